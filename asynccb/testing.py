"""Doubles for tests of callbacks and services: a model that waits for you, a callback that records, and
``settle``.

::

    model, recorder = ScriptedModel(gated=True), Recorder()
    run = Trainer(model).start(np.zeros((4, 1)), batch_size=1, verbose=0, callbacks=[recorder])
    await model.open(2)                      # two batches are trained, the third waits at the gate
    await settle()                           # nothing of ours can move any more
    assert recorder.hooks[-1] == "on_train_batch_begin"
    run.stop("seen enough")
    model.open_for_good()
    await run
"""

from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from asynccb.callbacks.base import Callback
from asynccb.run import live_runs
from asynccb.storage.atomic import atomic_write

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from os import PathLike

    from asynccb.events import Event
    from asynccb.protocols import Batch
    from asynccb.run import Run

__all__ = ["Match", "Recorder", "ScriptedModel", "ScriptedState", "settle"]


class ScriptedModel:
    """A model whose batches wait for a gate, and whose losses are given.

    Each trained batch fills its one weight array with the number of batches trained, so that a copy shows
    when it was made.

    Args:
        losses: loss of each batch in turn, from the start again when they are used up.
        gated: whether batches wait for :meth:`open`.
        raises: exceptions by 0-based step; raised in the middle of that batch.

    Attributes:
        weights: float array of shape (16,), filled with the number of batches trained.
        steps: batches trained.
        sizes: the size of each batch trained.
    """

    metrics_names = ("loss",)
    needs_cpu = False
    """It computes nothing, and takes no turns with other trainings: nobody waits because it waits."""

    def __init__(
        self,
        losses: Sequence[float] = (1.0,),
        *,
        gated: bool = False,
        raises: Mapping[int, BaseException] | None = None,
    ) -> None:
        self.stop_training = False
        self.weights = np.zeros(16)
        self.steps = 0
        self.sizes: list[int] = []
        self._losses = list(losses)
        self._raises = dict(raises or {})
        self._gate = threading.Condition()
        self._allowed = 0 if gated else -1
        self._waiting = False

    def train_batch(self, batch: Batch) -> dict[str, float]:
        """Waits for the gate, then trains: every weight becomes the number of batches trained."""
        self._pass_gate()
        half = self.weights.size // 2
        self.weights[:half] = self.steps + 1
        if self.steps in self._raises:
            raise self._raises[self.steps]
        self.weights[half:] = self.steps + 1
        loss = self._losses[self.steps % len(self._losses)]
        self.steps += 1
        self.sizes.append(batch.size)
        return {"loss": loss}

    def test_batch(self, batch: Batch) -> dict[str, float]:
        """Waits for the gate too; the loss is the number of batches trained."""
        self._pass_gate()
        return {"loss": float(self.steps)}

    def predict_batch(self, batch: Batch) -> np.ndarray[Any, Any]:
        return np.full((batch.size, 1), float(self.steps))

    def capture(self) -> ScriptedState:
        return ScriptedState(self.weights.copy())

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.weights[:] = state["weights"]
        self.steps = int(state["steps"])

    async def open(self, batches: int = 1) -> None:
        """Lets ``batches`` more through, and waits until the thread stands at the gate again or the runs have
        ended."""
        with self._gate:
            self._allowed += batches
            self._gate.notify_all()
        await self.at_gate()

    def open_for_good(self) -> None:
        """Lets every batch through from now on."""
        with self._gate:
            self._allowed = -1
            self._gate.notify_all()

    async def at_gate(self) -> None:
        """Waits until the thread waits at the closed gate, or no run is alive."""
        while not self.waiting and live_runs():  # noqa: ASYNC110 a thread comes
            await asyncio.sleep(0.001)

    @property
    def waiting(self) -> bool:
        """Whether a thread waits at the closed gate."""
        return self._waiting and self._allowed == 0

    def _pass_gate(self) -> None:
        with self._gate:
            self._waiting = True
            self._gate.wait_for(lambda: self._allowed != 0)
            self._waiting = False
            if self._allowed > 0:
                self._allowed -= 1


