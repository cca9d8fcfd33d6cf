"""A secret is planted wherever one can be, and every byte that comes out is searched for it."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.proxy import Proxy
from topotune.cli.main import app
from topotune.config.file import parse_search
from topotune.config.models import TrackingConfig
from topotune.errors import ConfigError
from topotune.redaction import address_with_secret, brief, names_secret, redact
from topotune.search.place.folder import SearchFolder
from topotune.tracking.store import check_tracking_uri

ROOT = Path(__file__).parent.parent
TOKEN = "pl4nted-{}-s3cret"
HTTP, PASSWORD, BEARER, RAY, AWS, DATABASE, QUERY, COMMENT = (TOKEN.format(n) for n in range(8))
BAD, FILE, OPTION, STUDY = (TOKEN.format(n) for n in range(8, 12))
SEARCH = {
    "name": "leaky",
    "description": "rings",
    "task": {"name": "tests.leaky_task:Leaky"},
    "method": "adam",
    "space": {"task.fault": {"type": "categorical", "choices": ["", "raise"]}},
    "fixed": {"lr": 0.01},
    "warm_start": [{"task.fault": "raise"}, {"task.fault": ""}],
    "objective": {"metric": "val_loss", "direction": "minimize"},
    "budget": {"trials": 2, "epochs": 1},
    "pruner": "none",
    "overhead": {"blocks": 0},
    "resources": {"concurrency": 1},
}


def planted(folder: Path, uri: str) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "RAY_TMPDIR": str(folder),
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_TRACKING_PASSWORD": PASSWORD,
        "MLFLOW_TRACKING_TOKEN": BEARER,
        "RAY_AUTH_TOKEN": RAY,
        "AWS_SECRET_ACCESS_KEY": AWS,
        "RINGS_DATABASE": f"postgresql://rings:{DATABASE}@db.example/rings?sslpassword={QUERY}",
    }


def texts(path: Path) -> Iterator[bytes]:
    """A file's bytes, and what is compressed in them."""
    with suppress(OSError):  # a socket
        data = path.read_bytes()
        yield data
        if data[:2] == b"\x1f\x8b":
            yield gzip.decompress(data)
        if zipfile.is_zipfile(io.BytesIO(data)):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                yield from (archive.read(name) for name in archive.namelist())


def leaks(data: bytes) -> list[str]:
    words = [TOKEN.format(n) for n in range(12)]
    words += [base64.b64encode(f"me:{word}".encode()).decode() for word in words]
    return [word for word in words if word.encode() in data]


def watch(process: subprocess.Popen[bytes], seen: set[str]) -> None:
    """Collect the command lines of a process and all that it starts."""
    while process.poll() is None:
        with suppress(psutil.Error, subprocess.TimeoutExpired):
            for one in psutil.Process(process.pid).children(recursive=True):
                with suppress(psutil.Error):
                    seen.add(" ".join(one.cmdline()))
            process.wait(0.3)


def run(folder: Path, env: dict[str, str], *arguments: str, code: int) -> bytes:
    """Run a command; everything that it printed and its processes' command lines."""
    log, seen = folder / f"out-{arguments[0]}-{code}", set[str]()
    with log.open("w+b") as out:
        command = [sys.executable, "-m", "topotune", *arguments]
        process = subprocess.Popen(
            command, cwd=folder, env=env, stdout=out, stderr=subprocess.STDOUT
        )
        watcher = threading.Thread(target=watch, args=(process, seen))
        watcher.start()
        found = process.wait(200)
        watcher.join()
    assert found == code, log.read_text(encoding="utf-8")
    return log.read_bytes() + "\n".join(seen).encode()


