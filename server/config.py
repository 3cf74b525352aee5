"""One frozen ServerConfig, merged from flags, the environment and models.yaml, in that order of precedence.

Every setting is a field of ServerSettings or ModelConfig and is spelled only there: its flag is `--max-model-len`, its
environment variable `HALFBYTE_MAX_MODEL_LEN`, its YAML key `max_model_len`. The quantization passes through as it
stands: the engine validates it, because this file must not import torch. Every mistake is a ConfigError of one sentence
that names where the value came from.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from server.cpus import available_cpus
from server.demo import DEMO_MODEL_NAME, DEMO_MODEL_PATH, DEMO_QUANTIZATION
from server.errors import ConfigError
from server.records import (
    BATCH_TOKENS,
    CPU_BATCH_TOKENS,
    MAX_SEQUENCES,
    MAX_TIMEOUT_SECONDS,
    SPECULATIVE_TOKENS,
    ModelSpec,
    SamplingDefaults,
    is_sendable,
)
from server.sentences import describe, listed, location, shown
from server.yaml_file import read_yaml

ENVIRONMENT_PREFIX: Final = "HALFBYTE_"
MAX_DRAIN_SECONDS: Final = 86400.0
NOT_SUPPORTED_YET: Final = frozenset({"adapters"})
"""Keys of a model that the design names and this version does not honour: refused by name, never skipped."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}")
_DEVICE = re.compile(r"auto|cpu|cuda(:[0-9]{1,3})?")
_HOST = re.compile(r"[A-Za-z0-9.:_-]{1,253}")
_API_KEY = re.compile(r"[!-+\--~]{8,512}")

_NOT_OURS = re.compile(
    r"HALFBYTE_CUDA(_ARCHITECTURES|_KERNEL)?|HALFBYTE_CPU_LEVEL|HALFBYTE_(\w+_)?(SERVICE_(HOST|PORT\w*)|PORT(_[0-9]+_(TCP|UDP|SCTP)\w*))"
)
"""Variables that the build or the kernels read, and those that Kubernetes sets for a Service named halfbyte."""

LogLevel = Literal["debug", "info", "warning", "error"]


