"""A callback whose hooks block, beside the training."""

from __future__ import annotations

import asyncio
import inspect
from typing import TYPE_CHECKING, Any

from asynccb.callbacks.base import Callback
from asynccb.callbacks.hooks import read_hooks
from asynccb.callbacks.keras_callback import KerasCallback, wrap
from asynccb.errors import ArgumentError, TornState
from asynccb.storage.serial import SerialExecutor

if TYPE_CHECKING:
    from collections.abc import Callable

    from asynccb.callbacks.base import OnError, SnapshotHandle

__all__ = ["Offload"]

_WITH_MODEL = frozenset({"on_train_begin", "on_epoch_end", "on_train_end"})
_ROOMY = 1024


class Offload(Callback):
    """Runs a callback with blocking ``def`` hooks, of this package or of Keras, on a thread of its own.

    Its hooks are called in order, one at a time, and no batch waits for them, unless so many wait that the
    mailbox is full. It gets a model of its own: one made of a snapshot that is taken, between two batches,
    where ``on_train_begin``, ``on_epoch_end`` and ``on_train_end`` are due; its other hooks see the model of
    the last of these. What it does to that model changes the training in nothing, but for
    ``model.stop_training = True``, which stops it at the next batch. The same goes for keys that it adds to
    logs: nobody else sees them.

    It costs the training a copy of the model at each end of an epoch, and, beside it, the making of a model
    (with Keras some milliseconds a layer, and a new compilation when it predicts). The thread is there while
    there is work, and a new one comes when there is some again: what belongs to one thread (a connection of
    SQLite) is opened where it is used.

    A resumed training begins the callback anew: of what goes on beside no state is kept.

    Args:
        callback: whose hooks are all ``def``.
        snapshots: False: it gets no model (``model`` is None), and nothing is copied. For models that cannot
            be copied, and for callbacks that only look at logs.
        on_error: what happens when a hook raises: ``"raise"`` (default), ``"warn"`` or ``"disable"``; see
            :class:`~asynccb.Callback`.
        mailbox_size: events that may wait; then the training waits. Default: 2, so that no more than as many
            copies wait, or 1,024 for a callback with hooks of batches.

    Raises:
        ArgumentError: no callback, or one with ``async def`` hooks, which runs beside the training anyway.
        HookRefused: as for any callback.
    """

    def __init__(
        self,
        callback: Any,
        *,
        snapshots: bool = True,
        on_error: OnError = "raise",
        mailbox_size: int | None = None,
    ) -> None:
        inner = wrap(callback)
        hooks = read_hooks(inner)
        if hooks.beside:
            raise ArgumentError("callback", callback, f"all hooks `def`; {min(hooks.beside)} is `async def`")
        self._inner = inner
        self._wrapped = callback
        self.also_serves = (callback,)
        self._snapshots = snapshots
        self._thread = SerialExecutor(f"asynccb offload {type(callback).__name__}")
        self._shown: Any = None
        self.on_error = on_error  # type: ignore[misc]  # of this one, not of its class
        batches = any("_batch_" in name for name in hooks.inline)
        self.mailbox_size = mailbox_size or (_ROOMY if batches else 2)  # type: ignore[misc]
        for name, hook in hooks.inline.items():
            setattr(self, name, self._handing_over(name, hook))

    def set_model(self, model: Any) -> None:
        if isinstance(self._inner, KerasCallback):
            self._inner.check_model(model)
        super().set_model(model)
        self._shown = None
        self._inner.run = self.run
        self._inner.validation_data = self.validation_data

    def set_params(self, params: dict[str, Any]) -> None:
        self.params = params
        self._inner.set_params(params)

    def _handing_over(self, name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        takes = self._snapshots and name in _WITH_MODEL

        def hand_over(*arguments: Any) -> Any:
            return self._later(hook, arguments, self._take() if takes else None)

        return hand_over

    def _take(self) -> SnapshotHandle | None:
        try:
            return self.snapshot()
        except TornState:  # the model raised inside a batch; the end is told all the same
            return None

    async def _later(
        self, hook: Callable[..., Any], arguments: tuple[Any, ...], snapshot: SnapshotHandle | None
    ) -> None:
        answer = await asyncio.wrap_future(self._thread.submit(self._call, hook, arguments, snapshot))
        if inspect.iscoroutine(answer):
            await answer

    def _call(
        self, hook: Callable[..., Any], arguments: tuple[Any, ...], snapshot: SnapshotHandle | None
    ) -> Any:
        if snapshot is not None:
            try:
                self._shown = snapshot.to_model()
            finally:
                snapshot.release()
            self._inner.set_model(self._shown)
        # The logs are frozen, and everybody's, by now.
        answer = hook(*(dict(part) if isinstance(part, dict) else part for part in arguments))
        run = self._inner.run
        if getattr(self._shown, "stop_training", False) and run is not None:
            run.stop(f"{type(self._wrapped).__name__} set model.stop_training")
        return answer
