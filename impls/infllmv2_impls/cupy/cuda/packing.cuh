// Where a block of threads works: which sequence of a packed batch its tile of rows belongs to.
// Host code counts slots with `num_slots` of packing.py, for the worst case.
#pragma once

#include "primitives.cuh"

struct Tile {
    int sequence;
    int start;  // the sequence's first row
    int rows;   // its number of rows
    int first;  // the tile's first row, counted from `start`; a slot without work has it >= rows
};

// Sequence i, whose rows start at a = ends[i], has the slots from a / tile + i on.
__device__ inline Tile find_tile(int slot, const int* __restrict__ ends, int batch, int tile) {
    int low = 0;
    int high = batch;  // the sequence is one of low .. high - 1
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (ends[middle] / tile + middle <= slot) {
            low = middle;
        } else {
            high = middle;
        }
    }
    const int start = ends[low];
    return {low, start, ends[low + 1] - start, (slot - (start / tile + low)) * tile};
}

__device__ inline int length_of(const int* __restrict__ ends, int sequence) {
    return ends[sequence + 1] - ends[sequence];
}

// Complete windows in so many keys.
__device__ inline int num_windows(int keys, int size, int stride) {
    return keys >= size ? (keys - size) / stride + 1 : 0;
}

// Begin and end of one of `parts` shares of 0 .. total - 1, in whole steps.
struct Range {
    int begin;
    int end;
};

__device__ inline Range share(int total, int part, int parts, int step) {
    const int steps = (total + step - 1) / step;
    const int each = (steps + parts - 1) / parts * step;
    const int begin = part * each < total ? part * each : total;
    return {begin, begin + each < total ? begin + each : total};
}
