from __future__ import annotations

import asyncio
import gc
import os
import pickle
import subprocess
import sys
import threading
import weakref
from concurrent.futures import CancelledError, Future

import pytest

from asynccb.storage import SerialExecutor, serial
from asynccb.storage.hdf5 import hdf5_thread


@pytest.fixture
def executor():
    return SerialExecutor("serial under test")


def threads(executor):
    return [thread for thread in threading.enumerate() if thread.name == executor.name]


def drain(executor):
    """Returns when the thread has left."""
    for thread in threads(executor):
        thread.join()


def test_jobs_run_in_order_one_at_a_time(executor):
    inside, most, order = [], [], []

    def job(index):
        inside.append(index)
        most.append(len(inside))
        order.append(index)
        inside.remove(index)

    for future in [executor.submit(job, index) for index in range(200)]:
        future.result()
    assert order == list(range(200))
    assert max(most) == 1
    drain(executor)


def test_submitting_from_several_threads_loses_nothing(executor):
    done, start = [], threading.Barrier(8)

    def submit(base):
        start.wait()
        for index in range(100):
            executor.submit(done.append, (base, index))

    submitters = [threading.Thread(target=submit, args=(base,)) for base in range(8)]
    for thread in submitters:
        thread.start()
    for thread in submitters:
        thread.join()
    executor.submit(lambda: None).result()
    assert len(done) == 800
    for base in range(8):
        assert [index for owner, index in done if owner == base] == list(range(100))
    drain(executor)


def test_there_is_a_thread_only_while_there_is_work(executor):
    gate = threading.Event()
    assert threads(executor) == []
    executor.submit(gate.wait)
    (thread,) = threads(executor)
    assert thread.daemon
    gate.set()
    thread.join()
    assert threads(executor) == []
    assert executor.submit(lambda: "again").result() == "again"
    drain(executor)


def test_an_exception_reaches_its_future_and_the_next_job_runs(executor):
    gate = threading.Event()
    executor.submit(gate.wait)
    failed, after = executor.submit(lambda: 1 / 0), executor.submit(lambda: "fine")
    gate.set()
    assert isinstance(failed.exception(), ZeroDivisionError)
    assert after.result() == "fine"
    drain(executor)


def test_a_future_can_be_cancelled_until_its_job_starts(executor):
    gate, started, ran = threading.Event(), threading.Event(), []
    running = executor.submit(lambda: (started.set(), gate.wait()))
    waiting = executor.submit(ran.append, 1)
    started.wait()
    assert waiting.cancel()
    assert not running.cancel()
    gate.set()
    executor.submit(lambda: None).result()
    assert ran == []
    with pytest.raises(CancelledError):
        waiting.result()
    drain(executor)


def test_a_job_may_submit_another(executor):
    inner: list[Future[str]] = []
    executor.submit(lambda: inner.append(executor.submit(lambda: "inner"))).result()
    assert inner[0].result() == "inner"
    drain(executor)


