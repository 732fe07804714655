"""The loop's lag is that of the time of each watch, and only a loop that waits for the interpreter lock gets
a warning, once."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

import pytest

from asynccb import health
from asynccb.health import LATE, PERIOD, TESTS, WINDOW, LagStatistics, watch_loop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class FakeTimer:
    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class FakeLoop:
    """A loop and its clock: timers come when the test says, as late as it says."""

    def __init__(self) -> None:
        self.now = 100.0
        self.timers: list[FakeTimer] = []

    def call_later(self, delay: float, callback: Callable[[], None]) -> FakeTimer:
        assert delay == PERIOD
        self.timers.append(FakeTimer(callback))
        return self.timers[-1]

    def probe(self, *lags: float) -> None:
        for lag in lags:
            (timer,) = self.pending
            self.timers.clear()
            self.now += PERIOD + lag
            timer.callback()

    @property
    def pending(self) -> list[FakeTimer]:
        return [timer for timer in self.timers if not timer.cancelled]


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    fake = FakeLoop()
    monkeypatch.setattr(health, "perf_counter", lambda: fake.now)
    yield fake
    assert fake.pending == []
    assert len(health._probes) == 0


def about(seconds: float) -> Any:
    """What a bucket may make of a lag: up to 9 % more."""
    return pytest.approx(seconds * 1.045, rel=0.05)


# ---------------------------------------------------------------- the figures


def test_percentiles_are_near_and_the_worst_is_exact(loop: Any) -> None:
    watch = watch_loop(loop, "run")
    loop.probe(*[0.001] * 60, *[0.02] * 39, 1.5)
    p50, p99, worst, samples = watch.statistics()
    assert (p50, p99) == (about(0.001), about(0.02))
    assert (worst, samples) == (pytest.approx(1.5), 100)
    watch.close()


@pytest.mark.parametrize("lag", [0.0, 1e-6, 1e-5, 0.00123, 0.5, 60.0, 86_400.0])
def test_a_lag_of_any_size_has_its_place(loop: Any, lag: float) -> None:
    watch = watch_loop(loop, "run")
    loop.probe(lag)
    p50, _, worst, _ = watch.statistics()
    assert worst == pytest.approx(lag, abs=1e-9)
    assert p50 <= worst  # the edge of its bucket, but never more than there was
    assert p50 >= min(lag, 2000.0) * 0.999
    watch.close()


def test_nothing_is_known_before_the_first_probe(loop: Any) -> None:
    watch = watch_loop(loop, "run")
    assert watch.statistics() == LagStatistics(0.0, 0.0, 0.0, 0)
    watch.close()
    assert watch.statistics() == LagStatistics(0.0, 0.0, 0.0, 0)


def test_each_watch_tells_of_its_own_time(loop: Any) -> None:
    early = watch_loop(loop, "early")
    loop.probe(*[0.5] * 10)
    late = watch_loop(loop, "late")
    loop.probe(*[0.001] * 10)
    assert late.statistics()[:3] == (about(0.001), about(0.001), pytest.approx(0.001))
    early.close()
    loop.probe(0.002)
    assert early.statistics().samples == 20
    assert early.statistics().p99 == about(0.5)
    assert late.statistics().samples == 11
    late.close()


def test_one_timer_serves_all_who_watch_a_loop(loop: Any) -> None:
    watches = [watch_loop(loop, f"run-{number}") for number in range(1000)]
    assert len(loop.pending) == 1
    loop.probe(0.001)
    for watch in watches[1:]:
        watch.close()
    assert len(loop.pending) == 1
    watches[0].close()
    watches[0].close()  # any number of times
    assert loop.pending == []
    assert {watch.statistics().samples for watch in watches} == {1}


def test_a_closed_watch_does_not_end_the_one_that_began_after_it(loop: Any) -> None:
    first = watch_loop(loop, "first")
    first.close()
    second = watch_loop(loop, "second")
    first.close()
    loop.probe(0.25)
    assert second.statistics().worst == pytest.approx(0.25)
    assert first.statistics().samples == 0
    second.close()


def test_a_loop_that_is_blocked_now_is_seen_from_another_thread(loop: Any) -> None:
    watch = watch_loop(loop, "run")
    loop.probe(0.001)
    loop.now += PERIOD + 3.0
    seen: list[LagStatistics] = []
    thread = threading.Thread(target=lambda: seen.append(watch.statistics()))
    thread.start()
    thread.join()
    assert (seen[0].worst, seen[0].samples) == (pytest.approx(3.0), 1)
    watch.close()
    assert watch.statistics().worst == pytest.approx(3.0)


def test_a_day_of_probes_takes_no_more_memory_than_the_first(loop: Any) -> None:
    watch = watch_loop(loop, "run")
    (probe,) = health._probes.values()
    before = len(probe.counts)
    for _ in range(20):
        loop.probe(*[0.001] * (WINDOW - 1))
        assert len(probe._starvation._lags) < WINDOW  # type: ignore[union-attr]
    assert len(probe.counts) == before == health.BUCKETS
    watch.close()


# ---------------------------------------------------------------- on real loops


@pytest.mark.asyncio
async def test_a_loop_held_by_a_handler_shows_as_lag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "PERIOD", 0.001)
    watch = watch_loop(asyncio.get_running_loop(), "run")
    time.sleep(0.1)  # noqa: ASYNC251 the handler that blocks
    while not watch.statistics().samples:  # noqa: ASYNC110 the timer comes
        await asyncio.sleep(0)
    assert watch.statistics().worst >= 0.09
    watch.close()


def test_a_loop_that_is_dropped_takes_its_probe_along_and_a_closed_watch_keeps_no_loop() -> None:
    async def watched() -> tuple[health.LoopWatch, weakref.ref[Any]]:
        loop = asyncio.get_running_loop()
        watch_loop(loop, "never closed")
        kept = watch_loop(loop, "closed")
        kept.close()
        return kept, weakref.ref(loop)

    kept, loop = asyncio.run(watched())
    gc.collect()
    assert loop() is None
    assert len(health._probes) == 0
    assert kept.statistics().samples == 0


def test_a_watch_may_be_closed_after_its_loop() -> None:
    async def watched() -> health.LoopWatch:
        return watch_loop(asyncio.get_running_loop(), "run")

    watch = asyncio.run(watched())
    watch.close()
    assert len(health._probes) == 0


# ---------------------------------------------------------------- the warning


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "asynccb"]


def lock_waits(monkeypatch: pytest.MonkeyPatch, *waits: float) -> list[int]:
    """Answers the waits for the interpreter lock, in turn; and counts the questions."""
    asked = [0]

    def wait() -> float:
        asked[0] += 1
        return waits[asked[0] % len(waits)]

    monkeypatch.setattr(health, "_lock_wait", wait)
    return asked


def test_a_starved_loop_is_warned_of_once_with_what_helps(
    loop: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lock_waits(monkeypatch, 0.005)
    watches = [watch_loop(loop, f"run-{number}") for number in range(1, 6)]
    loop.probe(*[0.0052] * (WINDOW + TESTS - 1))
    assert warned(caplog) == []
    loop.probe(*[0.0052] * 1000)
    (said,) = warned(caplog)
    assert "run-1, run-2, run-3 and 2 more" in said
    for words in (
        "5.2 ms late",
        "5.0 ms now",
        "interpreter lock",
        "switch_interval=0.0005",
        "Orchestrator",
        "array operations",
    ):
        assert words in said
    for watch in watches:
        watch.close()


def test_the_next_time_somebody_watches_there_may_be_another(
    loop: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lock_waits(monkeypatch, 0.005)
    for name in ("first", "second"):
        watch = watch_loop(loop, name)
        loop.probe(*[0.0052] * (WINDOW + TESTS))
        watch.close()
    first, second = warned(caplog)
    assert "beside first" in first
    assert "beside second" in second


def test_a_switch_interval_that_is_short_already_is_not_advised(
    loop: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(health.sys, "getswitchinterval", lambda: 0.0005)
    lock_waits(monkeypatch, 0.005)
    watch = watch_loop(loop, "run")
    loop.probe(*[0.0052] * (WINDOW + TESTS))
    (said,) = warned(caplog)
    assert "switch_interval" not in said
    watch.close()


ALWAYS = 10 * WINDOW


@pytest.mark.parametrize(
    ("lags", "waits", "asked"),
    [
        pytest.param([0.012], [0.0], True, id="a handler of the service blocks the loop each time"),
        pytest.param([0.004], [0.0, 0.0, 0.0, 0.006], True, id="a busy machine"),
        pytest.param([0.006], [0.0001, 0.005], True, id="a thread that holds the lock half of the time"),
        pytest.param([2.0, 0.0, 0.0], [0.005], False, id="long gaps, now and then"),
        pytest.param([0.001], [0.005], False, id="a quick loop"),
    ],
)
def test_a_loop_that_is_late_for_another_reason_is_not_warned_of(
    loop: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    lags: list[float],
    waits: list[float],
    asked: bool,
) -> None:
    """``asked``: lateness alone would have taken it for starved."""
    count = lock_waits(monkeypatch, *waits)
    watch = watch_loop(loop, "run")
    loop.probe(*(lags * ALWAYS)[: ALWAYS - 1])
    assert warned(caplog) == []
    assert (count[0] > 0) is asked
    watch.close()


def test_what_was_late_for_another_reason_may_be_starved_later(
    loop: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    waits = [0.0]
    monkeypatch.setattr(health, "_lock_wait", lambda: waits[0])
    watch = watch_loop(loop, "run")
    loop.probe(*[0.005] * (WINDOW + TESTS))
    assert warned(caplog) == []
    waits[0] = 0.005
    loop.probe(*[0.005] * (WINDOW + TESTS))
    assert len(warned(caplog)) == 1
    watch.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A verdict within a quarter of a second; answers the waits for the lock, as they are measured."""
    monkeypatch.setattr(health, "PERIOD", 0.001)
    monkeypatch.setattr(health, "WINDOW", 20)
    waits: list[float] = []
    measure = health._lock_wait

    def recorded() -> float:
        waits.append(measure())
        return waits[-1]

    monkeypatch.setattr(health, "_lock_wait", recorded)
    return waits


