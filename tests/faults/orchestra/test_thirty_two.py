"""Thirty-two trainings at once: one fails, all are cancelled, the service's loop goes on."""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from waiting import PATIENT, until

from asynccb import Orchestrator, Run, Trainer
from asynccb.budget import budget
from asynccb.claims import _holders
from asynccb.run import live_runs
from asynccb.testing import Recorder, ScriptedModel

if TYPE_CHECKING:
    from collections.abc import Iterator

MANY = 32
X = np.zeros((4, 1))


class Computes(ScriptedModel):
    needs_cpu = True


class Failed(Exception):
    pass


@pytest.fixture(autouse=True)
def _all_as_before() -> Iterator[None]:
    held, interval, threads = len(_holders), sys.getswitchinterval(), budget().statistics().blas_threads
    yield
    statistics = budget().statistics()
    assert (statistics.holding, statistics.waiting, statistics.blas_threads) == (0, 0, threads)
    assert (budget()._shares, budget()._wishes) == ({}, [])
    assert (len(_holders), sys.getswitchinterval(), live_runs()) == (held, interval, [])


def submit(orch: Orchestrator, model: ScriptedModel, recorder: Recorder | None = None, **more: Any) -> Run:
    callbacks = [] if recorder is None else [recorder]
    return orch.submit(Trainer(model), X, batch_size=1, callbacks=callbacks, **more)


@pytest.mark.asyncio
@pytest.mark.parametrize("culprit", [0, 13, MANY - 1])
async def test_where_one_fails_the_others_train_as_if_it_were_not_there(
    culprit: int, caplog: pytest.LogCaptureFixture
) -> None:
    models = [Computes(raises={5: Failed("!")} if number == culprit else {}) for number in range(MANY)]
    recorders = [Recorder() for _ in range(MANY)]
    async with Orchestrator(slots=MANY) as orch:
        runs = [
            submit(orch, model, recorder, epochs=3) for model, recorder in zip(models, recorders, strict=True)
        ]
    others = [number for number in range(MANY) if number != culprit]
    assert {runs[number].outcome for number in others} == {"completed"}
    assert {models[number].steps for number in others} == {12}
    assert len({tuple(recorders[number].events) for number in others}) == 1
    assert {tuple(runs[number].history.epoch) for number in others} == {(0, 1, 2)}
    assert (runs[culprit].outcome, models[culprit].steps) == ("failed", 5)
    said = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert [runs[culprit].name in record.getMessage() for record in said] == [True]


@pytest.mark.asyncio
async def test_where_one_of_many_plain_fits_fails_the_others_train_on() -> None:
    models = [Computes(raises={5: Failed("!")} if number == 7 else {}) for number in range(MANY)]
    ends = await asyncio.gather(
        *(Trainer(model).fit(X, batch_size=1, epochs=3, verbose=0) for model in models),
        return_exceptions=True,
    )
    assert [number for number, end in enumerate(ends) if isinstance(end, BaseException)] == [7]
    assert isinstance(ends[7], Failed)
    assert [model.steps for model in models] == [5 if number == 7 else 12 for number in range(MANY)]


@pytest.mark.asyncio
async def test_a_block_that_is_cancelled_ends_each_behind_the_batch_under_way() -> None:
    models, recorders = [ScriptedModel(gated=True) for _ in range(MANY)], [Recorder() for _ in range(MANY)]
    orch = Orchestrator(slots=MANY)

    async def main() -> None:
        async with orch:
            for model, recorder in zip(models, recorders, strict=True):
                submit(orch, model, recorder, epochs=9)
            submit(orch, ScriptedModel(), name="queued")

    task = asyncio.create_task(main())
    await until(lambda: all(model.waiting for model in models))
    task.cancel()
    await until(lambda: orch._state == "closing")
    for model in models:
        model.open_for_good()
    async with asyncio.timeout(PATIENT):
        await asyncio.wait({task})
    assert task.cancelled()
    assert [model.steps for model in models] == [1] * MANY
    assert {run.outcome for run in orch.runs.values()} == {"cancelled"}
    assert {tuple(recorder.hooks[-2:]) for recorder in recorders} == {("on_exception", "on_train_end")}


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["cancel", "timeout", "raise", "stop each"])
async def test_endless_trainings_that_share_the_processors_all_end(how: str) -> None:
    orch = Orchestrator(slots=MANY)

    async def main() -> None:
        async with orch:
            runs = [submit(orch, Computes(), epochs=10**9) for _ in range(MANY)]
            await until(lambda: budget().statistics().waiting + budget().statistics().holding == MANY)
            if how == "raise":
                raise Failed
            if how == "stop each":
                for run in runs:
                    run.stop("enough")

    task = asyncio.create_task(main())
    if how == "timeout":
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(task, 0.3)
    else:
        await until(lambda: len(live_runs()) == MANY)
        if how == "cancel":
            await until(lambda: budget().statistics().waiting > MANY // 2)
            task.cancel()
        async with asyncio.timeout(PATIENT):
            await asyncio.wait({task})
        if how == "raise":
            assert isinstance(task.exception(), Failed)
    assert {run.outcome for run in orch.runs.values()} == {"stopped" if how == "stop each" else "cancelled"}


@pytest.mark.asyncio
async def test_a_cancelled_gather_of_plain_fits_cancels_each() -> None:
    models = [Computes() for _ in range(MANY)]
    trainers = [Trainer(model) for model in models]
    gathered = asyncio.gather(*(trainer.fit(X, epochs=10**9, verbose=0) for trainer in trainers))
    await until(lambda: len(live_runs()) == MANY)
    gathered.cancel()
    async with asyncio.timeout(PATIENT):
        with pytest.raises(asyncio.CancelledError):
            await gathered
        await until(lambda: not live_runs())
    assert {trainer.last_run.outcome for trainer in trainers if trainer.last_run} == {"cancelled"}


@pytest.mark.asyncio
async def test_every_endless_training_moves_on() -> None:
    """Nobody starves: each of them has had its turn, again and again."""
    models = [Computes() for _ in range(8)]
    async with Orchestrator(slots=8, cpu_threads=1) as orch:
        runs = [submit(orch, model, epochs=10**9, priority=number % 3) for number, model in enumerate(models)]
        await until(lambda: all(run.step for run in runs))
        for _ in range(3):
            before = {run: run.step for run in runs}
            await until(lambda before=before: all(run.step > step for run, step in before.items()))
        for run in runs:
            run.stop()
