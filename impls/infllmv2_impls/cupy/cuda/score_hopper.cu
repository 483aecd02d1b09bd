// Stages 2 and 3 for Hopper GPUs: scores of blocks, as `score.cu` with POOLED pools them.
//
// Products are windows by queries: 64 windows, 128 columns. Each of three groups of four warps has
// its own columns, the heads of TOKENS tokens, for good; all walk over the same ring of windows,
// which one thread fills. 8 columns are the same heads of neighbouring tokens, so a thread sums
// over heads in registers. While one group takes exponentials, another one multiplies. Blocks of
// threads stay, and take one set of tokens after another.
//
// The windows are cut into four parts, and a warp walks over one of them, 16 windows in a tile:
// blocks are pooled within a warp. What the last windows of a part leave to the first block of the
// next is added at the end.
//
// Macros: BF16, GROUP (8, 16 or 32), D (64 or 128), SIZE, STRIDE (of K_C1), BLOCK, ALL_VISIBLE (the
// windows of blocks that compete have ended for sure), BY_SLOT (see `Lines` of packing.py), STAGES.
#include "packing.cuh"
#include "rings.cuh"

constexpr int GROUPS = 3;
constexpr int THREADS = 128 * (GROUPS + 1);
constexpr int COLUMNS = 128;
constexpr int TOKENS = COLUMNS / GROUP;           // of a group
constexpr int BOX = TOKENS < 8 ? TOKENS : 8;      // tokens of one box of queries
constexpr int SETS = TOKENS / BOX;                // boxes, each with all heads
constexpr int PANELS = D / 64;
constexpr int QUERY_PANEL = COLUMNS * 128;        // bytes
constexpr int QUERY_BYTES = PANELS * QUERY_PANEL;
constexpr int TILE_BYTES = PANELS * PANEL;        // 64 windows
constexpr int PART = 16;                          // windows of a warp in a tile
constexpr int PER = BLOCK / STRIDE;               // windows that begin in a block
constexpr int EXTRA = SIZE / STRIDE - 1;          // windows of the block before that reach into it
constexpr int BLOCKS = 2 * PART / PER;            // of a warp in two tiles
constexpr int ITEMS = (TOKENS * BLOCKS + 31) / 32;  // pooled by a lane
// Tokens of a row: a warp's stores, and its loads of four, lie in different banks.
constexpr int SUM_ROW = 2 * PART + 4;
static_assert(PER <= PART && EXTRA <= PER && PART % PER == 0, "a tile has whole blocks");

struct Shared {
    alignas(1024) uint8_t queries[GROUPS][QUERY_BYTES];
    alignas(1024) uint8_t windows[STAGES][TILE_BYTES];
    alignas(16) float sums[GROUPS * 4][TOKENS * SUM_ROW];  // of two tiles, over heads
    float norms[GROUPS][COLUMNS];
    float seams[GROUPS][4][TOKENS];
    uint64_t queries_full[GROUPS];
    uint64_t queries_empty[GROUPS];
    uint64_t full[STAGES];
    uint64_t empty[STAGES];
};

struct Batch {
    const int* ends_q;
    const int* ends_k;
    const int* starts_c;
    int size, first_slot, slots, kv_heads, dense_len, covered, local;

    __device__ int items() const { return slots * kv_heads; }
    __device__ int rounds() const { return (items() + gridDim.x - 1) / gridDim.x; }
};

// What is done at a time: `here` tokens from row `start` on, and `all` windows of each.
struct Work {
    int kv_head, slot, start, here, past, all;
    int window_row;  // of the sequence's first window
    int steps;       // tiles; 0 at the end

    __device__ __forceinline__ int each() const { return steps * PART; }  // windows of a part

