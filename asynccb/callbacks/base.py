"""The base class of all callbacks: hooks that do nothing, and what a callback may ask of its run.

Three kinds of hook, told apart once, when a training starts:

``def``
    runs inline, on the training thread, between two batches. It may change the model, stop the training, and
    add keys to ``logs``. The batches wait for it, so it must be short.
``async def``
    runs beside the training, on the event loop, in order, one at a time for each callback. No batch ever
    waits for it.
``def`` that returns a coroutine
    does both: it decides and captures inline (a path, "is it the best", ``self.snapshot()``), and hands the
    slow half to the event loop, which runs it in this callback's order::

        def on_epoch_end(self, epoch, logs=None):
            return self._later(epoch, self.snapshot())

        async def _later(self, epoch, snapshot): ...
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from asynccb.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

    import numpy as np

    from asynccb.protocols import QueueStatistics

__all__ = ["Callback"]

_ASKED_BY = {"on_init_end": "transformers", "state_key": "lightning"}
"""What other libraries ask their own callbacks for, before they train."""

Overflow = Literal["wait", "drop_oldest", "latest"]
OnError = Literal["raise", "warn", "disable"]


class SnapshotHandle(Protocol):
    """What :meth:`Callback.snapshot` answers; see :class:`asynccb.Snapshot`."""

    step: int
    epoch: int

    @property
    def alone(self) -> bool: ...

    @property
    def arrays(self) -> Mapping[str, np.ndarray[Any, Any]]: ...

    def save(self, path: str | PathLike[str], *, weights_only: bool = False) -> None: ...

    def to_model(self) -> Any: ...

    def release(self) -> None: ...


class RunHandle(Protocol):
    """What a callback may ask of the run that it serves; see :class:`asynccb.Run`."""

    name: str

    @property
    def resumed(self) -> Any: ...

    @property
    def history(self) -> Any: ...

    def stop(self, reason: str = "stopped") -> None: ...

    def prune(self, reason: str = "pruned") -> None: ...

    def snapshot_now(self, callback: Callback, *, pooled: bool = False) -> SnapshotHandle: ...

    def expect_copies(self) -> None: ...

    def check_path(self, path: str, *, weights_only: bool) -> None: ...

    def room_for_copy(self, callback: Callback) -> bool: ...

    def announce_saved(self, path: str, epoch: int) -> None: ...

    def want_unit(self) -> None: ...

    def direction(self, metric: str) -> str | None: ...


class Callback:
    """Base class of callbacks, with Keras' hooks and attributes.

    Override any of the hooks below; all overridden hooks of one class are either ``def`` or ``async def``
    (``set_model``, ``set_params`` and ``on_train_begin`` apart). A subclass need not call
    ``super().__init__()``. One instance serves one training at a time.

    Attributes:
        model: the model in training. Change it in inline hooks only; beside-hooks use :meth:`snapshot`.
        params: dict with ``epochs``, ``steps``, ``verbose``, ``do_validation``, ``metrics`` and, for array
            data, ``batch_size`` and ``samples``.
        validation_data: what ``fit`` validates on, or None.
        run: the :class:`~asynccb.Run` that this callback serves: ``run.stop(reason)``, ``run.name``, ...
        lockstep: True: the training waits until the awaitable of each hook is done. Default False.
        overflow: what happens when ``mailbox_size`` events (1,024) wait for this callback: ``"wait"``
            (default: the training waits, nothing is lost), ``"drop_oldest"``, or ``"latest"`` (only the
            newest event of each hook is kept). Every drop is counted in ``run.stats``.
        on_error: what happens when a beside-hook raises: ``"raise"`` (default: the training stops at the next
            batch and ``fit`` raises :class:`~asynccb.CallbackError`), ``"warn"``, or ``"disable"`` (the
            callback gets nothing more but ``on_exception`` and ``on_train_end``). An inline hook that raises
            always fails the training with that very exception.
        changes_model: whether inline hooks may change the model's weights. Default True: callbacks before and
            behind it do not share one copy of the model, and, with models that do not look after that
            themselves (``Sequential`` does), a copy that is being made beside the training is completed
            before such a hook runs. Set it False in a class whose hooks only look: then copies cost the
            training less. It holds for the hooks of the class that sets it, and not for those that a subclass
            overrides.
        told_apart_by: names of attributes that tell an instance from another one of its class, such as
            ``("filename",)``: a resumed training gives each its own state by them, and by the order in the
            list where they are equal. Default: by the order alone.
    """

    lockstep: ClassVar[bool] = False
    overflow: ClassVar[Overflow] = "wait"
    on_error: ClassVar[OnError] = "raise"
    changes_model: ClassVar[bool] = True
    mailbox_size: ClassVar[int] = 1024
    told_apart_by: ClassVar[tuple[str, ...]] = ()

    model: Any = None
    params: dict[str, Any] | None = None
    validation_data: Any = None
    run: Any = None

    def set_model(self, model: Any) -> None:
        """Called once, inline, before ``set_params`` and ``on_train_begin``.

        Raises:
            ArgumentError: by Keras' own ``fit``, which would never run what hooks return as coroutines.
        """
        if self.run is None and any(k.__module__.partition(".")[0] == "keras" for k in type(model).__mro__):
            raise ArgumentError(
                "callbacks",
                self,
                "callbacks of Keras, in Keras' own fit",
                "Write callbacks=[asynccb.integrations.keras.BackgroundCallback([...])]",
            )
        self.model = model

    if not TYPE_CHECKING:  # or every attribute would be there in the eyes of a type checker

        def __getattr__(self, name: str) -> Any:
            found = f"{type(self).__name__!r} object has no attribute {name!r}"
            if name in _ASKED_BY:
                room = f"asynccb.integrations.{_ASKED_BY[name]}"
                found += f": callbacks of asynccb go in there by callbacks=[{room}.BackgroundCallback([...])]"
            raise AttributeError(found, name=name, obj=self)

    def set_params(self, params: dict[str, Any]) -> None:
        """Called once, inline, after ``set_model``."""
        self.params = params

    def snapshot(self) -> SnapshotHandle:
        """A consistent copy of the model at this very moment. Legal in inline hooks only.

        Callbacks share one copy of an event, as far as no hook between them may have changed the model
        (``changes_model``). A large one is made beside the next batch, whose update
        waits for it; the coroutine that the hook returns begins when it is made.

        Raises:
            RuntimeError: called outside of an inline hook; use ``await self.run.snapshot()`` there.
        """
        return self._snapshot(pooled=False)

    def _snapshot(self, *, pooled: bool) -> SnapshotHandle:
        """``pooled``: for the writers of this package, which release it and then touch its arrays no more."""
        if self.run is None:
            raise RuntimeError(
                f"{type(self).__name__} serves no run: snapshot() is legal in inline hooks only"
            )
        snapshot: SnapshotHandle = self.run.snapshot_now(self, pooled=pooled)
        return snapshot

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training must know of this callback. Default: nothing.

        Plain data: None, bool, int, float, str, numpy arrays and scalars of bools, integers or floats, lists,
        and dicts with keys of type str. It is copied at once, so live arrays may be answered (one that is
        read-only and owns its memory is taken as it is).

        A callback whose hooks are ``def`` is asked on the training thread, between two batches; what its
        hooks returned as coroutines may still have to run, and must not change what is answered here. One
        whose hooks are ``async def`` is asked on the event loop, in its own order, when it has handled every
        event up to that moment. ``on_checkpoint_saved`` is called on the event loop in any case: where other
        hooks are ``def``, what it changes does not belong in here.

        The moment lies behind a batch, before a validation, before the end of an epoch, or between two
        epochs.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what :meth:`state_dict` answered, in a training that goes on where another one was.

        Called on the training thread, before its first batch, after ``on_train_begin`` and its coroutines. A
        training that goes on in the middle of an epoch does **not** call ``on_epoch_begin`` for it: what a
        callback keeps from hook to hook belongs into its state.
        """

    async def sync(self) -> None:
        """What this callback has handled so far is durable when this returns. Default: nothing to do.

        Awaited on the event loop, in the callback's own order. A class that overrides it says that it writes
        files or rows: what a training is resumed from becomes valid only after it.
        """

    def queue_statistics(self) -> dict[str, QueueStatistics]:
        """What waits inside of this callback, beyond its mailbox, by a name for it; shown in
        ``run.stats.queues``. Called on any thread."""
        return {}

    # The hooks. Each may be overridden by a `def` or an `async def`, hence the wide return type.

    def on_train_begin(self, logs: Any = None) -> Hooked:
        """Before the first batch; the training waits for what it returns."""

    def on_train_end(self, logs: Any = None) -> Hooked:
        """The last hook, on every way out of a training."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> Hooked:
        """``epoch`` is 0-based."""

    def on_epoch_end(self, epoch: int, logs: Any = None) -> Hooked:
        """``logs``: means of the epoch, ``val_*`` included where it was validated."""

    def on_batch_begin(self, batch: int, logs: Any = None) -> Hooked:
        """Called for training batches unless ``on_train_batch_begin`` is overridden too."""

    def on_batch_end(self, batch: int, logs: Any = None) -> Hooked:
        """Called for training batches unless ``on_train_batch_end`` is overridden too."""

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> Hooked:
        """``logs``: ``batch`` and ``size``."""

    def on_train_batch_end(self, batch: int, logs: Any = None) -> Hooked:
        """``logs``: ``batch``, ``size``, ``loss`` and the metrics of this batch."""

    def on_test_begin(self, logs: Any = None) -> Hooked:
        """An evaluation starts, inside a training or on its own."""

    def on_test_end(self, logs: Any = None) -> Hooked:
        """``logs``: the means of the evaluation."""

    def on_test_batch_begin(self, batch: int, logs: Any = None) -> Hooked: ...

    def on_test_batch_end(self, batch: int, logs: Any = None) -> Hooked: ...

    def on_predict_begin(self, logs: Any = None) -> Hooked: ...

    def on_predict_end(self, logs: Any = None) -> Hooked: ...

    def on_predict_batch_begin(self, batch: int, logs: Any = None) -> Hooked: ...

    def on_predict_batch_end(self, batch: int, logs: Any = None) -> Hooked:
        """``logs["outputs"]``: the predictions of this batch."""

    def on_exception(self, exception: BaseException) -> Hooked:
        """The training fails or was cancelled; called before ``on_train_end``."""

    def on_checkpoint_saved(self, path: str, epoch: int) -> Hooked:
        """A file has become durable. Always called on the event loop, a ``def`` too."""


Hooked = Any  # None, a coroutine, or anything that is not awaitable (ignored, as in Keras)
"""What a hook may return."""
