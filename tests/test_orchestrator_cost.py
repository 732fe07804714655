"""What thousands of trainings cost that wait for their turn: memory, and time of the event loop."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
import weakref
from typing import TYPE_CHECKING, Any

import loop_time
import numpy as np
import pytest
from waiting import until

from asynccb import Orchestrator, Run, Trainer
from asynccb.models import Dense, Sequential
from asynccb.testing import ScriptedModel

if TYPE_CHECKING:
    from collections.abc import Callable

X = np.zeros((1, 1))
MOST = 0.002
"""Seconds of processor time of the loop's thread for one step of ours."""
RECORD = 4096
"""Bytes of a queued training."""


def make() -> Trainer:
    return Trainer(ScriptedModel())


class Line:
    """An orchestrator whose one slot is taken, and so many trainings behind it."""

    def __init__(self, queued: int) -> None:
        self.orch = Orchestrator(slots=1, switch_interval=None)
        self.gate = ScriptedModel(gated=True)
        self.runs: list[Run] = []
        self._queued = queued

    async def __aenter__(self) -> Line:
        await self.orch.__aenter__()
        self.orch.submit(Trainer(self.gate), X)
        await until(lambda: self.gate.waiting)
        self.submit(self._queued)
        return self

    def submit(self, count: int) -> None:
        self.runs += [self.orch.submit(make, X) for _ in range(count)]

    async def __aexit__(self, *error: Any) -> None:
        self.gate.open_for_good()
        for run in self.runs:
            run.cancel()
        await self.orch.__aexit__(*error)


async def record(submit: Callable[[int], None], count: int) -> float:
    """Bytes of a queued training."""
    asyncio.get_running_loop().set_debug(False)  # it keeps a traceback for each handle
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        submit(count)
        await asyncio.sleep(0)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return (after - before) / count


@pytest.mark.asyncio
async def test_a_queued_training_is_a_small_record() -> None:
    async with Line(200) as line:
        assert await record(line.submit, 1000) <= RECORD


@pytest.mark.asyncio
async def test_a_queued_training_whose_model_is_there_is_none() -> None:
    """The negative control: what a line of models would be."""
    models = Line(0)

    def submit(count: int) -> None:
        for _ in range(count):
            model = Sequential([Dense(16, input_dim=32)])
            models.runs.append(models.orch.submit(Trainer(model), X))

    async with models:
        assert await record(submit, 200) > RECORD


@pytest.mark.asyncio
@pytest.mark.parametrize("ended", ["completed", "cancelled", "failed"])
async def test_ended_runs_that_are_remembered_hold_no_data(ended: str) -> None:
    class Data(np.ndarray[Any, Any]):
        """An array whose life can be watched."""

    def fail() -> Trainer:
        raise OSError("!")

    async with Orchestrator(slots=1) as orch:
        data = np.zeros((1, 1)).view(Data)
        watched = weakref.ref(data)
        run = orch.submit(fail if ended == "failed" else make, data)
        completed = orch.as_completed()
        del data
        assert watched() is not None
        if ended == "cancelled":
            run.cancel()
        assert await anext(completed) is run
        assert run.outcome == ended
        await until(lambda: gc.collect() is not None and watched() is None)
        assert orch.runs == {run.name: run}


async def submit_and_cancel(steps: Any) -> None:
    line = Line(0)
    async with line:
        line.submit(5000)
        for _ in range(3):
            await asyncio.sleep(0)
        for run in line.runs:
            run.cancel()
        await until(lambda: line.orch.stats.queued == 0)


async def leave_by_cancel(steps: Any) -> None:
    line = Line(4000)
    await line.__aenter__()
    # In a task of its own: what it does in one step is a step of ours.
    leaving = asyncio.get_running_loop().create_task(line.orch.__aexit__(KeyError, KeyError(), None))
    await asyncio.sleep(0.01)
    line.gate.open_for_good()
    await leaving
    assert line.orch.stats.ended["cancelled"] == 4001


SCENES = pytest.mark.parametrize("scene", [submit_and_cancel, leave_by_cancel])


@SCENES
@pytest.mark.asyncio
async def test_thousands_that_are_submitted_and_cancelled_do_not_hold_the_loop(scene: Any) -> None:
    assert (await loop_time.longest_step(scene, tries=2)).seconds <= MOST


@SCENES
@pytest.mark.asyncio
async def test_done_in_one_step_they_would(scene: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""
    monkeypatch.setattr("asynccb.admission.STALE", 10**9)
    monkeypatch.setattr("asynccb.orchestrator.STEP", 10**9)
    assert (await loop_time.longest_step(scene, tries=1)).seconds > MOST


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["stop", "cancel", "pause", "priority"])
async def test_what_is_asked_of_hundreds_does_not_hold_the_loop(how: str) -> None:
    async def scene(steps: Any) -> None:
        async with Line(600) as line:
            for number, run in enumerate(line.runs):
                if how == "priority":
                    run.priority = number % 7
                else:
                    getattr(run, how)()
            await asyncio.sleep(0.005)

    assert (await loop_time.longest_step(scene, tries=2)).seconds <= MOST


@pytest.mark.asyncio
async def test_a_block_that_is_left_with_thousands_in_the_line_does_not_hold_the_loop() -> None:
    async def scene(steps: Any) -> None:
        line = Line(4000)
        await line.__aenter__()
        leaving = asyncio.get_running_loop().create_task(line.orch.__aexit__(None, None, None))
        await asyncio.sleep(0.01)
        for run in line.runs:
            run.cancel()
        line.gate.open_for_good()
        await leaving

    assert (await loop_time.longest_step(scene, tries=2)).seconds <= MOST


@pytest.mark.asyncio
async def test_hundreds_of_trainings_that_begin_and_end_do_not_hold_the_loop() -> None:
    async def scene(steps: Any) -> None:
        async with Orchestrator(slots=4, switch_interval=None) as orch:
            for number in range(200):
                orch.submit(make if number % 2 else make(), X)

    assert (await loop_time.longest_step(scene, tries=2)).seconds <= MOST
