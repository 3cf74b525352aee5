"""Norms, gated products, rotary embeddings, rows for a cache: kernels, references, torch's own, direct calls."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from quant import direct_rows, native, ops, reference
from quant.errors import ShapeError
from tests.quant import operands
from tests.quant.test_native import device  # noqa: F401

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1,), (3, 16), (2, 3, 33), (5, 511), (1, 1, 2048), (70, 1030), (0, 8), (4, 0)]
LAST_BITS = 4
"""What a float32 result may differ by, in steps of its size: a sum in another order, an exponential, two roundings."""


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Within LAST_BITS in float32; in 16 bits two, and that in few values: both operators round twice, and where the
    first falls the other way, the second may too.

    One value of 30,000 turns, but not each by itself: a row shares its norm, and where that is a number of few bits,
    many of its products lie half way between two results. Rounding once instead of twice turns a fifth of all values.
    """
    bits = LAST_BITS if found.dtype == torch.float32 else 2
    is_near = (found - expected).abs().double() <= bits * torch.finfo(found.dtype).eps * expected.abs().double()
    turned = (found != expected).sum().item()
    return bool(is_near.all()) and (found.dtype == torch.float32 or turned <= 4 + found.numel() / 10)


@pytest.fixture
def generator() -> torch.Generator:
    return operands.fresh_generator()


