/* The whole C interface of Halfbyte's kernels. Plain structs, no torch, no Python, no C++.
 *
 * Two libraries export exactly these names: libhalfbyte_cpu.so and libhalfbyte_cuda.so. Their pointers are host and
 * device pointers respectively. (What says "CPU only" has no CUDA kernel yet, and only the first exports it.)
 *
 * Every entry
 *   - takes one struct, reads it, and writes only the outputs named in it;
 *   - allocates nothing and never waits for a device: scratch memory is the caller's workspace, whose size the
 *     *_workspace function of the entry tells (entries without one need none);
 *   - returns an hb_status, HB_OK or the reason; on any other status no output has been written on the CPU.
 *
 * Letters: n values of a flat tensor, M rows of activations, N output features, K input features, B blocks.
 * Sizes are in elements unless a name ends in _bytes. Tensors are contiguous and row-major, each pointer aligned to its
 * element. A pointer may be null only where its tensor has no elements or its comment says so.
 */
#ifndef HALFBYTE_H
#define HALFBYTE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define HB_API __attribute__((visibility("default")))

/* Goes up with every change of a struct, a code or a meaning in this file. */
#define HB_ABI_VERSION 7
/* Required alignment of a workspace. */
#define HB_WORKSPACE_ALIGNMENT 64
/* The largest number of elements that any tensor may have. */
#define HB_MAX_ELEMENTS ((int64_t)1 << 46)
/* The largest number of threads that a call may ask for. */
#define HB_MAX_THREADS 1024
/* The most products that a group may have, and the most matrices of an expert. */
#define HB_MAX_GROUP 8
/* The largest size of an attention head. */
#define HB_MAX_HEAD_DIM 4096

typedef int32_t hb_status;
enum {
    HB_OK = 0,
    HB_NULL_POINTER = 1,
    HB_BAD_STRUCT = 2,
    HB_BAD_DTYPE = 3,
    HB_BAD_FORMAT = 4,
    HB_BAD_BLOCKSIZE = 5,
    HB_BAD_SHAPE = 6,
    HB_MISALIGNED = 7,
    HB_WORKSPACE_MISALIGNED = 8,
    HB_WORKSPACE_TOO_SMALL = 9,
    HB_BAD_THREADS = 10,
    HB_BAD_OPTION = 11,
    HB_NO_DEVICE = 12,
    HB_NO_DEVICE_CODE = 13,
    HB_LAUNCH_FAILED = 14,
    HB_BAD_SEQUENCE = 15,
    HB_BAD_EXPERTS = 16,
    HB_NO_KERNEL = 17,
    HB_STATUS_COUNT = 18
};

/* Dtypes of values; HB_INT8 is one of a cache's keys and values alone. */
enum { HB_FLOAT32 = 0, HB_FLOAT16 = 1, HB_BFLOAT16 = 2, HB_INT8 = 3 };
/* 4-bit formats. */
enum { HB_NF4 = 0, HB_FP4 = 1 };
/* Who decides that an activation is an outlier: the value alone, or its column over all M rows; or all of them are, so
 * that no activation is rounded and the weight alone is in 8 bits. */
enum { HB_OUTLIERS_VALUE = 0, HB_OUTLIERS_BATCH = 1, HB_OUTLIERS_ALL = 2 };
/* Kernels of the 4-bit matmul on CUDA for what tensor cores take: the one for every GPU of compute capability 8.0 and
 * later, or the one for 9.0 alone (H100, H200). */
enum { HB_CUDA_MMA = 0, HB_CUDA_HOPPER = 1 };
/* Tables that hb_table copies out. */
enum {
    HB_TABLE_NF4 = 0,               /* [16] */
    HB_TABLE_FP4 = 1,               /* [16] */
    HB_TABLE_NF4_THRESHOLDS = 2,    /* [15] */
    HB_TABLE_FP4_THRESHOLDS = 3,    /* [7] */
    HB_TABLE_NF4_RANKS = 4,         /* [16] code of each rank */
    HB_TABLE_FP4_RANKS = 5,         /* [8] */
    HB_TABLE_DYNAMIC = 6,           /* [256] */
    HB_TABLE_DYNAMIC_MIDPOINTS = 7, /* [255] */
    HB_TABLE_NF4_INT8 = 8,          /* [16] the table as int8 codes, for hb_linear4_int8 */
    HB_TABLE_FP4_INT8 = 9,          /* [16] */
    HB_TABLE_INT8_STEPS = 10        /* [2] by format: what the product of two codes stands for, times both maxima */
};

