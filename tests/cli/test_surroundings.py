"""Commands in a poor environment: streams that came closed or are full, no home, long TMPDIR."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from topotune.cli.surroundings import give_a_home
from topotune.errors import ResourceError
from topotune.search.ray import session

ROOT = Path(__file__).parents[2]
LONG = "x" * 60


def search_file(tmp_path: Path) -> Path:
    data = {
        "name": "poor",
        "task": "digits",
        "method": "adam",
        "space": {"lr": {"type": "float", "low": 1e-4, "high": 1e-1, "log": True}},
        "objective": {"metric": "val_accuracy", "direction": "maximize"},
        "budget": {"trials": 1, "epochs": 1},
        "overhead": {"blocks": 0},
        "pruner": "none",
    }
    path = tmp_path / "poor.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def shell(line: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run ``topotune`` with these arguments in a shell, with the redirections of ``line``."""
    command = ["sh", "-c", f'exec "$0" -m topotune "$@" {line}', sys.executable]
    return subprocess.run(
        [*command, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


COMMANDS = (["--version"], ["--help"], ["schema"], ["check", "--quick", "FILE"])


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_closed_standard_output_is_as_if_it_were_thrown_away(
    arguments: list[str], tmp_path: Path
) -> None:
    file = str(search_file(tmp_path))
    done = shell(">&-", *(file if word == "FILE" else word for word in arguments))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("line", ["2>&-", "2>/dev/full", ">&- 2>&-", "<&- >&- 2>&-"])
def test_the_exit_code_of_an_error_holds_where_nothing_can_be_said(
    line: str,
) -> None:
    done = shell(line, "check", "--quick", "nope.yaml")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_a_full_standard_output_is_said() -> None:
    done = shell(">/dev/full", "schema")
    assert done.returncode == 2
    assert done.stderr == "error: standard output: No space left on device\n"
    assert shell(">/dev/full 2>/dev/full", "schema").returncode == 2


def test_no_file_gets_the_number_of_a_closed_stream() -> None:
    code = (
        "import os, sys\n"
        "from topotune.cli.surroundings import open_closed_streams\n"
        "open_closed_streams()\n"
        "print('unseen', flush=True), print('unseen', file=sys.stderr, flush=True)\n"
        "assert sys.stdin.read() == ''\n"
        "os._exit(os.open('/dev/null', os.O_RDONLY))"
    )
    line = f'exec "{sys.executable}" -c "$0" <&- >&- 2>&-'
    done = subprocess.run(["sh", "-c", line, code], cwd=ROOT, timeout=60)
    assert done.returncode == 3


def test_ctrl_c_says_so_in_every_command() -> None:
    code = (
        "import os, signal\n"
        "from topotune.config import models\n"
        "from topotune.cli.main import main\n"
        "models.json_schema = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "schema"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped by SIGINT\n")


def home_of_a_child(tmp_path: Path, home: Path | None) -> dict[str, str]:
    """HOME and MPLCONFIGDIR after :func:`give_a_home` in a process of a user without a name."""
    answer = tmp_path / "answer"
    answer.write_text("")
    answer.chmod(0o666)
    if (child := os.fork()) == 0:
        try:
            if os.getuid() == 0:
                os.setuid(54321)
            os.environ["TMPDIR"] = "/tmp"
            os.environ.pop("HOME", None)
            os.environ.pop("MPLCONFIGDIR", None)
            if home is not None:
                os.environ["HOME"] = str(home)
            give_a_home()
            names = ("HOME", "MPLCONFIGDIR")
            fd = os.open(answer, os.O_WRONLY | os.O_TRUNC)
            os.write(fd, yaml.safe_dump({n: os.environ.get(n, "") for n in names}).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    found: dict[str, str] = yaml.safe_load(answer.read_text())
    return found


def test_a_missing_or_read_only_home() -> None:
    place = Path("/tmp") / f"homes-{os.getpid()}"  # pytest's own is closed to other users
    place.mkdir(mode=0o755)
    try:
        place.chmod(0o755)
        user = 54321 if os.getuid() == 0 else os.getuid()
        own = f"/tmp/topotune-{user}"
        missing = home_of_a_child(place, place / "missing")
        assert missing == {"HOME": own, "MPLCONFIGDIR": f"{own}/matplotlib"}
        if os.getuid() == 0:  # else the list of users knows a home
            assert home_of_a_child(place, None) == missing
            (place / "closed").mkdir(mode=0o700)  # as of root's, after su
            assert home_of_a_child(place, place / "closed" / "home") == missing
        locked = place / "locked"
        locked.mkdir(mode=0o555)
        assert home_of_a_child(place, locked) == {**missing, "HOME": str(locked)}
        fine = place / "fine"
        fine.mkdir()
        fine.chmod(0o777)
        assert home_of_a_child(place, fine) == {"HOME": str(fine), "MPLCONFIGDIR": ""}
    finally:
        left = [place, *([Path("/tmp/topotune-54321")] if os.getuid() == 0 else [])]
        subprocess.run(["rm", "-rf", *left], check=True)


def test_rays_sockets_get_a_short_folder_where_the_usual_one_is_too_deep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.delenv("TMPDIR", raising=False)
    assert session._short_folder() is None
    for path in (str(tmp_path / LONG), "relative", ""):
        monkeypatch.setenv("TMPDIR", path)
        folder = session._short_folder()
        assert folder is not None
        assert Path(folder).stat().st_mode & 0o777 == 0o700
        assert len(folder) <= session.MOST_BYTES
        Path(folder).rmdir()
    longest = Path("/tmp", "y" * (session.MOST_BYTES - len("/tmp/")))
    monkeypatch.setenv("TMPDIR", str(longest))
    assert session._short_folder() is None  # it can be made, as Ray does
    monkeypatch.setenv("TMPDIR", f"{longest}y")
    monkeypatch.setattr(session, "_SHORT_PLACES", ("/proc/nope", __file__))
    with pytest.raises(ResourceError, match=r"at most 39 bytes \(this one has 40\).*RAY_TMPDIR"):
        session._short_folder()


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
def test_a_folder_that_is_closed_to_this_user_cannot_be_made(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    if (child := os.fork()) == 0:
        status = 2
        try:
            os.setuid(54321)
            status = int(session._can_be_made(closed / "tmp" / "ray"))
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.ray
def test_a_search_without_output_home_or_a_short_tmpdir(tmp_path: Path) -> None:
    deep = tmp_path / LONG
    deep.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MPL"))}
    environment |= {"TMPDIR": str(deep), "HOME": "/proc/nope"}
    before = set(Path("/tmp").glob("ray-*"))
    line = 'exec "$0" -m topotune "$@" >&-'
    arguments = ("search", search_file(tmp_path), "--results-dir", tmp_path / "results")
    done = subprocess.run(
        ["sh", "-c", line, sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        timeout=200,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert set(Path("/tmp").glob("ray-*")) <= before
    state = shell("", "status", "--results-dir", tmp_path / "results").stdout
    assert state.startswith("poor: finished; 1 trial: 1 complete")


@pytest.mark.ray
def test_ctrl_c_while_ray_starts_says_what_happened_and_what_to_type(tmp_path: Path) -> None:
    arguments = ("search", search_file(tmp_path), "--results-dir", tmp_path / "results")
    with subprocess.Popen(
        [sys.executable, "-m", "topotune", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        while "starting Ray" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    first, last = said.splitlines()
    assert first == "SIGINT: ends as soon as Ray is up; once more to abort"
    how, kept = re.split("[;:] ", last, maxsplit=1)
    assert how in ("stopped by SIGINT", "aborted")  # the latter on a busy machine
    assert kept == ("the search has not begun and nothing is kept. To begin it: the same command")
    assert not (tmp_path / "results").exists()
