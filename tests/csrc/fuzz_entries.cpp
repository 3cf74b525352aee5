// A libFuzzer target for every entry of libhalfbyte_cpu.so; built by CMakeLists.txt with HALFBYTE_FUZZ=ON and clang.
//
// The input is read as an entry's arguments: sizes and options anywhere from sensible to absurd, tensors of arbitrary
// bytes. Each tensor is allocated at exactly the size that halfbyte.h gives it, worked out here once more, so that
// AddressSanitizer sees one byte too many; one that would be larger than kLargestTensor is passed as null, which the
// entry must refuse. An entry answers with a status that has a sentence, and without success leaves outputs alone.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <initializer_list>
#include <memory>
#include <utility>
#include <vector>

#include "halfbyte.h"

namespace {

constexpr __int128 kLargestTensor = 1 << 16;
constexpr double kMostProducts = 1 << 20;  // of a matmul, to keep a run short
constexpr uint8_t kUntouched = 0xA5;

[[noreturn]] void fail(const char* what) {
    fprintf(stderr, "fuzz_entries: %s\n", what);
    abort();
}

// The input, taken from the front; zeros when it is used up.
class Input {
  public:
    Input(const uint8_t* data, size_t size) : data_(data), left_(size) {}

    void read(void* out, size_t bytes) {
        const size_t there = bytes < left_ ? bytes : left_;
        memset(out, 0, bytes);
        if (there == 0) return;
        memcpy(out, data_, there);
        data_ += there;
        left_ -= there;
    }
    template <typename T>
    T any() {
        T value;
        read(&value, sizeof value);
        return value;
    }
    // Mostly small; sometimes on an edge; sometimes anything.
    int64_t size() {
        static constexpr int64_t edges[] = {
            -1,        1000,     4096, 4097, INT32_MAX, INT32_MIN, 1 << 30, int64_t{1} << 40, int64_t{1} << 47,
            INT64_MAX, INT64_MIN};
        constexpr uint8_t count = sizeof edges / sizeof edges[0];
        const uint8_t kind = any<uint8_t>();
        if (kind < 255 - count) return kind % 130;
        return kind == 255 ? any<int64_t>() : edges[kind - (255 - count)];
    }
    int64_t option(int64_t choices) {
        const uint8_t kind = any<uint8_t>();
        return kind < 240 ? kind % choices : any<int64_t>();
    }
    int64_t blocksize() {
        const uint8_t kind = any<uint8_t>();
        return kind < 240 ? int64_t{32} << kind % 8 : size();
    }

  private:
    const uint8_t* data_;
    size_t left_;
};

// Tensors of one call. Inputs are filled from the input, outputs with a pattern.
class Tensors {
  public:
    explicit Tensors(Input& input) : input_(input) {}

    template <typename T>
    const T* in(__int128 count, __int128 element_bytes) {
        return static_cast<const T*>(make(count, element_bytes, false));
    }
    template <typename T>
    T* out(__int128 count, __int128 element_bytes) {
        return static_cast<T*>(make(count, element_bytes, true));
    }
    void expect_outputs_untouched() const {
        for (const Tensor& tensor : tensors_) {
            for (size_t i = 0; tensor.is_output && i < tensor.bytes; ++i) {
                if (static_cast<const uint8_t*>(tensor.data.get())[i] != kUntouched) fail("a refused call wrote");
            }
        }
    }

  private:
    struct Tensor {
        std::unique_ptr<void, void (*)(void*)> data;
        size_t bytes;
        bool is_output;
    };

    void* make(__int128 count, __int128 element_bytes, bool is_output) {
        if (count < 0 || element_bytes < 1 || count > kLargestTensor || element_bytes > kLargestTensor) return nullptr;
        if (count * element_bytes > kLargestTensor) return nullptr;
        const size_t bytes = static_cast<size_t>(count * element_bytes);
        void* const data = malloc(bytes == 0 ? 1 : bytes);
        tensors_.push_back({{data, free}, bytes, is_output});
        if (is_output) {
            memset(data, kUntouched, bytes);
        } else {
            input_.read(data, bytes);
        }
        return data;
    }

