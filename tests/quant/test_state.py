"""Packed weights and their checkpoint tensors: both directions, odd shapes, and files that lie."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant import PackedWeight, formats, native
from quant.errors import CheckpointError, ShapeError
from quant.state import MAX_STATE_BYTES, STATE_PREFIX, STORAGES, Packed4bit, Packed8bit

STATE = STATE_PREFIX + "nf4"


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert list(a) == list(b)
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert tensor_bytes(a[name]) == tensor_bytes(b[name]), name


def layer(*shape: int, **how: object) -> dict[str, torch.Tensor]:
    """The checkpoint tensors of a freshly packed NF4 weight with double quantization."""
    return Packed4bit.quantize(torch.randn(*shape or (48, 80)), "nf4", **({"double_quant": True} | how)).to_checkpoint()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("blocksize", formats.BLOCKSIZES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_round_trip(
    quant_type: str, blocksize: int, double_quant: bool, storage: torch.dtype, dtype: torch.dtype
) -> None:
    weight = torch.randn(48, 80).to(dtype)
    packed = Packed4bit.quantize(weight, quant_type, blocksize=blocksize, double_quant=double_quant, storage=storage)
    written = packed.to_checkpoint()
    read = PackedWeight.from_checkpoint(written)
    assert_same(read.to_checkpoint(), written)
    values = read.dequantize()
    assert values.dtype == dtype
    assert torch.equal(values, packed.dequantize())
    plain = Packed4bit.quantize(weight, quant_type, blocksize=blocksize)
    if not double_quant:
        assert torch.equal(values, plain.dequantize())
    # Half of FP4's widest gap is a sixth of a block's largest value; its maximum's second rounding costs a hundredth.
    assert float((values.float() - weight.float()).abs().max()) <= 0.2 * float(weight.float().abs().max())


@pytest.mark.parametrize("shape", [(1,), (13,), (1, 1), (7, 9), (3, 5, 7), (2, 2, 2, 2), (1, 4097)], ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float64], ids=str)
def test_odd_shapes(shape: tuple[int, ...], double_quant: bool, storage: torch.dtype) -> None:
    weight = torch.randn(*shape)
    packed = Packed4bit.quantize(weight, "nf4", double_quant=double_quant, storage=storage)
    read = PackedWeight.from_checkpoint(packed.to_checkpoint())
    assert read.shape == shape
    assert torch.equal(read.dequantize(), packed.dequantize())
    assert packed.packed.nbytes % storage.itemsize == 0
    assert packed.packed.nbytes - math.ceil(weight.numel() / 2) in range(storage.itemsize)


def test_json_has_bitsandbytes_keys_order_and_separators() -> None:
    tensors = Packed4bit.quantize(torch.randn(4, 64, dtype=torch.bfloat16), "nf4").to_checkpoint()
    assert tensor_bytes(tensors[STATE]) == (
        b'{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4, 64]}'
    )
    nested = Packed4bit.quantize(torch.randn(8, 64), "fp4", double_quant=True)
    text = tensor_bytes(nested.to_checkpoint()[STATE_PREFIX + "fp4"]).decode()
    offset = text.split('"nested_offset": ')[1].rstrip("}")
    assert text.startswith('{"quant_type": "fp4", "blocksize": 64, "dtype": "float32", "shape": [8, 64], "nested_bloc')
    assert nested.nested is not None
    assert float(offset) == float(nested.nested.offset)
    assert offset == repr(float(torch.tensor(float(offset), dtype=torch.float32)))


def test_foreign_json_spelling_is_kept() -> None:
    tensors = layer()
    content = json.loads(tensor_bytes(tensors[STATE]))
    respelled = json.dumps(dict(reversed(content.items())), indent=1).encode()
    tensors[STATE] = torch.tensor(list(respelled), dtype=torch.uint8)
    assert_same(PackedWeight.from_checkpoint(tensors).to_checkpoint(), tensors)


def test_other_tables_are_kept_and_the_nested_one_is_used() -> None:
    tensors = layer(64, 64)
    expected = PackedWeight.from_checkpoint(tensors).dequantize()
    tensors["weight.quant_map"] = tensors["weight.quant_map"] * 2
    read = PackedWeight.from_checkpoint(tensors)
    assert torch.equal(read.dequantize(), expected)  # every reader takes the table from the type's name
    assert_same(read.to_checkpoint(), tensors)
    tensors["weight.nested_quant_map"] = tensors["weight.nested_quant_map"] * 0
    read = PackedWeight.from_checkpoint(tensors)
    offset = json.loads(tensor_bytes(tensors[STATE]))["nested_offset"]
    assert float(read.dequantize().abs().max()) == pytest.approx(offset)
    assert_same(read.to_checkpoint(), tensors)


@pytest.mark.parametrize("has_own_table", [False, True])
def test_a_group_may_be_larger_than_the_weight(has_own_table: bool) -> None:
    """By far: what is made of a file's number must not grow with it."""
    tensors = layer(8, 64)
    if has_own_table:
        tensors["weight.nested_quant_map"] = tensors["weight.nested_quant_map"].flip(0)
    expected = PackedWeight.from_checkpoint(tensors).dequantize()
    content = json.loads(tensor_bytes(tensors[STATE]))
    for size, is_accepted in ((native.MAX_ELEMENTS, True), (native.MAX_ELEMENTS + 1, False)):
        state = json.dumps(content | {"nested_blocksize": size}).encode()
        tensors[STATE] = torch.tensor(list(state), dtype=torch.uint8)
        if is_accepted:
            assert torch.equal(PackedWeight.from_checkpoint(tensors).dequantize(), expected)
        else:
            with pytest.raises(CheckpointError, match=f"nested_blocksize {size}; accepted is 1 to"):
                PackedWeight.from_checkpoint(tensors)


