// The forward of `attend` for Hopper GPUs: three groups of warps over one union of pieces.
//
// A tile has 192 rows, 64 for each group: with 16 heads per kv head, four tokens. One warp loads
// the keys and values of the tile's pieces into two rings, in the order of the union. Every group
// walks over the same list, but multiplies only the pieces that its own tokens attend. While a
// group's weights of one piece are multiplied with the values, it takes the exponentials of the
// next one.
//
// Macros: BF16, GROUP (8, 16 or 32), D (64 or 128), STAGES.

#include "hopper.cuh"

constexpr int PIECE = 64;
constexpr int GROUPS = 3;
constexpr int ROWS = 64;
constexpr int TOKENS = ROWS / GROUP;  // of a group
constexpr int PANELS = D / 64;
constexpr int THREADS = 128 * (GROUPS + 1);
constexpr int FIELDS = 6;
constexpr uint32_t EVERY = (1u << TOKENS) - 1;
constexpr uint32_t TILE_BYTES = PANELS * PANEL;
constexpr float LOWEST = -3.0e38f;  // finite, so that differences are

struct Shared {
    alignas(1024) uint8_t queries[GROUPS][TILE_BYTES];
    alignas(1024) uint8_t keys[STAGES][TILE_BYTES];
    alignas(1024) uint8_t values[STAGES][TILE_BYTES];
    uint64_t keys_full[STAGES];
    uint64_t keys_empty[STAGES];
    uint64_t values_full[STAGES];
    uint64_t values_empty[STAGES];
};

// One tile of one kv head: what `union.cu` says of it.
struct Tile {
    int row, base, first, num_keys, key_row;
    bool dense;
    int count;
    const int* pieces;  // unwritten where the tile is dense
    const int* members;
};

static __device__ __forceinline__ Tile read_tile(const int* tiles, const int* counts,
                                                 const int* pieces, const int* members,
                                                 int num_tiles, int capacity) {
    const int* record = tiles + int64_t(blockIdx.x) * FIELDS;
    const int item = blockIdx.y * num_tiles + blockIdx.x;
    const int64_t line = int64_t(item) * capacity;
    return {record[0],      record[1],    record[2],     record[3],     record[4],
            record[5] != 0, counts[item], pieces + line, members + line};
}

// ---- the warp that loads ----

static __device__ __forceinline__ void load_pieces(Shared& shared, const Tile& tile,
                                                   const TensorMap* keys, const TensorMap* values) {
    const int lane = threadIdx.x % 32;
    for (int begin = 0; begin < tile.count; begin += 32) {
        const int own = begin + lane;
        int piece = tile.count - 1 - own;
        if (!tile.dense && own < tile.count) piece = tile.pieces[own];
        const int end = min(32, tile.count - begin);
        for (int j = 0; j < end; ++j) {
            const int row = tile.key_row + __shfl_sync(ALL_LANES, piece, j) * PIECE;
            const int stage = (begin + j) % STAGES;
            const uint32_t parity = (((begin + j) / STAGES) & 1) ^ 1;
            if (lane == 0) {
                barrier_wait(&shared.keys_empty[stage], parity);
                barrier_expect(&shared.keys_full[stage], TILE_BYTES);
                for (int p = 0; p < PANELS; ++p)
                    copy_box(shared.keys[stage] + p * PANEL, keys, p * 64, blockIdx.y, row,
                             &shared.keys_full[stage]);
                barrier_wait(&shared.values_empty[stage], parity);
                barrier_expect(&shared.values_full[stage], TILE_BYTES);
                for (int p = 0; p < PANELS; ++p)
                    copy_box(shared.values[stage] + p * PANEL, values, p * 64, blockIdx.y, row,
                             &shared.values_full[stage]);
            }
            __syncwarp();
        }
    }
}

// ---- which pieces a group attends ----

// Walk over a tile's list, 32 pieces at a time: lane i holds the bits of piece `begin + i`.
struct Members {
    const Tile& tile;
    int shift, opens;  // the group's first bit; where a dense tile's group begins
    int begin;
    uint32_t bits, some;

    __device__ Members(const Tile& tile, int shift, int opens)
        : tile(tile), shift(shift), opens(opens) {
        read(0);
    }

    __device__ void read(int at) {
        begin = at;
        const int own = at + threadIdx.x % 32;
        bits = 0;
        if (own < tile.count) {
            if (tile.dense)
                bits = own >= opens ? EVERY : 0;
            else
                bits = (uint32_t(tile.members[own]) >> shift) & EVERY;
        }
        some = __ballot_sync(ALL_LANES, bits != 0);
    }

