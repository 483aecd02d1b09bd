// Stages 2 and 3: scores of windows, summed over the heads of a group, and pooled into blocks.
//
// A block of threads holds the queries of TOKENS tokens and all heads of their group, and walks
// over the windows. The product is transposed, windows by queries, and 8 columns of the tensor core
// are 8 tokens of one head. So a warp, which has 8 tokens and HEADS heads, keeps its queries in
// registers for good, and a thread has the logits of one token and all its heads: what is left of
// a tile after the sum over them is small, and goes through shared memory, where the warps of one
// group are summed and windows are pooled. That happens one tile later, beside the next product,
// so that one barrier for each tile is enough.
//
// Macros: BF16, GROUP, GROUP_PAD (a power of two), D, SIZE, STRIDE (of K_C1), BLOCK, POOLED (write
// blocks that compete, not windows), ALL_VISIBLE (their windows have ended for sure), BY_SLOT (see
// `Lines` of packing.py), HEADS (of one warp), TOKEN_GROUPS (of 8 tokens), TILE_WINDOWS (of one
// step), ROW_TILES (of 16 windows in registers at a time), STAGES (tiles of windows in shared
// memory), RESIDENT (blocks of threads that must fit a multiprocessor).
#include "windows.cuh"

constexpr int SPLITS = GROUP_PAD / HEADS;  // warps that share 8 tokens
constexpr int THREADS = 32 * SPLITS * TOKEN_GROUPS;
constexpr int TOKENS = 8 * TOKEN_GROUPS;
constexpr int STEPS = D / 16;
#if POOLED
constexpr int PER = BLOCK / STRIDE;         // windows that begin in a block
constexpr int EXTRA = SIZE / STRIDE - 1;    // windows of the block before that reach into it
#else
constexpr int PER = 1;
constexpr int EXTRA = 0;
#endif
constexpr int BLOCKS = TILE_WINDOWS / PER;  // of a tile
constexpr int ITEMS = (TOKENS * BLOCKS + THREADS - 1) / THREADS;  // pooled by a thread
constexpr int AT_ONCE = EXTRA > 0 ? ITEMS : 1;  // what is left to the next tile is in registers
// Sums over HEADS heads, [SPLITS][TOKENS][SUM_ROW]: four pairs of rows lie in different banks.
constexpr int SUM_ROW = TILE_WINDOWS + 4;
constexpr int SUMS = SPLITS * TOKENS * SUM_ROW;
static_assert(EXTRA == 0 || BLOCKS <= 32, "a warp pools the blocks of a tile");

struct alignas(16) Four {
    float of[4];
};

// log2(2**a + 2**b), also of -inf.
__device__ inline float merge(float a, float b) {
    const float high = fmaxf(a, b);
    const float low = fminf(a, b);
    return low == NEGATIVE_INFINITY ? high : high + log2_fast(1.0f + exp2_fast(low - high));
}

