"""The reference against its definitions, value by value in Python floats, and bitsandbytes' files."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from quant import formats, ops, reference
from tests.quant import operands

DTYPES = list(formats.VALUE_DTYPES)


@pytest.mark.parametrize("quant_type", formats.FOUR_BIT)
@pytest.mark.parametrize("shape", [(1,), (3, 43), (2, 3, 50)])
def test_quantize_4bit_value_by_value(quant_type: str, shape: tuple[int, ...]) -> None:
    number_format = formats.FOUR_BIT[quant_type]
    x = torch.randn(shape, generator=operands.fresh_generator())
    packed, absmax = reference.quantize_4bit(x, quant_type, 32)
    flat = x.flatten()
    thresholds = torch.tensor(number_format.thresholds)
    for i, value in enumerate(flat):
        block = flat[i // 32 * 32 : i // 32 * 32 + 32]
        assert absmax[i // 32] == block.abs().max()
        normalised = value * (1 / block.abs().max())
        ranked = normalised.abs() if number_format.signed_magnitude else normalised
        code = number_format.code_of_rank[int((ranked > thresholds).sum())]
        if number_format.signed_magnitude and normalised < 0:
            code += 8
        byte = int(packed[i // 2])
        assert (byte >> 4 if i % 2 == 0 else byte & 15) == code, "the first of two values is in the high nibble"
    if flat.numel() % 2:
        assert int(packed[-1]) & 15 == number_format.zero_code


@pytest.mark.parametrize("quant_type", formats.FOUR_BIT)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nearest_table_value_is_chosen(quant_type: str, dtype: torch.dtype) -> None:
    """No other code would be closer, up to the rounding of 1/absmax and of FP4's printed thresholds."""
    x = torch.randn(96, 64, generator=operands.fresh_generator()).to(dtype)
    packed, absmax = reference.quantize_4bit(x, quant_type, 64)
    back = reference.dequantize_4bit(packed, absmax, quant_type, 64, x.shape, torch.float32)
    table = formats.CODE_TABLES[quant_type]
    candidates = table * absmax[:, None, None]  # a block is a row here
    best = (candidates - x.float()[:, :, None]).abs().amin(dim=2)
    assert ((back - x.float()).abs() <= best + 2e-6 * absmax[:, None]).all()


@pytest.mark.parametrize("quant_type", formats.FOUR_BIT)
def test_zero_nan_infinity_and_subnormals(quant_type: str) -> None:
    x = torch.randn(5, 64, generator=operands.fresh_generator())
    x[0] = 0.0
    x[1, 3] = torch.nan
    x[2, 5] = -torch.inf
    x[3] = torch.linspace(-3e-40, 2e-40, 64)
    packed, absmax = reference.quantize_4bit(x, quant_type, 64)
    zero = formats.FOUR_BIT[quant_type].zero_code
    assert absmax[0] == 0
    assert (packed[:32] == zero * 17).all()
    assert absmax[1].isnan()
    assert absmax[2] == torch.inf
    back = reference.dequantize_4bit(packed, absmax, quant_type, 64, [5, 64], torch.float32)
    assert (back[0] == 0).all()
    assert (back[3] - x[3]).abs().max() <= 0.2 * x[3].abs().max()
    alone = reference.quantize_4bit(x[4:], quant_type, 64)
    assert torch.equal(packed[128:], alone[0]), "a block does not see its neighbours"


@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 5000])
@pytest.mark.parametrize("nested_blocksize", [256, 3])
def test_absmax_round_trip(count: int, nested_blocksize: int) -> None:
    absmax = torch.rand(count, generator=operands.fresh_generator()) + 0.5
    codes, nested_absmax, offset = reference.quantize_absmax(absmax, nested_blocksize)
    assert nested_absmax.numel() == formats.block_count(count, nested_blocksize)
    back = reference.dequantize_absmax(codes, nested_absmax, offset, nested_blocksize)
    largest = nested_absmax.repeat_interleave(nested_blocksize)[:count]
    # Largest gap of the map: 0.99297 to 1, and at the other end -1 has no code of its own.
    assert ((back - absmax).abs() <= 0.00705 * largest + 1e-6).all()


