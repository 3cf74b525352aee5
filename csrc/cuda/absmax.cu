// Double quantization of absmax. One warp per second-level block quantizes; one thread per code dequantizes. Equal to
// the CPU library bit for bit: the product and the sum are rounded separately.
#include "vocabulary.cuh"

namespace hb {

namespace {

constexpr int kThreads = 256;

// The number of midpoints below the value, by bisection; all of them for a NaN.
__device__ int nearest_code(float value) {
    int low = 0;
    int high = kDynamicMidpoints.length;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (!(kDeviceMidpoints.at[middle] >= value)) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

__global__ void quantize_absmax(const float* absmax, int64_t count, const float* offset, int64_t nested_blocksize,
                                uint8_t* codes, float* nested_absmax) {
    const int64_t blocks = (count + nested_blocksize - 1) / nested_blocksize;
    for (int64_t block = warp_index(); block < blocks; block += warp_count()) {
        const int64_t first = block * nested_blocksize;
        const int64_t end = first + nested_blocksize < count ? first + nested_blocksize : count;

        unsigned largest = 0;
        for (int64_t i = first + lane(); i < end; i += kWarp) {
            largest = max(largest, magnitude_bits(__fsub_rn(absmax[i], *offset)));
        }
        const float block_absmax = largest_in_warp(largest);
        const Normaliser normalise(block_absmax);

        for (int64_t i = first + lane(); i < end; i += kWarp) {
            codes[i] = static_cast<uint8_t>(nearest_code(normalise(__fsub_rn(absmax[i], *offset))));
        }
        if (lane() == 0) nested_absmax[block] = block_absmax;
    }
}

__global__ void dequantize_absmax(const uint8_t* codes, int64_t count, const float* nested_absmax, const float* offset,
                                  int64_t nested_blocksize, float* absmax) {
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += stride) {
        absmax[i] = dequantized_absmax(codes[i], nested_absmax[i / nested_blocksize], *offset);
    }
}

}  // namespace

}  // namespace hb

extern "C" hb_status hb_quantize_absmax(const hb_quantize_absmax_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_quantize_absmax_args& a = *args;
    if (a.blocks == 0) return HB_OK;
    const unsigned blocks = blocks_for_warps(ceil_div(a.blocks, a.nested_blocksize));
    launch(quantize_absmax, blocks, kWarpsPerBlock * kWarp, 0, stream_of(a.call), a.absmax, a.blocks, a.offset,
           a.nested_blocksize, a.codes, a.nested_absmax);
    return launched();
}

extern "C" hb_status hb_dequantize_absmax(const hb_dequantize_absmax_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_dequantize_absmax_args& a = *args;
    if (a.blocks == 0) return HB_OK;
    const unsigned blocks = blocks_for(a.blocks, kThreads);
    launch(dequantize_absmax, blocks, kThreads, 0, stream_of(a.call), a.codes, a.blocks, a.nested_absmax, a.offset,
           a.nested_blocksize, a.absmax);
    return launched();
}
