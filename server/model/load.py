"""A ModelSpec to a model in memory: transformers' own loading, with `quant`'s layers, from local safetensors only.

It never runs code from a checkpoint, never goes to the network and reads no pickle. What a checkpoint lacks is an
error that names it: transformers would fill it with random numbers and only warn. Which runner serves the model is
probe.py's business; what it will cost is server/memory/plan.py's.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from pydantic import ValidationError
from safetensors import SafetensorError
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils import logging as transformers_logging

import quant  # noqa: F401  importing it makes transformers load bitsandbytes' formats with our layers
from quant.config import EXTENSIONS, BitsAndBytesConfig
from quant.errors import CheckpointError, QuantError, some
from quant.headers import ADAPTED, read_checkpoint_headers
from quant.memory import auto_class, read_config
from quant.quality import GroupReport, measured
from server.errors import ConfigError, LoadError
from server.memory.devices import main_device, resolve_device
from server.memory.facts import effective_quantization, model_dtype
from server.memory.machine import file_system
from server.model.mapped import let_go
from server.records import DISK, Batching, ModelInfo, ModelSpec
from server.sampling_ranges import Recommendations
from server.sentences import describe, location

Progress = Callable[[int, int], None]
"""Called with bytes loaded and bytes in all; from the loading thread, many times."""

_IN_MEMORY: Final = ("tmpfs", "ramfs")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    model: transformers.PreTrainedModel
    dtype: torch.dtype
    device: str
    quantization: dict[str, Any]
    """The effective config as its JSON dictionary; empty where nothing is quantized."""
    sampling_defaults: dict[str, int | float]
    """What requests get that leave these fields of SamplingParams open; empty where those are OpenAI's."""
    offload: tempfile.TemporaryDirectory[str] | None
    """Where modules that device_map puts on disk are kept; gone with this object."""
    quality: tuple[GroupReport, ...] = ()
    """What quantizing cost; empty where nothing was quantized while loading."""

    def info(
        self,
        max_model_len: int,
        *,
        prefix_caching: bool,
        speculative_tokens: int,
        batching: Batching,
        decoder_prompt_tokens: int,
    ) -> ModelInfo:
        return ModelInfo(
            max_model_len=max_model_len,
            vocab_size=self.vocab_size,
            eos_token_ids=_eos_token_ids(self.model),
            architecture=type(self.model).__name__,
            dtype=str(self.dtype).removeprefix("torch."),
            device=self.device,
            quantization=self.quantization,
            prefix_caching=prefix_caching,
            speculative_tokens=speculative_tokens,
            batching=batching,
            decoder_prompt_tokens=decoder_prompt_tokens,
            sampling_defaults=self.sampling_defaults,
        )

    @property
    def vocab_size(self) -> int:
        """Ids that the embedding has a row for."""
        embedding: Any = self.model.get_input_embeddings()
        rows = getattr(embedding, "num_embeddings", None)
        return int(embedding.weight.shape[0] if rows is None else rows)


def check_path(spec: ModelSpec) -> None:
    """Raises ConfigError where the path cannot be a checkpoint at all."""
    directory = Path(spec.path)
    if not directory.is_dir():
        raise ConfigError(f"model {spec.name!r}: path is {spec.path!r}, which is not a directory")
    if not (directory / "config.json").is_file():
        raise ConfigError(
            f"model {spec.name!r}: {spec.path!r} has no config.json; accepted is a directory with a transformers "
            "checkpoint (config.json and safetensors files)"
        )


def load_model(spec: ModelSpec, progress: Progress) -> LoadedModel:
    """Loads and quantizes a checkpoint, ready for inference.

    Raises ConfigError for a bad value of the spec, CheckpointError and QuantConfigError from `quant`, and LoadError
    for everything else that keeps it from loading, each with one sentence.
    """
    check_path(spec)
    directory = Path(spec.path)
    config = read_config(directory)
    sampling_defaults = recommended_sampling(spec) if spec.sampling_defaults == "model" else {}
    dtype = model_dtype(spec, config)
    device = resolve_device(spec)
    quantization = effective_quantization(spec, config, dtype)
    sizes = {name: header.nbytes for name, header in read_checkpoint_headers(directory).items()}
    offload = tempfile.TemporaryDirectory(prefix="halfbyte-offload-") if spec.device_map is not None else None
    arguments: dict[str, Any] = {
        "dtype": dtype,
        "device_map": {"": device} if spec.device_map is None else spec.device_map,
        "local_files_only": True,
        "trust_remote_code": False,
        "use_safetensors": True,
        "output_loading_info": True,
    }
    if offload is not None:
        arguments["offload_folder"] = offload.name
    if quantization is None and any(ADAPTED in name for name in sizes):
        arguments["key_mapping"] = {re.escape(ADAPTED): "."}  # what quant does by itself where anything is quantized
    if spec.quantization is not None and quantization is not None:
        arguments["quantization_config"] = quantization
    with _reporting(progress, sizes), _explained(spec), measured() as meter:
        found: Any = auto_class(config).from_pretrained(directory, **arguments)
    model, loading = found  # a pair, because of output_loading_info
    _refuse_gaps(directory, loading)
    let_go(model)
    _warn_of_a_disk_in_memory(spec, model, offload)
    progress(sum(sizes.values()), sum(sizes.values()))
    return LoadedModel(
        model=model.eval().requires_grad_(False),
        dtype=dtype,
        device=device if spec.device_map is None else main_device(spec, model.hf_device_map),
        quantization={} if quantization is None else _every_field(quantization),
        sampling_defaults=sampling_defaults,
        offload=offload,
        quality=tuple(meter.groups()),
    )


