// Stage 1: means of windows of keys, and where the windows of every sequence lie.
#include "average.cuh"
#include "packing.cuh"

// Write the cumulative numbers of windows, [batch + 1], by one warp.
__device__ void write_ends(const int* ends_k, int* ends_c, int batch) {
    const int lane = threadIdx.x;
    int total = 0;
    if (lane == 0) ends_c[0] = 0;
    for (int first = 0; first < batch; first += WARP) {
        const int sequence = first + lane;
        int count = 0;
        if (sequence < batch) count = num_windows(length_of(ends_k, sequence), SIZE, STRIDE);
        for (int step = 1; step < WARP; step *= 2) {
            const int below = __shfl_up_sync(ALL_LANES, count, step);
            if (lane >= step) count += below;
        }
        if (sequence < batch) ends_c[sequence + 1] = total + count;
        total += __shfl_sync(ALL_LANES, count, WARP - 1);
    }
}

// Count the windows of the sequences before one, by all threads of the block.
__device__ int windows_before(const int* ends_k, int sequence) {
    __shared__ int total;
    if (threadIdx.x == 0) total = 0;
    __syncthreads();
    int mine = 0;
    for (int i = threadIdx.x; i < sequence; i += THREADS) {
        mine += num_windows(length_of(ends_k, i), SIZE, STRIDE);
    }
    mine = warp_sum(mine);
    if (threadIdx.x % WARP == 0 && mine > 0) atomicAdd(&total, mine);
    __syncthreads();
    return total;
}

// Average the windows of a head that begin in a tile of WINDOWS * STRIDE keys.
extern "C" __global__ void __launch_bounds__(THREADS)
compress_kernel(const half_t* __restrict__ k, half_t* __restrict__ means,
                const int* __restrict__ ends_k, int* __restrict__ ends_c, int batch,
                int64_t row_stride, int64_t head_stride) {
    const int head = blockIdx.y;
    if (blockIdx.x == 0 && head == 0 && threadIdx.x < WARP) write_ends(ends_k, ends_c, batch);
    const Tile at = find_tile(blockIdx.x, ends_k, batch, WINDOWS * STRIDE);
    const int first = at.first / STRIDE;
    const int count = num_windows(at.rows, SIZE, STRIDE) - first;
    if (count <= 0) return;
    const int64_t line = windows_before(ends_k, at.sequence) + int64_t(first);
    const int64_t row = at.start + int64_t(at.first);
    const int64_t width = int64_t(gridDim.y) * D;
    average_windows(k + row * row_stride + head * head_stride, means + line * width + head * D, count,
                    row_stride, width);
}
