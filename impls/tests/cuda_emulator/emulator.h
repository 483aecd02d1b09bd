// CUDA C++ on a CPU: every thread of a block is a fiber, blocks run one after the other.
//
// A fiber runs until it waits for its warp or for a barrier. What a device would leave undefined is
// an error here where it can be seen: lanes that wait for different things, threads that wait for
// some that have returned, unaligned asynchronous copies. Shared memory is NaN before each block,
// and the target of an asynchronous copy until it is waited for.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <bit>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#define __global__ __attribute__((visibility("default")))
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __constant__ static const
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static __attribute__((section("emulated_shared")))

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x, y, z; };
template <class T> struct alignas(2 * sizeof(T)) Pair { T x, y; };
template <class T> struct alignas(sizeof(T) > 4 ? 16 : 4 * sizeof(T)) Quad { T x, y, z, w; };
using int2 = Pair<int>;
using uint2 = Pair<unsigned>;
using float2 = Pair<float>;
using int4 = Quad<int>;
using uint4 = Quad<unsigned>;
using float4 = Quad<float>;
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

extern char __start_emulated_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_emulated_shared[] __attribute__((weak, visibility("hidden")));

namespace emulator {

constexpr int MOST_THREADS = 1024;
constexpr int BARRIERS = 16;
constexpr size_t STACK = 256 << 10;
constexpr size_t MOST_SHARED = 256 << 10;
constexpr size_t RED_ZONE = 4096;

struct Copy {
    void* to;
    const void* from;  // null for zeros
};

enum class State { RUNNABLE, IN_WARP, AT_BARRIER, AT_PHASE, AT_NUMBER, STALLED, DONE };

struct Fiber {
    void* stack_pointer;
    uint3 thread;
    int index, warp, lane;
    State state;
    const char* waits_for;
    unsigned mask;
    int barrier;
    int reduced;
    std::vector<std::vector<Copy>> groups;  // committed, not yet waited for
    std::vector<Copy> open;
};

// A warp-wide operation that lanes have begun.
struct Collective {
    const char* what;
    unsigned mask, arrived;
    const void* in[32];
    void* out[32];
};

struct Barrier {
    int arrived, expected;
    int all, any, count;
};

// What hopper_emulator.h adds to a block of threads.
struct Asynchronous {
    void (*begin)();      // before a block
    bool (*advance)();    // when no thread can run: finish something, or return false
    void (*explain)();    // nothing is left to finish: fail if a thread waits for it
    void (*leave)();      // a thread returns
    void (*end)();        // all have returned
};

inline Fiber fibers[MOST_THREADS];
inline std::vector<Collective> collectives[MOST_THREADS / 32];
inline Barrier barriers[BARRIERS];
inline Asynchronous asynchronous{};
inline Fiber* current = nullptr;
inline int num_threads = 0, num_done = 0, step = 1;
inline unsigned pace = 0;   // a random state, or 0 for threads that run in order
inline bool eager = false;  // whether what is asynchronous may be early
inline uint3 block_index;
inline dim3 block_size, grid_size;
inline void (*body)() = nullptr;
inline void* scheduler = nullptr;  // stack pointer of the host
inline bool failed = false;
inline char message[512];
inline size_t shared_bytes = 0;
alignas(1024) inline unsigned char shared_memory[MOST_SHARED + RED_ZONE];

// Save the registers that a call preserves on this stack, and go on with another.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.type emulator_switch, @function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

inline void* dynamic_shared() { return shared_memory; }

// Give up the launch: the host returns with the message, the fibers are abandoned.
[[noreturn]] inline void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    int n = 0;
    if (current) {
        n = snprintf(message, sizeof(message), "block (%u, %u, %u), thread %d: ", block_index.x,
                     block_index.y, block_index.z, current->index);
    }
    vsnprintf(message + n, sizeof(message) - n, format, arguments);
    va_end(arguments);
    failed = true;
    void* abandoned;
    emulator_switch(&abandoned, scheduler);
    abort();
}

// Return a number below `n`; multiplying by 48271 visits all but 0.
inline int draw(int n) {
    pace = unsigned(uint64_t(pace) * 48271 % 0x7fffffff);
    return int(pace % unsigned(n));
}

