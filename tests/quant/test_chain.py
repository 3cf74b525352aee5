"""Calls in a chain: the bits of the calls alone, however many rows, in buffers that chains share."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from quant import BitsAndBytesConfig, Linear4bit, Linear8bit, direct_rows
from quant.chain import BUFFERS, Chain, Run
from quant.errors import NativeError, ShapeError
from quant.siblings import direct_of
from tests.quant.operands import fresh_generator, same_bits

CONFIGS = {
    "nf4-dq": BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ),
    "nf4-int8": BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_activations="int8",
    ),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}
HIDDEN, INNER = 128, 192


@pytest.fixture(autouse=True)
def inference() -> object:
    with torch.no_grad():
        yield


def layer(name: str, rows: int, columns: int) -> Linear4bit | Linear8bit:
    config = CONFIGS[name]
    kind = Linear8bit if config.load_in_8bit else Linear4bit
    made: Linear4bit | Linear8bit = kind.from_float(nn.Linear(columns, rows), config)
    return made


class Block:
    """x + down(silu(gate(norm(x))) * up(norm(x))), by a chain and by calls."""

    def __init__(self, names: tuple[str, str, str]) -> None:
        self.gate, self.up = layer(names[0], INNER, HIDDEN), layer(names[1], INNER, HIDDEN)
        self.down = layer(names[2], HIDDEN, INNER)
        self.norm = torch.randn(HIDDEN).bfloat16()

    def by_calls(self, x: torch.Tensor) -> torch.Tensor:
        y = direct_rows.rms_norm(x, self.norm, 1e-5)
        out: torch.Tensor = x + self.down(direct_rows.swiglu(self.gate(y), self.up(y)))
        return out

    def chain(self, rows: int) -> tuple[Chain, tuple[object, object, torch.Tensor]]:
        chain = Chain(rows, torch.bfloat16)
        like = torch.empty(rows, HIDDEN, dtype=torch.bfloat16)
        gate, up, down = (direct_of(part, like) for part in (self.gate, self.up, self.down))
        assert gate is not None
        assert up is not None
        assert down is not None
        norm, y = chain.rms_norm(None, self.norm, 1e-5)
        (product,) = chain.linear(chain.swiglu(*chain.linear(y, [gate, up])), [down])
        last, out = chain.add(None, product)
        chain.ready()
        return chain, (norm, last, out)


def run(chained: tuple[Chain, tuple[object, object, torch.Tensor]], x: torch.Tensor) -> torch.Tensor:
    chain, (norm, last, out) = chained
    norm.x = last.a = x.data_ptr()  # type: ignore[attr-defined]
    Run([chain])()
    return out.clone()


@pytest.mark.parametrize("rows", [1, 2, 5, 9, 70])
@pytest.mark.parametrize(
    "names", [("nf4-dq",) * 3, ("nf4-int8",) * 3, ("int8",) * 3, ("nf4-dq", "int8", "nf4-int8")], ids=str
)
def test_a_chain_has_the_bits_of_its_calls(names: tuple[str, str, str], rows: int) -> None:
    block = Block(names)
    chained = block.chain(rows)
    for _ in range(2):
        x = torch.randn(rows, HIDDEN, generator=fresh_generator()).bfloat16()
        assert same_bits(run(chained, x), block.by_calls(x))


def one_behind_the_other(x: torch.Tensor) -> tuple[list[Block], list[Chain], torch.Tensor, Any]:
    """Two blocks, their chains, of which the second goes on with what the first gives: that, and the last sum."""
    blocks = [Block(("nf4-dq",) * 3), Block(("int8",) * 3)]
    chained: list[Any] = [block.chain(len(x)) for block in blocks]
    (_, (norm, last, out)), (_, (next_norm, next_last, _)) = chained
    norm.x = last.a = x.data_ptr()
    next_norm.x = next_last.a = out.data_ptr()
    return blocks, [chain for chain, _ in chained], out, next_last


def test_chains_one_behind_the_other() -> None:
    x = torch.randn(3, HIDDEN).bfloat16()
    blocks, chains, out, _ = one_behind_the_other(x)
    Run(chains)()
    assert same_bits(out.clone(), blocks[1].by_calls(blocks[0].by_calls(x)))


def test_some_of_the_chains_that_are_one_behind_the_other() -> None:
    x = torch.randn(3, HIDDEN).bfloat16()
    blocks, chains, out, next_last = one_behind_the_other(x)
    apart = torch.full_like(out, torch.nan)
    next_last.out = apart.data_ptr()
    Run(chains)(1)
    assert same_bits(out.clone(), blocks[0].by_calls(x))
    assert apart.isnan().all()


def test_a_chain_that_goes_on_from_another_leaves_its_results() -> None:
    first = Chain(4, torch.bfloat16)
    x = torch.randn(4, HIDDEN).bfloat16()
    weight = torch.randn(HIDDEN).bfloat16()
    _, normed = first.rms_norm(x, weight, 1e-5)
    first.ready()
    Run([first])()
    kept = normed.clone()
    second = Chain(2, torch.bfloat16, goes_on_from=first)
    _, again = second.rms_norm(normed[1:3], weight, 1e-5)
    second.ready()
    Run([second])()
    assert same_bits(normed, kept)
    assert same_bits(again, direct_rows.rms_norm(kept[1:3], weight, 1e-5))


def test_buffers_double() -> None:
    """Each chain keeps those it was made with; a buffer a row would leave many behind."""
    block = Block(("nf4-dq",) * 3)
    kept = [block.chain(rows) for rows in (65, 128)]
    before = BUFFERS.nbytes
    kept += [block.chain(rows) for rows in (66, 100, 127)]
    assert BUFFERS.nbytes == before
    kept = [block.chain(rows) for rows in (129, 130, 200, 255)]
    after = BUFFERS.nbytes
    kept.append(block.chain(256))
    assert BUFFERS.nbytes == after


def test_chains_share_their_buffers_and_keep_what_they_use() -> None:
    blocks = [Block(("nf4-dq",) * 3) for _ in range(3)]
    x = torch.randn(40, HIDDEN).bfloat16()
    small = [block.chain(2) for block in blocks]
    before = BUFFERS.nbytes
    more = [block.chain(2) for block in blocks]
    assert BUFFERS.nbytes == before
    large = [block.chain(40) for block in blocks]  # larger buffers; the small chains keep theirs
    for block, *chains in zip(blocks, small, more, large, strict=True):
        for chain in chains:
            rows = x[: chain[0].rows].contiguous()
            assert same_bits(run(chain, rows), block.by_calls(rows))


def test_a_chain_goes_on_with_the_tensors_it_was_made_for() -> None:
    """Whoever keeps a chain decides by `direct_of` when it is stale; until then its weights stay alive."""
    block = Block(("nf4-dq",) * 3)
    x = torch.randn(3, HIDDEN).bfloat16()
    chained, expected = block.chain(3), block.by_calls(x)
    before = direct_of(block.gate, x)
    block.gate.quantize(torch.randn(INNER, HIDDEN))
    assert direct_of(block.gate, x) is not before
    torch.empty(1 << 20).fill_(float("nan"))
    assert same_bits(run(chained, x), expected)
    assert not same_bits(block.by_calls(x), expected)


def test_what_does_not_fit_is_refused() -> None:
    block = Block(("nf4-dq",) * 3)
    chain = Chain(2, torch.bfloat16)
    direct = direct_of(block.down, torch.empty(2, INNER, dtype=torch.bfloat16))
    assert direct is not None
    x = torch.zeros(2, HIDDEN, dtype=torch.bfloat16)
    with pytest.raises(ShapeError, match="its last size must be 192"):
        chain.linear(x, [direct])
    with pytest.raises(ShapeError, match="weight has dtype torch.float32"):
        chain.rms_norm(x, block.norm.float(), 1e-5)
    with pytest.raises(ShapeError, match=r"weight has shape \[64\]"):
        chain.rms_norm(x, block.norm[:64], 1e-5)
    with pytest.raises(ShapeError, match="they must be alike"):
        chain.swiglu(x, x[:1])
    with pytest.raises(ShapeError, match=r"a has shape \[1, 128\] and b \[2, 128\]"):
        chain.add(x[:1], x)
    with pytest.raises(ShapeError, match="an even head size"):
        chain.rotary(x.view(2, -1)[:, :9].reshape(2, 3, 3), x.view(2, 2, 64))
    with pytest.raises(ShapeError, match=r"value has shape \[2, 1, 128\]; \[2, 2, head size\]"):
        chain.cache_write(x.view(2, 2, 64), x.view(2, 1, 128))


def test_an_error_on_the_way_is_told() -> None:
    chained = Block(("nf4-dq",) * 3).chain(2)
    with pytest.raises(NativeError, match="hb_run in the cpu library refused: A pointer is null"):
        Run([chained[0]])()  # nobody has said where x is


def test_layers_are_copied_without_their_pointers() -> None:
    block = Block(("nf4-dq",) * 3)
    x = torch.randn(2, HIDDEN).bfloat16()
    twin = copy.deepcopy(block)
    assert same_bits(run(twin.chain(2), x), run(block.chain(2), x))
