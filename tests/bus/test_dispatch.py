"""The hook table: who is called for an event, in which order, with what, and what it costs when nobody is."""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import itertools
import pickle
from typing import TYPE_CHECKING, Any

import pytest

from asynccb.bus import clock as clock_room
from asynccb.bus import inline
from asynccb.bus.dispatch import Dispatcher, InlineFailure, Subscriber
from asynccb.bus.inline import as_coroutine
from asynccb.bus.mailbox import WORK, Mailbox, hook_of
from asynccb.bus.readers import Readers
from asynccb.callbacks import BaseLogger
from asynccb.callbacks.base import Callback
from asynccb.callbacks.hooks import read_hooks
from asynccb.errors import HookRefused
from asynccb.events import EpochEnd, ExceptionRaised, FrozenLogs, Logs, TrainBegin, TrainEnd
from asynccb.training.control import Limits
from asynccb.training.snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable


class Bell:
    rung = False

    def __init__(self) -> None:
        self.calls: list[str] = []

    def ring(self) -> None:
        self.calls.append("ring")

    def flush(self) -> None:
        self.calls.append("flush")


class Waits:
    """Stands for the training thread's control: notes what it would wait for."""

    limits = Limits()

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.complaints: list[Any] = []

    def wait(self, reason: str, predicate: Callable[[], bool], *, complain: Any = None, **_: Any) -> bool:
        self.reasons.append(reason)
        self.complaints.append(complain)
        return True


class Gate:
    """Stands for the copy of a model that is made beside the training."""

    def __init__(self) -> None:
        self.copying = False
        self.finished = 0

    def finish(self) -> None:
        self.finished += self.copying
        self.copying = False


class Bench:
    def __init__(self, *callbacks: Callback, model_asks: bool = False) -> None:
        self._model_asks = model_asks
        self.bell, self.control, self.gate = Bell(), Waits(), Gate()
        self.readers = Readers(64, lambda: self.dispatcher.rebuild())
        self.failures: list[InlineFailure] = []
        self.warnings: list[tuple[float, str, str]] = []
        self.subscribers = [self._subscriber(callback) for callback in callbacks]
        self.dispatcher = Dispatcher(
            self.subscribers,
            self.readers,
            self.bell,  # type: ignore[arg-type]
            self.control,  # type: ignore[arg-type]
            self.gate,  # type: ignore[arg-type]
            failed=self.failures.append,
            warn=lambda *told: self.warnings.append(told),
        )

    def _subscriber(self, callback: Callback) -> Subscriber:
        hooks = read_hooks(callback)
        name = type(callback).__name__
        box = Mailbox(name, callback.overflow, callback.mailbox_size, lambda box, has_room: None)
        return Subscriber(
            name,
            callback,
            hooks.inline,
            hooks.beside,
            box,
            lockstep=callback.lockstep,
            changes_model=hooks.changes_model,
            model_asks=self._model_asks,
        )

    def box(self, at: int) -> list[Any]:
        return list(self.subscribers[at].mailbox.queue)

    def waiting(self, at: int) -> list[str]:
        """The hooks for which something lies in a mailbox; coroutines of inline hooks in brackets."""
        return [f"({hook_of(e)})" if e[0] == WORK else hook_of(e) for e in self.box(at)]

    def close(self) -> None:
        for subscriber in self.subscribers:
            subscriber.mailbox.discard_all()


class Inline(Callback):
    """Notes what it sees on the training thread."""

    def __init__(self, name: str = "", seen: list[Any] | None = None) -> None:
        self.name = name
        self.seen: list[Any] = [] if seen is None else seen

    def on_train_batch_end(self, batch: int, logs: Any = None) -> Any:
        self.seen.append((self.name, batch, dict(logs)))
        logs[f"by {self.name}"] = len(logs)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> Any:
        self.seen.append((self.name, epoch, dict(logs)))
        logs[f"by {self.name}"] = len(logs)


class Beside(Callback):
    async def on_train_batch_end(self, batch: int, logs: Any = None) -> None: ...

    async def on_epoch_end(self, epoch: int, logs: Any = None) -> None: ...

    async def on_train_end(self, logs: Any = None) -> None: ...

    async def on_exception(self, exception: BaseException) -> None: ...


