// What `hopper.cuh` needs, on a CPU: barriers with phases, the copy engine, asynchronous products.
//
// All that is asynchronous is as late as it can be. A copy lands when no thread can go on without
// it (for odd seeds of a random order: at any time). A product ends at the wait for it, and there a warp
// stalls until no other thread can go on, either. Until then targets are NaN. What a product reads
// must be there when it starts and stay as it is until the last warp has waited.
#pragma once

#include <algorithm>
#include <array>
#include <deque>
#include <map>
#include <set>
#include <string>

#include "emulator.h"

namespace emulator {

constexpr int MOST_WARPS = MOST_THREADS / 32;
constexpr int GROUP_WARPS = 4;
constexpr int MOST_REGISTERS = 65536;         // of a block
constexpr int LEAST_REGISTERS = 24;           // of a thread
constexpr int64_t MOST_BYTES = (1 << 20) - 1;  // that a barrier counts, and arrivals
constexpr uint64_t MARK = 0x7261626d00000000;  // what an initialised barrier holds, and its place
constexpr uint32_t POISON = 0x7fa5a5a5;        // in registers that a product will write: a NaN that
                                               // arithmetic changes
constexpr uint32_t LINE = 128;                 // bytes of a row, swizzled
constexpr uint32_t ATOM = 1024;                // bytes of 8 rows, after which the swizzle repeats

// ---- barriers ----

struct Phases {
    int count, missing;  // arrivals
    int64_t bytes;       // expected and not yet there
    uint64_t completed;
    bool fenced;
    std::set<int> arrived;  // threads, in this phase
};

struct Waiting {
    uint32_t place, parity;
};

inline std::map<uint32_t, Phases> all_phases;  // by place in shared memory
inline Waiting waiting[MOST_THREADS];

inline Phases& phases_of(const uint64_t* barrier, const char* what) {
    const uint32_t place = shared_offset(barrier);
    auto found = all_phases.find(place);
    if (found == all_phases.end()) fail("%s: no mbarrier was initialised at byte %u", what, place);
    if (*barrier != (MARK | place)) fail("%s: the mbarrier at byte %u was overwritten", what, place);
    return found->second;
}

inline void phases_init(uint64_t* barrier, uint32_t arrivals) {
    check_aligned("barrier_init at unaligned memory", barrier, 8);
    const uint32_t place = shared_offset(barrier);
    if (arrivals < 1 || arrivals > MOST_BYTES) fail("an mbarrier cannot be for %u arrivals", arrivals);
    Phases phases{int(arrivals), int(arrivals), 0, 0, false, {}};
    if (!all_phases.emplace(place, phases).second) fail("the mbarrier at byte %u is initialised twice", place);
    *barrier = MARK | place;
}

inline void fence_barrier_init() {
    for (auto& [place, phases] : all_phases) phases.fenced = true;
}

// Go on to the next phase if nothing of this one is missing.
inline void end_phase(uint32_t place, Phases& phases) {
    if (std::abs(phases.bytes) > MOST_BYTES) fail("the mbarrier at byte %u expects too many bytes", place);
    if (phases.missing || phases.bytes) return;
    ++phases.completed;
    phases.missing = phases.count;
    phases.arrived.clear();
    for (int i = 0; i < num_threads; ++i) {
        if (fibers[i].state == State::AT_PHASE && waiting[i].place == place) fibers[i].state = State::RUNNABLE;
    }
}

inline void phases_expect(uint64_t* barrier, uint32_t bytes, const char* what = "barrier_expect", int arrivals = 1) {
    Phases& phases = phases_of(barrier, what);
    const uint32_t place = shared_offset(barrier);
    if (arrivals < 1) fail("%s: %d arrivals", what, arrivals);
    if (phases.missing < arrivals) {
        fail("%s: %d arrivals, and %d of %d are missing at the mbarrier at byte %u", what, arrivals, phases.missing,
             phases.count, place);
    }
    if (!phases.arrived.insert(current->index).second) {
        fail("%s: the thread arrives twice in one phase of the mbarrier at byte %u", what, place);
    }
    phases.bytes += bytes;
    phases.missing -= arrivals;
    end_phase(place, phases);
    yield();  // whoever waited may be faster than this thread
}

inline void phases_arrive(uint64_t* barrier, int arrivals) {
    phases_expect(barrier, 0, "barrier_arrive", arrivals);
}

// A thread that comes to run again after two more phases sees none of them end, as on a device.
inline void phases_wait(uint64_t* barrier, uint32_t parity) {
    if (parity > 1) fail("barrier_wait for parity %u", parity);
    while ((phases_of(barrier, "barrier_wait").completed & 1) == parity) {
        waiting[current->index] = {shared_offset(barrier), parity};
        current->state = State::AT_PHASE;
        yield();
    }
}

// ---- numbers that a thread publishes ----

struct Number {
    const int* at;
    int least;
};

inline Number numbers[MOST_THREADS];  // that threads wait for

inline void publish(int* at, int number) {
    *at = number;
    for (int i = 0; i < num_threads; ++i) {
        if (fibers[i].state == State::AT_NUMBER && numbers[i].at == at && numbers[i].least <= number) {
            fibers[i].state = State::RUNNABLE;
        }
    }
}

inline int wait_published(const int* at, int least) {
    while (*at < least) {
        numbers[current->index] = {at, least};
        current->state = State::AT_NUMBER;
        yield();
    }
    return *at;
}

inline void explain_phases() {
    std::map<std::pair<uint32_t, uint32_t>, int> threads, readers;  // that wait for a phase, a number
    bool is_first = true;
    for (int i = 0; i < num_threads; ++i) {
        const State state = fibers[i].state;
        if (state != State::AT_PHASE && state != State::AT_NUMBER) continue;
        if (std::exchange(is_first, false)) current = &fibers[i];
        if (state == State::AT_PHASE) ++threads[{waiting[i].place, waiting[i].parity}];
        if (state == State::AT_NUMBER) ++readers[{shared_offset(numbers[i].at), uint32_t(numbers[i].least)}];
    }
    std::string text;
    for (const auto& [wait, count] : readers) {
        char part[120];
        snprintf(part, sizeof(part), "; number at byte %u: %d threads wait for %d, and it is %d", wait.first, count,
                 int(wait.second), *reinterpret_cast<const int*>(shared_memory + wait.first));
        text += part;
    }
    for (const auto& [wait, count] : threads) {
        const Phases& phases = all_phases.at(wait.first);
        char part[160];
        snprintf(part, sizeof(part), "; mbarrier at byte %u, parity %u: %d threads wait, %d of %d arrivals and "
                 "%lld bytes are missing", wait.first, wait.second, count, phases.missing, phases.count,
                 static_cast<long long>(phases.bytes));
        text += part;
    }
    if (!text.empty()) fail("waits for what does not come%s", text.c_str());
}

// ---- what the copy engine and the tensor cores see of shared memory ----

inline unsigned char seen_memory[MOST_SHARED];

inline void fence_async_shared() { memcpy(seen_memory, shared_memory, shared_bytes); }

inline bool is_seen(uint32_t place, size_t bytes) {
    return memcmp(seen_memory + place, shared_memory + place, bytes) == 0;
}

inline void write_both(uint32_t place, const void* from, size_t bytes) {
    memcpy(shared_memory + place, from, bytes);
    memcpy(seen_memory + place, from, bytes);
}

// Chunks of 16 bytes change places within a row, by the row's place among eight.
inline uint32_t swizzled(uint32_t place) { return place ^ (place / LINE % 8 * 16); }

// ---- the copy engine ----

// As the emulator's `encode_tensor_map` writes it.
struct Map {
    uint64_t mark, base, item;
    uint64_t dims[3], strides[2], box[3];  // strides of the outer two, in bytes
    uint64_t swizzle, unused[4];
};
constexpr uint64_t MAP_MARK = 0x70616d5f726f736e;

struct BoxCopy {
    Map map;
    uint32_t to, bytes;
    int64_t at[3];
    uint32_t barrier;
};

inline std::deque<BoxCopy> box_copies;  // on their way

inline void check_products_keep(uint32_t place, uint32_t bytes);

inline void copy_box(void* to, const uint64_t* words, int x, int y, int z, const uint64_t* barrier) {
    BoxCopy copy{};
    memcpy(&copy.map, words, sizeof(copy.map));
    const Map& map = copy.map;
    if (map.mark != MAP_MARK) fail("copy_box: this is no tensor map");
    if (map.swizzle != 3 || map.box[0] * map.item != LINE) fail("copy_box: rows must have 128 bytes, swizzled");
    copy.to = shared_offset(to);
    copy.bytes = uint32_t(LINE * map.box[1] * map.box[2]);
    copy.at[0] = x, copy.at[1] = y, copy.at[2] = z;
    copy.barrier = shared_offset(barrier);
    if (copy.to % ATOM) fail("copy_box to byte %u, which is no multiple of %u", copy.to, ATOM);
    if (copy.to + copy.bytes > shared_bytes) fail("copy_box to byte %u: the end is behind shared memory", copy.to);
    if (!phases_of(barrier, "copy_box").fenced) {
        fail("copy_box: no fence_barrier_init for the mbarrier at byte %u", copy.barrier);
    }
    for (const BoxCopy& other : box_copies) {
        if (copy.to < other.to + other.bytes && other.to < copy.to + copy.bytes) {
            fail("copy_box to byte %u, where another copy is on its way to", copy.to);
        }
    }
    if (!is_seen(copy.to, copy.bytes)) {
        fail("copy_box to byte %u, where threads have stored without fence_async_shared", copy.to);
    }
    check_products_keep(copy.to, copy.bytes);
    memset(shared_memory + copy.to, 0xff, copy.bytes);
    memset(seen_memory + copy.to, 0xff, copy.bytes);
    box_copies.push_back(copy);
}

inline void land(const BoxCopy& copy) {
    const Map& map = copy.map;
    for (uint32_t at = copy.to; at < copy.to + copy.bytes; ++at) {
        if (shared_memory[at] != 0xff) fail("byte %u was stored while a copy was on its way to it", at);
    }
    const int64_t dims[3] = {int64_t(map.dims[0]), int64_t(map.dims[1]), int64_t(map.dims[2])};
    const int64_t first = std::max<int64_t>(0, -copy.at[0]);
    const int64_t end = std::min<int64_t>(map.box[0], dims[0] - copy.at[0]);
    uint32_t place = copy.to;
    for (int64_t k = 0; k < int64_t(map.box[2]); ++k) {
        for (int64_t j = 0; j < int64_t(map.box[1]); ++j, place += LINE) {
            unsigned char line[LINE] = {};
            const int64_t y = copy.at[1] + j, z = copy.at[2] + k;
            if (y >= 0 && y < dims[1] && z >= 0 && z < dims[2] && first < end) {
                const char* from = reinterpret_cast<const char*>(map.base) + y * int64_t(map.strides[0]) +
                                   z * int64_t(map.strides[1]) + (copy.at[0] + first) * int64_t(map.item);
                memcpy(line + first * map.item, from, (end - first) * map.item);
            }
            for (uint32_t c = 0; c < LINE; c += 16) write_both(swizzled(place + c), line + c, 16);
        }
    }
}

// Let one copy land: the oldest, or the latest, or any, as threads run.
inline bool land_next() {
    if (box_copies.empty()) return false;
    auto next = step > 0 ? box_copies.begin() : box_copies.end() - 1;
    if (pace) next = box_copies.begin() + draw(int(box_copies.size()));
    const BoxCopy copy = *next;
    box_copies.erase(next);
    land(copy);
    Phases& phases = all_phases.at(copy.barrier);
    phases.bytes -= copy.bytes;
    end_phase(copy.barrier, phases);
    return true;
}

// ---- products of a group of four warps ----

struct Product {
    uint64_t a, b;  // descriptors
    bool in_registers, add;
    int columns;
    std::vector<uint32_t> places;      // of the operands in shared memory, 16 bytes each
    std::vector<unsigned char> bytes;  // what lies there
    std::vector<float> right;          // 16 x columns
    int issued, waited;                // warps
    struct {
        const uint32_t* registers[32];
        uint32_t left[32][4];
        float* d;  // of lane 0
    } warps[GROUP_WARPS];
};

struct Accumulator {
    int products;  // under way
    float* lanes[32];
    std::vector<float> sums;  // 16 x columns
};

struct ProductsOfWarp {
    size_t issued, waited;
    std::deque<size_t> groups;  // committed, by their ends
    bool fenced;
    std::map<float*, Accumulator> accumulators;  // under way, by lane 0's
    int registers;
};

struct ProductsOfGroup {
    size_t begin;  // the number of the first of these
    std::deque<Product> products;
};

inline ProductsOfWarp products_of_warp[MOST_WARPS];
inline ProductsOfGroup products_of_group[MOST_WARPS / GROUP_WARPS];

// Where 16 bytes of a row are, `row` and `chunk` counted from where the descriptor begins.
struct Descriptor {
    uint32_t start, leading, stride;