/* What every call carries. */
typedef struct hb_call {
    int64_t struct_bytes; /* sizeof the struct that holds this one: a caller built against another header is refused */
    void* stream;         /* cudaStream_t to launch on; ignored by the CPU library */
    void* workspace;      /* scratch, aligned to HB_WORKSPACE_ALIGNMENT; may be null when none is needed */
    int64_t workspace_bytes; /* its size */
    int64_t threads; /* 1 .. HB_MAX_THREADS threads may work; the result does not depend on it; CUDA ignores it */
    int64_t batch_invariant; /* 1: a row of a matmul has the same bits in a batch of any size; 0: few rows may take a
                                faster way than many, which adds up in another order. CUDA ignores it. */
    int64_t cuda_kernel; /* HB_CUDA_MMA or HB_CUDA_HOPPER; a row's last bits differ between them. hb_linear4 on another
                            GPU refuses HB_CUDA_HOPPER; the CPU library ignores it, and so do other entries */
} hb_call;

/* Flat values -> 4-bit codes and block maxima. */
typedef struct hb_quantize4_args {
    hb_call call;
    const void* x;     /* [n] values */
    int64_t x_dtype;   /* HB_FLOAT32, HB_FLOAT16 or HB_BFLOAT16 */
    int64_t n;         /* number of values */
    int64_t format;    /* HB_NF4 or HB_FP4 */
    int64_t blocksize; /* values per block: a power of two from 32 to 4096 */
    uint8_t* packed;   /* out [ceil(n/2)] two codes per byte, the first in the high nibble */
    float* absmax;     /* out [ceil(n/blocksize)] */
} hb_quantize4_args;
HB_API hb_status hb_quantize4(const hb_quantize4_args* args);

/* Flat values -> 4-bit codes at scales that are given: what hb_quantize4 writes where scales are its absmax. */
typedef struct hb_encode4_args {
    hb_call call;
    const void* x;       /* [n] values */
    int64_t x_dtype;     /* HB_FLOAT32, HB_FLOAT16 or HB_BFLOAT16 */
    int64_t n;           /* number of values */
    int64_t format;      /* HB_NF4 or HB_FP4 */
    int64_t blocksize;   /* values per block: a power of two from 32 to 4096 */
    const float* scales; /* [ceil(n/blocksize)] of either sign; a block whose scale is 0 gets the code of zero */
    uint8_t* packed;     /* out [ceil(n/2)] two codes per byte, the first in the high nibble */
} hb_encode4_args;
HB_API hb_status hb_encode4(const hb_encode4_args* args);

/* Flat values -> for each block the scale, of either sign, with the smallest squared error that a search finds; the
 * largest magnitude where none is better. A block with a NaN or an infinity has that as its scale. */
typedef struct hb_search4_args {
    hb_call call;
    const void* x;     /* [n] values */
    int64_t x_dtype;   /* HB_FLOAT32, HB_FLOAT16 or HB_BFLOAT16 */
    int64_t n;         /* number of values */
    int64_t format;    /* HB_NF4 or HB_FP4 */
    int64_t blocksize; /* values per block: a power of two from 32 to 4096 */
    float* scales;     /* out [ceil(n/blocksize)] */
} hb_search4_args;
HB_API hb_status hb_search4(const hb_search4_args* args);

/* 4-bit codes -> values: dtype(table[code] * absmax), one float32 product and one rounding. */
typedef struct hb_dequantize4_args {
    hb_call call;
    const uint8_t* packed; /* [ceil(n/2)] */
    const float* absmax;   /* [ceil(n/blocksize)] */
    int64_t n;             /* number of values */
    int64_t format;        /* HB_NF4 or HB_FP4 */
    int64_t blocksize;     /* values per block: a power of two from 32 to 4096 */
    void* out;             /* out [n] */
    int64_t out_dtype;     /* HB_FLOAT32, HB_FLOAT16 or HB_BFLOAT16 */
} hb_dequantize4_args;
HB_API hb_status hb_dequantize4(const hb_dequantize4_args* args);

