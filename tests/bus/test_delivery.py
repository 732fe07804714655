"""One consumer for each callback: in order, one at a time, and nothing that a hook does ends it."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import itertools
import time
import weakref
from typing import TYPE_CHECKING, Any

import pytest

from asynccb.bus import delivery
from asynccb.bus.delivery import SLICE, STRIDE, Consumer, HookFailure
from asynccb.bus.mailbox import CODES, WORK, Entry, Mailbox, Work, marker

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

BATCH = "on_train_batch_end"


class Bench:
    """A consumer with its mailbox, and what it reports."""

    def __init__(self, policy: str = "wait", **hooks: Callable[..., Awaitable[Any]]) -> None:
        self.mailbox = Mailbox("Tested", policy, 1024, lambda box, has_room: None)
        self.failures: list[HookFailure] = []
        self.cancels: list[str] = []
        self.moves = 0
        self.consumer = Consumer(
            "Tested",
            self.mailbox,
            hooks,
            failed=self.failures.append,
            moved=self._moved,
            cancelled=self.cancels.append,
        )

    def _moved(self) -> None:
        self.moves += 1

    def start(self, context: contextvars.Context | None = None) -> Bench:
        self.consumer.start(context or contextvars.copy_context(), "a callback")
        return self

    def post(self, hook: str, *arguments: Any, seq: int = 0) -> None:
        first, second = (*arguments, None, None)[:2]
        epoch = first if "epoch" in hook else None
        entry: Entry = (CODES[hook], first, second, seq, epoch)
        self.mailbox.queue.append(entry)
        self.consumer.wake()

    def post_work(self, coroutine: Any, hook: str = "on_epoch_end", snapshots: tuple[Any, ...] = ()) -> Work:
        work = Work(coroutine, hook, snapshots)
        self.mailbox.queue.append((WORK, work, None, 0, 0))
        self.consumer.wake()
        return work

    async def drained(self) -> None:
        done = asyncio.get_running_loop().create_future()
        self.mailbox.put(marker(done))
        self.consumer.wake()
        await done

    async def end(self) -> None:
        self.consumer.close()
        if self.consumer.task is not None:
            await self.consumer.task
        assert self.consumer.ended
        assert self.mailbox.finished


def recording(seen: list[Any]) -> Callable[..., Awaitable[None]]:
    async def hook(*arguments: Any) -> None:
        seen.append(arguments)

    return hook


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


# ---------------------------------------------------------------- order


@pytest.mark.asyncio
async def test_hooks_run_in_order_one_at_a_time_with_the_arguments_of_their_kind() -> None:
    seen: list[Any] = []
    running = 0

    def hook(name: str) -> Callable[..., Awaitable[None]]:
        async def run(*arguments: Any) -> None:
            nonlocal running
            running += 1
            await asyncio.sleep(0)
            seen.append((name, *arguments))
            assert running == 1
            running -= 1

        return run

    names = [
        "on_train_begin",
        "on_epoch_begin",
        BATCH,
        "on_epoch_end",
        "on_checkpoint_saved",
        "on_exception",
        "on_train_end",
    ]
    bench = Bench(**{name: hook(name) for name in names}).start()
    error = RuntimeError()
    posted: list[tuple[Any, ...]] = [
        ("on_train_begin", {}),
        ("on_epoch_begin", 0, {}),
        (BATCH, 0, {"loss": 1.0}),
        ("on_epoch_end", 0, {"loss": 1.0}),
        ("on_checkpoint_saved", "a.h5", 0),
        ("on_exception", error),
        ("on_train_end", {}),
    ]
    for name, *arguments in posted:
        bench.post(name, *arguments)
    await bench.drained()
    assert seen == posted
    assert bench.mailbox.statistics().handled == len(posted)
    await bench.end()


@pytest.mark.asyncio
async def test_coroutines_of_inline_hooks_keep_their_place_among_the_hooks() -> None:
    seen: list[Any] = []
    bench = Bench(on_train_begin=recording(seen)).start()
    bench.post("on_train_begin", "first")
    bench.post_work(recording(seen)("second"))
    bench.post("on_train_begin", "third")
    await bench.drained()
    assert seen == [("first",), ("second",), ("third",)]
    await bench.end()


@pytest.mark.asyncio
async def test_a_file_listener_may_be_a_def_and_is_called_on_the_loop() -> None:
    seen: list[Any] = []

    def on_checkpoint_saved(path: str, epoch: int) -> None:
        seen.append((asyncio.get_running_loop() is not None, path, epoch))

    bench = Bench(on_checkpoint_saved=on_checkpoint_saved).start()  # type: ignore[arg-type]
    bench.post("on_checkpoint_saved", "a.h5", 3)
    await bench.drained()
    assert seen == [(True, "a.h5", 3)]
    await bench.end()


@pytest.mark.asyncio
async def test_a_slow_callback_holds_itself_alone() -> None:
    gate, seen = asyncio.Event(), []

    async def slow(*arguments: Any) -> None:
        await gate.wait()

    first, second = Bench(on_epoch_end=slow).start(), Bench(on_epoch_end=recording(seen)).start()
    for epoch in range(3):
        first.post("on_epoch_end", epoch, {})
        second.post("on_epoch_end", epoch, {})
    await second.drained()
    assert [epoch for epoch, _ in seen] == [0, 1, 2]
    assert len(first.mailbox.queue) == 2
    gate.set()
    await first.end()
    await second.end()


@pytest.mark.asyncio
async def test_one_pump_for_all_callbacks_lets_a_slow_one_hold_the_others() -> None:
    """The control: the same two callbacks behind one task."""
    gate, seen = asyncio.Event(), []

    async def slow(*arguments: Any) -> None:
        await gate.wait()

    async def pump() -> None:
        for epoch in range(3):
            for hook in (slow, recording(seen)):
                await hook(epoch, {})

    task = asyncio.create_task(pump())
    await settle()
    assert seen == []
    gate.set()
    await task


# ---------------------------------------------------------------- when it is done


@pytest.mark.asyncio
async def test_entries_that_lie_there_before_the_task_begins_are_not_done_while_their_hook_runs() -> None:
    """Else the training would not wait for the awaitables of train begin where its thread is quicker than
    this task."""
    gate = asyncio.Event()

    async def set_up(logs: Any) -> None:
        await gate.wait()

    bench = Bench(on_train_begin=set_up)
    bench.post("on_train_begin", {})
    bench.start()
    await settle()
    assert not bench.mailbox.finished
    assert bench.consumer.suspended
    assert bench.consumer.hook == "set_up"
    gate.set()
    await settle()
    assert bench.mailbox.finished
    assert not bench.consumer.suspended
    await bench.end()


@pytest.mark.asyncio
async def test_a_marker_is_told_when_all_before_it_is_done_and_not_earlier() -> None:
    gate = asyncio.Event()

    async def hook(*arguments: Any) -> None:
        await gate.wait()

    bench = Bench(on_train_batch_end=hook).start()
    bench.post(BATCH, 0, {})
    done = asyncio.get_running_loop().create_future()
    bench.mailbox.put(marker(done))
    await settle()
    assert not done.done()
    gate.set()
    await done
    await bench.end()


@pytest.mark.asyncio
async def test_closing_ends_the_task_after_what_lies_there() -> None:
    seen: list[Any] = []
    bench = Bench(on_train_batch_end=recording(seen)).start()
    for batch in range(100):
        bench.post(BATCH, batch, {})
    await bench.end()
    assert len(seen) == 100


# ---------------------------------------------------------------- giving way


class Clock:
    """Stands for perf_counter: only hooks make time pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(delivery, "perf_counter", lambda: self.now)

    def hook(self, cost: float) -> Callable[..., Awaitable[None]]:
        """An async hook that takes so many seconds and never suspends."""

        async def hook(*arguments: Any) -> None:
            self.now += cost

        return hook

    async def longest_hold(self, work: Coroutine[Any, Any, object]) -> float:
        """Runs ``work`` and answers for how long nobody else had a turn of the loop."""
        turns: list[float] = []

        async def others() -> None:
            while True:
                turns.append(self.now)
                await asyncio.sleep(0)

        other = asyncio.create_task(others())
        await settle()
        await asyncio.create_task(work)
        await settle()
        other.cancel()
        return max(later - earlier for earlier, later in itertools.pairwise(turns))