    Descriptor(uint64_t bits, bool rows)
        : start(uint32_t(bits & 0x3fff) << 4), leading(uint32_t(bits >> 16 & 0x3fff) << 4),
          stride(uint32_t(bits >> 32 & 0x3fff) << 4) {
        if (bits >> 62 != 1) fail("descriptor %016llx: only the swizzle of 128 bytes is emulated", bits);
        if (bits & 0x3fffc000c000c000) fail("descriptor %016llx: a field has run over", bits);
        if (start / LINE % 8) fail("descriptor %016llx does not begin where a swizzle does", bits);
        if (rows ? start % LINE % 32 : start % LINE) fail("descriptor %016llx begins within a step", bits);
        if (stride % ATOM || (!rows && leading % ATOM)) fail("descriptor %016llx: distances", bits);
    }

    // The rows are along M or N, and hold 16 channels.
    uint32_t row(uint32_t row, uint32_t chunk) const {
        return checked(start + row / 8 * stride + row % 8 * LINE + chunk * 16);
    }

    // The rows are along K, and hold all of N: 64 of it in a line, the next `leading` further.
    uint32_t column(uint32_t row, uint32_t chunk) const {
        return checked(start + row / 8 * stride + row % 8 * LINE + chunk / 8 * leading + chunk % 8 * 16);
    }

