"""A day of training in virtual time, with outages of the server and a date that jumps: nothing waits, nothing
grows, and every event is delivered or counted."""

from __future__ import annotations

import ast
import asyncio
import csv
import gc
import importlib.util
import io
import os
import random
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest

import asynccb
from asynccb import Callback, Trainer
from asynccb.callbacks import CSVLogger, ModelCheckpoint, ProgbarLogger, RemoteMonitor, TensorBoard
from asynccb.testing import ScriptedModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_spec = importlib.util.spec_from_file_location("virtual", Path(__file__).with_name("virtual.py"))
assert _spec is not None
assert _spec.loader is not None
virtual = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(virtual)

SEED = int(os.environ.get("FAULT_SEED", "0"))
MINUTE, HOUR, YEAR = 60.0, 3600.0, 365 * 86400.0
BATCHES = 3
"""In each epoch of one minute."""


class Outage(NamedTuple):
    """From ``begin`` on, in seconds since the start, the server does not answer as it should."""

    begin: float
    seconds: float
    kind: str


class Jump(NamedTuple):
    """At ``at`` somebody puts the date forward by ``seconds``."""

    at: float
    seconds: float


# ---------------------------------------------------------------- the world


class Server:
    """Takes posts, or does not: it refuses connections, stays silent, or answers with an error."""

    def __init__(self) -> None:
        self.kind = ""
        self.posts: list[tuple[float, bytes]] = []
        self.port = 0
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def fail(self, kind: str) -> None:
        self.kind = kind
        if kind == "refuse":
            await self.stop()

    async def recover(self) -> None:
        refused, self.kind = self.kind == "refuse", ""
        if refused:
            await self.start()

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in list(self._open):
            writer.transport.abort()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
                body = await reader.readexactly(length)
                if self.kind == "silent":
                    continue
                if not self.kind:
                    self.keep(body)
                status = b"500 Broken" if self.kind == "error" else b"200 OK"
                writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._open.discard(writer)
            writer.close()

    def keep(self, body: bytes) -> None:
        self.posts.append((asyncio.get_running_loop().time(), body))

    async def live_through(self, outages: Sequence[Outage]) -> None:
        began = asyncio.get_running_loop().time()
        for outage in outages:
            await asyncio.sleep(began + outage.begin - asyncio.get_running_loop().time())
            await self.fail(outage.kind)
            await asyncio.sleep(outage.seconds)
            await self.recover()


class Minutes(ScriptedModel):
    """Each batch takes twenty virtual seconds."""

    def __init__(self, clock: Any) -> None:
        super().__init__()
        self.clock = clock
        self.times: list[float] = []
        """When it was free to train each batch."""

    def train_batch(self, batch: Any) -> dict[str, float]:
        self.times.append(self.clock.now)
        self.clock.sleep(MINUTE / BATCHES)
        return super().train_batch(batch)


class Watch(Callback):
    """Notes each hour what there is of everything that could grow."""

    def __init__(self) -> None:
        self.events = 0
        self.hours: list[dict[str, int]] = []

    async def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.events += 1

    async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.events += 1
        if epoch % 60 == 59:
            stats, loop = self.run.stats, asyncio.get_running_loop()
            gc.collect()
            self.hours.append(
                {
                    "waiting in mailboxes": sum(box.waiting for box in stats.callbacks.values()),
                    "waiting elsewhere": sum(
                        queue.waiting for name, queue in stats.queues.items() if name != "event streams"
                    ),
                    "tasks": len(asyncio.all_tasks()),
                    "timers": len(loop._scheduled),  # type: ignore[attr-defined]
                    "threads": threading.active_count(),
                    "resident": resident(),
                }
            )


