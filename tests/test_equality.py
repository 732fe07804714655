"""Each of many trainings at once leaves the very bytes that it leaves alone with as many threads."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asynccb import Callback, History, Orchestrator, Trainer
from asynccb.budget import budget, cpu_budget, fair
from asynccb.callbacks import EarlyStopping, LearningRateScheduler, ReduceLROnPlateau, SwapEMAWeights
from asynccb.models import Activation, BatchNormalization, Dense, Dropout, Sequential
from asynccb.testing import ScriptedModel

if TYPE_CHECKING:
    from collections.abc import Iterable

OPTIMIZERS = ["sgd", "adam", "rmsprop", "adagrad"]
RNG = np.random.default_rng(7)
X = RNG.standard_normal((192, 24)).astype("float32")
Y = np.eye(4, dtype="float32")[RNG.integers(0, 4, 192)]


class Copies(Callback):
    """Asks for snapshots beside the training, and for its time."""

    async def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if batch == 1:
            (await self.run.snapshot()).release()


class Together:
    """Trainings that begin their first batch only when all of them are there."""

    def __init__(self, count: int) -> None:
        self._missing = count
        self._there = asyncio.Event()

    def callback(self) -> Callback:
        class Begins(Callback):
            async def on_train_begin(callback, logs: Any = None) -> None:
                self._missing -= 1
                if not self._missing:
                    self._there.set()
                await self._there.wait()

        return Begins()


class Training:
    """Number ``number`` of a family in which no two are alike."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.priority = number % 3
        width = [8, 32, 96, 256][number % 4]
        layers: list[Any] = [Dense(width, activation="relu", input_dim=24)]
        if number % 2:
            layers += [Dropout(0.3)]
        if number % 3 == 0:
            layers += [BatchNormalization()]
        self.model = Sequential([*layers, Dense(4), Activation("softmax")], seed=number)
        self.model.compile(
            optimizer=OPTIMIZERS[number // 2 % 4], loss="categorical_crossentropy", metrics=["accuracy"]
        )
        self.history: History | None = None

    def trainer(self) -> Trainer:
        return Trainer(self.model, seed=100 + self.number)

    def arguments(self, *more: Callback) -> dict[str, Any]:
        callbacks = list(more)
        if self.number % 2 == 0:
            callbacks += [Copies(), ReduceLROnPlateau("loss", patience=1)]
        if self.number % 4 == 1:
            callbacks += [LearningRateScheduler(lambda epoch, rate: rate * 0.9), EarlyStopping("loss")]
        if self.number % 8 == 3:
            callbacks += [SwapEMAWeights()]
        return {
            "x": X,
            "y": Y,
            "batch_size": [16, 32, 48][self.number % 3],
            "epochs": 2 + self.number % 3,
            "validation_split": 0.25 * (self.number % 2),
            "shuffle": self.number % 5 != 0,
            "callbacks": callbacks,
            "verbose": 0,
        }

    async def fit(self, *more: Callback) -> None:
        self.history = await self.trainer().fit(**self.arguments(*more))

    def digest(self) -> tuple[str, str]:
        """Of weights, optimizer and random streams; of the History."""
        assert self.history is not None
        whole = hashlib.sha256()
        state = self.model.capture()
        for name, array in state.arrays.items():
            whole.update(f"{name} {array.shape} {array.dtype} ".encode() + array.tobytes())
        whole.update(repr(state.random).encode())
        told = {"epoch": self.history.epoch, "history": self.history.history}
        return whole.hexdigest(), hashlib.sha256(json.dumps(told).encode()).hexdigest()


def family(count: int) -> list[Training]:
    return [Training(number) for number in range(count)]


def digests(trainings: Iterable[Training]) -> list[tuple[str, str]]:
    return [training.digest() for training in trainings]


async def alone(count: int, threads: int | None) -> list[tuple[str, str]]:
    """What each leaves where nobody else trains."""
    trainings = family(count)
    with cpu_budget(threads=threads):
        for training in trainings:
            await training.fit()
    return digests(trainings)


async def orchestrated(count: int, slots: int | None) -> list[tuple[str, str]]:
    trainings, together = family(count), Together(count)
    async with Orchestrator(slots) as orch:
        for training in trainings:
            more = [together.callback()] if orch.slots >= count else []
            run = orch.submit(training.trainer, priority=training.priority, **training.arguments(*more))
            training.history = run.history
    return digests(trainings)


async def gathered(count: int, threads: int | None) -> list[tuple[str, str]]:
    trainings, together = family(count), Together(count)
    with cpu_budget(threads=threads):
        await asyncio.gather(*(training.fit(together.callback()) for training in trainings))
    return digests(trainings)


@pytest.fixture
def _short_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings that take milliseconds take turns too."""
    monkeypatch.setattr(budget()._scheduler, "_slice", 0.0)
    monkeypatch.setattr(fair, "LOOK", 0.0)


def test_no_two_trainings_of_the_family_are_alike() -> None:
    """The negative control: the digest sees a difference."""
    ends = asyncio.run(alone(8, 1))
    assert len({weights for weights, _ in ends}) == 8
    assert len({history for _, history in ends}) == 8


@pytest.mark.asyncio
@pytest.mark.parametrize("slots", [None, 8])
async def test_eight_at_once_under_an_orchestrator_are_as_each_alone(slots: int | None) -> None:
    assert await orchestrated(8, slots=slots) == await alone(8, 1)


@pytest.mark.asyncio
@pytest.mark.usefixtures("_short_slices")
async def test_thirty_two_at_once_under_an_orchestrator_are_as_each_alone() -> None:
    switches = budget().statistics().switches
    assert await orchestrated(32, slots=32) == await alone(32, 1)
    assert budget().statistics().switches - switches > 100  # they took turns


@pytest.mark.asyncio
@pytest.mark.parametrize("threads", [1, None])
@pytest.mark.usefixtures("_short_slices")
async def test_a_plain_gather_of_fits_is_as_each_alone(threads: int | None) -> None:
    assert await gathered(8, threads) == await alone(8, threads)


# ---------------------------------------------------------------- what concurrency would spoil


class Noisy(ScriptedModel):
    """Adds noise to its weights. Where two train at once they take turns, batch by batch."""

    def __init__(self, noise: np.random.Generator, turns: threading.Barrier | None) -> None:
        super().__init__()
        self._noise = noise
        self._turns = turns

    def train_batch(self, batch: Any) -> Any:
        if self._turns is not None:
            self._turns.wait(10)
        self.weights += self._noise.standard_normal(16)
        return {"loss": float(self.weights.sum())}


async def noisy(*, shared: bool, at_once: bool) -> list[bytes]:
    turns = threading.Barrier(2) if at_once else None
    stream = np.random.default_rng(1)
    models = []
    async with Orchestrator(slots=2) as orch:
        for _ in range(2):
            if not at_once:
                stream = np.random.default_rng(1)
            models.append(Noisy(stream if shared else np.random.default_rng(1), turns))
            run = orch.submit(Trainer(models[-1]), X, batch_size=64)
            if not at_once:
                await run
    return [model.weights.tobytes() for model in models]


@pytest.mark.asyncio
async def test_models_that_share_a_random_stream_are_not_as_alone() -> None:
    """The negative control: bytes that depend on who else trains are found."""
    assert await noisy(shared=True, at_once=True) != await noisy(shared=True, at_once=False)


@pytest.mark.asyncio
async def test_the_same_models_with_a_stream_each_are() -> None:
    assert await noisy(shared=False, at_once=True) == await noisy(shared=False, at_once=False)
