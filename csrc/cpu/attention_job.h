// One call of attention as attention.cpp and attention_span.cpp see it: sizes, the workspace's parts, one item of work.
#pragma once

#include <algorithm>

#include "attention.h"
#include "checks.h"
#include "halfbyte.h"

namespace hb::attention {

constexpr int64_t kSpanKeys = 512;
constexpr int64_t kItemVectors = 192;
constexpr int64_t kItemsPerThread = 2;                 // wanted before spans are split
constexpr int64_t kMostPartFloats = int64_t{1} << 24;  // of the workspace, for split spans

inline int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

// The first position that a row at `position` sees.
inline int64_t seen_from(const hb_paged_attention_args& a, int64_t position) {
    return a.window == 0 || position < a.window ? 0 : position - a.window + 1;
}

// The running softmax of consecutive vectors; see Block.
struct State {
    float* maxima;
    float* sums;
    float* outputs;

    static int64_t floats(int64_t vectors, int64_t padded_e) {
        return round_up(vectors, kLanes) + vectors * (kLanes + padded_e);
    }
    State(float* memory, int64_t vectors)
        : maxima(memory), sums(memory + round_up(vectors, kLanes)), outputs(sums + vectors * kLanes) {}
    State from(int64_t vector, int64_t padded_e) const {
        State later = *this;
        later.maxima += vector, later.sums += vector * kLanes, later.outputs += vector * padded_e;
        return later;
    }
};

// One call, with what follows from its arguments, and the parts of the workspace in floats.
struct Job {
    const hb_paged_attention_args& a;
    const Variant& variant;
    Shape shape;
    int64_t group;         // query heads that share a kv head
    int64_t item_vectors;  // the most that an item can have
    int64_t spans;         // at most, of a sequence
    bool is_split;         // items are single spans
    bool is_alone;         // single rows read keys where they lie
    int64_t kv_heads = 1;  // of an item of a single row; see share_out

    explicit Job(const hb_paged_attention_args& args)
        : a(args),
          variant(fastest(args.dtype, args.store_dtype, args.D, args.E)),
          shape{args.dtype, args.store_dtype, args.D, args.E, round_up(args.D, 2), round_up(args.E, kLanes),
                0,          args.softcap > 0, 0,      0},
          group(args.H / args.G),
          item_vectors(least(kItemVectors, std::max(args.H, (args.T - args.S + 1) * group))),
          spans(args.max_blocks * args.block_tokens / kSpanKeys + 1) {
        shape.vector_bytes = shape.padded_d * (variant.keeps_pairs ? 2 : 4);
        const float softcap = static_cast<float>(a.softcap);
        shape.scale = static_cast<float>(a.scale) * (shape.is_capped ? 2 / softcap : 1) * kLog2E;
        shape.cap = softcap * kLog2E;
        const bool is_scarce = a.S < kItemsPerThread * a.call.threads;
        const int64_t part = kLanes + shape.padded_e + 1;
        is_alone = variant.attend_alone != nullptr && a.store_dtype == HB_BFLOAT16 && group <= kMostBlockVectors &&
                   a.block_tokens % kLanes == 0;
        is_split = a.T == a.S && is_scarce && a.H <= kMostPartFloats && a.T * a.H * part <= kMostPartFloats / spans;
    }

