// Stage 7: average the windows that new rows of a cache complete.
#include "average.cuh"
#include "packing.cuh"

// Block (x, y, z) works on tile y of the new windows of sequence x and head z. Every sequence has
// room for `most` windows. `lengths` are those before the new rows.
extern "C" __global__ void __launch_bounds__(THREADS)
append_windows_kernel(const half_t* __restrict__ keys, half_t* __restrict__ windows,
                      const int* __restrict__ ends, const int* __restrict__ lengths, int capacity,
                      int most) {
    const int64_t sequence = blockIdx.x;
    const int head = blockIdx.z;
    const int before = lengths[sequence];
    const int64_t grown = before + int64_t(length_of(ends, int(sequence)));
    const int after = grown < capacity ? int(grown) : capacity;
    const int first = num_windows(before, SIZE, STRIDE) + blockIdx.y * WINDOWS;
    const int count = num_windows(after, SIZE, STRIDE) - first;
    if (count <= 0) return;
    const int64_t width = int64_t(gridDim.z) * D;
    const int64_t row = sequence * capacity + int64_t(first) * STRIDE;
    average_windows(keys + row * width + head * D,
                    windows + (sequence * most + first) * width + head * D, count, width, width);
}