def test_other_nested_blocksize() -> None:
    tensors = layer(64, 64)  # 64 blocks
    content = json.loads(tensor_bytes(tensors[STATE])) | {"nested_blocksize": 16}
    tensors[STATE] = torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)
    tensors["weight.nested_absmax"] = tensors["weight.nested_absmax"].repeat(4)
    read = PackedWeight.from_checkpoint(tensors)
    assert torch.equal(read.dequantize(), PackedWeight.from_checkpoint(layer_with(tensors, content)).dequantize())


def layer_with(tensors: dict[str, torch.Tensor], content: dict[str, object]) -> dict[str, torch.Tensor]:
    """The same layer with its four equal groups written as one."""
    state = json.dumps(content | {"nested_blocksize": 256}).encode()
    one_group = tensors["weight.nested_absmax"][:1]
    return tensors | {STATE: torch.tensor(list(state), dtype=torch.uint8), "weight.nested_absmax": one_group}


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf, 1e-42, 0.0])
@pytest.mark.parametrize("double_quant", [False, True])
def test_special_values_round_trip(special: float, double_quant: bool) -> None:
    weight = torch.randn(4, 64)
    weight[1] = special
    packed = Packed4bit.quantize(weight, "nf4", double_quant=double_quant)
    written = packed.to_checkpoint()
    read = PackedWeight.from_checkpoint(written)
    assert_same(read.to_checkpoint(), written)
    assert torch.equal(read.dequantize().isnan(), packed.dequantize().isnan())
    if math.isfinite(special):
        assert bool(read.dequantize().isfinite().all())


def test_negative_absmax_is_read() -> None:
    tensors = Packed4bit.quantize(torch.randn(4, 64), "nf4").to_checkpoint()
    values = PackedWeight.from_checkpoint(tensors).dequantize()
    flipped = tensors | {"weight.absmax": -tensors["weight.absmax"]}
    assert torch.equal(PackedWeight.from_checkpoint(flipped).dequantize(), -values)


@pytest.mark.parametrize("has_format", [True, False])
def test_int8(has_format: bool) -> None:
    weight = torch.randn(33, 50)
    written = Packed8bit.quantize(weight).to_checkpoint()
    assert int(written["weight_format"]) == 0
    assert written["weight_format"].shape == ()
    if not has_format:
        del written["weight_format"]
    read = PackedWeight.from_checkpoint(written)
    assert_same(read.to_checkpoint(), written)
    assert float((read.dequantize() - weight).abs().max()) <= float(weight.abs().max()) / 127


