// Attention over a paged cache: checks of what the tables say, who computes what, and how parts come together.
//
// The work is cut into items: up to 192 query vectors of one sequence and kv head, over all that they see. Threads take
// items off a counter, so uneven ones (a prompt beside single tokens) even out. Where a step of single rows has fewer
// items than threads would want, an item is one span of 512 keys instead, its running softmax goes to the workspace,
// and the spans are put together at the end. Either way each span is summed up on its own and spans are put together in
// order, so that both ways give the same bits.
//
//     item     for each span, for each tile of 64 keys that some row sees:
//                  pack the tile (attention_avx512.cpp, attention_baseline.cpp); block after block of six vectors meet
//                  it
//              sink, division, rounding
//
// Packing costs as much as five vectors' products, so decoding is near the speed of memory and prefill near the
// multiplier's. The inner part is what the variants differ in; everything here is the same for all.
#include "attention.h"

#include <math.h>
#include <string.h>

#include <atomic>

#include "checks.h"
#include "clones.h"
#include "floats.h"
#include "halfbyte.h"
#include "pool.h"

namespace hb::attention {

namespace {

constexpr int64_t kSpanKeys = 512;
constexpr int64_t kItemVectors = 192;
constexpr int64_t kItemsPerThread = 2;                 // wanted before spans are split
constexpr int64_t kMostPartFloats = int64_t{1} << 24;  // of the workspace, for split spans

int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
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
    int64_t kv_heads = 1;  // of an item; see share_out

    explicit Job(const hb_paged_attention_args& args)
        : a(args),
          variant(fastest(args.dtype, args.D)),
          shape{args.dtype, args.D, args.E, round_up(args.D, 2), round_up(args.E, kLanes), 0, args.softcap > 0, 0, 0},
          group(args.H / args.G),
          item_vectors(least(kItemVectors, args.T > args.S ? (args.T - args.S + 1) * group : args.H)),
          spans(args.max_blocks * args.block_tokens / kSpanKeys + 1) {
        shape.vector_bytes = shape.padded_d * (variant.keeps_pairs ? 2 : 4);
        const double scale = a.scale * (shape.is_capped ? 2 / a.softcap : 1);
        shape.scale = static_cast<float>(scale * kLog2E);
        shape.cap = static_cast<float>(a.softcap * kLog2E);
        const bool is_scarce = a.S < kItemsPerThread * a.call.threads;
        const int64_t part = kLanes + shape.padded_e + 1;
        is_split = a.T == a.S && is_scarce && a.H <= kMostPartFloats && a.T * a.H * part <= kMostPartFloats / spans;
    }

    int64_t scratch_floats() const {
        return kTileKeys * round_up(shape.padded_d, kLanes) + kTileKeys * shape.padded_e +
               item_vectors * round_up(shape.padded_d, kLanes) +
               2 * round_up(State::floats(item_vectors, shape.padded_e), kLanes);
    }
    // How many kv heads an item takes along: as many as leave enough items.
    void share_out(int64_t threads) {
        if (a.T != a.S || group > kItemVectors) return;
        int64_t items = 0;
        for (int64_t s = 0; s < a.S; ++s) items += is_split ? a.starts[s] / kSpanKeys + 1 : 1;
        kv_heads = least(a.G, kItemVectors / group);
        while (kv_heads > 1 && items * ceil_div(a.G, kv_heads) < kItemsPerThread * threads)
            kv_heads = (kv_heads + 1) / 2;
    }

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

    Scratch(const Job& job, float* memory)
        : keys(memory),
          values(keys + kTileKeys * round_up(job.shape.padded_d, kLanes)),
          queries(reinterpret_cast<char*>(values + kTileKeys * job.shape.padded_e)),
          total(values + kTileKeys * job.shape.padded_e + job.item_vectors * round_up(job.shape.padded_d, kLanes),
                job.item_vectors),
          span(total.maxima + round_up(State::floats(job.item_vectors, job.shape.padded_e), kLanes), job.item_vectors) {
    }
};

// --- what there is to do
// ----------------------------------------------------------------------------------------------

// The first position that a row at `position` sees.
int64_t seen_from(const hb_paged_attention_args& a, int64_t position) {
    return a.window == 0 || position < a.window ? 0 : position - a.window + 1;
}

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
    // Of vector i of all: its row in the batch and its head.
    int64_t row_of(const Job& job, int64_t i) const { return row + (first + i % vectors) / job.group; }
    int64_t head_of(const Job& job, int64_t i) const {
        return (kv_head + i / vectors) * job.group + (first + i % vectors) % job.group;
    }
};

// Finds items by number, for numbers that only rise.
class Cursor {
  public:
    explicit Cursor(const Job& job) : job_(job) {}

