"""Linear4bit and Linear8bit as modules: forward, gradients, moving, copying, state_dicts."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from quant import BitsAndBytesConfig, Linear4bit, Linear8bit, native
from quant.errors import CheckpointError, QuantConfigError, ShapeError
from quant.linear import PackedLinear

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
CONFIGS: dict[str, dict[str, object]] = {
    "nf4": NF4,
    "fp4": {"load_in_4bit": True},
    "nf4-dq": NF4 | {"bnb_4bit_use_double_quant": True},
    "nf4-dq-bf16-storage": NF4 | {"bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "bfloat16"},
    "fp4-float64-storage": {"load_in_4bit": True, "bnb_4bit_quant_storage": "float64"},
    "int8": {"load_in_8bit": True},
    "int8-fp16": {"load_in_8bit": True, "llm_int8_has_fp16_weight": True},
}
PACKED = [name for name in CONFIGS if name != "int8-fp16"]


def make(name: str, linear: nn.Module, **changes: object) -> PackedLinear:
    config = BitsAndBytesConfig(**(CONFIGS[name] | changes))
    return (Linear8bit if config.load_in_8bit else Linear4bit).from_float(linear, config)


def bits(module: nn.Module) -> dict[str, tuple[torch.dtype, bytes]]:
    return {
        name: (tensor.dtype, bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).tolist()))
        for name, tensor in module.state_dict().items()
    }


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("n", "k"), [(96, 128), (33, 100), (1, 1), (7, 65)])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_dequantized_layer(name: str, n: int, k: int, bias: bool) -> None:
    linear = nn.Linear(k, n, bias=bias)
    layer = make(name, linear)
    x = torch.randn(2, 3, k)
    expected = nn.functional.linear(x, layer.dequantize(torch.float32), layer.bias)
    result = layer(x)
    assert result.shape == (2, 3, n)
    # float32 sums of up to 128 products; int8 rounds each activation, and int8-fp16 each weight too, by up to half a
    # 127th of its row's largest. That is less than the largest of many biases, and a tenth of a row's product.
    weight = layer.dequantize(torch.float32).detach()
    allowed = torch.full_like(result, 1e-5)
    if "int8" in name:
        allowed += x.abs().amax(-1, keepdim=True) / 254 * weight.abs().sum(1)
    if name == "int8-fp16":
        allowed += x.abs().sum(-1, keepdim=True) / 254 * weight.abs().amax(1) * (1 + 1 / 127)
    assert ((result - expected).abs() <= allowed).all()
    assert (layer.in_features, layer.out_features) == (k, n)
    assert isinstance(layer, nn.Linear)


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_only_reads(name: str) -> None:
    layer = make(name, nn.Linear(128, 96))
    tensors = [*layer.parameters(), *layer.buffers()]
    before, versions = bits(layer), [tensor._version for tensor in tensors]
    with torch.no_grad():
        layer(torch.randn(5, 128) * 10)
    assert bits(layer) == before
    assert [tensor._version for tensor in tensors] == versions
    assert all(a is b for a, b in zip(tensors, (*layer.parameters(), *layer.buffers()), strict=True))


@pytest.mark.parametrize("compute", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.float16, torch.bfloat16])
def test_compute_dtype_is_used_and_the_input_dtype_given_back(compute: torch.dtype, given: torch.dtype) -> None:
    layer = make("nf4", nn.Linear(128, 96), bnb_4bit_compute_dtype=compute)
    x = torch.randn(4, 128).to(given)
    result = layer(x)
    assert result.dtype == given
    # In bfloat16 the CPU levels with an instruction for it round the weight too; the others multiply it as it stands,
    # but for fixed point, which rounds its table, in 16 bits.
    last_bits = 2 * max(torch.finfo(compute).eps, torch.finfo(given).eps)
    in_fixed_point = native.kernels("cpu").level == "avx2" and compute is not torch.float32
    found = []
    for weight in (layer.dequantize(torch.float32), layer.dequantize(compute)):
        exact = nn.functional.linear(x.to(compute).double(), weight.double(), layer.bias.double())
        size = nn.functional.linear(x.double().abs(), weight.double().abs())
        expected = exact.to(compute).to(given).double()
        error = (result.double() - expected).abs()
        found.append(bool((error <= last_bits * expected.abs() + (2**-12 * size if in_fixed_point else 1e-5)).all()))
    assert found[0] or (compute is torch.bfloat16 and found[1])
    if compute is not torch.float32 and given is torch.float32:
        assert torch.equal(result, result.to(compute).float())


@torch.no_grad()
def test_int8_activations_change_the_product_alone() -> None:
    """Off unless asked for; the same packed bytes; and honoured where the attribute is set later."""
    linear = nn.Linear(128, 96)
    plain, fast = make("nf4", linear), make("nf4", linear, bnb_4bit_activations="int8")
    assert bits(fast) == bits(plain)
    assert "int8 activations" in repr(fast)
    assert "int8 activations" not in repr(plain)
    x = torch.randn(5, 128)
    expected, rounded = plain(x), fast(x)
    assert rounded.dtype == expected.dtype
    assert 0 < float((rounded - expected).norm() / expected.norm()) < 0.03
    plain.activations, fast.activations = fast.activations, plain.activations
    assert torch.equal(plain(x), rounded)
    assert torch.equal(fast(x), expected)


def test_int8_outliers_by_value_leave_neighbours_alone() -> None:
    layer = make("int8", nn.Linear(128, 64))
    rows = torch.randn(2, 128)
    loud = rows.clone()
    loud[1, ::3] = 50.0
    assert torch.equal(layer(rows)[0], layer(loud)[0])
    batch = make("int8", nn.Linear(128, 64), llm_int8_outliers="batch")
    assert not torch.equal(batch(rows)[0], batch(loud)[0])


def test_int8_threshold_is_honoured() -> None:
    linear = nn.Linear(128, 64)
    x = torch.randn(4, 128)
    x[:, 5] = 40.0
    with torch.no_grad():
        exact = linear(x)
        error_at = {
            t: float((make("int8", linear, llm_int8_threshold=t)(x) - exact).norm()) for t in (0.0, 6.0, 39.0, 41.0)
        }
    assert error_at[6.0] < 0.5 * error_at[0.0]
    assert error_at[39.0] < 0.5 * error_at[41.0]


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients(name: str) -> None:
    layer = make(name, nn.Linear(64, 48))
    x = torch.randn(2, 5, 64, requires_grad=True)
    gradient = torch.randn(2, 5, 48)
    layer(x).backward(gradient)
    weight = layer.dequantize(torch.float32)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, gradient @ weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.bias.grad, gradient.sum((0, 1)), rtol=1e-4, atol=1e-4)
    if name == "int8-fp16":
        expected = gradient.flatten(0, 1).t() @ x.detach().flatten(0, 1)
        assert layer.weight.grad is not None
        assert layer.weight.grad.dtype == torch.float16
        torch.testing.assert_close(layer.weight.grad.float(), expected, rtol=1e-2, atol=1e-2)
    else:
        assert not layer.weight.requires_grad
        assert layer.weight.grad is None


def test_a_main_weight_is_the_same_parameter_after_loading() -> None:
    """An optimizer that was made before goes on training it."""
    layer, other = (make("int8-fp16", nn.Linear(64, 48)) for _ in range(2))
    parameter = layer.weight
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer.load_state_dict(other.state_dict())
    assert layer.weight is parameter
    assert torch.equal(layer.weight, other.weight)
    layer(torch.randn(3, 64)).sum().backward()
    optimizer.step()
    assert not torch.equal(layer.weight, other.weight)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("assign", [False, True])
def test_a_frozen_main_weight_stays_frozen(assign: bool, device: str) -> None:
    layer = make("int8-fp16", nn.Linear(64, 48)).to(device)
    layer.weight.requires_grad_(False)
    state = make("int8-fp16", nn.Linear(64, 48)).state_dict()
    layer.load_state_dict(state, assign=assign)
    assert torch.equal(layer.weight, state["weight"])
    assert (layer.weight.data_ptr() == state["weight"].data_ptr()) == assign
    layer.quantize(torch.zeros(48, 64))
    assert not layer.weight.requires_grad


def test_fp16_main_weight_is_quantized_anew_in_each_forward() -> None:
    layer = make("int8-fp16", nn.Linear(64, 48, bias=False))
    x = torch.randn(3, 64)
    first = layer(x)
    assert layer.weight.dtype == torch.float16
    with torch.no_grad():
        layer.weight.mul_(2)
    torch.testing.assert_close(layer(x), 2 * first, rtol=1e-3, atol=1e-3)
    assert list(layer.state_dict()) == ["weight"]


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("cast", ["half", "double", "bfloat16", "float", "to", "type"])
def test_casts_never_touch_packed_bytes(name: str, cast: str) -> None:
    layer = make(name, nn.Linear(64, 48))
    before = bits(layer)
    x = torch.randn(3, 64)
    expected = layer(x)
    result = layer.to(torch.float16) if cast == "to" else layer
    if cast == "type":
        result = layer.type(torch.float16)
    elif cast != "to":
        result = getattr(layer, cast)()
    assert result is layer
    after = bits(layer)
    before.pop("bias")
    assert {key: after[key] for key in before} == before
    assert after["bias"][0] == {"double": torch.float64, "bfloat16": torch.bfloat16, "float": torch.float32}.get(
        cast, torch.float16
    )
    if cast != "double":
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=2e-2)


@pytest.mark.parametrize("name", CONFIGS)
def test_meta_and_back(name: str) -> None:
    layer = make(name, nn.Linear(64, 48))
    state = layer.state_dict()
    empty = make(name, nn.Linear(64, 48, device="meta"))
    assert all(t.is_meta for t in (*empty.parameters(), *empty.buffers()))
    assert list(empty.state_dict()) == ["weight", "bias"]
    shapes = {key: (t.shape, t.dtype) for key, t in (*layer.named_parameters(), *layer.named_buffers())}
    assert {key: (t.shape, t.dtype) for key, t in (*empty.named_parameters(), *empty.named_buffers())} == shapes
    empty.load_state_dict(state)
    x = torch.randn(2, 64)
    assert torch.equal(empty(x), layer(x))
    on_cpu = make(name, nn.Linear(64, 48, device="meta")).to_empty(device="cpu")
    assert {key: (t.shape, t.dtype) for key, t in (*on_cpu.named_parameters(), *on_cpu.named_buffers())} == shapes
    on_cpu.load_state_dict(state)
    assert torch.equal(on_cpu(x), layer(x))


@pytest.mark.parametrize("name", CONFIGS)
def test_copies_are_independent(name: str) -> None:
    layer = make(name, nn.Linear(64, 48))
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    restored = make(name, nn.Linear(64, 48))
    restored.load_state_dict(torch.load(buffer))
    twins = [copy.deepcopy(layer), restored]
    before = bits(layer)
    for twin in twins:
        assert bits(twin) == before
        with torch.no_grad():
            for tensor in (*twin.parameters(), *twin.buffers()):
                tensor.zero_()
    assert bits(layer) == before


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("assign", [True, False])
def test_state_dict_round_trip_in_a_model(name: str, assign: bool) -> None:
    model = nn.Sequential(make(name, nn.Linear(64, 48)), nn.ReLU(), make(name, nn.Linear(48, 8, bias=False)))
    other = nn.Sequential(make(name, nn.Linear(64, 48)), nn.ReLU(), make(name, nn.Linear(48, 8, bias=False)))
    other.load_state_dict(model.state_dict(), assign=assign)
    assert bits(other) == bits(model)
    x = torch.randn(2, 64)
    assert torch.equal(other(x), model(x))
    shared = other[0].weight.data_ptr() == model[0].weight.data_ptr()
    assert shared == assign or name == "int8-fp16"


def test_state_dict_complaints() -> None:
    layer = make("nf4", nn.Linear(64, 48))
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match="weight.absmax has 3 values; 48 are needed"):
        layer.load_state_dict(state | {"weight.absmax": torch.zeros(3)})
    with pytest.raises(RuntimeError, match='Missing key.*"weight"'):
        layer.load_state_dict({"bias": state["bias"]})
    with pytest.raises(RuntimeError, match='Missing key.*"bias"'):
        layer.load_state_dict({key: t for key, t in state.items() if key != "bias"})
    with pytest.raises(RuntimeError, match='Unexpected key.*"extra"'):
        layer.load_state_dict(state | {"extra": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"bias has shape \[47\]; \[48\] is needed"):
        layer.load_state_dict(state | {"bias": torch.zeros(47)})
    with pytest.raises(RuntimeError, match=r"Packed4bit of shape \[40, 64\] was given to a Linear4bit"):
        layer.load_state_dict(make("nf4", nn.Linear(64, 40)).state_dict() | {"bias": state["bias"]})
    with pytest.raises(CheckpointError, match="Packed4bit"):
        make("int8", nn.Linear(64, 48)).adopt(layer.packed_weight())


def test_per_tensor_state_wins_over_the_config() -> None:
    fp4 = make("fp4", nn.Linear(64, 48))
    layer = make("nf4-dq", nn.Linear(64, 48))
    layer.load_state_dict(fp4.state_dict())
    x = torch.randn(2, 64)
    assert torch.equal(layer(x), fp4(x))
    assert bits(layer) == bits(fp4)


def test_a_nested_table_of_another_writer_is_computed_with() -> None:
    layer = make("nf4-dq", nn.Linear(64, 48))
    state = layer.state_dict()
    state["weight.nested_quant_map"] = torch.linspace(-1, 1, 256)
    layer.load_state_dict(state)
    x = torch.randn(2, 64)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.dequantize(), layer.bias))
    assert bits(layer)["weight.nested_quant_map"] == (
        torch.float32,
        bytes(torch.linspace(-1, 1, 256).view(torch.uint8).tolist()),
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_conv1d_is_transposed(name: str) -> None:
    conv = Conv1D(48, 64)
    nn.init.normal_(conv.bias)
    layer = make(name, conv)
    x = torch.randn(3, 64)
    assert (layer.in_features, layer.out_features) == (64, 48)
    with torch.no_grad():
        relative = (layer(x) - conv(x)).norm() / conv(x).norm()
    assert float(relative) < 0.3
    torch.testing.assert_close(layer.dequantize(torch.float32).t(), conv.weight, atol=0.03, rtol=0.3)


def test_the_original_keeps_its_bias() -> None:
    linear = nn.Linear(8, 8)
    make("nf4", linear).half()
    assert linear.bias.dtype == torch.float32


def test_what_is_refused() -> None:
    with pytest.raises(QuantConfigError, match="load_in_8bit"):
        Linear4bit.from_float(nn.Linear(4, 4), BitsAndBytesConfig(load_in_8bit=True))
    with pytest.raises(QuantConfigError, match="load_in_4bit"):
        Linear8bit.from_float(nn.Linear(4, 4), BitsAndBytesConfig(load_in_4bit=True))
    with pytest.raises(ShapeError, match="Embedding"):
        Linear4bit.from_float(nn.Embedding(4, 4), BitsAndBytesConfig(load_in_4bit=True))
    with pytest.raises(ShapeError, match="Linear4bit"):
        make("int8", make("nf4", nn.Linear(4, 4)))


@pytest.mark.parametrize("name", CONFIGS)
def test_inference_mode_and_training_flag(name: str) -> None:
    layer = make(name, nn.Linear(64, 48).eval())
    assert not layer.training
    with torch.inference_mode():
        assert layer(torch.randn(1, 64)).shape == (1, 48)
    assert "Linear" in repr(layer)
    assert "in_features=64" in repr(layer)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", PACKED)
def test_devices(name: str) -> None:
    layer = make(name, nn.Linear(64, 48))
    x, before = torch.randn(3, 64), bits(layer)
    expected = layer(x)
    layer.cuda()
    assert all(t.is_cuda for t in (*layer.parameters(), *layer.buffers()))
    torch.testing.assert_close(layer(x.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)
    assert bits(layer.cpu()) == before


@pytest.mark.parametrize("double_quant", [False, True])
def test_packing_again_keeps_the_format_that_was_loaded(double_quant: bool) -> None:
    loaded, layer = (
        make("nf4", nn.Linear(128, 96), bnb_4bit_use_double_quant=doubly) for doubly in (double_quant, not double_quant)
    )
    layer.load_state_dict(loaded.state_dict())
    weight = torch.randn(96, 128)
    for each in (loaded, layer):
        each.quantize(weight)
    loaded.bias = layer.bias
    assert bits(layer) == bits(loaded)
