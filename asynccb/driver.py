"""What runs on the training thread around the loop: opens it, hosts it, closes it, and turns every way out
into a value."""

from __future__ import annotations

import threading
from operator import methodcaller
from typing import TYPE_CHECKING, Any

from asynccb.ending import Outcome, of_error, of_return
from asynccb.errors import RunCancelled, TornState
from asynccb.events import ExceptionRaised, Logs
from asynccb.training.control import FLAGGED, TORN, Interrupt
from asynccb.training.snapshot import Snapshot
from asynccb.unit import Units

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from asynccb.bus.dispatch import Dispatcher
    from asynccb.bus.dispatch import Emit as HookTable
    from asynccb.protocols import Batch, Gate, Model, Place, Share, Source
    from asynccb.resume import Resume
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
        resume: finds a backup and puts everything back; None where the program is no training.
        dispatcher: runs inline hooks and fills mailboxes.
        control: requests from the loop.
        snapshots: makes the copies of the model.
        phases: the run's stopwatch.
        join: the thread's share of what all trainings of the process compute with.
        equip: gives each callback its run, params and data; called on the thread.
        fixed: told the outcome as soon as the loop is left, before the closing hooks.
        left: told the final outcome as the last thing.
    """

    def __init__(
        self,
        model: Model,
        program: Program,
        resume: Resume | None,
        dispatcher: Dispatcher,
        control: Control,
        snapshots: Snapshots,
        phases: Phases,
        *,
        join: Callable[[], Share],
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
        self._resume = resume
        self._place: Place | None = None
        self._counted = 0  # `step` when the training came to that place
        self._dispatcher = dispatcher
        self._control = control
        self._phases = phases
        self._join = join
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
        self._units = None
        if resume is not None:
            self._units = Units(dispatcher, self._capture_for_unit, self._describe, control.limits.unit)
            control.cut = self._cut

    # The host -----------------------------------------------------------------------------------------------

    def let_go(self) -> None:
        """Of what leads back here; the thread has said its last word."""
        self._control.capture, self._control.cut = None, lambda: None
        self._units = None
        del self.emit

    def _use(self, table: HookTable) -> None:
        self.emit = table

    def broke_inside(self) -> None:
        self._control.torn = True

    def enter(self, place: Place | None, *, last: bool = False) -> None:
        self._place, self._counted = place, self.step
        self._cut(last=last)

    def _cut(self, *, last: bool = False) -> None:
        place = self._place
        if place is None or self._units is None:
            return
        if place.phase == "batches":
            place = place._replace(batch=place.batch + self.step - self._counted)
        self._units.cut(place, self.step, last=last)

    def _describe(self) -> dict[str, Any]:
        assert self._resume is not None
        # A stop from within belongs to the training: an uninterrupted one would stop here too. One from
        # outside (run.stop, stop_after) does not.
        stop = (self._control.stop_reason or FLAGGED) if self._control.flagged() else None
        return self._resume.describe() | {"stop": stop}

    # The thread ---------------------------------------------------------------------------------------------

    def __call__(self) -> None:
        """The body of the thread. Raises nothing: the outcome is a value."""
        self.finish(self.open() or self._tell())

    def open(self) -> Outcome | None:
        """All that comes before the loop; answers the outcome where it did not come so far. Raises
        nothing."""
        self.ident = threading.get_ident()
        self._phases.enter("opening")
        try:
            # Before anything is computed: results depend on the number of threads that it settles.
            self._control.take_turns(self._join())
            mark_training(self._model.user_model, self.ident, self.snapshots.gate)
            self._prepare()
        except BaseException as error:
            return self._of_error(error)
        return None

    @property
    def stop_asked(self) -> bool:
        """Whether the training is to end. Legal on any thread."""
        return self._control.stop_reason is not None or self._control.flagged()

    def ended(self) -> Outcome:
        """The outcome of a loop that is not ours and has ended by itself."""
        try:
            return of_return(not self.stopped(), self._control.stop_reason, self._control.stop_kind)
        except Interrupt as interrupt:
            return of_error(interrupt)

    def finish(self, outcome: Outcome) -> None:
        """All that comes behind the loop, on the thread that opened it. Raises nothing."""
        try:
            outcome = self._finish(outcome)
        except BaseException as error:  # around the story, not in it: else nobody would hear of the end
            self._control.leave()
            outcome = of_error(error)
        finally:
            self._control.share.leave()
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
            raise TornState(TORN)
        return self.snapshots.take(self.step, self.epoch, pooled=pooled)

    def _capture_for_unit(self) -> Snapshot:
        plain = getattr(self._model, "plain_state", None)
        if plain is None:
            return self.capture(pooled=True)
        return Snapshot(plain(), self.step, self.epoch)

    def _finish(self, outcome: Outcome) -> Outcome:
        self.outcome = outcome
        if self._resume is not None:
            self._resume.leave(self._dispatcher.subscribers)
        history = self._fixed(outcome)
        outcome = self._close(outcome, history)
        self._control.leave()
        self.snapshots.close()
        mark_training(self._model.user_model, None)
        return outcome

    def _prepare(self) -> None:
        params = self._program.prepare(self._model)
        if self._resume is not None and (resumed := self._resume.begin()) is not None:
            self.step, self.epoch = resumed.step, resumed.epoch
        self._equip(params)
        self._dispatcher.begin(self._program.opening, self.step)
        self._dispatcher.wait_begun()
        if self._resume is not None:
            self._begin_or_go_on(self._resume)
        self._phases.enter("batches")

    def _tell(self) -> Outcome:
        try:
            whole = self._program.tell(self._model, self)
            return of_return(whole, self._control.stop_reason, self._control.stop_kind)
        except BaseException as error:
            return self._of_error(error)

    def _of_error(self, error: BaseException) -> Outcome:
        return of_error(self._cut_at_cancel(error) if isinstance(error, Interrupt) else error)

    def _begin_or_go_on(self, resume: Resume) -> None:
        if resume.resumed is None:
            # Rows and records that are written before the first backup would be there twice after a crash.
            self.enter(resume.start)
            self._dispatcher.wait_begun()
        elif (reason := resume.end(self._dispatcher.subscribers)) is not None:
            # The flag too, as hooks saw it: the backup that is made where this ends says so again.
            self._model.user_model.stop_training = True
            self._control.stop(reason)

    def _cut_at_cancel(self, interrupt: Interrupt) -> BaseException:
        """The last unit of a cancelled training. Answers why it ended, which is something else if that fails
        otherwise than by the cancel."""
        if interrupt.cause != "cancelled" or not self._control.between or self._control.torn:
            return interrupt
        try:
            self._cut(last=True)
        except Interrupt:  # no room for a copy: the backup before this one stands
            return interrupt
        except BaseException as error:
            return error
        return interrupt

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
