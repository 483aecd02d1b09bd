// Stage 4: the forced blocks and the best-scored ones, ascending, without a sort.
//
// A row is read twice. First come the best scores of 256 groups of its blocks: from them follows a
// bound that at least as many blocks exceed as are wanted, and hardly more. Then the blocks above
// the bound are listed, in their order. What is left is to choose among those few, by a bisection
// on the scores as integers and a scan that gives every chosen block its place. Of blocks that tie
// at the end of the budget the first ones are taken.
//
// Rows of which no bound leaves a few, such as those with very many ties, are bisected as a whole.
//
// Macros: BLOCK, BY_SLOT and TILE (see `Lines` of packing.py), WARPS (of one row), ROWS (of a block
// of threads; 1 unless WARPS is 1).
#include "packing.cuh"

constexpr int THREADS = 32 * WARPS * ROWS;
constexpr int NO_BLOCK = -2147483647 - 1;  // below the order of every score
constexpr int NONE = -0x7f800000;          // the order of -inf
constexpr int MOST = 0x7f800000;           // the order of +inf
constexpr int VECTOR = 4;                  // scores of one load, with an aligned address
constexpr int STEP = 32 * VECTOR;          // scores of one load by a warp
constexpr int SPAN = 32 * 32;              // scores that the words of a warp have a bit for
constexpr int TOPS = 2 * VECTOR;           // groups of each lane
constexpr int FEW = 256;                   // blocks to choose among without a look at all

// Both zeros are one score; NaN counts as -inf, so that it leaves no place unselected.
__device__ inline int order_of(float x) {
    const int bits = __float_as_int(fmaxf(x, NEGATIVE_INFINITY));
    return bits < 0 ? NO_BLOCK - bits : bits;
}

__device__ inline float score_of(int order) {
    return __int_as_float(order < 0 ? NO_BLOCK - order : order);
}