    static uint32_t checked(uint32_t place) {
        if (place + 16 > shared_bytes) fail("a product reads behind shared memory");
        return swizzled(place);
    }
};

inline void list_places(Product& product) {
    auto& places = product.places;
    if (product.in_registers) {
        const Descriptor b(product.b, false);
        for (int k = 0; k < 16; ++k) {
            for (int n = 0; n < product.columns / 8; ++n) places.push_back(b.column(k, n));
        }
    } else {
        const Descriptor a(product.a, true), b(product.b, true);
        for (int m = 0; m < 64; ++m) {
            for (int h = 0; h < 2; ++h) places.push_back(a.row(m, h));
        }
        for (int n = 0; n < product.columns; ++n) {
            for (int h = 0; h < 2; ++h) places.push_back(b.row(n, h));
        }
    }
}

inline void check_products_keep(uint32_t place, uint32_t bytes) {
    for (const auto& group : products_of_group) {
        for (const Product& product : group.products) {
            for (uint32_t at : product.places) {
                if (at + 16 > place && at < place + bytes) {
                    fail("copy_box to byte %u, which a product under way reads", at);
                }
            }
        }
    }
}

// Say what is wrong with the operands in shared memory as a product starts.
inline void check_operands(const Product& product) {
    for (uint32_t at : product.places) {
        for (const BoxCopy& copy : box_copies) {
            if (at + 16 > copy.to && at < copy.to + copy.bytes) {
                fail("a product reads byte %u, where a copy is still on its way to", at);
            }
        }
        if (!is_seen(at, 16)) fail("a product reads byte %u, stored without fence_async_shared", at);
    }
}

inline void check_unchanged(const Product& product) {
    for (size_t i = 0; i < product.places.size(); ++i) {
        if (memcmp(&product.bytes[16 * i], shared_memory + product.places[i], 16)) {
            fail("byte %u was changed while a product that reads it was under way", product.places[i]);
        }
    }
}

template <bool BF>
inline float operand(const unsigned char* at) {
    uint16_t bits;
    memcpy(&bits, at, 2);
    return BF ? from_bf16(bits) : from_fp16(bits);
}

template <bool BF>
inline void decode_right(Product& product) {
    const int columns = product.columns;
    product.right.resize(16 * columns);
    if (product.in_registers) {
        for (int i = 0; i < 16 * columns; ++i) product.right[i] = operand<BF>(&product.bytes[2 * i]);
    } else {
        for (int i = 0; i < 16 * columns; ++i) {
            product.right[i % 16 * columns + i / 16] = operand<BF>(&product.bytes[64 * 32 + 2 * i]);
        }
    }
}

// Run for each element of a warp's accumulator: its lane, its register, its row and column.
template <class Body>
inline void for_accumulator(int columns, Body body) {
    for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < columns / 2; ++i) {
            body(lane, i, lane / 4 + i / 2 % 2 * 8, i / 4 * 8 + lane % 4 * 2 + i % 2);
        }
    }
}

