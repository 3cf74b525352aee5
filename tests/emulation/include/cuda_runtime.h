// In the place of CUDA's header of this name: what csrc/cuda uses of the language and of its built-in functions, in
// plain C++. A warp's functions ask the emulator (emulator.h) for what the other lanes brought.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "emulator.h"

#define __global__
#define __device__
#define __constant__
#define __launch_bounds__(...)

using hb::emulation::blockDim;
using hb::emulation::blockIdx;
using hb::emulation::gridDim;
using hb::emulation::threadIdx;

struct alignas(8) float2 {
    float x, y;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

// --- the host's side -------------------------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t {
    cudaSuccess,
    cudaErrorNoDevice,
    cudaErrorInsufficientDriver,
    cudaErrorInitializationError,
    cudaErrorNoKernelImageForDevice,
    cudaErrorInvalidDeviceFunction,
    cudaErrorLaunchFailure,
};

inline cudaError_t cudaGetDevice(int* device) {
    *device = hb::emulation::device();
    return *device == hb::emulation::kNoDevice ? cudaErrorNoDevice : cudaSuccess;
}

inline cudaError_t cudaGetLastError() {
    return hb::emulation::take_failure() ? cudaErrorLaunchFailure : cudaSuccess;
}

// --- arithmetic: this is compiled without contraction ----------------------------------------------------------------

inline float __fadd_rn(float a, float b) {
    return a + b;
}
inline float __fsub_rn(float a, float b) {
    return a - b;
}
inline float __fmul_rn(float a, float b) {
    return a * b;
}
inline float __fdiv_rn(float a, float b) {
    return a / b;
}
inline float __fsqrt_rn(float value) {
    return sqrtf(value);
}
inline float __fmaf_rn(float a, float b, float c) {
    return fmaf(a, b, c);
}
inline int __float2int_rn(float value) {
    return static_cast<int>(lrintf(value));
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
inline int __float_as_int(float value) {
    return static_cast<int>(__float_as_uint(value));
}
inline float __int_as_float(int bits) {
    return __uint_as_float(static_cast<unsigned>(bits));
}
inline int __ffs(int value) {
    return __builtin_ffs(value);
}
inline int __popc(unsigned value) {
    return __builtin_popcount(value);
}
// Byte i of the result is the one that the i-th four bits of `selector` name, 0 to 3 of low and 4 to 7 of high.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
    unsigned bytes = 0;
    for (int i = 0; i < 4; ++i) {
        bytes |= static_cast<unsigned>(both >> (selector >> i * 4 & 7) * 8 & 0xff) << i * 8;
    }
    return bytes;
}
inline unsigned max(unsigned a, unsigned b) {
    return a > b ? a : b;
}

// --- warps -----------------------------------------------------------------------------------------------------------

template <typename T>
T __shfl_sync(unsigned lanes, T value, int from) {
    return hb::emulation::exchange("shfl", lanes, value)[from % hb::emulation::kWarpSize];
}
template <typename T>
T __shfl_xor_sync(unsigned lanes, T value, int distance) {
    return hb::emulation::exchange("shfl.xor", lanes, value)[hb::emulation::lane() ^ distance];
}
template <typename T>
T __shfl_up_sync(unsigned lanes, T value, int distance) {
    const T* const values = hb::emulation::exchange("shfl.up", lanes, value);
    const int own = hb::emulation::lane();
    return values[own < distance ? own : own - distance];
}
inline unsigned __ballot_sync(unsigned lanes, bool vote) {
    const bool* const votes = hb::emulation::exchange("ballot", lanes, vote);
    unsigned ballot = 0;
    for (int i = 0; i < hb::emulation::kWarpSize; ++i) ballot |= static_cast<unsigned>(votes[i]) << i;
    return ballot;
}
inline unsigned __reduce_max_sync(unsigned lanes, unsigned value) {
    const unsigned* const values = hb::emulation::exchange("reduce.max", lanes, value);
    unsigned largest = 0;
    for (int i = 0; i < hb::emulation::kWarpSize; ++i) largest = max(largest, values[i]);
    return largest;
}
inline unsigned __reduce_or_sync(unsigned lanes, unsigned value) {
    const unsigned* const values = hb::emulation::exchange("reduce.or", lanes, value);
    unsigned any = 0;
    for (int i = 0; i < hb::emulation::kWarpSize; ++i) any |= values[i];
    return any;
}
