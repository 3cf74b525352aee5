"""Our layers as modules among others: compiled, exported, pickled, offloaded, called functionally, like nn.Linear.

Each test runs the same steps on nn.Linear's own twin where the steps themselves could be at fault. What one layer
computes is tested in test_linear.py.
"""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import accelerate
import pytest
import torch
import transformers
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils.modeling import get_state_dict_offloaded_model
from torch import nn

from quant import BitsAndBytesConfig
from quant.experts import PackedExperts
from quant.linear import PackedLinear
from tests import tiny_models
from tests.quant.test_linear import CONFIGS, PACKED, bits, make

EVERY = [*CONFIGS, "linear"]
COMPILED = ["nf4", "nf4-dq-bf16-storage", "int8", "int8-fp16"]
TORCHS_OWN_WARNING = "ignore:.*should not be instantiated:DeprecationWarning"  # where it traces an autograd.Function


class Small(nn.Module):
    """Two layers of one kind in a block of their own, a norm between them."""

    def __init__(self, name: str, **changes: object) -> None:
        super().__init__()
        first, second = nn.Linear(64, 48), nn.Linear(48, 8, bias=False)
        if name != "linear":
            first, second = make(name, first, **changes), make(name, second, **changes)
        self.first = first
        self.inner = nn.Sequential(nn.LayerNorm(48), nn.ReLU(), second)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(self.first(x))
        return result


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def tiny_llama(config: BitsAndBytesConfig, directory: Path) -> nn.Module:
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_models.save_tiny("llama", directory), quantization_config=config, dtype=torch.float32
    )
    return model


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.filterwarnings(TORCHS_OWN_WARNING)
def test_compile_has_no_graph_break(name: str) -> None:
    model = Small(name)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 5):
        x = torch.randn(rows, 64)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.filterwarnings(TORCHS_OWN_WARNING)
def test_compile_with_gradients(name: str) -> None:
    model = Small(name)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    compiled(x).square().sum().backward()
    gradients = {key: tensor.grad for key, tensor in model.named_parameters() if tensor.grad is not None}
    model.zero_grad()
    model(twin).square().sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)
    expected = {key: tensor.grad for key, tensor in model.named_parameters() if tensor.grad is not None}
    assert set(gradients) == set(expected)
    for key, gradient in expected.items():
        torch.testing.assert_close(gradients[key], gradient)


def test_compile_with_outliers_over_the_batch() -> None:
    model = Small("int8", llm_int8_outliers="batch")
    x = torch.randn(4, 64)
    x[:, 3] = 30.0
    with torch.no_grad():
        result = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
        torch.testing.assert_close(result, model(x))


def test_compile_with_a_nested_table_of_another_writer() -> None:
    model = Small("nf4-dq")
    state = model.state_dict() | {"first.weight.nested_quant_map": torch.linspace(-1, 1, 256)}
    model.load_state_dict(state)
    x = torch.randn(3, 64)
    with torch.no_grad():
        result = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
        torch.testing.assert_close(result, model(x))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compile_with_inductor(name: str) -> None:
    model = Small(name)
    compiled = torch.compile(model, backend="inductor", fullgraph=True)
    x = torch.randn(3, 64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    result = compiled(x)
    torch.testing.assert_close(result, model(twin))
    result.square().sum().backward()
    model(twin).square().sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)


