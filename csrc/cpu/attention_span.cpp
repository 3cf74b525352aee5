// One span of attention: query vectors packed, tiles found in the blocks of the cache, each met by block after block.
#include <math.h>
#include <string.h>

#include "attention_job.h"
#include "floats.h"

namespace hb::attention {

namespace {

// Where a tile's keys and values are; null outside of begin .. end - 1.
void find_rows(const Job& job, const Item& item, int64_t tile, int64_t begin, int64_t end, TileRows* rows) {
    const hb_paged_attention_args& a = job.a;
    const int64_t* const table = a.tables + item.sequence * a.max_blocks;
    const int64_t bytes = dtype_bytes(a.store_dtype);
    const int64_t first = tile * kTileKeys;
    int64_t place = begin > first ? least(begin - first, kTileKeys) : 0;
    const int64_t stop = end > first ? least(end - first, kTileKeys) : 0;
    rows->begin = place, rows->end = stop, rows->key_stride = a.G * a.D * bytes;
    for (int64_t i = 0; i < kTileKeys; ++i) {
        if (i < place || i >= stop) rows->keys[i] = rows->values[i] = nullptr, rows->scales[i] = nullptr;
    }
    while (place < stop) {
        const int64_t block = (first + place) / a.block_tokens, inside = (first + place) % a.block_tokens;
        const int64_t slot = table[block] * a.block_tokens + inside;
        const int64_t last = least(stop, place + a.block_tokens - inside);
        const char* key = static_cast<const char*>(a.keys) + (slot * a.G + item.kv_head) * a.D * bytes;
        const char* value = static_cast<const char*>(a.values) + (slot * a.G + item.kv_head) * a.E * bytes;
        const float* scales = a.store_dtype == HB_INT8 ? a.scales + (slot * a.G + item.kv_head) * 2 : nullptr;
        for (; place < last; ++place, key += rows->key_stride, value += a.G * a.E * bytes) {
            rows->keys[place] = key, rows->values[place] = value, rows->scales[place] = scales;
            if (scales != nullptr) scales += a.G * 2;
        }
    }
}

// The same of the tile that an item begins with; nothing where there is none.
void find_first_rows(const Job& job, const Item* item, TileRows* rows) {
    rows->begin = rows->end = 0;
    if (item == nullptr) return;
    const int64_t begin = item->keys_begin(job), end = item->keys_end(job), span = item->first_span * kSpanKeys;
    find_rows(job, *item, (begin > span ? begin : span) / kTileKeys, begin, end, rows);
}

// The scales of a tile's rows, `head` heads further.
void gather_scales(const TileRows& rows, int64_t head, TileScales* scales) {
    for (int64_t i = 0; i < kTileKeys; ++i) {
        const float* const both = rows.scales[i] == nullptr ? nullptr : rows.scales[i] + head * 2;
        scales->keys[i] = both == nullptr ? 0.0f : both[0];
        scales->values[i] = both == nullptr ? 0.0f : both[1];
    }
}

// The item's vectors of one kv head meet its tile, in blocks as equal as they can be: packed, or keys as they lie.
void attend_tile(const Job& job, const Item& item, int64_t tile, int64_t head, const TileRows& rows,
                 const TileScales* scales, Fetching& next, const Scratch& scratch, const State& state) {
    const bool is_alone = item.is_alone(job);
    if (!is_alone) job.variant.pack(job.shape, rows, next, scratch.keys, scratch.values);
    const int64_t blocks = ceil_div(item.vectors, job.variant.block_vectors);
    for (int64_t i = 0; i < blocks; ++i) {
        const int64_t first = item.vectors * i / blocks;
        const State mine = state.from(head * item.vectors + first, job.shape.padded_e);
        Block block = {item.vectors * (i + 1) / blocks - first,
                       scales,
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
        if (!sees_any) continue;
        if (is_alone) {
            job.variant.attend_alone(job.shape, rows, next, scratch.turned + head * job.turned_floats(), scratch.values,
                                     block);
        } else {
            job.variant.attend(job.shape, scratch.keys, scratch.values, block);
        }
    }
}

}  // namespace

void pack_queries(const Job& job, const Item& item, const Scratch& scratch) {
    const hb_paged_attention_args& a = job.a;
    for (int64_t i = 0; i < item.all_vectors(); ++i) {
        const int64_t element = item.row_of(job, i) * a.query_row_stride + item.head_of(job, i) * a.query_head_stride;
        char* const to = scratch.queries + i * job.shape.vector_bytes;
        if (job.variant.keeps_pairs) {
            memcpy(to, static_cast<const uint16_t*>(a.query) + element, static_cast<size_t>(job.shape.vector_bytes));
            continue;
        }
        load_floats(a.query, a.dtype, element, a.D, reinterpret_cast<float*>(to));
        if (job.shape.padded_d > a.D) reinterpret_cast<float*>(to)[a.D] = 0;
    }
    for (int64_t head = 0; item.is_alone(job) && head < item.kv_heads; ++head) {
        job.variant.turn(job.shape, scratch.queries + head * item.vectors * job.shape.vector_bytes, item.vectors,
                         scratch.turned + head * job.turned_floats());
    }
}

void attend_span(const Job& job, const Item& item, const Item* after, int64_t span, const Scratch& scratch,
                 const State& state) {
    const int64_t vectors = item.all_vectors();
    for (int64_t i = 0; i < vectors; ++i) state.maxima[i] = -INFINITY;
    memset(state.sums, 0, static_cast<size_t>(vectors * kLanes) * sizeof(float));
    memset(state.outputs, 0, static_cast<size_t>(vectors * job.shape.padded_e) * sizeof(float));
    const int64_t begin = item.keys_begin(job), end = item.keys_end(job);
    const int64_t last = least(end, (span + 1) * kSpanKeys);
    const int64_t own_end = job.is_split ? last : end;  // of what this thread computes without a pause
    int64_t tile = (begin > span * kSpanKeys ? begin : span * kSpanKeys) / kTileKeys;
    const int64_t bytes = dtype_bytes(job.a.store_dtype);
    const bool is_int8 = job.a.store_dtype == HB_INT8;
    TileScales scales;
    TileRows rows[2];
    find_rows(job, item, tile, begin, end, &rows[0]);
    for (int turn = 0; tile * kTileKeys < last; ++tile, turn ^= 1) {
        TileRows &now = rows[turn], &next = rows[turn ^ 1];
        const Item* const next_item = (tile + 1) * kTileKeys < own_end ? &item : after;
        if (next_item == &item) {
            find_rows(job, item, tile + 1, begin, end, &next);
        } else {
            find_first_rows(job, after, &next);
        }
        const int64_t next_heads = next_item == nullptr ? 0 : next_item->kv_heads;
        Fetching fetching(next, next_heads * job.a.D * bytes, next_heads * job.a.E * bytes,
                          item.kv_heads * job.pack_steps(item.is_alone(job)));
        for (int64_t head = 0; head < item.kv_heads; ++head) {
            now.key_offset = head * job.a.D * bytes, now.value_offset = head * job.a.E * bytes;
            if (is_int8) gather_scales(now, head, &scales);
            attend_tile(job, item, tile, head, now, is_int8 ? &scales : nullptr, fetching, scratch, state);
        }
    }
}

}  // namespace hb::attention
