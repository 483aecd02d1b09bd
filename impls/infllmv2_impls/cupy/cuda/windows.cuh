// Tiles of windows in shared memory, and fragments of queries in registers, for tensor cores.
//
// Macros: D, the head dim; TILE_WINDOWS.
#pragma once

#include "packing.cuh"

static_assert(D % 16 == 0, "the tensor core multiplies 16 channels at a time");

// Rows are padded by 16 bytes: eight of them at one column then lie in different banks.
constexpr int WINDOW_ROW = D + 8;
constexpr int WINDOW_TILE = TILE_WINDOWS * WINDOW_ROW;  // in halves

// Starts to copy the windows from `from` on; of those, `count` exist, and others become 0.
template <int COPIERS>
__device__ inline void copy_windows(half_t* tile, const half_t* __restrict__ from, int row_stride,
                                    int count) {
    constexpr int CHUNKS = D / 8;  // of 16 bytes in a row
    if constexpr (COPIERS % CHUNKS == 0 && TILE_WINDOWS * CHUNKS % COPIERS == 0) {
        // A thread stays in its column: most of the addresses are constant offsets.
        constexpr int ROWS_AT_ONCE = COPIERS / CHUNKS;
        const int row = threadIdx.x / CHUNKS;
        const int column = threadIdx.x % CHUNKS * 8;
        half_t* to = tile + row * WINDOW_ROW + column;
        from += row * row_stride + column;
#pragma unroll
        for (int i = 0; i < TILE_WINDOWS; i += ROWS_AT_ONCE) {
            copy16_async(to + i * WINDOW_ROW, from, row + i < count);
            from += ROWS_AT_ONCE * row_stride;
        }
    } else {
        for (int chunk = threadIdx.x; chunk < TILE_WINDOWS * CHUNKS; chunk += COPIERS) {
            const int row = chunk / CHUNKS;
            const int column = chunk % CHUNKS * 8;
            copy16_async(tile + row * WINDOW_ROW + column, from + row * row_stride + column,
                         row < count);
        }
    }
}

// Two neighbouring channels of a query; zeros where there is none.
__device__ inline uint32_t load_pair(const half_t* __restrict__ at, bool exists) {
    return exists ? *reinterpret_cast<const uint32_t*>(at) : 0u;
}