// Go on with the next fiber that can run, or with the host.
inline void yield() {
    Fiber* me = current;
    if (eager && num_done < num_threads && asynchronous.advance && !draw(64)) asynchronous.advance();
    do {
        const int from = pace && !draw(32) ? draw(num_threads) : me->index;
        for (int i = 1; i <= num_threads; ++i) {
            int next = from + step * i;
            next += next < 0 ? num_threads : 0;
            next -= next >= num_threads ? num_threads : 0;
            if (fibers[next].state == State::RUNNABLE) {
                if (&fibers[next] == me) return;
                current = &fibers[next];
                emulator_switch(&me->stack_pointer, current->stack_pointer);
                return;
            }
        }
    } while (num_done < num_threads && asynchronous.advance && asynchronous.advance());
    if (num_done == num_threads) {
        if (asynchronous.end) asynchronous.end();
        void* abandoned;
        emulator_switch(&abandoned, scheduler);
    }
    if (asynchronous.explain) asynchronous.explain();
    for (int i = 0; i < num_threads; ++i) {
        if (fibers[i].state == State::IN_WARP) {
            current = &fibers[i];
            fail("waits at %s with mask %08x for lanes that do not come", fibers[i].waits_for,
                 fibers[i].mask);
        }
    }
    for (int i = 0; i < num_threads; ++i) {
        if (fibers[i].state == State::AT_BARRIER) {
            current = &fibers[i];
            fail("waits at barrier %d for threads that do not come (%d of %d are there, %d of %d "
                 "have returned)", fibers[i].barrier, barriers[fibers[i].barrier].arrived,
                 barriers[fibers[i].barrier].expected, num_done, num_threads);
        }
    }
    abort();
}

inline void fiber_main() {
    body();
    bool pending = !current->open.empty();
    for (const auto& group : current->groups) pending |= !group.empty();
    if (pending) fail("returns without having waited for its asynchronous copies");
    if (asynchronous.leave) asynchronous.leave();
    current->state = State::DONE;
    ++num_done;
    yield();
}

// Meet the other lanes of `mask`; the last of them computes all results.
template <class In, class Out, class Finish>
inline void collective(const char* what, unsigned mask, const In& in, Out& out, Finish finish) {
    int lane = current->lane;
    if (!(mask >> lane & 1)) fail("lane %d is not in the mask %08x of %s", lane, mask, what);
    int in_warp = std::min(32, num_threads - current->warp * 32);
    if (in_warp < 32 && mask == 0xffffffffu) mask = (1u << in_warp) - 1;
    auto& pending = collectives[current->warp];
    size_t at = 0;
    while (at < pending.size() && !(pending[at].mask & mask)) ++at;
    if (at == pending.size()) pending.push_back(Collective{what, mask, 0, {}, {}});
    Collective& meeting = pending[at];
    if (strcmp(meeting.what, what) || meeting.mask != mask) {
        fail("lane %d is at %s with mask %08x, others are at %s with mask %08x", lane, what, mask,
             meeting.what, meeting.mask);
    }
    meeting.in[lane] = &in;
    meeting.out[lane] = &out;
    meeting.arrived |= 1u << lane;
    if (meeting.arrived != mask) {
        current->state = State::IN_WARP;
        current->waits_for = what;
        current->mask = mask;
        yield();
        return;
    }
    const In* inputs[32];
    Out* outputs[32];
    Fiber* warp = fibers + current->warp * 32;
    for (int i = 0; i < 32; ++i) {
        inputs[i] = static_cast<const In*>(meeting.in[i]);
        outputs[i] = static_cast<Out*>(meeting.out[i]);
        if (mask >> i & 1) warp[i].state = State::RUNNABLE;
    }
    pending.erase(pending.begin() + at);
    finish(mask, inputs, outputs);
}

inline void barrier_arrive(int id, int threads, int predicate) {
    if (id < 0 || id >= BARRIERS) fail("there is no barrier %d", id);
    Barrier& b = barriers[id];
    if (b.arrived == 0) b = Barrier{0, threads, 1, 0, 0};
    if (b.expected != threads) {
        fail("barrier %d is for %d threads here, for %d elsewhere", id, threads, b.expected);
    }
    b.all &= predicate != 0;
    b.any |= predicate != 0;
    b.count += predicate != 0;
    if (++b.arrived < threads) return;
    for (int i = 0; i < num_threads; ++i) {
        if (fibers[i].state == State::AT_BARRIER && fibers[i].barrier == id) {
            fibers[i].state = State::RUNNABLE;
        }
    }
    b.arrived = 0;
}

