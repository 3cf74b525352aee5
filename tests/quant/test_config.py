"""BitsAndBytesConfig: fields, defaults, validation, round trips, presets."""

from __future__ import annotations

import copy
import inspect
import json
import logging

import pytest
import torch
import transformers
from transformers.quantizers.auto import AutoHfQuantizer

from quant.config import EXTENSIONS, FIELDS, PRESETS, BitsAndBytesConfig, from_spec
from quant.errors import QuantConfigError

WRITTEN_BY_TRANSFORMERS = {
    "_load_in_4bit",
    "_load_in_8bit",
    "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_storage",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "llm_int8_enable_fp32_cpu_offload",
    "llm_int8_has_fp16_weight",
    "llm_int8_skip_modules",
    "llm_int8_threshold",
    "load_in_4bit",
    "load_in_8bit",
    "quant_method",
}


def test_fields_and_defaults_are_those_of_transformers() -> None:
    theirs = inspect.signature(transformers.BitsAndBytesConfig.__init__).parameters
    ours = inspect.signature(BitsAndBytesConfig.__init__).parameters
    assert list(theirs)[1:11] == list(FIELDS) == list(ours)[1:11]
    assert all(theirs[name].default == ours[name].default for name in FIELDS)
    config = BitsAndBytesConfig()
    assert config.bnb_4bit_quant_type == "fp4"
    assert config.bnb_4bit_compute_dtype is torch.float32
    assert config.bnb_4bit_quant_storage is torch.uint8
    assert config.bnb_4bit_use_double_quant is False
    assert config.llm_int8_threshold == 6.0
    assert config.llm_int8_outliers == "value"
    assert config.bnb_4bit_activations == "float"


def test_it_passes_for_transformers_own_class() -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    assert isinstance(config, transformers.BitsAndBytesConfig)
    assert type(config).__name__ == "BitsAndBytesConfig"
    assert config.quantization_method() == "nf4"
    assert config.is_quantizable()
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        merged = AutoHfQuantizer.merge_quantization_configs(config.to_dict(), config)
    assert merged.to_dict() == config.to_dict()


