// Softmax attention over the selected blocks, for GPUs from compute capability 8.0 on.
//
// The rows of a tile are the heads of its tokens, token by token, so that one matrix product serves
// all of them. Each warp has 16 of the rows and walks over the union of what the tile's tokens
// selected (union.cu), whose keys and values flow through a ring in shared memory, with a running
// softmax in base 2. A warp skips the pieces that none of its tokens attends.
//
// Macros: BF16, GROUP heads of TOKENS tokens in a tile, with HEADS >= GROUP rows for each token,
// D, PIECE keys at once, STAGES pieces in the ring, SPLIT: whether tiles are cut into parts.

#include "primitives.cuh"

constexpr int ROWS = TOKENS * HEADS;
constexpr int WARPS = ROWS / 16;
constexpr int THREADS = 32 * WARPS;
constexpr int CHUNKS = D / 8;  // of 16 bytes, in a row
constexpr int FIELDS = 6;
constexpr int KEY_TILES = PIECE / 8;
constexpr int DIM_STEPS = D / 16;
constexpr int SIZE = PIECE * D;       // elements of the keys of a piece
constexpr bool Q_SHARED = D > 128;    // else the queries stay in registers
// A limit of registers, where a multiprocessor has shared memory for so many blocks of threads.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr int BLOCKS_AT_ONCE = D > 128 ? 1 : SPLIT || HEADS > 16 || HEADS < 4 ? 2 : 3;
#else
constexpr int BLOCKS_AT_ONCE = D > 128 ? 1 : 2;
#endif

static_assert(ROWS % 16 == 0 && TOKENS <= 32 && GROUP <= HEADS, "rows come in tiles of 16");
static_assert(D % 16 == 0 && PIECE % 16 == 0, "products take 16 at once");
static_assert(STAGES >= 2 && ROWS <= 2 * STAGES * PIECE, "the output is staged in the ring");

// Eight neighbouring rows have any chunk of theirs in different banks, as loads and stores of
// matrices want it: the chunks of a row are exchanged within periods, by its turn.
constexpr int PERIOD = CHUNKS % 8 == 0 ? 8 : CHUNKS % 4 == 0 ? 4 : 2;

static __device__ __forceinline__ int turn_of(int row) {  // the same 8 rows later
    return PERIOD == 8 ? row & 7 : PERIOD == 4 ? row >> 1 & 3 : row >> 2 & 1;
}

// Returns where a chunk of a row lies.
static __device__ __forceinline__ int swizzled(int row, int chunk) {
    return (row * CHUNKS + (chunk ^ turn_of(row))) * 8;
}

// Says where a lane reads a column of matrices of 8 x 8, of which two make a step of 16 elements.
struct Reader {
    int line, turned;

    // `row` is that of the lane in the first of the matrices, `side` 0 or 1 of the two.
    __device__ __forceinline__ Reader(int row, int side)
        : line(row * D), turned((side ^ turn_of(row)) * 8) {}

    // Is swizzled(row + rows, 2 * step + side), from constants and few registers.
    __device__ __forceinline__ int at(int rows, int step) const {
        const int chunk = 2 * step;
        return line + (turned ^ chunk % PERIOD * 8) + rows * D + chunk / PERIOD * PERIOD * 8;
    }
};

struct Entry {
    int start;      // the first key of the piece
    uint32_t bits;  // the tokens that attend it
};

// Starts to copy the keys and values of a piece into shared memory; rows from `limit` on become 0.
static __device__ __forceinline__ void load_piece(
    half_t* shared, const half_t* k, const half_t* v, int key_row, int start, int limit,
    int64_t k_row_stride, int64_t v_row_stride) {
    constexpr int ROWS_AT_ONCE = THREADS / CHUNKS;
    const int chunk = threadIdx.x % CHUNKS, first = threadIdx.x / CHUNKS;
    const int64_t row_of_first = key_row + start + first;
    const half_t* key = k + row_of_first * k_row_stride + chunk * 8;
    const half_t* value = v + row_of_first * v_row_stride + chunk * 8;
    if (THREADS % CHUNKS == 0 || first < ROWS_AT_ONCE) {
#pragma unroll 2  // more take registers
        for (int row = first; row < PIECE; row += ROWS_AT_ONCE) {
            half_t* to = shared + swizzled(row, chunk);
            copy16_async(to, key, start + row < limit);
            copy16_async(to + SIZE, value, start + row < limit);
            key += ROWS_AT_ONCE * k_row_stride;
            value += ROWS_AT_ONCE * v_row_stride;
        }
    }
}

