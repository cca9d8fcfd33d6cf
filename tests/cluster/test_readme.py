"""What cluster/README.md shows exists: its commands, their options, its files."""

from __future__ import annotations

import ipaddress
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.cluster_files import CLUSTER, FILES, ROOT, compose
from topotune.cli.main import app

README = CLUSTER / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```console\n(.*?)```", TEXT, re.DOTALL)


def topotune_commands() -> list[list[str]]:
    """Every topotune command line of the page."""
    lines = [line.partition("  #")[0] for block in BLOCKS for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("topotune ")]


@pytest.mark.parametrize("words", topotune_commands(), ids=" ".join)
def test_commands_and_options_exist(words: list[str]) -> None:
    shown = CliRunner().invoke(app, [words[0], "--help"])
    assert shown.exit_code == 0, shown.output
    for option in (word for word in words if word.startswith("-")):
        assert re.search(rf"(?<![\w-]){option}\b", shown.output), option


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0][:40])
def test_blocks_are_sound_shell(block: str) -> None:
    subprocess.run(["bash", "-n", "-c", block], check=True)


def test_the_files_it_names_exist() -> None:
    named = set(re.findall(r"(?<![\w/.-])(cluster/[\w./-]+|search_spaces/[\w.]+)", TEXT))
    assert len(named) > 8
    for name in named:
        assert (ROOT / name.rstrip(".")).exists(), name
    for path in FILES:
        assert path.name in TEXT or f"{path.parent.name}/" in TEXT, f"{path.name} is not explained"


def test_the_secrets_it_makes_are_those_that_are_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    block = next(block for block in BLOCKS if "openssl rand" in block)
    lines = [line for line in block.splitlines() if not line.startswith("export")]
    script = f"set -eu; TOPOTUNE_SECRETS={shlex.quote(str(folder))}\n" + "\n".join(lines)
    subprocess.run(["bash", "-c", script], check=True)
    made = {path.name: path.read_text(encoding="ascii") for path in folder.iterdir()}
    assert set(made) == set(compose()["secrets"])
    assert folder.stat().st_mode & 0o777 == 0o700
    assert len(set(made.values())) == len(made)
    assert all(re.fullmatch(r"[0-9a-f]{64}", value) for value in made.values())
    # The keys that the manifests ask for are these files.
    keys = set()
    for path in (CLUSTER / "kuberay").glob("*.yaml"):
        keys |= set(re.findall(r"secretKeyRef: {name: topotune, key: (\w+)}", path.read_text()))
    assert keys
    assert keys <= set(made)


def test_the_certificate_it_makes_is_valid_for_the_nodes(tmp_path: Path) -> None:
    block = next(block for block in BLOCKS if "openssl req -x509" in block)
    lines = [line for line in block.splitlines() if line.startswith("openssl")]
    script = f"set -eu; TOPOTUNE_SECRETS={shlex.quote(str(tmp_path))}\n" + "\n".join(lines)
    subprocess.run(["bash", "-c", script], check=True, cwd=tmp_path, capture_output=True)
    services = compose("compose.tls.yaml")
    (network,) = services["networks"]["inside"]["ipam"]["config"]
    hosts = list(ipaddress.ip_network(network["subnet"]).hosts())
    for address in (hosts[1], hosts[-1], "127.0.0.1"):  # the first is the host's
        subprocess.run(
            ["openssl", "verify", "-CAfile", "tls_ca.pem", "-verify_ip", str(address),
             "tls_cert.pem"],
            check=True, cwd=tmp_path, capture_output=True,
        )  # fmt: skip
    for name in ("mlflow", "localhost"):
        subprocess.run(
            ["openssl", "verify", "-CAfile", "tls_ca.pem", "-verify_hostname", name,
             "tls_cert.pem"],
            check=True, cwd=tmp_path, capture_output=True,
        )  # fmt: skip