def _from_text(value: object) -> object:
    """Flags and variables are text: a JSON object becomes a dictionary, anything else stays a preset's name."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:  # no JSON, too many digits; too deep
            raise ValueError(f"{shown(value)} starts like a JSON object and is not one: {error}") from error
    return value


def _split(value: object) -> object:
    """A list as flags and variables write it: separated by commas."""
    if isinstance(value, str):
        return tuple(item.strip() for item in value.split(",") if item.strip())
    return value


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False)


_Model = TypeVar("_Model", bound=Settings)


class KvCacheConfig(Settings):
    tokens: Annotated[int, Field(ge=1, le=2**40)] | None = Field(
        default=None, description="Tokens the KV cache holds over all sequences; without it the plan chooses."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = Field(
        default="auto",
        description="What the KV cache keeps keys and values in; int8 takes half of what 16 bits take.",
    )


class ModelConfig(Settings):
    """One model: an entry of `models:` in models.yaml, or the one model that flags and variables describe."""

    name: str = Field(description="The name requests use; the last part of the path unless given.")
    path: Path = Field(description="A local transformers checkpoint: a directory with config.json and safetensors.")
    quantization: Annotated[str | dict[str, Any] | None, BeforeValidator(_from_text)] = Field(
        default=None,
        description="A preset (nf4, fp4, nf4-dq, fp4-dq, int8, none) or BitsAndBytesConfig's fields; without it, what "
        "the checkpoint itself says.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="dtype of what is not quantized; auto takes the checkpoint's own."
    )
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N.")
    device_map: Annotated[str | dict[str, str | int] | None, BeforeValidator(_from_text)] = Field(
        default=None, description="Where modules go, as transformers takes it: a name or a mapping."
    )
    max_model_len: Annotated[int, Field(ge=1, le=2**24)] | None = Field(
        default=None,
        description="Longest prompt plus completion in tokens (an encoder-decoder's: of each); without it the model's "
        "own limit.",
    )
    kv_cache: KvCacheConfig = Field(default=KvCacheConfig(), description="The KV cache: {tokens: N, dtype: int8}.")
    max_batch_tokens: Annotated[int, Field(ge=1, le=2**20)] | None = Field(
        default=None,
        description="Tokens one engine step computes at most; without it "
        f"{CPU_BATCH_TOKENS} on a CPU and {BATCH_TOKENS} on a GPU or with modules on disk, or twice `max_sequences` "
        "where that is more.",
    )
    max_sequences: Annotated[int, Field(ge=1, le=4096)] = Field(
        default=MAX_SEQUENCES, description="Sequences that share an engine step at most."
    )
    prefix_caching: bool = Field(
        default=True, description="Use again what the KV cache still holds of a prompt's beginning."
    )
    speculative_tokens: Annotated[int, Field(ge=0, le=64)] = Field(
        default=SPECULATIVE_TOKENS,
        description="Tokens of a sequence that a step may guess and check at once, where that pays; 0: none.",
    )
    batch_invariant: bool = Field(
        default=False, description="Same bits for a token whatever else is in its step, at some cost; on a CPU only."
    )
    cuda_graphs: bool = Field(
        default=True, description="On a GPU, start the kernels of a decode step in one call, recorded at the start."
    )
    sampling_defaults: SamplingDefaults = Field(
        default="model",
        description="What a request's open fields mean: what the checkpoint's generation_config.json recommends "
        "(model), or what they mean in OpenAI's API (openai).",
    )
    threads: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        default=None, description="CPU threads of this engine; without it an equal share of the machine's."
    )

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if not _NAME.fullmatch(value):
            raise ValueError(
                f"'name' is {shown(value)}; accepted are 1 to 128 letters, digits and . _ : / @ -, "
                "starting with a letter or digit"
            )
        return value

    @field_validator("device")
    @classmethod
    def _check_device(cls, value: str) -> str:
        if not _DEVICE.fullmatch(value):
            raise ValueError(f"'device' is {shown(value)}; accepted are auto, cpu, cuda and cuda:N")
        return value

    @field_validator("path", "quantization", "device_map")
    @classmethod
    def _check_sendable(cls, value: object, info: ValidationInfo) -> object:
        """The other fields can't hold anything that is not."""
        sent = str(value) if isinstance(value, Path) else value
        if not is_sendable(sent):
            raise ValueError(
                f"'{info.field_name}' is {shown(sent)}, which an engine can't be sent; accepted are whole characters, "
                "integers of 64 bits, and no endless nesting"
            )
        return value

    def spec(self, threads: int) -> ModelSpec:
        """What the engine process is told; `threads` is this engine's share where none was configured."""
        return ModelSpec(
            name=self.name,
            path=str(self.path),
            quantization=self.quantization,
            dtype=self.dtype,
            device=self.device,
            device_map=self.device_map,
            max_model_len=self.max_model_len,
            kv_cache_tokens=self.kv_cache.tokens,
            kv_cache_dtype=self.kv_cache.dtype,
            max_batch_tokens=self.max_batch_tokens,
            max_sequences=self.max_sequences,
            prefix_caching=self.prefix_caching,
            speculative_tokens=self.speculative_tokens,
            batch_invariant=self.batch_invariant,
            cuda_graphs=self.cuda_graphs,
            sampling_defaults=self.sampling_defaults,
            threads=self.threads or threads,
        )