/* Block maxima minus an offset -> 8-bit codes of the dynamic map. */
typedef struct hb_quantize_absmax_args {
    hb_call call;
    const float* absmax;      /* [B] */
    int64_t blocks;           /* B */
    const float* offset;      /* [1] subtracted from each */
    int64_t nested_blocksize; /* maxima per second-level block: any positive number */
    uint8_t* codes;           /* out [B] */
    float* nested_absmax;     /* out [ceil(B/nested_blocksize)] */
} hb_quantize_absmax_args;
HB_API hb_status hb_quantize_absmax(const hb_quantize_absmax_args* args);

/* 8-bit codes -> block maxima: map[code] * nested_absmax + offset, rounded after the product and after the sum. */
typedef struct hb_dequantize_absmax_args {
    hb_call call;
    const uint8_t* codes;       /* [B] */
    int64_t blocks;             /* B */
    const float* nested_absmax; /* [ceil(B/nested_blocksize)] */
    const float* offset;        /* [1] */
    int64_t nested_blocksize;   /* any positive number */
    float* absmax;              /* out [B] */
} hb_dequantize_absmax_args;
HB_API hb_status hb_dequantize_absmax(const hb_dequantize_absmax_args* args);

/* out[M,N] = x[M,K] * W[N,K]^T + bias, W in 4 bits, decoded a few rows at a time into the workspace. Float32 sums; a
 * row's sum is added up in the same order whatever M is where the call is batch_invariant. */
typedef struct hb_linear4_args {
    hb_call call;
    const void* x;              /* [M, K] */
    int64_t x_dtype;            /* dtype of x and out */
    int64_t M;                  /* rows of x */
    int64_t N;                  /* output features */
    int64_t K;                  /* input features */
    const uint8_t* packed;      /* [ceil(N*K/2)] codes of the flattened W; blocks may cross rows */
    int64_t format;             /* HB_NF4 or HB_FP4 */
    int64_t blocksize;          /* values per block: a power of two from 32 to 4096 */
    const void* absmax;         /* [B], B = ceil(N*K/blocksize): float32, or uint8 codes when nested_absmax is given */
    const float* nested_absmax; /* [ceil(B/nested_blocksize)], or null: absmax is not double-quantized */
    const float* offset;        /* [1] when nested_absmax is given, else null */
    int64_t nested_blocksize;   /* any positive number; ignored without nested_absmax */
    const void* bias;           /* [N] or null */
    int64_t bias_dtype;         /* dtype of bias; ignored without bias */
    void* out;                  /* out [M, N] in x_dtype */
} hb_linear4_args;
HB_API hb_status hb_linear4(const hb_linear4_args* args);
/* Writes the bytes of workspace that hb_linear4 needs for these shapes and threads; reads no other pointer. */
HB_API hb_status hb_linear4_workspace(const hb_linear4_args* args, int64_t* bytes);
/* `count` (1 .. HB_MAX_GROUP) products of one x, as a model's query, key and value have them: what hb_linear4 gives for
 * each, bit for bit, in one call that converts x once and starts its threads once. Items have the same x, x_dtype, M
 * and K; threads, workspace and batch_invariant are the first one's. Not in the CUDA library. */
HB_API hb_status hb_linear4_group(const hb_linear4_args* items, int64_t count);
HB_API hb_status hb_linear4_group_workspace(const hb_linear4_args* items, int64_t count, int64_t* bytes);

/* Products of rows with the 4-bit matrices of the expert that each row belongs to, in one call: expert e has the rows
 * of x from ends[e - 1] (0 for the first) up to ends[e], and of each
 *
 *     out[m, p*N + n] = sum over k of x[m, k] * W[e, p, n, k] + bias[e, p*N + n]
 *
 * bit for bit what hb_linear4 gives for the expert's rows and one matrix. Rows behind the last end become zeros.
 * Nothing of an expert without rows is read. In the CUDA library `ends` is read on the device, and ends that fall or
 * leave x give some rows of out wrong values; in the CPU library they are refused. */
