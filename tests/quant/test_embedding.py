"""Packed embeddings: lookups against the whole table, tied and untied models, files, memory, training."""

from __future__ import annotations

import copy
import filecmp
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from quant import BitsAndBytesConfig, Linear4bit, memory, quantize_checkpoint, reference, report_checkpoint, rows
from quant.conversion import modules_to_quantize
from quant.embedding import Embedding4bit, Embedding8bit, PackedEmbedding, TiedToEmbedding
from quant.errors import CheckpointError, QuantConfigError, ShapeError
from quant.lora import lora_config, prepare_model_for_kbit_training
from quant.report import report_model
from server.memory.components import exact
from server.memory.plan import make_plan
from server.model.load import load_model
from server.records import ModelSpec
from tests.quant.operands import SHAPES, Weight4, fresh_generator, same_bits
from tests.tiny_models import auto_class, save_tiny, tiny_inputs, tiny_model

FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4-dq-4096": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "bnb_4bit_blocksize": 4096},
    "nf4-dq-int8-storage": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": "int8",
    },
    "int8": {"load_in_8bit": True},
}
TIED: dict[str, dict[str, Any]] = {"llama": {"tie_word_embeddings": True}, "gpt2": {}, "bloom": {}, "gemma3_text": {}}
UNTIED: dict[str, dict[str, Any]] = {"llama": {}, "gptj": {}, "gemma3_text": {"tie_word_embeddings": False}}
MODELS = [
    *((architecture, "tied", changes) for architecture, changes in TIED.items()),
    *((architecture, "untied", changes) for architecture, changes in UNTIED.items()),
]
EVERY_MODEL = pytest.mark.parametrize(
    ("architecture", "ties", "changes"), MODELS, ids=[f"{name}-{ties}" for name, ties, _ in MODELS]
)
EVERY_FORMAT = pytest.mark.parametrize("form", FORMATS)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    torch.compiler.reset()
    yield
    transformers.utils.logging.enable_progress_bar()


def config_of(form: str, **changes: Any) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(**(FORMATS[form] | {"quantize_embeddings": True} | changes))


def make(form: str, embedding: nn.Embedding) -> PackedEmbedding:
    return (Embedding8bit if form == "int8" else Embedding4bit).from_float(embedding, config_of(form))


def load(path: Path, config: BitsAndBytesConfig | None = None, **how: Any) -> transformers.PreTrainedModel:
    architecture = json.loads((path / "config.json").read_text())["model_type"]
    if config is not None:
        how["quantization_config"] = config
    model: transformers.PreTrainedModel = auto_class(architecture).from_pretrained(path, **how)
    return model


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    result: torch.Tensor = model(**inputs).logits
    return result


