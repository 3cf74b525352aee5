// The inner part of attention for any CPU: what attention_avx512.cpp does, in the same order, left to the compiler's
// vectors but for AVX2's products, which attention_avx2.cpp has. This file may fuse a product with a sum: where the
// level can, each sum below is the fused one that the hand-written variant spells. No other expression here adds to a
// product.
#include <math.h>
#include <string.h>

#include "attention.h"
#include "checks.h"
#include "clones.h"
#include "floats.h"

namespace hb::attention {

namespace {

using Lanes = float __attribute__((vector_size(kLanes * sizeof(float)), may_alias, aligned(4)));
using Words = uint32_t __attribute__((vector_size(kLanes * sizeof(float)), may_alias, aligned(4)));

HB_INLINE void load(const float* from, Lanes& out) {
    memcpy(&out, from, sizeof out);
}

HB_INLINE void store(const Lanes& lanes, float* to) {
    memcpy(to, &lanes, sizeof lanes);
}

// --- packing --------------------------------------------------------------------------------------------------------

void load_row(const char* row, int64_t store, int64_t count, int64_t padded, float* out) {
    const int64_t there = row == nullptr ? 0 : count;
    load_floats(row, store, 0, there, out);
    memset(out + there, 0, static_cast<size_t>(padded - there) * sizeof(float));
}

void pack(const Shape& shape, const TileRows& rows, Fetching& next, float* keys, float* values) {
    float row[HB_MAX_HEAD_DIM];
    for (int64_t key = 0; key < kTileKeys; ++key) {
        if (key % 2 == 0) next.step();
        load_row(rows.value(key), shape.store, shape.E, shape.padded_e, values + key * shape.padded_e);
        load_row(rows.key(key), shape.store, shape.D, shape.padded_d, row);
        for (int64_t d = 0; d < shape.padded_d; ++d) keys[d * kTileKeys + key] = row[d];
    }
}

// --- products -------------------------------------------------------------------------------------------------------

constexpr int64_t kTogether = 2;  // vectors, and lanes of each: four sums, which any CPU has registers for

// sums[i][n] += x[i][k] * y[k][n] for k from begin to end, both even.
template <int Vectors, int Columns>
HB_INLINE void multiply_few(float* sums, int64_t sums_stride, const float* x, int64_t x_stride, const float* y,
                            int64_t y_stride, int64_t begin, int64_t end) {
    Lanes totals[Vectors][Columns];
    for (int i = 0; i < Vectors; ++i) {
        for (int j = 0; j < Columns; ++j) load(sums + i * sums_stride + j * kLanes, totals[i][j]);
    }
    for (int64_t pair = begin; pair < end; pair += 2) {
        for (int64_t k = pair + 1; k >= pair; --k) {
            for (int j = 0; j < Columns; ++j) {
                Lanes lanes;
                load(y + k * y_stride + j * kLanes, lanes);
                for (int i = 0; i < Vectors; ++i) totals[i][j] += x[i * x_stride + k] * lanes;
            }
        }
    }
    for (int i = 0; i < Vectors; ++i) {
        for (int j = 0; j < Columns; ++j) store(totals[i][j], sums + i * sums_stride + j * kLanes);
    }
}

void multiply(int64_t vectors, int64_t columns, float* sums, int64_t sums_stride, const float* x, int64_t x_stride,
              const float* y, int64_t y_stride, int64_t begin, int64_t end) {
#ifdef HB_X86
    if (has_avx2()) return multiply_avx2(vectors, columns, sums, sums_stride, x, x_stride, y, y_stride, begin, end);
#endif
    for (int64_t i = 0; i < vectors; i += kTogether) {
        for (int64_t n = 0; n < columns; n += kTogether * kLanes) {
            float* const at = sums + i * sums_stride + n;
            const float* const mine = x + i * x_stride;
            const bool one_vector = vectors - i < kTogether, one_column = columns - n < kTogether * kLanes;
            if (one_vector && one_column) {
                multiply_few<1, 1>(at, sums_stride, mine, x_stride, y + n, y_stride, begin, end);
            } else if (one_vector) {
                multiply_few<1, kTogether>(at, sums_stride, mine, x_stride, y + n, y_stride, begin, end);
            } else if (one_column) {
                multiply_few<kTogether, 1>(at, sums_stride, mine, x_stride, y + n, y_stride, begin, end);
            } else {
                multiply_few<kTogether, kTogether>(at, sums_stride, mine, x_stride, y + n, y_stride, begin, end);
            }
        }
    }
}

// --- softmax --------------------------------------------------------------------------------------------------------

// 2^x = 2^n * (1 + r * q), n an integer; `n` as what adds it to a float's exponent.
HB_INLINE void split_power(const Lanes& x, Words& n, Lanes& r, Lanes& q) {
    const Lanes shifted = x + kRoundToInteger;
    r = x - (shifted - kRoundToInteger);
    q = kExp2[5] - Lanes{};
    for (int i = 4; i >= 0; --i) q = q * r + kExp2[i];
    n = reinterpret_cast<const Words&>(shifted) << 23;
}

// 2^x for x <= 0, NaN for NaN; zero where a normal float would end.
HB_INLINE void exp2_of(Lanes& x) {
    Words n;
    Lanes r, q;
    split_power(x, n, r, q);
    const Lanes fraction = q * r + 1.0f;
    const Words power = reinterpret_cast<const Words&>(fraction) + n;
    const Words kept = x < kSmallestPower ? Words{} : power;
    x = x == x ? reinterpret_cast<const Lanes&>(kept) : x;
}

// cap * tanh(x / (2 log2 e)), from 2^x - 1, which keeps its digits near zero.
HB_INLINE void cap_of(Lanes& x, float cap) {
    const Words bits = reinterpret_cast<const Words&>(x);
    const Words magnitude = bits & 0x7fffffffu;
    const Lanes absolute = reinterpret_cast<const Lanes&>(magnitude);
    const Lanes size = absolute > kTanhIsOne ? kTanhIsOne - Lanes{} : absolute;
    Words n;
    Lanes r, q;
    split_power(size, n, r, q);
    n += 0x3f800000u;
    const Lanes scale = reinterpret_cast<const Lanes&>(n);
    const Lanes fraction = q * r;
    const Lanes less_one = scale * fraction + (scale - 1.0f);
    const Lanes capped = less_one / (less_one + 2.0f) * cap;
    const Words with_sign = reinterpret_cast<const Words&>(capped) | (bits & 0x80000000u);
    x = x == x ? reinterpret_cast<const Lanes&>(with_sign) : x;
}

// To nearest, ties to even, still as float32. A NaN that comes from bfloat16 values stays one.
HB_INLINE void round_to_bfloat(Lanes& x) {
    Words bits = reinterpret_cast<const Words&>(x);
    bits += (bits >> 16 & 1u) + 0x7fffu;
    bits &= 0xffff0000u;
    x = reinterpret_cast<const Lanes&>(bits);
}

HB_INLINE void larger(const Lanes& a, const Lanes& b, Lanes& out) {
    out = a > b ? a : b;
}

// Sums of products -> scores, -inf where nothing is seen; returns the largest. `scales` of keys, or null.
HB_CLONES(float, score, (const Shape& shape, const float* scales, int64_t begin, int64_t end, float* row)) {
    Lanes scores[kTileLanes];
    for (int j = 0; j < kTileLanes; ++j) {
        load(row + j * kLanes, scores[j]);
        if (scales != nullptr) {
            Lanes lanes;
            load(scales + j * kLanes, lanes);
            scores[j] *= lanes;
        }
        scores[j] *= shape.scale;
        if (shape.is_capped) cap_of(scores[j], shape.cap);
        store(scores[j], row + j * kLanes);
    }
    for (int64_t place = 0; place < kTileKeys; ++place) {
        if (place < begin || place >= end) row[place] = -INFINITY;
    }
    for (int j = 0; j < kTileLanes; ++j) load(row + j * kLanes, scores[j]);
    larger(scores[0], scores[1], scores[0]);
    larger(scores[2], scores[3], scores[2]);
    larger(scores[0], scores[2], scores[0]);
    float lanes[kLanes];
    store(scores[0], lanes);
    float largest = lanes[0];
    for (int i = 1; i < kLanes; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
    return largest;
}

// A larger maximum: what was summed up so far shrinks.
HB_CLONES(void, rescale, (const Shape& shape, const Block& block, int64_t vector, float maximum)) {
    Lanes factor = block.maxima[vector] - maximum - Lanes{};
    exp2_of(factor);
    float* const sums = block.sums + vector * kLanes;
    Lanes lanes;
    load(sums, lanes);
    store(lanes * factor, sums);
    float* const outputs = block.outputs + vector * shape.padded_e;
    for (int64_t e = 0; e < shape.padded_e; e += kLanes) {
        load(outputs + e, lanes);
        store(lanes * factor, outputs + e);
    }
    block.maxima[vector] = maximum;
}

// Weights of a tile in int8, whose sum is known, -> what its codes are multiplied with: times the value's scale, and
// zero, whatever that is, where nothing is seen.
HB_CLONES(void, weigh_values, (const float* scales, int64_t begin, int64_t end, bool rounds, float* row)) {
    for (int j = 0; j < kTileLanes; ++j) {
        Lanes weights, lanes;
        load(row + j * kLanes, weights);
        load(scales + j * kLanes, lanes);
        weights *= lanes;
        if (rounds) round_to_bfloat(weights);
        store(weights, row + j * kLanes);
    }
    for (int64_t place = 0; place < kTileKeys; ++place) {
        if (place < begin || place >= end) row[place] = 0;
    }
}

// Scores -> weights against the maximum, in place, and their sum.
HB_CLONES(void, weigh, (float maximum, bool rounds, float* row, float* sums)) {
    Lanes weights[kTileLanes];
    for (int j = 0; j < kTileLanes; ++j) {
        load(row + j * kLanes, weights[j]);
        weights[j] -= maximum;
        exp2_of(weights[j]);
        if (rounds) round_to_bfloat(weights[j]);
        store(weights[j], row + j * kLanes);
    }
    Lanes total;
    load(sums, total);
    store(total + ((weights[0] + weights[1]) + (weights[2] + weights[3])), sums);
}

void attend(const Shape& shape, const float* keys, const float* values, const Block& block) {
    float rows[kBlockVectors][kTileKeys] = {};
    const bool is_int8 = block.scales != nullptr, rounds = shape.dtype == HB_BFLOAT16;
    const int64_t stride = shape.vector_bytes / static_cast<int64_t>(sizeof(float));
    multiply(block.vectors, kTileKeys, rows[0], kTileKeys, reinterpret_cast<const float*>(block.queries), stride, keys,
             kTileKeys, 0, shape.padded_d);
    for (int64_t vector = 0; vector < block.vectors; ++vector) {
        const int64_t first = block.begin[vector], last = block.end[vector];
        const float largest = score(shape, is_int8 ? block.scales->keys : nullptr, first, last, rows[vector]);
        if (!(largest <= block.maxima[vector])) rescale(shape, block, vector, largest);
        // A vector that has seen nothing yet keeps -inf, against which no difference has a meaning.
        const float maximum = block.maxima[vector] == -INFINITY ? 0.0f : block.maxima[vector];
        weigh(maximum, rounds && !is_int8, rows[vector], block.sums + vector * kLanes);
        if (is_int8) weigh_values(block.scales->values, first, last, rounds, rows[vector]);
    }
    // Weights outside are zero, and adding nothing changes no bit.
    const Seen seen = seen_by(block);
    multiply(block.vectors, shape.padded_e, block.outputs, shape.padded_e, rows[0], kTileKeys, values, shape.padded_e,
             seen.begin / 2 * 2, (seen.end + 1) / 2 * 2);
}

}  // namespace

const Variant& baseline() {
    static constexpr Variant kVariant = {false, kBlockVectors, pack, attend, nullptr, nullptr, nullptr, nullptr};
    return kVariant;
}

}  // namespace hb::attention
