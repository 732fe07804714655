"""What waits for one callback: order, bound, policy, and an account in which nothing is missing."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from asynccb.bus.mailbox import CODES, HOOKS, MARKER, WORK, Entry, Mailbox, Work, hook_of, marker

if TYPE_CHECKING:
    from collections.abc import Callable

BATCH, EPOCH = CODES["on_train_batch_end"], CODES["on_epoch_end"]
BEGIN, END, RAISED = CODES["on_train_begin"], CODES["on_train_end"], CODES["on_exception"]
KEPT = (BEGIN, END, RAISED)


class Waits:
    """Stands for the training thread's wait: notes it, and lets the consumer make room."""

    def __init__(self) -> None:
        self.count = 0
        self.seen: list[int] = []

    def __call__(self, mailbox: Mailbox, has_room: Callable[[], bool]) -> None:
        self.count += 1
        while not has_room():
            self.seen.append(mailbox.take()[3])


class Handle:
    def __init__(self) -> None:
        self.released = False

    def release(self) -> None:
        self.released = True


def refuse_to_wait(mailbox: Mailbox, has_room: Callable[[], bool]) -> None:
    raise AssertionError("this mailbox holds nobody")


def mailbox(policy: str = "wait", bound: int = 4, waits: Any = refuse_to_wait) -> Mailbox:
    return Mailbox("Slow", policy, bound, waits)


def post(box: Mailbox, code: int, seq: int, first: Any = 0) -> None:
    """As the dispatcher does it: the entry goes in first, the limit is looked at afterwards."""
    entry: Entry = (code, first, {}, seq, 0)
    box.queue.append(entry)
    if len(box.queue) >= box.limit:
        box.overflow(entry)


def numbers(box: Mailbox) -> list[int]:
    return [entry[3] for entry in box.queue]


async def work() -> None: ...


# ---------------------------------------------------------------- waiting


def test_a_mailbox_that_waits_takes_the_event_in_first_and_goes_on_at_half_its_bound() -> None:
    waits = Waits()
    box = mailbox(bound=4, waits=waits)
    for seq in range(4):
        post(box, BATCH, seq)
    assert waits.count == 1
    assert waits.seen == [0, 1]
    assert numbers(box) == [2, 3]
    assert box.statistics()[1:6] == (4, 0, 0, 1, 0)


def test_nothing_is_lost_and_nothing_changes_places_where_the_training_waits() -> None:
    waits = Waits()
    box = mailbox(bound=8, waits=waits)
    for seq in range(1000):
        post(box, BATCH, seq)
    assert [*waits.seen, *numbers(box)] == list(range(1000))
    assert box.dropped == 0


@pytest.mark.parametrize("code", [*KEPT, EPOCH])
def test_the_ends_of_a_training_and_of_its_epochs_pass_the_bound_without_a_wait(code: int) -> None:
    box = mailbox(bound=4)
    for seq in range(3):
        post(box, BATCH, seq)
    post(box, code, 3)
    assert numbers(box) == [0, 1, 2, 3]


def test_twice_the_bound_holds_epoch_ends_too() -> None:
    waits = Waits()
    box = mailbox(bound=4, waits=waits)
    for seq in range(7):
        post(box, EPOCH, seq)
    assert waits.count == 0
    post(box, EPOCH, 7)
    assert waits.count == 1
    assert len(box.queue) == 2


def test_what_the_loop_puts_never_waits_and_is_never_dropped() -> None:
    box = mailbox("latest", bound=1)
    done: Any = Handle()
    for _ in range(5):
        box.put(marker(done))
    post(box, BATCH, 1)
    post(box, BATCH, 2)
    assert [entry[0] for entry in box.queue] == [MARKER] * 5 + [BATCH]
    assert numbers(box)[-1] == 2


def test_what_is_put_back_waits_for_a_thread_that_looks_for_what_to_drop() -> None:
    box = mailbox("drop_oldest", bound=1)
    done: Any = Handle()
    post(box, BATCH, 1)
    back = threading.Thread(target=box.put_back, args=(marker(done),))
    with box._dropping:
        for _ in box.queue:  # changed under it, this raises
            back.start()
            back.join(0.02)
    back.join()
    assert [entry[0] for entry in box.queue] == [MARKER, BATCH]


