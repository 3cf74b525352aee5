"""What memory is counted as, beside the weights' own components (quant/memory.py): the names, and nothing else.

Plan and ledger count the same things under the same names, each from sources of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

KV_CACHE: Final = "kv_cache"
"""Keys and values, all blocks, used or not."""
ACTIVATIONS: Final = "activations"
"""What lives only while a step runs, at its largest."""
WORKSPACE: Final = "workspace"
"""Kept from step to step: the runner's input buffers, and what kernels compute in."""
RUNTIME_CONTEXT: Final = "runtime_context"
"""What the process had written before any of the model was loaded: the interpreter, torch, transformers."""
MAPPED_FILES: Final = "mapped_files"
"""Its share of pages of files, as far as they are no weights: programs and libraries."""
HEAP: Final = "heap"
"""What malloc has handed out since, beyond the tensors that are counted elsewhere: modules, caches, requests."""
ALLOCATOR_SLACK: Final = "allocator_slack"
"""Resident in an allocator's memory and part of no tensor: ends of huge pages on a CPU, cached blocks on CUDA."""
ESTIMATED: Final = frozenset({ACTIVATIONS, WORKSPACE, RUNTIME_CONTEXT, MAPPED_FILES, HEAP, ALLOCATOR_SLACK})
"""Components that a plan estimates or does not know; all others it predicts to the byte."""


def exact(components: Mapping[str, int]) -> dict[str, int]:
    """Those that plan and ledger must agree on to the byte: weights and cache."""
    return {name: size for name, size in components.items() if name not in ESTIMATED}
