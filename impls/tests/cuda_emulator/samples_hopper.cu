// Kernels for the tests of what the emulator offers to `hopper.cuh`.
#include "hopper.cuh"

// Wait with all threads for boxes that thread 0 asks for, 64 rows and 64 channels each.
static void load(uint8_t* to, const TensorMap& map, int rows, int columns, uint64_t* barrier) {
    if (threadIdx.x == 0) {
        barrier_init(barrier, 1);
        fence_barrier_init();
        barrier_expect(barrier, rows * columns * 2);
        for (int p = 0; p < columns / 64; ++p) {
            for (int r = 0; r < rows / 64; ++r)
                copy_box(to + (p * rows / 64 + r) * PANEL, &map, p * 64, 0, r * 64, barrier);
        }
    }
    __syncthreads();
    barrier_wait(barrier, 0);
}

template <int COLUMNS>
static void store(const float (&d)[COLUMNS / 2], float* out) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int i = 0; i < COLUMNS / 2; ++i) {
        const int row = warp * 16 + lane / 4 + i / 2 % 2 * 8;
        out[row * COLUMNS + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i];
    }
}

// out = a b^T, for a of 64 x 128 and b of COLUMNS x 128.
template <int COLUMNS>
static void multiply_rows(const uint8_t* a, const uint8_t* b, float* out) {
    float d[COLUMNS / 2];
    products_fence();
    for (int k = 0; k < 8; ++k) {
        const int step = k % 4 * 32;
        product_rows(d, rows_operand(a) + ((k / 4 * PANEL + step) >> 4),
                     rows_operand(b) + ((k / 4 * COLUMNS * 128 + step) >> 4), k > 0);
    }
    products_commit();
    products_wait<0>();
    products_done(d);
    store<COLUMNS>(d, out);
}

// out = 1 + a b, for a of 64 x 64 in registers and b of 64 x COLUMNS.
template <int COLUMNS>
static void multiply_columns(const half_t* a, const uint8_t* b, float* out) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32_t left[16];
    for (int i = 0; i < 16; ++i) {
        const int row = warp * 16 + lane / 4 + i % 2 * 8, k = i / 4 * 16 + i / 2 % 2 * 8 + lane % 4 * 2;
        left[i] = a[row * 64 + k].bits | uint32_t(a[row * 64 + k + 1].bits) << 16;
    }
    float d[COLUMNS / 2];
    for (float& x : d) x = 1.0f;
    products_fence();
    for (int k = 0; k < 4; ++k)
        product_columns(d, &left[4 * k], columns_operand(b) + ((k * 2048) >> 4));
    products_commit();
    products_wait<0>();
    products_done(d);
    store<COLUMNS>(d, out);
}

extern "C" __global__ void multiply_boxes(const __grid_constant__ TensorMap a,
                                          const __grid_constant__ TensorMap b,
                                          const __grid_constant__ TensorMap v, const half_t* weights,
                                          float* rows64, float* rows128, float* columns64,
                                          float* columns128) {
    DYNAMIC_SHARED(uint8_t, memory);
    uint64_t* barriers = reinterpret_cast<uint64_t*>(memory + 8 * PANEL);
    load(memory, a, 64, 128, barriers);
    load(memory + 2 * PANEL, b, 128, 128, barriers + 1);
    load(memory + 6 * PANEL, v, 64, 128, barriers + 2);
    multiply_rows<128>(memory, memory + 2 * PANEL, rows128);
    multiply_columns<64>(weights, memory + 6 * PANEL, columns64);
    multiply_columns<128>(weights, memory + 6 * PANEL, columns128);
    __syncthreads();
    load(memory + 2 * PANEL, b, 64, 128, barriers + 3);
    multiply_rows<64>(memory, memory + 2 * PANEL, rows64);
}

// Copy the box at (x, y, z) to `out`, as it lies in shared memory.
extern "C" __global__ void fetch_box(const __grid_constant__ TensorMap map, half_t* out, int x, int y,
                                     int z) {
    DYNAMIC_SHARED(uint8_t, memory);
    uint64_t* barrier = reinterpret_cast<uint64_t*>(memory + PANEL);
    barrier_init(barrier, 1);
    fence_barrier_init();
    barrier_expect(barrier, PANEL);
    copy_box(memory, &map, x, y, z, barrier);
    barrier_wait(barrier, 0);
    for (int i = 0; i < 64 * 64; ++i) out[i] = reinterpret_cast<half_t*>(memory)[i];
}

// In the order of `FAULTS` in test_cuda_emulator.py.
enum Fault {
    NONE, IS_NOT_RELEASED, EXPECTS_MORE, EXPECTS_LESS, WAITS_FOR_NOTHING, WAITS_FOR_THE_LAST_PHASE,
    DOES_NOT_WAIT_FOR_BOX, RELEASES_EARLY, RELEASES_TWICE, LEAVES_PRODUCT, LEAVES_BOX, DOES_NOT_FENCE_BARRIERS,
    DOES_NOT_FENCE_STORES, DOES_NOT_FENCE_REGISTERS, STORES_BESIDE, TOUCHES_ACCUMULATOR, TOUCHES_OPERAND,
    IS_DONE_EARLY, LACKS_A_WARP, LACKS_A_LANE, DISAGREES, GOES_TO_THE_MIDDLE, BEGINS_IN_THE_MIDDLE, RUNS_OVER,
    TAKES_TOO_MUCH, STORES_UNDER_A_COPY, ARRIVES_FOR_TOO_MANY, DOES_NOT_PUBLISH, READS_EARLY,
};

