// The words that the kernels are written in: one small thing per function. No kernels.
//
// All PTX and all of nvcc's own syntax are here, at the end, so that kernels are plain C++: without nvcc the same words
// come from emulation.h, which tests/emulation brings, and the kernels run on a processor.
//
// Arithmetic that must equal the CPU library and the reference bit for bit uses __fmul_rn and __fadd_rn, which the
// compiler never fuses; the library is compiled without fast-math, so divisions and subnormals are exact too.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>
#include <string.h>

#include "checks.h"
#include "formats.h"
#include "halfbyte.h"

namespace hb {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarpsPerBlock = 4;
constexpr int64_t kMostBlocks = 1 << 20;  // kernels walk over their work in strides of the grid

// The tables in the memory of this translation unit's kernels. Constant memory answers a warp that asks for one number
// at a time; what each lane looks up by a number of its own is in global memory, which answers all of a line at once.
static __constant__ const Table<float, 15> kDeviceNf4Thresholds = kNf4Thresholds;
static __constant__ const Table<float, 7> kDeviceFp4Thresholds = kFp4Thresholds;
static __device__ const Table<float, 16> kDeviceNf4 = kNf4Values;
static __device__ const Table<float, 16> kDeviceFp4 = kFp4Values;
static __device__ const Table<uint8_t, 8> kDeviceFp4CodeOfRank = kFp4CodeOfRank;
static __device__ const Table<float, 256> kDeviceDynamic = make_dynamic_values();
static __device__ const Table<float, 255> kDeviceMidpoints = make_dynamic_midpoints();

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

// Thread blocks for `count` pieces of work, so many in each.
inline unsigned blocks_for(int64_t count, int64_t in_each) {
    const int64_t blocks = ceil_div(count, in_each);
    return static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks);
}
// And for `warps` pieces of work, one warp each.
inline unsigned blocks_for_warps(int64_t warps) {
    return blocks_for(warps, kWarpsPerBlock);
}

// --- values ----------------------------------------------------------------------------------------------------------

