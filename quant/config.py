"""BitsAndBytesConfig: the ten fields of transformers' class, their defaults and their validation, and our extensions.

It is a subclass of transformers' class and has its name, because transformers asks for both (it tests the type and
compares the name). What it adds: every value is checked when it is given, an unknown argument is refused by name, and
the fields in EXTENSIONS. It quantizes nothing: that is linear.py and hf.py.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import torch
import transformers
from transformers.quantizers.quantizers_utils import should_convert_module

from quant import formats
from quant.arguments import ACTIVATIONS, OUTLIER_RULES
from quant.errors import QuantConfigError

logger = logging.getLogger(__name__)

QUANT_TYPES: Final = tuple(formats.FOUR_BIT)
COMPUTE_DTYPES: Final = {str(dtype).removeprefix("torch."): dtype for dtype in formats.VALUE_DTYPES}
STORAGE_DTYPES: Final = {
    "uint8": torch.uint8,
    "int8": torch.int8,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
FIELDS: Final = (
    "load_in_8bit",
    "load_in_4bit",
    "llm_int8_threshold",
    "llm_int8_skip_modules",
    "llm_int8_enable_fp32_cpu_offload",
    "llm_int8_has_fp16_weight",
    "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "bnb_4bit_quant_storage",
)
EXTENSIONS: Final = (
    "llm_int8_outliers",
    "bnb_4bit_activations",
    "bnb_4bit_blocksize",
    "module_overrides",
    "bnb_4bit_search",
    "quantize_embeddings",
)
"""Fields of our own; written to a file only where they differ from their default."""
NEVER_WRITTEN: Final = ("bnb_4bit_search",)
"""Those that leave nothing in a file that its readers need to know."""
OVERRIDABLE: Final = tuple(
    name
    for name in (*FIELDS, *EXTENSIONS)
    if name
    not in ("llm_int8_skip_modules", "llm_int8_enable_fp32_cpu_offload", "module_overrides", "quantize_embeddings")
)
"""What an override may set: the fields that say how one module is packed, not which modules are."""

QUANT_METHOD: Final = "bitsandbytes"
_WRITTEN_BESIDE: Final = ("quant_method", "_load_in_8bit", "_load_in_4bit")
_BOOKKEEPING: Final = ("_from_model_config", "transformers_version")
_EXTENSION_DEFAULTS: Final[Mapping[str, Any]] = MappingProxyType(
    dict(zip(EXTENSIONS, (OUTLIER_RULES[0], ACTIVATIONS[0], formats.DEFAULT_BLOCKSIZE, {}, False, False), strict=True))
)
_BOTH: Final = "load_in_4bit and load_in_8bit are both True; only one of them is accepted at a time"


class BitsAndBytesConfig(transformers.BitsAndBytesConfig):
    """What bitsandbytes users already write; docs/quantization.md says what each field does.

    Ours are: `llm_int8_outliers`, "value" (default: each activation above the threshold is an outlier, so that rows of
    a batch do not change each other), "batch" (whole columns over the batch, as bitsandbytes does) or
    "all" (no activation is rounded: the weight alone is in 8 bits); `bnb_4bit_activations`, "float" or "int8": whether
    activations are rounded to int8 before they are multiplied with a 4-bit weight, whose bytes stay what they are;
    `bnb_4bit_blocksize`, the values per 4-bit block when packing (a packed tensor says its own); `module_overrides`,
    a pattern as in `llm_int8_skip_modules` to the fields that differ for the modules it names, or to None, which
    leaves them unquantized; `bnb_4bit_search`, which looks for each 4-bit block's best scale and sign when packing (the
    files are what they are without it, so it is never written to one); `quantize_embeddings`, which packs the input and
    the output embedding too, as one where they are tied.

    Raises QuantConfigError, which is a ValueError, for a value or a name that is not accepted.
    """

    def __init__(
        self,
        load_in_8bit: bool = False,
        load_in_4bit: bool = False,
        llm_int8_threshold: float = 6.0,
        llm_int8_skip_modules: list[str] | None = None,
        llm_int8_enable_fp32_cpu_offload: bool = False,
        llm_int8_has_fp16_weight: bool = False,
        bnb_4bit_compute_dtype: torch.dtype | str | None = None,
        bnb_4bit_quant_type: str = "fp4",
        bnb_4bit_use_double_quant: bool = False,
        bnb_4bit_quant_storage: torch.dtype | str | None = None,
        *,
        llm_int8_outliers: str = OUTLIER_RULES[0],
        bnb_4bit_activations: str = ACTIVATIONS[0],
        bnb_4bit_blocksize: int = formats.DEFAULT_BLOCKSIZE,
        module_overrides: Mapping[str, Mapping[str, Any] | None] | None = None,
        bnb_4bit_search: bool = False,
        quantize_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        if load_in_4bit is True and load_in_8bit is True:
            raise QuantConfigError(_BOTH)
        super().__init__(  # type: ignore[no-untyped-call]
            load_in_8bit=_flag("load_in_8bit", load_in_8bit),
            load_in_4bit=_flag("load_in_4bit", load_in_4bit),
            llm_int8_threshold=_threshold(llm_int8_threshold),
            llm_int8_skip_modules=_skip_modules(llm_int8_skip_modules),
            llm_int8_enable_fp32_cpu_offload=_flag(
                "llm_int8_enable_fp32_cpu_offload", llm_int8_enable_fp32_cpu_offload
            ),
            llm_int8_has_fp16_weight=_flag("llm_int8_has_fp16_weight", llm_int8_has_fp16_weight),
            bnb_4bit_compute_dtype=_dtype(
                "bnb_4bit_compute_dtype", bnb_4bit_compute_dtype, COMPUTE_DTYPES, torch.float32
            ),
            bnb_4bit_quant_type=_choice("bnb_4bit_quant_type", bnb_4bit_quant_type, QUANT_TYPES),
            bnb_4bit_use_double_quant=_flag("bnb_4bit_use_double_quant", bnb_4bit_use_double_quant),
            bnb_4bit_quant_storage=_dtype(
                "bnb_4bit_quant_storage", bnb_4bit_quant_storage, STORAGE_DTYPES, torch.uint8
            ),
        )
        self.llm_int8_outliers = _choice("llm_int8_outliers", llm_int8_outliers, OUTLIER_RULES)
        self.bnb_4bit_activations = _choice("bnb_4bit_activations", bnb_4bit_activations, ACTIVATIONS)
        self.bnb_4bit_blocksize = _blocksize(bnb_4bit_blocksize)
        self.bnb_4bit_search = _flag("bnb_4bit_search", bnb_4bit_search)
        self.quantize_embeddings = _flag("quantize_embeddings", quantize_embeddings)
        self._check_written_beside(kwargs)
        self.module_overrides: dict[str, dict[str, Any] | None] = {}
        for pattern, fields in _overrides(module_overrides).items():
            self.module_overrides[pattern] = None if fields is None else self._checked_override(pattern, fields)
        self._check_embeddings_storage()

    def _check_embeddings_storage(self) -> None:
        """transformers takes a model's first floating-point parameter for its dtype, usually the embedding."""
        configs = [self, *map(self.for_override, self.module_overrides)] if self.quantize_embeddings else []
        for config in configs:
            if config is not None and config.load_in_4bit and config.bnb_4bit_quant_storage.is_floating_point:
                raise QuantConfigError(
                    f"bnb_4bit_quant_storage is {config.bnb_4bit_quant_storage} and quantize_embeddings is True, which "
                    "would leave transformers no tensor to tell the model's dtype by; accepted are uint8 and int8"
                )

    def override_of(self, name: str) -> str | None:
        """The key of `module_overrides` that names this module; QuantConfigError where two do and disagree."""
        patterns = [pattern for pattern in self.module_overrides if not should_convert_module(name, [pattern])]
        for pattern in patterns[1:]:
            if self.module_overrides[pattern] != self.module_overrides[patterns[0]]:
                raise QuantConfigError(
                    f"module_overrides names {name} in {patterns[0]!r} and in {pattern!r}, which disagree; accepted is "
                    "one override per module"
                )
        return patterns[0] if patterns else None

    def for_module(self, name: str) -> BitsAndBytesConfig | None:
        """The config of one module: this one, what its override makes of it, or None: it stays unquantized."""
        pattern = self.override_of(name)
        return self if pattern is None else self.for_override(pattern)

    def for_override(self, pattern: str) -> BitsAndBytesConfig | None:
        """What one entry of `module_overrides` makes of this config; None: its modules stay unquantized."""
        fields = self.module_overrides[pattern]
        return None if fields is None else self._with(fields)

    def _with(self, fields: Mapping[str, Any]) -> BitsAndBytesConfig:
        merged = {key: value for key, value in self._used_fields().items() if key in OVERRIDABLE}
        for flag, other in (("load_in_4bit", "load_in_8bit"), ("load_in_8bit", "load_in_4bit")):
            if fields.get(flag) is True:
                merged[other] = False
        return type(self)(**(merged | dict(fields)))

    def _checked_override(self, pattern: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields with every dtype as its name, so that they are JSON."""
        unknown = sorted(set(fields) - set(OVERRIDABLE))
        if unknown:
            raise QuantConfigError(
                f"module_overrides[{pattern!r}] sets {', '.join(map(repr, unknown))}; accepted are "
                f"{', '.join(OVERRIDABLE)}"
            )
        try:
            merged = self._with(fields)
        except QuantConfigError as error:
            raise QuantConfigError(f"module_overrides[{pattern!r}]: {error}") from error
        if not (merged.load_in_4bit or merged.load_in_8bit) and (self.load_in_4bit or self.load_in_8bit):
            raise QuantConfigError(
                f"module_overrides[{pattern!r}] leaves neither load_in_4bit nor load_in_8bit; accepted is None for "
                "modules that stay unquantized"
            )
        spelled = merged.to_dict()
        return {name: spelled[name] for name in fields}

    def _check_written_beside(self, kwargs: Mapping[str, Any]) -> None:
        """The keys that config.json carries beside the fields must agree with them; any other name is refused."""
        unknown = sorted(set(kwargs) - set(_WRITTEN_BESIDE))
        if unknown:
            raise QuantConfigError(
                f"BitsAndBytesConfig has no argument {', '.join(map(repr, unknown))}; accepted are "
                f"{', '.join(FIELDS + EXTENSIONS)}"
            )
        actual = {
            "quant_method": QUANT_METHOD,
            "_load_in_8bit": self.load_in_8bit,
            "_load_in_4bit": self.load_in_4bit,
        }
        for name, value in kwargs.items():
            if value != actual[name]:
                raise QuantConfigError(f"{name} is {value!r} where the other fields say {actual[name]!r}")

    @property
    def load_in_4bit(self) -> bool:
        """Replace linear layers by 4-bit ones; excludes load_in_8bit."""
        return bool(self._load_in_4bit)

    @load_in_4bit.setter
    def load_in_4bit(self, value: bool) -> None:
        if _flag("load_in_4bit", value) and self.load_in_8bit:
            raise QuantConfigError(_BOTH)
        self._load_in_4bit = value

    @property
    def load_in_8bit(self) -> bool:
        """Replace linear layers by LLM.int8() ones; excludes load_in_4bit."""
        return bool(self._load_in_8bit)

    @load_in_8bit.setter
    def load_in_8bit(self, value: bool) -> None:
        if _flag("load_in_8bit", value) and self.load_in_4bit:
            raise QuantConfigError(_BOTH)
        self._load_in_8bit = value

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config that a checkpoint's config.json holds; keys that this version does not know are reported.

        `kwargs` that name a field replace its value; the others are returned beside the config where
        `return_unused_kwargs` is set, as transformers does.
        """
        known = set(FIELDS + EXTENSIONS + _WRITTEN_BESIDE)
        unknown = sorted(set(config_dict) - known - set(_BOOKKEEPING))
        if unknown:
            logger.warning(
                "the quantization config holds keys that are not honoured: %s; known are %s",
                ", ".join(unknown),
                ", ".join(FIELDS + EXTENSIONS),
            )
        fields = {key: value for key, value in config_dict.items() if key in known}
        changes = {key: kwargs.pop(key) for key in FIELDS + EXTENSIONS if key in kwargs}
        for flag in ("load_in_8bit", "load_in_4bit"):
            if flag in changes:
                fields.pop(f"_{flag}", None)
        config = cls(**(fields | changes))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Exactly the keys that transformers writes for bitsandbytes, dtypes as names; our own only where used."""
        return {name: value for name, value in self._used_fields().items() if name not in NEVER_WRITTEN}

    def _used_fields(self) -> dict[str, Any]:
        """What to_dict() gives, and what is never written, where it is used."""
        output: dict[str, Any] = super().to_dict()
        for name, default in _EXTENSION_DEFAULTS.items():
            if output[name] == default:
                del output[name]
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        """The entries of to_dict() that differ from a config built without arguments."""
        default = type(self)().to_dict()
        return {key: value for key, value in self.to_dict().items() if key not in default or value != default[key]}

    def to_json_string(self, use_diff: bool = True) -> str:
        """to_diff_dict() (or to_dict()) as JSON with sorted keys, indented by two, ending in a newline."""
        content = self.to_diff_dict() if use_diff else self.to_dict()
        return json.dumps(content, indent=2, sort_keys=True) + "\n"

    def __eq__(self, other: object) -> bool:
        # transformers' dataclass has no fields, so that its own comparison finds any two configs equal.
        return isinstance(other, BitsAndBytesConfig) and self._used_fields() == other._used_fields()

    __hash__ = None  # type: ignore[assignment]  # mutable, like the class it stands for


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise QuantConfigError(f"{name} is {value!r}; accepted are True and False")
    return value


def _threshold(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise QuantConfigError(
            f"llm_int8_threshold is {value!r}; accepted are finite numbers from 0.0 (no outliers) upwards"
        )
    return float(value)


def _skip_modules(value: object) -> list[str] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(entry, str) and entry for entry in value):
        raise QuantConfigError(
            f"llm_int8_skip_modules is {value!r}; accepted is a list of module names, suffixes or regular expressions"
        )
    for entry in value:
        _compiles("llm_int8_skip_modules", entry)
    return list(value)


def _blocksize(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value not in formats.BLOCKSIZES:
        raise QuantConfigError(
            f"bnb_4bit_blocksize is {value!r}; accepted are {', '.join(map(str, formats.BLOCKSIZES))}"
        )
    return value


def _overrides(value: object) -> Mapping[str, Mapping[str, Any] | None]:
    """`module_overrides` by its outer shape: patterns that compile, to mappings or None."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(
        isinstance(pattern, str) and pattern and (fields is None or isinstance(fields, Mapping))
        for pattern, fields in value.items()
    ):
        raise QuantConfigError(
            f"module_overrides is {value!r:.200}; accepted is a mapping of module names, suffixes or regular "
            "expressions to the fields that differ, or to None"
        )
    for pattern in value:
        _compiles("module_overrides", pattern)
    return value


