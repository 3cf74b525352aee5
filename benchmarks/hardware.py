"""Names the machine a result was measured on. It measures nothing."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
import transformers

from quant import native


def describe() -> dict[str, str]:
    """Processor, cores, memory, accelerator and the versions that matter, as a result file carries them."""
    return {
        "processor": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def machine_line() -> str:
    """The machine as the last line of a page has it."""
    return f"Machine: {', '.join(f'{key} {value}' for key, value in describe().items())}."


def load_line() -> str:
    """What the kernels ran at, and how busy the machine was."""
    return f"Level {native.kernels('cpu').level}, load average at the end {os.getloadavg()[0]:.1f}."


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
