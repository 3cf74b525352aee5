"""The bytes of a model's weights by component: predicted from headers and config, or measured from tensors.

The two are independent on purpose. `predict_weights` knows the model's shapes (built on the meta device), the file's
headers and the formats' arithmetic, and sees no tensor; `measure_weights` walks the tensors of a loaded model and
knows no arithmetic. Where they disagree, one of them is wrong. KV cache, activations and everything else a process
needs are not here but in server/memory.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
import transformers
from transformers.initialization import no_init_weights

from quant.config import BitsAndBytesConfig
from quant.conversion import Kind, modules_packed_in, modules_to_quantize
from quant.embedding import embedding_groups
from quant.errors import CheckpointError, QuantError
from quant.experts import PackedExperts, Projection, find_experts
from quant.formats import NESTED_BLOCKSIZE
from quant.headers import TensorHeader, plain_name, read_checkpoint_headers
from quant.offload import is_offloaded
from quant.packed import PackedModule
from quant.report import format_name
from quant.stored import Stored, stored_modules
from quant.tied import untie_what_differs

if TYPE_CHECKING:
    from torch import nn

PACKED_WEIGHTS: Final = "packed_weights"
ABSMAX: Final = "absmax"
NESTED_STATISTICS: Final = "nested_statistics"
UNQUANTIZED: Final = "unquantized_"
"""Prefix of one component per dtype: unquantized_bfloat16, unquantized_float32, ..."""

MOST_MODULES: Final = {"layer": 4096, "layers": 4096, "experts": 65536}
"""What a config may count at most, by the last word of a key: many times what any model of transformers has."""

_FLOAT32_BYTES: Final = 4
_DIGITS: Final = 32
_REASON_CHARACTERS: Final = 300
"""How much of another library's message is shown: some list every model there is, or where in C++ they come from."""


def unquantized(dtype: torch.dtype) -> str:
    """The component that holds what is not quantized, in this dtype."""
    return UNQUANTIZED + str(dtype).removeprefix("torch.")


def read_config(directory: Path) -> transformers.PretrainedConfig:
    """The transformers config of a checkpoint directory; raises CheckpointError where there is none that is known."""
    file = directory / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{directory} is not a model: it has no config.json")
    with refused(f"{file} is not a config that transformers knows"):
        _refuse_endless(json.loads(file.read_text(encoding="utf-8")), file)
        config: transformers.PretrainedConfig = transformers.AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    return config


def _refuse_endless(part: object, file: Path) -> None:
    """Raises CheckpointError for a number of layers or experts that would be built for hours, or until memory ends: by
    the config itself, which lists its layers' kinds, or by the model.
    """
    for key, value in part.items() if isinstance(part, dict) else ():
        most = MOST_MODULES.get(key.rpartition("_")[2])
        if most is not None and isinstance(value, int | float) and value > most:
            raise CheckpointError(f"{file}: {key} is {_cut(str(value), _DIGITS)}; accepted is at most {most}")
        _refuse_endless(value, file)
    for value in part if isinstance(part, list) else ():
        _refuse_endless(value, file)


