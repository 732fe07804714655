"""Whose turn it is to begin: the line of queued trainings, and the room on each device. No clock, no loop."""

from __future__ import annotations

import heapq
import inspect
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from asynccb.errors import ArgumentError, nearest

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator

    from asynccb.claims import Claim
    from asynccb.prepared import Prepared
    from asynccb.run import Run
    from asynccb.trainer import Trainer

__all__ = ["ANY", "Demand", "Devices", "Line", "Submission"]

ANY = "any"
"""In place of a device's name: whichever has room."""

STALE = 200
"""Entries of a line that are dropped at a time: 0.2 ms."""

_TOLERANCE = 1e-9  # three thirds are a whole


class Demand(NamedTuple):
    """What a training wants of the devices.

    Attributes:
        device: its name, or :data:`ANY`.
        share: how much of it, in (0, 1].
    """

    device: str
    share: float


Room = tuple[str | None, bool]
"""A device, and whether it has room; None: every device that would do is kept for somebody else."""


class Submission:
    """A run that was submitted, until it ends.

    Attributes:
        source: the trainer, or what makes it.
        claim: on its callbacks, and on its model where that is there.
        threads: that it computes with; None: those of the orchestrator.
        demand: what it wants of the devices; None: nothing.
        number: its place in the order of submission.
        state: ``"queued"``, ``"held"`` (queued and paused), ``"building"``, ``"begun"`` or ``"over"``.
    """

    __slots__ = ("claim", "demand", "key", "number", "prepared", "run", "source", "state", "threads")

    def __init__(
        self,
        run: Run,
        source: Trainer | Callable[..., Any],
        prepared: Prepared | None,
        claim: Claim,
        threads: int | None,
        demand: Demand | None,
        number: int,
    ) -> None:
        self.run = run
        self.source: Any = source
        self.prepared = prepared
        self.claim = claim
        self.threads = threads
        self.demand = demand
        self.number = number
        self.state = "queued"
        self.key = (0.0, number)

    def make(self) -> Any:
        """Calls the user's function, with the name of the device if it takes an argument."""
        try:
            parameters = inspect.signature(self.source).parameters.values()
        except (TypeError, ValueError):  # built in, and tells nothing
            return self.source()
        kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
        wanted = any(p.default is p.empty and p.kind in kinds for p in parameters)
        return self.source(self.run.device) if wanted else self.source()

    def forget(self) -> None:
        """What only its beginning needed: the data and the model are the run's now."""
        self.source = self.prepared = None


class Line:
    """Queued trainings: the highest priority first, then in the order of submission.

    One heap for each demand, so that a training that waits for its device holds up nobody who wants none, or
    another one. Entries that were moved or withdrawn stay behind in their heap until they come up.
    """

    def __init__(self) -> None:
        self._heaps: dict[Demand | None, list[tuple[tuple[float, int], Submission]]] = {}
        self._waiting = 0

    def __len__(self) -> int:
        return self._waiting

    def add(self, submission: Submission) -> None:
        submission.state = "queued"
        self._waiting += 1
        self._push(submission)

    def move(self, submission: Submission) -> None:
        """Its priority has changed."""
        self._push(submission)

    def withdraw(self, submission: Submission, state: str) -> None:
        """It does not wait any more."""
        submission.state = state
        self._waiting -= 1

    def tidy(self) -> bool:
        """Drops some of the entries that were moved or withdrawn and have come up. Whether all are dropped;
        else :meth:`next` would have much to do."""
        left = STALE
        for heap in self._heaps.values():
            while left and heap and not _stands(heap[0]):
                heapq.heappop(heap)
                left -= 1
        return left > 0

    def next(self, room: Callable[[Demand, Container[str]], Room]) -> tuple[Submission, str | None] | None:
        """Takes the first one that there is room for, with its device; None: there is none.

        A device that the first one waits for is kept for it: nobody behind it, however little he wants, comes
        before it there.

        Args:
            room: which device a demand is for, kept ones apart, and whether it has room.
        """
        kept: set[str] = set()
        for _, submission in sorted(self._heads(), key=lambda head: head[0]):
            demand = submission.demand
            device, fits = (None, True) if demand is None else room(demand, kept)
            if fits:
                heapq.heappop(self._heaps[demand])
                self.withdraw(submission, "building")
                return submission, device
            if device is not None:
                kept.add(device)
        return None

    def _heads(self) -> Iterator[tuple[tuple[float, int], Submission]]:
        """The first of each heap."""
        for demand in list(self._heaps):
            heap = self._heaps[demand]
            while heap and not _stands(heap[0]):
                heapq.heappop(heap)
            if heap:
                yield heap[0]
            else:
                del self._heaps[demand]

    def _push(self, submission: Submission) -> None:
        submission.key = (-submission.run.priority, submission.number)
        heap = self._heaps.setdefault(submission.demand, [])
        heapq.heappush(heap, (submission.key, submission))
        if len(heap) > 2 * self._waiting + 16:  # more was moved and withdrawn than has come up
            heap[:] = [entry for entry in heap if _stands(entry)]
            heapq.heapify(heap)


