"""An effective quantization config as label values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from server.metrics.catalog import QUANTIZATION_FIELDS

_FORMATS: Final = {"bnb_4bit_": "load_in_4bit", "llm_int8_": "load_in_8bit"}
"""Beginnings of the fields that mean something in one of the formats only."""
_BOTH: Final = frozenset({"llm_int8_skip_modules", "llm_int8_enable_fp32_cpu_offload"})
"""Fields that are named after one format, and count in both."""


def quantization_label(quantization: Mapping[str, Any]) -> str:
    """A short name of an effective quantization config: nf4, nf4-dq, fp4, fp4-dq, int8 or none."""
    if quantization.get("load_in_8bit"):
        return "int8"
    if quantization.get("load_in_4bit"):
        nested = "-dq" if quantization.get("bnb_4bit_use_double_quant") else ""
        return f"{quantization.get('bnb_4bit_quant_type', 'fp4')}{nested}"
    return "none"


def quantization_labels(quantization: Mapping[str, Any]) -> list[str]:
    """The values of QUANTIZATION_FIELDS, in their order; empty where a field does not apply."""
    return [_value(quantization, field) for field in QUANTIZATION_FIELDS]


def _value(quantization: Mapping[str, Any], field: str) -> str:
    flag = next((flag for start, flag in _FORMATS.items() if field.startswith(start) and field not in _BOTH), None)
    if not quantization or (flag is not None and not quantization.get(flag)):
        return ""
    value = quantization.get(field)
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return json.dumps(value, separators=(",", ":")) if value else ""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(map(str, value))
    return str(value)
