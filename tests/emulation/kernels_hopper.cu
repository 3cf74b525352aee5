// Kernels for tests of what hopper.cpp models: a product whose tile is laid out by hand, and what a kernel must not do.
#include "cuda/vocabulary_hopper.cuh"

namespace hb {

namespace {

constexpr int kTileColumns = 64;

// out[64, 16] = a[64, 64] * b[16, 64]^T, twice where `again`, by a warpgroup. `fault` leaves something out.
enum Fault { kNone, kNoFence, kNoCommit, kNoWait };

__global__ void multiply_warpgroup(const __nv_bfloat16* a, const __nv_bfloat16* b, bool again, int fault, float* out) {
    unsigned char* const tile = tiles_memory();
    const int thread = static_cast<int>(threadIdx.x);
    for (int i = thread; i < 16 * kTileColumns; i += kWarpgroup) {
        const int row = i / kTileColumns, column = i % kTileColumns;
        *reinterpret_cast<__nv_bfloat16*>(tile + row * kSwizzledRow + swizzled(row, column / 8) + column % 8 * 2) =
            b[i];
    }
    block_barrier();
    const int row = thread / kWarp * 16 + lane() / 4, member = lane() % 4;
    const auto pair = [&](int down, int column) {
        const __nv_bfloat16* const at = a + (row + down) * kTileColumns + column;
        return pair_of<__nv_bfloat16>(to_float(at[0]), to_float(at[1]));
    };
    float sums[8] = {};
    if (fault != kNoFence) products_begin();
    const uint64_t whole = swizzled_tile(shared_address(tile));
    for (int step = 0; step < (again ? 8 : 4); ++step) {
        const int column = step % 4 * 16 + member * 2;
        const unsigned left[4] = {pair(0, column), pair(8, column), pair(0, column + 8), pair(8, column + 8)};
        multiply_rows(__nv_bfloat16(), sums, left, tile_step(whole, step % 4), step != 0);
    }
    if (fault != kNoCommit) products_commit();
    if (fault != kNoWait) products_wait(sums);
    for (int i = 0; i < 8; ++i) out[(row + i / 2 % 2 * 8) * 16 + i / 4 * 8 + member * 2 + i % 2] = sums[i];
}

// Thread 0 has 64 bytes copied; all wait for their barrier, or do not, and write two each. One warp: of several, one
// might be held back until the copy is here.
__global__ void copy_in_bulk(const unsigned char* from, bool wait, unsigned char* out) {
    Barrier* const barrier = reinterpret_cast<Barrier*>(tiles_memory());
    if (threadIdx.x == 0) {
        barrier_begin(barrier, 1);
        barriers_begun();
        barrier_arrive_expecting(barrier, 64);
        bulk_copy(tiles_memory() + 64, from, 64, barrier);
    }
    block_barrier();
    if (wait) barrier_wait(barrier, 0);
    for (unsigned i = threadIdx.x; i < 64; i += kWarp) out[i] = tiles_memory()[64 + i];
    if (!wait) barrier_wait(barrier, 0);
}

__global__ void misuse(int which, const unsigned char* from) {
    Barrier* const barrier = reinterpret_cast<Barrier*>(tiles_memory());
    if (which == 0) barrier_arrive(barrier);
    if (which == 0 || threadIdx.x != 0) return;
    barrier_begin(barrier, 1);
    if (which == 1) bulk_copy(tiles_memory() + 64, from, 64, barrier);
    barriers_begun();
    if (which == 2) bulk_copy(tiles_memory() + 72, from, 64, barrier);
    if (which == 3) bulk_copy(tiles_memory() + 128, from, 64, barrier);
    if (which == 4) bulk_copy(tiles_memory() + 64, from, 64, barrier);
    if (which == 5) barrier_wait(barrier, 0);
}

__global__ void make(int* number) {
    number[threadIdx.x] = 1;
}
__global__ void take(const int* number, bool wait, int* out) {
    if (wait) predecessors_wait();
    out[threadIdx.x] = number[threadIdx.x];
}

}  // namespace

}  // namespace hb

extern "C" HB_API hb_status hb_emulated_multiply_warpgroup(const void* a, const void* b, bool again, int fault,
                                                           float* out) {
    using namespace hb;
    launch(multiply_warpgroup, 1u, kWarpgroup, 2 * kSwizzledRows, nullptr, static_cast<const __nv_bfloat16*>(a),
           static_cast<const __nv_bfloat16*>(b), again, fault, out);
    return launched();
}

extern "C" HB_API hb_status hb_emulated_copy_in_bulk(const void* from, bool wait, void* out) {
    using namespace hb;
    launch(copy_in_bulk, 1u, kWarp, 128, nullptr, static_cast<const unsigned char*>(from), wait,
           static_cast<unsigned char*>(out));
    return launched();
}

extern "C" HB_API hb_status hb_emulated_misuse(int which, const void* memory) {
    using namespace hb;
    launch(misuse, 1u, 32, 128, nullptr, which, static_cast<const unsigned char*>(memory));
    return launched();
}

extern "C" HB_API hb_status hb_emulated_launch_behind(bool wait, int* number, int* out) {
    using namespace hb;
    launch(make, 1u, kWarp, 0, nullptr, number);
    launch_behind(take, 1u, kWarp, 0, nullptr, static_cast<const int*>(number), wait, out);
    return launched();
}