def test_what_cannot_be_quantized() -> None:
    with pytest.raises(ShapeError, match="float64"):
        Packed4bit.quantize(torch.zeros(2, 2, dtype=torch.float64), "nf4")
    with pytest.raises(ShapeError, match="two dimensions"):
        Packed8bit.quantize(torch.zeros(4))


def state_with(**changes: object) -> torch.Tensor:
    content = json.loads(tensor_bytes(layer()[STATE])) | changes
    return torch.tensor(
        list(json.dumps({k: v for k, v in content.items() if v is not ...}).encode()), dtype=torch.uint8
    )


def raw(text: bytes) -> torch.Tensor:
    return torch.tensor(list(text), dtype=torch.uint8)


LIES = {
    "no weight": ({"weight": None}, "tensor model.q.weight is missing"),
    "no absmax": ({"weight.absmax": None}, "weight.absmax is missing"),
    "no table": ({"weight.quant_map": None}, "weight.quant_map is missing"),
    "no state": ({STATE: None}, "either SCB or one"),
    "two states": ({STATE_PREFIX + "fp4": raw(b"{}")}, "either SCB or one"),
    "no nested absmax": ({"weight.nested_absmax": None}, "weight.nested_absmax is missing"),
    "no nested table": ({"weight.nested_quant_map": None}, "weight.nested_quant_map is missing"),
    "unknown tensor": ({"weight.extra": torch.zeros(1)}, "weight.extra is not part of a packed weight"),
    "short weight": ({"weight": torch.zeros(1919, 1, dtype=torch.uint8)}, "has 1919 bytes.*needs 1920"),
    "long weight": ({"weight": torch.zeros(1921, 1, dtype=torch.uint8)}, "has 1921 bytes"),
    "weight of a wrong dtype": ({"weight": torch.zeros(240, 1, dtype=torch.int64)}, "is torch.int64"),
    "short absmax": ({"weight.absmax": torch.zeros(59, dtype=torch.uint8)}, "has 59 values; 60"),
    "plain absmax beside a nested state": ({"weight.absmax": torch.zeros(60)}, "weight.absmax is torch.float32"),
    "absmax of two dimensions": ({"weight.absmax": torch.zeros(60, 1, dtype=torch.uint8)}, "1 dimensions are needed"),
    "short table": ({"weight.quant_map": torch.zeros(15)}, "weight.quant_map has 15 values; 16"),
    "half table": ({"weight.quant_map": torch.zeros(16).half()}, "weight.quant_map is torch.float16"),
    "short nested table": ({"weight.nested_quant_map": torch.zeros(255)}, "has 255 values; 256"),
    "long nested absmax": ({"weight.nested_absmax": torch.zeros(2)}, "has 2 values; 1"),
    "no data": ({"weight": torch.zeros(1920, 1, dtype=torch.uint8, device="meta")}, "has no data"),
    "state is text of floats": ({STATE: torch.zeros(10)}, "is torch.float32"),
    "state too long": ({STATE: raw(b" " * (MAX_STATE_BYTES + 1))}, f"at most {MAX_STATE_BYTES}"),
    "state not JSON": ({STATE: raw(b'{"quant_type"')}, "is not JSON"),
    "state not UTF-8": ({STATE: raw(b"\xff\xfe")}, "is not JSON"),
    "state too deep": ({STATE: raw(b"[" * 4000)}, "is not JSON"),
    "state a list": ({STATE: raw(b"[]")}, "JSON list; an object"),
    "state empty": ({STATE: raw(b"{}")}, "missing or unknown keys 'blocksize', 'dtype'"),
    "unknown key": ({STATE: state_with(nonsense=1)}, "unknown keys 'nonsense'"),
    "half nested": ({STATE: state_with(nested_offset=...)}, "keys 'nested_offset'"),
    "wrong type": ({STATE: state_with(quant_type="fp4")}, "quant_type 'fp4'; accepted is 'nf4'"),
    "type a number": ({STATE: state_with(quant_type=4)}, "quant_type 4"),
    "blocksize 63": ({STATE: state_with(blocksize=63)}, "blocksize 63"),
    "blocksize 0": ({STATE: state_with(blocksize=0)}, "blocksize 0"),
    "blocksize true": ({STATE: state_with(blocksize=True)}, "blocksize True"),
    "blocksize text": ({STATE: state_with(blocksize="64")}, "blocksize '64'"),
    "dtype": ({STATE: state_with(dtype="float64")}, "dtype 'float64'"),
    "dtype a list": ({STATE: state_with(dtype=["float32"])}, "dtype"),
    "shape empty": ({STATE: state_with(shape=[])}, "shape"),
    "shape with zero": ({STATE: state_with(shape=[0, 80])}, "shape"),
    "shape negative": ({STATE: state_with(shape=[-48, -80])}, "shape"),
    "shape huge": ({STATE: state_with(shape=[2**47, 2**47])}, "shape"),
    "shape of floats": ({STATE: state_with(shape=[48.0, 80])}, "shape"),
    "shape of many": ({STATE: state_with(shape=[1] * 9)}, "shape"),
    "shape of another size": ({STATE: state_with(shape=[48, 81])}, "needs 1944"),
    "nested blocksize 0": ({STATE: state_with(nested_blocksize=0)}, "nested_blocksize 0"),
    "nested dtype": ({STATE: state_with(nested_dtype="float16")}, "nested_dtype"),
    "offset text": ({STATE: state_with(nested_offset="0.1")}, "nested_offset"),
    "int8 mixed in": ({"SCB": torch.zeros(48)}, "belongs to a 4-bit weight"),
}


