// Stage 4: the forced blocks and the best-scored ones, ascending, without a sort.
//
// A row's competing scores are spread over the lanes of WARPS warps, HELD of them in registers of
// each lane, as integers that ascend with the scores. A bisection finds the integer from which on
// a block is chosen; it ends as soon as exactly as many blocks lie above as are wanted. Then one
// scan in the order of the blocks gives every chosen one its place. Of blocks that tie at the end
// of the budget the first ones are taken.
//
// Macros: BLOCK, BY_SLOT (see `Lines` of packing.py), HELD, WARPS (of one row), ROWS (of a block of
// threads; 1 unless WARPS is 1).
#include "packing.cuh"

constexpr int THREADS = 32 * WARPS * ROWS;
constexpr int NO_BLOCK = -2147483647 - 1;  // below the order of every score
constexpr int NONE = -0x7f800000;          // the order of -inf
constexpr int MOST = 0x7f800000;           // the order of +inf

// Both zeros are one score; NaN counts as -inf, so that it leaves no place unselected.
__device__ inline int order_of(float x) {
    const int bits = __float_as_int(x);
    if (x != x) return NONE;
    return bits < 0 ? -(bits & 0x7fffffff) : bits;
}

__device__ inline int sum_lanes(int x) {
#if defined(__CUDA_ARCH__)
    return __reduce_add_sync(ALL_LANES, x);
#else
    return warp_sum(x);
#endif
}

__device__ inline int min_lanes(int x) {
#if defined(__CUDA_ARCH__)
    return __reduce_min_sync(ALL_LANES, x);
#else
    for (int lane = 16; lane > 0; lane /= 2) {
        const int other = __shfl_xor_sync(ALL_LANES, x, lane);
        x = x < other ? x : other;
    }
    return x;
#endif
}

// The scores of a row that one warp works on: blocks begin .. end - 1, of which those from `init`
// to `last` compete. Lane l holds the blocks begin + 32 i + l, the first N of them in registers.
template <int N>
struct Segment {
    const float* scores;
    int begin;
    int end;
    int init;
    int last;
    int lane;
    int held[N];

    __device__ int load(int i) const {
        const int block = begin + 32 * i + lane;
        const bool competes = block >= init && block <= last && block < end;
        return competes ? order_of(scores[block]) : NO_BLOCK;
    }

    __device__ void fill() {
#pragma unroll
        for (int i = 0; i < N; ++i) held[i] = load(i);
    }

    // Steps of 32 blocks that hold anything.
    __device__ int steps() const {
        const int stop = last + 1 < end ? last + 1 : end;
        return stop > begin ? (stop - begin + 31) / 32 : 0;
    }

    __device__ int count_above(int bound) const {
        int count = 0;
#pragma unroll
        for (int i = 0; i < N; ++i) count += held[i] > bound;
        for (int i = N; i < steps(); ++i) count += load(i) > bound;
        return count;
    }
};

// Combines numbers of the WARPS warps of a row. Two sets of places alternate, so that one barrier
// is enough between a write and the next write to the same place.
struct Exchange {
    int (*places)[WARPS];
    int turn;
    int warp;

    // Sums over all warps; `before` becomes the sum over the warps in front of this one.
    __device__ int sum(int x, int* before = nullptr) {
        if (WARPS == 1) {
            if (before) *before = 0;
            return x;
        }
        publish(x);
        int total = 0;
        for (int i = 0; i < WARPS; ++i) {
            if (before && i == warp) *before = total;
            total += places[turn][i];
        }
        return total;
    }

    __device__ int min(int x) {
        if (WARPS == 1) return x;
        publish(x);
        int least = places[turn][0];
        for (int i = 1; i < WARPS; ++i) least = places[turn][i] < least ? places[turn][i] : least;
        return least;
    }

    __device__ void publish(int x) {
        turn ^= 1;
        if (threadIdx.x % 32 == 0) places[turn][warp] = x;
        __syncthreads();
    }
};

