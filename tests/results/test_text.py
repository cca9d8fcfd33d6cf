"""Hostile text, shown by the readers of each destination."""

from __future__ import annotations

import io
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console

from topotune.errors import ConfigError
from topotune.results.text import clean, markdown, number, parameter, rich_text, strict_json

MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def first_cell(text: str) -> str:
    """The first cell of a table's one row as a reader of the rendered page sees it."""
    tokens = MARKDOWN.parse(f"| a | b |\n| --- | --- |\n| {text} | y |\n")
    place = next(i for i, token in enumerate(tokens) if token.type == "td_open")
    children = tokens[place + 1].children or []
    assert all(child.type in ("text", "text_special") for child in children)
    return "".join(child.content for child in children)


def test_what_has_no_json_form_is_named() -> None:
    with pytest.raises(ConfigError, match=r"top\.a\[1\]: a complex has no JSON form"):
        strict_json({"a": [1, 2j]}, "top")


@given(st.text("\\`*_{}[]()<>|~&#$!;:/w.-+=a1é \n\x1b", max_size=24) | st.text(max_size=12))
def test_markdown_escape_is_undone_by_a_reader(text: str) -> None:
    assert first_cell(f"x{markdown(text)}x") == f"x{clean(text)}x"


@pytest.mark.parametrize(
    "text",
    [
        "~~struck~~",
        "**bold** _em_ __x__ a_b_c *e*",
        "`code` ``x``",
        "[a](http://b) ![i](j) <http://c> <b>",
        "&amp; &#35; \\| a|b \\\\|",
        "trailing \\",
    ],
)
def test_markdown_constructs_stay_text(text: str) -> None:
    assert first_cell(markdown(text)) == text


def test_markdown_links_no_bare_address() -> None:
    assert markdown("see http://a.b and www.c.d") == r"see http:\//a.b and www\.c.d"


@given(st.text(max_size=30) | st.text("\\[]a/ b#@=", max_size=12))
def test_rich_shows_letter_for_letter(text: str) -> None:
    console = Console(file=io.StringIO(), width=400, color_system=None, emoji=False)
    shown = console.render_str(rich_text(text), highlight=False).plain
    assert shown == clean(text)


@pytest.mark.parametrize(
    "text", ["[red]x[/red]", r"\[red]", r"\\[red]", r"\[1]", "[1]", "[/]", "[@click=x]y", "a\\"]
)
def test_rich_tags_stay_text(text: str) -> None:
    assert Console(emoji=False).render_str(rich_text(text), highlight=False).plain == text


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\nb\tc\r", "a b c"),
        ("\x1b[31m\x9b", "\\x1b[31m\\x9b"),
        ("\u202eabc\u2028", "\\u202eabc\\u2028"),
        ("\udc80\U000e0001", "\\udc80\\U000e0001"),
        ("naïve 日本 😀", "naïve 日本 😀"),
    ],
)
def test_what_cleaning_shows(text: str, line: str) -> None:
    assert clean(text) == line


@given(st.text(st.characters()))
def test_cleaned_text_is_one_printable_line(text: str) -> None:
    line = clean(text)
    line.encode()
    assert line.replace("\u3000", " ").isprintable() or not line.isascii()
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]", line)
    assert len(clean(text, 10)) <= 10


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.93424, "0.9342"),
        (0.0, "0.0000"),
        (-12.5, "-12.5000"),
        (1.23456e-7, "1.235e-07"),
        (123456.0, "1.235e+05"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (3, "3"),
        (0.99999, "0.99999"),
        (0.000123456789, "0.0001235"),
        ([0.9, 0.999], "[0.9, 0.999]"),
        ("x" * 40, "x" * 40),
    ],
)
def test_parameters(value: bool | int | float | str | list[float] | None, text: str) -> None:
    assert parameter(value) == text
