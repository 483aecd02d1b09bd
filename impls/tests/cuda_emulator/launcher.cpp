// What the host calls: INFLLMV2_FILE is compiled as it is, INFLLMV2_KERNEL is launched.
#include "emulator.h"
#include "hopper_emulator.h"

// In a namespace of their own, inline functions may have shared memory, too: it lies in one section.
namespace {
#include INFLLMV2_FILE
}

static void** launch_values;

extern "C" __global__ void emulator_signature(char* out) { emulator::signature_of(INFLLMV2_KERNEL, out); }

extern "C" __global__ const char* emulator_run(
    const unsigned* grid, int threads, size_t bytes, int order, void** values) {
    launch_values = values;
    emulator::body = [] { emulator::call(INFLLMV2_KERNEL, launch_values); };
    return emulator::run(grid, threads, bytes, order);
}
