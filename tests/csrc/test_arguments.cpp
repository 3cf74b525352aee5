// What must be refused, and with which status: null, misaligned, odd, empty and huge arguments of every entry.
#include <memory>

#include "testing.h"

using namespace testing;

namespace {

using hb_linear4_int8_args = hb_linear4_args;

// One valid call of each entry on small real buffers, to be spoiled one field at a time.
struct Valid {
    alignas(64) float x[64] = {};
    alignas(64) float absmax[64] = {};
    alignas(64) float out[64] = {};
    alignas(64) uint8_t bytes[256] = {};
    alignas(64) int8_t codes[256] = {};
    alignas(64) char scratch[1 << 17] = {};
    alignas(64) char large[1 << 17] = {};
    float offset = 0;
    alignas(64) int64_t tables[6] = {1, 0, -7, 2, 99, 99};  // [2, 3]: what the sequences do not reach names no block
    alignas(64) int64_t offsets[3] = {0, 2, 3};
    alignas(64) int64_t starts[2] = {2, 0};
    alignas(64) int64_t ends[3] = {1, 1, 3};
    alignas(64) int64_t places[4] = {};

    template <typename Args>
    Args with_workspace() {
        Args args = args_with<Args>();
        args.call.workspace = scratch;
        args.call.workspace_bytes = sizeof scratch;
        return args;
    }
    hb_quantize4_args quantize4() {
        auto a = args_with<hb_quantize4_args>();
        a.x = x, a.n = 64, a.blocksize = 64, a.packed = bytes, a.absmax = absmax;
        return a;
    }
    hb_encode4_args encode4() {
        auto a = args_with<hb_encode4_args>();
        a.x = x, a.n = 64, a.blocksize = 64, a.scales = absmax, a.packed = bytes;
        return a;
    }
    hb_search4_args search4() {
        auto a = args_with<hb_search4_args>();
        a.x = x, a.n = 64, a.blocksize = 64, a.scales = absmax;
        return a;
    }
    hb_dequantize4_args dequantize4() {
        auto a = args_with<hb_dequantize4_args>();
        a.packed = bytes, a.absmax = absmax, a.n = 64, a.blocksize = 64, a.out = out;
        return a;
    }
    hb_quantize_absmax_args quantize_absmax() {
        auto a = args_with<hb_quantize_absmax_args>();
        a.absmax = x, a.blocks = 64, a.offset = &offset, a.nested_blocksize = 256, a.codes = bytes;
        a.nested_absmax = absmax;
        return a;
    }
    hb_dequantize_absmax_args dequantize_absmax() {
        auto a = args_with<hb_dequantize_absmax_args>();
        a.codes = bytes, a.blocks = 64, a.nested_absmax = absmax, a.offset = &offset, a.nested_blocksize = 256;
        a.absmax = out;
        return a;
    }
    hb_linear4_args linear4() {
        auto a = with_workspace<hb_linear4_args>();
        a.x = x, a.M = 2, a.N = 3, a.K = 21, a.packed = bytes, a.blocksize = 64, a.absmax = absmax, a.out = out;
        return a;
    }
    hb_linear4_int8_args linear4_int8() { return linear4(); }
    // Three experts of two matrices each; the second has no rows, the last row belongs to none.
    hb_linear4_experts_args linear4_experts() {
        auto a = args_with<hb_linear4_experts_args>();
        a.call.workspace = large, a.call.workspace_bytes = sizeof large;
        a.x = x, a.M = 4, a.E = 3, a.P = 2, a.N = 3, a.K = 13, a.ends = ends, a.packed = bytes, a.packed_bytes = 21;
        a.blocksize = 64, a.absmax = absmax, a.out = out;
        return a;
    }
    hb_quantize8_args quantize8() {
        auto a = args_with<hb_quantize8_args>();
        a.w = x, a.N = 3, a.K = 21, a.codes = codes, a.absmax = absmax;
        return a;
    }
    hb_dequantize8_args dequantize8() {
        auto a = args_with<hb_dequantize8_args>();
        a.codes = codes, a.absmax = absmax, a.N = 3, a.K = 21, a.out = out;
        return a;
    }
    hb_linear8_args linear8() {
        auto a = with_workspace<hb_linear8_args>();
        a.x = x, a.M = 2, a.N = 3, a.K = 21, a.codes = codes, a.absmax = absmax, a.out = out;
        return a;
    }
    // Three experts of 20 codes each; the second has no rows, the last row belongs to none.
    hb_linear8_experts_args linear8_experts() {
        auto a = args_with<hb_linear8_experts_args>();
        a.call.workspace = large, a.call.workspace_bytes = sizeof large;
        a.x = x, a.M = 4, a.E = 3, a.N = 2, a.K = 10, a.ends = ends, a.codes = codes, a.absmax = absmax, a.out = out;
        return a;
    }
    hb_rms_norm_args rms_norm() {
        auto a = args_with<hb_rms_norm_args>();
        a.x = x, a.M = 3, a.K = 21, a.weight = absmax, a.eps = 1e-6, a.out = out;
        return a;
    }
    hb_argmax_args argmax() {
        auto a = args_with<hb_argmax_args>();
        a.x = x, a.M = 3, a.K = 21, a.out = places;
        return a;
    }
    hb_swiglu_args swiglu() {
        auto a = args_with<hb_swiglu_args>();
        a.gate = x, a.up = absmax, a.n = 63, a.out = out;
        return a;
    }
    hb_rotary_args rotary() {
        auto a = args_with<hb_rotary_args>();
        a.query = out, a.key = absmax, a.T = 3, a.H = 2, a.G = 1, a.D = 4, a.cos = x, a.sin = x;
        return a;
    }
    hb_add_args add() {
        auto a = args_with<hb_add_args>();
        a.a = x, a.b = absmax, a.n = 63, a.out = out;
        return a;
    }
    hb_cache_write_args cache_write() {
        auto a = args_with<hb_cache_write_args>();
        a.key = x, a.key_row_stride = 4, a.key_head_stride = 2, a.value = x, a.value_row_stride = 6;
        a.value_head_stride = 3, a.T = 2, a.G = 2, a.D = 2, a.E = 3, a.slots = starts, a.slot_count = 5;
        a.keys = out, a.values = absmax;
        return a;
    }
    // Two sequences: rows at positions 2 and 3 of one, at 0 of the other; blocks of two tokens.
    hb_paged_attention_args paged_attention() {
        auto a = args_with<hb_paged_attention_args>();
        a.call.workspace = large, a.call.workspace_bytes = sizeof large;
        a.query = x, a.query_row_stride = 8, a.query_head_stride = 2, a.keys = x, a.values = absmax, a.out = out;
        a.T = 3, a.H = 4, a.G = 2, a.D = 2, a.E = 3, a.blocks = 3, a.block_tokens = 2, a.tables = tables;
        a.S = 2, a.max_blocks = 3, a.offsets = offsets, a.starts = starts, a.scale = 1;
        return a;
    }
};

template <typename Args>
void expect_refused(hb_status (*entry)(const Args*), Args args, void (*spoil)(Args&), hb_status expected,
                    const char* what) {
    const hb_status before = entry(&args);
    EXPECT(before == HB_OK, "%s: the valid call gave %d", what, before);
    spoil(args);
    const hb_status status = entry(&args);
    EXPECT(status == expected, "%s gave %d, not %d", what, status, expected);
}

template <typename Pointer>
Pointer shifted(Pointer pointer, int bytes = 1) {
    return reinterpret_cast<Pointer>(reinterpret_cast<uintptr_t>(pointer) + static_cast<uintptr_t>(bytes));
}

#define REFUSED(entry, field_change, expected)                                                               \
    do {                                                                                                     \
        const std::unique_ptr<Valid> valid(new Valid); /* its buffers are too large for many on a stack */   \
        using Args = hb_##entry##_args;                                                                      \
        expect_refused<Args>(                                                                                \
            hb_##entry, valid->entry(), [](Args& a) { field_change; }, expected, #entry ": " #field_change); \
    } while (0)

// What every entry refuses in the part that all calls share.
#define REFUSED_CALLS(entry)                                                       \
    do {                                                                           \
        EXPECT(hb_##entry(nullptr) == HB_NULL_POINTER, #entry ": null arguments"); \
        REFUSED(entry, a.call.struct_bytes -= 8, HB_BAD_STRUCT);                   \
        REFUSED(entry, a.call.threads = 0, HB_BAD_THREADS);                        \
        REFUSED(entry, a.call.threads = -1, HB_BAD_THREADS);                       \
        REFUSED(entry, a.call.threads = HB_MAX_THREADS + 1, HB_BAD_THREADS);       \
        REFUSED(entry, a.call.batch_invariant = 2, HB_BAD_OPTION);                 \
        REFUSED(entry, a.call.cuda_kernel = 2, HB_BAD_OPTION);                     \
    } while (0)

constexpr int64_t kHuge = std::numeric_limits<int64_t>::max();

}  // namespace

TEST(every_entry_refuses_a_bad_call) {
    REFUSED_CALLS(quantize4);
    REFUSED_CALLS(encode4);
    REFUSED_CALLS(search4);
    REFUSED_CALLS(dequantize4);
    REFUSED_CALLS(quantize_absmax);
    REFUSED_CALLS(dequantize_absmax);
    REFUSED_CALLS(linear4);
    REFUSED_CALLS(linear4_int8);
    REFUSED_CALLS(linear4_experts);
    REFUSED_CALLS(quantize8);
    REFUSED_CALLS(dequantize8);
    REFUSED_CALLS(linear8);
    REFUSED_CALLS(linear8_experts);
    REFUSED_CALLS(paged_attention);
    REFUSED_CALLS(rms_norm);
    REFUSED_CALLS(argmax);
    REFUSED_CALLS(swiglu);
    REFUSED_CALLS(rotary);
    REFUSED_CALLS(add);
    REFUSED_CALLS(cache_write);
}

TEST(a_run_refuses_bad_steps) {
    const std::unique_ptr<Valid> valid(new Valid);
    const hb_add_args add = valid->add();
    hb_swiglu_args bad = valid->swiglu();
    bad.gate = nullptr;
    const hb_step good = {HB_STEP_ADD, &add, 1};
    EXPECT(hb_run(&good, 1, 1) == HB_OK && hb_run(nullptr, 0, 2) == HB_OK, "nothing wrong");
    EXPECT(hb_run(nullptr, 1, 1) == HB_NULL_POINTER, "no steps");
    EXPECT(hb_run(shifted(&good), 1, 1) == HB_MISALIGNED, "steps anywhere");
    for (const int64_t count : {int64_t{-1}, kHuge}) EXPECT(hb_run(&good, count, 1) == HB_BAD_SHAPE, "a wrong count");
    for (const int64_t threads : {0, -1, HB_MAX_THREADS + 1}) {
        EXPECT(hb_run(&good, 1, threads) == HB_BAD_THREADS, "%d threads", (int)threads);
    }
    const std::pair<hb_step, hb_status> steps[] = {
        {{HB_STEP_ADD + 1, &add, 1}, HB_BAD_OPTION},
        {{-1, &add, 1}, HB_BAD_OPTION},
        {{HB_STEP_ADD, &add, 2}, HB_BAD_OPTION},
        {{HB_STEP_ADD, &add, 0}, HB_BAD_OPTION},
        {{HB_STEP_ADD, nullptr, 1}, HB_NULL_POINTER},
        {{HB_STEP_SWIGLU, &bad, 1}, HB_NULL_POINTER},
        {{HB_STEP_ROTARY, &add, 1}, HB_BAD_STRUCT},
        {{HB_STEP_LINEAR4, nullptr, 1}, HB_NULL_POINTER},
        {{HB_STEP_PAGED_ATTENTION, &add, 1}, HB_BAD_STRUCT},
    };
    for (const auto& [step, expected] : steps) {
        memset(valid->out, 0xA5, sizeof valid->out);
        const hb_step three[] = {good, step, good};
        const hb_status status = hb_run(three, 3, 2);
        EXPECT(status == expected, "entry %d gave %d", (int)step.entry, status);
        EXPECT(valid->out[0] == 0, "what came before has been done");
    }
}

TEST(null_pointers_are_refused) {
    REFUSED(quantize4, a.x = nullptr, HB_NULL_POINTER);
    REFUSED(quantize4, a.packed = nullptr, HB_NULL_POINTER);
    REFUSED(quantize4, a.absmax = nullptr, HB_NULL_POINTER);
    REFUSED(encode4, a.x = nullptr, HB_NULL_POINTER);
    REFUSED(encode4, a.scales = nullptr, HB_NULL_POINTER);
    REFUSED(encode4, a.packed = nullptr, HB_NULL_POINTER);
    REFUSED(search4, a.x = nullptr, HB_NULL_POINTER);
    REFUSED(search4, a.scales = nullptr, HB_NULL_POINTER);
    REFUSED(dequantize4, a.packed = nullptr, HB_NULL_POINTER);
    REFUSED(dequantize4, a.absmax = nullptr, HB_NULL_POINTER);
    REFUSED(dequantize4, a.out = nullptr, HB_NULL_POINTER);
    REFUSED(quantize_absmax, a.absmax = nullptr, HB_NULL_POINTER);
    REFUSED(quantize_absmax, a.offset = nullptr, HB_NULL_POINTER);
    REFUSED(quantize_absmax, a.codes = nullptr, HB_NULL_POINTER);
    REFUSED(quantize_absmax, a.nested_absmax = nullptr, HB_NULL_POINTER);
    REFUSED(dequantize_absmax, a.codes = nullptr, HB_NULL_POINTER);
    REFUSED(dequantize_absmax, a.nested_absmax = nullptr, HB_NULL_POINTER);
    REFUSED(dequantize_absmax, a.offset = nullptr, HB_NULL_POINTER);
    REFUSED(dequantize_absmax, a.absmax = nullptr, HB_NULL_POINTER);
    REFUSED(linear4, a.x = nullptr, HB_NULL_POINTER);
    REFUSED(linear4, a.packed = nullptr, HB_NULL_POINTER);
    REFUSED(linear4, a.absmax = nullptr, HB_NULL_POINTER);
    REFUSED(linear4, a.out = nullptr, HB_NULL_POINTER);
    REFUSED(linear4, a.call.workspace = nullptr, HB_NULL_POINTER);
    REFUSED(linear4, (a.nested_absmax = static_cast<const float*>(a.absmax), a.nested_blocksize = 1), HB_NULL_POINTER);
    REFUSED(linear4_int8, a.x = nullptr, HB_NULL_POINTER);
    REFUSED(linear4_int8, a.absmax = nullptr, HB_NULL_POINTER);
    REFUSED(linear4_int8, a.call.workspace = nullptr, HB_NULL_POINTER);
    REFUSED(linear4_experts, a.x = nullptr, HB_NULL_POINTER);
    REFUSED(linear4_experts, a.ends = nullptr, HB_NULL_POINTER);
    REFUSED(linear4_experts, a.packed = nullptr, HB_NULL_POINTER);
    REFUSED(linear4_experts, a.absmax = nullptr, HB_NULL_POINTER);
    REFUSED(linear4_experts, a.out = nullptr, HB_NULL_POINTER);
    REFUSED(linear4_experts, a.call.workspace = nullptr, HB_NULL_POINTER);
    REFUSED(linear4_experts, (a.nested_absmax = static_cast<const float*>(a.absmax), a.nested_blocksize = 1),
            HB_NULL_POINTER);
    REFUSED(quantize8, a.w = nullptr, HB_NULL_POINTER);
    REFUSED(quantize8, a.codes = nullptr, HB_NULL_POINTER);
    REFUSED(quantize8, a.absmax = nullptr, HB_NULL_POINTER);
    REFUSED(dequantize8, a.codes = nullptr, HB_NULL_POINTER);
    REFUSED(dequantize8, a.absmax = nullptr, HB_NULL_POINTER);
    REFUSED(dequantize8, a.out = nullptr, HB_NULL_POINTER);
    REFUSED(linear8, a.x = nullptr, HB_NULL_POINTER);
    REFUSED(linear8, a.codes = nullptr, HB_NULL_POINTER);
    REFUSED(linear8, a.absmax = nullptr, HB_NULL_POINTER);
    REFUSED(linear8, a.out = nullptr, HB_NULL_POINTER);
    REFUSED(linear8, a.call.workspace = nullptr, HB_NULL_POINTER);
    REFUSED(linear8_experts, a.x = nullptr, HB_NULL_POINTER);
    REFUSED(linear8_experts, a.ends = nullptr, HB_NULL_POINTER);
    REFUSED(linear8_experts, a.codes = nullptr, HB_NULL_POINTER);
    REFUSED(linear8_experts, a.absmax = nullptr, HB_NULL_POINTER);
    REFUSED(linear8_experts, a.out = nullptr, HB_NULL_POINTER);
    REFUSED(linear8_experts, a.call.workspace = nullptr, HB_NULL_POINTER);
    REFUSED(rms_norm, a.x = nullptr, HB_NULL_POINTER);
    REFUSED(rms_norm, a.weight = nullptr, HB_NULL_POINTER);
    REFUSED(rms_norm, a.out = nullptr, HB_NULL_POINTER);
    REFUSED(argmax, a.x = nullptr, HB_NULL_POINTER);
    REFUSED(argmax, a.out = nullptr, HB_NULL_POINTER);
    REFUSED(swiglu, a.gate = nullptr, HB_NULL_POINTER);
    REFUSED(swiglu, a.up = nullptr, HB_NULL_POINTER);
    REFUSED(swiglu, a.out = nullptr, HB_NULL_POINTER);
    REFUSED(rotary, a.query = nullptr, HB_NULL_POINTER);
    REFUSED(rotary, a.key = nullptr, HB_NULL_POINTER);
    REFUSED(rotary, a.cos = nullptr, HB_NULL_POINTER);
    REFUSED(rotary, a.sin = nullptr, HB_NULL_POINTER);
    REFUSED(add, a.a = nullptr, HB_NULL_POINTER);
    REFUSED(add, a.b = nullptr, HB_NULL_POINTER);
    REFUSED(add, a.out = nullptr, HB_NULL_POINTER);
    REFUSED(cache_write, a.key = nullptr, HB_NULL_POINTER);
    REFUSED(cache_write, a.value = nullptr, HB_NULL_POINTER);
    REFUSED(cache_write, a.slots = nullptr, HB_NULL_POINTER);
    REFUSED(cache_write, a.keys = nullptr, HB_NULL_POINTER);
    REFUSED(cache_write, a.store_dtype = HB_INT8, HB_NULL_POINTER);  // without scales
    REFUSED(paged_attention, a.store_dtype = HB_INT8, HB_NULL_POINTER);
    REFUSED(cache_write, a.values = nullptr, HB_NULL_POINTER);
    REFUSED(paged_attention, a.query = nullptr, HB_NULL_POINTER);
    REFUSED(paged_attention, a.keys = nullptr, HB_NULL_POINTER);
    REFUSED(paged_attention, a.values = nullptr, HB_NULL_POINTER);
    REFUSED(paged_attention, a.tables = nullptr, HB_NULL_POINTER);
    REFUSED(paged_attention, a.offsets = nullptr, HB_NULL_POINTER);
    REFUSED(paged_attention, a.starts = nullptr, HB_NULL_POINTER);
    REFUSED(paged_attention, a.out = nullptr, HB_NULL_POINTER);
    REFUSED(paged_attention, a.call.workspace = nullptr, HB_NULL_POINTER);
}

TEST(misaligned_pointers_are_refused) {
    REFUSED(quantize4, a.x = shifted(a.x), HB_MISALIGNED);
    REFUSED(quantize4, (a.x_dtype = HB_BFLOAT16, a.x = shifted(a.x)), HB_MISALIGNED);
    REFUSED(quantize4, a.absmax = shifted(a.absmax, 2), HB_MISALIGNED);
    REFUSED(encode4, a.x = shifted(a.x), HB_MISALIGNED);
    REFUSED(encode4, a.scales = shifted(a.scales), HB_MISALIGNED);
    REFUSED(search4, (a.x_dtype = HB_FLOAT16, a.x = shifted(a.x)), HB_MISALIGNED);
    REFUSED(search4, a.scales = shifted(a.scales, 2), HB_MISALIGNED);
    REFUSED(dequantize4, a.absmax = shifted(a.absmax), HB_MISALIGNED);
    REFUSED(dequantize4, a.out = shifted(a.out, 2), HB_MISALIGNED);
    REFUSED(quantize_absmax, a.absmax = shifted(a.absmax), HB_MISALIGNED);
    REFUSED(quantize_absmax, a.offset = shifted(a.offset), HB_MISALIGNED);
    REFUSED(dequantize_absmax, a.nested_absmax = shifted(a.nested_absmax), HB_MISALIGNED);
    REFUSED(linear4, a.x = shifted(a.x), HB_MISALIGNED);
    REFUSED(linear4, a.absmax = shifted(a.absmax), HB_MISALIGNED);
    REFUSED(linear4, a.bias = shifted(a.x), HB_MISALIGNED);
    REFUSED(linear4, a.out = shifted(a.out), HB_MISALIGNED);
    REFUSED(linear4, a.call.workspace = shifted(a.call.workspace, 32), HB_WORKSPACE_MISALIGNED);
    REFUSED(linear4_int8, a.out = shifted(a.out), HB_MISALIGNED);
    REFUSED(linear4_experts, a.x = shifted(a.x), HB_MISALIGNED);
    REFUSED(linear4_experts, a.ends = shifted(a.ends, 4), HB_MISALIGNED);
    REFUSED(linear4_experts, a.absmax = shifted(a.absmax, 2), HB_MISALIGNED);
    REFUSED(linear4_experts, a.bias = shifted(a.x), HB_MISALIGNED);
    REFUSED(linear4_experts, a.out = shifted(a.out), HB_MISALIGNED);
    REFUSED(linear4_experts, a.call.workspace = shifted(a.call.workspace, 32), HB_WORKSPACE_MISALIGNED);
    REFUSED(linear4_int8, a.call.workspace = shifted(a.call.workspace, 32), HB_WORKSPACE_MISALIGNED);
    REFUSED(quantize8, a.w = shifted(a.w), HB_MISALIGNED);
    REFUSED(dequantize8, a.out = shifted(a.out), HB_MISALIGNED);
    REFUSED(linear8, a.x = shifted(a.x), HB_MISALIGNED);
    REFUSED(linear8, a.bias = shifted(a.x), HB_MISALIGNED);
    REFUSED(linear8, a.call.workspace = shifted(a.call.workspace, 4), HB_WORKSPACE_MISALIGNED);
    REFUSED(linear8_experts, a.x = shifted(a.x), HB_MISALIGNED);
    REFUSED(linear8_experts, a.ends = shifted(a.ends, 4), HB_MISALIGNED);
    REFUSED(linear8_experts, a.absmax = shifted(a.absmax, 2), HB_MISALIGNED);
    REFUSED(linear8_experts, a.bias = shifted(a.x), HB_MISALIGNED);
    REFUSED(linear8_experts, a.call.workspace = shifted(a.call.workspace, 4), HB_WORKSPACE_MISALIGNED);
    REFUSED(rms_norm, a.x = shifted(a.x, 2), HB_MISALIGNED);
    REFUSED(rms_norm, (a.dtype = HB_FLOAT16, a.weight = shifted(a.weight)), HB_MISALIGNED);
    REFUSED(rms_norm, a.out = shifted(a.out), HB_MISALIGNED);
    REFUSED(argmax, a.x = shifted(a.x, 2), HB_MISALIGNED);
    REFUSED(argmax, (a.dtype = HB_FLOAT16, a.x = shifted(a.x)), HB_MISALIGNED);
    REFUSED(argmax, a.out = shifted(a.out, 4), HB_MISALIGNED);
    REFUSED(swiglu, a.gate = shifted(a.gate, 2), HB_MISALIGNED);
    REFUSED(swiglu, (a.dtype = HB_BFLOAT16, a.up = shifted(a.up)), HB_MISALIGNED);
    REFUSED(swiglu, a.out = shifted(a.out, 3), HB_MISALIGNED);
    REFUSED(rotary, a.query = shifted(a.query, 2), HB_MISALIGNED);
    REFUSED(rotary, (a.dtype = HB_BFLOAT16, a.key = shifted(a.key)), HB_MISALIGNED);
    REFUSED(rotary, a.cos = shifted(a.cos), HB_MISALIGNED);
    REFUSED(rotary, a.sin = shifted(a.sin), HB_MISALIGNED);
    REFUSED(add, a.a = shifted(a.a, 2), HB_MISALIGNED);
    REFUSED(add, (a.dtype = HB_BFLOAT16, a.b = shifted(a.b)), HB_MISALIGNED);
    REFUSED(cache_write, a.key = shifted(a.key, 2), HB_MISALIGNED);
    REFUSED(cache_write, (a.dtype = HB_FLOAT16, a.values = shifted(a.values)), HB_MISALIGNED);
    REFUSED(cache_write, a.slots = shifted(a.slots, 4), HB_MISALIGNED);
    REFUSED(cache_write, (a.store_dtype = HB_INT8, a.scales = shifted(static_cast<float*>(a.keys), 2)), HB_MISALIGNED);
    REFUSED(paged_attention, (a.store_dtype = HB_INT8, a.scales = shifted(static_cast<const float*>(a.query), 2)),
            HB_MISALIGNED);
    REFUSED(paged_attention, a.query = shifted(a.query, 2), HB_MISALIGNED);
    REFUSED(paged_attention, (a.dtype = HB_BFLOAT16, a.keys = shifted(a.keys)), HB_MISALIGNED);
    REFUSED(paged_attention, a.tables = shifted(a.tables, 4), HB_MISALIGNED);
    REFUSED(paged_attention, a.starts = shifted(a.starts), HB_MISALIGNED);
    REFUSED(paged_attention, a.sinks = shifted(a.query), HB_MISALIGNED);
    REFUSED(paged_attention, a.out = shifted(a.out), HB_MISALIGNED);
    REFUSED(paged_attention, a.call.workspace = shifted(a.call.workspace, 8), HB_WORKSPACE_MISALIGNED);
}

TEST(unknown_choices_are_refused) {
    REFUSED(quantize4, a.x_dtype = 3, HB_BAD_DTYPE);
    REFUSED(quantize4, a.format = 2, HB_BAD_FORMAT);
    REFUSED(quantize4, a.format = -1, HB_BAD_FORMAT);
    REFUSED(encode4, a.x_dtype = -1, HB_BAD_DTYPE);
    REFUSED(encode4, a.format = 2, HB_BAD_FORMAT);
    REFUSED(search4, a.x_dtype = 3, HB_BAD_DTYPE);
    REFUSED(search4, a.format = 7, HB_BAD_FORMAT);
    for (const int64_t blocksize : {int64_t{0}, int64_t{-64}, int64_t{16}, int64_t{48}, int64_t{8192}, kHuge}) {
        Valid valid;
        hb_quantize4_args quantize = valid.quantize4();
        hb_encode4_args encode = valid.encode4();
        hb_search4_args search = valid.search4();
        hb_dequantize4_args dequantize = valid.dequantize4();
        hb_linear4_args linear = valid.linear4();
        quantize.blocksize = encode.blocksize = search.blocksize = blocksize;
        dequantize.blocksize = linear.blocksize = blocksize;
        EXPECT(hb_quantize4(&quantize) == HB_BAD_BLOCKSIZE, "%lld", static_cast<long long>(blocksize));
        EXPECT(hb_encode4(&encode) == HB_BAD_BLOCKSIZE, "%lld", static_cast<long long>(blocksize));
        EXPECT(hb_search4(&search) == HB_BAD_BLOCKSIZE, "%lld", static_cast<long long>(blocksize));
        EXPECT(hb_dequantize4(&dequantize) == HB_BAD_BLOCKSIZE, "%lld", static_cast<long long>(blocksize));
        EXPECT(hb_linear4(&linear) == HB_BAD_BLOCKSIZE, "%lld", static_cast<long long>(blocksize));
    }
    REFUSED(dequantize4, a.out_dtype = -1, HB_BAD_DTYPE);
    REFUSED(quantize_absmax, a.nested_blocksize = 0, HB_BAD_BLOCKSIZE);
    REFUSED(dequantize_absmax, a.nested_blocksize = -256, HB_BAD_BLOCKSIZE);
    REFUSED(linear4, (a.bias = a.x, a.bias_dtype = 7), HB_BAD_DTYPE);
    REFUSED(linear4_int8, a.format = 2, HB_BAD_FORMAT);
    REFUSED(linear4_experts, a.x_dtype = 3, HB_BAD_DTYPE);
    REFUSED(linear4_experts, a.format = -1, HB_BAD_FORMAT);
    REFUSED(linear4_experts, a.blocksize = 48, HB_BAD_BLOCKSIZE);
    REFUSED(linear4_experts, (a.nested_absmax = static_cast<const float*>(a.absmax), a.nested_blocksize = 0),
            HB_BAD_BLOCKSIZE);
    REFUSED(linear4_experts, (a.bias = a.x, a.bias_dtype = 7), HB_BAD_DTYPE);
    REFUSED(linear4_experts, a.P = 0, HB_BAD_SHAPE);
    REFUSED(linear4_experts, a.P = HB_MAX_GROUP + 1, HB_BAD_SHAPE);
    REFUSED(linear4_experts, a.packed_bytes = 19, HB_BAD_SHAPE);  // of 39 codes
    REFUSED(linear4_experts, a.M = 2, HB_BAD_EXPERTS);            // and three rows in experts
    REFUSED(linear4_int8, a.x_dtype = 3, HB_BAD_DTYPE);
    REFUSED(linear8, a.outlier_rule = 3, HB_BAD_OPTION);
    REFUSED(linear8, a.outlier_rule = -1, HB_BAD_OPTION);
    REFUSED(linear8, a.threshold = -1.0, HB_BAD_OPTION);
    REFUSED(linear8, a.threshold = std::numeric_limits<double>::quiet_NaN(), HB_BAD_OPTION);
    REFUSED(linear8_experts, a.x_dtype = 3, HB_BAD_DTYPE);
    REFUSED(linear8_experts, (a.bias = a.x, a.bias_dtype = 7), HB_BAD_DTYPE);
    REFUSED(linear8_experts, a.outlier_rule = 3, HB_BAD_OPTION);
    REFUSED(linear8_experts, a.threshold = -1.0, HB_BAD_OPTION);
    REFUSED(linear8_experts, a.M = 2, HB_BAD_EXPERTS);  // and three rows in experts
}

TEST(options_of_attention_are_refused) {
    REFUSED(rms_norm, a.dtype = 3, HB_BAD_DTYPE);
    REFUSED(rms_norm, a.eps = -1e-6, HB_BAD_OPTION);
    REFUSED(rms_norm, a.eps = std::numeric_limits<double>::quiet_NaN(), HB_BAD_OPTION);
    REFUSED(argmax, a.dtype = 3, HB_BAD_DTYPE);
    REFUSED(swiglu, a.dtype = -1, HB_BAD_DTYPE);
    REFUSED(rotary, a.dtype = 3, HB_BAD_DTYPE);
    REFUSED(add, a.dtype = 3, HB_BAD_DTYPE);
    REFUSED(cache_write, a.dtype = -1, HB_BAD_DTYPE);
    REFUSED(cache_write, a.dtype = HB_INT8, HB_BAD_DTYPE);
    REFUSED(cache_write, a.store_dtype = 4, HB_BAD_DTYPE);
    REFUSED(paged_attention, a.store_dtype = -1, HB_BAD_DTYPE);
    REFUSED(cache_write, a.D = HB_MAX_HEAD_DIM + 1, HB_BAD_SHAPE);
    REFUSED(cache_write, a.value_row_stride = HB_MAX_ELEMENTS, HB_BAD_SHAPE);
    REFUSED(rotary, a.D = 5, HB_BAD_SHAPE);
    REFUSED(rotary, a.D = HB_MAX_HEAD_DIM + 2, HB_BAD_SHAPE);
    REFUSED(paged_attention, a.dtype = 3, HB_BAD_DTYPE);
    REFUSED(paged_attention, (a.sinks = a.query, a.sinks_dtype = -1), HB_BAD_DTYPE);
    REFUSED(paged_attention, a.scale = std::numeric_limits<double>::infinity(), HB_BAD_OPTION);
    REFUSED(paged_attention, a.scale = std::numeric_limits<double>::quiet_NaN(), HB_BAD_OPTION);
    REFUSED(paged_attention, a.window = -1, HB_BAD_OPTION);
    REFUSED(paged_attention, a.softcap = -1, HB_BAD_OPTION);
    REFUSED(paged_attention, a.softcap = std::numeric_limits<double>::quiet_NaN(), HB_BAD_OPTION);
    REFUSED(paged_attention, a.G = 3, HB_BAD_SHAPE);  // 4 heads
    REFUSED(paged_attention, a.G = 0, HB_BAD_SHAPE);
    REFUSED(paged_attention, a.H = 0, HB_BAD_SHAPE);
    REFUSED(paged_attention, a.D = 0, HB_BAD_SHAPE);
    REFUSED(paged_attention, a.E = HB_MAX_HEAD_DIM + 1, HB_BAD_SHAPE);
    REFUSED(paged_attention, a.block_tokens = 0, HB_BAD_SHAPE);
    REFUSED(paged_attention, a.query_row_stride = -8, HB_BAD_SHAPE);
    REFUSED(paged_attention, a.query_head_stride = HB_MAX_ELEMENTS, HB_BAD_SHAPE);
}

#define REFUSED_TABLES(change)                                                                           \
    do {                                                                                                 \
        Valid valid;                                                                                     \
        auto a = valid.paged_attention();                                                                \
        EXPECT(hb_paged_attention(&a) == HB_OK, "the valid call");                                       \
        memset(valid.out, 0xA5, sizeof valid.out);                                                       \
        change;                                                                                          \
        EXPECT(hb_paged_attention(&a) == HB_BAD_SEQUENCE, #change);                                      \
        for (const float value : valid.out) EXPECT(memcmp(&value, "\xA5\xA5\xA5\xA5", 4) == 0, #change); \
    } while (0)

TEST(sequences_that_leave_their_tables_or_the_cache_are_refused) {
    for (const int64_t block : {int64_t{-1}, int64_t{3}, kHuge, std::numeric_limits<int64_t>::min()}) {
        for (const int at : {0, 1, 3}) REFUSED_TABLES(valid.tables[at] = block);
    }
    REFUSED_TABLES(valid.offsets[0] = 1);
    REFUSED_TABLES(valid.offsets[0] = -1);
    REFUSED_TABLES(valid.offsets[1] = 0);
    REFUSED_TABLES(valid.offsets[1] = 3);
    REFUSED_TABLES(valid.offsets[1] = kHuge);
    REFUSED_TABLES(valid.offsets[2] = 2);
    REFUSED_TABLES(valid.offsets[2] = 4);
    REFUSED_TABLES(valid.starts[0] = -1);
    REFUSED_TABLES(valid.starts[0] = 5);  // and 6 positions in the table
    REFUSED_TABLES(valid.starts[1] = kHuge);
    REFUSED_TABLES(a.T = 2);
    REFUSED_TABLES(a.S = 1);
    REFUSED_TABLES(a.S = 0);
    REFUSED_TABLES(a.S = 4);
    REFUSED_TABLES(a.max_blocks = 0);
    REFUSED_TABLES(a.blocks = 0);
    // A window that ends after a block leaves its entry alone.
    Valid valid;
    auto a = valid.paged_attention();
    valid.starts[0] = 3, valid.tables[0] = -5, valid.tables[2] = 0, a.window = 2;
    EXPECT(hb_paged_attention(&a) == HB_OK, "a block before the window");
    a.window = 3;
    EXPECT(hb_paged_attention(&a) == HB_BAD_SEQUENCE, "a block in the window");
}

TEST(negative_and_huge_sizes_are_refused) {
    for (const int64_t size :
         {int64_t{-1}, kHuge, kHuge / 2, std::numeric_limits<int64_t>::min(), HB_MAX_ELEMENTS + 1}) {
        Valid valid;
        auto quantize4 = valid.quantize4();
        quantize4.n = size;
        EXPECT(hb_quantize4(&quantize4) == HB_BAD_SHAPE, "n %lld", static_cast<long long>(size));
        auto encode4 = valid.encode4();
        encode4.n = size;
        EXPECT(hb_encode4(&encode4) == HB_BAD_SHAPE, "n %lld", static_cast<long long>(size));
        auto search4 = valid.search4();
        search4.n = size;
        EXPECT(hb_search4(&search4) == HB_BAD_SHAPE, "n %lld", static_cast<long long>(size));
        auto dequantize4 = valid.dequantize4();
        dequantize4.n = size;
        EXPECT(hb_dequantize4(&dequantize4) == HB_BAD_SHAPE, "n %lld", static_cast<long long>(size));
        auto quantize_absmax = valid.quantize_absmax();
        quantize_absmax.blocks = size;
        EXPECT(hb_quantize_absmax(&quantize_absmax) == HB_BAD_SHAPE, "blocks %lld", static_cast<long long>(size));
        for (int64_t hb_linear4_args::* field : {&hb_linear4_args::M, &hb_linear4_args::N, &hb_linear4_args::K}) {
            auto linear = valid.linear4();
            linear.*field = size;
            int64_t bytes = 0;
            EXPECT(hb_linear4(&linear) == HB_BAD_SHAPE, "%lld", static_cast<long long>(size));
            EXPECT(hb_linear4_workspace(&linear, &bytes) == HB_BAD_SHAPE, "%lld", static_cast<long long>(size));
            EXPECT(hb_linear4_int8(&linear) == HB_BAD_SHAPE, "%lld", static_cast<long long>(size));
            EXPECT(hb_linear4_int8_workspace(&linear, &bytes) == HB_BAD_SHAPE, "%lld", static_cast<long long>(size));
        }
        using Experts = hb_linear4_experts_args;
        for (int64_t Experts::* field :
             {&Experts::M, &Experts::E, &Experts::P, &Experts::N, &Experts::K, &Experts::packed_bytes}) {
            auto experts = valid.linear4_experts();
            experts.*field = size;
            int64_t bytes = 0;
            EXPECT(hb_linear4_experts(&experts) == HB_BAD_SHAPE, "%lld", static_cast<long long>(size));
            EXPECT(hb_linear4_experts_workspace(&experts, &bytes) == HB_BAD_SHAPE, "%lld",
                   static_cast<long long>(size));
        }
        for (int64_t hb_linear8_args::* field : {&hb_linear8_args::M, &hb_linear8_args::N, &hb_linear8_args::K}) {
            auto linear = valid.linear8();
            linear.*field = size;
            int64_t bytes = 0;
            EXPECT(hb_linear8(&linear) == HB_BAD_SHAPE, "%lld", static_cast<long long>(size));
            EXPECT(hb_linear8_workspace(&linear, &bytes) == HB_BAD_SHAPE, "%lld", static_cast<long long>(size));
        }
        using Experts8 = hb_linear8_experts_args;
        for (int64_t Experts8::* field : {&Experts8::M, &Experts8::E, &Experts8::N, &Experts8::K}) {
            auto experts8 = valid.linear8_experts();
            experts8.*field = size;
            int64_t bytes = 0;
            EXPECT(hb_linear8_experts(&experts8) == HB_BAD_SHAPE, "%lld", static_cast<long long>(size));
            EXPECT(hb_linear8_experts_workspace(&experts8, &bytes) == HB_BAD_SHAPE, "%lld",
                   static_cast<long long>(size));
        }
        for (int64_t hb_rotary_args::* field : {&hb_rotary_args::T, &hb_rotary_args::H, &hb_rotary_args::G}) {
            auto rotary = valid.rotary();
            rotary.*field = size;
            EXPECT(hb_rotary(&rotary) == HB_BAD_SHAPE, "%lld", static_cast<long long>(size));
        }
        using Write = hb_cache_write_args;
        for (int64_t Write::* field : {&Write::T, &Write::G, &Write::D, &Write::E, &Write::slot_count,
                                       &Write::key_row_stride, &Write::value_head_stride}) {
            auto write = valid.cache_write();
            write.*field = size;
            EXPECT(hb_cache_write(&write) == HB_BAD_SHAPE, "%lld", static_cast<long long>(size));
        }
        auto add = valid.add();
        add.n = size;
        EXPECT(hb_add(&add) == HB_BAD_SHAPE, "n %lld", static_cast<long long>(size));
        using Attention = hb_paged_attention_args;
        for (int64_t Attention::* field :
             {&Attention::T, &Attention::H, &Attention::G, &Attention::D, &Attention::E, &Attention::blocks,
              &Attention::block_tokens, &Attention::S, &Attention::max_blocks, &Attention::query_row_stride}) {
            auto attention = valid.paged_attention();
            attention.*field = size;
            int64_t bytes = 0;
            EXPECT(hb_paged_attention(&attention) == HB_BAD_SHAPE, "%lld", static_cast<long long>(size));
            EXPECT(hb_paged_attention_workspace(&attention, &bytes) == HB_BAD_SHAPE, "%lld",
                   static_cast<long long>(size));
        }
        auto quantize8 = valid.quantize8();
        quantize8.N = size;
        EXPECT(hb_quantize8(&quantize8) == HB_BAD_SHAPE, "N %lld", static_cast<long long>(size));
        auto rms_norm = valid.rms_norm();
        rms_norm.K = size;
        EXPECT(hb_rms_norm(&rms_norm) == HB_BAD_SHAPE, "K %lld", static_cast<long long>(size));
        auto argmax = valid.argmax();
        argmax.M = size;
        EXPECT(hb_argmax(&argmax) == HB_BAD_SHAPE, "M %lld", static_cast<long long>(size));
        auto swiglu = valid.swiglu();
        swiglu.n = size;
        EXPECT(hb_swiglu(&swiglu) == HB_BAD_SHAPE, "n %lld", static_cast<long long>(size));
        auto dequantize8 = valid.dequantize8();
        dequantize8.K = size;
        EXPECT(hb_dequantize8(&dequantize8) == HB_BAD_SHAPE, "K %lld", static_cast<long long>(size));
    }
    // Sizes that are fine alone but whose product wraps around to something small.
    Valid valid;
    auto linear = valid.linear4();
    linear.N = linear.K = int64_t{1} << 32;
    EXPECT(hb_linear4(&linear) == HB_BAD_SHAPE, "2^32 * 2^32");
    auto experts = valid.linear4_experts();
    experts.E = int64_t{1} << 32, experts.N = experts.K = int64_t{1} << 16, experts.packed_bytes = int64_t{1} << 31;
    EXPECT(hb_linear4_experts(&experts) == HB_BAD_SHAPE, "2^32 experts of 2^32 weights");
    auto experts8 = valid.linear8_experts();
    experts8.E = int64_t{1} << 32, experts8.N = experts8.K = int64_t{1} << 16;
    EXPECT(hb_linear8_experts(&experts8) == HB_BAD_SHAPE, "2^32 experts of 2^32 weights");
}

namespace {

// Any size, small ones and borders among them.
int64_t any_size() {
    return any_of({0, 0, 1, 2, 3, 64, 4096, int64_t{1} << 20, int64_t{1} << 31, int64_t{1} << 40, HB_MAX_ELEMENTS,
                   HB_MAX_ELEMENTS + 1, kHuge, -1, std::numeric_limits<int64_t>::min()});
}

// No sizes overflow what is computed of them, and none keep an entry busy that has no tensor to work on. What `args`
// has beside them is not read: every tensor that has elements is missing.
template <typename Args>
void try_sizes(hb_status (*entry)(const Args*), hb_status (*workspace)(const Args*, int64_t*), Args args,
               std::initializer_list<int64_t Args::*> sizes) {
    for (int round = 0; round < 3000; ++round) {
        for (const auto size : sizes) args.*size = any_size();
        const hb_status status = entry(&args);
        EXPECT(status >= HB_OK && status < HB_STATUS_COUNT, "status %d", status);
        int64_t bytes = 0;
        const hb_status asked = workspace == nullptr ? HB_OK : workspace(&args, &bytes);
        EXPECT(bytes >= 0 && (asked == HB_OK || bytes == 0), "%lld bytes, status %d", (long long)bytes, asked);
    }
}

template <typename Args>
void try_sizes(hb_status (*entry)(const Args*), Args args, std::initializer_list<int64_t Args::*> sizes) {
    try_sizes<Args>(entry, nullptr, args, sizes);
}

const float some[64] = {};

// A 4-bit matmul's arguments without sizes: of plain absmax, and of double-quantized ones.
template <typename Args>
std::vector<Args> plain_and_nested() {
    auto plain = args_with<Args>(7);
    plain.blocksize = 64, plain.bias = some;
    Args nested = plain;
    nested.nested_absmax = nested.offset = some;
    return {plain, nested};
}

// An 8-bit matmul's, with each rule of what an outlier is.
template <typename Args>
std::vector<Args> of_each_rule() {
    std::vector<Args> found;
    auto args = args_with<Args>(7);
    args.bias = some;
    for (args.outlier_rule = HB_OUTLIERS_VALUE; args.outlier_rule <= HB_OUTLIERS_ALL; ++args.outlier_rule) {
        found.push_back(args);
    }
    return found;
}

}  // namespace

TEST(sizes_together_overflow_nothing) {
    {
        using A = hb_linear4_args;
        for (const A& a : plain_and_nested<A>()) {
            try_sizes(hb_linear4, hb_linear4_workspace, a, {&A::M, &A::N, &A::K, &A::nested_blocksize});
            try_sizes(hb_linear4_int8, hb_linear4_int8_workspace, a, {&A::M, &A::N, &A::K, &A::nested_blocksize});
        }
    }
    {
        using A = hb_linear4_experts_args;
        for (A& a : plain_and_nested<A>()) {
            for (a.P = 1; a.P <= HB_MAX_GROUP; a.P += 7) {
                try_sizes(hb_linear4_experts, hb_linear4_experts_workspace, a,
                          {&A::M, &A::E, &A::N, &A::K, &A::packed_bytes, &A::nested_blocksize});
            }
        }
    }
    {
        using A = hb_linear8_args;
        for (const A& a : of_each_rule<A>()) try_sizes(hb_linear8, hb_linear8_workspace, a, {&A::M, &A::N, &A::K});
    }
    {
        using A = hb_linear8_experts_args;
        for (const A& a : of_each_rule<A>()) {
            try_sizes(hb_linear8_experts, hb_linear8_experts_workspace, a, {&A::M, &A::E, &A::N, &A::K});
        }
    }
    {
        using A = hb_paged_attention_args;
        auto a = args_with<A>(7);
        a.scale = 1, a.sinks = some;
        try_sizes(hb_paged_attention, hb_paged_attention_workspace, a,
                  {&A::T, &A::H, &A::G, &A::D, &A::E, &A::blocks, &A::block_tokens, &A::S, &A::max_blocks,
                   &A::query_row_stride, &A::query_head_stride, &A::window});
    }
    using Quantize4 = hb_quantize4_args;
    try_sizes(hb_quantize4, args_with<Quantize4>(7), {&Quantize4::n, &Quantize4::blocksize});
    using Encode4 = hb_encode4_args;
    try_sizes(hb_encode4, args_with<Encode4>(7), {&Encode4::n, &Encode4::blocksize});
    using Search4 = hb_search4_args;
    try_sizes(hb_search4, args_with<Search4>(7), {&Search4::n, &Search4::blocksize});
    using Dequantize4 = hb_dequantize4_args;
    try_sizes(hb_dequantize4, args_with<Dequantize4>(7), {&Dequantize4::n, &Dequantize4::blocksize});
    using Nest = hb_quantize_absmax_args;
    try_sizes(hb_quantize_absmax, args_with<Nest>(7), {&Nest::blocks, &Nest::nested_blocksize});
    using Unnest = hb_dequantize_absmax_args;
    try_sizes(hb_dequantize_absmax, args_with<Unnest>(7), {&Unnest::blocks, &Unnest::nested_blocksize});
    using Quantize8 = hb_quantize8_args;
    try_sizes(hb_quantize8, args_with<Quantize8>(7), {&Quantize8::N, &Quantize8::K});
    using Dequantize8 = hb_dequantize8_args;
    try_sizes(hb_dequantize8, args_with<Dequantize8>(7), {&Dequantize8::N, &Dequantize8::K});
    using Norm = hb_rms_norm_args;
    try_sizes(hb_rms_norm, args_with<Norm>(7), {&Norm::M, &Norm::K});
    using Argmax = hb_argmax_args;
    try_sizes(hb_argmax, args_with<Argmax>(7), {&Argmax::M, &Argmax::K});
    using Swiglu = hb_swiglu_args;
    try_sizes(hb_swiglu, args_with<Swiglu>(7), {&Swiglu::n});
    using Add = hb_add_args;
    try_sizes(hb_add, args_with<Add>(7), {&Add::n});
    using Rotary = hb_rotary_args;
    try_sizes(hb_rotary, args_with<Rotary>(7), {&Rotary::T, &Rotary::H, &Rotary::G, &Rotary::D});
    using Write = hb_cache_write_args;
    try_sizes(hb_cache_write, args_with<Write>(7),
              {&Write::T, &Write::G, &Write::D, &Write::E, &Write::slot_count, &Write::key_row_stride,
               &Write::key_head_stride, &Write::value_row_stride, &Write::value_head_stride});
}

TEST(a_workspace_one_byte_short_is_refused) {
    Valid valid;
    auto linear4 = valid.linear4();
    EXPECT(hb_linear4_workspace(&linear4, &linear4.call.workspace_bytes) == HB_OK, "linear4");
    EXPECT(hb_linear4(&linear4) == HB_OK, "linear4 with what it asked for");
    --linear4.call.workspace_bytes;
    EXPECT(hb_linear4(&linear4) == HB_WORKSPACE_TOO_SMALL, "linear4");
    auto linear4_int8 = valid.linear4_int8();
    EXPECT(hb_linear4_int8_workspace(&linear4_int8, &linear4_int8.call.workspace_bytes) == HB_OK, "linear4_int8");
    EXPECT(hb_linear4_int8(&linear4_int8) == HB_OK, "linear4_int8 with what it asked for");
    --linear4_int8.call.workspace_bytes;
    EXPECT(hb_linear4_int8(&linear4_int8) == HB_WORKSPACE_TOO_SMALL, "linear4_int8");
    EXPECT(hb_linear4_int8_workspace(&linear4_int8, nullptr) == HB_NULL_POINTER, "nowhere to write the size");
    auto experts = valid.linear4_experts();
    EXPECT(hb_linear4_experts_workspace(&experts, &experts.call.workspace_bytes) == HB_OK, "linear4_experts");
    EXPECT(hb_linear4_experts(&experts) == HB_OK, "linear4_experts with what it asked for");
    --experts.call.workspace_bytes;
    EXPECT(hb_linear4_experts(&experts) == HB_WORKSPACE_TOO_SMALL, "linear4_experts");
    EXPECT(hb_linear4_experts_workspace(&experts, nullptr) == HB_NULL_POINTER, "nowhere to write the size");
    auto linear8 = valid.linear8();
    EXPECT(hb_linear8_workspace(&linear8, &linear8.call.workspace_bytes) == HB_OK, "linear8");
    EXPECT(hb_linear8(&linear8) == HB_OK, "linear8 with what it asked for");
    --linear8.call.workspace_bytes;
    EXPECT(hb_linear8(&linear8) == HB_WORKSPACE_TOO_SMALL, "linear8");
    for (const int64_t rule : {HB_OUTLIERS_VALUE, HB_OUTLIERS_BATCH, HB_OUTLIERS_ALL}) {
        auto experts8 = valid.linear8_experts();
        experts8.outlier_rule = rule;
        EXPECT(hb_linear8_experts_workspace(&experts8, &experts8.call.workspace_bytes) == HB_OK, "linear8_experts");
        EXPECT(hb_linear8_experts(&experts8) == HB_OK, "linear8_experts with what it asked for");
        --experts8.call.workspace_bytes;
        EXPECT(hb_linear8_experts(&experts8) == HB_WORKSPACE_TOO_SMALL, "linear8_experts");
        EXPECT(hb_linear8_experts_workspace(&experts8, nullptr) == HB_NULL_POINTER, "nowhere to write the size");
    }
    auto attention = valid.paged_attention();
    EXPECT(hb_paged_attention_workspace(&attention, &attention.call.workspace_bytes) == HB_OK, "attention");
    EXPECT(hb_paged_attention(&attention) == HB_OK, "attention with what it asked for");
    --attention.call.workspace_bytes;
    EXPECT(hb_paged_attention(&attention) == HB_WORKSPACE_TOO_SMALL, "attention");
    EXPECT(hb_paged_attention_workspace(&attention, nullptr) == HB_NULL_POINTER, "nowhere to write the size");
    EXPECT(hb_linear4_workspace(&linear4, nullptr) == HB_NULL_POINTER, "nowhere to write the size");
    EXPECT(hb_linear8_workspace(&linear8, nullptr) == HB_NULL_POINTER, "nowhere to write the size");
}

TEST(empty_tensors_need_no_pointers) {
    auto quantize4 = args_with<hb_quantize4_args>();
    quantize4.blocksize = 64;
    EXPECT(hb_quantize4(&quantize4) == HB_OK, "n = 0");
    auto encode4 = args_with<hb_encode4_args>();
    encode4.blocksize = 64;
    EXPECT(hb_encode4(&encode4) == HB_OK, "n = 0");
    auto search4 = args_with<hb_search4_args>();
    search4.blocksize = 64;
    EXPECT(hb_search4(&search4) == HB_OK, "n = 0");
    auto dequantize4 = args_with<hb_dequantize4_args>();
    dequantize4.blocksize = 64;
    EXPECT(hb_dequantize4(&dequantize4) == HB_OK, "n = 0");
    auto quantize_absmax = args_with<hb_quantize_absmax_args>();
    quantize_absmax.nested_blocksize = 256;
    EXPECT(hb_quantize_absmax(&quantize_absmax) == HB_OK, "B = 0");
    auto dequantize_absmax = args_with<hb_dequantize_absmax_args>();
    dequantize_absmax.nested_blocksize = 256;
    EXPECT(hb_dequantize_absmax(&dequantize_absmax) == HB_OK, "B = 0");
    auto linear4 = args_with<hb_linear4_args>();
    linear4.blocksize = 64;
    linear4.K = 100;
    EXPECT(hb_linear4(&linear4) == HB_OK, "M = N = 0");
    EXPECT(hb_linear4_int8(&linear4) == HB_OK, "M = N = 0");
    auto experts = args_with<hb_linear4_experts_args>();
    experts.blocksize = 64, experts.K = 100, experts.P = 2;
    EXPECT(hb_linear4_experts(&experts) == HB_OK, "M = E = N = 0");
    auto quantize8 = args_with<hb_quantize8_args>();
    EXPECT(hb_quantize8(&quantize8) == HB_OK, "N = K = 0");
    auto dequantize8 = args_with<hb_dequantize8_args>();
    EXPECT(hb_dequantize8(&dequantize8) == HB_OK, "N = K = 0");
    auto linear8 = args_with<hb_linear8_args>();
    linear8.K = 100;
    EXPECT(hb_linear8(&linear8) == HB_OK, "M = N = 0");
    auto rms_norm = args_with<hb_rms_norm_args>();
    rms_norm.M = 7;
    EXPECT(hb_rms_norm(&rms_norm) == HB_OK, "K = 0");
    auto argmax = args_with<hb_argmax_args>();
    argmax.K = 7;
    EXPECT(hb_argmax(&argmax) == HB_OK, "M = 0");
    auto swiglu = args_with<hb_swiglu_args>();
    EXPECT(hb_swiglu(&swiglu) == HB_OK, "n = 0");
    auto attention = args_with<hb_paged_attention_args>();
    attention.H = attention.G = attention.D = attention.E = attention.block_tokens = 1;
    EXPECT(hb_paged_attention(&attention) == HB_OK, "T = S = 0");
}

TEST(every_status_has_a_sentence_and_every_table_a_length) {
    for (hb_status status = -1; status <= HB_STATUS_COUNT; ++status) {
        const char* const text = hb_status_text(status);
        EXPECT(text != nullptr && strlen(text) > 10 && text[strlen(text) - 1] == '.', "status %d", status);
    }
    const int64_t lengths[] = {16, 16, 15, 7, 16, 8, 256, 255, 16, 16, 2};
    std::vector<float> room(256);
    for (int32_t which = 0; which < 11; ++which) {
        EXPECT(hb_table(which, room.data(), lengths[which]) == lengths[which], "table %d", which);
        EXPECT(hb_table(which, room.data(), lengths[which] - 1) == -1, "table %d, too little room", which);
    }
    EXPECT(hb_table(11, room.data(), 256) == -1, "an unknown table");
    EXPECT(hb_table(0, nullptr, 256) == -1, "nowhere to write");
}

namespace {

// A group of two; `spoil` changes the second.
template <typename Args>
void expect_group_refused(hb_status (*entry)(const Args*, int64_t), const Args& valid, void (*spoil)(Args&),
                          hb_status expected, const char* what) {
    Args items[2] = {valid, valid};
    const hb_status before = entry(items, 2);
    EXPECT(before == HB_OK, "%s: the valid group gave %d", what, before);
    spoil(items[1]);
    const hb_status status = entry(items, 2);
    EXPECT(status == expected, "%s gave %d, not %d", what, status, expected);
}

#define GROUP_REFUSED(entry, field_change, expected)                                                                 \
    do {                                                                                                             \
        const std::unique_ptr<Valid> valid(new Valid);                                                               \
        using Args = hb_##entry##_args;                                                                              \
        expect_group_refused<Args>(                                                                                  \
            hb_##entry##_group, valid->entry(), [](Args& a) { field_change; }, expected, #entry ": " #field_change); \
    } while (0)

}  // namespace

TEST(groups_are_refused_where_their_items_do_not_belong_together) {
    GROUP_REFUSED(linear4, a.call.struct_bytes -= 8, HB_BAD_STRUCT);
    GROUP_REFUSED(linear4, a.packed = nullptr, HB_NULL_POINTER);
    GROUP_REFUSED(linear4, a.x_dtype = HB_FLOAT16, HB_BAD_DTYPE);
    GROUP_REFUSED(linear4, a.M = 1, HB_BAD_SHAPE);
    GROUP_REFUSED(linear4, a.K = 20, HB_BAD_SHAPE);
    GROUP_REFUSED(linear4, a.x = a.out, HB_BAD_OPTION);
    GROUP_REFUSED(linear8, a.codes = nullptr, HB_NULL_POINTER);
    GROUP_REFUSED(linear8, a.x = a.out, HB_BAD_OPTION);
    GROUP_REFUSED(linear8, a.threshold = 3, HB_BAD_OPTION);
    GROUP_REFUSED(linear8, a.outlier_rule = HB_OUTLIERS_ALL, HB_BAD_OPTION);
    const std::unique_ptr<Valid> valid(new Valid);
    const auto linear4 = valid->linear4();
    const auto linear8 = valid->linear8();
    int64_t bytes = 0;
    for (const int64_t count : {int64_t{0}, int64_t{-1}, int64_t{HB_MAX_GROUP + 1}, kHuge}) {
        EXPECT(hb_linear4_group(&linear4, count) == HB_BAD_SHAPE, "%lld", static_cast<long long>(count));
        EXPECT(hb_linear8_group(&linear8, count) == HB_BAD_SHAPE, "%lld", static_cast<long long>(count));
        EXPECT(hb_linear4_group_workspace(&linear4, count, &bytes) == HB_BAD_SHAPE, "workspace");
        EXPECT(hb_linear8_group_workspace(&linear8, count, &bytes) == HB_BAD_SHAPE, "workspace");
    }
    EXPECT(hb_linear4_group(nullptr, 2) == HB_NULL_POINTER, "no items");
    EXPECT(hb_linear8_group(nullptr, 2) == HB_NULL_POINTER, "no items");
    EXPECT(hb_linear4_group_workspace(&linear4, 1, nullptr) == HB_NULL_POINTER, "nowhere to write");
}
