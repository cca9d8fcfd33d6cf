"""Ranking, counting and the leaderboard's three forms."""

from __future__ import annotations

import io
import itertools
import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console

from topotune.cli.boards import print_board
from topotune.errors import ConfigError
from topotune.records import TrialSummary
from topotune.results.description import describe
from topotune.results.leaderboard import Leaderboard, legend, standing
from topotune.results.ranking import STATES, counts, is_eligible, pareto_fronts, rank
from topotune.results.text import clean

UP, DOWN = "maximize", "minimize"
MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])
HOSTILE = "a|b [red]x[/red] \x1b[31m`c` <i>d</i> \\[1] \n# *e* _f_ \u202eg"


def titles_of(board: Leaderboard) -> list[str]:
    return [column.title for column in board.columns()]


def rows_of(board: Leaderboard) -> list[list[str]]:
    return [list(row) for row in zip(*(c.cells for c in board.columns()), strict=True)]


def trial(n: int, *values: float, state: str = "COMPLETE", **more: object) -> TrialSummary:
    return TrialSummary(n, state, values=values, **more)  # type: ignore[arg-type]


def brute_fronts(points: Sequence[Sequence[float]], directions: Sequence[str]) -> list[int]:
    """Peel off the points that nothing left dominates, by the definition."""

    def dominates(a: int, b: int) -> bool:
        gain = [
            (x - y) if d == UP else (y - x)
            for x, y, d in zip(points[a], points[b], directions, strict=True)
        ]
        return min(gain) >= 0 and max(gain) > 0

    left, fronts, level = set(range(len(points))), [0] * len(points), 0
    while left:
        level += 1
        free = {i for i in left if not any(dominates(j, i) for j in left)}
        for i in free:
            fronts[i] = level
        left -= free
    return fronts


any_float = st.floats(allow_nan=True, allow_infinity=True) | st.sampled_from([0.0, -0.0, 1.0])


@st.composite
def searches(draw: st.DrawFn) -> tuple[list[TrialSummary], list[str]]:
    directions = draw(st.lists(st.sampled_from([UP, DOWN]), min_size=1, max_size=3))
    numbers = draw(st.lists(st.integers(0, 40), unique=True, max_size=9))
    trials = [
        TrialSummary(
            n,
            draw(st.sampled_from([*STATES, "COMPLETE", "LATER_VERSION"])),
            values=tuple(draw(st.lists(any_float, max_size=3))),
            curve=draw(st.dictionaries(st.integers(1, 3), any_float, max_size=2)),
            epochs=draw(st.integers(0, 3)),
            violated=draw(st.sampled_from([(), (), ("overhead: 2 > 1",)])),
        )
        for n in numbers
    ]
    return trials, directions


def top(
    trials: Sequence[TrialSummary], directions: Sequence[str], count: int
) -> tuple[TrialSummary, ...]:
    objectives = {f"m{index}": direction for index, direction in enumerate(directions)}
    return Leaderboard.of(trials, "", objectives).top(count)


@given(searches(), st.randoms(use_true_random=False))
def test_order_is_a_permutation_and_ignores_the_given_order(
    search: tuple[list[TrialSummary], list[str]], shuffler: random.Random
) -> None:
    trials, directions = search
    ranked = rank(trials, directions)
    assert sorted(t.number for t in ranked) == sorted(t.number for t in trials)
    mixed = list(trials)
    shuffler.shuffle(mixed)
    assert [t.number for t in rank(mixed, directions)] == [t.number for t in ranked]


@given(searches())
def test_best_is_finished_finite_feasible_and_not_dominated(
    search: tuple[list[TrialSummary], list[str]],
) -> None:
    trials, directions = search
    winner = next(iter(top(trials, directions, 1)), None)
    candidates = [
        t
        for t in trials
        if t.state == "COMPLETE"
        and not t.violated
        and len(t.values) == len(directions)
        and all(map(math.isfinite, t.values))
    ]
    assert (winner is None) == (not candidates)
    if winner is None:
        return
    assert winner in candidates
    on_front = brute_fronts([t.values for t in candidates], directions)
    front = [t for t, level in zip(candidates, on_front, strict=True) if level == 1]
    pick = max if directions[0] == UP else min
    extreme = pick(t.values[0] for t in front)
    assert winner.number == min(t.number for t in front if t.values[0] == extreme)


@settings(max_examples=200)
@given(
    st.integers(1, 4).flatmap(
        lambda m: st.tuples(
            st.lists(st.lists(st.integers(-2, 3).map(float), min_size=m, max_size=m), max_size=14),
            st.lists(st.sampled_from([UP, DOWN]), min_size=m, max_size=m),
        )
    )
)
def test_fronts_equal_those_of_the_definition(case: tuple[list[list[float]], list[str]]) -> None:
    points, directions = case
    assert pareto_fronts(points, directions) == brute_fronts(points, directions)