// Meet `threads` threads at a barrier and learn for how many the predicate is true.
inline int barrier_sync(int id, int threads, int predicate = 0) {
    Fiber* me = current;
    me->state = State::AT_BARRIER;
    me->barrier = id;
    barrier_arrive(id, threads, predicate);
    if (me->state == State::RUNNABLE) {
        for (int i = 0; i < num_threads; ++i) {
            if (fibers[i].barrier == id) fibers[i].reduced = barriers[id].count;
        }
    } else {
        yield();
    }
    return me->reduced;
}

// Return an address in dynamic shared memory, which begins at 0 here.
inline uint32_t shared_offset(const void* shared) {
    auto offset = static_cast<const unsigned char*>(shared) - shared_memory;
    if (offset < 0 || size_t(offset) >= shared_bytes) fail("%p is not in dynamic shared memory", shared);
    return uint32_t(offset);
}

inline void check_aligned(const char* what, const void* pointer, size_t to) {
    if (reinterpret_cast<uintptr_t>(pointer) % to) fail("%s: address %p", what, pointer);
}

inline void copy16_async(void* shared, const void* global, bool valid) {
    check_aligned("copy16_async to unaligned memory", shared, 16);
    if (valid) check_aligned("copy16_async from unaligned memory", global, 16);
    memset(shared, 0xff, 16);
    current->open.push_back(Copy{shared, valid ? global : nullptr});
}

inline void copy_commit() {
    current->groups.push_back(std::move(current->open));
    current->open.clear();
}

inline void copy_wait(int most) {
    auto& groups = current->groups;
    while (int(groups.size()) > most) {
        for (const Copy& copy : groups.front()) {
            if (copy.from) memcpy(copy.to, copy.from, 16); else memset(copy.to, 0, 16);
        }
        groups.erase(groups.begin());
    }
}

inline float from_bf16(uint16_t bits) { return std::bit_cast<float>(uint32_t(bits) << 16); }

