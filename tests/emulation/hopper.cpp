#include "hopper.h"

#include <stdlib.h>

#include <algorithm>
#include <map>
#include <vector>

namespace hb {
namespace emulation {

namespace {

constexpr int kColumns = 16;        // of a and of b, in one product
constexpr int kGroupBarriers = 16;  // with number 0, which is the whole block's

struct Phases {
    int arrivals;  // that end a phase
    int missing;
    int64_t missing_bytes = 0;
    unsigned ended = 0;  // phases
    bool published = false;
};

struct Group {
    int threads = 0;
    int arrived = 0;
};

// Of one lane: its two rows of a, and of b the columns whose sums it has.
struct Product {
    float (*value)(uint16_t);
    float a[2][kColumns];
    std::vector<float> b;  // empty until it is read
    uint64_t tile;
    bool add;
    float* sums;
    int64_t group;
};

struct Products {
    bool begun = false;
    int64_t groups = 0;  // committed
    std::vector<Product> pending;
    std::map<float*, std::vector<float>> sums;  // true values of those that are under way
};

struct Hopper : Extension {
    std::map<const void*, Phases> barriers;
    Group groups[kGroupBarriers];
    Products products[kMostThreads];
};

Hopper& hopper() {
    std::unique_ptr<Extension>& state = extension();
    if (state == nullptr) state = std::make_unique<Hopper>();
    return static_cast<Hopper&>(*state);
}

Phases& phases_of(const void* barrier) {
    std::map<const void*, Phases>& known = hopper().barriers;
    const auto found = known.find(barrier);
    if (found == known.end()) fail("a barrier is used that has not begun");
    return found->second;
}

void end_phase_if_complete(const void* barrier) {
    Phases& phases = phases_of(barrier);
    if (phases.missing > 0 || phases.missing_bytes != 0) return;
    ++phases.ended;
    phases.missing = phases.arrivals;
    wake(barrier);
}

void count_arrival(const void* barrier) {
    if (phases_of(barrier).missing-- == 0) fail_outside("more arrive at a barrier than it was made for");
    end_phase_if_complete(barrier);
}

// b's value of a row and column, by the descriptor of its tile: rows of 128 bytes, eight of them `stride` before the
// next eight; bits 4 to 6 of an address are those of the piece, exchanged by bits 7 to 9.
uint16_t value_at(uint64_t tile, int row, int column) {
    const uint64_t begin = (tile & 0x3fff) << 4, stride = (tile >> 32 & 0x3fff) << 4;
    if (tile >> 62 != 1 || (tile >> 49 & 7) != 0) fail("only tiles with a swizzle of 128 bytes are emulated");
    const uint64_t plain =
        begin + static_cast<uint64_t>(row / 8) * stride + static_cast<uint64_t>(row % 8 * 128 + column * 2);
    const uint64_t address = plain ^ (plain >> 7 & 7) << 4;
    unsigned char* const shared = shared_memory();
    const unsigned char* const place = shared + ((address - reinterpret_cast<uintptr_t>(shared)) & 0x3ffff);
    if (!is_shared(place, sizeof(uint16_t))) fail("a tile lies outside of the shared memory");
    uint16_t bits;
    memcpy(&bits, place, sizeof bits);
    return bits;
}

// The b of sums 4i, 4i+1 and so on: columns 8i + 2 * (lane % 4) and the next of the result, which are rows of the tile.
void read_tile(Product& product, size_t count) {
    for (size_t i = 0; i < count / 4; ++i) {
        for (int next = 0; next < 2; ++next) {
            const int row = static_cast<int>(i) * 8 + lane() % 4 * 2 + next;
            for (int k = 0; k < kColumns; ++k) product.b.push_back(product.value(value_at(product.tile, row, k)));
        }
    }
}

void add_up(const Product& product, std::vector<float>& sums) {
    for (size_t i = 0; i < sums.size(); ++i) {
        const float* const b = product.b.data() + (i / 4 * 2 + i % 2) * kColumns;
        float sum = product.add ? sums[i] : 0.0f;
        for (int k = 0; k < kColumns; ++k) sum += product.a[i / 2 % 2][k] * b[k];
        sums[i] = sum;
    }
}

}  // namespace

void wait_for_group(int number, int threads) {
    if (number < 1 || number >= kGroupBarriers || threads % kWarpSize != 0) fail("no barrier of a group");
    Group& group = hopper().groups[number];
    if (group.arrived == 0) group.threads = threads;
    if (group.threads != threads) fail("threads disagree in how many meet");
    if (++group.arrived < threads) return sleep(&group);
    group.arrived = 0;
    wake(&group);
}

void begin_barrier(const void* barrier, int arrivals) {
    if (!is_shared(barrier, 8) || reinterpret_cast<uintptr_t>(barrier) % 8 != 0) fail("a barrier lies where none can");
    if (!hopper().barriers.insert({barrier, Phases{arrivals, arrivals}}).second) fail("a barrier begins twice");
}

void publish_barriers() {
    for (auto& barrier : hopper().barriers) barrier.second.published = true;
}

void arrive(const void* barrier, int expected_bytes) {
    phases_of(barrier).missing_bytes += expected_bytes;
    count_arrival(barrier);
}

void arrive_after_copies(const void* barrier) {
    phases_of(barrier);
    after_copies([barrier] { count_arrival(barrier); });
}

void wait_for_phase(const void* barrier, unsigned parity) {
    while (phases_of(barrier).ended % 2 == parity) sleep(barrier);
}

void start_bulk_copy(void* to_shared, const void* from, int bytes, const void* barrier) {
    const uintptr_t all = reinterpret_cast<uintptr_t>(to_shared) | reinterpret_cast<uintptr_t>(from);
    if (all % 16 != 0 || bytes % 16 != 0) fail("a bulk copy is not aligned to 16 bytes");
    if (!is_shared(to_shared, bytes)) fail("a bulk copy goes outside of the shared memory");
    if (!phases_of(barrier).published) fail("a bulk copy arrives at a barrier that it does not know");
    later([=] {
        memcpy(to_shared, from, static_cast<size_t>(bytes));
        phases_of(barrier).missing_bytes -= bytes;
        end_phase_if_complete(barrier);
    });
}

void begin_products() {
    hopper().products[threadIdx.x].begun = true;
}

// wgmma with 16-bit operands, "Register Fragments for wgmma.mma_async.m64nNk16": of a, as of an m16n8k16's; of d, for
// every eight columns, as of an m16n8k16's c.
void start_product(float (*value)(uint16_t), float* sums, int count, const unsigned* a, uint64_t tile, bool add) {
    struct Fragment {
        float a[8];
        uint64_t tile;
    };
    Products& own = hopper().products[threadIdx.x];
    if (!own.begun) fail("a product without a fence behind what wrote its registers");
    Fragment fragment;
    for (int i = 0; i < 8; ++i) fragment.a[i] = value(static_cast<uint16_t>(a[i / 2] >> i % 2 * 16));
    fragment.tile = tile;
    const Fragment* const all = exchange("wgmma", kAllLanes, fragment);
    Product product = {value, {}, {}, tile, add, sums, own.groups};
    for (int k = 0; k < kColumns; ++k) {
        const Fragment& holder = all[lane() / 4 * 4 + k % 8 / 2];
        if (holder.tile != tile) fail("lanes disagree in the tile that they multiply");
        for (int half = 0; half < 2; ++half) product.a[half][k] = holder.a[k % 2 + half * 2 + k / 8 * 4];
    }
    if (own.sums.find(sums) == own.sums.end()) {
        own.sums[sums].assign(sums, sums + count);
        memset(sums, 0xff, static_cast<size_t>(count) * sizeof(float));
    }
    if (chance(4)) read_tile(product, static_cast<size_t>(count));
    own.pending.push_back(std::move(product));
}

void commit_products() {
    ++hopper().products[threadIdx.x].groups;
}

void wait_for_products() {
    Products& own = hopper().products[threadIdx.x];
    own.begun = false;
    std::vector<Product> left;
    for (Product& product : own.pending) {
        if (product.group == own.groups) {
            left.push_back(std::move(product));
            continue;
        }
        std::vector<float>& sums = own.sums[product.sums];
        if (product.b.empty()) read_tile(product, sums.size());
        add_up(product, sums);
    }
    own.pending = std::move(left);
    if (!own.pending.empty()) return;
    for (const auto& sums : own.sums) memcpy(sums.first, sums.second.data(), sums.second.size() * sizeof(float));
    own.sums.clear();
}

}  // namespace emulation
}  // namespace hb
