"""What Ray Tune asks for, answered by the Book: a Searcher, a TrialScheduler and a Callback.

Thin on purpose: no decision is taken here. Ray swallows no exception of a callback, it ends the
experiment; so an error of ours is kept in the book, the search drains, and the driver raises it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from ray.tune import Callback, PlacementGroupFactory
from ray.tune.experiment import Trial
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from topotune.errors import RunError, TopotuneError
from topotune.records import EpochReport, TrialSpec
from topotune.redaction import brief
from topotune.search.drive.book import Book, Progress, Turn
from topotune.search.ray.pulse import Pulse
from topotune.search.ray.ray_internals import end_idle_workers, end_worker, unplaced_trials
from topotune.search.ray.watchdog import Stalls
from topotune.search.study.deaths import classify, take_note
from topotune.search.study.store import Handout
from topotune.tracking.entries import begun, now_ms

T = TypeVar("T")

NUMBER = "number"
ALONE = "alone"
PAYLOAD = "payload"


def guarded(book: Book, call: Callable[[], T], otherwise: T) -> T:
    """The call's value; an error goes into the book and drains the search instead.

    Every kind of error: Ray would swallow some, end the experiment on others, and take a trial
    whose end could not be stored for one whose worker died.
    """
    try:
        return call()
    except TopotuneError as error:
        book.fatal = book.fatal or error
    except Exception as error:  # noqa: BLE001 - raised by the driver as the search's own error
        cause = RunError(f"{type(error).__name__}: {brief(str(error), 500)}")
        cause.__cause__ = error
        book.fatal = book.fatal or cause
    return otherwise


def charge(book: Book) -> None:
    """Charge the ledger's time up to now to the trials that hold a device."""
    guarded(book, lambda: book.ledger.tick(book.holding), None)


def last_error(trial: Trial) -> str:
    """Ray's words on why a trial's worker failed last; it keeps those of all failures in a file."""
    if trial.error_file is None:
        return ""
    try:
        text = Path(trial.error_file).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return text.rpartition("Failure # ")[2].partition("\n")[2]


def beginning(spec: TrialSpec) -> Progress:
    """What is known of a trial when it begins; its worker reports the rest."""
    return Progress(entries=(begun(spec.table(), {"seed": str(spec.seed)}, now_ms()),))


class NotStored:
    """Mixin for what lives in the driver only: Tune's pickle of its own set-up, which nothing
    ever reads, gets an empty object in its place."""

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        return object, ()

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self


class StudySearcher(NotStored, Searcher):
    """Hands the book's trials to Tune and tells the book when Tune is done with one.

    Args:
        book: the search's books.
        trial_config: the config that a worker gets for a handout.
    """

    def __init__(self, book: Book, trial_config: Callable[[Handout], dict[str, Any]]) -> None:
        super().__init__()
        self._book, self._trial_config = book, trial_config
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        """A trial's config, None to be asked again later, or Searcher.FINISHED."""
        over: Handout | Turn = Turn.END
        turn = guarded(self._book, self._book.next, over)
        if isinstance(turn, Handout):
            self._numbers[trial_id] = turn.number
            return self._trial_config(turn)
        return None if turn is Turn.WAIT else Searcher.FINISHED

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Take the last result in, then close the trial."""
        number = self._numbers.pop(trial_id, None)
        if number is None or number not in self._book.live:
            return
        if result and PAYLOAD in result and not error:
            progress = Progress.from_json(result[PAYLOAD])
            guarded(self._book, lambda: self._book.progress(number, progress), False)
        charge(self._book)
        cause = "Ray could not run it" if error else ""
        guarded(self._book, lambda: self._book.end(number, cause), None)

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the study is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore: the study is the state."""


