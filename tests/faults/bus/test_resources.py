"""Many trainings in one process, and a process that has no descriptor or no thread left to give."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asynccb import CallbackError, CheckpointWriteError, RunCancelled, Trainer
from asynccb.callbacks import CSVLogger, ModelCheckpoint, RemoteMonitor, TensorBoard
from asynccb.models import BatchNormalization, Dense, Dropout, Sequential
from asynccb.run import live_runs
from asynccb.testing import ScriptedModel
from asynccb.training import copying

if TYPE_CHECKING:
    from pathlib import Path

    from asynccb.callbacks.base import Callback

SEED = int(os.environ.get("FAULT_SEED", "0"))
_drawn = np.random.default_rng(0)
X = _drawn.normal(size=(96, 8)).astype("float32")
Y = np.eye(3, dtype="float32")[np.arange(96) % 3]


def model(seed: int) -> Sequential:
    layers = [Dense(16, activation="relu", input_dim=8), BatchNormalization(), Dropout(0.3)]
    made = Sequential([*layers, Dense(3, activation="softmax")], seed=seed)
    made.compile("adam", "categorical_crossentropy", ["accuracy"])
    return made


# ---------------------------------------------------------------- many trainings


async def trained(seed: int, folder: Path, epochs: int = 4) -> dict[str, str]:
    """Digests of all that a training leaves."""
    folder.mkdir()
    trained, callbacks = model(seed), [CSVLogger(folder / "log.csv"), ModelCheckpoint(folder / "model.hdf5")]
    history = await Trainer(trained, seed=seed).fit(
        X, Y, batch_size=8, epochs=epochs, validation_split=0.25, verbose=0, callbacks=callbacks
    )
    left = {
        "weights": b"".join(array.tobytes() for array in trained.capture().arrays.values()),
        "history": json.dumps(history.history).encode(),
        "rows": (folder / "log.csv").read_bytes(),
        "file": (folder / "model.hdf5").read_bytes(),
    }
    return {name: hashlib.sha256(content).hexdigest() for name, content in left.items()}


async def cancelled(seed: int, folder: Path) -> None:
    """A training that somebody cancels in the middle."""
    folder.mkdir()
    run = Trainer(model(seed)).start(
        X, Y, epochs=10**6, verbose=0, callbacks=ModelCheckpoint(folder / "model.hdf5")
    )
    while run.step < 5:  # noqa: ASYNC110  a thread brings it about
        await asyncio.sleep(0.001)
    run.cancel()
    with pytest.raises(RunCancelled):
        await run


async def alone_and_together(folder: Path, count: int, to_cancel: int = 0) -> tuple[list[Any], list[Any]]:
    alone = [await trained(seed, folder / f"alone {seed}") for seed in range(count)]
    both = [trained(seed, folder / f"together {seed}") for seed in range(count)]
    ended = [cancelled(seed, folder / f"cancelled {seed}") for seed in range(to_cancel)]
    together = await asyncio.gather(*both, *ended)
    return alone, together[:count]


def test_each_of_eight_trainings_at_a_time_leaves_to_the_byte_what_it_leaves_alone(tmp_path: Path) -> None:
    alone, together = asyncio.run(alone_and_together(tmp_path, 8))
    assert together == alone
    assert len({digests["weights"] for digests in alone}) == 8


@pytest.mark.long
@pytest.mark.timeout(300)
def test_each_of_thirty_two_of_which_four_more_are_cancelled_leaves_what_it_leaves_alone(
    tmp_path: Path,
) -> None:
    alone, together = asyncio.run(alone_and_together(tmp_path, 32, to_cancel=4))
    assert together == alone


def test_trainings_that_share_a_stream_of_random_numbers_would_be_found() -> None:
    """Negative control: what one draws, the other does not."""
    shared = np.random.default_rng(0)

    class Draws(ScriptedModel):
        def train_batch(self, batch: Any) -> dict[str, float]:
            logs = super().train_batch(batch)
            self.weights += shared.normal()
            return logs

    async def fit() -> float:
        draws = Draws()
        await Trainer(draws).fit(X, batch_size=1, verbose=0)
        return float(draws.weights[0])

    async def main() -> tuple[float, list[float]]:
        nonlocal shared
        alone = await fit()
        shared = np.random.default_rng(0)
        return alone, await asyncio.gather(fit(), fit())

    alone, together = asyncio.run(main())
    assert together != [alone, alone]


# ---------------------------------------------------------------- no thread left


class Refuses:
    """Stands for ``Thread.start``: from the k-th thread of ours on, the system has none to give."""

    def __init__(self, after: int, patch: pytest.MonkeyPatch) -> None:
        self.left, self.refused = after, 0
        start = threading.Thread.start

        def refuse(thread: threading.Thread) -> None:
            if thread.name.startswith("asynccb"):
                if not self.left:
                    self.refused += 1
                    raise RuntimeError("can't start new thread")
                self.left -= 1
            start(thread)

        patch.setattr(threading.Thread, "start", refuse)


def sinks(folder: Path) -> list[Callback]:
    return [
        CSVLogger(folder / "log.csv"),
        ModelCheckpoint(folder / "model.hdf5"),
        TensorBoard(folder / "board", histogram_freq=1),
        RemoteMonitor("http://127.0.0.1:1", retries=0, timeout=0.5),
    ]


def reasons(error: BaseException | None) -> list[BaseException]:
    """An error and what led to it."""
    found: list[BaseException] = []
    while error is not None:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


@pytest.mark.asyncio
@pytest.mark.filterwarnings("ignore:TensorBoard", "ignore:.*lost")
async def test_wherever_threads_run_out_the_error_says_so_and_nothing_hangs_or_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "AT_ONCE", -1)  # a copy has a thread too
    outcomes = []
    for number in range(60):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            refuses = Refuses(number, patch)
            fit = Trainer(model(1)).fit(X, Y, epochs=2, verbose=0, callbacks=sinks(folder))
            error = None
            try:
                async with asyncio.timeout(20):
                    await fit
            except (RuntimeError, CallbackError, CheckpointWriteError) as raised:
                error = raised
        if error is not None:
            assert any("can't start new thread" in str(reason) for reason in reasons(error)), number
        assert live_runs() == []
        outcomes.append(type(error).__name__)
        del error
        if not refuses.refused:
            break
    assert outcomes[-1] == "NoneType"
    assert {"RuntimeError", "CallbackError"} <= set(outcomes)
    assert len(outcomes) > 8


# ---------------------------------------------------------------- no descriptor left

SHORT = """
import asyncio, gc, importlib.util, json, os, resource, sys, warnings
from pathlib import Path