typedef struct hb_linear4_experts_args {
    hb_call call;
    const void* x;              /* [M, K] */
    int64_t x_dtype;            /* dtype of x and out */
    int64_t M;                  /* rows of x */
    int64_t E;                  /* experts */
    int64_t P;                  /* matrices of an expert, 1 .. HB_MAX_GROUP */
    int64_t N;                  /* output features of a matrix */
    int64_t K;                  /* input features */
    const int64_t* ends;        /* [E] rising, from 0 to M */
    const uint8_t* packed;      /* [E, P, packed_bytes] the codes of each flattened matrix first */
    int64_t packed_bytes;       /* at least ceil(N*K/2) */
    int64_t format;             /* HB_NF4 or HB_FP4 */
    int64_t blocksize;          /* values per block: a power of two from 32 to 4096 */
    const void* absmax;         /* [E, P, B], B = ceil(N*K/blocksize): float32, or uint8 codes with nested_absmax */
    const float* nested_absmax; /* [E, P, ceil(B/nested_blocksize)], or null: absmax is not double-quantized */
    const float* offset;        /* [E, P] when nested_absmax is given, else null */
    int64_t nested_blocksize;   /* any positive number; ignored without nested_absmax */
    const void* bias;           /* [E, P*N] or null */
    int64_t bias_dtype;         /* dtype of bias; ignored without bias */
    void* out;                  /* out [M, P*N] in x_dtype */
} hb_linear4_experts_args;
HB_API hb_status hb_linear4_experts(const hb_linear4_experts_args* args);
/* Writes the bytes of workspace that hb_linear4_experts needs for these shapes and threads; reads no other pointer. */
HB_API hb_status hb_linear4_experts_workspace(const hb_linear4_experts_args* args, int64_t* bytes);

/* The same with both sides in int8, CPU only: x rounded to int8 in groups of 64 columns of each row against the group's
 * largest magnitude, the weight's table rounded to int8. Where a group and a block meet, the sum of products is an
 * exact integer; times (absmax * (largest magnitude * step)) in float32 these are added up in the order of K, each
 * operation rounded, at every level alike. A group with a NaN or an infinity makes its row NaN. */
HB_API hb_status hb_linear4_int8(const hb_linear4_args* args);
HB_API hb_status hb_linear4_int8_workspace(const hb_linear4_args* args, int64_t* bytes);

/* Rows -> int8 codes and row maxima, values rounded to float16 first unless that makes them infinite. */
typedef struct hb_quantize8_args {
    hb_call call;
    const void* w;   /* [N, K] */
    int64_t w_dtype; /* HB_FLOAT32, HB_FLOAT16 or HB_BFLOAT16 */
    int64_t N;       /* rows */
    int64_t K;       /* columns */
    int8_t* codes;   /* out [N, K] "CB" */
    float* absmax;   /* out [N] "SCB", not divided by 127 */
} hb_quantize8_args;
HB_API hb_status hb_quantize8(const hb_quantize8_args* args);

/* int8 codes -> values: dtype(code * absmax / 127) in float32. */
typedef struct hb_dequantize8_args {
    hb_call call;
    const int8_t* codes; /* [N, K] */
    const float* absmax; /* [N] */
    int64_t N;           /* rows */
    int64_t K;           /* columns */
    void* out;           /* out [N, K] */
    int64_t out_dtype;   /* HB_FLOAT32, HB_FLOAT16 or HB_BFLOAT16 */
} hb_dequantize8_args;
HB_API hb_status hb_dequantize8(const hb_dequantize8_args* args);

/* LLM.int8(): out[M,N] = x[M,K] * W[N,K]^T + bias, W in int8. Values with |x| >= threshold meet the dequantized weight
 * in float32 in column order; the others are rounded to int8 per row and multiplied exactly. With HB_OUTLIERS_ALL the
 * sums are float32 in an order of the kernel's own, and the weight's scale comes last. */
typedef struct hb_linear8_args {
    hb_call call;
    const void* x;        /* [M, K] */
    int64_t x_dtype;      /* dtype of x and out */
    int64_t M;            /* rows of x */
    int64_t N;            /* output features */
    int64_t K;            /* input features */
    const int8_t* codes;  /* [N, K] "CB" */
    const float* absmax;  /* [N] "SCB" */
    double threshold;     /* 0: no outliers; must not be negative or NaN */
    int64_t outlier_rule; /* HB_OUTLIERS_VALUE, HB_OUTLIERS_BATCH or HB_OUTLIERS_ALL */
    const void* bias;     /* [N] or null */
    int64_t bias_dtype;   /* dtype of bias; ignored without bias */
    void* out;            /* out [M, N] in x_dtype */
} hb_linear8_args;
HB_API hb_status hb_linear8(const hb_linear8_args* args);
/* Writes the bytes of workspace that hb_linear8 needs for these shapes and threads; reads no other pointer. */
HB_API hb_status hb_linear8_workspace(const hb_linear8_args* args, int64_t* bytes);
/* As hb_linear4_group; items also have the same threshold and outlier_rule. */
HB_API hb_status hb_linear8_group(const hb_linear8_args* items, int64_t count);
HB_API hb_status hb_linear8_group_workspace(const hb_linear8_args* items, int64_t count, int64_t* bytes);

