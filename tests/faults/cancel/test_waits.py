"""Every wait of a training thread in a whole run, pair by pair with everything that may end it."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asynccb import Callback, CallbackError, Run, RunCancelled, Trainer
from asynccb.budget import budget, cpu_budget
from asynccb.budget.blocked import Pulse
from asynccb.callbacks import ModelCheckpoint
from asynccb.run import live_runs
from asynccb.testing import Recorder, ScriptedModel, settle
from asynccb.training.control import Limits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

EPOCHS = 4
X = np.zeros((2, 1))
PATIENT = 10.0


class Held(Callback):
    """A hook of its waits for a gate."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()


class Slow(Held):
    mailbox_size = 1

    async def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        await self.gate.wait()


class Lockstep(Held):
    lockstep = True

    async def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        await self.gate.wait()


class Opens(Held):
    async def on_train_begin(self, logs: Any = None) -> None:
        await self.gate.wait()


class HeldWriter(ModelCheckpoint):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "{epoch}-{batch}.bin", save_freq=1)
        self.disk = threading.Event()

    def _write_now(self, save: Any, snapshot: Any) -> None:
        assert self.disk.wait(30)
        super()._write_now(save, snapshot)


class Fails(Callback):
    """Fails when it is told to, on the loop."""

    def on_checkpoint_saved(self, path: str, epoch: int) -> None:
        if path == "fail":
            raise OSError("told to")


class Computes(ScriptedModel):
    """Takes turns with others."""

    needs_cpu = True


