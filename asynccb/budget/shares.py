"""The process's one budget: who computes now, and with how many threads."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from asynccb.budget.blas import Pools, blas_threads, put_back_here
from asynccb.budget.blocked import Pulse
from asynccb.budget.cpus import usable_cpus
from asynccb.budget.fair import SLICE, Client, Scheduler
from asynccb.budget.learning import Learning
from asynccb.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Budget", "BudgetStatistics", "Share", "Wish", "budget", "cpu_budget"]

logger = logging.getLogger(__name__)


class BudgetStatistics(NamedTuple):
    """The process's budget at one moment."""

    cpus: int
    """That this process may use."""
    blas_threads: int
    """That each training computes with."""
    tokens: float
    """How many trainings may compute at once; infinite: as many as there are."""
    in_use_limit: float
    """The same, as far as it pays: what was learned."""
    holding: int
    """Trainings that compute."""
    waiting: int
    """Trainings that wait for their turn."""
    switches: int
    """How often a training had its turn after waiting for it, since the process began."""
    learned: float | None
    """Progress in all with all tokens out over that with one; None: not measured."""


class Wish:
    """What somebody asks of the budget, until it is withdrawn."""

    def __init__(self, budget: Budget, threads: int | None, tokens: float | None) -> None:
        self.threads = threads
        self.tokens = tokens
        self._budget = budget

    def withdraw(self) -> None:
        """Legal any number of times, on any thread."""
        self._budget._withdraw(self)


class Share:
    """One training's part of the budget, between :meth:`Budget.join` and :meth:`leave`.

    The training's thread calls :meth:`request`, waits until :attr:`granted`, computes, and says
    :meth:`batch_done` after each batch for as long as :attr:`contended`. Everything may be called from any
    thread and in any state: what has no meaning there does nothing.
    """

    def __init__(self, budget: Budget, client: Client, wake: Callable[[], None]) -> None:
        self._budget = budget
        self._client = client
        self._wake = wake
        self._pulse = Pulse(budget._clock)
        self._thread = threading.get_ident()
        self._found: list[tuple[Any, int]] = []

    @property
    def granted(self) -> bool:
        """Whether the training may compute."""
        return self._client.granted

    @property
    def contended(self) -> bool:
        """Whether :meth:`batch_done` is to be called after each batch."""
        return self._client.contended

    def request(self) -> None:
        """Takes a token, or stands in line for one. When it is granted ``wake`` is called."""
        self._budget._do(self._budget._scheduler.request, self._client)

    def give_back(self) -> None:
        """Gives the token back, or leaves the line."""
        self._budget._do(self._budget._scheduler.give_back, self._client)

    def look_at_others(self) -> None:
        """To be called now and then by who waits for his turn: one that holds a token and computes nothing,
        because its batch waits for something, lends it."""
        self._budget._lend_of_blocked()

    def leave(self) -> None:
        """For good. The last one to leave restores the threads, unless a wish holds them."""
        self._budget._leave(self)

    def batch_done(self) -> bool:
        """Counts a batch.

        Returns:
            Whether the token is to be given back now, and requested again.
        """
        return self._budget._batch_done(self._client)

    @property
    def weight(self) -> float:
        """Its part of the time, relative to the weights of the others."""
        return self._client.weight

    @weight.setter
    def weight(self, weight: float) -> None:
        self._budget._set_weight(self._client, _checked_weight(weight))

    @property
    def spent(self) -> float:
        """Seconds with the token."""
        return self._budget._seconds(self._client)[0]

    @property
    def waited(self) -> float:
        """Seconds in line for it."""
        return self._budget._seconds(self._client)[1]


