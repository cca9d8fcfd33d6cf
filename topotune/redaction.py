"""Passwords, tokens and keys: recognised in addresses, names and the environment, kept from sight.

Whatever leaves topotune as text (messages, logs, tags, parameters, reasons, tracebacks) goes
through :func:`redact`; a search file that holds a secret is refused, because it is kept and shown.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from urllib.parse import unquote

SHORTEST = 6
"""Characters of the shortest value of the environment that is looked for in texts."""

_USERINFO = re.compile(r"(?<=//)[^\s'\"<>]*@|(?<![\w/])[^\s'\"<>/:@]+:[^\s'\"<>/@]+@(?=[\w\[])")
_FIELD = re.compile(
    r"((?:pass(?:word|wd|phrase)?|pwd|token|secret|credentials?|signature|sig|sslpassword|"
    r"(?:api|access|secret|private|account)[_-]?key)=)([^&\s'\"<>]+)",
    re.IGNORECASE,
)
_HEADER = re.compile(r"\b(basic|bearer)\s+[A-Za-z0-9+/=._~-]{8,}", re.IGNORECASE)
_NAME = re.compile(
    r"(?:^|_)(?:pass(?:word|wd|phrase)?|pwd|token|secret|credentials?|dsn|"
    r"(?:api|access|secret|private|account|auth)_?key)(?:_|$)"
)


def redact(text: str) -> str:
    """The text with ``***`` for every password, token and key in it that can be recognised.

    Those are user and password of an address, fields such as ``token=...``, authorization
    headers, and the values of environment variables that are named like secrets or hold an
    address with a password. Rather too much than too little: everything between ``://`` and the
    last ``@`` of a word goes.
    """
    for value in sorted(set(_known()), key=len, reverse=True):
        text = text.replace(value, "***")
    return redact_addresses(text)


def redact_addresses(text: str) -> str:
    """As :func:`redact`, by the text alone."""
    text = _FIELD.sub(r"\1***", _USERINFO.sub("***@", text))
    return _HEADER.sub(r"\1 ***", text)


def names_secret(name: str) -> bool:
    """Whether a name says that its value is a secret: ``api_key``, ``dbPassword``, ``HF_TOKEN``."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return _NAME.search(re.sub(r"[^A-Za-z0-9]+", "_", words).lower()) is not None


def _known() -> Iterator[str]:
    """The secrets in the environment, of ``SHORTEST`` characters or more."""
    for name, value in os.environ.items():
        if name in ("PWD", "OLDPWD"):  # a folder
            continue
        found = [value] if names_secret(name) else []
        if "@" in value:
            for match in _USERINFO.finditer(value):
                password = match[0].rpartition("@")[0].partition(":")[2]
                found += [password, unquote(password)]
        if "=" in value:
            found += [match[2] for match in _FIELD.finditer(value)]
        yield from (secret for secret in found if len(secret) >= SHORTEST)
