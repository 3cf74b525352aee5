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

// A thread's share of copying stages of a matrix, each `Bytes` of `Count` rows: pieces that lie under each other, so
// that all but one of what leads to them is worked out once. Zeros for what lies outside of the matrix.
template <typename Place, int Count, int Bytes, int Threads>
class StageCopies {
    static constexpr int kPieces = Bytes / kPieceBytes;    // of a row
    static constexpr int kRowsAtOnce = Threads / kPieces;  // that all threads copy, a piece each
    static_assert(Threads % kPieces == 0, "a thread's pieces lie under each other");
    static_assert(kRowsAtOnce % 8 == 0, "places repeat every eight rows");

    const Rows& from_;
    const unsigned char* source_;  // the thread's first piece in stage 0, which need not be in the matrix
    int64_t step_;                 // to its next one
    int rows_;                     // of the matrix, from this one's on
    int stages_;                   // that have something of these pieces
    int target_;

    // The threads may be the last ones of a block.
    __device__ static int own_row() { return static_cast<int>(threadIdx.x) % Threads / kPieces; }
    __device__ static int own_piece() { return static_cast<int>(threadIdx.x) % kPieces; }

  public:
    // Of rows from `first` on.
    __device__ StageCopies(const Rows& from, int64_t first)
        : from_(from),
          source_(from.at + (first + own_row()) * from.bytes + own_piece() * kPieceBytes),
          step_(kRowsAtOnce * from.bytes),
          target_(own_row() * Bytes + Place::of(own_row(), own_piece()) * kPieceBytes) {
        const int64_t rows = from.count - first - own_row();
        rows_ = rows < Count ? static_cast<int>(rows) : Count;
        stages_ = static_cast<int>((from.bytes - own_piece() * kPieceBytes + Bytes - 1) / Bytes);
    }

    __device__ void start(unsigned char* to, int stage) const {
        const unsigned char* source = source_ + static_cast<int64_t>(stage) * Bytes;
        to += target_;
        if (!from_.aligned) {
            start_by_bytes(to, source, stage);
            return;
        }
        start_pieces(to, source, stage);
    }

    // The same of a matrix that is aligned.
    __device__ void start_aligned(unsigned char* to, int stage) const {
        start_pieces(to + target_, source_ + static_cast<int64_t>(stage) * Bytes, stage);
    }

  private:
    // Where threads are more than pieces, some have none.
    __device__ static bool is_mine(int row) { return Count % kRowsAtOnce == 0 || row + own_row() < Count; }

    __device__ void start_pieces(unsigned char* to, const unsigned char* source, int stage) const {
#pragma unroll
        for (int row = 0; row < Count; row += kRowsAtOnce, source += step_) {
            if (is_mine(row)) copy_16_bytes(to + row * Bytes, source, row < rows_ && stage < stages_);
        }
    }

    __device__ void start_by_bytes(unsigned char* to, const unsigned char* source, int stage) const {
        const int64_t left = from_.bytes - static_cast<int64_t>(stage) * Bytes - own_piece() * kPieceBytes;
#pragma unroll 1
        for (int row = 0; row < Count && is_mine(row); row += kRowsAtOnce, source += step_) {
            for (int b = 0; b < kPieceBytes; ++b) to[row * Bytes + b] = row < rows_ && b < left ? source[b] : 0;
        }
    }
};

// Calls use(stage, slot) for stages [begin, end), each when what fetch(stage, slot) copied is here. Copies start
// Stages - 1 stages ahead, into the slot stage % Stages of a ring. One barrier per stage says both that its bytes are
// here and that the slot read before may be written again.
template <int Stages, typename Fetch, typename Use>
__device__ void run_pipeline(int begin, int end, const Fetch& fetch, const Use& use) {
    const auto behind = [](int slot) { return slot + 1 < Stages ? slot + 1 : 0; };
    const int first = begin % Stages;
    int filled = first;
#pragma unroll
    for (int ahead = 0; ahead < Stages - 1; ++ahead, filled = behind(filled)) {
        if (begin + ahead < end) fetch(begin + ahead, filled);
        copies_commit();
    }
    int slot = first;
    for (int stage = begin; stage < end; ++stage, slot = behind(slot), filled = behind(filled)) {
        copies_wait<Stages - 2>();
        block_barrier();
        if (stage + Stages - 1 < end) fetch(stage + Stages - 1, filled);
        copies_commit();
        use(stage, slot);
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
