"""Whole trainings beside servers that do everything a server should not: the training takes as long as it
would without, every event is received or counted as lost, and the end waits four seconds at most.

In virtual time, so that the times are those that a user has and not those of a test.
"""

from __future__ import annotations

import asyncio
import csv
import importlib.util
import itertools
import json
import os
import socket
import struct
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest

from asynccb import Callback, Trainer
from asynccb.callbacks import CSVLogger, ModelCheckpoint, RemoteMonitor, TensorBoard, remote_monitor
from asynccb.testing import ScriptedModel

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

_spec = importlib.util.spec_from_file_location(
    "virtual", Path(__file__).parent.with_name("time") / "virtual.py"
)
assert _spec is not None
assert _spec.loader is not None
virtual = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(virtual)

EPOCHS, MINUTE = 6, 60.0
DRAIN = 4.0
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


# ---------------------------------------------------------------- what a server may do


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
    return await reader.readexactly(length)


def reset(writer: asyncio.StreamWriter) -> None:
    """Closes with a reset in place of an end."""
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def well(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        await read_request(reader)
        writer.write(OK)


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    await reader.read()


async def reset_at_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    reset(writer)


async def reset_after_the_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    reset(writer)


async def reset_after_headers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nX-Half: ")
    await writer.drain()
    reset(writer)


async def half_closed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write_eof()  # it will say nothing, and goes on listening
    await reader.read()


async def half_a_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")


async def a_byte_a_second(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    for at in range(len(OK)):
        writer.write(OK[at : at + 1])
        await asyncio.sleep(1.0)


async def a_byte_of_the_body_a_second(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(1000):
        writer.write(b".")
        await asyncio.sleep(1.0)


def status(line: bytes, *headers: bytes) -> Answer:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            writer.write(b"\r\n".join([b"HTTP/1.1 " + line, *headers, b"Content-Length: 0", b"", b""]))

    return answer


async def no_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    writer.write(b"\x16\x03\x01\x02\x00 this is no HTTP\r\n\r\n")


async def a_length_below_zero(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n")


async def compressed_zeros(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A small body that claims to be a large one."""
    import zlib

    await read_request(reader)
    bomb = zlib.compress(bytes(50 << 20))
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: deflate\r\nContent-Length: %d\r\n\r\n" % len(bomb)
    writer.write(head + bomb)


async def closes_what_it_kept_alive(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    writer.write(OK.replace(b"\r\n\r\n", b"\r\nConnection: keep-alive\r\n\r\n"))


async def answers_twice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The second answer is to nobody's question; if it were taken for that of the next, an error would look
    like a success."""
    await read_request(reader)
    writer.write(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n" + OK)
    await reader.read()


async def only_information(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    while True:
        writer.write(b"HTTP/1.1 102 Processing\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.5)


class Fault(NamedTuple):
    answer: Answer
    sent: int
    """Events that count as received."""
    why: str = ""
    """The last reason, or a part of it."""


FAULTS = {
    "well": Fault(well, EPOCHS),
    "silent": Fault(silent, 0),
    "reset at once": Fault(reset_at_once, 0),
    "reset after the request": Fault(reset_after_the_request, 0),
    "reset after headers": Fault(reset_after_headers, 0),
    "half-closed": Fault(half_closed, 0),
    "half a body": Fault(half_a_body, EPOCHS),
    "a byte a second": Fault(a_byte_a_second, 0),
    "a byte of the body a second": Fault(a_byte_of_the_body_a_second, EPOCHS),
    "500": Fault(status(b"500 Broken"), 0, "status 500"),
    "429": Fault(status(b"429 Slow down", b"Retry-After: 86400"), 0, "status 429"),
    "503": Fault(status(b"503 Busy", b"Retry-After: Fri, 01 Jan 2100 00:00:00 GMT"), 0, "status 503"),
    "no HTTP": Fault(no_http, 0),
    "a length below zero": Fault(a_length_below_zero, 0),
    "compressed zeros": Fault(compressed_zeros, EPOCHS),
    "closes what it kept alive": Fault(closes_what_it_kept_alive, EPOCHS),
    "answers twice": Fault(answers_twice, 0, "status 503"),
    "only information": Fault(only_information, 0),
}


# ---------------------------------------------------------------- a training beside it


class Server:
    """Does with each connection what its fault says."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.serving: set[asyncio.Task[Any]] = set()

    async def start(self) -> str:
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.serving.add(task)
        try:
            await self.answer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self.serving.discard(task)
            writer.transport.abort() if task.cancelling() else writer.close()

    async def stop(self) -> None:
        self.server.close()
        serving = list(self.serving)
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving)
        await self.server.wait_closed()


class Minutes(ScriptedModel):
    """Each epoch takes a virtual minute."""

    def __init__(self, clock: Any) -> None:
        super().__init__()
        self.clock = clock
        self.times: list[float] = []

    def train_batch(self, batch: Any) -> dict[str, float]:
        self.times.append(self.clock.now)
        self.clock.sleep(MINUTE)
        return super().train_batch(batch)


class Trained(NamedTuple):
    monitor: RemoteMonitor
    run: Any
    seconds: float
    """Of the batches."""
    drain: float
    """Seconds from the last batch to the end."""
    tasks: int
    """The most there were at a time."""
    said: list[str]


async def training(
    clock: Any, monitor: RemoteMonitor, folder: Path, *callbacks: Callback, epochs: int = EPOCHS
) -> Trained:
    model, tasks = Minutes(clock), []

    class Counts(Callback):
        async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            tasks.append(len(asyncio.all_tasks()))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = Trainer(model).start(
            np.zeros((1, 1)),
            epochs=epochs,
            verbose=0,
            callbacks=[CSVLogger(folder / "log.csv"), monitor, Counts(), *callbacks],
        )
        await run
    ended = model.times[-1] + MINUTE
    said = [str(warning.message) for warning in caught]
    return Trained(monitor, run, ended - model.times[0], clock.now - ended, max(tasks), said)


def beside(answer: Answer, folder: Path) -> Trained:
    clock = virtual.Clock()

    async def main() -> Trained:
        server = Server(answer)
        trained = await training(clock, RemoteMonitor(await server.start()), folder)
        await server.stop()
        return trained

    found: Trained = virtual.run(clock, main())
    return found


def faults(trained: Trained, folder: Path, sent: int, epochs: int = EPOCHS) -> list[str]:
    """What is wrong after a training."""
    found = []
    if trained.seconds != epochs * MINUTE:
        found.append(f"the training took {trained.seconds} s in place of {epochs * MINUTE}")
    if trained.drain > DRAIN + 0.1:
        found.append(f"its end took {trained.drain} s")
    if trained.run.stats.waits.keys() - {"train begin"}:
        found.append(f"it waited: {trained.run.stats.waits}")
    if (trained.monitor.sent, trained.monitor.lost) != (sent, epochs - sent):
        found.append(f"{trained.monitor.sent} received and {trained.monitor.lost} lost")
    with open(folder / "log.csv", newline="") as file:
        if len(list(csv.reader(file))) != 1 + epochs:
            found.append("a row is missing in the CSV file")
    if trained.tasks > 16:
        found.append(f"{trained.tasks} tasks at a time")
    if len(trained.said) != (sent < epochs):
        found.append(f"said: {trained.said}")
    return found


@pytest.mark.parametrize("name", FAULTS)
def test_a_training_beside_a_server_takes_as_long_as_without_and_counts_every_event(
    name: str, tmp_path: Path
) -> None:
    fault = FAULTS[name]
    trained = beside(fault.answer, tmp_path)
    assert faults(trained, tmp_path, fault.sent) == []
    assert all(fault.why in said for said in trained.said)


def test_a_server_that_floods_headers_costs_its_events_and_no_memory(tmp_path: Path) -> None:
    written = 0

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n")
        for number in itertools.count():
            writer.write(b"X-%d: " % number + b"x" * 4000 + b"\r\n")
            written += 4000
            await writer.drain()

    trained = beside(flood, tmp_path)
    assert faults(trained, tmp_path, 0) == []
    assert written < EPOCHS * 3 * (16 << 20), "what fits into the buffers of the sockets, for each attempt"


def test_an_endless_body_is_let_go_of_with_its_connection(tmp_path: Path) -> None:
    written = 0

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"10000\r\n" + bytes(65536) + b"\r\n")
            written += 65536
            await writer.drain()

    trained = beside(endless, tmp_path)
    assert faults(trained, tmp_path, EPOCHS) == []
    assert written < EPOCHS * (16 << 20)


@pytest.mark.parametrize("code", [b"301 Moved", b"302 Found", b"303 Other", b"307 Here", b"308 There"])
def test_a_secret_header_does_not_go_where_a_redirect_leads(code: bytes, tmp_path: Path) -> None:
    clock, heads = virtual.Clock(), []

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.read())

    async def main() -> Trained:
        other = Server(listen)
        server = Server(status(code, b"Location: " + (await other.start()).encode() + b"/"))
        monitor = RemoteMonitor(await server.start(), headers={"X-Token": "canary"})
        trained = await training(clock, monitor, tmp_path)
        await server.stop()
        await other.stop()
        return trained

    trained = virtual.run(clock, main())
    assert faults(trained, tmp_path, 0) == []
    assert heads == []
    assert not any("canary" in said for said in trained.said)


# ---------------------------------------------------------------- names


def test_a_resolver_that_hangs_for_an_hour_has_one_thread_and_holds_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, asked = virtual.Clock(), []

    def hang(*arguments: Any) -> Any:
        asked.append(threading.current_thread().name)
        clock.sleep(3600.0)
        raise socket.gaierror(socket.EAI_AGAIN, "try again")

    monkeypatch.setattr(socket, "getaddrinfo", hang)

    async def main() -> Trained:
        trained = await training(clock, RemoteMonitor("http://name.invalid"), tmp_path, epochs=180)
        while any(thread.name == "asynccb host names" for thread in threading.enumerate()):  # noqa: ASYNC110
            await asyncio.sleep(60.0)
        return trained

    assert faults(virtual.run(clock, main()), tmp_path, 0, 180) == []
    assert set(asked) == {"asynccb host names"}
    assert 1 <= len(asked) <= 4, "one look-up after the other, for three hours"


def test_a_resolver_that_fails_is_asked_again_for_each_attempt_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, asked = virtual.Clock(), []

    def fail(*arguments: Any) -> Any:
        asked.append(arguments)
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    monkeypatch.setattr(socket, "getaddrinfo", fail)

    async def main() -> Trained:
        return await training(clock, RemoteMonitor("http://name.invalid"), tmp_path)

    assert faults(virtual.run(clock, main()), tmp_path, 0) == []
    assert EPOCHS <= len(asked) <= 3 * EPOCHS


@pytest.mark.asyncio
async def test_where_the_default_executor_is_full_a_training_with_all_sinks_goes_on(tmp_path: Path) -> None:
    release, loop = threading.Event(), asyncio.get_running_loop()
    sleepers = [loop.run_in_executor(None, release.wait) for _ in range(64)]
    server = Server(well)
    monitor = RemoteMonitor((await server.start()).replace("127.0.0.1", "localhost"))
    callbacks = [
        CSVLogger(tmp_path / "log.csv"),
        ModelCheckpoint(tmp_path / "model"),
        TensorBoard(tmp_path / "board"),
        monitor,
    ]
    try:
        await Trainer(ScriptedModel()).fit(np.zeros((4, 1)), epochs=5, verbose=0, callbacks=callbacks)
    finally:
        release.set()
        await asyncio.gather(*sleepers)
        await server.stop()
    assert (monitor.sent, monitor.lost) == (5, 0)
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 6
    assert np.fromfile(tmp_path / "model").tolist() == [5.0] * 16


# ---------------------------------------------------------------- negative controls


class Waits(RemoteMonitor):
    """Posts within the hook, and the training waits for it: the straightforward way."""

    lockstep = True

    async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        await super().on_epoch_end(epoch, logs)
        assert self._queue is not None
        while self._queue.sent + self._queue.lost <= epoch:  # noqa: ASYNC110
            await asyncio.sleep(0.1)


class Follows(RemoteMonitor):
    """Does not stop to give up."""

    async def on_train_end(self, logs: Any = None) -> None:
        assert self._queue is not None
        await self._queue.close(3600.0)


class CountsNothing(RemoteMonitor):
    async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if epoch != 2:
            await super().on_epoch_end(epoch, logs)


@pytest.mark.parametrize(
    ("naive", "said"),
    [(Waits, "the training took"), (Follows, "its end took"), (CountsNothing, "received and")],
)
def test_a_monitor_that_waits_or_loses_without_counting_is_found(
    naive: type[RemoteMonitor], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "RemoteMonitor", naive)
    trained = beside(silent, tmp_path)
    assert any(said in fault for fault in faults(trained, tmp_path, 0))
    assert remote_monitor._DRAIN == DRAIN
    assert json.dumps(trained.run.history.history["loss"]) == json.dumps([1.0] * EPOCHS)
    assert os.listdir(tmp_path) == ["log.csv"]
