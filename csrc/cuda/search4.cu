// The scale of each 4-bit block with the smallest squared error that is found; csrc/cpu/search4.cpp says how.
//
// One warp per block, one factor per lane: each lane goes over the block's values in order, so that its sums equal the
// CPU library's and the reference's bit for bit. The block's maximum and the winning factor are exchanged in the warp;
// the refinement and the last comparison run in all lanes alike. Simple rather than fast: values come from the cache
// again for every group of factors.
#include "vocabulary.cuh"

namespace hb {

namespace {

static __constant__ const Table<float, kSearchFactors.length> kDeviceSearchFactors = make_search_factors();

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

// The factor of the lane with the largest gain, the smallest index among equal ones, in every lane.
__device__ float winner_in_warp(float gain, int index, float factor) {
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
        const float other_gain = __shfl_xor_sync(kAllLanes, gain, distance);
        const int other_index = __shfl_xor_sync(kAllLanes, index, distance);
        const float other_factor = __shfl_xor_sync(kAllLanes, factor, distance);
        if (other_gain > gain || (other_gain == gain && other_index < index)) {
            gain = other_gain, index = other_index, factor = other_factor;
        }
    }
    return factor;
}

template <typename T>
__device__ float best_factor(const Block<T>& block, int count) {
    float best_gain = 0, found = 1;
    int best_index = count;
    for (int index = lane(); index < count; index += kWarp) {
        const Fit fit = block.fit(kDeviceSearchFactors.at[index]);
        const float gain = fit.powers == 0 ? 0.0f : __fdiv_rn(__fmul_rn(fit.products, fit.products), fit.powers);
        if (!(gain > best_gain)) continue;
        best_gain = gain, best_index = index;
        found = __fdiv_rn(fit.products, fit.powers);
    }
    found = winner_in_warp(best_gain, best_index, found);
    const Fit fit = block.fit(found);
    if (fit.powers > 0) found = __fdiv_rn(fit.products, fit.powers);
    return block.error(found) < __fsub_rn(block.error(1.0f), kSearchMargin) ? found : 1.0f;
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
        const float scale = __fmul_rn(best_factor(block, count), absmax);
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
        search4<T><<<blocks, kWarpsPerBlock * kWarp, 0, stream_of(a.call)>>>(static_cast<const T*>(a.x), a.n, a.format,
                                                                             a.blocksize, a.scales);
    });
    return launched();
}
