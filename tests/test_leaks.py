"""A hundred trainings later the process is what it was."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import tracemalloc
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asynccb import Callback, CallbackError, History, RunCancelled, Trainer
from asynccb.callbacks import CSVLogger, ModelCheckpoint, RemoteMonitor, TensorBoard
from asynccb.claims import _holders
from asynccb.models import Dense, Sequential
from asynccb.run import live_runs
from asynccb.testing import Recorder, ScriptedModel
from asynccb.training.control import Limits

if TYPE_CHECKING:
    from pathlib import Path

FITS = 100
X = np.zeros((4, 3), dtype="float32")
Y = np.zeros((4, 1), dtype="float32")


def counts() -> dict[str, Any]:
    """What a training might leave behind. Files and sockets by what they point to."""
    gc.collect()
    files = []
    for number in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []:
        try:
            files.append(os.readlink(f"/proc/self/fd/{number}").split(":[")[0])
        except OSError:  # the descriptor of the listing itself
            continue
    signals = [number for number in signal.Signals if number in signal.valid_signals()]
    return {
        "signal handlers": [(number, signal.getsignal(number)) for number in signals],
        "loggers": sorted(logging.root.manager.loggerDict),
        "handlers of loggers": len(logging._handlerList),  # type: ignore[attr-defined]
        "tasks": len(asyncio.all_tasks()),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "files": sorted(files),
        "temporary files": sorted(name for name in os.listdir(tempfile.gettempdir()) if "asynccb" in name),
        "runs": live_runs(),
        "claims": len(_holders),
    }


async def settled() -> dict[str, Any]:
    """The counts once the threads that are just ending have ended."""
    async with asyncio.timeout(10):
        while any(thread.name.startswith("asynccb") for thread in threading.enumerate()):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    return counts()


def dead_port() -> int:
    """A port where nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def model() -> Sequential:
    made = Sequential([Dense(1, input_dim=3)], seed=1)
    made.compile(optimizer="sgd", loss="mse")
    return made


@pytest.mark.asyncio
async def test_a_hundred_fits_with_sinks_leave_no_task_thread_file_or_temporary_file(tmp_path: Path) -> None:
    def callbacks(number: int) -> list[Callback]:
        return [
            CSVLogger(tmp_path / "log.csv"),
            ModelCheckpoint(str(tmp_path / "model.hdf5")),
            *([TensorBoard(tmp_path / "board")] if number % 20 == 0 else []),
        ]

    trained = Trainer(model())
    await trained.fit(X, Y, verbose=0, callbacks=callbacks(0))  # what is imported at first use is here now
    before = await settled()
    for number in range(FITS):
        await trained.fit(X, Y, verbose=0, callbacks=callbacks(number))
    assert await settled() == before
    assert sorted(os.listdir(tmp_path)) == ["board", "log.csv", "model.hdf5"]


@pytest.mark.asyncio
async def test_fits_with_a_monitor_that_nobody_listens_to_leave_nothing() -> None:
    monitor = f"http://127.0.0.1:{dead_port()}"
    trained = Trainer(ScriptedModel())
    for number in range(3):
        if number == 1:
            before = await settled()
        with pytest.warns(UserWarning, match="lost"):
            await trained.fit(X, verbose=0, callbacks=RemoteMonitor(monitor, retries=0))
    assert await settled() == before


class Beside(Callback):
    """Holds on to its run, and to a copy of the model from which a task of its own reads."""

    async def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.copying = asyncio.create_task(self.run.snapshot())

    async def on_batch_end(self, batch: int, logs: Any = None) -> None:
        await asyncio.sleep(0)

    async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        with await self.copying as snapshot:
            self.arrays = {name: array.sum() for name, array in snapshot.arrays.items()}


def every_sink(folder: Path, port: int) -> list[Callback]:
    monitor = RemoteMonitor(f"http://127.0.0.1:{port}", timeout=0.5, retries=0)
    checkpoint = ModelCheckpoint(folder / "model.hdf5")
    return [CSVLogger(folder / "log.csv"), checkpoint, TensorBoard(folder / "board"), monitor, Beside()]


@pytest.mark.asyncio
async def test_a_hundred_fits_with_every_sink_at_once_leave_their_files_alone(tmp_path: Path) -> None:
    port = dead_port()
    for number in range(FITS + 2):
        with pytest.warns(UserWarning, match="lost"):
            await Trainer(model()).fit(X, Y, verbose=0, callbacks=every_sink(tmp_path, port))
        if number == 1:
            before = await settled()
    assert await settled() == before
    assert sorted(os.listdir(tmp_path)) == ["board", "log.csv", "model.hdf5"]
    assert len(os.listdir(tmp_path / "board")) == FITS + 2


@pytest.mark.asyncio
async def test_run_trainer_and_callbacks_die_with_their_last_name_and_the_model_with_its_history(
    tmp_path: Path,
) -> None:
    async def fit() -> tuple[History, list[weakref.ref[Any]], weakref.ref[Any]]:
        trainer, callbacks = Trainer(model()), every_sink(tmp_path, dead_port())
        run = trainer.start(X, Y, epochs=2, verbose=0, callbacks=callbacks)
        with pytest.warns(UserWarning, match="lost"):
            history = await run
        return history, [weakref.ref(each) for each in (run, trainer, *callbacks)], weakref.ref(trainer.model)

    history, references, trained = await fit()
    await asyncio.sleep(0)  # the loop holds the run until it has called who waits for the end of its task
    await settled()
    assert [reference() for reference in references] == [None] * 7
    assert history.model is trained() is not None
    del history
    gc.collect()
    assert trained() is None