    // False when there are not that many.
    bool find(int64_t number, Item* item) {
        for (; sequence_ < job_.a.S; ++sequence_) {
            const int64_t row = job_.a.offsets[sequence_], start = job_.a.starts[sequence_];
            const int64_t vectors = (job_.a.offsets[sequence_ + 1] - row) * job_.group;
            const int64_t ranges = ceil_div(vectors, kItemVectors);
            const int64_t first_span = seen_from(job_.a, start) / kSpanKeys;
            const int64_t spans = job_.is_split ? start / kSpanKeys + 1 - first_span : 1;
            const int64_t count = ceil_div(job_.a.G, job_.kv_heads) * ranges * spans;
            if (number - before_ < count) {
                const int64_t rest = number - before_;
                const int64_t first = rest / spans % ranges * kItemVectors;
                const int64_t kv_head = rest / spans / ranges * job_.kv_heads;
                *item = {sequence_,
                         row,
                         start,
                         kv_head,
                         least(job_.kv_heads, job_.a.G - kv_head),
                         first,
                         least(kItemVectors, vectors - first),
                         0,
                         0};
                item->first_span = item->keys_begin(job_) / kSpanKeys + rest % spans;
                item->end_span = job_.is_split ? item->first_span + 1 : ceil_div(item->keys_end(job_), kSpanKeys);
                return true;
            }
            before_ += count;
        }
        return false;
    }

  private:
    const Job& job_;
    int64_t sequence_ = 0;
    int64_t before_ = 0;  // items of the sequences before it
};

// --- one item
// ---------------------------------------------------------------------------------------------------------

void pack_queries(const Job& job, const Item& item, char* queries) {
    const hb_paged_attention_args& a = job.a;
    for (int64_t i = 0; i < item.all_vectors(); ++i) {
        const int64_t element = item.row_of(job, i) * a.query_row_stride + item.head_of(job, i) * a.query_head_stride;
        char* const to = queries + i * job.shape.vector_bytes;
        if (job.variant.keeps_pairs) {
            memcpy(to, static_cast<const uint16_t*>(a.query) + element, static_cast<size_t>(job.shape.vector_bytes));
            continue;
        }
        load_floats(a.query, a.dtype, element, a.D, reinterpret_cast<float*>(to));
        if (job.shape.padded_d > a.D) reinterpret_cast<float*>(to)[a.D] = 0;
    }
}

// Where a tile's keys and values are; null outside of begin .. end - 1.
void find_rows(const Job& job, const Item& item, int64_t tile, int64_t begin, int64_t end, TileRows* rows) {
    const hb_paged_attention_args& a = job.a;
    const int64_t* const table = a.tables + item.sequence * a.max_blocks;
    const int64_t bytes = dtype_bytes(a.dtype);
    const int64_t first = tile * kTileKeys;
    int64_t place = begin > first ? least(begin - first, kTileKeys) : 0;
    const int64_t stop = end > first ? least(end - first, kTileKeys) : 0;
    for (int64_t i = 0; i < kTileKeys; ++i) {
        if (i < place || i >= stop) rows->keys[i] = rows->values[i] = nullptr;
    }
    while (place < stop) {
        const int64_t block = (first + place) / a.block_tokens, inside = (first + place) % a.block_tokens;
        const int64_t slot = table[block] * a.block_tokens + inside;
        const int64_t last = least(stop, place + a.block_tokens - inside);
        const char* key = static_cast<const char*>(a.keys) + (slot * a.G + item.kv_head) * a.D * bytes;
        const char* value = static_cast<const char*>(a.values) + (slot * a.G + item.kv_head) * a.E * bytes;
        for (; place < last; ++place, key += a.G * a.D * bytes, value += a.G * a.E * bytes) {
            rows->keys[place] = key, rows->values[place] = value;
        }
    }
}

// The item's vectors of one kv head meet its packed tile, in blocks as equal as they can be.
void attend_tile(const Job& job, const Item& item, int64_t tile, int64_t head, const Scratch& scratch,
                 const State& state) {
    const int64_t blocks = ceil_div(item.vectors, kBlockVectors);
    for (int64_t i = 0; i < blocks; ++i) {
        const int64_t first = item.vectors * i / blocks;
        const State mine = state.from(head * item.vectors + first, job.shape.padded_e);
        Block block = {item.vectors * (i + 1) / blocks - first,
                       scratch.queries + (head * item.vectors + first) * job.shape.vector_bytes,
                       {},
                       {},
                       mine.maxima,
                       mine.sums,
                       mine.outputs};
        bool sees_any = false;
        for (int64_t v = 0; v < block.vectors; ++v) {
            const int64_t position = item.start + (item.first + first + v) / job.group;
            const int64_t begin = seen_from(job.a, position) - tile * kTileKeys;
            block.begin[v] = begin < 0 ? 0 : least(begin, kTileKeys);
            block.end[v] = position < tile * kTileKeys ? 0 : least(position + 1 - tile * kTileKeys, kTileKeys);
            sees_any = sees_any || block.begin[v] < block.end[v];
        }
        if (sees_any) job.variant.attend(job.shape, scratch.keys, scratch.values, block);
    }
}