@pytest.mark.ray
@pytest.mark.heavy
def test_no_planted_secret_comes_out(tmp_path: Path) -> None:
    file = tmp_path / "leaky.yaml"
    file.write_text(yaml.safe_dump(SEARCH) + f"# was http://me:{COMMENT}@host\n", encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="tt", dir="/tmp") as short:  # sockets: 107 characters
        with Proxy(9, "401") as proxy:
            uri = proxy.url.replace("://", f"://me:{HTTP}@")
            printed = run(tmp_path, planted(Path(short), uri), "search", str(file), code=0)
            assert proxy.calls.get("401")
        assert b"cannot be reached" in printed
        assert b"cannot open postgresql://***@" in printed
        assert printed.count(b"note runs code of tests.leaky_task:Leaky from ") == 1
        # Nobody listens there any more; then an address that is none; then the embedded store.
        env = planted(Path(short), uri)
        printed += run(tmp_path, env, "sync", "leaky", "--timeout", "3", code=1)
        env["MLFLOW_TRACKING_URI"] = f"me:{BAD}@host:5000"
        printed += run(tmp_path, env, "sync", "leaky", code=2)
        del env["MLFLOW_TRACKING_URI"]
        printed += run(tmp_path, env, "sync", "leaky", code=2)
        folder = SearchFolder.open(tmp_path / "topotune-results", "leaky")
        config = folder.config()
        assert config.tracking.uri == uri.replace(f"me:{HTTP}", "***")
        folder.save(config.model_copy(update={"tracking": TrackingConfig()}))
        printed += run(tmp_path, env, "sync", "leaky", code=0)
        printed += run(tmp_path, env, "status", "leaky", "--json", code=0)
        env["TOPOTUNE_STUDY_URI"] = f"mysql://me:{STUDY}@127.0.0.1:9/studies"
        printed += run(tmp_path, env, "search", str(file), "--name", "other", code=2)
        assert [line for line in printed.splitlines() if leaks(line)] == []
        files = [path for folder in (tmp_path, Path(short)) for path in folder.rglob("*")]
        names = {path.name for path in files}
        assert {"search.json", "study.jsonl", "mlflow.db", "error.txt", "checkpoint.pt"} <= names
        assert "raylet.out" in names
        file.unlink()  # the user's own
        found = {str(path): leaks(data) for path in files if path != file for data in texts(path)}
    assert {path: words for path, words in found.items() if words} == {}