/* Products of rows with the int8 matrix of the expert that each row belongs to, in one call: expert e has the rows of x
 * from ends[e - 1] (0 for the first) up to ends[e], and of each what hb_linear8 gives for the expert's rows and matrix,
 * bit for bit; a column counts as one of outliers (HB_OUTLIERS_BATCH) over the rows of one expert. Rows behind the last
 * end become zeros. Nothing of an expert without rows is read. `ends` as for hb_linear4_experts. */
typedef struct hb_linear8_experts_args {
    hb_call call;
    const void* x;        /* [M, K] */
    int64_t x_dtype;      /* dtype of x and out */
    int64_t M;            /* rows of x */
    int64_t E;            /* experts */
    int64_t N;            /* output features */
    int64_t K;            /* input features */
    const int64_t* ends;  /* [E] rising, from 0 to M */
    const int8_t* codes;  /* [E, N, K] */
    const float* absmax;  /* [E, N] */
    double threshold;     /* 0: no outliers; must not be negative or NaN */
    int64_t outlier_rule; /* HB_OUTLIERS_VALUE, HB_OUTLIERS_BATCH or HB_OUTLIERS_ALL */
    const void* bias;     /* [E, N] or null */
    int64_t bias_dtype;   /* dtype of bias; ignored without bias */
    void* out;            /* out [M, N] in x_dtype */
} hb_linear8_experts_args;
HB_API hb_status hb_linear8_experts(const hb_linear8_experts_args* args);
/* Writes the bytes of workspace that hb_linear8_experts needs for these shapes and threads; reads no other pointer. */
HB_API hb_status hb_linear8_experts_workspace(const hb_linear8_experts_args* args, int64_t* bytes);

/* Attention over a paged cache. A batch packs the new rows of S sequences; row r of a sequence stands at
 * position start + r and sees the sequence's positions up to its own, or the last `window` of them.
 *
 *     out[t, h] = sum of weight(p) * value(p) over the positions p that row t sees
 *     weight    = softmax over p of scale * (query[t, h] . key(p)), soft-capped if asked for, the head's sink beside
 *
 * Head h reads kv head h / (H / G). Position p of sequence s lies in block tables[s, p / block_tokens], at place
 * p % block_tokens. Table entries of positions that no row sees are not read and may hold anything, and so may the
 * blocks they name. A row's bits depend on its own query and on what it sees: not on other rows or sequences, on where
 * a chunk begins, on the blocks' order or size, or on threads, as long as all values of its own sequence are finite.
 *
 * What offsets, starts and tables say is checked by who reads them. The CPU library answers HB_BAD_SEQUENCE. On a
 * device nobody can be told in time: there a row that no sequence has, that stands outside its table, or that sees a
 * block which is not in the cache becomes NaN, and no such block is read. Launches depend on shapes and options alone,
 * so a CUDA graph of them serves other tables; a table may be wider than any of its sequences needs.
 *
 * Keys and values have a dtype of their own. In HB_INT8 each head of a position has a scale beside its codes, one for
 * the key and one for the value: what it holds is code * scale, as hb_cache_write puts it. */
