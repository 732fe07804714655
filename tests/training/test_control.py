"""The one place where a training thread waits: who waits for what, and what ends each wait."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from asynccb.bus.dispatch import Dispatcher, Subscriber
from asynccb.bus.mailbox import CODES, Mailbox
from asynccb.bus.readers import Readers
from asynccb.callbacks.base import Callback
from asynccb.callbacks.hooks import read_hooks
from asynccb.errors import TornState
from asynccb.events import Logs
from asynccb.protocols import Batch
from asynccb.training.control import Control, Interrupt, Limits, SnapshotRequest
from asynccb.training.feed import IterableFeed
from asynccb.training.prefetch import AsyncFeed, _Item

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENT = 10.0
"""Seconds after which a test gives up on a thread; none of them waits for that long."""


class Bell:
    def ring(self) -> None: ...
    def flush(self) -> None: ...


class Loop:
    """An event loop as far as a waiting thread looks at it."""

    def __init__(self) -> None:
        self.closed = False

    def is_closed(self) -> bool:
        return self.closed

    def call_soon_threadsafe(self, function: Any) -> None: ...


class Copied(int):
    """Stands for a snapshot: its number."""

    def release(self) -> None: ...


class NoCopy:
    """The gate while no copy of the model is under way."""

    copying = False

    def finish(self) -> None: ...


class Bench:
    """A control, and what runs on a real thread with it."""

    def __init__(self, poll: float = 0.01, **limits: float) -> None:
        self.loop = Loop()
        self.entered = 0
        self.copies = 0
        self.complaints: list[Any] = []
        self.control = Control(self.loop.is_closed, self._entering, Limits(poll=poll, **limits))
        self.control.capture = self._capture
        self._result: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._inside = threading.Event()
        self._thread: threading.Thread | None = None

    def _entering(self) -> None:
        self.entered += 1
        self._inside.set()

    def _capture(self) -> Any:
        self.copies += 1
        return Copied(self.copies)

    def start(self, waits: Callable[[], object]) -> None:
        """Runs ``waits`` on a thread, and returns when that thread has entered a wait."""

        def body() -> None:
            try:
                self._result.put(waits())
            except BaseException as error:
                self._result.put(error)

        self._thread = threading.Thread(target=body, daemon=True)
        self._thread.start()
        assert self._inside.wait(PATIENT)

    def result(self) -> Any:
        """What it returned or raised; the thread has ended."""
        result = self._result.get(timeout=PATIENT)
        assert self._thread is not None
        self._thread.join(PATIENT)
        assert self.control.waiting is None
        return result

    def copy(self) -> Any:
        """What a snapshot request is answered."""
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        assert self.control.ask(SnapshotRequest(answers.put, answers.put))
        return answers.get(timeout=PATIENT)

    def still_waits(self, reason: str) -> bool:
        """Whether the thread, having looked at everything once more, waits on."""
        # The second answer comes from a round that began after the first had looked for a stop.
        self.copy()
        self.copy()
        return self.control.waiting == reason


# ---------------------------------------------------------------- the five waiters, as the system calls them


class Waiter(NamedTuple):
    """What runs on the thread, and what makes the thing come true that it waits for."""

    waits: Callable[[], object]
    fulfil: Callable[[], None]


def dispatcher(bench: Bench, callback: Callback) -> Dispatcher:
    hooks = read_hooks(callback)
    box = Mailbox("Slow", "wait", 1024, lambda box, has_room: None)
    slow = Subscriber("Slow", callback, hooks.inline, hooks.beside, box, lockstep=callback.lockstep)
    bell: Any = Bell()
    return Dispatcher(
        [slow],
        Readers(4, lambda: None),
        bell,
        bench.control,
        NoCopy(),  # type: ignore[arg-type]
        failed=lambda failure: None,
        warn=lambda *said: bench.complaints.append(said),
    )


def finish(bench: Bench, box: Mailbox) -> None:
    """What a consumer does when it has run everything."""
    box.queue.clear()
    box.idle = True
    bench.control.nudge()


class Lockstep(Callback):
    lockstep = True

    async def on_epoch_end(self, epoch: int, logs: Any = None) -> None: ...


class Opens(Callback):
    async def on_train_begin(self, logs: Any = None) -> None: ...


def mailbox(bench: Bench) -> Waiter:
    box = Mailbox("Slow", "wait", 2, lambda box, room: bench.control.wait("mailbox", room) and None)
    entry = (CODES["on_train_batch_end"], 0, {}, 0, 0)

    def overflow() -> object:
        box.queue.extend([entry, entry])
        return box.overflow(entry)

    return Waiter(overflow, lambda: finish(bench, box))


def lockstep(bench: Bench) -> Waiter:
    bus = dispatcher(bench, Lockstep())
    return Waiter(lambda: bus.emit.epoch_end(0, Logs(), 1), lambda: finish(bench, bus.subscribers[0].mailbox))


def train_begin(bench: Bench) -> Waiter:
    bus = dispatcher(bench, Opens())
    return Waiter(bus.wait_begun, lambda: finish(bench, bus.subscribers[0].mailbox))


def feed(bench: Bench) -> Waiter:
    source: Any = None
    data = AsyncFeed(source, steps=None)
    loop: Any = bench.loop
    data.attach(bench.control, loop)
    data.begin(0)
    return Waiter(data.next, lambda: data._put(_Item(0, Batch("x", size=1))))


def pause(bench: Bench) -> Waiter:
    bench.control.pause()
    return Waiter(bench.control.safe_point, bench.control.resume)


WAITERS = {
    "mailbox": mailbox,
    "lockstep": lockstep,
    "train begin": train_begin,
    "feed": feed,
    "pause": pause,
}
STOP_ENDS = {"feed", "pause"}


@pytest.mark.parametrize("reason", WAITERS)
def test_every_wait_ends_when_what_is_waited_for_comes_true(reason: str) -> None:
    bench = Bench()
    waiter = WAITERS[reason](bench)
    bench.start(waiter.waits)
    assert bench.still_waits(reason)
    waiter.fulfil()
    result = bench.result()
    assert result == (Batch("x", size=1) if reason == "feed" else None)
    assert bench.control.waits == {reason: 1}
    assert bench.entered == 1


@pytest.mark.parametrize("reason", WAITERS)
def test_a_stop_ends_the_waits_for_data_and_for_a_resume_and_no_other(reason: str) -> None:
    bench = Bench()
    waiter = WAITERS[reason](bench)
    bench.start(waiter.waits)
    bench.control.stop("enough")
    if reason not in STOP_ENDS:
        assert bench.still_waits(reason)
        waiter.fulfil()
    assert bench.result() is None
    assert bench.control.stopped()


@pytest.mark.parametrize("reason", WAITERS)
@pytest.mark.parametrize("cause", ["cancelled", "failed", "abandoned"])
def test_a_cancel_and_a_failure_end_every_wait(reason: str, cause: Any) -> None:
    bench = Bench()
    error = RuntimeError()
    bench.start(WAITERS[reason](bench).waits)
    assert bench.control.interrupt_with(cause, "because", error)
    result = bench.result()
    assert isinstance(result, Interrupt)
    assert (result.cause, result.reason, result.error) == (cause, "because", error)


@pytest.mark.parametrize("reason", WAITERS)
def test_a_loop_that_is_gone_is_noticed_by_every_wait(reason: str) -> None:
    bench = Bench()
    bench.start(WAITERS[reason](bench).waits)
    bench.loop.closed = True  # and nobody is left to tell the thread
    result = bench.result()
    assert isinstance(result, Interrupt)
    assert result.cause == "loop gone"


@pytest.mark.parametrize("reason", WAITERS)
def test_snapshots_are_served_in_every_wait(reason: str) -> None:
    """A lockstep hook that awaits one would else wait for the thread that waits for the hook."""
    bench = Bench(poll=PATIENT)
    waiter = WAITERS[reason](bench)
    bench.start(waiter.waits)
    assert [bench.copy(), bench.copy()] == [1, 2]
    assert bench.control.waiting == reason
    waiter.fulfil()
    bench.result()


@pytest.mark.parametrize("reason", WAITERS)
def test_what_came_before_the_wait_is_not_missed(reason: str) -> None:
    """A cancel, a stop or a fulfilment that comes between the look and the wait: here, on entering it."""
    for end in ("cancel", "stop", "own"):
        if end == "stop" and reason not in STOP_ENDS:
            continue
        bench = Bench(poll=PATIENT)
        waiter = WAITERS[reason](bench)
        acts = {
            "cancel": lambda bench=bench: bench.control.interrupt_with("cancelled", "now"),
            "stop": lambda bench=bench: bench.control.stop("now"),
            "own": waiter.fulfil,
        }
        bench.control._entering_wait = lambda bench=bench, act=acts[end]: (act(), bench._entering())
        bench.start(waiter.waits)
        assert isinstance(bench.result(), Interrupt) is (end == "cancel")


@pytest.mark.parametrize("reason", ["mailbox", "lockstep", "train begin"])
def test_nothing_is_waited_for_while_the_run_closes(reason: str) -> None:
    bench = Bench()
    bench.control.closing = True
    assert WAITERS[reason](bench).waits() is None
    assert bench.entered == 0
    assert bench.control.waits == {}


def test_what_holds_already_is_not_waited_for() -> None:
    bench = Bench()
    assert bench.control.wait("feed", lambda: True)
    assert (bench.entered, bench.control.waits) == (0, {})


def test_nobody_wakes_a_thread_for_what_it_does_not_wait_for() -> None:
    bench = Bench(poll=PATIENT)
    looked: list[str] = []
    there = threading.Event()

    def ready() -> bool:
        looked.append(threading.current_thread().name)
        return there.is_set()

    bench.start(lambda: bench.control.wait("feed", ready))
    bench.copy()  # the thread has gone round: it sleeps, or is about to
    before = looked.count("waker")
    waker = threading.Thread(target=bench.control.nudge, name="waker")
    waker.start()
    waker.join()
    assert looked.count("waker") == before + 1
    there.set()
    bench.control.nudge()
    assert bench.result() is True


@pytest.mark.parametrize("reason", WAITERS)
@pytest.mark.parametrize("end", ["own", "cancel", "stop", "snapshot"])
def test_a_thread_that_was_told_and_has_not_yet_woken_does_not_rest(reason: str, end: str) -> None:
    """Whoever waits for a training to settle would else go on before it has moved."""
    bench = Bench(poll=PATIENT)
    waiter = WAITERS[reason](bench)
    answers: list[Any] = []
    acts: dict[str, Callable[[], object]] = {
        "own": waiter.fulfil,
        "cancel": lambda: bench.control.interrupt_with("cancelled", "now"),
        "stop": lambda: bench.control.stop("now"),
        "snapshot": lambda: bench.control.ask(SnapshotRequest(answers.append, answers.append)),
    }
    seen: list[bool] = []

    def entering() -> None:  # the thread itself: it cannot wake before this returns
        seen.append(bench.control.resting)
        acts[end]()
        seen.append(bench.control.resting)
        bench._entering()

    assert not bench.control.resting
    bench.control._entering_wait = entering
    bench.start(waiter.waits)
    if end == "snapshot" or (end == "stop" and reason not in STOP_ENDS):
        waiter.fulfil()
    bench.result()
    assert seen == [True, end == "stop" and reason not in STOP_ENDS]
    assert not bench.control.resting


# ---------------------------------------------------------------- stop, cancel, and which of them counts


def test_the_first_reason_to_stop_wins() -> None:
    control = Bench().control
    control.stop("first")
    control.stop("second")
    assert control.stop_reason == "first"
    assert control.stopped()


def test_the_flag_of_the_model_stops_and_a_reason_given_before_stays() -> None:
    control = Bench().control
    assert not control.stopped()
    control.flagged = lambda: True
    assert control.stopped()
    assert control.stop_reason == "model.stop_training was set"
    other = Bench().control
    other.stop("by hand")
    other.flagged = lambda: True
    assert other.stopped()
    assert other.stop_reason == "by hand"


def test_the_first_interrupt_wins_and_only_being_given_up_goes_before_it() -> None:
    control = Bench().control
    assert control.interrupt_with("cancelled", "first")
    assert not control.interrupt_with("failed", "second")
    assert control.interrupt is not None
    assert control.interrupt.reason == "first"
    at = control.interrupted_at
    assert control.interrupt_with("abandoned", "stuck")
    assert control.interrupt.cause == "abandoned"
    assert control.interrupted_at == at  # the grace period counts from the cancel


@pytest.mark.parametrize("where", ["safe_point", "stopped"])
def test_a_cancel_leaves_at_the_next_safe_point_and_again_at_each_that_follows(where: str) -> None:
    control = Bench().control
    control.stop("a stop does not hide it")
    control.interrupt_with("cancelled", "now")
    for _ in range(2):
        with pytest.raises(Interrupt):
            getattr(control, where)()


def test_a_wait_inside_of_another_gives_back_what_the_outer_one_waits_for() -> None:
    """A copy is completed inside of a lockstep wait: forgotten, the outer wait would hear of its end by
    polling."""
    bench = Bench(poll=PATIENT)
    done = threading.Event()
    bench.control.capture = lambda: inside()  # type: ignore[assignment,return-value]

    def inside() -> Copied:
        bench.control.wait("gate", lambda: True, unending=True)
        looks = iter([False, True])
        bench.control.wait("gate", lambda: next(looks), unending=True)
        return Copied(1)

    bench.start(lambda: bench.control.wait("lockstep", done.is_set))
    bench.copy()
    assert bench.control.waiting == "lockstep"
    done.set()
    bench.control.nudge()
    assert bench.result() is True


def test_while_a_run_closes_only_being_given_up_interrupts() -> None:
    control = Bench().control
    control.interrupt_with("cancelled", "now")
    control.closing = True
    control.safe_point()
    assert not control.stopped()
    control.interrupt_with("abandoned", "stuck")
    with pytest.raises(Interrupt):
        control.safe_point()


def test_a_closed_loop_is_seen_where_a_stop_is_looked_for() -> None:
    bench = Bench()
    bench.loop.closed = True
    with pytest.raises(Interrupt) as caught:
        bench.control.stopped()
    assert caught.value.cause == "loop gone"


def test_an_interrupt_passes_every_except_exception() -> None:
    assert not issubclass(Interrupt, Exception)


# ---------------------------------------------------------------- pauses


def test_a_pause_parks_at_the_safe_point_and_a_pause_taken_back_before_parks_nobody() -> None:
    bench = Bench()
    bench.control.pause()
    bench.control.resume()
    bench.control.safe_point()
    assert bench.entered == 0
    bench.control.pause()
    bench.start(bench.control.safe_point)
    assert bench.control.parked
    bench.control.resume()
    bench.result()
    assert not bench.control.parked
    bench.control.safe_point()
    assert bench.entered == 1


# ---------------------------------------------------------------- snapshots


def test_all_who_asked_by_a_safe_point_share_one_copy() -> None:
    bench = Bench()
    answers: list[Any] = []
    for _ in range(3):
        bench.control.ask(SnapshotRequest(answers.append, answers.append))
    bench.control.safe_point()
    assert answers == [1, 1, 1]
    bench.control.safe_point()
    assert bench.copies == 1


def test_a_request_that_comes_while_others_are_served_is_served_at_the_next_safe_point() -> None:
    bench = Bench()
    answers: list[Any] = []

    def ask_again(answer: Any) -> None:
        answers.append(answer)
        if len(answers) == 1:
            bench.control.ask(SnapshotRequest(ask_again, answers.append))

    bench.control.ask(SnapshotRequest(ask_again, answers.append))
    bench.control.safe_point()
    assert answers == [1]
    bench.control.safe_point()
    assert answers == [1, 2]


def test_a_model_that_broke_inside_a_batch_is_not_copied() -> None:
    bench = Bench()
    bench.control.torn = True
    refused: list[Any] = []
    bench.control.ask(SnapshotRequest(refused.append, refused.append))
    bench.control.leave()
    assert [type(error) for error in refused] == [TornState]
    assert bench.copies == 0


def test_what_a_model_raises_while_it_is_copied_goes_to_who_asked_and_the_training_goes_on() -> None:
    bench = Bench()
    error = MemoryError()

    def capture() -> Any:
        raise error

    bench.control.capture = capture
    answers: list[Any] = []
    refused: list[Any] = []
    bench.control.ask(SnapshotRequest(answers.append, refused.append))
    bench.control.safe_point()
    assert (answers, refused) == ([], [error])


def test_a_thread_that_leaves_answers_those_who_asked_and_later_ones_are_told_that_nobody_is_there() -> None:
    bench = Bench()
    answers: list[Any] = []
    assert bench.control.ask(SnapshotRequest(answers.append, answers.append))
    bench.control.leave()
    assert answers == [1]
    assert not bench.control.ask(SnapshotRequest(answers.append, answers.append))
    assert answers == [1]


def test_no_request_is_lost_while_the_thread_leaves() -> None:
    """Many ask while it goes: each is answered, or told at once that nobody is there."""
    bench = Bench()
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    accepted: list[bool] = []
    begun = threading.Barrier(5)

    def ask() -> None:
        begun.wait()
        accepted.extend(bench.control.ask(SnapshotRequest(answers.put, answers.put)) for _ in range(200))

    askers = [threading.Thread(target=ask) for _ in range(4)]
    for asker in askers:
        asker.start()
    begun.wait()
    bench.control.safe_point()
    bench.control.leave()
    for asker in askers:
        asker.join(PATIENT)
    assert len(accepted) == 800
    assert answers.qsize() == accepted.count(True)


# ---------------------------------------------------------------- what takes long is said


def test_a_wait_that_takes_long_is_complained_of_once() -> None:
    bench = Bench(poll=0.001)
    said: list[float] = []
    there = threading.Event()
    bench.start(lambda: bench.control.wait("mailbox", there.is_set, complain=said.append, complain_after=0.0))
    assert bench.still_waits("mailbox")
    assert bench.still_waits("mailbox")
    there.set()
    bench.control.nudge()
    assert bench.result() is True
    assert len(said) == 1
    assert bench.control.waited["mailbox"] >= said[0] >= 0


def test_a_lockstep_hook_that_takes_long_is_named() -> None:
    bench = Bench(poll=0.001, patience=0.0)
    waiter = lockstep(bench)
    bench.start(waiter.waits)
    assert bench.still_waits("lockstep")
    assert bench.still_waits("lockstep")
    waiter.fulfil()
    bench.result()
    assert [said[1:] for said in bench.complaints] == [("Slow", "on_epoch_end")]


def test_a_sync_iterable_waits_in_its_own_code_and_not_here() -> None:
    bench = Bench()
    data = IterableFeed([1], steps=None)
    data.begin(0)
    assert data.next() == Batch(1, size=1)
    assert bench.control.waits == {}
