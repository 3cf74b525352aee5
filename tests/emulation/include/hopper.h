// What Hopper adds to the emulator's model of a block, as PTX defines it:
//
//     barriers       mbarrier: arrivals, expected bytes, waits for a phase by its parity
//     bulk copies    land at any time until their barrier is waited for by all; a few at once
//     products       wgmma.mma_async with a in registers, by one warp, whose 16 rows are its own: b is read from shared
//                    memory at any time until the wait, through the descriptor's address, stride and 128-byte swizzle;
//                    until the wait the sums are NaN
//
// A product without a fence, an unknown barrier, or a descriptor of another kind ends the launch with a sentence. Not
// modelled: that four warps make one warpgroup, registers changing hands, proxies (but for the barriers' fence).
#pragma once

#include <stdint.h>

#include "emulator.h"

namespace hb {
namespace emulation {

void wait_for_group(int number, int threads);

void begin_barrier(const void* barrier, int arrivals);
void publish_barriers();
void arrive(const void* barrier, int expected_bytes);
void arrive_after_copies(const void* barrier);
void wait_for_phase(const void* barrier, unsigned parity);
void start_bulk_copy(void* to_shared, const void* from, int bytes, const void* barrier);

void begin_products();
void start_product(float (*value)(uint16_t), float* sums, int count, const unsigned* a, uint64_t tile, bool add);
void commit_products();
void wait_for_products();

}  // namespace emulation
}  // namespace hb
