"""A training thread and its compute token: when it gives it back, when it takes it, what it does without."""

from __future__ import annotations

import queue
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from asynccb.training.control import Control, Interrupt, Limits, SnapshotRequest

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENT = 10.0
REASONS: list[Any] = ["mailbox", "lockstep", "train begin", "feed", "pause", "pool", "gate"]


class Token:
    """A share whose token comes when the test hands it out. Writes down what it was asked."""

    def __init__(self, *, free: bool = True) -> None:
        self.free = free
        self.granted = False
        self.contended = False
        self.wanting = False
        self.over = False
        self.said: list[str] = []
        self.spent = 0.0
        self.weight = 1.0
        self.looked = threading.Event()

    def request(self) -> None:
        self.said.append("request")
        self.granted = self.free
        self.wanting = not self.free

    def give_back(self) -> None:
        self.said.append("give back")
        self.granted = self.wanting = False

    def look_at_others(self) -> None:
        self.looked.set()

    def batch_done(self) -> bool:
        self.said.append("batch")
        return self.over

    def leave(self) -> None:
        self.give_back()


class Snapshot(int):
    def release(self) -> None: ...


class Bench:
    """A control with a token, and a thread that runs with it."""

    def __init__(self, *, free: bool = True, poll: float = 0.01) -> None:
        self.closed = False
        self.control = Control(lambda: self.closed, lambda: None, Limits(poll=poll))
        self.control.capture = lambda: Snapshot(1)  # type: ignore[assignment,return-value]
        self.token = Token(free=free)
        self._result: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def start(self, body: Callable[[], object]) -> None:
        """Runs ``body`` on a thread, and returns when it has entered a wait."""

        def run() -> None:
            try:
                self._result.put(body())
            except BaseException as error:
                self._result.put(error)

        threading.Thread(target=run, daemon=True).start()
        deadline = time.monotonic() + PATIENT
        while self.control.waiting is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def result(self) -> Any:
        result = self._result.get(timeout=PATIENT)
        assert self.control.waiting is None
        return result

    def grant(self) -> None:
        self.token.granted, self.token.wanting = True, False
        self.control.look_up()

    def copy(self) -> Any:
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        assert self.control.ask(SnapshotRequest(answers.put, answers.put))
        return answers.get(timeout=PATIENT)


def holding(**more: Any) -> Bench:
    bench = Bench(**more)
    bench.control.take_turns(bench.token)
    assert bench.token.granted
    bench.token.said.clear()
    return bench


# ---------------------------------------------------------------- before it computes


def test_a_free_token_is_taken_without_waiting() -> None:
    bench = holding()
    assert bench.control.waits == {}


@pytest.mark.parametrize("reason", REASONS)
def test_a_thread_gives_its_token_back_before_it_waits_and_takes_one_afterwards(reason: Any) -> None:
    bench, there = holding(), threading.Event()
    unending = reason == "gate"
    bench.start(lambda: bench.control.wait(reason, there.is_set, unending=unending))
    assert (bench.token.granted, bench.token.said) == (False, ["give back"])
    there.set()
    bench.control.nudge()
    assert bench.result() is True
    assert (bench.token.granted, bench.token.said) == (True, ["give back", "request"])


@pytest.mark.parametrize("reason", REASONS)
def test_what_has_come_true_already_costs_no_token(reason: Any) -> None:
    bench = holding()
    assert bench.control.wait(reason, lambda: True) is True
    assert bench.token.said == []


def test_a_wait_inside_of_a_wait_gives_nothing_back_and_takes_nothing() -> None:
    bench, there, inner = holding(), threading.Event(), iter([False, False, True])

    def capture() -> Any:
        bench.control.wait("gate", lambda: next(inner), unending=True)
        return Snapshot(2)

    bench.control.capture = capture
    bench.start(lambda: bench.control.wait("lockstep", there.is_set))
    assert bench.copy() == 2
    assert bench.token.said == ["give back"]
    there.set()
    bench.control.nudge()
    bench.result()
    assert bench.token.said == ["give back", "request"]


@pytest.mark.parametrize("reason", REASONS[:6])
def test_a_wait_that_is_left_by_a_cancel_takes_no_token(reason: Any) -> None:
    bench = holding()
    bench.start(lambda: bench.control.wait(reason, lambda: False))
    bench.control.interrupt_with("cancelled", "no more")
    assert isinstance(bench.result(), Interrupt)
    assert (bench.token.granted, bench.token.said) == (False, ["give back"])


def test_a_stop_ends_the_wait_and_a_token_is_taken_to_go_on_with() -> None:
    bench = holding()
    bench.start(lambda: bench.control.wait("feed", lambda: False, stop_ends=True))
    bench.control.stop("enough")
    assert bench.result() is False
    assert bench.token.granted


# ---------------------------------------------------------------- the wait for its turn


def waiting(poll: float = 0.01) -> Bench:
    bench = Bench(free=False, poll=poll)
    bench.start(lambda: bench.control.take_turns(bench.token))
    assert bench.control.waiting == "compute token"
    return bench


