"""A training with every callback of the package, what happens to it at its k-th suspension, and what must be
left of it however it ended."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import gc
import io
import logging
import os
import re
import sys
import threading
import time
import warnings
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader

import asynccb.callbacks
from asynccb import Callback, Run, Trainer
from asynccb.callbacks import (
    BackupAndRestore,
    BaseLogger,
    CSVLogger,
    EarlyStopping,
    History,
    LambdaCallback,
    LearningRateScheduler,
    ModelCheckpoint,
    Offload,
    ProgbarLogger,
    ReduceLROnPlateau,
    RemoteMonitor,
    SwapEMAWeights,
    TensorBoard,
    TerminateOnNaN,
)
from asynccb.claims import _holders
from asynccb.models import Dense, Sequential, load_model
from asynccb.run import live_runs
from asynccb.storage.atomic import is_temporary
from asynccb.testing import Recorder
from asynccb.training.control import Limits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from asynccb.ending import Outcome

EPOCHS, BATCHES = 3, 3
X = np.linspace(0, 1, 4 * 2, dtype="float32").reshape(4, 2)
Y = X[:, :1]
PATIENT = 10.0
"""Seconds after which what should have ended has not."""


class Closing(Callback):
    """The inline hooks that begin and end a training, as they came."""

    def __init__(self) -> None:
        self.hooks: list[str] = []
        self.left: Outcome | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        self.hooks.append("on_train_begin")

    def on_exception(self, exception: BaseException) -> None:
        self.hooks.append("on_exception")

    def on_train_end(self, logs: Any = None) -> None:
        self.hooks.append("on_train_end")
        self.left = self.run._parts.driver.outcome  # as it was when the thread left its loop


def built_in(folder: Path, port: int) -> list[Callback]:
    """One of each class; those that write do so in ``folder``."""
    monitor = RemoteMonitor(f"http://127.0.0.1:{port}", timeout=2, retries=0)
    return [
        BaseLogger(),
        CSVLogger(folder / "log.csv"),
        EarlyStopping("loss", patience=99),
        History(),
        LambdaCallback(on_epoch_end=lambda epoch, logs: None),
        LearningRateScheduler(lambda epoch: 0.01),
        ModelCheckpoint(folder / "epoch.h5"),
        ModelCheckpoint(folder / "batch.h5", save_freq=2),
        ProgbarLogger(file=io.StringIO()),
        ReduceLROnPlateau("loss", patience=99),
        monitor,
        TensorBoard(folder / "board", histogram_freq=2),
        SwapEMAWeights(),
        TerminateOnNaN(),
        Offload(LambdaCallback(on_epoch_end=lambda epoch, logs: None)),
        BackupAndRestore(folder / "backup", 2),
    ]


def untested() -> set[str]:
    """Callbacks of the package that do not take part."""
    there = {type(callback).__name__ for callback in built_in(_nowhere, 9)}
    return set(asynccb.callbacks.__all__) - there - {"Callback"}


class _Nowhere:
    def __truediv__(self, name: str) -> str:
        return os.path.join("nowhere", name)


_nowhere: Any = _Nowhere()


class Batches:
    """An async source, whose task is one of the run's."""

    def seek(self, number: int, batch: int) -> None:
        """It has no place."""

    async def __aiter__(self) -> AsyncIterator[Any]:
        while True:
            yield X, Y
            await asyncio.sleep(0)


def model() -> Sequential:
    made = Sequential([Dense(3, activation="relu", input_dim=2), Dense(1)], seed=1)
    made.compile(optimizer="sgd", loss="mse")
    return made


