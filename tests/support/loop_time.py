"""How long our own work holds the event loop, step by step, in processor time of the loop's thread.

The collector of cyclic garbage is told apart: how long it takes is a matter of all that the process has
loaded, and in whose step it begins is chance.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import os
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import asynccb

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

PACKAGE = os.path.join(os.path.realpath(Path(asynccb.__file__).parent), "")


class Step(NamedTuple):
    """One turn of the loop for one task or callback.

    Attributes:
        seconds: processor time of the loop's thread, without the collector's.
        name: of the task and its coroutine, or of the callback.
        collecting: the collector's.
    """

    seconds: float
    name: str
    collecting: float = 0.0


class Steps:
    """What was measured; see :func:`measured_steps`."""

    def __init__(self) -> None:
        self.all: list[Step] = []
        self._collecting = 0.0
        self._thread = threading.get_ident()

    def longest(self, count: int = 1) -> list[Step]:
        """The longest ones, longest first."""
        return sorted(self.all, reverse=True)[:count]

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Adds a step: what the test itself does in the block, as calling ``submit``. It must not await."""
        collecting, began = self._collecting, time.thread_time()
        try:
            yield
        finally:
            spent, collecting = time.thread_time() - began, self._collecting - collecting
            self.all.append(Step(spent - collecting, name, collecting))

    def collector(self, phase: str, info: object) -> None:
        """For ``gc.callbacks``."""
        if threading.get_ident() == self._thread:
            self._collecting += time.thread_time() * (1 if phase == "stop" else -1)


@contextmanager
def measured_steps() -> Iterator[Steps]:
    """Measures each step of ours that the running loop takes meanwhile: tasks whose coroutine, and callbacks
    whose function, is written in asynccb. What a test's own coroutine calls is not among them: see
    :meth:`Steps.step`. The loop's debug mode rests: it reads source lines for each new handle."""
    steps, run = Steps(), asyncio.Handle._run  # type: ignore[attr-defined]
    loop = asyncio.get_running_loop()
    debug = loop.get_debug()

    def measured(handle: asyncio.Handle) -> None:
        name = _ours(handle._callback)  # type: ignore[attr-defined]  # the handle forgets it when it has run
        if name is None:
            run(handle)
        else:
            with steps.step(name):
                run(handle)

    asyncio.Handle._run = measured  # type: ignore[attr-defined]
    gc.callbacks.append(steps.collector)
    loop.set_debug(False)
    try:
        yield steps
    finally:
        loop.set_debug(debug)
        gc.callbacks.remove(steps.collector)
        asyncio.Handle._run = run  # type: ignore[attr-defined]


async def longest_step(scene: Callable[[Steps], Awaitable[object]], tries: int = 3) -> Step:
    """Plays ``scene`` several times and answers the longest step of the try in which it was shortest: what
    the machine does to a step now and then is not ours."""
    found = []
    for _ in range(tries):
        with measured_steps() as steps:
            await scene(steps)
        assert steps.all, "no step of ours was seen"
        found += steps.longest()
    return min(found)


def _ours(callback: Any) -> str | None:
    """The name of what a handle calls, if it is written in asynccb."""
    task = getattr(callback, "__self__", None)
    if isinstance(task, asyncio.Task):
        coroutine = task.get_coro()
        code = getattr(coroutine, "cr_code", None)
        name = f"{task.get_name()}: {getattr(coroutine, '__qualname__', coroutine)}"
    else:
        while isinstance(callback, functools.partial):
            callback = callback.func
        function = inspect.unwrap(getattr(callback, "__func__", callback))
        code, name = getattr(function, "__code__", None), getattr(function, "__qualname__", repr(function))
    return name if code is not None and os.path.realpath(code.co_filename).startswith(PACKAGE) else None
