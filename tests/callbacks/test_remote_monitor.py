"""RemoteMonitor against real servers: what is on the wire, and that no server can hold or hurt a training."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
import socket
import threading
import warnings
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from asynccb import ArgumentError, Trainer
from asynccb.callbacks import post_queue, remote_monitor
from asynccb.callbacks.remote_monitor import RemoteMonitor, without_secrets
from asynccb.testing import ScriptedModel

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
    RawHandler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Post(NamedTuple):
    path: str
    body: bytes
    headers: dict[str, str]
    peer: Any


class Server:
    """A real aiohttp server on a free port, which keeps what it is sent and answers as its script says."""

    def __init__(self, *statuses: int) -> None:
        self.posts: list[Post] = []
        self._statuses = list(statuses)
        self._arrived = asyncio.Condition()
        self.gate = asyncio.Event()
        self.gate.set()
        self.url = ""

    async def handle(self, request: web.Request) -> web.Response:
        assert request.transport is not None
        peer = request.transport.get_extra_info("peername")
        headers = {name.lower(): value for name, value in request.headers.items()}
        post = Post(request.raw_path, await request.read(), headers, peer)
        async with self._arrived:
            self.posts.append(post)
            self._arrived.notify_all()
        await self.gate.wait()
        return web.Response(status=self._statuses.pop(0) if self._statuses else 200, text="ok")

    async def arrived(self, count: int) -> None:
        async with self._arrived:
            await self._arrived.wait_for(lambda: len(self.posts) >= count)


@asynccontextmanager
async def serving(*statuses: int) -> AsyncIterator[Server]:
    server = Server(*statuses)
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", server.handle)
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await runner.cleanup()


@asynccontextmanager
async def raw_server(answer: RawHandler) -> AsyncIterator[str]:
    """A server that reads one request's head and then does what ``answer`` does."""
    writers: list[asyncio.StreamWriter] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        try:
            await reader.readuntil(b"\r\n\r\n")
            await answer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()
        await server.wait_closed()


def closed_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(post_queue, "FIRST_PAUSE", 0.0)


async def monitored(monitor: RemoteMonitor, *epochs: dict[str, Any]) -> RemoteMonitor:
    await monitor.on_train_begin()
    for epoch, logs in enumerate(epochs):
        await monitor.on_epoch_end(epoch, logs)
    await monitor.on_train_end()
    return monitor


async def lost_with(monitor: RemoteMonitor, *epochs: dict[str, Any]) -> str:
    """The one warning of a training all of whose events were lost."""
    with pytest.warns(UserWarning) as caught:  # noqa: PT030  its text is what the tests compare
        await monitored(monitor, *epochs)
    assert len(caught) == 1
    assert (monitor.sent, monitor.lost) == (0, len(epochs))
    return str(caught[0].message)


# ---------------------------------------------------------------- what is on the wire


@pytest.mark.asyncio
async def test_the_form_is_the_originals_to_the_byte() -> None:
    async with serving() as server:
        monitor = RemoteMonitor(server.url)
        await monitor.on_train_begin()
        await monitor.on_epoch_end(3, {"loss": 0.5, "acc": 0.25})
        await monitor.on_train_end()
    [post] = server.posts
    assert post.path == "/publish/epoch/end/"
    assert post.body == b"data=%7B%22epoch%22%3A+3%2C+%22loss%22%3A+0.5%2C+%22acc%22%3A+0.25%7D"
    assert post.headers["content-type"] == "application/x-www-form-urlencoded"
    assert post.headers["accept"] == "*/*"
    assert (monitor.sent, monitor.lost) == (1, 0)


@pytest.mark.asyncio
async def test_path_is_appended_as_it_stands_and_field_names_the_form_field() -> None:
    async with serving() as server:
        await monitored(RemoteMonitor(server.url + "/hub", "?run=1", "payload"), {"loss": 1.0})
    assert server.posts[0].path == "/hub?run=1"
    assert server.posts[0].body == b"payload=%7B%22epoch%22%3A+0%2C+%22loss%22%3A+1.0%7D"