def test_the_groups_follow_each_other() -> None:
    trials = [
        trial(0, state="FAILED", reason="killed"),
        trial(1, 0.99, state="DIVERGED"),
        trial(2, state="WAITING"),
        trial(3, state="RUNNING", curve={1: 0.9}),
        trial(4, math.nan),
        trial(5, math.inf),
        trial(6, state="PRUNED", curve={1: 0.7}, epochs=1),
        trial(7, state="PRUNED", curve={1: 0.2, 2: 0.3}, epochs=2),
        trial(8, state="PRUNED", curve={1: 0.2, 2: math.nan}, epochs=2),
        trial(9, 0.98, violated=("overhead_vs_adam: 1.3 > 1.2",)),
        trial(10, 0.5),
        trial(11, 0.9),
        trial(12, 0.9),
    ]
    order = [t.number for t in rank(trials, [UP])]
    assert order == [11, 12, 10, 9, 7, 8, 6, 4, 5, 3, 2, 1, 0]
    assert [t.number for t in rank(trials, [DOWN])][:4] == [10, 11, 12, 9]
    assert [t.number for t in top(trials, [UP], 5)] == [11, 12, 10]
    assert [t.number for t in top(trials, [UP], 1)] == [11]


def test_no_best_where_none_may_be_called_so() -> None:
    trials = [trial(0, math.nan), trial(1, 3.0, violated=("x",)), trial(2, 9.0, state="DIVERGED")]
    assert top(trials, [UP], 1) == ()
    board = Leaderboard.of(trials, "s", {"m": UP})
    assert board.best is None
    assert board.to_dict()["best"] is None
    assert "No trial finished within the constraints." in board.to_markdown()
    assert {row[0] for row in rows_of(board)} == {"-"}
    assert (board.front, standing(board.front, board.objectives)) == ((), "")


@pytest.mark.parametrize(
    ("directions", "place"), [([], "directions"), ([UP, "max"], r"directions\[1\].*'max'")]
)
def test_wrong_directions_are_refused(directions: list[str], place: str) -> None:
    with pytest.raises(ConfigError, match=place):
        rank([trial(0, 1.0)], directions)


def test_counts_name_every_state() -> None:
    found = counts([trial(0, 1.0), trial(1, state="PRUNED"), trial(2, state="PRUNED")])
    assert found == dict.fromkeys(STATES, 0) | {"COMPLETE": 1, "PRUNED": 2}
    assert set(STATES) == {"COMPLETE", "PRUNED", "DIVERGED", "FAILED", "RUNNING", "WAITING"}


@pytest.fixture
def board() -> Leaderboard:
    trials = [
        trial(
            0,
            0.93424,
            params={"lr": 1e-3, "eta": 0.01, "coupling": "uniform"},
            metrics={"overhead_vs_adam": 1.8249, "overhead_vs_adam_iqr": 0.57, "lost": math.nan},
            epochs=5,
            device_seconds=2.25,
        ),
        trial(
            1,
            0.95,
            params={"lr": 0.00012345678, "eta": 0.01},
            violated=("overhead_vs_adam: 1.31 > 1.2",),
            epochs=5,
            device_seconds=1.5,
        ),
        trial(2, state="PRUNED", params={"lr": 1e-3, "eta": 0.01}, curve={1: 0.5}, epochs=1),
        trial(3, state="FAILED", params={"lr": 1e-3, "eta": 0.01}, reason="ValueError: " + HOSTILE),
    ]
    return Leaderboard.of(trials, "digits | [b]", {"val_accuracy": UP})


def test_rows_show_what_differs(board: Leaderboard) -> None:
    titles = ["rank", "trial", "state", "val_accuracy", "epochs", "lr", "coupling", "vs adam"]
    assert titles_of(board) == [*titles, "device-s", "reason"]  # eta is the same everywhere
    rows = rows_of(board)
    row = ["1", "0", "COMPLETE", "0.9342", "5", "0.001", "uniform", "1.82 (0.57)", "2.2", ""]
    assert rows[0] == row
    assert rows[1][:6] == ["-", "1", "COMPLETE", "0.9500", "5", "0.0001235"]
    assert rows[1][-1] == "breaks overhead_vs_adam: 1.31 > 1.2"
    assert rows[2][3] == "(0.5000)"
    assert rows[3][-1] == "ValueError: " + clean(HOSTILE)
    assert all(
        c.cells[:2] == d.cells for c, d in zip(board.columns(), board.columns(2), strict=True)
    )
    assert board.device_seconds == 3.75
    assert board.summary == "4 trials: 2 complete, 1 pruned, 1 failed; 3.8 device-seconds"