__device__ inline float to_float(float value) {
    return value;
}
__device__ inline float to_float(__half value) {
    return __half2float(value);
}
__device__ inline float to_float(int8_t code) {
    return static_cast<float>(code);
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

// Two values rounded to T side by side, the first in the low half: what a tensor core takes.
template <typename T>
__device__ unsigned pair_of(float low, float high);
template <>
__device__ inline unsigned pair_of<__half>(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    unsigned bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
}
template <>
__device__ inline unsigned pair_of<__nv_bfloat16>(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    unsigned bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
}

// An element whose dtype is known only when the kernel runs (a bias).
__device__ inline float load_float(const void* tensor, int64_t dtype, int64_t index) {
    if (dtype == HB_FLOAT32) return static_cast<const float*>(tensor)[index];
    if (dtype == HB_FLOAT16) return to_float(static_cast<const __half*>(tensor)[index]);
    return to_float(static_cast<const __nv_bfloat16*>(tensor)[index]);
}
__device__ inline void store_float(float value, void* tensor, int64_t dtype, int64_t index) {
    if (dtype == HB_FLOAT32) {
        static_cast<float*>(tensor)[index] = value;
    } else if (dtype == HB_FLOAT16) {
        static_cast<__half*>(tensor)[index] = from_float<__half>(value);
    } else {
        static_cast<__nv_bfloat16*>(tensor)[index] = from_float<__nv_bfloat16>(value);
    }
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

// Where absmax comes from: float32, or codes of a second level as checkpoints hold them.
struct Absmax {
    const void* absmax;
    const float* nested_absmax;  // null: absmax is float32
    const float* offset;
    int64_t nested_blocksize;

    __device__ float of(int64_t block) const {
        if (nested_absmax == nullptr) return static_cast<const float*>(absmax)[block];
        const int code = static_cast<const uint8_t*>(absmax)[block];
        return dequantized_absmax(code, nested_absmax[block / nested_blocksize], *offset);
    }
};

// --- launching -------------------------------------------------------------------------------------------------------

inline cudaStream_t stream_of(const hb_call& call) {
    return static_cast<cudaStream_t>(call.stream);
}

inline hb_status status_of(cudaError_t error) {
    switch (error) {
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

// What the launch just made came to; nothing is waited for.
inline hb_status launched() {
    return status_of(cudaGetLastError());
}

// Calls run(T()) with the C++ type of a checked dtype.
template <typename Run>
void with_dtype(int64_t dtype, const Run& run) {
    if (dtype == HB_FLOAT32) {
        run(float());
    } else if (dtype == HB_FLOAT16) {
        run(__half());
    } else {
        run(__nv_bfloat16());
    }
}

}  // namespace hb

// --- what only nvcc understands --------------------------------------------------------------------------------------

#ifdef __CUDACC__

namespace hb {

// Asks for a kernel to be launched with so many bytes of shared memory, where that is more than any may have.
template <typename... Parameters>
void ask_for_shared_memory(void (*kernel)(Parameters...), int64_t bytes) {
    constexpr int64_t without_asking = 48 << 10;
    if (bytes <= without_asking) return;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

// Launches kernel(arguments...) on a stream; `launched` tells what came of it.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), unsigned blocks, int threads, int64_t shared_bytes, cudaStream_t stream,
            Arguments... arguments) {
    ask_for_shared_memory(kernel, shared_bytes);
    kernel<<<blocks, static_cast<unsigned>(threads), static_cast<size_t>(shared_bytes), stream>>>(
        static_cast<Parameters>(arguments)...);
}

// The memory that the threads of a block share: as much as the launch says, from an address divisible by 128 on.
__device__ inline unsigned char* shared_memory() {
    extern __shared__ __align__(128) unsigned char hb_shared_memory[];
    return hb_shared_memory;
}

// No thread of the block goes on before all have come here; what they wrote to shared memory is seen by all then.
__device__ inline void block_barrier() {
    __syncthreads();
}

// The value, in a register that the compiler does not see through and so keeps.
__device__ inline unsigned kept(unsigned value) {
    asm volatile("" : "+r"(value));
    return value;
}

// (value & mask) | bits in one instruction, of which the compiler makes two where both are numbers.
template <unsigned Mask, unsigned Bits>
__device__ unsigned masked_with(unsigned value) {
    unsigned result;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(value), "n"(Mask), "n"(Bits));
    return result;
}

// Starts copying 16 bytes into shared memory, both addresses divisible by 16; zeros, and no read, where `there` is
// false. The bytes arrive by the time of a copies_wait; other threads see them after a barrier behind that.
__device__ inline void copy_16_bytes(void* to_shared, const void* from, bool there) {
    const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(to_shared));
    const int bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// Ends a group of copies, an empty one too.
__device__ inline void copies_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `Pending` of this thread's groups are still under way.
template <int Pending>
__device__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// sums += a * b on the warp's tensor core: a is 16 rows of 16, b 16 rows of 8, sums 16 rows of 8 in float32. With
// g = lane / 4 and t = lane % 4, a lane holds of a: rows g, g+8, g, g+8 in this order, in columns 2t and 2t+1 (the
// first two) or 2t+8 and 2t+9; of b: column g in rows 2t and 2t+1, then 2t+8 and 2t+9; of sums: row g in columns 2t and
// 2t+1, then row g+8 in the same.
template <typename T>
__device__ void multiply_tiles(float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2]);
template <>
__device__ inline void multiply_tiles<__half>(float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ inline void multiply_tiles<__nv_bfloat16>(float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same in int8 with exact sums in int32: a is 16 rows of 32, b 32 rows of 8. A lane holds of a: rows g, g+8, g, g+8
// in this order, in columns 4t to 4t+3 (the first two) or 4t+16 to 4t+19, the first in the low byte; of b: column g in
// rows 4t to 4t+3, then 4t+16 to 4t+19; of sums: as above.
__device__ inline void multiply_int8_tiles(int (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace hb

#else
#include "emulation.h"
#endif