def _stands(entry: tuple[tuple[float, int], Submission]) -> bool:
    key, submission = entry
    # The very same key: one that moved there and back has an entry that is equal and stays behind.
    return submission.state == "queued" and submission.key is key


class Devices:
    """How much of each device is taken.

    Args:
        given: names, or a mapping from names to how many whole trainings each has room for (1).

    Raises:
        ArgumentError: neither; a capacity that is no number above 0; the name ``"any"``.
    """

    def __init__(self, given: Iterable[str] | Mapping[str, float] | None) -> None:
        self._capacity = _read_devices(given)
        self._taken = dict.fromkeys(self._capacity, 0.0)

    def demand(self, device: Any) -> Demand | None:
        """What ``submit(device=...)`` asks for: a name, or (name, share); None: nothing.

        Raises:
            ArgumentError: an unknown device; a share that is not in (0, 1], or larger than the device.
        """
        if device is None:
            return None
        name, share = device if isinstance(device, tuple) and len(device) == 2 else (device, 1.0)
        if not self._capacity:
            raise ArgumentError(
                "device", device, "None: this orchestrator has no devices", 'Orchestrator(devices=["cuda:0"])'
            )
        if not isinstance(name, str) or (name != ANY and name not in self._capacity):
            raise ArgumentError(
                "device", device, "a device of the orchestrator", nearest(name, self._capacity)
            )
        if not _is_number(share) or not 0 < share <= 1:
            raise ArgumentError(
                "device", device, 'a name or (name, share) with 0 < share <= 1, as ("cuda:0", 0.5)'
            )
        most = max(self._capacity.values()) if name == ANY else self._capacity[name]
        if share > most:
            raise ArgumentError("device", device, f"at most {most:g} of {name}, which is all of it")
        return Demand(name, float(share))

    def room(self, demand: Demand, kept: Container[str] = ()) -> Room:
        """The device that it gets or waits for: the emptiest where it does not matter which; and whether it
        has room. ``kept``: devices that others wait for."""
        names = self._capacity if demand.device == ANY else [demand.device]
        free = {name: self._capacity[name] - self._taken[name] for name in names if name not in kept}
        if not free:
            return None, False
        best = max(free, key=lambda name: free[name])
        return best, free[best] >= demand.share - _TOLERANCE

    def take(self, device: str, share: float) -> None:
        self._taken[device] += share

    def give_back(self, device: str, share: float) -> None:
        self._taken[device] -= share

    def taken(self) -> dict[str, float]:
        """By name, rounded to a billionth."""
        return {name: round(taken, 9) for name, taken in self._taken.items()}


def _read_devices(given: Any) -> dict[str, float]:
    allowed = "names, or a mapping from names to how many whole trainings each has room for"
    if given is None:
        return {}
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ArgumentError("devices", given, allowed, 'As ["cuda:0", "cuda:1"], or {"cuda:0": 2}')
    names = list(given)
    devices = dict(given) if isinstance(given, Mapping) else dict.fromkeys(names, 1.0)
    if len(devices) < len(names):
        raise ArgumentError(
            "devices", given, "each name once", f"As {{{names[0]!r}: 2}}, if it has room for two"
        )
    for name, capacity in devices.items():
        if not isinstance(name, str) or name == ANY:
            raise ArgumentError("devices", given, f'{allowed}; "{ANY}" means whichever has room')
        if not _is_number(capacity) or not 0 < capacity < math.inf:
            raise ArgumentError("devices", given, f"{allowed}, a number above 0")
    return devices


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
