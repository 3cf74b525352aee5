// Products with decoded weights by columns: which calls can be computed so, and what they work in. columns_avx512.cpp
// computes. Rows of x are read where they are.
#include "columns.h"

#include "formats.h"
#include "level.h"

namespace hb {

static_assert(kPanelValues % kSmallestBlocksize == 0 && kLargestBlocksize % kPanelValues == 0, "powers of two");

bool fit_columns(const DecodedCall& call, int64_t rows) {
    static const bool has_kernel = level() == kAvx512Bf16 && has_vbmi();
    const int64_t whole = call.weight.is_int8 ? kUnitBytes : call.weight.blocksize;
    const bool are_many = rows >= (call.weight.is_int8 ? kFewestRows8 : kFewestRows4);
    return has_kernel && are_many && call.x_dtype == HB_BFLOAT16 && call.K > 0 && call.K % whole == 0;
}

ColumnsScratch::ColumnsScratch(const DecodedCall& call, int64_t rows)
    : panel(kPanelValues * kColumns * int64_t{sizeof(uint16_t)}),
      totals(rows * kColumns * int64_t{sizeof(float)}),
      absmax(0),
      scales(call.K / call.weight.blocksize * kColumns * int64_t{sizeof(float)}) {
    if (call.weight.absmax.nested_absmax != nullptr) absmax = scales;
}

#ifdef HB_X86

namespace {

int64_t most_rows(const DecodedCall&) {
    return kRowsPerPass;
}

int64_t none(const DecodedCall&, int64_t) {
    return 0;
}

void load_nothing(const DecodedCall&, const DecodedRows&, int64_t, int64_t) {}

int64_t scratch_bytes(const DecodedCall& call, int64_t rows) {
    const ColumnsScratch parts(call, rows);
    return parts.panel + parts.totals + parts.absmax + parts.scales;
}

}  // namespace

const DecodedWay kByColumns = {kColumns, most_rows, none, none, load_nothing, scratch_bytes, run_columns_avx512};

#endif

}  // namespace hb
