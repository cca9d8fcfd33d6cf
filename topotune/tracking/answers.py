"""What a tracking server's refusal means: never, not yet, or gone."""

from __future__ import annotations

import re
from typing import Any

from topotune.errors import RunError
from topotune.redaction import redact
from topotune.tracking.store import RunMissingError, StoreOfflineError, StoreRefusedError

_FOREIGN = re.compile(r"API request to \S+ \S+ failed with error code (\d{3})\b")
"""How MLflow says that an answer was not its own server's JSON."""
_NETWORK = re.compile(
    r"\[Errno -?\d+\] [^'\")]+|\w+ timed out[^'\")]*|too many \d+ error responses", re.IGNORECASE
)


def permanent(status: int, own: bool) -> bool:
    """Whether an HTTP status means that this content will never be taken.

    A wrong password (401, 403) or address (404 without a record) concerns every record alike:
    setting them all aside would lose a search, so that these wait like an outage.

    Args:
        status: of the answer.
        own: whether MLflow itself answered, in its JSON. A page of something in between (a
            reverse proxy, a sign-in) judges no record, except for its size.
    """
    if not own:
        return status == 413
    return 400 <= status < 500 and status not in (401, 403, 404, 408, 409, 429, 499)


def classified(error: Any) -> RunError:
    """An MlflowException as refused for good, missing, or to be tried again."""
    text = one_line(error)
    foreign = _FOREIGN.match(str(error))
    if foreign is not None:
        final = permanent(int(foreign[1]), own=False)
    elif error.error_code == "RESOURCE_DOES_NOT_EXIST":
        return RunMissingError(text)
    else:
        final = permanent(int(error.get_http_status_code()), own=True)
    return StoreRefusedError(text) if final else StoreOfflineError(text)


def turned_down(response: Any) -> bool:
    """Whether an answer to an upload means that this file will never be taken.

    Args:
        response: of the library ``requests``, or what another library keeps in its place.
    """
    try:
        body = response.json()
        own = isinstance(body, dict) and isinstance(body.get("error_code"), str)
        return permanent(int(response.status_code), own)
    except AttributeError:  # of another library: nothing is known
        return False
    except ValueError:  # no JSON
        return permanent(int(response.status_code), own=False)


def one_line(error: Exception) -> str:
    """What an error says, in a line, without secrets."""
    text = " ".join(str(error).split())
    if text.startswith("API request to") and (cause := _NETWORK.search(text)) is not None:
        return f"no answer from the server: {cause[0].strip()}"
    return redact(text)[:300] or type(error).__name__
