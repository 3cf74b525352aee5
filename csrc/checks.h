// Argument checks that both libraries share. Host code only; nothing here reads a tensor.
//
// A check function answers a status; HB_REQUIRE returns the first one that is not HB_OK from an entry.
#pragma once

#include <stdint.h>

#include "formats.h"
#include "halfbyte.h"

#define HB_REQUIRE(check)                     \
    do {                                      \
        const hb_status status_ = (check);    \
        if (status_ != HB_OK) return status_; \
    } while (0)

namespace hb {

inline hb_status fail_unless(bool good, hb_status status) {
    return good ? HB_OK : status;
}

inline int64_t ceil_div(int64_t a, int64_t b) {
    return a / b + (a % b != 0);
}

inline int64_t round_up(int64_t a, int64_t multiple) {
    return ceil_div(a, multiple) * multiple;
}

// The common part of every call; `bytes` is the size of the struct that this library knows.
inline hb_status check_call(const hb_call* call, int64_t bytes) {
    if (call == nullptr) return HB_NULL_POINTER;
    if (call->struct_bytes != bytes) return HB_BAD_STRUCT;
    HB_REQUIRE(fail_unless(call->threads >= 1 && call->threads <= HB_MAX_THREADS, HB_BAD_THREADS));
    HB_REQUIRE(fail_unless(call->cuda_kernel == HB_CUDA_MMA || call->cuda_kernel == HB_CUDA_HOPPER, HB_BAD_OPTION));
    return fail_unless(call->batch_invariant == 0 || call->batch_invariant == 1, HB_BAD_OPTION);
}

// rows * columns, refused where a size is negative or the product is beyond HB_MAX_ELEMENTS.
inline hb_status check_shape(int64_t rows, int64_t columns, int64_t* count) {
    if (rows < 0 || columns < 0 || rows > HB_MAX_ELEMENTS || columns > HB_MAX_ELEMENTS) return HB_BAD_SHAPE;
    if (columns != 0 && rows > HB_MAX_ELEMENTS / columns) return HB_BAD_SHAPE;
    *count = rows * columns;
    return HB_OK;
}

inline int64_t dtype_bytes(int64_t dtype) {
    return dtype == HB_FLOAT32 ? 4 : dtype == HB_INT8 ? 1 : 2;
}

inline hb_status check_dtype(int64_t dtype) {
    return fail_unless(dtype == HB_FLOAT32 || dtype == HB_FLOAT16 || dtype == HB_BFLOAT16, HB_BAD_DTYPE);
}

// What a cache keeps keys and values in.
inline hb_status check_store_dtype(int64_t dtype) {
    return dtype == HB_INT8 ? HB_OK : check_dtype(dtype);
}

inline hb_status check_format(int64_t format) {
    return fail_unless(format == HB_NF4 || format == HB_FP4, HB_BAD_FORMAT);
}

inline hb_status check_blocksize(int64_t blocksize) {
    const bool power_of_two = blocksize > 0 && (blocksize & (blocksize - 1)) == 0;
    return fail_unless(power_of_two && blocksize >= kSmallestBlocksize && blocksize <= kLargestBlocksize,
                       HB_BAD_BLOCKSIZE);
}

inline hb_status check_nested_blocksize(int64_t blocksize) {
    return fail_unless(blocksize >= 1 && blocksize <= HB_MAX_ELEMENTS, HB_BAD_BLOCKSIZE);
}

// A tensor of `count` elements of `element_bytes`: there if it has elements, and aligned to them.
inline hb_status check_tensor(const void* pointer, int64_t count, int64_t element_bytes) {
    if (count == 0) return HB_OK;
    if (pointer == nullptr) return HB_NULL_POINTER;
    return fail_unless(reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(element_bytes) == 0,
                       HB_MISALIGNED);
}

inline hb_status check_workspace(const hb_call& call, int64_t needed_bytes) {
    if (needed_bytes == 0) return HB_OK;
    if (call.workspace == nullptr) return HB_NULL_POINTER;
    if (reinterpret_cast<uintptr_t>(call.workspace) % HB_WORKSPACE_ALIGNMENT != 0) return HB_WORKSPACE_MISALIGNED;
    return fail_unless(call.workspace_bytes >= needed_bytes, HB_WORKSPACE_TOO_SMALL);
}

// --- one per entry: everything but the workspace ---------------------------------------------------------------------

// What the entries share that read values in blocks.
template <typename Args>
hb_status check_blocks(const Args* a) {
    HB_REQUIRE(check_call(a == nullptr ? nullptr : &a->call, sizeof *a));
    HB_REQUIRE(check_dtype(a->x_dtype));
    HB_REQUIRE(check_format(a->format));
    HB_REQUIRE(check_blocksize(a->blocksize));
    int64_t count = 0;
    HB_REQUIRE(check_shape(a->n, 1, &count));
    return check_tensor(a->x, count, dtype_bytes(a->x_dtype));
}

inline hb_status check(const hb_quantize4_args* a) {
    HB_REQUIRE(check_blocks(a));
    HB_REQUIRE(check_tensor(a->packed, a->n, 1));
    return check_tensor(a->absmax, a->n, sizeof(float));
}

inline hb_status check(const hb_encode4_args* a) {
    HB_REQUIRE(check_blocks(a));
    HB_REQUIRE(check_tensor(a->scales, a->n, sizeof(float)));
    return check_tensor(a->packed, a->n, 1);
}

inline hb_status check(const hb_search4_args* a) {
    HB_REQUIRE(check_blocks(a));
    return check_tensor(a->scales, a->n, sizeof(float));
}

inline hb_status check(const hb_dequantize4_args* a) {
    HB_REQUIRE(check_call(a == nullptr ? nullptr : &a->call, sizeof *a));
    HB_REQUIRE(check_dtype(a->out_dtype));
    HB_REQUIRE(check_format(a->format));
    HB_REQUIRE(check_blocksize(a->blocksize));
    int64_t count = 0;
    HB_REQUIRE(check_shape(a->n, 1, &count));
    HB_REQUIRE(check_tensor(a->packed, count, 1));
    HB_REQUIRE(check_tensor(a->absmax, count, sizeof(float)));
    return check_tensor(a->out, count, dtype_bytes(a->out_dtype));
}

inline hb_status check(const hb_quantize_absmax_args* a) {
    HB_REQUIRE(check_call(a == nullptr ? nullptr : &a->call, sizeof *a));
    HB_REQUIRE(check_nested_blocksize(a->nested_blocksize));
    int64_t count = 0;
    HB_REQUIRE(check_shape(a->blocks, 1, &count));
    HB_REQUIRE(check_tensor(a->absmax, count, sizeof(float)));
    HB_REQUIRE(check_tensor(a->offset, count, sizeof(float)));
    HB_REQUIRE(check_tensor(a->codes, count, 1));
    return check_tensor(a->nested_absmax, count, sizeof(float));
}

inline hb_status check(const hb_dequantize_absmax_args* a) {
    HB_REQUIRE(check_call(a == nullptr ? nullptr : &a->call, sizeof *a));
    HB_REQUIRE(check_nested_blocksize(a->nested_blocksize));
    int64_t count = 0;
    HB_REQUIRE(check_shape(a->blocks, 1, &count));
    HB_REQUIRE(check_tensor(a->codes, count, 1));
    HB_REQUIRE(check_tensor(a->nested_absmax, count, sizeof(float)));
    HB_REQUIRE(check_tensor(a->offset, count, sizeof(float)));
    return check_tensor(a->absmax, count, sizeof(float));
}

// Shapes and options alone: what the size of the workspace depends on.
inline hb_status check_linear4_shape(const hb_linear4_args* a) {
    HB_REQUIRE(check_call(a == nullptr ? nullptr : &a->call, sizeof *a));
    HB_REQUIRE(check_dtype(a->x_dtype));
    HB_REQUIRE(check_format(a->format));
    HB_REQUIRE(check_blocksize(a->blocksize));
    int64_t count = 0;
    HB_REQUIRE(check_shape(a->M, a->K, &count));
    HB_REQUIRE(check_shape(a->M, a->N, &count));
    return check_shape(a->N, a->K, &count);
}

inline hb_status check(const hb_linear4_args* a) {
    HB_REQUIRE(check_linear4_shape(a));
    HB_REQUIRE(check_tensor(a->x, a->M * a->K, dtype_bytes(a->x_dtype)));
    HB_REQUIRE(check_tensor(a->packed, a->N * a->K, 1));
    if (a->nested_absmax != nullptr) {
        HB_REQUIRE(check_nested_blocksize(a->nested_blocksize));
        HB_REQUIRE(check_tensor(a->absmax, a->N * a->K, 1));
        HB_REQUIRE(check_tensor(a->nested_absmax, a->N * a->K, sizeof(float)));
        HB_REQUIRE(check_tensor(a->offset, 1, sizeof(float)));
    } else {
        HB_REQUIRE(check_tensor(a->absmax, a->N * a->K, sizeof(float)));
    }
    if (a->bias != nullptr) {
        HB_REQUIRE(check_dtype(a->bias_dtype));
        HB_REQUIRE(check_tensor(a->bias, a->N, dtype_bytes(a->bias_dtype)));
    }
    return check_tensor(a->out, a->M * a->N, dtype_bytes(a->x_dtype));
}

// Products of one x: each as `check_item` has it, and in agreement with the first.
template <typename Args>
hb_status check_group(const Args* items, int64_t count, hb_status (*check_item)(const Args*)) {
    HB_REQUIRE(check_item(items));
    HB_REQUIRE(fail_unless(count >= 1 && count <= HB_MAX_GROUP, HB_BAD_SHAPE));
    for (int64_t i = 1; i < count; ++i) {
        HB_REQUIRE(check_item(items + i));
        HB_REQUIRE(fail_unless(items[i].x_dtype == items->x_dtype, HB_BAD_DTYPE));
        HB_REQUIRE(fail_unless(items[i].M == items->M && items[i].K == items->K, HB_BAD_SHAPE));
        HB_REQUIRE(fail_unless(items[i].x == items->x, HB_BAD_OPTION));
    }
    return HB_OK;
}

template <typename Args>
bool has_output(const Args* items, int64_t count) {
    bool any = false;
    for (int64_t i = 0; i < count; ++i) any |= items[i].M > 0 && items[i].N > 0;
    return any;
}

inline hb_status check_linear4_experts_shape(const hb_linear4_experts_args* a) {
    HB_REQUIRE(check_call(a == nullptr ? nullptr : &a->call, sizeof *a));
    HB_REQUIRE(check_dtype(a->x_dtype));
    HB_REQUIRE(check_format(a->format));
    HB_REQUIRE(check_blocksize(a->blocksize));
    if (a->nested_absmax != nullptr) HB_REQUIRE(check_nested_blocksize(a->nested_blocksize));
    HB_REQUIRE(fail_unless(a->P >= 1 && a->P <= HB_MAX_GROUP, HB_BAD_SHAPE));
    int64_t count = 0, matrices = 0;
    HB_REQUIRE(check_shape(a->M, a->K, &count));
    HB_REQUIRE(check_shape(a->P, a->N, &count));
    HB_REQUIRE(check_shape(a->M, count, &count));
    HB_REQUIRE(check_shape(a->E, a->P, &matrices));
    HB_REQUIRE(check_shape(matrices, a->N, &count));
    HB_REQUIRE(check_shape(a->N, a->K, &count));
    HB_REQUIRE(fail_unless(a->packed_bytes >= ceil_div(count, 2), HB_BAD_SHAPE));
    HB_REQUIRE(check_shape(matrices, a->packed_bytes, &count));
    return check_shape(matrices, a->N * a->K, &count);
}

inline hb_status check(const hb_linear4_experts_args* a) {
    HB_REQUIRE(check_linear4_experts_shape(a));
    const int64_t values = a->E * a->P * a->N * a->K;
    HB_REQUIRE(check_tensor(a->x, a->M * a->K, dtype_bytes(a->x_dtype)));
    HB_REQUIRE(check_tensor(a->ends, a->E, sizeof(int64_t)));
    HB_REQUIRE(check_tensor(a->packed, values, 1));
    if (a->nested_absmax != nullptr) {
        HB_REQUIRE(check_tensor(a->absmax, values, 1));
        HB_REQUIRE(check_tensor(a->nested_absmax, values, sizeof(float)));
        HB_REQUIRE(check_tensor(a->offset, a->E, sizeof(float)));
    } else {
        HB_REQUIRE(check_tensor(a->absmax, values, sizeof(float)));
    }
    if (a->bias != nullptr) {
        HB_REQUIRE(check_dtype(a->bias_dtype));
        HB_REQUIRE(check_tensor(a->bias, a->E * a->N, dtype_bytes(a->bias_dtype)));
    }
    return check_tensor(a->out, a->M * a->N, dtype_bytes(a->x_dtype));
}

inline hb_status check(const hb_quantize8_args* a) {
    HB_REQUIRE(check_call(a == nullptr ? nullptr : &a->call, sizeof *a));
    HB_REQUIRE(check_dtype(a->w_dtype));
    int64_t count = 0;
    HB_REQUIRE(check_shape(a->N, a->K, &count));
    HB_REQUIRE(check_tensor(a->w, count, dtype_bytes(a->w_dtype)));
    HB_REQUIRE(check_tensor(a->codes, count, 1));
    return check_tensor(a->absmax, a->N, sizeof(float));
}

inline hb_status check(const hb_dequantize8_args* a) {
    HB_REQUIRE(check_call(a == nullptr ? nullptr : &a->call, sizeof *a));
    HB_REQUIRE(check_dtype(a->out_dtype));
    int64_t count = 0;
    HB_REQUIRE(check_shape(a->N, a->K, &count));
    HB_REQUIRE(check_tensor(a->codes, count, 1));
    HB_REQUIRE(check_tensor(a->absmax, a->N, sizeof(float)));
    return check_tensor(a->out, count, dtype_bytes(a->out_dtype));
}

inline hb_status check_outliers(double threshold, int64_t rule) {
    const bool known_rule = rule >= HB_OUTLIERS_VALUE && rule <= HB_OUTLIERS_ALL;
    return fail_unless(known_rule && threshold >= 0, HB_BAD_OPTION);
}

inline hb_status check_linear8_shape(const hb_linear8_args* a) {
    HB_REQUIRE(check_call(a == nullptr ? nullptr : &a->call, sizeof *a));
    HB_REQUIRE(check_dtype(a->x_dtype));
    HB_REQUIRE(check_outliers(a->threshold, a->outlier_rule));
    int64_t count = 0;
    HB_REQUIRE(check_shape(a->M, a->K, &count));
    HB_REQUIRE(check_shape(a->M, a->N, &count));
    HB_REQUIRE(check_shape(a->N, a->K, &count));
    return fail_unless(a->K <= INT32_MAX, HB_BAD_SHAPE);  // outlier columns are kept as int32
}

inline hb_status check(const hb_linear8_args* a) {
    HB_REQUIRE(check_linear8_shape(a));
    HB_REQUIRE(check_tensor(a->x, a->M * a->K, dtype_bytes(a->x_dtype)));
    HB_REQUIRE(check_tensor(a->codes, a->N * a->K, 1));
    HB_REQUIRE(check_tensor(a->absmax, a->N, sizeof(float)));
    if (a->bias != nullptr) {
        HB_REQUIRE(check_dtype(a->bias_dtype));
        HB_REQUIRE(check_tensor(a->bias, a->N, dtype_bytes(a->bias_dtype)));
    }
    return check_tensor(a->out, a->M * a->N, dtype_bytes(a->x_dtype));
}

inline hb_status check_linear8_group(const hb_linear8_args* items, int64_t count,
                                     hb_status (*check_item)(const hb_linear8_args*)) {
    HB_REQUIRE(check_group(items, count, check_item));
    for (int64_t i = 1; i < count; ++i) {
        const bool same = items[i].threshold == items->threshold && items[i].outlier_rule == items->outlier_rule;
        HB_REQUIRE(fail_unless(same, HB_BAD_OPTION));
    }
    return HB_OK;
}

inline hb_status check_linear8_experts_shape(const hb_linear8_experts_args* a) {
    HB_REQUIRE(check_call(a == nullptr ? nullptr : &a->call, sizeof *a));
    HB_REQUIRE(check_dtype(a->x_dtype));
    HB_REQUIRE(check_outliers(a->threshold, a->outlier_rule));
    int64_t count = 0;
    HB_REQUIRE(check_shape(a->M, a->K, &count));
    HB_REQUIRE(check_shape(a->M, a->N, &count));
    HB_REQUIRE(check_shape(a->N, a->K, &count));
    HB_REQUIRE(check_shape(a->E, count, &count));
    HB_REQUIRE(check_shape(a->E, a->N, &count));
    return fail_unless(a->K <= INT32_MAX, HB_BAD_SHAPE);  // outlier columns are kept as int32
}

inline hb_status check(const hb_linear8_experts_args* a) {
    HB_REQUIRE(check_linear8_experts_shape(a));
    HB_REQUIRE(check_tensor(a->x, a->M * a->K, dtype_bytes(a->x_dtype)));
    HB_REQUIRE(check_tensor(a->ends, a->E, sizeof(int64_t)));
    HB_REQUIRE(check_tensor(a->codes, a->E * a->N * a->K, 1));
    HB_REQUIRE(check_tensor(a->absmax, a->E * a->N, sizeof(float)));
    if (a->bias != nullptr) {
        HB_REQUIRE(check_dtype(a->bias_dtype));
        HB_REQUIRE(check_tensor(a->bias, a->E * a->N, dtype_bytes(a->bias_dtype)));
    }
    return check_tensor(a->out, a->M * a->N, dtype_bytes(a->x_dtype));
}

// How far the strides of a tensor [rows, heads, size] reach, from its first value to its last.
inline hb_status check_strides(int64_t rows, int64_t row_stride, int64_t heads, int64_t head_stride, int64_t size) {
    int64_t of_rows = 0, of_heads = 0;
    HB_REQUIRE(check_shape(rows == 0 ? 0 : rows - 1, row_stride, &of_rows));
    HB_REQUIRE(check_shape(heads == 0 ? 0 : heads - 1, head_stride, &of_heads));
    return fail_unless(of_rows <= HB_MAX_ELEMENTS - of_heads - size, HB_BAD_SHAPE);
}

// Of what a head has in a cache: a key, a value, two scales.
inline int64_t largest_size(int64_t D, int64_t E) {
    const int64_t larger = D > E ? D : E;
    return larger > 2 ? larger : 2;
}

inline hb_status check_attention_shape(const hb_paged_attention_args* a) {
    HB_REQUIRE(check_call(a == nullptr ? nullptr : &a->call, sizeof *a));
    HB_REQUIRE(check_dtype(a->dtype));
    HB_REQUIRE(check_store_dtype(a->store_dtype));
    HB_REQUIRE(fail_unless(a->D >= 1 && a->D <= HB_MAX_HEAD_DIM && a->E >= 1 && a->E <= HB_MAX_HEAD_DIM, HB_BAD_SHAPE));
    HB_REQUIRE(fail_unless(a->G >= 1 && a->H >= a->G && a->H % a->G == 0 && a->block_tokens >= 1, HB_BAD_SHAPE));
    const bool good_scale = a->scale >= -1e30 && a->scale <= 1e30;
    const bool good_cap = a->softcap == 0 || (a->softcap >= 1e-30 && a->softcap <= 1e30);
    HB_REQUIRE(fail_unless(good_scale && good_cap && a->window >= 0, HB_BAD_OPTION));
    const int64_t larger = largest_size(a->D, a->E);
    int64_t count = 0;
    HB_REQUIRE(check_shape(a->H, larger, &count));
    HB_REQUIRE(check_shape(a->T, count, &count));
    HB_REQUIRE(check_shape(a->G, larger, &count));
    HB_REQUIRE(check_shape(a->block_tokens, count, &count));
    HB_REQUIRE(check_shape(a->blocks, count, &count));
    HB_REQUIRE(check_shape(a->max_blocks, a->block_tokens, &count));
    HB_REQUIRE(check_shape(a->S, a->max_blocks, &count));
    HB_REQUIRE(fail_unless(a->S <= a->T, HB_BAD_SEQUENCE));  // every sequence has a row
    return check_strides(a->T, a->query_row_stride, a->H, a->query_head_stride, a->D);
}

inline hb_status check(const hb_paged_attention_args* a) {
    HB_REQUIRE(check_attention_shape(a));
    const int64_t bytes = dtype_bytes(a->dtype), store_bytes = dtype_bytes(a->store_dtype);
    HB_REQUIRE(check_tensor(a->query, a->T, bytes));
    HB_REQUIRE(check_tensor(a->keys, a->T, store_bytes));
    HB_REQUIRE(check_tensor(a->values, a->T, store_bytes));
    if (a->store_dtype == HB_INT8) HB_REQUIRE(check_tensor(a->scales, a->T, sizeof(float)));
    HB_REQUIRE(check_tensor(a->tables, a->T, sizeof(int64_t)));
    HB_REQUIRE(check_tensor(a->offsets, a->T, sizeof(int64_t)));
    HB_REQUIRE(check_tensor(a->starts, a->T, sizeof(int64_t)));
    if (a->sinks != nullptr) {
        HB_REQUIRE(check_dtype(a->sinks_dtype));
        HB_REQUIRE(check_tensor(a->sinks, a->T, dtype_bytes(a->sinks_dtype)));
    }
    return check_tensor(a->out, a->T, bytes);
}

inline hb_status check(const hb_rms_norm_args* a) {
    HB_REQUIRE(check_call(a == nullptr ? nullptr : &a->call, sizeof *a));
    HB_REQUIRE(check_dtype(a->dtype));
    HB_REQUIRE(fail_unless(a->eps >= 0, HB_BAD_OPTION));
    int64_t count = 0;
    HB_REQUIRE(check_shape(a->M, a->K, &count));
    const int64_t bytes = dtype_bytes(a->dtype);
    HB_REQUIRE(check_tensor(a->x, count, bytes));
    HB_REQUIRE(check_tensor(a->weight, count, bytes));
    return check_tensor(a->out, count, bytes);
}

inline hb_status check(const hb_argmax_args* a) {
    HB_REQUIRE(check_call(a == nullptr ? nullptr : &a->call, sizeof *a));
    HB_REQUIRE(check_dtype(a->dtype));
    int64_t count = 0;
    HB_REQUIRE(check_shape(a->M, a->K, &count));
    HB_REQUIRE(check_tensor(a->x, count, dtype_bytes(a->dtype)));
    return check_tensor(a->out, a->M, sizeof *a->out);
}

// What the entries share that make n values of twice n.
template <typename Args>
hb_status check_pair(const Args* a, const void* Args::* first, const void* Args::* second) {
    HB_REQUIRE(check_call(a == nullptr ? nullptr : &a->call, sizeof *a));
    HB_REQUIRE(check_dtype(a->dtype));
    int64_t count = 0;
    HB_REQUIRE(check_shape(a->n, 1, &count));
    const int64_t bytes = dtype_bytes(a->dtype);
    HB_REQUIRE(check_tensor(a->*first, count, bytes));
    HB_REQUIRE(check_tensor(a->*second, count, bytes));
    return check_tensor(a->out, count, bytes);
}

inline hb_status check(const hb_swiglu_args* a) {
    return check_pair(a, &hb_swiglu_args::gate, &hb_swiglu_args::up);
}

inline hb_status check(const hb_rotary_args* a) {
    HB_REQUIRE(check_call(a == nullptr ? nullptr : &a->call, sizeof *a));
    HB_REQUIRE(check_dtype(a->dtype));
    HB_REQUIRE(fail_unless(a->D >= 0 && a->D <= HB_MAX_HEAD_DIM && a->D % 2 == 0, HB_BAD_SHAPE));
    int64_t rows = 0, queries = 0, keys = 0;
    HB_REQUIRE(check_shape(a->T, a->D, &rows));
    HB_REQUIRE(check_shape(a->H, rows, &queries));
    HB_REQUIRE(check_shape(a->G, rows, &keys));
    HB_REQUIRE(check_tensor(a->query, queries, dtype_bytes(a->dtype)));
    HB_REQUIRE(check_tensor(a->key, keys, dtype_bytes(a->dtype)));
    HB_REQUIRE(check_tensor(a->cos, rows, dtype_bytes(a->dtype)));
    return check_tensor(a->sin, rows, dtype_bytes(a->dtype));
}

inline hb_status check(const hb_add_args* a) {
    return check_pair(a, &hb_add_args::a, &hb_add_args::b);
}

// Whether any row has a slot to go to; else no tensor is read, and all may be null.
inline bool has_slots(const hb_cache_write_args& a) {
    return a.T != 0 && a.G != 0 && a.slot_count != 0;
}

inline hb_status check(const hb_cache_write_args* a) {
    HB_REQUIRE(check_call(a == nullptr ? nullptr : &a->call, sizeof *a));
    HB_REQUIRE(check_dtype(a->dtype));
    HB_REQUIRE(check_store_dtype(a->store_dtype));
    HB_REQUIRE(fail_unless(a->D >= 0 && a->D <= HB_MAX_HEAD_DIM && a->E >= 0 && a->E <= HB_MAX_HEAD_DIM, HB_BAD_SHAPE));
    const int64_t bytes = dtype_bytes(a->dtype), store_bytes = dtype_bytes(a->store_dtype);
    const int64_t larger = largest_size(a->D, a->E);
    int64_t heads = 0, count = 0;
    HB_REQUIRE(check_shape(a->G, larger, &heads));
    HB_REQUIRE(check_shape(a->T, heads, &count));
    HB_REQUIRE(check_shape(a->slot_count, heads, &count));
    HB_REQUIRE(check_strides(a->T, a->key_row_stride, a->G, a->key_head_stride, a->D));
    HB_REQUIRE(check_strides(a->T, a->value_row_stride, a->G, a->value_head_stride, a->E));
    if (!has_slots(*a)) return HB_OK;
    HB_REQUIRE(check_tensor(a->key, a->D, bytes));
    HB_REQUIRE(check_tensor(a->value, a->E, bytes));
    HB_REQUIRE(check_tensor(a->slots, a->T, sizeof(int64_t)));
    if (a->store_dtype == HB_INT8) HB_REQUIRE(check_tensor(a->scales, 1, sizeof(float)));
    HB_REQUIRE(check_tensor(a->keys, a->D, store_bytes));
    return check_tensor(a->values, a->E, store_bytes);
}

}  // namespace hb