// One thread loads rounds of 64 rows x into one stage; a group adds up x x^T of them all, each x
// but for its first row, which is 0, and then x itself as rows of K, times ones.
extern "C" __global__ void add_rounds(const __grid_constant__ TensorMap map, float* out, int rounds,
                                      int fault) {
    DYNAMIC_SHARED(uint8_t, memory);
    uint64_t *full = reinterpret_cast<uint64_t*>(memory + PANEL), *empty = full + 1;
    int* begun = reinterpret_cast<int*>(full + 2);
    const int thread = threadIdx.x, lane = thread % 32;
    if (thread == 0) {
        if (fault != WAITS_FOR_NOTHING) barrier_init(full, 1);
        barrier_init(empty, 5);  // four warps, and the loader for one that there is not
        *begun = 0;
        if (fault != DOES_NOT_FENCE_BARRIERS) fence_barrier_init();
    }
    __syncthreads();
    if (thread >= 128) {
        if (fault == TAKES_TOO_MUCH) take_registers<240>(); else give_registers<24>();
        if (thread > 128) return;
        for (int i = 0; i < rounds; ++i) {
            barrier_wait(empty, (i & 1) ^ (fault != WAITS_FOR_THE_LAST_PHASE));
            barrier_arrive(empty, fault == ARRIVES_FOR_TOO_MANY ? 6 : 1);
            barrier_expect(full, PANEL + (fault == EXPECTS_MORE ? 16 : fault == EXPECTS_LESS ? -16 : 0));
            copy_box(memory + (fault == GOES_TO_THE_MIDDLE ? 128 : 0), &map, 0, 0, 64 * i, full);
            if (fault == STORES_UNDER_A_COPY) memory[77] = 1;
            if (fault != DOES_NOT_PUBLISH) publish(begun, i + 1);
        }
        return;
    }
    if (fault == TAKES_TOO_MUCH) take_registers<240>(); else take_registers<168>();
    float d[32], e[32];
    for (int i = 0; i < 32; ++i) d[i] = e[i] = 0.0f;
    uint32_t ones[4];
    for (uint32_t& pair : ones) pair = pack2(1.0f, 1.0f);
    const uint32_t rows = rows_operand(memory) + (fault == BEGINS_IN_THE_MIDDLE ? 8 : 0);
    for (int i = 0; i < rounds; ++i) {
        if (fault == LEAVES_BOX && i == rounds - 1) break;
        wait_published(begun, i + 1);
        if (fault != DOES_NOT_WAIT_FOR_BOX) barrier_wait(full, i & 1);
        if (thread < 8) reinterpret_cast<uint4*>(memory)[thread] = make_uint4(0, 0, 0, 0);
        if (fault != DOES_NOT_FENCE_STORES) fence_async_shared();
        barrier_sync(1, 128);
        if (fault != DOES_NOT_FENCE_REGISTERS) products_fence();
        for (int k = 0; k < 4; ++k) {
            if (fault == LACKS_A_WARP && thread >= 96) break;
            if (fault == LACKS_A_LANE && lane == 7) break;
            const int other = fault == DISAGREES && thread >= 64 ? 0 : k;
            const int step = fault == RUNS_OVER ? 1 << 14 : 2 * other;
            product_rows(d, rows + step, rows + step, true);
        }
        products_commit();
        for (int k = 0; k < 4; ++k) {
            product_columns(e, ones, columns_operand(memory) + k * 128);
        }
        products_commit();
        if (fault == RELEASES_EARLY && lane == 0) barrier_arrive(empty);
        if (fault == RELEASES_EARLY) __nanosleep(0);
        if (fault == STORES_BESIDE) memory[1024 + thread] = 1;
        if (fault == TOUCHES_ACCUMULATOR) d[3] *= 2.0f;
        if (fault == TOUCHES_OPERAND) ones[3] = 0;
        if (fault == READS_EARLY) out[thread] = d[3];
        products_wait<1>();
        if (fault == IS_DONE_EARLY) products_done(e); else products_done(d);
        if (fault == LEAVES_PRODUCT) return;
        products_wait<0>();
        products_done(e);
        if (fault == IS_NOT_RELEASED) continue;
        if (lane == 0 && fault != RELEASES_EARLY) barrier_arrive(empty);
        if (lane == 0 && fault == RELEASES_TWICE) barrier_arrive(empty);
    }
    if (fault == READS_EARLY) return;
    for (int i = 0; i < 32; ++i) d[i] += e[i];
    store<64>(d, out);
}
