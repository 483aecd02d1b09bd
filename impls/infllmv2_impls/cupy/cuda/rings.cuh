// Rings of buffers in shared memory, between a thread that loads and warps that multiply, for Hopper
// GPUs.
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
