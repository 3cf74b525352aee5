// Sixteen bytes of values at a time: what one thread reads or writes at once. No kernels.
#pragma once

#include "vocabulary.cuh"

namespace hb {

constexpr int kPieceBytes = 16;

template <typename T>
struct alignas(kPieceBytes) Piece {
    static constexpr int kValues = kPieceBytes / static_cast<int>(sizeof(T));
    T values[kValues];
};

// Whether a tensor begins where a piece may.
inline bool in_pieces(const void* tensor) {
    return reinterpret_cast<uintptr_t>(tensor) % kPieceBytes == 0;
}

template <typename T>
__device__ Piece<T> load_piece(const T* tensor, int64_t index) {
    Piece<T> piece;
    const uint4 bits = reinterpret_cast<const uint4*>(tensor)[index];
    memcpy(&piece, &bits, sizeof bits);
    return piece;
}

template <typename T>
__device__ void store_piece(const Piece<T>& piece, T* tensor, int64_t index) {
    uint4 bits;
    memcpy(&bits, &piece, sizeof bits);
    reinterpret_cast<uint4*>(tensor)[index] = bits;
}

}  // namespace hb
