// The forward of `attend` for Hopper GPUs: three groups of warps over one union of pieces.
//
// A tile has 192 rows, 64 for each group: with 16 heads per kv head, four tokens. One warp loads
// the keys of the tile's pieces into a ring, in the order of the union, and another one the values.
// A group takes only the pieces that its own tokens attend, and never looks at the others: the
// loader releases those on its behalf. While a group's weights of one piece are multiplied with the
// values, it takes the exponentials of the next one.
//
// A block of threads takes one tile after another, and all its warps go on at their own pace: while
// a group finishes its tile, others may be at the next one, whose pieces follow in the same rings.
//
// Macros: BF16, GROUP (8, 16 or 32), D (64 or 128), STAGES, SHARED_BYTES (of dynamic memory).

#include "hopper.cuh"

constexpr int PIECE = 64;
constexpr int GROUPS = 3;
constexpr int WARPS = 4;  // of a group
constexpr int ROWS = 64;
constexpr int TOKENS = ROWS / GROUP;  // of a group
constexpr int PANELS = D / 64;
constexpr int THREADS = 128 * (GROUPS + 1);
constexpr int FIELDS = 6;
constexpr uint32_t EVERY = (1u << TOKENS) - 1;
constexpr uint32_t TILE_BYTES = PANELS * PANEL;
constexpr float LOWEST = -3.0e38f;  // finite, so that differences are
constexpr float MOST = 256.0f;      // that weights of a thread's row may sum up to: see Softmax

// Pieces of keys, or of values, on their way from the loader to the groups. Pieces of all tiles of a
// block of threads are counted on: piece i lies in stage i % STAGES, and that stage is full for the
// (i / STAGES)th time then.
struct Ring {
    uint64_t full[STAGES];
    uint64_t empty[STAGES];
    int begun;  // pieces whose load has begun
};

struct Shared {
    alignas(1024) uint8_t queries[GROUPS][TILE_BYTES];
    alignas(1024) uint8_t keys[STAGES][TILE_BYTES];
    alignas(1024) uint8_t values[STAGES][TILE_BYTES];
    Ring ring_of_keys;
    Ring ring_of_values;
};

// One tile of one kv head: what `union.cu` says of it.
struct Tile {
    int kv_head, row, base, first, num_keys, key_row;
    bool dense;
    int count;
    const int* pieces;  // unwritten where the tile is dense
    const int* members;
    int before;  // pieces of the tiles that this block of threads took before
};

// The tiles of all kv heads, of which every block of threads takes some.
struct Tiles {
    const int* records;
    const int* counts;
    const int* pieces;
    const int* members;
    int num_tiles, kv_heads, capacity;

    // Run for each tile of this block of threads: they are dealt out in turn, the longest first.
    template <class Body>
    __device__ __forceinline__ void for_own(Body body) const {
        int before = 0;
        const int items = num_tiles * kv_heads;
        for (int item = blockIdx.x; item < items; item += gridDim.x) {
            const int kv_head = item / num_tiles;
            const int index = num_tiles - 1 - item % num_tiles;
            const int* record = records + int64_t(index) * FIELDS;
            const int at = kv_head * num_tiles + index;
            const int64_t line = int64_t(at) * capacity;
            const Tile tile = {kv_head,    record[0],      record[1],  record[2],
                               record[3],  record[4],      record[5] != 0, counts[at],
                               pieces + line, members + line, before};
            body(tile);
            before += tile.count;
        }
    }
};

// ---- which pieces a group attends ----

// Return the bits of the tokens of a tile that attend piece `own` of its list.
static __device__ __forceinline__ uint32_t members_of(const Tile& tile, int own) {
    if (!tile.dense) return uint32_t(tile.members[own]);
    // All tokens from the piece of their group's last token on.
    uint32_t bits = 0;
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
        const int base = tile.base + group * TOKENS;
        const bool some = base < tile.num_keys && base + TOKENS > tile.first;
        if (some && tile.count - 1 - own <= base / PIECE) bits |= EVERY << (group * TOKENS);
    }
    return bits;
}

