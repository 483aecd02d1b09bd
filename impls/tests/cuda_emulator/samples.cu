// Kernels for the tests of the emulator.
#include "primitives.cuh"

extern "C" __global__ void multiply(const half_t* __restrict__ a, const half_t* __restrict__ b,
                                    float* __restrict__ out) {
    DYNAMIC_SHARED(half_t, tiles);
    const int lane = threadIdx.x;
    copy16_async(tiles + lane * 8, a + lane * 8, true);
    copy_commit();
    copy16_async(tiles + 256 + lane % 16 * 8, b + lane % 16 * 8, true);
    copy_commit();
    copy_wait<0>();
    __syncwarp();
    uint32_t left[4], right[2];
    float d[4] = {};
    ldmatrix_x4(left, tiles + lane % 16 * 16 + lane / 16 * 8);
    ldmatrix_x2_trans(right, tiles + 256 + lane % 16 * 8);
    mma_16x8x16(d, left, right);
    for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

extern "C" __global__ void convert(const float* __restrict__ x, half_t* __restrict__ y,
                                   float* __restrict__ z, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    y[i] = from_float(x[i]);
    z[i] = to_float(half_t{uint16_t(pack2(0.0f, x[i]) >> 16)});
}

extern "C" __global__ void add_up(float* out) {
    __shared__ float sums[8];
    const float sum = warp_sum(float(threadIdx.x));
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    float total = 0.0f;
    for (int i = 0; i < 8; ++i) total += sums[i];
    out[threadIdx.x] = total;
}

extern "C" __global__ void returns_early(float* out) {
    if (threadIdx.x == 5) return;
    __syncthreads();
}

extern "C" __global__ void disagrees(float* out) {
    if (threadIdx.x < 5) __syncwarp(); else out[threadIdx.x] = warp_sum(1.0f);
}

extern "C" __global__ void writes_behind(float* out) {
    DYNAMIC_SHARED(float, tile);
    tile[threadIdx.x] = 1.0f;
}

extern "C" __global__ void does_not_wait(float* out) {
    DYNAMIC_SHARED(float, tile);
    if (threadIdx.x > 0) return;
    copy16_async(tile, out, true);
    copy_commit();
}

extern "C" __global__ void reads_unwritten(float* out) {
    DYNAMIC_SHARED(float, tile);
    out[threadIdx.x] = tile[threadIdx.x];
}
