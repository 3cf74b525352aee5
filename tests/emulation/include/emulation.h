// The end of csrc/cuda/vocabulary.cuh once more, for a compiler that is not nvcc: launching, shared memory, barriers,
// asynchronous copies and tensor cores. The lane layouts are those of the PTX manual, written out by themselves and not
// taken from the kernels.
#pragma once

#include <stdint.h>

#include "emulator.h"

namespace hb {

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), unsigned blocks, int threads, int64_t shared_bytes, cudaStream_t stream,
            Arguments... arguments) {
    emulation::run_grid(blocks, threads, shared_bytes, stream, [=] { kernel(static_cast<Parameters>(arguments)...); });
}

inline unsigned char* shared_memory() {
    return emulation::shared_memory();
}

inline void block_barrier() {
    emulation::wait_for_block();
}

inline unsigned kept(unsigned value) {
    return value;
}

template <unsigned Mask, unsigned Bits>
unsigned masked_with(unsigned value) {
    return (value & Mask) | Bits;
}

inline void copy_16_bytes(void* to_shared, const void* from, bool there) {
    emulation::start_copy(to_shared, from, there);
}

inline void copies_commit() {
    emulation::end_copy_group();
}

template <int Pending>
void copies_wait() {
    emulation::wait_for_copies(Pending);
}

// mma.sync.aligned.m16n8k16.row.col, "Matrix Fragments for mma.m16n8k16 with floating point type": with group =
// lane / 4 and member = lane % 4, values i of a fragment are
//     a (0..7)  row group + 8 * (i / 2 % 2),   column member * 2 + i % 2 + 8 * (i / 4)
//     b (0..3)  row member * 2 + i % 2 + 8 * (i / 2),   column group
//     c (0..3)  row group + 8 * (i / 2),   column member * 2 + i % 2
// Products are exact; here they are added one after the other in float32, which PTX leaves open.
template <typename T>
void multiply_tiles(float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    struct Fragment {
        float a[8];
        float b[4];
    };
    Fragment own;
    for (int i = 0; i < 8; ++i) own.a[i] = to_float(T{static_cast<uint16_t>(a[i / 2] >> i % 2 * 16)});
    for (int i = 0; i < 4; ++i) own.b[i] = to_float(T{static_cast<uint16_t>(b[i / 2] >> i % 2 * 16)});
    const Fragment* const all = emulation::exchange("mma", emulation::kAllLanes, own);
    const int group = emulation::lane() / 4, member = emulation::lane() % 4;
    for (int i = 0; i < 4; ++i) {
        const int row = group + i / 2 * 8, column = member * 2 + i % 2;
        for (int k = 0; k < 16; ++k) {
            const int holder = k % 8 / 2;  // the member whose fragments hold this k
            const float left = all[row % 8 * 4 + holder].a[k % 2 + row / 8 * 2 + k / 8 * 4];
            const float right = all[column * 4 + holder].b[k % 2 + k / 8 * 2];
            sums[i] += left * right;
        }
    }
}

// mma.sync.aligned.m16n8k32.row.col, "Matrix Fragments for mma.m16n8k32" with 8-bit integers: values i of a fragment
// are
//     a (0..15)  row group + 8 * (i / 4 % 2),   column member * 4 + i % 4 + 16 * (i / 8)
//     b (0..7)   row member * 4 + i % 4 + 16 * (i / 4),   column group
//     c (0..3)   as above
// A sum that an int32 does not hold wraps around.
inline void multiply_int8_tiles(int (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    struct Fragment {
        int8_t a[16];
        int8_t b[8];
    };
    Fragment own;
    for (int i = 0; i < 16; ++i) own.a[i] = static_cast<int8_t>(a[i / 4] >> i % 4 * 8);
    for (int i = 0; i < 8; ++i) own.b[i] = static_cast<int8_t>(b[i / 4] >> i % 4 * 8);
    const Fragment* const all = emulation::exchange("mma.s8", emulation::kAllLanes, own);
    const int group = emulation::lane() / 4, member = emulation::lane() % 4;
    for (int i = 0; i < 4; ++i) {
        const int row = group + i / 2 * 8, column = member * 2 + i % 2;
        int64_t sum = sums[i];
        for (int k = 0; k < 32; ++k) {
            const int holder = k % 16 / 4;  // the member whose fragments hold this k
            const int left = all[row % 8 * 4 + holder].a[k % 4 + row / 8 * 4 + k / 16 * 8];
            sum += left * all[column * 4 + holder].b[k % 4 + k / 16 * 4];
        }
        sums[i] = static_cast<int>(static_cast<unsigned>(sum));
    }
}

}  // namespace hb