inline void check_poisoned(const Accumulator& accumulator, int columns) {
    for_accumulator(columns, [&](int lane, int i, int, int) {
        if (std::bit_cast<uint32_t>(accumulator.lanes[lane][i]) != POISON) {
            fail("lane %d has changed its accumulator while a product was under way", lane);
        }
    });
}

struct Issue {
    float* d;
    const uint32_t* registers;
    uint64_t a, b;
    bool add;
};

// Start a product for this warp; the first warp of its group that comes lays down which one.
template <bool BF>
inline void issue_product(int columns, const Issue* const* lanes) {
    const int warp = current->warp;
    if (num_threads % (32 * GROUP_WARPS)) fail("products need groups of four warps");
    const Issue& issue = *lanes[0];
    for (int lane = 0; lane < 32; ++lane) {
        const Issue& other = *lanes[lane];
        if (other.a != issue.a || other.b != issue.b || other.add != issue.add) {
            fail("lanes of a warp multiply different things");
        }
    }
    ProductsOfWarp& mine = products_of_warp[warp];
    ProductsOfGroup& group = products_of_group[warp / GROUP_WARPS];
    const size_t at = mine.issued++ - group.begin;
    const bool in_registers = issue.registers != nullptr;
    const bool first = at == group.products.size();
    if (first) {
        group.products.push_back(Product{issue.a, issue.b, in_registers, issue.add, columns});
        list_places(group.products.back());
    }
    Product& product = group.products[at];
    if (product.a != issue.a || product.b != issue.b || product.add != issue.add ||
        product.in_registers != in_registers || product.columns != columns) {
        fail("this warp multiplies something else than another one of its group");
    }
    check_operands(product);
    if (first) {
        product.bytes.resize(16 * product.places.size());
        for (size_t i = 0; i < product.places.size(); ++i) {
            memcpy(&product.bytes[16 * i], shared_memory + product.places[i], 16);
        }
        decode_right<BF>(product);
    } else {
        check_unchanged(product);
    }
    ++product.issued;
    auto& part = product.warps[warp % GROUP_WARPS];
    part.d = issue.d;
    for (int lane = 0; lane < 32; ++lane) {
        part.registers[lane] = lanes[lane]->registers;
        if (in_registers) memcpy(part.left[lane], lanes[lane]->registers, 16);
    }

    auto [found, fresh] = mine.accumulators.try_emplace(issue.d);
    Accumulator& accumulator = found->second;
    ++accumulator.products;
    if (!fresh) return check_poisoned(accumulator, columns);
    if (!mine.fenced) fail("a product starts without products_fence since the last wait");
    for (int lane = 0; lane < 32; ++lane) accumulator.lanes[lane] = lanes[lane]->d;
    accumulator.sums.resize(16 * columns);
    for_accumulator(columns, [&](int lane, int i, int row, int column) {
        accumulator.sums[row * columns + column] = lanes[lane]->d[i];
        lanes[lane]->d[i] = std::bit_cast<float>(POISON);
    });
}

