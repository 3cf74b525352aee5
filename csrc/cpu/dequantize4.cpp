// 4-bit codes -> values of any dtype, block by block; dequantize4_avx512.cpp does what it can first.
#include "dequantize4.h"

#include "checks.h"
#include "decode4.h"
#include "floats.h"
#include "formats.h"
#include "halfbyte.h"
#include "pool.h"

extern "C" hb_status hb_dequantize4(const hb_dequantize4_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_dequantize4_args& a = *args;
    const PairTable& table = pair_table(a.format);
    const int64_t threads = threads_for(a.call.threads, a.n);
    parallel_for(threads, ceil_div(a.n, a.blocksize), [&a, &table](int64_t, int64_t begin, int64_t end) {
        float values[kLargestBlocksize];
        for (int64_t block = begin; (block = dequantize_blocks_avx512(a, block, end)) < end; ++block) {
            const int64_t first = block * a.blocksize;
            const int64_t count = first + a.blocksize <= a.n ? a.blocksize : a.n - first;
            decode4(table, a.packed, a.absmax + block, a.blocksize, first, count, values);
            store_floats(values, count, a.out, a.out_dtype, first);
        }
    });
    return HB_OK;
}