@pytest.mark.parametrize("case", LIES)
def test_lies_are_refused_in_one_sentence(case: str) -> None:
    changes, words = LIES[case]
    tensors = {name: t for name, t in (layer() | changes).items() if t is not None}
    with pytest.raises(CheckpointError, match=words) as refusal:
        PackedWeight.from_checkpoint(tensors, name="model.q")
    assert str(refusal.value).startswith("tensor model.q.")
    assert "\n" not in str(refusal.value)


INT8_LIES = {
    "no weight": ({"weight": None}, "weight is missing"),
    "weight of floats": ({"weight": torch.zeros(4, 8)}, "weight is torch.float32"),
    "weight flat": ({"weight": torch.zeros(32, dtype=torch.int8)}, "2 dimensions"),
    "short SCB": ({"SCB": torch.zeros(3)}, "SCB has 3 values; 4"),
    "half SCB": ({"SCB": torch.zeros(4).half()}, "SCB is torch.float16"),
    "another layout": ({"weight_format": torch.tensor(3, dtype=torch.uint8)}, "weight_format is 3"),
    "layout a vector": ({"weight_format": torch.zeros(1, dtype=torch.uint8)}, "0 dimensions"),
}


@pytest.mark.parametrize("case", INT8_LIES)
def test_int8_lies(case: str) -> None:
    changes, words = INT8_LIES[case]
    tensors = Packed8bit.quantize(torch.randn(4, 8)).to_checkpoint() | changes
    with pytest.raises(CheckpointError, match=words):
        PackedWeight.from_checkpoint({name: t for name, t in tensors.items() if t is not None})


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
KEYS = ("quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset")


@settings(max_examples=150)
@given(st.dictionaries(st.sampled_from(KEYS), JSON_VALUES, min_size=1, max_size=3))
def test_any_json_value_is_read_or_refused(changes: dict[str, object]) -> None:
    tensors = layer(4, 64) | {STATE: state_with(**({"shape": [4, 64]} | changes))}
    try:
        read = PackedWeight.from_checkpoint(tensors)
    except CheckpointError:
        return
    assert read.dequantize().shape == read.shape


@settings(max_examples=150)
@given(st.binary(max_size=200))
def test_any_bytes_as_state_are_refused(content: bytes) -> None:
    with pytest.raises(CheckpointError):
        PackedWeight.from_checkpoint(layer(4, 64) | {STATE: raw(content)})
