"""Names and numbers from outside made harmless for a terminal, rich, Markdown, a figure or JSON.

A trial's parameter names, reasons and search name come from files and exceptions. They may hold
escape sequences that repaint a terminal, markup that rich would obey, or a pipe that breaks a
Markdown table. Everything that ``results`` prints goes through :func:`clean` and then through the
one escape of its destination.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

from topotune.errors import ConfigError
from topotune.records import Value, pack_number

_UNPRINTABLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_RICH_BRACKET = re.compile(r"(?P<slashes>\\*)(?P<tag>\[[a-z#/@][^\[]*?\])|\[")
_MARKDOWN = re.compile(r"[\\`*\[\]<>|~&#$]|(?<![^\W_])_|_(?![^\W_])|(?<=:)/(?=/)|(?<=www)\.")


def clean(text: str, width: int | None = None) -> str:
    """One printable line: control, format and separator characters become visible escapes.

    Args:
        text: anything, lone surrogates included; the result always encodes to UTF-8.
        width: cut to this many characters, the last being an ellipsis.
    """
    visible = "".join(
        c if unicodedata.category(c) not in _UNPRINTABLE else _visible(c) for c in text
    ).strip()
    if width is not None and len(visible) > width:
        return visible[: width - 1] + "…"
    return visible


def _visible(char: str) -> str:
    if char in "\n\r\t":
        return " "
    code = ord(char)
    return (
        f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
    )


def rich_text(text: str) -> str:
    """A cleaned line that rich shows letter for letter instead of reading tags in it.

    Emoji codes such as ``:warning:`` remain; ``Console(emoji=False)`` turns them off.
    """

    def escape(match: re.Match[str]) -> str:
        # before a tag rich reads pairs of backslashes as one; before any other bracket only the
        # last one counts
        return "\\[" if match["tag"] is None else match["slashes"] * 2 + "\\" + match["tag"]

    return _RICH_BRACKET.sub(escape, clean(text))


def markdown(text: str) -> str:
    """A cleaned line that Markdown shows letter for letter, inside a table cell too."""
    return _MARKDOWN.sub(lambda match: "\\" + match.group(), clean(text))


def figure_text(text: str, width: int = 90) -> str:
    """A cleaned line in letters that matplotlib's bundled font has; others become ``?``."""
    return "".join(c if ord(c) < 0x250 or c == "…" else "?" for c in clean(text, width))


def number(value: float) -> str:
    """A measured figure at four decimals, such as ``0.9342``; small and large ones by exponent."""
    if not math.isfinite(value):
        return str(float(value))
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4f}"
    return f"{value:.3e}"


def spread(metrics: Mapping[str, float], name: str, label: str = "IQR ") -> str:
    """`` (IQR 0.57)`` to stand behind a measured ratio; empty where no spread was measured."""
    found = metrics.get(f"{name}_iqr")
    return "" if found is None else f" ({label}{found:.2f})"


def parameter(value: Value) -> str:
    """A parameter as it would stand in a search file, floats at four digits when they are long."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        exact = repr(value)
        return exact if len(exact) <= 7 else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return clean("[" + ", ".join(parameter(item) for item in value) + "]")
    return clean(str(value))


def strict_json(value: Any, place: str) -> Any:
    """The value in strict JSON types: non-finite floats as words, tuples as lists.

    Raises:
        ConfigError: a value of another type, with the place where it stands.
    """
    return plain(value, place, "JSON", pack_number)


def plain(value: Any, place: str, form: str, of_float: Callable[[float], Any] = float) -> Any:
    """The value in built-in types alone, tuples as lists; subclasses such as NumPy's floats are
    converted.

    Args:
        value: any.
        place: where it stands, for the message.
        form: what is written, for the message.
        of_float: what stands for a float.

    Raises:
        ConfigError: a value of a type that has no such form, with the place where it stands.
    """
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, float):
        return of_float(value)
    if isinstance(value, Mapping):
        return {
            str(key): plain(item, f"{place}.{key}", form, of_float) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [plain(item, f"{place}[{i}]", form, of_float) for i, item in enumerate(value)]
    raise ConfigError(
        place,
        f"a {type(value).__name__} has no {form} form",
        "Use numbers, text, lists and mappings",
    )
