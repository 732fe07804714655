"""The collector at work all the time: no task is lost that nobody but the loop knows, and no thread that uses
HDF5 waits for another for ever."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asynccb import Callback, RunCancelled, Trainer
from asynccb.callbacks import CSVLogger, ModelCheckpoint, RemoteMonitor, TensorBoard
from asynccb.testing import Recorder, ScriptedModel
from asynccb.training.control import Limits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

EPOCHS, BATCHES = 3, 4
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


class Collects(Callback):
    """Collects at every event, on the training thread."""

    changes_model = False

    def collect(self, *_: Any) -> None:
        gc.collect()

    on_train_begin = on_train_end = on_epoch_begin = on_epoch_end = collect
    on_train_batch_begin = on_train_batch_end = collect


class CollectsBeside(Callback):
    """Collects at every event, on the loop, while its own hook is suspended."""

    async def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        gc.collect()
        await asyncio.sleep(0)
        gc.collect()


def complaints() -> list[str]:
    """What the running loop has to complain of from now on."""
    said: list[str] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: said.append(context["message"]))
    return said


def test_no_task_of_a_training_with_every_sink_is_collected(tmp_path: Path) -> None:
    async def batches() -> AsyncIterator[Any]:
        for _ in range(BATCHES):
            await asyncio.sleep(0)
            yield np.zeros((1, 1)), np.zeros((1, 1))

    class Passes:
        def __aiter__(self) -> AsyncIterator[Any]:
            return batches()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(OK)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def main() -> tuple[list[str], Recorder, RemoteMonitor]:
        said, recorder = complaints(), Recorder()
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        monitor = RemoteMonitor(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", send_as_json=True)
        sinks = [
            CSVLogger(tmp_path / "log.csv"),
            ModelCheckpoint(tmp_path / "model"),
            TensorBoard(tmp_path / "board"),
            monitor,
        ]
        run = Trainer(ScriptedModel()).start(
            Passes(),
            epochs=EPOCHS,
            verbose=0,
            callbacks=[Collects(), *sinks, recorder, CollectsBeside()],
        )
        stream = [event async for event in run]
        await run
        assert len(stream) == run.stats.events
        server.close()
        await server.wait_closed()
        gc.collect()
        return said, recorder, monitor

    said, recorder, monitor = asyncio.run(main())
    assert said == []
    assert recorder.hooks.count("on_train_batch_end") == EPOCHS * BATCHES
    assert (monitor.sent, monitor.lost) == (EPOCHS, 0)
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 1 + EPOCHS
    assert np.fromfile(tmp_path / "model").tolist() == [EPOCHS * BATCHES] * 16


@pytest.mark.asyncio
async def test_a_hook_that_waits_for_what_nobody_else_knows_is_kept_until_it_is_cut_short() -> None:
    suspended = asyncio.Event()

    class Waits(Callback):
        async def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            suspended.set()
            await asyncio.get_running_loop().create_future()

    model = ScriptedModel(gated=True)
    trainer = Trainer(model)
    trainer._limits = Limits(grace=0.05, last_words=0.05)
    run = trainer.start(np.zeros((4, 1)), verbose=0, callbacks=Waits())
    await suspended.wait()
    [waiting] = [task for task in asyncio.all_tasks() if "Waits" in task.get_name()]
    kept = weakref.ref(waiting)
    del waiting
    gc.collect()
    assert kept() is not None
    run.cancel()
    model.open_for_good()
    with pytest.raises(RunCancelled):
        await run
    assert kept() is None or kept().done()  # type: ignore[union-attr]


def test_a_task_that_nobody_keeps_would_be_collected() -> None:
    """Negative control: what a callback starts and forgets."""

    class Forgets(Callback):
        async def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            asyncio.create_task(self.later())  # noqa: RUF006
            await asyncio.sleep(0)

        async def later(self) -> None:
            await asyncio.get_running_loop().create_future()

    async def main() -> list[str]:
        said = complaints()
        await Trainer(ScriptedModel()).fit(np.zeros((4, 1)), verbose=0, callbacks=[Forgets(), Collects()])
        gc.collect()
        return said

    assert asyncio.run(main()) == ["Task was destroyed but it is pending!"]


STRESS = """
import asyncio, faulthandler, gc, io, sys, threading
from pathlib import Path

import h5py
import numpy as np

from asynccb import Trainer
from asynccb.callbacks import ModelCheckpoint
from asynccb.models import Dense, Sequential, load_model
from asynccb.storage import direct

folder = Path(sys.argv[1])
faulthandler.dump_traceback_later(45, exit=True)
if sys.argv[2] == "library":
    direct.available = lambda: False
over, files = threading.Event(), []


class Cycle:
    '''An object of the library in a ring, so that only the collector lets go of it, on whatever thread.'''

    def __init__(self):
        self.file = h5py.File(io.BytesIO(), "w")
        self.file["a"] = np.arange(10.0)
        self.me = self


def use_the_library():
    while not over.is_set():
        Cycle()
        with h5py.File(io.BytesIO(), "w") as file:
            file.create_dataset("x", data=np.arange(100.0), compression="gzip")
            files.append(float(file["x"][5]))


async def main():
    model = Sequential([Dense(8, input_dim=4), Dense(1)], seed=1)
    model.compile("adam", "mse")
    user = threading.Thread(target=use_the_library)
    user.start()
    gc.set_threshold(1, 1, 1)
    await Trainer(model).fit(
        np.zeros((8, 4), "float32"), np.zeros((8, 1), "float32"), batch_size=4, epochs=12, verbose=0,
        callbacks=ModelCheckpoint(folder / "{epoch}.hdf5"))
    over.set()
    user.join()
    return model


model = asyncio.run(main())
gc.set_threshold(700, 10, 10)
loaded = load_model(folder / "12.hdf5")
assert all(np.array_equal(a, b) for a, b in zip(loaded.get_weights(), model.get_weights()))
for number in range(1, 12):
    assert load_model(folder / f"{number}.hdf5").optimizer.iterations == 2 * number
assert len(files) > 3 and set(files) == {5.0}
print("done")
"""


@pytest.mark.parametrize("route", ["template", "library"])
def test_checkpoints_are_written_while_the_collector_runs_and_another_thread_uses_the_library(
    route: str, tmp_path: Path
) -> None:
    """In a process of its own: a thread that waits inside of the library hears no signal."""
    command = [sys.executable, "-c", STRESS, str(tmp_path), route]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (child.returncode, child.stdout) == (0, "done\n"), child.stderr