    Input& input_;
    std::vector<Tensor> tensors_;
};

__int128 blocks_of(__int128 count, int64_t blocksize) {
    return blocksize < 1 || count < 0 ? -1 : (count + blocksize - 1) / blocksize;
}

__int128 element_bytes(int64_t dtype) {
    return dtype == HB_FLOAT32 ? 4 : dtype == HB_INT8 ? 1 : 2;
}

template <typename Args>
Args start(Input& input) {
    Args args;
    memset(&args, 0, sizeof args);
    const uint8_t kind = input.any<uint8_t>();
    args.call.struct_bytes = kind < 250 ? static_cast<int64_t>(sizeof args) : input.any<int64_t>();
    args.call.threads = kind % 8 != 7 ? 1 : input.size();
    if (args.call.threads > 4) args.call.threads = HB_MAX_THREADS + 1;  // do not start a thousand
    return args;
}

void judge(hb_status status, const Tensors& tensors) {
    const char* const sentence = hb_status_text(status);
    if (sentence == nullptr || strlen(sentence) < 4) fail("a status without a sentence");
    if (status != HB_OK) tensors.expect_outputs_untouched();
}

// Workspace of exactly what the entry asks for, or a byte less, or nowhere. An entry of `products` steps that would
// take too long is not run.
template <typename Args>
void run_with_workspace(Input& input, Args& args, Tensors& tensors, hb_status (*ask)(const Args*, int64_t*),
                        hb_status (*entry)(const Args*), bool has_work, double products) {
    int64_t bytes = -1;
    const hb_status asked = ask(&args, &bytes);
    if (asked == HB_OK && bytes < 0) fail("a negative workspace");
    void* workspace = nullptr;
    if (asked == HB_OK && bytes > 0 && bytes < (1 << 24)) {
        const int64_t rounded = (bytes + HB_WORKSPACE_ALIGNMENT - 1) / HB_WORKSPACE_ALIGNMENT * HB_WORKSPACE_ALIGNMENT;
        workspace = aligned_alloc(HB_WORKSPACE_ALIGNMENT, static_cast<size_t>(rounded));
        memset(workspace, 0xFF, static_cast<size_t>(rounded));
        const bool is_short = input.any<uint8_t>() == 7;
        args.call.workspace = workspace;
        args.call.workspace_bytes = bytes - (is_short ? 1 : 0);
        if (is_short && entry(&args) == HB_OK && has_work) fail("too small a workspace was accepted");
        args.call.workspace_bytes = bytes;
    }
    if (products < kMostProducts || args.out == nullptr) judge(entry(&args), tensors);
    free(workspace);
}

template <typename Args>
double products_of(const Args& args) {
    return static_cast<double>(args.M) * static_cast<double>(args.N) * (static_cast<double>(args.K) / 16 + 1);
}

void fuzz_quantize4(Input& input) {
    Tensors tensors(input);
    auto args = start<hb_quantize4_args>(input);
    args.x_dtype = input.option(3), args.n = input.size(), args.format = input.option(3);
    args.blocksize = input.blocksize();
    args.x = tensors.in<void>(args.n, element_bytes(args.x_dtype));
    args.packed = tensors.out<uint8_t>((static_cast<__int128>(args.n) + 1) / 2, 1);
    args.absmax = tensors.out<float>(blocks_of(args.n, args.blocksize), 4);
    judge(hb_quantize4(&args), tensors);
}

void fuzz_encode4(Input& input) {
    Tensors tensors(input);
    auto args = start<hb_encode4_args>(input);
    args.x_dtype = input.option(3), args.n = input.size(), args.format = input.option(2);
    args.blocksize = input.blocksize();
    args.x = tensors.in<void>(args.n, element_bytes(args.x_dtype));
    args.scales = tensors.in<float>(blocks_of(args.n, args.blocksize), 4);
    args.packed = tensors.out<uint8_t>((static_cast<__int128>(args.n) + 1) / 2, 1);
    judge(hb_encode4(&args), tensors);
}

void fuzz_search4(Input& input) {
    Tensors tensors(input);
    auto args = start<hb_search4_args>(input);
    args.x_dtype = input.option(3), args.n = input.size(), args.format = input.option(2);
    args.blocksize = input.blocksize();
    args.x = tensors.in<void>(args.n, element_bytes(args.x_dtype));
    args.scales = tensors.out<float>(blocks_of(args.n, args.blocksize), 4);
    judge(hb_search4(&args), tensors);
}

void fuzz_dequantize4(Input& input) {
    Tensors tensors(input);
    auto args = start<hb_dequantize4_args>(input);
    args.out_dtype = input.option(3), args.n = input.size(), args.format = input.option(3);
    args.blocksize = input.blocksize();
    args.packed = tensors.in<uint8_t>((static_cast<__int128>(args.n) + 1) / 2, 1);
    args.absmax = tensors.in<float>(blocks_of(args.n, args.blocksize), 4);
    args.out = tensors.out<void>(args.n, element_bytes(args.out_dtype));
    judge(hb_dequantize4(&args), tensors);
}

void fuzz_quantize_absmax(Input& input) {
    Tensors tensors(input);
    auto args = start<hb_quantize_absmax_args>(input);
    args.blocks = input.size(), args.nested_blocksize = input.size();
    args.offset = tensors.in<float>(1, 4);
    args.absmax = tensors.in<float>(args.blocks, 4);
    args.codes = tensors.out<uint8_t>(args.blocks, 1);
    args.nested_absmax = tensors.out<float>(blocks_of(args.blocks, args.nested_blocksize), 4);
    judge(hb_quantize_absmax(&args), tensors);
}

void fuzz_dequantize_absmax(Input& input) {
    Tensors tensors(input);
    auto args = start<hb_dequantize_absmax_args>(input);
    args.blocks = input.size(), args.nested_blocksize = input.size();
    args.offset = tensors.in<float>(1, 4);
    args.nested_absmax = tensors.in<float>(blocks_of(args.blocks, args.nested_blocksize), 4);
    args.codes = tensors.in<uint8_t>(args.blocks, 1);
    args.absmax = tensors.out<float>(args.blocks, 4);
    judge(hb_dequantize_absmax(&args), tensors);
}

void fuzz_linear4_with(Input& input, hb_status (*ask)(const hb_linear4_args*, int64_t*),
                       hb_status (*entry)(const hb_linear4_args*)) {
    Tensors tensors(input);
    auto args = start<hb_linear4_args>(input);
    args.x_dtype = input.option(3), args.M = input.size(), args.N = input.size(), args.K = input.size();
    args.format = input.option(2), args.blocksize = input.blocksize();
    const __int128 count = static_cast<__int128>(args.N) * args.K;
    const __int128 blocks = blocks_of(args.N < 0 || args.K < 0 ? -1 : count, args.blocksize);
    const bool is_nested = input.any<uint8_t>() % 2 == 1;
    if (is_nested) {
        args.nested_blocksize = input.size();
        args.offset = tensors.in<float>(1, 4);
        const bool fits = blocks >= 0 && blocks <= kLargestTensor;
        args.nested_absmax = tensors.in<float>(fits ? blocks_of(blocks, args.nested_blocksize) : -1, 4);
    }
    // Without nested_absmax the entry reads absmax as float32, whatever was meant.
    args.absmax = tensors.in<void>(blocks, args.nested_absmax != nullptr ? 1 : 4);
    if (args.nested_absmax == nullptr) args.offset = nullptr;
    args.packed = tensors.in<uint8_t>((count + 1) / 2, 1);
    args.x = tensors.in<void>(args.M < 0 ? -1 : static_cast<__int128>(args.M) * args.K, element_bytes(args.x_dtype));
    if (input.any<uint8_t>() % 2 == 1) {
        args.bias_dtype = input.option(3);
        args.bias = tensors.in<void>(args.N, element_bytes(args.bias_dtype));
    }
    args.out = tensors.out<void>(args.M < 0 ? -1 : static_cast<__int128>(args.M) * args.N, element_bytes(args.x_dtype));
    run_with_workspace(input, args, tensors, ask, entry, args.M > 0 && args.N > 0, products_of(args));
}

void fuzz_linear4(Input& input) {
    fuzz_linear4_with(input, hb_linear4_workspace, hb_linear4);
}

void fuzz_linear4_int8(Input& input) {
    fuzz_linear4_with(input, hb_linear4_int8_workspace, hb_linear4_int8);
}

// Whether there are so few experts that their ends can be made.
bool has_ends(int64_t experts) {
    return experts >= 0 && experts <= 64;
}

// The ends of args.E experts' rows, which mostly lie where they can, else nothing would get past the checks; and M.
template <typename Args>
std::vector<int64_t> spread_rows(Input& input, Args* args) {
    const bool few = has_ends(args->E);
    std::vector<int64_t> ends;
    int64_t rows = 0;
    for (int64_t e = 0; few && e < args->E; ++e) {
        rows += input.any<uint8_t>() % 5;
        ends.push_back(input.any<uint8_t>() < 250 ? rows : input.any<int64_t>());
    }
    args->ends = few ? ends.data() : nullptr;
    args->M = input.any<uint8_t>() < 240 ? rows + input.any<uint8_t>() % 3 : input.size();
    return ends;
}

// The product of two sizes of a tensor, or -1 where it cannot be had.
__int128 product(__int128 a, __int128 b) {
    return a < 0 || b < 0 || b > kLargestTensor ? -1 : a * b;
}

void fuzz_linear4_experts(Input& input) {
    Tensors tensors(input);
    auto args = start<hb_linear4_experts_args>(input);
    args.x_dtype = input.option(3), args.E = input.option(9), args.P = input.option(3), args.N = input.size();
    args.K = input.size(), args.format = input.option(2), args.blocksize = input.blocksize();
    const std::vector<int64_t> ends = spread_rows(input, &args);
    const bool few = has_ends(args.E);
    const __int128 matrices = args.P < 0 || args.P > 64 || !few ? -1 : args.E * args.P;
    const __int128 count = args.N < 0 || args.K < 0 ? -1 : static_cast<__int128>(args.N) * args.K;
    const __int128 blocks = blocks_of(count, args.blocksize);
    const uint8_t padding = input.any<uint8_t>();
    args.packed_bytes = padding < 250 ? static_cast<int64_t>((count + 1) / 2) + padding % 3 : input.size();
    args.packed = tensors.in<uint8_t>(product(matrices, args.packed_bytes), 1);
    if (input.any<uint8_t>() % 2 == 1) {
        args.nested_blocksize = input.size();
        args.offset = tensors.in<float>(matrices, 4);
        const bool fits = blocks >= 0 && blocks <= kLargestTensor;
        const __int128 outer = fits ? blocks_of(blocks, args.nested_blocksize) : -1;
        args.nested_absmax = tensors.in<float>(product(matrices, outer), 4);
    }
    // Without nested_absmax the entry reads absmax as float32, whatever was meant.
    args.absmax = tensors.in<void>(product(matrices, blocks), args.nested_absmax != nullptr ? 1 : 4);
    args.x = tensors.in<void>(product(args.M, args.K), element_bytes(args.x_dtype));
    if (input.any<uint8_t>() % 2 == 1) {
        args.bias_dtype = input.option(3);
        args.bias = tensors.in<void>(product(matrices, args.N), element_bytes(args.bias_dtype));
    }
    args.out = tensors.out<void>(product(product(args.M, args.P), args.N), element_bytes(args.x_dtype));
    run_with_workspace(input, args, tensors, hb_linear4_experts_workspace, hb_linear4_experts, args.M > 0 && args.N > 0,
                       products_of(args) * static_cast<double>(args.P));
}

void fuzz_quantize8(Input& input) {
    Tensors tensors(input);
    auto args = start<hb_quantize8_args>(input);
    args.w_dtype = input.option(3), args.N = input.size(), args.K = input.size();
    const __int128 count = args.N < 0 ? -1 : static_cast<__int128>(args.N) * args.K;
    args.w = tensors.in<void>(count, element_bytes(args.w_dtype));
    args.codes = tensors.out<int8_t>(count, 1);
    args.absmax = tensors.out<float>(args.N, 4);
    judge(hb_quantize8(&args), tensors);
}

void fuzz_dequantize8(Input& input) {
    Tensors tensors(input);
    auto args = start<hb_dequantize8_args>(input);
    args.out_dtype = input.option(3), args.N = input.size(), args.K = input.size();
    const __int128 count = args.N < 0 ? -1 : static_cast<__int128>(args.N) * args.K;
    args.codes = tensors.in<int8_t>(count, 1);
    args.absmax = tensors.in<float>(args.N, 4);
    args.out = tensors.out<void>(count, element_bytes(args.out_dtype));
    judge(hb_dequantize8(&args), tensors);
}

void fuzz_linear8(Input& input) {
    Tensors tensors(input);
    auto args = start<hb_linear8_args>(input);
    args.x_dtype = input.option(3), args.M = input.size(), args.N = input.size(), args.K = input.size();
    args.outlier_rule = input.option(3);
    args.threshold = input.any<uint8_t>() % 4 == 0 ? input.any<double>() : input.any<uint8_t>() / 32.0;
    args.codes = tensors.in<int8_t>(args.N < 0 ? -1 : static_cast<__int128>(args.N) * args.K, 1);
    args.absmax = tensors.in<float>(args.N, 4);
    args.x = tensors.in<void>(args.M < 0 ? -1 : static_cast<__int128>(args.M) * args.K, element_bytes(args.x_dtype));
    if (input.any<uint8_t>() % 2 == 1) {
        args.bias_dtype = input.option(3);
        args.bias = tensors.in<void>(args.N, element_bytes(args.bias_dtype));
    }
    args.out = tensors.out<void>(args.M < 0 ? -1 : static_cast<__int128>(args.M) * args.N, element_bytes(args.x_dtype));
    run_with_workspace(input, args, tensors, hb_linear8_workspace, hb_linear8, args.M > 0 && args.N > 0,
                       products_of(args));
}

void fuzz_linear8_experts(Input& input) {
    Tensors tensors(input);
    auto args = start<hb_linear8_experts_args>(input);
    args.x_dtype = input.option(3), args.E = input.option(9), args.N = input.size(), args.K = input.size();
    args.outlier_rule = input.option(3);
    args.threshold = input.any<uint8_t>() % 4 == 0 ? input.any<double>() : input.any<uint8_t>() / 32.0;
    const std::vector<int64_t> ends = spread_rows(input, &args);
    const __int128 experts = has_ends(args.E) ? args.E : -1;
    args.codes = tensors.in<int8_t>(product(product(experts, args.N), args.K), 1);
    args.absmax = tensors.in<float>(product(experts, args.N), 4);
    args.x = tensors.in<void>(product(args.M, args.K), element_bytes(args.x_dtype));
    if (input.any<uint8_t>() % 2 == 1) {
        args.bias_dtype = input.option(3);
        args.bias = tensors.in<void>(product(experts, args.N), element_bytes(args.bias_dtype));
    }
    args.out = tensors.out<void>(product(args.M, args.N), element_bytes(args.x_dtype));
    run_with_workspace(input, args, tensors, hb_linear8_experts_workspace, hb_linear8_experts, args.M > 0 && args.N > 0,
                       products_of(args));
}

// Tables that mostly name blocks of the cache, and rows that mostly add up; else nothing would get past the checks.
void fuzz_paged_attention(Input& input) {
    Tensors tensors(input);
    auto args = start<hb_paged_attention_args>(input);
    args.dtype = input.option(3), args.store_dtype = input.option(4), args.D = input.size(), args.E = input.size();
    args.G = input.any<uint8_t>() < 240 ? input.any<uint8_t>() % 4 + 1 : input.size();
    args.H = args.G > 0 && args.G < 9 ? args.G * (input.any<uint8_t>() % 4) : input.size();
    args.S = input.option(4), args.blocks = input.size(), args.block_tokens = input.option(33);
    args.max_blocks = input.option(9), args.window = input.size() % 40, args.scale = input.any<uint8_t>() / 64.0;
    args.softcap = input.any<uint8_t>() % 2 == 1 ? 3.0 : 0.0;
    const bool few = args.S >= 0 && args.S <= 64 && args.max_blocks >= 0 && args.max_blocks <= 64;
    std::vector<int64_t> tables(few ? static_cast<size_t>(args.S * args.max_blocks) : 0), offsets = {0}, starts;
    for (int64_t& block : tables) block = input.any<uint8_t>() < 250 ? input.any<uint8_t>() % 3 : input.any<int64_t>();
    for (int64_t s = 0; few && s < args.S; ++s) {
        offsets.push_back(offsets.back() +
                          (input.any<uint8_t>() < 250 ? input.any<uint8_t>() % 9 : input.size()) % 500);
        starts.push_back(input.any<uint8_t>() < 250 ? input.any<uint8_t>() % 70 : input.any<int64_t>());
    }
    args.T = input.any<uint8_t>() < 250 ? offsets.back() : input.size();
    args.tables = tables.data(), args.offsets = offsets.data(), args.starts = starts.data();
    if (!few) args.tables = args.offsets = args.starts = nullptr;
    args.query_head_stride = input.any<uint8_t>() < 200 ? args.D : input.size();
    const bool is_small =
        args.H >= 0 && args.H <= 4096 && args.query_head_stride >= 0 && args.query_head_stride <= 4096;
    const bool is_packed = is_small && input.any<uint8_t>() < 200;
    args.query_row_stride = is_packed ? args.query_head_stride * args.H : input.size();
    const __int128 bytes = element_bytes(args.dtype);
    const auto product = [](std::initializer_list<int64_t> sizes) {
        __int128 count = 1;
        for (const int64_t size : sizes) {
            count = size < 0 || count < 0 || count > kLargestTensor ? -1 : count * size;
        }
        return count;
    };
    __int128 reach = args.D;
    for (const auto& [count, stride] : {std::pair(args.T, args.query_row_stride), {args.H, args.query_head_stride}}) {
        reach = count < 1 || stride < 0 ? -1 : reach + (static_cast<__int128>(count) - 1) * stride;
        if (reach < 0 || reach > kLargestTensor) break;
    }
    args.query = tensors.in<void>(args.D < 0 || args.T == 0 ? 0 : reach, bytes);
    const __int128 store_bytes = element_bytes(args.store_dtype);
    args.keys = tensors.in<void>(product({args.blocks, args.block_tokens, args.G, args.D}), store_bytes);
    args.values = tensors.in<void>(product({args.blocks, args.block_tokens, args.G, args.E}), store_bytes);
    if (args.store_dtype == HB_INT8) {
        args.scales = tensors.in<float>(product({args.blocks, args.block_tokens, args.G, 2}), 4);
    }
    if (input.any<uint8_t>() % 2 == 1) {
        args.sinks_dtype = input.option(3);
        args.sinks = tensors.in<void>(args.H, element_bytes(args.sinks_dtype));
    }
    args.out = tensors.out<void>(product({args.T, args.H, args.E}), bytes);
    const double steps =
        70.0 * static_cast<double>(args.T) * static_cast<double>(args.H) * (static_cast<double>(args.D) + 1) / 16;
    run_with_workspace(input, args, tensors, hb_paged_attention_workspace, hb_paged_attention, args.T > 0, steps);
}

void fuzz_rms_norm(Input& input) {
    Tensors tensors(input);
    auto args = start<hb_rms_norm_args>(input);
    args.dtype = input.option(3), args.M = input.size(), args.K = input.size();
    args.eps = input.any<uint8_t>() % 4 == 0 ? input.any<double>() : 1e-6;
    const __int128 count = args.M < 0 ? -1 : static_cast<__int128>(args.M) * args.K;
    args.x = tensors.in<void>(count, element_bytes(args.dtype));
    args.weight = tensors.in<void>(args.K, element_bytes(args.dtype));
    args.out = tensors.out<void>(count, element_bytes(args.dtype));
    judge(hb_rms_norm(&args), tensors);
}

void fuzz_argmax(Input& input) {
    Tensors tensors(input);
    auto args = start<hb_argmax_args>(input);
    args.dtype = input.option(3), args.M = input.size(), args.K = input.size();
    const __int128 count = args.M < 0 ? -1 : static_cast<__int128>(args.M) * args.K;
    args.x = tensors.in<void>(count, element_bytes(args.dtype));
    args.out = tensors.out<int64_t>(args.M, sizeof *args.out);
    judge(hb_argmax(&args), tensors);
}

void fuzz_swiglu(Input& input) {
    Tensors tensors(input);
    auto args = start<hb_swiglu_args>(input);
    args.dtype = input.option(3), args.n = input.size();
    args.gate = tensors.in<void>(args.n, element_bytes(args.dtype));
    args.up = tensors.in<void>(args.n, element_bytes(args.dtype));
    args.out = tensors.out<void>(args.n, element_bytes(args.dtype));
    judge(hb_swiglu(&args), tensors);
}

void fuzz_rotary(Input& input) {
    Tensors tensors(input);
    auto args = start<hb_rotary_args>(input);
    args.dtype = input.option(3), args.T = input.size(), args.H = input.size(), args.G = input.size();
    args.D = input.size();
    const __int128 rows = product(args.T, args.D);
    args.query = tensors.out<void>(product(rows, args.H), element_bytes(args.dtype));
    args.key = tensors.out<void>(product(rows, args.G), element_bytes(args.dtype));
    args.cos = tensors.in<void>(rows, element_bytes(args.dtype));
    args.sin = tensors.in<void>(rows, element_bytes(args.dtype));
    judge(hb_rotary(&args), tensors);
}

void fuzz_add(Input& input) {
    Tensors tensors(input);
    auto args = start<hb_add_args>(input);
    args.dtype = input.option(3), args.n = input.size();
    args.a = tensors.in<void>(args.n, element_bytes(args.dtype));
    args.b = tensors.in<void>(args.n, element_bytes(args.dtype));
    args.out = tensors.out<void>(args.n, element_bytes(args.dtype));
    judge(hb_add(&args), tensors);
}

// Slots of all kinds; strides that leave room between heads and rows.
void fuzz_cache_write(Input& input) {
    Tensors tensors(input);
    auto args = start<hb_cache_write_args>(input);
    args.dtype = input.option(3), args.store_dtype = input.option(4), args.T = input.size(), args.G = input.size();
    args.D = input.size(), args.E = input.size(), args.slot_count = input.size();
    const bool is_small = args.T >= 0 && args.T <= 4096;
    std::vector<int64_t> slots(is_small ? static_cast<size_t>(args.T) : 0);
    int64_t next = 0;
    for (int64_t& slot : slots) slot = input.any<uint8_t>() < 200 ? next++ : -1 - input.any<uint8_t>();
    args.slots = is_small ? slots.data() : nullptr;
    const auto rows = [&](int64_t size, int64_t& row_stride, int64_t& head_stride) {
        const int64_t gap = input.any<uint8_t>() % 3;
        head_stride = size < 0 || size > kLargestTensor ? input.size() : size + gap;
        const __int128 row = static_cast<__int128>(head_stride) * args.G;
        row_stride = row < 0 || row > kLargestTensor ? input.size() : static_cast<int64_t>(row) + gap;
        const bool counts = args.T >= 0 && args.G >= 0 && size >= 0 && row >= 0 && row <= kLargestTensor;
        return counts ? static_cast<__int128>(args.T) * row_stride + 1 : __int128{-1};
    };
    const auto cache = [&](int64_t size) {
        const bool counts = args.slot_count >= 0 && args.G >= 0 && size >= 0;
        const __int128 heads = static_cast<__int128>(args.G) * size;
        return !counts || heads > kLargestTensor ? __int128{-1} : heads * args.slot_count;
    };
    const int64_t bytes = element_bytes(args.dtype);
    args.key = tensors.in<void>(rows(args.D, args.key_row_stride, args.key_head_stride), bytes);
    args.value = tensors.in<void>(rows(args.E, args.value_row_stride, args.value_head_stride), bytes);
    const int64_t store_bytes = element_bytes(args.store_dtype);
    args.keys = tensors.out<void>(cache(args.D), store_bytes);
    args.values = tensors.out<void>(cache(args.E), store_bytes);
    if (args.store_dtype == HB_INT8) args.scales = tensors.out<float>(cache(2), 4);
    judge(hb_cache_write(&args), tensors);
}

void fuzz_table(Input& input) {
    const int32_t which = input.any<int32_t>() % 16;
    const int64_t room = input.any<uint16_t>() % 300 - 10;
    std::vector<float> out(static_cast<size_t>(room < 0 ? 0 : room));
    const int64_t length = hb_table(which, out.data(), room);
    if (length != -1 && (length < 1 || length > room)) fail("hb_table answered an impossible length");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static constexpr void (*kEntries[])(Input&) = {
        fuzz_quantize4,   fuzz_encode4,         fuzz_search4,
        fuzz_dequantize4, fuzz_quantize_absmax, fuzz_dequantize_absmax,
        fuzz_linear4,     fuzz_quantize8,       fuzz_dequantize8,
        fuzz_linear8,     fuzz_table,           fuzz_paged_attention,
        fuzz_rms_norm,    fuzz_argmax,          fuzz_swiglu,
        fuzz_rotary,      fuzz_linear4_int8,    fuzz_add,
        fuzz_cache_write, fuzz_linear4_experts, fuzz_linear8_experts,
    };
    Input input(data, size);
    kEntries[input.any<uint8_t>() % (sizeof kEntries / sizeof kEntries[0])](input);
    return 0;
}
