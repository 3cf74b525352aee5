// out = a + b, value by value: the sums that carry a model's residual stream. Torch's bits, at every level.
#include "checks.h"
#include "clones.h"
#include "floats.h"
#include "halfbyte.h"
#include "pool.h"

namespace hb {
namespace {

constexpr int64_t kPiece = 512;  // values converted at a time

HB_CLONES(void, add_to, (float* sums, const float* others, int64_t count)) {
    for (int64_t i = 0; i < count; ++i) sums[i] += others[i];
}

void run(const hb_add_args& a, int64_t at, int64_t count) {
    float sums[kPiece], others[kPiece];
    load_floats(a.a, a.dtype, at, count, sums);
    load_floats(a.b, a.dtype, at, count, others);
    add_to(sums, others, count);
    store_floats(sums, count, a.out, a.dtype, at);
}

}  // namespace
}  // namespace hb

extern "C" hb_status hb_add(const hb_add_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_add_args& a = *args;
    parallel_for(threads_for(a.call.threads, a.n), ceil_div(a.n, kPiece), [&a](int64_t, int64_t begin, int64_t end) {
        for (int64_t piece = begin; piece < end; ++piece) {
            const int64_t at = piece * kPiece;
            run(a, at, a.n - at < kPiece ? a.n - at : kPiece);
        }
    });
    return HB_OK;
}