@pytest.mark.asyncio
async def test_json_goes_with_the_two_headers_of_the_page_and_without_the_field() -> None:
    async with serving() as server:
        await monitored(RemoteMonitor(server.url, send_as_json=True), {"loss": 0.5})
    [post] = server.posts
    assert post.body == b'{"epoch": 0, "loss": 0.5}'
    assert post.headers["content-type"] == "application/json"
    assert post.headers["accept"] == "application/json"


@pytest.mark.asyncio
async def test_headers_are_sent_as_given() -> None:
    async with serving() as server:
        given = {"X-Token": "t", "content-type": "text/plain"}
        await monitored(RemoteMonitor(server.url, headers=given), {"loss": 0.5})
        await monitored(RemoteMonitor(server.url, headers={"X-Token": "t"}, send_as_json=True), {"loss": 0.5})
    form, as_json = server.posts
    assert (form.headers["x-token"], form.headers["content-type"]) == ("t", "text/plain")
    assert form.body.startswith(b"data=%7B")
    assert (as_json.headers["content-type"], as_json.headers["accept"]) == ("application/json", "*/*")


@pytest.mark.asyncio
async def test_values_that_json_does_not_know_are_strings_and_a_key_epoch_overrides_the_number() -> None:
    async with serving() as server:
        logs = {"loss": float("nan"), "x": np.float32(0.5), "y": np.array([1.0, np.inf]), "epoch": 9}
        await monitored(RemoteMonitor(server.url, send_as_json=True), logs)
    assert server.posts[0].body == b'{"epoch": 9, "loss": "NaN", "x": 0.5, "y": [1.0, "Infinity"]}'


@pytest.mark.asyncio
async def test_events_come_in_order_over_one_connection() -> None:
    async with serving() as server:
        await monitored(RemoteMonitor(server.url, send_as_json=True), *({"loss": i / 2} for i in range(20)))
    assert [json.loads(post.body)["epoch"] for post in server.posts] == list(range(20))
    assert len({post.peer for post in server.posts}) == 1


@pytest.mark.asyncio
async def test_a_user_and_password_in_the_url_become_basic_authentication() -> None:
    async with serving() as server:
        await monitored(RemoteMonitor(server.url.replace("//", "//me:canary@")), {"loss": 1.0})
    assert server.posts[0].headers["authorization"] == "Basic bWU6Y2FuYXJ5"


@pytest.mark.asyncio
async def test_cookies_of_the_server_are_not_kept() -> None:
    async def set_cookie(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(b"")
        while True:
            writer.write(b"HTTP/1.1 200 OK\r\nSet-Cookie: a=b\r\nContent-Length: 0\r\n\r\n")
            heads.append(await reader.readuntil(b"\r\n\r\n"))

    heads: list[bytes] = []
    async with raw_server(set_cookie) as url:
        await monitored(RemoteMonitor(url), {"loss": 1.0}, {"loss": 2.0})
    assert len(heads) == 2
    assert b"cookie" not in heads[1].lower()


# ---------------------------------------------------------------- faults


async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    await writer.drain()
    writer.transport.abort()


async def invalid(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"\x00\x01 not HTTP at all\r\n\r\n")
    writer.close()


async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"X-Flood: " + b"x" * 4000 + b"\r\n")
        await writer.drain()


async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 2")  # and the rest would come much later


@pytest.mark.asyncio
@pytest.mark.parametrize("answer", [never, reset, invalid, flood, drip])
async def test_a_server_that_misbehaves_costs_its_events_and_nothing_else(answer: RawHandler) -> None:
    async with raw_server(answer) as url:
        monitor = RemoteMonitor(url, timeout=0.05, retries=1)
        text = await lost_with(monitor, {"loss": 1.0}, {"loss": 2.0}, {"loss": 3.0})
    assert text.startswith(
        f"Could not reach RemoteMonitor root server at {url}: 3 events were lost, 0 received (last reason: "
    )