typedef struct hb_paged_attention_args {
    hb_call call;
    const void* query;         /* [T, H, D], strides below; each head's D values are contiguous */
    int64_t query_row_stride;  /* elements between two rows */
    int64_t query_head_stride; /* elements between two heads of a row */
    const void* keys;          /* [blocks, block_tokens, G, D] */
    const void* values;        /* [blocks, block_tokens, G, E] */
    int64_t store_dtype;       /* of keys and values: HB_FLOAT32, HB_FLOAT16, HB_BFLOAT16 or HB_INT8 */
    const float* scales;       /* [blocks, block_tokens, G, 2] of keys and values in HB_INT8; else ignored */
    int64_t dtype;             /* of query and out: HB_FLOAT32, HB_FLOAT16 or HB_BFLOAT16 */
    int64_t T;                 /* rows in the batch */
    int64_t H;                 /* query heads, a multiple of G */
    int64_t G;                 /* kv heads */
    int64_t D;                 /* values of a query and of a key, at most HB_MAX_HEAD_DIM */
    int64_t E;                 /* values of a value and of an output, at most HB_MAX_HEAD_DIM */
    int64_t blocks;            /* in the cache */
    int64_t block_tokens;      /* positions in a block */
    const int64_t* tables;     /* [S, max_blocks] the blocks of each sequence in order */
    int64_t S;                 /* sequences */
    int64_t max_blocks;        /* columns of tables */
    const int64_t* offsets; /* [S + 1] rows of sequence s are offsets[s] .. offsets[s + 1] - 1; from 0 to T, rising */
    const int64_t* starts;  /* [S] position of each sequence's first row */
    double scale;           /* from -1e30 to 1e30 */
    int64_t window;         /* positions that a row sees, itself included; 0: all before it */
    double softcap;         /* c from 1e-30 to 1e30: a score x becomes c * tanh(x / c); 0: none */
    const void* sinks;      /* [H] one more score per head that gives no value, or null */
    int64_t sinks_dtype;    /* dtype of sinks; ignored without sinks */
    void* out;              /* out [T, H, E] */
} hb_paged_attention_args;
HB_API hb_status hb_paged_attention(const hb_paged_attention_args* args);
/* Writes the bytes of workspace that hb_paged_attention needs for these shapes and threads; reads no other pointer. */
HB_API hb_status hb_paged_attention_workspace(const hb_paged_attention_args* args, int64_t* bytes);

/* Root mean square normalisation of rows: with r = x / sqrt(mean(x^2) + eps) in float32, r rounded to x's
 * dtype, out = weight * r rounded once more. The squares are added up in 16 sums, the same at every level. */
typedef struct hb_rms_norm_args {
    hb_call call;
    const void* x;      /* [M, K] */
    int64_t dtype;      /* of x, weight and out */
    int64_t M;          /* rows */
    int64_t K;          /* values of a row */
    const void* weight; /* [K] */
    double eps;         /* used as a float32; not negative and not NaN */
    void* out;          /* out [M, K] */
} hb_rms_norm_args;
HB_API hb_status hb_rms_norm(const hb_rms_norm_args* args);

/* The first of the greatest values of each row, or -1 where that is not finite or a value is NaN, and for an empty row.
 * CPU only. */
typedef struct hb_argmax_args {
    hb_call call;
    const void* x; /* [M, K] */
    int64_t dtype; /* of x */
    int64_t M;     /* rows */
    int64_t K;     /* values of a row */
    int64_t* out;  /* out [M] */
} hb_argmax_args;
HB_API hb_status hb_argmax(const hb_argmax_args* args);

/* The product in a gated linear unit: out = silu(gate) * up, with silu(g) = g / (1 + e^-g) computed in
 * float32 and rounded to the dtype before the product is. */
typedef struct hb_swiglu_args {
    hb_call call;
    const void* gate; /* [n] */
    const void* up;   /* [n] */
    int64_t dtype;    /* of gate, up and out */
    int64_t n;        /* values */
    void* out;        /* out [n] */
} hb_swiglu_args;
HB_API hb_status hb_swiglu(const hb_swiglu_args* args);

/* Rotary position embeddings, in place: out[t, h, d] = x[t, h, d] * cos[t, d] + turned(x)[t, h, d] * sin[t, d], where
 * turned(x) is x with its halves exchanged and the first then negated. Products and sum are rounded to the dtype one by
 * one. */
typedef struct hb_rotary_args {
    hb_call call;
    void* query;     /* in and out [T, H, D] */
    void* key;       /* in and out [T, G, D] */
    int64_t dtype;   /* of all four tensors */
    int64_t T;       /* tokens */
    int64_t H;       /* query heads */
    int64_t G;       /* key heads */
    int64_t D;       /* size of a head, even, at most HB_MAX_HEAD_DIM */
    const void* cos; /* [T, D] */
    const void* sin; /* [T, D] */
} hb_rotary_args;
HB_API hb_status hb_rotary(const hb_rotary_args* args);

/* out = a + b in float32, rounded to the dtype; out may be a or b. */
typedef struct hb_add_args {
    hb_call call;
    const void* a; /* [n] */
    const void* b; /* [n] */
    int64_t dtype; /* of all three */
    int64_t n;     /* values */
    void* out;     /* out [n] */
} hb_add_args;
HB_API hb_status hb_add(const hb_add_args* args);

