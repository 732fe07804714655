"""What inline hooks cost: estimated from few batches, and said once where it is too much."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest

from asynccb.bus import clock as room
from asynccb.bus.clock import APART, EVERY, HookClock, Timed

if TYPE_CHECKING:
    from collections.abc import Callable

BEGIN, END = "on_train_batch_begin", "on_train_batch_end"


class Bench:
    """Batches and hooks whose times are given; nothing else makes time pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 50.0
        self.step = 0
        self.timed = 0
        monkeypatch.setattr(room, "perf_counter", lambda: self.now)
        self.clock = HookClock(lambda hook, hook_name: hook.__name__)

    def hook(self, name: str, seconds: float) -> Callable[[int, Any], None]:
        def run(index: int, logs: Any) -> None:
            self.now += seconds

        run.__name__ = name
        return run

    def train(self, batches: int, batch: float, **hooks: list[Any]) -> None:
        """One epoch, as the dispatcher asks the clock."""
        for index in range(batches):
            for name, when in ((BEGIN, "begin"), (END, "end")):
                if name == END:
                    self.now += batch
                    self.step += 1
                found = hooks.get(when, [])
                asked = index & self.clock.mask < 2
                calls = self.clock.begin(name, index, found) if asked and found else found
                self.timed += any(isinstance(call, Timed) for call in calls)
                for call in calls:
                    call(index, {})
                if asked and found:
                    self.clock.end(name, index, self.step)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


def test_few_batches_stand_for_all_and_the_estimate_is_right_where_hooks_are_even(bench: Bench) -> None:
    hooks = [bench.hook("Dear", 4e-3), bench.hook("Cheap", 1e-3)]
    bench.train(4 * (EVERY + 1) + 2, batch=0.01, end=hooks, begin=[bench.hook("Early", 2e-3)])
    assert bench.timed == 2 * 5  # begin and end of one batch in 512
    trained = 4 * (EVERY + 1) + 2
    assert bench.clock.spent == pytest.approx(
        {"Dear": 4e-3 * trained, "Cheap": 1e-3 * trained, "Early": 2e-3 * trained}
    )


def test_a_sample_that_took_long_by_chance_stands_for_no_more_time_than_has_passed(bench: Bench) -> None:
    def sometimes(index: int, logs: Any) -> None:
        bench.now += 5e-3 if index % (EVERY + 1) == 1 else 1e-6

    began = bench.now
    bench.train(30 * (EVERY + 1), batch=APART / EVERY, end=[sometimes])
    assert bench.timed >= 20
    assert bench.clock.spent["sometimes"] <= bench.now - began < 1.0


def test_short_epochs_are_timed_no_more_often_than_the_clock_allows(bench: Bench) -> None:
    for _ in range(100):
        bench.train(10, batch=APART / 100, end=[bench.hook("Quick", 0.0)])
    assert 5 <= bench.timed <= 10  # 100 epochs of a tenth of APART each


def test_hooks_of_epochs_are_added_as_they_are(bench: Bench) -> None:
    bench.clock.add("Epochs", 1.5)
    bench.clock.add("Epochs", 0.5)
    assert bench.clock.spent == {"Epochs": 2.0}


def test_hooks_that_cost_more_than_the_batches_are_named_once_they_have_cost_a_second(bench: Bench) -> None:
    hooks = [bench.hook("Dear", 3e-3), bench.hook("Cheap", 1e-3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bench.train(EVERY + 3, batch=1e-3, end=hooks)  # too few samples to say so
    with pytest.warns(UserWarning, match=r"Inline hooks have cost about .*; most of it is Dear's") as caught:
        bench.train(10 * EVERY, batch=1e-3, end=hooks)
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("hook", "batch"), [(1e-3, 2e-3), (1e-7, 1e-8)], ids=["less than the batches", "less than a second"]
)
def test_hooks_that_cost_less_than_the_batches_or_next_to_nothing_are_not(
    bench: Bench, hook: float, batch: float
) -> None:
    bench.train(20 * EVERY, batch, end=[bench.hook("Fine", hook)])


def test_a_hook_that_nobody_owns_any_more_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.clock = HookClock(lambda hook, hook_name: None)
    bench.train(4, batch=1e-3, end=[bench.hook("Muted", 1e-3)])
    assert bench.clock.spent == {}


def test_from_the_first_slow_hook_on_every_batch_is_timed(bench: Bench) -> None:
    with pytest.warns(UserWarning, match=r"Method run\(\) of|Method Slow\(\) of Slow is slow"):
        bench.train(20, batch=1e-3, end=[bench.hook("Slow", 0.2)])
    assert bench.timed == 19
