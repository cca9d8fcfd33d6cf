"""The searched parameters of a search file: ranges and sets of choices, perhaps conditional; the
values that they take, and the order in which they are sampled."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from topotune.errors import FieldError
from topotune.records import Value

PARAM_NAME = re.compile(r"(?:(?:model|task|train)\.)?[A-Za-z_][A-Za-z0-9_]*")
MOST_STEPS = 1e15
"""Steps of a range of floats, beyond which neighbours are one float."""
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


def too_many_steps(param: FloatParam | IntParam) -> bool:
    """Whether a range has more steps than floats can tell apart."""
    if param.type == "int" or param.step is None:
        return False
    return not param.high / param.step - param.low / param.step <= MOST_STEPS


def sampling_order(space: Mapping[str, Param]) -> list[str]:
    """Parameter names, each after those that its condition reads, else in file order.

    Raises:
        FieldError: conditions form a circle.
    """
    done: list[str] = []
    left = list(space)
    while left:
        ready = [name for name in left if all(parent in done for parent in space[name].when)]
        if not ready:
            raise FieldError(
                ("space", left[0], "when"), f"conditions form a circle among {', '.join(left)}"
            )
        done.append(ready[0])
        left.remove(ready[0])
    return done


def last_value(param: FloatParam | IntParam) -> float:
    """The largest value that a parameter takes: ``high``, or the last step below it."""
    if param.type == "int":
        return param.high - (param.high - param.low) % param.step
    if param.step is None or too_many_steps(param):
        return param.high
    # In decimal, as Optuna does: 0.3 is three steps of 0.1 there.
    low, high, step = (Decimal(str(number)) for number in (param.low, param.high, param.step))
    rest = (high - low) % step
    return float(high - rest) if rest else param.high


def is_active(param: Param, chosen: Mapping[str, Value]) -> bool:
    """Whether a parameter's condition holds; an inactive parent is no match."""
    return all(
        parent in chosen
        and any(
            _meets(chosen[parent], value)
            for value in (wanted if isinstance(wanted, list) else [wanted])
        )
        for parent, wanted in param.when.items()
    )


def _meets(chosen: Value, wanted: Value) -> bool:
    """Whether a sampled value is the wanted one: three steps of 0.1 are not exactly 0.3."""
    if isinstance(chosen, float) and isinstance(wanted, int | float):
        return not isinstance(wanted, bool) and math.isclose(chosen, wanted, abs_tol=1e-15)
    return same(chosen, wanted)


def active_part(space: Mapping[str, Param], point: Mapping[str, Value]) -> dict[str, Value]:
    """A point without the values of parameters whose condition does not hold in it."""
    chosen: dict[str, Value] = {}
    for name in sampling_order(space):
        if name in point and is_active(space[name], chosen):
            chosen[name] = point[name]
    return chosen


def same(left: Value, right: Value) -> bool:
    """Equality that keeps True and 1 apart."""
    return left == right and isinstance(left, bool) == isinstance(right, bool)


def holds(param: Param, value: Value) -> bool:
    """Whether ``value`` is one that the parameter can take."""
    if param.type == "categorical":
        return any(same(choice, value) for choice in param.choices)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if param.type == "int" and not float(value).is_integer():
        return False
    if not param.low <= value <= param.high:
        return False
    if param.step is None:
        return True
    steps = (value - param.low) / param.step
    return abs(steps - round(steps)) < 1e-8


def describe(param: Param) -> str:
    """A parameter's range in a few words, such as ``float 1e-05 to 0.1, log``."""
    if param.type == "categorical":
        return "one of " + ", ".join(plain(choice) for choice in param.choices)
    text = f"{param.type} {param.low:g} to {param.high:g}"
    text += ", log" if param.log else ""
    return text + (f", step {param.step:g}" if param.step not in (None, 1) else "")


def grid_axis(param: Param) -> int:
    """How many values a grid gives a parameter, which has choices or a step."""
    if param.type == "categorical":
        return len(param.choices)
    assert param.step is not None
    return round((last_value(param) - param.low) / param.step) + 1


def grid_size(space: Mapping[str, Param]) -> int:
    """How many points a grid has."""
    return math.prod(grid_axis(param) for param in space.values())


def plain(value: Value) -> str:
    """A value as a search file has it, a text without quotes."""
    return value if isinstance(value, str) else json.dumps(value)


def one_of(wanted: Scalar | list[Scalar | None] | None) -> str:
    """The value or values of a condition, such as ``ring or null``."""
    return " or ".join(map(plain, wanted if isinstance(wanted, list) else [wanted]))


def quoted(value: Value) -> str:
    """A value as a search file has it, a text in quotes."""
    return repr(value) if isinstance(value, str) else json.dumps(value)
