"""What the dispatcher deals with: one callback as the bus sees it, one version of the hook table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from asynccb.events import (
    BatchBegin,
    BatchEnd,
    PredictBatchBegin,
    PredictBatchEnd,
    TestBatchBegin,
    TestBatchEnd,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from asynccb.bus.mailbox import Mailbox

__all__ = ["BATCH_KINDS", "Emit", "Emitter", "InlineFailure", "Subscriber"]

Emitter = Any  # a function of the event's fields without their number, or None where nobody wants the event

BATCH_KINDS: dict[str, Any] = {
    "batch_begin": BatchBegin,
    "batch_end": BatchEnd,
    "test_batch_begin": TestBatchBegin,
    "test_batch_end": TestBatchEnd,
    "predict_batch_begin": PredictBatchBegin,
    "predict_batch_end": PredictBatchEnd,
}


class Subscriber:
    """One callback as the bus sees it."""

    def __init__(
        self,
        name: str,
        callback: Any,
        inline: dict[str, Callable[..., Any]],
        beside: dict[str, Callable[..., Any]],
        mailbox: Mailbox,
        *,
        lockstep: bool,
        changes_model: bool = True,
        model_asks: bool = False,
    ) -> None:
        self.name = name
        self.callback = callback
        self.inline = inline
        self.beside = beside
        self.mailbox = mailbox
        self.lockstep = lockstep
        self.changes_model = changes_model and bool(inline)
        # Whether a copy under way must be completed before its hooks: they may write past the gate.
        self.past_the_gate = self.changes_model and not model_asks
        self.begun = False
        self.muted = False
        self.closing_hooks: set[str] = set()
        """The closing hooks that were called inline."""


class Emit(NamedTuple):
    """One version of the hook table."""

    logs: type[dict[str, Any]]
    late: bool
    epoch_begin: Emitter
    epoch_end: Emitter
    batch_begin: Emitter
    batch_end: Emitter
    test_begin: Emitter
    test_end: Emitter
    test_batch_begin: Emitter
    test_batch_end: Emitter
    predict_batch_begin: Emitter
    predict_batch_end: Emitter


class InlineFailure(NamedTuple):
    """An inline hook raised; told to ``failed`` before the exception goes on."""

    subscriber: Subscriber
    hook: str
    seq: int
    epoch: int | None
    error: BaseException
