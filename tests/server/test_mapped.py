"""A checkpoint's file is let go of where little of it is the model, and stays mapped where most is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from server.model.load import load_model
from server.model.mapped import let_go
from server.records import ModelSpec
from tests.tiny_models import save_tiny

MAPS = Path("/proc/self/maps")
pytestmark = pytest.mark.skipif(not MAPS.is_file(), reason="without /proc nobody can tell what is mapped")


def is_mapped(path: Path) -> bool:
    return str(path) in MAPS.read_text()


@pytest.mark.parametrize(("quantization", "stays"), [("nf4", False), ("int8", False), ("none", True)])
@pytest.mark.parametrize("tied", [False, True])
def test_a_file_that_was_packed_is_let_go_of(quantization: str, stays: bool, tied: bool, tmp_path: Path) -> None:
    path = save_tiny("llama", tmp_path / "model", num_hidden_layers=4, tie_word_embeddings=tied)
    loaded = load_model(ModelSpec("m", str(path), quantization=quantization), lambda *_: None)
    assert is_mapped(path) == stays
    model = loaded.model
    same = model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    assert same == tied


@torch.no_grad()  # a graph would hold the old tensors
def test_a_copy_is_the_same_model(tmp_path: Path) -> None:
    path = save_tiny("llama", tmp_path / "model", num_hidden_layers=4)
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert let_go(model) == 0, "all of the file is the model"
    tokens = torch.tensor([[5, 6, 7, 8]])
    before = model(tokens).logits
    for parameter in model.model.layers.parameters():
        parameter.data = parameter.data.clone()  # as if it had been packed
    embedding = model.get_input_embeddings().weight
    left = {
        parameter.data_ptr(): parameter.nbytes for name, parameter in model.named_parameters() if "layers" not in name
    }
    assert let_go(model) == sum(left.values())
    assert not is_mapped(path)
    assert model.get_input_embeddings().weight is embedding
    assert torch.equal(model(tokens).logits, before)
    assert let_go(model) == 0
