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
        for (; place < last; ++place, key += a.G * a.D * bytes, value += a.G * a.E * bytes) {
            rows->keys[place] = key, rows->values[place] = value, rows->scales[place] = scales;
            if (scales != nullptr) scales += a.G * 2;
        }
    }
}

// The scales of a tile's rows, `head` heads further.
void gather_scales(const TileRows& rows, int64_t head, TileScales* scales) {
    for (int64_t i = 0; i < kTileKeys; ++i) {
        const float* const both = rows.scales[i] == nullptr ? nullptr : rows.scales[i] + head * 2;
        scales->keys[i] = both == nullptr ? 0.0f : both[0];
        scales->values[i] = both == nullptr ? 0.0f : both[1];
    }
}

// The item's vectors of one kv head meet its packed tile, in blocks as equal as they can be.
void attend_tile(const Job& job, const Item& item, int64_t tile, int64_t head, const TileScales* scales,
                 const Scratch& scratch, const State& state) {
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
        if (sees_any) job.variant.attend(job.shape, scratch.keys, scratch.values, block);
    }
}

}  // namespace

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

void attend_span(const Job& job, const Item& item, int64_t span, const Scratch& scratch, const State& state) {
    const int64_t vectors = item.all_vectors();
    for (int64_t i = 0; i < vectors; ++i) state.maxima[i] = -INFINITY;
    memset(state.sums, 0, static_cast<size_t>(vectors * kLanes) * sizeof(float));
    memset(state.outputs, 0, static_cast<size_t>(vectors * job.shape.padded_e) * sizeof(float));
    const int64_t begin = item.keys_begin(job), end = item.keys_end(job);
    const int64_t last = least(end, (span + 1) * kSpanKeys);
    int64_t tile = (begin > span * kSpanKeys ? begin : span * kSpanKeys) / kTileKeys;
    const int64_t bytes = dtype_bytes(job.a.store_dtype);
    const bool is_int8 = job.a.store_dtype == HB_INT8;
    TileScales scales;
    TileRows rows[2];
    find_rows(job, item, tile, begin, end, &rows[0]);
    for (int turn = 0; tile * kTileKeys < last; ++tile, turn ^= 1) {
        TileRows &now = rows[turn], &next = rows[turn ^ 1];
        find_rows(job, item, tile + 1, begin, end, &next);
        for (int64_t head = 0; head < item.kv_heads; ++head) {
            now.key_offset = next.key_offset = head * job.a.D * bytes;
            now.value_offset = next.value_offset = head * job.a.E * bytes;
            if (is_int8) gather_scales(now, head, &scales);
            job.variant.pack(job.shape, now, next, scratch.keys, scratch.values);
            attend_tile(job, item, tile, head, is_int8 ? &scales : nullptr, scratch, state);
        }
    }
}

}  // namespace hb::attention
