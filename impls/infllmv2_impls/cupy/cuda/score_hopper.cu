// Stages 2 and 3 for Hopper GPUs: scores of blocks, as `score.cu` with POOLED pools them.
//
// Products are windows by queries: 64 windows, 128 columns. Each of two groups of four warps has
// its own columns, the heads of TOKENS tokens, for good; both walk over the same ring of windows,
// which one thread fills. 8 columns are the same heads of neighbouring tokens, so a thread sums
// over heads in registers. While it takes the exponentials of one tile, the next one is multiplied.
//
// The windows are cut into four parts, and a warp walks over one of them, 16 windows in a tile:
// blocks are pooled within a warp. What the last windows of a part leave to the first block of the
// next is added at the end.
//
// Macros: BF16, GROUP (8, 16 or 32), D (64 or 128), SIZE, STRIDE (of K_C1), BLOCK, ALL_VISIBLE (the
// windows of blocks that compete have ended for sure), BY_SLOT (see `Lines` of packing.py), STAGES.
#include "hopper.cuh"
#include "packing.cuh"

constexpr int GROUPS = 2;
constexpr int THREADS = 128 * (GROUPS + 1);
constexpr int COLUMNS = 128;
constexpr int TOKENS = COLUMNS / GROUP;           // of a group
constexpr int BOX = TOKENS < 8 ? TOKENS : 8;      // tokens of one box of queries
constexpr int SETS = TOKENS / BOX;                // boxes, each with all heads
constexpr int PANELS = D / 64;
constexpr int QUERY_PANEL = COLUMNS * 128;        // bytes
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
    alignas(1024) uint8_t queries[GROUPS][PANELS * QUERY_PANEL];
    alignas(1024) uint8_t windows[STAGES][TILE_BYTES];
    alignas(16) float sums[GROUPS * 4][TOKENS * SUM_ROW];  // of two tiles, over heads
    float norms[GROUPS][COLUMNS];
    float seams[GROUPS][4][TOKENS];
    uint64_t queries_full;
    uint64_t full[STAGES];
    uint64_t empty[STAGES];
};

// What a block of threads does: `here` tokens from row `start` on, and `all` windows of each.
struct Work {
    int kv_head, start, here, past, all;
    int window_row;  // of the sequence's first window
    int each, steps;  // windows of a part, and its tiles
};

// ---- the thread that loads ----

static __device__ __forceinline__ void load(Shared& shared, const Work& work,
                                            const TensorMap* queries, const TensorMap* windows) {
    barrier_expect(&shared.queries_full, sizeof(shared.queries));
    for (int i = 0; i < GROUPS * SETS; ++i) {
        for (int p = 0; p < PANELS; ++p)
            copy_box(shared.queries[i / SETS] + p * QUERY_PANEL + i % SETS * BOX * GROUP * 128,
                     queries, p * 64, work.start + i * BOX, work.kv_head * GROUP,
                     &shared.queries_full);
    }
    for (int t = 0; t < work.steps; ++t) {
        const int stage = t % STAGES;
        barrier_wait(&shared.empty[stage], ((t / STAGES) & 1) ^ 1);
        barrier_expect(&shared.full[stage], TILE_BYTES);
        for (int warp = 0; warp < 4; ++warp) {
            for (int p = 0; p < PANELS; ++p)
                copy_box(shared.windows[stage] + p * PANEL + warp * PART * 128, windows, p * 64,
                         work.kv_head, work.window_row + warp * work.each + t * PART,
                         &shared.full[stage]);
        }
    }
}

// ---- one group of warps ----

// log2(2**a + 2**b), also of -inf.
static __device__ __forceinline__ float merge(float a, float b) {
    const float high = fmaxf(a, b), low = fminf(a, b);
    return low == NEGATIVE_INFINITY ? high : high + log2_fast(1.0f + exp2_fast(low - high));
}

// The LSE of this thread's column, with the opposite sign; -inf without one: score 0.
static __device__ __forceinline__ float load_norm(const float* lse, const Work& work, int group,
                                                  int heads, int parts, int64_t part_stride) {
    const int column = threadIdx.x % COLUMNS;
    const int row = column % (BOX * GROUP);
    const int token = (group * SETS + column / (BOX * GROUP)) * BOX + row % BOX;
    float norm = NEGATIVE_INFINITY;
    if (token < work.here) {
        lse += int64_t(work.start + token) * heads + work.kv_head * GROUP + row / BOX;
        for (int part = 0; part < parts; ++part) norm = merge(norm, lse[part * part_stride]);
    }
    return norm == NEGATIVE_INFINITY ? NEGATIVE_INFINITY : -norm;
}