async def handle(benches: list[Bench], batches: int) -> None:
    for batch in range(batches):
        for bench in benches:
            bench.post(BATCH, batch, {})
    for bench in benches:
        await bench.drained()


@pytest.mark.asyncio
@pytest.mark.parametrize("cost", [1e-6, 1e-5, 1e-4, 9e-4, 5e-3])
async def test_hooks_that_never_suspend_hold_the_loop_for_about_a_millisecond(
    monkeypatch: pytest.MonkeyPatch, cost: float
) -> None:
    clock = Clock(monkeypatch)
    bench = Bench(on_train_batch_end=clock.hook(cost)).start()
    assert await clock.longest_hold(handle([bench], 2000)) <= max(2 * SLICE, SLICE + cost)
    assert bench.mailbox.handled == 2000
    await bench.end()


@pytest.mark.asyncio
@pytest.mark.parametrize("cost", [1e-6, 1e-5, 5e-5])
async def test_many_consumers_together_hold_the_loop_no_longer_than_one(
    monkeypatch: pytest.MonkeyPatch, cost: float
) -> None:
    """Eight of them, each with its own millisecond, would hold it for eight."""
    clock = Clock(monkeypatch)
    benches = [Bench(on_train_batch_end=clock.hook(cost)).start() for _ in range(8)]
    assert await clock.longest_hold(handle(benches, 1000)) <= 2 * SLICE
    assert [bench.mailbox.handled for bench in benches] == [1000] * 8
    for bench in benches:
        await bench.end()


