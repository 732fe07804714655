"""Event loops of every kind, loops that stop at any moment, and others' ways to end a task."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import random
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asynccb import Run, Trainer
from asynccb.claims import _holders
from asynccb.run import live_runs
from asynccb.testing import Recorder, ScriptedModel
from asynccb.training.control import Limits

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

_spec = importlib.util.spec_from_file_location("scene", Path(__file__).with_name("scene.py"))
scene = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(scene)

SEED = 20_261_127
X = np.zeros((4, 1))

# ---------------------------------------------------------------- a loop that stops


class Bench:
    """A training that would go on for ever, on a loop of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.inline, self.beside = scene.Closing(), Recorder()
        self.run: Run = self.loop.run_until_complete(self._start())

    async def _start(self) -> Run:
        trainer = Trainer(ScriptedModel())
        trainer._limits = Limits(poll=0.01)
        return trainer.start(
            X, batch_size=1, epochs=10**6, verbose=0, callbacks=[self.inline, self.beside], replay=8
        )

    def stop_after(self, seconds: float) -> None:
        """Runs the loop for so long; then it stops, wherever the training is."""
        self.loop.call_later(seconds, self.loop.stop)
        self.loop.run_forever()

    def join(self) -> None:
        for thread in threading.enumerate():
            if thread.name.startswith("asynccb"):
                thread.join(scene.PATIENT)
                assert not thread.is_alive()


def closed_at_once(bench: Bench) -> None:
    """What a program does that has stopped its loop and wants to be gone."""
    bench.loop.close()
    bench.join()
    assert bench.inline.hooks in ([], ["on_train_begin", "on_exception", "on_train_end"])
    assert "on_train_end" not in bench.beside.hooks


def all_tasks_cancelled(bench: Bench) -> None:
    """What `asyncio.run` does when its main function is over."""
    tasks = asyncio.all_tasks(bench.loop)
    for task in tasks:
        task.cancel()
    bench.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    bench.loop.close()
    bench.join()
    assert bench.run.outcome == "cancelled"
    if bench.inline.hooks:
        assert bench.inline.hooks == ["on_train_begin", "on_exception", "on_train_end"]
        assert bench.beside.hooks[-2:] == ["on_exception", "on_train_end"]


def run_again(bench: Bench) -> None:
    """What a notebook or a debugger does. Nothing of the training has noticed."""

    async def stop() -> str:
        bench.run.stop("seen enough")
        return (await bench.run).outcome

    assert bench.loop.run_until_complete(stop()) == "stopped"
    bench.loop.close()
    bench.join()
    assert bench.beside.hooks[-1] == "on_train_end"
    assert bench.beside.hooks.count("on_train_batch_end") == bench.run.step


