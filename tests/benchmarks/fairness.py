"""Whether trainings that run at once get their shares of the processors, whatever their steps take.

    python tests/benchmarks/fairness.py [--rounds 5]

Sixteen trainings whose steps take 0.5 to 20 ms (each the next one's 1 / 1.28), and twelve of priorities 0, 1
and 2, whose shares are promised as 1:2:4. A step is a hash, which lets the interpreter go as a kernel does;
in the mixed row every other training computes in Python alone. What a training got is told twice: processor
time of its thread inside its steps, which the model itself takes, and ``run.stats.computed``, which the
orchestrator keeps. Both over the same seconds, after a first one that does not count.

Jain's index of the shares is 1 where all are equal and 1/16 where one has everything; said is what it lacks
of 1. Beside: the same trainings in plain threads, which leave it to the operating system, and taking turns
batch by batch, which is what a queue or a semaphore around the batch does: there who has long steps has the
processor.
"""

from __future__ import annotations

import asyncio
import hashlib
import queue
import threading
import time
from typing import TYPE_CHECKING, Any

from harness import Contenders, Result, Scale, alternate, cores, main

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SHORTEST, LONGEST = 0.5e-3, 20e-3
SETTLES = 1.0
SECONDS = 4.0
PRIORITIES = (0, 1, 2)
UNEQUAL = [SHORTEST * (LONGEST / SHORTEST) ** (number / 15) for number in range(16)]
OF_PRIORITY = (0.5e-3, 2e-3, 5e-3, 20e-3)
"""Steps of the trainings of each priority."""
THREADS, TURNS = "plain threads", "turns, a batch each"

Shares = dict[str, list[float]]
"""Seconds of each training, by who has taken them: ``"model"``, and ``"run.stats"``."""


def jain(shares: Sequence[float]) -> float:
    """Jain's index of fairness: 1 where all shares are equal, 1 / n where one has everything."""
    return sum(shares) ** 2 / (len(shares) * sum(share * share for share in shares))


def furthest(shares: Sequence[float], weights: Sequence[float]) -> float:
    """How far the share that is furthest from its part by weight is from it, in per cent of that part."""
    total, whole = sum(shares), sum(weights)
    return max(
        abs(share / total * whole / weight - 1) * 100 for share, weight in zip(shares, weights, strict=True)
    )


class Stepping:
    """A model whose steps take a given time of a processor, and that knows how much it got."""

    metrics_names = ("loss",)
    stop_training = False

    def __init__(self, step: Callable[[], Any]) -> None:
        self.computed = 0.0
        self._step = step

    def train_batch(self, batch: Any) -> dict[str, float]:
        began = time.thread_time()
        self._step()
        self.computed += time.thread_time() - began
        return {"loss": 1.0}


def steps_of(seconds: Sequence[float], *, mixed: bool) -> list[Callable[[], Any]]:
    """A function for each, that takes so long when nothing is beside it."""
    block, numbers = bytes(2_000_000), range(200_000)
    hashing = min(_took(lambda: hashlib.sha256(block)) for _ in range(5)) / len(block)
    adding = min(_took(lambda: _add(numbers)) for _ in range(5)) / len(numbers)

    def hash_for(wanted: float) -> Callable[[], Any]:
        some = bytes(round(wanted / hashing))
        return lambda: hashlib.sha256(some)

    def add_for(wanted: float) -> Callable[[], Any]:
        some = range(round(wanted / adding))
        return lambda: _add(some)

    return [(add_for if mixed and number % 2 else hash_for)(wanted) for number, wanted in enumerate(seconds)]


def _add(numbers: range) -> int:
    total = 0
    for number in numbers:
        total += number * number
    return total


