"""One searched parameter of a search file: a range or a set of choices, perhaps conditional."""

from __future__ import annotations

import sys
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

Scalar: TypeAlias = bool | int | float | str


class Frozen(BaseModel):
    """Base of all blocks: immutable; unknown keys, NaN and infinities are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FloatParam(Frozen):
    """A float between ``low`` and ``high``, optionally on a log scale or a grid of ``step``."""

    type: Literal["float"]
    low: float
    high: float
    log: bool = False
    step: float | None = Field(default=None, gt=0)
    when: dict[str, Scalar | list[Scalar]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        check_bounds(self.low, self.high, self.log, self.step)
        return self


class IntParam(Frozen):
    """An integer between ``low`` and ``high``, both included."""

    type: Literal["int"]
    low: int
    high: int
    log: bool = False
    step: int = Field(default=1, ge=1)
    when: dict[str, Scalar | list[Scalar]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        check_bounds(self.low, self.high, self.log, None if self.step == 1 else self.step)
        return self


class CategoricalParam(Frozen):
    """One of ``choices``."""

    type: Literal["categorical"]
    choices: tuple[Scalar | None, ...] = Field(min_length=1)
    when: dict[str, Scalar | list[Scalar]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        # As Optuna tells them apart: 1, 1.0 and true are one choice to it.
        if len(set(self.choices)) < len(self.choices):
            raise ValueError(f"choices must differ from one another (got {list(self.choices)})")
        return self


Param: TypeAlias = Annotated[FloatParam | IntParam | CategoricalParam, Field(discriminator="type")]


def check_bounds(low: float, high: float, log: bool, step: float | None) -> None:
    """Raise ValueError with the rule that a range breaks."""
    if not max(abs(low), abs(high)) <= sys.float_info.max:  # an int may be larger; NaN fails too
        raise ValueError(f"low and high must be finite (got low={low}, high={high})")
    if low >= high:
        raise ValueError(f"low must be below high (got low={low}, high={high})")
    if log and low <= 0:
        raise ValueError(f"log needs low above 0 (got low={low}); use a positive low or log: false")
    if log and step is not None:
        raise ValueError(f"log and step exclude each other (got step={step})")
