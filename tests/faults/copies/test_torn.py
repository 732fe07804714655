"""No copy is torn: every update fills every array with the number of its step, models are saved at random
steps by slow writers while the training goes on, and each file holds the number of the step that it names."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest

from asynccb import Callback, Trainer
from asynccb.models import BatchNormalization, Dense, Embedding, Flatten, Sequential, load_model
from asynccb.models import memory as memory_room
from asynccb.models import updates as updates_room
from asynccb.models.optimizers import SGD
from asynccb.protocols import LiveState
from asynccb.storage.atomic import atomic_write
from asynccb.storage.template import Templates
from asynccb.training import copying
from asynccb.training.snapshot import Pool, Snapshots

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    Array = np.ndarray[Any, Any]

SEED = int(os.environ.get("FAULT_SEED", "0"))
"""Of everything that is drawn here; the long tier draws a new one where none is given."""
SAVES = {"template": 500, "library": 100, "table": 200, "live": 100, "capture only": 100}
"""In the fast tier: a thousand."""
LONG = 20
"""Times as many in the long tier."""


class StepNumber(SGD):
    """Its update fills parameters and slots with the number of the update."""

    def step(self, p: Array, g: Array, a: Array, slots: Sequence[Array]) -> None:
        p.fill(self.iterations)
        for slot in slots:
            slot.fill(self.iterations)


StepNumber.__name__ = "SGD"  # by which a file knows its optimizer


def dense() -> Sequential:
    layers = [BatchNormalization(input_shape=(6,)), *(Dense(12) for _ in range(4)), Dense(3)]
    model = Sequential(layers, seed=1)
    model.compile(StepNumber(momentum=0.5), "mse")
    return model


def of_words() -> Sequential:
    """A table, all of whose rows are in every batch, and are kept aside where a copy is under way."""
    model = Sequential([Embedding(6, 5, input_length=6), Flatten(), Dense(8), Dense(3)], seed=1)
    model.compile(StepNumber(), "mse")
    return model


class Numbers:
    """The state of the models below; its file is an ``.npz``."""

    def __init__(self, step: int, arrays: Sequence[Array], write: Callable[[], None]) -> None:
        self.step = step
        self.arrays: Mapping[str, Array] = {f"array{at}": array for at, array in enumerate(arrays)}
        self._write = write

    def save(self, path: str | os.PathLike[str], *, weights_only: bool = False) -> None:
        def write(temporary: str) -> None:
            arrays = {}
            for name, array in self.arrays.items():
                self._write()
                arrays[name] = array.copy()
            with open(temporary, "wb") as file:
                np.savez(file, step=self.step, **arrays)

        atomic_write(path, write)

    def to_model(self) -> Any:
        raise NotImplementedError


class CaptureOnly:
    """A user's model of the smallest kind that can be saved."""

    metrics_names = ("loss",)
    stop_training = False
    write: ClassVar[Callable[[], None]] = staticmethod(lambda: None)

    def __init__(self) -> None:
        self.step = 0
        self.arrays = [np.zeros((40, 3)) for _ in range(5)]

    def train_batch(self, batch: Any) -> dict[str, float]:
        self.step += 1
        for array in self.arrays:
            array.fill(self.step)
        return {"loss": 0.0}

    def capture(self) -> Numbers:
        return Numbers(self.step, [array.copy() for array in self.arrays], self.write)


class Live(CaptureOnly):
    """A user's model that is copied beside its training, in segments; its update goes over them in order."""

    segments = tuple((array, start, start + 8) for start in range(0, 40, 8) for array in range(5))

    def train_batch(self, batch: Any, before_update: Any = None) -> dict[str, float]:
        for number, (array, start, stop) in enumerate(self.segments, 1):
            if before_update is not None and before_update.copying:
                before_update(number)
            if number == 1:
                self.step += 1
            self.arrays[array][start:stop] = self.step
        return {"loss": 0.0}

    def live(self) -> LiveState:
        step = self.step
        return LiveState(
            self.arrays,
            self.segments,
            [None] * len(self.arrays),
            lambda arrays: Numbers(step, arrays, self.write),
        )


MODELS: dict[str, Callable[[], Any]] = {
    "template": dense,
    "library": dense,
    "table": of_words,
    "live": Live,
    "capture only": CaptureOnly,
}


# ---------------------------------------------------------------- the verdict


def moving_means(steps: int) -> list[float]:
    """What the running mean of `dense` is after each step, where every input is 1."""
    model = dense()
    (x, y), means = data("template", 1), [0.0]
    for _ in range(steps):
        model.train_batch(batch := _batch(x, y))
        means.append(float(model.layers[0].get_weights()[2][0]))
    assert batch.size == 1
    return means


def _batch(x: Array, y: Array) -> Any:
    from asynccb.protocols import Batch

    return Batch(x, y, None, len(x))


