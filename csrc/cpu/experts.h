// What the matmuls of rows with their experts' matrices share beside decoded.h: where rows end, and nobody's rows.
#pragma once

#include <string.h>

#include "checks.h"

namespace hb {

// `Args`: with ends [E] of M rows.
template <typename Args>
hb_status check_ends(const Args& a) {
    int64_t begin = 0;
    for (int64_t e = 0; e < a.E; ++e) {
        HB_REQUIRE(fail_unless(a.ends[e] >= begin && a.ends[e] <= a.M, HB_BAD_EXPERTS));
        begin = a.ends[e];
    }
    return HB_OK;
}

// Zeros in the rows of out behind the last end, of `columns` values each.
template <typename Args>
void clear_rows_of_nobody(const Args& a, int64_t columns) {
    const int64_t last = a.E == 0 ? 0 : a.ends[a.E - 1], row_bytes = columns * dtype_bytes(a.x_dtype);
    memset(static_cast<char*>(a.out) + last * row_bytes, 0, static_cast<size_t>((a.M - last) * row_bytes));
}

}  // namespace hb
