"""Every callback goes on in a resumed training as if nothing had happened.

A training of hooks alone is played: once to its end, and once to a cut, where every callback is asked for its
state. The second one goes on for a while, so that files have what comes after the cut, and is given up. New
callbacks in a new run get the states, as bytes would bring them, and play the rest. What is logged, decided,
printed, warned and on the disk must be that of the training that was never interrupted.
"""

from __future__ import annotations

import asyncio
import copy
import io
import json
import math
import random
import re
import tempfile
import warnings
from collections import deque
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from asynccb.callbacks import (
    BaseLogger,
    Callback,
    CSVLogger,
    EarlyStopping,
    History,
    LambdaCallback,
    LearningRateScheduler,
    ModelCheckpoint,
    ProgbarLogger,
    ReduceLROnPlateau,
    SwapEMAWeights,
    TensorBoard,
    TerminateOnNaN,
)
from asynccb.callbacks.hooks import read_hooks
from asynccb.events import Logs
from asynccb.storage.atomic import atomic_write

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EPOCHS, BATCHES = 5, 3


class Model:
    """Weights that depend on every batch, and on the learning rate of each."""

    def __init__(self) -> None:
        self.stop_training = False
        self.optimizer = SimpleNamespace(learning_rate=0.5)
        self.kernel = np.zeros(3, np.float32)

    def get_weights(self) -> list[Any]:
        return [self.kernel]  # no copy: who keeps it must make one

    def set_weights(self, weights: list[Any]) -> None:
        (kernel,) = weights
        self.kernel[:] = kernel

    def train(self, step: int) -> None:
        self.kernel += np.float32(self.optimizer.learning_rate) * np.float32([step, 1.0, -step])


class FakeSnapshot:
    alone = True

    def __init__(self, kernel: Any) -> None:
        self.text = repr(kernel.tolist())

    def save(self, path: Any, *, weights_only: bool = False) -> None:
        atomic_write(path, lambda temporary: Path(temporary).write_text(self.text))

    def release(self) -> None:
        pass


class FakeRun:
    name = "run-1"

    def __init__(self, model: Model, history: History, resumed: Any = None) -> None:
        self.model, self.history, self.resumed = model, history, resumed
        self.reasons: list[str] = []

    def stop(self, reason: str = "stopped") -> None:
        self.reasons.append(reason)

    def snapshot_now(self, callback: object, *, pooled: bool) -> FakeSnapshot:
        return FakeSnapshot(self.model.kernel)

    def expect_copies(self) -> None:
        pass

    def check_path(self, path: str, *, weights_only: bool) -> None: ...

    def room_for_copy(self, callback: object) -> bool:
        return True

    def announce_saved(self, path: str, epoch: int) -> None:
        pass

    def direction(self, metric: str) -> str | None:
        return None


class Script(NamedTuple):
    """Losses by epoch and batch, and those of the validations (None: the epoch is not validated)."""

    losses: list[list[float]]
    validations: list[float | None]

    def events(self) -> Iterator[tuple[str, int, int]]:
        for epoch in range(EPOCHS):
            yield "epoch_begin", epoch, 0
            for batch in range(BATCHES):
                yield "batch", epoch, batch
            if self.validations[epoch] is not None:
                yield "validation", epoch, BATCHES
            yield "epoch_end", epoch, BATCHES


