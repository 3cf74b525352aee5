// The words of vocabulary.cuh that only Hopper has (sm_90a): barriers in shared memory, bulk copies, products by a
// whole warpgroup, and launches that overlap. No kernels. All PTX of these is here, at the end; without nvcc the same
// words come from emulation_hopper.h.
//
// A warpgroup is four warps beginning with one whose number is divisible by four. Its tensor cores and bulk copies see
// shared memory by a way of their own, the async proxy.
#pragma once

#include "vocabulary.cuh"

namespace hb {

// Whether what is being compiled may hold these words: a kernel begins with `if constexpr (kHopper)`, and is empty in
// code for other architectures. The host's side always has the kernels' names.
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHopper = false;
#else
constexpr bool kHopper = true;
#endif

constexpr int kWarpgroup = 4 * kWarp;
constexpr int kSwizzledRow = 128;                // bytes
constexpr int kSwizzledRows = 8 * kSwizzledRow;  // what repeats: such a tile begins at a multiple of it
constexpr int kHopperSharedBytes = 228 << 10;    // of a multiprocessor
constexpr int kSystemSharedBytes = 1 << 10;      // of each block there, which are the system's

// A barrier for some number of arrivals and, where one says so, of bytes that bulk copies bring. It has phases: one
// ends when all have arrived, and the next begins. A wait for a phase is told whether its number is odd.
struct alignas(8) Barrier {
    uint64_t bits;
};

// Where in its row of 128 bytes a 16-byte piece lies, in a tile that tensor cores read.
__device__ inline int swizzled(int row, int piece) {
    return (piece ^ (row % 8)) * 16;
}

// Describes a tile in shared memory: rows of 128 bytes, 16-byte pieces placed as `swizzled` says, 16-bit values. The
// address may stand at a multiple of 32 bytes within the first row: there begin the 16 columns of one step.
__device__ inline uint64_t swizzled_tile(unsigned address) {
    constexpr uint64_t ignored = 1;  // the leading dimension's distance, which a swizzled row does not need
    constexpr uint64_t eight_rows = kSwizzledRows >> 4;
    constexpr uint64_t swizzle_128_bytes = 1;
    return (address & 0x3ffffu) >> 4 | ignored << 16 | eight_rows << 32 | swizzle_128_bytes << 62;
}

// The descriptor of the tile's step `step`, 32 bytes further on in every row.
__device__ inline uint64_t tile_step(uint64_t tile, int step) {
    return tile + static_cast<uint64_t>(step) * (32 >> 4);
}

}  // namespace hb

// --- what only nvcc understands --------------------------------------------------------------------------------------

#ifdef __CUDACC__