class ScriptedState:
    """What :meth:`ScriptedModel.capture` answers."""

    def __init__(self, weights: np.ndarray[Any, Any]) -> None:
        weights.flags.writeable = False
        self.arrays: dict[str, np.ndarray[Any, Any]] = {"weights": weights}

    def save(self, path: str | PathLike[str], *, weights_only: bool = False) -> None:
        """Writes the bytes of the array, atomically."""
        atomic_write(os.fspath(path), lambda temporary: self._write(temporary))

    def to_model(self) -> ScriptedModel:
        model = ScriptedModel()
        model.weights = self.arrays["weights"].copy()
        model.steps = int(model.weights[0])
        return model

    def _write(self, path: str) -> None:
        with open(path, "wb") as file:
            file.write(self.arrays["weights"].tobytes())


class Recorder(Callback):
    """Records every event of a run, in order, on the loop.

    Attributes:
        events: the events' hook names with their first arguments: ``("on_epoch_end", 0)``,
            ``("on_train_end",)``.
        logs: the logs of each, as plain dicts.
    """

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.logs: list[dict[str, Any]] = []

    @property
    def hooks(self) -> list[str]:
        """The hook names alone."""
        return [event[0] for event in self.events]

    def _add(self, hook: str, index: int | None, logs: Any) -> None:
        self.events.append((hook,) if index is None else (hook, index))
        self.logs.append(dict(logs or {}))

    async def on_train_begin(self, logs: Any = None) -> None:
        self._add("on_train_begin", None, logs)

    async def on_train_end(self, logs: Any = None) -> None:
        self._add("on_train_end", None, logs)

    async def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._add("on_epoch_begin", epoch, logs)

    async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._add("on_epoch_end", epoch, logs)

    async def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._add("on_train_batch_begin", batch, logs)

    async def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._add("on_train_batch_end", batch, logs)

    async def on_test_begin(self, logs: Any = None) -> None:
        self._add("on_test_begin", None, logs)

    async def on_test_end(self, logs: Any = None) -> None:
        self._add("on_test_end", None, logs)

    async def on_test_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._add("on_test_batch_begin", batch, logs)

    async def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        self._add("on_test_batch_end", batch, logs)

    async def on_predict_begin(self, logs: Any = None) -> None:
        self._add("on_predict_begin", None, logs)

    async def on_predict_end(self, logs: Any = None) -> None:
        self._add("on_predict_end", None, logs)

    async def on_exception(self, exception: BaseException) -> None:
        self.events.append(("on_exception", type(exception).__name__))
        self.logs.append({})

    async def on_checkpoint_saved(self, path: str, epoch: int) -> None:
        self.events.append(("on_checkpoint_saved", os.path.basename(path)))
        self.logs.append({})


class Match:
    """Equal to every event of a kind with the given fields: ``Match(EpochEnd, epoch=1) == event``."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, kind: type[Event], **fields: Any) -> None:
        self._kind = kind
        self._fields = fields

    def __eq__(self, event: object) -> bool:
        return isinstance(event, self._kind) and all(
            getattr(event, name) == value for name, value in self._fields.items()
        )

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self._fields.items())
        return f"Match({self._kind.__name__}{', ' if fields else ''}{fields})"


async def settle(rounds: int = 5) -> None:
    """Returns when nothing of ours can move on this loop: every mailbox is empty or behind a suspended hook,
    and every training thread waits (at a gate, in a wait, in a pause) or has left.

    A model that really computes keeps this waiting until it has ended or waits.
    """
    quiet = 0
    seen: object = None
    while quiet < rounds:
        await asyncio.sleep(0 if quiet else 0.001)
        runs = live_runs()
        state = [_state(run) for run in runs]
        quiet = quiet + 1 if state == seen and all(run.settled for run in runs) else 0
        seen = state


def _state(run: Run) -> tuple[Any, ...]:
    stats = run.stats
    return run.name, run.state, run.step, stats.events, tuple(stats.callbacks.values())
