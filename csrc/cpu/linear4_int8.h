// What linear4_int8.cpp and its two ways to compute share: the job of one call, and how many bytes each way works in.
// Functions here are HB_INLINE: one of the files is compiled for one level only.
#pragma once

#include <stdint.h>

#include "clones.h"
#include "decode4.h"
#include "formats.h"
#include "halfbyte.h"

namespace hb {

constexpr int64_t kGroupValues = 64;   // values of x under one scale
constexpr int64_t kInt8Rows = 256;     // rows of x kept rounded at a time
constexpr int64_t kPlainColumns = 16;  // weight rows finished together, the plain way and with few rows of x
constexpr int64_t kInt8Columns = 32;   // and with many rows of x

// Rows of x, rounded to int8 group by group, against the packed weight.
struct Int8Job {
    const hb_linear4_args* args;
    AbsmaxSource absmax;
    int64_t rows;            // of x in this pass
    int64_t first_row;       // the first one's place in args->x and args->out
    int64_t groups;          // of a row of x, a multiple of four; those beyond K are zero
    int64_t stride;          // bytes from one row of codes to the next
    const int8_t* codes;     // [rows, stride] zero from K on; in the order that the way to compute has them in
    const float* scales;     // [rows, groups] what a product of a code of x and one of the weight's table stands for,
                             // in units of the weight's absmax
    const int32_t* offsets;  // [rows, groups] what biased codes of the weight add too much, negative; wide way only
};

// The table of HB_NF4 or HB_FP4 as int8 codes.
HB_INLINE const Table<int8_t, 16>& int8_table(int64_t format) {
    return format == HB_NF4 ? kNf4Int8 : kFp4Int8;
}

// What a code of it times a code of x stands for, times both maxima.
HB_INLINE float int8_step(int64_t format) {
    return kInt8Steps.at[format == HB_NF4 ? 0 : 1];
}

// Whether each weight row begins with a block that holds whole groups, which the wide way asks for.
HB_INLINE bool is_in_groups(const hb_linear4_args& a) {
    return a.K > 0 && a.K % a.blocksize == 0 && a.blocksize % kGroupValues == 0;
}

// Bias and rounding: sums[i] -> out[first_row + row][n + i].
void finish_int8(const Int8Job& job, int64_t row, int64_t n, int64_t columns, float* sums);

// Any shape, plain loops: weight rows [begin, end). Scratch: plain_bytes of one thread.
int64_t plain_bytes(const hb_linear4_args& a);
void run_plain(const Int8Job& job, int64_t begin, int64_t end, char* scratch);

#ifdef __x86_64__
// AVX-512 with VNNI.
constexpr int64_t kFewRows = 4;  // of x that meet the codes in registers
HB_INLINE int64_t wide_columns(const hb_linear4_args& a) {
    return a.M <= kFewRows ? kPlainColumns : kInt8Columns;
}
// A row's codes in natural order -> the order and the offsets that run_wide reads.
void arrange_wide(const int8_t* natural, int64_t groups, int8_t* codes, int32_t* offsets);
// All weight rows are in groups. Scratch: wide_bytes of one thread.
int64_t wide_bytes(const hb_linear4_args& a);
void run_wide(const Int8Job& job, int64_t begin, int64_t end, char* scratch);
#endif

}  // namespace hb