// Writes the `wanted` best of the blocks that compete, ascending, to `out`.
template <int N>
__device__ void choose(const float* scores, int* out, int init, int last, int wanted,
                       Exchange exchange) {
    const int lane = threadIdx.x % 32;
    const int blocks = last + 1;
    const int each = ((blocks + WARPS - 1) / WARPS + 31) / 32 * 32;
    const int begin = exchange.warp * each;
    Segment<N> row = {scores, begin, begin + each, init, last, lane, {}};
    row.fill();

    // `floor` is the order of the last chosen block; all above it are chosen, and `ties` at it.
    int floor = NO_BLOCK;
    int ties = 0;
    if (wanted < blocks - init) {
        int least = MOST;  // of real scores
        int highest = NO_BLOCK;
        int real = 0;
        auto take = [&](int x) {
            if (x > NONE && x < least) least = x;
            if (x > highest) highest = x;
            real += x > NONE;
        };
#pragma unroll
        for (int i = 0; i < N; ++i) take(row.held[i]);
        for (int i = N; i < row.steps(); ++i) take(row.load(i));
        least = exchange.min(min_lanes(least));
        highest = ~exchange.min(min_lanes(~highest));
        real = exchange.sum(sum_lanes(real));
        if (real < wanted) {  // blocks of -inf make up for the rest
            floor = NONE;
            ties = wanted - real;
        } else {
            int low = least - 1;  // `above_low` >= wanted lie above it
            int high = highest;   // `above_high` < wanted lie above it
            int above_low = real;
            int above_high = 0;
            while (above_low > wanted && high - 1 > low) {
                const int middle = (low & high) + ((low ^ high) >> 1);  // no overflow
                const int count = exchange.sum(sum_lanes(row.count_above(middle)));
                if (count >= wanted) {
                    low = middle;
                    above_low = count;
                } else {
                    high = middle;
                    above_high = count;
                }
            }
            const bool is_tied = above_low > wanted;
            floor = is_tied ? high : low;
            ties = is_tied ? wanted - above_high : 0;
        }
    }

    int place = 0;
    int seen = 0;  // of the blocks at `floor`, those in front
    if (WARPS > 1) {
        int level = 0;
#pragma unroll
        for (int i = 0; i < N; ++i) level += row.held[i] == floor;
        for (int i = N; i < row.steps(); ++i) level += row.load(i) == floor;
        exchange.sum(sum_lanes(row.count_above(floor)), &place);
        if (ties > 0) exchange.sum(sum_lanes(level), &seen);
        place += seen < ties ? seen : ties;
    }
    const unsigned below = (1u << lane) - 1;
    auto store = [&](int x, int block) {
        const bool above = x > floor;
        const unsigned chosen = __ballot_sync(ALL_LANES, above);
        if (ties == 0) {
            if (above) out[place + __popc(chosen & below)] = block;
            place += __popc(chosen);
            return;
        }
        const bool level = x == floor;
        const unsigned levels = __ballot_sync(ALL_LANES, level);
        const int left = ties - seen > 0 ? ties - seen : 0;
        const int nth = __popc(levels & below);
        const int fits = nth < left ? nth : left;
        if (above || (level && nth < left)) out[place + __popc(chosen & below) + fits] = block;
        const int all = __popc(levels);
        place += __popc(chosen) + (all < left ? all : left);
        seen += all;
    };
#pragma unroll
    for (int i = 0; i < N; ++i) store(row.held[i], begin + 32 * i + lane);
    for (int i = N; i < row.steps(); ++i) store(row.load(i), begin + 32 * i + lane);
}

// A named number of residents keeps the compiler from spilling for more of them.
extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS)
topk_kernel(const float* __restrict__ scores, int* __restrict__ selected,
            const int* __restrict__ ends_q, const int* __restrict__ ends_k, int batch, int total_q,
            int dense_len, int init, int local, int budget, int first_slot, int slots, int tile,
            long long head_stride, long long line_stride) {
    __shared__ int places[2][WARPS];
    const int warp = threadIdx.x / 32;
    const int index = blockIdx.x * ROWS + warp / WARPS;
    const int slot = index / tile;
    if (slot >= slots) return;
    const Tile at = find_tile(first_slot + slot, ends_q, batch, tile);
    const int row = at.first + index % tile;
    if (row >= at.rows) return;

    const int keys = length_of(ends_k, at.sequence);
    const int own = keys >= dense_len ? (keys - at.rows + row) / BLOCK : -1;
    const long long head = blockIdx.y;
    const long long line = BY_SLOT ? index : at.start + row;
    const float* in = scores + head * head_stride + line * line_stride;
    int* out = selected + (head * total_q + at.start + row) * budget;

    const int num_init = own + 1 < init ? own + 1 : init;
    const int last = own - local;  // the last block that competes; all from `init` on do
    const int competing = last >= init ? last - init + 1 : 0;
    const int num_local = own + 1 - num_init - competing;
    const int room = budget - num_init - num_local;
    const int wanted = room < competing ? room : competing;
    for (int place = threadIdx.x % (32 * WARPS); place < budget; place += 32 * WARPS) {
        const int behind = place - num_init - wanted;
        if (place < num_init) {
            out[place] = place;
        } else if (behind >= 0) {
            out[place] = behind < num_local ? own + 1 - num_local + behind : -1;
        }
    }
    if (wanted <= 0) return;
    const Exchange exchange = {places, 0, warp % WARPS};
    // Registers are worked through whether or not they hold a block: short rows take fewer.
    if (HELD >= 8 && last < 32 * WARPS * HELD / 4) {
        choose<(HELD >= 8 ? HELD / 4 : HELD)>(in, out + num_init, init, last, wanted, exchange);
    } else if (HELD >= 8 && last < 32 * WARPS * HELD / 2) {
        choose<(HELD >= 8 ? HELD / 2 : HELD)>(in, out + num_init, init, last, wanted, exchange);
    } else {
        choose<HELD>(in, out + num_init, init, last, wanted, exchange);
    }
}
