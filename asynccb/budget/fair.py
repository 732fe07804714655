"""Who computes next: fair shares of the compute tokens, by measured time. A pure state machine.

Deficit round robin in its virtual-time form. Each client has a *level*: the seconds it has computed while
somebody waited, divided by its weight. A free token goes to the waiting client of the lowest level; who holds
one keeps it for a slice and for as long as its level is the lowest. So a step that is much longer than a
slice is paid back: its client misses as many turns as it took. No turn is passed over with a token free.
Who is more than a slice behind, because it is away for a moment in every step, waits for a quarter of a slice
only.

What keeps it fair in the long run:

* Computing is free while nobody waits: nothing is owed for tokens that would have lain idle.
* A newcomer begins where the others are, so that it neither catches up with their past nor waits for it. Who
  was away keeps its distance from the others: no credit grows by being away, and debts are forgotten.
* The common level also rises by the time served, so that an endless stream of short newcomers does not keep a
  client out that owes much.
* A weight that asks for more than one token's worth cannot be served; what it is short of is dropped.

A client may take several tokens. While it is the first in line nobody overtakes it: tokens that become free
are kept for it, the one case in which a token idles though somebody waits, for a slice or one step.
"""

from __future__ import annotations

import math
from bisect import insort
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Client", "Scheduler"]

LOOK = 0.005
"""Seconds after which a client that holds a token looks again at the latest, and how long it keeps it though
somebody waits who is far behind."""
SLICE = 0.05
"""Seconds. To hand a token over costs two changes of threads and cold caches, about 1 ms between trainings
of a 784-256-10 network, which is 9 % at 20 ms and 3 % here."""


class Client:
    """One training in the eyes of the scheduler, which alone writes it.

    Args:
        weight: its share of the time, relative to the others'.
        tokens: how many it computes with.
    """

    __slots__ = (
        "_seen",
        "alongside",
        "batches",
        "contended",
        "counted_from",
        "counted_to",
        "granted",
        "joined",
        "lent",
        "level",
        "look_at",
        "mix",
        "over_at",
        "processor_from",
        "since",
        "spent",
        "ticket",
        "tokens",
        "waited",
        "wanting",
        "weight",
    )

    def __init__(self, weight: float, tokens: int) -> None:
        self.weight = weight
        self.tokens = tokens
        self.joined = False
        self.wanting = False
        """Whether it waits for its turn."""
        self.granted = False
        """Whether it may compute."""
        self.contended = False
        """Whether it is to say after each batch that it has done one."""
        self.lent = False
        """Whether others have its tokens, because it holds them and computes nothing."""
        self.level = 0.0
        self.over_at = 0.0
        """When its slice ends."""
        self.look_at = 0.0
        """When it is to look whether it has to give its token back; its slice may end, or the limit sink."""
        self.since = 0.0
        """When it was granted, or began to wait."""
        self.spent = 0.0
        self.waited = 0.0
        self.ticket = 0
        self._seen = 0.0  # the common level when it went away
        # Its batches since everybody who computes now does; written by its own thread.
        self.mix = -1
        self.alongside = 0
        """How many compute, itself included; 0: not all of them have come to a batch's end yet."""
        self.batches = 0
        self.counted_from = 0.0
        self.processor_from = 0.0
        """Processor time of its thread at ``counted_from``."""
        self.counted_to = 0.0