class Training:
    """Callbacks, and what one sees of them. Their coroutines run when ``drain`` is called, not before."""

    def __init__(self, script: Script, callbacks: list[Callback], resumed: Any = None) -> None:
        history = History()
        self.script, self.model = script, Model()
        self.callbacks = [BaseLogger(), *callbacks, history, ProgbarLogger(file=io.StringIO())]
        self.run = FakeRun(self.model, history, resumed)
        self.hooks = [read_hooks(callback) for callback in self.callbacks]
        self.later: list[deque[Any]] = [deque() for _ in self.callbacks]
        self.validation: dict[str, Any] = {}
        self.seen: list[Any] = []
        self.over = False

    async def begin(self) -> None:
        params = {
            "epochs": EPOCHS,
            "steps": BATCHES,
            "verbose": 2,
            "do_validation": True,
            "metrics": ["loss", "val_loss"],
        }
        for callback in self.callbacks:
            callback.run, callback.validation_data = self.run, None
            callback.set_model(self.model)
            callback.set_params(params)
        self.emit("on_train_begin", Logs())
        await self.drain()

    def emit(self, hook: str, *arguments: Any) -> None:
        for hooks, later in zip(self.hooks, self.later, strict=True):
            if hook in hooks.inline:
                answer = hooks.inline[hook](*arguments)
                if answer is not None:
                    later.append(lambda answer=answer: answer)
        for argument in arguments:
            if isinstance(argument, Logs):
                argument.freeze()
        for hooks, later in zip(self.hooks, self.later, strict=True):
            if hook in hooks.beside:
                later.append(lambda hook=hooks.beside[hook]: hook(*arguments))

    async def drain(self, only: Callback | None = None) -> None:
        for callback, later in zip(self.callbacks, self.later, strict=True):
            while later and only in (None, callback):
                await later.popleft()()

    def play(self, kind: str, epoch: int, batch: int) -> None:
        if self.over:
            return
        model = self.model
        if kind == "epoch_begin":
            if model.stop_training:
                self.over = True
                return
            self.validation = {}
            self.emit("on_epoch_begin", epoch, Logs())
        elif kind == "batch":
            logs = Logs(batch=batch, size=batch + 1)
            self.emit("on_train_batch_begin", batch, logs)
            model.train(epoch * BATCHES + batch)
            logs = Logs(batch=batch, size=batch + 1, loss=self.script.losses[epoch][batch])
            self.emit("on_train_batch_end", batch, logs)
            if model.stop_training:
                self.end_epoch(epoch)
                self.over = True
        elif kind == "validation":
            self.emit("on_test_begin", Logs())
            self.validation = {"val_loss": self.script.validations[epoch]}
            self.seen.append(("evaluated with", model.kernel.tolist()))
            self.emit("on_test_end", Logs(self.validation))
        else:
            self.end_epoch(epoch)
        self.seen.append((kind, epoch, batch, model.kernel.tolist(), model.optimizer.learning_rate))

    def end_epoch(self, epoch: int) -> None:
        logs = Logs(self.validation)
        self.emit("on_epoch_end", epoch, logs)
        self.seen.append(sorted(logs.items()))

    async def state(self) -> Any:
        """As a unit has it: inline callbacks at this moment, beside ones when they have come to it, and then
        everything durable."""
        states: list[Any] = [
            None if hooks.beside else copy.deepcopy(callback.state_dict())
            for callback, hooks in zip(self.callbacks, self.hooks, strict=True)
        ]
        model = copy.deepcopy((vars(self.model.optimizer), self.model.kernel, self.validation))
        for at, callback in enumerate(self.callbacks):
            await self.drain(callback)
            if states[at] is None:
                states[at] = copy.deepcopy(callback.state_dict())
            await callback.sync()
        stop = self.run.reasons[0] if self.model.stop_training else None
        return as_read([states, *model, stop])

    async def load(self, state: Any, skip: type | None = None) -> None:
        states, optimizer, kernel, self.validation, stop = state
        if stop is not None:  # from within, but not obeyed yet: a unit has it
            self.model.stop_training = True
            self.run.stop(stop)
        vars(self.model.optimizer).update(optimizer)
        self.model.kernel[:] = kernel
        # History first: others may look at its rows.
        for callback, own in sorted(
            zip(self.callbacks, states, strict=True), key=lambda pair: pair[0] is not self.run.history
        ):
            if skip is None or type(callback) is not skip:
                await asyncio.to_thread(callback.load_state_dict, own)

    async def end(self, exception: BaseException | None = None) -> None:
        if exception is not None:
            self.emit("on_exception", exception)
        self.emit("on_train_end", Logs())
        await self.drain()
        self.seen.append(("end", self.model.kernel.tolist(), self.run.reasons[:1]))

    async def lines(self) -> list[str]:
        """What the progress bar has said; how long an epoch took is left out."""
        bar = self.callbacks[-1]
        assert isinstance(bar, ProgbarLogger)
        assert isinstance(bar.file, io.StringIO)
        if bar._display is not None:
            await bar._display.settled(10.0)
        return re.sub(r" - \d+s - ", " - ", bar.file.getvalue()).splitlines()


def as_read(tree: Any) -> Any:
    """A state as it comes back from a file: JSON, and arrays and scalars of numpy beside it."""
    arrays: list[Any] = []

    def plain(node: Any) -> Any:
        if isinstance(node, (np.ndarray, np.generic)):
            arrays.append(node.copy())
            return {"$": len(arrays) - 1}
        assert type(node) in (type(None), bool, int, float, str, list, dict), f"{node!r} is not plain data"
        if isinstance(node, dict):
            assert all(type(key) is str for key in node)
            return {key: plain(value) for key, value in node.items()}
        return [plain(value) for value in node] if isinstance(node, list) else node

    def back(node: dict[str, Any]) -> Any:
        return arrays[node["$"]] if "$" in node else node

    return json.loads(json.dumps(plain(tree)), object_hook=back)


