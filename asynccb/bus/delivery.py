"""One consumer for each callback, with one long-lived task from the first entry on: runs its beside-hooks in
order, one at a time, and lets no exception out."""

from __future__ import annotations

import asyncio
import weakref
from itertools import repeat
from operator import length_hint
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

from asynccb.bus.mailbox import HOOKS, hook_of, marker

if TYPE_CHECKING:
    import contextvars
    from collections.abc import Awaitable, Callable

    from asynccb.bus.mailbox import Entry, Mailbox, Mark, Work
    from asynccb.training.snapshot import Snapshot

__all__ = ["Consumer", "HookFailure", "end_by_force"]

SLICE = 0.001
"""Seconds for which the hooks of all consumers of a loop together, as far as they never suspend, may hold it
in one of its turns. Each consumer gives way after its share."""
STRIDE = 32
"""Entries between two looks at the clock, while hooks are quick."""

_NO_ENTRY: Entry = (0, None, None, -1, None)

_ONE_ARGUMENT = frozenset(
    {
        "on_train_begin",
        "on_train_end",
        "on_test_begin",
        "on_test_end",
        "on_predict_begin",
        "on_predict_end",
        "on_exception",
    }
)


class HookFailure(NamedTuple):
    """A beside-hook raised ``error``; ``seq`` is the number of its event."""

    consumer: Consumer
    hook: str
    seq: int
    epoch: int | None
    error: BaseException


