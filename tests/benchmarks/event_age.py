"""How old a batch event is when an async hook starts on it, with the event loop idle and with it busy.

    python tests/benchmarks/event_age.py [--rounds 5]

Age: from the moment at which the batch has ended on the training thread to the first line of the async
``on_train_batch_end``. Steps sleep 500 us. Idle: nothing else runs on the loop. Busy: a task of the service
computes in Python for 2 ms of every 4. Limit: a plain thread that calls ``call_soon_threadsafe`` for each
batch, on the same loops: the earliest that a thread can be heard on the loop, at the price of a wake-up each.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any

from harness import Contenders, Result, Scale, alternate, main

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

STEP = 500e-6
SLICE = 2e-3
BATCHES = 1_500


async def _beside(work: Awaitable[Any], *, busy: bool) -> None:
    """Awaits ``work`` while the loop is idle, or computes half of the time."""

    async def compute() -> None:
        while True:
            until = time.perf_counter() + SLICE
            while time.perf_counter() < until:
                pass
            await asyncio.sleep(SLICE)

    other = asyncio.create_task(compute()) if busy else None
    try:
        await work
    finally:
        if other is not None:
            other.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await other


def _percentiles(ended: list[float], heard: list[float]) -> dict[str, float]:
    ages = sorted(late - early for early, late in zip(ended, heard, strict=True))
    return {"p50": ages[len(ages) // 2] * 1e3, "p99": ages[int(len(ages) * 0.99)] * 1e3}


def ours() -> Callable[[int, bool], dict[str, float]]:
    import numpy as np

    from asynccb import Callback, Trainer

    class Stepping:
        metrics_names = ("loss",)
        stop_training = False

        def __init__(self) -> None:
            self.ended: list[float] = []

        def train_batch(self, batch: Any) -> dict[str, float]:
            time.sleep(STEP)
            self.ended.append(time.perf_counter())
            return {"loss": 1.0}

    class Listening(Callback):
        def __init__(self) -> None:
            self.heard: list[float] = []

        async def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.heard.append(time.perf_counter())

    def run(batches: int, busy: bool) -> dict[str, float]:
        model, listening = Stepping(), Listening()

        async def train() -> None:
            fit = Trainer(model, seed=1).fit(
                np.zeros((batches, 1)), batch_size=1, shuffle=False, verbose=0, callbacks=[listening]
            )
            await _beside(fit, busy=busy)

        asyncio.run(train())
        return _percentiles(model.ended, listening.heard)

    return run


def limit() -> Callable[[int, bool], dict[str, float]]:
    def run(batches: int, busy: bool) -> dict[str, float]:
        ended: list[float] = []
        heard: list[float] = []

        async def listen() -> None:
            loop, over = asyncio.get_running_loop(), asyncio.Event()

            def train() -> None:
                for _ in range(batches):
                    time.sleep(STEP)
                    ended.append(time.perf_counter())
                    loop.call_soon_threadsafe(lambda: heard.append(time.perf_counter()))
                loop.call_soon_threadsafe(over.set)

            thread = threading.Thread(target=train)
            thread.start()
            await _beside(over.wait(), busy=busy)
            thread.join()

        asyncio.run(listen())
        return _percentiles(ended, heard)

    return run


def measure(scale: Scale) -> Result:
    result = Result(
        "event age", notes=["ms from a batch's end to its async hook; steps of 500 us; one BLAS thread"]
    )
    batches = 200 if scale.quick else BATCHES
    with Contenders() as there:
        there.add("asynccb", ours)
        there.add("call_soon_threadsafe", limit)
        rows = {
            (name, state): lambda name=name, state=state: there[name](batches, state == "busy")
            for name in ("asynccb", "call_soon_threadsafe")
            for state in ("idle", "busy")
        }
        figures = alternate(rows, scale.rounds)
    for (name, state), rounds in figures.items():
        for part in ("p50", "p99"):
            say = result.claim if name == "asynccb" else result.detail
            say(f"loop {state}: {name}, {part}", [figure[part] for figure in rounds], "ms")
    return result


if __name__ == "__main__":
    main(measure, __doc__)