template <bool BF>
inline void finish_product(Product& product, ProductsOfWarp& mine, int warp) {
    check_unchanged(product);
    auto& part = product.warps[warp % GROUP_WARPS];
    float left[16][16];
    if (product.in_registers) {
        for (int lane = 0; lane < 32; ++lane) {
            if (memcmp(part.left[lane], part.registers[lane], 16)) {
                fail("lane %d has changed an operand while a product was under way", lane);
            }
            for (int i = 0; i < 4; ++i) {
                const int row = lane / 4 + i % 2 * 8, k = lane % 4 * 2 + i / 2 * 8;
                const auto* pair = reinterpret_cast<const unsigned char*>(&part.left[lane][i]);
                left[row][k] = operand<BF>(pair), left[row][k + 1] = operand<BF>(pair + 2);
            }
        }
    } else {
        const unsigned char* rows = &product.bytes[warp % GROUP_WARPS * 16 * 32];
        for (int i = 0; i < 256; ++i) left[i / 16][i % 16] = operand<BF>(rows + 2 * i);
    }

    const int columns = product.columns;
    auto found = mine.accumulators.find(part.d);
    Accumulator& accumulator = found->second;
    if (!product.add) std::fill(accumulator.sums.begin(), accumulator.sums.end(), 0.0f);
    for (int m = 0; m < 16; ++m) {
        float* sums = &accumulator.sums[m * columns];
        for (int k = 0; k < 16; ++k) {
            const float* right = &product.right[k * columns];
            for (int n = 0; n < columns; ++n) sums[n] += left[m][k] * right[n];
        }
    }
    if (--accumulator.products == 0) {
        check_poisoned(accumulator, columns);
        for_accumulator(columns, [&](int lane, int i, int row, int column) {
            accumulator.lanes[lane][i] = accumulator.sums[row * columns + column];
        });
        mine.accumulators.erase(found);
    }
    ++product.waited;
}

