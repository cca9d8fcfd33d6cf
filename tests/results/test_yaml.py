"""The YAML of an exported config comes back the same from every reader."""

from __future__ import annotations

import math
import re
import struct
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from topotune.errors import ConfigError
from topotune.records import TrialSpec
from topotune.results.yamltext import dump_yaml

# the scalars of YAML 1.2's core schema (section 10.3.2): what a 1.2 reader does not take as text
CORE_NUMBER = re.compile(
    r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+|[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
CORE_WORD = re.compile(r"null|Null|NULL|~||true|True|TRUE|false|False|FALSE")


def core_value(scalar: str) -> float | int | str:
    """A plain scalar as a YAML 1.2 reader takes it."""
    if re.fullmatch(r"[-+]?[0-9]+", scalar):
        return int(scalar)
    if CORE_NUMBER.fullmatch(scalar):
        return float(re.sub(r"\.(inf|nan)", r"\1", scalar))
    return scalar


@settings(max_examples=300)
@given(st.floats())
def test_floats_come_back_to_the_bit_in_both_yaml_versions(value: float) -> None:
    text = dump_yaml({"lr": value})
    scalar = text.removeprefix("lr: ").removesuffix("\n")
    for back in (yaml.safe_load(text)["lr"], core_value(scalar)):
        assert type(back) is float
        if math.isnan(value):
            assert math.isnan(back)
        else:
            assert struct.pack("d", back) == struct.pack("d", value)


AMBIGUOUS = """1e-05 1e3 0o17 0x1F .5 1_000 1:30 yes no on y n ~ null NaN .nan True = << - [a] {a}
#a a: !x &a *a |"""
texts = st.text(max_size=20) | st.sampled_from(AMBIGUOUS.split())
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3)
)


def typed(value: object) -> object:
    """The value with every scalar's type, so that 1, 1.0 and True differ."""
    if isinstance(value, dict):
        return {key: typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [typed(item) for item in value]
    return (type(value).__name__, repr(value))


@settings(max_examples=100)
@given(st.dictionaries(texts, trees, max_size=4))
def test_any_tree_comes_back_with_its_types(data: dict[str, Any]) -> None:
    text = dump_yaml(data)
    assert text.isascii()
    assert typed(yaml.safe_load(text)) == typed(data)


@given(texts)
def test_no_text_is_left_for_a_1_2_reader_to_take_as_something_else(value: str) -> None:
    root = yaml.compose(dump_yaml({value: value}))
    assert isinstance(root, yaml.MappingNode)
    ((key, item),) = root.value
    assert item.style == '"'
    if key.style is None:
        assert not CORE_NUMBER.fullmatch(key.value)
        assert not CORE_WORD.fullmatch(key.value)


def test_repeated_lists_are_written_out_and_foreign_types_refused() -> None:
    shared = [1.0, 2.0]
    text = dump_yaml({"a": shared, "b": (shared, shared)})
    assert "&" not in text
    assert yaml.safe_load(text) == {"a": shared, "b": [shared, shared]}
    with pytest.raises(ConfigError, match=r"config\.a\[1\]: a Tensor has no YAML form"):
        dump_yaml({"a": [0, torch.zeros(1)]})


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=6),
        st.floats() | st.booleans() | st.integers() | texts | st.lists(st.floats(), max_size=2),
        max_size=4,
    )
)
def test_any_parameters_survive_the_config(params: dict[str, Any]) -> None:
    spec = TrialSpec("digits", "adam", epochs=3, seed=2**62 + 1, params=params)
    back = TrialSpec.from_dict(yaml.safe_load(dump_yaml(spec.to_dict())))
    assert typed(back.to_dict()) == typed(spec.to_dict())
