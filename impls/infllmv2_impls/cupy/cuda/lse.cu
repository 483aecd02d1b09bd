// The normaliser of stage 2: per query and head, the logsumexp of its logits over visible windows.
//
// A block of threads holds the queries of some tokens and all heads of their group as rows, in
// registers, and walks over the windows. Each thread has its own running maximum and sum for each
// of its rows: threads never wait for another's maximum, and are put together at the end.
//
// Logarithms are to the base 2, with `scale * log2(e)` folded into the logits.
//
// Macros: BF16, GROUP, GROUP_PAD (a power of two), D, SIZE, STRIDE (of the windows), BLOCK, WARPS,
// ROW_TILES (of 16 rows, of a warp), TILE_WINDOWS (of one step), STAGES (tiles of windows in shared
// memory), RESIDENT (blocks of threads that must fit a multiprocessor).
#include "windows.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int ROWS = 16 * ROW_TILES;  // of a warp
constexpr int TOKENS = WARPS * ROWS / GROUP_PAD;
constexpr int STEPS = D / 16;
constexpr int CHUNK = 32;  // windows whose logits are in registers at a time
// Below every logit, and finite: a difference to it is never NaN.
constexpr float LOWEST = -3.0e38f;

// What a thread knows of a row: the highest logit so far, and the sum of 2**(logit - highest).
struct Running {
    float top = LOWEST;
    float total = 0.0f;

    __device__ void raise(float high) {
        if (high > top) {
            total *= exp2_fast(top - high);
            top = high;
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
lse_kernel(const half_t* __restrict__ q, const half_t* __restrict__ windows,
           float* __restrict__ lse, const int* __restrict__ ends_q, const int* __restrict__ ends_k,
           const int* __restrict__ starts_c, int batch, int total_q, int dense_len, int covered,
           long long q_row_stride, long long q_head_stride, int c_row_stride,
           long long c_head_stride, float scale) {
    DYNAMIC_SHARED(half_t, tiles);
    const int kv_head = blockIdx.y;
    const int slot = gridDim.x - 1 - blockIdx.x;  // the longest rows first
    const Tile at = find_tile(slot, ends_q, batch, TOKENS);
    const int keys = length_of(ends_k, at.sequence);
    const int past = keys - at.rows + at.first;  // position of the first token
    const int here = at.rows - at.first < TOKENS ? at.rows - at.first : TOKENS;
    const int last = past + here - 1;
    if (here <= 0 || keys < dense_len || last / BLOCK < covered) return;

    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    // This thread's rows are `row + 8 * i`.
    const int row = warp * ROWS + lane / 4;
    uint32_t queries[ROW_TILES][STEPS][4];
#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; ++i) {
        const int token = (row + 8 * i) / GROUP_PAD;
        const int member = (row + 8 * i) % GROUP_PAD;
        const bool exists = token < here && member < GROUP;
        const half_t* from = q + (at.start + at.first + token) * q_row_stride +
                             (kv_head * GROUP + member) * q_head_stride + lane % 4 * 2;
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            queries[i / 2][step][i % 2] = load_pair(from + 16 * step, exists);
            queries[i / 2][step][i % 2 + 2] = load_pair(from + 16 * step + 8, exists);
        }
    }

    const int count = num_windows(last + 1, SIZE, STRIDE);
    const int whole = num_windows(past + 1, SIZE, STRIDE);  // visible to all tokens
    const Range part = share(count, blockIdx.z, gridDim.z, TILE_WINDOWS);
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
    for (int i = 0; i < STAGES - 1; ++i) start_copy(part.begin + i * TILE_WINDOWS, i);

    Running running[2 * ROW_TILES];
    int stage = 0;
    for (int c = part.begin; c < part.end; c += TILE_WINDOWS) {
        copy_wait<STAGES - 2>();
        __syncthreads();  // this tile is there, and all are done with the one before
        start_copy(c + (STAGES - 1) * TILE_WINDOWS, stage == 0 ? STAGES - 1 : stage - 1);
        // Rows of an 8x8 matrix are windows, as the tensor core wants its second factor.
        const half_t* tile = tiles + stage * WINDOW_TILE +
                             (lane % 8 + lane / 16 * 8) * WINDOW_ROW + lane / 8 % 2 * 8;
#pragma unroll 1
        for (int begin = 0; begin < TILE_WINDOWS; begin += CHUNK) {
            float logits[ROW_TILES][CHUNK / 8][4] = {};
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
#pragma unroll
                for (int pair = 0; pair < CHUNK / 16; ++pair) {
                    uint32_t keys_of[4];
                    ldmatrix_x4(keys_of,
                                tile + (begin + 16 * pair) * WINDOW_ROW + 16 * step);
                    const uint32_t low[2] = {keys_of[0], keys_of[1]};
                    const uint32_t high[2] = {keys_of[2], keys_of[3]};
#pragma unroll
                    for (int i = 0; i < ROW_TILES; ++i) {
                        mma_16x8x16(logits[i][2 * pair], queries[i][step], low);
                        mma_16x8x16(logits[i][2 * pair + 1], queries[i][step], high);
                    }
                }
            }
            if (c + begin + CHUNK > whole) {
#pragma unroll
                for (int i = 0; i < 2 * ROW_TILES; ++i) {
                    const int token = (row + 8 * i) / GROUP_PAD;
                    const int visible = num_windows(past + token + 1, SIZE, STRIDE);
#pragma unroll
                    for (int j = 0; j < CHUNK / 4; ++j) {
                        const int window = c + begin + j / 2 * 8 + lane % 4 * 2 + j % 2;
                        float& logit = logits[i / 2][j / 2][i % 2 * 2 + j % 2];
                        logit = window < visible ? logit : NEGATIVE_INFINITY;
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < 2 * ROW_TILES; ++i) {
                float high = NEGATIVE_INFINITY;
#pragma unroll
                for (int j = 0; j < CHUNK / 4; ++j) {
                    high = fmaxf(high, logits[i / 2][j / 2][i % 2 * 2 + j % 2]);
                }
                running[i].raise(high * scale);
#pragma unroll
                for (int j = 0; j < CHUNK / 4; ++j) {
                    const float logit = logits[i / 2][j / 2][i % 2 * 2 + j % 2];
                    running[i].total += exp2_fast(logit * scale - running[i].top);
                }
            }
        }
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    copy_wait<0>();

    const int heads = gridDim.y * GROUP;
    const long long line = static_cast<long long>(blockIdx.z) * total_q + at.start + at.first;
#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; ++i) {
        float top = running[i].top;
        float total = running[i].total;
        // The four threads of a row.
        for (int other = 1; other < 4; other *= 2) {
            const float top_there = __shfl_xor_sync(ALL_LANES, top, other);
            const float total_there = __shfl_xor_sync(ALL_LANES, total, other);
            const float high = fmaxf(top, top_there);
            total = total * exp2_fast(top - high) + total_there * exp2_fast(top_there - high);
            top = high;
        }
        const int token = (row + 8 * i) / GROUP_PAD;
        const int member = (row + 8 * i) % GROUP_PAD;
        if (lane % 4 == 0 && token < here && member < GROUP) {
            lse[(line + token) * heads + kv_head * GROUP + member] =
                total > 0.0f ? top + log2_fast(total) : NEGATIVE_INFINITY;
        }
    }
}