    int64_t scratch_floats() const {
        return kTileKeys * round_up(shape.padded_d, kLanes) + kTileKeys * shape.padded_e + query_floats() +
               2 * round_up(State::floats(item_vectors, shape.padded_e), kLanes) + turned_floats() * most_heads();
    }
    // How often packing a head's tile, or its values alone, takes a step of fetching.
    int64_t pack_steps(bool of_values) const {
        const int64_t in_lane = a.store_dtype == HB_INT8 ? 4 : variant.keeps_pairs ? 2 : 1;
        return (of_values ? 0 : kTileLanes * ceil_div(a.D, in_lane * kLanes)) + kTileKeys / 2;
    }
    // The vectors of a head of a single row, turned.
    int64_t turned_floats() const { return is_alone ? round_up(shape.padded_d, 2 * kLanes) / 2 * kLanes : 0; }
    int64_t most_heads() const { return least(a.G, kItemVectors / group); }
    // A block's queries are read to its whole size, also the last one's: pairs fill half of this.
    int64_t query_floats() const {
        return std::max(item_vectors, kMostBlockVectors) * round_up(shape.padded_d, kLanes);
    }
    // How many kv heads an item of a single row takes along: as many as leave enough items.
    void share_out(int64_t threads) {
        if (group > kItemVectors) return;
        int64_t items = 0;
        for (int64_t s = 0; s < a.S; ++s) items += is_split ? a.starts[s] / kSpanKeys + 1 : 1;
        kv_heads = most_heads();
        const int64_t wanted = kItemsPerThread * threads;
        while (kv_heads > 1 && items * ceil_div(a.G, kv_heads) < wanted) kv_heads = (kv_heads + 1) / 2;
    }

    int64_t rows_of(int64_t sequence) const { return a.offsets[sequence + 1] - a.offsets[sequence]; }
    int64_t heads_of(int64_t sequence) const { return rows_of(sequence) == 1 ? kv_heads : 1; }

    int64_t part_vectors() const { return is_split ? a.T * a.H * spans : 0; }
    int64_t bytes() const {
        const int64_t parts = round_up(State::floats(part_vectors(), shape.padded_e), kLanes);
        return (parts + a.call.threads * scratch_floats()) * static_cast<int64_t>(sizeof(float));
    }
};

struct Scratch {
    float* keys;
    float* values;
    char* queries;
    State total, span;
    float* turned;

    Scratch(const Job& job, float* memory)
        : keys(memory),
          values(keys + kTileKeys * round_up(job.shape.padded_d, kLanes)),
          queries(reinterpret_cast<char*>(values + kTileKeys * job.shape.padded_e)),
          total(values + kTileKeys * job.shape.padded_e + job.query_floats(), job.item_vectors),
          span(total.maxima + round_up(State::floats(job.item_vectors, job.shape.padded_e), kLanes), job.item_vectors),
          turned(span.maxima + round_up(State::floats(job.item_vectors, job.shape.padded_e), kLanes)) {}
};

// A range of one sequence's query vectors, the same for each of some kv heads. The sequence's first row is `row` of the
// batch and lies at `start`.
struct Item {
    int64_t sequence, row, start;
    int64_t kv_head, kv_heads;
    int64_t first, vectors;  // of each kv head
    int64_t first_span, end_span;

    // The rows of the sequence that the item's first and last vector are in.
    int64_t first_row(const Job& job) const { return first / job.group; }
    int64_t last_row(const Job& job) const { return (first + vectors - 1) / job.group; }
    int64_t keys_begin(const Job& job) const { return seen_from(job.a, start + first_row(job)); }
    int64_t keys_end(const Job& job) const { return start + last_row(job) + 1; }
    int64_t all_vectors() const { return kv_heads * vectors; }
    bool is_alone(const Job& job) const { return job.is_alone && job.rows_of(sequence) == 1; }
    // Of vector i of all: its row in the batch and its head.
    int64_t row_of(const Job& job, int64_t i) const { return row + (first + i % vectors) / job.group; }
    int64_t head_of(const Job& job, int64_t i) const {
        return (kv_head + i / vectors) * job.group + (first + i % vectors) % job.group;
    }
};

// Query vectors as the variant takes them.
void pack_queries(const Job& job, const Item& item, const Scratch& scratch);
// The running softmax of an item's vectors over one span, from nothing. Fetches the first tile of what is computed
// after the item's last one, if anything is.
void attend_span(const Job& job, const Item& item, const Item* after, int64_t span, const Scratch& scratch,
                 const State& state);

}  // namespace hb::attention
