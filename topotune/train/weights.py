"""What a finished trial leaves: its weights, and how they do on the test split."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from topotune.errors import CheckpointError
from topotune.records import TrialSpec
from topotune.tasks import build_task
from topotune.train.assemble import check_spec, data_options, make_model
from topotune.train.checkpoint import CheckpointStore
from topotune.train.evaluation import evaluate
from topotune.train.methods import build_method
from topotune.train.process import reset_process_state, resolve_device


def load_weights(spec: TrialSpec, folder: Path) -> dict[str, Tensor]:
    """The weights of the newest checkpoint in a trial's folder, on the CPU.

    Raises:
        CheckpointError: it is missing or damaged, or it belongs to another spec.
    """
    state = CheckpointStore(folder, spec).load()
    if state is None:
        raise CheckpointError(f"folder {folder}: holds no checkpoint. Train the trial there first")
    return dict(state["model"])


def evaluate_test(spec: TrialSpec, weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Loss and metrics of trained weights on the test split, as ``test_<name>``.

    For finished, chosen trials only: a search that looks at this has no test split left.

    Args:
        spec: the spec that the weights were trained with; its device and threads are used.
        weights: the model's ``state_dict``.

    Raises:
        UserError: as :func:`topotune.train.trial.open_trial`.
        CheckpointError: the weights do not fit the spec's model.
    """
    check_spec(spec)
    device = resolve_device(spec.device)
    reset_process_state(spec.seed, spec.threads, device)
    task = build_task(spec.task, spec.task_options)
    rows = task.splits(data_options(spec)).test.to(device)
    model = make_model(build_method(spec), task)
    try:
        model.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise CheckpointError(
            f"weights do not fit the model of task {spec.task!r}: {error}"
        ) from error
    measured = evaluate(task, model.to(device), rows)
    return {f"test_{name}": value for name, value in measured.items()}