class Both(Callback):
    """Decides inline and hands a slow half over."""

    def __init__(self, seen: list[Any] | None = None, name: str = "both") -> None:
        self.seen: list[Any] = [] if seen is None else seen
        self.name = name

    def on_epoch_end(self, epoch: int, logs: Any = None) -> Any:
        self.seen.append(f"{self.name} inline")
        return self.later()

    def on_train_end(self, logs: Any = None) -> Any:
        self.seen.append(f"{self.name} end")
        return self.later()

    async def later(self) -> None: ...


# ---------------------------------------------------------------- inline hooks and logs


def test_inline_hooks_run_in_list_order_on_one_dict_and_see_what_earlier_ones_added() -> None:
    seen: list[Any] = []
    bench = Bench(Inline("a", seen), Inline("b", seen))
    logs = Logs(loss=1.0)
    bench.dispatcher.emit.epoch_end(3, logs, 7)
    assert seen == [("a", 3, {"loss": 1.0}), ("b", 3, {"loss": 1.0, "by a": 1})]
    assert dict(logs) == {"loss": 1.0, "by a": 1, "by b": 2}


def test_logs_of_batches_may_come_late_while_nobody_looks_at_them_before_the_epoch_ends() -> None:
    class Looks(BaseLogger):
        def on_batch_end(self, batch: int, logs: Any = None) -> None:
            super().on_batch_end(batch, logs)

    for callbacks in ([], [BaseLogger()], [BaseLogger(), Both()]):
        assert Bench(*callbacks).dispatcher.emit.late
    for others in (Inline(), Beside(), Looks()):
        assert not Bench(BaseLogger(), others).dispatcher.emit.late
    bench = Bench(BaseLogger())
    _stream = bench.readers.open(None, 0, lambda: None)
    bench.dispatcher.rebuild()
    assert not bench.dispatcher.emit.late


@pytest.mark.parametrize("event", ["batch_end", "epoch_end"])
def test_awaitables_and_readers_get_the_very_logs_that_the_last_inline_hook_left(event: str) -> None:
    bench = Bench(Beside(), Inline("late"))  # whatever the order of the list
    stream = bench.readers.open(None, 0, lambda: None)
    logs = Logs(loss=1.0)
    fields = (0, logs, 0, 0) if event == "batch_end" else (0, logs, 0)
    getattr(bench.dispatcher.emit, event)(*fields)
    ((_, _, delivered, _, _),) = bench.box(0)
    found = bench.readers.read(0)
    assert delivered is logs
    assert found is not None
    assert found[1].logs is logs  # type: ignore[attr-defined]
    assert delivered == {"loss": 1.0, "by late": 1}
    assert stream is not None


@pytest.mark.parametrize(
    "change",
    [
        lambda logs: logs.__setitem__("a", 1),
        lambda logs: logs.__delitem__("loss"),
        lambda logs: logs.__ior__({"a": 1}),
        lambda logs: logs.clear(),
        lambda logs: logs.pop("loss"),
        lambda logs: logs.popitem(),
        lambda logs: logs.setdefault("a", 1),
        lambda logs: logs.update(a=1),
    ],
)
def test_after_the_last_inline_hook_the_logs_are_frozen(change: Callable[[Any], Any]) -> None:
    bench = Bench(Beside())
    logs = Logs(loss=1.0)
    bench.dispatcher.emit.epoch_end(0, logs, 0)
    with pytest.raises(TypeError, match="shared by all callbacks"):
        change(logs)
    assert logs == {"loss": 1.0}


def test_frozen_logs_pickle_and_copy_as_a_plain_dict_and_deep_copies_are_deep() -> None:
    logs = Logs(loss=[1.0])
    logs.freeze()
    for made in (pickle.loads(pickle.dumps(logs)), copy.copy(logs), copy.deepcopy(logs), logs.copy()):
        assert type(made) is dict
        assert made == {"loss": [1.0]}
    assert copy.deepcopy(logs)["loss"] is not logs["loss"]
    assert type(logs) is FrozenLogs


