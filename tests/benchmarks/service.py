"""How quickly a service answers while trainings run in its process, and what they pay for it.

    python tests/benchmarks/service.py [--rounds 5]

An aiohttp handler that answers 1 KB, in the process of 0, 1, 2 and 4 trainings that never end; a client in a
process of its own that sends at a steady rate whether it has been answered or not (an open loop), and counts
from the moment at which each request was due, so that a stall is in every request that fell into it. 200
requests a second; 20 beside pure Python, because more than that cannot be answered at all beside plain
threads. The orchestrator sets one BLAS thread by itself; plain threads have as many as there are cores.

    orchestrator   ``Orchestrator().submit``
    to_thread      ``asyncio.to_thread`` of the bare loop, one for each training
    processes      the bare loops in processes of their own: the limit

Kinds: big kernels (a layer of 1024 x 1024, batches of 1,024), small arrays (64-64-10) and pure Python (about
2 ms a batch, and the interpreter is never let go). What the trainings pay is their batches a second against
the same without a single request, told of two trainings. A round is two seconds, and its p99 that of its own
requests (beside pure Python the slowest of forty); the p99.9 is that of all rounds together.
"""

from __future__ import annotations

import asyncio
import socket
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from harness import Contenders, Result, Scale, alternate, main, over

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

BODY = b"x" * 1_024
SETTLES, SECONDS = 0.6, 2.0
SLICES = 2
"""As many times more rounds, which are short: what else the machine does meanwhile falls on all alike."""
KINDS = {
    "big kernels": ("1024x1024", 200),
    "small arrays": ("64-64-10", 200),
    "pure Python": ("pure Python", 20),
}
"""The training, and requests a second."""
COUNTS = (1, 2, 4)
PAYING = 2
"""Trainings of which it is told what they pay."""
OURS, THREADS, PROCESSES = "orchestrator", "to_thread", "processes"
PERCENTILES = {"p50": 0.5, "p99": 0.99}


class Cell(NamedTuple):
    """What is measured at once.

    Attributes:
        kind: of the trainings.
        count: how many.
        way: how they run.
        rate: requests a second; 0: none.
    """

    kind: str
    count: int
    way: str
    rate: int


class Told(NamedTuple):
    """Latencies in milliseconds, sorted; batches a second of all trainings together."""

    latencies: list[float]
    batches: float


