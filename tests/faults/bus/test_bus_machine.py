"""The bus beside a list: whatever callbacks, readers and a cancelling runner do, each event is delivered in
order, or counted."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import random
from time import perf_counter
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from asynccb import Callback
from asynccb.bus import delivery
from asynccb.bus.delivery import STRIDE, Consumer
from asynccb.bus.dispatch import Dispatcher, Subscriber
from asynccb.bus.mailbox import Mailbox, Work, hook_of, marker
from asynccb.bus.readers import Readers
from asynccb.bus.wakeup import Wakeup
from asynccb.callbacks.hooks import read_hooks
from asynccb.events import Gap, Logs, TrainEnd
from asynccb.training.control import Limits

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

FAST = settings(
    max_examples=300, stateful_step_count=50, suppress_health_check=list(HealthCheck), deadline=None
)
LONG = settings(FAST, max_examples=3000, stateful_step_count=100, derandomize=False, print_blob=True)


class Loop(asyncio.SelectorEventLoop):
    """Goes one step at a time. Its clock goes on with each, so that what is delayed by a few milliseconds
    comes some steps later."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def time(self) -> float:
        return self.now

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.now += 0.002
            self.call_soon(self.stop)
            self.run_forever()

    def tidy(self) -> None:
        tasks = asyncio.all_tasks(self)
        for task in tasks:
            task.cancel()
        self.step(3)
        self.close()


# ---------------------------------------------------------------- the bus


class Hooked(Callback):
    """Its hooks do what the test says: they return at once, are slow, fail, or stall."""

    def __init__(self) -> None:
        self.mode = "quick"
        self.ran: list[int] = []
        self.running = 0
        self.failed = 0
        self.go_on: asyncio.Future[None] | None = None

    async def hook(self, number: int) -> None:
        assert not self.running, "two hooks of one callback at a time"
        self.running = 1
        self.ran.append(number)
        try:
            if self.mode == "slow":
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            elif self.mode == "fails":
                self.failed += 1
                raise OSError("!")
            elif self.mode == "stalls":
                self.go_on = asyncio.get_running_loop().create_future()
                await self.go_on
        finally:
            self.running = 0

    def release(self) -> None:
        if self.go_on is not None and not self.go_on.done():
            self.go_on.set_result(None)

    async def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        await self.hook(batch)

    async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        await self.hook(epoch)

    async def on_train_end(self, logs: Any = None) -> None:
        await self.hook(logs["number"])


class Waits(Hooked):
    mailbox_size = 4


class DropsOldest(Hooked):
    overflow, mailbox_size = "drop_oldest", 3


class Latest(Hooked):
    overflow = "latest"


class Handle:
    """A snapshot that a hook was to use."""

    whole, released = True, False

    def release(self) -> None:
        self.released = True


class HandsOver(Hooked):
    """Inline, with a slow half that uses a snapshot."""

    mailbox_size = 4

    def __init__(self) -> None:
        super().__init__()
        self.handles: list[Handle] = []

    def _hand_over(self, number: int) -> Coroutine[Any, Any, None]:
        self.handles.append(handle := Handle())
        bus.dispatcher._snapshots.taken.append((self, handle))  # type: ignore[arg-type]
        return self._later(number, handle)

    async def _later(self, number: int, handle: Handle) -> None:
        try:
            await self.hook(number)
        finally:
            handle.release()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> Any:
        return self._hand_over(batch)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> Any:
        return self._hand_over(epoch)

    def on_train_end(self, logs: Any = None) -> Any:
        return self._hand_over(logs["number"])


class Gate:
    copying = False

    def finish(self) -> None: ...


class Control:
    """Waits by letting the loop go on."""

    limits = Limits()

    def __init__(self, machine: Bus) -> None:
        self.machine = machine

    def wait(self, reason: str, predicate: Callable[[], bool], **_: Any) -> bool:
        self.machine.go_on_until(predicate)
        return True


LAST = 10**9
KINDS: list[type[Hooked]] = [Waits, DropsOldest, Latest, HandsOver]
bus: Bus