def stop_at_random(trials: int, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    ways = [closed_at_once, all_tasks_cancelled, run_again]
    trained = 0
    for trial in range(trials):
        chance = random.Random(SEED + trial)
        way, seconds = ways[trial % len(ways)], chance.uniform(0, 0.02)
        caplog.clear()
        try:
            # asyncio itself says that tasks were destroyed whose loop was closed under them.
            logging.getLogger("asyncio").disabled = way is closed_at_once
            with scene.nothing_said():
                bench = Bench()
                bench.stop_after(seconds)
                way(bench)
                trained += bench.run.step > 0
                assert [r.levelno for r in caplog.records] == [logging.ERROR] * (way is closed_at_once)
                del bench
            assert live_runs() == []
            assert not _holders
        except BaseException as error:
            error.add_note(f"{way.__name__} after {seconds} s (seed {SEED + trial})")
            raise
        finally:
            logging.getLogger("asyncio").disabled = False
    assert trained > trials / 2
    assert capfd.readouterr().err == ""


def test_a_loop_that_stops_at_two_hundred_random_moments_leaves_no_thread_and_says_nothing(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    stop_at_random(200, caplog, capfd)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_loop_that_stops_at_two_thousand_random_moments_leaves_no_thread_and_says_nothing(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    stop_at_random(2000, caplog, capfd)


def test_a_naive_thread_says_a_traceback_when_its_loop_has_gone(tmp_path: Path) -> None:
    """The negative control."""
    loop, gate = asyncio.new_event_loop(), threading.Event()

    def train() -> None:
        gate.wait(10)
        loop.call_soon_threadsafe(print, "epoch 1")

    async def main() -> threading.Thread:
        thread = threading.Thread(target=train)
        thread.start()
        return thread

    def stop_and_close() -> None:
        thread = loop.run_until_complete(main())
        loop.close()
        gate.set()
        thread.join()

    with pytest.raises(AssertionError, match="Event loop is closed"), scene.nothing_said():
        stop_and_close()


# ---------------------------------------------------------------- loops of every kind


@pytest.fixture(autouse=True, scope="module")
def _what_uvloop_keeps() -> None:
    """Its first loop opens a pipe for the whole process."""
    if importlib.util.find_spec("uvloop"):
        on_uvloop(lambda: asyncio.sleep(0))


Main = "Callable[[], Coroutine[Any, Any, Any]]"


def on_asyncio(main: Main) -> Any:
    return asyncio.run(main())


def on_a_thread_that_is_not_the_main_one(main: Main) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(asyncio.run(main())))
    thread.start()
    thread.join()
    return results.pop()


def on_uvloop(main: Main) -> Any:
    uvloop = pytest.importorskip("uvloop", reason="uvloop is not installed: pip install 'asynccb[test]'")
    return uvloop.run(main())


def on_anyio(main: Main) -> Any:
    anyio = pytest.importorskip("anyio", reason="anyio is not installed: pip install 'asynccb[test]'")
    return anyio.run(main)


def on_asyncio_with_eager_tasks(main: Main) -> Any:
    async def eager() -> Any:
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
        return await main()

    return asyncio.run(eager())


LOOPS = [
    on_asyncio,
    on_a_thread_that_is_not_the_main_one,
    on_uvloop,
    on_anyio,
    *([on_asyncio_with_eager_tasks] if hasattr(asyncio, "eager_task_factory") else []),
]


@pytest.mark.parametrize("on", LOOPS)
def test_trainings_with_every_callback_end_well_on_every_loop_one_after_the_other(
    on: Callable[[Main], Any], tmp_path: Path
) -> None:
    async def main() -> Any:
        async with scene.serving() as port:
            return await scene.fit(folder, port)

    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        ended = on(main)
        assert (ended.error, ended.run.outcome) == (None, "completed")
        scene.check_files(folder)
        scene.check_closing(ended)
        assert len(ended.run.history.epoch) == scene.EPOCHS


async def timed_out(fit: Coroutine[Any, Any, Any]) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await fit


async def waited_for_in_vain(fit: Coroutine[Any, Any, Any]) -> None:
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(fit, 0.05)


async def beside_a_task_that_fails(fit: Coroutine[Any, Any, Any]) -> None:
    async def fail() -> None:
        await asyncio.sleep(0.05)
        raise OSError("of the sibling")

    async def both() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(fit)
            group.create_task(fail())

    with pytest.raises(ExceptionGroup) as caught:
        await both()
    assert [str(error) for error in caught.value.exceptions] == ["of the sibling"]


async def gathered_and_cancelled(fit: Coroutine[Any, Any, Any]) -> None:
    gathered = asyncio.gather(fit, asyncio.sleep(30), return_exceptions=True)
    asyncio.get_running_loop().call_later(0.05, gathered.cancel)
    with pytest.raises(asyncio.CancelledError):
        await gathered


async def in_a_scope_of_anyios(fit: Coroutine[Any, Any, Any]) -> None:
    anyio = pytest.importorskip("anyio", reason="anyio is not installed: pip install 'asynccb[test]'")
    with anyio.move_on_after(0.05) as scope:
        await fit
    assert scope.cancelled_caught


WAYS = [timed_out, waited_for_in_vain, beside_a_task_that_fails, gathered_and_cancelled, in_a_scope_of_anyios]


@pytest.mark.parametrize("on", LOOPS)
@pytest.mark.parametrize("way", WAYS)
def test_whoever_ends_the_task_that_awaits_a_training_ends_it_in_order_and_gets_his_own_error(
    way: Callable[[Coroutine[Any, Any, Any]], Coroutine[Any, Any, None]], on: Callable[[Main], Any]
) -> None:
    async def main() -> None:
        trainer, inline, beside = Trainer(ScriptedModel()), scene.Closing(), Recorder()
        before = scene.left()
        await way(trainer.fit(X, batch_size=1, epochs=10**6, verbose=0, callbacks=[inline, beside]))
        run = trainer.last_run
        assert run is not None
        assert run.outcome == "cancelled"
        assert inline.hooks == ["on_train_begin", "on_exception", "on_train_end"]
        assert beside.hooks[-2:] == ["on_exception", "on_train_end"]
        await scene.back_to(before)

    on(main)