def torn(path: Path, step: int, means: Sequence[float]) -> list[str]:
    """The arrays of a file that hold anything but the number of the step."""
    if path.suffix == ".npz":
        with np.load(path) as file:
            found = {name: file[name] for name in file.files}
    else:
        model = load_model(path)
        found = {"iterations": np.asarray(model.optimizer.iterations), **dict(model.capture().arrays)}
    wrong = []
    for name, array in found.items():
        wanted = float(step)
        if "moving_mean" in name:
            wanted = means[step]
        elif "moving_variance" in name or "learning_rate" in name:
            continue  # these tell nothing here
        if not np.all(array == np.float32(wanted)):
            wrong.append(f"{path.name}: {name} of step {step} holds {np.unique(array)[:5]}")
    return wrong


# ---------------------------------------------------------------- the training


class Saves(Callback):
    """Saves at steps drawn at random, in memory of the pool or of its own, up to two files at a time."""

    changes_model = False

    def __init__(self, folder: Path, ending: str, seed: int, count: int) -> None:
        self.folder, self.ending, self.left = folder, ending, count
        self.draw = random.Random(seed)
        self.steps: dict[Path, int] = {}
        self.begun = 0

    def on_train_begin(self, logs: Any = None) -> None:
        self.writers = ThreadPoolExecutor(2)
        self.writing: list[Any] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> Any:
        if not self.left or self.draw.random() < 0.4:
            return None
        self.left -= 1
        if not self.left:
            self.run.stop("saved enough")
        snapshot = self._snapshot(pooled=self.draw.random() < 0.7)
        path = self.folder / f"{len(self.steps)}{self.ending}"
        self.steps[path] = snapshot.step  # type: ignore[attr-defined]
        return self._write(path, snapshot)

    async def _write(self, path: Path, snapshot: Any) -> None:
        def write() -> None:
            try:
                snapshot.save(path)
            finally:
                snapshot.release()

        self.writing.append(asyncio.get_running_loop().run_in_executor(self.writers, write))
        self.begun += 1
        if len(self.writing) > 1:
            await self.writing.pop(0)

    def on_train_end(self, logs: Any = None) -> Any:
        return self._end()

    async def _end(self) -> None:
        for written in self.writing:
            await written
        self.writers.shutdown()
        self.at_the_gate = self.run.stats.waits.get("gate", 0)


class Sloth:
    """Delays: a nap now and then, at places that the test chooses."""

    def __init__(self, seed: int, one_in: int = 6, longest: float = 0.0008) -> None:
        self.draw = random.Random(seed)
        self.one_in, self.longest = one_in, longest
        self.naps = 0

    def __call__(self) -> None:
        if self.draw.randrange(self.one_in) == 0:
            self.naps += 1
            time.sleep(self.draw.uniform(0, self.longest))


def slowed(patch: pytest.MonkeyPatch, seed: int) -> Sloth:
    """Slow copies and slow writers, and models in many small pieces."""
    sloth = Sloth(seed)
    copyto, pwritev = np.copyto, getattr(os, "pwritev", None)

    def slow_copy(target: Array, source: Array) -> None:
        sloth()
        copyto(target, source)

    def slow_write(descriptor: int, pieces: Sequence[Any], at: int) -> int:
        sloth()
        first = memoryview(pieces[0])
        if len(first) > 1 and sloth.draw.random() < 0.3:  # a short write, as disks do them
            return pwritev(descriptor, [first[: sloth.draw.randrange(1, len(first))]], at)  # type: ignore[misc]
        return pwritev(descriptor, pieces, at)  # type: ignore[misc]

    patch.setattr(copying, "AT_ONCE", -1)
    patch.setattr(copying.np, "copyto", slow_copy)
    patch.setattr(memory_room, "PART", 256)
    patch.setattr(updates_room, "BLOCK", 256)
    patch.setattr(os, "fsync", lambda descriptor: None)  # no test of what a power cut leaves
    patch.setattr(CaptureOnly, "write", staticmethod(sloth))
    if pwritev is not None:
        patch.setattr(os, "pwritev", slow_write)
    return sloth


def data(kind: str, samples: int) -> tuple[Array, Array]:
    x = np.tile(np.arange(6), (samples, 1)) if kind == "table" else np.ones((samples, 6), "float32")
    return x, np.zeros((samples, 3), "float32")


def saved(kind: str, folder: Path, seed: int, count: int) -> Saves:
    """A training of a model of that kind, until ``count`` files are written."""
    ending = ".npz" if kind in ("live", "capture only") else ".hdf5"
    saves = Saves(folder, ending, seed, count)
    x, y = data(kind, 200)
    fit = Trainer(MODELS[kind](), seed=seed).fit(
        x, y, batch_size=1, epochs=10**6, shuffle=False, verbose=0, callbacks=saves
    )
    asyncio.run(fit)
    assert len(saves.steps) == saves.begun == count
    return saves