def test_a_thread_that_cannot_start_fails_the_future_and_not_the_executor(executor, monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        again: list[Future[None]] = []
        future = executor.submit(print)
        # A callback that submits at once must find the lock free.
        future.add_done_callback(lambda _: again.append(executor.submit(print)))
        assert isinstance(future.exception(), RuntimeError)
        assert isinstance(again[0].exception(), RuntimeError)
    assert executor.submit(lambda: "later").result() == "later"
    drain(executor)


def test_a_result_is_not_kept_alive_by_the_executor(executor):
    class Thing:
        pass

    gate = threading.Event()
    future = executor.submit(Thing)
    seen = weakref.ref(future.result())
    executor.submit(gate.wait)
    del future
    gc.collect()
    assert seen() is None
    gate.set()
    drain(executor)


def test_after_a_shutdown_the_queued_jobs_run_and_new_ones_are_refused(executor):
    gate, ran = threading.Event(), []
    executor.submit(gate.wait)
    executor.submit(ran.append, 1)
    executor.shutdown(wait=False)
    with pytest.raises(RuntimeError, match="was shut down"):
        executor.submit(print)
    gate.set()
    executor.shutdown(wait=True)
    assert ran == [1]
    drain(executor)


def test_a_shutdown_can_cancel_what_waits(executor):
    gate = threading.Event()
    executor.submit(gate.wait)
    waiting = executor.submit(print)
    executor.shutdown(wait=False, cancel_futures=True)
    assert waiting.cancelled()
    gate.set()
    drain(executor)


def test_a_shutdown_of_an_idle_executor_returns_at_once(executor):
    executor.shutdown()
    assert threads(executor) == []


def test_an_event_loop_can_await_its_jobs(executor):
    async def main():
        return await asyncio.get_running_loop().run_in_executor(executor, threading.get_ident)

    assert asyncio.run(main()) != threading.get_ident()
    drain(executor)


def test_a_call_runs_behind_what_waits_and_gives_its_result(executor):
    order = []
    executor.submit(order.append, "before")
    assert (
        executor.call(lambda: (order.append("called"), threading.current_thread().name)[1]) == executor.name
    )
    assert order == ["before", "called"]
    drain(executor)


def test_an_exception_of_a_call_is_the_callers(executor):
    with pytest.raises(ZeroDivisionError):
        executor.call(lambda: 1 / 0)
    drain(executor)


def test_a_call_from_a_job_runs_at_once_in_place_of_waiting_for_itself(executor):
    executor.submit(lambda: executor.call(lambda: "inner")).result(timeout=30)
    drain(executor)


def test_a_call_without_a_thread_to_be_had_runs_on_the_callers(executor, monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert executor.call(threading.get_ident) == threading.get_ident()
    with pytest.raises(RuntimeError, match="the job's own"):
        executor.call(lambda: (_ for _ in ()).throw(RuntimeError("the job's own")))


@pytest.mark.parametrize("begun", [True, False])
def test_a_call_that_is_interrupted_returns_when_its_job_runs_no_longer(executor, monkeypatch, begun):
    gate, started, ran = threading.Event(), threading.Event(), []
    if not begun:
        executor.submit(gate.wait)
    real = Future.result

    def interrupted(future, timeout=None):
        if begun:
            started.wait(30)
            threading.Timer(0, gate.set).start()
        monkeypatch.setattr(Future, "result", real)
        raise KeyboardInterrupt

    monkeypatch.setattr(Future, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        executor.call(lambda: (started.set(), gate.wait(30), ran.append(True)))
    assert ran == ([True] if begun else [])
    gate.set()
    drain(executor)
    assert ran == ([True] if begun else [])


def test_a_copy_is_a_new_one_without_jobs(executor):
    gate = threading.Event()
    executor.submit(gate.wait)
    copy = pickle.loads(pickle.dumps(executor))
    assert copy.name == executor.name
    assert copy.submit(lambda: "at once").result(timeout=30) == "at once"
    gate.set()
    drain(executor)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_a_thread_of_its_own():
    """Its copy of the executor believes that the parent's thread is there."""
    code = (
        "import os, threading\n"
        "from asynccb.storage import SerialExecutor\n"
        "executor, started, gate = SerialExecutor('x'), threading.Event(), threading.Event()\n"
        "executor.submit(lambda: (started.set(), gate.wait()))\n"
        "started.wait()\n"
        "if child := os.fork():\n"
        "    gate.set()\n"
        "    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "ran = executor.submit(lambda: 5).result(timeout=20), executor.call(lambda: 6)\n"
        "os._exit(0 if ran == (5, 6) else 1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code], timeout=50, check=False
    )
    assert done.returncode == 0


@pytest.mark.parametrize(("kind", "ends"), [("SerialExecutor('x')", True), ("ThreadPoolExecutor(1)", False)])
def test_a_hanging_job_does_not_keep_the_process(kind, ends):
    """The standard executor, as negative control, is joined at exit and hangs."""
    code = (
        "import threading\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from asynccb.storage import SerialExecutor\n"
        "started = threading.Event()\n"
        f"executor = {kind}\n"
        "executor.submit(lambda: (started.set(), threading.Event().wait()))\n"
        "started.wait()\n"
        "print('main is done', flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"main is done\n"
        try:
            process.wait(30 if ends else 0.5)
            ended = True
        except subprocess.TimeoutExpired:
            process.kill()
            ended = False
    assert ended is ends


def test_h5py_has_one_thread():
    assert isinstance(hdf5_thread, SerialExecutor)
    names = {hdf5_thread.submit(lambda: threading.current_thread().name).result() for _ in range(3)}
    drain(hdf5_thread)
    assert names == {"asynccb hdf5"}


def priority():
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads have no priority of their own")
def test_what_nobody_waits_for_steps_back_and_so_do_the_threads_that_it_starts():
    def both():
        found = [priority()]
        thread = threading.Thread(target=lambda: found.append(priority()))
        thread.start()
        thread.join()
        return found

    own = priority()
    executor = SerialExecutor("background", background=True)
    for made in (executor, pickle.loads(pickle.dumps(executor))):
        assert made.submit(both).result() == [own + serial.NICE] * 2
        drain(made)
    plain = SerialExecutor("plain")
    assert plain.submit(both).result() == [own] * 2
    drain(plain)
    assert priority() == own


@pytest.mark.parametrize("platform", ["darwin", "win32", "refused"])
def test_where_priorities_cannot_be_had_the_job_runs_all_the_same(platform, monkeypatch):
    asked = []

    def refuse(*arguments):
        asked.append(arguments)
        raise PermissionError(1, "not allowed")

    if platform == "refused":
        monkeypatch.setattr(os, "setpriority", refuse)
    else:
        monkeypatch.setattr(sys, "platform", platform)
        monkeypatch.delattr(os, "setpriority")
    executor = SerialExecutor("background", background=True)
    assert executor.submit(lambda: 5).result() == 5
    drain(executor)
    assert len(asked) == (platform == "refused" and sys.platform == "linux")
