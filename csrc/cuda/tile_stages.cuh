// What the matmuls on mma.sync share: rows of a matrix copied into shared memory, and the pipeline of its stages.
//
// Nothing is rearranged in memory: the order of K within a chunk of 64 is free as long as both operands agree. Lane t
// of a group of four takes values 16t .. 16t+15, which lie side by side in either operand.
//
// In shared memory a row of a stage is cut into pieces of 16 bytes, and a `Place` says where in its row a piece lies,
// so that the lanes of one access meet no bank twice.
#pragma once

#include <type_traits>

#include "matmul_plan.h"
#include "pieces.cuh"
#include "vocabulary.cuh"

namespace hb {

constexpr int kMmaThreads = kWarpsPerBlock * kWarp;          // of a block whose warps share out the rows of W
constexpr int kChunkBytes = static_cast<int>(kChunkValues);  // of int8 codes

// Of rows of 64 or 128 bytes of int8 codes: two rows are read at once, 64 bytes of each.
template <int RowBytes>
struct PlaceOfBytes {
    __device__ static int of(int row, int piece) { return RowBytes == 128 ? piece ^ (row & 1) * 4 : piece; }
};

// A row-major matrix in global memory, without gaps.
struct Rows {
    const unsigned char* at;
    int64_t count;
    int64_t bytes;  // of a row
    bool aligned;   // every row, to kPieceBytes

    Rows() = default;
    Rows(const void* matrix, int64_t rows, int64_t row_bytes)
        : at(static_cast<const unsigned char*>(matrix)),
          count(rows),
          bytes(row_bytes),
          aligned((reinterpret_cast<uintptr_t>(matrix) | static_cast<uintptr_t>(row_bytes)) % kPieceBytes == 0) {}

    // `rows` of its rows.
    __device__ Rows from(int64_t first, int64_t rows) const { return behind(first * bytes, rows); }
    // A matrix like this one, but for its rows, that begins so many bytes behind it, a multiple of kPieceBytes where
    // this one is aligned.
    __device__ Rows behind(int64_t distance, int64_t rows) const {
        Rows other = *this;
        other.at += distance;
        other.count = rows;
        return other;
    }
};

// Starts copying `Bytes` from byte `begin` on of `Count` rows; zeros for what lies outside of the matrix.
template <typename Place, int Count, int Bytes, int Threads>
__device__ void copy_rows(unsigned char* to, const Rows& from, int64_t first, int64_t begin) {
    constexpr int pieces = Bytes / kPieceBytes;
    for (int i = static_cast<int>(threadIdx.x); i < Count * pieces; i += Threads) {
        const int row = i / pieces, piece = i % pieces;
        const int64_t at = begin + piece * kPieceBytes;
        const bool there = first + row < from.count && at < from.bytes;
        const unsigned char* const source = from.at + (there ? (first + row) * from.bytes + at : 0);
        unsigned char* const target = to + row * Bytes + Place::of(row, piece) * kPieceBytes;
        if (from.aligned) {
            copy_16_bytes(target, source, there);
        } else {
            for (int b = 0; b < kPieceBytes; ++b) target[b] = there && at + b < from.bytes ? source[b] : 0;
        }
    }
}

// Calls use(stage) for stages [begin, end), each when what fetch(stage) copied is here. Copies start Stages - 1 stages
// ahead, into the slot stage % Stages of a ring. One barrier per stage says both that its bytes are here and that the
// slot read before may be written again.
template <int Stages, typename Fetch, typename Use>
__device__ void run_pipeline(int64_t begin, int64_t end, const Fetch& fetch, const Use& use) {
#pragma unroll
    for (int ahead = 0; ahead < Stages - 1; ++ahead) {
        if (begin + ahead < end) fetch(begin + ahead);
        copies_commit();
    }
    for (int64_t stage = begin; stage < end; ++stage) {
        copies_wait<Stages - 2>();
        block_barrier();
        if (stage + Stages - 1 < end) fetch(stage + Stages - 1);
        copies_commit();
        use(stage);
    }
}

// The largest over the block's threads; every thread gets it. `room` in shared memory has a place for each warp, and
// nobody may be reading it when the first comes here.
__device__ inline unsigned largest_in_block(unsigned value, unsigned* room) {
    const unsigned of_warp = __reduce_max_sync(kAllLanes, value);
    if (lane() == 0) room[threadIdx.x / kWarp] = of_warp;
    block_barrier();
    return __reduce_max_sync(kAllLanes, lane() < static_cast<int>(blockDim.x) / kWarp ? room[lane()] : 0u);
}

// Calls run(std::integral_constant<int, which>()), for which < Count.
template <int Count, int First = 0, typename Run>
void with_number(int which, const Run& run) {
    if constexpr (First < Count) {
        if (which == First) {
            run(std::integral_constant<int, First>());
        } else {
            with_number<Count, First + 1>(which, run);
        }
    }
}

}  // namespace hb
