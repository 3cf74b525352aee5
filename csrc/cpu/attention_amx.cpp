// The inner part of attention on AMX tiles: up to sixteen query vectors meet 64 keys, and their weights 64 values of an
// output, in products of sixteen by sixteen sums of 32 terms. Queries, keys, values and weights are bfloat16 in pairs,
// as attention_pack_avx512.cpp packs them for vectors too: a lane of keys holds two neighbours of d, one of values two
// neighbouring keys, which is how the right operand of a tile's product lies. See attention.h for the layout.
//
// A single row meets each tile once, for which its keys are not worth turning: they are the left operand, as they lie
// in the cache, and its vectors the right one.
//
// Sums are added up in the order of the instruction: 16 products of even and 16 of odd places, then both to the sum. It
// takes subnormal values for zeros.
#include "attention.h"
#include "attention_softmax_avx512.h"
#include "level.h"

#ifdef HB_X86

#include "tile_blocks.h"
#include "tiles.h"
#include "vectors_avx512.h"

namespace hb::attention {

namespace {

constexpr int64_t kTilePairs = 16;  // of terms in a product

// 0 .. 3 sums      4 left operand      5, 6 right operand, in turn; keys as they lie: 4, 6 left, 5 right
void configure() {
    TileConfig config{};
    config.palette = 1;
    for (int tile = 0; tile < 7; ++tile) {
        config.rows[tile] = kTileRows;
        config.row_bytes[tile] = kTileRowBytes;
    }
    AmxTiles::configure(config);
}

void release() {
    AmxTiles::release();
}

// Pairs [begin, end) of sixteen rows of x, `x_stride` bytes apart, times those of y [pairs, y_stride lanes].
struct Operands {
    const char* x;
    int64_t x_stride;
    const float* y;
    int64_t y_stride;
    int64_t begin, end;  // multiples of kTilePairs
};

template <int Lane, int Lanes>
HB_INLINE void add_products(const float* y, int64_t stride) {
    if constexpr (Lane < Lanes) {
        constexpr int kRight = 5 + Lane % 2;
        AmxTiles::load<kRight>(y + Lane * kLanes, stride);
        AmxTiles::dot_bfloat16<Lane, 4, kRight>();
        add_products<Lane + 1, Lanes>(y, stride);
    }
}

template <int Lane, int Lanes>
HB_INLINE void zero_sums() {
    if constexpr (Lane < Lanes) AmxTiles::zero<Lane>(), zero_sums<Lane + 1, Lanes>();
}

template <int Lane, int Lanes>
HB_INLINE void store_sums(float* sums) {
    if constexpr (Lane < Lanes) {
        AmxTiles::store<Lane>(sums + Lane * kLanes, kTileKeys * static_cast<int64_t>(sizeof(float)));
        store_sums<Lane + 1, Lanes>(sums);
    }
}

// sums[16][64], of which the first Lanes times sixteen columns.
template <int Lanes>
void multiply(const Operands& o, float* sums) {
    const int64_t stride = o.y_stride * static_cast<int64_t>(sizeof(float));
    zero_sums<0, Lanes>();
    for (int64_t k = o.begin; k < o.end; k += kTilePairs) {
        AmxTiles::load<4>(o.x + k * static_cast<int64_t>(sizeof(float)), o.x_stride);
        add_products<0, Lanes>(o.y + k * o.y_stride, stride);
    }
    store_sums<0, Lanes>(sums);
}

void multiply(int64_t lanes, const Operands& operands, float* sums) {
    static constexpr void (*kByLanes[kTileLanes])(const Operands&, float*) = {multiply<1>, multiply<2>, multiply<3>,
                                                                              multiply<4>};
    kByLanes[lanes - 1](operands, sums);
}

using Scores = float[kTileRows][kTileKeys];

// Rows of tiles behind the block's vectors hold anything, and what comes of them is dropped.
HB_AVX512 void weigh_values(const Shape& shape, const float* values, const Block& block, const Seen& seen,
                            Scores& rows) {
    alignas(64) Scores sums;
    const int64_t row_bytes = kTileKeys * static_cast<int64_t>(sizeof(float));
    for (int64_t vector = 0; vector < block.vectors; ++vector) weigh<true>(shape, block, vector, rows[vector]);
    // Weights outside are zero; values there are zeros or other rows' own, and with finite ones nothing is added.
    const int64_t begin = seen.begin / 2 / kTilePairs * kTilePairs;
    const int64_t end = (seen.end + 2 * kTilePairs - 1) / (2 * kTilePairs) * kTilePairs;
    for (int64_t e = 0; e < shape.padded_e; e += kTileKeys) {
        const int64_t left = (shape.padded_e - e) / kLanes, lanes = left < kTileLanes ? left : kTileLanes;
        multiply(lanes, {reinterpret_cast<const char*>(rows[0]), row_bytes, values + e, shape.padded_e, begin, end},
                 sums[0]);
        for (int64_t vector = 0; vector < block.vectors; ++vector) {
            float* const outputs = block.outputs + vector * shape.padded_e + e;
            for (int64_t lane = 0; lane < lanes * kLanes; lane += kLanes) {
                const __m512 more = _mm512_load_ps(sums[vector] + lane);
                _mm512_storeu_ps(outputs + lane, _mm512_add_ps(_mm512_loadu_ps(outputs + lane), more));
            }
        }
    }
}

// Lanes behind the last key that is seen are left out. Those in front may hold anything, and all are masked.
int64_t lanes_of(const Seen& seen) {
    return (seen.end + kLanes - 1) / kLanes;
}

void attend(const Shape& shape, const float* keys, const float* values, const Block& block) {
    const Seen seen = seen_by(block);
    alignas(64) Scores rows;
    multiply(lanes_of(seen), {block.queries, shape.vector_bytes, keys, kTileKeys, 0, shape.padded_d / 2}, rows[0]);
    weigh_values(shape, values, block, seen, rows);
}

// --- single rows ---------------------------------------------------------------------------------------------------

HB_AVX512 void turn(const Shape& shape, const char* queries, int64_t vectors, float* turned) {
    for (int64_t pair = 0; pair < shape.padded_d / 2; pair += kTilePairs) {
        __m512i rows[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) {
            const char* const from = queries + i * shape.vector_bytes + pair * static_cast<int64_t>(sizeof(float));
            rows[i] = i < vectors ? _mm512_loadu_si512(from) : _mm512_setzero_si512();
        }
        transpose(rows);
        for (int64_t i = 0; i < kLanes; ++i) _mm512_storeu_si512(turned + (pair + i) * kLanes, rows[i]);
    }
}

// Where the first of sixteen positions has its keys, though it may not be one that is to be read; null where none is.
const char* keys_of(const TileRows& rows, int64_t first) {
    for (int64_t i = first; i < first + kLanes; ++i) {
        if (rows.keys[i] != nullptr) return rows.key(i) - (i - first) * rows.key_stride;
    }
    return nullptr;
}

template <int Lane, int Lanes>
HB_INLINE void add_keys(const char* const* keys, int64_t byte, int64_t stride) {
    if constexpr (Lane < Lanes) {
        constexpr int kLeft = Lane % 2 == 0 ? 4 : 6;
        AmxTiles::load<kLeft>(keys[Lane] + byte, stride);
        AmxTiles::dot_bfloat16<Lane, kLeft, 5>();
        add_keys<Lane + 1, Lanes>(keys, byte, stride);
    }
}

template <int Lane, int Lanes>
HB_INLINE void store_turned(float (*sums)[kTileRows][kLanes]) {
    if constexpr (Lane < Lanes) {
        AmxTiles::store<Lane>(sums[Lane], kTileRowBytes);
        store_turned<Lane + 1, Lanes>(sums);
    }
}

// Sixteen keys a lane of sums, against all vectors -> sums[lane][key][vector].
template <int Lanes>
void multiply_keys(const char* const* keys, int64_t stride, const float* turned, int64_t pairs,
                   float (*sums)[kTileRows][kLanes]) {
    zero_sums<0, Lanes>();
    for (int64_t pair = 0; pair < pairs; pair += kTilePairs) {
        AmxTiles::load<5>(turned + pair * kLanes, kTileRowBytes);
        add_keys<0, Lanes>(keys, pair * static_cast<int64_t>(sizeof(float)), stride);
    }
    store_turned<0, Lanes>(sums);
}

// The same bits as attend over the packed tile: a product's factors change sides, and nothing else.
HB_AVX512 void attend_alone(const Shape& shape, const TileRows& rows, Fetching& next, const float* turned,
                            float* values, const Block& block) {
    static constexpr void (*kByLanes[kTileLanes])(const char* const*, int64_t, const float*, int64_t,
                                                  float (*)[kTileRows][kLanes]) = {multiply_keys<1>, multiply_keys<2>,
                                                                                   multiply_keys<3>, multiply_keys<4>};
    const Seen seen = seen_by(block);
    const int64_t lanes = lanes_of(seen);
    const char* keys[kTileLanes];
    const char* any = nullptr;
    for (int64_t lane = 0; lane < lanes; ++lane) {
        keys[lane] = keys_of(rows, lane * kLanes);
        if (keys[lane] != nullptr) any = keys[lane];
    }
    for (int64_t lane = 0; lane < lanes; ++lane) keys[lane] = keys[lane] == nullptr ? any : keys[lane];
    alignas(64) float sums[kTileLanes][kTileRows][kLanes];
    kByLanes[lanes - 1](keys, rows.key_stride, turned, shape.padded_d / 2, sums);
    alignas(64) Scores scores;
    for (int64_t lane = 0; lane < lanes; ++lane) {
        __m512i columns[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) columns[i] = _mm512_load_si512(sums[lane][i]);
        transpose(columns);
        for (int64_t i = 0; i < kLanes; ++i) _mm512_store_si512(scores[i] + lane * kLanes, columns[i]);
    }
    pack_value_pairs_avx512(shape, rows, next, values);
    weigh_values(shape, values, block, seen, scores);
}

}  // namespace

bool fit_tiles(int64_t D, int64_t E) {
    return D % (2 * kTilePairs) == 0 && E % kLanes == 0;
}

const Variant& on_tiles() {
    static constexpr Variant kTiles = {true, kTileRows,    pack_pairs_avx512, attend,
                                       turn, attend_alone, configure,         release};
    return kTiles;
}

}  // namespace hb::attention

#endif