spec = importlib.util.spec_from_file_location("resources", sys.argv[1])
room = importlib.util.module_from_spec(spec)
spec.loader.exec_module(room)
folder = Path(sys.argv[2])
warnings.simplefilter("ignore")


def used():
    gc.collect()
    return sorted(int(number) for number in os.listdir("/proc/self/fd"))[:-1]


async def fit(name):
    (folder / name).mkdir()
    async with asyncio.timeout(20):
        await room.Trainer(room.model(1)).fit(
            room.X, room.Y, epochs=2, verbose=0, callbacks=room.sinks(folder / name))


async def main():
    await fit("first")  # what is imported and kept open at first use is here now
    before, hard = used(), resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    outcomes = []
    for spare in range(16):
        (folder / str(spare)).mkdir()
        callbacks = room.sinks(folder / str(spare))
        fitting = room.Trainer(room.model(1)).fit(room.X, room.Y, epochs=2, verbose=0, callbacks=callbacks)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(before) + 1 + spare, hard))
        error = None
        try:
            async with asyncio.timeout(20):
                await fitting
        except Exception as raised:
            error = raised
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        said = [f"{type(e).__name__}: {e}" for e in room.reasons(error)]
        del error, fitting, callbacks
        await asyncio.sleep(0.05)
        junk = [str(path) for path in folder.rglob(".*.tmp")]
        outcomes.append([said, used() == before, junk])
    await fit("last")
    print(json.dumps(outcomes))


asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="descriptors are counted in /proc")
def test_wherever_descriptors_run_out_the_error_says_so_and_nothing_hangs_or_is_left(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SHORT, __file__, str(tmp_path)]
    child = subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)
    assert child.returncode == 0, child.stderr
    outcomes = json.loads(child.stdout.splitlines()[-1])
    too_many = os.strerror(errno.EMFILE)
    for spare, (said, as_before, junk) in enumerate(outcomes):
        assert as_before, f"{spare} descriptors to spare: some are left open after {said}"
        assert junk == []
        assert not said or any(too_many in text for text in said), f"{spare} to spare: {said}"
    assert outcomes[0][0]
    assert not outcomes[-1][0]
