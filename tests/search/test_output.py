"""What a trial prints lies in its folder: all of it, below Python too, bounded, without secrets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.search_cases import Desk, make_config
from topotune.cli.main import app
from topotune.search.place import output
from topotune.search.place.output import (
    ERROR_FILE,
    MAX_BYTES,
    OUTPUT_FILE,
    Output,
    read,
    tidy,
    tidy_killed,
)
from topotune.search.study.store import Handout

SECRET = "hunter2hunter2"


def printing(folder: Path, body: str) -> subprocess.CompletedProcess[str]:
    """Lines of Python that print in a process of their own."""
    code = "import ctypes, os, subprocess, sys, time\nfrom pathlib import Path\n"
    code += "from topotune.search.place.output import Output\n"
    code += "output = Output(Path(sys.argv[1]))\n" + textwrap.dedent(body)
    return subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env={**os.environ, "OWN_TOKEN": SECRET},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_everything_that_a_trial_prints_is_in_its_file(tmp_path: Path) -> None:
    body = """
    print("by print")
    print("by error", file=sys.stderr)
    os.write(1, b"by descriptor\\n")
    os.system("echo by a child")
    ctypes.CDLL(None).puts(b"by the C library")
    print("the secret is", os.environ["OWN_TOKEN"])
    print("no end", end="")
    output.close()
    print("after")
    print("error after", file=sys.stderr)
    """
    done = printing(tmp_path / "trial", body)
    assert (done.stdout, done.stderr) == ("after\n", "error after\n")
    text = (tmp_path / "trial" / OUTPUT_FILE).read_text()
    lines = ["by print", "by error", "by descriptor", "by a child", "by the C library"]
    assert sorted(text.splitlines()) == sorted([*lines, "the secret is ***", "no end"])


@pytest.mark.parametrize("end", ["os._exit(3)", "os.abort()", "os.kill(os.getpid(), 9)"])
def test_the_last_words_of_a_process_that_crashes_are_kept(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = f"""
    os.write(2, b"last words to " + os.environ["OWN_TOKEN"].encode())
    {end}
    """
    assert printing(tmp_path, body).returncode != 0
    path = tmp_path / OUTPUT_FILE
    assert path.read_text() == f"last words to {SECRET}"  # no line of its own was run any more
    monkeypatch.setenv("OWN_TOKEN", SECRET)
    assert read(path) == "last words to ***"
    assert printing(tmp_path, "print(', then more')\noutput.close()\n").returncode == 0
    assert path.read_text() == "last words to ***, then more\n"


def test_a_flood_keeps_its_beginning_and_its_end(tmp_path: Path) -> None:
    body = """
    for number in range(400_000):
        os.write(1, b"line %07d %s\\n" % (number, b"x" * 60))
    print("the last line", flush=True)
    path = Path(sys.argv[1], "output.txt")
    deadline = time.monotonic() + 20
    while path.stat().st_size > 8 * 2**20 and time.monotonic() < deadline:
        time.sleep(0.05)
    Path(sys.argv[1], "bounded").write_text(str(path.stat().st_size))
    output.close()
    """
    printing(tmp_path, body)
    assert int((tmp_path / "bounded").read_text()) <= MAX_BYTES  # while it still runs
    text = (tmp_path / OUTPUT_FILE).read_text()
    assert len(text) <= MAX_BYTES
    assert text.startswith("line 0000000 ")
    assert text.endswith("the last line\n")
    assert " bytes are left out here)" in text
    lines = [line for line in text.splitlines() if line.startswith("line ")]
    assert all(len(line) == 73 for line in lines)  # whole ones
    assert lines == sorted(lines)


def test_what_is_printed_while_a_file_is_made_tidy_comes_after_it(tmp_path: Path) -> None:
    body = """
    print("first", os.environ["OWN_TOKEN"])
    output.tidy()
    Path(sys.argv[1], "meanwhile").write_text(Path(sys.argv[1], "output.txt").read_text())
    print("second")
    output.close()
    """
    printing(tmp_path, body)
    assert (tmp_path / "meanwhile").read_text() == "first ***\n"
    assert (tmp_path / OUTPUT_FILE).read_text() == "first ***\nsecond\n"


def test_of_what_every_epoch_prints_only_the_new_is_searched(tmp_path: Path) -> None:
    body = """
    sizes = []
    from topotune.search.place import output as module
    real = module.redact
    module.redact = lambda text: sizes.append(len(text)) or real(text)
    for epoch in range(5):
        print("x" * 999)
        print("half of", os.environ["OWN_TOKEN"][:5], end="")
        output.tidy()
        print(os.environ["OWN_TOKEN"], "whole")
    Path(sys.argv[1], "sizes").write_text(repr(sizes[1:]))
    output.close()
    """
    done = printing(tmp_path, body)
    assert done.returncode == 0, done.stderr
    assert all(size < 1100 for size in json.loads((tmp_path / "sizes").read_text()))
    text = (tmp_path / OUTPUT_FILE).read_text()
    assert text == ("x" * 999 + "\nhalf of hunte*** whole\n") * 5


def test_what_killed_workers_have_left_is_made_tidy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OWN_TOKEN", SECRET)
    folders = [tmp_path / name for name in ("printed", "silent", "gone")]
    for folder in folders[:2]:
        folder.mkdir()
    (folders[0] / OUTPUT_FILE).write_text(f"one {SECRET}\n")
    (folders[1] / OUTPUT_FILE).touch()
    tidy_killed(folders)
    assert (folders[0] / OUTPUT_FILE).read_text() == "one ***\n"
    assert list(folders[1].iterdir()) == []


def test_the_end_of_a_file_that_is_much_too_long_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "MAX_BYTES", 1000)
    monkeypatch.setattr(output, "_HEAD", 100)
    monkeypatch.setattr(output, "_TAIL", 300)
    path = tmp_path / OUTPUT_FILE
    path.write_bytes(b"".join(b"%09d\n" % n for n in range(1000)) + b"the last words")
    text = read(path)
    assert text.startswith("000000000\n")
    assert text.endswith("000000999\nthe last words")
    assert len(text) < 1000


def test_silence_and_a_folder_that_cannot_be_written_leave_nothing(tmp_path: Path) -> None:
    printing(tmp_path / "silent", "output.close()\n")
    assert list((tmp_path / "silent").iterdir()) == []
    (tmp_path / "file").touch()
    done = printing(tmp_path / "file" / "below", "print('here')\noutput.close()\n")
    assert done.stdout == "here\n"
    tidy(tmp_path / "nowhere")
    assert read(tmp_path / "nowhere") == ""


def test_bytes_that_are_no_text_stay_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / OUTPUT_FILE
    path.write_bytes(b"\xff\x00 token=abcdefgh \xfe")
    tidy(path)
    assert path.read_bytes() == b"\xff\x00 token=*** \xfe"


def test_a_file_that_outgrew_its_process_is_shortened_when_it_is_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "MAX_BYTES", 1000)
    monkeypatch.setattr(output, "_HEAD", 100)
    monkeypatch.setattr(output, "_TAIL", 300)
    path = tmp_path / OUTPUT_FILE
    path.write_bytes(b"".join(b"%09d\n" % n for n in range(1000)))
    Output(tmp_path).close()
    lines = path.read_text().splitlines()
    assert lines[:10] == [f"{n:09d}" for n in range(10)]
    assert lines[10:13] == ["", "(9610 bytes are left out here)", ""]
    assert lines[13:] == [f"{n:09d}" for n in range(971, 1000)]


def test_logs_show_what_a_trial_has_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OWN_TOKEN", SECRET)
    monkeypatch.delenv("TOPOTUNE_ADDRESS", raising=False)
    desk = Desk(tmp_path, make_config())
    assert isinstance(desk.book.next(), Handout)
    home = desk.folder.trial(0)

    def logs(*arguments: str, code: int = 0) -> str:
        place = ["--results-dir", str(tmp_path)]
        done = CliRunner().invoke(app, ["logs", "demo", *arguments, *place])
        assert (done.exit_code == 0) is (code == 0), done.output
        return done.stdout if code == 0 else str(done.exception)

    assert logs("--trial", "0") == "trial 0 of demo has printed nothing\n"
    home.mkdir(parents=True)  # as the trial's worker does
    (home / OUTPUT_FILE).write_text(f"one {SECRET}\n  two\x1b[2J\nhalf")
    assert logs("--trial", "0") == "one ***\n  two\\x1b[2J\nhalf\n"
    (home / ERROR_FILE).write_text("Traceback\n  File\n")
    assert logs("--trial", "0").endswith(f"half\n--- {home / ERROR_FILE}\nTraceback\n  File\n")
    assert "has no trial 1. 'topotune status demo' lists" in logs("--trial", "1", code=2)
    assert "--trial shows the output so far" in logs("--trial", "0", "-f", code=2)
    assert "--trial N shows what a trial of a search on this" in logs(code=2)
    desk.store.close()
