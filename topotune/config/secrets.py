"""No secret may stand in a search file: it is kept, uploaded and shown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from topotune.config.rules import BrokenRulesError, RuleError
from topotune.redaction import address_with_secret, names_secret

if TYPE_CHECKING:
    from topotune.config.models import SearchConfig


def check_secrets(config: SearchConfig) -> None:
    """Nothing in a search file may be a secret: it is kept, uploaded and shown.

    Raises:
        BrokenRulesError: texts look like one.
    """
    if broken := list(_secrets(config)):
        raise BrokenRulesError(broken)


def _secrets(config: SearchConfig) -> Iterator[RuleError]:
    # The study's address has a rule of its own, which allows a user's name.
    for place, value in _texts(config.model_dump(exclude={"study"}), ()):
        names = [key for key in place if isinstance(key, str)]
        # What is searched is no secret, whatever its name.
        named = place[0] in ("task", "model", "fixed") and names_secret(names[-1])
        if value and (named or address_with_secret(value)):
            yield RuleError(
                place,
                "looks like a secret, and a search file is kept, uploaded and shown. Put it into "
                "the environment: MLFLOW_TRACKING_URI or MLFLOW_TRACKING_PASSWORD for the "
                "tracking server; a task of your own can read others from there",
            )


def _texts(
    value: object, place: tuple[str | int, ...]
) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Every text in nested plain data, and where it stands."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(inner, (*place, key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _texts(inner, (*place, index))
