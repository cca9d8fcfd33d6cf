"""Passwords, tokens and keys: recognised in addresses, names and the environment, kept from sight.

Whatever leaves topotune as text (messages, logs, tags, parameters, reasons, tracebacks) goes
through :func:`redact`; a search file that holds a secret is refused, because it is kept and shown.
The texts may be large and hostile: every pattern here takes time in proportion to its text, since
no two of its attempts read the same run of characters.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from urllib.parse import unquote

SHORTEST = 8
"""Characters of the shortest value of the environment that is looked for in texts."""

# A word with an @; in it //user:password (no port), //user@, and user:password without //.
_WORD = re.compile(r"(?<![^\s'\"<>])[^\s'\"<>@]*+@[^\s'\"<>]*+")
_LOGIN = re.compile(r"//(?=[^/@:]*+:(?!\d{1,5}/))")
_USER = re.compile(r"//[^/@]*+@")
_BARE = re.compile(
    r"\W*+(?:\w++=)?+(?!mailto:)([A-Za-z][\w.+-]*+:(?![\d.eE+-]++@)[^/]{6,})@(?=[\w\[])"
)
_PASSWORD = re.compile(r"://[^\s/?#@:]*+:[^\s/?#@]++@")
_FIELD = re.compile(r"(?<![\w-])[\w-]++=")
_VALUE = re.compile(r"[^&\s'\"<>]++")
_AUTHORIZATION = re.compile(
    r"(\bauthorization['\"]?\s*+[:=,]\s*+['\"]?(?:(?:basic|bearer|digest|token)\s++)?)[^\s'\",]++",
    re.IGNORECASE,
)
# Elsewhere "basic" is a word like any other: what follows it must look like a token.
_HEADER = re.compile(
    r"\b((?i:basic|bearer))\s++(?=[\w+/=.~-]*\d|[\w+/=.~-]+[A-Z])[\w+/=.~-]{16,}+", re.ASCII
)
_NAME = re.compile(
    r"(?:pass(?:word|wd|phrase)|pwd|api_?key|(?:auth|access)token|"
    r"(?:^|_)(?:pass|token|secret|credentials?|dsn|"
    r"(?:access|secret|private|account|auth)_?key(?:_id)?))(?:_?\d{1,3})?$"
)
_ORDINARY = re.compile(
    r"^(?:old)?pwd$|(?:^|_)(?:(?:low|high|band|forward|backward|single)_pass|"
    r"(?:bos|class|cls|end|eos|last|mask|next|pad|per|sep|special|start|unk)_token)$"
)
_KEY = re.compile(r"_(?:key|pat|jwt)(?:_?\d{1,3})?$", re.IGNORECASE)
_LOOKS_RANDOM = re.compile(r"(?=\S*\d)(?=\S*[A-Za-z])\S{16,}+")
_SIGNATURES = ("sig", "signature", "x-amz-signature")


def redact(text: str) -> str:
    """The text with ``***`` for every password, token and key in it that can be recognised.

    Those are user and password of an address, fields such as ``token=...``, authorization
    headers, and the values of environment variables that are named like secrets or hold an
    address with a password.
    """
    if not text:
        return text
    for value in sorted(set(_known()), key=len, reverse=True):
        if value.isalpha():  # "password", say, which must not break up other words
            text = re.sub(rf"(?<![^\W_]){value}(?![^\W_])", "***", text)
        else:
            text = text.replace(value, "***")
    text = _PASSWORD.sub("://***@", text)  # a password may hold quotes, at which words end
    text = _WORD.sub(_without_login, text)
    parts: list[str] = []
    end = 0
    for _, start, stop in _fields(text):
        parts += [text[end:start], "***"]
        end = stop
    text = "".join((*parts, text[end:]))
    return _HEADER.sub(r"\1 ***", _AUTHORIZATION.sub(r"\1***", text))


def brief(text: str, limit: int) -> str:
    """A message of others on one line of at most ``limit`` characters, without its secrets.

    In this order: a secret that was cut or whose lines were joined would not be recognised.
    """
    line = " ".join(redact(text).split())[:limit]
    return line.encode("utf-8", "backslashreplace").decode()  # a file's name may hold any bytes


def names_secret(name: str) -> bool:
    """Whether a name says that its value is a secret: ``api_key``, ``dbPassword``, ``HF_TOKEN``.

    Its last word decides: ``token_mixer`` and ``PASSWORD_STORE_DIR`` name none.
    """
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    words = re.sub(r"[^A-Za-z0-9]+", "_", words).lower()
    return _NAME.search(words) is not None and _ORDINARY.search(words) is None


def address_with_secret(text: str) -> bool:
    """Whether a text holds an address with ``user:password@`` or a field such as ``?token=...``."""
    if "://" not in text:
        return False
    in_query = any(text[at - 1] in "?&" for at, _, _ in _fields(text) if at)
    return in_query or _PASSWORD.search(text) is not None


def _login(word: str) -> tuple[int, int]:
    """Where user and password stand in a word with an ``@``; (0, 0) where there are none.

    They reach to the last ``@``: a password may hold others, and a ``/``, unescaped.
    """
    end = word.rindex("@")
    if found := _LOGIN.search(word, 0, end):
        return found.end(), end
    bare = _BARE.match(word)
    return bare.span(1) if bare else (0, 0)


def _without_login(match: re.Match[str]) -> str:
    word = match[0]
    start, end = _login(word)
    if end:
        word = f"{word[:start]}***{word[end:]}"
    return _USER.sub("//***@", word)


def _fields(text: str) -> Iterator[tuple[int, int, int]]:
    """Every ``name=value`` that holds a secret: where name and value begin, and the value ends."""
    end = 0
    for field in _FIELD.finditer(text):
        name = field[0][:-1]
        if field.start() >= end and (names_secret(name) or name.lower() in _SIGNATURES):
            value = _VALUE.match(text, field.end())
            if value:
                end = value.end()
                yield field.start(), value.start(), end


def _known() -> Iterator[str]:
    """The secrets in the environment: long enough, and neither a number nor a file."""
    for name, value in os.environ.items():
        for secret in _secrets(name, value):
            if not _is_file(secret):
                yield secret


@functools.lru_cache(4096)  # every message is searched, and the environment hardly changes
def _secrets(name: str, value: str) -> tuple[str, ...]:
    """What may be a secret in one variable, files among them."""
    # KAGGLE_KEY, GH_PAT: such names are secrets only where the value looks like one.
    key = _KEY.search(name) is not None and _LOOKS_RANDOM.fullmatch(value) is not None
    found = [value] if key or names_secret(name) else []
    if "@" in value:
        found += _logins(value)
        for match in _WORD.finditer(value):
            start, end = _login(match[0])
            password = match[0][start:end].partition(":")[2]
            found += [password, unquote(password)]
    if "=" in value:
        found += [value[start:end] for _, start, end in _fields(value)]
    return tuple(one for one in found if len(one) >= SHORTEST and not one.isdecimal())


def _logins(address: str) -> Iterator[str]:
    """What may be the login of a variable that is one whole address, whatever characters it has:
    up to the first @ or the last; its password, and both with their escapes undone."""
    scheme, mark, rest = address.partition("://")
    if not mark:
        return
    for login in {rest.partition("@")[0], rest.rpartition("@")[0]}:
        user, colon, password = login.partition(":")
        if set("/?# ") & set(user):  # a path, not a login
            continue
        for secret in (login, password) if colon else (login,) * scheme.startswith("http"):
            yield from (secret, unquote(secret))


def _is_file(value: str) -> bool:
    return os.sep in value and os.path.exists(value)  # noqa: PTH110 - any text, however long