// Run for a whole warp, once, when all its lanes have come.
template <class Body>
inline void by_warp(const char* what, Body body) {
    int nothing = 0;
    collective(what, 0xffffffffu, nothing, nothing, [&](unsigned mask, auto, auto) {
        if (mask != 0xffffffffu) fail("%s needs a whole warp", what);
        body(products_of_warp[current->warp]);
    });
}

// d is 64 x 2 N, a in registers or at a descriptor.
template <bool BF, int N>
inline void product(float (&d)[N], uint64_t a, const uint32_t* registers, uint64_t b, bool add) {
    static_assert(N == 32 || N == 64);
    const char* what = registers ? "product_columns" : "product_rows";
    int nothing = 0;
    collective(what, 0xffffffffu, Issue{d, registers, a, b, add}, nothing, [&](unsigned mask, auto in, auto) {
        if (mask != 0xffffffffu) fail("%s needs a whole warp", what);
        issue_product<BF>(2 * N, in);
    });
}

inline void products_fence() {
    by_warp("products_fence", [](ProductsOfWarp& mine) { mine.fenced = true; });
}

inline void products_commit() {
    by_warp("products_commit", [](ProductsOfWarp& mine) { mine.groups.push_back(mine.issued); });
}

inline std::vector<int> stalled;  // warps, the latest last
inline int slow_warp;

