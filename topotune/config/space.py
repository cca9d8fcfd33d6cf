"""One searched parameter of a search file: a range or a set of choices, perhaps conditional."""

from __future__ import annotations

import re
import sys
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

PARAM_NAME = re.compile(r"(?:(?:model|task|train)\.)?[A-Za-z_][A-Za-z0-9_]*")
Scalar: TypeAlias = bool | int | float | str
When: TypeAlias = dict[str, Scalar | list[Scalar | None] | None]
"""Parameter to the value, or the values, that it must have."""


def no_flag(value: object) -> object:
    """Refuse true and false where a number stands: pydantic would read them as 1 and 0."""
    if isinstance(value, bool):
        raise ValueError(f"must not be {str(value).lower()}")
    return value


class _Block(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Frozen(_Block):
    """Base of all blocks: immutable; unknown keys, NaN and infinities are errors."""

    @field_validator("*", mode="before")
    @classmethod
    def _no_flag(cls, value: object, info: ValidationInfo) -> object:
        kind = cls.model_fields[info.field_name or ""].annotation
        return value if kind in (bool, str) else no_flag(value)


def one_given(*names: str) -> dict[str, Any]:
    """The JSON schema of a block in which at least one of these keys has a value."""
    given = {"not": {"type": "null"}}
    return {"anyOf": [{"required": [name], "properties": {name: given}} for name in names]}


class FloatParam(_Block):
    """A float between ``low`` and ``high``, optionally on a log scale or a grid of ``step``."""

    _no_flag = field_validator("low", "high", "step", mode="before")(no_flag)

    type: Literal["float"]
    low: float
    high: float
    log: bool = False
    step: float | None = Field(default=None, gt=0)
    when: When = Field(default_factory=dict)

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        check_bounds(self.low, self.high, self.log, self.step)
        return self


class IntParam(_Block):
    """An integer between ``low`` and ``high``, both included."""

    _no_flag = field_validator("low", "high", "step", mode="before")(no_flag)

    type: Literal["int"]
    low: int
    high: int
    log: bool = False
    step: int = Field(default=1, ge=1)
    when: When = Field(default_factory=dict)

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        check_bounds(self.low, self.high, self.log, None if self.step == 1 else self.step)
        return self


class CategoricalParam(_Block):
    """One of ``choices``."""

    type: Literal["categorical"]
    choices: tuple[Scalar | None, ...] = Field(min_length=1)
    when: When = Field(default_factory=dict)

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