    __device__ Work(const Batch& batch, int item) {
        constexpr int TILE = GROUPS * TOKENS;
        const bool exists = item < batch.items();
        kv_head = item % batch.kv_heads;
        slot = exists ? batch.slots - 1 - item / batch.kv_heads : 0;  // the longest rows first
        const Tile at = find_tile(batch.first_slot + slot, batch.ends_q, batch.size, TILE);
        const int keys = length_of(batch.ends_k, at.sequence);
        start = at.start + at.first;
        here = at.rows - at.first < TILE ? at.rows - at.first : TILE;
        past = keys - at.rows + at.first;  // position of the first token
        window_row = batch.starts_c[at.sequence];
        const int last = past + here - 1;
        const bool is_asked = exists && here > 0 && keys >= batch.dense_len &&
                              last / BLOCK >= batch.covered;
        // Also blocks without a window get their -inf.
        all = (last / BLOCK - batch.local + 1) * PER;
        steps = is_asked && all > 0 ? (all + 4 * PART - 1) / (4 * PART) : 0;
    }

    // The next one of this block of threads from a round on, which moves behind it.
    static __device__ Work next(const Batch& batch, int& round) {
        Work work(batch, item_of(round++));
        while (work.steps == 0 && round < batch.rounds()) work = Work(batch, item_of(round++));
        return work;
    }
};

// ---- the thread that loads ----

static __device__ __forceinline__ void load(Shared& shared, const Batch& batch,
                                            const TensorMap* queries, const TensorMap* windows) {
    Place<STAGES> stage;
    int round = 0;
    uint32_t parity = 1;
    for (Work work = Work::next(batch, round); work.steps > 0; work = Work::next(batch, round)) {
        for (int group = 0; group < GROUPS; ++group) {
            barrier_wait(&shared.queries_empty[group], parity);
            barrier_expect(&shared.queries_full[group], QUERY_BYTES);
            for (int i = 0; i < SETS; ++i) {
                for (int p = 0; p < PANELS; ++p)
                    copy_box(shared.queries[group] + p * QUERY_PANEL + i * BOX * GROUP * 128,
                             queries, p * 64, work.start + (group * SETS + i) * BOX,
                             work.kv_head * GROUP, &shared.queries_full[group]);
            }
        }
        parity ^= 1;
        for (int t = 0; t < work.steps; ++t) {
            barrier_wait(&shared.empty[stage.at], stage.round ^ 1);
            barrier_expect(&shared.full[stage.at], TILE_BYTES);
            for (int warp = 0; warp < 4; ++warp) {
                for (int p = 0; p < PANELS; ++p)
                    copy_box(shared.windows[stage.at] + p * PANEL + warp * PART * 128, windows,
                             p * 64, work.kv_head, work.window_row + warp * work.each() + t * PART,
                             &shared.full[stage.at]);
            }
            stage.advance();
        }
    }
}

// ---- one group of warps ----

// log2(2**a + 2**b), also of -inf.
static __device__ __forceinline__ float merge(float a, float b) {
    const float high = fmaxf(a, b), low = fminf(a, b);
    return low == NEGATIVE_INFINITY ? high : high + log2_fast(1.0f + exp2_fast(low - high));
}

// The LSE of this thread's column, put together from parts; -inf without one. Of the first part
// nothing is asked yet, so that nobody waits for it.
static __device__ __forceinline__ float load_norm(const float* lse, const Work& work, int group,
                                                  int heads, int parts, int64_t part_stride) {
    const int column = threadIdx.x % COLUMNS;
    const int row = column % (BOX * GROUP);
    const int token = (group * SETS + column / (BOX * GROUP)) * BOX + row % BOX;
    if (token >= work.here || work.steps == 0) return NEGATIVE_INFINITY;
    lse += int64_t(work.start + token) * heads + work.kv_head * GROUP + row / BOX;
    float norm = lse[0];
    for (int part = 1; part < parts; ++part) norm = merge(norm, lse[part * part_stride]);
    return norm;
}

static __device__ __forceinline__ void multiply(float (&acc)[64], const uint8_t* windows,
                                                const uint8_t* queries) {
    const uint32_t a = rows_operand(windows), b = rows_operand(queries);
#pragma unroll
    for (int k = 0; k < D / 16; ++k)
        product_rows(acc, a + ((k / 4 * PANEL + k % 4 * 32) >> 4),
                     b + ((k / 4 * QUERY_PANEL + k % 4 * 32) >> 4), k > 0);
}

