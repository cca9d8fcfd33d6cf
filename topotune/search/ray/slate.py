"""The worker's process as it was before any training: what a trial changes there ends with it.

What decides numbers inside torch and NumPy is reset by :mod:`topotune.train.process`, in every
process; this is the rest, which only a process that belongs to us may take back. The note is taken
when the first trial has opened: what imports change happens once a process and must stay.
"""

from __future__ import annotations

import decimal
import gc
import logging
import os
import sys
import warnings


class Slate:
    """Takes note of the process now; :meth:`wipe` sets it back."""

    def __init__(self) -> None:
        self._environment = dict(os.environ)
        self._umask = _umask()
        self._path = list(sys.path)
        self._decimals = decimal.getcontext().copy()
        self._depth = sys.getrecursionlimit()
        self._silenced = logging.root.manager.disable
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()

    def wipe(self) -> None:
        """Set back environment, umask, import path, warning filters and the like."""
        if dict(os.environ) != self._environment:
            os.environ.clear()
            os.environ.update(self._environment)
        os.umask(self._umask)
        sys.path[:] = self._path
        decimal.setcontext(self._decimals.copy())
        sys.setrecursionlimit(self._depth)
        logging.disable(self._silenced)
        gc.enable()
        self._warnings.__exit__(None, None, None)
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