class Bus(RuleBasedStateMachine):
    """Dispatcher, wake-up, mailboxes, consumers and readers of one run, beside lists of what was emitted."""

    policy_of_room = staticmethod(Mailbox._has_room)

    @initialize(seed=st.integers(0, 2**16))
    def start(self, seed: int) -> None:
        global bus
        bus = self
        self.draw = random.Random(seed)
        self.loop = Loop()
        self.callbacks = [kind() for kind in KINDS]
        delivery.perf_counter = self.loop.time  # no turn ends because a host was busy
        self.wakeup = Wakeup(self.loop, self.deliver)
        self.readers = Readers(6, lambda: self.dispatcher.rebuild())
        self.failures: list[Any] = []
        self.subscribers = [self.subscriber(callback) for callback in self.callbacks]
        self.dispatcher = Dispatcher(
            self.subscribers,
            self.readers,
            self.wakeup,
            Control(self),  # type: ignore[arg-type]
            Gate(),  # type: ignore[arg-type]
            failed=self.failures.append,
            warn=lambda *_: None,
        )
        for subscriber in self.subscribers:
            subscriber.begun = True
        self.consumers = [
            Consumer(
                subscriber.name,
                subscriber.mailbox,
                subscriber.beside,
                failed=self.failures.append,
                moved=lambda: None,
                cancelled=lambda reason: None,
            )
            for subscriber in self.subscribers
        ]
        self.sent: list[list[int]] = [[] for _ in KINDS]
        self.absent = [False] * len(KINDS)  # given up: nothing of it is counted as run any more
        self.cancels = [0] * len(KINDS)
        self.marks: list[tuple[int, int, asyncio.Future[None]]] = []
        self.numbers = itertools.count()
        self.streams: list[tuple[Any, list[Any]]] = []
        self.closed = False

        async def begin() -> None:
            for consumer in self.consumers:
                consumer.start(contextvars.copy_context(), consumer.name)

        self.loop.run_until_complete(begin())

    def subscriber(self, callback: Callback) -> Subscriber:
        hooks = read_hooks(callback)
        name = type(callback).__name__
        box = Mailbox(name, callback.overflow, callback.mailbox_size, self.wait_for_room)
        return Subscriber(
            name, callback, hooks.inline, hooks.beside, box, lockstep=False, changes_model=False
        )

    def wait_for_room(self, box: Mailbox, has_room: Callable[[], bool]) -> None:
        self.go_on_until(has_room)

    def go_on_until(self, predicate: Callable[[], bool]) -> None:
        for _ in range(1000):
            if predicate():
                return
            for callback in self.callbacks:
                callback.mode = "quick"
                callback.release()
            self.loop.step()
        raise AssertionError("the training would wait for ever")

    def deliver(self) -> None:
        woken = [consumer for consumer in self.consumers if consumer.mailbox.queue]
        self.draw.shuffle(woken)
        for consumer in woken:
            consumer.wake()
        self.readers.wake()

    def emitted(self) -> int:
        number = next(self.numbers)
        for at, subscriber in enumerate(self.subscribers):
            if not (subscriber.muted and isinstance(subscriber.callback, HandsOver)):
                self.sent[at].append(number)
        return number

    # What happens -------------------------------------------------------------------------------------------

    @precondition(lambda self: not self.closed)
    @rule(times=st.integers(1, 6))
    def emit_batches(self, times: int) -> None:
        for _ in range(times):
            number = self.emitted()
            self.dispatcher.emit.batch_end(number, Logs(loss=1.0), 0, number)

    @precondition(lambda self: not self.closed)
    @rule()
    def emit_an_epoch_end(self) -> None:
        number = self.emitted()
        self.dispatcher.emit.epoch_end(number, Logs(loss=1.0), number)

    @rule(times=st.integers(1, 12))
    def let_the_loop_go_on(self, times: int) -> None:
        self.loop.step(times)

    @rule(at=st.integers(0, 3), mode=st.sampled_from(["quick", "slow", "fails", "stalls"]))
    def change_a_hook(self, at: int, mode: str) -> None:
        self.callbacks[at].mode = mode
        self.callbacks[at].release()

    @rule(at=st.integers(0, 3), chance=st.integers(0, 3))
    def mute(self, at: int, chance: int) -> None:
        if not chance and not self.consumers[at].ended:  # seldom, for nothing follows it
            self.consumers[at].mute()
            self.dispatcher.mute(self.subscribers[at])

    @rule(at=st.integers(0, 3))
    def cancel_a_task(self, at: int) -> None:
        consumer = self.consumers[at]
        if not consumer.ended and consumer.task is not None:
            self.cancels[at] += 1
            consumer.task.cancel()

    @rule(at=st.integers(0, 3), chance=st.integers(0, 9))
    def give_up(self, at: int, chance: int) -> None:
        if not chance and not self.consumers[at].ended:
            self.absent[at] = True
            self.consumers[at].abandon(self.loop.time())

    @rule(at=st.integers(0, 3), chance=st.integers(0, 9))
    def cut_short(self, at: int, chance: int) -> None:
        consumer = self.consumers[at]
        if not chance and not consumer.ended and consumer.given_up_at is None:
            self.absent[at] = True
            waiting = [entry for entry in consumer.mailbox.queue if entry[3] >= 0]
            lost = consumer.cut_short(self.loop.time())
            assert lost == len([entry for entry in waiting if hook_of(entry) != "on_train_end"])

    @rule(at=st.integers(0, 3))
    def mark(self, at: int) -> None:
        if not self.consumers[at].ended:
            done = self.loop.create_future()
            self.consumers[at].mailbox.put(marker(done))
            self.marks.append((at, len(self.sent[at]), done))
            self.wakeup.flush()

    @rule(since=st.sampled_from([None, 0]))
    def open_a_stream(self, since: int | None) -> None:
        if len(self.streams) < 3:
            self.streams.append((self.dispatcher.stream(since, lambda: None), []))

    @rule(times=st.integers(1, 10))
    def read_streams(self, times: int) -> None:
        for stream, seen in self.streams:
            for _ in range(times):
                reading = self.loop.create_task(anext(stream))
                self.loop.step()
                if not reading.done():
                    reading.cancel()
                    self.loop.step()
                    break
                seen.append(reading.result())

    @rule()
    def drop_a_stream(self) -> None:
        if self.streams:
            self.streams.pop(0)

    @rule(chance=st.integers(0, 4))
    def close(self, chance: int) -> None:
        if not chance:
            for _ in range(2):  # once more changes nothing
                if not self.closed:
                    self.dispatcher.close(TrainEnd, 0, Logs(number=LAST))
                    for sent in self.sent:
                        sent.append(LAST)
                self.closed = True
                for consumer in self.consumers:
                    consumer.close()

    # What holds always --------------------------------------------------------------------------------------

    @invariant()
    def every_event_is_accounted_for(self) -> None:
        for at, subscriber in enumerate(getattr(self, "subscribers", [])):
            box = subscriber.mailbox
            counts = box.statistics()
            missing = len(self.sent[at]) - counts.handled - counts.dropped - counts.lost
            missing -= sum(1 for entry in box.queue if entry[3] >= 0)  # a marker is no event
            if box.idle:
                assert missing == 0, (subscriber.name, counts, missing)
                assert counts.handled == len(self.callbacks[at].ran)
            else:  # what is being handled is counted together
                assert 0 <= missing <= STRIDE, (subscriber.name, counts, missing)

    @invariant()
    def each_callback_gets_them_in_order(self) -> None:
        for callback, sent in zip(getattr(self, "callbacks", []), getattr(self, "sent", []), strict=True):
            assert callback.ran == sorted(set(callback.ran) & set(sent)), type(callback).__name__

    @invariant()
    def no_mailbox_is_over_its_bound(self) -> None:
        for subscriber in getattr(self, "subscribers", []):
            box = subscriber.mailbox
            waiting = sum(1 for entry in box.queue if entry[3] >= 0)
            most = {"wait": 2 * box.bound + 1, "drop_oldest": box.bound + 1, "latest": 3}[box.policy]
            assert waiting <= most, (subscriber.name, box.queue)
            if box.policy == "wait" and not subscriber.muted:
                assert box.dropped == 0

    @invariant()
    def streams_tell_of_what_they_miss(self) -> None:
        for stream, seen in getattr(self, "streams", []):
            numbers = [event.seq for event in seen if not isinstance(event, Gap)]
            assert numbers == sorted(set(numbers))
            missing = sum(event.missing for event in seen if isinstance(event, Gap))
            if numbers and stream._held is None:
                begun = numbers[-1] + 1 - len(numbers) - missing
                assert begun >= 0

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        try:
            self.end()
        finally:
            self.streams.clear()
            self.wakeup.close()
            for subscriber in self.subscribers:
                subscriber.mailbox.discard_all()
            self.loop.tidy()
            delivery.perf_counter = perf_counter

    def end(self) -> None:
        for callback in self.callbacks:
            callback.mode = "quick"
        for _ in range(200):
            for callback in self.callbacks:
                callback.release()
            for consumer in self.consumers:
                consumer.close()
            self.loop.step()
            if all(consumer.ended for consumer in self.consumers):
                break
        assert all(consumer.ended for consumer in self.consumers)
        self.every_event_is_accounted_for()
        self.each_callback_gets_them_in_order()
        for at, subscriber in enumerate(self.subscribers):
            counts = subscriber.mailbox.statistics()
            # What is emitted when its consumer has gone lies there, up to the bound.
            assert counts.waiting == 0 or self.absent[at]
            assert counts.lost == 0 or self.absent[at], (subscriber.name, counts)
        assert all(done.done() for _, _, done in self.marks)
        handles = self.callbacks[-1].handles  # type: ignore[attr-defined]
        assert all(handle.released for handle in handles), "a snapshot is kept"


