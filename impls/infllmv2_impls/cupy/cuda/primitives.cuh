// What the kernels need of the device beyond plain C++: the 16-bit type, tensor cores, asynchronous
// copies and warp reductions. No header of the CUDA toolkit is included, so that NVRTC alone is
// enough. With INFLLMV2_EMULATED the same functions come from an emulator, for tests on a CPU.
//
// BF16=1 makes half_t bfloat16, BF16=0 float16.
#pragma once

#ifdef INFLLMV2_EMULATED
#include "emulator.h"
#elif defined(__CUDACC_RTC__)
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <cstdint>
#endif

#ifndef BF16
#define BF16 0
#endif

constexpr int WARP = 32;
constexpr uint32_t ALL_LANES = 0xffffffffu;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

#define POSITIVE_INFINITY __int_as_float(0x7f800000)
#define NEGATIVE_INFINITY __int_as_float(0xff800000)

// Two bytes of float16 or bfloat16; a struct, so that no integer converts to it by accident.
struct half_t {
    uint16_t bits;
};

#ifdef INFLLMV2_EMULATED

#define DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(emulator::dynamic_shared())

inline float to_float(half_t x) {
    return BF16 ? emulator::from_bf16(x.bits) : emulator::from_fp16(x.bits);
}

inline half_t from_float(float x) {
    return half_t{BF16 ? emulator::to_bf16(x) : emulator::to_fp16(x)};
}

inline uint32_t pack2(float lo, float hi) {
    return from_float(lo).bits | uint32_t(from_float(hi).bits) << 16;
}

inline float exp2_fast(float x) { return exp2f(x); }
inline float log2_fast(float x) { return log2f(x); }

inline uint32_t shared_address(const void* shared) { return emulator::shared_offset(shared); }

inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulator::mma_16x8x16<BF16>(d, a, b);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared) { emulator::ldmatrix<4, false>(r, shared); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared) { emulator::ldmatrix<4, true>(r, shared); }
inline void ldmatrix_x2(uint32_t (&r)[2], const void* shared) { emulator::ldmatrix<2, false>(r, shared); }
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared) { emulator::ldmatrix<2, true>(r, shared); }

inline void copy16_async(void* shared, const void* global, bool valid) {
    emulator::copy16_async(shared, global, valid);
}

inline void copy_commit() { emulator::copy_commit(); }

template <int N>
inline void copy_wait() {
    emulator::copy_wait(N);
}

inline void barrier_sync(int barrier, int threads) { emulator::barrier_sync(barrier, threads); }

#else

// The alignment is what swizzled tiles ask for; it costs nothing where no static memory is used.
#define DYNAMIC_SHARED(type, name)                                      \
    extern __shared__ __align__(1024) unsigned char dynamic_shared_[];  \
    type* const name = reinterpret_cast<type*>(dynamic_shared_)

__device__ __forceinline__ float to_float(half_t x) {
#if BF16
    return __uint_as_float(uint32_t(x.bits) << 16);
#else
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
#endif
}

__device__ __forceinline__ half_t from_float(float x) {
    half_t y;
#if BF16
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#endif
    return y;
}

// Round to two half_t in one register, `lo` in its low bits.
__device__ __forceinline__ uint32_t pack2(float lo, float hi) {
    uint32_t y;
#if BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
#endif
    return y;
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// d += a * b by the warp: a is 16 x 16, b 16 x 8, in the layouts of mma.sync.m16n8k16.
__device__ __forceinline__ void mma_16x8x16(
    float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if BF16
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#endif
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
    return uint32_t(__cvta_generic_to_shared(shared));
}

// Load four 8 x 8 matrices; lane 8 * m + i gives the address of row i of matrix m, 16 bytes.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared))
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared))
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(shared))
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(shared))
                 : "memory");
}

// Start to copy 16 bytes; zeros, and no look at `global`, unless `valid`.
__device__ __forceinline__ void copy16_async(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)),
                   "r"(valid ? 16 : 0)
                 : "memory");
}

// Close a group of copies of this thread.
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until at most the last N groups of this thread are still on their way.
template <int N>
__device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Wait for `threads` threads, whole warps, at the barrier 1 to 15.
__device__ __forceinline__ void barrier_sync(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

#endif

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, step));
    }
    return x;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
        x += __shfl_xor_sync(ALL_LANES, x, step);
    }
    return x;
}

__device__ __forceinline__ int warp_sum(int x) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
        x += __shfl_xor_sync(ALL_LANES, x, step);
    }
    return x;
}
