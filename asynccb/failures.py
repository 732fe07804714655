"""What is done about a hook that raised: it is counted, and its callback's ``on_error`` decides the rest."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from asynccb.errors import CallbackError, Failure, said

if TYPE_CHECKING:
    from collections.abc import Callable

    from asynccb.bus.delivery import HookFailure
    from asynccb.bus.dispatch import InlineFailure
    from asynccb.callbacks.history import History

__all__ = ["Failures"]

logger = logging.getLogger("asynccb")


class Failures:
    """The failures of one run. ``inline`` is called on the training thread, ``beside`` on the loop.

    Args:
        name: of the run.
        history: gets the first failure of each hook, with its count.
        fail: ends the training after the batch under way, with this error.
    """

    def __init__(self, name: str, history: History, fail: Callable[[CallbackError], None]) -> None:
        self._name = name
        self._history = history
        self._fail = fail
        self._first: dict[tuple[str, str], Failure] = {}
        self._raised: list[tuple[int, CallbackError]] = []

    @property
    def errors(self) -> list[CallbackError]:
        """What beside-hooks raised under ``on_error = "raise"``, in the order of their events."""
        return [error for _, error in sorted(self._raised, key=lambda item: item[0])]

    def inline(self, failure: InlineFailure) -> None:
        """An inline hook raised; its exception is on its way to end the training."""
        self._count(failure.subscriber.name, failure.hook, failure.epoch, failure.error)

    def beside(self, failure: HookFailure, policy: str) -> None:
        """A beside-hook raised, and ``on_error`` of its callback is ``policy``."""
        name = failure.consumer.name
        first = self._count(name, failure.hook, failure.epoch, failure.error)
        if policy == "raise":
            error = CallbackError(name, failure.hook, failure.epoch, self._history)
            error.__cause__ = failure.error
            failure.consumer.mute()
            self._raised.append((failure.seq, error))
            self._fail(error)
            return
        if policy == "disable":
            failure.consumer.mute()
        if first:
            logger.warning(
                "%s: %s.%s raised %s (on_error=%r)",
                self._name,
                name,
                failure.hook,
                said(failure.error),
                policy,
            )

    def died(self, name: str, error: BaseException) -> None:
        """The delivery of a callback ended by itself, though no hook raised."""
        fatal = CallbackError(name, "the delivery of its events", None, self._history)
        fatal.__cause__ = error
        self._raised.append((-1, fatal))
        self._fail(fatal)

    def publish(self) -> None:
        """Writes what is known into the History, which forgets when a training begins."""
        self._history.failures = list(self._first.values())

    def _count(self, name: str, hook: str, epoch: int | None, error: BaseException) -> bool:
        before = self._first.get((name, hook))
        if before is None:
            self._first[name, hook] = Failure(name, hook, epoch, error)
        else:
            self._first[name, hook] = before._replace(times=before.times + 1)
        self.publish()
        return before is None
