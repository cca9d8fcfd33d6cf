"""Trials that share GPUs, on a real Ray whose GPUs are only declared: what runs out of a GPU's
memory is tried again with a GPU of its own, and it is said what waits for what."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
HAS = {"CPU": 3, "GPU": 1, "site": 2}


def topotune(*arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "topotune", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "RAY_OVERRIDE_RESOURCES": json.dumps(HAS)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def status(results: Path) -> dict[str, Any]:
    done = topotune("status", "hungry", "--json", "--results-dir", results)
    text, _ = done.communicate(timeout=100)
    assert done.returncode == 0, text
    found: dict[str, Any] = json.loads(text)
    return found


def search_file(tmp_path: Path) -> Path:
    data = {
        "name": "hungry",
        "task": {"name": "tests.hungry_task:Hungry", "options": {"folder": str(tmp_path)}},
        "method": "adam",
        "space": {"task.memory": {"type": "categorical", "choices": ["enough", "once", "always"]}},
        "objective": {"metric": "val_accuracy", "direction": "maximize"},
        "sampler": "grid",
        "pruner": "none",
        "budget": {"epochs": 3, "wall_clock": "20m"},
        "overhead": {"blocks": 0},
        "fixed": {"task.pause": 0.15},
        "resources": {"gpus": 0.5, "custom": {"site": 1}},
    }
    path = tmp_path / "hungry.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def test_a_trial_out_of_gpu_memory_goes_on_alone_once(tmp_path: Path) -> None:
    results = tmp_path / "results"
    driver = topotune("search", search_file(tmp_path), "--results-dir", results)
    live = results / "hungry" / "live.json"
    seen: dict[str, Any] = {}
    try:
        while driver.poll() is None:
            if not seen and live.exists() and "whole GPU" in live.read_text():
                seen = status(results)
            time.sleep(0.2)
        output, _ = driver.communicate(timeout=100)
    finally:
        driver.kill()
    assert driver.returncode == 0, output
    report = status(results)
    assert report["live"] is None
    assert not live.exists()

    # Alone means: with a whole GPU, which no other trial uses meanwhile.
    notes = [json.loads(line) for line in (tmp_path / "held.jsonl").read_text().splitlines()]
    held = {m: [n["held"]["GPU"] for n in notes if n["memory"] == m] for m in ("once", "always")}
    for gpus in held.values():
        assert gpus[:20] == [0.5] * 20
        assert len(gpus) > 20
        assert set(gpus[20:]) == {1.0}
    assert all(note["held"]["site"] == 1 for note in notes)
    for memory in held:
        alone = [n["at"] for n in notes if n["memory"] == memory and n["held"]["GPU"] == 1]
        others = [n["at"] for n in notes if n["memory"] != memory]
        assert not [at for at in others if alone[0] < at < alone[-1]]
    # Others shared the GPU before.
    shared = {n["memory"] for n in notes if n["held"]["GPU"] == 0.5}
    assert len(shared) == 3

    rows = {row["params"]["task.memory"]: row for row in report["trials"]}
    assert {name: row["state"] for name, row in rows.items()} == {
        "enough": "COMPLETE",
        "once": "COMPLETE",
        "always": "FAILED",
    }
    assert rows["once"]["epochs"] == 3
    # It went on from the epoch that was finished: its batches are those of three epochs, and what
    # the second one had already done.
    batches = len([n for n in notes if n["memory"] == "enough"])
    assert len(held["once"]) == batches + 20 - batches // 3
    reason = rows["always"]["reason"]
    assert reason.startswith("its GPU ran out of memory 2 times (last: alone on its device, ")
    assert re.search(r"took [0-9.]+ GiB at the peak when it asked for 20.00 GiB more", reason)
    assert "error.txt" in reason
    assert "it goes on from its last epoch, alone on a device (0 more restarts allowed)" in output
    # Seen from another process while it waited.
    assert seen["live"]["phase"] == "running"
    waiting = r"1 waiting: each needs 1 GPU, 0.* of 1 free; one ran out .* waits for a whole GPU"
    assert re.fullmatch(waiting, seen["live"]["waiting"])
    assert {trial["number"] for trial in seen["live"]["running"]} <= {0, 1, 2}