@pytest.mark.asyncio
async def test_a_port_where_nobody_listens_is_one_warning() -> None:
    root = closed_port()
    text = await lost_with(RemoteMonitor(root), {"loss": 1.0})
    assert text == (
        f"Could not reach RemoteMonitor root server at {root}: 1 event was lost, 0 received "
        "(last reason: ClientConnectorError)."
    )


@pytest.mark.asyncio
@pytest.mark.parametrize("status", [301, 307, 400, 404, 429, 500, 503])
async def test_every_status_from_300_on_is_a_loss_that_names_it(status: int) -> None:
    async with serving(*[status] * 3) as server:
        text = await lost_with(RemoteMonitor(server.url), {"loss": 1.0})
    assert f"(last reason: status {status})" in text
    tried_again = status in (429, 500, 503)
    assert len(server.posts) == (3 if tried_again else 1)


@pytest.mark.asyncio
async def test_a_redirect_is_not_followed_so_that_no_header_reaches_another_host() -> None:
    async with serving() as other:

        async def redirect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = f"HTTP/1.1 301 Moved Permanently\r\nLocation: {other.url}/\r\nContent-Length: 0\r\n\r\n"
            writer.write(head.encode())

        async with raw_server(redirect) as url:
            text = await lost_with(RemoteMonitor(url, headers={"X-Token": "canary"}), {"loss": 1.0})
    assert other.posts == []
    assert "status 301" in text


@pytest.mark.asyncio
async def test_an_answer_counts_by_its_status_and_its_body_is_not_read() -> None:
    written = []

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
        while True:
            writer.write(b"x" * 65536)
            written.append(65536)
            await writer.drain()

    async with raw_server(endless) as url:
        monitor = await monitored(RemoteMonitor(url), {"loss": 1.0}, {"loss": 2.0})
    assert (monitor.sent, monitor.lost) == (2, 0)
    assert sum(written) < 64_000_000  # what fits into the buffers of the sockets


@pytest.mark.asyncio
async def test_a_body_that_breaks_off_is_no_loss() -> None:
    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
        writer.close()

    async with raw_server(half) as url:
        monitor = await monitored(RemoteMonitor(url), {"loss": 1.0})
    assert (monitor.sent, monitor.lost) == (1, 0)


@pytest.mark.asyncio
async def test_a_failure_that_passes_is_tried_again_in_order_and_nothing_is_lost() -> None:
    async with serving(500, 429, 200, 503) as server:
        monitor = RemoteMonitor(server.url, send_as_json=True)
        await monitored(monitor, {"loss": 1.0}, {"loss": 2.0})
    assert [json.loads(post.body)["epoch"] for post in server.posts] == [0, 0, 0, 1, 1]
    assert (monitor.sent, monitor.lost) == (2, 0)


@pytest.mark.asyncio
async def test_a_connection_closed_while_it_was_kept_alive_is_opened_anew() -> None:
    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(1)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: keep-alive\r\n\r\n")
        writer.close()

    heads: list[int] = []
    async with raw_server(once) as url:
        monitor = await monitored(RemoteMonitor(url), *[{"loss": 1.0}] * 4)
    assert (monitor.sent, monitor.lost) == (4, 0)


@pytest.mark.asyncio
async def test_logs_without_a_json_form_lose_their_event_alone() -> None:
    async with serving() as server:
        monitor = RemoteMonitor(server.url)
        with pytest.warns(
            UserWarning, match=r"1 event was lost, 1 received \(last reason: a object at \['x\\n'\]"
        ):
            await monitored(monitor, {"x\n": object()}, {"loss": 1.0})
    assert len(server.posts) == 1


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "root", ["nonsense", "", "http://[::1", "ftp://example.invalid", "http://\n", "http://h:x"]
)
async def test_what_is_no_url_is_no_error_and_is_not_shown(root: str) -> None:
    text = await lost_with(RemoteMonitor(root), {"loss": 1.0})
    assert "1 event was lost" in text
    assert text.isprintable()


# ---------------------------------------------------------------- the training is never held