// A piece that a group attends: its number, where it lies in the rings, and which of the group's
// tokens attend it.
struct Step {
    int index;
    int stage;
    uint32_t parity;
    uint32_t bits;
};

// Walks over a tile's list, 32 pieces at a time: lane i holds the bits of piece `begin + i`.
struct Walk {
    const Tile& tile;
    int shift;  // the group's first bit
    int begin;
    uint32_t bits, left;

    __device__ __forceinline__ Walk(const Tile& tile, int shift) : tile(tile), shift(shift) {
        read(0);
    }

    __device__ __forceinline__ void read(int at) {
        begin = at;
        const int own = at + threadIdx.x % 32;
        bits = own < tile.count ? (members_of(tile, own) >> shift) & EVERY : 0;
        left = __ballot_sync(ALL_LANES, bits != 0);
    }

    // Return the next piece that some token of the group attends; after the last one, `end()`.
    __device__ __forceinline__ Step next() {
        while (left == 0 && begin + 32 < tile.count) read(begin + 32);
        const int lane = left ? __ffs(left) - 1 : 0;
        const int index = left ? tile.before + begin + lane : end();
        left &= left - 1;
        return {index, index % STAGES, uint32_t(index / STAGES) & 1,
                __shfl_sync(ALL_LANES, bits, lane)};
    }

    __device__ __forceinline__ int end() const { return tile.before + tile.count; }
};

// ---- a warp that loads ----

static __device__ __forceinline__ void load_pieces(Ring& ring, uint8_t (*stages)[TILE_BYTES],
                                                   const Tile& tile, const TensorMap* map) {
    const int lane = threadIdx.x % 32;
    for (int begin = 0; begin < tile.count; begin += 32) {
        const int own = begin + lane;
        int piece = tile.count - 1 - own;
        int absent = 0;  // arrivals of the warps that do not attend it
        if (own < tile.count) {
            if (!tile.dense) piece = tile.pieces[own];
            const uint32_t members = members_of(tile, own);
#pragma unroll
            for (int group = 0; group < GROUPS; ++group)
                absent += (members >> (group * TOKENS)) & EVERY ? 0 : WARPS;
        }
        const int end = min(32, tile.count - begin);
#pragma unroll 1
        for (int j = 0; j < end; ++j) {
            const int row = tile.key_row + __shfl_sync(ALL_LANES, piece, j) * PIECE;
            const int others = __shfl_sync(ALL_LANES, absent, j);
            const int i = tile.before + begin + j;
            const int stage = i % STAGES;
            if (lane == 0) {
                barrier_wait(&ring.empty[stage], ((i / STAGES) & 1) ^ 1);
                if (others) barrier_arrive(&ring.empty[stage], others);
                barrier_expect(&ring.full[stage], TILE_BYTES);
                for (int p = 0; p < PANELS; ++p)
                    copy_box(stages[stage] + p * PANEL, map, p * 64, tile.kv_head, row,
                             &ring.full[stage]);
                publish(&ring.begun, i + 1);
            }
            __syncwarp();
        }
    }
}

// ---- a ring, as a warp sees it that multiplies ----

// Barriers have only a parity, and a warp does not see every round of a stage. So before it waits
// for a round, it makes sure that the load of that round has begun: then the barrier cannot be a
// round behind.
struct Reader {
    Ring& ring;
    int begun = 0;  // what is known of `ring.begun`

    __device__ __forceinline__ void wait(const Step& step) {
        if (begun <= step.index) begun = wait_published(&ring.begun, step.index + 1);
        barrier_wait(&ring.full[step.stage], step.parity);
    }

    __device__ __forceinline__ void release(const Step& step) {
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(&ring.empty[step.stage]);
    }
};