def test_each_overhead_has_a_column_that_says_what_it_is_over() -> None:
    trials = [
        trial(0, 0.9, metrics={"overhead_vs_bptt": 0.756}),
        trial(1, 0.8, metrics={"overhead_vs_adam": 1.25, "overhead_vs_adam_default": 1.1}),
        trial(2, 0.7),
    ]
    board = Leaderboard.of(trials, "mixed", {"val_accuracy": UP})
    assert titles_of(board)[-4:] == ["vs adam", "vs bptt", "device-s", "reason"]
    assert [row[-4:-2] for row in rows_of(board)] == [["", "0.76"], ["1.25", ""], ["", ""]]
    alone = Leaderboard.of(trials[:1], "bptt", {"val_accuracy": UP})
    assert "vs adam" not in titles_of(alone)
    assert "vs bptt" in alone.to_markdown()


def test_several_objectives_have_fronts_and_a_column_each() -> None:
    trials = [trial(0, 0.9, 2.0), trial(1, 0.8, 1.0), trial(2, 0.7, 3.0), trial(3, 0.95, 9.0)]
    board = Leaderboard.of(trials, "s", {"val_accuracy": UP, "step_time_ms": DOWN})
    assert [t.number for t in board.trials] == [3, 0, 1, 2]
    assert titles_of(board)[:5] == ["rank", "front", "trial", "state", "val_accuracy"]
    assert [row[1] for row in rows_of(board)] == ["1", "1", "1", "2"]
    assert rows_of(board)[1][4:6] == ["0.9000", "2.0000"]
    assert [t.number for t in board.front] == [3, 0, 1]
    assert board.to_dict()["front"] == [3, 0, 1]
    assert standing(board.front, board.objectives) == (
        "front of 3 (trials 3, 0, 1): val_accuracy up to 0.9500, step_time_ms down to 1.0000"
    )
    listed = board.to_markdown().partition("Front of 3:")[2].partition("| rank")[0]
    assert listed.split("\n")[2:5] == [
        "- trial 3: val_accuracy 0.9500 (maximize), step_time_ms 9.0000 (minimize)",
        "- trial 0: val_accuracy 0.9000 (maximize), step_time_ms 2.0000 (minimize)",
        "- trial 1: val_accuracy 0.8000 (maximize), step_time_ms 1.0000 (minimize)",
    ]


def test_a_front_of_many_is_counted_in_a_line_and_listed_whole() -> None:
    trials = [trial(n, float(n), float(n)) for n in range(40)]
    board = Leaderboard.of(trials, "s", {"a": UP, "b": DOWN})
    assert "front of 40 (trials 39, 38, 37, 36, 35, 34, 33, 32 and 32 more): a up to 39" in (
        standing(board.front, board.objectives)
    )
    assert board.to_markdown().count("- trial ") == 40
    page = describe(board, "COMPLETE")
    assert page.startswith("**COMPLETE**, front of 40, listed below. 40 trials")
    assert page.count("- [trial ") == 10
    assert "\n- 30 more\n" in page


def test_an_objective_that_is_an_overhead_has_its_spread_and_no_second_column() -> None:
    measured = {"overhead_vs_adam": 1.8249, "overhead_vs_adam_iqr": 0.57}
    trials = [trial(0, 0.9, 1.8249, metrics=measured), trial(1, state="PRUNED", metrics=measured)]
    board = Leaderboard.of(trials, "s", {"val_accuracy": UP, "overhead_vs_adam": DOWN})
    assert "vs adam" not in titles_of(board)
    assert [row[5] for row in rows_of(board)] == ["1.8249 (0.57)", "(1.8249)"]
    assert "overhead_vs_adam down to 1.8249 (IQR 0.57)" in standing(board.front, board.objectives)
    assert "overhead\\_vs\\_adam 1.8249 (IQR 0.57)" in board.to_markdown().replace("_", "\\_")


def test_the_legend_explains_what_the_table_has_and_nothing_else(board: Leaderboard) -> None:
    assert legend(board.columns()) == [
        "rank: - where a trial cannot be best: it did not finish, or breaks a constraint",
        "val_accuracy: in brackets the last known value of a trial that did not finish",
        "vs adam: time of a training step over fused Adam's, median (interquartile range)",
        "device-s: seconds that a trial held a device, all its attempts together",
    ]
    alone = Leaderboard.of(board.trials[:1], "s", {"val_accuracy": UP})
    assert [line.partition(":")[0] for line in legend(alone.columns())] == ["vs adam", "device-s"]
    two = [trial(0, state="PRUNED", curve={1: 0.5}, further_curves=({1: 2.0},))]
    text = legend(Leaderboard.of(two, "s", {"a": UP, "b": DOWN}).columns())
    assert "a, b: in brackets the last known value of a trial that did not finish" in text


