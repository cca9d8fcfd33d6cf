"""What a tracking server's refusal means: never, not yet, or gone."""

from __future__ import annotations

import re
from typing import Any

from topotune.errors import RunError
from topotune.redaction import redact
from topotune.tracking.store import RunMissingError, StoreOfflineError, StoreRefusedError

_STATUS = re.compile(r"failed with error code (\d{3})\b")
_NETWORK = re.compile(
    r"\[Errno -?\d+\] [^'\")]+|\w+ timed out[^'\")]*|too many \d+ error responses", re.IGNORECASE
)


def permanent(status: int) -> bool:
    """Whether an HTTP status means that this content will never be taken.

    A wrong password (401, 403) or address (404 without a record) concerns every record alike:
    setting them all aside would lose a search, so that these wait like an outage.
    """
    return 400 <= status < 500 and status not in (401, 403, 404, 408, 409, 429, 499)


def classified(error: Any) -> RunError:
    """An MlflowException as refused for good, missing, or to be tried again."""
    text = one_line(error)
    status = int(error.get_http_status_code())
    if (plain := _STATUS.search(str(error))) is not None:
        status = int(plain[1])
    if error.error_code == "RESOURCE_DOES_NOT_EXIST":
        return RunMissingError(text)
    return StoreRefusedError(text) if permanent(status) else StoreOfflineError(text)


def one_line(error: Exception) -> str:
    """What an error says, in a line, without secrets."""
    text = " ".join(str(error).split())
    if text.startswith("API request to") and (cause := _NETWORK.search(text)) is not None:
        return f"no answer from the server: {cause[0].strip()}"
    return redact(text)[:300] or type(error).__name__