static __device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}

static __device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

static __device__ __forceinline__ void multiply_pair(
    float (&left)[4], float (&right)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
    const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
    mma_16x8x16(left, a, low);
    mma_16x8x16(right, a, high);
}

// `part_out` float32 [parts, total_q, HQ, D] and `part_lse` [parts, total_q, HQ], in base 2, are
// written instead of `out` and `lse` where tiles are cut into parts. `out` is contiguous.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_AT_ONCE) attend(
    const half_t* __restrict__ q, const half_t* __restrict__ k, const half_t* __restrict__ v,
    half_t* __restrict__ out, float* __restrict__ lse, float* __restrict__ part_out,
    float* __restrict__ part_lse, const int* __restrict__ tiles, const int* __restrict__ counts,
    const int* __restrict__ pieces, const uint32_t* __restrict__ members, int64_t q_row_stride,
    int64_t q_head_stride, int64_t k_row_stride, int64_t k_head_stride,
    int64_t v_row_stride, int64_t v_head_stride, int num_tiles, int capacity, int total_q,
    float scale) {
    DYNAMIC_SHARED(half_t, ring);  // [STAGES, 2, PIECE, D], then the queries if they are shared
    const int tile = num_tiles - 1 - blockIdx.x;  // late tiles attend most: they come first
    const int kv_head = blockIdx.y, heads = gridDim.y * GROUP;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    const int* record = tiles + static_cast<int64_t>(tile) * FIELDS;
    const int row = record[0], base = record[1], first = record[2], num_keys = record[3];
    const int key_row = record[4];
    const int begin_token = max(first - base, 0), end_token = min(num_keys - base, TOKENS);
    if (begin_token >= end_token) return;
    const int limit = base + end_token;  // keys from here on are after all queries of the tile
    const int64_t item = static_cast<int64_t>(kv_head) * num_tiles + tile;
    const int count = counts[item];
    int begin = 0, stop = count;  // the pieces that this block of threads takes
    if (SPLIT) {
        const int each = (count + gridDim.z - 1) / gridDim.z;
        begin = min(static_cast<int>(blockIdx.z) * each, count);
        stop = min(begin + each, count);
    }
    const int64_t list = record[5] ? -1 : item * capacity;  // -1: all pieces
    const auto look_up = [&](int i) {
        Entry entry = {(count - 1 - i) * PIECE, ALL_LANES};
        if (list >= 0 && i < stop) {
            entry = {__ldg(pieces + list + i) * PIECE, __ldg(members + list + i)};
        }
        return entry;
    };
    k += kv_head * k_head_stride;
    v += kv_head * v_head_stride;

    // A thread holds elements of two rows of the warp's 16, `lane / 4` and 8 more.
    int position[2];  // -1 where there is no token
    const half_t* queries[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int at = warp * 16 + lane / 4 + 8 * i;
        const int token = HEADS % 16 == 0 ? warp * 16 / HEADS : at / HEADS, head = at % HEADS;
        const bool exists = token >= begin_token && token < end_token;
        position[i] = exists ? base + token : -1;
        queries[i] = exists && head < GROUP ? q + (row + token) * q_row_stride +
                                                  (kv_head * GROUP + head) * q_head_stride
                                            : nullptr;
    }
    const int low_token = warp * 16 / HEADS, high_token = (warp * 16 + 15) / HEADS;
    const uint32_t warp_bits = (ALL_LANES >> (31 - min(high_token, end_token - 1))) &
                               (ALL_LANES << max(low_token, begin_token));  // of tokens that exist

    half_t* shared_q = ring + STAGES * 2 * SIZE + warp * 16 * D;
    uint32_t q_parts[Q_SHARED ? 1 : DIM_STEPS][4];
#pragma unroll
    for (int step = 0; step < DIM_STEPS; ++step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const half_t* line = queries[i % 2];
            const int dim = step * 16 + i / 2 * 8 + lane % 4 * 2;
            uint32_t pair = 0;
            if (line) pair = *reinterpret_cast<const uint32_t*>(line + dim);
            if (Q_SHARED) {
                const int at = swizzled(lane / 4 + i % 2 * 8, dim / 8) + dim % 8;
                *reinterpret_cast<uint32_t*>(shared_q + at) = pair;
            } else {
                q_parts[Q_SHARED ? 0 : step][i] = pair;
            }
        }
    }
    __syncwarp();

    float acc[D / 8][4] = {};
    float top[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY};  // the largest logit before `scale`
    float total[2] = {};  // the sum of weights
    Entry next[STAGES];  // entry i is that of the piece i steps ahead