// The running softmax of an item's vectors over one span, from nothing.
void attend_span(const Job& job, const Item& item, int64_t span, const Scratch& scratch, const State& state) {
    const int64_t vectors = item.all_vectors();
    for (int64_t i = 0; i < vectors; ++i) state.maxima[i] = -INFINITY;
    memset(state.sums, 0, static_cast<size_t>(vectors * kLanes) * sizeof(float));
    memset(state.outputs, 0, static_cast<size_t>(vectors * job.shape.padded_e) * sizeof(float));
    const int64_t begin = item.keys_begin(job), end = item.keys_end(job);
    const int64_t last = least(end, (span + 1) * kSpanKeys);
    int64_t tile = (begin > span * kSpanKeys ? begin : span * kSpanKeys) / kTileKeys;
    TileRows rows[2];
    find_rows(job, item, tile, begin, end, &rows[0]);
    for (int turn = 0; tile * kTileKeys < last; ++tile, turn ^= 1) {
        TileRows &now = rows[turn], &next = rows[turn ^ 1];
        find_rows(job, item, tile + 1, begin, end, &next);
        for (int64_t head = 0; head < item.kv_heads; ++head) {
            now.key_offset = next.key_offset = head * job.a.D * dtype_bytes(job.a.dtype);
            now.value_offset = next.value_offset = head * job.a.E * dtype_bytes(job.a.dtype);
            job.variant.pack(job.shape, now, next, scratch.keys, scratch.values);
            attend_tile(job, item, tile, head, scratch, state);
        }
    }
}

// --- putting together
// -------------------------------------------------------------------------------------------------

HB_CLONES void add_scaled(float* a, float a_scale, const float* b, float b_scale, int64_t count) {
    for (int64_t i = 0; i < count; ++i) a[i] = a[i] * a_scale + b[i] * b_scale;
}

HB_CLONES void scale(float* a, float by, int64_t count) {
    for (int64_t i = 0; i < count; ++i) a[i] *= by;
}

// Adds a later span to the total.
void merge(const Job& job, const State& total, const State& span, int64_t vectors) {
    for (int64_t i = 0; i < vectors; ++i) {
        const float maximum = total.maxima[i] > span.maxima[i] ? total.maxima[i] : span.maxima[i];
        if (maximum == -INFINITY) continue;
        const float old_scale = exp2f(total.maxima[i] - maximum), new_scale = exp2f(span.maxima[i] - maximum);
        add_scaled(total.sums + i * kLanes, old_scale, span.sums + i * kLanes, new_scale, kLanes);
        const int64_t at = i * job.shape.padded_e;
        add_scaled(total.outputs + at, old_scale, span.outputs + at, new_scale, job.shape.padded_e);
        total.maxima[i] = maximum;
    }
}

float add_lanes(float* sums) {
    for (int64_t width = kLanes / 2; width > 0; width /= 2) {
        for (int64_t i = 0; i < width; ++i) sums[i] += sums[i + width];
    }
    return sums[0];
}

// The sink's share, the division, and one rounding to the output's dtype.
void finish(const Job& job, const Item& item, const State& total) {
    const hb_paged_attention_args& a = job.a;
    for (int64_t i = 0; i < item.all_vectors(); ++i) {
        const int64_t head = item.head_of(job, i), row = item.row_of(job, i);
        float sum = add_lanes(total.sums + i * kLanes), factor = 1;
        if (a.sinks != nullptr) {
            const float sink = load_float(a.sinks, a.sinks_dtype, head) * kLog2E;
            const float maximum = sink > total.maxima[i] ? sink : total.maxima[i];
            factor = exp2f(total.maxima[i] - maximum);
            sum = sum * factor + exp2f(sink - maximum);
        }
        float* const outputs = total.outputs + i * job.shape.padded_e;
        scale(outputs, factor / sum, a.E);
        store_floats(outputs, a.E, a.out, a.dtype, (row * a.H + head) * a.E);
    }
}

