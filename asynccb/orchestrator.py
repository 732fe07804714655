"""Many trainings at once: slots, priorities, devices, one owner of all that it starts.

::

    submit ──► Line ──► a slot is free ──► the trainer is made, on a thread ──► Run.begin ──► its end
               (queued: a small record)                                                        │
        as_completed, events, stats  ◄─────────────────────────────────────────────────────────┘

All of it lives on the event loop; there is no task of its own. What happens is told by callbacks: a run has
ended, somebody has stopped a queued one, a trainer is made. How the trainings that have begun share the
processors is the budget's affair, which knows nothing of slots.
"""

from __future__ import annotations

import _thread
import asyncio
import contextvars
import inspect
import logging
import time
import weakref
from collections import Counter, deque
from typing import TYPE_CHECKING, Any, Literal

from asynccb.admission import Devices, Line, Submission
from asynccb.all_events import AllEvents
from asynccb.budget import SwitchInterval, Wish, budget, usable_cpus
from asynccb.claims import Claim
from asynccb.completed import Completed
from asynccb.ending import Outcome, of_error
from asynccb.engines.pool import ThreadPoolEngine
from asynccb.errors import ArgumentError, OrchestratorClosed, RunCancelled, SelfWait
from asynccb.events import RunChanged
from asynccb.health import LagStatistics, LoopWatch, watch_loop
from asynccb.overview import Overview
from asynccb.prepared import REPLAY, FitKeywords, prepare
from asynccb.run import Run, inside_runs, new_name
from asynccb.statistics import OrchestratorStatistics
from asynccb.trainer import Trainer
from asynccb.training.arguments import check_count, check_seconds
from asynccb.training.control import Limits
from asynccb.wiring import tell

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Mapping
    from types import TracebackType
    from typing import Unpack

    from asynccb.bus.readers import EventStream
    from asynccb.overview import Verbosity

__all__ = ["Orchestrator"]

logger = logging.getLogger("asynccb")

LENDS_AFTER = 0.1
"""Seconds that a training waits (for data, a pause, a callback) before another one may use its slot."""
STEP = 0.001
"""Seconds of the event loop that are taken at a time where there is much to do."""


