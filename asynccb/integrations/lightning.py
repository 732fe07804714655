"""Our callbacks in a Lightning ``Trainer``.

::

    Trainer(max_epochs=20, callbacks=[BackgroundCallback([CSVLogger("log.csv"), RemoteMonitor(url)])])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asynccb.integrations.background import Background
from asynccb.integrations.module_state import CopiedModule
from asynccb.integrations.scalars import of_output

try:
    from lightning.pytorch.callbacks import Callback as LightningCallback
except ImportError as missing:
    raise ImportError(
        "asynccb.integrations.lightning needs Lightning: pip install 'asynccb[lightning]'"
    ) from missing

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterable, Mapping

    from asynccb.callbacks.base import Callback

__all__ = ["BackgroundCallback"]


class BackgroundCallback(LightningCallback):  # type: ignore[misc]  # Any, where Lightning is not looked into
    """A Lightning callback that runs callbacks of ours: their ``def`` hooks inside of Lightning's, the rest
    beside the training.

    Logs of an epoch and of a validation are what was logged meanwhile of ``trainer.callback_metrics``, those
    of a batch what ``training_step`` returned (its numbers). What the module logs in its own
    ``on_train_epoch_end`` is not among them: Lightning calls that behind the callbacks. Validation
    inside of ``fit`` is told, the sanity check is not, nor are ``validate``, ``test`` and ``predict``. Epochs
    count from 0. A stop that is asked for sets ``trainer.should_stop``, so ``min_epochs`` counts.

    With several processes the one of rank 0 alone runs callbacks, and a stop counts at the end of the epoch,
    in all of them.

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
        self.background = Background(callbacks, loop=loop, name=name)
        self._before_epoch: dict[str, Any] = {}
        self._before_test: dict[str, Any] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero:
            self.background.open(params=_params(trainer), model=CopiedModule(pl_module, trainer.optimizers))
        self._give_on(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.background.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.background.close(exception)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if self.background.is_open:
            self._before_epoch = dict(trainer.callback_metrics)
            self.background.on_epoch_begin(trainer.current_epoch)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.background.is_open:
            logs = _logged_since(self._before_epoch, trainer.callback_metrics)
            self.background.on_epoch_end(trainer.current_epoch, logs)
        self._give_on(trainer, together=True)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.background.is_open:
            self.background.on_train_batch_begin(batch_idx)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.background.is_open:
            self.background.on_train_batch_end(batch_idx, of_output(outputs))
        self._give_on(trainer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if self._validates(trainer):
            self._before_test = dict(trainer.callback_metrics)
            self.background.on_test_begin()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self._validates(trainer):
            self.background.on_test_end(_logged_since(self._before_test, trainer.callback_metrics))

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._validates(trainer):
            self.background.on_test_batch_begin(batch_idx)

    def on_validation_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._validates(trainer):
            self.background.on_test_batch_end(batch_idx, of_output(outputs))

    def _validates(self, trainer: Any) -> bool:
        return self.background.is_open and not trainer.sanity_checking

    def _give_on(self, trainer: Any, *, together: bool = False) -> None:
        stops = self.background.should_stop
        if trainer.world_size > 1:
            if not together:
                return
            stops = trainer.strategy.broadcast(stops)
        if stops:
            trainer.should_stop = True


def _params(trainer: Any) -> dict[str, Any]:
    steps = trainer.num_training_batches
    return {
        "epochs": trainer.max_epochs,
        "steps": int(steps) if steps != float("inf") else None,
        "verbose": 0,
    }


def _logged_since(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Lightning keeps the newest value of each metric, however old; one that was logged anew is another
    tensor."""
    return {name: value for name, value in now.items() if value is not before.get(name)}