Bus.TestCase.settings = FAST
TestBus = Bus.TestCase
FIND = settings(FAST, phases=[Phase.generate])  # whether a fault is found, not by how few steps


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_bus_beside_its_lists_for_long() -> None:
    run_state_machine_as_test(Bus, settings=LONG)


def drop_uncounted(box: Mailbox, at: int) -> None:
    del box.queue[at]


def lose_uncounted(consumer: Consumer) -> None:
    before = consumer.mailbox.lost
    consumer.mailbox.discard_all()
    consumer.mailbox.lost = before
    while consumer.task is not None and consumer.task.cancelling():
        consumer.task.uncancel()


@pytest.mark.parametrize(
    ("where", "name", "naive"),
    [
        (Mailbox, "_drop", drop_uncounted),
        (Mailbox, "_take_locked", lambda box: box.queue.pop()),
        (Mailbox, "overflow", lambda box, entry: None),
        (Work, "discard", lambda work: work.coroutine.close()),
        (Consumer, "_uncancel", lose_uncounted),
    ],
    ids=["drops without a count", "order", "no bound", "keeps snapshots", "loses events when cancelled"],
)
def test_a_bus_that_breaks_its_law_is_found(
    where: type[Any], name: str, naive: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative controls."""
    monkeypatch.setattr(where, name, naive)
    with pytest.raises((AssertionError, ExceptionGroup)):
        run_state_machine_as_test(Bus, settings=FIND)
