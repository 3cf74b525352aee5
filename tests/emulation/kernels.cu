// Kernels for tests of the emulation itself: a matrix product whose layout is checked from outside, and what a kernel
// must not do.
#include "cuda/vocabulary.cuh"

namespace hb {

namespace {

// out[16, 8] += a[16, 16] * b[16, 8], by one warp that reads its fragments value by value.
__global__ void multiply(const __nv_bfloat16* a, const __nv_bfloat16* b, float* out) {
    const int group = lane() / 4, member = lane() % 4;
    const auto left = [&](int row, int column) {
        return pair_of<__nv_bfloat16>(to_float(a[row * 16 + column]), to_float(a[row * 16 + column + 1]));
    };
    const auto right = [&](int row) {
        return pair_of<__nv_bfloat16>(to_float(b[row * 8 + group]), to_float(b[(row + 1) * 8 + group]));
    };
    const unsigned lefts[4] = {left(group, member * 2), left(group + 8, member * 2), left(group, member * 2 + 8),
                               left(group + 8, member * 2 + 8)};
    const unsigned rights[2] = {right(member * 2), right(member * 2 + 8)};
    float sums[4] = {};
    multiply_tiles<__nv_bfloat16>(sums, lefts, rights);
    for (int i = 0; i < 4; ++i) out[(group + i / 2 * 8) * 8 + member * 2 + i % 2] += sums[i];
}

// out[16, 8] += a[16, 32] * b[32, 8] in int8, in the same way.
__global__ void multiply_int8(const int8_t* a, const int8_t* b, int* out) {
    const int group = lane() / 4, member = lane() % 4;
    const auto left = [&](int row, int column) {
        unsigned word;
        memcpy(&word, a + row * 32 + column, sizeof word);
        return word;
    };
    const auto right = [&](int row) {
        unsigned word = 0;
        for (int i = 0; i < 4; ++i)
            word |= static_cast<unsigned>(static_cast<uint8_t>(b[(row + i) * 8 + group])) << i * 8;
        return word;
    };
    const unsigned lefts[4] = {left(group, member * 4), left(group + 8, member * 4), left(group, member * 4 + 16),
                               left(group + 8, member * 4 + 16)};
    const unsigned rights[2] = {right(member * 4), right(member * 4 + 16)};
    int sums[4] = {};
    multiply_int8_tiles(sums, lefts, rights);
    for (int i = 0; i < 4; ++i) out[(group + i / 2 * 8) * 8 + member * 2 + i % 2] += sums[i];
}

// Every thread leaves its number for the thread in front of it, with a barrier between or without.
__global__ void pass_on(bool barrier, int* out) {
    int* const numbers = reinterpret_cast<int*>(shared_memory());
    const int own = static_cast<int>(threadIdx.x), count = static_cast<int>(blockDim.x);
    numbers[own] = own;
    if (barrier) block_barrier();
    out[own] = numbers[(own + 1) % count];
}

// Each thread copies 16 bytes and writes what is there before and after it waits.
__global__ void copy(const uint4* from, int pending, uint4* before, uint4* after) {
    uint4* const place = reinterpret_cast<uint4*>(shared_memory()) + threadIdx.x;
    copy_16_bytes(place, from + threadIdx.x, true);
    copies_commit();
    before[threadIdx.x] = *place;
    if (pending == 0) copies_wait<0>();
    if (pending == 1) copies_wait<1>();
    after[threadIdx.x] = *place;
}

// One thread does not come to the barrier.
__global__ void wait_for_ever(int* out) {
    if (threadIdx.x != 5) block_barrier();
    out[threadIdx.x] = 1;
}

// Lanes of one warp in two functions.
__global__ void diverge(int* out) {
    out[threadIdx.x] =
        threadIdx.x % 2 == 0 ? __shfl_xor_sync(kAllLanes, 1, 2) : static_cast<int>(__ballot_sync(kAllLanes, true));
}

__global__ void exchange_in_half_a_warp(int* out) {
    out[threadIdx.x] = __shfl_xor_sync(0xffffu, 1, 2);
}

__global__ void copy_to(int64_t place, const uint4* from) {
    copy_16_bytes(shared_memory() + place, from, true);
}

}  // namespace

}  // namespace hb

extern "C" HB_API hb_status hb_emulated_multiply(const void* a, const void* b, float* out) {
    using namespace hb;
    launch(multiply, 1u, kWarp, 0, nullptr, static_cast<const __nv_bfloat16*>(a), static_cast<const __nv_bfloat16*>(b),
           out);
    return launched();
}

extern "C" HB_API hb_status hb_emulated_multiply_int8(const void* a, const void* b, int* out) {
    using namespace hb;
    launch(multiply_int8, 1u, kWarp, 0, nullptr, static_cast<const int8_t*>(a), static_cast<const int8_t*>(b), out);
    return launched();
}

extern "C" HB_API hb_status hb_emulated_pass_on(int threads, bool barrier, int* out) {
    using namespace hb;
    launch(pass_on, 1u, threads, threads * 4, nullptr, barrier, out);
    return launched();
}

extern "C" HB_API hb_status hb_emulated_copy(int threads, const void* from, int pending, void* before, void* after) {
    using namespace hb;
    launch(copy, 1u, threads, threads * 16, nullptr, static_cast<const uint4*>(from), pending,
           static_cast<uint4*>(before), static_cast<uint4*>(after));
    return launched();
}

extern "C" HB_API hb_status hb_emulated_fault(int which, void* memory) {
    using namespace hb;
    int* const out = static_cast<int*>(memory);
    constexpr int64_t too_much = 100 << 10;
    if (which == 0) launch(wait_for_ever, 1u, 64, 0, nullptr, out);
    if (which == 1) launch(diverge, 1u, 64, 0, nullptr, out);
    if (which == 2) launch(exchange_in_half_a_warp, 1u, 64, 0, nullptr, out);
    if (which == 3) launch(copy_to, 1u, 32, 64, nullptr, 56, static_cast<const uint4*>(memory));
    if (which == 4) launch(copy_to, 1u, 32, 64, nullptr, 8, static_cast<const uint4*>(memory));
    if (which == 5) launch(pass_on, 1u, 64, too_much, nullptr, true, out);
    if (which == 6) launch(pass_on, 1u, 33, 33 * 4, nullptr, true, out);
    return launched();
}