def test_a_whole_model_compiles_into_one_graph(tmp_path: Path) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = tiny_llama(config, tmp_path)
    assert any(isinstance(module, PackedLinear) for module in model.modules())
    ids = torch.randint(3, 300, (1, 9))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        result = torch.compile(model, backend="aot_eager", fullgraph=True)(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("name", PACKED)
def test_export(name: str) -> None:
    model = Small(name).eval()
    x = torch.randn(3, 64)
    program = torch.export.export(model, (x,))
    operator = "linear_8bit" if name == "int8" else "linear_4bit"
    assert sum(operator in str(node.target) for node in program.graph.nodes) == 2
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("name", EVERY)
def test_pickled_copied_and_saved_whole(name: str) -> None:
    model = Small(name)
    model.first.bias.requires_grad_(False)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twins = [
        pickle.loads(pickle.dumps(model)),  # noqa: S301 - its own bytes
        copy.deepcopy(model),
        torch.load(buffer, weights_only=False),
    ]
    x = torch.randn(2, 64)
    for twin in twins:
        assert bits(twin) == bits(model)
        assert torch.equal(twin(x), model(x))
        ours, theirs = dict(model.named_parameters()), dict(twin.named_parameters())
        assert {k: t.requires_grad for k, t in theirs.items()} == {k: t.requires_grad for k, t in ours.items()}
        storages = {tensor.untyped_storage().data_ptr() for tensor in tensors_of(model).values()}
        assert not storages & {tensor.untyped_storage().data_ptr() for tensor in tensors_of(twin).values()}


@pytest.mark.parametrize("name", EVERY)
def test_functional_call_takes_the_tensors_given(name: str) -> None:
    model, other = Small(name), Small(name)
    x = torch.randn(2, 64)
    result = torch.func.functional_call(model, tensors_of(other), (x,))
    assert torch.equal(result, other(x))
    assert not torch.equal(result, model(x))


@pytest.mark.parametrize("name", EVERY)
def test_moving_by_swapping_tensors(name: str) -> None:
    model = Small(name)
    before = bits(model)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to(torch.float64).to(torch.float32)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    if name != "int8-fp16":
        assert bits(model) == before
    assert model(torch.randn(2, 64)).dtype == torch.float32


@pytest.mark.parametrize("name", EVERY)
def test_to_meta_and_back(name: str) -> None:
    model = Small(name)
    state, x = model.state_dict(), torch.randn(2, 64)
    expected = model(x)
    model.to("meta")
    assert all(tensor.is_meta for tensor in tensors_of(model).values())
    model.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(model(x), expected)
    model.to("meta").load_state_dict(state, assign=True)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", EVERY)
def test_shared_memory(name: str) -> None:
    model = Small(name)
    before = bits(model)
    model.share_memory()
    assert all(tensor.untyped_storage().is_shared() for tensor in tensors_of(model).values())
    assert bits(model) == before


def with_a_table_of_its_own(model: nn.Module, name: str) -> nn.Module:
    """The same with one more buffer, which files of other writers bring."""
    if name.startswith("nf4-dq"):
        model.load_state_dict(model.state_dict() | {"first.weight.nested_quant_map": torch.linspace(-1, 1, 256)})
    return model


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_disk_offload(name: str, buffers: bool, tmp_path: Path) -> None:
    model = with_a_table_of_its_own(Small(name), name)
    x = torch.randn(2, 64)
    expected, state = model(x), bits(model)
    accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"), offload_buffers=buffers)
    assert model.first.weight.is_meta
    for _ in range(2):
        assert torch.equal(model(x), expected)
        assert model.first.weight.is_meta
        assert all(buffer.is_meta == buffers for buffer in model.buffers())
    restored = get_state_dict_offloaded_model(model)
    assert {key: (t.dtype, bytes(t.view(-1).view(torch.uint8).tolist())) for key, t in restored.items()} == state


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_cpu_offload(name: str, buffers: bool) -> None:
    model = with_a_table_of_its_own(Small(name), name)
    x = torch.randn(2, 64)
    expected, state = model(x), bits(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=buffers)
    assert model.first.weight.is_meta
    assert torch.equal(model(x), expected)
    assert all(buffer.is_meta == buffers for buffer in model.buffers())
    assert torch.equal(copy.deepcopy(model)(x), expected)
    remove_hook_from_submodules(model)
    assert bits(model) == state
    assert torch.equal(model(x), expected)
    assert not hasattr(model.first, "_hf_hook")


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_dispatch_over_cpu_and_disk(name: str, buffers: bool, tmp_path: Path) -> None:
    model = with_a_table_of_its_own(Small(name), name)
    x = torch.randn(2, 64)
    expected = model(x)
    places = {"first": "cpu", "inner": "disk"}
    model = accelerate.dispatch_model(
        model, places, offload_dir=tmp_path, main_device="cpu", force_hooks=True, offload_buffers=buffers
    )
    assert torch.equal(model(x), expected)
    assert model.inner[2].weight.is_meta
    assert all(buffer.is_meta == buffers for buffer in model.inner.buffers())


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("name", ["nf4", "nf4-dq-bf16-storage", "int8"])
@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_packed_experts_are_offloaded(architecture: str, name: str, buffers: bool, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_models.save_tiny(architecture, tmp_path / "source"),
        quantization_config=BitsAndBytesConfig(**CONFIGS[name]),
    )
    (first, second) = [module for module in model.modules() if isinstance(module, PackedExperts)]
    ids = torch.randint(3, 300, (2, 9))
    with torch.no_grad():
        expected, state = model(input_ids=ids).logits, bits(first)
        accelerate.cpu_offload(model.model.layers[0], execution_device=torch.device("cpu"), offload_buffers=buffers)
        accelerate.disk_offload(
            model.model.layers[1], tmp_path / "offload", execution_device=torch.device("cpu"), offload_buffers=buffers
        )
        for _ in range(2):
            assert torch.equal(model(input_ids=ids).logits, expected)
            for experts in (first, second):
                assert all(parameter.is_meta for parameter in experts.parameters())
                assert all(buffer.is_meta == buffers for buffer in experts.buffers())
        remove_hook_from_submodules(model)
        assert bits(first) == state
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_a_name_that_no_tensor_has_is_a_key_error() -> None:
    layer = make("nf4", nn.Linear(64, 8))
    for name in ("SCB", "nested_offset", "bias", "anything"):
        with pytest.raises(KeyError):
            layer.tensor_in_files(name, {})
