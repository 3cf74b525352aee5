"""The operators as torch sees them: schemas, fakes, gradients, dispatch, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from quant import formats, native, op_kernels, ops, reference
from quant.errors import NativeError, ShapeError
from tests.quant import operands
from tests.quant.operands import Experts4, Experts8, Paged, Weight4

DTYPES = list(formats.VALUE_DTYPES)


@pytest.fixture
def generator() -> torch.Generator:
    return operands.fresh_generator()


def sample_arguments(name: str, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> list[Any]:
    """Valid arguments of one operator, every one given."""
    weight = Weight4.random((7, 33), "nf4", 64, 256, generator)
    CB, SCB = reference.quantize_8bit(torch.randn(7, 33, generator=generator))
    x = torch.randn(2, 3, 33, generator=generator).to(dtype)
    bias = torch.randn(7, generator=generator).to(dtype)
    absmax = torch.rand(300, generator=generator)
    paged = Paged.random([(3, 2), (0, 4)], (4, 2), (8, 6), 4, dtype, generator)
    paged8 = Paged.random([(3, 2), (0, 4)], (4, 2), (8, 6), 4, dtype, generator, torch.int8)
    new_rows = [torch.randn(shape, generator=generator).to(dtype) for shape in [(3, 2, 6), (3, 2, 5)]]
    sinks = torch.randn(4, generator=generator)
    experts = Experts4.random([2, 0, 3], 2, (7, 33), "nf4", 64, 256, generator, padding=3)
    experts8 = Experts8.random([2, 0, 3], (7, 33), 1, dtype, generator)
    return {
        "quantize_4bit": [x, "fp4", 64],
        "encode_4bit": [x, torch.randn(4, generator=generator), "nf4", 64],
        "search_scales_4bit": [x, "nf4", 64],
        "dequantize_4bit": [weight.packed, weight.plain_absmax(), "nf4", 64, [7, 33], dtype],
        "quantize_absmax": [absmax, 256],
        "dequantize_absmax": [*reference.quantize_absmax(absmax), 256],
        "linear_4bit": [x, *weight.arguments(bias)],
        "linear_4bit_int8": [x, *weight.arguments(bias)],
        "linear_4bit_experts": [
            x.view(6, 33),
            *experts.arguments(torch.randn(3, 14, generator=generator).to(dtype)),
        ],
        "quantize_8bit": [x[0]],
        "dequantize_8bit": [CB, SCB, dtype],
        "linear_8bit": [x, CB, SCB, 2.0, "value", bias],
        "linear_8bit_experts": [*experts8.arguments(2.0, "batch")[:6], experts8.bias.to(dtype)],
        "paged_attention": [*paged.arguments(), 0.5, 3, 20.0, sinks, None],
        "paged_attention_int8": [*paged8.arguments(), 0.5, 3, 20.0, sinks, paged8.scales],
        "rms_norm": [x, torch.randn(33, generator=generator).to(dtype), 1e-6],
        "argmax": [x],
        "swiglu": [x, x * 2],
        "rotary": [
            torch.randn(shape, generator=generator).to(dtype) for shape in [(3, 4, 6), (3, 2, 6), (3, 6), (3, 6)]
        ],
        "cache_write": [
            *new_rows,
            *(torch.randn(shape, generator=generator).to(dtype) for shape in [(4, 8, 2, 6), (4, 8, 2, 5)]),
            torch.tensor([31, -1, 4]),
            None,
        ],
        "cache_write_int8": [
            *new_rows,
            *(torch.zeros(shape, dtype=torch.int8) for shape in [(4, 8, 2, 6), (4, 8, 2, 5)]),
            torch.tensor([31, -1, 4]),
            torch.zeros(4, 8, 2, 2),
        ],
    }[name]


IN_INT8 = ("paged_attention_int8", "cache_write_int8")
"""Names of arguments: the operators over a cache in int8."""


def operator(name: str) -> Any:
    own = name.removesuffix("_int8") if name in IN_INT8 else name
    return getattr(torch.ops.halfbyte, own).default


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*ops.NAMES, *IN_INT8])
def test_opcheck(name: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    torch.library.opcheck(operator(name), sample_arguments(name, generator, dtype))


@pytest.mark.parametrize(
    "name", ["linear_4bit", "linear_4bit_int8", "linear_4bit_experts", "linear_8bit", "linear_8bit_experts"]
)
def test_opcheck_with_gradients(name: str, generator: torch.Generator) -> None:
    arguments = sample_arguments(name, generator)
    arguments[0].requires_grad_()
    arguments[-1].requires_grad_()
    torch.library.opcheck(operator(name), arguments)


@pytest.mark.parametrize("name", ops.NAMES)
def test_fake_kernel_tells_shapes_and_dtypes(name: str, generator: torch.Generator) -> None:
    arguments = sample_arguments(name, generator, torch.bfloat16)
    real = operator(name)(*arguments)
    on_meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
    fake = operator(name)(*on_meta)
    for got, want in zip(_as_tuple(fake), _as_tuple(real), strict=True):
        assert (got.shape, got.dtype, got.device.type) == (want.shape, want.dtype, "meta")


def _as_tuple(result: Any) -> tuple[torch.Tensor, ...]:
    if result is None:
        return ()
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


@pytest.mark.parametrize("name", ops.NAMES)
def test_reference_never_runs_where_a_kernel_is(name: str, generator: torch.Generator) -> None:
    """The compiled library has every operator; if one fell back, this would see it."""
    assert not op_kernels.REFERENCE_ONLY["cpu"]
    assert callable(getattr(native.kernels("cpu"), name))
    before = op_kernels.reference_calls()
    operator(name)(*sample_arguments(name, generator))
    assert op_kernels.reference_calls() == before


@pytest.mark.parametrize("name", ops.NAMES)
def test_reference_runs_are_counted(name: str, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    monkeypatch.setitem(op_kernels.REFERENCE_ONLY, "cpu", frozenset([name]))
    before = op_kernels.reference_calls().get(name, 0)
    operator(name)(*sample_arguments(name, generator))
    assert op_kernels.reference_calls()[name] == before + 1


@pytest.mark.parametrize("name", ops.NAMES)
def test_missing_library_is_an_error_not_a_slow_path(
    name: str, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    def missing(device_type: str) -> None:
        raise NativeError(f"no {device_type} library")

    monkeypatch.setattr(native, "kernels", missing)
    with pytest.raises(NativeError, match="no cpu library"):
        operator(name)(*sample_arguments(name, generator))


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linear", [ops.linear_4bit, ops.linear_4bit_int8])
@pytest.mark.parametrize("nested", [None, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_4bit_gradients(
    dtype: torch.dtype, nested: int | None, linear: Callable[..., torch.Tensor], generator: torch.Generator
) -> None:
    """With int8 activations too: rounding counts as the identity."""
    weight = Weight4.random((7, 33), "fp4", 32, nested, generator)
    dense = weight.dense(dtype)
    x, bias = _differentiable((2, 3, 33), dtype, generator), _differentiable((7,), dtype, generator)
    out = linear(x, *weight.arguments(bias))
    _compare_gradients(out, x, bias, dense, generator)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_8bit_gradients(dtype: torch.dtype, generator: torch.Generator) -> None:
    CB, SCB = ops.quantize_8bit(torch.randn(7, 33, generator=generator))
    x, bias = _differentiable((2, 3, 33), dtype, generator), _differentiable((7,), dtype, generator)
    out = ops.linear_8bit(x, CB, SCB, 2.0, "value", bias)
    _compare_gradients(out, x, bias, ops.dequantize_8bit(CB, SCB, dtype), generator)


@pytest.mark.parametrize("nested", [None, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_4bit_experts_gradients(dtype: torch.dtype, nested: int | None, generator: torch.Generator) -> None:
    """Against torch's own linear layers on the dequantized matrices; an expert without rows has no gradient."""
    experts = Experts4.random([3, 0, 5], 2, (7, 33), "fp4", 32, nested, generator, padding=1)
    x, bias = _differentiable((10, 33), dtype, generator), _differentiable((3, 14), dtype, generator)
    out = ops.linear_4bit_experts(x, *experts.arguments(bias))
    grad = torch.randn(out.shape, generator=generator).to(dtype)
    got = torch.autograd.grad(out, [x, bias], grad)
    values, biases = x.detach().float().requires_grad_(), bias.detach().float().requires_grad_()
    parts = []
    for begin, end, expert in ((0, 3, 0), (3, 8, 2)):
        dense = torch.cat([weight.dense(dtype) for weight in experts.matrices[expert]]).float()
        parts.append(torch.nn.functional.linear(values[begin:end], dense, biases[expert]))
    want = torch.autograd.grad(torch.cat(parts), [values, biases], grad[:8].float())
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    for g, w in zip(got, want, strict=True):
        assert g.dtype == dtype
        torch.testing.assert_close(g.float(), w, rtol=tolerance, atol=tolerance * w.abs().max().item())
    assert not got[0][8:].any(), "rows of no expert"
    assert not got[1][1].any()


