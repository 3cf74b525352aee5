// AMX tiles in plain C++, after Intel's description of the instructions (Software Developer's Manual, volumes 1 and 2):
// shapes, pairs and fours, flushed subnormals, the order of sums. Where a processor would fault, a Fault is thrown.
//
// One rule is ours: tiles are not configured twice, nor released twice. A kernel that did would have left them
// configured for whoever runs next on its thread.
#pragma once

#include <stdint.h>

#include "cpu/tiles.h"

namespace testing {

struct Fault {
    const char* what;
};

// The tiles of one thread.
class TileMachine {
  public:
    void configure(const void* config);
    void release();
    void zero(int tile);
    void load(int tile, const void* rows, int64_t stride);
    void store(int tile, void* rows, int64_t stride) const;
    void dot_bfloat16(int sums, int weights, int x);
    void dot_int8(int sums, int weights, int x);
    bool is_configured() const { return is_configured_; }

    static TileMachine& of_this_thread();
    // Over all threads, since the process began.
    static int64_t configured();
    static int64_t released();

  private:
    struct Tile {
        int rows, row_bytes;
        uint8_t bytes[16][64];
    };
    const Tile& at(int tile) const;
    void check_product(int sums, int weights, int x) const;

    bool is_configured_;
    Tile tiles_[8];
};

// The vocabulary of cpu/tiles.h.
struct EmulatedTiles {
    static void configure(const hb::TileConfig& config) { TileMachine::of_this_thread().configure(&config); }
    static void release() { TileMachine::of_this_thread().release(); }
    template <int Tile>
    static void zero() {
        TileMachine::of_this_thread().zero(Tile);
    }
    template <int Tile>
    static void load(const void* rows, int64_t stride) {
        TileMachine::of_this_thread().load(Tile, rows, stride);
    }
    template <int Tile>
    static void store(void* rows, int64_t stride) {
        TileMachine::of_this_thread().store(Tile, rows, stride);
    }
    template <int Sums, int Weights, int X>
    static void dot_bfloat16() {
        TileMachine::of_this_thread().dot_bfloat16(Sums, Weights, X);
    }
    template <int Sums, int Weights, int X>
    static void dot_int8() {
        TileMachine::of_this_thread().dot_int8(Sums, Weights, X);
    }
};

}  // namespace testing
