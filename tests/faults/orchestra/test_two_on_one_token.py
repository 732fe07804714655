"""Two trainings share one compute token, and one waits for what only the other can do: neither may keep the
token from the other."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from waiting import PATIENT, until

from asynccb import Callback, Orchestrator, Run, RunCancelled, Trainer
from asynccb.budget import Share, blocked, budget, cpu_budget
from asynccb.budget.blocked import Pulse
from asynccb.callbacks import ModelCheckpoint
from asynccb.testing import ScriptedModel
from asynccb.training.control import Limits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

X = np.zeros((2, 1))
EPOCHS = 3
A_WHILE = 0.1
"""Seconds in which a pair that is not stuck has long ended."""


class Computes(ScriptedModel):
    needs_cpu = True


@pytest.fixture(autouse=True)
def _one_token() -> Iterator[None]:
    with cpu_budget(tokens=1):
        yield
    statistics = budget().statistics()
    assert (statistics.holding, statistics.waiting, budget()._shares) == (0, 0, {})


@pytest.fixture
def _never_lent(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not given back is not lent either."""
    monkeypatch.setattr(Pulse, "is_blocked", lambda pulse, seen_at: False)


@pytest.fixture
def _lent_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "SECONDS", 0.03)
    monkeypatch.setattr(blocked, "BLIND", 0.03)


def start(data: Any, *callbacks: Callback, model: Any = None, **more: Any) -> Run:
    trainer = Trainer(Computes() if model is None else model)
    trainer._limits = Limits(grace=0.05, last_words=0.05, poll=0.01)
    shape = {"batch_size": 1} if data is X else {"steps_per_epoch": 2}
    return trainer.start(data, epochs=EPOCHS, verbose=0, callbacks=callbacks, **shape, **more)


class Tells(Callback):
    """Does something on the loop when it has come so far."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act
        self._loop = asyncio.get_running_loop()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if epoch == 1:
            self._loop.call_soon_threadsafe(self._act)


class Slow(Callback):
    mailbox_size = 1

    def __init__(self) -> None:
        self.gate = asyncio.Event()

    async def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        await self.gate.wait()


class Lockstep(Slow):
    lockstep = True


class Opens(Slow):
    async def on_train_begin(self, logs: Any = None) -> None:
        await self.gate.wait()


class HeldWriter(ModelCheckpoint):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "{epoch}-{batch}.bin", save_freq=1)
        self.disk = threading.Event()

    def _write_now(self, save: Any, snapshot: Any) -> None:
        assert self.disk.wait(PATIENT)
        super()._write_now(save, snapshot)


class AtGate(Callback):
    """Waits as a training does for a segment of its model that is being copied."""

    def __init__(self) -> None:
        self.copied = False

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.run._parts.control.wait("gate", lambda: self.copied, unending=True)

    def copy(self) -> None:
        self.copied = True
        self.run._parts.control.nudge()


def waits(reason: str, folder: Path) -> tuple[Run, Callable[[], object]]:
    """A training that will wait for ``reason``, and what ends that."""
    if reason == "feed":
        gate = asyncio.Event()

        async def source() -> AsyncIterator[Any]:
            yield X
            await gate.wait()
            while True:
                yield X

        return start(source()), gate.set
    if reason == "pause":
        run = start(X)
        run.pause()
        return run, run.resume
    if reason == "pool":
        writer = HeldWriter(folder)
        return start(X, writer), writer.disk.set
    if reason == "gate":
        at_gate = AtGate()
        return start(X, at_gate), at_gate.copy
    held = {"mailbox": Slow, "lockstep": Lockstep, "train begin": Opens}[reason]()
    return start(X, held), held.gate.set


REASONS = ["mailbox", "lockstep", "train begin", "feed", "pause", "pool", "gate"]


@pytest.mark.asyncio
@pytest.mark.parametrize("reason", REASONS)
@pytest.mark.usefixtures("_never_lent")
async def test_a_training_that_waits_for_another_one_leaves_it_the_token(reason: str, tmp_path: Path) -> None:
    waiting, fulfil = waits(reason, tmp_path)
    await until(lambda: waiting._parts.control.waiting == reason)
    computing = start(X, Tells(fulfil))
    async with asyncio.timeout(PATIENT):
        await computing
        await waiting
    assert (waiting.outcome, computing.outcome) == ("completed", "completed")


@pytest.mark.asyncio
@pytest.mark.parametrize("reason", REASONS)
@pytest.mark.usefixtures("_never_lent")
async def test_a_token_that_is_kept_in_a_wait_holds_both_up_for_ever(
    reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: the same pairs with a share that is not given back."""
    waiting, fulfil = waits(reason, tmp_path)
    kept: list[Share] = []
    with monkeypatch.context() as patch:
        patch.setattr(Share, "give_back", lambda share: kept.append(share))
        await until(lambda: waiting._parts.control.waiting == reason)
        computing = start(X, Tells(fulfil))
        await until(lambda: computing._parts.control.waiting == "compute token")
        await asyncio.sleep(A_WHILE)
        assert (computing._parts.control.waiting, computing.step) == ("compute token", 0)
        assert waiting._parts.control.waiting == reason
    kept[0].give_back()
    async with asyncio.timeout(PATIENT):
        await computing
        await waiting


