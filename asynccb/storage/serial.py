"""An executor of one thread that is there only while there is work."""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from concurrent.futures import Executor, Future, wait
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
T = TypeVar("T")

NICE = 10
"""By how much the threads of a background executor step back: about a tenth of the share of others, where all
processors are busy."""


class SerialExecutor(Executor):
    """Runs jobs strictly in the order of their submission, one at a time, on one daemon thread.

    The thread starts with the first job and leaves when none is left, so an idle executor holds nothing.
    Unlike those of the standard library, its thread is never joined by the interpreter at exit: a job that
    hangs cannot keep a process alive. ``submit`` may be called from any thread, also from a job. A future can
    be cancelled until its job starts. A copy, also one made by pickling, is a new one of the same name,
    without jobs.

    Args:
        name: of the thread.
        background: whether its jobs step back where processors are short, for work that nobody waits for. On
            Linux, where a thread has a priority of its own, and so have the threads that it starts; elsewhere
            it has no effect.
    """

    def __init__(self, name: str, *, background: bool = False) -> None:
        self.name = name
        self._background = background
        self._closed = False
        self._begin()

    def _begin(self) -> None:
        self._jobs: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._lock = threading.Lock()
        self._running = False
        self._thread: int | None = None  # while it works
        self._process = os.getpid()

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), self.name, background=self._background), ()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queues ``fn(*args, **kwargs)``.

        Returns:
            Its future. If the thread could not be started, the future holds that error.

        Raises:
            RuntimeError: after :meth:`shutdown`.
        """
        future: Future[T] = Future()
        if self._process != os.getpid():
            # A fork has copied this object and not its thread, perhaps with the lock held: who waited here
            # would wait for ever.
            self._begin()
        with self._lock:
            if self._closed:
                raise RuntimeError(f"the executor {self.name!r} was shut down")
            self._jobs.append((future, lambda: fn(*args, **kwargs)))
            failed = None if self._running else self._start()
        if failed is not None:
            future.set_exception(failed)  # outside the lock: a callback of the future may submit again
        return future

    def call(self, job: Callable[[], T]) -> T:
        """Runs ``job`` on the thread, behind the jobs that wait there, and returns its result. Blocks.

        On the thread itself it runs at once; and where no thread can be started, on the caller's. However the
        waiting ends, the job runs no longer.
        """
        if threading.get_ident() == self._thread and self._process == os.getpid():
            return job()
        began = threading.Event()

        def run() -> T:
            began.set()
            return job()

        future = self.submit(run)
        try:
            return future.result()
        except BaseException:  # the job's own, an interrupt of the wait, or no thread to be had
            if not future.cancel():
                wait([future])
                if not began.is_set():
                    return job()
            raise

    def _start(self) -> RuntimeError | None:
        # Under the lock. Whoever finds no thread running starts one, and the thread decides under the same
        # lock that it leaves: so no job can be queued between its last look and its leaving.
        try:
            threading.Thread(target=self._work, name=self.name, daemon=True).start()
        except RuntimeError as error:  # the process has no thread left to give, or the interpreter is ending
            self._jobs.clear()
            return error
        self._running = True
        return None

    def _work(self) -> None:
        if self._background:
            _step_back()
        self._thread = threading.get_ident()
        while True:
            with self._lock:
                if not self._jobs:
                    self._running, self._thread = False, None
                    return
                future, job = self._jobs.popleft()
            _run(future, job)
            del future, job  # a result must not live until the next job comes

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Refuses new jobs. With ``wait``, returns when the queued ones are done."""
        with self._lock:
            self._closed = True
            waiting = [future for future, _ in self._jobs]
            last: Future[None] = Future()
            if self._running and wait:
                self._jobs.append((last, lambda: None))
            else:
                last.set_result(None)
        if cancel_futures:
            for future in waiting:
                future.cancel()
        last.result()


def _step_back() -> None:
    """Lowers the priority of this thread; it is ours and ends, so nobody puts it back.

    Not by more: a thread of a much lower priority that has the interpreter lock when it must leave its
    processor would keep the lock from everybody.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        try:
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICE)
        except OSError:  # not allowed here: then it is as quick as the others
            pass


def _run(future: Future[Any], job: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = job()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