def resident() -> int:
    """Bytes of memory; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return 0


class Day(NamedTuple):
    """What a training of many hours left."""

    clock: Any
    monitor: RemoteMonitor
    server: Server
    watch: Watch
    run: Any
    seconds: float
    streamed: int
    folder: Path


def trained(folder: Path, hours: int, outages: Sequence[Outage] = (), jumps: Sequence[Jump] = ()) -> Day:
    clock = virtual.Clock()
    random.seed(SEED)

    async def put_dates() -> None:
        began = clock.now
        for jump in jumps:
            await asyncio.sleep(began + jump.at - clock.now)
            clock.date_moved += jump.seconds

    async def read(stream: Any) -> int:
        return sum([1 async for _ in stream])

    async def main() -> Day:
        server, watch, model = Server(), Watch(), Minutes(clock)
        await server.start()
        monitor = RemoteMonitor(f"http://127.0.0.1:{server.port}", send_as_json=True)
        callbacks = [
            CSVLogger(folder / "log.csv"),
            ModelCheckpoint(folder / "model"),
            TensorBoard(folder / "board", histogram_freq=10, update_freq="batch", write_graph=False),
            monitor,
            ProgbarLogger(file=io.StringIO()),
            watch,
        ]
        world = [asyncio.create_task(server.live_through(outages)), asyncio.create_task(put_dates())]
        run = Trainer(model).start(
            np.zeros((BATCHES, 1)), batch_size=1, epochs=hours * 60, verbose=2, callbacks=callbacks
        )
        reader = asyncio.create_task(read(run.events()))
        await run
        seconds = model.times[-1] - model.times[0] + MINUTE / BATCHES
        for task in world:
            task.cancel()
        await asyncio.gather(*world, return_exceptions=True)
        await server.stop()
        return Day(clock, monitor, server, watch, run, seconds, await reader, folder)

    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")  # histograms of weights only; events lost, which are counted here
        patch.setattr(os, "fsync", lambda descriptor: None)  # no test of what a power cut leaves
        day: Day = virtual.run(clock, main())
    return day


# ---------------------------------------------------------------- the verdict


def faults(day: Day, hours: int) -> list[str]:
    """What is wrong after a training of so many hours."""
    epochs, found = hours * 60, []
    if abs(day.seconds - hours * HOUR) > 1e-3:
        found.append(f"the training took {day.seconds} s in place of {hours * HOUR}")
    if day.run.stats.waits.keys() - {"train begin", "gate"}:
        found.append(f"the training waited: {day.run.stats.waits}")
    if day.monitor.sent + day.monitor.lost != epochs:
        found.append(f"{day.monitor.sent} posts received, {day.monitor.lost} lost, of {epochs}")
    received = [body for _, body in day.server.posts]
    if len(set(received)) != day.monitor.sent:
        found.append(f"{day.monitor.sent} counted as received, {len(set(received))} were")
    if day.watch.events != epochs * (BATCHES + 1):
        found.append(f"{day.watch.events} events handled")
    if day.streamed != day.run.stats.events:
        found.append(f"{day.streamed} events read of {day.run.stats.events}")
    with open(day.folder / "log.csv", newline="") as file:
        if [row[0] for row in csv.reader(file)] != ["epoch", *map(str, range(epochs))]:
            found.append("rows are missing in the CSV file")
    if np.fromfile(day.folder / "model").tolist() != [float(epochs * BATCHES)] * 16:
        found.append("the newest checkpoint is not that of the last epoch")
    board = day.run.stats.queues["TensorBoard: batches"]
    if board.overflowed or board.waiting:
        found.append(f"TensorBoard: {board}")
    for name, most in {
        "waiting in mailboxes": 12,
        "waiting elsewhere": 64,
        "tasks": 24,
        "timers": 64,
    }.items():
        if max(hour[name] for hour in day.watch.hours) > most:
            found.append(f"{name}: {[hour[name] for hour in day.watch.hours]}")
    return found


DAY = [
    Outage(1 * HOUR + 7, 10 * MINUTE, "refuse"),
    Outage(4 * HOUR + 7, 2 * HOUR, "silent"),
    Outage(9 * HOUR + 7, 1 * HOUR, "error"),
    Outage(15 * HOUR + 7, 90 * MINUTE, "refuse"),
]


def test_a_day_of_training_with_outages_is_a_day_and_every_event_is_delivered_or_counted(
    tmp_path: Path,
) -> None:
    day = trained(tmp_path, 24, DAY, [Jump(6 * HOUR, -10 * YEAR), Jump(12 * HOUR, HOUR)])
    assert faults(day, 24) == []
    down = sum(outage.seconds for outage in DAY) / MINUTE
    assert down - 15 <= day.monitor.lost <= down + 5, "what was posted while nobody listened, about"
    assert day.clock.jumps > 24 * 60 * BATCHES


def test_when_the_date_jumps_everything_happens_at_the_same_moment_as_without(tmp_path: Path) -> None:
    """Deadlines and rates are of the monotonic clock: posts arrive to the moment as they would have."""
    # Not in the very moment of a post: then chance decides.
    outages = [Outage(HOUR / 2 + 7, 10 * MINUTE, "refuse"), Outage(1.2 * HOUR + 7, 10 * MINUTE, "silent")]
    jumps = [Jump(0.4 * HOUR, HOUR), Jump(0.55 * HOUR, -10 * YEAR), Jump(1.3 * HOUR, 20 * YEAR)]
    arrived = []
    for name, some in {"without": [], "with": jumps}.items():
        (tmp_path / name).mkdir()
        day = trained(tmp_path / name, 2, outages, some)
        assert faults(day, 2) == []
        arrived.append([(round(at, 3), body) for at, body in day.server.posts])
    assert arrived[0] == arrived[1]
    assert 95 <= len(arrived[0]) < 120


class Holds(RemoteMonitor):
    """How a straightforward monitor would be: the training waits for the answer."""

    lockstep = True

    async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        await super().on_epoch_end(epoch, logs)
        assert self._queue is not None
        while self._queue._messages or self._queue.sent + self._queue.lost <= epoch:  # noqa: ASYNC110
            await asyncio.sleep(0.1)


class Grows(Callback):
    """Keeps a timer for each batch, for a day."""

    async def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        asyncio.get_running_loop().call_later(24 * HOUR, print)


class ByTheDate(RemoteMonitor):
    """Posts only if a minute has passed by the date."""

    last = 0.0

    async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        import time

        if time.time() - self.last > MINUTE / 2:
            self.last = time.time()
            await super().on_epoch_end(epoch, logs)


@pytest.mark.parametrize(
    ("naive", "said"),
    [
        (Holds, "the training took"),
        (Grows, "timers"),
        (ByTheDate, "posts received"),
    ],
)
def test_what_waits_grows_or_believes_the_date_is_found(
    naive: Callable[..., Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative controls."""
    if naive is Grows:
        watch = Watch.on_train_batch_end

        async def grow(self: Watch, batch: int, logs: Any = None) -> None:
            await Grows.on_train_batch_end(self, batch, logs)  # type: ignore[arg-type]
            await watch(self, batch, logs)

        monkeypatch.setattr(Watch, "on_train_batch_end", grow)
    else:
        monkeypatch.setitem(globals(), "RemoteMonitor", naive)
    day = trained(tmp_path, 2, [Outage(HOUR / 2, HOUR / 2, "silent")], [Jump(HOUR / 4, -HOUR)])
    assert any(fault.startswith(said) or said in fault for fault in faults(day, 2))


