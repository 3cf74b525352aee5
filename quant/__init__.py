"""4-bit and 8-bit linear layers in bitsandbytes' formats. It knows nothing of serving.

Importing this package makes transformers use these layers in this process (quant/hf.py); unregister() undoes it.
"""

from quant.config import BitsAndBytesConfig
from quant.convert import quantize_checkpoint, report_checkpoint
from quant.hf import register, unregister
from quant.linear import Linear4bit, Linear8bit
from quant.native import set_batch_invariant
from quant.report import report_model
from quant.state import PackedWeight

__all__ = [
    "BitsAndBytesConfig",
    "Linear4bit",
    "Linear8bit",
    "PackedWeight",
    "quantize_checkpoint",
    "register",
    "report_checkpoint",
    "report_model",
    "set_batch_invariant",
    "unregister",
]

register()