template <bool BF>
inline void products_wait(int left) {
    const ProductsOfWarp& own = products_of_warp[current->warp];
    if (own.issued != own.waited) {
        if (std::find(stalled.begin(), stalled.end(), current->warp) == stalled.end()) {
            stalled.push_back(current->warp);
        }
        current->state = State::STALLED;
        yield();
    }
    by_warp("products_wait", [&](ProductsOfWarp& mine) {
        ProductsOfGroup& group = products_of_group[current->warp / GROUP_WARPS];
        while (int(mine.groups.size()) > left) {
            while (mine.waited < mine.groups.front()) {
                finish_product<BF>(group.products[mine.waited++ - group.begin], mine, current->warp);
                mine.fenced = false;
            }
            mine.groups.pop_front();
        }
        while (!group.products.empty() && group.products.front().waited == GROUP_WARPS) {
            group.products.pop_front();
            ++group.begin;
        }
    });
}

template <int N>
inline void products_done(const float (&d)[N]) {
    for (const auto& [first, accumulator] : products_of_warp[current->warp].accumulators) {
        if (accumulator.lanes[current->lane] == d) fail("products_done without a wait for the products");
    }
}

// Let a stalled warp go on. One of them is the slow one, until it is the only one.
inline bool wake_next() {
    if (stalled.empty()) return false;
    const int count = int(stalled.size());
    if (std::find(stalled.begin(), stalled.end(), slow_warp) == stalled.end()) {
        slow_warp = stalled[pace ? draw(count) : step > 0 ? 0 : count - 1];
    }
    int at = pace ? draw(count) : count - 1;
    if (stalled[at] == slow_warp) at = (at + count - 1) % count;
    Fiber* lanes = fibers + 32 * stalled[at];
    stalled.erase(stalled.begin() + at);
    if (count == 1) slow_warp = -1;
    for (int lane = 0; lane < 32; ++lane) {
        if (lanes[lane].state == State::STALLED) lanes[lane].state = State::RUNNABLE;
    }
    return true;
}

// Copies are the first, or products, or either at a random pace.
inline bool advance() {
    const bool copies = pace ? draw(2) : step > 0;
    return copies ? land_next() || wake_next() : wake_next() || land_next();
}

// ---- registers ----

inline void set_registers(int registers, bool more) {
    by_warp(more ? "take_registers" : "give_registers", [&](ProductsOfWarp& mine) {
        const int before = mine.registers;  // 0 at first, as the compiler decides
        if (num_threads % (32 * GROUP_WARPS)) fail("registers move between groups of four warps");
        if (registers % 8 || registers < LEAST_REGISTERS || registers > 256) {
            fail("a thread cannot have %d registers", registers);
        }
        if (before && (more ? registers < before : registers > before)) {
            fail("%d registers are asked for where there were %d", registers, before);
        }
        mine.registers = registers;
    });
}

inline void check_registers() {
    int total = 0;
    if (num_threads % (32 * GROUP_WARPS)) return;
    for (int warp = 0; warp < num_threads / 32; ++warp) {
        const int registers = products_of_warp[warp].registers;
        if (registers != products_of_warp[warp / GROUP_WARPS * GROUP_WARPS].registers) {
            fail("warps of a group take or give different numbers of registers");
        }
        total += 32 * (registers ? registers : LEAST_REGISTERS);
    }
    if (total > MOST_REGISTERS) fail("threads ask for %d registers, of %d", total, MOST_REGISTERS);
}

// ---- a block ----

inline void begin_asynchronous() {
    all_phases.clear();
    box_copies.clear();
    stalled.clear();
    slow_warp = -1;
    for (auto& warp : products_of_warp) warp = {};
    for (auto& group : products_of_group) group = {};
    fence_async_shared();
}

inline void check_leaving() {
    const ProductsOfWarp& mine = products_of_warp[current->warp];
    if (mine.issued != mine.waited) fail("returns without having waited for its products");
}

inline void check_ended() {
    if (!box_copies.empty()) fail("nobody has waited for a copy to byte %u", box_copies.front().to);
    for (const auto& group : products_of_group) {
        if (!group.products.empty()) fail("only %d of 4 warps of a group multiply", group.products.front().issued);
    }
    check_registers();
}

inline const bool installed =
    (asynchronous = {begin_asynchronous, advance, explain_phases, check_leaving, check_ended}, true);

}  // namespace emulator
