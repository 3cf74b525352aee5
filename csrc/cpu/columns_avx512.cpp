// Products with decoded weights by columns for AVX-512 with BF16 and VBMI; columns.h has the layout.
//
// Sixteen rows of codes, 64 bytes each, are transposed in units of four bytes, so that a vector has eight values of
// each row. One instruction then moves a pair's two codes to the low bits of their 16-bit lanes, and a second one looks
// both up. Tables stay as they are, rounded to bfloat16 once, and what a block has added up to is scaled.
//
// A sum is its row's and column's own, in the order of K, however many other rows there are. The products' instruction
// takes subnormal values for zeros.
#include <immintrin.h>
#include <string.h>

#include "avx512_bf16.h"
#include "clones.h"
#include "columns.h"
#include "fetch.h"
#include "floats.h"
#include "formats.h"

namespace hb {

namespace {

constexpr int64_t kLanes = 16;
constexpr int kVectors = 2;   // of sums, for a row of x
constexpr int kMostRows = 8;  // of x in registers; with more of them, what is scaled after each block has no room
constexpr int64_t kPairBytes = kVectors * 64;
static_assert(kColumns == kVectors * kLanes, "a row's sums");

// How each kind of weight goes from units, four bytes of sixteen rows, to pairs.
struct FourBits {
    static constexpr int64_t kPairs = 4;  // in a unit, one behind the other

    // Where in a quadword, which has a unit of two rows, the codes of each of its pairs are: the first one in the high
    // half of its byte.
    __m512i places[kPairs];
    __m512i table;

    HB_INLINE explicit FourBits(const DecodedWeight& weight) {
        for (int64_t pair = 0; pair < kPairs; ++pair) {
            const int64_t first = 8 * pair + 4, second = 8 * pair;
            places[pair] = _mm512_set1_epi64(first | second << 16 | (32 + first) << 32 | (32 + second) << 48);
        }
        const __m512 entries = Avx512Bf16::table(weight.format == HB_NF4 ? kNf4Values.at : kFp4Values.at);
        table = _mm512_castps_si512(Avx512Bf16::scaled(entries, lift_of(weight.format)));
    }
    HB_INLINE void decode(__m512i unit, char* pairs) const {
        for (int64_t i = 0; i < kPairs; ++i) {
            const __m512i found = _mm512_multishift_epi64_epi8(places[i], unit);
            _mm512_store_si512(pairs + i * kPairBytes, _mm512_permutexvar_epi16(found, table));
        }
    }
    static HB_INLINE float lift(const DecodedWeight& weight) { return lift_of(weight.format); }
    static HB_INLINE void scales_of_absmax(float*) {}
};

// A code in the high byte of a lane is its value times 2^24, which float32 holds exactly, and its upper half too.
struct EightBits {
    static constexpr int64_t kPairs = 2;

    HB_INLINE explicit EightBits(const DecodedWeight&) {}
    static HB_INLINE void decode(__m512i unit, char* pairs) {
        _mm512_store_si512(pairs, pair(_mm512_slli_epi32(unit, 24), _mm512_slli_epi32(unit, 16)));
        _mm512_store_si512(pairs + kPairBytes, pair(_mm512_slli_epi32(unit, 8), unit));
    }
    static HB_INLINE float lift(const DecodedWeight&) { return 0x1p24f; }
    static HB_INLINE void scales_of_absmax(float* scales) {
        for (int64_t i = 0; i < kColumns; ++i) scales[i] /= kInt8Max;
    }

  private:
    // The codes in the high bytes; other bytes are 0 in `first` or cut off.
    static HB_INLINE __m512i pair(__m512i first, __m512i second) {
        const __m512i high = _mm512_set1_epi32(static_cast<int32_t>(0xff000000u));
        const __m512 a = _mm512_cvtepi32_ps(_mm512_and_si512(first, high));
        const __m512 b = _mm512_cvtepi32_ps(_mm512_and_si512(second, high));
        return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(a), 16), _mm512_castps_si512(b));
    }
};

// `bytes` bytes of codes of sixteen rows -> their vectors of a panel. Fetches those of the next panel.
template <typename Kind>
HB_INLINE void fill(const uint8_t* codes, int64_t row_bytes, int64_t rows, int64_t bytes, const Kind& kind,
                    char* panel) {
    alignas(64) char units[kLanes * kTransposedBytes];
    for (int64_t at = 0; at < bytes; at += kTransposedBytes) {
        for (int64_t i = 0; i < kLanes; ++i) __builtin_prefetch(codes + (i + kColumns) * row_bytes + at, 0, 2);
        const int64_t some = bytes - at < kTransposedBytes ? bytes - at : kTransposedBytes;
        transpose_codes(codes + at, row_bytes, rows, some, units);
        for (int64_t i = 0; i < some / kUnitBytes; ++i, panel += Kind::kPairs * kPairBytes) {
            kind.decode(_mm512_load_si512(units + i * kTransposedBytes), panel);
        }
    }
}

// What rows of x meet: `pieces` times `pairs` pairs of 32 weight rows, each piece part of a block or a whole one.
struct Panel {
    const char* weights;
    int64_t pieces, pairs;
    const float* scales;  // [pieces][32]
};

