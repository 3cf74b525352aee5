// The first of the greatest values of each row; the same at every instruction set.
//
// A float's bits, of a negative one all but the sign turned over, are an integer with the float's order: 16 bits are
// compared as they are, twice as many at once, and the compiler vectorises it, which it may not do for floats.
#include <algorithm>
#include <limits>

#include "checks.h"
#include "clones.h"
#include "floats.h"
#include "halfbyte.h"
#include "pool.h"

namespace hb {
namespace {

constexpr int64_t kPiece = 512;  // values that are looked through before it is asked whether one was found

// In order of size, -0 just before 0. What is beyond either infinity is a NaN.
template <typename Bits>
HB_INLINE Bits key(Bits bits) {
    constexpr Bits kAllButSign = std::numeric_limits<Bits>::max();
    return static_cast<Bits>(bits ^ (bits < 0 ? kAllButSign : 0));
}

template <typename Bits, Bits infinity>
HB_INLINE int64_t argmax(const Bits* x, int64_t K) {
    constexpr Bits kNegativeInfinity = static_cast<Bits>(~infinity);
    Bits greatest = std::numeric_limits<Bits>::min(), least = std::numeric_limits<Bits>::max();
    for (int64_t k = 0; k < K; ++k) {
        const Bits found = key(x[k]);
        greatest = std::max(greatest, found);
        least = std::min(least, found);
    }
    if (greatest >= infinity || greatest <= kNegativeInfinity || least < kNegativeInfinity) return -1;
    const Bits wanted = greatest == 0 ? Bits{-1} : greatest;  // -0 is as great as 0
    for (int64_t begin = 0;; begin += kPiece) {
        const int64_t end = std::min(begin + kPiece, K);
        Bits found = 0;
        for (int64_t k = begin; k < end; ++k) found |= static_cast<Bits>(key(x[k]) >= wanted);
        if (found == 0) continue;
        int64_t first = begin;
        while (key(x[first]) < wanted) ++first;
        return first;
    }
}

template <typename Bits, Bits infinity>
HB_INLINE void argmax_of_rows(const hb_argmax_args& a, int64_t begin, int64_t end) {
    const Bits* const x = static_cast<const Bits*>(a.x);
    for (int64_t row = begin; row < end; ++row) a.out[row] = argmax<Bits, infinity>(x + row * a.K, a.K);
}

}  // namespace
}  // namespace hb

extern "C" hb_status hb_argmax(const hb_argmax_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_argmax_args& a = *args;
    const auto run =
        for_dtype(a.dtype, Clones<argmax_of_rows<int32_t, 0x7f800000>>::run,
                  Clones<argmax_of_rows<int16_t, 0x7c00>>::run, Clones<argmax_of_rows<int16_t, 0x7f80>>::run);
    parallel_for(threads_for(a.call.threads, a.M * a.K), a.M,
                 [&](int64_t, int64_t begin, int64_t end) { run(a, begin, end); });
    return HB_OK;
}
