"""What is process-wide is counted: the shortest counts, the last one restores, nobody else is overruled."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asynccb import ArgumentError, Callback, Trainer
from asynccb.budget import SwitchInterval, blas, blas_threads
from asynccb.budget import interval as _interval
from asynccb.testing import ScriptedModel

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def interval() -> Iterator[float]:
    before = sys.getswitchinterval()
    yield before
    left, _ = sys.getswitchinterval(), sys.setswitchinterval(before)
    assert left == pytest.approx(before)


def now() -> float:
    return round(sys.getswitchinterval(), 6)


def test_it_is_held_and_put_back(interval: float) -> None:
    held = SwitchInterval(0.001)
    held.hold()
    assert now() == 0.001
    held.let_go()
    held.let_go()
    assert now() == interval


def test_two_that_overlap_leave_what_was_there_before_the_first(interval: float) -> None:
    first, second = SwitchInterval(0.001), SwitchInterval(0.002)
    first.hold()
    second.hold()
    first.let_go()
    assert now() == 0.002
    second.let_go()
    assert now() == interval


def test_to_save_and_restore_for_oneself_would_leak(interval: float) -> None:
    """The control: the same overlap, each with what it found."""
    found = []
    for value in (0.001, 0.002):
        found.append(sys.getswitchinterval())
        sys.setswitchinterval(value)
    for value in found:  # the first one ends first
        sys.setswitchinterval(value)
    assert now() == 0.001
    sys.setswitchinterval(interval)


def test_the_shortest_of_several_counts() -> None:
    held = [SwitchInterval(seconds) for seconds in (0.002, 0.0005, 0.001)]
    for one in held:
        one.hold()
    assert now() == 0.0005
    for one in held:
        one.let_go()


def test_who_sets_another_meanwhile_is_not_overruled(interval: float) -> None:
    held = SwitchInterval(0.001)
    held.hold()
    sys.setswitchinterval(0.003)
    held.let_go()
    assert now() == 0.003
    sys.setswitchinterval(interval)


class Looks(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_begin(self, logs: Any = None) -> None:
        self.seen.append(now())

    on_train_end = on_train_begin


@pytest.mark.asyncio
async def test_a_training_holds_it_from_its_first_hook_to_its_last(interval: float) -> None:
    looks = Looks()
    await Trainer(ScriptedModel()).fit(np.zeros((2, 1)), verbose=0, callbacks=looks, switch_interval=0.0005)
    assert looks.seen == [0.0005, 0.0005]
    assert now() == interval


@pytest.mark.asyncio
async def test_a_training_that_fails_puts_it_back(interval: float) -> None:
    model = ScriptedModel(raises={0: ValueError("a test")})
    with pytest.raises(ValueError, match="a test"):
        await Trainer(model).fit(np.zeros((2, 1)), verbose=0, switch_interval=0.0005)
    assert now() == interval


@pytest.mark.asyncio
async def test_a_run_cancelled_while_queued_puts_it_back(interval: float) -> None:
    run = Trainer(ScriptedModel()).start(np.zeros((2, 1)), verbose=0, switch_interval=0.0005)
    run.cancel()
    with pytest.raises(Exception, match="cancelled"):
        await run
    assert now() == interval


@pytest.mark.asyncio
@pytest.mark.parametrize("given", [0, -1.0, float("nan"), float("inf"), True, "1ms"])
async def test_what_is_no_time_is_refused_by_name(given: Any) -> None:
    with pytest.raises(ArgumentError, match="switch_interval"):
        await Trainer(ScriptedModel()).fit(np.zeros((2, 1)), verbose=0, switch_interval=given)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_has_what_there_was_before_and_waits_for_no_thread_of_its_parent(
    interval: float,
) -> None:
    holder = SwitchInterval(0.0005)
    holder.hold()
    with _interval._lock, blas._lock:  # held by other threads at the moment of the fork
        child = os.fork()
        if child == 0:
            signal.alarm(5)  # where it does wait
            code = 1
            try:
                found = now()
                blas_threads()
                holder.let_go()
                code = 0 if found == now() == pytest.approx(interval) else 1
            finally:
                os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert now() == pytest.approx(0.0005)
    holder.let_go()
