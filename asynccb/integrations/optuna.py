"""Sweeps with Optuna: its storage is spoken to beside the event loop and beside the batches.

::

    async def worker(trials: int) -> None:
        for _ in range(trials):
            trial = await ask(study, {"rate": FloatDistribution(1e-4, 1.0, log=True)})
            run = orch.submit(
                partial(build, trial.params["rate"]), x, y, validation_split=0.2, epochs=20,
                name=f"trial-{trial.number}", callbacks=[PruningCallback(trial)],
            )
            await tell(study, trial, run)

    async with Orchestrator(slots=4) as orch, asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(worker(10))

A report to SQLite takes 18 ms where one to memory takes 0.3. So everything that may reach a study's storage
runs on a thread of that study, one call after the other; a training waits for the verdict on its own epoch,
and others compute meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar
from weakref import WeakKeyDictionary

from asynccb.callbacks.base import Callback
from asynccb.callbacks.monitor import Monitor, find_key
from asynccb.errors import ArgumentError
from asynccb.storage.serial import SerialExecutor

try:
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState
except ImportError as missing:
    raise ImportError("asynccb.integrations.optuna needs Optuna: pip install 'asynccb[optuna]'") from missing

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

    from asynccb.callbacks.history import History
    from asynccb.run import Run

__all__ = ["PruningCallback", "ask", "tell"]

T = TypeVar("T")

logger = logging.getLogger("asynccb")

GRACE = 5.0
"""Seconds that a cancelled task waits until the storage has the end of its trial."""


class PruningCallback(Callback):
    """Reports a metric to an Optuna trial after each epoch, and prunes the training where the study's pruner
    says so.

    A pruned training ends behind that very epoch with the outcome ``"pruned"``, which is no failure: ``await
    run`` gives its History. Inside of an :class:`~asynccb.Orchestrator` others compute while the storage is
    asked.

    NaN is reported as it is, and what it means is the pruner's affair (Optuna's own prune it). An epoch
    without the metric reports nothing and the training goes on, with one RuntimeWarning. ``acc`` and
    ``accuracy`` find each other. Where somebody has ended the trial meanwhile, the training is pruned. A
    storage that fails, or a study of several objectives, is a :class:`~asynccb.CallbackError`.

    Args:
        trial: what ``study.ask()`` or :func:`ask` gave.
        monitor: the metric, which the study's direction is about. Default ``"val_loss"``.

    Raises:
        ArgumentError: ``trial`` is no trial, or ``monitor`` no name.
    """

    changes_model: ClassVar[bool] = False
    lockstep: ClassVar[bool] = True

    def __init__(self, trial: Trial, monitor: str = "val_loss") -> None:
        if not all(hasattr(trial, name) for name in ("report", "should_prune", "study")):
            raise ArgumentError("trial", trial, "an Optuna trial, as study.ask() gives it")
        self.trial = trial
        self.monitor = monitor
        self._monitor = Monitor(monitor, owner="PruningCallback")

    def on_train_begin(self, logs: Any = None) -> None:
        self._monitor.reset()

    async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        value = self._monitor.value(logs)
        if value is None:
            self._monitor.warn_missing(logs)
            return
        why = await _do(self.trial.study, _verdict, self.trial, value, epoch)
        if why is not None:
            self.run.prune(f"{why} at {self.monitor} = {value:g}")


def _verdict(trial: Trial, value: float, epoch: int) -> str | None:
    """Reports, and says who prunes; None: nobody. Blocks."""
    try:
        trial.report(value, epoch)
    except UpdateFinishedTrialError:
        return "its trial has ended"
    return type(trial.study.pruner).__name__ if trial.should_prune() else None


async def ask(study: Study, distributions: Mapping[str, BaseDistribution] | None = None) -> Trial:
    """A new trial of ``study``.

    Args:
        distributions: parameters that are drawn at once; ``trial.params`` has them. Others are drawn by
            ``trial.suggest_float`` and the like, which reach the storage as well: call these in the function
            that makes the trainer, which an orchestrator runs on a thread.
    """
    return await _do(study, study.ask, None if distributions is None else dict(distributions))


async def tell(
    study: Study,
    trial: Trial,
    run: Run,
    monitor: str | Callable[[History], float | Sequence[float]] = "val_loss",
) -> FrozenTrial:
    """Waits for the end of a run, and tells it to the study; never raises what the run raises.

    ==========================  ========================================================================
    ``completed``, ``stopped``  COMPLETE, with the value
    ``pruned``                  PRUNED; its value is the last one reported
    ``cancelled``, ``failed``   FAIL, and why in the log; the exception is ``run.exception``
    ==========================  ========================================================================

    A value that is NaN, or not there, is FAIL too. Where the task is cancelled while it waits, the trial is
    told as FAIL, the run is left alone (an orchestrator whose block is cancelled cancels it), and the
    cancellation goes on, after 5 s at the latest.

    Args:
        monitor: the metric whose value in the last epoch that has one is the trial's; or a function that
            takes the History and answers the value, or the values where the study has several objectives.

    Returns:
        The trial as it is in the storage now.

    Raises:
        SelfWait: called in a hook of the run.
    """
    try:
        await run
    except asyncio.CancelledError:
        await _finish(study, trial, TrialState.FAIL, None)
        raise
    except Exception:
        if not run.ended:  # it may not be waited for here
            raise
    if run.outcome == "pruned":
        return await _finish(study, trial, TrialState.PRUNED, None)
    values: Sequence[float] | str = f"{run.outcome}, {run.reason}"
    if run.outcome in ("completed", "stopped"):
        try:
            values = _values(run.history, monitor)
        except BaseException:
            await _finish(study, trial, TrialState.FAIL, None)
            raise
    if isinstance(values, str):
        logger.warning("trial %d (%s) is told as failed: %s", trial.number, run.name, values)
        return await _finish(study, trial, TrialState.FAIL, None)
    return await _finish(study, trial, TrialState.COMPLETE, values)


def _values(
    history: History, monitor: str | Callable[[History], float | Sequence[float]]
) -> Sequence[float] | str:
    """The objectives; or why there are none."""
    if callable(monitor):
        found = monitor(history)
    else:
        key = find_key(monitor, history.history)
        if key is None:
            return f"no {monitor} in its History, which has {', '.join(history.history) or 'nothing'}"
        found = history.history[key][-1]
    values = [float(value) for value in (found if isinstance(found, Sequence) else [found])]
    return f"{values} is no value" if any(map(math.isnan, values)) else values


async def _finish(
    study: Study, trial: Trial, state: TrialState, values: Sequence[float] | None
) -> FrozenTrial:
    """A trial that is not told stays RUNNING for ever in the storage; so a cancel waits for it."""
    job = partial(study.tell, trial, values, state, skip_if_finished=True)
    telling = asyncio.wrap_future(_executor(study).submit(job))
    try:
        return await asyncio.shield(telling)
    except asyncio.CancelledError:
        await asyncio.wait({telling}, timeout=GRACE)
        if telling.done() and (error := telling.exception()) is not None:
            logger.error("the end of trial %d could not be told: %s", trial.number, error)
        raise


_executors: WeakKeyDictionary[Study, SerialExecutor] = WeakKeyDictionary()


def _executor(study: Study) -> SerialExecutor:
    found = _executors.get(study)
    return _executors.setdefault(study, SerialExecutor("asynccb optuna")) if found is None else found


async def _do(study: Study, job: Callable[..., T], *arguments: Any) -> T:
    return await asyncio.get_running_loop().run_in_executor(_executor(study), job, *arguments)