def test_all_inline_hooks_of_an_event_run_before_any_awaitable_is_handed_over() -> None:
    seen: list[str] = []
    first, second = Both(seen, "first"), Both(seen, "second")
    bench = Bench(first, second)
    original = bench.dispatcher._append_all

    def append(entries: Any, **how: Any) -> None:
        seen.extend(f"handed over to {subscriber.name}" for subscriber, _ in entries)
        original(entries, **how)

    bench.dispatcher._append_all = append  # type: ignore[method-assign]
    bench.dispatcher.emit.epoch_end(0, Logs(), 0)
    assert seen == ["first inline", "second inline", "handed over to Both", "handed over to Both"]
    bench.close()


def test_all_inline_closing_hooks_run_before_any_awaitable_of_them_is_handed_over() -> None:
    seen: list[str] = []
    bench = Bench(Both(seen, "first"), Both(seen, "second"))
    bench.dispatcher.begin(TrainBegin, 0)
    original = bench.dispatcher._append_all

    def append(entries: Any, **how: Any) -> None:
        seen.extend(f"handed over to {subscriber.name}" for subscriber, _ in entries)
        original(entries, **how)

    bench.dispatcher._append_all = append  # type: ignore[method-assign]
    assert bench.dispatcher.close(TrainEnd, 0, Logs()) == []
    assert seen == ["first end", "second end", "handed over to Both", "handed over to Both"]
    bench.close()


class Interrupted(BaseException):
    pass


def never_room(box: Mailbox, has_room: Any) -> None:
    raise Interrupted  # as a cancel of the run ends the wait


@pytest.mark.parametrize("kind", ["async", "both"])
def test_who_waits_for_one_mailbox_has_put_the_event_into_all_others_first(kind: str) -> None:
    class Full(Callback):
        mailbox_size = 1

        async def on_epoch_end(self, epoch: int, logs: Any = None) -> None: ...

    class FullBoth(Callback):
        mailbox_size = 1

        def on_epoch_end(self, epoch: int, logs: Any = None) -> Any:
            return self.later()

        async def later(self) -> None: ...

    slow = Full() if kind == "async" else FullBoth()
    bench = Bench(slow, Both([], "roomy") if kind == "both" else Beside())
    for subscriber in bench.subscribers:
        subscriber.mailbox._wait_for_room = never_room
    for _ in range(2):  # an epoch's end may lie there twice before it is waited for
        try:
            bench.dispatcher.emit.epoch_end(0, Logs(), 0)
        except Interrupted:
            break
    assert len(bench.box(0)) == len(bench.box(1))
    bench.close()


# ---------------------------------------------------------------- what a hook may return


def test_a_coroutine_goes_into_that_callbacks_mailbox_with_its_hook_and_epoch() -> None:
    bench = Bench(Both())
    bench.dispatcher.emit.epoch_end(4, Logs(), 0)
    ((code, work, _, _, epoch),) = bench.box(0)
    assert (code, work.hook, epoch) == (WORK, "on_epoch_end", 4)
    bench.close()


