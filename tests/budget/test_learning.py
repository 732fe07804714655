"""How many tokens pay is learned from step times alone; no thread and no clock here."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING

import pytest

from asynccb.budget.learning import LONGEST_PAUSE, Learning

if TYPE_CHECKING:
    from collections.abc import Callable

TICK = 0.005


class World:
    """Two CPUs, and trainings that all take ``alone`` seconds a step alone and ``shared`` beside another."""

    def __init__(
        self,
        alone: float,
        shared: float,
        noise: Callable[[float], float] = lambda now: 1.0,
        processor: float | None = None,
    ) -> None:
        self.alone, self.shared, self.noise = alone, shared, noise
        self.processor = processor
        """Part of their time for which threads have one; None: not known."""
        self.now = 0.0
        self.progress = 0.0
        self.learning = Learning(2, self.now)
        self.trainings: list[object] = ["one", "other"]
        self.begun = [0.0, 0.0]
        self.trials = 0

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        was = self.learning.all_tokens
        while self.now < end:
            self.now += TICK
            if self.learning.all_tokens:
                for place in (0, 1):
                    self._compute(place, 2, self.shared)
            else:
                self._compute(0, 1, self.alone)
            self.learning.look(self.now)
            self.trials += self.learning.all_tokens is not was
            was = self.learning.all_tokens

    def _compute(self, place: int, computing: int, step: float) -> None:
        self.progress += TICK * self.alone / step
        self.begun[place] += TICK
        batches = int(self.begun[place] / step + 1e-9)
        if batches:
            seconds = batches * step * self.noise(self.now)
            used = None if self.processor is None else seconds * self.processor
            self.learning.record(self.trainings[place], computing, seconds, batches, used)
            self.begun[place] -= batches * step


KERNELS, LOCK = (0.001, 0.0011), (0.0001, 0.0003)


def test_trainings_bound_by_the_lock_go_one_at_a_time() -> None:
    world = World(*LOCK)
    world.run(0.5)
    assert world.learning.all_tokens is False
    assert world.learning.ratio == pytest.approx(2 / 3, rel=0.01)


def test_trainings_bound_by_kernels_go_all_at_once() -> None:
    world = World(*KERNELS)
    world.run(0.5)
    assert world.learning.all_tokens is True
    assert world.learning.ratio == pytest.approx(2 / 1.1, rel=0.01)


@pytest.mark.parametrize(
    ("steps", "best"),
    [(LOCK, 1.0), (KERNELS, 2 / 1.1), ((0.03, 0.031), 2 / (31 / 30)), ((1.0, 1.05), 2 / 1.05)],
)
@pytest.mark.parametrize("seconds", [4.0, 60.0])
def test_what_trials_cost_is_under_three_in_a_hundred(
    steps: tuple[float, float], best: float, seconds: float
) -> None:
    world = World(*steps)
    world.run(seconds)
    assert world.progress >= 0.97 * best * seconds


def test_no_trial_is_made_where_every_thread_has_a_processor_all_the_time() -> None:
    world = World(*KERNELS, processor=0.99)
    world.run(60.0)
    assert (world.trials, world.learning.all_tokens) == (0, True)
    assert world.progress == pytest.approx(2 / 1.1 * 60.0, rel=0.001)


def test_the_same_trainings_are_tried_where_the_processor_time_is_not_known() -> None:
    """The control."""
    world = World(*KERNELS)
    world.run(60.0)
    assert world.trials > 0


@pytest.mark.parametrize("processor", [0.5, 0.89])
def test_threads_that_stand_in_line_for_the_lock_are_tried(processor: float) -> None:
    world = World(*LOCK, processor=processor)
    world.run(2.0)
    assert world.learning.all_tokens is False
    assert world.learning.ratio == pytest.approx(2 / 3, rel=0.01)


def test_a_busy_machine_that_takes_processors_away_costs_a_trial_and_no_wrong_answer() -> None:
    world = World(*KERNELS, processor=0.7)
    world.run(2.0)
    assert world.learning.all_tokens is True
    assert world.learning.ratio == pytest.approx(2 / 1.1, rel=0.01)


def test_to_stay_with_what_does_not_pay_costs_a_third() -> None:
    """The control: no trial is ever made, and all tokens are out."""
    world = World(*LOCK)
    world.learning.look = lambda now: None  # type: ignore[method-assign]
    world.run(4.0)
    assert world.progress == pytest.approx(2 / 3 * 4.0, rel=0.01)


def test_with_long_steps_the_first_trial_waits_until_it_is_paid_for() -> None:
    world = World(1.0, 1.05)
    world.run(20.0)
    assert world.trials == 0
    world.run(200.0)
    assert world.learning.ratio == pytest.approx(2 / 1.05, rel=0.01)
    assert world.learning.all_tokens is True


def test_trials_become_rare_while_the_answer_is_the_same() -> None:
    world = World(*KERNELS)
    world.run(100.0)
    before = world.trials
    world.run(LONGEST_PAUSE - 1)
    assert world.trials - before <= 2 * 3  # there and back, three that agree


def test_trainings_that_change_their_nature_are_found_out_before_the_pause_is_over() -> None:
    world = World(*KERNELS)
    world.run(100.0)
    world.alone, world.shared = LOCK
    world.run(2.5)
    assert world.learning.all_tokens is False


def test_other_trainings_cut_the_pause_short() -> None:
    world = World(*LOCK)
    world.run(100.0)
    world.learning.forget("one")
    world.trainings[0] = "new"
    world.learning.look_again(world.now)
    world.alone, world.shared = KERNELS
    world.run(0.5)
    assert world.learning.all_tokens is True


def test_many_changes_do_not_make_it_dear() -> None:
    world = World(*LOCK)
    for _ in range(400):
        world.learning.look_again(world.now)
        world.run(0.05)
    assert world.progress >= 0.97 * 20.0


def test_one_trial_that_the_machine_disturbed_decides_nothing() -> None:
    def disturbed(now: float) -> float:
        return 4.0 if 0.02 < now < 0.05 else 1.0

    world = World(*LOCK, noise=disturbed)
    world.run(1.0)
    assert world.learning.all_tokens is False


def test_trainings_too_short_to_be_seen_twice_are_taken_for_alike() -> None:
    world = World(*LOCK)
    names = count()
    for _ in range(150):
        for place in (0, 1):
            world.learning.forget(world.trainings[place])
            world.trainings[place] = next(names)
        world.learning.look_again(world.now)
        world.run(TICK)
    assert world.learning.all_tokens is False


def test_trainings_that_were_seen_on_one_side_only_are_not_compared() -> None:
    learning = Learning(2, 0.0)
    learning.record("slow", 2, 0.1, 10)
    learning.look(0.1)
    assert learning.all_tokens is False  # a trial
    learning.record("quick", 1, 0.1, 1000)
    learning.look(0.2)
    assert (learning.all_tokens, learning.ratio) == (True, None)


def test_the_ratio_is_of_the_same_trainings_on_both_sides() -> None:
    learning = Learning(2, 0.0)
    for name, step in (("slow", 0.01), ("quick", 0.0001)):
        learning.record(name, 2, 0.1, round(0.1 / step))
    learning.look(0.1)
    learning.record("slow", 1, 0.1, 20)  # twice as quick alone
    learning.look(0.2)
    assert learning.ratio == pytest.approx(1.0)