@pytest.fixture(params=["it tells", "it does not tell"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the system tells how often a thread gives its processor away."""
    if request.param == "it does not tell":
        monkeypatch.setattr(health, "resource", None)
    elif health._switches() == 0:
        pytest.skip("it does not, here")


@pytest.mark.asyncio
@pytest.mark.usefixtures("quick", "system")
async def test_a_thread_that_computes_in_python_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    over = threading.Event()

    def compute() -> None:
        while not over.is_set():
            sum(range(1000))

    thread = threading.Thread(target=compute)
    watch = watch_loop(asyncio.get_running_loop(), "pure Python")
    thread.start()
    try:
        async with asyncio.timeout(50):
            while not warned(caplog):  # noqa: ASYNC110 the loop's timer comes
                await asyncio.sleep(0.001)
    finally:
        over.set()
        thread.join()
        watch.close()
    assert "beside pure Python" in warned(caplog)[0]


@pytest.mark.asyncio
@pytest.mark.parametrize("computes", [True, False], ids=["computes", "sleeps"])
async def test_a_loop_that_its_own_handler_blocks_is_not_warned_of(
    computes: bool, quick: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    """The control: as late as the one that is starved."""
    watch = watch_loop(asyncio.get_running_loop(), "run")
    async with asyncio.timeout(50):
        while len(quick) < TESTS:
            if computes:
                until = time.thread_time() + 0.006
                while time.thread_time() < until:
                    pass
            else:
                time.sleep(0.006)  # noqa: ASYNC251 the handler that blocks
            await asyncio.sleep(0)
    assert watch.statistics().p50 >= LATE
    assert warned(caplog) == []
    watch.close()


def test_a_nap_that_a_busy_machine_makes_long_is_no_wait_for_the_lock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the system does not tell, it counts as one."""
    monkeypatch.setattr(health.time, "sleep", lambda seconds: None)
    for switches, waits in ((1, False), (2, True), (0, True)):
        told, clock = iter([7, 7 + switches]), iter([10.0, 10.0205])
        monkeypatch.setattr(health, "_switches", lambda told=told: next(told))
        monkeypatch.setattr(health, "perf_counter", lambda clock=clock: next(clock))
        assert health._lock_wait() == pytest.approx(0.02 if waits else 0.0)


def test_warnings_go_to_the_packages_logger() -> None:
    assert health.logger is logging.getLogger("asynccb")