@pytest.mark.parametrize("name", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_dtypes_by_name(name: str | torch.dtype) -> None:
    config = BitsAndBytesConfig(bnb_4bit_compute_dtype=name, bnb_4bit_quant_storage=name)
    assert config.bnb_4bit_compute_dtype is torch.bfloat16
    assert config.bnb_4bit_quant_storage is torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, ["load_in_4bit", "load_in_8bit", "only one"]),
        ({"load_in_4bit": 1}, ["load_in_4bit is 1", "True and False"]),
        ({"load_in_8bit": "yes"}, ["load_in_8bit is 'yes'"]),
        ({"bnb_4bit_quant_type": "int4"}, ["bnb_4bit_quant_type is 'int4'", "nf4", "fp4"]),
        ({"bnb_4bit_quant_type": None}, ["bnb_4bit_quant_type is None"]),
        ({"bnb_4bit_compute_dtype": "float8"}, ["bnb_4bit_compute_dtype is 'float8'", "bfloat16"]),
        ({"bnb_4bit_compute_dtype": torch.int8}, ["bnb_4bit_compute_dtype is torch.int8"]),
        ({"bnb_4bit_compute_dtype": 16}, ["bnb_4bit_compute_dtype is 16"]),
        ({"bnb_4bit_quant_storage": "int64"}, ["bnb_4bit_quant_storage is 'int64'", "uint8"]),
        ({"bnb_4bit_use_double_quant": None}, ["bnb_4bit_use_double_quant is None"]),
        ({"llm_int8_threshold": "6"}, ["llm_int8_threshold is '6'"]),
        ({"llm_int8_threshold": -1.0}, ["llm_int8_threshold is -1.0"]),
        ({"llm_int8_threshold": float("nan")}, ["llm_int8_threshold is nan"]),
        ({"llm_int8_threshold": True}, ["llm_int8_threshold is True"]),
        ({"llm_int8_skip_modules": "lm_head"}, ["llm_int8_skip_modules is 'lm_head'", "list"]),
        ({"llm_int8_skip_modules": [""]}, ["llm_int8_skip_modules is ['']"]),
        ({"llm_int8_skip_modules": ["h.("]}, ["'h.('", "regular expression"]),
        ({"llm_int8_outliers": "column"}, ["llm_int8_outliers is 'column'", "value", "batch", "all"]),
        ({"bnb_4bit_activations": "int4"}, ["bnb_4bit_activations is 'int4'", "'float' and 'int8'"]),
        ({"bnb_4bit_activations": True}, ["bnb_4bit_activations is True"]),
        ({"bnb_4bit_blocksize": 128, "nonsense": 1}, ["bnb_4bit_blocksize", "nonsense", "accepted"]),
        ({"bnb_4bit_blocksize": 65}, ["bnb_4bit_blocksize is 65", "32, 64, 128"]),
        ({"bnb_4bit_blocksize": True}, ["bnb_4bit_blocksize is True"]),
        ({"bnb_4bit_blocksize": "64"}, ["bnb_4bit_blocksize is '64'"]),
        ({"module_overrides": ["lm_head"]}, ["module_overrides is ['lm_head']", "mapping"]),
        ({"module_overrides": {"lm_head": "int8"}}, ["module_overrides is {'lm_head': 'int8'}"]),
        ({"module_overrides": {"": None}}, ["module_overrides is {'': None}"]),
        ({"module_overrides": {"h.(": None}}, ["module_overrides contains 'h.('", "regular expression"]),
        (
            {"module_overrides": {"lm_head": {"llm_int8_skip_modules": []}}},
            ["module_overrides['lm_head'] sets 'llm_int8_skip_modules'", "accepted are load_in_8bit"],
        ),
        (
            {"module_overrides": {"lm_head": {"load_in_8bit": True, "load_in_4bit": True}}},
            ["module_overrides['lm_head']: ", "only one"],
        ),
        (
            {"module_overrides": {"lm_head": {"bnb_4bit_quant_type": "nf5"}}},
            ["module_overrides['lm_head']: bnb_4bit_quant_type is 'nf5'"],
        ),
        (
            {"load_in_4bit": True, "module_overrides": {"lm_head": {"load_in_4bit": False}}},
            ["module_overrides['lm_head'] leaves neither", "None"],
        ),
        ({"quant_method": "gptq"}, ["quant_method is 'gptq'", "bitsandbytes"]),
        ({"_load_in_4bit": True}, ["_load_in_4bit is True"]),
    ],
)
def test_refusals_are_one_sentence(arguments: dict[str, object], words: list[str]) -> None:
    with pytest.raises(QuantConfigError) as refusal:
        BitsAndBytesConfig(**arguments)
    for word in words:
        assert word in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("first", "second"), [("load_in_4bit", "load_in_8bit"), ("load_in_8bit", "load_in_4bit")])
def test_flags_exclude_each_other_when_set_later(first: str, second: str) -> None:
    config = BitsAndBytesConfig(**{first: True})
    with pytest.raises(QuantConfigError, match="only one"):
        setattr(config, second, True)
    with pytest.raises(QuantConfigError, match=f"{second} is 1"):
        setattr(config, second, 1)
    setattr(config, first, False)
    setattr(config, second, True)
    assert getattr(config, second)


def test_an_integer_threshold_is_a_number() -> None:
    threshold = BitsAndBytesConfig(llm_int8_threshold=0).llm_int8_threshold
    assert threshold == 0.0
    assert isinstance(threshold, float)


CONFIGS = [
    {},
    {"load_in_8bit": True, "llm_int8_threshold": 4.5, "llm_int8_skip_modules": ["lm_head", r"h\.0\..*"]},
    {"load_in_8bit": True, "llm_int8_has_fp16_weight": True, "llm_int8_outliers": "batch"},
    {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "float16",
        "llm_int8_enable_fp32_cpu_offload": True,
    },
    {"load_in_4bit": True, "bnb_4bit_blocksize": 128},
    {"load_in_4bit": True, "bnb_4bit_activations": "int8"},
    {
        "load_in_4bit": True,
        "bnb_4bit_blocksize": 4096,
        "module_overrides": {
            "lm_head": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
            r"model\.layers\.(0|1)\..*": None,
            "down_proj": {"bnb_4bit_compute_dtype": torch.bfloat16, "bnb_4bit_quant_storage": "torch.float32"},
        },
    },
]