def test_json_is_strict_and_complete(board: Leaderboard) -> None:
    def refuse(word: str) -> float:
        raise AssertionError(f"{word} is no JSON")

    data = json.loads(board.to_json(), parse_constant=refuse)
    assert data["best"] == 0
    assert data["counts"]["COMPLETE"] == 2
    assert [t["rank"] for t in data["trials"]] == [1, None, None, None]
    first = data["trials"][0]
    assert first["metrics"]["lost"] == "nan"
    kept = {name: value for name, value in first.items() if name not in ("rank", "front")}
    back = TrialSummary.from_dict(kept)
    assert back.values == board.trials[0].values
    assert back.params == board.trials[0].params


def test_json_holds_infinite_parameters() -> None:
    board = Leaderboard.of([trial(0, 1.0, params={"clip": math.inf})], "s", {"m": UP})
    assert json.loads(board.to_json())["trials"][0]["params"] == {"clip": "inf"}


def markdown_cells(text: str) -> list[list[str]]:
    """The table's cells as a reader of the rendered page sees them."""
    tokens = MARKDOWN.parse(text)
    rows: list[list[str]] = []
    for token, inline in itertools.pairwise(tokens):
        if token.type == "tr_open":
            rows.append([])
        if token.type in ("td_open", "th_open"):
            assert all(c.type in ("text", "text_special") for c in inline.children or [])
            rows[-1].append("".join(c.content for c in inline.children or []))
    return rows


def test_markdown_shows_hostile_names_letter_for_letter(board: Leaderboard) -> None:
    rows = markdown_cells(board.to_markdown())
    assert rows[0] == titles_of(board)
    assert rows[1:] == rows_of(board)
    assert rows[4][-1].endswith("ValueError: " + clean(HOSTILE))
    assert "\x1b" not in board.to_markdown()


def test_markdown_names_the_best(board: Leaderboard) -> None:
    assert "Best: trial 0, val_accuracy 0.9342 (maximize)." in board.to_markdown()


def test_markdown_keeps_within_its_limit() -> None:
    board = Leaderboard.of([trial(i, float(i)) for i in range(200)], "s", {"m": UP})
    whole = board.to_markdown()
    text = board.markdown_table(max_chars=3000)
    assert len(whole) > 6000
    assert 2500 < len(text) <= 3000
    shown = len(markdown_cells(text)) - 1
    assert f"{200 - shown} more trials are left out here." in text
    assert markdown_cells(text)[1][:2] == ["1", "199"]


def test_a_single_trial_shows_all_its_parameters() -> None:
    only = trial(0, 1.0, params={"lr": 0.1, "eta": 0.2})
    assert Leaderboard.of([only], "s", {"m": UP}).varied == ("lr", "eta")
    twin = replace(only, number=1)
    assert Leaderboard.of([only, twin], "s", {"m": UP}).varied == ()
    assert not is_eligible(replace(only, violated=("x",)), [UP])


def test_an_empty_search_has_a_leaderboard() -> None:
    board = Leaderboard.of([], "s", {"m": UP})
    assert board.summary == "0 trials; 0.0 device-seconds"
    assert json.loads(board.to_json())["trials"] == []
    assert markdown_cells(board.to_markdown()) == [titles_of(board)]


def test_the_path_of_a_traceback_is_whole_below_the_table_at_any_width() -> None:
    place = "/a/results/folder/" + "deep/" * 30 + "trials/0001/error.txt"
    failed = trial(1, state="FAILED", reason=f"ValueError: no [red] (traceback: {place})")
    board = Leaderboard.of([trial(0, 0.5), failed], "demo", {"m": UP})
    assert board.tracebacks == {1: place}
    assert board.columns()[-1].cells == ("", "ValueError: no [red]")
    assert board.to_dict()["trials"][1]["reason"] == failed.reason
    assert f"Traceback of trial 1: {place}" in board.to_markdown().replace("\\", "")
    for width in (80, 120):
        out = io.StringIO()
        print_board(Console(file=out, width=width), board, limit=2)
        assert f"Traceback of trial 1: {place}" in " ".join(out.getvalue().split())
    last = f"its GPU ran out of memory 2 times (last: alone (traceback: {place}))"
    twice = Leaderboard.of([trial(2, state="FAILED", reason=last)], "demo", {"m": UP})
    assert twice.tracebacks == {2: place}
    assert twice.columns()[-1].cells == ("its GPU ran out of memory 2 times (last: alone)",)
    many = [trial(n, state="FAILED", reason=failed.reason) for n in range(13)]
    out = io.StringIO()
    print_board(Console(file=out, width=80), Leaderboard.of(many, "demo", {"m": UP}), limit=12)
    assert out.getvalue().count(place) == 10
    assert out.getvalue().endswith("2 more tracebacks: topotune logs demo --trial NUMBER\n")
