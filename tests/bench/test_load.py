"""``topotune bench load`` measures real searches."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_it_measures_a_real_search_and_its_close() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "topotune", "bench", "load", "--trials", "3", "--json"],
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    load = json.loads(done.stdout)
    assert load["concurrency"] == 8
    (mark,) = load["marks"]
    assert mark["trials"] == 3
    assert mark["memory_mb"] > 50
    assert mark["cpu_ms"] > 0
    (size,) = load["sizes"]
    assert size["trials"] == 3
    recorded, stored = (int(part.split()[0]) for part in size["stored"][8:].split(", "))
    assert recorded == stored > 3 * 10
