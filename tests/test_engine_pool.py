"""Threads that serve one run after the other: used again, clean, and gone when nobody needs them."""

from __future__ import annotations

import contextvars
import functools
import gc
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asynccb import Trainer
from asynccb.engines import ThreadEngine, ThreadPoolEngine, pool
from asynccb.testing import ScriptedModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

X = np.zeros((2, 1))
here: contextvars.ContextVar[str] = contextvars.ContextVar("here", default="nowhere")


@pytest.fixture
def engine() -> Iterator[ThreadPoolEngine]:
    engine = ThreadPoolEngine(2)
    yield engine
    engine.close()


def run(engine: Any, target: Callable[[], Any], name: str = "a run") -> Any:
    """Runs ``target`` and waits until its thread has come to rest. Answers what it returns."""
    answers: list[Any] = []
    threads: list[threading.Thread] = []

    def body() -> None:
        threads.append(threading.current_thread())
        answers.append(target())

    engine.start(body, name)
    until(lambda: answers and (not threads[0].is_alive() or threads[0] in idle(engine)))
    return answers[0]


def idle(engine: Any) -> list[threading.Thread]:
    return [worker.thread for worker in getattr(engine, "_idle", [])]


def until(true: Callable[[], Any]) -> None:
    waiting = threading.Event()
    for _ in range(2000):
        if true():
            return
        waiting.wait(0.005)
    raise AssertionError("it did not come true")


def test_one_thread_serves_runs_that_follow_each_other(engine: ThreadPoolEngine) -> None:
    assert len({run(engine, threading.get_native_id) for _ in range(5)}) == 1


def test_each_run_has_its_own_name_and_context_on_it(engine: ThreadPoolEngine) -> None:
    def look() -> tuple[Any, ...]:
        thread, was = threading.current_thread(), here.get()
        here.set("left behind")
        return thread.name, thread.daemon, was

    seen = []
    for caller in ("one", "two"):
        token = here.set(caller)
        seen.append(run(engine, look, f"run {caller}"))
        here.reset(token)
    assert seen == [("run one", True, "one"), ("run two", True, "two")]
    (thread,) = idle(engine)
    assert thread.name == pool.IDLE_NAME


def test_nothing_of_a_run_is_kept_by_the_thread_that_waits_for_the_next(engine: ThreadPoolEngine) -> None:
    class Weighty:
        def __call__(self) -> None: ...

    weighty, held = Weighty(), Weighty()
    token = here.set(held)  # type: ignore[arg-type]  # by the context
    seen = [weakref.ref(weighty), weakref.ref(held)]
    run(engine, weighty)
    here.reset(token)
    del weighty, held, token
    gc.collect()
    assert [it() for it in seen] == [None, None]
    assert len(idle(engine)) == 1


def test_a_run_never_waits_for_the_thread_of_another(engine: ThreadPoolEngine) -> None:
    go_on, begun = threading.Event(), threading.Semaphore(0)

    def stuck() -> None:
        begun.release()
        assert go_on.wait(30)

    for _ in range(4):
        engine.start(stuck, "stuck")
    for _ in range(4):
        assert begun.acquire(timeout=30)
    go_on.set()
    until(lambda: not [t for t in threading.enumerate() if t.name == "stuck"])
    assert len(idle(engine)) == 2  # no more than may wait; the others have left


def test_what_a_run_raises_is_told_as_of_any_thread_and_its_thread_is_used_no_more(
    engine: ThreadPoolEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: told.append((args.exc_type, args.thread.name)))

    def fail() -> None:
        raise ArithmeticError

    engine.start(fail, "fails")
    until(lambda: told)
    assert told == [(ArithmeticError, "fails")]
    assert run(engine, lambda: 1) == 1
    assert len(idle(engine)) == 1


def test_idle_threads_leave_by_themselves(engine: ThreadPoolEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "LINGER", 0.0)
    threads = set()
    for _ in range(100):  # some are given a run at the very moment when they have waited long enough
        done = threading.Event()

        def body(done: threading.Event = done) -> None:
            threads.add(threading.current_thread())
            done.set()

        engine.start(body, "short")
        assert done.wait(30)
    until(lambda: not any(thread.is_alive() for thread in threads))
    assert idle(engine) == []


def test_a_run_given_to_a_thread_that_is_about_to_leave_is_not_lost(engine: ThreadPoolEngine) -> None:
    run(engine, lambda: None)
    (worker,) = engine._idle
    done = threading.Event()
    engine.start(done.set, "the last moment")
    assert not engine._unpark(worker)  # it would have asked just now, and must stay
    assert done.wait(30)


def test_closing_ends_the_idle_now_and_the_busy_when_they_return() -> None:
    engine = ThreadPoolEngine(2)
    go_on = {"waits": threading.Event(), "works": threading.Event()}
    threads: dict[str, threading.Thread] = {}

    def body(name: str) -> None:
        threads[name] = threading.current_thread()
        assert go_on[name].wait(30)

    for name in go_on:
        engine.start(functools.partial(body, name), name)
    go_on["waits"].set()
    until(lambda: len(threads) == 2 and idle(engine) == [threads["waits"]])
    engine.close()
    threads["waits"].join(30)
    assert [threads[name].is_alive() for name in go_on] == [False, True]
    with pytest.raises(RuntimeError, match="too late: the engine was closed"):
        engine.start(lambda: None, "too late")
    go_on["works"].set()
    threads["works"].join(30)
    assert not threads["works"].is_alive()
    engine.close()  # a second time harms nothing


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from Python 3.12 on, of forks beside threads
def test_a_forked_process_starts_threads_of_its_own(engine: ThreadPoolEngine) -> None:
    run(engine, lambda: None)
    child = os.fork()
    if child == 0:
        done = threading.Event()
        engine.start(done.set, "in the child")
        os._exit(0 if done.wait(10) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.asyncio
async def test_trainings_on_a_thread_that_is_used_again_are_what_they_are_on_new_ones() -> None:
    class Threads(ScriptedModel):
        def train_batch(self, batch: Any) -> dict[str, float]:
            names.append(threading.current_thread().name)
            return super().train_batch(batch)

    async def trained(engine: Any) -> list[Any]:
        trainer = Trainer(Threads(), seed=1, engine=engine)
        return [
            (await trainer.fit(X, verbose=0, epochs=2, name=f"{n}")).history for n in range(3)
        ]  # the same model, the same name, one after the other

    names: list[str] = []
    engine = ThreadPoolEngine(1)
    try:
        assert await trained(engine) == await trained(ThreadEngine())
    finally:
        engine.close()
    assert names[: len(names) // 2] == names[len(names) // 2 :]
    assert set(names) == {"asynccb 0", "asynccb 1", "asynccb 2"}


def test_a_system_without_a_thread_to_give_is_told_to_the_caller(
    engine: ThreadPoolEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            engine.start(lambda: None, "none left")
    assert run(engine, lambda: "goes on") == "goes on"