@pytest.mark.asyncio
async def test_no_epoch_hook_ever_waits_and_the_oldest_events_are_dropped() -> None:
    """Each hook is driven by hand: if it awaited anything, it would not end in this one step."""
    async with serving() as server:
        server.gate.clear()
        monitor = RemoteMonitor(server.url, send_as_json=True)
        await monitor.on_train_begin()
        await monitor.on_epoch_end(0, {})
        await server.arrived(1)
        for epoch in range(1, 1001):
            with pytest.raises(StopIteration):
                monitor.on_epoch_end(epoch, {}).send(None)
        assert monitor.lost == 1000 - 256
        server.gate.set()
        with pytest.warns(UserWarning, match="744 events were lost, 257 received"):
            await monitor.on_train_end()
    assert [json.loads(post.body)["epoch"] for post in server.posts] == [0, *range(745, 1001)]


@pytest.mark.asyncio
async def test_a_post_that_is_awaited_in_the_hook_would_hold_it() -> None:
    """Negative control of the test above: the straightforward hook stops at its first step."""

    class Naive(RemoteMonitor):
        async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            await super().on_epoch_end(epoch, logs)
            await asyncio.gather(asyncio.open_connection("127.0.0.1", 9), return_exceptions=True)

    naive = Naive(closed_port())
    hook = naive.on_epoch_end(0, {})
    assert hook.send(None) is not None
    hook.close()
    await asyncio.sleep(0)


@pytest.mark.asyncio
async def test_the_end_gives_up_after_its_time_and_counts_what_was_under_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote_monitor, "_DRAIN", 0.01)
    async with raw_server(never) as url:
        text = await lost_with(RemoteMonitor(url, timeout=60), *[{"loss": 1.0}] * 5)
    assert text.endswith("5 events were lost, 0 received (last reason: no time was left).")


@pytest.mark.asyncio
async def test_an_end_that_is_cancelled_still_closes_and_counts() -> None:
    async def cancelled_end() -> None:
        ending = asyncio.create_task(monitor.on_train_end())
        await asyncio.sleep(0)
        ending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await ending

    async with serving() as server:
        server.gate.clear()
        monitor = RemoteMonitor(server.url)
        await monitor.on_train_begin()
        await monitor.on_epoch_end(0, {})
        await server.arrived(1)
        with pytest.warns(UserWarning, match="1 event was lost"):
            await cancelled_end()
        server.gate.set()
    assert (monitor.sent, monitor.lost) == (0, 1)


@pytest.mark.asyncio
async def test_a_server_that_never_answered_gets_no_pauses_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(post_queue, "FIRST_PAUSE", 1e6)
    monkeypatch.setattr(post_queue, "LONGEST_PAUSE", 1e6)
    monkeypatch.setattr(remote_monitor, "_DRAIN", 1e6)
    await lost_with(RemoteMonitor(closed_port()), *[{"loss": 1.0}] * 20)


@pytest.mark.asyncio
async def test_the_first_loss_is_logged_while_the_training_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    logged = threading.Event()
    caplog.handler.addFilter(lambda record: logged.set() or True)
    with caplog.at_level(logging.WARNING, "asynccb"):
        await lost_with(RemoteMonitor(closed_port()), {"loss": 1.0}, {"loss": 2.0})
        assert logged.wait(10)
    [record] = [r for r in caplog.records if r.name == "asynccb.callbacks.remote_monitor"]
    assert record.getMessage().endswith(
        ": ClientConnectorError. The training goes on; its end tells how many events were lost."
    )


@pytest.mark.asyncio
async def test_hooks_without_a_training_do_nothing() -> None:
    monitor = RemoteMonitor()
    await monitor.on_epoch_end(0, {"loss": 1.0})
    await monitor.on_train_end()
    assert (monitor.sent, monitor.lost) == (0, 0)


@pytest.mark.asyncio
async def test_an_object_serves_one_training_after_the_other_and_counts_anew() -> None:
    monitor = RemoteMonitor(closed_port())
    await lost_with(monitor, {"loss": 1.0}, {"loss": 2.0})
    await lost_with(monitor, {"loss": 1.0})