class Observed(NamedTuple):
    seen: list[Any]
    printed: str
    lines: list[str]
    warned: list[str]
    rows: list[dict[str, Any]]
    files: dict[str, Any]


async def uninterrupted(script: Script, make: Callable[[Path], list[Callback]], folder: Path) -> Observed:
    printed, warned = io.StringIO(), []
    with redirect_stdout(printed), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        training = Training(script, make(folder))
        await training.begin()
        for event in script.events():
            training.play(*event)
            await training.drain()
        await training.end()
        warned = [str(one.message) for one in said]
    rows, lines = training.run.history.rows(), await training.lines()
    return Observed(training.seen, printed.getvalue(), lines, warned, rows, on_disk(folder))


async def interrupted(
    script: Script,
    make: Callable[[Path], list[Callback]],
    folder: Path,
    cuts: list[tuple[int, int]],
    skip: type | None = None,
) -> Observed:
    """Cut at each of ``cuts`` (events before the cut, events until the crash), resumed each time."""
    printed, warned, events = "", [], list(script.events())
    seen: list[Any] = []
    lines: list[str] = []
    state, begin = None, 0
    for cut, crash in [*cuts, (len(events), 0)]:
        cut = min(max(cut, begin), len(events))
        out = io.StringIO()
        with redirect_stdout(out), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            at = SimpleNamespace(epoch=events[begin][1] if begin < len(events) else EPOCHS)
            training = Training(script, make(folder), None if state is None else at)
            await training.begin()
            if state is not None:
                await training.load(state, skip)
            for event in events[begin:cut]:
                await training.drain()  # before and not after: what the last event left waits at the cut
                training.play(*event)
                if training.over:
                    break
            last = training.over or cut == len(events)
            if last:
                await training.end()
            else:
                state, begin = await training.state(), cut
            seen += training.seen
            told = [str(one.message) for one in said]
            text = out.getvalue()
            count = len(training.seen)
            if not last:
                so_far = await training.lines()
                for event in events[cut : cut + crash]:
                    training.play(*event)
                    await training.drain()
                await training.end(asyncio.CancelledError())
                del training.seen[count:]
                lines += so_far
            else:
                lines += await training.lines()
        printed, warned = printed + text, warned + told
        if last:
            break
    return Observed(seen, printed, lines, warned, training.run.history.rows(), on_disk(folder))


def on_disk(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.is_file() and "tfevents" not in path.name
    }
    if any("tfevents" in path.name for path in folder.iterdir()):
        read = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        read.Reload()
        for tag in read.Tags()["scalars"]:
            found[tag] = [(event.step, event.value) for event in read.Scalars(tag)]
    return found


# ---------------------------------------------------------------- the law

OLDER = b"epoch,loss,val_loss\r\n0,9.0,8.0"  # without the end of its line


def csv_behind_older_rows(folder: Path) -> list[Callback]:
    if not (folder / "log.csv").exists():
        (folder / "log.csv").write_bytes(OLDER)
    return [CSVLogger(folder / "log.csv", append=True)]


def steps(epoch: int, rate: float) -> float:
    return rate * 0.5


CASES: dict[str, Callable[[Path], list[Callback]]] = {
    "means": lambda folder: [],
    "stopping": lambda folder: [EarlyStopping("val_loss", patience=2, verbose=1, start_from_epoch=1)],
    "best weights": lambda folder: [EarlyStopping("loss", patience=3, verbose=1, restore_best_weights=True)],
    "missing": lambda folder: [EarlyStopping("typo"), ReduceLROnPlateau("typo"), CSVLogger(folder / "a.csv")],
    "plateau": lambda folder: [ReduceLROnPlateau("loss", 0.5, 1, 1, cooldown=1), CSVLogger(folder / "a.csv")],
    "schedule": lambda folder: [LearningRateScheduler(steps, verbose=1)],
    "best file": lambda folder: [ModelCheckpoint(folder / "{epoch}.h5", "loss", 1, True)],
    "period": lambda folder: [ModelCheckpoint(folder / "{epoch}.h5", period=2, verbose=1)],
    "files kept": lambda folder: [
        ModelCheckpoint(folder / "{epoch}-{loss:.1f}.h5", "loss", keep_last=1, keep_best=2)
    ],
    "files of batches": lambda folder: [
        ModelCheckpoint(folder / "{epoch}-{batch}.h5", "loss", 1, save_freq=2, keep_last=2)
    ],
    "not validated": lambda folder: [
        ModelCheckpoint(folder / "{epoch}-{val_loss:.1f}.h5", save_best_only=True)
    ],
    "no number": lambda folder: [TerminateOnNaN()],
    "rows": lambda folder: [CSVLogger(folder / "log.csv")],
    "rows behind older ones": csv_behind_older_rows,
    "averages": lambda folder: [SwapEMAWeights(0.5), ModelCheckpoint(folder / "{epoch}.h5")],
    "averages of epochs": lambda folder: [SwapEMAWeights(0.9, True), ModelCheckpoint(folder / "{epoch}.h5")],
    "board": lambda folder: [TensorBoard(folder)],
    "board of batches": lambda folder: [
        TensorBoard(folder, update_freq=2),
        ReduceLROnPlateau("loss", 0.5, 1),
    ],
    "functions": lambda folder: [
        LambdaCallback(on_epoch_end=lambda epoch, logs: print("epoch", epoch, sorted(logs.items())))
    ],
}

