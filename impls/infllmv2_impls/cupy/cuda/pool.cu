// Stage 3 on its own: the highest stored score of the windows of each block, for any geometry.
//
// Macros: SIZE, STRIDE (of K_C1), BLOCK, LITERAL (Eq. 7 read literally), BY_SLOT (where lines of
// scores lie: see `Lines` of packing.py).
#include "packing.cuh"

constexpr int THREADS = 128;

// A block of threads writes up to `span` block scores of one line; -inf without a visible window.
extern "C" __global__ void __launch_bounds__(THREADS)
pool_kernel(const float* __restrict__ scores, float* __restrict__ pooled,
            const int* __restrict__ ends_q, const int* __restrict__ ends_k, int batch,
            int dense_len, int first_slot, int slots, int tile, int lines, int blocks, int span,
            long long score_head_stride, long long score_line_stride) {
    const int index = blockIdx.x;
    const int slot = index / tile;
    const Tile at = find_tile(first_slot + slot, ends_q, batch, tile);
    const int row = at.first + index % tile;
    const int keys = length_of(ends_k, at.sequence);
    if (slot >= slots || row >= at.rows || keys < dense_len) return;

    const int position = keys - at.rows + row;
    const int visible = num_windows(position + 1, SIZE, STRIDE);
    const long long line = BY_SLOT ? index : at.start + row;
    const float* in = scores + blockIdx.z * score_head_stride + line * score_line_stride;
    float* out = pooled + (static_cast<long long>(blockIdx.z) * lines + line) * blocks;

    const int first = blockIdx.y * span;
    const int own = position / BLOCK;  // what lies behind it may stay unwritten
    int end = own + 1 < blocks ? own + 1 : blocks;
    if (end > first + span) end = first + span;
    for (int block = first + threadIdx.x; block < end; block += THREADS) {
#if LITERAL
        const int begin = block * BLOCK / STRIDE;
        int stop = begin + (BLOCK + SIZE) / STRIDE - 1;
#else
        // Window c reaches the block if c * STRIDE + SIZE > start, and begins in or before it.
        const int reach = block * BLOCK - SIZE;
        const int begin = reach >= 0 ? reach / STRIDE + 1 : 0;
        int stop = ((block + 1) * BLOCK + STRIDE - 1) / STRIDE;
#endif
        if (stop > visible) stop = visible;
        float best = NEGATIVE_INFINITY;
        for (int window = begin; window < stop; ++window) best = fmaxf(best, in[window]);
        out[block] = best;
    }
}
