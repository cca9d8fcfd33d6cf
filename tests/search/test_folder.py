"""Results folders that are not whole, or not ours to read."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tests.search_cases import Desk, make_config
from topotune.errors import SearchFolderError
from topotune.search.place.folder import SearchFolder, searches


def test_a_search_whose_identity_is_gone_is_not_said_to_be_unknown(tmp_path: Path) -> None:
    desk = Desk(tmp_path, make_config())
    desk.folder.meta.unlink()
    with pytest.raises(SearchFolderError, match=r"search\.json: is missing or cannot be read"):
        SearchFolder.open(tmp_path, "demo")
    with pytest.raises(SearchFolderError, match="no search named 'other'"):
        SearchFolder.open(tmp_path, "other")


@pytest.mark.parametrize("place", ["study.jsonl", "trials/0000/spool.jsonl", "driver.lock", "x"])
@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_a_pipe_or_a_socket_inside_a_search_is_refused_and_not_waited_for(
    kind: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Desk(tmp_path, make_config()).folder.root / place
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        monkeypatch.chdir(path.parent)  # a socket's whole path must be short
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    with pytest.raises(SearchFolderError, match=f"{place}: is a pipe, a socket or a device"):
        SearchFolder.open(tmp_path, "demo")


def test_a_folder_that_may_not_be_read_is_no_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Desk(tmp_path, make_config())
    (tmp_path / "private").mkdir()
    looked = Path.is_file

    def is_file(path: Path) -> bool:  # as the kernel answers everybody but root
        if path.parent.name == "private":
            raise PermissionError(13, "Permission denied", str(path))
        return looked(path)

    monkeypatch.setattr(Path, "is_file", is_file)
    assert [folder.name for folder in searches(tmp_path)] == ["demo"]
