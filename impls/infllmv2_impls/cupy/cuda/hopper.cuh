// What Hopper's tensor cores and copy engine take: barriers, descriptors, asynchronous products.
// With INFLLMV2_EMULATED the same functions come from an emulator, as in `primitives.cuh`.
#pragma once

#include "primitives.cuh"
#ifdef INFLLMV2_EMULATED
#include "hopper_emulator.h"
#endif

// What the copy engine needs to know of a tensor; the host has it written.
struct alignas(64) TensorMap {
    uint64_t words[16];
};

// ---- matrices in shared memory ----
//
// They have rows of 128 bytes, 64 channels, in the copy engine's swizzle; the next 64 channels are
// `64 rows * 128 bytes` further. Base addresses are multiples of 1024.

constexpr uint32_t PANEL = 64 * 128;  // bytes of 64 rows and 64 channels

// A descriptor has 64 bits. The upper half is the same for all: the distance of 8 rows, 1024 bytes,
// and the swizzle. The lower half, an *operand* here, has the address in units of 16 bytes: adding
// moves along.

constexpr uint32_t DESCRIPTOR = (1u << 30) | (1024 >> 4);

// Rows along M or N, channels along K.
static __device__ __forceinline__ uint32_t rows_operand(const uint8_t* tile) {
    return (1u << 16) | ((shared_address(tile) & 0x3FFFF) >> 4);
}

// Rows along K, channels along N; 64 channels are a panel apart.
static __device__ __forceinline__ uint32_t columns_operand(const uint8_t* tile) {
    return ((PANEL >> 4) << 16) | ((shared_address(tile) & 0x3FFFF) >> 4);
}

#ifdef INFLLMV2_EMULATED

inline void barrier_init(uint64_t* barrier, uint32_t arrivals) { emulator::phases_init(barrier, arrivals); }
inline void barrier_expect(uint64_t* barrier, uint32_t bytes) { emulator::phases_expect(barrier, bytes); }
inline void barrier_arrive(uint64_t* barrier, uint32_t arrivals = 1) { emulator::phases_arrive(barrier, arrivals); }
inline void barrier_wait(uint64_t* barrier, uint32_t parity) { emulator::phases_wait(barrier, parity); }
inline void fence_barrier_init() { emulator::fence_barrier_init(); }
inline void publish(int* at, int number) { emulator::publish(at, number); }
inline int wait_published(const int* at, int least) { return emulator::wait_published(at, least); }
inline void fence_async_shared() { emulator::fence_async_shared(); }

inline void copy_box(void* to, const TensorMap* map, int x, int y, int z, uint64_t* barrier) {
    emulator::copy_box(to, map->words, x, y, z, barrier);
}

inline void products_fence() { emulator::products_fence(); }
inline void products_commit() { emulator::products_commit(); }

template <int LEFT>
inline void products_wait() {
    emulator::products_wait<BF16>(LEFT);
}

template <int N>
inline void products_done(float (&d)[N]) {
    emulator::products_done(d);
}

template <int N>
inline void product_rows(float (&d)[N], uint32_t a, uint32_t b, bool add) {
    emulator::product<BF16>(d, uint64_t(DESCRIPTOR) << 32 | a, nullptr, uint64_t(DESCRIPTOR) << 32 | b, add);
}

template <int N>
inline void product_columns(float (&d)[N], const uint32_t* a, uint32_t b) {
    emulator::product<BF16>(d, 0, a, uint64_t(DESCRIPTOR) << 32 | b, true);
}

inline uint32_t moved(uint32_t from) { return from; }

template <int REGISTERS>
inline void take_registers() {
    emulator::set_registers(REGISTERS, true);
}

template <int REGISTERS>
inline void give_registers() {
    emulator::set_registers(REGISTERS, false);
}

#else

// ---- barriers in shared memory ----

static __device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(arrivals));
}

static __device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
        "r"(bytes)
        : "memory");
}

static __device__ __forceinline__ void barrier_arrive(uint64_t* barrier, uint32_t arrivals = 1) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(arrivals)
                 : "memory");
}

// Make barriers that were just initialised known to the copy engine.
static __device__ __forceinline__ void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Wait for the end of the phase with this parity; the one before the first counts as parity 1.
static __device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// A number that one thread writes and others wait for: what came before the write is done.
static __device__ __forceinline__ void publish(int* at, int number) {
    asm volatile("st.release.cta.shared::cta.b32 [%0], %1;" ::"r"(shared_address(at)), "r"(number)
                 : "memory");
}

// Wait until it is at least so large; return what it is.
static __device__ __forceinline__ int wait_published(const int* at, int least) {
    int number;
    do {
        asm volatile("ld.acquire.cta.shared::cta.b32 %0, [%1];"
                     : "=r"(number)
                     : "r"(shared_address(at))
                     : "memory");
    } while (number < least);
    return number;
}

// Let the copy engine and the tensor cores see what this thread stored in shared memory.
static __device__ __forceinline__ void fence_async_shared() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- the copy engine ----