@pytest.mark.parametrize("answer", [None, 3, "text", [], object(), (x for x in ())])
def test_what_is_not_awaitable_is_ignored(answer: object) -> None:
    class Answers(Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> Any:
            return answer

        on_train_batch_end = on_epoch_end

    bench = Bench(Answers())
    bench.dispatcher.emit.epoch_end(0, Logs(), 0)
    bench.dispatcher.emit.batch_end(0, Logs(), 0, 0)
    assert bench.box(0) == []


def test_an_object_of_the_users_own_that_can_be_awaited_is_awaited() -> None:
    class Mine:
        def __await__(self) -> Any:
            yield from ()
            return 5

    made = as_coroutine(Mine(), "here")
    assert made is not None
    assert asyncio.run(made) == 5  # type: ignore[arg-type]


@pytest.mark.asyncio
async def test_futures_and_tasks_are_refused_by_name() -> None:
    loop = asyncio.get_running_loop()
    task = asyncio.create_task(asyncio.sleep(0))
    for made in (loop.create_future(), concurrent.futures.Future[None](), task):
        message = rf"Saver.on_epoch_end=.*: a {type(made).__name__} made on the training thread is not safe"
        with pytest.raises(HookRefused, match=message):
            as_coroutine(made, "Saver.on_epoch_end")
    await task


@pytest.mark.parametrize("event", ["batch_end", "epoch_end"])
def test_a_hook_that_returns_a_future_fails_the_training_and_is_named(event: str) -> None:
    class Wrong(Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> Any:
            return concurrent.futures.Future()

        on_train_batch_end = on_epoch_end

    bench = Bench(Wrong())
    fields = (0, Logs(), 0, 0) if event == "batch_end" else (0, Logs(), 0)
    with pytest.raises(HookRefused, match=r"Wrong.on_(epoch|train_batch)_end"):
        getattr(bench.dispatcher.emit, event)(*fields)


# ---------------------------------------------------------------- what nobody wants


def test_a_batch_event_that_nobody_wants_is_not_built_and_takes_its_number_all_the_same() -> None:
    bench = Bench(Callback())
    emit = bench.dispatcher.emit
    assert [getattr(emit, name) for name in emit._fields if "batch" in name] == [None] * 6
    bench.dispatcher.skip()
    assert bench.dispatcher.taken == 1
    emit.epoch_end(0, Logs(), 0)
    assert bench.dispatcher.taken == 2


def test_epoch_events_are_always_built() -> None:
    bench = Bench()
    bench.dispatcher.emit.epoch_end(0, Logs(), 0)
    found = bench.readers.read(0)
    assert found is not None
    assert type(found[1]) is EpochEnd


@pytest.mark.asyncio
async def test_a_reader_that_joins_makes_a_new_version_of_the_table_and_one_that_leaves_another() -> None:
    bench = Bench(Callback())
    before = bench.dispatcher.emit
    stream = bench.readers.open(None, 0, lambda: None)
    joined = bench.dispatcher.emit
    assert (before.batch_end, joined.batch_end is None) == (None, False)
    await stream.aclose()
    assert bench.dispatcher.emit.batch_end is None


def test_events_are_numbered_in_the_order_in_which_they_happen_whoever_wants_them() -> None:
    bench = Bench(Beside())
    for epoch in range(2):
        bench.dispatcher.emit.epoch_begin(epoch, Logs(), 0)
        bench.dispatcher.skip()
        bench.dispatcher.emit.batch_end(0, Logs(), epoch, 0)
        bench.dispatcher.emit.epoch_end(epoch, Logs(), 0)
    assert [entry[3] for entry in bench.box(0)] == [2, 3, 6, 7]


def test_one_entry_is_shared_by_all_mailboxes() -> None:
    bench = Bench(Beside(), Beside())
    bench.dispatcher.emit.batch_end(0, Logs(), 0, 0)
    assert bench.box(0)[0] is bench.box(1)[0]


def test_batch_events_ring_and_epoch_events_flush() -> None:
    bench = Bench(Beside())
    bench.dispatcher.emit.batch_end(0, Logs(), 0, 0)
    assert bench.bell.calls == ["ring"]
    bench.dispatcher.emit.epoch_end(0, Logs(), 0)
    assert bench.bell.calls == ["ring", "flush"]


# ---------------------------------------------------------------- lockstep


class Step(Beside):
    lockstep = True


class StepBoth(Both):
    lockstep = True


@pytest.mark.parametrize("callback", [Step, StepBoth])
def test_the_training_waits_for_the_awaitables_of_a_lockstep_callback(callback: type[Callback]) -> None:
    bench = Bench(Beside(), callback())
    bench.dispatcher.emit.epoch_end(0, Logs(), 0)
    assert bench.control.reasons == ["lockstep"]
    complain = bench.control.complaints[0]
    complain(31.0)
    assert bench.warnings == [(31.0, callback.__name__, "on_epoch_end")]
    bench.close()


def test_no_other_callback_makes_a_batch_wait() -> None:
    bench = Bench(Beside(), Both())
    bench.dispatcher.emit.batch_end(0, Logs(), 0, 0)
    bench.dispatcher.emit.epoch_end(0, Logs(), 0)
    assert bench.control.reasons == []
    bench.close()


def test_the_wait_for_train_begins_awaitables_names_who_takes_so_long() -> None:
    bench = Bench(Beside(), Step())
    bench.dispatcher.begin(TrainBegin, 0)
    bench.subscribers[0].mailbox.idle = True
    bench.dispatcher.wait_begun()
    assert bench.control.reasons == ["train begin"]
    bench.control.complaints[0](30.0)
    assert bench.warnings == [(30.0, "Step", "on_train_begin")]


# ---------------------------------------------------------------- failures


class Broken(Inline):
    def on_epoch_end(self, epoch: int, logs: Any = None) -> Any:
        raise ValueError("broken")

    on_train_batch_end = on_epoch_end


@pytest.mark.parametrize("event", ["batch_end", "epoch_end"])
def test_an_inline_hook_that_raises_ends_the_event_with_that_very_exception(event: str) -> None:
    seen: list[Any] = []
    bench = Bench(Inline("first", seen), Broken(), Inline("last", seen), Beside())
    fields = (2, Logs(), 2, 0) if event == "batch_end" else (2, Logs(), 0)
    with pytest.raises(ValueError, match="broken") as caught:
        getattr(bench.dispatcher.emit, event)(*fields)
    assert [name for name, *_ in seen] == ["first"]
    assert bench.box(3) == []
    (failure,) = bench.failures
    assert (failure.subscriber.name, failure.epoch, failure.error) == ("Broken", 2, caught.value)


def test_what_was_returned_before_another_hook_raised_is_handed_over_all_the_same() -> None:
    bench = Bench(Both(), Broken())
    with pytest.raises(ValueError, match="broken"):
        bench.dispatcher.emit.epoch_end(0, Logs(), 0)
    assert bench.waiting(0) == ["(on_epoch_end)"]
    bench.close()


# ---------------------------------------------------------------- the ends


class Begins(Inline):
    def on_train_begin(self, logs: Any = None) -> Any:
        self.seen.append((self.name, "begin"))
        if self.name == "broken":
            raise ValueError("broken")

    def on_train_end(self, logs: Any = None) -> Any:
        self.seen.append((self.name, "end"))
        if self.name == "broken at the end":
            raise ValueError("broken")


def test_closing_hooks_are_for_every_callback_whose_train_begin_was_called() -> None:
    seen: list[Any] = []
    bench = Bench(Begins("first", seen), Begins("broken", seen), Begins("never", seen), Beside())
    with pytest.raises(ValueError, match="broken"):
        bench.dispatcher.begin(TrainBegin, 0)
    bench.dispatcher.close(TrainEnd, 0, Logs())
    assert seen == [("first", "begin"), ("broken", "begin"), ("first", "end"), ("broken", "end")]
    assert bench.waiting(3) == []


def test_a_closing_hook_that_raises_keeps_no_other_from_its_own() -> None:
    seen: list[Any] = []
    bench = Bench(Begins("broken at the end", seen), Begins("second", seen), Beside())
    bench.dispatcher.begin(TrainBegin, 0)
    errors = bench.dispatcher.close(TrainEnd, 0, Logs())
    assert [str(error) for error in errors] == ["broken"]
    assert seen[-2:] == [("broken at the end", "end"), ("second", "end")]
    assert bench.waiting(2) == ["on_train_end"]


def test_a_closing_event_comes_once_even_if_a_stuck_thread_comes_back() -> None:
    bench = Bench(Beside())
    bench.dispatcher.begin(TrainBegin, 0)
    for _ in range(2):
        bench.dispatcher.close_beside(ExceptionRaised, ValueError())
        bench.dispatcher.close_beside(TrainEnd, 0, Logs())
    assert bench.waiting(0) == ["on_exception", "on_train_end"]


class Listens(Beside):
    async def on_checkpoint_saved(self, path: str, epoch: int) -> None: ...


def test_a_durable_file_is_told_to_those_who_listen_and_before_their_last_event() -> None:
    bench = Bench(Listens(), Beside())
    bench.dispatcher.begin(TrainBegin, 0)
    bench.dispatcher.close(TrainEnd, 0, Logs())
    assert bench.waiting(0) == []
    bench.dispatcher.commit("a.h5", 3)
    assert bench.dispatcher.release_withheld()
    assert not bench.dispatcher.release_withheld()
    assert bench.waiting(0) == ["on_checkpoint_saved", "on_train_end"]
    assert bench.box(0)[0][1:3] == ("a.h5", 3)
    assert bench.waiting(1) == ["on_train_end"]


def test_a_silenced_dispatcher_reaches_no_hook_any_more() -> None:
    seen: list[Any] = []
    bench = Bench(Inline("a", seen), Beside())
    old = bench.dispatcher.emit
    bench.dispatcher.silence()
    bench.dispatcher.emit.epoch_end(0, Logs(), 0)
    old.epoch_end(0, Logs(), 0)
    assert bench.dispatcher.emit.batch_end is None
    assert (seen, bench.box(1)) == ([], [])


class Ends(Inline):
    def on_train_end(self, logs: Any = None) -> Any:
        self.seen.append((self.name, "end"))


def test_a_muted_callback_gets_its_closing_hooks_inline_and_no_other() -> None:
    seen: list[Any] = []
    bench = Bench(Ends("a", seen), Ends("muted", seen), Ends("c", seen))
    bench.dispatcher.begin(TrainBegin, 0)
    emit = bench.dispatcher.emit
    bench.dispatcher.mute(bench.subscribers[1])
    emit.batch_end(0, Logs(), 0, 0)
    emit.epoch_end(0, Logs(), 0)
    bench.dispatcher.close(TrainEnd, 0, Logs())
    names = [name for name, *_ in seen]
    assert names == ["a", "c", "a", "c", "a", "muted", "c"]


def test_a_hook_may_be_muted_while_it_runs() -> None:
    class Late(Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> Any:
            bench.dispatcher.mute(bench.subscribers[0])
            return self.later()

        async def later(self) -> None: ...

    seen: list[Any] = []
    bench = Bench(Late(), Inline("next", seen))
    for index in range(2):
        bench.dispatcher.emit.batch_end(index, Logs(), 0, index)
    assert [batch for _, batch, _ in seen] == [0, 1]
    assert bench.waiting(0) == ["(on_train_batch_end)"]
    bench.close()


# ---------------------------------------------------------------- snapshots of inline hooks


class State:
    arrays: dict[str, Any] = {}


def test_inline_hooks_of_one_event_share_one_copy_and_each_has_a_handle_of_its_own() -> None:
    snapshots, captures = inline.HookSnapshots([("a", False), ("b", True)]), []

    def capture(*, pooled: bool) -> Snapshot:
        captures.append(1)
        return Snapshot(State(), 0, 0)  # type: ignore[arg-type]

    first, second = snapshots.take("a", capture), snapshots.take("b", capture)
    assert len(captures) == 1
    first.release()
    assert not second.released
    assert snapshots.of("a") == (first,)
    snapshots.forget()
    snapshots.take("a", capture)
    assert len(captures) == 2


def test_a_copy_is_not_shared_over_a_hook_that_may_have_changed_the_model() -> None:
    snapshots = inline.HookSnapshots([("looks", False), ("changes", True), ("looks too", False)])
    captures = []

    def capture(*, pooled: bool) -> Snapshot:
        captures.append(pooled)
        return Snapshot(State(), 0, 0)  # type: ignore[arg-type]

    kept = [
        snapshots.take(name, capture, pooled=True) for name in ("looks", "changes", "looks too", "looks too")
    ]
    assert captures == [True, True]
    assert [one._shared is other._shared for one, other in itertools.pairwise(kept)] == [
        True,
        False,
        True,
    ]


def test_a_callback_that_asks_twice_in_one_hook_gets_two_copies_if_it_may_have_changed_the_model() -> None:
    for changes, copies in ((True, 2), (False, 1)):
        snapshots, captures = inline.HookSnapshots([("asks", changes)]), []

        def capture(*, pooled: bool, captures: list[bool] = captures) -> Snapshot:
            captures.append(pooled)
            return Snapshot(State(), 0, 0)  # type: ignore[arg-type]

        _both = [snapshots.take("asks", capture) for _ in range(2)]
        assert len(captures) == copies


def test_a_callback_that_is_wrapped_into_another_one_shares_no_copy_and_its_copy_is_made_at_once() -> None:
    inner = Callback()

    class Wraps(Callback):
        changes_model = False

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            def capture(*, pooled: bool) -> Snapshot:
                bench.gate.copying = True
                return Snapshot(State(), 0, 0)  # type: ignore[arg-type]

            bench.dispatcher.snapshot(inner, capture, pooled=True)
            bench.dispatcher.snapshot(self, capture, pooled=True)
            bench.dispatcher.snapshot(inner, capture, pooled=True)

    bench = Bench(Wraps())
    bench.dispatcher.emit.batch_end(0, Logs(), 0, 1)
    assert (bench.gate.finished, bench.gate.copying) == (2, False)


def test_a_stream_alone_rings_for_batches() -> None:
    bench = Bench()
    _stream = bench.readers.open(None, 0, lambda: None)
    bench.dispatcher.emit.batch_end(0, Logs(), 0, 1)
    assert bench.bell.calls == ["ring"]


class Saves(Callback):
    """Takes a snapshot at the ends of batches and epochs; its hooks only look."""

    changes_model = False

    def __init__(self, bench: list[Any]) -> None:
        self.bench = bench

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.take()

    on_epoch_end = on_train_batch_end

    def take(self) -> None:
        bench = self.bench[0]

        def capture(*, pooled: bool) -> Snapshot:
            bench.gate.copying = True
            return Snapshot(State(), 0, 0)  # type: ignore[arg-type]

        bench.dispatcher.snapshot(self, capture, pooled=True)


@pytest.mark.parametrize(
    ("event", "fields"),
    [("batch_end", (0, Logs(), 0, 1)), ("epoch_end", (0, Logs(), 1))],
    ids=["batch", "epoch"],
)
@pytest.mark.parametrize("looks", [False, True])
def test_a_copy_under_way_is_completed_before_a_hook_that_may_change_the_model(
    event: str, fields: Any, looks: bool
) -> None:
    during: list[bool] = []
    bench: list[Any] = []

    class Later(Callback):
        changes_model = not looks

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            during.append(bench[0].gate.copying)

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            during.append(bench[0].gate.copying)

    bench.append(Bench(Saves(bench), Later()))
    getattr(bench[0].dispatcher.emit, event)(*fields)
    assert during == [looks]


def test_no_hook_completes_the_copy_of_a_model_that_asks_the_gate_whoever_writes_to_it() -> None:
    during: list[bool] = []

    class Later(Callback):
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            during.append(bench.gate.copying)

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            during.append(bench.gate.copying)

    bench = Bench(Later(), model_asks=True)
    bench.gate.copying = True
    bench.dispatcher.emit.epoch_begin(0, Logs(), 0)
    bench.dispatcher.emit.batch_begin(0, Logs(), 0, 0)
    assert during == [True, True]


def test_a_copy_of_the_event_before_is_completed_too() -> None:
    during: list[bool] = []

    class Later(Callback):
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            during.append(bench.gate.copying)

    bench = Bench(Later())
    bench.gate.copying = True
    bench.dispatcher.emit.batch_begin(0, Logs(), 0, 0)
    assert during == [False]


# ---------------------------------------------------------------- slow hooks


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(clock_room, "perf_counter", lambda: self.now)


def slow_training(clock: Clock, hook: float, batch: float, batches: int = 20) -> None:
    class Slow(Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            clock.now += hook

    bench = Bench(Callback(), Slow())
    for index in range(batches):
        clock.now += batch
        bench.dispatcher.emit.batch_end(index, Logs(), 0, index)


def test_an_inline_hook_that_is_slow_beside_the_batches_is_warned_of_once_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    message = r"Method on_train_batch_end\(\) of Slow is slow compared to the batch update \(0.200000 s\)"
    with pytest.warns(UserWarning, match=message) as caught:
        slow_training(Clock(monkeypatch), hook=0.2, batch=0.01)
    assert len(caught) == 1


@pytest.mark.parametrize(("hook", "batch"), [(0.2, 1.0), (0.05, 0.001), (0.0, 0.5)])
def test_a_hook_that_is_quick_or_quick_beside_its_batch_is_not(
    monkeypatch: pytest.MonkeyPatch, hook: float, batch: float
) -> None:
    slow_training(Clock(monkeypatch), hook, batch)


def test_one_slow_call_among_ten_is_no_slow_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    class Sometimes(Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            clock.now += 1.0 if batch % 10 == 0 else 0.0

    bench = Bench(Sometimes())
    for index in range(60):
        clock.now += 0.01
        bench.dispatcher.emit.batch_end(index, Logs(), 0, index)
