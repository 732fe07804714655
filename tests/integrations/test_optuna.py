"""Sweeps with Optuna: a study's record is that of the runs, and its storage holds up nobody."""

from __future__ import annotations

import asyncio
import logging
import math
import subprocess
import sys
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.storages import InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from asynccb import ArgumentError, Callback, CallbackError, Orchestrator, Trainer
from asynccb.integrations.optuna import PruningCallback, ask, tell
from asynccb.testing import ScriptedModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from asynccb import Run

X = np.zeros((1, 1), np.float32)
optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture(params=["memory", "journal", "sqlite"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    if request.param == "memory":
        yield InMemoryStorage()
    elif request.param == "journal":
        yield JournalStorage(JournalFileBackend(str(tmp_path / "journal.log")))
    else:
        database = RDBStorage(f"sqlite:///{tmp_path / 'study.db'}")
        yield database
        database.engine.dispose()


class FakeStudy:
    """A study whose storage does what the test says, and remembers who called it."""

    def __init__(self, prune_at: int | None = None, report: Callable[[], None] | None = None) -> None:
        self.pruner = self
        self.prune_at = prune_at
        self.before_report = report or (lambda: None)
        self.reported: list[tuple[float, int]] = []
        self.told: list[tuple[Any, TrialState]] = []
        self.threads: list[str] = []

    def tell(self, trial: Any, values: Any, state: TrialState, *, skip_if_finished: bool) -> str:
        self.threads.append(threading.current_thread().name)
        self.told.append((values, state))
        return "the trial"


class FakeTrial:
    number = 7

    def __init__(self, study: FakeStudy) -> None:
        self.study = study

    def report(self, value: float, step: int) -> None:
        self.study.threads.append(threading.current_thread().name)
        self.study.before_report()
        self.study.reported.append((value, step))

    def should_prune(self) -> bool:
        return len(self.study.reported) - 1 == self.study.prune_at


def fake(*arguments: Any) -> tuple[Any, Any]:
    study = FakeStudy(*arguments)
    return study, FakeTrial(study)


def start(callback: PruningCallback, epochs: int = 4, losses: tuple[float, ...] = (1.0,)) -> Run:
    return Trainer(ScriptedModel(losses)).start(X, epochs=epochs, verbose=0, callbacks=[callback])


# ---------------------------------------------------------------- a whole sweep


async def sweep(study: optuna.Study, *, trials: int, at_a_time: int) -> dict[int, Run]:
    """Trial t learns to the loss that was drawn for it, in four epochs."""
    runs: dict[int, Run] = {}

    async def worker() -> None:
        for _ in range(trials // at_a_time):
            trial = await ask(study, {"reached": FloatDistribution(0.0, 1.0)})
            losses = [trial.params["reached"] + 1 / (2 + epoch) for epoch in range(4)]
            run = runs[trial.number] = orch.submit(
                lambda losses=losses: Trainer(ScriptedModel(losses)),
                X,
                epochs=4,
                name=f"trial-{trial.number}",
                callbacks=[PruningCallback(trial, "loss")],
            )
            await tell(study, trial, run, "loss")

    async with Orchestrator(slots=at_a_time) as orch, asyncio.TaskGroup() as group:
        for _ in range(at_a_time):
            group.create_task(worker())
    return runs


@pytest.mark.asyncio
async def test_of_forty_trials_four_at_a_time_the_studys_record_is_that_of_the_runs(storage: Any) -> None:
    made = await asyncio.to_thread(
        optuna.create_study,
        storage=storage,
        sampler=optuna.samplers.RandomSampler(seed=7),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=5),
    )
    runs = await sweep(made, trials=40, at_a_time=4)
    trials = await asyncio.to_thread(made.get_trials)
    assert sorted(runs) == [trial.number for trial in trials] == list(range(40))
    states = Counter(trial.state for trial in trials)
    assert set(states) == {TrialState.COMPLETE, TrialState.PRUNED}
    assert min(states.values()) >= 5
    for trial in trials:
        run = runs[trial.number]
        losses = run.history.history["loss"]
        assert run.outcome == {TrialState.COMPLETE: "completed", TrialState.PRUNED: "pruned"}[trial.state]
        assert trial.intermediate_values == dict(enumerate(losses))
        assert trial.value == losses[-1]
        assert len(losses) == 4 or trial.state is TrialState.PRUNED


# ---------------------------------------------------------------- pruning


@pytest.mark.asyncio
async def test_a_pruned_training_ends_at_that_very_epoch_as_an_outcome_and_no_failure() -> None:
    study, trial = fake(1)
    run = start(PruningCallback(trial, "loss"), losses=(0.5, 0.25))
    history = await run
    assert (history.outcome, history.epoch) == ("pruned", [0, 1])
    assert history.reason == "FakeStudy at loss = 0.25"
    assert study.reported == [(0.5, 0), (0.25, 1)]


def _held_until(model: ScriptedModel, steps: int) -> Callable[[], None]:
    """A storage that answers when the model has trained, or certainly does not."""

    def report() -> None:
        for _ in range(100):
            if model.steps >= steps:
                return
            threading.Event().wait(0.001)

    return report


@pytest.mark.asyncio
@pytest.mark.parametrize("lockstep", [True, False])
async def test_a_slow_storage_lets_no_epoch_more_through_and_without_lockstep_it_would(
    lockstep: bool,
) -> None:
    class Pruning(PruningCallback):
        pass

    Pruning.lockstep = lockstep  # type: ignore[misc]
    model = ScriptedModel()
    _, trial = fake(0, _held_until(model, 3))
    await Trainer(model).fit(X, epochs=50, verbose=0, callbacks=[Pruning(trial, "loss")])
    assert (model.steps == 1) is lockstep


@pytest.mark.asyncio
async def test_the_storage_is_spoken_to_on_a_thread_of_ours_alone() -> None:
    study, trial = fake()
    run = start(PruningCallback(trial, "loss"))
    assert await tell(study, trial, run, "loss") == "the trial"
    assert study.told == [([1.0], TrialState.COMPLETE)]
    assert study.threads == ["asynccb optuna"] * 5


@pytest.mark.asyncio
async def test_while_one_waits_for_its_storage_another_one_trains() -> None:
    other_is_over = threading.Event()
    study, trial = fake(None, lambda: other_is_over.wait(20))
    async with Orchestrator(slots=2) as orch:
        held = orch.submit(Trainer(Counting()), X, epochs=1, callbacks=[PruningCallback(trial, "loss")])
        await orch.submit(Trainer(Counting()), X, epochs=20)
        assert held.outcome is None
        other_is_over.set()
    assert study.reported == [(1.0, 0)]


class Counting:
    """A model that takes turns with others, as ScriptedModel does not."""

    def train_batch(self, batch: Any) -> dict[str, float]:
        return {"loss": 1.0}


@pytest.mark.asyncio
@pytest.mark.filterwarnings("ignore:All-NaN")  # the pruner's own
async def test_nan_is_reported_and_optunas_own_pruner_prunes_it() -> None:
    study = optuna.create_study(pruner=optuna.pruners.MedianPruner(n_startup_trials=0))
    first = await ask(study)
    await tell(study, first, start(PruningCallback(first, "loss")), "loss")
    second = await ask(study)
    told = await tell(study, second, start(PruningCallback(second, "loss"), losses=(math.nan,)), "loss")
    assert told.state is TrialState.PRUNED
    assert [math.isnan(value) for value in told.intermediate_values.values()] == [True]


@pytest.mark.asyncio
async def test_a_missing_metric_is_one_warning_and_the_training_goes_on() -> None:
    study, trial = fake(0)
    with pytest.warns(RuntimeWarning, match=r"val_loss.* not available.* loss") as warned:
        history = await start(PruningCallback(trial), epochs=3)
    assert (history.outcome, len(warned), study.reported) == ("completed", 1, [])


@pytest.mark.asyncio
async def test_a_storage_that_fails_is_an_error_of_the_callback() -> None:
    _, trial = fake(None, lambda: 1 / 0)
    with pytest.raises(CallbackError, match=r"PruningCallback\.on_epoch_end of epoch 0 .*ZeroDivision"):
        await start(PruningCallback(trial, "loss"))


@pytest.mark.asyncio
async def test_a_trial_that_somebody_has_ended_prunes_its_training() -> None:
    study = optuna.create_study()
    trial = await ask(study)
    study.tell(trial, state=TrialState.FAIL)
    history = await start(PruningCallback(trial, "loss"))
    assert (history.outcome, history.epoch) == ("pruned", [0])
    assert history.reason == "its trial has ended at loss = 1"


@pytest.mark.asyncio
async def test_a_study_of_several_objectives_is_an_error_of_the_callback() -> None:
    study = optuna.create_study(directions=["minimize", "maximize"])
    with pytest.raises(CallbackError, match="multi-objective"):
        await start(PruningCallback(await ask(study), "loss"))


def test_what_is_no_trial_is_refused() -> None:
    with pytest.raises(ArgumentError, match="an Optuna trial"):
        PruningCallback(3)  # type: ignore[arg-type]


# ---------------------------------------------------------------- telling


@pytest.mark.asyncio
async def test_a_training_that_failed_is_told_as_failed_and_its_exception_is_on_the_run(
    caplog: pytest.LogCaptureFixture,
) -> None:
    study, trial = fake()
    run = Trainer(ScriptedModel(raises={0: OSError("no disk")})).start(X, verbose=0)
    await tell(study, trial, run, "loss")
    assert study.told == [(None, TrialState.FAIL)]
    assert isinstance(run.exception, OSError)
    assert [record.getMessage() for record in caplog.records if record.name == "asynccb"] == [
        f"trial 7 ({run.name}) is told as failed: failed, OSError: no disk"
    ]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("losses", "monitor", "why"),
    [
        ((1.0,), "val_loss", "no val_loss in its History, which has loss"),
        ((math.nan,), "loss", "[nan] is no value"),
    ],
)
async def test_a_value_that_is_none_is_told_as_failed(
    losses: tuple[float, ...], monitor: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    study, trial = fake()
    await tell(study, trial, Trainer(ScriptedModel(losses)).start(X, verbose=0), monitor)
    assert study.told == [(None, TrialState.FAIL)]
    assert why in caplog.text


@pytest.mark.asyncio
async def test_a_function_may_choose_the_value_and_if_it_fails_the_trial_is_told_all_the_same() -> None:
    study, trial = fake()
    run = Trainer(ScriptedModel((0.5, 0.25, 0.75))).start(X, epochs=3, verbose=0)
    await tell(study, trial, run, lambda history: min(history.history["loss"]))
    await tell(study, trial, run, lambda history: (history.history["loss"][0], len(history.epoch)))
    with pytest.raises(KeyError, match="typo"):
        await tell(study, trial, run, lambda history: history.history["typo"][-1])
    assert study.told == [
        ([0.25], TrialState.COMPLETE),
        ([0.5, 3.0], TrialState.COMPLETE),
        (None, TrialState.FAIL),
    ]


@pytest.mark.asyncio
async def test_a_hook_cannot_tell_its_own_run_and_nothing_is_told() -> None:
    study, trial = fake()

    class Tells(Callback):
        async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            await tell(study, trial, self.run, "loss")

    with pytest.raises(CallbackError, match="SelfWait"):
        await Trainer(ScriptedModel()).fit(X, verbose=0, callbacks=[Tells()])
    assert study.told == []


@pytest.mark.asyncio
async def test_a_sweep_that_is_cancelled_leaves_no_trial_running(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "asynccb")
    study = optuna.create_study()
    model, begun = ScriptedModel(gated=True), asyncio.Event()

    async def all_of_it() -> None:
        async with Orchestrator() as orch:
            trial = await ask(study)
            run = orch.submit(Trainer(model), X, callbacks=[PruningCallback(trial, "loss")])
            begun.set()
            await tell(study, trial, run, "loss")

    task = asyncio.create_task(all_of_it())
    await begun.wait()
    while not model.waiting:  # noqa: ASYNC110  a thread comes
        await asyncio.sleep(0.001)
    task.cancel()
    asyncio.get_running_loop().call_later(0.01, model.open_for_good)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [trial.state for trial in study.get_trials()] == [TrialState.FAIL]
    assert caplog.records == []


@pytest.mark.asyncio
async def test_a_cancel_waits_until_the_storage_has_the_end_of_the_trial() -> None:
    held, telling = threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    class Slow(FakeStudy):
        def tell(self, *arguments: Any, **keywords: Any) -> str:
            loop.call_soon_threadsafe(telling.set)
            held.wait(20)
            return super().tell(*arguments, **keywords)

    study: Any = Slow()
    run = start(PruningCallback(FakeTrial(FakeStudy(0)), "loss"))  # type: ignore[arg-type]
    await run
    task = asyncio.create_task(tell(study, FakeTrial(study), run))  # type: ignore[arg-type]
    await telling.wait()
    task.cancel()
    loop.call_later(0.01, held.set)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert study.told == [(None, TrialState.PRUNED)]


# ---------------------------------------------------------------- without Optuna


def test_without_optuna_the_error_names_the_extra() -> None:
    source = (
        "import sys; sys.modules['optuna'] = None\n"
        "try:\n    import asynccb.integrations.optuna\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == (
        "asynccb.integrations.optuna needs Optuna: pip install 'asynccb[optuna]'\n",
        "",
    )
