"""The measure of what our own work does to the event loop sees every step of ours, and nobody else's."""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import time
from typing import TYPE_CHECKING, Any

import loop_time
import numpy as np
import pytest

from asynccb import Trainer
from asynccb.testing import Recorder, ScriptedModel

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

COMPUTES = """
async def task(compute, seconds):
    compute(seconds)

def callback(compute, seconds):
    compute(seconds)
"""


def compute(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def written_in(folder: str) -> dict[str, Any]:
    """The two functions above, as if they stood in a file of that folder."""
    names: dict[str, Any] = {}
    exec(compile(COMPUTES, os.path.join(folder, "made_up.py"), "exec"), names)
    return names


def as_task(names: dict[str, Any], seconds: float) -> None:
    asyncio.get_running_loop().create_task(names["task"](compute, seconds), name="a task")


def as_callback(names: dict[str, Any], seconds: float) -> None:
    asyncio.get_running_loop().call_soon(names["callback"], compute, seconds)


def as_partial(names: dict[str, Any], seconds: float) -> None:
    asyncio.get_running_loop().call_later(0, functools.partial(names["callback"], compute, seconds))


HOW = pytest.mark.parametrize("how", [as_task, as_callback, as_partial])


@HOW
@pytest.mark.asyncio
async def test_a_step_of_ours_is_measured_and_named(how: Callable[..., None]) -> None:
    with loop_time.measured_steps() as steps:
        how(written_in(loop_time.PACKAGE), 0.02)
        await asyncio.sleep(0.001)
    (step,) = steps.longest()
    assert step.seconds >= 0.02
    assert step.name == ("a task: task" if how is as_task else "callback")


@HOW
@pytest.mark.asyncio
async def test_a_step_of_somebody_else_is_not(how: Callable[..., None], tmp_path: Path) -> None:
    with loop_time.measured_steps() as steps:
        how(written_in(str(tmp_path)), 0.002)
        await asyncio.sleep(0.001)
    assert steps.all == []


@pytest.mark.asyncio
async def test_what_the_test_itself_calls_is_measured_when_it_says_so() -> None:
    with loop_time.measured_steps() as steps, steps.step("submit"):
        compute(0.02)
    ((seconds, name, _),) = steps.all
    assert (seconds >= 0.02, name) == (True, "submit")


@pytest.mark.asyncio
async def test_the_collector_is_told_apart() -> None:
    rings: list[Any] = []
    for _ in range(100_000):
        rings.append([])
        rings[-1].append(rings[-1])
    with loop_time.measured_steps() as steps:
        with steps.step("collects"):
            gc.collect()
        await asyncio.to_thread(gc.collect)  # on another thread: holds the loop up, but is not its time
        with steps.step("does not"):
            compute(0.001)
    first, second = steps.all
    assert first.collecting > 0.001 > first.seconds
    assert (second.collecting, second.seconds >= 0.001) == (0.0, True)


@pytest.mark.asyncio
async def test_of_several_tries_the_quietest_counts() -> None:
    """The control: the longest step of all tries is one that the machine held up."""
    ours, seconds, seen = written_in(loop_time.PACKAGE), iter([0.1, 0.002, 0.1]), []

    async def scene(steps: Any) -> None:
        as_callback(ours, next(seconds))
        await asyncio.sleep(0.001)
        seen.extend(steps.all)

    step = await loop_time.longest_step(scene, tries=3)
    assert 0.002 <= step.seconds < 0.1
    assert max(seen).seconds >= 0.1


@pytest.mark.asyncio
async def test_a_scene_without_a_step_of_ours_proves_nothing() -> None:
    async def scene(steps: Any) -> None:
        await asyncio.sleep(0)

    with pytest.raises(AssertionError, match="no step of ours"):
        await loop_time.longest_step(scene)


@pytest.mark.asyncio
async def test_the_loop_is_as_before_afterwards() -> None:
    loop, run = asyncio.get_running_loop(), asyncio.Handle._run
    before = loop.get_debug()

    def fail() -> None:
        assert asyncio.Handle._run is not run
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), loop_time.measured_steps():
        fail()
    assert (asyncio.Handle._run, loop.get_debug()) == (run, before)
    assert not any(isinstance(getattr(call, "__self__", None), loop_time.Steps) for call in gc.callbacks)


@pytest.mark.asyncio
async def test_the_steps_of_a_training_are_seen_by_name() -> None:
    with loop_time.measured_steps() as steps:
        run = Trainer(ScriptedModel()).start(
            np.zeros((64, 1)), batch_size=1, verbose=0, name="mine", callbacks=[Recorder()]
        )
        await run
    names = {step.name for step in steps.all}
    assert any(name.startswith("asynccb mine: ") for name in names)
    assert any(name.startswith("callback Recorder of mine: ") for name in names)
    assert "Wakeup._come" in names
