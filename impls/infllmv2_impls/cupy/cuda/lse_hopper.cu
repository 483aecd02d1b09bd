// The normaliser of stage 2 for Hopper GPUs: what `lse.cu` computes, with products of 64 rows.
//
// A tile has the queries of TOKENS tokens and all heads of their group as rows. Each of two groups
// of four warps has two sets of 64 rows, and both walk over the same ring of windows: while a group
// takes the exponentials of one set, the other set is multiplied. Blocks of threads stay, and take
// one tile after another: the thread that loads is ahead of them, by queries as well.
//
// Logarithms are to the base 2, with `scale * log2(e)` folded into the logits.
//
// Macros: BF16, GROUP (8, 16 or 32), D (64 or 128), SIZE, STRIDE (of the windows), BLOCK, STAGES.
#include "packing.cuh"
#include "rings.cuh"

constexpr int GROUPS = 2;
constexpr int SETS = 2;
constexpr int THREADS = 128 * (GROUPS + 1);
constexpr int ROWS = 64;
constexpr int ALL_ROWS = GROUPS * SETS * ROWS;
constexpr int TOKENS = ALL_ROWS / GROUP;
constexpr int WINDOWS = 128;  // of a step
constexpr int PANELS = D / 64;
constexpr int QUERY_PANEL = ALL_ROWS * 128;  // bytes
constexpr int WINDOW_PANEL = WINDOWS * 128;
constexpr int BUFFERS = 2;                   // of queries
constexpr float LOWEST = -3.0e38f;           // below every logit, and finite: differences are
constexpr float MUCH = 1.15e18f;             // 2**60: sums of so much are still far from infinity

struct Shared {
    alignas(1024) uint8_t queries[BUFFERS][PANELS * QUERY_PANEL];
    alignas(1024) uint8_t windows[STAGES][PANELS * WINDOW_PANEL];
    uint64_t queries_full[BUFFERS];
    uint64_t queries_empty[BUFFERS];
    uint64_t full[STAGES];
    uint64_t empty[STAGES];
};

struct Batch {
    const int* ends_q;
    const int* ends_k;
    const int* starts_c;
    int size, slots, kv_heads, dense_len, covered;

    __device__ int items() const { return slots * kv_heads; }
    __device__ int rounds() const { return (items() + gridDim.x - 1) / gridDim.x; }
};

// A tile of one kv head: `here` tokens from row `start` on, and all windows that they see.
struct Work {
    int kv_head, start, here, past;
    int window_row;  // of the sequence's first window
    int steps;

    __device__ Work(const Batch& batch, int item) {
        const bool exists = item < batch.items();
        kv_head = item % batch.kv_heads;
        // The longest rows first.
        const int slot = exists ? batch.slots - 1 - item / batch.kv_heads : 0;
        const Tile at = find_tile(slot, batch.ends_q, batch.size, TOKENS);
        const int keys = length_of(batch.ends_k, at.sequence);
        start = at.start + at.first;
        here = at.rows - at.first < TOKENS ? at.rows - at.first : TOKENS;
        past = keys - at.rows + at.first;  // position of the first token
        window_row = batch.starts_c[at.sequence];
        const int last = past + here - 1;
        const bool is_asked = exists && here > 0 && keys >= batch.dense_len &&
                              last / BLOCK >= batch.covered;
        // Without a window there is one step as well: it writes -inf.
        const int count = num_windows(last + 1, SIZE, STRIDE);
        steps = is_asked ? (count > 0 ? (count + WINDOWS - 1) / WINDOWS : 1) : 0;
    }
};

// ---- the thread that loads ----

