// The arithmetic and the faults of emulated_tiles.h.
#include "emulated_tiles.h"

#include <string.h>

#include <atomic>
#include <cmath>

namespace testing {

namespace {

std::atomic<int64_t> configured_count{0}, released_count{0};

void require(bool holds, const char* what) {
    if (!holds) throw Fault{what};
}

// Subnormal numbers, going in and coming out, are zeros of their sign.
float flushed(float value) {
    return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value;
}

float fused(float a, float b, float sum) {
    return flushed(std::fma(flushed(a), flushed(b), flushed(sum)));
}

float bfloat_at(const uint8_t* bytes) {
    uint16_t half;
    memcpy(&half, bytes, sizeof half);
    const uint32_t bits = uint32_t{half} << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace

TileMachine& TileMachine::of_this_thread() {
    static thread_local TileMachine machine{};
    return machine;
}

int64_t TileMachine::configured() {
    return configured_count;
}

int64_t TileMachine::released() {
    return released_count;
}

void TileMachine::configure(const void* from) {
    hb::TileConfig config;
    memcpy(&config, from, sizeof config);
    require(config.palette == 1, "the palette is 1");
    require(config.start_row == 0, "no load was interrupted");
    for (const uint8_t byte : config.reserved) require(byte == 0, "reserved bytes are zero");
    for (int tile = 0; tile < 16; ++tile) {
        require(config.rows[tile] <= (tile < 8 ? 16 : 0), "rows: 16 at most, and eight tiles");
        require(config.row_bytes[tile] <= (tile < 8 ? 64 : 0), "bytes of a row: 64 at most, and eight tiles");
        require((config.rows[tile] == 0) == (config.row_bytes[tile] == 0), "rows without bytes, or bytes without rows");
    }
    require(!is_configured_, "tiles are configured once");
    is_configured_ = true;
    for (int tile = 0; tile < 8; ++tile) tiles_[tile] = {config.rows[tile], config.row_bytes[tile], {}};
    ++configured_count;
}

void TileMachine::release() {
    require(is_configured_, "tiles are released once");
    *this = {};
    ++released_count;
}

const TileMachine::Tile& TileMachine::at(int tile) const {
    require(is_configured_, "tiles are configured");
    require(tile >= 0 && tile < 8, "there are eight tiles");
    require(tiles_[tile].rows != 0, "a tile that is used has rows");
    return tiles_[tile];
}

void TileMachine::zero(int tile) {
    at(tile);
    memset(tiles_[tile].bytes, 0, sizeof tiles_[tile].bytes);
}

void TileMachine::load(int tile, const void* rows, int64_t stride) {
    zero(tile);
    Tile& to = tiles_[tile];
    const char* const from = static_cast<const char*>(rows);
    for (int row = 0; row < to.rows; ++row) {
        memcpy(to.bytes[row], from + row * stride, static_cast<size_t>(to.row_bytes));
    }
}

void TileMachine::store(int tile, void* rows, int64_t stride) const {
    const Tile& from = at(tile);
    char* const to = static_cast<char*>(rows);
    for (int row = 0; row < from.rows; ++row) {
        memcpy(to + row * stride, from.bytes[row], static_cast<size_t>(from.row_bytes));
    }
}

void TileMachine::check_product(int sums, int weights, int x) const {
    const Tile &s = at(sums), &w = at(weights), &b = at(x);
    require(sums != weights && sums != x && weights != x, "the three tiles of a product are different ones");
    require(s.row_bytes % 4 == 0 && w.row_bytes % 4 == 0 && b.row_bytes % 4 == 0, "rows are whole units of four bytes");
    require(s.rows == w.rows && s.row_bytes == b.row_bytes,
            "sums have the rows of one operand, the columns of the other");
    require(w.row_bytes / 4 == b.rows, "a unit of a row meets a row");
}

void TileMachine::dot_bfloat16(int sums, int weights, int x) {
    check_product(sums, weights, x);
    const Tile &w = tiles_[weights], &b = tiles_[x];
    for (int m = 0; m < w.rows; ++m) {
        for (int n = 0; n < b.row_bytes / 4; ++n) {
            float even = 0, odd = 0;
            for (int k = 0; k < b.rows; ++k) {
                even = fused(bfloat_at(w.bytes[m] + 4 * k), bfloat_at(b.bytes[k] + 4 * n), even);
                odd = fused(bfloat_at(w.bytes[m] + 4 * k + 2), bfloat_at(b.bytes[k] + 4 * n + 2), odd);
            }
            float sum;
            memcpy(&sum, tiles_[sums].bytes[m] + 4 * n, sizeof sum);
            sum = flushed(flushed(sum) + flushed(even + odd));
            memcpy(tiles_[sums].bytes[m] + 4 * n, &sum, sizeof sum);
        }
    }
}

void TileMachine::dot_int8(int sums, int weights, int x) {
    check_product(sums, weights, x);
    const Tile &w = tiles_[weights], &b = tiles_[x];
    for (int m = 0; m < w.rows; ++m) {
        for (int n = 0; n < b.row_bytes / 4; ++n) {
            uint32_t sum;  // wraps around
            memcpy(&sum, tiles_[sums].bytes[m] + 4 * n, sizeof sum);
            for (int k = 0; k < b.rows; ++k) {
                for (int i = 0; i < 4; ++i) {
                    const int product =
                        static_cast<int8_t>(w.bytes[m][4 * k + i]) * static_cast<int8_t>(b.bytes[k][4 * n + i]);
                    sum += static_cast<uint32_t>(product);
                }
            }
            memcpy(tiles_[sums].bytes[m] + 4 * n, &sum, sizeof sum);
        }
    }
}

}  // namespace testing
