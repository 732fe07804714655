"""Trainings with every callback: a cancel wherever one can be suspended, an error in every hook."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from asynccb import Callback, CallbackError, RunCancelled
from asynccb.bus.mailbox import HOOKS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_spec = importlib.util.spec_from_file_location("scene", Path(__file__).with_name("scene.py"))
scene = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(scene)

pytestmark = pytest.mark.filterwarnings("ignore:Could not reach RemoteMonitor:UserWarning")

Cut = scene.Cut


def the_fit(task: asyncio.Task[Any]) -> None:
    """Cancels whoever awaits the training."""
    next(task for task in asyncio.all_tasks() if task.get_name() == "fit").cancel()


def itself(task: asyncio.Task[Any]) -> None:
    """Cancels the task that was suspended, as a runner that shuts down does."""
    task.cancel()


class Bench:
    """A loop, a server and a folder, where trainings are cut one after the other."""

    def __init__(self, runner: asyncio.Runner, folder: Path) -> None:
        self._runner = runner
        self._folder = folder
        self._numbers = itertools.count()
        self.trials = 0
        for _ in range(2):  # what is imported and opened at first use is there now
            self.roles = sorted(self.fit().counts)
        self._before: Any = None

    def fit(self, *cuts: Any, **options: Any) -> Any:
        """One training in a new folder; checks what it left."""
        folder = self._folder / str(next(self._numbers))
        folder.mkdir()
        try:
            with scene.nothing_said():
                ended = self._runner.run(self._fit(folder, frozenset(cuts), options))
                scene.check_files(folder)
                scene.check_closing(ended)
        except BaseException as error:
            error.add_note(f"cut at {cuts} with {options}")
            raise
        self.trials += 1
        return ended

    async def _fit(self, folder: Path, cuts: frozenset[Any], options: Any) -> Any:
        before = scene.left()
        async with scene.serving() as port:
            async with asyncio.timeout(30):
                ended = await scene.fit(folder, port, cuts, **options)
        await scene.back_to(before)
        return ended


@pytest.fixture
def bench(folder: Path) -> Iterator[Bench]:
    with asyncio.Runner() as runner:
        yield Bench(runner, folder)


def test_every_callback_of_the_package_takes_part() -> None:
    assert scene.untested() == set()


@pytest.mark.parametrize("act", [the_fit, itself])
def test_a_cancel_at_every_suspension_leaves_nothing_and_whole_files(
    bench: Bench, act: Callable[[Any], None]
) -> None:
    errors: set[type[Any]] = set()
    for role in bench.roles:
        for at in itertools.count(1):
            ended = bench.fit(Cut(role, at), act=act)
            if not ended.cut:  # it has completed untouched
                assert (ended.error, ended.run.outcome) == (None, "completed")
                break
            errors.add(type(ended.error))
            if act is the_fit or role == "fit":
                assert isinstance(ended.error, asyncio.CancelledError)
    assert bench.trials > 80
    assert errors == {asyncio.CancelledError} | ({RunCancelled, type(None)} if act is itself else set())


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("act", [the_fit, itself])
def test_two_cancels_at_every_pair_of_points_that_are_near_leave_nothing_and_whole_files(
    bench: Bench, act: Callable[[Any], None]
) -> None:
    for role, apart in itertools.product(bench.roles, range(1, 6)):
        for at in itertools.count(1):
            ended = bench.fit(Cut(role, at), Cut(role, at + apart), act=act)
            if not ended.cut:
                break
    assert bench.trials > 400


# ---------------------------------------------------------------- an error at every hook


class Fails(Callback):
    """Raises at the ``at``-th of its hooks."""

    def __init__(self, at: int) -> None:
        self.left = at

    def passed(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise ZeroDivisionError("by a hook")


def failing(side: str, at: int) -> Fails:
    """A callback of ``def`` or of ``async def`` hooks."""

    def inline(self: Fails, *_: Any) -> None:
        self.passed()

    async def beside(self: Fails, *_: Any) -> None:
        await asyncio.sleep(0)
        self.passed()
        await asyncio.sleep(0)

    hook = inline if side == "inline" else beside
    # News of files are told on the loop, whatever the hook is made with.
    hooks = [name for name in HOOKS if side == "beside" or name != "on_checkpoint_saved"]
    return type(side.capitalize(), (Fails,), dict.fromkeys(hooks, hook))(at)


@pytest.mark.parametrize(("side", "raised"), [("inline", ZeroDivisionError), ("beside", CallbackError)])
def test_an_error_in_every_hook_beside_all_callbacks_leaves_nothing_and_whole_files(
    bench: Bench, side: str, raised: type[BaseException]
) -> None:
    for at in itertools.count(1):
        fails = failing(side, at)
        ended = bench.fit(more=(fails,))
        if fails.left > 0:
            assert ended.error is None
            break
        assert type(ended.error) is raised
        assert ended.run.outcome == "failed"
    assert at > scene.EPOCHS * (2 + 2 * scene.BATCHES)


# ---------------------------------------------------------------- the negative control


def test_a_naive_thread_with_tasks_beside_it_trains_on_and_leaves_task_thread_and_file(
    tmp_path: Path,
) -> None:
    """What people write in its place: ``to_thread`` for the training, ``create_task`` for the log."""
    gate, steps = threading.Event(), []

    async def naive() -> None:
        loop, rows = asyncio.get_running_loop(), asyncio.Queue[str | None]()

        async def log() -> None:
            with (tmp_path / "log.csv").open("w") as file:
                while (row := await rows.get()) is not None:
                    file.write(row)

        def train() -> None:
            for step in range(scene.EPOCHS * scene.BATCHES):
                gate.wait(10)
                steps.append(step)
                loop.call_soon_threadsafe(rows.put_nowait, f"{step}\r\n")
            loop.call_soon_threadsafe(rows.put_nowait, None)

        logging = loop.create_task(log())
        await asyncio.to_thread(train)
        await logging

    async def main() -> dict[str, Any]:
        before = scene.left()
        training = asyncio.create_task(naive())
        at_each = scene.suspensions(lambda cut, task: task.cancel() if task is training else None)
        with at_each, pytest.raises(asyncio.CancelledError):
            await training
        with pytest.raises(AssertionError):
            await scene.back_to(before, patient=0.05)
        seen = scene.left()
        gate.set()
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}))
        return {name: seen[name] for name in seen if seen[name] != before[name]}

    assert asyncio.run(main()).keys() >= {"tasks", "threads"}
    assert len(steps) == scene.EPOCHS * scene.BATCHES  # it trained to its end, though it was cancelled
