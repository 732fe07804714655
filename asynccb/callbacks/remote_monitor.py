"""Epochs posted to a server. Whatever the server does, the training does not notice."""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlencode, urlsplit

from asynccb.callbacks.base import Callback
from asynccb.callbacks.post_queue import WAITING, PostQueue
from asynccb.errors import ArgumentError, in_words
from asynccb.storage.serial import SerialExecutor
from asynccb.text import printable, strict_json

if TYPE_CHECKING:
    from asynccb.callbacks.base import Overflow
    from asynccb.protocols import QueueStatistics

__all__ = ["RemoteMonitor"]

_log = logging.getLogger(__name__)

_FORM = {"Content-Type": "application/x-www-form-urlencoded"}
_JSON = {"Accept": "application/json", "Content-Type": "application/json"}
_DRAIN = 4.0  # seconds; with the closing it stays below the five seconds of grace of a cancelled run
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_NOT_IN_A_HEADER = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


class RemoteMonitor(Callback):
    """Posts the logs of each epoch to a server, in order, one at a time, over one kept-alive connection.

    The body is the form field ``field`` with ``{"epoch": <0-based>, **logs}`` as JSON, or that JSON itself
    with ``send_as_json``. NaN and the infinities, which JSON does not know, are the strings ``"NaN"``,
    ``"Infinity"`` and ``"-Infinity"``.

    No hook waits for the server, except that the end of the training gives the events still waiting up to 4
    seconds. An event is lost if every attempt failed, if 256 newer ones came while it waited, if its logs
    have no JSON form, or if that time is over. The first loss is logged; at the end of the training one
    UserWarning tells how many events were lost and why the last one was. Only a status below 300 counts as
    received: redirects are not followed, since the headers may hold a token, and the bodies of answers are
    not read. An event that was tried again may arrive twice, and so may those around the moment that a
    resumed training goes on from: what was still waiting then is sent again. Neither warning nor log shows
    credentials, queries or headers. A server that is not there is no error, before the training as well:
    nothing connects until an epoch ends.

    Args:
        root: URL of the server; a user and password in it are sent as basic authentication.
        path: is appended to ``root`` as it stands.
        field: name of the form field.
        headers: sent as given. Default: nothing beside the content type; with ``send_as_json`` the two
            headers that announce JSON and ask for it.
        send_as_json: send a JSON body in place of a form. Default False.
        timeout: seconds for one attempt, of which at most 2 for connecting. Default 5.
        retries: further attempts after a failed one, with growing, jittered pauses of at most 2 seconds. A
            status that says that the request itself is wrong is not tried again. Default 2.

    Attributes:
        sent: events of this training that the server has received.
        lost: events of this training that it will never receive.

    Raises:
        ArgumentError: a wrong type, a header that HTTP does not allow, or a number out of range.
    """

    changes_model: ClassVar[bool] = False
    overflow: ClassVar[Overflow] = "drop_oldest"
    mailbox_size: ClassVar[int] = WAITING

    def __init__(
        self,
        root: str = "http://localhost:9000",
        path: str = "/publish/epoch/end/",
        field: str = "data",
        headers: Mapping[str, str] | None = None,
        *,
        send_as_json: bool = False,
        timeout: float = 5.0,
        retries: int = 2,
    ) -> None:
        for argument, given in (("root", root), ("path", path), ("field", field)):
            if not isinstance(given, str):
                # Only the type is shown: a URL object may hold a password.
                raise ArgumentError(argument, in_words(type(given).__name__), "a string")
        if not isinstance(timeout, (int, float)) or not 0 < timeout < math.inf:
            raise ArgumentError("timeout", timeout, "a number of seconds above 0")
        if not isinstance(retries, int) or retries < 0:
            raise ArgumentError("retries", retries, "an integer of at least 0")
        self.root = root
        self.path = path
        self.field = field
        self.headers = None if headers is None else _checked(headers)
        self.send_as_json = send_as_json
        self.timeout = timeout
        self.retries = retries
        self._queue: PostQueue | None = None

    @property
    def sent(self) -> int:
        return 0 if self._queue is None else self._queue.sent

    @property
    def lost(self) -> int:
        return 0 if self._queue is None else self._queue.lost

    def queue_statistics(self) -> dict[str, QueueStatistics]:
        return {} if self._queue is None else {"posts": self._queue.statistics()}

    async def on_train_begin(self, logs: Any = None) -> None:
        self._queue = PostQueue(
            self.root + self.path,
            self._request_headers(),
            timeout=self.timeout,
            retries=self.retries,
            first_loss=self._log_first_loss,
        )
        await self._queue.open()

    async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self._queue is None:
            return
        try:
            message = strict_json({"epoch": epoch, **(logs or {})})
        except (TypeError, ValueError) as error:
            self._queue.lose(printable(str(error)))
            return
        body = message if self.send_as_json else urlencode({self.field: message})
        self._queue.post(body.encode())

    async def on_train_end(self, logs: Any = None) -> None:
        if self._queue is None:
            return
        try:
            await self._queue.close(_DRAIN)
        finally:
            if self._queue.lost:
                self._warn(self._queue)

    def state_dict(self) -> dict[str, Any]:
        return {"queue": None if self._queue is None else self._queue.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._queue is not None and state["queue"] is not None:
            self._queue.load_state_dict(state["queue"])

    def _request_headers(self) -> dict[str, str]:
        if self.headers is None:
            return _JSON if self.send_as_json else _FORM
        if any(name.lower() == "content-type" for name in self.headers):
            return self.headers
        return {"Content-Type": (_JSON if self.send_as_json else _FORM)["Content-Type"], **self.headers}

    def _log_first_loss(self, why: str) -> None:
        text = "%s: %s. The training goes on; its end tells how many events were lost."
        # On a thread, because a handler writes to a terminal or a disk.
        SerialExecutor("asynccb remote monitor").submit(_log.warning, text, self._complaint(), why)

    def _warn(self, queue: PostQueue) -> None:
        events = "1 event was" if queue.lost == 1 else f"{queue.lost} events were"
        text = f"{self._complaint()}: {events} lost, {queue.sent} received (last reason: {queue.why})."
        warnings.warn(text, UserWarning, stacklevel=3)

    def _complaint(self) -> str:
        return f"Could not reach RemoteMonitor root server at {without_secrets(self.root)}"


def without_secrets(url: str) -> str:
    """Scheme, host, port and path of a URL, safe to print: without user, password, query and fragment."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "(not a URL)"
    host = parts.netloc.rpartition("@")[2]
    if not parts.scheme or not host:
        return "(not a URL)"  # where its parts cannot be told, neither can its secrets
    return printable(f"{parts.scheme}://{host}{parts.path}")


def _checked(headers: Mapping[str, str]) -> dict[str, str]:
    # Values never stand in a message: they are tokens as often as not.
    if not isinstance(headers, Mapping):
        raise ArgumentError("headers", in_words(type(headers).__name__), "a dict of strings, or None")
    for name, value in headers.items():
        if not isinstance(name, str) or not _HEADER_NAME.fullmatch(name):
            raise ArgumentError("headers", in_words(repr(name)), "names of letters, digits and hyphens")
        if not isinstance(value, str) or _NOT_IN_A_HEADER.search(value):
            given = in_words(f"the value of {name!r}")
            raise ArgumentError("headers", given, "strings without line breaks and control characters")
    return dict(headers)
