"""What benchmarks/cuda_operators.py times: each contender's copy of a weight, the other operators, a cache.

Not here: how it is timed and what becomes of the times.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch

from quant import formats, kv, native
from quant.errors import NativeError

DTYPE: Final = torch.bfloat16
BLOCKSIZE: Final = formats.DEFAULT_BLOCKSIZE
EXPERTS: Final = 8
"""What a weight's rows are shared out to, one row of x each, where products with those of experts are timed."""
OUTLIER_THRESHOLD: Final = 6.0
TORCH: Final = "torch bfloat16"
HEAD_DIM: Final = 128
ROTARY_HEADS: Final = 8
HEADS: Final = (32, 8)
"""Of queries, and of keys and values: Llama 3's."""
BLOCK_TOKENS: Final = 16

Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Weight:
    """One contender's copy of a weight [N, K]."""

    bytes: int
    multiply: Callable[[torch.Tensor], torch.Tensor]
    dense: Callable[[torch.dtype], torch.Tensor]  # what it stands for


def contenders(kernels: native.Kernels, directory: str | None) -> dict[str, Callable[[torch.Tensor], Weight]]:
    """What makes each contender's weight of a dense one."""
    found: dict[str, Callable[[torch.Tensor], Weight]] = {TORCH: dense_weight}
    for each in with_each_kernel(kernels):
        for quant_type, nested in (("nf4", False), ("nf4", True), ("fp4", False)):
            name = f"{quant_type}-dq" if nested else quant_type
            name += "" if each.cuda_kernel == "mma" else f" {each.cuda_kernel}"
            found[name] = lambda w, k=each, q=quant_type, n=nested: four_bit(k, w, q, n)  # type: ignore[misc]
    for outliers, name in (("value", "int8"), ("batch", "int8 by column"), ("all", "int8 weights only")):
        found[name] = lambda w, o=outliers: eight_bit(kernels, w, o)  # type: ignore[misc]
    if directory is not None:
        sys.path.append(directory)
    try:
        importlib.import_module("bitsandbytes")
    except ImportError:
        return found
    for name in ("bitsandbytes nf4", "bitsandbytes nf4-dq", "bitsandbytes int8"):
        found[name] = lambda w, n=name: bitsandbytes_weight(w, n)  # type: ignore[misc]
    return found


def with_each_kernel(kernels: native.Kernels) -> Iterator[native.Kernels]:
    """The library once for each kernel of the 4-bit matmul that this device runs, whatever the environment names."""
    device = "cuda" if kernels.device_type == "cuda" else "cpu"
    nothing = torch.empty(0, 64, dtype=DTYPE, device=device)
    for name in native.CUDA_KERNEL_CODES:
        each = native.Kernels(kernels.library, kernels.device_type, name)
        try:
            four_bit(each, torch.zeros(1, 64, device=device), "nf4", False).multiply(nothing)
        except NativeError as error:
            print(error)
        else:
            yield each


def dense_weight(w: torch.Tensor) -> Weight:
    return Weight(w.nbytes, lambda x: torch.nn.functional.linear(x, w), w.to)


def four_bit(kernels: native.Kernels, w: torch.Tensor, quant_type: str, nested: bool) -> Weight:
    packed, absmax = kernels.quantize_4bit(w, quant_type, BLOCKSIZE)
    stored, nested_absmax, offset = absmax, None, None
    if nested:
        stored, nested_absmax, offset = kernels.quantize_absmax(absmax, formats.NESTED_BLOCKSIZE)
        absmax = kernels.dequantize_absmax(stored, nested_absmax, offset, formats.NESTED_BLOCKSIZE)
    layout = (quant_type, BLOCKSIZE, list(w.shape))
    held = [tensor for tensor in (packed, stored, nested_absmax, offset) if tensor is not None]
    return Weight(
        sum(tensor.nbytes for tensor in held),
        lambda x: kernels.linear_4bit(
            x, packed, stored, *layout, nested_absmax, offset, formats.NESTED_BLOCKSIZE, None
        ),
        lambda dtype: kernels.dequantize_4bit(packed, absmax, *layout, dtype),
    )