@pytest.mark.parametrize("outliers", ["value", "all"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_8bit_experts_gradients(dtype: torch.dtype, outliers: str, generator: torch.Generator) -> None:
    """Those of each expert's product alone; rows of no expert, and an expert without rows, have none."""
    given = Experts8.random([3, 0, 5], (7, 33), 2, dtype, generator)
    x, bias = given.x.clone().requires_grad_(), given.bias.to(dtype).requires_grad_()
    out = ops.linear_8bit_experts(x, given.ends, given.CB, given.SCB, 2.0, outliers, bias)
    grad = torch.randn(out.shape, generator=generator).to(dtype)
    got = torch.autograd.grad(out, [x, bias], grad)
    values, biases = given.x.clone().requires_grad_(), bias.detach().clone().requires_grad_()
    parts = [
        ops.linear_8bit(values[begin:end], given.CB[expert], given.SCB[expert], 2.0, outliers, biases[expert])
        for begin, end, expert in ((0, 3, 0), (3, 8, 2))
    ]
    want = torch.autograd.grad(torch.cat(parts), [values, biases], grad[:8])
    room = 4 * torch.finfo(dtype).eps  # sums over rows are in another order
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=room, atol=room * float(w.abs().max()))
    assert not got[0][8:].any()
    assert not got[1][1].any()


def test_frozen_experts_have_gradients_only_where_they_are_asked_for(generator: torch.Generator) -> None:
    experts = Experts4.random([3, 0, 5], 2, (7, 33), "nf4", 64, None, generator)
    x, bias = torch.randn(8, 33, generator=generator), torch.randn(3, 14, generator=generator)
    assert not ops.linear_4bit_experts(x, *experts.arguments(bias)).requires_grad
    bias.requires_grad_()
    ops.linear_4bit_experts(x, *experts.arguments(bias)).sum().backward()
    assert bias.grad is not None
    assert torch.equal(bias.grad, torch.tensor([3.0, 0.0, 5.0])[:, None].expand(3, 14))


def _differentiable(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


def _compare_gradients(
    out: torch.Tensor, x: torch.Tensor, bias: torch.Tensor, dense: torch.Tensor, generator: torch.Generator
) -> None:
    """Against torch's own linear layer on the dequantized weight."""
    grad = torch.randn(out.shape, generator=generator).to(out.dtype)
    got = torch.autograd.grad(out, [x, bias], grad)
    want = torch.autograd.grad(
        torch.nn.functional.linear(x.float(), dense.float(), bias.float()), [x, bias], grad.float()
    )
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[out.dtype]
    for g, w in zip(got, want, strict=True):
        assert g.dtype == out.dtype
        torch.testing.assert_close(g.float(), w.float(), rtol=tolerance, atol=tolerance * w.abs().max().item())


def test_frozen_input_gets_no_gradient(generator: torch.Generator) -> None:
    weight = Weight4.random((7, 33), "nf4", 64, None, generator)
    x = torch.randn(2, 33, generator=generator)
    assert not ops.linear_4bit(x, *weight.arguments()).requires_grad  # type: ignore[arg-type]
    bias = _differentiable((7,), torch.float32, generator)
    ops.linear_4bit(x, *weight.arguments(bias)).sum().backward()  # type: ignore[arg-type]
    assert bias.grad is not None
    assert torch.equal(bias.grad, torch.full((7,), 2.0))


def test_mixed_bias_dtype_keeps_its_own_gradient_dtype(generator: torch.Generator) -> None:
    weight = Weight4.random((7, 33), "nf4", 64, None, generator)
    x, bias = _differentiable((4, 33), torch.bfloat16, generator), _differentiable((7,), torch.float32, generator)
    out = ops.linear_4bit(x, *weight.arguments(bias))  # type: ignore[arg-type]
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert bias.grad is not None
    assert bias.grad.dtype == torch.float32


# --- empty and refused ------------------------------------------------------------------------------------------------


def test_empty_batches_and_weights(generator: torch.Generator) -> None:
    weight = Weight4.random((7, 33), "nf4", 64, None, generator)
    assert ops.linear_4bit(torch.empty(2, 0, 33), *weight.arguments()).shape == (2, 0, 7)  # type: ignore[arg-type]
    nothing = Weight4.random((0, 33), "nf4", 64, None, generator)
    assert ops.linear_4bit(torch.empty(2, 33), *nothing.arguments()).shape == (2, 0)  # type: ignore[arg-type]
    no_input = Weight4.random((5, 0), "nf4", 64, None, generator)
    bias = torch.randn(5, generator=generator)
    assert torch.equal(ops.linear_4bit(torch.empty(2, 0), *no_input.arguments(bias)), bias.expand(2, 5))  # type: ignore[arg-type]
    CB, SCB = ops.quantize_8bit(torch.empty(0, 4))
    assert ops.linear_8bit(torch.randn(3, 4), CB, SCB, 6.0, "value").shape == (3, 0)
    assert ops.linear_8bit(torch.empty(0, 4), CB, SCB, 6.0, "batch").shape == (0, 0)


REFUSALS: list[tuple[str, int, Callable[[Any], Any], str]] = [
    ("quantize_4bit", 0, lambda x: x.double(), "x has dtype torch.float64"),
    ("quantize_4bit", 1, lambda _: "int4", "quant_type is 'int4'; accepted are 'nf4' and 'fp4'"),
    ("quantize_4bit", 2, lambda _: 48, "blocksize is 48; accepted are 32, 64"),
    ("encode_4bit", 0, lambda x: x.double(), "x has dtype torch.float64"),
    ("encode_4bit", 1, lambda s: s[1:], r"scales has shape \[3\]; it must be \[4\]"),
    ("encode_4bit", 1, lambda s: s.half(), "scales has dtype torch.float16"),
    ("encode_4bit", 1, lambda s: s.to("meta"), "scales is on meta but x is on cpu"),
    ("encode_4bit", 2, lambda _: "int4", "quant_type is 'int4'"),
    ("search_scales_4bit", 0, lambda x: x.to(torch.int8), "x has dtype torch.int8"),
    ("search_scales_4bit", 1, lambda _: "int4", "quant_type is 'int4'"),
    ("search_scales_4bit", 2, lambda _: 16, "blocksize is 16; accepted are 32, 64"),
    ("dequantize_4bit", 0, lambda p: p[:-1], r"packed has shape \[115\]; it must be \[116\]"),
    ("dequantize_4bit", 0, lambda p: p.view(torch.int8), "packed has dtype torch.int8"),
    ("dequantize_4bit", 0, lambda p: p[:, None], r"packed has shape \[116, 1\]"),
    ("dequantize_4bit", 1, lambda a: a[1:], r"absmax has shape \[3\]; it must be \[4\]"),
    ("dequantize_4bit", 1, lambda a: a.half(), "absmax has dtype torch.float16"),
    ("dequantize_4bit", 4, lambda _: [-7, -33], "sizes must not be negative"),
    ("dequantize_4bit", 5, lambda _: torch.int8, "dtype is torch.int8"),
    ("quantize_absmax", 0, lambda a: a.view(2, -1), "absmax has shape"),
    ("quantize_absmax", 1, lambda _: 0, "nested_blocksize is 0"),
    ("dequantize_absmax", 1, lambda a: a[:1], "nested_absmax has shape"),
    ("dequantize_absmax", 2, lambda o: o[None], "offset is torch.float32"),
    ("linear_4bit", 0, lambda x: x[..., :-1], r"its last size must be 33"),
    ("linear_4bit", 0, lambda x: x.to(torch.int32), "x has dtype torch.int32"),
    ("linear_4bit", 2, lambda a: a.float(), "absmax has dtype torch.float32; it must be torch.uint8"),
    ("linear_4bit", 5, lambda _: [7, 33, 1], "has two dimensions"),
    ("linear_4bit", 6, lambda _: None, "nested_absmax and offset belong together"),
    ("linear_4bit", 9, lambda b: b[1:], r"bias has shape \[6\]; it must be \[7\]"),
    ("linear_4bit_int8", 0, lambda x: x[..., :-1], r"its last size must be 33"),
    ("linear_4bit_int8", 3, lambda _: "nf5", "quant_type is 'nf5'"),
    ("linear_4bit_experts", 0, lambda x: x[..., :-1], r"x has shape \[6, 32\]; it must be \[rows, 33\]"),
    ("linear_4bit_experts", 0, lambda x: x[0], r"x has shape \[33\]"),
    ("linear_4bit_experts", 0, lambda x: x.int(), "x has dtype torch.int32"),
    ("linear_4bit_experts", 1, lambda e: e[1:], r"ends has shape \[2\]; it must be \[3\]"),
    ("linear_4bit_experts", 1, lambda e: e.int(), "ends has dtype torch.int32"),
    ("linear_4bit_experts", 1, lambda e: e.to("meta"), "ends is on meta but x is on cpu"),
    ("linear_4bit_experts", 2, lambda p: p[..., :115], r"packed is torch.uint8 \[3, 2, 115\]; .* at least 116\]"),
    ("linear_4bit_experts", 2, lambda p: p.view(torch.int8), "packed is torch.int8"),
    ("linear_4bit_experts", 2, lambda p: p[:, 0], r"packed is torch.uint8 \[3, 119\]"),
    ("linear_4bit_experts", 3, lambda a: a.float(), r"absmax is torch.float32 .*; it must be torch.uint8 \[3, 2, 4\]"),
    ("linear_4bit_experts", 3, lambda a: a[:, :1], r"absmax is torch.uint8 \[3, 1, 4\]; it must be"),
    ("linear_4bit_experts", 4, lambda _: "nf5", "quant_type is 'nf5'"),
    ("linear_4bit_experts", 5, lambda _: 48, "blocksize is 48"),
    ("linear_4bit_experts", 6, lambda _: [7, 33, 1], "it has two dimensions"),
    ("linear_4bit_experts", 6, lambda _: [-7, 33], "sizes must not be negative"),
    ("linear_4bit_experts", 7, lambda _: None, "nested_absmax and offset belong together"),
    ("linear_4bit_experts", 7, lambda n: n[:2], r"nested_absmax is torch.float32 \[2, 2, 1\]; it must be"),
    ("linear_4bit_experts", 8, lambda o: o[:, 0], r"offset is torch.float32 \[3\]; it must be torch.float32 \[3, 2\]"),
    ("linear_4bit_experts", 9, lambda _: 0, "nested_blocksize is 0"),
    ("linear_4bit_experts", 10, lambda b: b[:, 1:], r"bias is torch.float32 \[3, 13\]; it must be .* \[3, 14\]"),
    ("linear_4bit_experts", 10, lambda b: b.double(), "bias has dtype torch.float64"),
    ("quantize_8bit", 0, lambda w: w[0], "it must have two dimensions"),
    ("dequantize_8bit", 0, lambda c: c.view(torch.uint8), "CB is torch.uint8"),
    ("linear_8bit", 2, lambda s: s[1:], "SCB has shape"),
    ("linear_8bit", 3, lambda _: -1.0, "threshold is -1.0"),
    ("linear_8bit", 3, lambda _: float("nan"), "threshold is nan"),
    ("linear_8bit", 4, lambda _: "column", "outliers is 'column'"),
    ("linear_8bit_experts", 0, lambda x: x[..., :-1], r"x has shape \[6, 32\]; it must be \[rows, 33\]"),
    ("linear_8bit_experts", 0, lambda x: x.int(), "x has dtype torch.int32"),
    ("linear_8bit_experts", 1, lambda e: e[1:], r"ends has shape \[2\]; it must be \[3\]"),
    ("linear_8bit_experts", 1, lambda e: e.to("meta"), "ends is on meta but x is on cpu"),
    ("linear_8bit_experts", 2, lambda c: c[0], r"CB is torch.int8 \[7, 33\]; .* three dimensions"),
    ("linear_8bit_experts", 2, lambda c: c.view(torch.uint8), "CB is torch.uint8"),
    ("linear_8bit_experts", 3, lambda s: s[:, 1:], r"SCB is torch.float32 \[3, 6\]; it must be .* \[3, 7\]"),
    ("linear_8bit_experts", 4, lambda _: -1.0, "threshold is -1.0"),
    ("linear_8bit_experts", 5, lambda _: "column", "outliers is 'column'"),
    ("linear_8bit_experts", 6, lambda b: b[0], r"bias is torch.float32 \[7\]; it must be .* \[3, 7\]"),
    ("linear_8bit_experts", 6, lambda b: b.double(), "bias has dtype torch.float64"),
    ("rms_norm", 0, lambda x: x.double(), "x has dtype torch.float64"),
    ("rms_norm", 0, lambda x: x[0, 0, 0], "x has no dimensions"),
    ("rms_norm", 1, lambda w: w.half(), "weight has dtype torch.float16; it must be torch.float32"),
    ("rms_norm", 1, lambda w: w[1:], r"weight has shape \[32\]; it must be \[33\]"),
    ("rms_norm", 2, lambda _: -1.0, "eps is -1.0"),
    ("argmax", 0, lambda x: x.double(), "x has dtype torch.float64"),
    ("argmax", 0, lambda x: x[0, 0, 0], "x has no dimensions"),
    ("swiglu", 0, lambda g: g.int(), "gate has dtype torch.int32"),
    ("swiglu", 1, lambda u: u[1:], r"they must be alike"),
    ("swiglu", 1, lambda u: u.half(), r"up is torch.float16 \[2, 3, 33\]; they must be alike"),
    ("rotary", 0, lambda q: q.int(), "query has dtype torch.int32"),
    ("rotary", 0, lambda q: q[..., :5], r"query has shape \[3, 4, 5\]; \[tokens, heads, an even head size\]"),
    ("rotary", 1, lambda k: k[1:], r"key has shape \[2, 2, 6\]; \[3, heads, 6\] is needed"),
    ("rotary", 1, lambda k: k.half(), "key has dtype torch.float16"),
    ("rotary", 2, lambda c: c[:, :4], r"cos has shape \[3, 4\]"),
    ("rotary", 3, lambda s: s.double(), "sin has dtype torch.float64"),
    ("cache_write", 0, lambda k: k.double(), "key has dtype torch.float64"),
    ("cache_write", 0, lambda k: k[0], r"key has shape \[2, 6\]; \[tokens, heads, head size\]"),
    ("cache_write", 1, lambda v: v[:, :1], r"value has shape \[3, 1, 5\]; \[3, 2, head size\]"),
    ("cache_write", 1, lambda v: v.half(), "value has dtype torch.float16; the key's"),
    ("cache_write", 2, lambda k: k[..., :5], r"keys has shape \[4, 8, 2, 5\]; a contiguous \[blocks, size, 2, 6\]"),
    ("cache_write", 3, lambda v: v[1:], r"values has shape \[3, 8, 2, 5\]; it must have the blocks of keys"),
    ("cache_write", 2, lambda k: k.double(), "keys have dtype torch.float64; accepted are torch.float32"),
    ("cache_write", 3, lambda v: v.half(), "values have dtype torch.float16 but keys have torch.float32"),
    ("cache_write", 5, lambda _: torch.zeros(4, 8, 2, 2), "scales are given and keys have dtype torch.float32"),
    ("cache_write_int8", 5, lambda _: None, "scales are missing and keys have dtype torch.int8"),
    ("cache_write_int8", 5, lambda s: s[1:], r"scales are torch.float32 \[3, 8, 2, 2\]; they must be"),
    ("cache_write_int8", 5, lambda s: s.half(), "scales are torch.float16"),
    ("cache_write_int8", 5, lambda s: s.transpose(0, 1).contiguous().transpose(0, 1), "scales are not contiguous"),
    ("cache_write", 4, lambda s: s.int(), r"slots is torch.int32 \[3\]; a contiguous int64 \[3\]"),
    ("cache_write", 4, lambda s: s[1:], r"slots is torch.int64 \[2\]"),
    ("paged_attention", 0, lambda q: q.double(), "query has dtype torch.float64"),
    ("paged_attention", 0, lambda q: q[0], r"query has shape \[4, 8\]; it must be \[T, H, D\]"),
    ("paged_attention", 0, lambda q: q[:, :3], "query has 3 heads; it must be a multiple of the keys' 2"),
    ("paged_attention", 0, lambda q: q[..., :7], r"must be \[T, H, D\], \[blocks, block_tokens, G, D\]"),
    ("paged_attention", 1, lambda k: k.half(), "values have dtype torch.float32 but keys have torch.float16"),
    ("paged_attention", 1, lambda k: k.double(), "keys have dtype torch.float64; accepted are torch.float32"),
    ("paged_attention", 10, lambda _: torch.zeros(4, 4, 2, 2), "scales are given and keys have dtype torch.float32"),
    ("paged_attention_int8", 10, lambda _: None, "scales are missing and keys have dtype torch.int8"),
    ("paged_attention_int8", 10, lambda s: s[..., :1], "scales are torch.float32"),
    ("paged_attention", 2, lambda v: v[0], "values have shape"),
    ("paged_attention", 2, lambda v: v[1:], "query, keys and values have shapes"),
    ("paged_attention", 3, lambda t: t.int(), "tables are torch.int32"),
    ("paged_attention", 4, lambda o: o[1:], r"offsets has shape \[2\]; it must be \[3\]"),
    ("paged_attention", 5, lambda s: s.float(), "starts has dtype torch.float32"),
    ("paged_attention", 6, lambda _: float("inf"), "scale is inf"),
    ("paged_attention", 7, lambda _: -1, "window is -1"),
    ("paged_attention", 8, lambda _: -5.0, "softcap is -5.0"),
    ("paged_attention", 9, lambda s: s[1:], r"sinks have shape \[3\]; they must be \[4\]"),
]


@pytest.mark.parametrize(("name", "index", "spoil", "sentence"), REFUSALS)
def test_arguments_that_do_not_belong_together_are_refused(
    name: str, index: int, spoil: Callable[[Any], Any], sentence: str, generator: torch.Generator
) -> None:
    arguments = sample_arguments(name, generator)
    arguments[index] = spoil(arguments[index])
    with pytest.raises(ShapeError, match=sentence):
        operator(name)(*arguments)


def test_too_many_matrices_of_an_expert_are_refused(generator: torch.Generator) -> None:
    experts = Experts4.random([1], native.MAX_GROUP + 1, (2, 32), "nf4", 32, None, generator)
    with pytest.raises(ShapeError, match="accepted are 1 to 8 matrices of an expert"):
        ops.linear_4bit_experts(torch.zeros(1, 32), *experts.arguments())


def test_ends_that_cannot_be_are_refused_on_a_cpu(generator: torch.Generator) -> None:
    experts = Experts4.random([1, 1], 1, (2, 32), "nf4", 32, None, generator)
    with pytest.raises(NativeError, match="The experts' rows end where they cannot"):
        ops.linear_4bit_experts(torch.zeros(1, 32), *experts.arguments())


def test_tensors_on_two_devices_are_refused(generator: torch.Generator) -> None:
    arguments = sample_arguments("linear_8bit", generator)
    arguments[2] = arguments[2].to("meta")
    with pytest.raises(ShapeError, match="SCB is on meta but CB is on cpu"):
        ops.linear_8bit(*arguments)


def test_compiled_graph_holds_the_operator_whole(generator: torch.Generator) -> None:
    """torch.compile sees one node, not the inside; the eager backend needs no compiler."""
    weight = Weight4.random((7, 33), "nf4", 64, 256, generator)

    def double(x: torch.Tensor) -> torch.Tensor:
        return ops.linear_4bit(x, *weight.arguments()) * 2  # type: ignore[arg-type]

    x = torch.randn(3, 33, generator=generator)
    compiled = torch.compile(double, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), double(x))