void run_item(const Job& job, const Item& item, const Scratch& scratch, const State& parts) {
    pack_queries(job, item, scratch.queries);
    if (job.is_split) {
        const int64_t vector = (item.first_span * job.a.T + item.row) * job.a.H + item.head_of(job, 0);
        attend_span(job, item, item.first_span, scratch, parts.from(vector, job.shape.padded_e));
        return;
    }
    attend_span(job, item, item.first_span, scratch, scratch.total);
    for (int64_t span = item.first_span + 1; span < item.end_span; ++span) {
        attend_span(job, item, span, scratch, scratch.span);
        merge(job, scratch.total, scratch.span, item.all_vectors());
    }
    finish(job, item, scratch.total);
}

// The spans of one row, all heads.
void finish_row(const Job& job, int64_t row, const State& parts) {
    const int64_t start = job.a.starts[row];
    const int64_t first = seen_from(job.a, start) / kSpanKeys;
    const auto part = [&](int64_t span) { return parts.from((span * job.a.T + row) * job.a.H, job.shape.padded_e); };
    for (int64_t span = first + 1; span <= start / kSpanKeys; ++span) merge(job, part(first), part(span), job.a.H);
    finish(job, {row, row, start, 0, job.a.G, 0, job.group, first, 0}, part(first));
}

// --- what the tables say
// ----------------------------------------------------------------------------------------------

hb_status check_sequences(const hb_paged_attention_args& a) {
    if (a.S == 0) return fail_unless(a.T == 0, HB_BAD_SEQUENCE);
    const int64_t capacity = a.max_blocks * a.block_tokens;
    if (a.offsets[0] != 0 || a.offsets[a.S] != a.T) return HB_BAD_SEQUENCE;
    for (int64_t s = 0; s < a.S; ++s) {
        const int64_t begin = a.offsets[s], end = a.offsets[s + 1], start = a.starts[s];
        if (begin < 0 || end <= begin || end > a.T || start < 0 || start > capacity) return HB_BAD_SEQUENCE;
        if (end - begin > capacity - start) return HB_BAD_SEQUENCE;
        const int64_t last = (start + end - begin - 1) / a.block_tokens;
        for (int64_t i = seen_from(a, start) / a.block_tokens; i <= last; ++i) {
            const int64_t block = a.tables[s * a.max_blocks + i];
            if (block < 0 || block >= a.blocks) return HB_BAD_SEQUENCE;
        }
    }
    return HB_OK;
}

// In products, an eighth of which is about one step of threads_for.
int64_t work_of(const hb_paged_attention_args& a) {
    double seen = 0;
    for (int64_t s = 0; s < a.S; ++s) {
        const int64_t rows = a.offsets[s + 1] - a.offsets[s];
        seen += static_cast<double>(rows) * static_cast<double>(a.starts[s] + rows - seen_from(a, a.starts[s]));
    }
    const double steps = seen * static_cast<double>(a.H) * static_cast<double>(a.D + a.E) / 8;
    return steps < 1e15 ? static_cast<int64_t>(steps) : int64_t{1} << 50;
}

}  // namespace

}  // namespace hb::attention

extern "C" hb_status hb_paged_attention_workspace(const hb_paged_attention_args* args, int64_t* bytes) {
    using namespace hb;
    HB_REQUIRE(check_attention_shape(args));
    HB_REQUIRE(check_tensor(bytes, 1, sizeof *bytes));
    *bytes = args->T == 0 ? 0 : attention::Job(*args).bytes();
    return HB_OK;
}

extern "C" hb_status hb_paged_attention(const hb_paged_attention_args* args) {
    using namespace hb;
    using namespace hb::attention;
    HB_REQUIRE(check(args));
    const hb_paged_attention_args& a = *args;
    HB_REQUIRE(check_sequences(a));
    if (a.T == 0) return HB_OK;
    Job job(a);
    HB_REQUIRE(check_workspace(a.call, job.bytes()));

    float* const memory = static_cast<float*>(a.call.workspace);
    const State parts(memory, job.part_vectors());
    float* const scratch = memory + round_up(State::floats(job.part_vectors(), job.shape.padded_e), kLanes);
    const int64_t threads = threads_for(a.call.threads, work_of(a));
    job.share_out(threads);
    std::atomic<int64_t> taken{0};
    parallel_for(threads, threads, [&](int64_t part, int64_t, int64_t) {
        const Scratch mine(job, scratch + part * job.scratch_floats());
        Cursor cursor(job);
        for (Item item; cursor.find(taken.fetch_add(1, std::memory_order_relaxed), &item);) {
            run_item(job, item, mine, parts);
        }
    });
    if (!job.is_split) return HB_OK;
    // Putting together is little work; only many spans are worth waking others.
    const int64_t finishers = threads_for(threads, a.T * a.H * least(job.spans, kTileKeys) * (a.E / kLanes + 1));
    parallel_for(finishers, a.T, [&](int64_t, int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) finish_row(job, row, parts);
    });
    return HB_OK;
}
