// Values -> 4-bit codes. One warp per quantization block: the warp finds the largest magnitude, or takes the scale that
// is given, then each lane ranks two neighbouring values at a time and writes their byte. Codes and absmax equal the
// CPU library's bit for bit.
#include "vocabulary.cuh"

namespace hb {

namespace {

__device__ int code_of(int64_t format, float normalised) {
    int rank = 0;
    if (format == HB_NF4) {
        for (int t = 0; t < 15; ++t) rank += normalised > kDeviceNf4Thresholds.at[t] ? 1 : 0;
        return rank;
    }
    const float magnitude = normalised < 0 ? -normalised : normalised;
    for (int t = 0; t < 7; ++t) rank += magnitude > kDeviceFp4Thresholds.at[t] ? 1 : 0;
    return kDeviceFp4CodeOfRank.at[rank] | (normalised < 0 ? 8 : 0);
}

// At scales[block], or where scales is null at the block's largest magnitude, which is then written to absmax[block].
template <typename T>
__global__ void encode4(const T* x, int64_t n, int64_t format, int64_t blocksize, const float* scales, uint8_t* packed,
                        float* absmax) {
    const int64_t blocks = (n + blocksize - 1) / blocksize;
    for (int64_t block = warp_index(); block < blocks; block += warp_count()) {
        const int64_t first = block * blocksize;
        const int64_t end = first + blocksize < n ? first + blocksize : n;

        float scale = 0;
        if (scales != nullptr) {
            scale = scales[block];
        } else {
            unsigned largest = 0;
            for (int64_t i = first + lane(); i < end; i += kWarp) {
                largest = max(largest, magnitude_bits(to_float(x[i])));
            }
            scale = largest_in_warp(largest);
            if (lane() == 0) absmax[block] = scale;
        }
        const Normaliser normalise(scale);

        for (int64_t i = first + 2 * lane(); i < end; i += 2 * kWarp) {
            const int high = code_of(format, normalise(to_float(x[i])));
            const int padding = format == HB_NF4 ? kNf4Zero : kFp4Zero;
            const int low = i + 1 < end ? code_of(format, normalise(to_float(x[i + 1]))) : padding;
            packed[i / 2] = static_cast<uint8_t>(high << 4 | low);
        }
    }
}

// Launches for a checked call of either entry.
template <typename Args>
hb_status encode(const Args& a, const float* scales, float* absmax) {
    if (a.n == 0) return HB_OK;
    const unsigned blocks = blocks_for_warps(ceil_div(a.n, a.blocksize));
    with_dtype(a.x_dtype, [&](auto type) {
        using T = decltype(type);
        launch(encode4<T>, blocks, kWarpsPerBlock * kWarp, 0, stream_of(a.call), static_cast<const T*>(a.x), a.n,
               a.format, a.blocksize, scales, a.packed, absmax);
    });
    return launched();
}

}  // namespace

}  // namespace hb

extern "C" hb_status hb_quantize4(const hb_quantize4_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    return encode(*args, nullptr, args->absmax);
}

extern "C" hb_status hb_encode4(const hb_encode4_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    return encode(*args, args->scales, nullptr);
}
