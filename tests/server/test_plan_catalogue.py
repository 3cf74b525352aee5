"""Plans of well-known models from their configs alone, against figures worked out by hand (tests/catalogue.py)."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch

from quant.memory import meta_model, read_config
from server.memory.machine import Share
from server.memory.plan import make_plan
from server.records import ModelSpec, Plan
from tests.catalogue import CATALOGUE, write_config

TIB = 2**40
GB = {  # weights in NF4 and in NF4 with double quantization, 10^9 bytes: 0.5625 and 0.51587 bytes a number, others two
    "Llama-2-7B": (4.17, 3.87),
    "Llama-3.1-8B": (6.03, 5.70),
    "Llama-3.1-70B": (42.71, 39.52),
    "Llama-3.1-405B": (234.34, 215.61),
    "Mistral-7B": (4.45, 4.13),
    "BLOOM-7B1": (5.46, 5.17),
    "GPT-J-6B": (4.00, 3.74),
    "Flan-T5-XXL": (9.54, 9.12),
    "Mixtral-8x7B": (26.65, 24.48),
    "Qwen3-30B-A3B": (18.09, 16.69),
    "GPT-OSS-20B": (13.44, 12.52),
}


def planned(name: str, directory: Path, quantization: str) -> Plan:
    spec = ModelSpec(name, str(write_config(name, directory)), quantization=quantization, device="cpu")
    return make_plan(spec, TIB, runtime=Share(0, 0))


@pytest.mark.parametrize("name", CATALOGUE)
def test_figures_by_hand(name: str, tmp_path: Path) -> None:
    known = CATALOGUE[name]
    assert known.linear + known.others == known.parameters
    nf4, nested = (planned(name, tmp_path, quantization) for quantization in ("nf4", "nf4-dq"))
    assert nf4.parameters == known.parameters - known.tied_in_config
    assert nf4.components["packed_weights"] == nested.components["packed_weights"] == known.linear // 2
    assert nf4.components["absmax"] == known.linear // 64 * 4
    assert nested.components["absmax"] == known.linear // 64
    assert nf4.components["unquantized_bfloat16"] == 2 * (known.others - known.tied_in_config)
    assert nf4.kv_bytes_per_token == 2 * known.kv_per_token
    assert nf4.max_model_len == known.context
    tied_gb = 2 * known.tied_in_config / 1e9
    for plan, gigabytes in zip((nf4, nested), GB[name], strict=True):
        weights = sum(
            size for part, size in plan.components.items() if part.startswith(("packed", "abs", "nes", "unq"))
        )
        assert round(weights / 1e9 + tied_gb, 2) == gigabytes


def test_llama_2_7b_in_both_units(tmp_path: Path) -> None:
    """The 3.5 that one often reads are GiB, and without statistics and embeddings."""
    plan = planned("Llama-2-7B", tmp_path, "nf4")
    sizes = {name: size for name, size in plan.components.items() if not name.startswith(("kv", "run", "work", "act"))}
    total = sum(sizes.values())
    assert (round(total / 1e9, 2), round(total / 2**30, 2)) == (4.17, 3.88)
    assert round(plan.components["packed_weights"] / 2**30, 2) == 3.02


def test_int8_takes_a_byte_and_a_scale_per_row(tmp_path: Path) -> None:
    plan = planned("Llama-2-7B", tmp_path, "int8")
    assert plan.components["packed_weights"] == CATALOGUE["Llama-2-7B"].linear
    assert plan.components["absmax"] == 4 * 32 * (4 * 4096 + 2 * 11008 + 4096)


def test_an_index_of_400_billion_parameters(tmp_path: Path) -> None:
    """Headers of 191 files whose data are holes: what is planned is what the config alone says, and what is on disk."""
    directory = write_config("Llama-3.1-405B", tmp_path / "whole")
    sizes = write_hollow_checkpoint(directory, shards=191)
    assert sum(sizes) == 2 * CATALOGUE["Llama-3.1-405B"].parameters
    spec = ModelSpec("m", str(directory), quantization="nf4-dq", device="cpu")
    whole = make_plan(spec, TIB, runtime=Share(0, 0))
    bare = planned("Llama-3.1-405B", tmp_path / "bare", "nf4-dq")
    assert whole.components == bare.components
    assert whole.checkpoint_bytes == sum(file.stat().st_size for file in directory.glob("*.safetensors")) > sum(sizes)
    too_small = make_plan(spec, 200 * 10**9, runtime=Share(0, 0))
    assert not too_small.fits
    assert too_small.nearest == ()


def write_hollow_checkpoint(directory: Path, shards: int) -> list[int]:
    """Safetensors files with the right headers over nothing; returns the bytes of data that each would hold."""
    model = meta_model(read_config(directory), torch.bfloat16)
    names = list(model.state_dict())
    weight_map: dict[str, str] = {}
    sizes = []
    for shard in range(shards):
        file = f"model-{shard:05d}.safetensors"
        header, end = {}, 0
        for name in names[shard::shards]:
            shape = list(model.get_parameter(name).shape)
            begin, end = end, end + 2 * model.get_parameter(name).numel()
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
            weight_map[name] = file
        text = json.dumps(header).encode()
        with (directory / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + end)
        sizes.append(end)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sizes