/* New rows of keys and values to their places in a paged cache: keys[slots[t], g, d] = key[t, g, d], and values alike,
 * rounded to the cache's dtype. A row whose slot is not in the cache is left out. No two rows may have one slot.
 *
 * In HB_INT8, with absmax the largest magnitude of a head's values: scale = absmax / 127, and a code is
 * value * (1 / absmax * 127) to nearest, ties to even, all in float32. A head whose absmax is below 2^-64 gets zeros
 * and the scale 0; one with a NaN or an infinity gets zeros and the scale NaN, which makes what reads it NaN. */
typedef struct hb_cache_write_args {
    hb_call call;
    const void* key;           /* [T, G, D], strides below; each head's D values are contiguous */
    int64_t key_row_stride;    /* elements between two rows */
    int64_t key_head_stride;   /* elements between two heads of a row */
    const void* value;         /* [T, G, E], likewise */
    int64_t value_row_stride;  /* elements */
    int64_t value_head_stride; /* elements */
    int64_t dtype;             /* of key and value: HB_FLOAT32, HB_FLOAT16 or HB_BFLOAT16 */
    int64_t T;                 /* rows */
    int64_t G;                 /* kv heads */
    int64_t D;                 /* values of a key, at most HB_MAX_HEAD_DIM */
    int64_t E;                 /* values of a value, at most HB_MAX_HEAD_DIM */
    const int64_t* slots;      /* [T] block * block_tokens + place in the block */
    int64_t slot_count;        /* blocks * block_tokens */
    int64_t store_dtype;       /* of keys and values: any dtype */
    void* keys;                /* out [slot_count, G, D] */
    void* values;              /* out [slot_count, G, E] */
    float* scales;             /* out [slot_count, G, 2] of keys and values in HB_INT8; else ignored */
} hb_cache_write_args;
HB_API hb_status hb_cache_write(const hb_cache_write_args* args);

/* The entries that hb_run knows. */
enum {
    HB_STEP_LINEAR4 = 0, /* hb_linear4_group */
    HB_STEP_LINEAR8 = 1, /* hb_linear8_group */
    HB_STEP_LINEAR4_INT8 = 2,
    HB_STEP_PAGED_ATTENTION = 3,
    HB_STEP_CACHE_WRITE = 4,
    HB_STEP_RMS_NORM = 5,
    HB_STEP_SWIGLU = 6,
    HB_STEP_ROTARY = 7,
    HB_STEP_ADD = 8
};
typedef struct hb_step {
    int64_t entry;    /* HB_STEP_* */
    const void* args; /* its struct, or a group's */
    int64_t count;    /* of a group; 1 for what has no groups */
} hb_step;
/* Calls entries one after the other, as a layer of a model needs them, with the results that they have alone. Up to
 * `threads` threads stay ready between them; each step uses as many as its own struct says. Steps may share a
 * workspace. The first status that is not HB_OK ends the run and is returned; what came before it has been done. CPU
 * only. */
HB_API hb_status hb_run(const hb_step* steps, int64_t count, int64_t threads);

/* HB_ABI_VERSION of the library. */
HB_API int32_t hb_abi_version(void);
/* The name of the instruction set level that this library runs at: the one that serves this machine best, or the one
 * that HALFBYTE_CPU_LEVEL names. Null where that is none of hb_levels; "cuda" in the CUDA library. */
HB_API const char* hb_level(void);
/* Writes the names of the levels that can run on this machine and returns their number; -1 for too little room. */
HB_API int64_t hb_levels(const char** names, int64_t room);
/* Runs body(context) on up to `threads` threads at once, the caller among them, and returns when each has returned:
 * GOMP_parallel of an OpenMP runtime, whose flags are 0 here. */
typedef void (*hb_parallel)(void (*body)(void* context), void* context, unsigned threads, unsigned flags);
/* From now on calls run on the threads of this runtime, where others keep them awake already, instead of on the
 * library's own; null goes back to those. A forked child, where a runtime has no threads, starts with null. Not in the
 * CUDA library. */
HB_API void hb_use_parallel(hb_parallel parallel);
/* One sentence saying what a status means; never null. */
HB_API const char* hb_status_text(hb_status status);
/* Copies a table (HB_TABLE_*) as float32 and returns its length; -1 for an unknown table or too little room. */
HB_API int64_t hb_table(int32_t table, float* out, int64_t room);

#ifdef __cplusplus
}
#endif
#endif
