"""A thread that holds a token and computes nothing lends it; one that computes does not."""

from __future__ import annotations

import queue
import threading
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from asynccb.budget import Budget, blocked
from asynccb.budget.blocked import BLIND, BUSY, SECONDS, Pulse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATIENT = 10.0


class Clocks:
    """Of the wall and of the thread's processor time; both stand still unless they are moved."""

    def __init__(self) -> None:
        self.now = 100.0
        self.computed = 7.0
        self.gone = False

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float, computed: float = 0.0) -> None:
        self.now += seconds
        self.computed += computed

    def clock_gettime(self, clock: int) -> float:
        if self.gone:
            raise OSError("no such thread")
        return self.computed


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    clocks = Clocks()
    fake = SimpleNamespace(clock_gettime=clocks.clock_gettime, pthread_getcpuclockid=lambda ident: 17)
    monkeypatch.setattr(blocked, "time", fake)
    return clocks


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    """A system that does not tell the processor time of a thread."""
    monkeypatch.setattr(blocked, "time", SimpleNamespace())
    return Clocks()


# ---------------------------------------------------------------- a pulse on clocks that are made up


def test_the_first_look_finds_nobody_blocked_however_long_ago_it_was_seen(clocks: Clocks) -> None:
    pulse = Pulse(clocks)
    clocks.pass_(1000.0)
    assert not pulse.is_blocked(seen_at=1.0)


def test_a_thread_that_computed_nothing_for_a_while_is_blocked(clocks: Clocks) -> None:
    pulse = Pulse(clocks)
    pulse.is_blocked(1.0)
    clocks.pass_(SECONDS * 0.9)
    assert not pulse.is_blocked(1.0)
    clocks.pass_(SECONDS * 0.2)
    assert pulse.is_blocked(1.0)


def test_a_thread_that_computes_is_not_however_long_its_batch(clocks: Clocks) -> None:
    pulse = Pulse(clocks)
    pulse.is_blocked(1.0)
    for _ in range(100):
        clocks.pass_(1.0, computed=1.0)
        assert not pulse.is_blocked(1.0)


def test_a_thread_that_has_a_processor_for_part_of_the_time_computes(clocks: Clocks) -> None:
    pulse = Pulse(clocks)
    pulse.is_blocked(1.0)
    clocks.pass_(SECONDS * 4, computed=SECONDS * 4 * BUSY * 1.01)
    assert not pulse.is_blocked(1.0)
    clocks.pass_(SECONDS * 4, computed=0.0)
    assert pulse.is_blocked(1.0)


def test_looking_begins_anew_with_each_batch_that_ends(clocks: Clocks) -> None:
    pulse = Pulse(clocks)
    for batch in range(10):
        assert not pulse.is_blocked(float(batch))
        clocks.pass_(SECONDS * 0.9)
    assert not pulse.is_blocked(9.0)
    clocks.pass_(SECONDS * 0.2)
    assert pulse.is_blocked(9.0)


def test_what_it_computed_before_somebody_looked_does_not_count(clocks: Clocks) -> None:
    pulse = Pulse(clocks)
    clocks.pass_(50.0, computed=50.0)
    pulse.is_blocked(1.0)
    clocks.pass_(SECONDS * 1.1)
    assert pulse.is_blocked(1.0)


def test_a_thread_that_is_gone_without_a_word_is_blocked_in_the_end(clocks: Clocks) -> None:
    pulse = Pulse(clocks)
    clocks.gone = True
    pulse.is_blocked(1.0)
    clocks.pass_(BLIND * 0.9)
    assert not pulse.is_blocked(1.0)
    clocks.pass_(BLIND * 0.2)
    assert pulse.is_blocked(1.0)


def test_where_the_system_tells_no_processor_time_a_long_batch_counts_as_blocked(blind: Clocks) -> None:
    pulse = Pulse(blind)
    pulse.is_blocked(1.0)
    blind.pass_(BLIND * 0.9, computed=BLIND)
    assert not pulse.is_blocked(1.0)
    blind.pass_(BLIND * 0.2, computed=BLIND)
    assert pulse.is_blocked(1.0)


def test_where_the_system_tells_no_processor_time_short_batches_do_not(blind: Clocks) -> None:
    pulse = Pulse(blind)
    for batch in range(10):
        assert not pulse.is_blocked(float(batch))
        blind.pass_(BLIND * 0.9)