def _compiles(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise QuantConfigError(
            f"{name} contains {pattern!r}, which is not a valid regular expression ({error})"
        ) from error


def _choice(name: str, value: object, accepted: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in accepted:
        raise QuantConfigError(f"{name} is {value!r}; accepted are {' and '.join(map(repr, accepted))}")
    return value


def _dtype(name: str, value: object, accepted: Mapping[str, torch.dtype], default: torch.dtype) -> torch.dtype:
    """A dtype given as torch.dtype, "bfloat16" or "torch.bfloat16"; None means the default."""
    if value is None:
        return default
    found = accepted.get(value.removeprefix("torch.")) if isinstance(value, str) else value
    if not isinstance(found, torch.dtype) or found not in accepted.values():
        raise QuantConfigError(f"{name} is {value!r}; accepted are {', '.join(accepted)}")
    return found


PRESETS: Final[Mapping[str, BitsAndBytesConfig | None]] = MappingProxyType(
    {
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "fp4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
        "nf4-dq": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        "fp4-dq": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "none": None,
    }
)
"""The names that the command line and models.yaml accept. Do not change one in place: from_spec() returns copies."""


def from_spec(
    spec: str | Mapping[str, Any] | None, *, compute_dtype: torch.dtype | str | None = None
) -> BitsAndBytesConfig | None:
    """A preset's name, the fields of BitsAndBytesConfig, or None (nothing asked for) as a config of its own.

    A preset computes in `compute_dtype` (usually the model's dtype) where one is given; a dictionary that does not
    name `bnb_4bit_compute_dtype` keeps the documented default, float32. Raises QuantConfigError.
    """
    if spec is None:
        return None
    if isinstance(spec, str):
        if spec not in PRESETS:
            raise QuantConfigError(f"quantization is {spec!r}; accepted are {', '.join(PRESETS)}")
        preset = copy.deepcopy(PRESETS[spec])
        if preset is not None and compute_dtype is not None:
            preset.bnb_4bit_compute_dtype = _dtype(
                "compute_dtype", compute_dtype, COMPUTE_DTYPES, preset.bnb_4bit_compute_dtype
            )
        return preset
    if not isinstance(spec, Mapping) or not all(isinstance(key, str) for key in spec):
        raise QuantConfigError(
            f"quantization is {spec!r}; accepted are {', '.join(PRESETS)} or the fields of BitsAndBytesConfig"
        )
    config = BitsAndBytesConfig(**spec)
    if not (config.load_in_4bit or config.load_in_8bit):
        raise QuantConfigError(
            f"quantization is {dict(spec)!r}, with neither load_in_4bit nor load_in_8bit; set one of them to true"
        )
    return config