// Adds 1 if a > b. The compiler makes three instructions of the plain expression.
__device__ inline void count_if_above(int& count, int a, int b) {
#if defined(__CUDA_ARCH__)
    asm("{\n.reg .pred p;\nsetp.gt.s32 p, %1, %2;\n@p add.s32 %0, %0, 1;\n}"
        : "+r"(count) : "r"(a), "r"(b));
#else
    count += a > b;
#endif
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

// Blocks with the order of their scores, in registers: N of each lane, ascending over lanes first.
template <int N>
struct Held {
    int orders[N];
    int blocks[N];

    template <class F>
    __device__ void each(F f) const {
#pragma unroll
        for (int i = 0; i < N; ++i) f(orders[i], blocks[i]);
    }
};

// The same of a row that is read again and again.
struct Stored {
    const float* scores;
    int init;
    int last;

    template <class F>
    __device__ void each(F f) const {
#pragma unroll 1
        for (int first = init; first <= last; first += 32) {
            const int block = first + int(threadIdx.x % 32);
            f(block <= last ? order_of(scores[block]) : NO_BLOCK, block);
        }
    }
};

// Two orders with the number of blocks above them: at least the wanted one, and less.
struct Bracket {
    int low;
    int above_low;
    int high;
    int above_high;
};

// All of `total` blocks lie above `low`.
template <class Blocks>
__device__ Bracket bracket_of(const Blocks& blocks, int total) {
    constexpr unsigned FIRST = unsigned(NO_BLOCK) + 1;  // from which on NO_BLOCK is the highest number
    unsigned least = MOST - FIRST;
    int highest = NO_BLOCK;
    blocks.each([&](int order, int) {
        const unsigned number = order - FIRST;
        least = number < least ? number : least;
        highest = order > highest ? order : highest;
    });
    return {min_lanes(least + FIRST) - 1, total, ~min_lanes(~highest), 0};
}

// Bisects until at most `enough` blocks, and at least `wanted`, lie above `low`, or nothing is left
// between low and high.
template <class Blocks>
__device__ Bracket bisect(const Blocks& blocks, Bracket at, int wanted, int enough) {
    while (at.above_low > enough && at.high - 1 > at.low) {
        const int middle = (at.low & at.high) + ((at.low ^ at.high) >> 1);  // no overflow
        int count = 0;
        blocks.each([&](int order, int) { count_if_above(count, order, middle); });
        count = sum_lanes(count);
        if (count >= wanted) {
            at.low = middle;
            at.above_low = count;
        } else {
            at.high = middle;
            at.above_high = count;
        }
    }
    return at;
}

// Writes the `wanted` best of `total` blocks to `out`; nothing else may hang on the warp.
template <class Blocks>
__device__ void choose(const Blocks& blocks, int total, int wanted, int* out) {
    const Bracket at = bisect(blocks, bracket_of(blocks, total), wanted, wanted);
    // `floor` is the order of the last chosen block; all above it are chosen, and `ties` at it.
    const bool is_tied = at.above_low > wanted;
    const int floor = is_tied ? at.high : at.low;
    int ties = is_tied ? wanted - at.above_high : 0;
    const unsigned before = (1u << threadIdx.x % 32) - 1;
    unsigned place = 0;
    auto store = [&](bool chosen, int block) {
        const unsigned all = __ballot_sync(ALL_LANES, chosen);
        if (chosen) out[place + __popc(all & before)] = block;
        place += __popc(all);
    };
    if (ties == 0) {
        blocks.each([&](int order, int block) { store(order > floor, block); });
        return;
    }
    blocks.each([&](int order, int block) {
        const unsigned levels = __ballot_sync(ALL_LANES, order == floor);
        const bool fits = order == floor && __popc(levels & before) < ties;
        store(order > floor || fits, block);
        ties -= __popc(levels);
    });
}

// Chooses among blocks of a list.
template <int N>
__device__ void choose_listed(const float* scores, const int* list, int total, int wanted,
                              int* out) {
    Held<N> held;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const int place = 32 * i + int(threadIdx.x % 32);
        held.blocks[i] = list[place < total ? place : 0];
        const int order = order_of(__ldg(scores + unsigned(held.blocks[i])));
        held.orders[i] = place < total ? order : NO_BLOCK;
    }
    choose(held, total, wanted, out);
}

// The scores that one warp reads: from `begin` to `end` - 1 behind an aligned address.
struct Part {
    const float* scores;
    int begin;
    int end;

    __device__ float4 load(int at) const {
        return __ldg(reinterpret_cast<const float4*>(scores + unsigned(at)));
    }
};

// Finds the best score of each of 256 groups. A lane's next scores are of its other groups, so that
// neighbours, which often score alike, are of different ones. Less than one step in front is left
// out: that loosens the bound, but whatever the groups have, the bound holds.
__device__ void find_tops(const Part& part, float (&tops)[TOPS]) {
#pragma unroll
    for (int i = 0; i < TOPS; ++i) tops[i] = NEGATIVE_INFINITY;
    auto take = [&](int at, int group) {
        const float4 x = part.load(at);
        tops[group] = fmaxf(tops[group], x.x);  // which is never NaN
        tops[group + 1] = fmaxf(tops[group + 1], x.y);
        tops[group + 2] = fmaxf(tops[group + 2], x.z);
        tops[group + 3] = fmaxf(tops[group + 3], x.w);
    };
    int at = part.end / VECTOR * VECTOR + VECTOR * int(threadIdx.x % 32);
    int steps = (part.end / VECTOR * VECTOR - part.begin) / STEP;
    at -= steps * STEP;
#pragma unroll 2
    for (; steps >= 2; steps -= 2, at += 2 * STEP) {
        take(at, 0);
        take(at + STEP, VECTOR);
    }
    if (steps > 0) take(at, 0);
}

