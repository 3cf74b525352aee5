"""server/config.py: precedence of the three sources, and one sentence with its origin for everything wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from server.config import ALL_KEYS, MODEL_KEYS, SERVER_KEYS, load_config, load_entry
from server.cpus import available_cpus, cgroup_quota
from server.demo import DEMO_MODEL_NAME, DEMO_MODEL_PATH, DEMO_QUANTIZATION
from server.errors import ConfigError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "my-model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    return path


def write(directory: Path, text: str) -> Path:
    file = directory / "models.yaml"
    file.write_text(text)
    return file


@pytest.mark.skipif(not (DEMO_MODEL_PATH / "config.json").is_file(), reason="the demo model is not here yet")
def test_nothing_at_all_is_the_demo_on_loopback() -> None:
    config = load_config({}, {})
    assert [(m.name, m.path, m.quantization) for m in config.models] == [
        (DEMO_MODEL_NAME, DEMO_MODEL_PATH, DEMO_QUANTIZATION)
    ]
    assert (config.host, config.port, config.api_keys) == ("127.0.0.1", 8000, ())
    assert config.loopback
    assert load_config({"quantization": "int8", "name": "d"}, {}).models[0].quantization == "int8"


def test_a_path_names_the_model_and_keeps_its_own_quantization(model: Path) -> None:
    (served,) = load_config({"model": str(model)}, {}).models
    assert (served.name, served.path, served.quantization) == ("my-model", model, None)


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path, model: Path) -> None:
    file = write(
        tmp_path,
        "host: 127.0.0.3\nport: 1\ndrain_seconds: 1\n"
        "models: [{name: a, path: my-model, dtype: float32, max_sequences: 1, threads: 1}]",
    )
    environment = {
        "HALFBYTE_CONFIG": str(file),
        "HALFBYTE_PORT": "2",
        "HALFBYTE_DRAIN_SECONDS": "2",
        "HALFBYTE_MAX_SEQUENCES": "2",
        "HALFBYTE_THREADS": "2",
    }
    config = load_config({"drain_seconds": "3", "threads": "3", "host": None}, environment)
    assert (config.host, config.port, config.drain_seconds) == ("127.0.0.3", 2, 3.0)
    (served,) = config.models
    assert (served.name, served.path, served.dtype) == ("a", model, "float32")
    assert (served.max_sequences, served.threads) == (2, 3)


def test_the_environment_alone_configures_a_container(model: Path) -> None:
    config = load_config(
        {},
        {
            "HALFBYTE_MODEL": str(model),
            "HALFBYTE_NAME": "served",
            "HALFBYTE_QUANTIZATION": '{"load_in_4bit": true, "bnb_4bit_quant_type": "nf4"}',
            "HALFBYTE_KV_CACHE_TOKENS": "4096",
            "HALFBYTE_KV_CACHE_DTYPE": "int8",
            "HALFBYTE_DEVICE_MAP": '{"": 0}',
            "HALFBYTE_HOST": "0.0.0.0",
            "HALFBYTE_API_KEYS": "first-key, second-key",
            "HALFBYTE_ALLOWED_HOSTS": "llm.example",
            "HALFBYTE_LOG_LEVEL": "",
            "HALFBYTE_CUDA": "ON",
            "HALFBYTE_SERVICE_HOST": "10.0.0.1",
            "HALFBYTE_PORT_8000_TCP_ADDR": "10.0.0.1",
            "PATH": "/bin",
        },
    )
    (spec,) = config.specs()
    assert spec.name == "served"
    assert spec.quantization == {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    assert (spec.kv_cache_tokens, spec.kv_cache_dtype) == (4096, "int8")
    assert spec.device_map == {"": 0}
    assert [key.get_secret_value() for key in config.api_keys] == ["first-key", "second-key"]
    assert "first-key" not in repr(config)
    assert config.allowed_hosts == ("llm.example",)
    assert not config.loopback


def test_several_models_share_the_cpus(tmp_path: Path, model: Path) -> None:
    text = "models:\n" + "".join(f"- {{name: m{i}, path: {model}}}\n" for i in range(2))
    text += f"- {{name: own, path: {model}, threads: 7, kv_cache: {{tokens: 64, dtype: int8}}}}\n"
    specs = load_config({"config": str(write(tmp_path, text))}, {}).specs()
    share = max(1, available_cpus() // 3)
    assert [spec.threads for spec in specs] == [share, share, 7]
    assert [spec.kv_cache_tokens for spec in specs] == [None, None, 64]
    assert [spec.kv_cache_dtype for spec in specs] == ["auto", "auto", "int8"]


BAD_FILES = [
    ("models: [", "line 1, column 10: not valid YAML"),
    ("models:\n  - name: a\n   path: b", "line 3, column 4"),
    ("port: 1\nport: 2", "line 2, column 1: not valid YAML: the key 'port' is written twice"),
    ("a: \tb\n\x00", "not valid YAML"),
    ("- 1", "accepted is a mapping with the key 'models'"),
    ("", "accepted is a mapping with the key 'models'"),
    ("models: 5", "'models' is 5; accepted is a list"),
    ("models: []", "accepted is a list with at least one model"),
    ("models: [x]", "models[0] is 'x'; accepted is a mapping with the keys name, path"),
    ("models: [{name: a, path: my-model, colour: red}]", "models[0].colour: 'colour' is not known; accepted are name"),
    ("models: [{name: a, path: my-model, adapters: [b]}]", "models[0]: 'adapters' is not supported yet"),
    ("models: [{name: a}]", "'path' is missing"),
    ("models: [{name: a, path: nowhere}]", "models[0].path: '"),
    ("models: [{name: a, path: .}]", "is a directory without config.json"),
    ("models: [{name: a b, path: my-model}]", "'name' is 'a b'; accepted are"),
    ("models: [{name: 5, path: my-model}]", "'name' is 5; it must be a valid string"),
    ("models: [{name: a, path: my-model}, {name: a, path: my-model}]", "2 models are named 'a'"),
    ("models: [{name: a, path: my-model, dtype: int4}]", "'dtype' is 'int4'; it must be 'auto', 'float32'"),
    ("models: [{name: a, path: my-model, device: tpu}]", "accepted are auto, cpu, cuda and cuda:N"),
    ("models: [{name: a, path: my-model, max_model_len: 0}]", "'max_model_len' is 0; it must be greater"),
    ("models: [{name: a, path: my-model, max_sequences: many}]", "'max_sequences' is 'many'"),
    ("models: [{name: a, path: my-model, kv_cache: {blocks: 5}}]", "'kv_cache.blocks' is not known"),
    ("models: [{name: a, path: my-model, kv_cache: 5}]", "'kv_cache' is 5"),
    ("models: [{name: a, path: my-model, kv_cache: {dtype: int4}}]", "'kv_cache.dtype' is 'int4'; it must be 'auto'"),
    ("models: [{name: a, path: my-model, quantization: [nf4]}]", "'quantization"),
    ("models: [{name: a, path: my-model, device_map: {a: 99999999999999999999}}]", "which an engine can't be sent"),
    ("prot: 80\nmodels: [{name: a, path: my-model}]", "prot: 'prot' is not known; accepted are host, port"),
    ('"\\ud800": 80\nmodels: [{name: a, path: my-model}]', "'\\ud800' is not known; accepted are host, port"),
    ('models: [{name: a, path: my-model, "\\ud800": 80}]', "models[0]: '\\ud800' is not known; accepted are name"),
    ("api_keys: [short]\nmodels: [{name: a, path: my-model}]", "key 1 of 'api_keys' is not accepted; a key is 8"),
    ("api_keys: {a: b}\nmodels: [{name: a, path: my-model}]", "'api_keys' is '(not shown)'"),
    ("admin_key: short\nmodels: [{name: a, path: my-model}]", "'admin_key' is not accepted; a key is 8"),
    ("admin_key: 5\nmodels: [{name: a, path: my-model}]", "'admin_key' is '(not shown)'"),
    ("api_keys: [one-key-1]\nadmin_key: one-key-1\nmodels: [{name: a, path: my-model}]", "is one of 'api_keys'"),
    ("host: http://x\nmodels: [{name: a, path: my-model}]", "'host' is 'http://x'; accepted is an address"),
]


@pytest.mark.parametrize(("text", "words"), BAD_FILES, ids=lambda value: str(value)[:40])
def test_a_bad_file_is_one_sentence(tmp_path: Path, model: Path, text: str, words: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config({"config": str(file)}, {})
    sentence = str(caught.value)
    assert words in sentence
    assert "models.yaml" in sentence
    assert "\n" not in sentence
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("flags", "environment", "words"),
    [
        ({"port": "many"}, {}, "--port: 'port' is 'many'; it must be a valid integer"),
        ({"port": "65536"}, {}, "--port: 'port' is '65536'; it must be less than or equal to 65535"),
        ({}, {"HALFBYTE_PORT": "x"}, "HALFBYTE_PORT: 'port' is 'x'"),
        ({}, {"HALFBYTE_PORT": "tcp://10.0.0.1:80"}, "enableServiceLinks: false"),
        ({}, {"HALFBYTE_QUANTISATION": "nf4"}, "'HALFBYTE_QUANTISATION' is not known; accepted are HALFBYTE_CONFIG"),
        ({"model": "/nowhere"}, {}, "MODEL: '/nowhere' is not a directory"),
        ({"model": "org/name"}, {}, "MODEL: 'org/name' is not a directory on this machine"),
        ({"quantization": "{nf4"}, {}, "--quantization: '{nf4' starts like a JSON object"),
        ({"config": "/nowhere.yaml"}, {}, "'/nowhere.yaml' can't be read: No such file"),
        ({"kv_cache_tokens": "0"}, {}, "--kv-cache-tokens: 'kv_cache.tokens' is '0'"),
        ({}, {"HALFBYTE_KV_CACHE_DTYPE": "fp8"}, "HALFBYTE_KV_CACHE_DTYPE: 'kv_cache.dtype' is 'fp8'"),
        ({"drain_seconds": "nan"}, {}, "--drain-seconds"),
        ({"request_timeout_seconds": "0"}, {}, "--request-timeout-seconds"),
        ({"prefix_caching": "perhaps"}, {}, "--prefix-caching"),
        ({"log_level": "loud"}, {}, "'debug', 'info'"),
    ],
)
def test_a_bad_flag_or_variable_is_named(
    model: Path, flags: dict[str, str], environment: dict[str, str], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"model": str(model)} | flags, environment)
    assert words in str(caught.value)


def test_a_path_that_is_no_text_is_refused(tmp_path: Path) -> None:
    """The name of a file may be any bytes."""
    path = tmp_path / "m\udcff"
    path.mkdir()
    (path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"'path' is '.*udcff', which an engine can't be sent"):
        load_entry({"path": str(path), "name": "m"}, "the request body", Path())


def test_flags_for_one_model_beside_a_file_of_several_are_refused(tmp_path: Path, model: Path) -> None:
    file = write(tmp_path, "models: [{name: a, path: my-model}, {name: b, path: my-model}]")
    with pytest.raises(ConfigError, match="--quantization describes one model, and .* lists 2"):
        load_config({"config": str(file), "quantization": "nf4"}, {})


def test_keys_are_never_shown(model: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"model": str(model)}, {"HALFBYTE_API_KEYS": "long-enough-key,x"})
    assert "key 2" in str(caught.value)
    assert "long-enough" not in str(caught.value)
    with pytest.raises(ConfigError, match="'admin_key' is not accepted") as caught:
        load_config({"model": str(model)}, {"HALFBYTE_ADMIN_KEY": "two words"})
    assert "two words" not in str(caught.value)
    config = load_config({"model": str(model)}, {"HALFBYTE_ADMIN_KEY": "long-enough-key"})
    assert config.admin_key is not None
    assert "long-enough" not in repr(config)


HALF, QUARTER, NONE = "150000 100000\n", "75000 100000\n", "max 100000\n"


@pytest.mark.parametrize(
    ("own", "files", "cpus"),
    [
        ("0::/", {"cpu.max": HALF}, 1.5),
        ("0::/", {"cpu.max": NONE}, None),
        ("0::/", {"cpu.max": "garbage"}, None),
        ("0::/", {}, None),
        ("0::/a/b", {"a/b/cpu.max": HALF, "a/cpu.max": NONE}, 1.5),
        ("0::/a/b", {"a/b/cpu.max": HALF, "a/cpu.max": QUARTER}, 0.75),
        ("0::/a/b", {"a/b/cpu.max": NONE, "a/cpu.max": NONE, "other/cpu.max": QUARTER}, None),
        ("0::/out/of/sight", {"cpu.max": HALF}, 1.5),  # as a container sees its own group
        ("3:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ("3:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "50000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 0.5),
        ("3:cpu:/\n0::/", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
    ],
)
def test_cgroup_quotas(tmp_path: Path, own: str, files: dict[str, str], cpus: float | None) -> None:
    mine, root = tmp_path / "own", tmp_path / "root"
    mine.write_text(own + "\n")
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    assert cgroup_quota(root, mine) == cpus
    assert cgroup_quota(root, tmp_path / "no such file") is None
    assert 1 <= available_cpus() <= (os.cpu_count() or 1)


def test_every_setting_is_documented_with_its_variable() -> None:
    page = (Path(__file__).parent.parent.parent / "docs" / "configuration.md").read_text()
    for key in ALL_KEYS:
        assert f"`HALFBYTE_{key.upper()}`" in page, key
    for key in (*SERVER_KEYS, *MODEL_KEYS):
        assert f"`{key}`" in page, key
