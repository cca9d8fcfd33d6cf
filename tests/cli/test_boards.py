"""What a terminal shows of a search: whatever its width, no value that was searched for is cut."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console
from typer.testing import CliRunner

from tests.search_cases import Desk, make_config, report
from topotune.cli.boards import print_best, print_board
from topotune.cli.live import LiveTable, ended_line, progress_line
from topotune.cli.main import app
from topotune.cli.options import say_commands
from topotune.cli.run import _print
from topotune.records import EpochReport, TrialSpec, TrialSummary
from topotune.results.leaderboard import Leaderboard
from topotune.results.text import number, parameter
from topotune.search.driver import SearchReport
from topotune.search.status import status
from topotune.search.view import RunningTrial, SearchView

WIDTHS = (80, 100, 120, 160)
METRICS = {"val_accuracy": "maximize", "val_loss": "minimize", "overhead_vs_adam": "minimize"}
NAMES = (
    *("lr", "coupling", "eta", "w_topo", "mu0", "beta1", "beta2", "model.hidden"),
    *("train.batch_size", "task.augmentation_strength", "energy_control", "weight_decay"),
)
CHOICES = ("uniform", "exchange", "my_package.my_module:MyOwnCouplingOfAVeryLongName", "[b]x[/b]")


def printed(show: Callable[[Console], None], width: int) -> str:
    out = io.StringIO()
    show(Console(file=out, width=width, highlight=False))
    return out.getvalue()


def board_of(parameters: int, objectives: int, trials: int = 12) -> Leaderboard:
    """Trials whose every value is another one; every third did not finish, each with its cause."""
    draw = random.Random(parameters * 10 + objectives)
    goals = dict(list(METRICS.items())[:objectives])
    rows = []
    for n in range(trials):
        cause = f"ValueError: no. {n} (traceback: /home/somebody/a-long-folder/{n:04d}/error.txt)"
        ended = n % 3 != 2
        rows.append(
            TrialSummary(
                n,
                "COMPLETE" if ended else "FAILED",
                params={
                    name: draw.choice(CHOICES) if name == "coupling" else draw.lognormvariate(-4, 3)
                    for name in NAMES[:parameters]
                },
                values=tuple(draw.random() for _ in goals) if ended else (),
                curve={1: draw.random()},
                reason="" if ended else cause,
                metrics={"overhead_vs_adam": 1 + draw.random(), "overhead_vs_adam_iqr": 0.57},
                epochs=3,
                device_seconds=draw.random(),
            )
        )
    return Leaderboard.of(rows, "demo", goals)


def wanted(board: Leaderboard, limit: int) -> list[str]:
    """The words that a table of so many trials must hold whole."""
    words = []
    for place, trial in enumerate(board.trials[:limit], start=1):
        words += [str(place) if trial.number in board.fronts else "-", str(trial.number)]
        words += [number(value) for value in trial.values]
        words += [parameter(value) for name, value in trial.params.items() if name in board.varied]
    return words


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_no_value_is_cut_and_no_line_too_long(width: int, objectives: int) -> None:
    for parameters in range(1, 13):
        board = board_of(parameters, objectives)
        for limit in (10, 12):

            def show(out: Console, board: Leaderboard = board, limit: int = limit) -> None:
                print_board(out, board, limit)
                print_best(out, board)

            text = printed(show, width)
            words = text.split()
            missing = [word for word in wanted(board, limit) if word not in words]
            assert not missing, text
            assert "…" not in text
            long = [line for line in text.splitlines() if cell_len(line) > width]
            assert all(len(line.split()) == 1 for line in long), text  # a path stays in one piece
            for name in (*board.objectives, *board.varied, "rank", "trial"):
                assert name in words
            for trial in board.trials[:limit]:
                assert not trial.reason or trial.reason.split()[-1].rstrip(")") in text
                if trial in board.front:
                    lines = text.partition("Front of" if objectives > 1 else "Best:")[2]
                    assert f"trial {trial.number}" in " ".join(lines.split())
                    assert all(
                        number(value) in lines.split() or f"{number(value)}," in lines
                        for value in trial.values
                    )


def test_the_table_gives_up_columns_says_which_and_is_then_transposed() -> None:
    board = board_of(1, 2, 3)
    seen: dict[str, list[str]] = {}
    for width in range(200, 20, -1):
        text = printed(lambda out: print_board(out, board, 3), width)
        seen.setdefault(" ".join(text.split("\n", 1)[0].split()), text.splitlines())
    heads = list(seen)
    assert heads[:7] == [
        "rank front trial state val_accuracy val_loss epochs lr vs adam device-s reason",
        "rank front trial state val_accuracy val_loss epochs lr vs adam device-s",
        "rank front trial state val_accuracy val_loss epochs lr vs adam",
        "rank front trial state val_accuracy val_loss lr vs adam",
        "rank front trial state val_accuracy val_loss lr",
        "rank front trial val_accuracy val_loss lr",
        "rank trial val_accuracy val_loss lr",
    ]
    assert heads[7:] == ["rank 1 2", "rank 1"]  # three trials beside each other need more
    for head, gone in zip(
        heads[:7],
        (
            "",
            "",
            "device-s",
            "epochs, device-s",
            "epochs, vs adam, device-s",
            "state, epochs, vs adam, device-s",
            "front, state, epochs, vs adam, device-s",
        ),
        strict=True,
    ):
        text = " ".join(seen[head])
        assert (f" columns: {gone}; --json has them" in text) == bool(gone)
        assert ("FAILED trial 2: ValueError: no. 2 " in text) == ("reason" not in head)
    assert "left out" not in " ".join(seen["rank 1 2"])


def test_a_value_wider_than_the_terminal_is_folded_and_whole() -> None:
    choice = "x" * 300
    board = Leaderboard.of(
        [TrialSummary(0, "FAILED", params={"a": choice})], "s", {"m": "maximize"}
    )
    text = printed(lambda out: print_board(out, board, 1), 80)
    assert choice in "".join(text.split())
    assert max(map(len, text.splitlines())) <= 80


def test_names_and_values_of_others_are_shown_letter_for_letter() -> None:
    name = "[red]a[/] \x1b[31m :warning: \u202e|"
    trial = TrialSummary(0, "FAILED", params={name: name}, reason=name, metrics={name: 1.0})
    board = Leaderboard.of([trial], name, {name: "maximize"})
    for width in (120, 300):
        out = io.StringIO()
        print_board(
            Console(file=out, width=width, force_terminal=True, color_system=None), board, 1
        )
        assert "\x1b" not in out.getvalue()
        assert out.getvalue().count(r"[red]a[/] \x1b[31m :warning: \u202e|") >= 3


def search_of(results: Path, objectives: int, parameters: int, **changes: Any) -> Desk:
    space = {name: {"type": "float", "low": 1e-4, "high": 1e-1} for name in NAMES[:parameters]}
    space["coupling"] = {"type": "categorical", "choices": list(CHOICES)}
    goals = [{"metric": m, "direction": d} for m, d in list(METRICS.items())[:objectives]]
    desk = Desk(results, make_config(space=space, objective=goals, **changes))

    def measured(spec: TrialSpec, epoch: int) -> EpochReport:
        draw = random.Random(spec.seed + epoch)
        values = {"val_loss": draw.random(), "overhead_vs_adam": 1 + draw.random()}
        return report(spec, epoch, overhead_vs_adam_iqr=0.57, **values)

    desk.run(measured)
    return desk


@pytest.mark.parametrize("objectives", [1, 3])
@pytest.mark.parametrize("parameters", [2, 12])
def test_search_status_and_best_print_every_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objectives: int, parameters: int
) -> None:
    desk = search_of(tmp_path, objectives, parameters, budget={"trials": 12, "epochs": 1})
    desk.store.close()
    found = status(tmp_path, "demo")
    ended = SearchReport(desk.folder, desk.config, found.board, True, "", "MLflow: all stored")

    def ask(*arguments: str) -> str:
        done = CliRunner().invoke(app, [*arguments, "--results-dir", str(tmp_path)])
        assert done.exit_code == 0, done.output
        return done.stdout

    option = f" --results-dir {tmp_path}"
    for width in WIDTHS:
        monkeypatch.setenv("TOPOTUNE_WIDTH", str(width))
        outputs: dict[int, Callable[[], str]] = {
            10: lambda: CliRunner().invoke(_as_command(lambda: _print(ended, option))).stdout,
            12: lambda: ask("status", "demo"),
        }
        for limit, show in outputs.items():
            text = show()
            words = text.split()
            assert [word for word in wanted(found.board, limit) if word not in words] == []
            assert "…" not in text
        assert f"2 more rows: topotune status demo{option}" in outputs[10]().replace("\n", " ")
        chosen = "--front" if objectives > 1 else "--top 3"
        assert f"  topotune export demo {chosen} --verify{option}" in outputs[10]()
        text = ask("best", "demo")
        for name, value in found.board.trials[0].params.items():
            assert f"{value}" in text, name
        for trial in found.board.front:
            assert f"trial {trial.number}: val_accuracy {number(trial.values[0])}" in text
        assert all(cell_len(x) <= width for x in text.splitlines() if x.startswith("#"))


def _as_command(show: Callable[[], None]) -> Any:
    import typer

    command = typer.Typer()
    command.command()(show)
    return command


def test_commands_are_whole_on_a_line_with_their_purpose_beside_or_above() -> None:
    commands = {"topotune dashboard NAME": "look at it", "topotune export NAME --top 3": "files"}
    wide = printed(lambda out: say_commands(out, commands), 60)
    assert wide == (
        "  topotune dashboard NAME       # look at it\n  topotune export NAME --top 3  # files\n"
    )
    narrow = printed(lambda out: say_commands(out, commands), 20)
    assert narrow.splitlines() == [
        "  # look at it",
        "  topotune dashboard NAME",
        "  # files",
        "  topotune export NAME --top 3",
    ]


def test_lines_of_a_running_search_show_every_objective() -> None:
    metrics = {"overhead_vs_adam": 1.8249, "overhead_vs_adam_iqr": 0.57, "val_accuracy": 0.9}
    trial = TrialSummary(3, "COMPLETE", values=(0.9, 4e-7, 1.8249), metrics=metrics, epochs=2)
    whole = {**metrics, "val_loss": 4e-7}
    trial = TrialSummary.from_dict({**trial.to_dict(), "metrics": whole})
    assert ended_line(trial, METRICS) == (
        "trial 3 COMPLETE val_accuracy 0.9000, val_loss 4.000e-07, overhead_vs_adam 1.8249 "
        "(IQR 0.57), 2 epochs, 0.0 device-s"
    )
    view = SearchView("demo", "running", {"COMPLETE": 1}, 6, 4, (trial,), objectives=METRICS)
    assert progress_line(view) == (
        "1/6 trials, 1 complete, front of 1 (trials 3): val_accuracy up to 0.9000, val_loss down "
        "to 4.000e-07, overhead_vs_adam down to 1.8249 (IQR 0.57), 0s elapsed"
    )


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("objectives", [1, 3])
def test_the_live_table_cuts_no_value(width: int, objectives: int) -> None:
    goals = dict(list(METRICS.items())[:objectives])
    for parameters in range(1, 13):
        board = board_of(parameters, objectives)
        running = tuple(
            RunningTrial(t.number, 2, tuple(t.values) or (None,) * objectives, t.params)
            for t in board.trials[:4]
        )
        view = SearchView(
            *("demo", "running", {}, 6, 40),
            running=running,
            objectives=goals,
            tracking="MLflow: all stored",
        )
        out = io.StringIO()
        Console(file=out, width=width, highlight=False).print(LiveTable(goals)._draw(view))
        text = out.getvalue()
        whole = "".join(text.split())
        assert "…" not in text
        assert max(map(cell_len, text.splitlines())) <= width
        assert text.splitlines()[-1] == "MLflow: all stored"
        for trial in running:
            assert f"{trial.number}2/40" in whole
            for name, value in trial.params.items():
                assert f"{name}={parameter(value)}" in whole
            assert all(number(value) in text for value in trial.values if value is not None)