def test_the_search_for_leaks_finds_them(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x", "a" * 999 + AWS)
    (tmp_path / "b").write_bytes(gzip.compress(b"a" * 999 + BEARER.encode()))
    for name, word in (("a", AWS), ("b", BEARER)):
        raw, inner = texts(tmp_path / name)
        assert (leaks(raw), leaks(inner)) == ([], [word])


@pytest.mark.parametrize(
    "changes",
    [
        {"tracking": {"uri": f"http://me:{FILE}@host:5000"}},
        {"tracking": {"uri": f"postgresql://host/db?password={FILE}"}},
        {"description": f"see http://me:{FILE}@host"},
        {"task": {"name": "a:B", "options": {"api_token": OPTION}}},
        {"task": {"name": "a:B", "options": {"source": f"s3://key:{OPTION}@bucket"}}},
        {"model": {"options": {"hfToken": OPTION}}},
        {"fixed": {"task.db_password": OPTION}},
        {"fixed": {"task.password": [OPTION]}},
        {"tracking": f"http://me:{FILE}@host:5000"},
    ],
    ids=str,
)
def test_a_search_file_holds_no_secret(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_search({**SEARCH, **changes}, "a.yaml", {})
    assert leaks(str(caught.value).encode()) == []


@pytest.mark.parametrize(
    "changes",
    [
        *[
            {"task": {"name": "a:B", "options": options}}
            for options in (
                {"tokens": 16, "token": 3, "num_tokens": 8, "key_dim": 2},
                {"tokenizer": "bpe", "keys": "wasd", "pad_token": "[PAD]", "filter": "low_pass"},
                {"password": ""},
            )
        ],
        {"fixed": {"model.token_mixer": "mlp", "model.cls_token": "mean", "lr": 0.1}},
        {"space": {"model.token_dropout": {"type": "float", "low": 0.0, "high": 0.5}}},
        {"space": {"model.token": {"type": "categorical", "choices": ["cls", "mean"]}}},
        *[
            {"description": f"see {text}"}
            for text in (
                "https://medium.com/@jane/post",
                "git+https://github.com/o/r@main",
                "https://host:5000/@jane and ssh://git@host/r",
                "http://x and 3:1@lr, token=mean",
            )
        ],
    ],
    ids=str,
)
def test_what_only_sounds_like_a_secret_is_taken(changes: dict[str, Any]) -> None:
    space = {"task.fault": {"type": "categorical", "choices": ["", "raise"]}}
    search = {**SEARCH, **changes, "space": {**space, **changes.get("space", {})}}
    config = parse_search(search, "a.yaml", {})
    assert config.space.keys() == search["space"].keys()
    assert config.fixed == search.get("fixed", {})


def test_a_search_that_exists_goes_on_whatever_it_holds(tmp_path: Path) -> None:
    folder = SearchFolder.create(tmp_path, parse_search(SEARCH, "a.yaml", {}), "")
    identity = folder.identity()
    identity["config"]["description"] = f"see http://me:{FILE}@host"
    folder.meta.write_text(json.dumps(identity), encoding="utf-8")
    config = SearchFolder.open(tmp_path, "leaky").config()
    assert FILE in config.description
    assert config.with_budget(trials=9).budget.trials == 9


@pytest.mark.parametrize("uri", [f"me:{BAD}@host", f"htp://me:{BAD}@host", f"//me:{BAD}@[host"])
def test_an_address_that_is_none_is_quoted_without_its_secret(uri: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_tracking_uri(uri)
    assert leaks(str(caught.value).encode()) == []


def test_secrets_of_the_environment_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_URL", "mysql://u:p%40ss-word@h/d?api_key=kkkkkkkk")
    monkeypatch.setenv("SOME_API_KEY", "abcdefgh")
    monkeypatch.setenv("HF_TOKEN", "short")
    monkeypatch.setenv("PWD", "/home/someone")
    text = "p@ss-word p%40ss-word kkkkkkkk abcdefgh short /home/someone"
    assert redact(text) == "*** *** *** *** short /home/someone"


@pytest.mark.parametrize("password", ["hunter's3cret", 'a"b<c>d e/f@g', "new\nline-pass", "p'w"])
def test_a_password_may_hold_any_character(monkeypatch: pytest.MonkeyPatch, password: str) -> None:
    address = f"http://someone:{password}@127.0.0.1:1/x"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert password not in redact(f"cannot reach {address!s}: refused")
    monkeypatch.setenv("PAGE", "https://example.org/@scope")
    assert redact("see example.org/ or someone") == "see example.org/ or someone"


def test_a_token_in_the_users_place_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://dapi0123456789@host/x")
    assert redact("used dapi0123456789 for https://dapi0123456789@host") == (
        "used *** for https://***@host"
    )


def test_a_key_of_the_environment_is_known_by_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAGGLE_KEY", "0123456789abcdef")
    monkeypatch.setenv("GH_PAT_2", "github_pat_11ABCDEFG")
    monkeypatch.setenv("SORT_KEY", "val_accuracy_descending")
    text = "0123456789abcdef github_pat_11ABCDEFG val_accuracy_descending"
    assert redact(text) == "*** *** val_accuracy_descending"


def test_a_message_is_cut_after_its_secrets_are_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEPLOY_PRIVATE_KEY", "-----BEGIN-----\nabcd\nefgh\n-----END-----")
    login = "no answer from https://user:hunter2secret@host/path"
    for limit in range(len(login)):
        assert "hunter" not in brief(login, limit)
    pem = "the key -----BEGIN-----\nabcd\nefgh\n-----END-----\n is bad"
    assert brief(pem, 100) == "the key *** is bad"
    assert brief("file \udcff", 100) == "file \\udcff"


def test_what_the_environment_holds_besides_secrets_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKEN_BUDGET", "100000000")
    monkeypatch.setenv("OTHER_TOKEN", "123456789")
    monkeypatch.setenv("PASSWORD_STORE_DIR", "/home/someone")
    monkeypatch.setenv("SIGNING_SECRET", str(tmp_path))
    monkeypatch.setenv("PGPASSWORD", "optimize")
    text = f"100000000 123456789 /home/someone/x {tmp_path}/x optimizer"
    assert redact(text) == text
    assert redact("'optimize',optimize_it") == "'***',***_it"


@pytest.mark.parametrize(
    "text",
    [
        "A basic comparison of optimizers",
        "Bearer authentication",
        "a basic hyperparametrisation",
        "tokens 3:1@lr and Adam:ring@home, lr:0.00001@epoch",
        "https://medium.com/@jane/post and https://host:5000/@jane",
        "git+https://github.com/o/r@main, git@github.com:o/r",
        "pad_token=[PAD] tokens=3 low_pass=0.25",
    ],
)
def test_text_that_holds_no_secret_stays(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Authorization: Basic bWU6eA==aa", "Authorization: Basic ***"),
        ("{'Authorization': 'Bearer abcdefgh'}", "{'Authorization': 'Bearer ***'}"),
        ("sent Bearer abc.def.ghi.jkl.m0 twice", "sent Bearer *** twice"),
        ("http://a/b,http://u:p/w@x@h/p", "http://a/b,http://***@h/p"),
        ("(http://u:12345@h) ssh://key@h/x", "(http://***@h) ssh://***@h/x"),
        ("uri=me:pass-word@host:5000", "uri=***@host:5000"),
        (
            "http://h/?a=http://x&hf_token=t&b=1 sig=s",
            "http://h/?a=http://x&hf_token=***&b=1 sig=***",
        ),
    ],
)
def test_secrets_in_a_text_are_hidden(text: str, shown: str) -> None:
    assert redact(text) == shown


@pytest.mark.parametrize("tail", ["", "@", " @a", "@@"])
@pytest.mark.parametrize(
    "unit",
    [
        *["-", "/", "//a:", "a:", ",a:b", "password=", "a=", "token=x ", "basic ", "@", "://"],
        *["Authorization:", "://a:1", "a@", "//@", "Bearer aaaaaaaaaaaaaaaaaaaa", "aB", " "],
        *["pwd1", "_", "?a=&"],
    ],
)
def test_a_large_hostile_text_takes_little_time(unit: str, tail: str) -> None:
    text = "://" + unit * (200_000 // len(unit)) + tail
    began = time.process_time()
    redact(text)
    address_with_secret(text)
    names_secret(text)
    assert time.process_time() - began < 3  # of a quadratic pattern: minutes


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        *[(name, True) for name in ("password", "DB_PASSWORD", "dbPassword", "api-key", "token")],
        *[(name, True) for name in ("aws_secret_access_key", "auth_token", "task.api_key")],
        *[(name, True) for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "WANDB_API_KEY")],
        *[(name, True) for name in ("PGPASSWORD", "DBPASSWORD", "MYSQL_PWD", "db_pass")],
        *[(name, True) for name in ("MLFLOW_TRACKING_TOKEN", "RAY_AUTH_TOKEN", "GITHUB_TOKEN")],
        *[(name, True) for name in ("OPENAI_API_KEY", "NGROK_AUTHTOKEN", "DB_PASSWORD_2")],
        *[(name, True) for name in ("AWS_ACCESS_KEY_ID", "SENTRY_DSN", "MLFLOW_TRACKING_PASSWORD")],
        *[(name, False) for name in ("tokens", "key", "tokenizer", "passes", "secretary", "lr")],
        *[(name, False) for name in ("PWD", "OLDPWD", "TOKENIZERS_PARALLELISM", "TOKEN_BUDGET")],
        *[(name, False) for name in ("PASSWORD_STORE_DIR", "SSH_AUTH_SOCK", "KEYBOARD")],
        *[(name, False) for name in ("model.token_mixer", "num_tokens", "key_dim", "compass")],
    ],
)
def test_names_of_secrets(name: str, secret: bool) -> None:
    assert names_secret(name) == secret


def test_a_password_on_the_command_line_is_blamed_on_the_option(tmp_path: Path) -> None:
    shipped = ROOT / "search_spaces" / "adam_mnist5k.yaml"
    address = "http://me:pa55word@127.0.0.1:1"
    with pytest.raises(ConfigError, match=r"^--tracking-uri: looks like a secret") as caught:
        app(
            ["search", str(shipped), "--tracking-uri", address, "--results-dir", str(tmp_path)],
            standalone_mode=False,
        )
    assert "pa55word" not in str(caught.value)
