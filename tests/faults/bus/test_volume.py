"""A hundred thousand events for ten callbacks, some of which stall, fail or are slow: what each of them got
is accounted for to the last event, and the others got everything."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asynccb import Callback, RunCancelled, Trainer
from asynccb.bus.mailbox import Mailbox
from asynccb.testing import ScriptedModel, settle
from asynccb.training.control import Limits

if TYPE_CHECKING:
    from asynccb.run import Run

# Hooks that wait for a busy loop thread to give the interpreter lock away look slow.
pytestmark = pytest.mark.filterwarnings("ignore:Inline hooks:UserWarning")

MANY = 100_000
"""Events of batches in the fast tier."""
LARGEST_GROWTH = 32 << 20
"""Bytes by which the resident memory may grow over a million events."""


class Counts(Callback):
    """Counts the events that it gets, and those that were not behind the one before."""

    def __init__(self) -> None:
        self.got = self.disorder = 0
        self.last = -1
        self.ended = False

    async def take(self, number: int) -> None:
        self.got += 1
        self.disorder += number <= self.last
        self.last = number

    async def on_train_begin(self, logs: Any = None) -> None:
        self.got += 1

    async def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        await self.take(2 * batch)

    async def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        await self.take(2 * batch + 1)

    async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.got += 1

    async def on_train_end(self, logs: Any = None) -> None:
        self.got += 1
        self.ended = True


class DropsOldest(Counts):
    overflow = "drop_oldest"


class Latest(Counts):
    overflow = "latest"


class Stalled(Counts):
    """Its hook for the first batch does not end before the training does."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = asyncio.Event()

    async def take(self, number: int) -> None:
        await super().take(number)
        await self.go_on.wait()


class StalledDropsOldest(Stalled):
    overflow = "drop_oldest"


class StalledLatest(Stalled):
    overflow = "latest"


class Slow(Counts):
    async def take(self, number: int) -> None:
        await super().take(number)
        await asyncio.sleep(0)


class SlowLatest(Slow):
    overflow = "latest"

    async def take(self, number: int) -> None:
        await super().take(number)
        await asyncio.sleep(0.001)


class Fails(Counts):
    """Fails with every hundredth event."""

    on_error = "warn"

    async def take(self, number: int) -> None:
        await super().take(number)
        if number % 100 == 0:
            raise OSError("a disk")


class FailsForGood(Fails):
    on_error = "disable"


class ReleasesStalled(Counts):
    """The last one: lets the stalled ones go when the training is over for the others."""

    def __init__(self, stalled: list[Stalled]) -> None:
        super().__init__()
        self.stalled = stalled

    async def on_train_end(self, logs: Any = None) -> None:
        await super().on_train_end(logs)
        for callback in self.stalled:
            callback.go_on.set()


def ten() -> list[Counts]:
    stalled: list[Stalled] = [StalledDropsOldest(), StalledLatest()]
    others = [Counts(), DropsOldest(), Latest(), Slow(), SlowLatest(), Fails(), FailsForGood()]
    return [*stalled, *others, ReleasesStalled(stalled)]


def started(batches: int, callbacks: list[Any]) -> Run:
    data = np.zeros((batches, 1))
    return Trainer(ScriptedModel()).start(data, batch_size=1, shuffle=False, verbose=0, callbacks=callbacks)


async def trained(batches: int) -> tuple[list[Counts], Run]:
    callbacks = ten()
    run = started(batches, callbacks)
    await run
    return callbacks, run


def faults(run: Run, callbacks: list[Counts], events: int) -> list[str]:
    """What is wrong with the accounts of callbacks that should each have been told of ``events`` events."""
    found = []
    for callback in callbacks:
        name = type(callback).__name__
        counts = run.stats.callbacks[name]
        if counts.handled + counts.dropped + counts.lost + counts.waiting != events:
            found.append(f"{name}: {counts} are not {events} events")
        if callback.got != counts.handled:
            found.append(f"{name} got {callback.got} events and {counts.handled} were counted")
        if callback.disorder:
            found.append(f"{name} got {callback.disorder} events out of order")
        room = {"wait": counts.bound, "drop_oldest": counts.bound + 1, "latest": len("ab") + 4}
        if counts.peak > room[counts.policy]:
            found.append(f"{name}: {counts.peak} events waited")
        if counts.policy == "wait" and counts.dropped and not isinstance(callback, FailsForGood):
            found.append(f"{name} waits for room, and {counts.dropped} events were dropped")
    return found


