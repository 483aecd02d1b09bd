// What a tile of neighbouring query tokens attends together: the union of their selected blocks,
// cut into pieces, the latest first, with one bit per token. cupy/union.py describes the results.
//
// Macros: TOKENS of a tile (at most 32), BLOCK, PIECE (divides BLOCK), SPARE tiles per sequence.

#include "primitives.cuh"

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;
constexpr int FIELDS = 6;
constexpr int PARTS = BLOCK / PIECE;

static_assert(TOKENS <= 32, "a token is a bit of a word");

// Returns the sequence of a tile. Sequence i, which starts at row ends[i], gets the tiles from
// ends[i] / TOKENS + SPARE * i on. Two to spare suffice: t queries need at most
// ceil(t / TOKENS) + 1 tiles, as their first position may lie inside one.
static __device__ __forceinline__ int find_sequence(int tile, const int* ends, int batch) {
    int low = 0, high = batch;  // it is one of low .. high - 1
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (ends[middle] / TOKENS + SPARE * middle <= tile) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

// One block of threads for each tile and kv head. It marks in shared memory which tokens attend
// each piece, `window` pieces at a time, and lists the marked ones in order by counting ballots.
extern "C" __global__ void __launch_bounds__(THREADS) unite(
    const int* __restrict__ selected, const int* __restrict__ ends_q,
    const int* __restrict__ ends_k, int* __restrict__ tiles, int* __restrict__ counts,
    int* __restrict__ pieces, uint32_t* __restrict__ members, int64_t head_stride,
    int64_t row_stride, int64_t slot_stride, int batch, int num_tiles, int num_pieces,
    int window, int capacity, int budget, int dense_len) {
    DYNAMIC_SHARED(uint32_t, marks);  // [window]: entry i is that of piece `top - i`
    __shared__ int found[WARPS];
    const int tile = blockIdx.x, head = blockIdx.y;
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;

    const int sequence = find_sequence(tile, ends_q, batch);
    const int start_q = ends_q[sequence], start_k = ends_k[sequence];
    const int num_keys = ends_k[sequence + 1] - start_k;
    const int first = max(num_keys - (ends_q[sequence + 1] - start_q), 0);
    const int number = tile - (start_q / TOKENS + SPARE * sequence);
    const int base = (first / TOKENS + number) * TOKENS;
    const int row = start_q + base - first;
    const int stop = min(num_keys, base + TOKENS);
    const bool dense = num_keys < dense_len;
    const int last = min((stop - 1) / PIECE, num_pieces - 1);  // the latest piece
    const bool empty = stop <= max(base, first);  // no token
    const int64_t item = static_cast<int64_t>(head) * num_tiles + tile;
    if (head == 0 && thread < FIELDS) {
        const int record[FIELDS] = {row, base, first, num_keys, start_k, dense};
        int field = record[0];
#pragma unroll
        for (int i = 1; i < FIELDS; ++i) field = thread == i ? record[i] : field;
        tiles[static_cast<int64_t>(tile) * FIELDS + thread] = field;
    }
    if (empty || dense) {
        if (thread == 0) counts[item] = empty ? 0 : last + 1;
        return;
    }

    const int* lines = selected + head * head_stride;
    pieces += item * capacity;
    members += item * capacity;
    int count = 0;
    for (int top = last; top >= 0; top -= window) {
        const int size = min(window, top + 1);
        for (int i = thread; i < size; i += THREADS) marks[i] = 0;
        __syncthreads();
        for (int token = warp; token < TOKENS; token += WARPS) {
            const int position = base + token;
            if (position < first || position >= num_keys) continue;
            const int own = min(position / PIECE, last);
            const int* line = lines + (row + token) * row_stride;
#pragma unroll 4
            for (int slot = lane; slot < budget; slot += 32) {
                const int block = line[slot * slot_stride];
                // Blocks far outside would overflow the product.
                if (block < 0 || block > last) continue;
#pragma unroll
                for (int part = 0; part < PARTS; ++part) {
                    const int piece = block * PARTS + part;
                    const int at = top - piece;
                    if (piece <= own && at >= 0 && at < size) {
                        atomicOr(&marks[at], 1u << token);
                    }
                }
            }
        }
        __syncthreads();

        // Every warp lists a run of its own, behind those of the warps before it.
        const int run = (size + THREADS - 1) / THREADS * 32;
        const int begin = warp * run, end = min(begin + run, size);
        int mine = 0;
        for (int i = begin; i < end; i += 32) {
            mine += __popc(__ballot_sync(ALL_LANES, i + lane < end && marks[i + lane] != 0));
        }
        if (lane == 0) found[warp] = mine;
        __syncthreads();
        int place = count;
        for (int i = 0; i < WARPS; ++i) {
            place += i < warp ? found[i] : 0;
            count += found[i];
        }
        for (int i = begin; i < end; i += 32) {
            const uint32_t mark = i + lane < end ? marks[i + lane] : 0;
            const uint32_t used = __ballot_sync(ALL_LANES, mark != 0);
            if (mark != 0) {
                const int at = place + __popc(used & ((1u << lane) - 1));
                pieces[at] = top - i - lane;
                members[at] = mark;
            }
            place += __popc(used);
        }
        __syncthreads();  // before marks and counts are written anew
    }
    if (thread == 0) {
        counts[item] = count;
        members[count] = ALL_LANES;  // so that a kernel may look one entry ahead
    }
}
