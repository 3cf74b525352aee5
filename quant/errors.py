"""The errors of `quant`: one tree; each message says what was wrong, with the value, and what is accepted.

QuantError
├── QuantConfigError      a field of a quantization config, or a combination of fields        (also a ValueError)
├── CheckpointError       a file or its tensors: sizes, shapes, dtypes, JSON                  (also a ValueError)
├── OutputError           where a converted checkpoint is to be written                       (also an OSError)
├── ShapeError            an operator's arguments do not belong together                      (also a ValueError)
└── NativeError           the compiled library is missing, the wrong version, or said no      (also a RuntimeError)
"""

from collections.abc import Sequence
from typing import Final

_NAMES_SHOWN: Final = 3


class QuantError(Exception):
    """The root: catch it to catch everything `quant` raises on purpose."""


class QuantConfigError(QuantError, ValueError):
    """A quantization config that is not accepted."""


class CheckpointError(QuantError, ValueError):
    """A checkpoint whose files or tensors are not what they claim to be."""


class OutputError(QuantError, OSError):
    """A place that a converted checkpoint cannot be written to."""


class ShapeError(QuantError, ValueError):
    """Operator arguments whose shapes, dtypes or devices do not fit together."""


class NativeError(QuantError, RuntimeError):
    """The compiled library could not be loaded or refused a call."""


def some(names: Sequence[str]) -> str:
    """The first names of a list that a message may not have to hold as a whole."""
    return ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")
