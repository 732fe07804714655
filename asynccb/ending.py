"""How a training ends: every way out as one row of a table, and the value in which it crosses threads.

====================  ==========  ============  ============  =======================  ================
way out               open epoch  on_exception  on_train_end  drain                    ``fit``
====================  ==========  ============  ============  =======================  ================
end                   --          --            yes           no limit                 History
stop, prune           ends, no    --            yes           no limit                 History
                      validation
cancel                left open   yes           yes           grace, from the cancel   CancelledError
inline hook or model  left open   yes           yes           grace                    that exception
raises
beside-hook raises    left open   yes           yes           grace for it, no limit   CallbackError
                                                              for the others
stuck after the       left open   beside only   beside only   1 s                      as it began
grace
loop gone             left open   inline only   inline only   none                     nobody listens
====================  ==========  ============  ============  =======================  ================

What an inline hook could not be told is named in the log.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Literal, NamedTuple

from asynccb.errors import CallbackError, ModelError, said
from asynccb.training.control import Interrupt, StopKind

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Outcome", "Way", "note_all", "of_error", "of_return", "of_stop", "raisable"]

Kind = Literal["completed", "stopped", "pruned", "cancelled", "failed"]
Drain = Literal["no limit", "grace", "grace for the culprit"]


class Way(NamedTuple):
    """One row of the table, as far as it is not the loop's own doing."""

    exception_hook: bool
    drain: Drain


WAYS = {
    "completed": Way(exception_hook=False, drain="no limit"),
    "stopped": Way(exception_hook=False, drain="no limit"),
    "pruned": Way(exception_hook=False, drain="no limit"),
    "cancelled": Way(exception_hook=True, drain="grace"),
    "failed": Way(exception_hook=True, drain="grace"),
    "failed beside": Way(exception_hook=True, drain="grace for the culprit"),
}


class Outcome(NamedTuple):
    """How a training ended. A value: it is raised in the frame of whoever awaits, never set on a task or a
    future.

    Attributes:
        kind: ``"completed"``, ``"stopped"``, ``"pruned"``, ``"cancelled"`` or ``"failed"``.
        reason: in words; ``""`` when it simply completed.
        exception: what ``fit`` raises, or None.
        traceback: of the exception, as it was when it left the training thread.
        way: the row of the table.
    """

    kind: Kind
    reason: str
    exception: BaseException | None
    traceback: TracebackType | None
    way: Way

    def with_closing_errors(self, errors: list[BaseException]) -> Outcome:
        """The same, after closing hooks raised ``errors``: the first becomes the exception where there was
        none."""
        if self.kind in ("failed", "cancelled") or not errors:
            note_all(self.exception, errors)
            return self
        first = raisable(errors[0])
        note_all(first, errors[1:])
        return self._replace(
            kind="failed", reason=said(errors[0]), exception=first, traceback=first.__traceback__
        )

    def with_beside_errors(self, errors: list[CallbackError]) -> Outcome:
        """The same, with the first error in event order as its exception. A cancelled training stays
        cancelled."""
        note_all(errors[0], list(errors[1:]))
        if self.kind == "cancelled":
            return self
        return self._replace(kind="failed", reason=str(errors[0]), exception=errors[0], traceback=None)

    def raise_exception(self) -> None:
        """Raises the exception, if any, with its original traceback: raised many times, it does not grow."""
        if self.exception is not None:
            raise self.exception.with_traceback(self.traceback)


def note_all(exception: BaseException | None, others: list[BaseException]) -> None:
    """Adds errors that came beside ``exception`` to it as notes, where it takes notes: one that is frozen (a
    frozen dataclass) goes without."""
    if exception is not None:
        for other in others:
            with contextlib.suppress(Exception):
                exception.add_note(f"Also: {said(other)}")


def of_return(whole: bool, stop_reason: str | None, kind: StopKind = "stopped") -> Outcome:
    """The loop returned: every epoch was trained to its end, or a stop or the end of the data came first."""
    if whole:
        return Outcome("completed", "", None, None, WAYS["completed"])
    return of_stop(kind, stop_reason or "the data ran out")


def of_stop(kind: StopKind, reason: str) -> Outcome:
    """Somebody has asked for the end."""
    return Outcome(kind, reason, None, None, WAYS[kind])


def of_error(error: BaseException) -> Outcome:
    """Something left the loop as an exception."""
    if isinstance(error, Interrupt):
        return _of_interrupt(error)
    exception = raisable(error)
    return Outcome("failed", said(error), exception, exception.__traceback__, WAYS["failed"])


def raisable(error: BaseException) -> BaseException:
    """``error`` as ``await`` can raise it: itself, but for the three that mean something to ``await``."""
    if not isinstance(error, (StopIteration, GeneratorExit, asyncio.CancelledError)):
        return error
    wrapped = ModelError(f"the training raised {said(error)}")
    wrapped.__cause__ = error
    return wrapped


def _of_interrupt(interrupt: Interrupt) -> Outcome:
    if interrupt.cause == "failed":
        error = interrupt.error
        return Outcome("failed", interrupt.reason, error, None, WAYS["failed beside"])
    return Outcome("cancelled", interrupt.reason, None, None, WAYS["cancelled"])
