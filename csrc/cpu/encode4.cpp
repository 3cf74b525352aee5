// Values -> 4-bit codes at scales that the caller gives; the work is quantize4.cpp's.
#include "checks.h"
#include "halfbyte.h"
#include "pool.h"
#include "quantize4.h"

extern "C" hb_status hb_encode4(const hb_encode4_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_encode4_args& a = *args;
    const Blocks4 blocks = {a.x, a.x_dtype, a.n, a.format, a.blocksize, a.packed};
    parallel_for(threads_for(a.call.threads, a.n), ceil_div(a.n, a.blocksize),
                 [&](int64_t, int64_t begin, int64_t end) { encode_blocks(blocks, begin, end, a.scales, nullptr); });
    return HB_OK;
}