class Server(asyncio.Protocol):
    """Answers every request with 204. No task of its own, so that all tasks there are are a training's."""

    def __init__(self) -> None:
        self.got = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self.got += data
        while (head := self.got.partition(b"\r\n\r\n"))[1]:
            found = re.search(rb"(?i)content-length: (\d+)", head[0])
            length = int(found[1]) if found else 0
            if len(head[2]) < length:
                return
            self.got = head[2][length:]
            self.transport.write(b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n")


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[int]:
    """The port of a server on this loop."""
    server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await server.wait_closed()


# ---------------------------------------------------------------- at the k-th suspension


class Cut(NamedTuple):
    """A task of the training, by its role, and which of its suspensions is meant, from 1 on."""

    role: str
    at: int


_NUMBERED = re.compile(r"( of)? run-\d+$|-\d+$")


def role(task: asyncio.Task[Any]) -> str:
    """A task's name without that of its run, and without a number."""
    return _NUMBERED.sub("", task.get_name())


@contextlib.contextmanager
def suspensions(seen: Callable[[Cut, asyncio.Task[Any]], None]) -> Iterator[None]:
    """Calls ``seen`` whenever a task has just been suspended: what it waits for is known, and it has not yet
    come."""
    run = asyncio.Handle._run  # type: ignore[attr-defined]
    counts: Counter[asyncio.Task[Any]] = Counter()

    def step(handle: Any) -> None:
        task = getattr(handle._callback, "__self__", None)
        run(handle)
        if isinstance(task, asyncio.Task) and not task.done():
            counts[task] += 1
            seen(Cut(role(task), counts[task]), task)

    asyncio.Handle._run = step  # type: ignore[attr-defined]
    try:
        yield
    finally:
        asyncio.Handle._run = run  # type: ignore[attr-defined]


# ---------------------------------------------------------------- one training, and what is left of it


class Ended(NamedTuple):
    """How a training ended."""

    error: BaseException | None
    run: Run
    cut: set[Cut]
    counts: dict[str, int]
    closing: Closing
    recorder: Recorder


async def fit(
    folder: Path,
    port: int,
    cuts: frozenset[Cut] = frozenset(),
    *,
    act: Callable[[asyncio.Task[Any]], object] = lambda task: task.cancel(),
    more: tuple[Callback, ...] = (),
) -> Ended:
    """Trains with everything, and does ``act`` at each of ``cuts``."""
    closing, recorder = Closing(), Recorder()
    trainer = Trainer(model(), seed=3)
    trainer._limits = Limits(grace=2.0, last_words=1.0, poll=0.01)
    done: set[Cut] = set()
    counts: dict[str, int] = {}
    ours = asyncio.current_task()

    def seen(cut: Cut, task: asyncio.Task[Any]) -> None:
        if task is ours:
            return
        counts[cut.role] = max(counts.get(cut.role, 0), cut.at)
        if cut in cuts:
            done.add(cut)
            act(task)

    callbacks = [*built_in(folder, port), *more, closing, recorder]
    training = asyncio.get_running_loop().create_task(
        trainer.fit(
            Batches(),
            epochs=EPOCHS,
            steps_per_epoch=BATCHES,
            verbose=2,
            callbacks=callbacks,
            validation_data=(X, Y),
            resume=False,
        ),
        name="fit",
    )
    with suspensions(seen):
        await asyncio.wait({training})
    error: BaseException | None
    try:
        error = training.exception()
    except asyncio.CancelledError as cancelled:
        error = cancelled
    if trainer.last_run is None:
        raise AssertionError("it did not even begin") from error
    return Ended(error, trainer.last_run, done, counts, closing, recorder)


def left() -> dict[str, Any]:
    """What a training might leave behind."""
    files = Counter()
    for number in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []:
        with contextlib.suppress(OSError):  # the descriptor of the listing itself
            files[os.readlink(f"/proc/self/fd/{number}").split(":[")[0]] += 1
    return {
        "tasks": sorted(task.get_name() for task in asyncio.all_tasks() - {asyncio.current_task()}),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "files": files,
        "runs": live_runs(),
        "claims": len(_holders),
    }


async def back_to(before: dict[str, Any], patient: float = PATIENT) -> None:
    """Waits until nothing is there that was not there before: threads say their last word before they end,
    those of the time before too."""
    deadline = time.monotonic() + patient
    while (more := _more(left(), before)) and time.monotonic() < deadline:  # noqa: ASYNC110  # threads end
        await asyncio.sleep(0.002)
    assert not more, (more, before)


def _more(now: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    more = {what: Counter(found) - Counter(before[what]) for what, found in now.items() if what != "claims"}
    more["claims"] = max(0, now["claims"] - before["claims"])
    return {what: found for what, found in more.items() if found}


def check_files(folder: Path) -> None:
    """Every file is whole, and none is half-written."""
    for path in sorted(folder.rglob("*")):
        assert not is_temporary(path.name), path
        if path.suffix == ".csv":
            text = path.read_bytes().decode()
            rows = list(csv.reader(io.StringIO(text, newline="")))
            assert text == "" or text.endswith("\r\n"), text
            assert {len(row) for row in rows} <= {len(rows[0]) if rows else 0}, text
            assert [row[0] for row in rows[1:]] == sorted(row[0] for row in rows[1:]), text
        elif path.suffix == ".h5":
            assert load_model(path).predict(X).shape == (4, 1)
        elif path.name.startswith("events"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                records = list(RawEventFileLoader(str(path)).Load())
            assert sum(len(record) + 16 for record in records) == path.stat().st_size, path


def check_closing(ended: Ended) -> None:
    """Whoever began has ended, last of all, and was told why where there is something to tell."""
    left = ended.closing.left
    told = left is not None and left.way.exception_hook
    for seen in (ended.closing.hooks, ended.recorder.hooks):
        # News of files that were still being written may come in between.
        hooks = [hook for hook in seen if hook != "on_checkpoint_saved"]
        if not hooks:
            continue
        last = ["on_exception", "on_train_end"] if told else ["on_train_end"]
        assert hooks[0] == "on_train_begin", hooks
        assert hooks[-len(last) :] == last, hooks
        assert seen[-1] == "on_train_end", seen
        assert hooks.count("on_train_end") == 1, hooks
        assert hooks.count("on_exception") == told, hooks


@contextlib.contextmanager
def nothing_said() -> Iterator[None]:
    """Fails if anything was reported that nobody looked at: by a destructor, a thread, a loop."""
    said: list[str] = []
    hooks = sys.unraisablehook, threading.excepthook
    sys.unraisablehook = lambda told: said.append(f"{told.exc_value!r} in {told.object!r}")
    threading.excepthook = lambda told: said.append(f"{told.exc_value!r} in {told.thread!r}")
    complaints = logging.Handler(logging.WARNING)
    complaints.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("asyncio").addHandler(complaints)
    try:
        yield
        gc.collect()  # what nobody looked at is said when it is collected
    finally:
        sys.unraisablehook, threading.excepthook = hooks
        logging.getLogger("asyncio").removeHandler(complaints)
    assert said == [], said
