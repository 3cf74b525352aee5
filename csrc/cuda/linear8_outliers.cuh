// The outliers of a tile of LLM.int8(): for each output the sum of value * weight over its row's outliers, in float32
// and in column order, as the CPU library and the reference add it up.
//
// Columns in which a row of the tile has an outlier are listed, 1024 columns at a time; the weights and values of those
// listed come to shared memory, 16 columns at a time, and each thread adds up the terms of its own outputs. Nothing
// else of W is read for them, and nothing where no row has any.
#pragma once

#include "linear8_tile.cuh"

namespace hb {

template <int Number>
struct Outliers {
    using Tile = Int8Tile<Number>;
    using Totals = typename Tile::Totals;

    const Tile& tile;
    const Int8Product& p;

    __device__ explicit Outliers(const Tile& of) : tile(of), p(of.p) {}

    __device__ int* list() const { return reinterpret_cast<int*>(tile.shared); }
    // [2][warps][32]
    __device__ unsigned* words() const { return reinterpret_cast<unsigned*>(list() + kWindow); }
    __device__ float* weights() const { return reinterpret_cast<float*>(words() + 2 * Tile::kWarps * kWarp); }
    __device__ float* values() const { return weights() + kListed * Tile::kRows; }

    // Whether a row of the tile has any. Behind it nobody reads the ring any more.
    __device__ bool any() const {
        if (p.rows.found == nullptr) return false;
        unsigned found = 0;
        for (int token = static_cast<int>(threadIdx.x); token < Tile::kTokens; token += Tile::kThreads) {
            const int64_t m = tile.first_token + token;
            if (m < p.M) found |= p.rows.found[m];
        }
        return largest_in_block(found, reinterpret_cast<unsigned*>(tile.shared + Tile::kRoomAt)) != 0;
    }

    // This lane's word of a window's columns, joined over the tile's rows of x.
    __device__ unsigned joined_word(int64_t window) const {
        const int64_t word = window * kWarp + lane(), count = p.rows.stride / kWordColumns;
        const int warp = static_cast<int>(threadIdx.x) / kWarp;
        unsigned joined = 0;
        for (int token = warp; token < Tile::kTokens; token += Tile::kWarps) {
            const int64_t m = tile.first_token + token;
            if (m < p.M && word < count && p.rows.found[m] != 0) joined |= p.rows.masks[m * count + word];
        }
        // Two windows take turns: a warp can be in the next one while another still reads.
        unsigned* const room = words() + window % 2 * Tile::kWarps * kWarp;
        room[warp * kWarp + lane()] = joined;
        block_barrier();
        for (int other = 0; other < Tile::kWarps; ++other) joined |= room[other * kWarp + lane()];
        return joined;
    }

    // The first warp writes the list of a window's columns; every thread gets their number.
    __device__ int list_columns(int64_t window) const {
        unsigned word = joined_word(window);
        const int own = __popc(word);
        int end = own;  // of this lane's columns in the list
        for (int distance = 1; distance < kWarp; distance *= 2) {
            const int before = __shfl_up_sync(kAllLanes, end, distance);
            if (lane() >= distance) end += before;
        }
        if (threadIdx.x < kWarp) {
            const int first = static_cast<int>(window * kWindow) + lane() * kWordColumns;
            for (int at = end - own; at < end; ++at) {
                list()[at] = first + __ffs(static_cast<int>(word)) - 1;
                word &= word - 1;
            }
        }
        return __shfl_sync(kAllLanes, end, kWarp - 1);
    }

    __device__ void bring(const int* columns, int count) const {
        const int8_t* const codes = reinterpret_cast<const int8_t*>(p.codes.at);
        for (int i = static_cast<int>(threadIdx.x); i < count * Tile::kRows; i += Tile::kThreads) {
            const int64_t n = tile.first_row + i % Tile::kRows;
            weights()[i] = n < p.N ? static_cast<float>(codes[n * p.K + columns[i / Tile::kRows]]) : 0.0f;
        }
        for (int i = static_cast<int>(threadIdx.x); i < count * Tile::kTokens; i += Tile::kThreads) {
            const int64_t m = tile.first_token + i % Tile::kTokens;
            const int64_t at = m * p.K + columns[i / Tile::kTokens];
            values()[i] = m < p.M ? load_float(p.values, p.x_dtype, at) : 0.0f;
        }
    }

    __device__ void add_column(Totals& totals, const float* column_weights, const float* column_values) const {
        float own[Tile::kWeightTiles][2];
#pragma unroll
        for (int w = 0; w < Tile::kWeightTiles; ++w) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                own[w][half] = column_weights[Tile::warp_row() + w * 16 + half * 8 + lane() / 4];
            }
        }
#pragma unroll
        for (int t = 0; t < Tile::kTokenTiles; ++t) {
#pragma unroll
            for (int which = 0; which < 2; ++which) {
                const float value = column_values[Tile::warp_token() + t * 8 + lane() % 4 * 2 + which];
                if (!p.rows.by_column && !(fabsf(value) >= p.rows.threshold)) continue;
#pragma unroll
                for (int w = 0; w < Tile::kWeightTiles; ++w) {
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        float& total = totals[w][t][half * 2 + which];
                        total = __fadd_rn(total, __fmul_rn(value, own[w][half]));
                    }
                }
            }
        }
    }

    __device__ void add(Totals& totals) const {
        const int64_t windows = (p.K + kWindow - 1) / kWindow;
        for (int64_t window = 0; window < windows; ++window) {
            const int count = list_columns(window);
            for (int first = 0; first < count; first += kListed) {
                const int together = count - first < kListed ? count - first : kListed;
                block_barrier();  // the list is written, and what came before has been read
                bring(list() + first, together);
                block_barrier();
                for (int i = 0; i < together; ++i) {
                    add_column(totals, weights() + i * Tile::kRows, values() + i * Tile::kTokens);
                }
            }
        }
    }
};

}  // namespace hb
