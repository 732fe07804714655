"""Our callbacks in a transformers ``Trainer``.

::

    Trainer(model, args, train_dataset=data, callbacks=[BackgroundCallback([CSVLogger("log.csv")])])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asynccb.integrations.background import Background, ClosesWithBlock
from asynccb.integrations.module_state import CopiedModule

try:
    from transformers import TrainerCallback
except ImportError as missing:
    raise ImportError(
        "asynccb.integrations.transformers needs transformers: pip install 'asynccb[transformers]'"
    ) from missing

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterable, Mapping

    from asynccb.callbacks.base import Callback

__all__ = ["BackgroundCallback"]


class BackgroundCallback(ClosesWithBlock, TrainerCallback):  # type: ignore[misc]  # Any, not looked into
    """A TrainerCallback that runs callbacks of ours: their ``def`` hooks inside of the Trainer's, the rest
    beside the training.

    Logs are what the Trainer logs, by its names (``loss``, ``grad_norm``, ``learning_rate``, ``eval_loss``).
    A batch is an optimizer step; it has logs where the Trainer logs behind it (``logging_steps``). An epoch
    has the newest logs and metrics of its time; its end is told when these are there, behind the
    evaluation where one follows (of several ``eval_dataset``, for the first epoch: when the next one begins,
    so that a stop in it comes a step late). Epochs count from 0. A stop that is asked for sets
    ``control.should_training_stop``.

    The Trainer tells no callback that ``train`` has failed. Where that may happen, write ``with
    BackgroundCallback([...]) as callback:`` around it: the exception goes to ``on_exception``, and everything
    is closed. Without, it is closed by the next ``train`` or when the interpreter ends, as cancelled.

    With several processes the first one alone runs callbacks. It cannot stop the others: there a stop that is
    asked for changes nothing.

    Args:
        callbacks: as of :class:`~asynccb.integrations.Background`.
        loop: the running event loop of another thread, where ``train`` is called in ``asyncio.to_thread``;
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
        self.background = Background(callbacks, loop=loop, name=name)
        self._logs: dict[str, Any] = {}
        self._epoch: int | None = None
        self._batch = 0
        self._ended_batch: int | None = None
        self._ended_epoch: int | None = None
        self._awaits_evaluation = False
        self._evaluated: set[str] = set()
        self._evaluations: set[str] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        self._ended_batch = self._ended_epoch = self._epoch = None
        self._logs = {}
        self._evaluated = set()
        if state.is_world_process_zero:
            optimizers = [parts["optimizer"]] if parts.get("optimizer") is not None else []
            self.background.open(
                params=_params(args, state, parts), model=CopiedModule(parts["model"], optimizers)
            )
        self._give_on(args, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        self._flush()
        self.background.close()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        self._flush()
        self._batch = 0
        self._logs = {}
        # Counted: of data without a length the Trainer tells fractions of `max_steps`.
        self._epoch = int(state.epoch or 0) if self._epoch is None else self._epoch + 1
        if self.background.is_open:
            self.background.on_epoch_begin(self._epoch)
        self._give_on(args, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        self._flush()
        self._ended_epoch = self._epoch
        self._awaits_evaluation = control.should_evaluate
        if not (control.should_evaluate or control.should_log):
            self._flush()
        self._give_on(args, control)

    def on_step_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        self._flush()
        if self.background.is_open:
            self.background.on_train_batch_begin(self._batch)

    def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        self._ended_batch, self._batch = self._batch, self._batch + 1
        if not control.should_log:
            self._flush()
        self._give_on(args, control)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **parts: Any) -> None:
        told = _named(logs)
        self._logs |= told
        self._end_batch(told)
        if not self._awaits_evaluation:
            self._flush()
        self._give_on(args, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **parts: Any) -> None:
        self._end_batch({})
        if self.background.is_open:
            self.background.on_test_begin()
            self.background.on_test_end(_named(metrics))
            self._logs |= _named(metrics)
        self._evaluated |= {name for name in metrics or () if name.endswith("_runtime")}
        # Several data sets are told one by one, and how many there are when the first epoch has gone by.
        if "eval_runtime" in self._evaluated or self._evaluated == self._evaluations:
            self._flush()
        self._give_on(args, control)

    def on_save(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        self._flush()
        self._give_on(args, control)

    def _flush(self) -> None:
        """Tells the end of a batch and of an epoch that have waited for their logs, whether they came or
        not."""
        self._end_batch({})
        if self._evaluated:
            self._evaluations, self._evaluated = self._evaluated, set()
        epoch, self._ended_epoch, self._awaits_evaluation = self._ended_epoch, None, False
        if epoch is not None and self.background.is_open:
            self.background.on_epoch_end(epoch, self._logs)

    def _end_batch(self, logs: dict[str, Any]) -> None:
        batch, self._ended_batch = self._ended_batch, None
        if batch is not None and self.background.is_open:
            self.background.on_train_batch_end(batch, logs)

    def _give_on(self, args: Any, control: Any) -> None:
        if self.background.should_stop and args.world_size == 1:
            control.should_training_stop = True


def _named(logs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Without the Trainer's own count of epochs, which has the name of ours and another meaning."""
    return {name: value for name, value in (logs or {}).items() if name != "epoch"}


def _params(args: Any, state: Any, parts: Mapping[str, Any]) -> dict[str, Any]:
    try:
        steps = max(1, -(-len(parts["train_dataloader"]) // args.gradient_accumulation_steps))
        epochs = state.num_train_epochs
    except (TypeError, KeyError):  # data without a length: the Trainer has a number that stands for none
        steps = epochs = None
    return {"epochs": epochs, "steps": steps, "verbose": 0}