def test_its_turn_ends_the_wait_and_wakes_it_at_once() -> None:
    bench = waiting(poll=PATIENT * 9)
    bench.grant()
    assert bench.result() is None
    assert bench.token.granted
    assert bench.control.waits == {"compute token": 1}


@pytest.mark.parametrize("end", ["cancelled", "failed", "abandoned", "the loop"])
def test_whoever_must_leave_goes_on_without_a_token_and_raises_nothing_there(end: Any) -> None:
    bench = waiting()
    if end == "the loop":
        bench.closed = True
    else:
        bench.control.interrupt_with(end, "no more")
    assert bench.result() is None
    assert (bench.token.granted, bench.token.wanting) == (False, False)
    assert bench.token.said == ["request", "give back"]
    with pytest.raises(Interrupt):
        bench.control.stopped()


def test_a_stop_leaves_it_waiting_for_its_turn() -> None:
    bench = waiting()
    bench.control.stop("enough")
    bench.copy()
    bench.copy()
    assert bench.control.waiting == "compute token"
    bench.grant()
    assert bench.result() is None
    assert bench.control.stopped()


def test_snapshots_are_served_while_it_waits_for_its_turn() -> None:
    bench = waiting(poll=PATIENT * 9)
    assert bench.copy() == 1
    assert bench.control.waiting == "compute token"
    bench.grant()
    bench.result()


@pytest.mark.parametrize("reason", ["pool", "gate"])
def test_they_are_not_where_it_waits_for_its_turn_inside_of_a_batch_or_hook(reason: Any) -> None:
    bench, there = holding(), threading.Event()
    bench.token.free = False
    more: dict[str, Any] = {"serve": False} if reason == "pool" else {"unending": True}
    bench.start(lambda: bench.control.wait(reason, there.is_set, **more))
    there.set()
    bench.control.nudge()
    bench.token.looked.wait(PATIENT)
    assert bench.control.waiting == "compute token"
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    bench.control.ask(SnapshotRequest(answers.put, answers.put))
    bench.token.looked.clear()
    assert bench.token.looked.wait(PATIENT)
    bench.token.looked.clear()
    assert bench.token.looked.wait(PATIENT)
    assert answers.empty()
    bench.grant()
    bench.result()
    bench.control.safe_point()
    assert answers.get(timeout=PATIENT) == 1


def test_it_looks_at_those_that_hold_a_token_while_it_waits() -> None:
    bench = waiting()
    assert bench.token.looked.wait(PATIENT)
    bench.grant()
    bench.result()


def test_a_wait_for_its_turn_is_no_wait_for_something_else() -> None:
    bench = waiting()
    assert bench.control.blocked_at is None
    bench.grant()
    bench.result()
    there = threading.Event()
    bench.start(lambda: bench.control.wait("feed", there.is_set))
    assert bench.control.blocked_at is not None
    there.set()
    bench.control.nudge()
    bench.token.looked.clear()
    assert bench.token.looked.wait(PATIENT)
    assert bench.control.blocked_at is None  # now it waits for its turn
    bench.grant()
    bench.result()


def test_while_it_closes_it_waits_for_no_token() -> None:
    bench = holding()
    bench.control.closing = True
    bench.token.free = False
    looks = iter([False, True])
    assert bench.control.wait("gate", lambda: next(looks), unending=True) is True
    assert bench.token.said == ["give back", "request", "give back"]


# ---------------------------------------------------------------- turns between batches


def test_alone_it_is_not_asked_between_batches() -> None:
    bench = holding()
    bench.control.attention = True
    bench.control.safe_point()
    assert bench.token.said == []
    assert not bench.control.attention


def test_beside_others_it_is_asked_behind_each_batch_until_they_are_gone() -> None:
    bench = holding()
    bench.token.contended = True
    bench.control.look_up()
    for _ in range(3):
        bench.control.safe_point()
    assert bench.token.said == ["batch"] * 3
    bench.token.contended = False
    for _ in range(3):
        bench.control.safe_point()
    assert bench.token.said == ["batch"] * 3


def test_when_its_slice_is_over_it_lets_the_next_one_compute() -> None:
    bench = holding()
    bench.token.contended = bench.token.over = True
    bench.control.look_up()
    bench.token.free = False
    bench.start(bench.control.safe_point)
    assert bench.control.waiting == "compute token"
    assert bench.token.said == ["batch", "give back", "request"]
    bench.grant()
    bench.result()


def test_a_cancel_in_that_moment_ends_the_training_without_a_turn() -> None:
    bench = holding()
    bench.token.contended = bench.token.over = True
    bench.token.free = False
    bench.control.look_up()
    bench.start(lambda: (bench.control.safe_point(), bench.control.safe_point()))
    bench.control.interrupt_with("cancelled", "no more")
    assert isinstance(bench.result(), Interrupt)
    assert not bench.token.wanting
