"""Our callbacks in Keras' own ``fit``.

::

    model.fit(x, y, epochs=20, callbacks=[BackgroundCallback([CSVLogger("log.csv"), RemoteMonitor(url)])])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asynccb.errors import said
from asynccb.integrations.background import Background, ClosesWithBlock
from asynccb.models.adapt import adapt

try:
    import keras
except ImportError as missing:
    raise ImportError("asynccb.integrations.keras needs Keras: pip install 'asynccb[keras]'") from missing

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterable

    from asynccb.callbacks.base import Callback
    from asynccb.protocols import Model, ModelState

__all__ = ["BackgroundCallback"]


class BackgroundCallback(ClosesWithBlock, keras.callbacks.Callback):  # type: ignore[misc]  # Any, not looked into
    """A Keras callback that runs callbacks of ours: their ``def`` hooks inside of Keras' hooks, the rest
    beside the training.

    Logs are those that Keras gives (running means, for batches). A stop that is asked for
    (``model.stop_training``, ``run.stop``) ends ``fit`` as Keras' own callbacks do. Keys that hooks of ours
    add to the logs are seen by ours alone. An instance serves one ``fit`` after the other; in ``evaluate``
    and ``predict`` outside of a ``fit`` it does nothing.

    Keras tells no callback that ``fit`` has failed. Where that may happen, write ``with
    BackgroundCallback([...]) as callback: model.fit(..., callbacks=[callback])``: the exception goes to
    ``on_exception``, and everything is closed. Without, it is closed by the next ``fit`` or when the
    interpreter ends, as cancelled.

    Args:
        callbacks: as of :class:`~asynccb.integrations.Background`.
        loop: the running event loop of another thread, where ``fit`` is called in ``asyncio.to_thread``;
            None: a private one.
        name: of the run.

    Attributes:
        background: the :class:`~asynccb.integrations.Background`, with ``run`` and ``history``.
    """

    def __init__(
        self,
        callbacks: Callback | Iterable[Callback],
        *,
        loop: asyncio.AbstractEventLoop | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        self.background: Background = _Background(callbacks, loop=loop, name=name)
        self._stops = False

    def on_train_begin(self, logs: Any = None) -> None:
        # The bar is Keras' affair.
        asked = self.model.stop_training  # by a callback before this one; a run resets the flag
        self.background.open(params={**(self.params or {}), "verbose": 0}, model=_Copied(self))
        self._stops = asked
        self._give_on()

    def on_train_end(self, logs: Any = None) -> None:
        self.background.close()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.background.on_epoch_begin(epoch, logs)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.background.on_epoch_end(epoch, logs)
        self._give_on()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.background.on_train_batch_begin(batch, logs)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.background.on_train_batch_end(batch, logs)
        self._give_on()

    def on_test_begin(self, logs: Any = None) -> None:
        if self.background.is_open:
            self.background.on_test_begin(logs)

    def on_test_end(self, logs: Any = None) -> None:
        if self.background.is_open:
            self.background.on_test_end(logs)

    def on_test_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self.background.is_open:
            self.background.on_test_batch_begin(batch, logs)

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.background.is_open:
            self.background.on_test_batch_end(batch, logs)

    def _give_on(self) -> None:
        if self._stops or self.background.should_stop:
            self._model.stop_training = True  # not `model`: with JAX to ask for it costs a step's speed


class _Background(Background):
    def _to_raise(self, error: BaseException) -> BaseException:
        # Keras cuts the cause off whatever leaves `fit`; it stays as a note.
        if error.__cause__ is not None and not hasattr(error, "__notes__"):
            error.add_note(said(error.__cause__))
        return error


class _Copied:
    """Copies a model in Keras' own training.

    Attributes:
        user_model: what callbacks of ours see as ``self.model``. With JAX it has no weights in the middle of
            an epoch, until ``jax_state_sync()``.
    """

    def __init__(self, callback: BackgroundCallback) -> None:
        self._callback = callback
        self.user_model = callback.model
        self._adapted: Model | None = None

    def capture(self) -> ModelState:
        # Asked for in this way, Keras brings the weights that JAX has elsewhere back into the model.
        self.user_model = self._callback.model
        if self._adapted is None:
            self._adapted = adapt(self.user_model)
        return self._adapted.capture()