// Sum the shares of a tile over heads, and store them as [TOKENS][SUM_ROW]. A thread has two
// windows, and two tokens of each box.
static __device__ __forceinline__ void sum_heads(const float (&logits)[64],
                                                 const float (&norms)[32], float scale,
                                                 float (&sums)[SETS][4]) {
#pragma unroll
    for (int j = 0; j < 16; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            float& sum = sums[j * SETS / 16][k];
            const float share = exp2_fast(fmaf(logits[4 * j + k], scale, norms[2 * j + k % 2]));
            sum = j % (16 / SETS) == 0 ? share : sum + share;
        }
    }
#pragma unroll
    for (int i = 0; i < 4 && BOX < 8; ++i)
        sums[0][i] += __shfl_xor_sync(ALL_LANES, sums[0][i], 2);  // the other half of the heads
}

static __device__ __forceinline__ void store(const float (&sums)[SETS][4], float* to) {
    const int lane = threadIdx.x % 32;
    if (lane % 4 >= BOX / 2) return;
    to += lane % 4 * 2 * SUM_ROW + lane / 4;
#pragma unroll
    for (int i = 0; i < 4 * SETS; ++i)
        to[(i / 4 * BOX + i % 2) * SUM_ROW + i / 2 % 2 * 8] = sums[i / 4][i % 4];
}

// Pools two tiles at a time. `before` is what the last two leave to the next.
struct Pool {
    float before[ITEMS];

    // `out` is that of the first token and the first of these blocks; `left` windows follow it.
    __device__ __forceinline__ void pool(const float* sums, float* out, int left, int c, int here,
                                         int past, int columns) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            const int token = (32 * i + lane) / BLOCKS, block = lane % BLOCKS;
            const bool exists = TOKENS * BLOCKS % 32 == 0 || token < TOKENS;
            const int visible = ALL_VISIBLE ? 0 : num_windows(past + token + 1, SIZE, STRIDE);
            const float* from = sums + (exists ? token * SUM_ROW + block * PER : 0);
            float best = ALL_VISIBLE ? 0.0f : NEGATIVE_INFINITY, late = best;
#pragma unroll
            for (int p = 0; p < PER; ++p) {
                float score = fmaxf(from[p], 0.0f);  // NaN would take no place
                if (!ALL_VISIBLE && c + block * PER + p >= visible) score = NEGATIVE_INFINITY;
                best = fmaxf(best, score);
                if (p >= PER - EXTRA) late = fmaxf(late, score);
            }
            if (EXTRA > 0) {
                const int previous = block == 0 ? lane + BLOCKS - 1 : lane - 1;
                const float source = block == BLOCKS - 1 ? before[i] : late;
                best = fmaxf(best, __shfl_sync(ALL_LANES, source, previous));
                before[i] = late;
            }
            if (exists && token < here && block * PER < left)
                out[int64_t(token) * columns + block] = best;
        }
    }
};

struct Scores {
    float* data;
    int lines, columns;
};

struct Normaliser {
    const float* data;
    int parts;
    int64_t stride;  // of a part
};

static __device__ __forceinline__ void score_windows(Shared& shared, const Batch& batch, int group,
                                                     Normaliser lse, Scores scores, float scale) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int heads = batch.kv_heads * GROUP, columns = scores.columns;
    float* sums = shared.sums[group * 4 + warp];
    Place<STAGES> stage;
    uint32_t parity = 0;
    float logits[64], norms[32];
    int round = 0;
    Work work = Work::next(batch, round);
    float norm = load_norm(lse.data, work, group, heads, lse.parts, lse.stride);