@contextmanager
def refused(sentence: str) -> Iterator[None]:
    """Turns whatever is raised into a CheckpointError that begins with `sentence` and ends with the reason.

    A config decides which code of transformers runs, and on which values: no list of what that may raise is complete.
    """
    try:
        yield
    except (QuantError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointError(f"{sentence}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What another library says, in one line; with the class of error, unless it is one that brings sentences."""
    text = _cut(" ".join(str(error).split()), _REASON_CHARACTERS)
    kind = type(error)
    if kind in (ValueError, OSError, ImportError):
        return text
    return f"{kind.__name__}: {text}" if text else kind.__name__


def _cut(text: str, most: int) -> str:
    """At most so many characters of it."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def is_packed(config: transformers.PretrainedConfig) -> bool:
    """Whether a checkpoint with this config says that it is quantized already."""
    return getattr(config, "quantization_config", None) is not None


def auto_class(config: transformers.PretrainedConfig) -> Any:
    """The transformers class that builds and loads the language model of a config: causal, or an encoder-decoder."""
    return transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM


def meta_model(config: transformers.PretrainedConfig, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """The language model of a config on the meta device: every shape and dtype, no byte of weights."""
    kind = "an encoder-decoder for text" if config.is_encoder_decoder else "a causal language model"
    with refused(f"architecture {config.model_type!r} is not {kind} that transformers can build from this config"):
        with torch.device("meta"), no_init_weights():  # what fills nothing takes a third of the time all the same
            model: transformers.PreTrainedModel = auto_class(config).from_config(
                config, dtype=dtype, trust_remote_code=False
            )
        model.tie_weights()  # else a part of what was left out
    return model


def predict_weights(
    directory: Path, config: BitsAndBytesConfig | None, dtype: torch.dtype, device_map: object = None
) -> Counter[str]:
    """Bytes by component that the loaded model's parameters and buffers will take, from headers and config alone.

    `config` is the effective quantization (the request's, or the checkpoint's own), None where nothing is quantized;
    `dtype` is that of everything else. Tied tensors count once. What `device_map` (a dictionary; a name like "auto" is
    not worked out) offloads takes nothing: its weights are brought for each forward pass.
    """
    model, headers = meta_model(read_config(directory), dtype), read_checkpoint_headers(directory)
    untie_what_differs(model, headers)
    return predict_meta(model, config, dtype, headers, device_map)


def predict_meta(
    model: transformers.PreTrainedModel,
    config: BitsAndBytesConfig | None,
    dtype: torch.dtype,
    headers: Mapping[str, TensorHeader] | None = None,
    device_map: object = None,
) -> Counter[str]:
    """The same for a model on the meta device; layers whose statistics are in `headers` are quantized in the file."""
    lies_away = is_offloaded(device_map)
    return by_component(
        portion
        for portion in predict_tensors(model, config, dtype, headers, device_map)
        if portion.is_buffer or not lies_away(portion.name)
    )


@dataclass(frozen=True, slots=True)
class Portion:
    """What one tensor of the model becomes in memory."""

    name: str
    """As the model calls it; a tied one by its first name."""
    component_bytes: Mapping[str, int]
    arriving_bytes: int
    """Before it is quantized: in the model's dtype, or as it is packed in a file already."""
    is_buffer: bool

    @property
    def nbytes(self) -> int:
        return sum(self.component_bytes.values())


def by_component(portions: Iterable[Portion]) -> Counter[str]:
    """Their bytes by component, in the order in which tables show them."""
    bytes_of: Counter[str] = Counter()
    for portion in portions:
        bytes_of.update(portion.component_bytes)
    return _ordered(bytes_of)


def predict_tensors(
    model: transformers.PreTrainedModel,
    config: BitsAndBytesConfig | None,
    dtype: torch.dtype,
    headers: Mapping[str, TensorHeader] | None = None,
    device_map: object = None,
) -> Iterator[Portion]:
    """Every parameter and buffer of a model on the meta device, tied ones once, wherever `device_map` puts them."""
    headers = {plain_name(name): header for name, header in (headers or {}).items()}
    file_decides = bool(headers) and is_packed(model.config)
    stored = stored_modules(model, headers) if file_decides else Stored({}, {})
    kinds: Mapping[str, Kind] = {}
    if config is not None and file_decides:
        kinds, _ = modules_packed_in(model, config, stored, device_map)
    elif config is not None:
        kinds = modules_to_quantize(model, config, device_map)
    is_widened = is_offloaded(device_map if config is not None and config.llm_int8_enable_fp32_cpu_offload else None)
    experts = find_experts(model) if config is not None else {}
    groups = embedding_groups(model) if config is not None and config.quantize_embeddings else {}
    first_of = {name: first for first, members in groups.items() for name in members}
    stacks = {f"{name}.{projection.leaf}": projection for name in experts for projection in experts[name]}
    plan = model._get_dtype_plan(dtype)
    for name, tensor in _distinct_tensors(model):
        module, _, leaf = name.rpartition(".")
        module = first_of.get(module, module)  # a tied tensor is found under any of its names
        if module in kinds and leaf == "embed_scale":
            continue  # a packed embedding holds its scale as a number
        own = None
        if config is not None and leaf == "weight" and module in kinds:
            own = config.for_module(module) or config  # without a config of its own where only the file packs it
        arriving = tensor.nbytes
        if config is not None and name in stacks and module in kinds:
            found = _bytes_of_stack(stacks[name], config.for_module(module) or config)
        elif own is None:
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            kept = _kept_dtype(name, tensor, plan)
            if is_parameter and kept in (torch.float16, torch.bfloat16) and is_widened(name):
                kept = torch.float32
            found = {unquantized(kept): tensor.numel() * kept.itemsize}
        elif module in stored.packed:
            found = _bytes_in_file(headers, stored.packed[module])
            arriving = sum(found.values())
        elif kinds[module] == "4bit":
            found = _bytes_of_4bit(tensor.numel(), own)
        else:
            found = _bytes_of_8bit(tensor.shape, own, transposed=_is_transposed(model, module))
        yield Portion(name, found, arriving, is_buffer=not isinstance(tensor, torch.nn.Parameter))


def measure_weights(model: nn.Module) -> Counter[str]:
    """Bytes by component of a loaded model's parameters and buffers, from the tensors themselves; shared ones once."""
    bytes_of: Counter[str] = Counter()
    component_of: dict[int, str] = {}
    for module in model.modules():
        for leaf, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            component_of.setdefault(id(tensor), _component(module, leaf, tensor))
    for _, tensor in _distinct_tensors(model):
        if tensor.device.type != "meta":
            bytes_of[component_of[id(tensor)]] += tensor.nbytes
    return _ordered(bytes_of)


def measure_layers(model: nn.Module) -> list[tuple[str, str, dict[str, int]]]:
    """measure_weights once more by layer and format: ("model.layers.3", "nf4-dq", {"packed_weights": ...}), in order.

    What belongs to no numbered layer has its module's name; what is not quantized has its dtype for a format.
    """
    found: dict[tuple[str, str], Counter[str]] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        for leaf, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if tensor.device.type != "meta" and id(tensor) not in seen:
                seen.add(id(tensor))
                component = _component(module, leaf, tensor)
                found.setdefault((_layer_of(name), _format(module, leaf, component)), Counter())[component] += (
                    tensor.nbytes
                )
    return [(layer, form, dict(_ordered(sizes))) for (layer, form), sizes in found.items()]


def _layer_of(module: str) -> str:
    """The name up to the first number in it, or all of it."""
    parts = module.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[: number + 1])


def _format(module: nn.Module, leaf: str, component: str) -> str:
    if component.startswith(UNQUANTIZED):
        return component.removeprefix(UNQUANTIZED)
    if isinstance(module, PackedExperts):
        projection = next(name for name in module.projections if leaf.startswith(name))
        return format_name(next(module.matrices(projection)))
    if not isinstance(module, PackedModule):
        raise TypeError(f"a {type(module).__name__} has no packed tensors")
    return format_name(module.packed_weight())


def _ordered(bytes_of: Counter[str]) -> Counter[str]:
    """Quantized components first, then the rest by size: the order in which tables show them."""
    first = (PACKED_WEIGHTS, ABSMAX, NESTED_STATISTICS)
    rest = sorted(bytes_of.keys() - set(first), key=lambda name: -bytes_of[name])
    return Counter({name: bytes_of[name] for name in (*first, *rest) if bytes_of[name]})


def _component(module: nn.Module, leaf: str, tensor: torch.Tensor) -> str:
    if isinstance(module, PackedModule):
        if leaf == "weight" and module.is_packed:
            return PACKED_WEIGHTS
        if leaf in ("absmax", "SCB"):
            return ABSMAX
        if leaf.startswith("nested_"):
            return NESTED_STATISTICS
    if isinstance(module, PackedExperts):
        if leaf in module.projections:
            return PACKED_WEIGHTS
        if "_nested_" in leaf:
            return NESTED_STATISTICS
        if leaf.endswith(("_absmax", "_SCB")):
            return ABSMAX
    return unquantized(tensor.dtype)


def _distinct_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers, each object once: a tied weight has several names and one body."""
    yield from model.named_parameters(remove_duplicate=True)
    yield from model.named_buffers(remove_duplicate=True)


def _kept_dtype(name: str, tensor: torch.Tensor, plan: Mapping[str, torch.dtype]) -> torch.dtype:
    """The dtype an unquantized tensor is loaded in: transformers keeps some modules in float32 by name."""
    if not tensor.is_floating_point():
        return tensor.dtype
    return next((dtype for key, dtype in plan.items() if re.search(key, name)), tensor.dtype)


def _bytes_of_4bit(elements: int, config: BitsAndBytesConfig) -> dict[str, int]:
    """Two codes a byte and one absmax a block; doubly quantized: a byte a block, a float32 a group, and one offset."""
    item = _storage_itemsize(config.bnb_4bit_quant_storage)
    packed = -(-elements // (2 * item)) * item
    blocks = -(-elements // config.bnb_4bit_blocksize)
    if not config.bnb_4bit_use_double_quant:
        return {PACKED_WEIGHTS: packed, ABSMAX: blocks * _FLOAT32_BYTES}
    groups = -(-blocks // NESTED_BLOCKSIZE)
    return {PACKED_WEIGHTS: packed, ABSMAX: blocks, NESTED_STATISTICS: (groups + 1) * _FLOAT32_BYTES}


def _bytes_of_stack(projection: Projection, config: BitsAndBytesConfig) -> dict[str, int]:
    """A stack of experts: so many matrices, each packed by itself."""
    shape = torch.Size((projection.rows, projection.columns))
    is_int8 = config.load_in_8bit
    one = _bytes_of_codes(shape.numel(), shape[0]) if is_int8 else _bytes_of_4bit(shape.numel(), config)
    return {component: size * len(projection.file_names()) for component, size in one.items()}


def _bytes_of_8bit(shape: torch.Size, config: BitsAndBytesConfig, *, transposed: bool) -> dict[str, int]:
    """One byte a weight and one float32 an output row; with fp16 main weights nothing is packed."""
    if config.llm_int8_has_fp16_weight:
        return {unquantized(torch.float16): shape.numel() * torch.float16.itemsize}
    return _bytes_of_codes(shape.numel(), shape[1] if transposed else shape[0])


def _bytes_of_codes(count: int, rows: int) -> dict[str, int]:
    return {PACKED_WEIGHTS: count, ABSMAX: rows * _FLOAT32_BYTES}


def _storage_itemsize(storage: Any) -> int:
    dtype = storage if isinstance(storage, torch.dtype) else getattr(torch, str(storage).removeprefix("torch."))
    return int(dtype.itemsize)


def _bytes_in_file(headers: Mapping[str, TensorHeader], module: str) -> dict[str, int]:
    """What a quantized layer's own tensors take in its file, which is what they take in memory; tables are shared."""
    is_int8 = f"{module}.SCB" in headers
    sizes = {}
    for component, name in ((PACKED_WEIGHTS, "weight"), (ABSMAX, "SCB" if is_int8 else "weight.absmax")):
        if f"{module}.{name}" not in headers:
            raise CheckpointError(f"tensor {module}.{name} is missing")
        sizes[component] = headers[f"{module}.{name}"].nbytes
    nested = headers.get(f"{module}.weight.nested_absmax")
    if nested is not None:
        sizes[NESTED_STATISTICS] = nested.nbytes + _FLOAT32_BYTES  # the offset, which the file keeps in its JSON
    return sizes


def _is_transposed(model: nn.Module, module: str) -> bool:
    """GPT-2's Conv1D keeps [in, out] where a linear layer keeps [out, in]."""
    return isinstance(model.get_submodule(module), transformers.pytorch_utils.Conv1D)
