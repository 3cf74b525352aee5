// The scale of each 4-bit block with the smallest squared error that is found; csrc/cpu/search4.cpp says how.
//
// One warp per block, one factor per lane: each lane goes over the block's values in order, so that its sums equal the
// CPU library's and the reference's bit for bit. The block's maximum and the best scale are exchanged in the warp; the
// last comparison runs in all lanes alike. Simple rather than fast: values come from the cache again for each step.
#include "vocabulary.cuh"

namespace hb {

namespace {

static __constant__ const Table<float, kSearchFactors.length> kDeviceSearchFactors = make_search_factors();
static __constant__ const Table<float, kSearchSteps.length> kDeviceSearchSteps = make_search_steps();
static_assert(kSearchFactors.length <= kWarp, "a lane per factor");

struct Fit {
    float products;
    float powers;
};

__device__ float reciprocal_of(float factor) {
    return factor == 0 ? 0.0f : __fdiv_rn(1.0f, factor);
}

// The table's value, a magnitude for FP4, that a normalised one gets.
__device__ float nearest(int64_t format, float normalised) {
    int rank = 0;
    if (format == HB_NF4) {
        for (int t = 0; t < 15; ++t) rank += normalised > kDeviceNf4Thresholds.at[t] ? 1 : 0;
        return kDeviceNf4.at[rank];
    }
    for (int t = 0; t < 7; ++t) rank += normalised > kDeviceFp4Thresholds.at[t] ? 1 : 0;
    return kDeviceFp4.at[kDeviceFp4CodeOfRank.at[rank]];
}

// The values of one block divided by its largest magnitude, magnitudes for FP4.
template <typename T>
struct Block {
    const T* x;
    int64_t first;
    int64_t end;
    int64_t format;
    Normaliser normalise;

    __device__ float value(int64_t i) const {
        const float normalised = normalise(to_float(x[i]));
        return format == HB_FP4 ? fabsf(normalised) : normalised;
    }
    __device__ Fit fit(float factor) const {
        const float reciprocal = reciprocal_of(factor);
        Fit sums = {0, 0};
        for (int64_t i = first; i < end; ++i) {
            const float chosen = nearest(format, __fmul_rn(value(i), reciprocal));
            sums.products = __fadd_rn(sums.products, __fmul_rn(value(i), chosen));
            sums.powers = __fadd_rn(sums.powers, __fmul_rn(chosen, chosen));
        }
        return sums;
    }
    __device__ float error(float factor) const {
        const float reciprocal = reciprocal_of(factor);
        float sum = 0;
        for (int64_t i = first; i < end; ++i) {
            const float decoded = __fmul_rn(nearest(format, __fmul_rn(value(i), reciprocal)), factor);
            const float difference = __fsub_rn(value(i), decoded);
            sum = __fadd_rn(sum, __fmul_rn(difference, difference));
        }
        return sum;
    }
};

// What gained most so far, the same in every lane; before anything did, the largest magnitude's own scale.
struct Best {
    float gain;
    float scale;

    // Each lane brings a fit, or none with powers of 0; the first lane wins among equal ones.
    __device__ void look_at(Fit fit) {
        float gained = fit.powers == 0 ? 0.0f : __fdiv_rn(__fmul_rn(fit.products, fit.products), fit.powers);
        float found = __fdiv_rn(fit.products, fit.powers);
        int winner = lane();
        for (int distance = kWarp / 2; distance > 0; distance /= 2) {
            const float other_gained = __shfl_xor_sync(kAllLanes, gained, distance);
            const float other_found = __shfl_xor_sync(kAllLanes, found, distance);
            const int other_winner = __shfl_xor_sync(kAllLanes, winner, distance);
            if (other_gained > gained || (other_gained == gained && other_winner < winner)) {
                gained = other_gained, found = other_found, winner = other_winner;
            }
        }
        if (!(gained > gain)) return;
        gain = gained, scale = found;
    }
};

template <typename T>
__device__ float best_scale(const Block<T>& block, int count) {
    const Fit none = {0, 0};
    Best best = {0, 1};
    best.look_at(lane() < count ? block.fit(kDeviceSearchFactors.at[lane()]) : none);
    best.look_at(lane() < kSearchCount ? block.fit(__fadd_rn(best.scale, kDeviceSearchSteps.at[lane()])) : none);
    return block.error(best.scale) < __fsub_rn(block.error(1.0f), kSearchMargin) ? best.scale : 1.0f;
}

template <typename T>
__global__ void search4(const T* x, int64_t n, int64_t format, int64_t blocksize, float* scales) {
    const int count = format == HB_FP4 ? kSearchCount : 2 * kSearchCount;
    const int64_t blocks = (n + blocksize - 1) / blocksize;
    for (int64_t number = warp_index(); number < blocks; number += warp_count()) {
        const int64_t first = number * blocksize;
        const int64_t end = first + blocksize < n ? first + blocksize : n;
        unsigned largest = 0;
        for (int64_t i = first + lane(); i < end; i += kWarp) largest = max(largest, magnitude_bits(to_float(x[i])));
        const float absmax = largest_in_warp(largest);
        const Block<T> block = {x, first, end, format, Normaliser(absmax)};
        const float scale = __fmul_rn(best_scale(block, count), absmax);
        if (lane() == 0) scales[number] = isfinite(scale) ? scale : absmax;
    }
}

}  // namespace

}  // namespace hb

extern "C" hb_status hb_search4(const hb_search4_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_search4_args& a = *args;
    if (a.n == 0) return HB_OK;
    const unsigned blocks = blocks_for_warps(ceil_div(a.n, a.blocksize));
    with_dtype(a.x_dtype, [&](auto type) {
        using T = decltype(type);
        launch(search4<T>, blocks, kWarpsPerBlock * kWarp, 0, stream_of(a.call), static_cast<const T*>(a.x), a.n,
               a.format, a.blocksize, a.scales);
    });
    return launched();
}