def percentile(ordered: Sequence[float], part: float) -> float:
    """The smallest value that at least ``part`` of all do not exceed."""
    return ordered[min(len(ordered) - 1, max(0, -int(-part * len(ordered) // 1) - 1))]


# The service, with trainings in its process -----------------------------------------------------------------


def service(way: str) -> Callable[..., Any]:
    """Call it without arguments for its port; with a kind and a number of trainings it serves until the
    client says it is over, and answers the batches a second between the client's two words."""
    import trainings  # noqa: F401  # imported before anything is measured
    from aiohttp import web

    if way == OURS:
        from asynccb import Orchestrator  # noqa: F401  # the same

    listening = socket.create_server(("127.0.0.1", 0))

    async def serve(kind: str, count: int) -> float:
        steps, over = _Steps(), asyncio.Event()

        async def answer(request: web.Request) -> web.Response:
            return web.Response(body=BODY)

        async def begin(request: web.Request) -> web.Response:
            steps.begin()
            return web.Response()

        async def end(request: web.Request) -> web.Response:
            steps.end()
            over.set()
            return web.Response()

        app = web.Application()
        app.add_routes([web.get("/", answer), web.get("/begin", begin), web.get("/end", end)])
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        # A copy of it: a site closes the socket that it is given.
        await web.SockSite(runner, listening.dup()).start()
        await TRAININGS[way](kind, count, steps, over)
        await runner.cleanup()
        return steps.rate

    def run(*asked: Any) -> Any:
        return asyncio.run(serve(*asked)) if asked else listening.getsockname()[1]

    return run


class _Steps:
    """Batches trained, between the client's two words."""

    def __init__(self) -> None:
        self.count: Callable[[], int] = lambda: 0
        self.rate = 0.0
        self._began = (0, 0.0)

    def begin(self) -> None:
        self._began = self.count(), time.perf_counter()

    def end(self) -> None:
        count, began = self._began
        self.rate = (self.count() - count) / (time.perf_counter() - began)


async def _orchestrated(kind: str, count: int, steps: _Steps, over: asyncio.Event) -> None:
    from trainings import KINDS, build, data

    from asynccb import Orchestrator, Trainer

    x, y = data(kind)
    async with Orchestrator() as orch:
        runs = [
            orch.submit(Trainer(build(kind)), x, y, batch_size=KINDS[kind].batch, epochs=1_000_000)
            for _ in range(count)
        ]
        steps.count = lambda: sum(run.step for run in runs)
        await over.wait()
        for run in runs:
            run.stop()


async def _in_threads(kind: str, count: int, steps: _Steps, over: asyncio.Event) -> None:
    from trainings import by_hand_until

    stopped, trained = False, [0] * count

    def train(number: int) -> None:
        def count_one() -> None:
            trained[number] += 1

        by_hand_until(kind, lambda: stopped, count_one)

    steps.count = lambda: sum(trained)
    threads = [asyncio.create_task(asyncio.to_thread(train, number)) for number in range(count)]
    await over.wait()
    stopped = True
    await asyncio.gather(*threads)


async def _elsewhere(kind: str, count: int, steps: _Steps, over: asyncio.Event) -> None:
    await over.wait()


TRAININGS = {OURS: _orchestrated, THREADS: _in_threads, PROCESSES: _elsewhere}


def worker() -> Callable[[str, float, float], float]:
    """A training in a process of its own, for so many seconds; answers its batches a second after the
    first of them."""
    from trainings import by_hand_until

    def run(kind: str, settles: float, lasts: float) -> float:
        ended: list[float] = []
        over_at = time.perf_counter() + settles + lasts
        by_hand_until(kind, lambda: time.perf_counter() >= over_at, lambda: ended.append(time.perf_counter()))
        return sum(at >= over_at - lasts for at in ended) / lasts

    return run


# The client -------------------------------------------------------------------------------------------------


def client() -> Callable[[int, int, float, float], list[float]]:
    """Call it with a port, a rate, how long the trainings get to settle and how long to send; answers
    milliseconds."""
    import aiohttp

    async def send(port: int, rate: int, settles: float, lasts: float) -> list[float]:
        loop, url = asyncio.get_running_loop(), f"http://127.0.0.1:{port}/"
        unlimited = aiohttp.TCPConnector(limit=0)
        waits = aiohttp.ClientTimeout(total=120)
        async with aiohttp.ClientSession(connector=unlimited, timeout=waits) as session:

            async def ask(path: str = "", due: float = 0.0) -> float:
                async with session.get(url + path) as response:
                    assert response.status == 200
                    await response.read()
                return (loop.time() - due) * 1e3

            await ask()
            await asyncio.sleep(settles)
            await ask("begin")
            began, asked = loop.time(), []
            for number in range(round(rate * lasts)):
                due = began + number / rate
                await asyncio.sleep(max(0.0, due - loop.time()))
                asked.append(asyncio.create_task(ask(due=due)))
            await asyncio.sleep(began + lasts - loop.time() if not rate else 0)
            latencies = await asyncio.gather(*asked)
            await ask("end")
            return sorted(latencies)

    return lambda *asked: asyncio.run(send(*asked))


# Tables -----------------------------------------------------------------------------------------------------


def cells(scale: Scale, ways: Sequence[str]) -> Iterator[Cell]:
    counts = COUNTS[:1] if scale.quick else COUNTS
    for rate in sorted({rate for _, rate in KINDS.values()}):
        yield Cell("", 0, PROCESSES, rate)
    for kind, (_, rate) in KINDS.items():
        for count in counts:
            for way in ways:
                yield Cell(kind, count, way, rate)
                if scale.full or (count == PAYING and not scale.quick):
                    yield Cell(kind, count, way, 0)


def measure(scale: Scale) -> Result:
    result = Result("service beside trainings", notes=["1 KB by aiohttp; ms from when each was due"])
    lengths = (0.2, 0.5) if scale.quick else (SETTLES, SECONDS)
    with Contenders() as there:
        there.add("client", client)
        there.add(OURS, service, OURS, threads=None)
        if scale.peers:
            there.add(THREADS, service, THREADS, threads=None)
        there.add(PROCESSES, service, PROCESSES)
        workers = [f"worker {number}" for number in range(max(COUNTS))]
        for name in workers:
            there.add(name, worker)
        result.left_out = there.missing
        ways = [way for way in (OURS, THREADS, PROCESSES) if way in there]
        rounds = 1 if scale.quick else scale.rounds * SLICES
        beside: dict[tuple[str, int], list[Cell]] = {}
        for cell in cells(scale, ways):
            beside.setdefault((cell.kind, cell.count), []).append(cell)
        figures: dict[Cell, list[Told]] = {}
        for some in beside.values():
            rows = {
                cell: lambda cell=cell: one(there, workers[: cell.count], cell, *lengths) for cell in some
            }
            figures |= alternate(rows, rounds, warm_up=False)
    _say(result, figures)
    return result


def one(there: Contenders, workers: list[str], cell: Cell, settles: float, lasts: float) -> Told:
    kind = KINDS[cell.kind][0] if cell.kind else ""
    training = workers if cell.way == PROCESSES else []
    port = there[cell.way]()
    for name in training:
        there[name].ask(kind, settles, lasts + 0.3)
    there[cell.way].ask(kind, cell.count)
    latencies = there["client"](port, cell.rate, settles, lasts)
    batches = there[cell.way].answer() + sum(there[name].answer() for name in training)
    return Told(latencies, batches)


def _say(result: Result, figures: dict[Cell, list[Told]]) -> None:
    p99: dict[Cell, list[float]] = {}
    for cell, rounds in figures.items():
        title = f"{cell.kind} x {cell.count}, {cell.way}" if cell.kind else f"alone, {cell.rate} a second"
        if cell.rate:
            told = {
                name: [percentile(one.latencies, part) for one in rounds]
                for name, part in PERCENTILES.items()
            }
            p99[cell] = told["p99"]
            for name, values in told.items():
                result.detail(f"{title}: {name}", values, "ms")
            pooled = sorted(latency for one in rounds for latency in one.latencies)
            result.detail(f"{title}: p99.9 of all rounds", [percentile(pooled, 0.999)], "ms")
        if cell.kind:
            asked = "" if cell.rate else ", no request"
            result.detail(f"{title}{asked}: batches", [one.batches for one in rounds], "/s")
    for cell, values in p99.items():
        if not cell.kind or cell.way != OURS:
            continue
        title = f"{cell.kind} x {cell.count}: p99, orchestrator"
        target = 1.3 if cell.kind == "big kernels" else None
        result.claim(f"{title} / processes", over(values, p99[cell._replace(way=PROCESSES)]), "x", target)
        target = 0.5 if cell.kind == "pure Python" else None
        if (threads := cell._replace(way=THREADS)) in p99:
            result.claim(f"{title} / to_thread", over(values, p99[threads]), "x", target)
    for cell, rounds in figures.items():
        quiet = figures.get(cell._replace(rate=0))
        if cell.rate and quiet is not None:
            rates = over([one.batches for one in rounds], [one.batches for one in quiet])
            paid = [(1 - rate) * 100 for rate in rates]
            result.claim(f"{cell.kind} x {cell.count}, {cell.way}: the trainings pay", paid, "%")


if __name__ == "__main__":
    main(measure, __doc__)
