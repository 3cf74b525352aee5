// Products with decoded weights in 16-bit fixed point: which calls can be computed so, and what they work in.
// fixed_x_avx2.cpp and fixed_avx2.cpp compute.
#include "fixed.h"

#include <algorithm>

#include "level.h"

namespace hb {

bool fits_fixed(const DecodedCall& call) {
    const int64_t whole = call.weight.is_int8 ? kFixedGroup : call.weight.blocksize;
    return level() == kAvx2 && (call.rounds_x || call.x_dtype != HB_FLOAT32) && call.K > 0 && call.K % whole == 0 &&
           whole % kFixedGroup == 0;
}

FixedLayout::FixedLayout(const DecodedCall& call, int64_t rows)
    : groups(call.K / kFixedGroup),
      // Rows an odd number of cache lines apart: a power of two would put all of them into the same few lines.
      stride((call.K / 32 | 1) * 32),
      scales(rows * stride * int64_t{sizeof(int16_t)}) {}

FixedScratch::FixedScratch(const DecodedCall& call, int64_t rows)
    : panel(kFixedPanel * kFixedColumns * int64_t{sizeof(int16_t)}),
      totals(rows * kFixedColumns * int64_t{sizeof(float)}),
      absmax(round_up(call.K / call.weight.blocksize * kFixedColumns * int64_t{sizeof(float)}, 64)),
      scales(call.K / kFixedGroup * kFixedColumns * int64_t{sizeof(float)}) {}

#ifdef HB_X86

namespace {

int64_t most_rows(const DecodedCall&) {
    return kRowsPerPass;
}

int64_t x_bytes(const DecodedCall& call, int64_t rows) {
    const FixedLayout layout(call, rows);
    return layout.scales + round_up(rows * layout.groups * int64_t{sizeof(float)}, 64);
}

int64_t x_pieces(const DecodedCall&, int64_t rows) {
    return rows;
}

int64_t scratch_bytes(const DecodedCall& call, int64_t rows) {
    return FixedScratch(call, rows).bytes();
}

}  // namespace

const DecodedWay kFewInFixedPoint = {kFewFixedColumns, most_rows,     x_bytes,           x_pieces,
                                     load_fixed_avx2,  scratch_bytes, run_few_fixed_avx2};
const DecodedWay kInFixedPoint = {kFixedColumns,   most_rows,     x_bytes,       x_pieces,
                                  load_fixed_avx2, scratch_bytes, run_fixed_avx2};

#endif

}  // namespace hb
