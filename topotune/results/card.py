"""The short model card that goes with an exported trial."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from topotune.records import TrialSpec, TrialSummary
from topotune.results.text import clean, markdown, number, parameter, spread, strict_json


@dataclass(frozen=True)
class Provenance:
    """Where an exported trial comes from.

    Attributes:
        search: the search's name.
        search_id: its identifier, the same in the study and in MLflow.
        experiment: MLflow's, in which the search is recorded.
        trials: how many trials the search had when this one was chosen from them.
        code_version: of topotune, with the commit if there is one.
        packages: package name to version, of what computed the result.
        device: in words, such as "cpu (2 threads)" or the GPU's name.
        created: date and time of the export, ISO 8601.
        source: what the trial itself recorded of its code, commit and data.
    """

    search: str
    search_id: str
    experiment: str
    trials: int
    code_version: str
    packages: Mapping[str, str]
    device: str
    created: str
    source: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self, summary: TrialSummary, rank: int) -> dict[str, Any]:
        """All of it, with the trial's number, rank and seed, in strict JSON types."""
        whole: dict[str, Any] = strict_json(
            {
                "search": self.search,
                "search_id": self.search_id,
                "mlflow_experiment": self.experiment,
                "trials": self.trials,
                "trial": summary.number,
                "rank": rank,
                "seed": summary.seed,
                "code_version": self.code_version,
                "packages": self.packages,
                "device": self.device,
                "source": self.source,
                "created": self.created,
            },
            "provenance",
        )
        return whole


@dataclass(frozen=True)
class CardFacts:
    """What a model card states.

    Attributes:
        summary: the trial.
        spec: its complete resolved specification.
        rank: its place in the leaderboard, from 1.
        objectives: metric name to "maximize" or "minimize".
        provenance: where it comes from.
        tensors, values: how many tensors the weights hold, and numbers in all of them.
        test_metrics: metrics on the test split, if it was opened; it plays no part in the search.
    """

    summary: TrialSummary
    spec: TrialSpec
    rank: int
    objectives: Mapping[str, str]
    provenance: Provenance
    tensors: int
    values: int
    test_metrics: Mapping[str, float] = field(default_factory=dict)


def model_card(facts: CardFacts) -> str:
    """The card as Markdown; names from outside are escaped.

    It holds no date, so that the same trial always gives the same card.
    """
    trial, spec, source = facts.summary, facts.spec, facts.provenance
    model = f"model `{_code(spec.model)}`" if spec.model else "the default model"
    parts = [
        f"# {markdown(source.search)}: trial {trial.number}",
        f"Rank {facts.rank} of {source.trials} trials in the topotune search "
        f"`{_code(source.search)}`.",
        "## What it is",
        f"{model[0].upper()}{model[1:]} of task `{_code(spec.task)}`, trained with "
        f"`{_code(spec.method)}` for {spec.epochs} epochs at batch size {spec.train.batch_size} "
        f"from seed {spec.seed}. The weights are {facts.values:,} numbers in {facts.tensors} "
        "tensors.",
        _table(("parameter", "value"), [(n, parameter(v)) for n, v in spec.params.items()]),
        "## Data",
        f"The train, validation and test splits of task `{_code(spec.task)}` are disjoint and "
        f"drawn with split seed {spec.split_seed}. Training saw the first, the search chose by "
        "the second.",
        "## Results",
        _table(("metric", "split", "value"), _results(facts)),
        *(
            f"Runtime: {trial.metrics[name]:.2f}{spread(trial.metrics, name)} times a training "
            f"step {other}."
            for name, other in _OVERHEADS.items()
            if name in trial.metrics
        ),
        "## Train it again",
        "    topotune train config.yaml",
        "On the same machine, with the package versions of `provenance.json`, a CPU run gives the "
        "recorded validation metric exactly. `metrics.json` holds it with all its digits.",
        "## Load the weights",
        "    from safetensors.torch import load_file\n\n"
        '    model.load_state_dict(load_file("model.safetensors"))',
        "`model` is what the task builds from `model` and `model_options` of `config.yaml`.",
        "## Limits",
        _limits(facts),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


_OVERHEADS = {
    "overhead_vs_adam": "with torch's fastest Adam",
    "overhead_vs_bptt": "of the same network by backpropagation through its relaxation",
}
"""What the runtime was measured against."""


def _limits(facts: CardFacts) -> str:
    trials = facts.provenance.trials
    text = (
        f"One seed, chosen as rank {facts.rank} of {trials} trials by its validation metric: that "
        "figure is optimistic, and fresh seeds will scatter around a lower one. "
    )
    if not facts.test_metrics:
        text += "It was not measured on the test split. "
    if facts.summary.violated:
        text += f"It breaks: {markdown('; '.join(facts.summary.violated))}. "
    return text + "Nothing is known about data other than this task's."


def _results(facts: CardFacts) -> list[tuple[str, str, str]]:
    pairs = zip(facts.objectives.items(), facts.summary.values, strict=True)
    rows = [(f"{name} ({way})", _split(name), number(value)) for (name, way), value in pairs]
    rows += [(name, "test", number(value)) for name, value in facts.test_metrics.items()]
    return rows


def _split(metric: str) -> str:
    """The split that a metric's name speaks of; none for trial-level ones."""
    prefix = metric.partition("_")[0]
    return {"val": "validation", "train": "train", "test": "test"}.get(prefix, "")


def _table(titles: tuple[str, ...], rows: list[tuple[str, ...]] | list[Any]) -> str:
    if not rows:
        return ""
    lines = [titles, tuple("---" for _ in titles), *(tuple(map(markdown, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(text: str) -> str:
    """A name for a code span, in which only a backtick could end it."""
    return clean(text).replace("`", "'") or "?"