@pytest.fixture(autouse=True)
def _one_token(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Who holds it keeps it, though the test that does computes nothing."""
    monkeypatch.setattr(Pulse, "is_blocked", lambda pulse, seen_at: False)
    with cpu_budget(tokens=1):
        yield


class Scene:
    """A run whose thread waits for ``reason``, and what makes that come true."""

    def __init__(self, reason: str, folder: Path) -> None:
        self.reason = reason
        self.recorder = Recorder()
        self.source_gate = asyncio.Event()
        callbacks: list[Callback] = [self.recorder, Fails()]
        data: Any = X
        self.fulfil: Callable[[], object] = lambda: self.run.resume()
        if reason == "feed":
            data, self.fulfil = self.source(), self.source_gate.set
        elif reason == "pool":
            writer = HeldWriter(folder)
            callbacks.append(writer)
            self.fulfil = writer.disk.set
        elif reason == "compute token":
            self.holder = budget().join(lambda: None)
            self.fulfil = self.holder.leave
        elif reason != "pause":
            held = {"mailbox": Slow, "lockstep": Lockstep, "train begin": Opens}[reason]()
            callbacks.append(held)
            self.fulfil = held.gate.set
        trainer = Trainer(Computes() if reason == "compute token" else ScriptedModel())
        trainer._limits = Limits(grace=0.05, last_words=0.05, poll=0.01)
        shape: dict[str, Any] = {"steps_per_epoch": 2} if reason == "feed" else {"batch_size": 1}
        self.run: Run = trainer.start(data, epochs=EPOCHS, verbose=0, callbacks=callbacks, **shape)
        if reason in ("pause", "compute token"):
            self.run.pause()

    async def source(self) -> AsyncIterator[Any]:
        yield X
        await self.source_gate.wait()
        while True:
            yield X

    async def reached(self) -> None:
        async with asyncio.timeout(PATIENT):
            if (
                self.reason == "compute token"
            ):  # in the midst of the training: it gives its own back in a pause
                await self._waits_for("pause")
                self.holder.request()
                assert self.holder.granted
                self.run.resume()
            await self._waits_for(self.reason)

    async def _waits_for(self, reason: str) -> None:
        await settle()
        while self.run._parts.control.waiting != reason:
            await settle()

    async def ended(self) -> BaseException | None:
        """What the run raises; it ends in time."""
        async with asyncio.timeout(PATIENT):
            try:
                await self.run
            except (RunCancelled, CallbackError) as error:
                return error
        return None

    async def freed(self) -> None:
        self.fulfil()  # also the disk of a save that nobody waits for any more
        async with asyncio.timeout(PATIENT):
            while not self.run._session.claim.freed or any(  # noqa: ASYNC110  # threads come
                thread.name.startswith("asynccb") for thread in threading.enumerate()
            ):
                await asyncio.sleep(0.001)


REASONS = ["mailbox", "lockstep", "train begin", "feed", "pause", "compute token", "pool"]
STOP_ENDS = {"feed", "pause"}


@pytest.mark.asyncio
@pytest.mark.parametrize("reason", REASONS)
async def test_what_is_waited_for_comes_true(reason: str, tmp_path: Path) -> None:
    scene = Scene(reason, tmp_path)
    await scene.reached()
    scene.fulfil()
    assert await scene.ended() is None
    assert (scene.run.outcome, scene.run.step) == ("completed", 2 * EPOCHS)
    assert scene.recorder.hooks[-1] == "on_train_end"
    await scene.freed()


@pytest.mark.asyncio
@pytest.mark.parametrize("reason", REASONS)
async def test_a_stop_ends_the_waits_for_data_and_for_a_resume_and_leaves_the_others_waiting(
    reason: str, tmp_path: Path
) -> None:
    scene = Scene(reason, tmp_path)
    await scene.reached()
    step = scene.run.step
    scene.run.stop("enough")
    if reason not in STOP_ENDS:
        await asyncio.sleep(0.05)
        assert scene.run._parts.control.waiting == reason
        scene.fulfil()
    assert await scene.ended() is None
    assert scene.run.outcome == "stopped"
    assert scene.run.step <= step + 1
    assert scene.recorder.hooks[-1] == "on_train_end"
    await scene.freed()


@pytest.mark.asyncio
@pytest.mark.parametrize("reason", REASONS)
async def test_a_cancel_ends_every_wait(reason: str, tmp_path: Path) -> None:
    scene = Scene(reason, tmp_path)
    await scene.reached()
    step = scene.run.step
    scene.run.cancel("no more")
    assert isinstance(await scene.ended(), RunCancelled)
    assert scene.run.step == step
    assert scene.recorder.hooks[-2:] == ["on_exception", "on_train_end"]
    await scene.freed()


@pytest.mark.asyncio
@pytest.mark.parametrize("reason", REASONS)
async def test_a_failure_beside_ends_every_wait(reason: str, tmp_path: Path) -> None:
    scene = Scene(reason, tmp_path)
    await scene.reached()
    step = scene.run.step
    scene.run.announce_saved("fail", 0)
    while scene.run._end.outcome is None:  # noqa: ASYNC110  # a thread comes
        await asyncio.sleep(0.001)
    scene.fulfil()  # the hooks of the others have all the time
    assert isinstance(await scene.ended(), CallbackError)
    assert scene.run.step == step
    hooks = [hook for hook in scene.recorder.hooks if hook != "on_checkpoint_saved"]
    assert hooks[-2:] == ["on_exception", "on_train_end"]
    await scene.freed()


@pytest.mark.asyncio
@pytest.mark.parametrize("reason", REASONS)
async def test_a_copy_is_made_in_every_wait_but_the_one_inside_of_a_hook_and_then_after_it(
    reason: str, tmp_path: Path
) -> None:
    scene = Scene(reason, tmp_path)
    await scene.reached()
    asked = asyncio.create_task(scene.run.snapshot())
    if reason == "pool":  # inside of a hook, where a copy would be of no defined moment
        await asyncio.sleep(0.05)
        assert not asked.done()
        scene.fulfil()
    async with asyncio.timeout(PATIENT):
        snapshot = await asked
    assert set(snapshot.arrays["weights"]) == {float(snapshot.step)}
    if reason != "pool":
        assert scene.run._parts.control.waiting == reason
    scene.run.cancel()
    await scene.ended()
    await scene.freed()


@pytest.mark.asyncio
@pytest.mark.parametrize("reason", REASONS)
async def test_a_flush_in_every_wait_ends_with_a_cancel_at_the_latest(reason: str, tmp_path: Path) -> None:
    scene = Scene(reason, tmp_path)
    await scene.reached()
    flushed = asyncio.create_task(scene.run.flush())
    if reason in ("feed", "pause", "compute token"):  # nobody's hook is under way
        async with asyncio.timeout(PATIENT):
            await flushed
    else:
        await asyncio.sleep(0.05)
        assert not flushed.done()
    scene.run.cancel()
    await scene.ended()
    async with asyncio.timeout(PATIENT):
        await flushed
    await scene.freed()


def join(name: str) -> None:
    for thread in threading.enumerate():
        if thread.name == name:
            thread.join(PATIENT)
            assert not thread.is_alive()


@pytest.mark.parametrize("reason", REASONS)
def test_a_loop_that_is_closed_ends_every_wait(reason: str, tmp_path: Path) -> None:
    async def main() -> Scene:
        scene = Scene(reason, tmp_path)
        await scene.reached()
        return scene

    # asyncio says that tasks were destroyed; whoever closes a loop under its tasks is told so by it.
    logging.getLogger("asyncio").disabled = True
    try:
        loop = asyncio.new_event_loop()
        scene = loop.run_until_complete(main())
        loop.close()
        join(f"asynccb {scene.run.name}")
        assert scene.run.outcome == "cancelled"
        assert live_runs() == []
        if reason in ("pool", "compute token"):
            scene.fulfil()
            join("asynccb checkpoint")
        assert budget()._shares == {}
        del scene
        gc.collect()
    finally:
        logging.getLogger("asyncio").disabled = False
