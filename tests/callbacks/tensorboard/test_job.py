"""One job at a time beside the training: nothing queues, nothing is lost, nothing is silent."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import pytest

from asynccb.callbacks.tensorboard.job import Sideline

if TYPE_CHECKING:
    from collections.abc import Callable


def nothing() -> None: ...


def fails(error: BaseException) -> Callable[[], None]:
    def job() -> None:
        raise error

    return job


@pytest.mark.asyncio
async def test_it_is_busy_from_the_start_of_a_job_to_its_end() -> None:
    sideline, gate = Sideline("side"), threading.Event()
    assert not sideline.busy
    sideline.start(gate.wait, nothing)  # type: ignore[arg-type]
    assert sideline.busy
    gate.set()
    await sideline.end()
    assert not sideline.busy


@pytest.mark.asyncio
async def test_a_job_runs_on_a_thread_of_that_name() -> None:
    sideline, names = Sideline("side"), list[str]()
    sideline.start(lambda: names.append(threading.current_thread().name), nothing)
    await sideline.end()
    assert names == ["side"]


@pytest.mark.asyncio
@pytest.mark.parametrize("job", [nothing, fails(ValueError("no"))], ids=["well", "badly"])
async def test_done_is_called_however_the_job_ends(job: Callable[[], None]) -> None:
    sideline, done = Sideline("side"), threading.Event()
    sideline.start(job, done.set)
    assert await asyncio.to_thread(done.wait, 10)


@pytest.mark.asyncio
async def test_done_is_called_and_the_error_told_where_there_is_no_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    sideline, done = Sideline("side"), list[int]()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        sideline.start(nothing, lambda: done.append(1))
    assert done == [1]
    with pytest.raises(RuntimeError, match="can't start new thread"):
        sideline.raise_error()


@pytest.mark.asyncio
async def test_an_error_is_raised_once_and_the_first_of_two_is_kept() -> None:
    sideline = Sideline("side")
    for text in ("first", "second"):
        ended = threading.Event()
        sideline.start(fails(SystemExit(text)), ended.set)
        await asyncio.to_thread(ended.wait, 10)
    with pytest.raises(SystemExit, match="first"):
        sideline.raise_error()
    sideline.raise_error()
    await sideline.end()


@pytest.mark.asyncio
async def test_the_end_waits_for_the_job_and_raises_its_error() -> None:
    sideline, gate = Sideline("side"), threading.Event()

    def job() -> None:
        gate.wait()
        raise ValueError("late")

    sideline.start(job, nothing)
    waiting = asyncio.ensure_future(sideline.end())
    await asyncio.sleep(0)
    assert not waiting.done()
    gate.set()
    with pytest.raises(ValueError, match="late"):
        await waiting


@pytest.mark.asyncio
async def test_a_cancelled_wait_leaves_a_job_that_learns_that_it_is_not_wanted() -> None:
    sideline, seen = Sideline("side"), list[bool]()
    began, gate, done = (threading.Event() for _ in range(3))

    def job() -> None:
        seen.append(sideline.goes_on())
        began.set()
        gate.wait()
        seen.append(sideline.goes_on())

    sideline.start(job, done.set)
    await asyncio.to_thread(began.wait, 10)
    waiting = asyncio.ensure_future(sideline.end())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    sideline.stop()
    gate.set()
    assert await asyncio.to_thread(done.wait, 10)
    assert seen == [True, False]


@pytest.mark.asyncio
async def test_a_cancelled_wait_calls_off_a_job_that_has_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    sideline, done, ran = Sideline("side"), list[int](), list[int]()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", lambda thread: None)  # it never gets to run
        sideline.start(lambda: ran.append(1), lambda: done.append(1))
    waiting = asyncio.ensure_future(sideline.end())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert (ran, done) == ([], [1])


@pytest.mark.asyncio
async def test_the_end_of_nothing_is_at_once() -> None:
    await Sideline("side").end()
