"""The interpreter ends while a training is under way: with the right status, in order, and in time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from typing import TYPE_CHECKING, NamedTuple

import pytest

from asynccb.models import load_model

if TYPE_CHECKING:
    from pathlib import Path

WAIT = 45.0
"""Seconds within which every program ends; each is over in less than two on a quiet host."""

# What all programs have in common. `training` runs until somebody ends it.
COMMON = """
import asyncio, os, signal, sys, threading, time
import numpy as np
from asynccb import Callback, Trainer
from asynccb.callbacks import CSVLogger, ModelCheckpoint
from asynccb.models import Dense, Sequential
from asynccb.training.control import Limits

class Says(Callback):
    async def on_exception(self, exception):
        print("on_exception", flush=True)
    async def on_train_end(self, logs=None):
        print("on_train_end", flush=True)

class Swallows(Callback):
    async def on_epoch_end(self, epoch, logs=None):
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                pass

class Hangs(Callback):
    def on_epoch_end(self, epoch, logs=None):
        threading.Event().wait()

class Unwritable(ModelCheckpoint):
    # A disk that never answers: the writer's thread is in a system call for ever.
    stuck = False
    def _write_now(self, save, snapshot):
        self.stuck = True
        os.read(os.pipe()[0], 1)

def training(*callbacks):
    model = Sequential([Dense(1, input_dim=2)], seed=1)
    model.compile(optimizer="sgd", loss="mse")
    trainer = Trainer(model, seed=1)
    trainer._limits = Limits(grace=0.3, last_words=0.3, poll=0.01)
    x = np.zeros((8, 2), "float32")
    return trainer.start(
        x, x[:, :1], epochs=10**9, batch_size=1, verbose=0, callbacks=[*callbacks, Says()], name="the run"
    )

async def under_way(run, steps=20):
    while run.step < steps and run.outcome is None:
        await asyncio.sleep(0.001)
    print("under way", flush=True)
