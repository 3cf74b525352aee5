// out = a + b, value by value: the sums that carry a model's residual stream. Torch's bits, at every level.
#include "checks.h"
#include "clones.h"
#include "floats.h"
#include "halfbyte.h"
#include "pool.h"

namespace hb {
namespace {

constexpr int64_t kPiece = 512;  // values that no two threads share

template <typename Dtype>
HB_INLINE void add(const hb_add_args& args, int64_t begin, int64_t end) {
    using Kept = typename Dtype::Kept;
    const Kept *const a = static_cast<const Kept*>(args.a), *const b = static_cast<const Kept*>(args.b);
    Kept* const out = static_cast<Kept*>(args.out);
    for (int64_t i = begin; i < end; ++i) out[i] = Dtype::store(Dtype::load(a[i]) + Dtype::load(b[i]));
}

}  // namespace
}  // namespace hb

extern "C" hb_status hb_add(const hb_add_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_add_args& a = *args;
    const auto run =
        for_dtype(a.dtype, Clones<add<Float32>>::run, Clones<add<Float16>>::run, Clones<add<Bfloat16>>::run);
    parallel_for(threads_for(a.call.threads, a.n), ceil_div(a.n, kPiece), [&](int64_t, int64_t begin, int64_t end) {
        run(a, begin * kPiece, end * kPiece < a.n ? end * kPiece : a.n);
    });
    return HB_OK;
}
