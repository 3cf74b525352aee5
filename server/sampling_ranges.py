"""What a request may ask for, and a checkpoint recommend: the ranges of the fields that both have.

The names are those of transformers' GenerationConfig and of SamplingParams. What each field does is in
server/model/sampler.py; fields that only requests have are in server/api/sampling_fields.py.
"""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

TOP_K_OFF: Final = -1
"""How vLLM writes it; 0 is off too."""

Share = Annotated[float, Field(gt=0, le=1)]
Temperature = Annotated[float, Field(ge=0, le=2)]
TopK = Annotated[int, Field(ge=TOP_K_OFF, le=2**20)]
MinP = Annotated[float, Field(ge=0, le=1)]
RepetitionPenalty = Annotated[float, Field(ge=0.01, le=100)]


def _whole(value: object) -> object:
    """50.0 is 50 in JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Recommendations(BaseModel):
    """What a generation_config.json says of how tokens are chosen; None where it says nothing."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: Annotated[TopK | None, BeforeValidator(_whole)] = None
    min_p: MinP | None = None
    typical_p: Share | None = None
    repetition_penalty: RepetitionPenalty | None = None

    def given(self) -> dict[str, int | float]:
        """By name, as SamplingParams takes them."""
        found: dict[str, int | float] = self.model_dump(exclude_none=True)
        return found | ({"top_k": max(self.top_k, 0)} if self.top_k is not None else {})