def test_equal_maxima_need_no_second_level() -> None:
    codes, nested_absmax, offset = reference.quantize_absmax(torch.full((300,), 0.25))
    assert offset == 0.25
    assert (nested_absmax == 0).all()
    assert torch.equal(reference.dequantize_absmax(codes, nested_absmax, offset), torch.full((300,), 0.25))
    assert torch.equal(reference.dequantize_absmax(codes, nested_absmax[:1], offset, 1 << 46), torch.full((300,), 0.25))


def test_offset_is_the_mean() -> None:
    absmax = torch.rand(100001, generator=operands.fresh_generator())
    assert reference.mean_absmax(absmax).item() == torch.tensor(sum(absmax.tolist()) / absmax.numel()).item()


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_8bit_value_by_value(dtype: torch.dtype) -> None:
    w = torch.randn(5, 37, generator=operands.fresh_generator()).to(dtype)
    w[1] = 0
    w[2] *= 1e-3
    CB, SCB = reference.quantize_8bit(w)
    half = w.half().float()
    assert torch.equal(SCB, half.abs().amax(dim=1))
    steps = half.double() / SCB.double().clamp_min(1e-30)[:, None] * 127
    assert (CB.double() - steps).abs().max() <= 0.5 + 1e-4
    assert (CB[1] == 0).all()
    assert CB.abs().max() == 127


def test_int8_weights_keep_what_float16_would_lose() -> None:
    w = torch.tensor([[1e6, -5e5, 3.0], [torch.nan, 1.0, 2.0], [torch.inf, 1.0, -torch.inf]])
    CB, SCB = reference.quantize_8bit(w)
    assert SCB[0] == 1e6
    assert CB[0].tolist() == [127, -64, 0]
    assert SCB[1].isnan()
    assert SCB[2] == torch.inf
    assert (CB[1:] == 0).all()


