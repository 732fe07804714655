"""What each of thousands of queued trainings costs over its own compute, and what it weighs while it waits.

    python tests/benchmarks/queued.py [--rounds 3]

Trainings of a 64-64-10 net, given as factories: 1,000 of about 50 ms (900 batches) and 10,000 of about 1 ms
(10 batches and the building of the model). Limit: the bare loop of the same, one after the other, in the
same process with as many BLAS threads (one); of the long ones it does a half. "One at a time" has one slot
and one token, so that nothing hides behind a second core: what it takes longer than the bare loop is the cost
of a training. By default there are as many slots as cores; there the cost is told as processor time.

Linear: 1 ms trainings by the thousand, the time each of ten thousand over the time each of one thousand. A
record: bytes by ``tracemalloc`` of each of 2,000 trainings that wait behind one that does not end, with their
names and factories.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import tracemalloc
from typing import TYPE_CHECKING, Any

from harness import Contenders, Result, Scale, Took, alternate, main, minus, over

if TYPE_CHECKING:
    from collections.abc import Callable

KIND = "64-64-10"
LONG, SHORT = "50 ms", "1 ms"
BATCHES = {LONG: (100, 9), SHORT: (10, 1)}
"""Of an epoch, and epochs."""
COUNTS = (1_000, 3_000, 10_000)
RECORDS = 2_000
TARGETS = {LONG: 2.0, SHORT: 0.5}
BARE, ONE, DEFAULT = "bare loop", "one at a time", "slots by default"


def ours() -> Callable[[str, str, int], Took]:
    """Call it with a way, a length and a number of trainings; it answers what all of them took."""
    from trainings import KINDS, build, data

    from asynccb import Orchestrator, Trainer
    from asynccb.protocols import Batch

    x, y = data(KIND)
    rows = KINDS[KIND].batch

    def bare(length: str, count: int) -> None:
        batches, epochs = BATCHES[length]
        for _ in range(count):
            model = build(KIND)
            for _ in range(epochs):
                for at in range(0, batches * rows, rows):
                    model.train_batch(Batch(x[at : at + rows], y[at : at + rows], None, rows))

    async def orchestrated(slots: int | None, length: str, count: int) -> None:
        batches, epochs = BATCHES[length]
        some, targets = x[: batches * rows], y[: batches * rows]
        async with Orchestrator(slots, slots) as orch:
            runs = [
                orch.submit(
                    lambda: Trainer(build(KIND), seed=1),
                    some,
                    targets,
                    batch_size=rows,
                    epochs=epochs,
                    shuffle=False,
                )
                for _ in range(count)
            ]
        assert {run.outcome for run in runs} == {"completed"}
        assert {run.step for run in runs} == {batches * epochs}

    def run(way: str, length: str, count: int) -> Took:
        gc.collect()
        if way == BARE:
            return Took.by(lambda: bare(length, count))
        slots = 1 if way == ONE else None
        return Took.by(lambda: asyncio.run(orchestrated(slots, length, count)))

    return run


def records() -> Callable[[int], float]:
    """Call it with a number of trainings; it answers the bytes of each while it is queued."""
    from trainings import KINDS, build, data

    from asynccb import Orchestrator, Trainer

    x, y = data(KIND)

    class Holding:
        """A training that does not end before it is told to."""

        metrics_names = ("loss",)
        stop_training = False

        def __init__(self) -> None:
            self.begun, self.over = threading.Event(), threading.Event()

        def train_batch(self, batch: Any) -> dict[str, float]:
            self.begun.set()
            self.over.wait()
            return {"loss": 1.0}

    async def weigh(count: int) -> float:
        def submit(number: int) -> Any:
            return orch.submit(
                lambda: Trainer(build(KIND, number)),
                x,
                y,
                batch_size=KINDS[KIND].batch,
                epochs=20,
                name=f"trial-{number}",
            )

        async with Orchestrator(1, 1) as orch:
            holding = Holding()
            orch.submit(Trainer(holding), x, y, steps_per_epoch=1)
            await asyncio.to_thread(holding.begun.wait)
            runs = [submit(number) for number in range(-100, 0)]  # what is made once is made now
            before = _traced()
            runs += [submit(number) for number in range(count)]
            weight = (_traced() - before) / count
            for run in runs:
                run.cancel()
            holding.over.set()
        assert {run.outcome for run in runs} == {"cancelled"}
        return weight

    def run(count: int) -> float:
        tracemalloc.start()
        try:
            return asyncio.run(weigh(count))
        finally:
            tracemalloc.stop()

    return run


def _traced() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


# Tables -----------------------------------------------------------------------------------------------------


def measure(scale: Scale) -> Result:
    result = Result("queued trainings", notes=[f"{KIND}, batches of 128, built first; one BLAS thread"])
    rounds = min(scale.rounds, 3)
    counts = [20, 40, 80] if scale.quick else list(COUNTS)
    with Contenders() as there:
        there.add("trainings", ours)
        there.add("records", records)
        _measure_costs(result, there, LONG, [4 if scale.quick else COUNTS[0]], rounds)
        _measure_costs(result, there, SHORT, counts, rounds)
        some = 20 if scale.quick else RECORDS
        bytes_each = [there["records"](some) for _ in range(rounds)]
    result.claim("a queued training weighs", [weight / 1024 for weight in bytes_each], "KB", 4)
    return result


def _measure_costs(result: Result, there: Contenders, length: str, counts: list[int], rounds: int) -> None:
    most = counts[-1]
    of_bare = most // 2 if length == LONG else most
    asked = {(BARE, most): of_bare, (DEFAULT, most): most} | {(ONE, count): count for count in counts}
    rows = {
        (way, count): lambda way=way, really=really: there["trainings"](way, length, really)
        for (way, count), really in asked.items()
    }
    there["trainings"](ONE, length, counts[0] // 20 or 1)
    figures = alternate(rows, rounds, warm_up=False)
    told = {
        key: [Took(*(value / asked[key] * 1e3 for value in took)) for took in answers]
        for key, answers in figures.items()
    }
    wall = {key: [took.wall for took in answers] for key, answers in told.items()}
    cpu = {key: [took.cpu for took in answers] for key, answers in told.items()}
    for (way, count), values in wall.items():
        result.detail(f"{length}, {count}: {way}, each", values, "ms")
    bare, title = wall[BARE, most], f"{most} trainings of {length}"
    result.claim(f"{title}: cost each, one at a time", minus(wall[ONE, most], bare), "ms", TARGETS[length])
    busy = minus(cpu[DEFAULT, most], cpu[BARE, most])
    result.claim(f"{title}: processor time more each, by default", busy, "ms", TARGETS[length])
    result.claim(f"{title}: by default / bare loop", over(wall[DEFAULT, most], bare), "x")
    if len(counts) > 1:
        slower = over(wall[ONE, most], wall[ONE, counts[0]])
        result.claim(f"each of {most} of {length} / each of {counts[0]}", slower, "x", 1.1)
        slower = over(wall[ONE, counts[1]], wall[ONE, counts[0]])
        result.claim(f"each of {counts[1]} of {length} / each of {counts[0]}", slower, "x", 1.1)


if __name__ == "__main__":
    main(measure, __doc__)