class Scheduler:
    """Hands out tokens. Not thread-safe; every call may grant, and adds to ``woken`` whose state changed.

    Args:
        tokens: how many may be out at once; ``math.inf``: everybody computes when he likes.
        clock: seconds.
        slice_: seconds that a client keeps its token though others wait.
    """

    def __init__(self, tokens: float, clock: Callable[[], float], slice_: float = SLICE) -> None:
        self.tokens = tokens
        self.limit = tokens
        """How many may be out now; lowered and raised by :meth:`set_limit`."""
        self.watched = False
        """Whether batches are counted though nobody waits."""
        self.out = 0
        self.switches = 0
        """How often a token went to somebody who had waited for it."""
        self.clients: set[Client] = set()
        self.holding: list[Client] = []
        self.woken: list[Client] = []
        self.mixes = 0
        """Counts every change of who computes beside whom."""
        self.arrived = 0
        """Of those that compute now: how many have ended a batch since that change."""
        self._clock = clock
        self._slice = slice_
        self._waiting: list[tuple[float, int, Client]] = []  # lowest level first
        self._tickets = count()
        self._common = 0.0
        self._highest_granted = 0.0
        self._active_weight = 0.0  # of those that hold or wait
        self._settled_at = clock()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def join(self, client: Client) -> None:
        self.clients.add(client)
        client.joined = True
        client.level = client._seen = self._settle_and_common()

    def request(self, client: Client) -> None:
        """Puts it in line, or gives it its token at once. Nothing if it has one, waits already or has
        left."""
        if client.granted or client.wanting or not client.joined:
            return
        common = self._settle_and_common()
        client.level = max(client.level, min(common, client.level + common - client._seen))
        client.since = self._settled_at
        self._active_weight += client.weight
        if not self._waiting and self._fits(client):
            self._grant(client)
        else:
            self._queue(client)
            self._dispatch()
        self._tell()

    def give_back(self, client: Client) -> None:
        """Its token, or its place in line. Nothing if it has neither."""
        if not (client.granted or client.wanting):
            return
        client._seen = self._settle_and_common()
        self._put_down(client)
        self._active_weight -= client.weight
        self._dispatch()
        self._tell()

    def leave(self, client: Client) -> None:
        self.give_back(client)
        client.joined = False
        self.clients.discard(client)
        if not self.clients:
            self._active_weight = 0.0  # whatever rounding has left

    def over(self, client: Client) -> bool:
        """Whether the client is to give its token back here, because its slice is over and somebody else's
        turn has come, or because too many tokens are out."""
        if not client.granted:
            return False
        self._settle()
        now = self._settled_at
        if self._waiting:
            ahead = (client.level - self._waiting[0][0]) * client.weight / client.tokens
            hurry = ahead > self._slice and now >= client.since + LOOK
            if ahead > 0 and (hurry or now >= client.over_at):
                return True
        if now >= client.over_at:
            client.over_at = now + self._slice
        client.look_at = min(client.over_at, now + LOOK)
        return self.out > self.limit and len(self.holding) > 1

    def lend(self, client: Client) -> None:
        """It holds its tokens and computes nothing: others have them until :meth:`came_back`."""
        if not client.granted or client.lent:
            return
        self._settle()
        client.lent = True
        self.out -= client.tokens
        self._mix()
        self._dispatch()
        self._tell()

    def came_back(self, client: Client) -> None:
        """It computes again; more tokens may be out now than there are, until the next one looks."""
        if not client.lent:
            return
        self._settle()
        client.lent = False
        self.out += client.tokens
        self._mix()
        self._tell()

    def set_weight(self, client: Client, weight: float) -> None:
        self._settle()
        if client.granted or client.wanting:
            self._active_weight += weight - client.weight
        client.weight = weight

    def set_limit(self, limit: float) -> None:
        """A client that has more tokens than the limit computes alone."""
        if limit == self.limit:
            return
        self._settle()
        self.limit = limit
        for client in self.holding:
            client.look_at = self._settled_at
        self._mix()
        self._dispatch()
        self._tell()

    # ------------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Writes down what was computed since the last call."""
        now = self._clock()
        passed = now - self._settled_at
        self._settled_at = now
        if not self._waiting or passed <= 0:
            return
        for client in self.holding:
            if client.lent:
                continue
            gained = passed * client.tokens / client.weight
            client.level = max(client.level + gained, self._highest_granted - self._slice)
        if self._active_weight > 0:
            self._common += passed * self.out / self._active_weight

    def _settle_and_common(self) -> float:
        """The level of the fluid ideal, or that of the hindmost if it is further."""
        self._settle()
        lowest = min((client.level for client in self.holding), default=math.inf)
        if self._waiting:
            lowest = min(lowest, self._waiting[0][0])
        if lowest < math.inf:
            self._common = max(self._common, lowest)
        return self._common

    def _fits(self, client: Client) -> bool:
        return self.out == 0 or self.out + client.tokens <= self.limit

    def _queue(self, client: Client) -> None:
        client.wanting = True
        client.ticket = next(self._tickets)
        insort(self._waiting, (client.level, client.ticket, client))

    def _dispatch(self) -> None:
        while self._waiting and self._fits(self._waiting[0][2]):
            client = self._waiting.pop(0)[2]
            client.wanting = False
            client.waited += self._settled_at - client.since
            self.switches += 1
            self._grant(client)
            self.woken.append(client)

    def _grant(self, client: Client) -> None:
        client.granted = True
        client.since = self._settled_at
        client.over_at = self._settled_at + self._slice
        client.look_at = min(client.over_at, self._settled_at + LOOK)
        self.out += client.tokens
        self.holding.append(client)
        self._mix()
        self._highest_granted = max(self._highest_granted, client.level)

    def _put_down(self, client: Client) -> None:
        if client.granted:
            client.granted = client.contended = False
            client.spent += self._settled_at - client.since
            if not client.lent:
                self.out -= client.tokens
            client.lent = False
            self.holding.remove(client)
            self._mix()
        else:
            client.wanting = False
            client.waited += self._settled_at - client.since
            self._waiting.remove((client.level, client.ticket, client))

    def _mix(self) -> None:
        self.mixes += 1
        self.arrived = 0

    def _tell(self) -> None:
        # Who has lent its tokens is to say when it computes again, also where nobody waits any more: else it
        # would go on beside the one that has them.
        lent = any(client.lent for client in self.holding)
        crowded = self.watched and len(self.holding) > 1
        contended = bool(self._waiting) or self.out > self.limit or lent or crowded
        for client in self.holding:
            if contended and not client.contended:
                client.mix = -1  # it has not counted so far
                self.woken.append(client)
            client.contended = contended