class ServerSettings(Settings):
    """The server-wide keys: beside `models:` in models.yaml."""

    host: str = Field(default="127.0.0.1", description="Address to listen on; loopback unless told otherwise.")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(default=8000, description="TCP port; 0 lets the system pick.")
    api_keys: Annotated[tuple[SecretStr, ...], BeforeValidator(_split), Field(max_length=1024)] = Field(
        default=(), description="Bearer keys that are accepted; with none, no key is asked for."
    )
    admin_key: SecretStr | None = Field(
        default=None, description="The one key that opens /admin; without it there is no /admin. None of api_keys."
    )
    allowed_hosts: Annotated[tuple[str, ...], BeforeValidator(_split), Field(max_length=256)] = Field(
        default=(), description="Host names, beside the listening address, that requests may name."
    )
    max_body_bytes: Annotated[int, Field(ge=1024, le=2**30)] = Field(
        default=4 * 1024 * 1024, description="Largest request body; a larger one is refused with 413."
    )
    max_queued_requests: Annotated[int, Field(ge=0, le=2**16)] = Field(
        default=128, description="Requests per model that may wait beside those that run; beyond, 429."
    )
    request_timeout_seconds: Annotated[float, Field(gt=0, le=MAX_TIMEOUT_SECONDS, allow_inf_nan=False)] | None = Field(
        default=None, description="How long a request may take that has no `timeout` of its own; without it, any time."
    )
    drain_seconds: Annotated[float, Field(ge=0, le=MAX_DRAIN_SECONDS, allow_inf_nan=False)] = Field(
        default=30.0, description="After SIGINT or SIGTERM, how long running requests may take to finish."
    )
    restart_limit: Annotated[int, Field(ge=0, le=1000)] = Field(
        default=8, description="Restarts in a row of an engine that died before its model is given up; 0 for none."
    )
    restart_pause_seconds: Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)] = Field(
        default=1.0, description="Pause before an engine that died is started again; each in a row is twice as long."
    )
    restart_longest_pause_seconds: Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)] = Field(
        default=60.0, description="The longest such pause; an engine that was ready for so long begins a new row."
    )
    stuck_seconds: Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)] = Field(
        default=300.0, description="With requests open, how long an engine may report no step before it is stuck."
    )
    restart_stuck: bool = Field(
        default=False, description="Kill a stuck engine and start it again, instead of only saying that it is stuck."
    )
    vllm_metrics: bool = Field(
        default=False,
        description="Show what vLLM measures too under vLLM's names as well, for tools that know only those.",
    )
    evict_idle: bool = Field(
        default=False, description="Unload idle models, least recently used first, for one that is loaded and needs it."
    )
    log_level: LogLevel = Field(default="info", description="debug, info, warning or error.")

    @field_validator("host")
    @classmethod
    def _check_host(cls, value: str) -> str:
        if not _HOST.fullmatch(value):
            raise ValueError(f"'host' is {shown(value)}; accepted is an address or a host name, without scheme or port")
        return value

    @field_validator("port", mode="before")
    @classmethod
    def _check_port(cls, value: object) -> object:
        if isinstance(value, str) and "://" in value:
            raise ValueError(
                f"'port' is {shown(value)}, which is what Kubernetes sets for a Service named halfbyte; set "
                "enableServiceLinks: false on the pod, or give the Service another name"
            )
        return value

    @field_validator("api_keys")
    @classmethod
    def _check_keys(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for number, key in enumerate(keys, start=1):
            if not _API_KEY.fullmatch(key.get_secret_value()):
                raise ValueError(
                    f"key {number} of 'api_keys' is not accepted; a key is 8 to 512 printable ASCII characters "
                    "without spaces or commas"
                )
        return keys

    @field_validator("admin_key")
    @classmethod
    def _check_admin_key(cls, key: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        if key is None:
            return None
        if not _API_KEY.fullmatch(key.get_secret_value()):
            raise ValueError(
                "'admin_key' is not accepted; a key is 8 to 512 printable ASCII characters without spaces or commas"
            )
        if key in info.data.get("api_keys", ()):
            raise ValueError("'admin_key' is one of 'api_keys'; accepted is a key that opens nothing else")
        return key

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.host.lower() == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


class ServerConfig(ServerSettings):
    """Everything `halfbyte serve` needs to know, checked and frozen."""

    models: tuple[ModelConfig, ...]
    folder: Path = Path()
    """Where relative paths of models begin: beside models.yaml, or in the working directory where there is none."""

    def specs(self) -> tuple[ModelSpec, ...]:
        """One ModelSpec per model; engines without a thread count share the CPUs equally."""
        share = thread_share(len(self.models))
        return tuple(model.spec(share) for model in self.models)


def thread_share(engines: int) -> int:
    """CPU threads of each of so many engines."""
    return max(1, available_cpus() // engines)


SERVER_KEYS: Final = tuple(ServerSettings.model_fields)
MODEL_KEYS: Final = tuple(ModelConfig.model_fields)
KV_CACHE_KEYS: Final = {f"kv_cache_{key}": key for key in KvCacheConfig.model_fields}
SINGLE_MODEL_KEYS: Final = ("model", *(k for k in MODEL_KEYS if k not in ("path", "kv_cache")), *KV_CACHE_KEYS)
"""What flags and variables offer for one model: MODEL is its path, --kv-cache-tokens its kv_cache.tokens."""
ALL_KEYS: Final = ("config", *SERVER_KEYS, *SINGLE_MODEL_KEYS)
SECRET_KEYS: Final = frozenset({"api_keys", "admin_key"})
"""Never shown, and no flags: other users of the machine can read a process's arguments."""


@dataclass(frozen=True)
class _Value:
    """A raw value and the name of the place it came from, as an error message calls it."""

    raw: object
    origin: str


def load_config(flags: Mapping[str, object], environment: Mapping[str, str]) -> ServerConfig:
    """Merges the three sources and checks the result. `flags` maps setting names to values; None means not given.

    Raises ConfigError: one sentence with the flag, variable or key, its value, and what is accepted.
    """
    given = _collect(flags, environment)
    config_file = given.pop("config", None)
    document: dict[str, Any] = {}
    source, folder = "", Path()
    if config_file is not None:
        path = Path(str(config_file.raw))
        document, source, folder = read_yaml(path), str(path), path.parent
        _check_keys(document, source, [*SERVER_KEYS, "models"])
    entries = _model_entries(document.pop("models", None), source, folder)
    server = {key: _Value(value, f"{source}: {key}") for key, value in document.items()}
    server |= {key: value for key, value in given.items() if key not in SINGLE_MODEL_KEYS}
    single = {key: value for key, value in given.items() if key in SINGLE_MODEL_KEYS}
    models = _models(entries, single, source)
    settings = _validate(ServerSettings, server, listed([*SERVER_KEYS, "models"]))
    return ServerConfig(**{key: getattr(settings, key) for key in SERVER_KEYS}, models=models, folder=folder)


def load_entry(entry: Mapping[str, object], source: str, folder: Path) -> ModelConfig:
    """One entry of models.yaml that comes from `source` and not from a file, checked as there.

    Raises ConfigError as load_config does; `folder` is where a relative path begins.
    """
    return _model(_model_entry(entry, source, folder))


def _collect(flags: Mapping[str, object], environment: Mapping[str, str]) -> dict[str, _Value]:
    """Environment first, flags over it. An empty variable counts as not set; an unknown one is refused."""
    variables = [ENVIRONMENT_PREFIX + key.upper() for key in ALL_KEYS]
    for variable in environment:
        if variable.startswith(ENVIRONMENT_PREFIX) and variable not in variables and not _NOT_OURS.fullmatch(variable):
            raise ConfigError(f"the environment variable {variable!r} is not known; accepted are {listed(variables)}")
    given: dict[str, _Value] = {}
    for key in ALL_KEYS:
        variable = ENVIRONMENT_PREFIX + key.upper()
        if environment.get(variable):
            given[key] = _Value(environment[variable], variable)
        if flags.get(key) is not None:
            given[key] = _Value(flags[key], "MODEL" if key == "model" else "--" + key.replace("_", "-"))
    return given


def _model_entries(models: object, source: str, folder: Path) -> list[dict[str, _Value]]:
    if models is None:
        return []
    if not isinstance(models, list) or not models:
        raise ConfigError(f"{source}: 'models' is {shown(models)}; accepted is a list with at least one model")
    return [_model_entry(model, f"{source}: models[{index}]", folder) for index, model in enumerate(models)]


def _model_entry(model: object, place: str, folder: Path) -> dict[str, _Value]:
    if not isinstance(model, Mapping):
        raise ConfigError(f"{place} is {shown(model)}; accepted is a mapping with the keys {listed(MODEL_KEYS)}")
    _check_keys(model, place, MODEL_KEYS)
    for key in model:
        if key in NOT_SUPPORTED_YET:
            raise ConfigError(f"{place}: {key!r} is not supported yet; accepted are {listed(MODEL_KEYS)}")
    entry = {str(key): _Value(value, f"{place}.{key}") for key, value in model.items()}
    path = entry.get("path")
    if path is not None and isinstance(path.raw, str):
        entry["path"] = _Value(folder / path.raw, path.origin)
    return entry


def _check_keys(keys: Iterable[object], place: str, accepted: Iterable[str]) -> None:
    """Refuses keys with half a character, which JSON and YAML can escape: pydantic wouldn't say which key it was."""
    for key in map(str, keys):
        if not is_sendable(key):
            raise ConfigError(f"{place}: {shown(key)} is not known; accepted are {listed(accepted)}")


def _models(entries: list[dict[str, _Value]], single: dict[str, _Value], source: str) -> tuple[ModelConfig, ...]:
    """Flags and variables describe one model: they override the only entry, or stand alone, or fall on the demo."""
    if len(entries) > 1 and single:
        culprit = next(iter(single.values())).origin
        raise ConfigError(
            f"{culprit} describes one model, and {source} lists {len(entries)}; "
            "accepted is one or the other: set it in that file, per model"
        )
    overrides = dict(single)
    if "model" in overrides:
        overrides["path"] = overrides.pop("model")
    own = {key: overrides.pop(name) for name, key in KV_CACHE_KEYS.items() if name in overrides}
    if own:
        origins = ", ".join(value.origin for value in own.values())
        overrides["kv_cache"] = _Value({key: value.raw for key, value in own.items()}, origins)
    if not entries:
        entries = [{}]
        if "path" not in overrides:
            origin = "the demo model"
            entries = [{"path": _Value(DEMO_MODEL_PATH, origin), "name": _Value(DEMO_MODEL_NAME, origin)}]
            overrides.setdefault("quantization", _Value(DEMO_QUANTIZATION, origin))
    if overrides:
        entries = [entries[0] | overrides]
    models = tuple(_model(entry) for entry in entries)
    names = [model.name for model in models]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{source}: {names.count(name)} models are named {name!r}; accepted is each name once")
    return models


def _model(entry: dict[str, _Value]) -> ModelConfig:
    if "path" in entry:
        path = entry["path"]
        try:
            directory = Path(str(path.raw)).expanduser()
            has_config, is_directory = (directory / "config.json").is_file(), directory.is_dir()
        except (OSError, RuntimeError, ValueError) as error:  # a name too long or garbled, a user without a home
            raise ConfigError(f"{path.origin}: {shown(str(path.raw))} can't be looked at: {error}") from error
        if not has_config:
            found = "a directory without config.json" if is_directory else "not a directory on this machine"
            raise ConfigError(
                f"{path.origin}: {str(path.raw)!r} is {found}; accepted is a local transformers checkpoint, "
                "a directory with config.json, tokenizer.json and safetensors files"
            )
        entry = entry | {"path": _Value(directory.resolve(), path.origin)}
        entry.setdefault("name", _Value(directory.resolve().name, path.origin))
    return _validate(ModelConfig, entry, listed(MODEL_KEYS))


def _validate(model: type[_Model], values: Mapping[str, _Value], accepted: str) -> _Model:
    try:
        return model.model_validate({key: value.raw for key, value in values.items()})
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        key = str(detail["loc"][0])
        origin = values[key].origin if key in values else next(iter(v.origin for v in values.values()), "")
        if key in SECRET_KEYS:
            detail["input"] = "(not shown)"
        sentence = describe(detail, location(detail["loc"]), [accepted])
        raise ConfigError(f"{origin}: {sentence}" if origin else sentence) from None