def test_one_event_loop_after_the_other_may_use_one_object() -> None:
    monitor = RemoteMonitor(closed_port())
    for _ in range(2):
        asyncio.run(lost_with(monitor, {"loss": 1.0}))


@given(attempt=st.integers(1, 60))
def test_pauses_are_doubled_jittered_and_bounded(attempt: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(post_queue, "FIRST_PAUSE", 0.2)
        full = min(2.0, 0.2 * 2 ** (attempt - 1))
        assert full / 2 <= post_queue.pause(attempt) <= full


# ---------------------------------------------------------------- host names


@pytest.mark.asyncio
async def test_names_are_looked_up_while_the_default_executor_is_full() -> None:
    release = threading.Event()
    loop = asyncio.get_running_loop()
    sleepers = [loop.run_in_executor(None, release.wait) for _ in range(64)]
    try:
        async with serving() as server:
            monitor = RemoteMonitor(server.url.replace("127.0.0.1", "localhost"))
            await monitored(monitor, {"loss": 1.0})
        assert (monitor.sent, monitor.lost) == (1, 0)
    finally:
        release.set()
        await asyncio.gather(*sleepers)


@pytest.mark.asyncio
async def test_a_name_that_cannot_be_found_is_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    text = await lost_with(RemoteMonitor("http://nxdomain.invalid"), {"loss": 1.0})
    assert "ClientConnectorDNSError" in text


@pytest.mark.asyncio
async def test_a_look_up_that_hangs_ends_with_the_time_for_connecting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    release = threading.Event()

    def hang(*args: Any) -> Any:
        release.wait()
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    try:
        text = await lost_with(
            RemoteMonitor("http://slow.invalid", timeout=0.05), {"loss": 1.0}, {"loss": 2.0}
        )
    finally:
        release.set()
    assert "2 events were lost" in text


# ---------------------------------------------------------------- arguments and secrets


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"root": 9000}, "root=int: a string"),
        ({"path": None}, "path=NoneType: a string"),
        ({"field": b"data"}, "field=bytes: a string"),
        ({"timeout": 0}, "timeout=0: a number of seconds above 0"),
        ({"timeout": float("nan")}, "timeout=nan: a number of seconds above 0"),
        ({"timeout": "5"}, "timeout='5': a number of seconds above 0"),
        ({"retries": -1}, "retries=-1: an integer of at least 0"),
        ({"retries": 1.5}, "retries=1.5: an integer of at least 0"),
        ({"headers": "canary"}, "headers=str: a dict of strings, or None"),
        ({"headers": {"X y": "canary"}}, "headers='X y': names of letters, digits and hyphens"),
        (
            {"headers": {"X": "canary\r\nHost: evil"}},
            "headers=the value of 'X': strings without line breaks and control characters",
        ),
        (
            {"headers": {"X": 1}},
            "headers=the value of 'X': strings without line breaks and control characters",
        ),
    ],
)
def test_arguments_that_can_never_work_are_refused_without_showing_values(
    arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(ArgumentError) as caught:
        RemoteMonitor(**arguments)
    assert str(caught.value) == words


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://localhost:9000", "http://localhost:9000"),
        ("http://user:canary@host:1/a?token=canary#canary", "http://host:1/a"),
        ("http://a@b:canary@host", "http://host"),
        ("https://[::1]:8/x", "https://[::1]:8/x"),
        ("http://[canary", "(not a URL)"),
        ("user:canary@host", "(not a URL)"),
        ("//user:canary@host", "(not a URL)"),
        ("canary", "(not a URL)"),
        ("http://h\x1b2J", "http://h\\x1b2J"),
        ("http://h\u202e", "http://h\\u202e"),
    ],
)
def test_a_url_is_shown_without_its_secrets(url: str, shown: str) -> None:
    assert without_secrets(url) == shown