@pytest.mark.asyncio
async def test_what_is_left_behind_is_seen(tmp_path: Path) -> None:
    before, end = await settled(), threading.Event()
    task = asyncio.create_task(asyncio.sleep(60))
    thread = threading.Thread(target=end.wait)
    thread.start()
    with (tmp_path / "file").open("w"), tempfile.NamedTemporaryFile(prefix="asynccb"):
        seen = counts()
    end.set()
    thread.join()
    task.cancel()
    changed = {name for name in before if seen[name] != before[name]}
    assert changed - {"files"} == {"tasks", "threads", "temporary files"}
    assert ("files" in changed) is os.path.isdir("/proc/self/fd")


class Raises(Callback):
    def __init__(self, hook: str) -> None:
        self.hook = hook

    async def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if self.hook == "on_epoch_begin":
            raise OSError("!")

    async def on_train_begin(self, logs: Any = None) -> None:
        if self.hook == "on_train_begin":
            raise OSError("!")


@pytest.mark.asyncio
async def test_a_hundred_trainings_that_do_not_end_well_leave_nothing_either(tmp_path: Path) -> None:
    async def end_badly(number: int) -> None:
        scripted = ScriptedModel(raises={2: OSError("!")} if number % 5 == 0 else {})
        trainer = Trainer(scripted)
        trainer._limits = Limits(poll=0.01)
        more: list[Callback] = [CSVLogger(tmp_path / "log.csv"), Recorder()]
        if number % 5 in (1, 2):
            more.append(Raises("on_epoch_begin" if number % 5 == 1 else "on_train_begin"))
        run = trainer.start(X, batch_size=1, epochs=10**6, verbose=0, callbacks=more)
        if number % 5 == 3:
            run.cancel()
        if number % 5 == 4:
            while run.step < 2:  # noqa: ASYNC110  # a thread brings it about
                await asyncio.sleep(0.001)
            run.cancel()
        with pytest.raises((OSError, CallbackError, RunCancelled)):
            await run

    for number in range(5):
        await end_badly(number)
    before = await settled()
    for number in range(FITS):
        await end_badly(number)
    assert await settled() == before


@pytest.mark.asyncio
async def test_a_run_and_its_model_are_let_go_of() -> None:
    """A megabyte of weights each: a hundred that stay would be seen."""

    class Big(ScriptedModel):
        def __init__(self) -> None:
            super().__init__()
            self.ballast = bytearray(1 << 20)

    async def fit() -> None:
        await Trainer(Big()).fit(X, verbose=0, callbacks=Recorder())

    await fit()
    await settled()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(30):
            await fit()
        await settled()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 5 << 20


FIVE_HUNDRED = """
import asyncio, importlib.util, os, sys, tempfile, warnings
from pathlib import Path

spec = importlib.util.spec_from_file_location("leaks", sys.argv[1])
leaks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(leaks)


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def main(folder, fits):
    port, seen = leaks.dead_port(), []
    for number in range(fits):
        if number == fits // 10:
            before = await leaks.settled()
        await leaks.Trainer(leaks.model()).fit(
            leaks.X, leaks.Y, verbose=0, callbacks=leaks.every_sink(folder, port))
        seen.append(resident())
    after = await leaks.settled()
    assert after == before, (before, after)
    warm = fits // 10
    half = (fits - warm) // 2
    early, late = sum(seen[warm : warm + half]) / half, sum(seen[-half:]) / half
    print(int((late - early) / half))


warnings.simplefilter("ignore")
with tempfile.TemporaryDirectory() as folder:
    asyncio.run(main(Path(folder), int(sys.argv[2])))
"""


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_five_hundred_fits_with_every_sink_leave_nothing_and_ten_kilobytes_of_memory_each_at_most() -> None:
    command = [sys.executable, "-c", FIVE_HUNDRED, __file__, "500"]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    assert int(child.stdout) <= 10 << 10, f"{child.stdout} bytes for each fit"


@pytest.mark.parametrize("batches", [1000, pytest.param(1_000_000, marks=pytest.mark.long)])
def test_history_keeps_nothing_for_each_batch(batches: int) -> None:
    async def main() -> History:
        data = np.zeros((batches, 1), "uint8")
        return await Trainer(ScriptedModel()).fit(data, batch_size=1, shuffle=False, verbose=0)

    def kept(thing: Any) -> int:
        parts = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list) else ()
        return 1 + sum(map(kept, parts))

    history = asyncio.run(main())
    assert history.history == {"loss": [1.0]}
    assert kept([value for name, value in vars(history).items() if name != "model"]) < 40


def test_a_hundred_event_loops_leave_nothing() -> None:
    async def main() -> None:
        await Trainer(ScriptedModel()).fit(X, verbose=0, callbacks=Recorder())

    def left() -> tuple[int, int]:
        gc.collect()
        for thread in threading.enumerate():
            if thread.name.startswith("asynccb"):
                thread.join(5)  # it has said its last word, and may still be on its way out
        return threading.active_count(), len(os.listdir("/proc/self/fd")) if os.path.isdir(
            "/proc/self/fd"
        ) else 0

    asyncio.run(main())
    before = left()
    for _ in range(FITS):
        asyncio.run(main())
    assert left() == before
    assert live_runs() == []
