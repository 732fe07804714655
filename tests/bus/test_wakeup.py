"""From the training thread to the loop: however the two interleave, nothing that was appended is left
lying."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asynccb.bus.wakeup import DELAY, Wakeup

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Timer:
    def __init__(self, loop: HandLoop, function: Callable[[], None]) -> None:
        self._loop, self.function = loop, function

    def cancel(self) -> None:
        if self in self._loop.timers:  # one that has fired may be cancelled too
            self._loop.timers.remove(self)


class HandLoop:
    """An event loop that does one step when it is told to."""

    def __init__(self) -> None:
        self.ready: deque[Callable[[], None]] = deque()
        self.timers: list[Timer] = []
        self.delays: list[float] = []
        self.woken = 0
        self.closed = False

    def call_soon_threadsafe(self, function: Callable[[], None]) -> None:
        if self.closed:
            raise RuntimeError("Event loop is closed")
        self.woken += 1
        self.ready.append(function)

    def call_later(self, delay: float, function: Callable[[], None]) -> Timer:
        self.delays.append(delay)
        self.timers.append(Timer(self, function))
        return self.timers[-1]

    def is_closed(self) -> bool:
        return self.closed

    def step(self) -> bool:
        """Runs what is ready, else lets the first timer fire. False: the loop sleeps, and nothing will wake
        it."""
        if self.ready:
            self.ready.popleft()()
        elif self.timers:
            self.timers.pop(0).function()
        else:
            return False
        return True

    def run(self) -> None:
        while self.step():
            pass


def wakeup() -> tuple[Wakeup, HandLoop, list[int]]:
    loop, came = HandLoop(), []
    return Wakeup(loop, lambda: came.append(len(came))), loop, came  # type: ignore[arg-type]


def test_a_batch_event_wakes_the_loop_once_and_is_delivered_five_milliseconds_later() -> None:
    bell, loop, came = wakeup()
    for _ in range(100):
        bell.ring()
    assert loop.woken == 1
    loop.step()
    assert (came, loop.delays) == ([], [DELAY])
    assert DELAY == 0.005
    loop.run()
    assert came == [0]


def test_the_first_append_after_a_delivery_wakes_the_loop_again() -> None:
    bell, loop, came = wakeup()
    for _ in range(3):
        bell.ring()
        loop.run()
    assert (loop.woken, came) == (3, [0, 1, 2])


def test_what_is_urgent_is_delivered_without_the_delay_and_once() -> None:
    bell, loop, came = wakeup()
    for _ in range(10):
        bell.flush()
    assert loop.woken == 1
    loop.step()
    assert (came, loop.timers) == ([0], [])


def test_what_is_urgent_overtakes_the_timer_of_batch_events_which_then_comes_no_more() -> None:
    bell, loop, came = wakeup()
    bell.ring()
    loop.step()
    assert len(loop.timers) == 1
    bell.flush()
    loop.step()
    assert (came, loop.timers) == ([0], [])


def test_batch_events_behind_an_urgent_one_start_no_timer() -> None:
    bell, loop, came = wakeup()
    bell.ring()
    bell.flush()
    bell.ring()
    loop.run()
    assert (came, loop.delays) == ([0], [])


def test_a_closed_loop_is_not_the_producers_error() -> None:
    bell, loop, came = wakeup()
    loop.closed = True
    bell.ring()
    bell.flush()
    assert came == []


def test_another_error_of_the_loop_is_not_swallowed() -> None:
    bell, loop, _ = wakeup()

    def broken(function: Callable[[], None]) -> None:
        raise RuntimeError("broken")

    loop.call_soon_threadsafe = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="broken"):
        bell.ring()


def test_closing_takes_the_timer_back() -> None:
    bell, loop, _ = wakeup()
    bell.ring()
    loop.step()
    bell.close()
    bell.close()
    assert loop.timers == []


# ---------------------------------------------------------------- every interleaving


class Seam:
    """Mixed into a wake-up: before each write of a flag and each call to the loop, the other side may
    move."""

    between: Callable[[], None]

    def __setattr__(self, name: str, value: object) -> None:
        if name in ("rung", "_urgent"):
            self.__dict__.get("between", lambda: None)()
        object.__setattr__(self, name, value)

    def _call(self, function: Callable[[], None]) -> None:
        self.between()
        super()._call(function)  # type: ignore[misc]


class Seamed(Seam, Wakeup):
    pass


class LowersAfterwards(Seam, Wakeup):
    """The naive order: look at the mailboxes, then lower the flags."""

    def _come(self) -> None:
        self.close()
        self._deliver()
        self.between()
        self.rung = self._urgent = False


class Scene:
    """A producer and a loop that interrupt each other wherever a script says so."""

    def __init__(self, kind: type[Any], script: list[int]) -> None:
        self.loop = HandLoop()
        self.bell = kind(self.loop, self.deliver)
        self.mailbox: list[int] = []
        self.delivered: list[int] = []
        self.appended = 0
        self._script: Iterator[int] = iter(script)
        self._producing = False
        self._looping = False
        self.bell.between = self.between

    def between(self) -> None:
        """0: go on. 1, 2: the other side takes so many turns, if it is not already in the middle of one."""
        for _ in range(next(self._script, 0)):
            if not self._looping:
                self.turn_loop()
            elif not self._producing:
                self.produce(next(self._script, 0) > 1)

    def produce(self, urgent: bool) -> None:
        self._producing = True
        self.mailbox.append(self.appended)
        self.appended += 1
        self.between()
        (self.bell.flush if urgent else self.bell.ring)()
        self._producing = False

    def turn_loop(self) -> None:
        self._looping = True
        self.loop.step()
        self._looping = False

    def deliver(self) -> None:
        self.between()
        self.delivered += self.mailbox
        self.mailbox.clear()
        self.between()

    def play(self, kinds: list[bool]) -> Scene:
        for urgent in kinds:
            self.produce(urgent)
            self.between()
        while self.loop.ready or self.loop.timers:
            self.turn_loop()
        return self


@given(st.lists(st.booleans(), min_size=1, max_size=6), st.lists(st.integers(0, 2), max_size=40))
def test_whatever_interrupts_whom_all_that_was_appended_is_delivered_in_order(
    kinds: list[bool], script: list[int]
) -> None:
    scene = Scene(Seamed, script).play(kinds)
    assert scene.delivered == list(range(scene.appended))
    assert scene.mailbox == []


def scripts(length: int) -> Iterator[list[int]]:
    for number in range(3**length):
        yield [number // 3**place % 3 for place in range(length)]


def test_every_short_interleaving_of_two_events_delivers_both() -> None:
    for script in scripts(8):
        scene = Scene(Seamed, script).play([False, False])
        assert scene.delivered == list(range(scene.appended)), script


def test_flags_that_fall_after_the_delivery_lose_an_event() -> None:
    """The control: the same scenes find the event that lies until the next one comes."""
    stuck = [script for script in scripts(8) if Scene(LowersAfterwards, script).play([False, False]).mailbox]
    assert stuck
