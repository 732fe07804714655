"""An engine whose threads serve one run after the other."""

from __future__ import annotations

import contextvars
import os
import threading
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ThreadPoolEngine"]

LINGER = 0.5
"""Seconds for which an idle thread waits for the next run."""
IDLE_NAME = "asynccb idle"


class _Job(NamedTuple):
    """What a thread is to run, in which context, and how it is called meanwhile."""

    target: Callable[[], None]
    name: str
    context: contextvars.Context


class ThreadPoolEngine:
    """As :class:`~asynccb.engines.ThreadEngine`, with threads that are used again, for many short trainings:
    to start a thread costs as much as several small batches.

    A run never waits for a thread: where none is idle, a new one is started. A thread takes no name, context
    or reference from one run to the next. What it does take along is the state that frameworks keep for each
    thread, where a model sets it and does not put it back (torch's default device, a ``threading.local``).

    Its threads are daemons, and leave after half a second without a run. The methods may be called from any
    thread.

    Args:
        idle: threads that may wait for a run.
    """

    def __init__(self, idle: int) -> None:
        self._bound = idle
        self._lock = threading.Lock()
        self._closed = False
        self._begin()

    def _begin(self) -> None:
        self._idle: list[_Worker] = []
        self._process = os.getpid()

    def start(self, target: Callable[[], None], name: str) -> None:
        """Starts ``target`` and returns at once.

        Raises:
            RuntimeError: the system has no thread left, or the engine was closed.
        """
        job = _Job(target, name, contextvars.copy_context())
        if self._process != os.getpid():
            # A fork has copied the list and none of the threads in it, perhaps with the lock held.
            self._lock = threading.Lock()
            self._begin()
        with self._lock:
            if self._closed:
                raise RuntimeError(f"{name}: the engine was closed")
            # The one that was used last: the others may find the time to leave.
            worker = self._idle.pop() if self._idle else None
        if worker is None:
            worker = _Worker(self)
            worker.give(job)
            worker.thread.start()
        else:
            worker.give(job)

    def close(self) -> None:
        """No run is started any more. Idle threads leave now, others when their run returns."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.give(None)

    def _park(self, worker: _Worker) -> bool:
        """The worker has nothing to do: True if it may wait for a run."""
        with self._lock:
            stays = not self._closed and len(self._idle) < self._bound
            if stays:
                self._idle.append(worker)
            return stays

    def _unpark(self, worker: _Worker) -> bool:
        """The worker has waited long enough: True if it may leave, False if a run was just given to it."""
        with self._lock:
            if worker not in self._idle:
                return False
            self._idle.remove(worker)
            return True


class _Worker:
    """One thread of an engine, and the hand-over to it."""

    def __init__(self, engine: ThreadPoolEngine) -> None:
        self.thread = threading.Thread(target=self._work, name=IDLE_NAME, daemon=True)
        self._engine = engine
        self._job: _Job | None = None
        self._bell = threading.Lock()
        self._bell.acquire()

    def give(self, job: _Job | None) -> None:
        """Hands over what to do next; None: leave. Once for each time that the worker parked, and once
        before."""
        self._job = job
        self._bell.release()

    def _work(self) -> None:
        self._bell.acquire()
        while self._run():
            if not self._engine._park(self):
                return
            if not self._bell.acquire(timeout=LINGER):
                if self._engine._unpark(self):
                    return
                self._bell.acquire()

    def _run(self) -> bool:
        """Runs the job, and lets go of all that belongs to it; False where there is none. What the job raises
        ends this thread, as it does everywhere else."""
        job, self._job = self._job, None
        if job is None:
            return False
        self.thread.name = job.name
        job.context.run(job.target)
        self.thread.name = IDLE_NAME
        return True