def eight_bit(kernels: native.Kernels, w: torch.Tensor, outliers: str) -> Weight:
    CB, SCB = kernels.quantize_8bit(w)
    return Weight(
        CB.nbytes + SCB.nbytes,
        lambda x: kernels.linear_8bit(x, CB, SCB, OUTLIER_THRESHOLD, outliers, None),
        lambda dtype: kernels.dequantize_8bit(CB, SCB, dtype),
    )


def bitsandbytes_weight(w: torch.Tensor, name: str) -> Weight:
    bnb: Any = importlib.import_module("bitsandbytes")
    N, K = w.shape
    if name.endswith("int8"):
        layer = bnb.nn.Linear8bitLt(K, N, bias=False, has_fp16_weights=False, threshold=OUTLIER_THRESHOLD)
    else:
        layer = bnb.nn.Linear4bit(K, N, False, DTYPE, compress_statistics=name.endswith("dq"), quant_type="nf4")
    layer.load_state_dict({"weight": w.cpu()})
    layer = layer.to(w.device).eval()
    return Weight(sum(p.nbytes for p in layer.parameters()), layer, w.to)


def conversions(kernels: native.Kernels, w: torch.Tensor) -> Iterator[tuple[str, int, Call]]:
    """Every operator that is no product with one weight: its name, the bytes that it moves, and a call of it on w."""
    packed, absmax = kernels.quantize_4bit(w, "nf4", BLOCKSIZE)
    codes, nested, offset = kernels.quantize_absmax(absmax, formats.NESTED_BLOCKSIZE)
    CB, SCB = kernels.quantize_8bit(w)
    four, eight, second = packed.nbytes + absmax.nbytes, CB.nbytes + SCB.nbytes, absmax.nbytes + codes.nbytes
    yield "quantize_4bit", w.nbytes + four, lambda: kernels.quantize_4bit(w, "nf4", BLOCKSIZE)[0]
    yield "encode_4bit", w.nbytes + four, lambda: kernels.encode_4bit(w, absmax, "nf4", BLOCKSIZE)
    yield "search_scales_4bit", w.nbytes + absmax.nbytes, lambda: kernels.search_scales_4bit(w, "nf4", BLOCKSIZE)
    shape = list(w.shape)
    unpacked = w.nbytes + four
    yield "dequantize_4bit", unpacked, lambda: kernels.dequantize_4bit(packed, absmax, "nf4", BLOCKSIZE, shape, DTYPE)
    yield "quantize_absmax", second, lambda: kernels.quantize_absmax(absmax, formats.NESTED_BLOCKSIZE)[0]
    nested_size = formats.NESTED_BLOCKSIZE
    yield "dequantize_absmax", second, lambda: kernels.dequantize_absmax(codes, nested, offset, nested_size)
    experts = EXPERTS if w.shape[0] % EXPERTS == 0 and w.numel() // EXPERTS % BLOCKSIZE == 0 else 1
    rows = w.shape[0] // experts
    stack = (packed.view(experts, 1, -1), absmax.view(experts, 1, -1), "nf4", BLOCKSIZE, [rows, w.shape[1]])
    x, ends = torch.ones_like(w[:experts]), torch.arange(1, experts + 1, device=w.device)
    moved = x.nbytes + experts * rows * w.element_size()
    yield "linear_4bit_experts", four + moved, lambda: kernels.linear_4bit_experts(x, ends, *stack, None, None, 1, None)
    stack8 = (CB.view(experts, rows, -1), SCB.view(experts, rows), OUTLIER_THRESHOLD)
    for outliers, name in (("value", "linear_8bit_experts"), ("all", "linear_8bit_experts, weights only")):
        call = functools.partial(kernels.linear_8bit_experts, x, ends, *stack8, outliers, None)
        yield name, eight + moved, call
    yield "quantize_8bit", w.nbytes + eight, lambda: kernels.quantize_8bit(w)[0]
    yield "dequantize_8bit", w.nbytes + eight, lambda: kernels.dequantize_8bit(CB, SCB, DTYPE)
    yield from between_products(kernels, w)