@pytest.mark.asyncio
@pytest.mark.parametrize("scheme", ["http", "ftp", "no url at all "])
async def test_no_secret_reaches_a_warning_a_log_or_a_repr(
    scheme: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    root = closed_port().replace("http://", f"{scheme}://user:canary@")
    monitor = RemoteMonitor(root, "/p?token=canary", headers={"X-Token": "canary"})
    with caplog.at_level(logging.DEBUG):
        text = await lost_with(monitor, {"loss": 1.0})
    said = [
        text,
        repr(monitor),
        str(monitor.state_dict()),
        *(record.getMessage() for record in caplog.records),
    ]
    assert [line for line in [*said, *capfd.readouterr()] if "canary" in line] == []


def test_the_positional_order_of_the_page_holds() -> None:
    monitor = RemoteMonitor("http://h", "/p", "f", {"a": "b"})
    assert (monitor.root, monitor.path, monitor.field, monitor.headers) == ("http://h", "/p", "f", {"a": "b"})
    plain = RemoteMonitor()
    assert (plain.root, plain.path, plain.field, plain.headers) == (
        "http://localhost:9000",
        "/publish/epoch/end/",
        "data",
        None,
    )


@pytest.mark.asyncio
async def test_what_nobody_has_received_is_sent_by_the_training_that_goes_on() -> None:
    arrived, gate = asyncio.Event(), asyncio.Event()

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        arrived.set()
        await gate.wait()

    async with raw_server(hang) as url:
        first = RemoteMonitor(url, send_as_json=True)
        await first.on_train_begin()
        for epoch in range(3):
            await first.on_epoch_end(epoch, {"loss": 1.0})
        await arrived.wait()
        state = json.loads(json.dumps(first.state_dict()))
        assert len(state["queue"]["waiting"]) == 3  # the one under way too
        assert first._queue is not None
        await first._queue.close(0)
        gate.set()
    async with serving() as server:
        second = RemoteMonitor(server.url, send_as_json=True)
        await second.on_train_begin()
        await asyncio.to_thread(second.load_state_dict, state)
        await server.arrived(3)
        await second.on_epoch_end(3, {"loss": 1.0})
        await second.on_train_end()
    assert [json.loads(post.body)["epoch"] for post in server.posts] == [0, 1, 2, 3]
    assert (second.sent, second.lost) == (4, 0)


@pytest.mark.asyncio
async def test_the_counts_go_on_and_the_first_loss_is_not_logged_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    monitor = RemoteMonitor(closed_port(), retries=0)
    await monitor.on_train_begin()
    monitor.load_state_dict({"queue": {"sent": 5, "lost": 2, "why": "status 500", "waiting": []}})
    with caplog.at_level(logging.WARNING):
        await monitor.on_epoch_end(0, {"loss": 1.0})
        with pytest.warns(UserWarning, match="3 events were lost, 5 received"):
            await monitor.on_train_end()
    assert caplog.records == []


def test_it_crosses_processes() -> None:
    assert pickle.loads(pickle.dumps(RemoteMonitor("http://h", timeout=2))).timeout == 2


# ---------------------------------------------------------------- with a real training


@pytest.mark.asyncio
async def test_a_training_posts_what_later_inline_hooks_added_and_its_history_has() -> None:
    async with serving() as server:
        monitor = RemoteMonitor(server.url, send_as_json=True)
        fit = Trainer(ScriptedModel([4.0, 2.0])).fit(
            np.zeros((4, 1)), batch_size=2, epochs=3, verbose=0, callbacks=[monitor]
        )
        history = await fit
    posted = [json.loads(post.body) for post in server.posts]
    assert posted == [{"epoch": e, "loss": history.history["loss"][e]} for e in range(3)]


@pytest.mark.asyncio
async def test_a_dead_server_leaves_the_training_as_it_would_be_without_it() -> None:
    async def trained(*callbacks: Any) -> dict[str, list[Any]]:
        fit = Trainer(ScriptedModel([4.0, 2.0, 1.0])).fit(
            np.zeros((8, 1)), batch_size=2, epochs=50, verbose=0, callbacks=list(callbacks)
        )
        return (await fit).history

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        beside = await trained(monitor := RemoteMonitor(closed_port()))
    assert beside == await trained()
    assert [w.category for w in caught] == [UserWarning]
    assert (monitor.sent, monitor.lost) == (0, 50)