static __device__ __forceinline__ void load(Shared& shared, const Batch& batch,
                                            const TensorMap* queries, const TensorMap* windows) {
    Place<BUFFERS> buffer;
    Place<STAGES> stage;
    for (int round = 0; round < batch.rounds(); ++round) {
        const Work work(batch, item_of(round));
        if (work.steps == 0) continue;
        barrier_wait(&shared.queries_empty[buffer.at], buffer.round ^ 1);
        barrier_expect(&shared.queries_full[buffer.at], PANELS * QUERY_PANEL);
        for (int p = 0; p < PANELS; ++p)
            copy_box(shared.queries[buffer.at] + p * QUERY_PANEL, queries, p * 64,
                     work.kv_head * GROUP, work.start, &shared.queries_full[buffer.at]);
        buffer.advance();
        for (int t = 0; t < work.steps; ++t) {
            barrier_wait(&shared.empty[stage.at], stage.round ^ 1);
            barrier_expect(&shared.full[stage.at], PANELS * WINDOW_PANEL);
            for (int p = 0; p < PANELS; ++p)
                copy_box(shared.windows[stage.at] + p * WINDOW_PANEL, windows, p * 64,
                         work.kv_head, work.window_row + t * WINDOWS, &shared.full[stage.at]);
            stage.advance();
        }
    }
}

// ---- one group of warps ----

static __device__ __forceinline__ void multiply(float (&acc)[64], const uint8_t* queries,
                                                const uint8_t* windows) {
    const uint32_t a = rows_operand(queries), b = rows_operand(windows);
#pragma unroll
    for (int k = 0; k < D / 16; ++k)
        product_rows(acc, a + ((k / 4 * QUERY_PANEL + k % 4 * 32) >> 4),
                     b + ((k / 4 * WINDOW_PANEL + k % 4 * 32) >> 4), k > 0);
}

// What a thread knows of its two rows of a set: a logit that is at most 2**60 below all others in
// its columns, and the sum of 2**(logit - top).
struct Running {
    float top[2] = {LOWEST, LOWEST};
    float total[2] = {0.0f, 0.0f};

    // Tops rise only where sums would grow too large otherwise: that needs no maximum.
    __device__ __forceinline__ void add(const float (&logits)[64], float scale, bool is_first) {
        float sums[2] = {MUCH, MUCH};
        if (!is_first) sum(logits, scale, sums);
        if (fmaxf(sums[0], sums[1]) >= MUCH) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float high = logits[2 * h];
#pragma unroll
                for (int j = 0; j < 16; ++j)
                    high = fmaxf(high, fmaxf(logits[4 * j + 2 * h], logits[4 * j + 2 * h + 1]));
                const float above = fmaxf(top[h], high * scale);
                total[h] *= exp2_fast(top[h] - above);
                top[h] = above;
            }
            sum(logits, scale, sums);
        }
        total[0] += sums[0];
        total[1] += sums[1];
        settle(total[0] + total[1]);
    }

    __device__ __forceinline__ void sum(const float (&logits)[64], float scale,
                                        float (&sums)[2]) const {
        float part[4] = {};  // chains of additions
#pragma unroll
        for (int i = 0; i < 64; ++i)
            part[i % 4] += exp2_fast(fmaf(logits[i], scale, -top[i / 2 % 2]));
        sums[0] = part[0] + part[1];
        sums[1] = part[2] + part[3];
    }

    // The LSE of a row, put together from its four threads.
    __device__ float merge(int h) const {
        float high = top[h], sum = total[h];
        for (int other = 1; other < 4; other *= 2) {
            const float top_there = __shfl_xor_sync(ALL_LANES, high, other);
            const float sum_there = __shfl_xor_sync(ALL_LANES, sum, other);
            const float above = fmaxf(high, top_there);
            sum = sum * exp2_fast(high - above) + sum_there * exp2_fast(top_there - above);
            high = above;
        }
        return sum > 0.0f ? high + log2_fast(sum) : NEGATIVE_INFINITY;
    }
};

// Hide what a row does not see; `left` windows of the step are visible to it.
static __device__ __forceinline__ void add_visible(Running& running, const float (&logits)[64],
                                                   float scale, const int (&left)[2]) {
    const int column = threadIdx.x % 4 * 2;
    float seen[64];
#pragma unroll
    for (int i = 0; i < 64; ++i) {
        const bool is_visible = i / 4 * 8 + column + i % 2 < left[i / 2 % 2];
        seen[i] = is_visible ? logits[i] : NEGATIVE_INFINITY;
    }
    running.add(seen, scale, true);
}

