// Attention over a paged cache: checks of what the tables say, who computes what, and how parts come together.
//
// The work is cut into items: up to 192 query vectors of one sequence, over all that they see. Many rows are vectors of
// one kv head; a single row, alone or beside many, takes several kv heads along, since their keys lie side by side.
// Threads take items off a counter, so uneven ones (a prompt beside single tokens) even out. In a step of few single
// rows an item is one span of 512 keys instead, its running softmax goes to the workspace, and the spans are put
// together at the end. Either way each span is summed up on its own and spans are put together in order, so that both
// ways give the same bits.
//
//     item     for each span (attention_span.cpp), for each tile of 64 keys that some row sees, for each kv head:
//                  pack the tile; block after block of vectors meets it (attention_avx512.cpp or its like)
//              sink, division, rounding
//
// On vectors packing costs as much as five vectors' products. The inner part is what the variants differ in; everything
// here is the same for all.
#include <math.h>

#include <atomic>

#include "attention_job.h"
#include "checks.h"
#include "clones.h"
#include "floats.h"
#include "halfbyte.h"
#include "pool.h"

namespace hb::attention {

namespace {

// Finds items by number, for numbers that only rise.
class Cursor {
  public:
    explicit Cursor(const Job& job) : job_(job) {}

    // False when there are not that many.
    bool find(int64_t number, Item* item) {
        for (; sequence_ < job_.a.S; ++sequence_) {
            const int64_t row = job_.a.offsets[sequence_], start = job_.a.starts[sequence_];
            const int64_t vectors = job_.rows_of(sequence_) * job_.group, heads = job_.heads_of(sequence_);
            const int64_t ranges = ceil_div(vectors, kItemVectors);
            const int64_t first_span = seen_from(job_.a, start) / kSpanKeys;
            const int64_t spans = job_.is_split ? start / kSpanKeys + 1 - first_span : 1;
            const int64_t count = ceil_div(job_.a.G, heads) * ranges * spans;
            if (number - before_ < count) {
                const int64_t rest = number - before_;
                const int64_t first = rest / spans % ranges * kItemVectors;
                const int64_t kv_head = rest / spans / ranges * heads;
                *item = {sequence_,
                         row,
                         start,
                         kv_head,
                         least(heads, job_.a.G - kv_head),
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

// --- putting together -----------------------------------------------------------------------------------------------

HB_CLONES(void, add_scaled, (float* a, float a_scale, const float* b, float b_scale, int64_t count)) {
    for (int64_t i = 0; i < count; ++i) a[i] = a[i] * a_scale + b[i] * b_scale;
}

HB_CLONES(void, scale, (float* a, float by, int64_t count)) {
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

// Of an item, and of the one that this thread computes next, if it has one.
void run_item(const Job& job, const Item& item, const Item* after, const Scratch& scratch, const State& parts) {
    pack_queries(job, item, scratch);
    if (job.is_split) {
        const int64_t vector = (item.first_span * job.a.T + item.row) * job.a.H + item.head_of(job, 0);
        attend_span(job, item, after, item.first_span, scratch, parts.from(vector, job.shape.padded_e));
        return;
    }
    attend_span(job, item, after, item.first_span, scratch, scratch.total);
    for (int64_t span = item.first_span + 1; span < item.end_span; ++span) {
        attend_span(job, item, after, span, scratch, scratch.span);
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

// --- what the tables say --------------------------------------------------------------------------------------------

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
        if (job.variant.begin != nullptr) job.variant.begin();
        const auto take = [&](Item* item) { return cursor.find(taken.fetch_add(1, std::memory_order_relaxed), item); };
        Item item, after;
        for (bool is_there = take(&item); is_there; item = after) {
            is_there = take(&after);
            run_item(job, item, is_there ? &after : nullptr, mine, parts);
        }
        if (job.variant.end != nullptr) job.variant.end();
    });
    if (!job.is_split) return HB_OK;
    // Putting together is little work; only many spans are worth waking others.
    const int64_t finishers = threads_for(threads, a.T * a.H * least(job.spans, kTileKeys) * (a.E / kLanes + 1));
    parallel_for(finishers, a.T, [&](int64_t, int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) finish_row(job, row, parts);
    });
    return HB_OK;
}
