"""``export`` and ``train``: take the best out of a search, and train a config again."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from topotune.cli import answer
from topotune.cli.cluster import forward
from topotune.cli.options import (
    DEFAULT_RESULTS,
    Address,
    AllowOpen,
    AsJson,
    ResultsDir,
    SearchName,
    elsewhere,
    log_to_stderr,
    on_cluster,
    print_json,
    say,
    typed,
)
from topotune.errors import ConfigError, RunError, TopotuneError, in_one_line
from topotune.records import pack_metrics
from topotune.results.text import spread

if TYPE_CHECKING:
    from topotune.records import EpochReport


def export(
    context: typer.Context,
    name: SearchName,
    top: Annotated[int, typer.Option(min=1, help="How many of the best.")] = 1,
    front: Annotated[
        bool, typer.Option("--front", help="Every trial of the Pareto front instead.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder; default topotune-exports/NAME.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Train each again and compare exactly.")
    ] = False,
    register: Annotated[
        str | None, typer.Option(help="Also register the best under this model name.")
    ] = None,
    alias: Annotated[str, typer.Option(help="Alias of the registered version.")] = "best",
    force: Annotated[bool, typer.Option("--force", help="Replace earlier exports.")] = False,
    results_dir: ResultsDir = DEFAULT_RESULTS,
    address: Address = None,
    allow_open: AllowOpen = False,
    as_json: AsJson = False,
) -> None:
    """Write config, metrics, weights, model card of the best trials."""
    target = out if out is not None else Path("topotune-exports") / name
    if front and typed(context, "top"):
        raise ConfigError(
            "--front", "exports the whole front, --top so many of the best", "Give one"
        )
    if cluster := elsewhere(context, address):
        _export_there(context, cluster, name, target, as_json)
        return
    log_to_stderr()
    from topotune.search.export import export_top
    from topotune.search.place.folder import SearchFolder
    from topotune.search.place.objects.pull import fetch

    search = SearchFolder.open(results_dir, name)
    if on_cluster(context):
        fetch(results_dir, name, "code/")
        sys.path.append(str(search.code))  # last: a file there stands in for no library
    exported = export_top(
        search,
        None if front else top,
        target,
        check=verify,
        register=register,
        alias=alias,
        force=force,
        note=(lambda text: None) if as_json else say,
    )
    answer.bring(target)
    if as_json:
        print_json(
            [
                {
                    "trial": one.number,
                    "folder": str(one.paths.folder),
                    "test": pack_metrics(one.test),
                    "verified": one.verification is not None and one.verification.exact,
                    "version": one.version,
                }
                for one in exported
            ]
        )
        return
    for one in exported:
        figures = ", ".join(f"{metric} {value:.4f}" for metric, value in one.test.items())
        say(f"trial {one.number}: {figures}")
        if one.verification is not None:
            found = one.verification
            how = "exactly" if found.exact else f"within {abs(found.difference):.2g}"
            say(
                f"trial {one.number}: verified, {found.metric} {found.reproduced!r} reproduced "
                f"{how} on {found.device}"
            )
        if one.version is not None:
            say(f"trial {one.number}: registered as {register} version {one.version}")
    typer.echo(f"\nTrain one again:\n  topotune train {exported[0].paths.config}")


def _export_there(
    context: typer.Context, address: str, name: str, target: Path, as_json: bool
) -> None:
    """Export on the cluster, and bring the files here as if they had been written here."""
    chosen = context.params
    if target.exists() and any(target.iterdir()) and not chosen["force"]:
        raise ConfigError(
            str(target), "holds earlier exports", "Give another --out, or --force to replace them"
        )
    there = f"exported-{secrets.token_hex(4)}"
    arguments = ["--front"] if chosen["front"] else ["--top", str(chosen["top"])]
    arguments += ["--out", there]
    arguments += ["--verify"] if chosen["verify"] else []
    if chosen["register"]:
        arguments += ["--register", chosen["register"], "--alias", chosen["alias"]]
    forward(context, address, arguments, name, as_json, files=(there, target))


def train(
    config: Annotated[Path, typer.Argument(help="A config that 'export' or 'best' wrote.")],
    folder: Annotated[
        Path | None, typer.Option(help="Keep checkpoints and the step trace here, and resume.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Another seed than the config's.")] = None,
    data_dir: Annotated[str | None, typer.Option(help="Where data sets lie.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train one resolved config; test metrics at the end."""
    import dataclasses
    import tempfile

    from topotune.config.file import load_spec
    from topotune.records import Outcome

    log_to_stderr()
    spec = load_spec(config)
    changes = {"seed": seed, "data_dir": data_dir, "device": device}
    spec = dataclasses.replace(spec, **{k: v for k, v in changes.items() if v is not None})  # type: ignore[arg-type]
    from topotune.train.trial import run_trial
    from topotune.train.weights import evaluate_test, load_weights

    def show(report: EpochReport) -> bool:
        if not as_json:
            say(_epoch_line(report, spec.epochs))
        return True

    with tempfile.TemporaryDirectory(prefix="topotune-train-") as scratch:
        place = folder if folder is not None else Path(scratch)
        try:
            result = run_trial(spec, folder=place, on_epoch=show)
        except (TopotuneError, OSError):
            raise
        except Exception as error:
            raise RunError(f"{config}: training failed: {in_one_line(error)}") from error
        complete = result.outcome is Outcome.COMPLETE
        test = evaluate_test(spec, load_weights(spec, place)) if complete else {}
    if as_json:
        print_json({**result.to_dict(), "test": pack_metrics(test)})
    else:
        for cost in ("overhead_vs_adam", "overhead_vs_bptt"):
            if cost in result.metrics:
                typer.echo(f"{cost} {result.metrics[cost]:.3f}{spread(result.metrics, cost)}")
        for metric, value in test.items():
            say(f"{metric} {value:.4f}")
    if not complete:
        raise RunError(f"{config}: training ended {result.outcome}: {result.reason}")


def _epoch_line(report: EpochReport, epochs: int) -> str:
    wanted = [n for n in report.metrics if n.startswith(("train_", "val_"))]
    own = ("energy", "topo_ratio", "energy_free", "nfe_free", "unconverged_share", "step_time_ms")
    wanted += [n for n in own if n in report.metrics]
    figures = "  ".join(f"{name} {report.metrics[name]:.4g}" for name in wanted)
    return f"epoch {report.epoch}/{epochs}  {figures}"