def test_of_a_hundred_thousand_events_every_one_is_handled_or_counted_for_each_of_ten_callbacks() -> None:
    callbacks, run = asyncio.run(trained(MANY // 2))  # no loop in debug mode, which is many times slower
    assert faults(run, callbacks, MANY + 3) == []
    counts = run.stats.callbacks
    for healthy in ("Counts", "Slow", "Fails", "ReleasesStalled"):
        assert counts[healthy].handled == MANY + 3
    # Or the test is of no use: the stalled ones were far behind, and so was the one that kept failing.
    assert counts["StalledDropsOldest"].dropped > MANY - 2000
    assert counts["StalledLatest"].dropped > MANY - 20
    assert callbacks[-2].got == 1 + 1 + 1  # train begin, the batch that failed, train end
    assert run.history.failures
    assert all(callback.ended for callback in callbacks)


@pytest.mark.asyncio
async def test_a_mailbox_without_a_bound_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the bound."""
    monkeypatch.setattr(Mailbox, "overflow", lambda box, entry: setattr(box, "peak", len(box.queue)))
    callbacks, run = await trained(1000)
    waited = [fault for fault in faults(run, callbacks, 2003) if fault.endswith("events waited")]
    assert [fault.partition(":")[0] for fault in waited[:2]] == ["StalledDropsOldest", "StalledLatest"]


@pytest.mark.asyncio
async def test_an_event_that_is_dropped_without_being_counted_would_be_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Negative control of the accounts."""

    def drop(box: Mailbox, at: int) -> None:
        del box.queue[at]

    monkeypatch.setattr(Mailbox, "_drop", drop)
    callbacks, run = await trained(1000)
    accounts = [fault.partition(": Mailbox")[0] for fault in faults(run, callbacks, 2003)]
    assert accounts[:2] == ["StalledDropsOldest", "StalledLatest"]


class Pump(Callback):
    """How a bus of one task would be: whoever stands behind a stalled callback gets nothing."""

    overflow = "drop_oldest"

    def __init__(self, callbacks: list[Counts]) -> None:
        self.callbacks = callbacks

    async def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        for callback in self.callbacks:
            await callback.on_train_batch_end(batch, logs)


@pytest.mark.asyncio
async def test_one_task_for_all_callbacks_would_keep_the_events_from_those_behind_a_stalled_one() -> None:
    """Negative control of the isolation."""
    stalled, healthy = Stalled(), Counts()
    last = ReleasesStalled([stalled])
    await started(5000, [Pump([stalled, healthy]), last])
    assert last.got == 10_003
    assert healthy.got < 5000


@pytest.mark.asyncio
async def test_a_stalled_callback_that_wants_every_event_holds_the_training_and_nobody_else() -> None:
    stalled, healthy, slow = Stalled(), Counts(), Slow()
    trainer = Trainer(ScriptedModel())
    trainer._limits = Limits(grace=0.05, slow_mailbox=1e6)
    data = np.zeros((50_000, 1))
    run = trainer.start(data, batch_size=1, shuffle=False, verbose=0, callbacks=[stalled, healthy, slow])
    while run.stats.waits.get("mailbox", 0) == 0:  # noqa: ASYNC110  a thread brings it about
        await asyncio.sleep(0.001)
    await settle()
    stats = run.stats.callbacks["Stalled"]
    emitted = 1 + stats.waiting + 1  # train begin, those that wait, the one that it stalls with
    assert stats.bound - 32 <= stats.waiting <= stats.bound
    assert [run.stats.callbacks[name].handled for name in ("Counts", "Slow")] == [emitted] * 2
    assert run.stats.callbacks["Stalled"].held == 1
    run.cancel()
    with pytest.raises(RunCancelled):
        await run
    assert healthy.ended
    assert slow.ended
    assert (stalled.got, stalled.ended) == (3, True)  # its first hook, the one that stalled, the last
    counts = run.stats.callbacks["Stalled"]
    assert (counts.waiting, counts.handled + counts.lost) == (0, run.stats.callbacks["Counts"].handled)


MILLION = """
import asyncio, importlib.util, os, sys

spec = importlib.util.spec_from_file_location("volume", sys.argv[1])
volume = importlib.util.module_from_spec(spec)
spec.loader.exec_module(volume)


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Watches(volume.Counts):
    peak = warm = 0

    async def take(self, number):
        await super().take(number)
        if number == 20_000:
            self.warm = resident()
        elif number > 20_000 and number % 2000 == 0:
            self.peak = max(self.peak, resident())


async def main():
    watches = Watches()
    callbacks = volume.ten()
    callbacks[2] = watches
    run = volume.started(500_000, callbacks)
    await run
    faults = volume.faults(run, callbacks, 1_000_003)
    assert faults == [], faults
    print(watches.peak - watches.warm)


asyncio.run(main())
"""


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_a_million_events_for_ten_callbacks_take_no_more_memory() -> None:
    command = [sys.executable, "-c", MILLION, __file__]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    assert int(child.stdout) <= LARGEST_GROWTH, f"grew by {int(child.stdout) >> 20} MiB"