# ---------------------------------------------------------------- real threads


class Threads:
    """Threads that hold the one token of a budget and do something until they are let go."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.go_on = threading.Event()
        self.ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def hold(self, work: Callable[[threading.Event], object]) -> Any:
        """The share of a thread that has the token and does ``work``."""
        shares: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def body() -> None:
            share = self.budget.join(lambda: None)
            share.request()
            shares.put(share)
            try:
                work(self.go_on)
                self.ended.put(share.batch_done())
            finally:
                share.leave()

        thread = threading.Thread(target=body, daemon=True)
        thread.start()
        self._threads.append(thread)
        return shares.get(timeout=PATIENT)

    def end(self) -> None:
        self.go_on.set()
        for thread in self._threads:
            thread.join(PATIENT)
            assert not thread.is_alive()


class NoPools:
    """Leaves the threads of linear algebra alone."""

    threads = None

    def hold(self, threads: int) -> None: ...
    def hold_here(self) -> list[Any]:
        return []

    def restore(self) -> None: ...


@pytest.fixture
def threads() -> Iterator[Threads]:
    pools: Any = NoPools()
    threads = Threads(Budget(pools=pools, cpus=lambda: 1, found_threads=lambda: 1))
    yield threads
    threads.end()


def sleeps(go_on: threading.Event) -> None:
    assert go_on.wait(PATIENT)


def computes(go_on: threading.Event) -> None:
    while not go_on.is_set():
        sum(range(100))


def look_for(share: Any, seconds: float) -> bool:
    """Waits for a turn as a training does; whether it came within that time."""
    deadline = time.monotonic() + seconds
    while not share.granted and time.monotonic() < deadline:
        share.look_at_others()
        time.sleep(0.005)
    return bool(share.granted)


pulse_is_told = pytest.mark.skipif(
    not hasattr(time, "pthread_getcpuclockid"), reason="the system does not tell a thread's processor time"
)


@pulse_is_told
def test_a_thread_that_sleeps_in_a_batch_lends_its_token_and_takes_it_back_behind_it(
    threads: Threads,
) -> None:
    sleeper = threads.hold(sleeps)
    share = threads.budget.join(lambda: None)
    share.request()
    assert not share.granted
    assert look_for(share, PATIENT)
    assert sleeper.granted  # its batch is under way; it does not know
    assert threads.budget.statistics().holding == 2
    threads.go_on.set()
    assert threads.ended.get(timeout=PATIENT) is True  # two hold one token: it gives its own back
    share.leave()


@pulse_is_told
def test_a_thread_that_computes_in_a_batch_keeps_its_token(
    threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As little as a thread may have on a host that is busy with other tests; one that sleeps has nothing.
    monkeypatch.setattr(blocked, "BUSY", 0.01)
    threads.hold(computes)
    share = threads.budget.join(lambda: None)
    share.request()
    assert not look_for(share, 5 * SECONDS)
    threads.end()
    assert share.granted
    share.leave()


def test_a_thread_that_ended_without_leaving_does_not_keep_its_token(threads: Threads) -> None:
    lost: list[Any] = []

    def forgets() -> None:
        lost.append(threads.budget.join(lambda: None))
        lost[0].request()

    thread = threading.Thread(target=forgets)
    thread.start()
    thread.join(PATIENT)
    share = threads.budget.join(lambda: None)
    share.request()
    assert look_for(share, PATIENT)
    share.leave()
    lost[0].leave()
    assert threads.budget.statistics()[4:6] == (0, 0)


def test_a_token_is_lent_where_the_system_tells_no_processor_time(
    threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(time, "pthread_getcpuclockid", raising=False)
    monkeypatch.setattr(blocked, "BLIND", 0.05)
    threads.hold(sleeps)
    share = threads.budget.join(lambda: None)
    share.request()
    assert look_for(share, PATIENT)
    share.leave()


def test_without_looking_a_token_is_never_lent(threads: Threads) -> None:
    """The negative control: the token comes back when the batch ends, and no earlier."""
    threads.hold(sleeps)
    share = threads.budget.join(lambda: None)
    share.request()
    time.sleep(3 * SECONDS)
    assert not share.granted
    threads.end()
    assert share.granted
    share.leave()