namespace hb {

// As `launch`, but the kernel may start before the one in front of it on the stream has ended: once all of that one's
// blocks have called successors_may_start, or ended. What that one writes is there after predecessors_wait.
template <typename... Parameters, typename... Arguments>
void launch_behind(void (*kernel)(Parameters...), unsigned blocks, int threads, int64_t shared_bytes,
                   cudaStream_t stream, Arguments... arguments) {
    ask_for_shared_memory(kernel, shared_bytes);
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = 1;
    cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

// HB_OK where the device at hand runs a kernel in blocks of so many threads, HB_NO_KERNEL where its code is for fewer
// or there is none; anything else is wrong with the device, not with the kernel.
template <typename... Parameters>
hb_status check_kernel(void (*kernel)(Parameters...), int threads) {
    cudaFuncAttributes attributes = {};
    const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    if (error == cudaSuccess) return fail_unless(attributes.maxThreadsPerBlock >= threads, HB_NO_KERNEL);
    cudaGetLastError();  // the next launch's status is its own
    const hb_status status = status_of(error);
    return status == HB_NO_DEVICE_CODE ? HB_NO_KERNEL : status;
}

// Both do nothing where the kernel was launched the ordinary way, and on older devices, which know no other.
__device__ inline void predecessors_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait; fence.proxy.async.global;" ::: "memory");
#endif
}
__device__ inline void successors_may_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// As shared_memory, from an address on that is a multiple of kSwizzledRows.
__device__ inline unsigned char* tiles_memory() {
    extern __shared__ __align__(kSwizzledRows) unsigned char hb_tiles_memory[];
    return hb_tiles_memory;
}

__device__ inline unsigned shared_address(const void* shared) {
    return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// Only `threads` threads, whole warps, meet here: those that call it with this number, 1 to 15.
__device__ inline void group_barrier(int number, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// The lanes of a warp meet: what they read and wrote comes before what any of them does next.
__device__ inline void warp_barrier() {
    __syncwarp();
}

// How many registers each thread of this warpgroup may have from here on: fewer, or more than the launch gave it.
template <int Registers>
__device__ void release_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ void claim_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

__device__ inline void barrier_begin(Barrier* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes the barriers that this thread began known to bulk copies; other threads need a block_barrier behind it.
__device__ inline void barriers_begun() {
    asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ inline void barrier_arrive(Barrier* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and lets the phase wait for `bytes` of bulk copies besides.
__device__ inline void barrier_arrive_expecting(Barrier* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// Arrives when this thread's copies so far (copy_16_bytes) have; the thread goes on.
__device__ inline void barrier_arrive_after_copies(Barrier* barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Waits until the phase whose number is odd or even, as `parity` says, has ended; the one before it must have.
__device__ inline void barrier_wait(Barrier* barrier, unsigned parity) {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "TRY:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
        "@!ended bra TRY;\n"
        "}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// Starts copying `bytes` into shared memory; all three divisible by 16. They arrive in the phase that expects them.
__device__ inline void bulk_copy(void* to_shared, const void* from, int bytes, Barrier* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to_shared)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

// Products of a warpgroup, in this order: products_begin after registers of sums or of a were written, multiply_rows
// any number of times, products_commit, and products_wait before sums or a are touched again.
__device__ inline void products_begin() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ inline void products_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int Count>
__device__ void products_wait(float (&sums)[Count]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(sums[i])::"memory");  // no use of them moves in front
}

// multiply_rows(T(), sums, a, tile, add):  sums = a * tile^T, or sums += a * tile^T where `add`. a is 64 rows of 16,
// `tile` the descriptor of 2 * (length of sums) rows of 16, sums 64 rows of so many columns in float32. Warp w of the
// group has rows 16w .. 16w+15 of a and of sums, laid out in its lanes as for multiply_tiles; sums[4i .. 4i+3] are
// columns 8i .. 8i+7.
#define HB_LIST_4  "%0, %1, %2, %3"
#define HB_LIST_8  HB_LIST_4 ", %4, %5, %6, %7"
#define HB_LIST_16 HB_LIST_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define HB_LIST_32 \
    HB_LIST_16     \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define HB_LIST_64                                                                                                \
    HB_LIST_32                                                                                                    \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
    "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define HB_SUMS_4(i)  "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define HB_SUMS_8(i)  HB_SUMS_4(i), HB_SUMS_4(i + 4)
#define HB_SUMS_16(i) HB_SUMS_8(i), HB_SUMS_8(i + 8)
#define HB_SUMS_32(i) HB_SUMS_16(i), HB_SUMS_16(i + 16)
#define HB_SUMS_64(i) HB_SUMS_32(i), HB_SUMS_32(i + 32)
// `rest`: the operands behind the sums, by number.
#define HB_MULTIPLY_ROWS(type, ptx, count, columns, a0, a1, a2, a3, from, adding)                                      \
    __device__ inline void multiply_rows(type, float (&sums)[count], const unsigned (&a)[4], uint64_t tile, int add) { \
        asm volatile("{ .reg .pred adds; setp.ne.b32 adds, %" #adding                                                  \
                     ", 0; wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." ptx "." ptx " {" HB_LIST_##count     \
                     "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #from ", adds, 1, 1, 0; }"                       \
                     : HB_SUMS_##count(0)                                                                              \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tile), "r"(add)                                 \
                     : "memory");                                                                                      \
    }
#define HB_MULTIPLY_ROWS_OF(type, ptx)                          \
    HB_MULTIPLY_ROWS(type, ptx, 4, 8, 4, 5, 6, 7, 8, 9)         \
    HB_MULTIPLY_ROWS(type, ptx, 8, 16, 8, 9, 10, 11, 12, 13)    \
    HB_MULTIPLY_ROWS(type, ptx, 16, 32, 16, 17, 18, 19, 20, 21) \
    HB_MULTIPLY_ROWS(type, ptx, 32, 64, 32, 33, 34, 35, 36, 37) \
    HB_MULTIPLY_ROWS(type, ptx, 64, 128, 64, 65, 66, 67, 68, 69)
HB_MULTIPLY_ROWS_OF(__half, "f16")
HB_MULTIPLY_ROWS_OF(__nv_bfloat16, "bf16")
#undef HB_MULTIPLY_ROWS_OF
#undef HB_MULTIPLY_ROWS

}  // namespace hb

#else
#include "emulation_hopper.h"
#endif
