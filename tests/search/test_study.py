"""The study as the truth: order, resumption, what samplers learn, what is stored."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest

from tests.search_cases import Desk, accuracy, edit_note, make_config, report
from topotune.config.rules import broken_rules
from topotune.errors import SearchFolderError
from topotune.records import EpochReport, Outcome, TrialSpec, TrialSummary
from topotune.search.drive.book import Progress, Turn
from topotune.search.place.folder import STUDY_FILE
from topotune.search.study.rows import note_of
from topotune.search.study.store import Handout
from topotune.seeding import derive_seed


def handed(turn: Handout | Turn) -> Handout:
    assert isinstance(turn, Handout)
    return turn


def test_a_search_runs_to_its_budget_and_finds_the_known_best(tmp_path: Path) -> None:
    desk = Desk(tmp_path, make_config(budget={"trials": 20, "epochs": 2}))
    desk.run()
    rows = desk.rows()
    assert [row.number for row in rows] == list(range(20))
    assert {row.state for row in rows} == {"COMPLETE"}
    for row in rows:
        spec = TrialSpec.from_dict(row.spec)
        assert row.values == (accuracy(spec, 2),)
        assert row.curve == {1: accuracy(spec, 1), 2: accuracy(spec, 2)}
        assert row.params["lr"] == spec.params["lr"]
    assert max(row.values[0] for row in rows) > 0.9


def test_the_same_seed_gives_the_same_trials_and_another_seed_others(tmp_path: Path) -> None:
    params = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        desk = Desk(tmp_path / folder, make_config(seed=seed))
        desk.run()
        params.append([(row.params["lr"], row.seed) for row in desk.rows()])
    assert params[0] == params[1]
    assert not set(params[0]) & set(params[2])


@pytest.mark.parametrize("sampler", ["tpe", "random", "gp", "cmaes", "qmc", "nsga2"])
def test_a_search_reopened_after_every_trial_is_the_undisturbed_one(
    sampler: str, tmp_path: Path
) -> None:
    space = {
        "lr": {"type": "float", "low": 1e-4, "high": 1e-1, "log": True},
        "momentum": {"type": "float", "low": 0.0, "high": 0.99},
    }
    config = make_config(sampler={"name": sampler, "startup_trials": 2}, space=space)
    whole = Desk(tmp_path / "whole", config)
    whole.run()
    for _ in range(6):
        desk = Desk(tmp_path / "pieces", config)
        desk.train(handed(desk.book.next()))
    assert desk.book.next() is Turn.END
    assert [row.params for row in desk.rows()] == [row.params for row in whole.rows()]


def test_a_killed_drivers_trial_is_handed_out_again_and_known_epochs_count_once(
    tmp_path: Path,
) -> None:
    config = make_config()
    first = Desk(tmp_path, config)
    handout = handed(first.book.next())
    first.book.progress(handout.number, Progress((report(handout.spec, 1),)))
    del first  # killed: no end, no goodbye

    again = Desk(tmp_path, config)
    orphan = handed(again.book.next())
    assert orphan == handout
    replay = tuple(report(orphan.spec, epoch) for epoch in (1, 2))
    assert again.book.progress(orphan.number, Progress(replay))
    for epoch in (3, 4):
        outcome = Outcome.COMPLETE if epoch == 4 else None
        again.book.progress(orphan.number, Progress((report(orphan.spec, epoch),), outcome=outcome))
    row = again.book.end(orphan.number)
    assert row is not None
    assert row.state == "COMPLETE"
    assert row.curve == {epoch: accuracy(orphan.spec, epoch) for epoch in (1, 2, 3, 4)}
    again.run()
    assert [r.number for r in again.rows()] == list(range(6))
    assert {r.state for r in again.rows()} == {"COMPLETE"}


def test_an_orphan_without_its_spec_gets_the_one_it_would_have_had(tmp_path: Path) -> None:
    config = make_config()
    whole = Desk(tmp_path / "a", config)
    expected = handed(whole.book.next())
    broken = Desk(tmp_path / "b", config)
    broken.store._study.ask()  # killed between the ask and everything after it
    again = Desk(tmp_path / "b", config)
    handout = handed(again.book.next())
    assert handout.number == 0
    assert handout.spec.seed == expected.spec.seed
    assert 1e-4 <= float(handout.spec.params["lr"]) <= 1e-1  # type: ignore[arg-type]


def test_an_orphan_is_told_to_the_sampler_that_samples_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    Desk(tmp_path, config).store._study.ask()
    again = Desk(tmp_path, config)
    told: list[object] = []
    monkeypatch.setattr(
        optuna.samplers.TPESampler, "before_trial", lambda sampler, *_: told.append(sampler)
    )
    handed(again.book.next())
    assert told == [again.store._study.sampler]


def test_qmc_takes_the_points_of_optunas_sequence_one_by_one(tmp_path: Path) -> None:
    config = make_config(sampler="qmc", budget={"trials": 9, "epochs": 1})
    desk = Desk(tmp_path, config)
    desk.run()
    seed = derive_seed(config.seed, -1) % 2**32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.QMCSampler(scramble=True, seed=seed)
    study = optuna.create_study(sampler=sampler)
    lr = optuna.distributions.FloatDistribution(1e-4, 1e-1, log=True)
    lrs = []
    for _ in range(9):
        trial = study.ask({"lr": lr})
        study.tell(trial, 0.0)
        lrs.append(trial.params["lr"])
    assert [row.params["lr"] for row in desk.rows()][1:] == lrs[1:]  # the first is a random one
    notes = desk.store._storage.get_study_system_attrs(desk.store._study._study_id)
    assert [*notes] == ["study:metric_names"]


def test_warm_start_points_come_first_and_once(tmp_path: Path) -> None:
    config = make_config(warm_start=[{"lr": 0.005}, {"lr": 0.05}])
    desk = Desk(tmp_path, config)
    first = handed(desk.book.next())
    assert first.spec.params == {"lr": 0.005}
    desk.train(first)
    again = Desk(tmp_path, config)
    again.run()
    lrs = [row.params["lr"] for row in again.rows()]
    assert lrs[:2] == [0.005, 0.05]
    assert len(lrs) == len(set(lrs)) == 6


def test_the_grid_visits_every_point_once_across_restarts(tmp_path: Path) -> None:
    space = {
        "lr": {"type": "categorical", "choices": [0.001, 0.01, 0.1]},
        "nesterov": {"type": "categorical", "choices": [True, False]},
        "depth": {"type": "int", "low": 1, "high": 5, "step": 2},
    }
    config = make_config(sampler="grid", space=space, budget={"trials": 100, "epochs": 1})
    for _ in range(3):
        desk = Desk(tmp_path, config)
        for _ in range(5):
            desk.train(handed(desk.book.next()))
    Desk(tmp_path, config).run()
    points = [tuple(row.params.items()) for row in desk.rows()]
    assert len(points) == len(set(points)) == 18


def test_close_and_typed_grid_points_are_all_visited(tmp_path: Path) -> None:
    space = {
        "n": {"type": "int", "low": 200000, "high": 200004},
        "flag": {"type": "categorical", "choices": ["1", 1]},
        "lr": {"type": "float", "low": 0.1, "high": 0.3, "step": 0.1},
    }
    config = make_config(sampler="grid", space=space, budget={"trials": 100, "epochs": 1})
    desk = Desk(tmp_path, config)
    desk.run()
    points = {repr(sorted(row.params.items())) for row in desk.rows()}
    assert len(points) == len(desk.rows()) == 30
    assert max(row.params["lr"] for row in desk.rows()) <= 0.3  # type: ignore[type-var, operator]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_constraint_on_a_number_that_is_none_is_violated(value: float, tmp_path: Path) -> None:
    def rough(spec: TrialSpec, epoch: int) -> EpochReport:
        return report(spec, epoch, loss_roughness=value)

    config = make_config(constraints={"loss_roughness": {"max": 0.5}}, budget={"trials": 2})
    desk = Desk(tmp_path, config)
    desk.run(rough)
    assert all(row.state == "COMPLETE" and row.violated for row in desk.rows())
    assert desk.book.view("done").front == ()


def test_conditional_parameters_appear_only_when_they_apply(tmp_path: Path) -> None:
    space = {
        "coupling": {"type": "categorical", "choices": ["uniform", "exchange"]},
        "lr": {"type": "float", "low": 1e-4, "high": 1e-1, "log": True},
        "eta": {
            "type": "float",
            "low": 0.1,
            "high": 0.3,
            "step": 0.1,
            "when": {"coupling": "exchange"},
        },
        "mu0": {"type": "float", "low": 0.1, "high": 0.5, "when": {"eta": 0.3}},
    }
    config = make_config(space=space, fixed={"eta": 0.0}, budget={"trials": 24, "epochs": 1})
    desk = Desk(tmp_path, config)
    desk.run()
    kinds, chains = set(), set()
    for row in desk.rows():
        spec = TrialSpec.from_dict(row.spec)
        kinds.add(row.params["coupling"])
        assert ("eta" in row.params) == (row.params["coupling"] == "exchange")
        # Three steps of 0.1 are 0.30000000000000004.
        assert ("mu0" in row.params) == (row.params.get("eta") in (0.3, 0.1 + 2 * 0.1))
        chains.add("mu0" in row.params)
        assert spec.params["eta"] == row.params.get("eta", 0.0)
    assert kinds == {"uniform", "exchange"}
    assert chains == {True, False}


def test_names_go_to_their_blocks(tmp_path: Path) -> None:
    space: dict[str, Any] = {
        "lr": {"type": "float", "low": 0.1, "high": 0.2},
        "model.hidden": {"type": "int", "low": 4, "high": 8},
        "train.batch_size": {"type": "categorical", "choices": [16, 32]},
        "task.val_fraction": {"type": "float", "low": 0.1, "high": 0.2},
    }
    config = make_config(
        space=space, fixed={"betas": [0.9, 0.99], "model.depth": 2}, train={"grad_clip": 1.0}
    )
    spec = handed(Desk(tmp_path, config).book.next()).spec
    assert set(spec.params) == {"lr", "betas"}
    assert set(spec.model_options) == {"hidden", "depth"}
    assert set(spec.task_options) == {"val_fraction"}
    assert spec.train.batch_size in (16, 32)
    assert spec.train.grad_clip == 1.0
    assert spec.threads == 1
    assert spec.device == "cpu"


def diverging(spec: TrialSpec, epoch: int) -> EpochReport:
    """Diverges for every lr above 0.003."""
    bad = float(spec.params["lr"]) > 0.003  # type: ignore[arg-type]
    return report(spec, epoch, **({"val_accuracy": float("nan")} if bad else {}))


@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsga2", "cmaes"])
def test_diverged_trials_are_never_best_and_teach_the_sampler(sampler: str, tmp_path: Path) -> None:
    config = make_config(
        sampler={"name": sampler, "startup_trials": 5}, budget={"trials": 16, "epochs": 1}
    )
    desk = Desk(tmp_path, config)
    desk.run(diverging)
    rows = desk.rows()
    bad = [row for row in rows if float(row.params["lr"]) > 0.003]  # type: ignore[arg-type]
    assert bad
    for row in bad:
        assert row.state == "DIVERGED"
        assert "val_accuracy is nan after epoch 1" in row.reason
        assert row.values == ()
    (best,) = desk.book.view("done").front
    assert best not in bad
    stored = desk.stored()
    seen = [t for t in stored if t.user_attrs["end"]["outcome"] == "DIVERGED"]
    fine = [t.value for t in stored if t.user_attrs["end"]["outcome"] == "COMPLETE"]
    for trial in seen:
        assert trial.state.name in ("COMPLETE", "PRUNED")  # FAIL would teach nothing
        if trial.state.name == "COMPLETE":
            assert trial.value is not None
            assert trial.value <= max(v for v in fine if v is not None)
        if sampler != "gp":
            assert trial.constraints["finished"] > 0


def test_tpe_leaves_a_region_that_diverges(tmp_path: Path) -> None:
    def flat(spec: TrialSpec, epoch: int) -> EpochReport:
        """Nothing attracts the sampler to one side; above 5e-4 (77 % of the range) all fails."""
        bad = float(spec.params["lr"]) > 5e-4  # type: ignore[arg-type]
        return report(spec, epoch, val_accuracy=float("nan") if bad else 0.5)

    config = make_config(
        sampler={"name": "tpe", "startup_trials": 8}, budget={"trials": 30, "epochs": 1}
    )
    desk = Desk(tmp_path, config)
    desk.run(flat)
    late = desk.rows()[10:]
    assert sum(row.state == "DIVERGED" for row in late) <= 9  # 15 of 20 by chance


def test_constraints_exclude_from_best_and_reach_the_sampler(tmp_path: Path) -> None:
    def slow(spec: TrialSpec, epoch: int) -> EpochReport:
        fast = float(spec.params["lr"]) < 0.005  # type: ignore[arg-type]
        return report(spec, epoch, overhead_vs_adam=1.0 if fast else 2.0)

    config = make_config(
        constraints={"overhead_vs_adam": {"max": 1.2}}, budget={"trials": 14, "epochs": 1}
    )
    desk = Desk(tmp_path, config)
    desk.run(slow)
    rows = desk.rows()
    broken = [row for row in rows if row.violated]
    assert broken
    assert all(row.violated == ("overhead_vs_adam: 2 > 1.2",) for row in broken)
    (best,) = desk.book.view("done").front
    assert not best.violated
    assert {round(t.constraints["overhead_vs_adam"], 6) for t in desk.stored()} == {-0.2, 0.8}


GOALS = [
    {"metric": "val_accuracy", "direction": "maximize"},
    {"metric": "overhead_vs_adam", "direction": "minimize"},
]


def test_several_objectives(tmp_path: Path) -> None:
    desk = Desk(tmp_path, make_config(objective=GOALS, sampler="nsga2"))
    desk.run()
    for row in desk.rows():
        assert row.values == (accuracy(TrialSpec.from_dict(row.spec), 4), 1.1)
        assert row.epochs == 4
    assert desk.store._study.metric_names == ["val_accuracy", "overhead_vs_adam"]


def test_several_objectives_have_the_curves_that_their_trials_reported(tmp_path: Path) -> None:
    third = {"metric": "val_loss", "direction": "minimize"}
    config = make_config(objective=[*GOALS, third], budget={"trials": 8, "epochs": 3})
    desk = Desk(tmp_path, config)

    def timed(spec: TrialSpec, epoch: int) -> EpochReport:
        whole = report(spec, epoch, val_loss=1 / epoch)
        kept = {k: v for k, v in whole.metrics.items() if k != "overhead_vs_adam"}
        return replace(whole, metrics=kept)

    def work(handout: Handout, epochs: int, outcome: Outcome | None) -> None:
        for epoch in range(1, epochs + 1):
            made = (timed(handout.spec, epoch),)  # the overhead is a trial's, not an epoch's
            desk.book.progress(handout.number, Progress(made, {"overhead_vs_adam": 1.5}))
        if outcome is not None:
            desk.book.progress(handout.number, Progress(outcome=outcome, reason="so"))
            desk.book.end(handout.number)

    while True:  # TPE, which fails on a pruned trial with a curve of several objectives
        handout = handed(desk.book.next())
        if handout.number == 7:
            break
        work(handout, *((2, Outcome.PRUNED) if handout.number % 2 else (3, Outcome.COMPLETE)))
    work(handout, 1, None)
    rows = desk.rows()
    for row, epochs in zip(rows, (3, 2, 3, 2, 3, 2, 3, 1), strict=True):
        assert row.epochs == epochs
        spec = TrialSpec.from_dict(row.spec)
        curve = {epoch: accuracy(spec, epoch) for epoch in range(1, epochs + 1)}
        assert row.curves == (curve, {}, {epoch: 1 / epoch for epoch in curve})
        assert TrialSummary.from_dict(json.loads(row.to_json())) == row
    desk.store.close()
    (desk.folder.root / STUDY_FILE).unlink()
    again = Desk(tmp_path, config)  # made whole from its copy
    assert again.rows()[:7] == rows[:7]
    orphan = handed(again.book.next())
    assert orphan.number == 7
    made = timed(orphan.spec, 1), timed(orphan.spec, 2)
    again.book.progress(7, Progress(made, {"overhead_vs_adam": 1.5}))
    assert list(again.rows()[7].curve) == [1, 2]


def test_a_report_of_several_objectives_that_was_damaged_is_named(tmp_path: Path) -> None:
    config = make_config(objective=GOALS, budget={"trials": 1, "epochs": 1})
    desk = Desk(tmp_path, config)
    desk.run()
    desk.store.close()
    notes: list[object] = [["x", 1.0], [1.0], 3, {}]
    for note in notes:
        edit_note(desk.folder, 0, note_of(1), note)
        with pytest.raises(SearchFolderError, match="record of trial 0 is damaged"):
            desk.rows()
        with pytest.raises(SearchFolderError, match="record of trial 0 is damaged"):
            Desk(tmp_path, config)


def test_a_grid_that_explodes_is_refused_by_the_files_own_rules() -> None:
    space = {f"p{i}": {"type": "int", "low": 0, "high": 99} for i in range(4)}
    broken = broken_rules(make_config(space=space, sampler="grid"))
    assert any("more than 100000 points" in problem for _, problem in broken)


@pytest.mark.parametrize("spent", [False, True])
def test_an_end_that_was_noted_and_not_told_is_settled_at_the_next_start(
    spent: bool, tmp_path: Path
) -> None:
    config = make_config(budget={"trials": 2, "epochs": 1, "wall_clock": 5.0})
    desk = Desk(tmp_path, config)
    handout = handed(desk.book.next())
    desk.book.progress(handout.number, Progress((report(handout.spec, 1),)))
    desk.store._tell = interrupted  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        desk.store.finish(0, Outcome.COMPLETE, "", {"val_accuracy": 0.5}, 1, 2.0)
    desk.store.close()

    again = Desk(tmp_path, config)
    (row,) = again.rows()  # as the driver hands them to the recorder, the counts and the retention
    assert (row.state, row.values, row.device_seconds) == ("COMPLETE", (0.5,), 2.0)
    assert again.book.view("running").counts["COMPLETE"] == 1
    if spent:
        again.ledger.wall_seconds = 6.0
        assert again.book.next() is Turn.END
    else:
        assert handed(again.book.next()).number == 1
    assert again.rows()[0] == row


def interrupted(*_: object) -> None:
    """Ctrl-C."""
    raise KeyboardInterrupt
