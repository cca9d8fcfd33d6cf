"""Names and texts in the form that MLflow takes."""

from __future__ import annotations

import functools
import hashlib
import re

MAX_TAG = 8000
"""Characters of the longest tag value that MLflow's SQL stores keep."""

_MAX_NAME = 250
_FOREIGN = re.compile(r"[^A-Za-z0-9_.\- :/]")
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@functools.lru_cache(4096)  # a search has few names, in many records
def clean_name(name: str) -> str:
    """A metric, parameter or tag name in the characters and the form that MLflow allows.

    Other characters become ``_``, and empty, ``.`` and ``..`` path parts go. A name that had to
    change gets a digest of the original at its end, so that two names never become one.
    """
    parts = _FOREIGN.sub("_", name).split("/")
    safe = "/".join(part for part in parts if part not in ("", ".", ".."))
    if safe and safe == name and len(name) <= _MAX_NAME:
        return name
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
    return f"{safe[: _MAX_NAME - 9] or 'unnamed'}-{digest}"


def clean_text(text: str, limit: int) -> str:
    """Text without control characters and lone surrogates, cut to ``limit`` characters."""
    safe = _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)
    return safe if len(safe) <= limit else safe[: limit - 1] + "…"


def clean_tag(text: str) -> str:
    """A tag's value; one that is too long is cut at the end of a line where it has lines."""
    safe = clean_text(text, len(text))
    if len(safe) <= MAX_TAG:
        return safe
    cut = safe.rfind("\n", MAX_TAG // 2, MAX_TAG - 2)
    return clean_text(safe, MAX_TAG) if cut < 0 else safe[: cut + 1] + "…"
