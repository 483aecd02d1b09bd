// Means of windows of keys, in float32, in the same order of sums wherever a window is averaged: in a
// batch or in a cache.
//
// Macros: BF16, D, VEC, SIZE (tokens of a window), STRIDE (from one window to the next), WINDOWS (of
// a block of threads), PARTS (threads that share the tokens of one window).
#pragma once

#include "vector.cuh"

constexpr int COLUMNS = D / VEC;
constexpr int WORKERS = WINDOWS * PARTS * COLUMNS;
constexpr int THREADS = (WORKERS + WARP - 1) / WARP * WARP;
constexpr int AT_ONCE = 8;  // loads of a thread on their way

// Average `count` windows of one head, at most WINDOWS; `keys` is the first token of the first of
// them, `means` the place of its mean. All threads of the block must call this.
__device__ inline void average_windows(const half_t* keys, half_t* means, int count,
                                       int64_t key_stride, int64_t mean_stride) {
    __shared__ float shares[PARTS > 1 ? WINDOWS * PARTS * D : 1];
    const int column = threadIdx.x % COLUMNS * VEC;
    const int part = threadIdx.x / COLUMNS % PARTS;
    const int window = threadIdx.x / (COLUMNS * PARTS);
    const bool works = window < WINDOWS && window < count;
    float total[VEC] = {};
    if (works) {
        const half_t* at = keys + window * STRIDE * key_stride + column;
#pragma unroll 1
        for (int first = part; first < SIZE; first += PARTS * AT_ONCE) {
            Vector x[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                const int token = first + i * PARTS;
                if (token < SIZE) x[i] = load_vector(at + token * key_stride);
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                if (first + i * PARTS >= SIZE) break;
#pragma unroll
                for (int j = 0; j < VEC; ++j) total[j] += to_float(x[i].channels[j]);
            }
        }
    }
    if (PARTS > 1) {
        if (works) {
#pragma unroll
            for (int j = 0; j < VEC; ++j) shares[(window * PARTS + part) * D + column + j] = total[j];
        }
        __syncthreads();
        if (!works || part > 0) return;
#pragma unroll
        for (int other = 1; other < PARTS; ++other) {
#pragma unroll
            for (int j = 0; j < VEC; ++j) total[j] += shares[(window * PARTS + other) * D + column + j];
        }
    }
    if (!works) return;
    Vector mean;
#pragma unroll
    for (int j = 0; j < VEC; ++j) mean.channels[j] = from_float(total[j] / SIZE);
    store_vector(means + window * mean_stride + column, mean);
}
