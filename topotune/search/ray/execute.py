"""Ray Tune runs what the book hands out."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

from topotune.config.models import SearchConfig
from topotune.errors import RunError, TopotuneError
from topotune.redaction import brief
from topotune.search.code.source import Source, code_of
from topotune.search.drive.book import Book, Progress
from topotune.search.drive.recorder import recorded
from topotune.search.place.folder import SearchFolder
from topotune.search.place.objects.files import TrialFiles
from topotune.search.ray.cluster import needs_of
from topotune.search.ray.pulse import Pulse
from topotune.search.ray.ray_internals import (
    keep_keys_off_command_lines,
    out_of_memory_is_a_death,
)
from topotune.search.ray.watchdog import Stalls

KILL_SECONDS = 3.0
"""How long the end of killed workers may take to be noticed."""


def execute(
    folder: SearchFolder,
    config: SearchConfig,
    book: Book,
    pulse: Pulse,
    gpus: float,
    note: Callable[[str], None],
    source: Source,
    most_at_once: int,
    files: TrialFiles,
) -> None:
    """Let Ray Tune execute what the book hands out.

    Args:
        folder: the search's folder.
        config: the search.
        book: what runs next, and what became of it.
        pulse: called on every turn.
        gpus: GPUs a trial.
        note: gets a line about each worker that died.
        source: the code that workers are to run.
        most_at_once: trials that may wait for a device at once; what waits is what an autoscaler
            sees.
        files: those of the trials, which may lie elsewhere.

    Raises:
        RunError: Ray itself failed.
    """
    from ray import tune
    from ray.tune import Stopper

    from topotune.search.ray.tune import (
        ALONE,
        Clock,
        NotStored,
        Silence,
        StudyScheduler,
        StudySearcher,
        guarded,
    )
    from topotune.search.ray.worker import TrialActor, trial_config

    class Overdue(NotStored, Stopper):
        """Ends the search when draining took too long.

        A little after :class:`Clock` has killed the workers that still trained: Tune itself would
        wait for them.
        """

        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            return pulse.overdue(grace=KILL_SECONDS)

    keep_keys_off_command_lines()
    # Tune would start the workers one after another and, while one loads, drop those of trials that
    # end. How many trials there are at once, the book says.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(most_at_once)
    shared, whole = needs_of(config, gpus), needs_of(config, gpus, alone=True)

    def request(trial: dict[str, Any]) -> tune.PlacementGroupFactory:
        return tune.PlacementGroupFactory([whole if trial[ALONE] else shared])

    modules = code_of(folder)

    def left(number: int) -> Progress:
        return recorded(files.checkpoint(number), book.live[number].spec)

    guarded(book, lambda: book.take_over(left), None)
    stalls = Stalls(config.limits.stall, files.heartbeats)
    # Tune insists on a folder; nothing that it writes there is ever read.
    with tempfile.TemporaryDirectory(prefix="topotune-ray-") as scratch:
        tuner = tune.Tuner(
            tune.with_resources(TrialActor, request),
            tune_config=tune.TuneConfig(
                search_alg=StudySearcher(
                    book,
                    lambda handout: trial_config(
                        handout.number,
                        handout.spec,
                        folder.root,
                        config.limits,
                        modules,
                        gpus=gpus,
                        gpu_memory=config.resources.gpu_memory,
                        alone=handout.alone,
                        source=source,
                    ),
                ),
                scheduler=StudyScheduler(book, files.died, left, note, request),
                num_samples=-1,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=config.name,
                storage_path=scratch,
                failure_config=tune.FailureConfig(max_failures=-1),  # the book decides
                checkpoint_config=tune.CheckpointConfig(
                    checkpoint_frequency=0, checkpoint_at_end=False
                ),
                callbacks=[Clock(book, pulse, stalls), Silence()],
                stop=Overdue(),
                verbose=0,
            ),
        )
        try:
            with out_of_memory_is_a_death():
                tuner.fit()
        except TopotuneError:
            raise
        except Exception as error:
            raise RunError(
                f"Ray ended the search: {brief(str(error), 500)}. What is finished is kept; "
                f"'topotune resume {config.name}' continues"
            ) from error
