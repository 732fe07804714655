"""What inline hooks leave besides changed logs: snapshots, and coroutines for the loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
from typing import TYPE_CHECKING, Any

from asynccb.errors import HookRefused

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from asynccb.training.snapshot import Snapshot

__all__ = ["HookSnapshots", "as_coroutine"]


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
        found = self.shared(callback)
        snapshot = capture(pooled=pooled) if found is None else found.another()
        if found is not None and not pooled:
            snapshot.own()
        self.taken.append((callback, snapshot))
        return snapshot

    def of(self, callback: Any) -> tuple[Snapshot, ...]:
        return tuple(snapshot for owner, snapshot in self.taken if owner is callback)

    def forget(self) -> None:
        self.taken.clear()

    def shared(self, callback: Any) -> Snapshot | None:
        """A handle on a copy that ``callback`` may share."""
        at = self._at.get(id(callback))
        for owner, snapshot in reversed(self.taken):
            owned_at = self._at.get(id(owner))
            if at is None or owned_at is None:  # wrapped into another callback
                return None
            between = self._changes[owned_at : max(at, owned_at + 1)]
            if not snapshot.released and not any(between):
                held: Snapshot = snapshot
                return held
        return None


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