"""

CLOSED = ["under way", "on_exception", "on_train_end"]


class Program(NamedTuple):
    """What it does, its status, what it prints, and what stands in its errors (nothing else may)."""

    body: str
    status: int
    printed: list[str]
    errors: list[str] = []


PROGRAMS = {
    "main returns": Program(
        """
        async def main():
            run = training()
            await under_way(run)
        asyncio.run(main())
        """,
        0,
        CLOSED,
    ),
    "main exits": Program(
        """
        async def main():
            run = training()
            await under_way(run)
            sys.exit(7)
        asyncio.run(main())
        """,
        7,
        CLOSED,
    ),
    "main raises": Program(
        """
        async def main():
            run = training()
            await under_way(run)
            raise ZeroDivisionError("of main")
        asyncio.run(main())
        """,
        1,
        CLOSED,
        ["Traceback", "ZeroDivisionError: of main"],
    ),
    "a hook exits": Program(
        """
        class Exits(Callback):
            def on_epoch_end(self, epoch, logs=None):
                sys.exit(9)
        async def main():
            await training(Exits())
        asyncio.run(main())
        """,
        9,
        CLOSED[1:],
    ),
    "os._exit": Program(
        """
        async def main():
            run = training(ModelCheckpoint("saved.h5", save_freq=1), CSVLogger("log.csv"))
            await under_way(run, 400)
            while not os.path.exists("saved.h5"):
                await asyncio.sleep(0.001)
            os._exit(5)
        asyncio.run(main())
        """,
        5,
        ["under way"],
    ),
    "the loop is stopped and left": Program(
        """
        loop = asyncio.new_event_loop()
        async def main():
            run = training()
            await under_way(run)
            loop.stop()
        task = loop.create_task(main())
        loop.run_forever()
        """,
        0,
        ["under way"],
    ),
    "an async hook swallows its cancellation": Program(
        """
        async def main():
            run = training(Swallows())
            await under_way(run)
            run.cancel()
            try:
                await run
            except Exception as error:
                print(type(error).__name__)
        asyncio.run(main())
        """,
        0,
        [*CLOSED, "RunCancelled"],
        ["Swallows was cut short in on_epoch_end", "Swallows.on_epoch_end ignores its cancellation"],
    ),
    "an async hook swallows its cancellation and main returns": Program(
        """
        async def main():
            run = training(Swallows())
            await under_way(run)
        asyncio.run(main())
        """,
        0,
        CLOSED,
        ["Swallows was cut short in on_epoch_end", "Swallows.on_epoch_end ignores its cancellation"],
    ),
    "an inline hook hangs": Program(
        """
        async def main():
            run = training(Hangs())
            await under_way(run, 8)
        asyncio.run(main())
        """,
        0,
        CLOSED,
        ["the training thread did not come back within 0.3 s after"],
    ),
    "a checkpoint's thread is stuck in a system call": Program(
        """
        async def main():
            saves = Unwritable("saved.h5", save_freq=1)
            run = training(saves)
            while not saves.stuck:
                await asyncio.sleep(0.001)
            await under_way(run, 1)
            run.cancel()
            try:
                await run
            except Exception as error:
                print(type(error).__name__)
        asyncio.run(main())
        """,
        0,
        [*CLOSED, "RunCancelled"],
        ["Unwritable was cut short in"],
    ),
    "an async source swallows its cancellation": Program(
        """
        class Source:
            def __aiter__(self):
                return self
            async def __anext__(self):
                while True:
                    try:
                        await asyncio.Event().wait()
                    except asyncio.CancelledError:
                        pass
        async def main():
            model = Sequential([Dense(1, input_dim=2)], seed=1)
            model.compile(optimizer="sgd", loss="mse")
            trainer = Trainer(model)
            trainer._limits = Limits(grace=0.3, last_words=0.3, poll=0.01)
            run = trainer.start(Source(), verbose=0, callbacks=[Says()])
            while run._parts.control.waiting != "feed":
                await asyncio.sleep(0.001)
            await under_way(run, 0)
        asyncio.run(main())
        """,
        0,
        CLOSED,
        ["the async source ignores its cancellation"],
    ),
}


def start(folder: Path, body: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", COMMON + textwrap.dedent(body)],
        cwd=folder,
        env=os.environ | {"PYTHONIOENCODING": "utf-8", "OPENBLAS_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def end(process: subprocess.Popen[str]) -> tuple[list[str], str]:
    """What it printed, and its errors."""
    try:
        printed, errors = process.communicate(timeout=WAIT)
    except subprocess.TimeoutExpired:
        process.kill()
        printed, errors = process.communicate()
        raise AssertionError(f"it did not end: {printed!r} {errors!r}") from None
    return printed.splitlines(), errors


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_interpreter_ends_with_the_right_status_though_a_training_is_under_way(
    name: str, tmp_path: Path
) -> None:
    program = PROGRAMS[name]
    process = start(tmp_path, program.body)
    printed, errors = end(process)
    assert (process.returncode, printed) == (program.status, program.printed), errors
    for words in program.errors:
        assert words in errors
    if not program.errors:
        assert errors == ""
    if name == "os._exit":
        assert load_model(tmp_path / "saved.h5").weights
        assert (tmp_path / "log.csv").read_bytes().endswith(b"\r\n")
    else:
        assert list(tmp_path.iterdir()) == []


def test_a_training_that_was_stopped_by_the_system_goes_on_and_no_deadline_has_passed(tmp_path: Path) -> None:
    process = start(
        tmp_path,
        """
        async def main():
            run = training(CSVLogger("log.csv"))
            await under_way(run)
            before = run.step
            while run.step < before + 1000:
                await asyncio.sleep(0.001)
            run.stop("seen enough")
            print((await run).outcome)
        asyncio.run(main())
        """,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "under way\n"
    if hasattr(signal, "SIGSTOP"):
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.7)  # more than its grace and its last words together
        process.send_signal(signal.SIGCONT)
    printed, errors = end(process)
    assert (process.returncode, printed, errors) == (0, ["on_train_end", "stopped"], "")


def test_a_naive_thread_keeps_the_interpreter_alive(tmp_path: Path) -> None:
    """The negative control: an executor's thread is joined, and a task that swallows is waited for."""
    bodies = [
        """
        async def main():
            asyncio.get_running_loop().run_in_executor(None, threading.Event().wait)
            print("under way", flush=True)
            await asyncio.sleep(0)
        asyncio.run(main())
        """,
        """
        async def main():
            task = asyncio.create_task(Swallows().on_epoch_end(0))
            await asyncio.sleep(0)
            print("under way", flush=True)
        asyncio.run(main())
        """,
    ]
    processes = [start(tmp_path, body) for body in bodies]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    time.sleep(0.7)
    alive = [process.poll() is None for process in processes]
    for process in processes:
        process.kill()
        process.communicate()
    assert alive == [True, True]