class Consumer:
    """The task of one callback. It begins when something lies in the mailbox: most callbacks have inline
    hooks alone, and a short training would pay more for their tasks than for its batches.

    Attributes:
        task: None until there is something to do.
        muted: it gets its closing hooks only.
        ended: nothing of it runs any more, or nobody waits for what does.
        given_up_at: when its time was up, the last time.
        closing_up: it was cut short, and a closing hook of its has begun since.

    Args:
        name: the callback's name.
        mailbox: where its entries come from.
        hooks: its ``async def`` hooks, bound, by hook name.
        failed: told of every hook that raised; called on the loop.
        moved: called after entries were handled, so that a thread waiting for room or for this hook can look
            again.
        cancelled: called when somebody outside cancels this task, as ``asyncio.run`` does when its main
            function returns.
        closing: the hooks that a muted callback still gets.
        died: told what ended the task, if it was not a hook.
    """

    def __init__(
        self,
        name: str,
        mailbox: Mailbox,
        hooks: dict[str, Callable[..., Awaitable[Any]]],
        *,
        failed: Callable[[HookFailure], None],
        moved: Callable[[], None],
        cancelled: Callable[[str], None],
        closing: frozenset[str] = frozenset({"on_exception", "on_train_end"}),
        died: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.name = name
        self.mailbox = mailbox
        self.muted = False
        self.ended = False
        self.given_up_at: float | None = None
        self.closing_up = False
        self.task: asyncio.Task[None] | None = None
        self._table = [_caller(hook, hooks[hook]) if hook in hooks else _skip for hook in HOOKS]
        self._table += [self._run_work, self._reach]
        self._failed = failed
        self._moved = moved
        self._cancelled = cancelled
        self._closing = closing
        self._died = died
        self._bell: asyncio.Future[None] | None = None
        self._closed = False
        self._cut_short = False
        self._abandoned = False
        self._began = 0.0
        self._stride = 1
        self._loop: asyncio.AbstractEventLoop | None = None
        self._context: contextvars.Context | None = None
        self._task_name = ""
        self._sharing: _Sharing | None = None
        self._busy = False

    def start(self, context: contextvars.Context, name: str) -> None:
        """From now on entries are taken, by a task of this name in ``context``, which all hooks of this
        callback share. Called on the loop."""
        self._loop = asyncio.get_running_loop()
        self._sharing = _sharing.setdefault(self._loop, _Sharing())
        self._context, self._task_name = context, name
        self.mailbox.idle = True
        self.wake()

    def _begin(self) -> None:
        assert self._loop is not None
        self._set_busy(True)
        # Before anything is taken, as wherever a consumer goes to work: see `Mailbox.finished`.
        self.mailbox.idle = False
        self.task = self._loop.create_task(self._run(), name=self._task_name, context=self._context)
        # Cancelled before its first step, as `asyncio.run` does to the tasks of a run that has just begun:
        # nothing of the body ran, and this callback's hooks are still owed.
        self.task.add_done_callback(lambda _: None if self.ended else self._begin())

    @property
    def alive(self) -> bool:
        """Whether its task may still take a step, left to itself perhaps."""
        return self.task is not None and not self.task.done()

    @property
    def hook(self) -> str:
        """The hook that is suspended now, or ``""``. Found by walking the chain of awaits, so that it costs
        the hot path nothing."""
        awaited: Any = None if self.task is None else self.task.get_coro()
        while (code := getattr(awaited, "cr_code", None)) is not None and code.co_filename == __file__:
            awaited = awaited.cr_await
        return getattr(awaited, "__name__", "") if code is not None else ""

    @property
    def suspended(self) -> bool:
        """Whether a hook of the user's is suspended now."""
        return bool(self.hook)

    def wake(self) -> None:
        """Called on the loop when the mailbox may hold something, or :meth:`close` was called."""
        if self.task is None:
            if self._loop is None or self.ended:
                return
            if self.mailbox.queue and not self._abandoned:
                self._begin()
            elif self._closed:
                self._end()
        elif self._bell is not None and not self._bell.done():
            self._bell.set_result(None)
            self._set_busy(True)  # now, and not when it resumes: those woken with it must know its share

    def close(self) -> None:
        """No entry comes any more: the task, if there is one, ends when it has nothing left to do."""
        self._closed = True
        self.wake()

    def mute(self) -> None:
        """From now on the callback gets its closing hooks only."""
        self.muted = True
        for code, hook in enumerate(HOOKS):
            if hook not in self._closing:
                self._table[code] = self._decline

    def cut_short(self, now: float) -> int:
        """Time is up: the running hook is cancelled, and of what lies behind it only closing hooks run.

        Returns:
            How many events are lost.
        """
        self.given_up_at = now
        self.muted = self._cut_short = True
        # The entries stay where they are: the hook that runs may be one of a stride that counts on them.
        for code, hook in enumerate(HOOKS):
            self._table[code] = self._last(self._table[code]) if hook in self._closing else self._lose
        self._cancel()
        behind = [hook_of(entry) for entry in list(self.mailbox.queue)]
        return sum(hook not in self._closing for hook in behind if hook)

    def abandon(self, now: float) -> None:
        """Time is up for good: the running hook is cancelled, and nothing after it runs."""
        self.given_up_at = now
        self.closing_up = False
        self._closed = self._abandoned = True
        # A hook that swallows its cancellation and returns would go on with the entries behind it.
        self._table[:] = [_give_up] * len(self._table)
        self._cancel()

    def leave_behind(self) -> None:
        """The running hook ignores its cancellation: nobody waits for it any more, it and what lies behind it
        are closed."""
        self.ended = self.mailbox.closed = True
        self._closed = self._abandoned = True
        self._set_busy(False)
        self.mailbox.discard_all()
        if self.task is not None:
            end_by_force(self.task)

    def _cancel(self) -> None:
        if self.task is None:
            self.wake()
        else:
            self.task.cancel()

    async def _run(self) -> None:
        """The body of the task. Ends after :meth:`close`; raises nothing, GeneratorExit apart."""
        self.task = asyncio.current_task()  # a loop with eager tasks runs this before it answers the task
        self._began = perf_counter()
        try:
            while True:
                try:
                    if not self.mailbox.queue or self._abandoned:
                        if self._closed:
                            return
                        await self._park()
                        continue
                    await self._run_some()
                except asyncio.CancelledError:
                    if self._abandoned:
                        return
                    self._uncancel()
                    if not self._cut_short:
                        # The runner cancels all tasks at once. The hook that ran is lost, what lies behind it
                        # is still delivered: the run turns this into a cancel of its own, and its grace
                        # period bounds the rest.
                        self._cancelled(f"the task of {self.name} was cancelled")
        except GeneratorExit:
            raise
        except BaseException as error:
            # A defect of ours, or an `on_error` that raises when it is read. Ended silently, this task would
            # leave a training that completes without the callback, or that waits for it for ever.
            if self._died is None:
                raise
            self._died(error)
        finally:
            self._end()

    def _end(self) -> None:
        self._set_busy(False)
        self.ended = self.mailbox.idle = self.mailbox.closed = True
        self.mailbox.discard_all()
        self._moved()
        # Nothing is called any more. What is kept of an ended run shall not hold all its parts in a ring.
        self._table = [_skip] * len(self._table)
        self._context = None

    async def _park(self) -> None:
        self._bell = asyncio.get_running_loop().create_future()
        self._set_busy(False)
        self.mailbox.idle = True
        # The thread may wait for this very moment (a lockstep hook, the awaitables of train begin).
        self._moved()
        try:
            if not self.mailbox.queue and not self._closed:
                await self._bell
        finally:
            self._bell = None
            self._set_busy(True)
            self.mailbox.idle = False
            self._began = perf_counter()

    def _set_busy(self, busy: bool) -> None:
        if busy is not self._busy and self._sharing is not None:
            self._busy = busy
            self._sharing.busy += 1 if busy else -1

    async def _run_some(self) -> None:
        """Entries in strides, with the bookkeeping after each, until none is left or a hook raises; the hot
        path of the loop thread."""
        mailbox, table, take, moved = self.mailbox, self._table, self.mailbox.take, self._moved
        queue, entry, stride = mailbox.queue, _NO_ENTRY, 0
        sharing = self._sharing
        assert sharing is not None
        turns = repeat(None, 0)
        before = perf_counter()
        try:
            while queue and not self._abandoned:
                stride = min(self._stride, len(queue))
                turns = repeat(None, stride)
                for _ in turns:
                    entry = take()
                    await table[entry[0]](entry[1], entry[2])
                mailbox.handled += stride
                stride = 0
                if mailbox.awaited:
                    moved()
                now = perf_counter()
                spent, before = now - before, now
                share = SLICE / sharing.busy
                if spent > share / 2:
                    self._stride = max(1, self._stride // 4)
                elif spent < share / 4 and self._stride < STRIDE:
                    self._stride *= 2
                if now - self._began > share:
                    await asyncio.sleep(0)
                    self._began = before = perf_counter()
        except BaseException as error:
            mailbox.handled += stride - length_hint(turns)
            moved()
            # What nobody asked for is the hook's own doing, and so an error like any other: let through, it
            # would end this task silently.
            if self._asked_for(error):
                raise
            if isinstance(error, _GaveUp):
                mailbox.handled -= 1
                mailbox.put_back(entry)
            elif not self._abandoned:
                self._failed(HookFailure(self, hook_of(entry) or "sync", entry[3], entry[4], error))

    async def _run_work(self, work: Work, _: None) -> None:
        if self.muted and work.hook not in self._closing:
            work.discard()
            if self._cut_short:
                await self._lose()
            else:
                await self._decline(None, None)
            return
        if self._cut_short:
            self._close_up()
        try:
            for snapshot in work.snapshots:
                if not snapshot.whole:
                    await _whole(snapshot)
        except BaseException:
            work.discard()
            raise
        await work.coroutine

    async def _decline(self, first: object, second: object) -> None:
        """The callback was muted before this entry's turn came."""
        self.mailbox.handled -= 1
        self.mailbox.count_dropped()

    async def _reach(self, mark: Mark | None, ask: Callable[[], Awaitable[object]] | None) -> None:
        self.mailbox.handled -= 1  # a marker is no event
        if mark is None or mark.done():
            return
        try:
            # Behind hooks that were lost nobody is to say that all is there, nor spend the last words on it.
            answer = None if ask is None or self._cut_short else await ask()
        except BaseException as error:
            if self._asked_for(error) and not (self._abandoned or self._cut_short):
                # By a runner that shuts down. A hook under way is lost then; a question is asked again.
                self.mailbox.put_back(marker(mark, ask))
            elif not mark.done():
                mark.set_result(None)
            raise
        if not mark.done():
            mark.set_result(answer)

    def _asked_for(self, error: BaseException) -> bool:
        """Whether somebody else ends this task with it: cancels it, or closes its coroutine from outside."""
        if not isinstance(error, (asyncio.CancelledError, GeneratorExit)):
            return False
        task = asyncio.current_task() if asyncio._get_running_loop() else None
        if task is None or task is not self.task:
            return True
        return isinstance(error, asyncio.CancelledError) and task.cancelling() > 0

    def _last(self, call: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
        """A closing hook of a callback that was cut short."""

        async def last(first: Any, second: Any) -> None:
            self._close_up()
            await call(first, second)

        return last

    async def _lose(self, *_: object) -> None:
        self.mailbox.handled -= 1
        self.mailbox.lost += 1

    def _close_up(self) -> None:
        # The hook that was cut short may have swallowed that, and this one is not to be taken for cancelled.
        self._uncancel()
        self.closing_up = True

    def _uncancel(self) -> None:
        while self.task is not None and self.task.cancelling():
            self.task.uncancel()


def end_by_force(task: asyncio.Task[None]) -> None:
    """Closes what a task runs that ignores its cancellation, so that the task ends: a runner that shuts down
    waits for every task without a limit."""
    if task.done():
        return
    coroutine: Any = task.get_coro()
    try:
        coroutine.close()
    except RuntimeError:  # it ignores this too, and waits for something new
        pass
    # Woken once more, the task finds its coroutine closed; that is an error which nobody needs to see.
    task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    task.cancel()


class _Sharing:
    """What the consumers of one loop share.

    Attributes:
        busy: consumers that have something to do.
    """

    def __init__(self) -> None:
        self.busy = 0


_sharing: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Sharing] = weakref.WeakKeyDictionary()


async def _whole(snapshot: Snapshot) -> None:
    """Waits for the thread that copies: a hook that reads its snapshot must not make the loop wait for it."""
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def tell() -> None:
        try:
            loop.call_soon_threadsafe(_set, done)
        except RuntimeError:  # the loop is gone, and nobody waits
            if not loop.is_closed():
                raise

    snapshot.then(tell)
    await done


def _set(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)


def _caller(name: str, hook: Callable[..., Any]) -> Callable[[Any, Any], Awaitable[Any]]:
    """How to call a hook with the two arguments of an entry: itself, where it takes both and is `async
    def`."""
    if name == "on_checkpoint_saved":  # the one hook that may be a `def` and is called here all the same

        async def announce(path: str, epoch: int) -> None:
            result = hook(path, epoch)
            if hasattr(result, "__await__"):
                await result

        return announce
    if name in _ONE_ARGUMENT:
        return lambda first, _: hook(first)
    return hook


class _GaveUp(BaseException):
    """The entry came after its callback was given up."""


async def _give_up(first: object, second: object) -> None:
    raise _GaveUp


async def _skip(first: object, second: object) -> None:
    """The hook of an event that this callback does not want, or no longer."""
