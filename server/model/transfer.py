"""Small tensors to the device of a step, without waiting for what it is at.

A copy from memory that the driver may page out waits until the device is done with everything before. From pinned
memory it takes its place in the stream, and torch keeps that memory until it has been read. What a step draws comes
back in one transfer, at its end (readout.py), and that is the one time a step waits; one that draws nothing does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


def on_device(
    values: Sequence[Any] | npt.NDArray[np.generic] | torch.Tensor,
    device: torch.device,
    dtype: torch.dtype = torch.int64,
) -> torch.Tensor:
    """A tensor of these numbers, which are on the host; on a CPU one that may share an array's memory."""
    on_host = torch.as_tensor(values, dtype=dtype)
    if device.type != "cuda":
        return on_host.to(device)
    return on_host.pin_memory().to(device, non_blocking=True)
