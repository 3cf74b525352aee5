// The words that the kernels are written in: one small thing per function. No kernels.
//
// Arithmetic that must equal the CPU library and the reference bit for bit uses __fmul_rn and __fadd_rn, which the
// compiler never fuses; the library is compiled without fast-math, so divisions and subnormals are exact too.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "checks.h"
#include "formats.h"
#include "halfbyte.h"

namespace hb {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarpsPerBlock = 4;
constexpr int64_t kMostBlocks = 1 << 20;  // kernels walk over their work in strides of the grid

// The tables in the memory of this translation unit's kernels.
static __constant__ const Table<float, 16> kDeviceNf4 = kNf4Values;
static __constant__ const Table<float, 16> kDeviceFp4 = kFp4Values;
static __constant__ const Table<float, 15> kDeviceNf4Thresholds = kNf4Thresholds;
static __constant__ const Table<float, 7> kDeviceFp4Thresholds = kFp4Thresholds;
static __constant__ const Table<uint8_t, 8> kDeviceFp4CodeOfRank = kFp4CodeOfRank;
static __constant__ const Table<float, 256> kDeviceDynamic = make_dynamic_values();
static __constant__ const Table<float, 255> kDeviceMidpoints = make_dynamic_midpoints();

// --- places ----------------------------------------------------------------------------------------------------------

__device__ inline int lane() {
    return static_cast<int>(threadIdx.x) % kWarp;
}

// This warp's number in the whole grid, and how many warps the grid has.
__device__ inline int64_t warp_index() {
    return static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
}
__device__ inline int64_t warp_count() {
    return static_cast<int64_t>(gridDim.x) * kWarpsPerBlock;
}

// Thread blocks for `warps` pieces of work, one warp each.
inline unsigned blocks_for_warps(int64_t warps) {
    const int64_t blocks = ceil_div(warps, kWarpsPerBlock);
    return static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks);
}

// --- values ----------------------------------------------------------------------------------------------------------

__device__ inline float to_float(float value) {
    return value;
}
__device__ inline float to_float(__half value) {
    return __half2float(value);
}
__device__ inline float to_float(__nv_bfloat16 value) {
    return __bfloat162float(value);
}

template <typename T>
__device__ T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) {
    return value;
}
template <>
__device__ inline __half from_float<__half>(float value) {
    return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}

// An element whose dtype is known only when the kernel runs (a bias).
__device__ inline float load_float(const void* tensor, int64_t dtype, int64_t index) {
    if (dtype == HB_FLOAT32) return static_cast<const float*>(tensor)[index];
    if (dtype == HB_FLOAT16) return to_float(static_cast<const __half*>(tensor)[index]);
    return to_float(static_cast<const __nv_bfloat16*>(tensor)[index]);
}

// Magnitudes compared as integers, where infinities and NaNs are the largest: none is lost.
__device__ inline unsigned magnitude_bits(float value) {
    return __float_as_uint(value) & 0x7fffffffu;
}
__device__ inline float largest_in_warp(unsigned bits) {
    return __uint_as_float(__reduce_max_sync(kAllLanes, bits));
}

// The sum over the warp, always added in the same order; every lane gets it.
__device__ inline float sum_in_warp(float value) {
    for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
    return value;
}
__device__ inline int64_t sum_in_warp(int64_t value) {
    for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
    return value;
}

// What divides the values of a block by its scale, as in cpu/floats.h: value * lift * reciprocal.
struct Normaliser {
    float lift;
    float reciprocal;

    __device__ explicit Normaliser(float scale) {
        lift = fabsf(scale) < kSmallestDivisor ? kSubnormalScale : 1.0f;
        const float divisor = __fmul_rn(scale, lift);
        reciprocal = divisor == 0 ? 0.0f : __fdiv_rn(1.0f, divisor);
    }
    __device__ float operator()(float value) const { return __fmul_rn(__fmul_rn(value, lift), reciprocal); }
};

// --- codes -----------------------------------------------------------------------------------------------------------

__device__ inline float code_value(int64_t format, int code) {
    return format == HB_NF4 ? kDeviceNf4.at[code] : kDeviceFp4.at[code];
}

// The 4-bit code of value `index` of a flattened tensor.
__device__ inline int code_at(const uint8_t* packed, int64_t index) {
    const int byte = packed[index / 2];
    return index % 2 == 0 ? byte >> 4 : byte & 15;
}

__device__ inline float dequantized_absmax(int code, float nested_absmax, float offset) {
    return __fadd_rn(__fmul_rn(kDeviceDynamic.at[code], nested_absmax), offset);
}

// --- launching -------------------------------------------------------------------------------------------------------

inline cudaStream_t stream_of(const hb_call& call) {
    return static_cast<cudaStream_t>(call.stream);
}

// What the launch just made came to; nothing is waited for.
inline hb_status launched() {
    switch (cudaGetLastError()) {
        case cudaSuccess:
            return HB_OK;
        case cudaErrorNoDevice:
        case cudaErrorInsufficientDriver:
        case cudaErrorInitializationError:
            return HB_NO_DEVICE;
        case cudaErrorNoKernelImageForDevice:
        case cudaErrorInvalidDeviceFunction:
            return HB_NO_DEVICE_CODE;
        default:
            return HB_LAUNCH_FAILED;
    }
}

// Calls launch(T()) with the C++ type of a checked dtype.
template <typename Launch>
void with_dtype(int64_t dtype, const Launch& launch) {
    if (dtype == HB_FLOAT32) {
        launch(float());
    } else if (dtype == HB_FLOAT16) {
        launch(__half());
    } else {
        launch(__nv_bfloat16());
    }
}

}  // namespace hb