// Returns an order that is exceeded by at least `wanted` of the groups, hence of the blocks.
__device__ int find_bound(const float (&tops)[TOPS], int wanted) {
    Held<TOPS> held;
#pragma unroll
    for (int i = 0; i < TOPS; ++i) {
        held.orders[i] = order_of(tops[i]);
        held.blocks[i] = 0;
    }
    // A few more cost less than the steps of a search for exactly as many.
    return bisect(held, bracket_of(held, 32 * TOPS), wanted, wanted + wanted / 4).low;
}

// Adds the bits of four scores to a word: which of them exceed the bound. The sign of a difference
// needs less than a comparison. That of NaN may be any: to list a block too many does no harm.
__device__ inline unsigned push_bits(unsigned word, float4 x, float bound) {
    word = word << 1 | __float_as_uint(bound - x.w) >> 31;
    word = word << 1 | __float_as_uint(bound - x.z) >> 31;
    word = word << 1 | __float_as_uint(bound - x.y) >> 31;
    return word << 1 | __float_as_uint(bound - x.x) >> 31;
}

// From bits for steps of 32 vectors, lane l those of the l-th vectors, to bits for 32 scores in a
// row, lane l those from 32 l on. Four bits are always moved together: lanes that differ in one bit
// of their number exchange the halves in which a step's number differs in that bit.
__device__ inline unsigned in_order(unsigned word) {
    const int lane = threadIdx.x % 32;
    unsigned other = __shfl_xor_sync(ALL_LANES, word, 1);
    word = lane & 1 ? (word & 0xf0f0f0f0u) | (other >> 4 & 0x0f0f0f0fu)
                    : (word & 0x0f0f0f0fu) | (other << 4 & 0xf0f0f0f0u);
    other = __shfl_xor_sync(ALL_LANES, word, 2);
    word = __byte_perm(word, other, lane & 2 ? 0x3715 : 0x6240);
    other = __shfl_xor_sync(ALL_LANES, word, 4);
    word = __byte_perm(word, other, lane & 4 ? 0x3276 : 0x5410);
    return __shfl_sync(ALL_LANES, word, lane % 4 * 8 + lane / 4);
}

// Lists the blocks above the bound, ascending, and returns how many they are, or more than FEW.
__device__ int list_above(const Part& part, float bound, int first_block, int* list) {
    const int lane = threadIdx.x % 32;
    const int last_vector = (part.end - 1) / VECTOR * VECTOR;
    int total = 0;
    for (int span = part.begin / VECTOR * VECTOR; span < part.end; span += SPAN) {
        unsigned word = 0;
        auto take = [&](int from) {  // four steps, the last one first
            float4 x[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int at = from + i * STEP + VECTOR * lane;
                x[i] = part.load(at < last_vector ? at : last_vector);
            }
#pragma unroll
            for (int i = 3; i >= 0; --i) word = push_bits(word, x[i], bound);
        };
        if (span + SPAN / 2 < part.end) take(span + SPAN / 2);
        take(span);

        const int first = span + 32 * lane;
        word = in_order(word);
        if (first < part.begin) word &= ALL_LANES << (part.begin - first);
        const int behind = first + 32 - part.end;
        if (behind > 0) word = behind < 32 ? word & ALL_LANES >> behind : 0;

        const int mine = __popc(word);
        int place = mine;  // and of all lanes in front
        for (int by = 1; by < 32; by *= 2) {
            const int other = __shfl_up_sync(ALL_LANES, place, by);
            if (lane >= by) place += other;
        }
        const int next = total + __shfl_sync(ALL_LANES, place, 31);
        if (next > FEW) return next;
        place += total - mine;
        total = next;
        for (; word; word &= word - 1) list[place++] = first_block + first + __ffs(word) - 1;
    }
    return total;
}

// Puts the groups' best scores of all warps together.
__device__ void join_tops(float (&tops)[TOPS], float (*shared)[THREADS]) {
#pragma unroll
    for (int i = 0; i < TOPS; ++i) shared[i][threadIdx.x] = tops[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < TOPS; ++i) {
        for (int at = threadIdx.x % 32; at < THREADS; at += 32) {
            tops[i] = fmaxf(tops[i], shared[i][at]);
        }
    }
}