    // Return the first piece from `at` on that some token of the group attends, or the count. The
    // compiler does not know that all lanes agree; a shuffle tells it, and stages become uniform.
    __device__ int next(int at) { return __shfl_sync(ALL_LANES, search(at), 0); }

    __device__ int search(int at) {
        while (at < tile.count) {
            if (at >= begin + 32) read(begin + 32);
            const uint32_t left = some >> (at - begin);
            if (left) return at + __ffs(left) - 1;
            at = begin + 32;
        }
        return tile.count;
    }

    __device__ uint32_t of(int at) const { return __shfl_sync(ALL_LANES, bits, at - begin); }
};

// A warp's count of rounds: it must see every round of a stage, since barriers have only a parity.
static __device__ __forceinline__ uint32_t round_of(int i) { return (i / STAGES) & 1; }

static __device__ __forceinline__ void release(uint64_t* barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

// Wait for the pieces `from .. to - 1`, and release them unread.
static __device__ __forceinline__ void skip(Shared& shared, int from, int to) {
#pragma unroll 1
    for (int i = from; i < to; ++i) {
        const int stage = i % STAGES;
        barrier_wait(&shared.keys_full[stage], round_of(i));
        release(&shared.keys_empty[stage]);
        barrier_wait(&shared.values_full[stage], round_of(i));
        release(&shared.values_empty[stage]);
    }
}

// ---- arithmetic ----

static __device__ __forceinline__ void start_logits(float (&logits)[32], const uint8_t* queries,
                                                    const uint8_t* keys) {
    const uint64_t a = rows_descriptor(shared_address(queries)),
                   b = rows_descriptor(shared_address(keys));
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        const uint32_t step = ((k / 4) * PANEL + (k % 4) * 32) >> 4;
        product_rows(logits, further(a, step), further(b, step), k > 0);
    }
}

static __device__ __forceinline__ void start_output(float (&acc)[D / 2],
                                                    const uint32_t (&weights)[16],
                                                    const uint8_t* values) {
    const uint64_t b = columns_descriptor(shared_address(values));
#pragma unroll
    for (int k = 0; k < PIECE / 16; ++k)
        product_columns(acc, &weights[4 * k], further(b, (k * 2048) >> 4));
}

// The running softmax of the two rows that a thread has a part of, in base 2.
struct Softmax {
    float top[2] = {LOWEST, LOWEST};
    float total[2] = {0.0f, 0.0f};  // of this thread's columns

    // Turn logits into weights, in place, and say by what to multiply what was summed up before.
    __device__ void weigh(float (&logits)[32], const bool (&member)[2], float scale,
                          float (&share)[2]) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            share[h] = 1.0f;
            if (!member[h]) {  // the same for a whole row: its weights are 0
#pragma unroll
                for (int j = 0; j < 8; ++j)
                    logits[4 * j + 2 * h] = logits[4 * j + 2 * h + 1] = 0.0f;
                continue;
            }
            float highest = logits[2 * h];
#pragma unroll
            for (int j = 0; j < 8; ++j)
                highest = fmaxf(highest, fmaxf(logits[4 * j + 2 * h], logits[4 * j + 2 * h + 1]));
            highest = fmaxf(highest, __shfl_xor_sync(ALL_LANES, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(ALL_LANES, highest, 2));
            const float above = fmaxf(top[h], highest * scale);
            share[h] = exp2_fast(top[h] - above);
            top[h] = above;
            float sum[2] = {0.0f, 0.0f};  // two chains of additions
#pragma unroll
            for (int j = 0; j < 8; ++j) {
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    float& x = logits[4 * j + 2 * h + c];
                    x = exp2_fast(fmaf(x, scale, -above));
                    sum[c] += x;
                }
            }
            total[h] = fmaf(total[h], share[h], sum[0] + sum[1]);
        }
    }
};

// Round weights to the operand of the second product.
static __device__ __forceinline__ void pack(const float (&weights)[32], uint32_t (&packed)[16]) {
#pragma unroll
    for (int k = 0; k < 16; ++k) packed[k] = pack2(weights[2 * k], weights[2 * k + 1]);
}

static __device__ __forceinline__ void multiply(float (&acc)[D / 2], const float (&share)[2]) {
    if (__any_sync(ALL_LANES, (share[0] != 1.0f) | (share[1] != 1.0f))) {
#pragma unroll
        for (int i = 0; i < D / 2; ++i) acc[i] *= share[(i / 2) % 2];
    }
}