class Budget:
    """Compute tokens and threads, for all trainings of the process. Thread-safe.

    There are as many tokens as CPUs divided by threads. The number of threads is what the first wish says,
    else what was found, and does not change while anybody has a share: results depend on it to the last bit.

    Args:
        clock: seconds.
        pools: the libraries whose threads are set.
        cpus: how many CPUs there are.
        found_threads: how many threads the libraries have when nobody wishes anything.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        pools: Pools | None = None,
        cpus: Callable[[], int] = usable_cpus,
        found_threads: Callable[[], int | None] = blas_threads,
    ) -> None:
        self._lock = threading.Lock()
        self._clock = clock
        self._pools = pools or Pools()
        self._count_cpus = cpus
        self._found_threads = found_threads
        self._wishes: list[Wish] = []
        self._shares: dict[Client, Share] = {}
        self._scheduler = Scheduler(1, clock, SLICE)
        self._learning: Learning | None = None
        self._cpus = 0
        self._threads = 0
        self._counted_at = -math.inf

    # Wishes -----------------------------------------------------------------------------------------------

    def wish(self, threads: int | None = None, tokens: float | None = None) -> Wish:
        """Asks for a number of threads, of tokens, or of both.

        A wish holds at once, or from the next moment at which no training has a share; of several that differ
        the first counts. Either is said in a warning.

        Raises:
            ArgumentError: ``threads`` is no whole number from 1 to the number of CPUs, or ``tokens`` none
                from 1 on, nor infinite.
        """
        cpus = self._count_cpus()
        if threads is not None and not (_whole(threads) and 1 <= threads <= cpus):
            raise ArgumentError("threads", threads, f"a whole number from 1 to {cpus}, the CPUs there are")
        if tokens is not None and not ((_whole(tokens) and tokens >= 1) or tokens == math.inf):
            raise ArgumentError("tokens", tokens, "a whole number from 1 on, or math.inf for no limit")
        wish = Wish(self, threads, tokens)
        with self._lock:
            complaint = self._complaint(wish)
            self._wishes.append(wish)
            self._settle()
        if complaint:
            logger.warning(complaint)
        return wish

    def _complaint(self, wish: Wish) -> str:
        for name, plural in (("threads", "threads for each training"), ("tokens", "compute tokens")):
            asked = getattr(wish, name)
            if asked is None:
                continue
            earlier = self._wished(name)
            if earlier == asked:
                continue
            if earlier is not None:
                return (
                    f"{asked} {plural} were asked for, but {earlier} asked for earlier stay in force until "
                    "that is withdrawn and no training is active"
                )
            force = self._threads if name == "threads" else self._scheduler.tokens
            if self._shares and force != asked:
                return (
                    f"{asked} {plural} were asked for while trainings are active with {force}: the number "
                    "changes when the last of them has ended, because results depend on it"
                )
        return ""

    def _withdraw(self, wish: Wish) -> None:
        with self._lock:
            if wish in self._wishes:
                self._wishes.remove(wish)
                self._settle()

    def _wished(self, name: str) -> Any:
        return next((asked for wish in self._wishes if (asked := getattr(wish, name)) is not None), None)

    # Shares -----------------------------------------------------------------------------------------------

    def join(self, wake: Callable[[], None], *, weight: float = 1.0, threads: int | None = None) -> Share:
        """A share for the training of the calling thread, before it computes anything.

        Args:
            wake: called, on any thread, when the share was granted, or when its thread is to look at
                :attr:`Share.contended` again.
            weight: its part of the time, relative to the weights of the others.
            threads: CPUs that it computes with if more than the others; it takes so many more tokens.
        """
        weight = _checked_weight(weight)
        with self._lock:
            self._set_up()
            per_token = max(1, self._threads)
            wanted = 1 if threads is None else max(1, threads // per_token)
            client = Client(weight, int(min(wanted, self._scheduler.tokens)))
            share = Share(self, client, wake)
            share._found = self._pools.hold_here()
            self._shares[client] = share
            self._scheduler.join(client)
            if self._learning is not None:
                self._learning.look_again(self._clock())
        return share

    @contextmanager
    def threads_here(self) -> Iterator[None]:
        """What the calling thread computes in the block it computes with the threads that hold in the
        process now; for what is not a training yet."""
        with self._lock:
            found = self._pools.hold_here()
        try:
            yield
        finally:
            put_back_here(found)

    def _set_up(self) -> None:
        """Puts the wishes in where nobody has a share; else reaches what was loaded meanwhile."""
        if self._shares:
            if self._pools.threads is not None:
                self._pools.hold(self._pools.threads)
            return
        self._settle()
        self._count()

    def _count(self) -> None:
        now = self._clock()
        if now - self._counted_at >= RECOUNT:
            self._counted_at = now
            self._cpus = self._count_cpus()
        self._threads = self._wished("threads") or min(self._found_threads() or self._cpus, self._cpus)
        tokens = self._wished("tokens") or max(1, self._cpus // self._threads)
        learns = tokens not in (1, math.inf) and self._wished("tokens") is None
        if tokens != self._scheduler.tokens or learns is not (self._learning is not None):
            self._scheduler.tokens = self._scheduler.limit = tokens
            self._scheduler.watched = learns
            self._learning = Learning(tokens, now) if learns else None

    def _leave(self, share: Share) -> None:
        with self._lock:
            if self._shares.pop(share._client, None) is None:
                return
            self._scheduler.leave(share._client)
            if self._learning is not None:
                self._learning.forget(share._client)
                self._learning.look_again(self._clock())
            woken = self._woken()
            if share._found and threading.get_ident() == share._thread:
                put_back_here(share._found)
            self._settle()
            share._wake = _nothing  # it leads to a training that is over
        for wake in woken:
            wake()

    def _settle(self) -> None:
        """Puts the threads that are wished in, or back what was found, where nobody has a share."""
        if self._shares:
            return
        wished = self._wished("threads")
        if wished is not None:
            # Now, and not when the next training comes: models are made before that, by linear algebra too.
            self._pools.hold(wished)
        elif self._pools.threads is not None:
            self._pools.restore()

    def _do(self, verb: Callable[[Client], None], client: Client) -> None:
        with self._lock:
            verb(client)
            woken = self._woken()
        for wake in woken:  # outside of the lock: it takes the lock of somebody's control
            wake()

    def _woken(self) -> list[Callable[[], None]]:
        if not self._scheduler.woken:
            return []
        clients = dict.fromkeys(self._scheduler.woken)
        self._scheduler.woken.clear()
        return [self._shares[client]._wake for client in clients if client in self._shares]

    def _batch_done(self, client: Client) -> bool:
        # The way of nearly all batches takes no lock.
        now = self._clock()
        if client.mix == self._scheduler.mixes and client.alongside:
            client.batches += 1
            client.counted_to = now
            if now < client.look_at:
                return False
        processor = time.thread_time()
        with self._lock:
            self._scheduler.came_back(client)
            self._count_batches(client, now, processor)
            over = self._scheduler.over(client)
            woken = self._woken()
        for wake in woken:
            wake()
        return over

    def _count_batches(self, client: Client, now: float, processor: float) -> None:
        learning, scheduler = self._learning, self._scheduler
        if learning is None or not client.granted:
            client.mix, client.alongside = scheduler.mixes, 1
            return
        if client.batches:
            seconds = client.counted_to - client.counted_from
            # Known where no batch has ended since that was not counted.
            used = processor - client.processor_from if client.counted_to == now else None
            learning.record(client, client.alongside, seconds, client.batches, used)
            client.batches = 0
        client.counted_from, client.processor_from = now, processor
        if client.mix != scheduler.mixes:
            client.mix, client.alongside = scheduler.mixes, 0
            scheduler.arrived += 1
        # A thread that was granted a token is not at once under way: its neighbours' first batches are done
        # alone.
        if scheduler.arrived == len(scheduler.holding):
            client.alongside = len(scheduler.holding)
        learning.look(now)
        scheduler.set_limit(scheduler.tokens if learning.all_tokens else 1)

    def _lend_of_blocked(self) -> None:
        """Called by who waits, so that a training that computes nothing does not keep its token from him."""
        with self._lock:
            for client in list(self._scheduler.holding):
                share = self._shares.get(client)
                seen_at = max(client.since, client.counted_from, client.counted_to)
                if share is not None and share._pulse.is_blocked(seen_at):
                    self._scheduler.lend(client)
            woken = self._woken()
        for wake in woken:
            wake()

    def _set_weight(self, client: Client, weight: float) -> None:
        with self._lock:
            self._scheduler.set_weight(client, weight)

    def _seconds(self, client: Client) -> tuple[float, float]:
        with self._lock:
            since = self._clock() - client.since
            return client.spent + since * client.granted, client.waited + since * client.wanting

    def statistics(self) -> BudgetStatistics:
        with self._lock:
            if not self._shares:
                self._count()
            scheduler = self._scheduler
            return BudgetStatistics(
                cpus=self._cpus,
                blas_threads=self._threads,
                tokens=scheduler.tokens,
                in_use_limit=scheduler.limit,
                holding=len(scheduler.holding),
                waiting=scheduler.waiting,
                switches=scheduler.switches,
                learned=None if self._learning is None else self._learning.ratio,
            )


def _nothing() -> None:
    """Nobody is to be woken."""


RECOUNT = 1.0
"""Seconds after which the CPUs are counted anew, which takes about 0.1 ms."""


def _whole(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


def _checked_weight(weight: float) -> float:
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
        raise ArgumentError("weight", weight, "a finite number above 0")
    return float(weight)


_process = Budget()


def budget() -> Budget:
    """That of this process."""
    return _process


def _after_fork() -> None:
    # The child has none of the threads that hold the lock and the tokens: it would wait for them for ever.
    global _process
    _process = Budget(pools=_process._pools)


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def cpu_budget(threads: int | None = None, tokens: float | None = None) -> Iterator[None]:
    """Asks for a number of threads, of compute tokens, or of both, for all trainings of this process.

    It holds for trainings that begin inside of the block, from a moment on at which none is active: the
    number of threads never changes under a training, because results depend on it to the last bit. Of blocks
    and orchestrators that ask for different numbers the first counts. Both cases are warned of.

    Args:
        threads: that the linear algebra computes with, in each training.
        tokens: how many trainings compute at once; ``math.inf``: nobody ever waits for anybody, and the
            operating system shares the CPUs out. By default CPUs divided by threads, or one where the budget
            finds that one at a time is quicker.

    Raises:
        ArgumentError: more threads than CPUs, or no whole number from 1 on.
    """
    wish = budget().wish(threads, tokens)
    try:
        yield
    finally:
        wish.withdraw()