class StudyScheduler(NotStored, FIFOScheduler):
    """Stops a trial when the book says so; trials start in the order they were handed out.

    Ray restarts a trial's worker as often as it dies; here the book is asked whether it should.

    Args:
        book: the search's books.
        folder: a trial's folder, where its guard has left why it died.
        recorded: what a trial's checkpoint holds.
        note: gets a line about each worker that died.
        request: what a trial with this config holds of the cluster.
    """

    def __init__(
        self,
        book: Book,
        folder: Callable[[int], Path],
        recorded: Callable[[int], Progress],
        note: Callable[[str], None],
        request: Callable[[dict[str, Any]], PlacementGroupFactory],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._book, self._folder, self._recorded = book, folder, recorded
        self._note, self._request = note, request

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """CONTINUE or STOP after a worker's step."""
        number = trial.config[NUMBER]
        if number not in self._book.live:
            return TrialScheduler.STOP
        progress = Progress.from_json(result[PAYLOAD])
        go_on = guarded(self._book, lambda: self._book.progress(number, progress), False)
        return TrialScheduler.CONTINUE if go_on else TrialScheduler.STOP

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Its worker died: find out why and let the book count it."""
        number = trial.config[NUMBER]
        if number in self._book.live:
            guarded(self._book, lambda: self._died(number, trial), None)

    def _died(self, number: int, trial: Trial) -> None:
        death = classify(last_error(trial), take_note(self._folder(number)))
        self._note(self._book.died(number, death, lambda: self._left(number)))
        if self._book.live[number].alone and not trial.config[ALONE]:
            # Ray has taken its worker away and not yet put it back into the queue, so this is the
            # moment to ask for more.
            trial.set_config({**trial.config, ALONE: True})  # type: ignore[no-untyped-call]
            trial.update_resources(self._request(trial.config))

    def _left(self, number: int) -> Sequence[EpochReport]:
        """The epochs that a trial leaves, the last of which it may not have reported."""
        progress = self._recorded(number)
        self._book.record(number, progress)
        return progress.reports

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """The first pending trial whose own worker does not load yet; Tune starts the others. On
        the way, count those that Ray has not placed on a node.

        Tune gives the chosen one the worker of a trial that has just ended, and would end a worker
        that loads for it.
        """
        if self._book.shared and self._book.full:
            end_idle_workers(tune_controller)
        unplaced = unplaced_trials(tune_controller)
        self._book.unplaced = len(unplaced)
        return next((trial for trial in unplaced if trial.status == Trial.PENDING), None)

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """A trial is new, or about to be started again after its worker died."""
        if self._book.over(trial.config[NUMBER]):
            tune_controller.stop_trial(trial)


class Silence(NotStored, TrialProgressCallback):
    """Stands where Tune would put a printer of its own, which also remembers every trial."""

    def __init__(self) -> None:
        """Nothing to keep."""

    def on_trial_result(self, *args: Any, **info: Any) -> None:
        """Print nothing."""

    def on_trial_error(self, *args: Any, **info: Any) -> None:
        """Print nothing."""

    def on_trial_complete(self, *args: Any, **info: Any) -> None:
        """Print nothing."""


class Clock(NotStored, Callback):
    """Keeps the ledger running and calls ``pulse`` on every turn of Tune's event loop.

    Args:
        book: the search's books.
        pulse: called on every turn.
        stalls: finds those of the trials at work whose process is frozen.
    """

    def __init__(self, book: Book, pulse: Pulse, stalls: Stalls) -> None:
        self._book, self._pulse, self._stalls = book, pulse, stalls
        # Tune keeps every trial that ever was; these are the few that hold a device.
        self._started: dict[int, Trial] = {}

    def _release(self, trial: Trial) -> None:
        charge(self._book)
        self._book.holding.discard(trial.config[NUMBER])
        self._started.pop(trial.config[NUMBER], None)

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """The trial holds its device from now on."""
        number = trial.config[NUMBER]
        charge(self._book)
        self._book.holding.add(number)
        self._started[number] = trial
        if number in self._book.live:  # MLflow shows it before its first epoch is over
            opened = beginning(self._book.live[number].spec)
            guarded(self._book, lambda: self._book.record(number, opened), None)

    def on_trial_recover(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Its worker died; it holds nothing until it starts again."""
        self._release(trial)

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """The device is free."""
        self._release(trial)

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """The device is free."""
        self._release(trial)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Charge the time and let the driver look around."""
        charge(self._book)
        guarded(self._book, self._pulse, None)
        working = {
            number: trial
            for number, trial in self._started.items()
            if trial.status == Trial.RUNNING and number in self._book.holding
        }
        guarded(self._book, lambda: self._stalls.look(working), None)
        if self._pulse.overdue():
            for trial in working.values():
                end_worker(trial)