#pragma unroll
    for (int i = 0; i < STAGES; ++i) next[i] = look_up(begin + i);
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) {
        if (begin + i < stop) {
            load_piece(ring + i * 2 * SIZE, k, v, key_row, next[i].start, limit, k_row_stride,
                       v_row_stride);
        }
        copy_commit();
    }

    // The keys lie as the right operand of a product wants them, of two tiles of 8 keys at once;
    // rows of values and queries are read in the order of a left operand, values transposed.
    const Reader key_reader((lane & 7) + (lane >> 4) * 8, lane >> 3 & 1);
    const Reader row_reader(lane & 15, lane >> 4);
    for (int piece = begin; piece < stop; ++piece) {
        const uint32_t stage = static_cast<uint32_t>(piece - begin) % STAGES;
        copy_wait<STAGES - 2>();
        __syncthreads();  // the piece is there, and all warps have left the stage before it
        if (piece + STAGES - 1 < stop) {
            load_piece(ring + (stage + STAGES - 1) % STAGES * 2 * SIZE, k, v, key_row,
                       next[STAGES - 1].start, limit, k_row_stride, v_row_stride);
        }
        copy_commit();
        const Entry entry = next[0];
#pragma unroll
        for (int i = 0; i < STAGES - 1; ++i) next[i] = next[i + 1];
        next[STAGES - 1] = look_up(piece + STAGES);
        const half_t* keys = ring + stage * 2 * SIZE;
        const half_t* values = keys + SIZE;
        if ((entry.bits & warp_bits) == 0) continue;

        float logits[KEY_TILES][4] = {};
#pragma unroll
        for (int step = 0; step < DIM_STEPS; ++step) {
            uint32_t a[4];
            if (Q_SHARED) {
                ldmatrix_x4(a, shared_q + row_reader.at(0, step));
            } else {
#pragma unroll
                for (int i = 0; i < 4; ++i) a[i] = q_parts[Q_SHARED ? 0 : step][i];
            }
#pragma unroll
            for (int j = 0; j < KEY_TILES; j += 2) {
                uint32_t b[4];
                ldmatrix_x4(b, keys + key_reader.at(j * 8, step));
                multiply_pair(logits[j], logits[j + 1], a, b);
            }
        }

        // A row that does not attend the piece has all its keys masked. Only few pieces need it.
        int seen[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const bool member = entry.bits >> (warp * 16 + lane / 4 + 8 * i) / HEADS & 1;
            seen[i] = HEADS >= 16 || member ? position[i] : -1;
        }
        if (entry.start + PIECE - 1 > min(seen[0], seen[1])) {
#pragma unroll
            for (int j = 0; j < KEY_TILES; ++j) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int key = entry.start + j * 8 + lane % 4 * 2 + i % 2;
                    logits[j][i] = key <= seen[i / 2] ? logits[j][i] : NEGATIVE_INFINITY;
                }
            }
        }

        float shift[2], share[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float most = logits[0][2 * i];
#pragma unroll
            for (int j = 0; j < KEY_TILES; ++j) {
                most = fmaxf(most, fmaxf(logits[j][2 * i], logits[j][2 * i + 1]));
            }
            most = fmaxf(top[i], quad_max(most));
            shift[i] = most == NEGATIVE_INFINITY ? 0.0f : most * scale;
            share[i] = exp2_fast(top[i] * scale - shift[i]);
            top[i] = most;
        }
        if (__any_sync(ALL_LANES, share[0] != 1.0f || share[1] != 1.0f)) {
#pragma unroll
            for (int j = 0; j < D / 8; ++j) {
#pragma unroll
                for (int i = 0; i < 4; ++i) acc[j][i] *= share[i / 2];
            }
            total[0] *= share[0];
            total[1] *= share[1];
        }