FINITE = [0.25, 0.5, 1.0, 2.0, 3.0]
WITH_NO_NUMBERS = [*FINITE, *FINITE, *FINITE, math.inf, math.nan]
SEEDS = range(12)


def drawn(seed: int, values: list[float]) -> tuple[Script, list[tuple[int, int]]]:
    """A script, and one to three cuts in it."""
    draw = random.Random(seed)
    losses = [draw.choices(values, k=BATCHES) for _ in range(EPOCHS)]
    script = Script(losses, [draw.choice([None, *draw.choices(values, k=2)]) for _ in range(EPOCHS)])
    length = len(list(script.events()))
    return script, sorted(
        (draw.randint(0, length), draw.randint(0, length)) for _ in range(draw.randint(1, 3))
    )


def difference(name: str, seed: int, skip: type | None = None) -> str | None:
    """What is not as in the training that was never interrupted; None where all is."""
    script, cuts = drawn(seed, WITH_NO_NUMBERS if name in ("no number", "best file") else FINITE)
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        whole = asyncio.run(uninterrupted(script, CASES[name], Path(one)))
        pieces = asyncio.run(interrupted(script, CASES[name], Path(other), cuts, skip))
        whole = whole._replace(printed=whole.printed.replace(one, other))
    for field, expected, actual in zip(Observed._fields, whole, pieces, strict=True):
        if repr(expected) != repr(actual):
            return f"{name}, seed {seed}, cuts {cuts}: {field}\n{expected!r}\n{actual!r}"
    return None


@pytest.mark.parametrize("name", CASES)
def test_a_training_that_was_cut_anywhere_any_number_of_times_ends_as_one_that_was_not(name: str) -> None:
    for seed in SEEDS:
        found = difference(name, seed)
        assert found is None, found


@pytest.mark.parametrize("name", CASES)
def test_without_a_resume_one_object_in_three_trainings_is_three_fresh_objects(name: str) -> None:
    with tempfile.TemporaryDirectory() as given:
        folder, used = Path(given), None
        for seed in range(3):
            script, _ = drawn(seed, FINITE)
            fresh = asyncio.run(uninterrupted(script, CASES[name], folder))
            clear(folder)
            used = CASES[name](folder) if used is None else (CASES[name](folder), used)[1]
            again = asyncio.run(uninterrupted(script, lambda folder, used=used: used, folder))
            clear(folder)
            assert repr(again) == repr(fresh), f"{name}, seed {seed}"


def clear(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", CASES)
def test_and_so_do_many_more(name: str) -> None:
    for seed in range(len(SEEDS), 300):
        found = difference(name, seed)
        assert found is None, found


@pytest.mark.parametrize(
    ("name", "forgetful"),
    [
        ("means", BaseLogger),
        ("means", History),
        ("means", ProgbarLogger),
        ("stopping", EarlyStopping),
        ("best weights", EarlyStopping),
        ("missing", EarlyStopping),
        ("missing", ReduceLROnPlateau),
        ("plateau", ReduceLROnPlateau),
        ("best file", ModelCheckpoint),
        ("period", ModelCheckpoint),
        ("files kept", ModelCheckpoint),
        ("files of batches", ModelCheckpoint),
        ("not validated", ModelCheckpoint),
        ("rows", CSVLogger),
        ("rows behind older ones", CSVLogger),
        ("averages", SwapEMAWeights),
        ("averages of epochs", SwapEMAWeights),
        ("board", TensorBoard),
        ("board of batches", TensorBoard),
    ],
)
def test_one_callback_that_forgets_its_state_is_found_out(name: str, forgetful: type) -> None:
    assert any(difference(name, seed, skip=forgetful) for seed in SEEDS)
