"""Random scripts of everything that can be asked of an orchestrator and its trainings: whatever comes, all
end as they may, and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import threading
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from waiting import PATIENT, until

from asynccb import Callback, NotStarted, Orchestrator, OrchestratorClosed, Run, TornState, Trainer
from asynccb.admission import Devices
from asynccb.all_events import AllEvents
from asynccb.budget import Wish, budget
from asynccb.claims import Claim, _holders
from asynccb.events import Gap, RunChanged
from asynccb.run import live_runs
from asynccb.testing import Recorder, ScriptedModel
from asynccb.training.control import Limits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

X = np.zeros((3, 1))
EPOCHS = 3
ENDLESS = 10**6


class Broken(Exception):
    """What trainings of the script fail with."""


class Left(Exception):
    """What leaves the block."""


class Computes(ScriptedModel):
    """Takes turns with others; its weights tell how many batches it has trained."""

    needs_cpu = True


class Lockstep(Callback):
    """The training waits for its hook, which lets others go first."""

    lockstep = True

    async def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        await asyncio.sleep(0)


class Full(Callback):
    """A mailbox that is often full."""

    mailbox_size = 1

    async def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        await asyncio.sleep(0)


async def batches() -> AsyncIterator[Any]:
    while True:
        yield X
        await asyncio.sleep(0)


class Submitted:
    """A run, and how it may end."""

    def __init__(self, run: Run, model: ScriptedModel, recorder: Recorder, kind: str) -> None:
        self.run, self.model, self.recorder, self.kind = run, model, recorder, kind
        self.may_end = {"endless": set(), "fails": {"failed"}, "never made": {"failed"}}.get(
            kind, {"completed"}
        )
        self.touched = False

    def check(self) -> None:
        run, hooks = self.run, self.recorder.hooks
        assert run.ended, run
        assert run.outcome in self.may_end, (run, self.kind, self.may_end)
        assert run.state == run.outcome == run.history.outcome
        if hooks:
            assert (hooks[0], hooks[-1], hooks.count("on_train_end")) == ("on_train_begin", "on_train_end", 1)
            assert ("on_exception" in hooks) == (run.outcome in ("failed", "cancelled"))
        else:
            assert self.model.steps == 0
        if run.outcome == "completed":
            assert self.model.steps == run.step == EPOCHS * 3
            assert run.history.epoch == list(range(EPOCHS))
        assert set(self.model.weights) == {float(self.model.steps)} or self.kind == "fails"


class Script:
    """One random life of an orchestrator, made from its seed alone."""

    def __init__(self, seed: int) -> None:
        self.choose = random.Random(seed)
        self.all: list[Submitted] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self.on_failure: Any = self.choose.choice(["collect", "collect", "cancel_others"])
        self.orch = Orchestrator(
            self.choose.choice([None, 1, 2, 3]),
            devices={"a": 1, "b": 2},
            on_failure=self.on_failure,
            replay=64,
        )
        self.items: list[Any] = []

    # What may happen ------------------------------------------------------------------------------------

    def submit(self) -> None:
        choose = self.choose
        kind = choose.choice(["plain", "plain", "factory", "endless", "fails", "never made", "source"])
        model = Computes(raises={4: Broken()} if kind == "fails" else {})
        if choose.random() < 0.2:
            model.needs_cpu = False  # type: ignore[misc]
        recorder = Recorder()
        more: list[Callback] = [one() for one in (Lockstep, Full) if choose.random() < 0.2]

        def make() -> Trainer:
            if kind == "never made":
                raise Broken
            trainer = Trainer(model)
            trainer._limits = Limits(grace=2.0, last_words=1.0, poll=0.01)
            return trainer

        arguments: dict[str, Any] = {"epochs": ENDLESS if kind == "endless" else EPOCHS}
        arguments |= {"steps_per_epoch": 3} if kind == "source" else {"batch_size": 1}
        try:
            run = self.orch.submit(
                make if kind in ("factory", "never made") else make(),
                batches() if kind == "source" else X,
                priority=choose.randint(-1, 2),
                device=choose.choice([None, None, "a", ("b", 0.5), ("any", 0.75)]),
                callbacks=[*more, recorder],
                **arguments,
            )
        except OrchestratorClosed:
            assert self.on_failure == "cancel_others"
            return
        self.all.append(Submitted(run, model, recorder, kind))

    def ask(self, how: str, outcome: str) -> None:
        if self.all:
            one = self.choose.choice(self.all)
            one.touched = True
            one.may_end.add(outcome)
            getattr(one.run, how)(f"asked by {self.choose.random()}")

    def pause_or_resume(self) -> None:
        if self.all:
            run = self.choose.choice(self.all).run
            self.choose.choice([run.pause, run.resume])()

    def move(self) -> None:
        if self.all:
            self.choose.choice(self.all).run.priority = self.choose.randint(-3, 3)

    def copy(self) -> None:
        if self.all:
            self.tasks.append(asyncio.create_task(self.snapshot(self.choose.choice(self.all))))

    async def snapshot(self, one: Submitted) -> None:
        try:
            snapshot = await one.run.snapshot()
        except TornState:
            assert one.kind == "fails"
        except NotStarted:
            assert one.model.steps == 0 or one.run.outcome is None
        else:
            assert set(snapshot.arrays["weights"]) == {float(snapshot.step)}
            snapshot.release()

    def from_a_thread(self) -> None:
        if self.all:
            one = self.choose.choice(self.all)
            one.touched = True
            one.may_end.add("stopped")
            thread = threading.Thread(target=one.run.stop)
            thread.start()
            thread.join()

    async def read(self) -> None:
        self.items = [item async for item in self.orch.events()]

    async def wait_a_little(self) -> None:
        for _ in range(self.choose.choice([1, 1, 3, 20])):
            await asyncio.sleep(0)
        if self.choose.random() < 0.1:
            await asyncio.sleep(0.005)

    async def step(self) -> None:
        acts: dict[str, Callable[[], object]] = {
            "submit": self.submit,
            "stop": lambda: self.ask("stop", "stopped"),
            "prune": lambda: self.ask("prune", "pruned"),
            "cancel": lambda: self.ask("cancel", "cancelled"),
            "pause": self.pause_or_resume,
            "move": self.move,
            "copy": self.copy,
            "thread": self.from_a_thread,
            "wait": lambda: None,
        }
        often = [10, 2, 1, 2, 4, 2, 2, 1, 6]
        acts[self.choose.choices(list(acts), often)[0]]()
        await self.wait_a_little()

    # How it is left -------------------------------------------------------------------------------------

    async def block(self, way: str) -> None:
        async with self.orch:
            self.tasks.append(asyncio.create_task(self.read()))
            if self.choose.random() < 0.5:
                self.tasks.append(asyncio.create_task(self.count()))
            await asyncio.sleep(0)
            for _ in range(self.choose.randint(5, 25)):
                await self.step()
            if way == "raises":
                raise Left
            if way == "cancelled":
                asyncio.current_task().cancel()  # type: ignore[union-attr]
                await asyncio.sleep(0)
            for one in self.all:
                if one.kind == "endless":
                    one.may_end.add("stopped")
                    one.run.stop()

    async def count(self) -> None:
        seen = [run.name async for run in self.orch.as_completed()]
        assert len(seen) == len(set(seen))

    async def play(self) -> None:
        way = self.choose.choice(["normal", "normal", "raises", "cancelled"])
        task = asyncio.create_task(self.block(way))
        async with asyncio.timeout(PATIENT):
            await asyncio.wait({task})
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        expected = {"normal": type(None), "raises": Left, "cancelled": asyncio.CancelledError}[way]
        failed = any(one.run.outcome == "failed" for one in self.all)
        if isinstance(error, Broken):
            assert self.on_failure == "cancel_others"
        else:
            assert isinstance(error, expected), error
        if way != "normal" or (failed and self.on_failure == "cancel_others"):
            for one in self.all:
                one.may_end.add("cancelled")
        self.check()
        async with asyncio.timeout(PATIENT):
            await asyncio.gather(*self.tasks)
        self.check_events()

    # What must be -----------------------------------------------------------------------------------------

    def check(self) -> None:
        for one in self.all:
            one.check()
        stats = self.orch.stats
        assert (stats.queued, stats.live, sum(stats.ended.values())) == (0, 0, len(self.all))
        assert stats.devices == {"a": 0.0, "b": 0.0}
        assert stats.computed >= 0

    def check_events(self) -> None:
        told: dict[str, list[Any]] = defaultdict(list)
        last = -1
        for item in self.items:
            if isinstance(item, Gap):
                last += item.missing
                told.clear()
                continue
            assert item.seq == last + 1
            last = item.seq
            told[item.run].append(item.event)
        for one in self.all:
            events = told[one.run.name]
            if not events:  # they have left the ring
                continue
            assert events[-1] == RunChanged(one.run.outcome or "")
            numbers = [event.seq for event in events if not isinstance(event, (RunChanged, Gap))]
            assert numbers == sorted(set(numbers))


async def play(seed: int) -> None:
    asyncio.get_running_loop().set_debug(False)  # it makes each handle ten times as dear
    held, interval = len(_holders), sys.getswitchinterval()
    script = Script(seed)
    with contextlib.suppress(TimeoutError):
        await script.play()
        # Their threads say a last word after the end was told.
        await until(lambda: len(_holders) == held)
        await until(lambda: budget()._shares == {})
        assert live_runs() == []
        assert budget()._wishes == []
        assert budget()._pools.threads is None
        assert budget()._scheduler.out == 0
        assert sys.getswitchinterval() == interval
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert not others, others
        return
    raise AssertionError(f"it hangs: {[(one.kind, one.run) for one in script.all]}")


@pytest.mark.asyncio
@pytest.mark.parametrize("first", range(0, 200, 20))
async def test_whatever_is_asked_all_end_as_they_may_and_nothing_is_left(
    first: int, caplog: pytest.LogCaptureFixture
) -> None:
    for seed in range(first, first + 20):
        try:
            await play(seed)
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise


# ---------------------------------------------------------------- the negative controls


def forgets_devices(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Devices, "give_back", lambda devices, device, share: None)


def forgets_a_claim(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Claim, "let_go", lambda claim, clean_up=None: None)


def forgets_its_wish(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Wish, "withdraw", lambda wish: None)


def forgets_to_say_the_outcome(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(AllEvents, "_say_outcome", lambda events, run: None)


def counts_twice(patch: pytest.MonkeyPatch) -> None:
    over = Orchestrator._over

    def twice(orch: Orchestrator, submission: Any) -> None:
        over(orch, submission)
        orch._outcomes["completed"] += submission.number == 3

    patch.setattr(Orchestrator, "_over", twice)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "broken", [forgets_devices, forgets_a_claim, forgets_its_wish, forgets_to_say_the_outcome, counts_twice]
)
async def test_an_orchestrator_with_a_defect_is_found(
    broken: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(play.__globals__, "PATIENT", 1.0)
    wishes, holders = list(budget()._wishes), dict(_holders)
    with monkeypatch.context() as patch:
        broken(patch)
        found = False
        for seed in range(10):
            try:
                await play(seed)
            except (AssertionError, TimeoutError):
                found = True
                break
        assert found
    for wish in budget()._wishes[len(wishes) :]:
        wish.withdraw()
    for held in _holders.keys() - holders.keys():
        del _holders[held]
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.asyncio
@pytest.mark.parametrize("first", range(1000, 6000, 1000))
async def test_whatever_is_asked_of_many_more(first: int) -> None:
    for seed in range(first, first + 1000):
        try:
            await play(seed)
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
