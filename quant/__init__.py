"""4-bit and 8-bit linear layers in bitsandbytes' formats. It knows nothing of serving."""

from quant.config import BitsAndBytesConfig

__all__ = ["BitsAndBytesConfig"]
