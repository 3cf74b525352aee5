// New keys and values into a paged cache. A warp copies the key and the value of one head of one row, 16 bytes a lane
// where heads, strides and tensors allow it, else an element; or it rounds them, a value a lane, in int8 after it has
// looked for the largest magnitude. Slots are read on the device; one that the cache does not have is nobody's memory
// and is not written.
#include "int8.cuh"
#include "pieces.cuh"
#include "vocabulary.cuh"

namespace hb {

namespace {

// One side of the call, in words of whatever size is copied at once.
template <typename Word>
struct Side {
    const Word* from;
    int64_t row_stride, head_stride, head_words;
    Word* to;

    Side(const void* rows, int64_t row_elements, int64_t head_elements, int64_t size, void* store,
         int64_t element_bytes)
        : from(static_cast<const Word*>(rows)),
          row_stride(row_elements * element_bytes / static_cast<int64_t>(sizeof(Word))),
          head_stride(head_elements * element_bytes / static_cast<int64_t>(sizeof(Word))),
          head_words(size * element_bytes / static_cast<int64_t>(sizeof(Word))),
          to(static_cast<Word*>(store)) {}

    __device__ void write(int64_t row, int64_t slot, int64_t head, int64_t heads) const {
        const Word* const source = from + row * row_stride + head * head_stride;
        Word* const target = to + (slot * heads + head) * head_words;
        for (int64_t i = lane(); i < head_words; i += kWarp) target[i] = source[i];
    }
};

template <typename Word>
__global__ void cache_write(Side<Word> key, Side<Word> value, int64_t rows, int64_t heads, const int64_t* slots,
                            int64_t slot_count) {
    for (int64_t item = warp_index(); item < rows * heads; item += warp_count()) {
        const int64_t row = item / heads, head = item % heads;
        const int64_t slot = slots[row];
        if (slot < 0 || slot >= slot_count) continue;
        key.write(row, slot, head, heads);
        value.write(row, slot, head, heads);
    }
}

// One head of one row, `size` values from element `from` on, to a head's place in a store of another dtype.
__device__ void convert_head(const hb_cache_write_args& a, const void* rows, int64_t from, int64_t size, void* store,
                             int64_t place, int which) {
    if (a.store_dtype != HB_INT8) {
        for (int64_t i = lane(); i < size; i += kWarp) {
            store_float(load_float(rows, a.dtype, from + i), store, a.store_dtype, place * size + i);
        }
        return;
    }
    unsigned largest = 0;
    for (int64_t i = lane(); i < size; i += kWarp) {
        const unsigned bits = magnitude_bits(load_float(rows, a.dtype, from + i));
        largest = bits > largest ? bits : largest;
    }
    const float absmax = largest_in_warp(largest);
    const bool is_kept = isfinite(absmax) && absmax >= kSmallestStored;
    const float factor = is_kept ? int8_factor(absmax) : 0.0f;
    for (int64_t i = lane(); i < size; i += kWarp) {
        static_cast<int8_t*>(store)[place * size + i] = int8_code(load_float(rows, a.dtype, from + i), factor);
    }
    const float without = isfinite(absmax) ? 0.0f : NAN;
    if (lane() == 0) a.scales[place * 2 + which] = is_kept ? int8_scale(absmax) : without;
}

__global__ void convert(hb_cache_write_args a) {
    for (int64_t item = warp_index(); item < a.T * a.G; item += warp_count()) {
        const int64_t row = item / a.G, head = item % a.G;
        const int64_t slot = a.slots[row];
        if (slot < 0 || slot >= a.slot_count) continue;
        const int64_t place = slot * a.G + head;
        convert_head(a, a.key, row * a.key_row_stride + head * a.key_head_stride, a.D, a.keys, place, 0);
        convert_head(a, a.value, row * a.value_row_stride + head * a.value_head_stride, a.E, a.values, place, 1);
    }
}

template <typename Word>
void launch_words(const hb_cache_write_args& a) {
    const int64_t bytes = dtype_bytes(a.dtype);
    const Side<Word> key(a.key, a.key_row_stride, a.key_head_stride, a.D, a.keys, bytes);
    const Side<Word> value(a.value, a.value_row_stride, a.value_head_stride, a.E, a.values, bytes);
    launch(cache_write<Word>, blocks_for_warps(a.T * a.G), kWarpsPerBlock * kWarp, 0, stream_of(a.call), key, value,
           a.T, a.G, a.slots, a.slot_count);
}

bool whole_pieces(const hb_cache_write_args& a) {
    const int64_t elements = kPieceBytes / dtype_bytes(a.dtype);
    for (const int64_t size :
         {a.D, a.E, a.key_row_stride, a.key_head_stride, a.value_row_stride, a.value_head_stride}) {
        if (size % elements != 0) return false;
    }
    return in_pieces(a.key) && in_pieces(a.value) && in_pieces(a.keys) && in_pieces(a.values);
}

}  // namespace

}  // namespace hb

extern "C" hb_status hb_cache_write(const hb_cache_write_args* args) {
    using namespace hb;
    HB_REQUIRE(check(args));
    const hb_cache_write_args& a = *args;
    if (!has_slots(a)) return HB_OK;
    if (a.store_dtype != a.dtype) {
        launch(convert, blocks_for_warps(a.T * a.G), kWarpsPerBlock * kWarp, 0, stream_of(a.call), a);
    } else if (whole_pieces(a)) {
        launch_words<uint4>(a);
    } else if (a.dtype == HB_FLOAT32) {
        launch_words<uint32_t>(a);
    } else {
        launch_words<uint16_t>(a);
    }
    return launched();
}
