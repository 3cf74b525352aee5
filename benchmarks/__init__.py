"""One command each; results are committed under results/ with the hardware named. Nothing here is a test."""

from __future__ import annotations

from pathlib import Path
from typing import Final

RESULTS: Final = Path(__file__).parent / "results"
"""Where records and the pages made from them are kept."""