def tables(model: nn.Module) -> list[PackedEmbedding]:
    return [module for module in model.modules() if isinstance(module, PackedEmbedding)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nested", [None, 256, 3])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [*SHAPES, (70, 128)])
def test_four_bit_rows_are_those_of_the_table(
    shape: tuple[int, int], quant_type: str, blocksize: int, nested: int | None, dtype: torch.dtype
) -> None:
    generator = fresh_generator()
    weight = Weight4.random(shape, quant_type, blocksize, nested, generator)
    ids = torch.randint(0, shape[0], (2, 5), generator=generator)
    ids[0, :2] = torch.tensor([0, shape[0] - 1])
    nesting = (weight.nested_absmax, weight.offset, weight.nested_blocksize, dtype)
    arguments = (weight.packed, weight.absmax, quant_type, blocksize, *shape, *nesting)
    result = rows.embedding_4bit(ids, *arguments)
    assert same_bits(result, reference.embedding_4bit(ids, *arguments))
    assert same_bits(result, weight.dense(dtype)[ids])
    assert same_bits(rows.embedding_4bit(ids.int(), *arguments), result)
    assert rows.embedding_4bit(ids[:0], *arguments).shape == (0, 5, shape[1])
    with torch.inference_mode():
        assert same_bits(rows.look_up_4bit(ids, *arguments), result)
        assert rows.look_up_4bit(ids[:0], *arguments).shape == (0, 5, shape[1])
        for outside in (-1, shape[0]):
            with pytest.raises(IndexError, match=f"id {outside} is not in the table"):
                rows.look_up_4bit(torch.tensor([0, outside]), *arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_eight_bit_rows_are_those_of_the_table(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = fresh_generator()
    codes = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    row_absmax = torch.rand(shape[0], generator=generator)
    ids = torch.randint(0, shape[0], (7,), generator=generator)
    result = rows.embedding_8bit(ids, codes, row_absmax, dtype)
    assert same_bits(result, reference.embedding_8bit(ids, codes, row_absmax, dtype))


@EVERY_FORMAT
def test_ids_beyond_the_table_are_refused(form: str) -> None:
    table = make(form, nn.Embedding(5, 33))
    for wrong in (5, -1):
        with pytest.raises(IndexError, match=f"id {wrong} is not in the table; accepted are 0 to 4"):
            table(torch.tensor([0, wrong]))
    with pytest.raises(ShapeError, match="ids have dtype torch.uint8"):
        table(torch.tensor([0], dtype=torch.uint8))


BEYOND = """
import sys, torch
from torch import nn
from quant import BitsAndBytesConfig
from quant.embedding import Embedding4bit
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_blocksize=4096)  # one block: no index into it is beyond it
table = Embedding4bit.from_float(nn.Embedding(5, 33), config).cuda()
table(torch.tensor([0, 4], device="cuda")).cpu()
print("accepted", flush=True)
table(torch.tensor([0, int(sys.argv[1])], device="cuda")).cpu()
"""


@pytest.mark.cuda
@pytest.mark.parametrize("wrong", ["-1", "5"])
def test_ids_beyond_the_table_are_a_device_assertion(wrong: str) -> None:
    """In a process of its own, whose GPU is of no use from then on."""
    run = subprocess.run([sys.executable, "-c", BEYOND, wrong], capture_output=True, text=True, check=False)
    assert run.stdout == "accepted\n"
    assert "device-side assert" in run.stderr


@pytest.mark.parametrize("columns", [128, 100])
def test_only_touched_rows_are_dequantized(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    table = make("nf4-dq-int8-storage", nn.Embedding(1000, columns))
    counts = dict.fromkeys(("dequantize_4bit", "dequantize_absmax"), 0)
    for name in counts:
        honest = getattr(rows.ops, name)

        def counted(*arguments: Any, _name: str = name, _honest: Any = honest) -> torch.Tensor:
            values: torch.Tensor = _honest(*arguments)
            counts[_name] += values.numel()
            return values

        monkeypatch.setattr(rows.ops, name, counted)
    table(torch.tensor([3, 999]))
    assert 2 * columns <= counts["dequantize_4bit"] <= 2 * (columns + 2 * 64)
    assert counts["dequantize_absmax"] * 64 == counts["dequantize_4bit"]  # of block maxima no more


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@EVERY_FORMAT
def test_as_a_module(form: str, dtype: torch.dtype) -> None:
    original = nn.Embedding(37, 100, padding_idx=2, dtype=dtype)
    table = make(form, original)
    ids = torch.randint(0, 37, (3, 4))
    expected = table.dequantize(dtype)[ids]
    assert torch.equal(table(ids), expected)
    assert (table.num_embeddings, table.embedding_dim, table.padding_idx) == (37, 100, 2)
    assert not isinstance(table, nn.Embedding | nn.Linear)
    assert torch.equal(table.to_float()(ids), expected)
    for twin in (copy.deepcopy(table), pickle.loads(pickle.dumps(table))):  # noqa: S301 - its own bytes
        assert torch.equal(twin(ids), expected)
    state = table.state_dict()
    assert all(name == "SCB" or name.startswith("weight") for name in state)
    other = make(form, nn.Embedding(37, 100, dtype=dtype))
    other.load_state_dict(state)
    assert torch.equal(other(ids), expected)
    before = {name: tensor.clone() for name, tensor in state.items()}
    half = copy.deepcopy(table).half()
    assert half(ids).dtype == torch.float16
    assert all(torch.equal(tensor, before[name]) for name, tensor in half.state_dict().items())
    assert torch.equal(copy.deepcopy(table).to("meta").to_empty(device="cpu").to(dtype)(ids[:0]), expected[:0])
    assert "padding_idx=2" in repr(table)
    for buffers in (False, True):
        offloaded = copy.deepcopy(table)
        accelerate.cpu_offload(offloaded, execution_device=torch.device("cpu"), offload_buffers=buffers)
        assert offloaded.weight.is_meta
        assert torch.equal(offloaded(ids), expected)
    compiled = torch.compile(table, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (3, 5):
        ids = torch.randint(0, 37, (2, length))
        assert torch.equal(compiled(ids), table(ids))


def test_what_cannot_be_packed() -> None:
    for wrong in (nn.Embedding(4, 4, max_norm=1.0), nn.EmbeddingBag(4, 4), nn.Linear(4, 4)):
        with pytest.raises(ShapeError, match="accepted is nn.Embedding without max_norm"):
            Embedding4bit.from_float(wrong, config_of("nf4"))
    with pytest.raises(QuantConfigError, match="Embedding4bit was asked for with load_in_8bit"):
        Embedding4bit(4, 4, config=config_of("int8"))


@EVERY_FORMAT
@EVERY_MODEL
def test_models(architecture: str, ties: str, changes: dict[str, Any], form: str, tmp_path: Path) -> None:
    source = save_tiny(architecture, tmp_path / "source", **changes)
    config = config_of(form)
    model = load(source, config)
    (table,) = tables(model)
    head = model.get_output_embeddings()
    assert model.get_input_embeddings() is table
    assert isinstance(head, TiedToEmbedding) == (ties == "tied")
    inputs = tiny_inputs(architecture)
    result = logits(model, inputs)

    # one table in memory, predicted, measured, planned
    storages = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert len(storages) == len([*model.parameters(), *model.buffers()])
    measured = memory.measure_weights(model)
    assert memory.predict_weights(source, config, torch.float32) == measured
    assert sum(measured.values()) == model.get_memory_footprint()
    plain = memory.predict_weights(source, BitsAndBytesConfig(**FORMATS[form]), torch.float32)
    assert sum(plain.values()) - sum(measured.values()) > 0.7 * 4 * table.num_embeddings * table.embedding_dim

    # files: once, under the names of a linear layer, and back
    model.save_pretrained(tmp_path / "saved")
    names = load_file(tmp_path / "saved" / "model.safetensors")
    name = next(name for name, module in model.named_modules() if module is table)
    assert (f"{name}.SCB" if form == "int8" else f"{name}.weight.absmax") in names
    assert any(key.startswith("lm_head.") for key in names) == (ties == "untied")
    quantize_checkpoint(source, tmp_path / "written", config)
    assert filecmp.cmp(tmp_path / "saved/model.safetensors", tmp_path / "written/model.safetensors", shallow=False)
    again = load(tmp_path / "saved")
    assert torch.equal(logits(again, inputs), result)
    assert (
        memory.predict_weights(tmp_path / "saved", config, torch.float32) == memory.measure_weights(again) == measured
    )
    again.save_pretrained(tmp_path / "again")
    assert filecmp.cmp(tmp_path / "saved/model.safetensors", tmp_path / "again/model.safetensors", shallow=False)
    spec = ModelSpec(name="m", path=str(tmp_path / "saved"), dtype="float32", device="cpu")
    plan = exact(make_plan(spec).components)
    del plan["kv_cache"]
    assert plan == dict(measured)
    served = load_model(spec, lambda done, total: None)
    assert torch.equal(logits(served.model, inputs), result)
    assert served.vocab_size == table.num_embeddings

    # reports
    kinds = modules_to_quantize(tiny_model(architecture, **changes), config)
    listed = [layer.name for layer in report_model(model)]
    assert name in listed
    assert ("lm_head" in listed) == (ties == "untied")
    assert sorted(listed) == sorted(layer.name for layer in report_checkpoint(source, config))
    assert sorted(listed) == sorted(layer.name for layer in report_model(tiny_model(architecture, **changes), config))
    assert set(listed) <= set(kinds)

    # equal to the twin with dequantized weights
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied, inputs), result)
    if isinstance(head, TiedToEmbedding):
        assert copied.get_output_embeddings().embedding is copied.get_input_embeddings()
    if form == "int8":
        return  # activations are rounded too
    twin = copied.dequantize(torch.float32)
    assert (twin.get_output_embeddings().weight is twin.get_input_embeddings().weight) == (ties == "tied")
    assert not tables(twin)
    torch.testing.assert_close(result, logits(twin, inputs), rtol=0, atol=1e-5 * float(result.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_rows_in_the_models_dtype(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    changes = {"tie_word_embeddings": True}
    model = load(save_tiny(architecture, tmp_path, **changes), config_of("nf4"), dtype=dtype)
    inputs = tiny_inputs(architecture)
    assert logits(model, inputs).dtype == dtype
    (table,) = tables(model)
    twin = table.to_float()
    assert twin.weight.dtype == dtype
    assert torch.equal(table(inputs["input_ids"]), twin(inputs["input_ids"]))


def test_encoder_and_decoder_share_one_table(tmp_path: Path) -> None:
    source = save_tiny("t5", tmp_path / "source", tie_word_embeddings=True)
    model = load(source, config_of("nf4"))
    assert len(tables(model)) == 1
    assert [name for name, module in model.named_modules() if isinstance(module, TiedToEmbedding)] == [
        "encoder.embed_tokens",
        "decoder.embed_tokens",
        "lm_head",
    ]
    inputs = tiny_inputs("t5") | {"decoder_input_ids": torch.randint(3, 300, (2, 4))}
    result = logits(model, inputs)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved"), inputs), result)
    twin = copy.deepcopy(model).dequantize(torch.float32)
    assert twin.lm_head.weight is twin.encoder.embed_tokens.weight is twin.shared.weight
    torch.testing.assert_close(logits(twin, inputs), result, rtol=0, atol=1e-5 * float(result.abs().max()))


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_a_file_that_names_the_table_otherwise(form: str, tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source", tie_word_embeddings=True)
    inputs = tiny_inputs("llama")
    expected = logits(load(source, config_of(form)), inputs)
    tensors = load_file(source / "model.safetensors")
    table = tensors.pop("model.embed_tokens.weight")

    def rewrite(**more: torch.Tensor) -> None:
        named = {key.replace("__", "."): tensor for key, tensor in more.items()}
        save_file(tensors | named, source / "model.safetensors", {"format": "pt"})

    rewrite(lm_head__weight=table)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config_of(form), output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(model, inputs), expected)
    model.save_pretrained(tmp_path / "saved")
    quantize_checkpoint(source, tmp_path / "written", config_of(form))
    assert filecmp.cmp(tmp_path / "saved/model.safetensors", tmp_path / "written/model.safetensors", shallow=False)
    rewrite(lm_head__weight=table, model__embed_tokens__weight=table.clone())
    assert torch.equal(logits(load(source, config_of(form)), inputs), expected)
    rewrite(lm_head__weight=table + 1, model__embed_tokens__weight=table)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight and model\.embed_tokens\.weight with different values"):
        load(source, config_of(form))


def test_off_by_default_and_absent_unless_used(tmp_path: Path) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True)
    assert "quantize_embeddings" not in config.to_dict()
    assert config_of("nf4").to_dict()["quantize_embeddings"] is True
    assert BitsAndBytesConfig.from_dict(config_of("nf4").to_dict()).quantize_embeddings
    with pytest.raises(QuantConfigError, match="quantize_embeddings is 1"):
        BitsAndBytesConfig(quantize_embeddings=1)
    with pytest.raises(QuantConfigError, match="sets 'quantize_embeddings'"):
        BitsAndBytesConfig(load_in_4bit=True, module_overrides={"a": {"quantize_embeddings": True}})
    for storage, overrides in (("bfloat16", {}), ("uint8", {"a": {"bnb_4bit_quant_storage": "bfloat16"}})):
        with pytest.raises(QuantConfigError, match="bnb_4bit_quant_storage is torch.bfloat16 and quantize_embeddings"):
            config_of("nf4", bnb_4bit_quant_storage=storage, module_overrides=overrides)
    model = load(save_tiny("llama", tmp_path), config)
    assert type(model.model.embed_tokens) is nn.Embedding


@pytest.mark.parametrize("tied", [True, False])
def test_overrides_and_skips(tied: bool) -> None:
    model = tiny_model("llama", tie_word_embeddings=tied)
    both = ("model.embed_tokens", "lm_head")

    def kinds(**changes: Any) -> list[str | None]:
        found = modules_to_quantize(model, config_of("nf4", **changes))
        return [found.get(name) for name in both]

    assert kinds() == ["4bit", "4bit"]
    embedding = {"model.embed_tokens": {"load_in_8bit": True}}
    assert kinds(module_overrides=embedding) == ["8bit", "8bit" if tied else "4bit"]
    assert kinds(module_overrides={"model.embed_tokens": None}) == [None, None if tied else "4bit"]
    assert kinds(llm_int8_skip_modules=["lm_head"]) == [None if tied else "4bit", None]
    assert kinds(llm_int8_skip_modules=[]) == ["4bit", "4bit"]
    alike = embedding | {"lm_head": {"load_in_8bit": True}}
    assert kinds(module_overrides=alike) == ["8bit", "8bit"]
    head = {"lm_head": {"load_in_8bit": True}}
    if tied:
        with pytest.raises(QuantConfigError, match="'lm_head', and its weight is that of model.embed_tokens"):
            kinds(module_overrides=head)
    else:
        assert kinds(module_overrides=head) == ["4bit", "8bit"]
    with pytest.raises(QuantConfigError, match="llm_int8_has_fp16_weight is True, which the embedding"):
        modules_to_quantize(model, config_of("int8", llm_int8_has_fp16_weight=True))
    with pytest.raises(QuantConfigError, match="'embed_tokens', which changes nothing"):
        modules_to_quantize(model, BitsAndBytesConfig(load_in_4bit=True, module_overrides={"embed_tokens": {}}))
    offloaded = {"": 0, "lm_head": "cpu"}
    own = modules_to_quantize(model, config_of("nf4", llm_int8_enable_fp32_cpu_offload=True), offloaded)
    assert [own.get(name) for name in both] == [None if tied else "4bit", None]


def test_an_embedding_of_another_kind_is_refused() -> None:
    class Strange(nn.Embedding):
        pass

    model = tiny_model("llama")
    model.model.embed_tokens = Strange(320, 128)
    with pytest.raises(QuantConfigError, match="model.embed_tokens of LlamaForCausalLM is a Strange; accepted are"):
        modules_to_quantize(model, config_of("nf4"))


@EVERY_FORMAT
def test_gradients_reach_what_goes_into_the_tied_head(form: str, tmp_path: Path) -> None:
    model = load(save_tiny("llama", tmp_path, tie_word_embeddings=True), config_of(form))
    x = torch.randn(3, 128, requires_grad=True)
    seed = torch.randn(3, 320)
    (gradient,) = torch.autograd.grad(model.lm_head(x), x, seed)
    expected = seed @ model.model.embed_tokens.dequantize(torch.float32)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21 asks transformers for it
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@EVERY_FORMAT
def test_adapters_train_beside_a_packed_table(form: str, tmp_path: Path) -> None:
    model = load(save_tiny("llama", tmp_path, tie_word_embeddings=True), config_of(form))
    before = {name: tensor.clone() for name, tensor in model.model.embed_tokens.state_dict().items()}
    model = prepare_model_for_kbit_training(model)
    model = peft.get_peft_model(model, lora_config(r=4, target_modules="all-linear"))
    ids = tiny_inputs("llama")["input_ids"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(6):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    table = model.base_model.model.model.embed_tokens
    assert all(torch.equal(tensor, before[name]) for name, tensor in table.state_dict().items())
    with pytest.raises(ValueError, match=r"not supported|Embedding"):
        peft.get_peft_model(model.unload(), peft.LoraConfig(target_modules=["embed_tokens"]))


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_a_tied_model_as_a_module(form: str, tmp_path: Path) -> None:
    model = load(save_tiny("llama", tmp_path, tie_word_embeddings=True), config_of(form))
    inputs = tiny_inputs("llama")
    result = logits(model, inputs)
    assert list(model.state_dict()) == list(copy.deepcopy(model).state_dict())
    model.tie_weights()
    assert isinstance(model.lm_head, TiedToEmbedding)
    assert torch.equal(logits(model, inputs), result)
    with pytest.raises(ShapeError, match="set the embedding's instead"):
        model.lm_head.weight = nn.Parameter(torch.zeros(1))
    with pytest.raises(TypeError):
        model.resize_token_embeddings(321)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), inputs), result)  # noqa: S301 - its own bytes
    other = load(tmp_path, config_of(form))
    for module in other.modules():
        if isinstance(module, PackedEmbedding | Linear4bit):
            module.quantize(torch.zeros(module.matrix_shape))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, inputs), result)
    assert memory.measure_weights(other) == memory.measure_weights(model)
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs, use_cache=False).logits
    torch.testing.assert_close(compiled, result)
    model.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False, pad_token_id=0)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    assert model.lm_head.weight.is_meta
    assert torch.equal(logits(model, inputs), result)


def test_the_bias_of_a_tied_head_is_its_own() -> None:
    table = make("nf4", nn.Embedding(40, 64))
    head = nn.Linear(64, 40)
    tied = TiedToEmbedding(table, head)
    x = torch.randn(5, 64)
    torch.testing.assert_close(tied(x), nn.functional.linear(x, table.dequantize(), head.bias))
    assert list(tied.state_dict()) == ["bias"]
    torch.testing.assert_close(tied.to_float(table.to_float())(x), tied(x))