def between_products(kernels: native.Kernels, x: torch.Tensor) -> Iterator[tuple[str, int, Call]]:
    """The small operators, on x as activations."""
    other, weight = torch.randn_like(x), x[0].clone()
    yield "rms_norm", 2 * x.nbytes, lambda: kernels.rms_norm(x, weight, 1e-6)
    yield "swiglu", 3 * x.nbytes, lambda: kernels.swiglu(x, other)
    tokens = x.numel() // (ROTARY_HEADS * HEAD_DIM)
    query = x.flatten()[: tokens * ROTARY_HEADS * HEAD_DIM].view(tokens, ROTARY_HEADS, HEAD_DIM)
    keys, values = (torch.empty_like(query)[:, None] for _ in range(2))
    slots = torch.randperm(tokens, device=x.device)

    def write() -> torch.Tensor:
        kernels.cache_write(query, query, keys, values, slots, None)
        return keys

    yield "cache_write", 4 * query.nbytes, write
    cos, sin = torch.randn(2, tokens, HEAD_DIM, device=x.device).to(x.dtype)
    moved = 2 * query.nbytes + cos.nbytes + sin.nbytes
    # The operator copies what its kernel then turns in place: at the most half of the roof.
    yield "rotary", moved, lambda: kernels.rotary(query, query[:, :0], cos, sin)[0]


@dataclass(frozen=True)
class Cached:
    """Keys and values of some sequences of one length: in blocks in random order, and side by side for torch."""

    keys: torch.Tensor  # [blocks, BLOCK_TOKENS, G, D]
    values: torch.Tensor
    codes: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    """The same in int8: codes of keys, of values, and float32 scales [blocks, BLOCK_TOKENS, G, 2]."""
    tables: torch.Tensor
    offsets: torch.Tensor
    starts: torch.Tensor
    dense: tuple[torch.Tensor, torch.Tensor]  # [S, G, tokens, D]

    @classmethod
    def random(cls, sequences: int, tokens: int, device: torch.device) -> Cached:
        blocks = -(-tokens // BLOCK_TOKENS)
        tables = torch.randperm(sequences * blocks, device=device).view(sequences, blocks)
        shape = (sequences * blocks, BLOCK_TOKENS, HEADS[1], HEAD_DIM)
        stores = [torch.randn(shape, dtype=DTYPE, device=device) for _ in range(2)]
        dense = [store[tables].flatten(1, 2)[:, :tokens].transpose(1, 2).contiguous() for store in stores]
        codes, scales = zip(*(kv.quantize_heads(store) for store in stores), strict=True)
        coded = (codes[0], codes[1], torch.stack(scales, dim=-1))
        rows = torch.arange(sequences + 1, device=device)
        starts = torch.full((sequences,), tokens - 1, device=device)
        return cls(stores[0], stores[1], coded, tables, rows, starts, (dense[0], dense[1]))

    def attend(self, kernels: native.Kernels, query: torch.Tensor, in_int8: bool) -> torch.Tensor:
        """One row a sequence, [S, H, D]."""
        keys, values, scales = self.codes if in_int8 else (self.keys, self.values, None)
        places = (self.tables, self.offsets, self.starts)
        return kernels.paged_attention(query, keys, values, *places, HEAD_DIM**-0.5, 0, 0.0, None, scales)

    def attend_dense(self, query: torch.Tensor) -> torch.Tensor:
        """What torch makes of the same; in float64 where the query is."""
        key, value = (tensor.to(query.dtype) for tensor in self.dense)
        attended = torch.nn.functional.scaled_dot_product_attention(query[:, :, None], key, value, enable_gqa=True)
        return attended[:, :, 0]