static __device__ __forceinline__ void multiply(float (&acc)[64], const uint8_t* windows,
                                                const uint8_t* queries) {
    const uint64_t a = rows_descriptor(shared_address(windows)),
                   b = rows_descriptor(shared_address(queries));
#pragma unroll
    for (int k = 0; k < D / 16; ++k)
        product_rows(acc, further(a, (k / 4 * PANEL + k % 4 * 32) >> 4),
                     further(b, (k / 4 * QUERY_PANEL + k % 4 * 32) >> 4), k > 0);
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

static __device__ __forceinline__ void release(uint64_t* barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

static __device__ __forceinline__ void score_windows(Shared& shared, const Work& work, int group,
                                                     const float* lse, int heads, int lse_parts,
                                                     int64_t part_stride, float* out, int columns,
                                                     float scale) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int here = work.here - group * TOKENS, past = work.past + group * TOKENS;
    shared.norms[group][threadIdx.x % 128] =
        load_norm(lse, work, group, heads, lse_parts, part_stride);
    barrier_sync(group + 1, 128);
    float norms[32];
#pragma unroll
    for (int i = 0; i < 32; ++i) norms[i] = shared.norms[group][i / 2 * 8 + lane % 4 * 2 + i % 2];

    const int begin = warp * work.each, steps = work.steps;
    float* sums = shared.sums[group * 4 + warp];
    out += int64_t(group) * TOKENS * columns + begin / PER;
    Pool pool;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) pool.before[i] = NEGATIVE_INFINITY;
    auto pool_pair = [&](int t) {
        const int c = begin + t * PART;
        const int end = min(work.each, work.all - begin);
        pool.pool(sums, out + t * PART / PER, end - t * PART, c, here, past, columns);
    };

    const uint8_t* queries = shared.queries[group];
    auto start = [&](float (&acc)[64], int t) {
        barrier_wait(&shared.full[t % STAGES], (t / STAGES) & 1);
        products_fence();
        multiply(acc, shared.windows[t % STAGES], queries);
        products_commit();
    };
    auto finish = [&](float (&acc)[64], int t) {
        products_done(acc);
        release(&shared.empty[t % STAGES]);
    };
    auto sum = [&](const float (&acc)[64], float* to) {
        float found[SETS][4];
        sum_heads(acc, norms, scale, found);
        __syncwarp();  // what is there was read
        store(found, to);
    };
    float even[64], odd[64];
    barrier_wait(&shared.queries_full, 0);
    start(even, 0);
    int t = 0;
    // No product is started in a branch: ptxas would put a wait behind every one.
#pragma unroll 1
    for (; t + 2 < steps; t += 2) {
        start(odd, t + 1);
        products_wait<1>();
        finish(even, t);
        if (t > 0) pool_pair(t - 2);
        sum(even, sums);
        start(even, t + 2);
        products_wait<1>();
        finish(odd, t + 1);
        sum(odd, sums + PART);
        __syncwarp();
    }
    if (t > 0) pool_pair(t - 2);
    if (t + 1 < steps) {
        start(odd, t + 1);
        products_wait<1>();
        finish(even, t);
        sum(even, sums);
        products_wait<0>();
        finish(odd, t + 1);
        sum(odd, sums + PART);
    } else {
        products_wait<0>();
        finish(even, t);
        sum(even, sums);
    }
    __syncwarp();
    pool_pair(t);

    if (EXTRA == 0) return;
    // The last block of a part that is followed by another one is that of its last step.
    const int end = steps % 2 == 0 ? BLOCKS : BLOCKS / 2;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        const int token = (32 * i + lane) / BLOCKS;
        if (token < TOKENS && lane % BLOCKS == end - 1)
            shared.seams[group][warp][token] = pool.before[i];
    }
    barrier_sync(group + 1, 128);
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        const int token = (32 * i + lane) / BLOCKS;
        if (warp > 0 && lane % BLOCKS == 0 && token < TOKENS && token < here && begin < work.all) {
            float& first = out[int64_t(token) * columns];  // this thread has written it
            first = fmaxf(first, shared.seams[group][warp - 1][token]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    score_hopper(const __grid_constant__ TensorMap queries,
                 const __grid_constant__ TensorMap windows, const float* __restrict__ lse,
                 float* __restrict__ scores, const int* __restrict__ ends_q,
                 const int* __restrict__ ends_k, const int* __restrict__ starts_c, int batch,
                 int total_q, int dense_len, int covered, int local, int first_slot, int lines,
                 int columns, int lse_parts, float scale) {
    DYNAMIC_SHARED(uint8_t, memory);
    if (shared_address(memory) % 1024 != 0) __trap();  // swizzles count from there
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    constexpr int TILE = GROUPS * TOKENS;
    const int slot = gridDim.x - 1 - blockIdx.x;  // the longest rows first
    const Tile at = find_tile(first_slot + slot, ends_q, batch, TILE);
    const int keys = length_of(ends_k, at.sequence);
    const int here = at.rows - at.first < TILE ? at.rows - at.first : TILE;
    const int past = keys - at.rows + at.first;  // position of the first token
    const int last = past + here - 1;
    // Also blocks without a window get their -inf.
    const int all = (last / BLOCK - local + 1) * PER;
    if (here <= 0 || keys < dense_len || last / BLOCK < covered || all <= 0) return;

    const int steps = (all + 4 * PART - 1) / (4 * PART);
    const int start = at.start + at.first;
    const Work work = {int(blockIdx.y), start,       here, past, all, starts_c[at.sequence],
                       steps * PART,    steps};
    if (threadIdx.x == 0) {
        barrier_init(&shared.queries_full, 1);
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(&shared.full[stage], 1);
            barrier_init(&shared.empty[stage], GROUPS * 4);  // one for each warp that multiplies
        }
        fence_barrier_init();
    }
    __syncthreads();
    const int group = __shfl_sync(ALL_LANES, threadIdx.x / 128, 0);
    if (group == GROUPS) {
        give_registers<24>();
        if (threadIdx.x == 128 * GROUPS) load(shared, work, &queries, &windows);
    } else {
        take_registers<240>();
        const int heads = gridDim.y * GROUP;
        const int64_t line = BY_SLOT ? slot * TILE : start;
        score_windows(shared, work, group, lse, heads, lse_parts, int64_t(total_q) * heads,
                      scores + (int64_t(work.kv_head) * lines + line) * columns, columns, scale);
    }
}
