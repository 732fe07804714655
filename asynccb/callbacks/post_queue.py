"""A bounded queue of POST requests to one server, which nobody ever waits for."""

from __future__ import annotations

import asyncio
import importlib
import random
import socket
from collections import deque
from typing import TYPE_CHECKING, Any

from asynccb.protocols import QueueStatistics
from asynccb.storage.serial import SerialExecutor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import aiohttp
    from aiohttp.abc import AbstractResolver, ResolveResult

__all__ = ["PostQueue"]

WAITING = 256  # messages
CONNECT = 2.0  # seconds
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 2.0  # seconds
_TRY_AGAIN = frozenset({408, 425, 429})  # and everything from 500 on


class PostQueue:
    """Sends messages in order, one at a time, over one kept-alive connection.

    A message is received if the answer's status is below 300. Redirects are not followed, because the headers
    may hold a token, and the bodies of answers are not read. Anything else that happens loses the message:
    there is no exception, but a count and a reason without any secret in it (an exception's type, or a
    status).

    Args:
        url: where to; also one that cannot be reached, or is no URL.
        headers: of every request.
        timeout: seconds for one attempt; connecting, the look-up of the name included, has at most 2 of them.
        retries: further attempts after one that failed.
        first_loss: called with the reason when the first message is lost.

    Attributes:
        sent: messages received.
        lost: messages known to be lost.
        dropped: those of them that were lost because 256 newer ones came.
        why: why the last of them was.
    """

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str],
        *,
        timeout: float,
        retries: int,
        first_loss: Callable[[str], None],
    ) -> None:
        self._url = url
        self._headers = dict(headers)
        self._timeout = timeout
        self._retries = retries
        self._first_loss = first_loss
        self.sent = 0
        self.lost = 0
        self.dropped = 0
        self.why = ""
        self._messages: deque[bytes] = deque()
        self._sending: list[bytes] = []
        self._news = asyncio.Event()
        self._closing = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._session: aiohttp.ClientSession | None = None
        self._sender: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Makes the session; connects to nothing."""
        names = SerialExecutor("asynccb host names")
        self._loop = asyncio.get_running_loop()
        # On a thread, because the first import of aiohttp reads hundreds of files and the certificates.
        await self._loop.run_in_executor(names, importlib.import_module, "aiohttp")
        import aiohttp

        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(resolver=_resolver(names), limit=1, keepalive_timeout=60),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=self._timeout, connect=min(CONNECT, self._timeout)),
            auto_decompress=False,
        )
        self._sender = asyncio.create_task(self._send_all(self._session), name="sender of RemoteMonitor")

    def post(self, message: bytes) -> None:
        """Queues a message. If 256 wait already, the oldest of them is lost."""
        if len(self._messages) >= WAITING:
            self._messages.popleft()
            self.dropped += 1
            self.lose("too many events waited")
        self._messages.append(message)
        self._news.set()

    def statistics(self) -> QueueStatistics:
        return QueueStatistics(WAITING, "drop_oldest", len(self._messages), self.dropped)

    def state_dict(self) -> dict[str, Any]:
        """The counts, and the messages that nobody has received yet; called on the loop."""
        waiting = [message.decode() for message in (*self._sending, *self._messages)]
        return {"sent": self.sent, "lost": self.lost, "why": self.why, "waiting": waiting}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on as the queue that answered ``state``; called on any thread, once it is open."""
        self.sent, self.lost, self.why = int(state["sent"]), int(state["lost"]), str(state["why"])
        self._messages.extend(message.encode() for message in state["waiting"])
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._news.set)

    def lose(self, why: str) -> None:
        """Counts a message that will never be received."""
        self.lost += 1
        self.why = why
        if self.lost == 1:
            self._first_loss(why)

    async def close(self, seconds: float) -> None:
        """Gives what waits ``seconds`` to be sent, and ends. What was not received by then is lost."""
        session, sender = self._session, self._sender
        if session is None or sender is None:
            return
        self._session = self._sender = None
        self._closing.set()
        self._news.set()
        try:
            await asyncio.wait([sender], timeout=seconds)
        finally:
            sender.cancel()
            try:
                await asyncio.gather(sender, return_exceptions=True)
            finally:  # also if this very wait is cancelled
                await session.close()
                while self._messages:
                    self._messages.popleft()
                    self.lose("no time was left")

    async def _send_all(self, session: aiohttp.ClientSession) -> None:
        while True:
            while self._messages:
                await self._send(session, self._messages.popleft())
            if self._closing.is_set():
                return
            self._news.clear()
            await self._news.wait()

    async def _send(self, session: aiohttp.ClientSession, message: bytes) -> None:
        why = "no time was left"
        self._sending = [message]
        try:
            for attempt in range(self._retries + 1):
                if attempt:
                    await self._pause(attempt)
                why, again = await self._attempt(session, message)
                if not again:
                    break
        finally:  # also when cancelled
            self._sending = []
            if why:
                self.lose(why)
            else:
                self.sent += 1

    async def _attempt(self, session: aiohttp.ClientSession, message: bytes) -> tuple[str, bool]:
        """Why it failed, empty where it did not, and whether another attempt may go better."""
        try:
            async with session.post(
                self._url, data=message, headers=self._headers, allow_redirects=False
            ) as answer:
                status = answer.status
        except Exception as error:
            # Whatever a server, a proxy or a URL can provoke: of no exception may the text be shown, which
            # can have the URL in it. A ValueError is a URL or a header that will be as wrong next time.
            return type(error).__name__, not isinstance(error, ValueError)
        if status < 300:
            return "", False
        return f"status {status}", status >= 500 or status in _TRY_AGAIN

    async def _pause(self, attempt: int) -> None:
        seconds = pause(attempt)
        if self.sent:
            await asyncio.sleep(seconds)
            return
        # A server that has never answered does not hold the end of the training.
        try:
            async with asyncio.timeout(seconds):
                await self._closing.wait()
        except TimeoutError:
            pass


def pause(attempt: int) -> float:
    """Seconds before the ``attempt``-th retry: doubled each time, at most 2, then jittered down to a half."""
    return min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** (attempt - 1)) * random.uniform(0.5, 1.0)


def _resolver(names: SerialExecutor) -> AbstractResolver:
    """Looks host names up on our own thread; the default executor of the loop is the service's."""
    from aiohttp.abc import AbstractResolver

    class Resolver(AbstractResolver):
        async def resolve(
            self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
        ) -> list[ResolveResult]:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(names, _look_up, host, port, family)

        async def close(self) -> None:
            pass

    return Resolver()


def _look_up(host: str, port: int, family: socket.AddressFamily) -> list[ResolveResult]:
    numeric = socket.NI_NUMERICHOST | socket.NI_NUMERICSERV
    return [
        {
            "hostname": host,
            # Asked again in numbers: this form keeps the scope of a link-local IPv6 address.
            "host": socket.getnameinfo(address, numeric)[0],
            "port": port,
            "family": family,
            "proto": protocol,
            "flags": socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
        }
        for family, _, protocol, _, address in socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)
    ]