def check(kind: str, folder: Path, seed: int, count: int) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        sloth = slowed(patch, seed)
        if kind == "library":
            patch.setattr(Templates, "get", lambda *_: None)
        saves = saved(kind, folder, seed, count)
    if kind != "capture only":  # or the test is of no use
        assert sloth.naps > count / 10, "nothing was slow"
        assert saves.at_the_gate, "no update came while a copy was under way"
    means = moving_means(max(saves.steps.values())) if kind in ("template", "library") else []
    return [fault for path, step in saves.steps.items() for fault in torn(path, step, means)]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning", "ignore:Inline hooks:UserWarning")
def test_each_of_a_thousand_files_holds_the_step_that_it_names(kind: str, tmp_path: Path) -> None:
    assert check(kind, tmp_path, SEED, SAVES[kind]) == [], f"replay with FAULT_SEED={SEED}"


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning", "ignore:Inline hooks:UserWarning")
def test_each_of_twenty_thousand_files_holds_the_step_that_it_names(kind: str, tmp_path: Path) -> None:
    drawn = SEED or random.SystemRandom().randrange(1, 2**31)
    for seed in range(drawn, drawn + LONG):
        faults = check(kind, tmp_path, seed, SAVES[kind])
        assert faults == [], f"replay with FAULT_SEED={seed}"


# ---------------------------------------------------------------- negative controls


class Late(Callback):
    """Takes a copy after each of the first batches and writes all of them when the training is over."""

    changes_model = False

    def __init__(self, folder: Path, ending: str, *, pooled: bool = False) -> None:
        self.folder, self.ending, self.pooled = folder, ending, pooled
        self.snapshots: list[Any] = []
        self.steps: dict[Path, int] = {}

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if len(self.snapshots) < 5:
            self.snapshots.append(self._snapshot(pooled=self.pooled))

    def on_train_end(self, logs: Any = None) -> None:
        for snapshot in self.snapshots:
            path = self.folder / f"{snapshot.step}{self.ending}"
            snapshot.save(path)
            self.steps[path] = snapshot.step


def written_late(kind: str, folder: Path, *, pooled: bool = False) -> list[str]:
    late = Late(folder, ".npz" if kind == "live" else ".hdf5", pooled=pooled)
    x, y = data(kind, 20)
    fit = Trainer(MODELS[kind]()).fit(x, y, batch_size=1, shuffle=False, verbose=0, callbacks=late)
    asyncio.run(fit)
    assert len(late.steps) == 5
    means = moving_means(20) if kind == "template" else []
    return [fault for path, step in late.steps.items() for fault in torn(path, step, means)]


@pytest.mark.parametrize("kind", ["template", "table", "live"])
@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
def test_what_is_written_when_the_training_is_over_is_of_the_step_of_its_copy(
    kind: str, tmp_path: Path
) -> None:
    assert written_late(kind, tmp_path) == []


@pytest.mark.parametrize("kind", ["template", "table", "live"])
@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
def test_references_in_place_of_copies_are_found(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control of the copies."""
    from asynccb.training.snapshot import Snapshot

    def refer(self: Snapshots, step: int, epoch: int, slot: Any) -> Snapshot:
        live = self._live()
        assert live is not None
        return Snapshot(live.complete(live.arrays), step, epoch)

    monkeypatch.setattr(Snapshots, "_take", refer)
    faults = written_late(kind, tmp_path)
    assert len({fault.partition(":")[0] for fault in faults}) == 5


@pytest.mark.parametrize("kind", ["template", "live"])
@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
def test_a_training_that_does_not_ask_the_gate_is_found(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control of the gate: the copier goes on when the next batch has been trained."""
    trained, copyto = threading.Event(), np.copyto

    def copy_late(target: Array, source: Array) -> None:
        assert trained.wait(10)
        copyto(target, source)

    class Trains(Callback):
        changes_model = False

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch == 1:
                trained.set()

    monkeypatch.setattr(copying, "AT_ONCE", -1)
    monkeypatch.setattr(copying.np, "copyto", copy_late)
    monkeypatch.setattr(copying.Copying, "__call__", lambda *_: None)
    late = Late(tmp_path, ".npz" if kind == "live" else ".hdf5")
    late.snapshots = [None] * 4  # one copy
    late.on_train_end = lambda logs=None: None  # type: ignore[method-assign]
    x, y = data(kind, 3)
    fit = Trainer(MODELS[kind]()).fit(
        x, y, batch_size=1, shuffle=False, verbose=0, callbacks=[Trains(), late]
    )
    asyncio.run(fit)
    snapshot = late.snapshots[-1]
    path = tmp_path / f"one{late.ending}"
    snapshot.save(path)
    assert torn(path, snapshot.step, [0.0] * 4)


@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
def test_memory_of_the_pool_that_is_used_again_too_early_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control of the pool: it hands out memory that is still being written from."""
    take = Pool.take

    def take_again(pool: Pool) -> Any:
        slot = take(pool)
        pool._free.append(slot)
        return slot

    monkeypatch.setattr(Pool, "take", take_again)
    assert len(written_late("template", tmp_path, pooled=True)) >= 4
