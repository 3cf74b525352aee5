"""Where the bytes are, after loading: each component from a source of its own, none as what remains.

Weights and KV cache are measured from their tensors; the process's memory is what the kernel says of its mappings.
Nothing here predicts: plan.py does, and the two meet only in a report.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from quant.memory import measure_weights
from server.memory.components import KV_CACHE

if TYPE_CHECKING:
    from torch import nn

_KIB: Final = 1024
_STATUS: Final = {
    "RssAnon": "rss_anonymous",
    "RssFile": "rss_file",
    "RssShmem": "rss_shared",
    "VmHWM": "peak_rss",
    "VmSwap": "swap",
}


def measure(model: nn.Module, kv_tensors: Iterable[torch.Tensor]) -> dict[str, int]:
    """Bytes by component of a loaded model and its cache, from the tensors themselves."""
    measured = measure_weights(model)
    measured[KV_CACHE] = sum(tensor.nbytes for tensor in kv_tensors)
    return dict(measured)


def process_memory(status: Path = Path("/proc/self/status")) -> dict[str, int]:
    """Resident bytes of this process as the kernel counts them.

    rss_anonymous is memory that only this process pays for; rss_file are mapped file pages, which the kernel may drop
    at any time. Where there is no /proc, the dictionary is empty.
    """
    if not status.is_file():
        return {}
    found: dict[str, int] = {}
    for line in status.read_text(encoding="ascii", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key in _STATUS:
            found[_STATUS[key]] = int(value.split()[0]) * _KIB
    return found
