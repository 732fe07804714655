"""What runs on the training thread around the loop: opens it, hosts it, closes it, and turns every way out
into a value."""

from __future__ import annotations

import threading
from operator import methodcaller
from typing import TYPE_CHECKING, Any

from asynccb.ending import Outcome, of_error, of_return
from asynccb.errors import RunCancelled, TornState
from asynccb.events import ExceptionRaised, Logs
from asynccb.training.snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from asynccb.bus.dispatch import Dispatcher
    from asynccb.bus.dispatch import Emit as HookTable
    from asynccb.protocols import Batch, Gate, Model, Source
    from asynccb.statistics import Phases
    from asynccb.training.control import Control
    from asynccb.training.programs import Program
    from asynccb.training.snapshot import Snapshots

__all__ = ["Driver"]


class Driver:
    """The host of the loop, and the body of the training thread.

    Args:
        model: what is trained.
        program: what is done with it.
        dispatcher: runs inline hooks and fills mailboxes.
        control: requests from the loop.
        snapshots: makes the copies of the model.
        phases: the run's stopwatch.
        equip: gives each callback its run, params and data; called on the thread.
        fixed: told the outcome as soon as the loop is left, before the closing hooks.
        left: told the final outcome as the last thing.
    """

    def __init__(
        self,
        model: Model,
        program: Program,
        dispatcher: Dispatcher,
        control: Control,
        snapshots: Snapshots,
        phases: Phases,
        *,
        equip: Callable[[dict[str, Any]], None],
        fixed: Callable[[Outcome], Any],
        left: Callable[[Outcome], None],
    ) -> None:
        self.epoch = 0
        self.step = 0
        self.logs: Mapping[str, Any] = {}
        self.ident: int | None = None
        self.outcome: Outcome | None = None
        """As it was when the thread left its loop."""
        self.snapshots = snapshots
        # A model that is never copied beside the training need not ask.
        self.before_update: Gate | None = (
            snapshots.gate if getattr(model, "has_live", hasattr(model, "live")) else None
        )
        self._model = model
        self._program = program
        self._dispatcher = dispatcher
        self._control = control
        self._phases = phases
        self._equip = equip
        self._fixed = fixed
        self._left = left
        # The verbs of the host that belong to others, looked up once.
        self.emit: HookTable = dispatcher.follow(self._use)
        self.next: Callable[[Source], Batch | None] = methodcaller("next")
        self.skip = dispatcher.skip
        self.safe_point = control.safe_point
        self.stopped = control.stopped
        control.flagged = _stop_flag(model.user_model)
        control.capture = self.capture

    # The host -----------------------------------------------------------------------------------------------

    def _use(self, table: HookTable) -> None:
        self.emit = table

    def broke_inside(self) -> None:
        self._control.torn = True

    # The thread ---------------------------------------------------------------------------------------------

    def __call__(self) -> None:
        """The body of the thread. Raises nothing: the outcome is a value."""
        self.ident = threading.get_ident()
        self._phases.enter("opening")
        try:
            outcome = self._open_and_close()
        except BaseException as error:  # around the story, not in it: else nobody would hear of the end
            self._control.leave()
            outcome = of_error(error)
        # Before anybody else may have the model.
        self.snapshots.close()
        self._phases.enter("drain")
        self._left(outcome)

    def capture(self, *, pooled: bool = False) -> Snapshot:
        """A copy of the model now; legal on this thread, outside of a batch.

        Args:
            pooled: for a writer of ours, who releases it; the training waits for room in the pool.
        """
        if self._control.torn:
            raise TornState("the model raised inside a batch, so its weights may be half updated")
        return self.snapshots.take(self.step, self.epoch, pooled=pooled)

    def capture_final(self) -> Snapshot:
        """A copy of the model after the end, on any thread that keeps others from the model."""
        return Snapshot(self._model.capture(), self.step, self.epoch)

    def _open_and_close(self) -> Outcome:
        mark_training(self._model.user_model, self.ident, self.snapshots.gate)
        self.outcome = outcome = self._train()
        history = self._fixed(outcome)
        outcome = self._close(outcome, history)
        self._control.leave()
        self.snapshots.close()
        mark_training(self._model.user_model, None)
        return outcome

    def _train(self) -> Outcome:
        try:
            params = self._program.prepare(self._model)
            self._equip(params)
            self._dispatcher.begin(self._program.opening, self.step)
            self._dispatcher.wait_begun()
            self._phases.enter("batches")
            whole = self._program.tell(self._model, self)
            return of_return(whole, self._control.stop_reason)
        except BaseException as error:
            return of_error(error)

    def _close(self, outcome: Outcome, history: Any) -> Outcome:
        # From here on nothing is waited for: the drain follows on the loop, and it has its own limits.
        self._control.closing = True
        self._phases.enter("closing")
        errors: list[BaseException] = []
        if outcome.way.exception_hook:
            told = outcome.exception or RunCancelled(outcome.reason, history)
            errors += self._dispatcher.close(ExceptionRaised, told)
        errors += self._dispatcher.close(self._program.closing, self.step, Logs(self._program.closing_logs))
        return outcome.with_closing_errors(errors)


def mark_training(user_model: Any, thread: int | None, gate: Gate | None = None) -> None:
    """Tells a model that wants to know (it has ``training_thread``, or ``training_gate``) which thread alone
    may use it now, None for everybody, and whom to ask before it overwrites itself outside of a batch."""
    if hasattr(user_model, "training_thread"):
        user_model.training_thread = thread
    if hasattr(user_model, "training_gate"):
        user_model.training_gate = gate


def _stop_flag(user_model: Any) -> Callable[[], bool]:
    """Resets ``model.stop_training`` and answers how to read it."""
    try:
        user_model.stop_training = False
    except (
        Exception
    ):  # it has no such door for callbacks, whatever way it says so; run.stop is open all the same
        return lambda: False
    return lambda: user_model.stop_training