// The LSEs of this thread's columns, put together from parts; +inf without one: score 0. The 8
// threads of the same columns take the parts in turn.
__device__ inline void load_norms(float (&norms)[HEADS][2], const float* __restrict__ lse, int head,
                                  int tokens, int heads, int parts, long long part_stride) {
    const int lane = threadIdx.x % 32;
    const int token = lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < HEADS; ++i) norms[i][0] = norms[i][1] = NEGATIVE_INFINITY;
    for (int part = lane / 4; part < parts; part += 8) {
        const float* from = lse + part * part_stride;
#pragma unroll
        for (int i = 0; i < 2 * HEADS; ++i) {
            const int member = i / 2;
            if (head + member < GROUP && token + i % 2 < tokens) {
                float& norm = norms[member][i % 2];
                norm = merge(norm, from[(token + i % 2) * heads + member]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 2 * HEADS; ++i) {
        float& norm = norms[i / 2][i % 2];
        for (int other = 4; other < 32 && parts > 1; other *= 2) {
            norm = merge(norm, __shfl_xor_sync(ALL_LANES, norm, other));
        }
        norm = parts > 1 ? norm : __shfl_sync(ALL_LANES, norm, lane % 4);
        norm = norm == NEGATIVE_INFINITY ? POSITIVE_INFINITY : norm;
    }
}

// Pools tile after tile of the sums of heads. `before` is what the last tile leaves to the next.
struct Pool {
    float before[ITEMS];

    __device__ void pool(const float* sums, float* __restrict__ out, int c, int end, int here,
                         int past, int columns, bool is_wanted) {
#pragma unroll AT_ONCE
        for (int i = 0; i < ITEMS; ++i) {
            const int item = i * THREADS + threadIdx.x;
            const int token = item / BLOCKS;
            const int block = item % BLOCKS;
            const bool exists = TOKENS * BLOCKS % THREADS == 0 || token < TOKENS;
            const int visible = ALL_VISIBLE ? 0 : num_windows(past + token + 1, SIZE, STRIDE);
            float best = NEGATIVE_INFINITY;
            float late = NEGATIVE_INFINITY;  // of the windows that reach into the next block
            constexpr int STEP = PER < 4 ? PER : 4;
            const float* from = sums + (exists ? token * SUM_ROW + block * PER : 0);
#pragma unroll
            for (int p = 0; p < PER; p += STEP) {
                float scores[STEP];
                sum_splits(scores, from + p);
#pragma unroll
                for (int k = 0; k < STEP; ++k) {
                    float score = scores[k];
                    if (POOLED) score = score >= 0.0f ? score : 0.0f;  // NaN would take no place
                    const int window = c + block * PER + p + k;
                    if (!ALL_VISIBLE && window >= visible) score = NEGATIVE_INFINITY;
                    best = POOLED ? fmaxf(best, score) : score;
                    if (p + k >= PER - EXTRA) late = fmaxf(late, score);
                }
            }
            if (EXTRA > 0) {
                const int lane = threadIdx.x % 32;
                const int previous = block == 0 ? lane + BLOCKS - 1 : lane - 1;
                const float source = block == BLOCKS - 1 ? before[i] : late;
                best = fmaxf(best, __shfl_sync(ALL_LANES, source, previous));
                before[i] = late;
            }
            if (exists && is_wanted && token < here && c + block * PER < end) {
                out[static_cast<long long>(token) * columns + c / PER + block] = best;
            }
        }
    }

    template <int N>
    __device__ static void sum_splits(float (&scores)[N], const float* from) {
#pragma unroll
        for (int split = 0; split < SPLITS; ++split) {
            const float* at = from + split * TOKENS * SUM_ROW;
            float more[N];
            if (N == 4) {
                const Four four = *reinterpret_cast<const Four*>(at);
#pragma unroll
                for (int k = 0; k < N; ++k) more[k] = four.of[k];
            } else {
#pragma unroll
                for (int k = 0; k < N; ++k) more[k] = at[k];
            }
#pragma unroll
            for (int k = 0; k < N; ++k) scores[k] = split == 0 ? more[k] : scores[k] + more[k];
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
score_kernel(const half_t* __restrict__ q, const half_t* __restrict__ windows,
             const float* __restrict__ lse, float* __restrict__ scores,
             const int* __restrict__ ends_q, const int* __restrict__ ends_k,
             const int* __restrict__ starts_c, int batch, int total_q, int dense_len, int covered,
             int local, int first_slot, int lines, int columns, int lse_parts,
             long long q_row_stride, long long q_head_stride, int c_row_stride,
             long long c_head_stride, float scale) {
    DYNAMIC_SHARED(half_t, tiles);
    float* const sums = reinterpret_cast<float*>(tiles + STAGES * WINDOW_TILE);
    const int kv_head = blockIdx.y;
    const int slot = gridDim.x - 1 - blockIdx.x;  // the longest rows first
    const Tile at = find_tile(first_slot + slot, ends_q, batch, TOKENS);
    const int keys = length_of(ends_k, at.sequence);
    const int past = keys - at.rows + at.first;  // position of the first token
    const int here = at.rows - at.first < TOKENS ? at.rows - at.first : TOKENS;
    const int last = past + here - 1;
    if (here <= 0 || keys < dense_len || last / BLOCK < covered) return;

    const int count = num_windows(keys, SIZE, STRIDE);
    // Also blocks without a window get their -inf.
    const int all = POOLED ? (last / BLOCK - local + 1) * PER : num_windows(last + 1, SIZE, STRIDE);
    const Range part = share(all > 0 ? all : 0, blockIdx.z, gridDim.z, TILE_WINDOWS);
    if (part.begin >= part.end) return;
    // The tile before the first block tells what reaches into it.
    const int begin = EXTRA > 0 && part.begin > 0 ? part.begin - TILE_WINDOWS : part.begin;
    const half_t* from = windows + static_cast<long long>(starts_c[at.sequence]) * c_row_stride +
                         kv_head * c_head_stride;
    auto start_copy = [&](int c, int stage) {
        if (c < part.end) {
            copy_windows<THREADS>(tiles + stage * WINDOW_TILE,
                                  from + static_cast<long long>(c) * c_row_stride, c_row_stride,
                                  count - c);
        }
        copy_commit();  // also of nothing, so that waiting can count
    };
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) start_copy(begin + i * TILE_WINDOWS, i);

    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    const int split = warp % SPLITS;
    const int group = warp / SPLITS * 8;  // the first token of this warp
    const int head = split * HEADS;
    const int start = at.start + at.first;
    uint32_t queries[HEADS][STEPS][2];
#pragma unroll
    for (int i = 0; i < HEADS; ++i) {
        const bool exists = group + lane / 4 < here && head + i < GROUP;
        const half_t* query = q + (start + group + lane / 4) * q_row_stride +
                              (kv_head * GROUP + head + i) * q_head_stride + lane % 4 * 2;
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            queries[i][step][0] = load_pair(query + 16 * step, exists);
            queries[i][step][1] = load_pair(query + 16 * step + 8, exists);
        }
    }
    float norms[HEADS][2];
    const int heads = gridDim.y * GROUP;
    load_norms(norms, lse + static_cast<long long>(start + group) * heads + kv_head * GROUP + head,
               head, here - group, heads, lse_parts, static_cast<long long>(total_q) * heads);

    const long long line = BY_SLOT ? slot * TOKENS : start;
    float* out = scores + (static_cast<long long>(kv_head) * lines + line) * columns;
    Pool pool;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) pool.before[i] = NEGATIVE_INFINITY;

    int stage = 0;
    int turn = 0;
    for (int c = begin; c < part.end; c += TILE_WINDOWS) {
        copy_wait<STAGES - 2>();
        __syncthreads();  // this tile is there, and so are the sums of the one before
        start_copy(c + (STAGES - 1) * TILE_WINDOWS, stage == 0 ? STAGES - 1 : stage - 1);
        if (c > begin) {
            pool.pool(sums + (turn ^ 1) * SUMS, out, c - TILE_WINDOWS, part.end, here, past,
                      columns, c > part.begin);
        }
        const half_t* tile = tiles + stage * WINDOW_TILE + lane % 16 * WINDOW_ROW + lane / 16 * 8;
        // This thread's first token, and the first of its windows.
        float* sums_at = sums + turn * SUMS +
                         (split * TOKENS + group + lane % 4 * 2) * SUM_ROW + lane / 4;
#pragma unroll 1
        for (int row = 0; row < TILE_WINDOWS; row += 16 * ROW_TILES) {
            float logits[ROW_TILES][HEADS][4] = {};
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
#pragma unroll
                for (int i = 0; i < ROW_TILES; ++i) {
                    uint32_t rows[4];
                    ldmatrix_x4(rows, tile + (row + 16 * i) * WINDOW_ROW + 16 * step);
#pragma unroll
                    for (int j = 0; j < HEADS; ++j) {
                        mma_16x8x16(logits[i][j], rows, queries[j][step]);
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < ROW_TILES; ++i) {
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    float sum = exp2_fast(logits[i][0][k] * scale - norms[0][k % 2]);
#pragma unroll
                    for (int j = 1; j < HEADS; ++j) {
                        sum += exp2_fast(logits[i][j][k] * scale - norms[j][k % 2]);
                    }
                    sums_at[k % 2 * SUM_ROW + row + 16 * i + k / 2 * 8] = sum;
                }
            }
        }
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        turn ^= 1;
    }
    copy_wait<0>();
    __syncthreads();
    const int c = begin + (part.end - begin - 1) / TILE_WINDOWS * TILE_WINDOWS;
    pool.pool(sums + (turn ^ 1) * SUMS, out, c, part.end, here, past, columns,
              c >= part.begin);
}
