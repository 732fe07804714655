"""Eight and thirty-two trainings at once: the orchestrator beside what people do today, and beside the limit.

    python tests/benchmarks/many.py [--rounds 3]

Three models on numpy: 64-64-10 (bound by the interpreter: many small kernels), 784-256-10 (in between) and a
layer of 1024 x 1024 with batches of 1,024 (bound by its kernels). Each contender does the same work, from
building the models to the last loss, and its losses are compared with the limit's.

    limit               as many processes as cores, one BLAS thread each: the bare loop of a training, and of
                        the next one as soon as it has ended
    orchestrator        ``Orchestrator().submit`` of factories
    one by one          ``await fit`` of one after the other, and the same with one BLAS thread
    gather of fits      ``asyncio.gather`` of ``fit``
    gather of to_thread ``asyncio.gather`` of ``asyncio.to_thread`` of the bare loop
    joblib threads      ``joblib.Parallel`` with threads, and its processes (loky), of the bare loop
    process pool        ``ProcessPoolExecutor().map`` of the bare loop
    Ray                 a task for each training

Nobody but the limit and "one thread" is told how many BLAS threads to use: the orchestrator sees to that
itself, loky and Ray do so too, the others have as many as there are cores. Pools have their processes started
and warmed up before the clock starts, for there are many trainings in a day and one start of a pool; ending
them is not counted either. The orchestrator is opened within its time, and closed within it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
import time
from multiprocessing import connection
from typing import TYPE_CHECKING, Any

from harness import Contenders, Result, Scale, alternate, cores, main, over

if TYPE_CHECKING:
    from collections.abc import Callable

EPOCHS = {"64-64-10": 160, "784-256-10": 96, "1024x1024": 32}
"""Of all trainings together: about 1 s on one core that has nothing else to do."""
COUNTS = (8, 32)
MOST_ROUNDS = 3
"""Some peers take twenty times as long as the limit."""
IN_ONE_PROCESS = ("gather of to_thread", "joblib threads")

Answer = tuple[float, list[float]]
"""Seconds, and of each training the mean loss of its last epoch."""


def timed(train: Callable[[], Any]) -> Answer:
    began = time.perf_counter()
    losses = train()
    return time.perf_counter() - began, [float(loss) for loss in losses]


# Contenders: each answers a function of (kind, number of trainings, epochs of each) -------------------------


def limit() -> Callable[[str, int], float | None]:
    """One process of the limit: a training, and where there are no epochs what a process pays once."""
    from trainings import by_hand, ready

    def run(kind: str, epochs: int) -> float | None:
        return by_hand(kind, epochs) if epochs else ready(kind)

    return run


def orchestrator() -> Callable[[str, int, int], Answer]:
    from trainings import KINDS, build, data, ready

    from asynccb import Orchestrator, Trainer

    async def train(kind: str, count: int, epochs: int) -> list[float]:
        x, y = data(kind)
        async with Orchestrator() as orch:
            runs = [
                orch.submit(
                    lambda: Trainer(build(kind), seed=1),
                    x,
                    y,
                    batch_size=KINDS[kind].batch,
                    epochs=epochs,
                    shuffle=False,
                )
                for _ in range(count)
            ]
        return [run.logs["loss"] for run in runs]

    def run(kind: str, count: int, epochs: int) -> Answer:
        ready(kind)
        return timed(lambda: asyncio.run(train(kind, count, epochs)))

    return run


def fits(*, together: bool) -> Callable[[str, int, int], Answer]:
    from trainings import KINDS, build, data, ready

    from asynccb import Trainer

    async def train(kind: str, epochs: int) -> float:
        x, y = data(kind)
        trainer = Trainer(build(kind), seed=1)
        await trainer.fit(x, y, batch_size=KINDS[kind].batch, epochs=epochs, shuffle=False, verbose=0)
        assert trainer.last_run is not None
        return float(trainer.last_run.logs["loss"])

    async def all_of(kind: str, count: int, epochs: int) -> list[float]:
        if together:
            return await asyncio.gather(*(train(kind, epochs) for _ in range(count)))
        return [await train(kind, epochs) for _ in range(count)]

    def run(kind: str, count: int, epochs: int) -> Answer:
        ready(kind)
        return timed(lambda: asyncio.run(all_of(kind, count, epochs)))

    return run


def one_by_one() -> Callable[[str, int, int], Answer]:
    return fits(together=False)


def gather_of_fits() -> Callable[[str, int, int], Answer]:
    return fits(together=True)


def gather_of_to_thread() -> Callable[[str, int, int], Answer]:
    from trainings import by_hand, ready

    async def train(kind: str, count: int, epochs: int) -> list[float]:
        return await asyncio.gather(*(asyncio.to_thread(by_hand, kind, epochs) for _ in range(count)))

    def run(kind: str, count: int, epochs: int) -> Answer:
        ready(kind)
        return timed(lambda: asyncio.run(train(kind, count, epochs)))

    return run


def joblib_threads() -> Callable[[str, int, int], Answer]:
    from joblib import Parallel, delayed
    from trainings import by_hand, ready

    def run(kind: str, count: int, epochs: int) -> Answer:
        ready(kind)
        train = delayed(by_hand)
        return timed(lambda: Parallel(n_jobs=-1, prefer="threads")(train(kind, epochs) for _ in range(count)))

    return run


def joblib_loky() -> Callable[[str, int, int], Answer]:
    from joblib import Parallel, delayed
    from joblib.externals.loky import get_reusable_executor
    from trainings import by_hand, ready

    def run(kind: str, count: int, epochs: int) -> Answer:
        try:
            Parallel(n_jobs=-1)(delayed(ready)(kind) for _ in range(cores()))
            return timed(lambda: Parallel(n_jobs=-1)(delayed(by_hand)(kind, epochs) for _ in range(count)))
        finally:
            get_reusable_executor().shutdown(wait=True, kill_workers=True)

    return run


def process_pool() -> Callable[[str, int, int], Answer]:
    from trainings import by_hand, ready

    def run(kind: str, count: int, epochs: int) -> Answer:
        with concurrent.futures.ProcessPoolExecutor() as pool:
            list(pool.map(ready, [kind] * cores()))
            return timed(lambda: list(pool.map(by_hand, [kind] * count, [epochs] * count)))

    return run


def ray() -> Callable[[str, int, int], Answer]:
    import os

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from trainings import by_hand, ready

    def run(kind: str, count: int, epochs: int) -> Answer:
        ray.init(num_cpus=cores(), include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
        try:
            warm, train = ray.remote(ready), ray.remote(by_hand)
            ray.get([warm.remote(kind) for _ in range(cores())])
            return timed(lambda: ray.get([train.remote(kind, epochs) for _ in range(count)]))
        finally:
            ray.shutdown()

    return run


OURS = {"orchestrator": orchestrator, "one by one": one_by_one, "gather of fits": gather_of_fits}
PEERS = {
    "gather of to_thread": gather_of_to_thread,
    "joblib threads": joblib_threads,
    "joblib loky": joblib_loky,
    "process pool": process_pool,
    "Ray": ray,
}
ONE_THREAD = "one by one, one thread"
LIMIT = "limit"


# Tables -----------------------------------------------------------------------------------------------------


def measure(scale: Scale) -> Result:
    result = Result(
        "many at once",
        notes=[f"seconds for the same work, so that less is better; {cores()} cores; pools warmed up before"],
    )
    processes = [f"{LIMIT} {number}" for number in range(cores())]
    with Contenders() as there:
        for name in processes:
            there.add(name, limit)
        for name, setup in OURS.items():
            there.add(name, setup, threads=None)
        there.add(ONE_THREAD, one_by_one)
        for name, setup in PEERS.items() if scale.peers else ():
            there.add(name, setup, threads=None, children=True)
        result.left_out = there.missing
        for kind, epochs in EPOCHS.items():
            for count in (2,) if scale.quick else COUNTS:
                each = 1 if scale.quick else epochs // count
                _measure(result, scale, there, processes, kind, count, each)
    return result


def _measure(
    result: Result,
    scale: Scale,
    there: Contenders,
    processes: list[str],
    kind: str,
    count: int,
    epochs: int,
) -> None:
    for name in processes:
        there[name](kind, 0)
    rows: dict[str, Callable[[], Answer]] = {LIMIT: lambda: at_once(there, processes, kind, count, epochs)}
    rows |= {
        name: lambda name=name: there[name](kind, count, epochs) for name in there if name not in processes
    }
    figures = alternate(rows, min(scale.rounds, MOST_ROUNDS), warm_up=not scale.quick)
    _check(figures)
    title = f"{count} x {kind}"
    seconds = {name: [took for took, _ in answers] for name, answers in figures.items()}
    for name, values in seconds.items():
        result.detail(f"{title}: {name}", values, "s")
    _say(result, title, kind, seconds)


def at_once(there: Contenders, processes: list[str], kind: str, count: int, epochs: int) -> Answer:
    """The limit: each process has a training, and the next one as soon as it has ended."""
    free, busy, losses = {there[name].pipe: there[name] for name in processes}, {}, []
    began = time.perf_counter()
    while len(losses) < count:
        while free and len(losses) + len(busy) < count:
            pipe, process = free.popitem()
            process.ask(kind, epochs)
            busy[pipe] = process
        for pipe in connection.wait(list(busy)):
            free[pipe] = busy.pop(pipe)
            losses.append(free[pipe].answer())
    return time.perf_counter() - began, losses


def _check(figures: dict[str, list[Answer]]) -> None:
    """All have done the same work."""
    wanted = figures[LIMIT][0][1]
    for name, answers in figures.items():
        for _, losses in answers:
            same = len(losses) == len(wanted) and all(
                math.isclose(loss, other, rel_tol=1e-3) for loss, other in zip(losses, wanted, strict=True)
            )
            if not same:
                raise RuntimeError(f"{name} did other work: {losses}, not {wanted}")


def _say(result: Result, title: str, kind: str, seconds: dict[str, list[float]]) -> None:
    """Ratios of times, so that 0.85 of a rate is 1 / 0.85 of a time."""
    small = kind == "64-64-10"
    alone = [min(pair) for pair in zip(seconds["one by one"], seconds[ONE_THREAD], strict=True)]
    gathered = over(seconds["gather of fits"], seconds["one by one"])
    if "orchestrator" in seconds:
        ours = seconds["orchestrator"]
        at_most = None if small else 1 / 0.85
        result.claim(f"{title}: orchestrator / limit", over(ours, seconds[LIMIT]), "x", at_most)
        at_most = 1 / 0.95 if small else None
        result.claim(f"{title}: orchestrator / quicker one by one", over(ours, alone), "x", at_most)
        for name in PEERS:
            if name in seconds:
                at_most = 1.0 if name in IN_ONE_PROCESS else None
                result.claim(f"{title}: orchestrator / {name}", over(ours, seconds[name]), "x", at_most)
    result.claim(f"{title}: gather of fits / one by one", gathered, "x", 1 / 0.95)
    for name in PEERS:
        if name in seconds:
            result.detail(f"{title}: {name} / limit", over(seconds[name], seconds[LIMIT]), "x")


if __name__ == "__main__":
    main(measure, __doc__)