#pragma unroll 1
    while (true) {
        const int steps = __shfl_sync(ALL_LANES, work.steps, 0);  // says that lanes agree
        if (steps == 0) break;
        // The opposite sign is a factor less; -inf without an LSE: score 0.
        shared.norms[group][threadIdx.x % 128] =
            norm == NEGATIVE_INFINITY ? NEGATIVE_INFINITY : -norm;
        barrier_sync(group + 1, 128);
#pragma unroll
        for (int i = 0; i < 32; ++i)
            norms[i] = shared.norms[group][i / 2 * 8 + lane % 4 * 2 + i % 2];
        const Work next = Work::next(batch, round);
        norm = load_norm(lse.data, next, group, heads, lse.parts, lse.stride);

        const int here = work.here - group * TOKENS, past = work.past + group * TOKENS;
        const int begin = warp * work.each(), end = min(work.each(), work.all - begin);
        const int64_t line = BY_SLOT ? work.slot * GROUPS * TOKENS : work.start;
        float* out = scores.data + begin / PER +
                     (int64_t(work.kv_head) * scores.lines + line + group * TOKENS) * columns;
        Pool pool;
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) pool.before[i] = NEGATIVE_INFINITY;
        auto pool_pair = [&](int t) {
            pool.pool(sums, out + t * PART / PER, end - t * PART, begin + t * PART, here, past,
                      columns);
        };
        barrier_wait(&shared.queries_full[group], parity);
        parity ^= 1;
#pragma unroll 1
        for (int t = 0; t < steps; ++t) {
            barrier_wait(&shared.full[stage.at], stage.round);
            products_fence();
            multiply(logits, shared.windows[stage.at], shared.queries[group]);
            products_commit();
            if (t % 2 == 0 && t > 0) pool_pair(t - 2);  // while the product runs
            products_wait<0>();
            products_done(logits);
            release(&shared.empty[stage.at]);
            stage.advance();
            float found[SETS][4];
            sum_heads(logits, norms, scale, found);
            store(found, sums + t % 2 * PART);
            __syncwarp();
        }
        release(&shared.queries_empty[group]);
        pool_pair((steps - 1) / 2 * 2);

        // The last block of a part that is followed by another one is that of its last step.
        const int last = (steps % 2 == 0 ? BLOCKS : BLOCKS / 2) - 1;
#pragma unroll
        for (int i = 0; i < ITEMS && EXTRA > 0; ++i) {
            const int token = (32 * i + lane) / BLOCKS;
            if (token < TOKENS && lane % BLOCKS == last)
                shared.seams[group][warp][token] = pool.before[i];
        }
        barrier_sync(group + 1, 128);  // and norms were read
#pragma unroll
        for (int i = 0; i < ITEMS && EXTRA > 0; ++i) {
            const int token = (32 * i + lane) / BLOCKS;
            const bool exists = token < TOKENS && token < here;
            if (warp > 0 && exists && lane % BLOCKS == 0 && end > 0) {
                float& first = out[int64_t(token) * columns];  // this thread has written it
                first = fmaxf(first, shared.seams[group][warp - 1][token]);
            }
        }
        work = next;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    score_hopper(const __grid_constant__ TensorMap queries,
                 const __grid_constant__ TensorMap windows, const float* __restrict__ lse,
                 float* __restrict__ scores, const int* __restrict__ ends_q,
                 const int* __restrict__ ends_k, const int* __restrict__ starts_c, int batch,
                 int total_q, int slots, int kv_heads, int dense_len, int covered, int local,
                 int first_slot, int lines, int columns, int lse_parts, float scale) {
    DYNAMIC_SHARED(uint8_t, memory);
    if (shared_address(memory) % 1024 != 0) __trap();  // swizzles count from there
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    if (threadIdx.x == 0) {
        for (int group = 0; group < GROUPS; ++group) {
            barrier_init(&shared.queries_full[group], 1);
            barrier_init(&shared.queries_empty[group], 4);
        }
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(&shared.full[stage], 1);
            barrier_init(&shared.empty[stage], GROUPS * 4);  // one for each warp that multiplies
        }
        fence_barrier_init();
    }
    __syncthreads();
    const Batch all = {ends_q, ends_k,   starts_c,  batch,   first_slot,
                       slots,  kv_heads, dense_len, covered, local};
    const int group = __shfl_sync(ALL_LANES, threadIdx.x / 128, 0);
    if (group == GROUPS) {
        give_registers<32>();
        if (threadIdx.x == 128 * GROUPS) load(shared, all, &queries, &windows);
    } else {
        take_registers<160>();
        score_windows(shared, all, group,
                      {lse, lse_parts, int64_t(total_q) * kv_heads * GROUP},
                      {scores, lines, columns}, scale);
    }
}