inline uint16_t to_bf16(float x) {
    uint32_t bits = std::bit_cast<uint32_t>(x);
    if (x != x) return 0x7fff;
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float decode_fp16(uint16_t bits) {
    int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float value = exponent == 31 ? (fraction ? NAN : INFINITY)
                  : exponent     ? std::ldexp(float(fraction + 1024), exponent - 25)
                                 : std::ldexp(float(fraction), -24);
    return bits >> 15 ? -value : value;
}

struct Table {
    float value[1 << 16];
    Table() { for (int i = 0; i < 1 << 16; ++i) value[i] = decode_fp16(uint16_t(i)); }
};
inline const Table table;

inline float from_fp16(uint16_t bits) { return table.value[bits]; }

inline uint16_t to_fp16(float x) {
    if (x != x) return 0x7fff;
    uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    float size = std::fabs(x);
    if (size >= 65520.0f) return sign | 0x7c00;
    if (size < 6.103515625e-05f) return sign | uint16_t(std::nearbyint(std::ldexp(size, 24)));
    uint32_t bits = std::bit_cast<uint32_t>(size);
    bits += 0xfff + (bits >> 13 & 1);
    return sign | uint16_t((bits >> 13) - (112 << 10));
}

struct Operands {
    const float* d;
    const uint32_t *a, *b;
};

// Element (row, column) of a lies in lane 4 * (row % 8) + column % 8 / 2, of b alike.
template <bool BF>
inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    auto convert = [](uint32_t bits) { return BF ? from_bf16(uint16_t(bits)) : from_fp16(uint16_t(bits)); };
    collective("mma", 0xffffffffu, Operands{d, a, b}, d, [&](unsigned mask, auto in, auto out) {
        if (mask != 0xffffffffu) fail("mma needs a whole warp");
        float left[16][16], right[16][8], sum[16][8];
        for (int lane = 0; lane < 32; ++lane) {
            int row = lane / 4, column = lane % 4 * 2;
            for (int i = 0; i < 4; ++i) {
                uint32_t x = in[lane]->a[i];
                left[row + i % 2 * 8][column + i / 2 * 8] = convert(x);
                left[row + i % 2 * 8][column + i / 2 * 8 + 1] = convert(x >> 16);
                sum[row + i / 2 * 8][column + i % 2] = in[lane]->d[i];
            }
            for (int i = 0; i < 2; ++i) {
                right[column + i * 8][row] = convert(in[lane]->b[i]);
                right[column + i * 8 + 1][row] = convert(in[lane]->b[i] >> 16);
            }
        }
        for (int m = 0; m < 16; ++m) {
            for (int k = 0; k < 16; ++k) {
                for (int n = 0; n < 8; ++n) sum[m][n] += left[m][k] * right[k][n];
            }
        }
        for (int lane = 0; lane < 32; ++lane) {
            for (int i = 0; i < 4; ++i) {
                (*out[lane])[i] = sum[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
            }
        }
    });
}

template <int N, bool TRANSPOSED>
inline void ldmatrix(uint32_t (&r)[N], const void* shared) {
    if (current->lane < 8 * N) check_aligned("ldmatrix from unaligned memory", shared, 16);
    collective("ldmatrix", 0xffffffffu, shared, r, [&](unsigned mask, auto in, auto out) {
        if (mask != 0xffffffffu) fail("ldmatrix needs a whole warp");
        for (int m = 0; m < N; ++m) {
            uint16_t x[8][8];
            for (int i = 0; i < 8; ++i) memcpy(x[i], *in[8 * m + i], 16);
            for (int lane = 0; lane < 32; ++lane) {
                int i = lane / 4, j = lane % 4 * 2;
                (*out[lane])[m] = TRANSPOSED ? x[j][i] | uint32_t(x[j + 1][i]) << 16
                                             : x[i][j] | uint32_t(x[i][j + 1]) << 16;
            }
        }
    });
}

template <class T, class Source>
inline T shuffle(const char* what, unsigned mask, T value, Source source) {
    struct Input { T value; int from; };
    T result;
    collective(what, mask, Input{value, source(current->lane)}, result, [&](unsigned lanes, auto in, auto out) {
        for (int i = 0; i < 32; ++i) {
            if (!(lanes >> i & 1)) continue;
            int from = in[i]->from;
            if (!(lanes >> from & 1)) fail("%s: lane %d reads lane %d, which is not there", what, i, from);
            *out[i] = in[from]->value;
        }
    });
    return result;
}

template <class T, class Fold>
inline T reduce(const char* what, unsigned mask, T value, Fold fold) {
    T result;
    collective(what, mask, value, result, [&](unsigned lanes, auto in, auto out) {
        bool first = true;
        T total{};
        for (int i = 0; i < 32; ++i) {
            if (lanes >> i & 1) total = first ? *in[i] : fold(total, *in[i]), first = false;
        }
        for (int i = 0; i < 32; ++i) if (lanes >> i & 1) *out[i] = total;
    });
    return result;
}

inline unsigned ballot(const char* what, unsigned mask, bool predicate) {
    unsigned bit = predicate ? 1u << current->lane : 0;
    return reduce(what, mask, bit, [](unsigned a, unsigned b) { return a | b; });
}

// A letter for the type of an argument; `t` is a tensor map of the copy engine, passed by value.
template <class A>
constexpr char kind() {
    if (std::is_pointer_v<A>) return 'p';
    if (std::is_class_v<A>) return sizeof(A) == 128 ? 't' : '?';
    if (std::is_floating_point_v<A>) return sizeof(A) == 4 ? 'f' : '?';
    return sizeof(A) == 4 ? 'i' : sizeof(A) == 8 ? 'l' : '?';
}

template <class... A>
inline void signature_of(void (*)(A...), char* out) {
    char kinds[] = {kind<A>()..., 0};
    memcpy(out, kinds, sizeof(kinds));
}

// The host aligns structures less than they ask for.
template <class A>
inline A argument(const void* value) {
    A argument;
    memcpy(&argument, value, sizeof(argument));
    return argument;
}

template <class... A, size_t... I>
inline void call(void (*kernel)(A...), void** values, std::index_sequence<I...>) {
    kernel(argument<std::remove_cv_t<A>>(values[I])...);
}

template <class... A>
inline void call(void (*kernel)(A...), void** values) {
    call(kernel, values, std::index_sequence_for<A...>{});
}

inline unsigned char* stacks() {
    static auto* memory = static_cast<unsigned char*>(
        mmap(nullptr, STACK * MOST_THREADS, PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    return memory;
}

inline void start_fiber(int index) {
    Fiber& fiber = fibers[index];
    fiber.thread = {unsigned(index), 0, 0};
    fiber.index = index;
    fiber.warp = index / 32;
    fiber.lane = index % 32;
    fiber.state = State::RUNNABLE;
    fiber.barrier = -1;
    fiber.groups.clear();
    fiber.open.clear();
    auto** top = reinterpret_cast<void**>(stacks() + STACK * (index + 1)) - 2;
    *top = reinterpret_cast<void*>(&fiber_main);  // where emulator_switch returns to
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    fiber.stack_pointer = top;
}

inline void run_block() {
    memset(shared_memory, 0xff, shared_bytes);
    memset(shared_memory + shared_bytes, 0xa5, RED_ZONE);
    if (__start_emulated_shared) {
        memset(__start_emulated_shared, 0xff, __stop_emulated_shared - __start_emulated_shared);
    }
    memset(barriers, 0, sizeof(barriers));
    num_done = 0;
    for (int i = 0; i < num_threads; ++i) start_fiber(i);
    for (auto& pending : collectives) pending.clear();
    if (asynchronous.begin) asynchronous.begin();
    current = &fibers[pace ? draw(num_threads) : step > 0 ? 0 : num_threads - 1];
    emulator_switch(&scheduler, current->stack_pointer);
    current = nullptr;
    for (size_t i = 0; i < RED_ZONE && !failed; ++i) {
        if (shared_memory[shared_bytes + i] != 0xa5) {
            failed = true;
            snprintf(message, sizeof(message), "block (%u, %u, %u) writes behind its %zu bytes of "
                     "dynamic shared memory", block_index.x, block_index.y, block_index.z, shared_bytes);
        }
    }
}

// Run all blocks of a grid; null, or what went wrong.
inline const char* run(const unsigned* grid, int threads, size_t bytes, int order) {
    grid_size = {grid[0], grid[1], grid[2]};
    block_size = {unsigned(threads), 1, 1};
    num_threads = threads;
    shared_bytes = bytes;
    step = order < 0 ? -1 : 1;
    pace = std::abs(order) > 1 ? std::abs(order) : 0;
    eager = pace % 2;
    failed = false;
    if (threads < 1 || threads > MOST_THREADS) return "a block has 1 to 1024 threads";
    if (bytes > MOST_SHARED) return "a block cannot have so much dynamic shared memory";
    for (unsigned z = 0; z < grid[2]; ++z) {
        for (unsigned y = 0; y < grid[1]; ++y) {
            for (unsigned x = 0; x < grid[0]; ++x) {
                block_index = {x, y, z};
                run_block();
                if (failed) return message;
            }
        }
    }
    return nullptr;
}

}  // namespace emulator

#define threadIdx (emulator::current->thread)
#define blockIdx (emulator::block_index)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)

inline void __syncthreads() { emulator::barrier_sync(0, emulator::num_threads); }
inline int __syncthreads_count(int x) { return emulator::barrier_sync(0, emulator::num_threads, x); }
inline int __syncthreads_or(int x) { return __syncthreads_count(x) > 0; }
inline int __syncthreads_and(int x) { return __syncthreads_count(x) == emulator::num_threads; }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::ballot("__syncwarp", mask, false); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { emulator::yield(); }
inline unsigned __activemask() { return 0xffffffffu; }
[[noreturn]] inline void __trap() { emulator::fail("__trap"); }

// As on a device, a lane outside its segment of `width` lanes reads itself.
template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
    return emulator::shuffle("__shfl_sync", mask, value, [=](int lane) {
        return (lane & ~(width - 1)) | (from & (width - 1));
    });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    return emulator::shuffle("__shfl_xor_sync", mask, value, [=](int lane) {
        int from = lane ^ bits;
        return from / width > lane / width ? lane : from;
    });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
    return emulator::shuffle("__shfl_up_sync", mask, value, [=](int lane) {
        return lane % width < int(by) ? lane : lane - int(by);
    });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
    return emulator::shuffle("__shfl_down_sync", mask, value, [=](int lane) {
        return lane % width + int(by) >= width ? lane : lane + int(by);
    });
}

inline unsigned __ballot_sync(unsigned mask, int x) { return emulator::ballot("__ballot_sync", mask, x); }
inline int __any_sync(unsigned mask, int x) { return emulator::ballot("__any_sync", mask, x) != 0; }
inline int __all_sync(unsigned mask, int x) { return emulator::ballot("__all_sync", mask, !x) == 0; }
template <class T>
T __reduce_add_sync(unsigned mask, T x) {
    return emulator::reduce("__reduce_add_sync", mask, x, [](T a, T b) { return T(a + b); });
}
template <class T>
T __reduce_min_sync(unsigned mask, T x) {
    return emulator::reduce("__reduce_min_sync", mask, x, [](T a, T b) { return a < b ? a : b; });
}
template <class T>
T __reduce_max_sync(unsigned mask, T x) {
    return emulator::reduce("__reduce_max_sync", mask, x, [](T a, T b) { return a > b ? a : b; });
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned x) {
    return emulator::reduce("__reduce_or_sync", mask, x, [](unsigned a, unsigned b) { return a | b; });
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned x) {
    return emulator::reduce("__reduce_and_sync", mask, x, [](unsigned a, unsigned b) { return a & b; });
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
    unsigned result;
    emulator::collective("__match_any_sync", mask, value, result, [](unsigned lanes, auto in, auto out) {
        for (int i = 0; i < 32; ++i) {
            if (!(lanes >> i & 1)) continue;
            *out[i] = 0;
            for (int j = 0; j < 32; ++j) {
                if (lanes >> j & 1 && *in[i] == *in[j]) *out[i] |= 1u << j;
            }
        }
    });
    return result;
}

template <class T, class U>
T atomicAdd(T* at, U x) { T old = *at; *at = T(old + T(x)); return old; }
template <class T, class U>
T atomicSub(T* at, U x) { T old = *at; *at = T(old - T(x)); return old; }
template <class T, class U>
T atomicMax(T* at, U x) { T old = *at; *at = old > T(x) ? old : T(x); return old; }
template <class T, class U>
T atomicMin(T* at, U x) { T old = *at; *at = old < T(x) ? old : T(x); return old; }
template <class T, class U>
T atomicOr(T* at, U x) { T old = *at; *at = old | T(x); return old; }
template <class T, class U>
T atomicAnd(T* at, U x) { T old = *at; *at = old & T(x); return old; }
template <class T, class U>
T atomicXor(T* at, U x) { T old = *at; *at = old ^ T(x); return old; }
template <class T, class U>
T atomicExch(T* at, U x) { T old = *at; *at = T(x); return old; }
template <class T, class U, class V>
T atomicCAS(T* at, U compare, V x) { T old = *at; if (old == T(compare)) *at = T(x); return old; }

template <class T> T __ldg(const T* at) { return *at; }
template <class T> T __ldcg(const T* at) { return *at; }
template <class T> T __ldcs(const T* at) { return *at; }
template <class T> T __ldca(const T* at) { return *at; }
template <class T> void __stcs(T* at, T x) { *at = x; }
template <class T> void __stcg(T* at, T x) { *at = x; }

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline unsigned __brev(unsigned x) {
    unsigned y = 0;
    for (int i = 0; i < 32; ++i) y |= (x >> i & 1) << (31 - i);
    return y;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    uint64_t bytes = uint64_t(y) << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        result |= unsigned(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
    }
    return result;
}

inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float2int_rn(float x) { return int(std::nearbyint(x)); }
inline int __float2int_rd(float x) { return int(std::floor(x)); }
inline float __int2float_rn(int x) { return float(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
template <class T, class U>
constexpr auto min(T a, U b) -> std::common_type_t<T, U> {
    using C = std::common_type_t<T, U>;
    return C(a) < C(b) ? C(a) : C(b);
}
template <class T, class U>
constexpr auto max(T a, U b) -> std::common_type_t<T, U> {
    using C = std::common_type_t<T, U>;
    return C(a) > C(b) ? C(a) : C(b);
}
