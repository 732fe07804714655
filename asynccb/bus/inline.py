"""What inline hooks leave besides changed logs: snapshots, coroutines for the loop, and a slow batch."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import warnings
from collections import deque
from time import perf_counter
from typing import TYPE_CHECKING, Any

from asynccb.errors import HookRefused
from asynccb.events import BatchBegin, BatchEnd, Logs

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from asynccb.training.snapshot import Snapshot

__all__ = ["HookSnapshots", "SlowHooks", "Timed", "as_coroutine"]

SLOW = 0.1
"""Seconds: inline hooks are looked at by the slow-callback warning where a batch with them takes longer than
this."""


class HookSnapshots:
    """The snapshots taken by the inline hooks of the event under way: one copy, and a handle for each
    callback that asks, as long as no hook between two askers may have changed the model.

    Args:
        changers: for each callback, in list order: whether its inline hooks may change the model.
    """

    def __init__(self, changers: list[tuple[Any, bool]]) -> None:
        self.taken: list[tuple[Any, Snapshot]] = []
        self._at = {id(callback): at for at, (callback, _) in enumerate(changers)}
        self._changes = [changes for _, changes in changers]

    def take(self, callback: Any, capture: Callable[..., Snapshot], *, pooled: bool = False) -> Snapshot:
        """The model as it is now, for ``callback``; ``pooled`` is for our own writers."""
        snapshot = self._shared(callback)
        if snapshot is None:
            snapshot = capture(pooled=pooled)
        elif not pooled:
            snapshot.own()
        self.taken.append((callback, snapshot))
        return snapshot

    def of(self, callback: Any) -> tuple[Snapshot, ...]:
        return tuple(snapshot for owner, snapshot in self.taken if owner is callback)

    def forget(self) -> None:
        self.taken.clear()

    def _shared(self, callback: Any) -> Snapshot | None:
        for owner, snapshot in reversed(self.taken):
            between = self._changes[self._at[id(owner)] : self._at[id(callback)]]
            if not snapshot.released and not any(between):
                other: Snapshot = snapshot.another()
                return other
        return None


class SlowHooks:
    """Warns of inline batch hooks that are slow beside the batches, as Keras does, and names the callback.

    Keras 2's rule: the median of the last ten calls is over 0.1 s and over 0.95 of a batch. Here a batch is
    the time from one end of a batch to the next, the hooks under observation left out. One look at the clock
    for each batch: the hooks themselves are timed from the first batch on that takes over 0.1 s.
    """

    def __init__(self) -> None:
        self._last = float("inf")
        self._watched: dict[str, list[Any]] = {}
        self._warned = False

    def watch(self, hook_name: str, hooks: list[Any]) -> Callable[[], None] | None:
        """Answers what to call after the hooks of a batch's end; None for the other events, whose hooks it
        times too."""
        if hook_name not in (BatchBegin.hook, BatchEnd.hook) or not hooks:
            return None
        self._watched[hook_name] = hooks
        return self._step if hook_name == BatchEnd.hook else None

    def _step(self) -> None:
        last, self._last = self._last, perf_counter()
        if self._last - last > SLOW and not self._warned:
            self._look(self._last - last)

    def _look(self, step: float) -> None:
        timed = [hook for hooks in self._watched.values() for hook in hooks if isinstance(hook, Timed)]
        if not timed:
            for hooks in self._watched.values():
                hooks[:] = [Timed(hook) for hook in hooks]
            return
        spent = sum(hook.newest for hook in timed)
        for hook in timed:
            hook.samples.append(hook.newest if spent > 0.95 * (step - spent) else 0.0)
        slowest = max(timed, key=Timed.median)
        if slowest.median() > SLOW:
            self._warned = True
            self._warn(slowest)

    def _warn(self, slowest: Timed) -> None:
        owner = type(getattr(slowest.hook, "__self__", slowest.hook)).__name__
        name = getattr(slowest.hook, "__name__", "hook")
        warnings.warn(
            f"Method {name}() of {owner} is slow compared to the batch update ({slowest.median():f} s). "
            "Check your callbacks, or make the hook `async def`: then no batch waits for it",
            UserWarning,
            stacklevel=2,
        )


class Timed:
    """An inline hook under observation."""

    __slots__ = ("hook", "newest", "samples")

    def __init__(self, hook: Callable[[int, Logs], object]) -> None:
        self.hook = hook
        self.newest = 0.0
        self.samples: deque[float] = deque(maxlen=10)

    def __call__(self, index: int, logs: Logs) -> object:
        began = perf_counter()
        try:
            return self.hook(index, logs)
        finally:
            self.newest = perf_counter() - began

    def median(self) -> float:
        """Of the last ten calls; those that are not yet there count as quick."""
        return sorted([*self.samples, *[0.0] * (10 - len(self.samples))])[5]


def as_coroutine(result: object, where: str) -> Coroutine[Any, Any, object] | None:
    """What an inline hook returned, as a coroutine for the loop; None where it is nothing to await.

    Raises:
        HookRefused: a Future or Task, which belongs to a loop and is not safe to make on another thread.
    """
    if inspect.iscoroutine(result):
        return result
    if isinstance(result, (asyncio.Future, concurrent.futures.Future)):
        raise HookRefused(
            where,
            result,
            f"a {type(result).__name__} made on the training thread is not safe to await",
            "Return the coroutine itself; the run makes the task",
        )
    if hasattr(result, "__await__"):
        return _await(result)
    return None


async def _await(awaitable: Any) -> object:
    return await awaitable