// ---- arithmetic ----

static __device__ __forceinline__ void start_logits(float (&logits)[32], const uint8_t* queries,
                                                    const uint8_t* keys) {
    const uint32_t a = rows_operand(queries), b = rows_operand(keys);
    products_fence();
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        const uint32_t step = ((k / 4) * PANEL + (k % 4) * 32) >> 4;
        product_rows(logits, a + step, b + step, k > 0);
    }
    products_commit();
}

static __device__ __forceinline__ void start_output(float (&acc)[D / 2],
                                                    const uint32_t (&weights)[16],
                                                    const uint8_t* values) {
    const uint32_t b = columns_operand(values);
    products_fence();
#pragma unroll
    for (int k = 0; k < PIECE / 16; ++k)
        product_columns(acc, &weights[4 * k], b + ((k * 2048) >> 4));
    products_commit();
}

// The running softmax of the two rows that a thread has a part of, in base 2.
//
// Weights are 2**(logit - top), where `top` is the highest logit of some earlier piece: it is
// raised only if the weights of some thread sum up to more than MOST. So most steps need no maximum
// of a row, and leave the accumulator as it is.
struct Softmax {
    float top[2] = {LOWEST, LOWEST};
    float total[2] = {0.0f, 0.0f};  // of this thread's columns

    // Write the weights of a piece; false if they are too large.
    __device__ __forceinline__ bool weigh(const float (&logits)[32], const bool (&member)[2],
                                          float scale, uint32_t (&weights)[16]) {
        float more[2] = {0.0f, 0.0f};
        take_exponentials(logits, member, scale, weights, more);
        if (__any_sync(ALL_LANES, !(more[0] <= MOST && more[1] <= MOST))) return false;
        total[0] += more[0];
        total[1] += more[1];
        return true;
    }

    // Raise the tops to this piece's highest logits, then write its weights; `share` is by what to
    // multiply what was summed up before.
    __device__ __forceinline__ void raise(const float (&logits)[32], const bool (&member)[2],
                                          float scale, uint32_t (&weights)[16],
                                          float (&share)[2]) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float highest = LOWEST;
#pragma unroll
            for (int j = 0; j < 8; ++j)
                highest = fmaxf(highest, fmaxf(logits[4 * j + 2 * h], logits[4 * j + 2 * h + 1]));
            highest = fmaxf(highest, __shfl_xor_sync(ALL_LANES, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(ALL_LANES, highest, 2));
            const float above = member[h] ? fmaxf(top[h], highest * scale) : top[h];
            share[h] = exp2_fast(top[h] - above);
            top[h] = above;
        }
        float more[2] = {0.0f, 0.0f};
        take_exponentials(logits, member, scale, weights, more);
#pragma unroll
        for (int h = 0; h < 2; ++h) total[h] = fmaf(total[h], share[h], more[h]);
    }

    __device__ __forceinline__ void take_exponentials(const float (&logits)[32],
                                                      const bool (&member)[2], float scale,
                                                      uint32_t (&weights)[16],
                                                      float (&more)[2]) const {
        if (GROUP >= 16) {  // both rows belong to one token
            take_rows<0, 2>(logits, member[0], scale, weights, more);
        } else {
            take_rows<0, 1>(logits, member[0], scale, weights, more);
            take_rows<1, 2>(logits, member[1], scale, weights, more);
        }
    }

    // A row that does not attend the piece, as a whole, has weights of 0.
    template <int FIRST, int END>
    __device__ __forceinline__ void take_rows(const float (&logits)[32], bool member, float scale,
                                              uint32_t (&weights)[16], float (&more)[2]) const {
        if (member) {
            float sum[2][2] = {};  // two chains of additions for each row
#pragma unroll
            for (int j = 0; j < 8; ++j) {
#pragma unroll
                for (int h = FIRST; h < END; ++h) {
                    const float x = exp2_fast(fmaf(logits[4 * j + 2 * h], scale, -top[h]));
                    const float y = exp2_fast(fmaf(logits[4 * j + 2 * h + 1], scale, -top[h]));
                    sum[h][0] += x;
                    sum[h][1] += y;
                    weights[2 * j + h] = pack2(x, y);
                }
            }
#pragma unroll
            for (int h = FIRST; h < END; ++h) more[h] = sum[h][0] + sum[h][1];
        } else {
#pragma unroll
            for (int j = 0; j < 8; ++j)
#pragma unroll
                for (int h = FIRST; h < END; ++h) weights[2 * j + h] = 0;
        }
    }
};