def test_only_labels_are_taken_from_the_date() -> None:
    """``time.time`` jumps when somebody sets the clock: whatever is measured or waited for, it must not be
    by it."""
    package = Path(asynccb.__file__).parent
    readers = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called in ("time.time", "time.time_ns", "datetime.now", "datetime.datetime.now"):
                readers.add(path.relative_to(package).as_posix())
    assert readers == {
        "callbacks/tensorboard/callback.py",
        "callbacks/tensorboard/writer.py",
        "storage/lock.py",  # since when a folder is taken
    }


# ---------------------------------------------------------------- the long tier


def drawn_outages(draw: random.Random, hours: int, count: int) -> Iterator[Outage]:
    share = hours * HOUR / count
    for number in range(count):
        seconds = draw.uniform(10 * MINUTE, 2 * HOUR)
        begin = number * share + draw.uniform(MINUTE, share - seconds - MINUTE)
        yield Outage(begin, seconds, draw.choice(["refuse", "silent", "error"]))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_three_days_with_twelve_outages_and_three_jumps_of_the_date(tmp_path: Path) -> None:
    seed = SEED or random.SystemRandom().randrange(1, 2**31)
    draw = random.Random(seed)
    outages = list(drawn_outages(draw, 72, 12))
    jumps = [Jump(draw.uniform(0, 72) * HOUR, by) for by in (HOUR, -HOUR, draw.choice([-10, 10]) * YEAR)]
    day = trained(tmp_path, 72, outages, sorted(jumps))
    said = f"replay with FAULT_SEED={seed}: {outages}, {jumps}"
    assert faults(day, 72) == [], said
    memory = [hour["resident"] for hour in day.watch.hours[12:]]
    assert max(memory) - memory[0] < 8 << 20, f"{said}: {memory}"