@pytest.mark.parametrize("quant_type", formats.FOUR_BIT)
@pytest.mark.parametrize(("shape", "blocksize"), [((5, 150), 32), ((3, 97), 64), ((4, 128), 128)])
def test_linear_4bit_int8_value_by_value(quant_type: str, shape: tuple[int, int], blocksize: int) -> None:
    """x rounded in groups of 64 columns, the table in steps of 1 / 112 (NF4) or 1 / 120 (FP4)."""
    unit = {"nf4": 112, "fp4": 120}[quant_type]
    generator = operands.fresh_generator()
    weight = operands.Weight4.random(shape, quant_type, blocksize, None, generator)
    x = torch.randn(3, shape[1], generator=generator)
    x[1, :64] = 0
    out = reference.linear_4bit_int8(x, *weight.arguments(torch.ones(shape[0])))  # type: ignore[arg-type]
    table = formats.FOUR_BIT[quant_type].table
    for m in range(3):
        for n in range(shape[0]):
            expected, size = 1.0, 1.0
            for k in range(shape[1]):
                i = n * shape[1] + k
                byte = int(weight.packed[i // 2])
                code = byte >> 4 if i % 2 == 0 else byte & 15
                largest = x[m, k // 64 * 64 : k // 64 * 64 + 64].abs().max()
                rounded = 0 if largest == 0 else int((x[m, k] * ((1 / largest) * 127)).round()) * float(largest) / 127
                term = rounded * round(table[code] * unit) / unit * weight.absmax[i // blocksize].item()
                expected, size = expected + term, size + abs(term)
            assert out[m, n].item() == pytest.approx(expected, abs=1e-6 * size)


@pytest.mark.parametrize("outliers", ["value", "batch"])
@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_linear_8bit_value_by_value(outliers: str, threshold: float) -> None:
    generator = operands.fresh_generator()
    x = torch.randn(4, 19, generator=generator)
    x[1, 5] = threshold  # exactly the threshold counts as an outlier
    x[2, 3] = 50.0
    CB, SCB = reference.quantize_8bit(torch.randn(6, 19, generator=generator))
    out = reference.linear_8bit(x, CB, SCB, threshold, outliers, torch.ones(6))
    for m in range(4):
        by_value = [threshold > 0 and abs(v) >= threshold for v in x[m].tolist()]
        columns = [threshold > 0 and bool((x[:, k].abs() >= threshold).any()) for k in range(19)]
        chosen = columns if outliers == "batch" else by_value
        largest = max([abs(v) for v, out_ in zip(x[m].tolist(), by_value, strict=True) if not out_], default=0.0)
        for n in range(6):
            expected, tie = 1.0, 0.0
            for k in range(19):
                weight = CB[n, k].item() * SCB[n].item() / 127
                value = x[m, k].item()
                steps = value * 127 / largest
                expected += weight * (value if chosen[k] else round(steps) * largest / 127)
                # Up to 127 steps have an error of 127 eps in float32, which decides where two codes are as near: once
                # in 30,000 rows. Any other value on the wrong side costs a step of some 0.02 times its weight.
                if not chosen[k] and abs(abs(steps) % 1 - 0.5) < 127 * torch.finfo(torch.float32).eps:
                    tie += abs(weight) * largest / 127
            assert out[m, n].item() == pytest.approx(expected, rel=1e-5, abs=1e-5 + tie)


def test_value_rule_keeps_rows_apart_and_batch_rule_does_not() -> None:
    generator = operands.fresh_generator()
    CB, SCB = reference.quantize_8bit(torch.randn(32, 64, generator=generator))
    x = torch.randn(2, 64, generator=generator)
    calm, loud = x.clone(), x.clone()
    loud[1, ::2] = 30.0
    first = [reference.linear_8bit(rows, CB, SCB, 6.0, "value")[0] for rows in (calm, loud)]
    assert torch.equal(*first)
    first = [reference.linear_8bit(rows, CB, SCB, 6.0, "batch")[0] for rows in (calm, loud)]
    assert not torch.equal(*first)


# --- bitsandbytes' own files ------------------------------------------------------------------------------------------

FILES = sorted((Path(__file__).parent / "conformance").glob("*.safetensors"))


@pytest.mark.parametrize("file", [f for f in FILES if f.name.startswith("4bit")], ids=lambda file: file.stem)
@pytest.mark.parametrize("run", [reference, ops], ids=["reference", "ops"])
def test_4bit_files_of_bitsandbytes(file: Path, run: ModuleType) -> None:
    """Their dequantized values bit for bit; and NF4 quantizes their source to their codes."""
    tensors = load_file(file)
    state = json.loads(bytes(next(v for k, v in tensors.items() if ".quant_state." in k).tolist()))
    packed, absmax = tensors["layer.weight"].view(torch.uint8).flatten(), tensors["layer.weight.absmax"]
    if "nested_offset" in state:
        offset = torch.tensor(state["nested_offset"], dtype=torch.float32)
        nested_absmax = tensors["layer.weight.nested_absmax"]
        absmax = run.dequantize_absmax(absmax, nested_absmax, offset, state["nested_blocksize"])
    expected = tensors["dequantized"]
    layout = (state["quant_type"], state["blocksize"])
    got = run.dequantize_4bit(packed, absmax, *layout, state["shape"], expected.dtype)
    assert operands.same_bits(got, expected)
    if state["quant_type"] == "nf4":
        assert torch.equal(run.quantize_4bit(tensors["source"], *layout)[0], packed)


@pytest.mark.parametrize("file", [f for f in FILES if f.name.startswith("8bit")], ids=lambda file: file.stem)
@pytest.mark.parametrize("run", [reference, ops], ids=["reference", "ops"])
def test_8bit_files_of_bitsandbytes(file: Path, run: ModuleType) -> None:
    """Their codes from their source, and their dequantized values, bit for bit."""
    tensors = load_file(file)
    CB, SCB = run.quantize_8bit(tensors["source"])
    assert torch.equal(CB, tensors["layer.weight"])
    assert torch.equal(SCB, tensors["layer.SCB"])
    assert operands.same_bits(run.dequantize_8bit(CB, SCB, torch.float32), tensors["dequantized"])


def test_the_files_are_there() -> None:
    assert len(FILES) >= 29
