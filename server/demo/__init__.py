"""The demo model that ships with the project: its name, where it lies, how it is served.

Not the model's code and not its training: this file imports nothing heavy, so the HTTP process may read it.
`corpus` writes the text, `train` makes the weights (needs torch), `model/` holds what they made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

DEMO_MODEL_NAME: Final = "halfbyte-demo"
DEMO_MODEL_PATH: Final = Path(__file__).resolve().parent / "model"
DEMO_QUANTIZATION: Final = "nf4"
"""The preset (quant.config.PRESETS) that the demo is served with unless told otherwise."""
