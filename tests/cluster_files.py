"""The files of cluster/, read the way that their programs read them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "cluster"
FILES = sorted(path for path in CLUSTER.rglob("*") if path.is_file())


def tool(name: str) -> str:
    """A program of the development environment."""
    return str(Path(sys.executable).parent / name)


def printed(*command: str | Path, **environment: str) -> str:
    """What a program prints; it must succeed without a warning."""
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr.strip(), done.stderr
    return done.stdout


@cache
def compose(*overlays: str, workers: str = "2", secrets: str = "/nowhere") -> dict[str, Any]:
    """compose.yaml with files put over it, as Docker's Compose resolves it, every profile on."""
    files = [part for name in ("compose.yaml", *overlays) for part in ("-f", CLUSTER / name)]
    text = printed(
        tool("docker-compose"), *files, "--profile", "*", "config", "--format", "json",
        TOPOTUNE_SECRETS=secrets, TOPOTUNE_WORKERS=workers, TOPOTUNE_BIND="192.0.2.7",
    )  # fmt: skip
    config: dict[str, Any] = json.loads(text)
    return config


def documents(path: Path) -> list[dict[str, Any]]:
    """The objects of a YAML file."""
    return [found for found in yaml.safe_load_all(path.read_text(encoding="utf-8")) if found]
