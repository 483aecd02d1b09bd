// VEC channels of a row, loaded and stored at once; VEC is 1, 2, 4 or 8, and rows are aligned to it.
#pragma once

#include "primitives.cuh"

#if VEC == 8
typedef uint4 word_t;
#elif VEC == 4
typedef uint2 word_t;
#elif VEC == 2
typedef uint32_t word_t;
#else
typedef uint16_t word_t;
#endif

union Vector {
    word_t word;
    half_t channels[VEC];
};

__device__ inline Vector load_vector(const half_t* at) {
    Vector x;
    x.word = __ldg(reinterpret_cast<const word_t*>(at));
    return x;
}

__device__ inline void store_vector(half_t* at, const Vector& x) {
    *reinterpret_cast<word_t*>(at) = x.word;
}