@pytest.mark.parametrize("arguments", CONFIGS)
def test_round_trips(arguments: dict[str, object]) -> None:
    config = BitsAndBytesConfig(**arguments)
    as_dict = config.to_dict()
    used = {name for name in EXTENSIONS if name in arguments}
    assert set(as_dict) == WRITTEN_BY_TRANSFORMERS | used
    assert BitsAndBytesConfig.from_dict(as_dict) == config
    assert BitsAndBytesConfig.from_dict(json.loads(json.dumps(as_dict))) == config
    assert json.loads(config.to_json_string(use_diff=False)) == as_dict
    assert json.loads(config.to_json_string()) == config.to_diff_dict()
    assert BitsAndBytesConfig.from_dict(config.to_diff_dict()) == config
    assert copy.deepcopy(config) == config
    if not used:
        theirs = transformers.BitsAndBytesConfig.from_dict(as_dict)
        assert theirs.to_dict() == as_dict
        assert theirs.to_json_string(use_diff=False) == config.to_json_string(use_diff=False)
        assert theirs.to_diff_dict() == config.to_diff_dict()


def test_the_config_of_one_module() -> None:
    config = BitsAndBytesConfig(**CONFIGS[-1])
    assert config.for_module("model.layers.2.mlp.up_proj") is config
    assert config.for_module("model.layers.1.mlp.up_proj") is None
    head = config.for_module("lm_head")
    assert head == BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0, bnb_4bit_blocksize=4096)
    config.bnb_4bit_quant_type = "nf4"  # what an override does not set, it takes from the config as it is now
    down = config.for_module("model.layers.2.mlp.down_proj")
    assert down is not None
    assert (down.bnb_4bit_quant_type, down.bnb_4bit_blocksize) == ("nf4", 4096)
    assert down.bnb_4bit_compute_dtype is torch.bfloat16
    assert down.bnb_4bit_quant_storage is torch.float32
    with pytest.raises(QuantConfigError, match="names model.layers.0.mlp.down_proj in .* which disagree"):
        config.for_module("model.layers.0.mlp.down_proj")


def test_configs_that_differ_are_not_equal() -> None:
    configs = [BitsAndBytesConfig(**arguments) for arguments in CONFIGS]
    assert all((a == b) == (a is b) for a in configs for b in configs)
    assert BitsAndBytesConfig() != {}


def test_a_file_with_unknown_keys_is_read_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    written = BitsAndBytesConfig(load_in_4bit=True).to_dict() | {"from_the_future": 1, "transformers_version": "4.28"}
    with caplog.at_level(logging.WARNING):
        config = BitsAndBytesConfig.from_dict(written)
    assert config.load_in_4bit
    assert "from_the_future" in caplog.text
    assert "transformers_version" not in caplog.text


def test_from_dict_takes_changes_and_returns_the_rest() -> None:
    written = BitsAndBytesConfig(load_in_8bit=True).to_dict()
    config, unused = BitsAndBytesConfig.from_dict(
        written, return_unused_kwargs=True, load_in_8bit=False, load_in_4bit=True, bnb_4bit_quant_type="nf4", other=3
    )
    assert (config.load_in_4bit, config.load_in_8bit, config.bnb_4bit_quant_type) == (True, False, "nf4")
    assert unused == {"other": 3}
    with pytest.raises(QuantConfigError, match="bnb_4bit_quant_type is 'x'"):
        BitsAndBytesConfig.from_dict(written, bnb_4bit_quant_type="x")


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    config = from_spec(name, compute_dtype=torch.bfloat16)
    if name == "none":
        assert config is None
        return
    assert config is not None
    assert config.bnb_4bit_compute_dtype is torch.bfloat16
    assert PRESETS[name].bnb_4bit_compute_dtype is torch.float32
    method = "llm_int8" if name == "int8" else name.removesuffix("-dq")
    assert config.quantization_method() == method
    assert config.bnb_4bit_use_double_quant == name.endswith("-dq")


def test_spec_as_fields() -> None:
    config = from_spec({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, compute_dtype=torch.bfloat16)
    assert config == BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    assert from_spec(None) is None


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nf5", ["'nf5'", "nf4-dq", "none"]),
        ({}, ["neither load_in_4bit nor load_in_8bit"]),
        ({"load_in_4bit": True, "typo": 1}, ["typo"]),
        ({"load_in_4bit": True, "load_in_8bit": True}, ["only one"]),
        (["nf4"], ["['nf4']"]),
        ({1: 2}, ["{1: 2}"]),
    ],
)
def test_bad_specs(spec: object, words: list[str]) -> None:
    with pytest.raises(QuantConfigError) as refusal:
        from_spec(spec)  # type: ignore[arg-type]
    assert all(word in str(refusal.value) for word in words)
