"""Where a training runs."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asynccb import Trainer
from asynccb.engines import ThreadEngine
from asynccb.run import live_runs
from asynccb.testing import Recorder, ScriptedModel

if TYPE_CHECKING:
    from collections.abc import Callable

X = np.zeros((2, 1))
here: contextvars.ContextVar[str] = contextvars.ContextVar("here", default="nowhere")


def test_the_default_engine_runs_each_target_in_a_named_daemon_thread_with_the_callers_context() -> None:
    seen: list[Any] = []
    done = threading.Event()

    def target() -> None:
        thread = threading.current_thread()
        seen.extend([thread.name, thread.daemon, here.get()])
        here.set("there")
        done.set()

    token = here.set("caller")
    try:
        ThreadEngine().start(target, "asynccb run-x")
        done.wait()
        assert here.get() == "caller"
    finally:
        here.reset(token)
    assert seen == ["asynccb run-x", True, "caller"]


@pytest.mark.asyncio
async def test_a_training_runs_on_one_thread_that_is_no_loops_and_is_gone_afterwards() -> None:
    class Threads(ScriptedModel):
        def train_batch(self, batch: Any) -> dict[str, float]:
            threads.add(threading.current_thread())
            return super().train_batch(batch)

    threads: set[threading.Thread] = set()
    trainer = Trainer(Threads())
    await trainer.fit(X, batch_size=1, epochs=3, verbose=0)
    (thread,) = threads
    assert thread is not threading.current_thread()
    assert (thread.name, thread.daemon) == (f"asynccb {trainer.last_run.name}", True)
    thread.join(5)
    assert not thread.is_alive()


@pytest.mark.asyncio
async def test_another_engine_is_given_the_target_and_a_name() -> None:
    class Mine:
        def start(self, target: Callable[[], None], name: str) -> None:
            names.append(name)
            threading.Thread(target=target, daemon=True).start()

    names: list[str] = []
    trainer = Trainer(ScriptedModel(), engine=Mine())
    await trainer.fit(X, verbose=0)
    assert names == [f"asynccb {trainer.last_run.name}"]


@pytest.mark.asyncio
async def test_an_engine_without_a_thread_to_give_fails_the_training_and_leaves_nothing() -> None:
    class Refuses:
        def start(self, target: Callable[[], None], name: str) -> None:
            raise RuntimeError("can't start new thread")

    model, recorder = ScriptedModel(), Recorder()
    trainer = Trainer(model, engine=Refuses())
    with pytest.raises(RuntimeError, match="can't start new thread"):
        await trainer.fit(X, verbose=0, callbacks=recorder)
    assert (recorder.hooks, trainer.last_run.outcome, live_runs()) == ([], "failed", [])
    assert (await Trainer(model).fit(X, verbose=0, callbacks=recorder)).outcome == "completed"


@pytest.mark.asyncio
async def test_trainings_run_beside_each_other() -> None:
    models = [ScriptedModel(gated=True) for _ in range(8)]
    runs = [Trainer(model).start(X, batch_size=1, verbose=0) for model in models]
    for model in models:
        await model.at_gate()
    assert all(model.waiting for model in models)  # all eight are in their first batch
    for model in models:
        model.open_for_good()
    histories = await asyncio.gather(*runs)
    assert [history.outcome for history in histories] == ["completed"] * 8
