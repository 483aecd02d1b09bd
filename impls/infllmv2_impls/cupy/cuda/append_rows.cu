// Stage 7: copy new rows behind those that a cache holds.
//
// Macros: BF16, D, VEC, WIDTH (channels of a row, of all heads), ROWS (of a block of threads).
#include "packing.cuh"
#include "vector.cuh"

constexpr int THREADS = 256;

struct Rows {
    const half_t* source;
    half_t* target;
    int64_t row_stride, head_stride;
};

// Plane z of the grid copies the z-th kind of rows: keys, values, keys of the selection.
extern "C" __global__ void __launch_bounds__(THREADS)
append_rows_kernel(const half_t* __restrict__ k, const half_t* __restrict__ v,
                   const half_t* __restrict__ selection_k, half_t* __restrict__ keys,
                   half_t* __restrict__ values, half_t* __restrict__ selection_keys,
                   const int* __restrict__ ends, const int* __restrict__ lengths, int batch,
                   int capacity, int64_t k_row_stride, int64_t k_head_stride, int64_t v_row_stride,
                   int64_t v_head_stride, int64_t s_row_stride, int64_t s_head_stride) {
    const Tile at = find_tile(blockIdx.x, ends, batch, ROWS);
    Rows copy{k, keys, k_row_stride, k_head_stride};
    if (blockIdx.z == 1) copy = Rows{v, values, v_row_stride, v_head_stride};
    if (blockIdx.z == 2) copy = Rows{selection_k, selection_keys, s_row_stride, s_head_stride};
    const int length = lengths[at.sequence];
    for (int i = threadIdx.x; i < ROWS * (WIDTH / VEC); i += THREADS) {
        const int row = at.first + i / (WIDTH / VEC);
        const int channel = i % (WIDTH / VEC) * VEC;
        const int64_t place = length + int64_t(row);
        if (row >= at.rows || place >= capacity) break;
        const half_t* source = copy.source + (at.start + int64_t(row)) * copy.row_stride;
        const Vector x = load_vector(source + channel / D * copy.head_stride + channel % D);
        store_vector(copy.target + (int64_t(at.sequence) * capacity + place) * WIDTH + channel, x);
    }
}

// Move the lengths on, behind all kernels that need the old ones.
extern "C" __global__ void advance_kernel(const int* __restrict__ ends, int* __restrict__ lengths,
                                          int batch) {
    const int sequence = blockIdx.x * blockDim.x + threadIdx.x;
    if (sequence < batch) lengths[sequence] += length_of(ends, sequence);
}