# ---------------------------------------------------------------- dropping


def test_drop_oldest_keeps_the_newest_and_counts_the_rest() -> None:
    box = mailbox("drop_oldest", bound=4)
    for seq in range(10):
        post(box, BATCH, seq)
    assert numbers(box) == [6, 7, 8, 9]
    assert box.statistics()[:4] == (4, 5, 0, 6)


def test_drop_oldest_drops_batches_before_epoch_ends_and_never_the_ends_of_the_training() -> None:
    box = mailbox("drop_oldest", bound=2)
    for seq, code in enumerate([BEGIN, EPOCH, BATCH, BATCH, EPOCH, RAISED, END]):
        post(box, code, seq)
    assert [entry[0] for entry in box.queue] == [BEGIN, EPOCH, RAISED, END]
    assert numbers(box)[1] == 4


def test_latest_keeps_the_newest_of_each_hook() -> None:
    box = mailbox("latest", bound=1024)
    for epoch in range(3):
        for batch in range(5):
            post(box, BATCH, 10 * epoch + batch)
        post(box, EPOCH, 10 * epoch + 5)
    assert numbers(box) == [24, 25]
    assert box.dropped == 14 + 2


def test_latest_counts_coroutines_of_a_hook_as_that_hook() -> None:
    box = mailbox("latest")
    first, second = Work(work(), "on_epoch_end"), Work(work(), "on_epoch_end")
    for seq, made in enumerate([first, second]):
        post(box, WORK, seq, made)
    assert numbers(box) == [1]
    assert first.coroutine.cr_frame is None  # closed
    box.discard_all()


@pytest.mark.parametrize("policy", ["drop_oldest", "latest"])
def test_a_dropped_coroutine_is_closed_and_its_snapshots_released(policy: str) -> None:
    box = mailbox(policy, bound=1)
    handles = [Handle(), Handle()]
    coroutines = [work(), work()]
    for seq in range(2):
        post(box, WORK, seq, Work(coroutines[seq], "on_epoch_end", (handles[seq],)))  # type: ignore[arg-type]
    assert [handle.released for handle in handles] == [True, False]
    assert coroutines[0].cr_frame is None
    box.discard_all()
    assert handles[1].released


def test_an_unknown_policy_has_no_mailbox() -> None:
    with pytest.raises(KeyError):
        mailbox("whatever")


def test_a_consumer_that_finds_its_entry_dropped_takes_one_that_does_nothing() -> None:
    """It has seen the length of the queue; the training drops an entry; only then it takes."""
    box = mailbox("latest")
    code, first, *_ = box.take()
    assert (code, first) == (MARKER, None)


# ---------------------------------------------------------------- the end


def test_what_is_left_at_the_end_is_counted_and_closed_and_markers_are_told() -> None:
    async def scene() -> None:
        box = mailbox()
        handle, done = Handle(), asyncio.get_running_loop().create_future()
        coroutine = work()
        post(box, BATCH, 0)
        post(box, WORK, 1, Work(coroutine, "on_epoch_end", (handle,)))  # type: ignore[arg-type]
        box.put(marker(done))
        assert box.discard_all() == 2
        assert (handle.released, done.done(), coroutine.cr_frame) == (True, True, None)
        assert box.statistics()[:6] == (0, 0, 0, 0, 0, 2)

    asyncio.run(scene())


def test_a_marker_whose_asker_was_cancelled_harms_nobody() -> None:
    async def scene() -> None:
        box = mailbox()
        done = asyncio.get_running_loop().create_future()
        done.cancel()
        box.put(marker(done))
        assert box.discard_all() == 0

    asyncio.run(scene())


def test_a_mailbox_is_finished_only_when_it_is_empty_and_its_consumer_has_parked() -> None:
    box = mailbox()
    assert not box.finished  # the consumer has not begun: it may find entries that already lie here
    box.idle = True
    assert box.finished
    post(box, BATCH, 0)
    assert not box.finished
    box.idle = False
    box.take()
    assert not box.finished