class Orchestrator:
    """Runs as many trainings as you submit, each equal to the byte to the same training alone::

        async with Orchestrator() as orch:
            for rate in rates:
                orch.submit(lambda rate=rate: Trainer(build(rate)), x, y, epochs=20, name=f"lr-{rate}")
            async for run in orch.as_completed():
                print(run.name, run.outcome, run.history.history["val_loss"][-1])

    Leaving the block waits for all of them, paused ones are resumed. A block that raises, or is cancelled,
    cancels them, and waits until they have ended, each after the batch under way and within its grace period.
    A training that fails touches no other: its exception is on its run.

    While the block is open linear algebra computes with ``cpu_threads`` threads in this process, because
    results depend on their number, and because several multi-threaded calls hold each other up; trainings
    that were under way before it opened keep their number, and so do those that begin before these have
    ended, which is said in a warning. How trainings share the processors is told in :mod:`asynccb.budget`.

    Args:
        slots: trainings that are alive at a time, at least 1. None: twice as many as can compute, which are
            the processors that this process may use (affinity and cgroup quota are looked at) divided by
            ``cpu_threads``: one begins or ends while another computes. A training that waits for longer than
            0.1 s (for data, in a pause, for a callback) lends its slot to the next one; so up to twice as
            many models as there are slots may be in memory.
        cpu_threads: threads of linear algebra for each training, 1 up to the processors. None: 1.
        devices: names of devices that trainings may ask for, or a mapping from names to how many whole
            trainings each has room for. The orchestrator only counts; to use a device is the model's affair.
        on_failure: ``"collect"``: nothing is raised. ``"cancel_others"``: the first training that fails
            cancels all others, and the end of the block raises its exception, also where the block has
            awaited one of the others and would raise that one's RunCancelled.
        switch_interval: seconds to which ``sys.setswitchinterval`` is lowered while the block is open, so
            that a service on the same loop answers soon beside models that compute in Python; None leaves it
            alone.
        replay: events kept for readers that come late.
        keep: ended runs that are remembered, for :attr:`runs` and :meth:`as_completed`, each with its model.
        verbose: what is shown of all trainings together. 0: nothing. 1: on a terminal a row for each live one
            and one of totals, which leave a line for each that fails and one of totals; elsewhere as 2. 2: a
            line for each that ends, and one of totals. ``"auto"``: 1 on a terminal, else 0, so that a service
            is silent. What a training shows of itself is its own ``verbose``.

    Raises:
        ArgumentError: names the argument, what was given and what is allowed.
    """

    def __init__(
        self,
        slots: int | None = None,
        cpu_threads: int | None = None,
        devices: Iterable[str] | Mapping[str, float] | None = None,
        *,
        on_failure: Literal["collect", "cancel_others"] = "collect",
        switch_interval: float | None = 0.001,
        verbose: Verbosity = "auto",
        replay: int = REPLAY,
        keep: int = 1000,
    ) -> None:
        cpus = usable_cpus()
        self._threads = _check_threads("cpu_threads", cpu_threads, cpus) or 1
        self.slots = check_count("slots", slots, least=1, none=True) or 2 * max(1, cpus // self._threads)
        self._cpus = cpus
        self._devices = Devices(devices)
        if on_failure not in ("collect", "cancel_others"):
            raise ArgumentError("on_failure", on_failure, '"collect" or "cancel_others"')
        self._cancels_others = on_failure == "cancel_others"
        seconds = check_seconds("switch_interval", switch_interval)
        self._switch_interval = SwitchInterval(seconds) if seconds else None
        self._events = AllEvents(check_count("replay", replay, least=1), self._begun, self._moved)
        self._keep_ended = check_count("keep", keep, least=0)
        self._overview = Overview(verbose, lambda: self.stats, self._begun)
        self._engine = ThreadPoolEngine(self.slots)
        self._grace = Limits().grace
        self._state: Literal["new", "open", "closing", "closed"] = "new"
        self._line = Line()
        self._submitted = 0
        self._names: dict[str, Submission] = {}
        self._live: dict[Submission, None] = {}
        self._building: set[Submission] = set()
        self._finished: dict[str, Run] = {}
        self._outcomes: Counter[str] = Counter()
        self._first_failure: Outcome | None = None
        self._computed = 0.0
        self._filling: asyncio.Handle | None = None
        self._looking: asyncio.TimerHandle | None = None
        self._giving_up: asyncio.TimerHandle | None = None
        self._cancelling: deque[Submission] | None = None
        self._cancel_reason = ""
        self._lag: LoopWatch | None = None
        self._news = asyncio.Event()
        self._watchers: weakref.WeakSet[Completed] = weakref.WeakSet()

    # The block ----------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Orchestrator:
        if self._state != "new":
            raise OrchestratorClosed("an orchestrator is opened once: make another one")
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()
        self._events.open(self._context)
        self._overview.open(self._context)
        self._state = "open"
        self._wish = budget().wish(threads=self._threads)
        self._lag = watch_loop(self._loop, "the trainings of an orchestrator")
        if self._switch_interval is not None:
            self._switch_interval.hold()
        # Where the loop is closed under the block nobody ever leaves it.
        held = self._wish, self._switch_interval
        self._dropped = weakref.finalize(self, _thread.start_new_thread, _let_go, held)
        self._dropped.atexit = False
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._loop_is_gone():
            # Nobody can be waited for; the threads of the trainings notice by themselves.
            self._let_go()
            self._engine.close()
            return
        self._check_waiter("the end of its block")
        if error is None:
            self._resume_some(deque(self._names.values()))
        else:
            self._cancel_all(f"the block raised {kind.__name__ if kind else 'an exception'}")
        cancelled: asyncio.CancelledError | None = None
        while self._names or self._building or self._events.busy:
            self._news.clear()
            try:
                await self._news.wait()
            except asyncio.CancelledError as cancel:
                cancelled = cancelled or cancel
                self._cancel_all("the task was cancelled while it waited for the trainings")
        self._close()
        await self._overview.close()
        if cancelled is not None and not isinstance(error, asyncio.CancelledError):
            raise cancelled
        if self._first_failure is not None and (error is None or self._is_a_consequence(error)):
            self._first_failure.raise_exception()

    def _is_a_consequence(self, error: BaseException) -> bool:
        """Whether the block awaited runs that were cancelled because another one failed, in a task group
        perhaps."""
        if isinstance(error, BaseExceptionGroup):
            return all(map(self._is_a_consequence, error.exceptions))
        return isinstance(error, RunCancelled) and error.reason == self._cancel_reason

    def _close(self) -> None:
        self._state = "closed"
        for handle in (self._filling, self._looking, self._giving_up):
            if handle is not None:
                handle.cancel()
        self._let_go()
        self._engine.close()
        assert self._lag is not None
        self._lag.close()
        self._events.close()

    def _let_go(self) -> None:
        self._dropped.detach()
        _let_go(self._wish, self._switch_interval)

    def _loop_is_gone(self) -> bool:
        """Whether the block is left because the loop was closed in its midst and its coroutine dropped."""
        try:
            return asyncio.get_running_loop() is not self._loop and self._loop.is_closed()
        except RuntimeError:
            return True

    # What can be asked --------------------------------------------------------------------------------------

    def submit(
        self,
        trainer: Trainer | Callable[..., Trainer],
        x: Any = None,
        y: Any = None,
        *,
        name: str | None = None,
        priority: float = 0,
        threads: int | None = None,
        device: str | tuple[str, float] | None = None,
        **fit: Unpack[FitKeywords],
    ) -> Run:
        """Queues a training, and answers the handle on it at once.

        A queued run can be awaited, streamed, paused (it does not begin then), stopped and cancelled (it ends
        at once, and none of its hooks runs), and its ``priority`` can be set.

        Args:
            trainer: a :class:`~asynccb.Trainer`; or a function that makes one, called on a thread when its
                turn comes, so that ten thousand queued trainings are not ten thousand models. A function that
                takes an argument gets the name of the device.
            x, y, fit: what :meth:`asynccb.Trainer.fit` takes. Unless given, ``verbose`` is 0 and ``replay``
                1,024.
            name: not that of a queued or live run of this orchestrator; None: ``run-<n>``.
            priority: see :attr:`asynccb.Run.priority`.
            threads: that the training computes with, where it has threads of its own beside those of linear
                algebra: it waits until as many are free. None: ``cpu_threads``.
            device: the name of a device, ``"any"``, or either with a share of it, as ``("cuda:0", 0.5)``; the
                training waits until there is room. The run has its name as ``run.device``.

        Raises:
            ArgumentError: names the argument, what was given and what is allowed. What only shows when the
                trainer is made, or the data is looked at, is raised by whoever awaits the run.
            ModelBusy, CallbackBusy: in another run, a queued one perhaps.
            OrchestratorClosed: before or behind the block, or when all are being cancelled.
            RuntimeError: on another event loop, or on none.
        """
        self._check_open()
        if not isinstance(trainer, Trainer) and (
            not callable(trainer) or inspect.iscoroutinefunction(trainer)
        ):
            raise ArgumentError(
                "trainer", trainer, "a Trainer, or a function that makes one", "Trainer(model)"
            )
        if name is not None and not isinstance(name, str):
            raise ArgumentError("name", name, "a str, or None")
        if name in self._names:
            raise ArgumentError(
                "name", name, f"a name that no other run has: one is {self._names[name].run.state}"
            )
        needed = _check_threads("threads", threads, self._cpus)
        demand = self._devices.demand(device)
        keywords: dict[str, Any] = {"verbose": 0, "replay": 1024, **fit}
        prepared = prepare(x, y, **keywords)
        while not name or name in self._names:
            name = new_name()
        run = Run(
            name,
            prepared.history,
            replay=prepared.replay,
            priority=priority,
            changed=self._run_changed,
            watched=self._watches,
        )
        model = trainer.model if isinstance(trainer, Trainer) else None
        claim = Claim(run.name, model, [callback for callback, _ in prepared.hooked])
        self._submitted += 1
        submission = Submission(run, trainer, prepared, claim, needed, demand, self._submitted)
        self._names[run.name] = submission
        self._line.add(submission)
        self._events.tell(run, RunChanged("queued"))
        self._overview.submitted()
        self._fill_soon()
        return run

    def as_completed(self) -> AsyncIterator[Run]:
        """The runs in the order in which they end, until none is left: those that have ended already (the
        newest ``keep`` of them), and all that end while you iterate.

        Raises:
            SelfWait: iterated in a hook of one of the runs, which would wait for itself.
        """
        self._check_loop()
        watcher = Completed(
            self._finished.values(),
            lambda: self._names,
            lambda: self._check_waiter("the end of all trainings"),
        )
        self._watchers.add(watcher)
        return watcher

    def events(self, since: int | None = None) -> EventStream:
        """The events of all runs, as :class:`~asynccb.events.RunEvent`, until the block is left.

        In the order in which they come to the loop; those of one run in theirs. Besides what a run's own
        stream has, each run has ``RunChanged("queued")``, ``RunChanged("running")`` and, last, its outcome. A
        slow reader never slows anybody: where events have left the ring (``replay``) it gets a
        :class:`~asynccb.Gap`. Batch events are only built while somebody reads.

        Args:
            since: the ``seq`` of the first event wanted; None: from now on.
        """
        self._check_loop()
        return self._events.stream(since, lambda: self._check_waiter("the events of all"))

    def __aiter__(self) -> EventStream:
        return self.events()

    @property
    def runs(self) -> dict[str, Run]:
        """By name, in the order of submission: all that are queued or alive, and before them the newest
        ``keep`` that have ended, each of which has its model, for a snapshot of its final state. A copy."""
        return self._finished | {name: submission.run for name, submission in self._names.items()}

    @property
    def stats(self) -> OrchestratorStatistics:
        """Totals so far. May be read on any thread."""
        live = list(self._live)
        return OrchestratorStatistics(
            self.slots,
            len(self._names) - sum(submission.state != "over" for submission in live),
            len(live),
            dict(self._outcomes),
            self._computed + sum(submission.run.computed for submission in live),
            self._devices.taken(),
            budget().statistics(),
            LagStatistics(0.0, 0.0, 0.0, 0) if self._lag is None else self._lag.statistics(),
        )

    # From the line into a slot ------------------------------------------------------------------------------

    def _begun(self) -> list[Run]:
        return [submission.run for submission in self._live if submission.state == "begun"]

    def _moved(self) -> None:
        """Something has come to its end that the block may be waiting for."""
        self._news.set()

    def _fill_soon(self) -> None:
        if self._filling is None:
            self._filling = self._loop.call_soon(self._fill, context=self._context)

    def _fill(self) -> None:
        self._filling = None
        until = time.monotonic() + STEP
        if not self._line.tidy():
            self._fill_soon()
            return
        while self._cancelling is None and len(self._live) < self.slots + self._lent():
            found = self._line.next(self._devices.room)
            if found is None:
                break
            self._take_slot(*found)
            if time.monotonic() >= until:
                self._fill_soon()
                return
        if len(self._line) and self._looking is None and self._state != "closed":
            # Whether a training has come to wait shows on its thread; nobody tells.
            self._looking = self._loop.call_later(LENDS_AFTER, self._look_again, context=self._context)

    def _look_again(self) -> None:
        self._looking = None
        self._fill()

    def _lent(self) -> int:
        """Slots whose trainings wait for something."""
        if not len(self._line):
            return 0
        waiting = sum(submission.run.waits_for > LENDS_AFTER for submission in self._live)
        return min(self.slots, waiting)

    def _take_slot(self, submission: Submission, device: str | None) -> None:
        run = submission.run
        self._live[submission] = None
        if device is not None and submission.demand is not None:
            run.device = device
            self._devices.take(device, submission.demand.share)
        if isinstance(submission.source, Trainer):
            self._begin(submission, submission.source)
            return
        self._building.add(submission)
        run.be_made()
        try:
            run.context.copy().run(
                self._engine.start, lambda: self._build(submission), f"asynccb {run.name} builds"
            )
        except BaseException as error:  # no thread to be had
            self._built(submission, None, error)

    def _build(self, submission: Submission) -> None:
        """On a thread."""
        made, problem = None, None
        try:
            with budget().threads_here():  # a model that is made with others would be another one
                made = submission.make()
        except BaseException as error:  # a user's function may raise anything; its run says so
            problem = error
        tell(self._loop, self._built, submission, made, problem)
        if self._loop.is_closed():
            submission.run.over()

    def _built(self, submission: Submission, made: Any, problem: BaseException | None) -> None:
        self._building.discard(submission)
        self._news.set()
        if submission.state == "over":
            # It was ended meanwhile; its model was being made all the same, in its slot and on its device.
            self._leave_slot(submission)
            return
        if problem is None and not isinstance(made, Trainer):
            problem = ArgumentError(
                "trainer", submission.source, f"a function that makes a Trainer, not a {type(made).__name__}"
            )
        if problem is not None:
            self._end_early(submission, of_error(problem))
        else:
            self._begin(submission, made)

    def _begin(self, submission: Submission, trainer: Trainer) -> None:
        run = submission.run
        try:
            assert submission.prepared is not None
            order = trainer.order(submission.prepared, self._engine)._replace(threads=submission.threads)
            self._events.begins(run)
            run.begin(order, submission.claim)
        except Exception as error:
            self._end_early(submission, of_error(error))
            return
        trainer.last_run = run
        submission.state = "begun"
        submission.forget()
        self._events.tell(run, RunChanged("running"))

    # The end of a run ---------------------------------------------------------------------------------------

    def _run_changed(self, run: Run) -> None:
        """It has ended; or somebody has asked something of a queued one."""
        submission = self._names.get(run.name)
        if submission is None or submission.run is not run:
            return
        # An outcome alone is not the end: what was asked of a queued one may come as late as that.
        if run.ended:
            self._over(submission)
        elif run.end_asked is not None and submission.state != "begun":
            self._end_early(submission, run.end_asked)
        elif submission.state == "queued" and run.pause_asked:
            self._line.withdraw(submission, "held")
        elif submission.state == "held" and not run.pause_asked:
            self._line.add(submission)
            self._fill_soon()
        elif submission.state == "queued":
            self._line.move(submission)

    def _end_early(self, submission: Submission, outcome: Outcome) -> None:
        if submission.state == "queued":
            self._line.withdraw(submission, "over")
        submission.state = "over"
        submission.claim.let_go()
        submission.claim.let_go()
        submission.run.end_early(outcome)  # which tells `_run_changed`

    def _over(self, submission: Submission) -> None:
        run = submission.run
        submission.state = "over"
        submission.forget()
        del self._names[run.name]
        if submission not in self._building:
            self._leave_slot(submission)
        assert run.outcome is not None
        self._outcomes[run.outcome] += 1
        self._computed += run.computed
        self._keep(run)
        self._events.ended(run)
        self._overview.ended(run)
        if run.outcome == "failed":
            self._failed(run)
        self._fill_soon()
        self._moved()
        for watcher in list(self._watchers):
            watcher.add(run)

    def _leave_slot(self, submission: Submission) -> None:
        run = submission.run
        if submission in self._live:
            del self._live[submission]
            if run.device is not None and submission.demand is not None:
                self._devices.give_back(run.device, submission.demand.share)
            self._fill_soon()

    def _keep(self, run: Run) -> None:
        self._finished.pop(run.name, None)
        self._finished[run.name] = run
        if len(self._finished) > self._keep_ended:
            del self._finished[next(iter(self._finished))]

    def _failed(self, run: Run) -> None:
        if self._cancels_others and self._first_failure is None:
            self._first_failure = run.ended_as
            self._cancel_all(f"{run.name} failed")

    def _watches(self) -> bool:
        return self._cancels_others or bool(self._watchers)

    def _resume_some(self, submissions: deque[Submission]) -> None:
        until = time.monotonic() + STEP
        while submissions:
            run = submissions.popleft().run
            if run.pause_asked and self._cancelling is None:
                run.resume()
                self._run_changed(run)
            if time.monotonic() >= until:
                self._loop.call_soon(self._resume_some, submissions, context=self._context)
                return

    def _cancel_all(self, reason: str) -> None:
        """Those that are alive at once; of the queued ones as many at a time as the loop can bear."""
        if self._cancelling is not None:
            return
        self._cancel_reason = reason
        self._state = "closing"
        self._cancelling = deque(self._names.values())  # the live ones once more, which does nothing
        for submission in list(self._live):
            submission.run.cancel(reason)
        self._giving_up = self._loop.call_later(self._grace, self._give_up_building)
        self._cancel_some()

    def _give_up_building(self) -> None:
        if self._building:
            names = ", ".join(submission.run.name for submission in self._building)
            logger.error(
                "the functions that make the trainers of %s do not return; they are left to themselves", names
            )
            self._building.clear()
            self._news.set()

    def _cancel_some(self) -> None:
        until = time.monotonic() + STEP
        assert self._cancelling is not None
        while self._cancelling:
            run = self._cancelling.popleft().run
            run.cancel(self._cancel_reason)
            self._run_changed(run)  # now: told later, all of these would end in one turn of the loop
            if time.monotonic() >= until:
                self._loop.call_soon(self._cancel_some, context=self._context)
                return

    # What is refused ----------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._state == "new":
            raise OrchestratorClosed("`async with Orchestrator() as orch:` opens it")
        self._check_loop()
        if self._state != "open":
            raise OrchestratorClosed(f"the orchestrator is {self._state}: it takes no more trainings")

    def _check_loop(self) -> None:
        if self._state == "new":
            raise OrchestratorClosed("`async with Orchestrator() as orch:` opens it")
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError("the orchestrator belongs to another event loop; use it there")

    def _check_waiter(self, what: str) -> None:
        self._check_loop()
        for run in inside_runs():
            submission = self._names.get(run.name)
            if submission is not None and submission.run is run:
                raise SelfWait(
                    f"a hook or source of {run.name} waits for {what}, which waits for that hook to end"
                )


def _let_go(wish: Wish, switch_interval: SwitchInterval | None) -> None:
    """Not to be called by the garbage collector: it may come while its thread has one of the locks."""
    wish.withdraw()
    if switch_interval is not None:
        switch_interval.let_go()


def _check_threads(name: str, threads: Any, cpus: int) -> int | None:
    if threads is None:
        return None
    count = check_count(name, threads, least=1)
    if count > cpus:
        raise ArgumentError(name, threads, f"at most {cpus}, the processors that this process may use")
    return count