#pragma unroll
        for (int j = 0; j < KEY_TILES; j += 2) {
            // The results of the first product lie as the left operand of the second one does.
            uint32_t a[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float(&pair)[4] = logits[j + i / 2];
                const int half = i % 2;
                const float w0 = exp2_fast(fmaf(pair[2 * half], scale, -shift[half]));
                const float w1 = exp2_fast(fmaf(pair[2 * half + 1], scale, -shift[half]));
                total[half] += w0 + w1;
                a[i] = pack2(w0, w1);
            }
#pragma unroll
            for (int step = 0; step < DIM_STEPS; ++step) {
                uint32_t b[4];
                ldmatrix_x4_trans(b, values + row_reader.at(j * 8, step));
                multiply_pair(acc[2 * step], acc[2 * step + 1], a, b);
            }
        }
    }
    copy_wait<0>();

    float inverse[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        total[i] = quad_sum(total[i]);
        inverse[i] = total[i] > 0.0f ? 1.0f / total[i] : 0.0f;
        const float sum =
            total[i] > 0.0f ? top[i] * scale + log2_fast(total[i]) : NEGATIVE_INFINITY;
        const int at = warp * 16 + lane / 4 + 8 * i;
        if (position[i] < 0 || at % HEADS >= GROUP) continue;
        const int64_t line = static_cast<int64_t>(row + at / HEADS) * heads +
                               kv_head * GROUP + at % HEADS;
        if (!SPLIT) {
            if (lane % 4 == 0) lse[line] = sum * LN_2;
            continue;
        }
        const int64_t part = static_cast<int64_t>(blockIdx.z) * total_q * heads + line;
        if (lane % 4 == 0) part_lse[part] = sum;
        if (total[i] > 0.0f) {  // else nobody reads it
#pragma unroll
            for (int j = 0; j < D / 8; ++j) {
                float2 pair;
                pair.x = acc[j][2 * i] * inverse[i];
                pair.y = acc[j][2 * i + 1] * inverse[i];
                *reinterpret_cast<float2*>(part_out + part * D + j * 8 + lane % 4 * 2) = pair;
            }
        }
    }
    if (SPLIT) return;

    __syncthreads();  // all warps have left the ring
    half_t* staged = ring + warp * 16 * D;
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t pair =
                pack2(acc[j][2 * i] * inverse[i], acc[j][2 * i + 1] * inverse[i]);
            const int at = swizzled(lane / 4 + 8 * i, j) + lane % 4 * 2;
            *reinterpret_cast<uint32_t*>(staged + at) = pair;
        }
    }
    __syncwarp();
#pragma unroll
    for (int i = lane; i < 16 * CHUNKS; i += 32) {
        const int at = warp * 16 + i / CHUNKS, chunk = i % CHUNKS;
        const int token = at / HEADS, head = at % HEADS;
        if (token >= begin_token && token < end_token && head < GROUP) {
            const int64_t line =
                static_cast<int64_t>(row + token) * heads + kv_head * GROUP + head;
            *reinterpret_cast<uint4*>(out + line * D + chunk * 8) =
                *reinterpret_cast<const uint4*>(staged + swizzled(i / CHUNKS, chunk));
        }
    }
}

// Joins the parts of the rows, a warp for each row. The order is fixed, hence the result, too.
extern "C" __global__ void __launch_bounds__(128) join(
    const float* __restrict__ part_out, const float* __restrict__ part_lse,
    half_t* __restrict__ out, float* __restrict__ lse, int parts, int64_t rows) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    if (row >= rows) return;
    float top = NEGATIVE_INFINITY;
    for (int part = lane; part < parts; part += 32) top = fmaxf(top, part_lse[part * rows + row]);
    top = warp_max(top);
    float total = 0.0f;
    float acc[(D + 31) / 32] = {};
    for (int part = 0; part < parts; ++part) {
        const float sum = part_lse[part * rows + row];
        if (sum == NEGATIVE_INFINITY) continue;  // its output has not been written
        const float weight = exp2_fast(sum - top);
        total += weight;
        const float* line = part_out + (part * rows + row) * D;
#pragma unroll
        for (int i = 0; i < (D + 31) / 32; ++i) {
            const int dim = lane + 32 * i;
            if (D % 32 == 0 || dim < D) acc[i] += weight * line[dim];
        }
    }
    const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
#pragma unroll
    for (int i = 0; i < (D + 31) / 32; ++i) {
        const int dim = lane + 32 * i;
        if (D % 32 == 0 || dim < D) out[row * D + dim] = from_float(acc[i] * inverse);
    }
    if (lane == 0) lse[row] = total > 0.0f ? (top + log2_fast(total)) * LN_2 : NEGATIVE_INFINITY;
}