def _took(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# Contenders: each answers a function of (seconds of each step, priorities, whether mixed, how long) ---------


def ours() -> Callable[..., Shares]:
    import numpy as np

    from asynccb import Orchestrator, Trainer

    async def train(models: list[Stepping], priorities: list[int], settles: float, lasts: float) -> Shares:
        x = np.zeros((1_000, 1))
        async with Orchestrator(slots=len(models)) as orch:
            runs = [
                orch.submit(Trainer(model), x, batch_size=1, epochs=1_000_000, priority=priority)
                for model, priority in zip(models, priorities, strict=True)
            ]

            def told() -> Shares:
                return {
                    "model": [model.computed for model in models],
                    "run.stats": [run.stats.computed for run in runs],
                }

            await asyncio.sleep(settles)
            before = told()
            await asyncio.sleep(lasts)
            after = told()
            for run in runs:
                run.stop()
        return {who: _less(after[who], before[who]) for who in after}

    def run(seconds: list[float], priorities: list[int], mixed: bool, settles: float, lasts: float) -> Shares:
        models = [Stepping(step) for step in steps_of(seconds, mixed=mixed)]
        return asyncio.run(train(models, priorities, settles, lasts))

    return run


def by_threads(*, turns: bool) -> Callable[..., Shares]:
    """Plain threads: one for each training, or one for each core, that take the trainings in turns."""

    def run(seconds: list[float], priorities: list[int], mixed: bool, settles: float, lasts: float) -> Shares:
        models = [Stepping(step) for step in steps_of(seconds, mixed=mixed)]
        over, waiting = threading.Event(), queue.SimpleQueue[Stepping]()
        for model in models:
            waiting.put(model)

        def train() -> None:
            model = waiting.get()
            while not over.is_set():
                model.train_batch(None)
                if turns:
                    waiting.put(model)
                    model = waiting.get()

        threads = [threading.Thread(target=train) for _ in range(cores() if turns else len(models))]
        for thread in threads:
            thread.start()
        time.sleep(settles)
        before = [model.computed for model in models]
        time.sleep(lasts)
        after = [model.computed for model in models]
        over.set()
        for thread in threads:
            thread.join()
        return {"model": _less(after, before)}

    return run


def plain_threads() -> Callable[..., Shares]:
    return by_threads(turns=False)


def taking_turns() -> Callable[..., Shares]:
    return by_threads(turns=True)


def _less(after: list[float], before: list[float]) -> list[float]:
    return [late - early for late, early in zip(after, before, strict=True)]


# Tables -----------------------------------------------------------------------------------------------------


def measure(scale: Scale) -> Result:
    result = Result("fair shares", notes=[f"{cores()} cores; seconds that each training got"])
    lengths = (0.2, 0.5) if scale.quick else (SETTLES, SECONDS)
    alike = [0] * len(UNEQUAL)
    by_priority = [priority for priority in PRIORITIES for _ in OF_PRIORITY]
    asked: dict[str, tuple[Any, ...]] = {
        "16 of unequal steps": (UNEQUAL, alike, False, *lengths),
        "16 of unequal steps, mixed": (UNEQUAL, alike, True, *lengths),
        "priorities 0, 1, 2": (list(OF_PRIORITY) * len(PRIORITIES), by_priority, False, *lengths),
    }
    with Contenders() as there:
        there.add("orchestrator", ours)
        for name, setup in ((THREADS, plain_threads), (TURNS, taking_turns)) if scale.peers else ():
            there.add(name, setup)
        result.left_out = there.missing
        rows = {
            (name, title): lambda name=name, given=given: there[name](*given)
            for title, given in asked.items()
            for name in there
            if name == "orchestrator" or not title.startswith("priorities")
        }
        figures = alternate(rows, scale.rounds, warm_up=False)
    for (name, title), rounds in figures.items():
        for who in rounds[0]:
            _say(result, name, title, who, [shares[who] for shares in rounds], lengths[1])
    return result


def _say(result: Result, name: str, title: str, who: str, rounds: list[list[float]], lasted: float) -> None:
    ours = name == "orchestrator"
    said = f"{title}: {name}, by the {who}"
    whole = [sum(shares) / lasted for shares in rounds]
    result.detail(f"{said}: processors used", whole, "")
    if not title.startswith("priorities"):
        lacking = [1 - jain(shares) for shares in rounds]
        result.claim(f"{said}: 1 - Jain's index", lacking, "", 0.05 if ours else None)
        ends = [max(shares) / max(min(shares), 1e-9) for shares in rounds]
        result.detail(f"{said}: most / least", ends, "x")
        return
    groups = [
        [
            sum(shares[at : at + len(OF_PRIORITY)])
            for at in range(0, len(PRIORITIES) * len(OF_PRIORITY), len(OF_PRIORITY))
        ]
        for shares in rounds
    ]
    weights = [2.0**priority for priority in PRIORITIES]
    for number, priority in enumerate(PRIORITIES[1:], 1):
        shares = [group[number] / group[0] for group in groups]
        result.detail(f"{said}: share of {priority} / share of 0", shares, "x")
    result.claim(f"{said}: furthest off", [furthest(group, weights) for group in groups], "%", 10)


if __name__ == "__main__":
    main(measure, __doc__)