static __device__ __forceinline__ void multiply(float (&acc)[D / 2], const float (&share)[2]) {
#pragma unroll
    for (int i = 0; i < D / 2; ++i) acc[i] *= share[(i / 2) % 2];
}

// ---- one group of warps ----

struct Output {
    half_t* out;
    float* lse;
};

static __device__ __forceinline__ void attend_rows(Shared& shared, Reader& keys, Reader& values,
                                                   const Tile& tile, int group, const half_t* q,
                                                   Output to, int64_t q_row_stride,
                                                   int64_t q_head_stride, int heads, float scale) {
    const int thread = threadIdx.x % 128, lane = threadIdx.x % 32;
    const int shift = group * TOKENS;
    const int base = tile.base + shift;  // position of the group's first token
    uint8_t* queries = shared.queries[group];

    barrier_sync(group + 1, 128);  // all warps are done with the queries of the tile before
    // Rows of queries, swizzled as the copy engine does: 16 bytes at a time.
    for (int i = thread; i < ROWS * D / 8; i += 128) {
        const int row = i / (D / 8), chunk = i % (D / 8);
        const int token = row / GROUP, position = base + token;
        uint4 chunk_of_row = make_uint4(0, 0, 0, 0);
        if (position >= tile.first && position < tile.num_keys) {
            const int64_t at = int64_t(tile.row + shift + token) * q_row_stride +
                               (tile.kv_head * GROUP + row % GROUP) * q_head_stride + chunk * 8;
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

    Walk walk(tile, shift);
    Step step = walk.next();
    if (step.index < walk.end()) {
        // The latest piece: it may hold keys after a query, or end behind the sequence.
        Step next = walk.next();
        keys.wait(step);
        start_logits(logits, queries, shared.keys[step.stage]);
        const int own = step.index - tile.before;
        const int piece = tile.dense ? tile.count - 1 - own : tile.pieces[own];
        products_wait<0>();
        products_done(logits);
        keys.release(step);
#pragma unroll
        for (int j = 0; j < 32; ++j) {
            const int key = piece * PIECE + (j / 4) * 8 + (lane % 4) * 2 + j % 2;
            if (key > base + token[(j / 2) % 2]) logits[j] = NEGATIVE_INFINITY;
        }
        if ((piece + 1) * PIECE > tile.num_keys) {
            // Behind the sequence lies anything, and 0 times NaN is NaN. All groups write the same
            // zeros.
            values.wait(step);
            const int kept = tile.num_keys - piece * PIECE;
            for (int c = thread; c < (PIECE - kept) * PANELS * 8; c += 128) {
                const int key = kept + c / (PANELS * 8), chunk = c % (PANELS * 8);
                uint8_t* at =
                    shared.values[step.stage] + (chunk / 8) * PANEL + key * 128 + (chunk % 8) * 16;
                *reinterpret_cast<uint4*>(at) = make_uint4(0, 0, 0, 0);
            }
            fence_async_shared();
            barrier_sync(group + 1, 128);
        }
        bool member[2] = {bool((step.bits >> token[0]) & 1), bool((step.bits >> token[1]) & 1)};
        softmax.raise(logits, member, scale, weights, share);  // nothing was summed up before

        while (next.index < walk.end()) {
            uint32_t fresh[16];  // what products under way read may not change, or they are serialised
            bool raised;
            Step after;
            auto weigh = [&] {
                products_done(logits);
                keys.release(next);
                member[0] = (next.bits >> token[0]) & 1;
                member[1] = (next.bits >> token[1]) & 1;
                raised = !softmax.weigh(logits, member, scale, fresh);
                if (raised) softmax.raise(logits, member, scale, fresh, share);
            };
            // The loader needs the stage of these values for the piece STAGES further.
            if (next.index - step.index <= STAGES) {
                keys.wait(next);
                start_logits(logits, queries, shared.keys[next.stage]);
                values.wait(step);
                start_output(acc, weights, shared.values[step.stage]);
                after = walk.next();
                products_wait<1>();
                weigh();
                products_wait<0>();
                products_done(acc);
                values.release(step);
            } else {
                values.wait(step);
                start_output(acc, weights, shared.values[step.stage]);
                after = walk.next();
                products_wait<0>();
                products_done(acc);
                values.release(step);
                keys.wait(next);
                start_logits(logits, queries, shared.keys[next.stage]);
                products_wait<0>();
                weigh();
            }
            if (raised) multiply(acc, share);
#pragma unroll
            for (int k = 0; k < 16; ++k) weights[k] = moved(fresh[k]);
            step = next;
            next = after;
        }
        values.wait(step);
        start_output(acc, weights, shared.values[step.stage]);
        products_wait<0>();
        products_done(acc);
        values.release(step);
    }

#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float total = softmax.total[h];
        total += __shfl_xor_sync(ALL_LANES, total, 1);
        total += __shfl_xor_sync(ALL_LANES, total, 2);
        const int position = base + token[h];
        if (position < tile.first || position >= tile.num_keys) continue;
        const float share = total > 0.0f ? 1.0f / total : 1.0f;
        const int64_t at = int64_t(tile.row + shift + token[h]) * heads + tile.kv_head * GROUP +
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
                  int64_t q_row_stride, int64_t q_head_stride, int num_tiles, int kv_heads,
                  int capacity, float scale) {
    DYNAMIC_SHARED(uint8_t, memory);
    static_assert(sizeof(Shared) <= SHARED_BYTES, "the host asks for as much as `Shared` needs");
    if (shared_address(memory) % 1024 != 0) __trap();  // swizzles count from there
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    if (threadIdx.x == 0) {
        Ring* const rings[] = {&shared.ring_of_keys, &shared.ring_of_values};
        for (Ring* ring : rings) {
            for (int stage = 0; stage < STAGES; ++stage) {
                barrier_init(&ring->full[stage], 1);
                barrier_init(&ring->empty[stage], GROUPS * WARPS);
            }
            ring->begun = 0;
        }
        fence_barrier_init();
    }
    __syncthreads();
    const Tiles own = {tiles, counts, pieces, members, num_tiles, kv_heads, capacity};
    const int group = __shfl_sync(ALL_LANES, threadIdx.x / 128, 0);
    if (group == GROUPS) {
        give_registers<32>();
        const int warp = threadIdx.x / 32 - WARPS * GROUPS;
        if (warp == 0) {
            own.for_own([&](const Tile& tile) {
                load_pieces(shared.ring_of_keys, shared.keys, tile, &keys);
            });
        } else if (warp == 1) {
            own.for_own([&](const Tile& tile) {
                load_pieces(shared.ring_of_values, shared.values, tile, &values);
            });
        }
    } else {
        take_registers<160>();
        Reader of_keys{shared.ring_of_keys}, of_values{shared.ring_of_values};
        own.for_own([&](const Tile& tile) {
            attend_rows(shared, of_keys, of_values, tile, group, q, {out, lse}, q_row_stride,
                        q_head_stride, kv_heads * GROUP, scale);
        });
    }
}
