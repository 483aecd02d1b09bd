// For kernels on Hopper GPUs whose blocks of threads stay: which items a block takes, and rings of
// buffers in shared memory, between a thread that loads and warps that multiply.
#pragma once

#include "hopper.cuh"

// A place in a ring, and the parity of its round: a warp must see every round of a place, since
// barriers have only a parity.
template <int COUNT>
struct Place {
    int at = 0;
    uint32_t round = 0;

    __device__ __forceinline__ void advance() {
        at = at + 1 == COUNT ? 0 : at + 1;
        round ^= at == 0;
    }
};

// Say that this warp is done with a place.
static __device__ __forceinline__ void release(uint64_t* barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

// The item that this block of threads takes in a round. The first items are the longest: blocks take
// turns in who has the longer one.
static __device__ __forceinline__ int item_of(int round) {
    const int place = round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
    return round * gridDim.x + place;
}