static __device__ __forceinline__ void sum_windows(Shared& shared, const Batch& batch, int group,
                                                   float* lse, float scale) {
    const int lane = threadIdx.x % 32;
    const int row = group * SETS * ROWS + threadIdx.x % 128 / 32 * 16 + lane / 4;  // of set 0
    const int heads = batch.kv_heads * GROUP;
    Place<BUFFERS> buffer;
    Place<STAGES> stage;
    float first[64], second[64];  // logits of the two sets
#pragma unroll 1
    for (int round = 0; round < batch.rounds(); ++round) {
        const Work work(batch, item_of(round));
        const int steps = __shfl_sync(ALL_LANES, work.steps, 0);
        if (steps == 0) continue;
        const int whole = num_windows(work.past + 1, SIZE, STRIDE);  // visible to all tokens
        const uint8_t* queries = shared.queries[buffer.at] + group * SETS * ROWS * 128;
        Running running[SETS];
        auto add = [&](const float (&logits)[64], int set, int t) {
            if ((t + 1) * WINDOWS <= whole) {
                running[set].add(logits, scale, t == 0);
            } else {
                const int token = (row + set * ROWS) / GROUP, other = (row + set * ROWS + 8) / GROUP;
                add_visible(running[set], logits, scale,
                            {num_windows(work.past + token + 1, SIZE, STRIDE) - t * WINDOWS,
                             num_windows(work.past + other + 1, SIZE, STRIDE) - t * WINDOWS});
            }
        };
        auto start = [&](float (&logits)[64], int set) {
            products_fence();
            multiply(logits, queries + set * ROWS * 128, shared.windows[stage.at]);
            products_commit();
        };
        barrier_wait(&shared.queries_full[buffer.at], buffer.round);
        barrier_wait(&shared.full[stage.at], stage.round);
        start(first, 0);
        // No product is started in a branch: ptxas would put a wait behind every one.
#pragma unroll 1
        for (int t = 0; t < steps - 1; ++t) {
            start(second, 1);
            products_wait<1>();
            products_done(first);
            add(first, 0, t);
            const int done = stage.at;
            stage.advance();
            barrier_wait(&shared.full[stage.at], stage.round);
            start(first, 0);
            products_wait<1>();
            products_done(second);
            release(&shared.empty[done]);
            add(second, 1, t);
        }
        start(second, 1);
        products_wait<1>();
        products_done(first);
        add(first, 0, steps - 1);
        products_wait<0>();
        products_done(second);
        release(&shared.empty[stage.at]);
        release(&shared.queries_empty[buffer.at]);
        stage.advance();
        buffer.advance();
        add(second, 1, steps - 1);

#pragma unroll
        for (int i = 0; i < 2 * SETS; ++i) {
            const float result = running[i / 2].merge(i % 2);
            const int at = row + i / 2 * ROWS + i % 2 * 8;
            if (lane % 4 == 0 && at / GROUP < work.here)
                lse[int64_t(work.start + at / GROUP) * heads + work.kv_head * GROUP + at % GROUP] =
                    result;
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    lse_hopper(const __grid_constant__ TensorMap queries, const __grid_constant__ TensorMap windows,
               float* __restrict__ lse, const int* __restrict__ ends_q,
               const int* __restrict__ ends_k, const int* __restrict__ starts_c, int batch,
               int slots, int kv_heads, int dense_len, int covered, float scale) {
    DYNAMIC_SHARED(uint8_t, memory);
    if (shared_address(memory) % 1024 != 0) __trap();  // swizzles count from there
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    if (threadIdx.x == 0) {
        for (int buffer = 0; buffer < BUFFERS; ++buffer) {
            barrier_init(&shared.queries_full[buffer], 1);
            barrier_init(&shared.queries_empty[buffer], GROUPS * 4);
        }
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(&shared.full[stage], 1);
            barrier_init(&shared.empty[stage], GROUPS * 4);  // one for each warp that multiplies
        }
        fence_barrier_init();
    }
    __syncthreads();
    const Batch all = {ends_q, ends_k, starts_c, batch, slots, kv_heads, dense_len, covered};
    const int group = __shfl_sync(ALL_LANES, threadIdx.x / 128, 0);
    if (group == GROUPS) {
        give_registers<24>();
        if (threadIdx.x == 128 * GROUPS) load(shared, all, &queries, &windows);
    } else {
        take_registers<240>();
        sum_windows(shared, all, group, lse, scale);
    }
}