@pytest.mark.asyncio
@pytest.mark.parametrize("lockstep", [True, False])
@pytest.mark.usefixtures("_never_lent")
async def test_a_hook_may_await_the_end_of_another_training(lockstep: bool) -> None:
    class Awaits(Callback):
        async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            seen.append((await other).outcome)

    seen: list[str | None] = []
    Awaits.lockstep = lockstep
    async with asyncio.timeout(PATIENT), Orchestrator(slots=2) as orch:
        orch.submit(Trainer(Computes()), X, batch_size=1, epochs=2, callbacks=Awaits())
        other = orch.submit(Trainer(Computes()), X, batch_size=1, epochs=9)
    assert seen == ["completed"] * 2


# ---------------------------------------------------------------- what blocks without a word


class Blocks(Callback):
    """Its inline hook blocks the thread until another training has come so far."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        assert self._event.wait(PATIENT)


class BlocksInBatch(Computes):
    def __init__(self, event: threading.Event) -> None:
        super().__init__()
        self._event = event

    def train_batch(self, batch: Any) -> Any:
        assert self._event.wait(PATIENT)
        return super().train_batch(batch)


def blocking(where: str, event: threading.Event) -> Run:
    def data() -> Iterator[Any]:
        while True:
            assert event.wait(PATIENT)
            yield X

    if where == "data":
        return start(data())
    return start(X, Blocks(event)) if where == "hook" else start(X, model=BlocksInBatch(event))


@pytest.mark.asyncio
@pytest.mark.parametrize("where", ["hook", "batch", "data"])
@pytest.mark.usefixtures("_lent_soon")
async def test_a_thread_that_is_blocked_by_another_training_lends_it_the_token(where: str) -> None:
    event = threading.Event()
    held = blocking(where, event)
    await until(lambda: budget().statistics().holding)
    computing = start(X, Tells(event.set))
    async with asyncio.timeout(PATIENT):
        await computing
        await held
    assert (held.outcome, computing.outcome) == ("completed", "completed")


@pytest.mark.asyncio
@pytest.mark.parametrize("where", ["hook", "batch", "data"])
@pytest.mark.usefixtures("_never_lent")
async def test_where_it_is_not_lent_both_stand_still(where: str) -> None:
    """The negative control."""
    event = threading.Event()
    held = blocking(where, event)
    await until(lambda: budget().statistics().holding)
    computing = start(X, Tells(event.set))
    await until(lambda: computing._parts.control.waiting == "compute token")
    await asyncio.sleep(A_WHILE)
    assert (computing._parts.control.waiting, computing.step) == ("compute token", 0)
    event.set()
    await computing
    await held


# ---------------------------------------------------------------- a thread that never comes back


@pytest.mark.asyncio
@pytest.mark.usefixtures("_never_lent")
async def test_a_thread_that_is_given_up_keeps_no_token(caplog: pytest.LogCaptureFixture) -> None:
    event = threading.Event()
    stuck = blocking("batch", event)
    await until(lambda: budget().statistics().holding)
    computing = start(X)
    await until(lambda: computing._parts.control.waiting == "compute token")
    stuck.cancel("no more")
    async with asyncio.timeout(PATIENT):
        with pytest.raises(RunCancelled):
            await stuck
        await computing
    assert computing.outcome == "completed"
    assert "did not come back" in caplog.text
    event.set()
    await until(lambda: stuck._session.claim.freed)


@pytest.mark.asyncio
@pytest.mark.usefixtures("_never_lent")
async def test_a_training_that_is_cancelled_in_the_line_ends_though_the_token_is_not_free() -> None:
    event = threading.Event()
    held = blocking("batch", event)
    await until(lambda: budget().statistics().holding)
    runs = [start(X) for _ in range(3)]
    await until(lambda: budget().statistics().waiting == 3)
    for run in runs:
        run.cancel()
    async with asyncio.timeout(PATIENT):
        await asyncio.gather(*runs, return_exceptions=True)
    assert [run.outcome for run in runs] == ["cancelled"] * 3
    assert (held.outcome, budget().statistics().waiting) == (None, 0)
    event.set()
    await held


@pytest.mark.asyncio
async def test_a_snapshot_of_a_training_that_waits_for_its_turn_is_taken_at_once() -> None:
    event = threading.Event()
    held = blocking("batch", event)
    await until(lambda: budget().statistics().holding)
    run = start(X)
    await until(lambda: run._parts.control.waiting == "compute token")
    async with asyncio.timeout(PATIENT):
        snapshot = await run.snapshot()
    assert snapshot.step == 0
    run.stop()
    event.set()
    await held
    await run