@pytest.mark.asyncio
async def test_a_hook_of_100_microseconds_without_a_slice_would_hold_the_loop_to_its_last_event(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The control: the same hooks awaited one after the other."""
    clock = Clock(monkeypatch)
    hook = clock.hook(1e-4)

    async def naive() -> None:
        for batch in range(2000):
            await hook(batch, {})

    assert await clock.longest_hold(naive()) > 0.1


@pytest.mark.asyncio
async def test_the_bookkeeping_is_done_once_in_32_events(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    bench = Bench(on_train_batch_end=recording([])).start()
    await settle()
    before = bench.moves
    for batch in range(STRIDE * 50):
        bench.post(BATCH, batch, {})
    await bench.drained()
    assert STRIDE == 32
    assert bench.moves - before <= 50 + 8
    await bench.end()


# ---------------------------------------------------------------- what hooks may do


@pytest.mark.asyncio
async def test_a_timeout_inside_a_hook_ends_the_hooks_wait_and_nothing_else() -> None:
    seen: list[Any] = []

    async def hook(batch: int, logs: Any) -> None:
        try:
            async with asyncio.timeout(0):
                await asyncio.Event().wait()
        except TimeoutError:
            seen.append(batch)

    bench = Bench(on_train_batch_end=hook).start()
    for batch in range(3):
        bench.post(BATCH, batch, {})
    await bench.drained()
    assert seen == [0, 1, 2]
    assert (bench.failures, bench.cancels) == ([], [])
    await bench.end()


@pytest.mark.asyncio
async def test_a_timeout_that_a_hook_lets_out_is_its_failure() -> None:
    async def hook(batch: int, logs: Any) -> None:
        async with asyncio.timeout(0):
            await asyncio.Event().wait()

    bench = Bench(on_train_batch_end=hook).start()
    bench.post(BATCH, 0, {})
    await bench.drained()
    assert [type(failure.error) for failure in bench.failures] == [TimeoutError]
    await bench.end()


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "kind", [ValueError, KeyboardInterrupt, SystemExit, StopAsyncIteration, asyncio.CancelledError]
)
async def test_whatever_a_hook_raises_is_told_and_the_next_event_is_delivered(
    kind: type[BaseException],
) -> None:
    seen: list[int] = []

    async def on_epoch_end(epoch: int, logs: Any) -> None:
        if epoch == 1:
            raise kind("broken")
        seen.append(epoch)

    bench = Bench(on_epoch_end=on_epoch_end).start()
    for epoch in range(3):
        bench.post("on_epoch_end", epoch, {}, seq=10 + epoch)
    await bench.drained()
    assert seen == [0, 2]
    (failure,) = bench.failures
    assert (failure.consumer, failure.hook, failure.seq, failure.epoch) == (
        bench.consumer,
        "on_epoch_end",
        11,
        1,
    )
    assert type(failure.error) is kind
    assert bench.mailbox.handled == 4 or bench.mailbox.handled == 3
    await bench.end()


@pytest.mark.asyncio
async def test_a_cancelled_task_that_a_hook_awaits_is_the_hooks_failure_and_nobodys_cancel() -> None:
    async def hook(batch: int, logs: Any) -> None:
        other = asyncio.create_task(asyncio.sleep(3600))
        other.cancel()
        await other

    bench = Bench(on_train_batch_end=hook).start()
    bench.post(BATCH, 0, {})
    await bench.drained()
    assert [type(failure.error) for failure in bench.failures] == [asyncio.CancelledError]
    assert bench.cancels == []
    await bench.end()


@pytest.mark.asyncio
async def test_a_naive_consumer_dies_silently_of_a_cancelled_error_that_nobody_asked_for() -> None:
    """The control: a task group sees a child that was cancelled, and says nothing."""
    seen: list[int] = []

    async def naive() -> None:
        for batch in range(3):
            if batch == 1:
                raise asyncio.CancelledError
            seen.append(batch)

    async with asyncio.TaskGroup() as group:
        group.create_task(naive())
    assert seen == [0]


@pytest.mark.asyncio
async def test_a_failing_coroutine_of_an_inline_hook_is_told_under_the_hooks_name() -> None:
    async def later() -> None:
        raise OSError("disk full")

    bench = Bench().start()
    bench.post_work(later(), hook="on_epoch_end")
    await bench.drained()
    (failure,) = bench.failures
    assert (failure.hook, failure.epoch, str(failure.error)) == ("on_epoch_end", 0, "disk full")
    await bench.end()


# ---------------------------------------------------------------- cancelled and abandoned


@pytest.mark.asyncio
async def test_a_cancel_from_outside_loses_the_running_hook_and_delivers_the_rest() -> None:
    seen: list[int] = []

    async def hook(batch: int, logs: Any) -> None:
        if batch == 0:
            await asyncio.Event().wait()
        seen.append(batch)

    bench = Bench(on_train_batch_end=hook).start()
    for batch in range(3):
        bench.post(BATCH, batch, {})
    await settle()
    assert bench.consumer.task is not None
    bench.consumer.task.cancel()
    await bench.drained()
    assert seen == [1, 2]
    assert bench.cancels == ["the task of Tested was cancelled"]
    assert (bench.failures, bench.consumer.task.cancelling()) == ([], 0)
    await bench.end()


@pytest.mark.asyncio
async def test_a_cancel_while_it_is_parked_harms_nothing() -> None:
    seen: list[Any] = []
    bench = Bench(on_train_batch_end=recording(seen)).start()
    await bench.drained()
    await settle()
    assert bench.consumer.task is not None
    bench.consumer.task.cancel()
    await settle()
    bench.post(BATCH, 0, {})
    await bench.drained()
    assert seen == [(0, {})]
    await bench.end()


@pytest.mark.asyncio
async def test_an_abandoned_hook_is_cancelled_and_what_lies_behind_it_is_lost_and_closed() -> None:
    ended: list[str] = []

    async def hook(batch: int, logs: Any) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cleaned up")

    bench = Bench(on_train_batch_end=hook).start()
    bench.post(BATCH, 0, {})
    work = bench.post_work(recording(ended)("never"))
    bench.post(BATCH, 1, {})
    await settle()
    bench.consumer.abandon(time.monotonic())
    await settle()
    assert bench.consumer.ended
    assert ended == ["cleaned up"]
    assert work.coroutine.cr_frame is None
    assert bench.mailbox.lost == 2


@pytest.mark.asyncio
async def test_nothing_runs_after_an_abandoned_hook_that_swallows_its_cancellation() -> None:
    seen: list[int] = []

    async def hook(batch: int, logs: Any) -> None:
        seen.append(batch)
        if batch == 40:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                pass

    bench = Bench(on_train_batch_end=hook).start()
    for batch in range(80):  # more than one stride, so that the hook is suspended in the middle of one
        bench.post(BATCH, batch, {})
    handle = Handle()
    work = bench.post_work(recording(seen)("never"), snapshots=(handle,))
    await settle()
    assert bench.consumer.suspended
    bench.consumer.abandon(time.monotonic())
    await settle()
    assert bench.consumer.ended
    assert seen == list(range(41))
    assert (work.coroutine.cr_frame, handle.released) == (None, True)
    assert bench.mailbox.statistics().handled == 41
    assert bench.mailbox.lost == 40
    assert bench.failures == []


@pytest.mark.asyncio
async def test_a_hook_left_to_itself_is_closed_with_what_waits_behind_it_and_its_end_is_not_told() -> None:
    closed: list[int] = []

    async def hook(batch: int, logs: Any) -> None:
        try:
            while True:
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    pass
        finally:
            closed.append(batch)
            raise RuntimeError("too late")

    bench = Bench(on_train_batch_end=hook).start()
    bench.post(BATCH, 0, {})
    handle = Handle()
    work = bench.post_work(recording([])("never"), snapshots=(handle,))
    await settle()
    bench.consumer.abandon(time.monotonic())
    await settle()
    assert not bench.consumer.ended
    bench.consumer.leave_behind()
    assert bench.consumer.ended
    assert (work.coroutine.cr_frame, handle.released, bench.mailbox.lost) == (None, True, 1)
    assert bench.consumer.task is not None
    await asyncio.wait({bench.consumer.task})
    assert closed == [0]
    assert bench.failures == []


# ---------------------------------------------------------------- no task before there is something to do


@pytest.mark.asyncio
async def test_a_callback_that_gets_nothing_has_no_task_and_is_done_all_the_time() -> None:
    bench = Bench(on_train_batch_end=recording([]))
    assert not bench.mailbox.finished
    bench.start()
    assert bench.mailbox.finished
    bench.consumer.wake()
    before = asyncio.all_tasks()
    bench.consumer.close()
    assert (bench.consumer.task, bench.consumer.ended, bench.mailbox.closed) == (None, True, True)
    assert (bench.moves, asyncio.all_tasks()) == (1, before)


@pytest.mark.asyncio
@pytest.mark.parametrize("when", ["before the start", "before the end"])
async def test_what_lies_there_unannounced_is_delivered(when: str) -> None:
    seen: list[Any] = []
    bench = Bench(on_train_batch_end=recording(seen))
    entry: Entry = (CODES[BATCH], 0, {}, 0, 0)
    if when == "before the start":
        bench.mailbox.queue.append(entry)
        bench.start()
    else:
        bench.start()
        bench.mailbox.queue.append(entry)
    assert not bench.mailbox.finished  # though nobody has woken the consumer
    await bench.end()
    assert (seen, bench.mailbox.handled) == ([(0, {})], 1)


@pytest.mark.asyncio
async def test_it_is_not_done_between_its_first_entry_and_the_end_of_that_hook() -> None:
    hanging, go_on, done = asyncio.Event(), asyncio.Event(), []

    async def hook(batch: int, logs: Any) -> None:
        hanging.set()
        await go_on.wait()

    bench = Bench(on_train_batch_end=hook).start()
    bench.post(BATCH, 0, {})
    done.append(bench.mailbox.finished)
    await hanging.wait()
    done.append(bench.mailbox.finished)
    go_on.set()
    await settle()
    assert [*done, bench.mailbox.finished] == [False, False, True]
    await bench.end()


@pytest.mark.asyncio
async def test_cancelled_before_its_first_step_the_task_begins_again() -> None:
    seen: list[Any] = []
    bench = Bench(on_train_batch_end=recording(seen)).start()
    bench.post(BATCH, 0, {})
    assert bench.consumer.task is not None
    bench.consumer.task.cancel()
    await settle()
    assert seen == [(0, {})]
    await bench.end()


@pytest.mark.asyncio
async def test_one_that_is_cut_short_before_it_has_a_task_runs_its_closing_hooks_only() -> None:
    seen: list[Any] = []
    bench = Bench(on_train_batch_end=recording(seen), on_train_end=recording(seen)).start()
    bench.mailbox.queue.append((CODES[BATCH], 0, {}, 0, 0))
    bench.mailbox.queue.append((CODES["on_train_end"], {}, None, 1, None))
    assert bench.consumer.cut_short(time.monotonic()) == 1
    await bench.end()
    assert (seen, bench.mailbox.lost) == ([({},)], 1)


@pytest.mark.asyncio
@pytest.mark.parametrize("way", ["abandon", "leave_behind"])
async def test_one_that_is_given_up_before_it_has_a_task_closes_what_lies_there(way: str) -> None:
    seen: list[Any] = []
    bench = Bench(on_train_batch_end=recording(seen)).start()
    handle = Handle()
    work = Work(recording(seen)("never"), "on_epoch_end", (handle,))  # type: ignore[arg-type]
    bench.mailbox.queue.append((WORK, work, None, 0, 0))
    if way == "abandon":
        bench.consumer.abandon(time.monotonic())
    else:
        bench.consumer.leave_behind()
    bench.consumer.wake()
    await settle()
    assert (bench.consumer.task, bench.consumer.ended, seen) == (None, True, [])
    assert (work.coroutine.cr_frame, handle.released, bench.mailbox.lost) == (None, True, 1)


@pytest.mark.skipif(not hasattr(asyncio, "eager_task_factory"), reason="from Python 3.12 on")
@pytest.mark.asyncio
async def test_a_loop_whose_tasks_are_eager_makes_no_difference() -> None:
    seen: list[Any] = []

    async def hook(batch: int, logs: Any) -> None:
        seen.append(batch)
        if batch == 0:
            bench.post(BATCH, 1, {})
            raise asyncio.CancelledError  # nobody asked for it: an error of the hook

    asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
    bench = Bench(on_train_batch_end=hook).start()
    bench.post(BATCH, 0, {})
    await bench.end()
    assert (seen, len(bench.failures)) == ([0, 1], 1)


# ---------------------------------------------------------------- muted


class Handle:
    def __init__(self) -> None:
        self.released = False

    def release(self) -> None:
        self.released = True


@pytest.mark.asyncio
async def test_a_muted_callback_gets_the_closing_hooks_of_its_run_only() -> None:
    seen: list[str] = []

    def hook(name: str) -> Callable[..., Awaitable[None]]:
        async def run(*arguments: Any) -> None:
            seen.append(name)

        return run

    names = ["on_epoch_end", BATCH, "on_test_end", "on_checkpoint_saved", "on_exception", "on_train_end"]
    bench = Bench(**{name: hook(name) for name in names}).start()
    bench.consumer.mute()
    handle = Handle()
    ordinary = bench.post_work(recording([])("never"), snapshots=(handle,))
    bench.post("on_epoch_end", 0, {})
    bench.post(BATCH, 0, {})
    bench.post("on_test_end", {})
    bench.post("on_checkpoint_saved", "a", 0)
    bench.post("on_exception", ValueError())
    bench.post_work(hook("the coroutine of on_train_end")(), hook="on_train_end")
    bench.post("on_train_end", {})
    await bench.drained()
    assert seen == ["on_exception", "the coroutine of on_train_end", "on_train_end"]
    assert (ordinary.coroutine.cr_frame, handle.released) == (None, True)
    await bench.end()


# ---------------------------------------------------------------- context

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="nothing")


@pytest.mark.asyncio
async def test_what_one_hook_sets_the_next_hook_of_that_callback_sees_and_no_other() -> None:
    seen: list[str] = []

    async def on_epoch_begin(*arguments: Any) -> None:
        seen.append(variable.get())
        variable.set("set by a hook")

    async def on_epoch_end(*arguments: Any) -> None:
        seen.append(variable.get())

    variable.set("the caller's")
    first = Bench(on_epoch_begin=on_epoch_begin, on_epoch_end=on_epoch_end).start()
    second = Bench(on_epoch_end=on_epoch_end).start()
    first.post("on_epoch_begin", 0, {})
    first.post("on_epoch_end", 0, {})
    await first.drained()
    second.post("on_epoch_end", 0, {})
    await second.drained()
    assert seen == ["the caller's", "set by a hook", "the caller's"]
    assert variable.get() == "the caller's"
    await first.end()
    await second.end()


# ---------------------------------------------------------------- the account


@pytest.mark.asyncio
async def test_handled_counts_hooks_and_neither_markers_nor_entries_that_were_dropped_meanwhile() -> None:
    bench = Bench("latest", on_train_batch_end=recording([])).start()
    bench.post(BATCH, 0, {})
    await bench.drained()
    await bench.drained()
    assert bench.mailbox.statistics().handled == 1
    await bench.end()


@pytest.mark.asyncio
@pytest.mark.parametrize("works", [True, False])
async def test_an_ended_consumer_goes_with_its_last_holder_and_waits_for_no_collection(works: bool) -> None:
    mailbox = Mailbox("Tested", "wait", 4, lambda box, has_room: None)
    consumer = Consumer(
        "Tested",
        mailbox,
        {BATCH: recording([])},
        failed=lambda failure: None,
        moved=lambda: None,
        cancelled=lambda reason: None,
    )
    consumer.start(contextvars.copy_context(), "a callback")
    if works:
        mailbox.queue.append((CODES[BATCH], 0, {}, 0, 0))
        consumer.wake()
    consumer.close()
    await settle()
    assert (consumer.ended, mailbox.handled) == (True, works)
    seen = weakref.ref(consumer)
    gc.disable()
    try:
        del consumer
        assert seen() is None
    finally:
        gc.enable()