static __device__ __forceinline__ void copy_box(void* to, const TensorMap* map, int x, int y, int z,
                                                uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(shared_address(to)),
        "l"(map), "r"(x), "r"(y), "r"(z), "r"(shared_address(barrier))
        : "memory");
}

// ---- products of a group of four warps ----

static __device__ __forceinline__ void products_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
static __device__ __forceinline__ void products_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int LEFT>
static __device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// Keep the compiler from moving reads of an accumulator before the wait for its product.
template <int N>
static __device__ __forceinline__ void products_done(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Copy a register here and not earlier: operands of a product under way may not change.
static __device__ __forceinline__ uint32_t moved(uint32_t from) {
    uint32_t to;
    asm volatile("mov.b32 %0, %1;" : "=r"(to) : "r"(from) : "memory");
    return to;
}

#if BF16
#define WGMMA_TYPES "f32.bf16.bf16"
#else
#define WGMMA_TYPES "f32.f16.f16"
#endif

#define REGS8(d, i)                                                                             \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
        "+f"(d[i + 6]), "+f"(d[i + 7])

// d[64 x 64] (+)= a[64 x 16] b[64 x 16]^T, both in shared memory.
static __device__ __forceinline__ void product_rows(float (&d)[32], uint32_t a, uint32_t b,
                                                    bool add) {
    asm volatile(
        "{\n"
        ".reg .pred add;\n"
        ".reg .b64 a, b;\n"
        "setp.ne.b32 add, %34, 0;\n"
        "mov.b64 a, {%32, %35};\n"
        "mov.b64 b, {%33, %35};\n"
        "wgmma.mma_async.sync.aligned.m64n64k16." WGMMA_TYPES
        " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"
        " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31},"
        " a, b, add, 1, 1, 0, 0;\n"
        "}\n"
        : REGS8(d, 0), REGS8(d, 8), REGS8(d, 16), REGS8(d, 24)
        : "r"(a), "r"(b), "r"(int(add)), "n"(DESCRIPTOR));
}

// d[64 x 128] (+)= a[64 x 16] b[128 x 16]^T, both in shared memory.
static __device__ __forceinline__ void product_rows(float (&d)[64], uint32_t a, uint32_t b,
                                                    bool add) {
    asm volatile(
        "{\n"
        ".reg .pred add;\n"
        ".reg .b64 a, b;\n"
        "setp.ne.b32 add, %66, 0;\n"
        "mov.b64 a, {%64, %67};\n"
        "mov.b64 b, {%65, %67};\n"
        "wgmma.mma_async.sync.aligned.m64n128k16." WGMMA_TYPES
        " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"
        " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31,"
        " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47,"
        " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63},"
        " a, b, add, 1, 1, 0, 0;\n"
        "}\n"
        : REGS8(d, 0), REGS8(d, 8), REGS8(d, 16), REGS8(d, 24), REGS8(d, 32), REGS8(d, 40),
          REGS8(d, 48), REGS8(d, 56)
        : "r"(a), "r"(b), "r"(int(add)), "n"(DESCRIPTOR));
}

// d[64 x 64] += a[64 x 16] b[16 x 64], a in registers.
static __device__ __forceinline__ void product_columns(float (&d)[32], const uint32_t* a,
                                                       uint32_t b) {
    asm volatile(
        "{\n"
        ".reg .b64 b;\n"
        "mov.b64 b, {%36, %37};\n"
        "wgmma.mma_async.sync.aligned.m64n64k16." WGMMA_TYPES
        " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"
        " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31},"
        " {%32, %33, %34, %35}, b, 1, 1, 1, 1;\n"
        "}\n"
        : REGS8(d, 0), REGS8(d, 8), REGS8(d, 16), REGS8(d, 24)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(DESCRIPTOR));
}

// d[64 x 128] += a[64 x 16] b[16 x 128], a in registers.
static __device__ __forceinline__ void product_columns(float (&d)[64], const uint32_t* a,
                                                       uint32_t b) {
    asm volatile(
        "{\n"
        ".reg .b64 b;\n"
        "mov.b64 b, {%68, %69};\n"
        "wgmma.mma_async.sync.aligned.m64n128k16." WGMMA_TYPES
        " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"
        " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31,"
        " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47,"
        " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63},"
        " {%64, %65, %66, %67}, b, 1, 1, 1, 1;\n"
        "}\n"
        : REGS8(d, 0), REGS8(d, 8), REGS8(d, 16), REGS8(d, 24), REGS8(d, 32), REGS8(d, 40),
          REGS8(d, 48), REGS8(d, 56)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(DESCRIPTOR));
}

template <int REGISTERS>
static __device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
static __device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

#endif

// Have a sum, never negative, computed before the next product starts. The assembler moves what has
// time behind it, past the start of the product that overwrites what the sum is of; but not past a
// branch.
static __device__ __forceinline__ void settle(float sum) {
    if (__any_sync(ALL_LANES, sum == -1.0f)) __trap();
}