// Rows rows of x against a panel; totals [Rows][32].
template <int Rows>
HB_NOINLINE void multiply(const uint16_t* x, int64_t stride, const Panel& panel, float* totals) {
    const char* at = panel.weights;
    for (int64_t piece = 0; piece < panel.pieces; ++piece) {
        __m512 sums[Rows][kVectors];
        for (auto& row : sums) {
            for (__m512& sum : row) sum = _mm512_setzero_ps();
        }
        for (int64_t pair = 0; pair < panel.pairs; ++pair, at += kPairBytes) {
            __m512bh weights[kVectors];
            for (int i = 0; i < kVectors; ++i) weights[i] = (__m512bh)_mm512_load_si512(at + 64 * i);
            for (int r = 0; r < Rows; ++r) {
                int32_t two;
                memcpy(&two, x + r * stride + 2 * pair, sizeof two);
                const __m512bh values = (__m512bh)_mm512_set1_epi32(two);
                for (int i = 0; i < kVectors; ++i) sums[r][i] = _mm512_dpbf16_ps(sums[r][i], values, weights[i]);
            }
        }
        x += 2 * panel.pairs;
        for (int i = 0; i < kVectors; ++i) {
            const __m512 scale = _mm512_loadu_ps(panel.scales + piece * kColumns + i * kLanes);
            for (int r = 0; r < Rows; ++r) {
                float* const total = totals + r * kColumns + i * kLanes;
                _mm512_storeu_ps(total, _mm512_fmadd_ps(sums[r][i], scale, _mm512_loadu_ps(total)));
            }
        }
    }
}

// Rows are shared out evenly, so that of the fewest there may be nobody gets less than half of the most.
template <int Rows = kMostRows>
HB_INLINE void multiply_rows(int64_t rows, const uint16_t* x, int64_t stride, const Panel& panel, float* totals) {
    if constexpr (Rows > kMostRows / 2) {
        if (rows < Rows) return multiply_rows<Rows - 1>(rows, x, stride, panel, totals);
    }
    multiply<Rows>(x, stride, panel, totals);
}

// Totals, divided by the table's lift, and the bias, rounded -> columns [n, n + columns) of out.
HB_INLINE void hand_out(const DecodedCall& a, const DecodedRows& rows, int64_t n, int64_t columns, float lift,
                        const float* totals) {
    float biases[kColumns] = {};
    for (int64_t i = 0; i < columns && a.bias != nullptr; ++i) biases[i] = load_float(a.bias, a.bias_dtype, n + i);
    const __m512 inverse = _mm512_set1_ps(1 / lift);
    uint16_t* const out = static_cast<uint16_t*>(a.out) + rows.first * a.out_stride + n;
    for (int64_t r = 0; r < rows.count; ++r) {
        for (int64_t i = 0; i < columns; i += kLanes) {
            const __m512 total = _mm512_mul_ps(_mm512_loadu_ps(totals + r * kColumns + i), inverse);
            const __m256i rounded = bfloats_of_floats(_mm512_add_ps(total, _mm512_loadu_ps(biases + i)));
            _mm256_mask_storeu_epi16(out + r * a.out_stride + i, lanes_mask(columns - i), rounded);
        }
    }
}

template <typename Kind>
HB_INLINE void run_columns(const DecodedCall& a, const DecodedRows& rows, int64_t begin, int64_t end, char* scratch) {
    const ColumnsScratch parts(a, rows.count);
    char* const weights = scratch;
    float* const totals = reinterpret_cast<float*>(weights + parts.panel);
    float* const room = totals + parts.totals / int64_t{sizeof(float)};
    float* const scales = room + parts.absmax / int64_t{sizeof(float)};
    const Kind kind(a.weight);
    const int64_t values_of_byte = 2 * Kind::kPairs / kUnitBytes, row_bytes = a.K / values_of_byte;
    const int64_t blocksize = a.weight.blocksize, blocks = a.K / blocksize;
    const uint16_t* const x = static_cast<const uint16_t*>(a.x) + rows.first * a.K;
    const int64_t last = end * kColumns < a.N ? end * kColumns : a.N;
    for (int64_t n = begin * kColumns; n < last; n += kColumns) {
        const int64_t columns = last - n < kColumns ? last - n : kColumns;
        turn_absmax<kColumns>(absmax_at(a.weight.absmax, n * blocks, columns * blocks, room), columns, blocks, scales);
        Kind::scales_of_absmax(scales);
        fetch_absmax(a.weight.absmax, (n + columns) * blocks, columns * blocks);
        memset(totals, 0, static_cast<size_t>(parts.totals));
        for (int64_t k = 0; k < a.K; k += kPanelValues) {
            const int64_t values = a.K - k < kPanelValues ? a.K - k : kPanelValues;
            const int64_t piece = blocksize < values ? blocksize : values;
            for (int64_t i = 0; i < kVectors; ++i) {
                // Where a vector has no row, its lanes are those of the last one there is.
                const int64_t first = i * kLanes < columns ? i * kLanes : columns - 1;
                const int64_t there = columns - first < kLanes ? columns - first : kLanes;
                const uint8_t* const codes = a.weight.codes + (n + first) * row_bytes + k / values_of_byte;
                fill(codes, row_bytes, there, values / values_of_byte, kind, weights + 64 * i);
            }
            const Panel panel = {weights, values / piece, piece / 2, scales + k / blocksize * kColumns};
            for (int64_t row = 0, shares = (rows.count + kMostRows - 1) / kMostRows; row < rows.count; --shares) {
                const int64_t together = (rows.count - row + shares - 1) / shares;
                multiply_rows(together, x + row * a.K + k, a.K, panel, totals + row * kColumns);
                row += together;
            }
        }
        hand_out(a, rows, n, columns, Kind::lift(a.weight), totals);
    }
}

}  // namespace

void run_columns_avx512(const DecodedCall& a, const DecodedRows& rows, int64_t begin, int64_t end, char* scratch) {
    if (a.weight.is_int8) {
        run_columns<EightBits>(a, rows, begin, end, scratch);
    } else {
        run_columns<FourBits>(a, rows, begin, end, scratch);
    }
}

}  // namespace hb
