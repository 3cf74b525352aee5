"""Tiny models in a format, over a cache in a dtype, loaded as an engine loads them. Not a test."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from server.model.load import load_model
from server.records import ModelSpec
from tests.tiny_models import save_tiny


@dataclass(frozen=True)
class Case:
    architecture: str
    dtype: str = "float32"
    quantization: str | None = None
    cache: str = "auto"
    changes: dict[str, object] = field(default_factory=dict)

    def load(self, **settings: Any) -> tuple[transformers.PreTrainedModel, ModelSpec]:
        """The model, and the spec that it was loaded by; `settings` are further fields of that."""
        with tempfile.TemporaryDirectory() as directory:
            path = save_tiny(self.architecture, Path(directory), dtype=getattr(torch, self.dtype), **self.changes)
            spec = ModelSpec(
                "m",
                str(path),
                dtype=self.dtype,
                quantization=self.quantization,
                kv_cache_dtype=self.cache,
                **settings,
            )
            return load_model(spec, lambda *_: None).model, spec
