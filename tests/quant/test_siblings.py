"""Products of one x made together: the bits of each layer alone, and each layer alone where they cannot be."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from quant import BitsAndBytesConfig, Linear4bit, Linear8bit
from quant.siblings import Siblings, multiplied_together
from tests.quant.operands import same_bits

BF16 = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16}
CONFIGS = {
    "nf4": BitsAndBytesConfig(**BF16, bnb_4bit_quant_type="nf4"),
    "fp4-dq": BitsAndBytesConfig(**BF16, bnb_4bit_use_double_quant=True),
    "nf4-128": BitsAndBytesConfig(**BF16, bnb_4bit_quant_type="nf4", bnb_4bit_blocksize=128),
    "nf4-int8": BitsAndBytesConfig(**BF16, bnb_4bit_quant_type="nf4", bnb_4bit_activations="int8"),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "int8-all": BitsAndBytesConfig(load_in_8bit=True, llm_int8_outliers="all"),
    "int8-batch": BitsAndBytesConfig(load_in_8bit=True, llm_int8_outliers="batch", llm_int8_threshold=1.0),
}
COLUMNS = 256


def layer(name: str, rows: int, columns: int = COLUMNS, bias: bool = True) -> nn.Module:
    config = CONFIGS[name]
    kind = Linear8bit if config.load_in_8bit else Linear4bit
    return kind.from_float(nn.Linear(columns, rows, bias=bias), config)


def alone(layers: Sequence[nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
    return [layer(x) for layer in layers]


def agree(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return len(found) == len(expected) and all(map(same_bits, found, expected))


@pytest.fixture(autouse=True)
def inference() -> object:
    with torch.no_grad():
        yield


@pytest.mark.parametrize(
    "names",
    [
        ("nf4", "nf4", "nf4"),
        ("fp4-dq", "nf4"),
        ("nf4", "nf4-128"),
        ("int8",) * 3,
        ("int8-all",) * 2,
        ("int8-batch",) * 2,
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_together_they_give_what_each_gives_alone(names: tuple[str, ...], dtype: torch.dtype) -> None:
    layers = [layer(name, rows, bias=rows != 70) for name, rows in zip(names, (70, 1, 130), strict=False)]
    siblings = Siblings(layers)
    for shape in [(COLUMNS,), (1, 1, COLUMNS), (2, 5, COLUMNS), (0, COLUMNS), (300, COLUMNS)]:
        x = (torch.randn(shape) * 3).to(dtype)
        assert agree(siblings(x), alone(layers, x)), shape
    is_grouped = siblings._group is not None
    assert is_grouped == (names[0].startswith("int8") or dtype == torch.bfloat16), "4-bit ones in their compute dtype"


@pytest.mark.parametrize(
    "layers",
    [
        pytest.param(lambda: [layer("nf4", 8), layer("int8", 8)], id="two entries"),
        pytest.param(lambda: [layer("int8", 8), layer("int8-all", 8)], id="two rules"),
        pytest.param(lambda: [layer("nf4", 8), nn.Linear(COLUMNS, 8, dtype=torch.bfloat16)], id="one unquantized"),
        pytest.param(lambda: [layer("nf4", 8) for _ in range(9)], id="too many"),
        pytest.param(lambda: [layer("nf4-int8", 8) for _ in range(2)], id="an entry without groups"),
    ],
)
def test_what_cannot_be_one_call_is_several(layers: object) -> None:
    several: list[nn.Module] = layers()  # type: ignore[operator]
    siblings = Siblings(several)
    x = torch.randn(3, COLUMNS, dtype=torch.bfloat16)
    assert agree(siblings(x), alone(several, x))
    assert siblings._group is None


def test_hooks_and_forwards_of_an_object_are_heeded() -> None:
    layers = [layer("nf4", 8), layer("nf4", 8)]
    siblings = Siblings(layers)
    x = torch.randn(3, COLUMNS, dtype=torch.bfloat16)
    plain = siblings(x)
    handle = layers[1].register_forward_hook(lambda module, arguments, output: output + 1)
    assert agree(siblings(x), [plain[0], plain[1] + 1])
    handle.remove()
    assert agree(siblings(x), plain)
    layers[0].forward = lambda x: x * 2  # type: ignore[method-assign, assignment]
    assert agree(siblings(x), [x * 2, plain[1]])


def test_a_weight_that_changed_and_a_layer_that_was_replaced_are_seen() -> None:
    owner = nn.Module()
    first, second = layer("nf4", 8), layer("nf4", 8)
    x = torch.randn(3, COLUMNS, dtype=torch.bfloat16)
    assert agree(multiplied_together(owner, (first, second), x), alone([first, second], x))
    first.load_state_dict(layer("nf4", 8).state_dict(), assign=True)
    assert agree(multiplied_together(owner, (first, second), x), alone([first, second], x))
    third = layer("nf4", 5)
    assert agree(multiplied_together(owner, (first, third), x), alone([first, third], x))
    twin = copy.deepcopy(owner)
    assert twin.__dict__["_siblings"]._group is None, "pointers stay behind"


def test_gradients_go_through_the_layers() -> None:
    layers = [layer("nf4", 8), layer("nf4", 8)]
    with torch.enable_grad():
        x = torch.randn(3, COLUMNS, requires_grad=True)
        sum(out.sum() for out in Siblings(layers)(x)).backward()
        assert x.grad is not None
        assert x.grad.abs().sum() > 0
