"""Our callbacks on an Ignite ``Engine``.

::

    background = BackgroundHandlers([CSVLogger("log.csv"), RemoteMonitor(url)], model=net)
    background.attach(trainer, evaluator)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asynccb.integrations.background import Background
from asynccb.integrations.module_state import CopiedModule
from asynccb.integrations.scalars import of_output, scalars

try:
    from ignite.engine import Events
except ImportError as missing:
    raise ImportError("asynccb.integrations.ignite needs Ignite: pip install 'asynccb[ignite]'") from missing

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable, Mapping

    from asynccb.callbacks.base import Callback

__all__ = ["BackgroundHandlers"]


class BackgroundHandlers:
    """Handlers that run callbacks of ours: their ``def`` hooks inside of the engine's, the rest beside it.

    Logs of a batch are the engine's output, those of an epoch ``trainer.state.metrics`` and, named ``val_*``,
    the metrics of an evaluator that ran since the epoch began; so attach them behind the handler that runs
    it. Epochs count from 0. A stop that is asked for terminates the trainer behind the iteration.

    An exception of the engine goes to ``on_exception``, and then to whoever else listens to
    ``EXCEPTION_RAISED``, which in Ignite decides what becomes of it: a trainer that goes on is told of no
    more. Where nobody does, it is raised.

    Args:
        callbacks: as of :class:`~asynccb.integrations.Background`.
        model: the module that is trained, for snapshots and checkpoints.
        optimizer: its state is copied with the model.
        output: makes the logs of a batch out of ``engine.state.output``; None: a number is the ``loss``, a
            dict gives its numbers, anything else nothing.
        loop: the running event loop of another thread, where the engine runs in ``asyncio.to_thread``; None:
            a private one.
        name: of the run.

    Attributes:
        background: the :class:`~asynccb.integrations.Background`, with ``run`` and ``history``.
    """

    def __init__(
        self,
        callbacks: Callback | Iterable[Callback],
        *,
        model: Any = None,
        optimizer: Any = None,
        output: Callable[[Any], Mapping[str, Any]] | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
        name: str | None = None,
    ) -> None:
        optimizers = [] if optimizer is None else [optimizer]
        copied = None if model is None else CopiedModule(model, optimizers)
        self.background = Background(callbacks, model=copied, loop=loop, name=name)
        self._output = of_output if output is None else output
        self._validated: dict[str, Any] = {}
        self._batch = 0

    def attach(self, trainer: Any, evaluator: Any = None) -> None:
        """Adds the handlers.

        Args:
            trainer: the engine that trains.
            evaluator: one that validates meanwhile.
        """
        trainer.add_event_handler(Events.STARTED, self._start)
        self._listen(
            trainer,
            {
                Events.EPOCH_STARTED: self._start_epoch,
                Events.ITERATION_STARTED: self._start_batch,
                Events.ITERATION_COMPLETED: self._end_batch,
                Events.EPOCH_COMPLETED: self._end_epoch,
                Events.TERMINATE: self._end,  # which need not be followed by the next
                Events.COMPLETED: self._end,
            },
        )
        trainer.add_event_handler(Events.EXCEPTION_RAISED, self._fail)
        # Before those that raise: else this one would never be called.
        handlers = trainer._event_handlers[Events.EXCEPTION_RAISED]
        handlers.insert(0, handlers.pop())
        if evaluator is not None:
            self._listen(
                evaluator,
                {
                    Events.STARTED: self._start_test,
                    Events.ITERATION_STARTED: self._start_test_batch,
                    Events.ITERATION_COMPLETED: self._end_test_batch,
                    Events.COMPLETED: self._end_test,
                },
            )

    def _listen(self, engine: Any, hooks: Mapping[Any, Callable[[Any], None]]) -> None:
        """An evaluator runs without a trainer too, and a trainer goes on where somebody swallows what has
        failed: then nothing is told."""

        def while_open(hook: Callable[[Any], None]) -> Callable[[Any], None]:
            return lambda engine: hook(engine) if self.background.is_open else None

        for event, hook in hooks.items():
            engine.add_event_handler(event, while_open(hook))

    def _start(self, engine: Any) -> None:
        state = engine.state
        self.background.open(params={"epochs": state.max_epochs, "steps": state.epoch_length, "verbose": 0})
        self._give_on(engine)

    def _start_epoch(self, engine: Any) -> None:
        self._validated = {}
        self._batch = 0
        self.background.on_epoch_begin(engine.state.epoch - 1)

    def _start_batch(self, engine: Any) -> None:
        self.background.on_train_batch_begin(self._batch)

    def _end_batch(self, engine: Any) -> None:
        batch, self._batch = self._batch, self._batch + 1
        self.background.on_train_batch_end(batch, self._output(engine.state.output))
        self._give_on(engine)

    def _end_epoch(self, engine: Any) -> None:
        self.background.on_epoch_end(
            engine.state.epoch - 1, {**self._validated, **scalars(engine.state.metrics)}
        )
        self._give_on(engine)

    def _end(self, engine: Any) -> None:
        self.background.close()

    def _fail(self, engine: Any, error: BaseException) -> None:
        self.background.close(error)
        # Ignite swallows what somebody listens to. That shall be somebody else's decision, not ours.
        if engine._event_handlers[Events.EXCEPTION_RAISED][-1][0] == self._fail:
            raise error

    def _start_test(self, engine: Any) -> None:
        self.background.on_test_begin()

    def _start_test_batch(self, engine: Any) -> None:
        self.background.on_test_batch_begin(engine.state.iteration - 1)

    def _end_test_batch(self, engine: Any) -> None:
        self.background.on_test_batch_end(engine.state.iteration - 1, self._output(engine.state.output))

    def _end_test(self, engine: Any) -> None:
        metrics = scalars(engine.state.metrics)
        self._validated = {f"val_{name}": value for name, value in metrics.items()}
        self.background.on_test_end(metrics)

    def _give_on(self, engine: Any) -> None:
        if self.background.should_stop:
            engine.terminate()