@pytest.fixture(scope="module")
def of_the_cpu() -> native.Kernels:
    """The CPU library, whatever stands in its place in a test."""
    return native.Kernels(native.load_library(native.library_path("cpu")), "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_device_has_the_cpus_bits(
    device: str,  # noqa: F811
    of_the_cpu: native.Kernels,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    """Sums in its order, and values of every size. 4113 values of a row are more than a block keeps at a time."""
    for shape in [*SHAPES[:4], (3, 130), (2, 4113), *SHAPES[-2:]]:
        x = torch.randn(shape, generator=generator).to(dtype)
        hostile = operands.hostile_values(shape, dtype, generator)
        weight = torch.randn(shape[-1], generator=generator).to(dtype)
        for values in (x, hostile):
            found = ops.rms_norm(values.to(device), weight.to(device), 1e-5)
            assert operands.same_bits(found.cpu(), of_the_cpu.rms_norm(values, weight, 1e-5)), shape
            for gate in (values, values * 90):
                found = ops.swiglu(gate.to(device), x.to(device))
                assert operands.same_bits(found.cpu(), of_the_cpu.swiglu(gate, x)), shape
    odd = torch.randn(70, generator=generator).to(dtype)
    for first in (1, 4, 8):  # whole pieces of 16 bytes, and none
        found = ops.swiglu(odd.to(device)[first:], odd.to(device)[first:])
        assert operands.same_bits(found.cpu(), of_the_cpu.swiglu(odd[first:], odd[first:]))
        for second in (odd[first:], operands.hostile_values((70 - first,), dtype, generator)):
            assert operands.same_bits(sum_on(device, odd[first:], second), odd[first:] + second)
    assert sum_on(device, odd[:0], odd[:0]).shape == (0,)
    for T, H, G, D in [(1, 1, 1, 2), (5, 6, 3, 34), (2, 9, 2, 130), (0, 2, 2, 8)]:
        shapes = [(T, H, D), (T, G, D), (T, D), (T, D)]
        turned = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        found = ops.rotary(*(tensor.to(device) for tensor in turned))
        for one, expected in zip(found, of_the_cpu.rotary(*turned), strict=True):
            assert operands.same_bits(one.cpu(), expected), (T, H, G, D)


def sum_on(device: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:  # noqa: F811
    """hb_add in place of its first operand; no operator has it but the chains of quant/chain.py."""
    total, other = a.to(device, copy=True), b.to(device)
    fields = {"dtype": native.DTYPE_CODES[a.dtype], "n": a.numel()}
    native.kernels(device).call("hb_add", total.device, a=total, b=other, **fields, out=total)
    return total.cpu()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_is_llamas(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> None:
    x = (torch.randn(shape, generator=generator) * 3).to(dtype)
    module = LlamaRMSNorm(shape[-1], 1e-5).to(dtype)
    module.weight.data = weight = torch.randn(shape[-1], generator=generator).to(dtype)
    found = ops.rms_norm(x, weight, 1e-5)
    assert found.shape == x.shape
    assert near(found, module(x).detach())
    assert near(found, reference.rms_norm(x, weight, 1e-5))
    with torch.no_grad():
        assert operands.same_bits(direct_rows.rms_norm(x, weight, 1e-5), found)
        spread = torch.stack([x, x], dim=-1)[..., 0]
        assert operands.same_bits(direct_rows.rms_norm(spread, weight, 1e-5), found)
    if x.dim() > 1 and x.numel():
        assert operands.same_bits(ops.rms_norm(x[-1:], weight, 1e-5), found[-1:]), "a row on its own"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_argmax_is_torchs(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> None:
    """Of few values, so that equals are many; and of all bits that there are."""
    few = torch.randint(-3, 3, shape, generator=generator).to(dtype)
    hostile = operands.hostile_values(shape, dtype, generator)
    values = torch.randn(shape, generator=generator).to(dtype)
    for x in (few, -few.abs(), values, hostile, values * torch.where(values > 2, torch.nan, 1)):
        found = ops.argmax(x)
        assert torch.equal(found, reference.argmax(x)), x
        if shape[-1]:
            greatest, places = x.max(dim=-1)
            assert torch.equal(found, torch.where(greatest.isfinite(), places, -1))
        with torch.no_grad():
            assert torch.equal(direct_rows.argmax(x), found)
            assert torch.equal(direct_rows.argmax(torch.stack([x, x], dim=-1)[..., 0]), found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_argmax_knows_every_number_of_16_bits(dtype: torch.dtype) -> None:
    """Beside a number that is just smaller, as great or just greater."""
    bits = torch.arange(1 << 16).to(torch.int16).view(dtype)
    for other in (bits, bits.roll(1), bits.roll(-1), -bits):
        x = torch.stack([other, bits], dim=1)
        assert torch.equal(ops.argmax(x), reference.argmax(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu_is_torchs(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> None:
    gate, up = ((torch.randn(shape, generator=generator) * size).to(dtype) for size in (6, 1))
    found = ops.swiglu(gate, up)
    assert found.shape == gate.shape
    assert near(found, F.silu(gate) * up)
    assert near(found, reference.swiglu(gate, up))
    with torch.no_grad():
        assert operands.same_bits(direct_rows.swiglu(gate, up), found)
        spread = torch.stack([up, up], dim=-1)[..., 0]
        assert operands.same_bits(direct_rows.swiglu(gate, spread), found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 2), (3, 4, 2, 6), (5, 6, 6, 34), (2, 32, 4, 64), (40, 3, 1, 130), (0, 2, 2, 8)]
)
def test_rotary_is_llamas_bit_for_bit(
    shape: tuple[int, int, int, int], dtype: torch.dtype, generator: torch.Generator
) -> None:
    T, H, G, D = shape
    query, key = (torch.randn(T, heads, D, generator=generator).to(dtype) for heads in (H, G))
    cos, sin = (torch.randn(T, D, generator=generator).to(dtype) for _ in range(2))
    heads_first = [tensor.transpose(0, 1)[None] for tensor in (query, key)]
    expected = [turned[0].transpose(0, 1) for turned in apply_rotary_pos_emb(*heads_first, cos[None], sin[None])]
    found, by_reference = ops.rotary(query, key, cos, sin), reference.rotary(query, key, cos, sin)
    for which, before in enumerate((query, key)):
        assert operands.same_bits(found[which], expected[which].contiguous())
        assert operands.same_bits(by_reference[which], found[which])
        assert found[which].data_ptr() != before.data_ptr() or not before.numel()
    spread = torch.stack([query, query], dim=-1)[..., 0]
    assert operands.same_bits(ops.rotary(spread, key, cos, sin)[0], found[0])
    direct_rows.rotate(query, key, cos, sin)
    assert operands.same_bits(query, found[0])
    assert operands.same_bits(key, found[1])


def test_rotation_in_place_refuses_what_it_cannot_turn() -> None:
    query, key, angles = torch.ones(3, 4, 6), torch.ones(3, 2, 6), torch.ones(3, 6)
    with pytest.raises(ShapeError, match="query and key must be contiguous"):
        direct_rows.rotate(query.transpose(0, 1).contiguous().transpose(0, 1), key, angles, angles)
    with pytest.raises(ShapeError, match=r"key has shape \[3, 2, 4\]; \[3, heads, 6\]"):
        direct_rows.rotate(query, key[..., :4].contiguous(), angles, angles)
    with pytest.raises(ShapeError, match=r"sin has shape \[2, 6\]; \[3, 6\]"):
        direct_rows.rotate(query, key, angles, angles[1:])
    with pytest.raises(ShapeError, match="cos has dtype torch.float16"):
        direct_rows.rotate(query, key, angles.half(), angles)
    with pytest.raises(ShapeError, match="sin is on meta"):
        direct_rows.rotate(query, key, angles, angles.to("meta"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 2, 6, 5), (130, 4, 64, 64), (0, 2, 4, 4)])
def test_cache_rows_go_to_their_slots(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, generator: torch.Generator
) -> None:
    T, G, D, E = sizes
    key, value = (torch.randn(T, G, size, generator=generator).to(dtype) for size in (D, E))
    stores = [torch.randn(T + 2, 2, G, size, generator=generator).to(dtype) for size in (D, E)]
    slots = torch.randperm(2 * T + 4, generator=generator)[:T]
    if T > 2:
        slots[0], slots[1] = -1, 2 * T + 4  # in no block: left out
    expected = [store.clone() for store in stores]
    for t, slot in enumerate(slots.tolist()):
        if 0 <= slot < 2 * T + 4:
            for store, rows in zip(expected, (key, value), strict=True):
                store.view(-1, *store.shape[2:])[slot] = rows[t]
    spread = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (key, value)]
    for write in (ops.cache_write, reference.cache_write, direct_rows.cache_write):
        for rows in ((key, value), spread):
            found = [store.clone() for store in stores]
            write(*rows, *found, slots)
            assert all(map(operands.same_bits, found, expected)), write


def test_threads_change_nothing(generator: torch.Generator) -> None:
    x, weight = torch.randn(200, 1030, generator=generator), torch.randn(1030, generator=generator)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append((direct_rows.rms_norm(x, weight, 1e-5), direct_rows.swiglu(x, x)))
    finally:
        torch.set_num_threads(threads)
    assert all(operands.same_bits(one, three) for one, three in zip(*found, strict=True))


def test_direct_calls_refuse_what_the_operators_refuse() -> None:
    x, weight = torch.ones(2, 8), torch.ones(8)
    with pytest.raises(ShapeError, match=r"weight has shape \[7\]"):
        direct_rows.rms_norm(x, weight[:7], 1e-5)
    with pytest.raises(ShapeError, match="weight has dtype torch.float16"):
        direct_rows.rms_norm(x, weight.half(), 1e-5)
    with pytest.raises(ShapeError, match="weight is on meta"):
        direct_rows.rms_norm(x, weight.to("meta"), 1e-5)
    with pytest.raises(ShapeError, match="eps is -1"):
        direct_rows.rms_norm(x, weight, -1.0)
    with pytest.raises(ShapeError, match="x has dtype torch.int64"):
        direct_rows.rms_norm(x.long(), weight, 1e-5)
    with pytest.raises(ShapeError, match="they must be alike"):
        direct_rows.swiglu(x, weight)
    with pytest.raises(ShapeError, match="up is on meta"):
        direct_rows.swiglu(x, x.to("meta"))
