"""A save that was cancelled under way and comes late never takes the place of a newer one."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asynccb import Run, RunCancelled, Trainer
from asynccb.callbacks import ModelCheckpoint
from asynccb.testing import ScriptedModel, ScriptedState
from asynccb.training.control import Limits

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

X = np.zeros((1, 1))


class HeldState(ScriptedState):
    """Its file is written whole, and then waits before it is given its name."""

    def __init__(self, model: Held) -> None:
        super().__init__(-model.weights)  # no step of another model can look like one of this
        self._written, self._gate = model.written, model.gate

    def _write(self, path: str) -> None:
        super()._write(path)
        self._written.set()
        assert self._gate.wait(30)


class Held(ScriptedModel):
    def __init__(self) -> None:
        super().__init__()
        self.written, self.gate = threading.Event(), threading.Event()

    def train_batch(self, batch: Any) -> Any:
        time.sleep(0.001)  # so that its epochs, which are without number, do not keep the loop busy
        return super().train_batch(batch)

    def capture(self) -> HeldState:
        return HeldState(self)


def start(model: ScriptedModel, path: Path, epochs: int) -> Run:
    trainer = Trainer(model)
    trainer._limits = Limits(grace=0.05, last_words=0.05, poll=0.01)
    return trainer.start(X, batch_size=1, epochs=epochs, verbose=0, callbacks=ModelCheckpoint(path))


async def cancelled(run: Run) -> None:
    run.cancel()
    with pytest.raises(RunCancelled):
        await run


async def timed_out(run: Run) -> None:
    async def fit() -> None:
        async with run:
            await asyncio.sleep(30)

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await fit()


async def the_newer_save_wins(path: Path, end: Callable[[Run], Any]) -> None:
    held = Held()
    run = start(held, path, 10**6)
    while not held.written.is_set():  # a thread comes
        assert run.outcome is None
        await asyncio.sleep(0.001)
    await end(run)
    try:
        newer = ScriptedModel()
        assert (await start(newer, path, 100)).outcome == "completed"
    finally:
        held.gate.set()
    for thread in threading.enumerate():
        if thread.name.startswith("asynccb checkpoint"):
            await asyncio.to_thread(thread.join, 30)
    assert set(np.frombuffer(path.read_bytes())) == {100.0}
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.asyncio
@pytest.mark.parametrize("end", [cancelled, timed_out])
async def test_a_save_that_was_given_up_just_before_it_got_its_name_never_lands_over_a_newer_one(
    end: Callable[[Run], Any], tmp_path: Path
) -> None:
    await the_newer_save_wins(tmp_path / "model.bin", end)


@pytest.mark.asyncio
async def test_a_naive_temporary_file_and_a_rename_let_the_older_one_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control."""

    def naive(path: str, write: Callable[[str], object]) -> None:
        write(f"{path}.{threading.get_ident()}")
        os.replace(f"{path}.{threading.get_ident()}", path)

    monkeypatch.setattr("asynccb.testing.atomic_write", naive)
    with pytest.raises(AssertionError, match=r"== \{100\.0\}"):
        await the_newer_save_wins(tmp_path / "model.bin", cancelled)
