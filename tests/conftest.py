"""Test set-up: one torch thread, so that two cores are not fought over."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