def recommended_sampling(spec: ModelSpec) -> dict[str, int | float]:
    """What the checkpoint's generation_config.json says of how tokens are chosen, whatever its do_sample is: vLLM and
    SGLang do not ask it either. Raises CheckpointError for values that no request may have.
    """
    file = Path(spec.path) / GENERATION_CONFIG_NAME
    if not file.is_file():
        return {}
    with _explained(spec):
        generation = transformers.GenerationConfig.from_pretrained(spec.path, local_files_only=True)
    try:
        return Recommendations.model_validate(
            {name: getattr(generation, name, None) for name in Recommendations.model_fields}
        ).given()
    except ValidationError as error:
        detail = error.errors()[0]
        what = describe(detail, location(detail["loc"]), Recommendations.model_fields)
        raise CheckpointError(f"{file}: {what}; sampling_defaults: openai serves it without") from error


def _eos_token_ids(model: transformers.PreTrainedModel) -> tuple[int, ...]:
    generation = getattr(model, "generation_config", None)
    ids = getattr(generation, "eos_token_id", None)
    if ids is None:
        ids = getattr(model.config.get_text_config(), "eos_token_id", None)
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(int(token) for token in ids)


def _every_field(quantization: BitsAndBytesConfig) -> dict[str, Any]:
    """The config as its JSON dictionary, with those of our own fields too that files leave out where unused."""
    return quantization.to_dict() | {name: getattr(quantization, name) for name in EXTENSIONS}


def _refuse_gaps(directory: Path, loading: dict[str, Any]) -> None:
    """Weights that the architecture has and the files have not would be random numbers."""
    missing = sorted(loading["missing_keys"])
    if missing:
        raise CheckpointError(f"{directory} lacks {len(missing)} of the model's tensors: {some(missing)}")


def _warn_of_a_disk_in_memory(spec: ModelSpec, model: Any, offload: tempfile.TemporaryDirectory[str] | None) -> None:
    """A temporary directory may be memory (a container's `--tmpfs /tmp`): what is put there is not out of the way."""
    if offload is None or DISK not in getattr(model, "hf_device_map", {}).values():
        return
    kind = file_system(Path(offload.name))
    if kind in _IN_MEMORY:
        log.warning(
            "modules of model %r that device_map puts on the disk lie in %s, a %s, which is memory; a volume mounted "
            "there, or TMPDIR on a disk, takes them out of it",
            spec.name,
            Path(offload.name).parent,
            kind,
        )


@contextmanager
def _explained(spec: ModelSpec) -> Iterator[None]:
    """Turns what transformers and safetensors raise while loading into one sentence."""
    try:
        yield
    except QuantError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise LoadError(f"model {spec.name!r} at {spec.path}: memory ran out while loading") from error
    except SafetensorError as error:
        raise CheckpointError(f"{spec.path} holds a safetensors file that cannot be read: {error}") from error
    except (RuntimeError, ValueError, OSError, KeyError, TypeError, ImportError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LoadError(f"model {spec.name!r} at {spec.path} could not be loaded: {first_line}") from error


@contextmanager
def _reporting(progress: Progress, sizes: dict[str, int]) -> Iterator[None]:
    """Listens to transformers' progress bars, which are drawn nowhere: one turn of theirs is one parameter stored."""
    total = sum(sizes.values())

    def hook(factory: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if not arguments or options.get("desc") != "Loading weights":
            return factory(*arguments, **{**options, "disable": True})
        return _counted(arguments[0], progress, sizes, total)

    progress(0, total)
    previous = transformers_logging.set_tqdm_hook(hook)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)


def _counted(
    items: Iterable[tuple[str, Any]], progress: Progress, sizes: dict[str, int], total: int
) -> Iterator[tuple[str, Any]]:
    """Passes items on and reports after each; a name that the files spell otherwise counts when all is done."""
    done = 0
    for name, mapping in items:
        yield name, mapping
        done += sizes.get(name, 0)
        progress(done, total)