// Puts the lists of all warps behind that of the first one; returns how many blocks they have.
__device__ int join_lists(int mine, int (*lists)[FEW], int* totals) {
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 0) totals[warp] = mine;
    __syncthreads();
    int total = 0;
    int place = 0;
    for (int i = 0; i < WARPS; ++i) {
        if (i == warp) place = total;
        total += totals[i];
    }
    if (warp > 0 && total <= FEW) {
        for (int i = threadIdx.x % 32; i < mine; i += 32) lists[0][place + i] = lists[warp][i];
    }
    __syncthreads();
    return total;
}

// Registers for 40 warps of a multiprocessor: what a row waits for are loads and sums over lanes.
extern "C" __global__ void __launch_bounds__(THREADS, 1280 / THREADS)
topk_kernel(const float* __restrict__ scores, int* __restrict__ selected,
            const int* __restrict__ ends_q, const int* __restrict__ ends_k, int batch, int total_q,
            int dense_len, int init, int local, int budget, int first_slot, int slots,
            long long size, long long head_stride, long long line_stride) {
    __shared__ int lists[WARPS * ROWS][FEW];
    const int warp = threadIdx.x / 32;
    const int index = blockIdx.x * ROWS + warp / WARPS;
    const int slot = index / TILE;
    if (slot >= slots) return;
    const Tile at = find_tile(first_slot + slot, ends_q, batch, TILE);
    const int row = at.first + index % TILE;
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
    const bool is_choice = wanted > 0 && wanted < competing;
    const int front = is_choice ? num_init : num_init + wanted;  // blocks that need no choice
#pragma unroll 1
    for (int place = threadIdx.x % (32 * WARPS); place < budget; place += 32 * WARPS) {
        const int behind = place - num_init - wanted;
        if (place < front) {
            out[place] = place;
        } else if (behind >= 0) {
            out[place] = behind < num_local ? own + 1 - num_local + behind : -1;
        }
    }
    if (!is_choice) return;
    out += num_init;

    // The first and the last vector hold up to three scores that do not compete, or lie outside of
    // the line. A row where they lie outside of the tensor is read score by score.
    const uint64_t first = reinterpret_cast<uint64_t>(in + init);
    const int skipped = int(first / sizeof(float) % VECTOR);
    const int end = skipped + competing;
    const long long begin_at = in + init - scores - skipped;
    const bool is_inside =
        begin_at >= 0 && begin_at + (end + VECTOR - 1) / VECTOR * VECTOR <= size;

    int* const list = lists[warp];
    int total = competing;
    if (competing > FEW && wanted <= FEW && is_inside) {
        const int each = ((end + WARPS - 1) / WARPS + STEP - 1) / STEP * STEP;
        const int begin = warp % WARPS * each;
        const Part part = {scores + begin_at,
                           begin > 0 ? begin : skipped,
                           begin + each < end ? begin + each : end};
        float tops[TOPS];
        find_tops(part, tops);
        if (WARPS > 1) {
            __shared__ float shared_tops[WARPS > 1 ? TOPS : 1][THREADS];
            join_tops(tops, shared_tops);
        }
        const int bound = find_bound(tops, wanted);
        // From -inf no difference is taken.
        total = bound > NONE ? list_above(part, score_of(bound), init - skipped, list) : FEW + 1;
        if (WARPS > 1) {
            __shared__ int totals[WARPS];
            total = join_lists(total, lists, totals);
        }
    } else if (competing <= FEW) {
        for (int i = threadIdx.x % 32; i < competing; i += 32) list[i] = init + i;
    }
    if (WARPS > 1 && warp > 0) return;
    __syncwarp();
    if (total <= FEW / 2) {
        choose_listed<FEW / 64>(in, list, total, wanted, out);
    } else if (total <= FEW) {
        choose_listed<FEW / 32>(in, list, total, wanted, out);
    } else {
        choose(Stored{in, init, last}, competing, wanted, out);
    }
}