def test_every_hook_has_a_code_of_its_own() -> None:
    assert sorted(CODES.values()) == list(range(len(HOOKS)))
    assert {WORK, MARKER}.isdisjoint(CODES.values())
    made = Work(work(), "on_epoch_end")
    assert [hook_of(entry) for entry in [(BATCH, 0, {}, 0, 0), (WORK, made, None, 0, 0), marker(None)]] == [  # type: ignore[arg-type]
        "on_train_batch_end",
        "on_epoch_end",
        "",
    ]
    made.discard()


# ---------------------------------------------------------------- the law


class Account(RuleBasedStateMachine):
    """A mailbox beside a list. What was emitted is delivered, waiting, dropped or lost; and it never changes
    places."""

    box: Mailbox
    policy: str
    bound: int

    @initialize(policy=st.sampled_from(["wait", "drop_oldest", "latest"]), bound=st.integers(1, 6))
    def open(self, policy: str, bound: int) -> None:
        self.policy, self.bound = policy, bound
        self.delivered: list[int] = []
        self.emitted: list[tuple[int, int]] = []
        self.lost = 0
        self.box = Mailbox("Any", policy, bound, self.make_room)

    def make_room(self, box: Mailbox, has_room: Callable[[], bool]) -> None:
        assert box.queue[-1][3] == self.emitted[-1][1], "the event goes in before the thread waits"
        while not has_room():
            self.deliver()
        assert len(box.queue) <= self.bound // 2

    def deliver(self) -> None:
        self.delivered.append(self.box.take()[3])
        self.box.handled += 1

    @rule(code=st.sampled_from([BATCH, BATCH, CODES["on_train_batch_begin"], EPOCH, BEGIN, END, RAISED]))
    def emit(self, code: int) -> None:
        seq = len(self.emitted)
        self.emitted.append((code, seq))
        post(self.box, code, seq)

    @precondition(lambda self: self.box.queue)
    @rule()
    def take(self) -> None:
        self.deliver()

    @rule()
    def end(self) -> None:
        self.lost += self.box.discard_all()

    @invariant()
    def nothing_is_missing(self) -> None:
        if not hasattr(self, "box"):
            return
        waiting, peak, handled, dropped, held, lost, bound, policy = self.box.statistics()
        assert (bound, policy) == (self.bound, self.policy)
        assert len(self.emitted) == handled + waiting + dropped + lost
        assert (handled, lost) == (len(self.delivered), self.lost)
        assert peak >= waiting
        if self.policy == "wait":
            assert dropped == 0
        else:
            assert held == 0

    @invariant()
    def order_holds(self) -> None:
        if hasattr(self, "box"):
            seen = [*self.delivered, *numbers(self.box)]
            assert seen == sorted(set(seen))

    @invariant()
    def the_bound_holds(self) -> None:
        if not hasattr(self, "box"):
            return
        passing = sum(1 for entry in self.box.queue if entry[0] in KEPT)
        others = [entry[0] for entry in self.box.queue if entry[0] not in KEPT]
        if self.policy == "wait":
            assert len([code for code in others if code != EPOCH]) <= max(1, self.bound)
            assert len(others) <= 2 * self.bound + passing
        elif self.policy == "drop_oldest":
            assert len(others) <= self.bound
        else:
            assert len(others) == len(set(others))

    @invariant()
    def the_ends_of_the_training_are_never_dropped(self) -> None:
        if hasattr(self, "box") and not self.lost:
            there = {*self.delivered, *numbers(self.box)}
            assert {seq for code, seq in self.emitted if code in KEPT} <= there


Account.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestAccount = Account.TestCase


@pytest.mark.parametrize("policy", ["wait", "drop_oldest", "latest"])
def test_a_mailbox_goes_with_its_last_holder_and_waits_for_no_collection(policy: str) -> None:
    mailbox = Mailbox("Tested", policy, 4, lambda box, has_room: None)
    seen = weakref.ref(mailbox)
    gc.disable()
    try:
        del mailbox
        assert seen() is None
    finally:
        gc.enable()