SOAK = """
import asyncio, datetime, importlib.util, os, sys, tempfile, time, warnings
from pathlib import Path

import numpy as np

from asynccb.testing import ScriptedState

spec = importlib.util.spec_from_file_location("hours", sys.argv[1])
hours = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hours)
minutes = float(sys.argv[2])


class Quick:
    # Keeps nothing, so that what grows is not the test's.
    metrics_names = ("loss",)
    stop_training = False

    def train_batch(self, batch):
        time.sleep(0.002)
        return {"loss": 1.0}

    def capture(self):
        return ScriptedState(np.zeros(16))


class Forgets(hours.Server):
    def keep(self, body):
        pass


class Watches(hours.Callback):
    def __init__(self):
        self.warm_at = time.monotonic() + minutes * 12
        self.look_at = 0.0
        self.seen = []

    async def on_epoch_end(self, epoch, logs=None):
        now = time.monotonic()
        if now >= max(self.warm_at, self.look_at):
            self.look_at = now + 1.0
            self.seen.append(hours.resident())


async def main(folder):
    server, watches = Forgets(), Watches()
    await server.start()
    callbacks = [
        hours.CSVLogger(folder / "log.csv"), hours.ModelCheckpoint(folder / "model"),
        hours.TensorBoard(folder / "board", histogram_freq=10, update_freq="batch", write_graph=False),
        hours.RemoteMonitor(f"http://127.0.0.1:{server.port}"),
        hours.ProgbarLogger(file=open(os.devnull, "w")), watches,
    ]
    history = await hours.Trainer(Quick()).fit(
        np.zeros((100, 1)), batch_size=1, epochs=10**6, verbose=2, callbacks=callbacks,
        stop_after=datetime.timedelta(minutes=minutes))
    await server.stop()
    seen = watches.seen
    print(len(history.epoch), seen[0], min(seen), max(seen), len(seen))


warnings.simplefilter("ignore")
with tempfile.TemporaryDirectory() as folder:
    asyncio.run(main(Path(folder)))
"""


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_twenty_minutes_of_real_training_keep_the_memory_within_two_megabytes() -> None:
    minutes = os.environ.get("SOAK_MINUTES", "20")
    child = subprocess.run(
        [sys.executable, "-c", SOAK, __file__, minutes], capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    _, warm, least, most, looks = map(int, child.stdout.split())
    assert looks >= 10
    assert warm - (2 << 20) <= least <= most <= warm + (2 << 20), child.stdout
