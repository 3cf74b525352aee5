// Rotary position embeddings of queries and keys, in place, rounded as transformers' functions round them: both
// products to the dtype, then their sum. Half d of a head is turned with half d + D / 2. The same bits at every level.
#include "checks.h"
#include "clones.h"
#include "floats.h"
#include "halfbyte.h"
#include "pool.h"

namespace hb {
namespace {

// first * cos + other * sin, each product and the sum rounded to the dtype.
template <typename Dtype>
HB_INLINE typename Dtype::Kept turned(float first, float cos, float other, float sin) {
    const float straight = Dtype::load(Dtype::store(first * cos));
    const float across = Dtype::load(Dtype::store(other * sin));
    return Dtype::store(straight + across);
}

template <typename Dtype>
HB_INLINE void turn(typename Dtype::Kept* head, int64_t half, const typename Dtype::Kept* cos,
                    const typename Dtype::Kept* sin) {
    typename Dtype::Kept* const upper = head + half;
    for (int64_t d = 0; d < half; ++d) {
        const float a = Dtype::load(head[d]), b = Dtype::load(upper[d]);
        head[d] = turned<Dtype>(a, Dtype::load(cos[d]), -b, Dtype::load(sin[d]));
        upper[d] = turned<Dtype>(b, Dtype::load(cos[d + half]), a, Dtype::load(sin[d + half]));
    }
}

HB_CLONES(void, turn_float32, (float* head, int64_t half, const float* cos, const float* sin)) {
    turn<Float32>(head, half, cos, sin);
}

HB_CLONES(void, turn_float16, (uint16_t* head, int64_t half, const uint16_t* cos, const uint16_t* sin)) {
    turn<Float16>(head, half, cos, sin);
}

HB_CLONES(void, turn_bfloat16, (uint16_t* head, int64_t half, const uint16_t* cos, const uint16_t* sin)) {
    turn<Bfloat16>(head, half, cos, sin);
}

template <typename Element>
void turn_heads(void (*turn_one)(Element*, int64_t, const Element*, const Element*), void* tensor, int64_t row,
                int64_t heads, const hb_rotary_args& a) {
    const Element* const cos = static_cast<const Element*>(a.cos) + row * a.D;
    const Element* const sin = static_cast<const Element*>(a.sin) + row * a.D;
    Element* const first = static_cast<Element*>(tensor) + row * heads * a.D;
    for (int64_t head = 0; head < heads; ++head) turn_one(first + head * a.D, a.D / 2, cos, sin);
}

void turn_row(void* tensor, int64_t row, int64_t heads, const hb_rotary_args& a) {
    if (a.dtype == HB_FLOAT32) {
        turn_heads(turn_float32, tensor, row, heads, a);
    } else {
        turn_heads(a.dtype == HB_FLOAT16 ? turn_float16 : turn_bfloat16, tensor, row, heads, a);
    }
}

}  // namespace
}  // namespace hb

extern "C" hb_status hb_rotary(const hb_rotary_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_rotary_args& a = *args;
    if (a.T == 0 || a.D == 0) return HB_OK;  // whose other sizes may be anything
    parallel_for(threads_for(a.call.threads, a.T * (a.H + a.G) * a.D), a.T, [&a](int64_t, int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            turn_row(a.query, row, a.H, a);
            turn_row(a.key, row, a.G, a);
        }
    });
    return HB_OK;
}