// ---- one group of warps ----

struct Output {
    half_t* out;
    float* lse;
};

static __device__ __forceinline__ void attend_rows(Shared& shared, const Tile& tile, int group,
                                                   const half_t* q, Output to, int64_t q_row_stride,
                                                   int64_t q_head_stride, int heads, float scale) {
    const int thread = threadIdx.x % 128, lane = threadIdx.x % 32;
    const int shift = group * TOKENS;
    const int base = tile.base + shift;  // position of the group's first token
    uint8_t* queries = shared.queries[group];

    // Rows of queries, swizzled as the copy engine does: 16 bytes at a time.
    for (int i = thread; i < ROWS * D / 8; i += 128) {
        const int row = i / (D / 8), chunk = i % (D / 8);
        const int token = row / GROUP, position = base + token;
        uint4 chunk_of_row = make_uint4(0, 0, 0, 0);
        if (position >= tile.first && position < tile.num_keys) {
            const int64_t at = int64_t(tile.row + shift + token) * q_row_stride +
                               (blockIdx.y * GROUP + row % GROUP) * q_head_stride + chunk * 8;
            chunk_of_row = *reinterpret_cast<const uint4*>(q + at);
        }
        const int place = (chunk / 8) * PANEL + row * 128 + (((chunk % 8) ^ (row % 8)) * 16);
        *reinterpret_cast<uint4*>(queries + place) = chunk_of_row;
    }
    fence_async_shared();
    barrier_sync(group + 1, 128);

    // The accumulator gives a thread two rows.
    const int row = (thread / 32) * 16 + lane / 4;
    const int token[2] = {row / GROUP, (row + 8) / GROUP};

    float acc[D / 2], logits[32], share[2];
    uint32_t weights[16];
    Softmax softmax;
#pragma unroll
    for (int i = 0; i < D / 2; ++i) acc[i] = 0.0f;

    int opens = 0;
    if (tile.dense) {
        const bool some = base < tile.num_keys && base + TOKENS > tile.first;
        const int latest = some ? base / PIECE : -1;
        opens = max(tile.count - 1 - latest, 0);
    }
    Members members(tile, shift, opens);
    int i = members.next(0);
    skip(shared, 0, i);
    if (i < tile.count) {
        // The latest piece: it may hold keys after a query, or end behind the sequence.
        int stage = i % STAGES;
        barrier_wait(&shared.keys_full[stage], round_of(i));
        products_fence();
        start_logits(logits, queries, shared.keys[stage]);
        products_commit();
        const int piece = tile.dense ? tile.count - 1 - i : tile.pieces[i];
        uint32_t bits = members.of(i);
        products_wait<0>();
        products_done(logits);
        release(&shared.keys_empty[stage]);
#pragma unroll
        for (int j = 0; j < 32; ++j) {
            const int key = piece * PIECE + (j / 4) * 8 + (lane % 4) * 2 + j % 2;
            if (key > base + token[(j / 2) % 2]) logits[j] = NEGATIVE_INFINITY;
        }
        if ((piece + 1) * PIECE > tile.num_keys) {
            // Behind the sequence lies anything, and 0 times NaN is NaN. All groups write the same
            // zeros.
            barrier_wait(&shared.values_full[stage], round_of(i));
            const int kept = tile.num_keys - piece * PIECE;
            for (int c = thread; c < (PIECE - kept) * PANELS * 8; c += 128) {
                const int key = kept + c / (PANELS * 8), chunk = c % (PANELS * 8);
                uint8_t* at =
                    shared.values[stage] + (chunk / 8) * PANEL + key * 128 + (chunk % 8) * 16;
                *reinterpret_cast<uint4*>(at) = make_uint4(0, 0, 0, 0);
            }
            fence_async_shared();
            barrier_sync(group + 1, 128);
        }
        bool member[2] = {bool((bits >> token[0]) & 1), bool((bits >> token[1]) & 1)};
        softmax.weigh(logits, member, scale, share);  // nothing was summed up before
        pack(logits, weights);

        for (int next = members.next(i + 1); next < tile.count; next = members.next(i + 1)) {
            // Skipped pieces are released at once; but the loader needs stage `i` for piece `i +
            // STAGES`.
            if (next - i <= STAGES) {
                skip(shared, i + 1, next);
                const int ahead = next % STAGES;
                barrier_wait(&shared.keys_full[ahead], round_of(next));
                products_fence();
                start_logits(logits, queries, shared.keys[ahead]);
                products_commit();
                barrier_wait(&shared.values_full[stage], round_of(i));
                products_fence();
                start_output(acc, weights, shared.values[stage]);
                products_commit();
                bits = members.of(next);
                products_wait<1>();
                products_done(logits);
                release(&shared.keys_empty[ahead]);
                member[0] = (bits >> token[0]) & 1;
                member[1] = (bits >> token[1]) & 1;
                softmax.weigh(logits, member, scale, share);
                products_wait<0>();
                products_done(acc);
                release(&shared.values_empty[stage]);
                // Both here, as ptxas serialises products if registers of one change while any
                // runs.
                multiply(acc, share);
                pack(logits, weights);
                stage = ahead;
            } else {
                // Nothing to overlap with: the next piece is further than the ring is long.
                barrier_wait(&shared.values_full[stage], round_of(i));
                products_fence();
                start_output(acc, weights, shared.values[stage]);
                products_commit();
                products_wait<0>();
                products_done(acc);
                release(&shared.values_empty[stage]);
                skip(shared, i + 1, next);
                stage = next % STAGES;
                barrier_wait(&shared.keys_full[stage], round_of(next));
                products_fence();
                start_logits(logits, queries, shared.keys[stage]);
                products_commit();
                bits = members.of(next);
                products_wait<0>();
                products_done(logits);
                release(&shared.keys_empty[stage]);
                member[0] = (bits >> token[0]) & 1;
                member[1] = (bits >> token[1]) & 1;
                softmax.weigh(logits, member, scale, share);
                multiply(acc, share);
                pack(logits, weights);
            }
            i = next;
        }
        barrier_wait(&shared.values_full[stage], round_of(i));
        products_fence();
        start_output(acc, weights, shared.values[stage]);
        products_commit();
        products_wait<0>();
        products_done(acc);
        release(&shared.values_empty[stage]);
        skip(shared, i + 1, tile.count);
    }

#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float total = softmax.total[h];
        total += __shfl_xor_sync(ALL_LANES, total, 1);
        total += __shfl_xor_sync(ALL_LANES, total, 2);
        const int position = base + token[h];
        if (position < tile.first || position >= tile.num_keys) continue;
        const float share = total > 0.0f ? 1.0f / total : 1.0f;
        const int64_t at = int64_t(tile.row + shift + token[h]) * heads + blockIdx.y * GROUP +
                           (row + 8 * h) % GROUP;
        if (lane % 4 == 0)
            to.lse[at] =
                total > 0.0f ? (softmax.top[h] + log2_fast(total)) * LN_2 : NEGATIVE_INFINITY;
        uint32_t* out = reinterpret_cast<uint32_t*>(to.out + at * D) + lane % 4;
#pragma unroll
        for (int j = 0; j < D / 8; ++j)
            out[4 * j] = pack2(acc[4 * j + 2 * h] * share, acc[4 * j + 2 * h + 1] * share);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attend_hopper(const __grid_constant__ TensorMap keys, const __grid_constant__ TensorMap values,
                  const half_t* __restrict__ q, half_t* __restrict__ out, float* __restrict__ lse,
                  const int* __restrict__ tiles, const int* __restrict__ counts,
                  const int* __restrict__ pieces, const int* __restrict__ members,
                  int64_t q_row_stride, int64_t q_head_stride, int num_tiles, int capacity,
                  float scale) {
    DYNAMIC_SHARED(uint8_t, memory);
    if (shared_address(memory) % 1024 != 0) __trap();  // swizzles count from there
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const Tile tile = read_tile(tiles, counts, pieces, members, num_tiles, capacity);
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(&shared.keys_full[stage], 1);
            barrier_init(&shared.values_full[stage], 1);
            barrier_init(&shared.keys_empty[stage],
                         GROUPS * 4);  // one for each warp that multiplies
            barrier_init(&shared.values_empty[stage], GROUPS * 4);
        }
        fence_barrier_init();
    }
    __syncthreads();
    const int group = __shfl_sync(ALL_LANES, threadIdx.x / 128, 0);
    if (group == GROUPS) {
        give_registers<24>();
        if (threadIdx.x < 128 * GROUPS + 32) load_pieces(shared, tile, &keys, &values);
    } else {
        take_registers<160>();
        attend_rows(shared, tile, group, q, {out, lse}, q_row_stride, q_head_stride,
                    gridDim.y * GROUP, scale);
    }
}
