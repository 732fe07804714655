"""What happens on the training thread around the loop: order, contexts, lockstep, and copies of the model."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from typing import Any

import numpy as np
import pytest
from waiting import until

from asynccb import (
    ArgumentError,
    Callback,
    ModelBusy,
    ModelError,
    NotStarted,
    Run,
    Snapshot,
    TornState,
    Trainer,
)
from asynccb.testing import Recorder, ScriptedModel

X = np.zeros((4, 1))


def start(model: Any, *callbacks: Callback, epochs: int = 1, **more: Any) -> Run:
    return Trainer(model).start(X, batch_size=1, epochs=epochs, verbose=0, callbacks=callbacks, **more)


def trained(snapshot: Snapshot) -> float:
    """After how many batches the copy was made; a torn one would hold two numbers."""
    (number,) = set(snapshot.arrays["weights"].tolist())
    assert number == snapshot.step
    return number


# ---------------------------------------------------------------- order on the thread


@pytest.mark.asyncio
async def test_the_training_waits_for_the_awaitables_of_train_begin_of_all_callbacks() -> None:
    class Opens(Callback):
        async def on_train_begin(self, logs: Any = None) -> None:
            for _ in range(50):
                await asyncio.sleep(0)
            steps.append(model.steps)

    class OpensToo(Callback):
        def on_train_begin(self, logs: Any = None) -> Any:
            return Opens.on_train_begin(self)  # type: ignore[arg-type]

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            steps.append("batch")

    steps: list[Any] = []
    model = ScriptedModel()
    await start(model, Opens(), OpensToo())
    assert steps == [0, 0, "batch", "batch", "batch", "batch"]


@pytest.mark.asyncio
async def test_a_train_begin_whose_awaitable_fails_ends_it_before_the_first_batch() -> None:
    class Opens(Recorder):
        async def on_train_begin(self, logs: Any = None) -> None:
            raise PermissionError("the file")

    opens, other, model = Opens(), Recorder(), ScriptedModel()
    run = start(model, opens, other)
    with pytest.raises(Exception, match=r"Opens\.on_train_begin raised: PermissionError: the file"):
        await run
    assert model.steps == 0
    assert opens.hooks == ["on_exception", "on_train_end"]
    assert other.hooks == ["on_train_begin", "on_exception", "on_train_end"]


@pytest.mark.asyncio
async def test_hooks_that_add_to_logs_are_seen_by_later_ones_and_by_all_that_run_beside() -> None:
    class Adds(Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            logs["lr"] = 0.1
            self.kept = logs

    class Sees(Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> Any:
            seen["inline"] = dict(logs)
            return self.later(logs)

        async def later(self, logs: Any) -> None:
            seen["later"] = logs

    seen: dict[str, Any] = {}
    recorder, adds = Recorder(), Adds()
    run = start(ScriptedModel(), recorder, adds, Sees())
    history = await run
    assert recorder.logs[recorder.hooks.index("on_epoch_end")] == {"loss": 1.0, "lr": 0.1}
    assert seen == {"inline": {"loss": 1.0, "lr": 0.1}, "later": {"loss": 1.0, "lr": 0.1}}
    assert history.history == {"loss": [1.0], "lr": [0.1]}
    assert seen["later"] is adds.kept
    with pytest.raises(TypeError, match="can no longer be changed"):
        adds.kept["late"] = 1


@pytest.mark.asyncio
async def test_lockstep_makes_the_training_wait_for_each_hook() -> None:
    class Slow(Callback):
        async def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            began = model.steps
            for _ in range(20):
                await asyncio.sleep(0)
            spans.append((began, model.steps))

    class Lockstep(Slow):
        lockstep = True

    spans: list[tuple[int, int]] = []
    model = ScriptedModel()
    run = start(model, Lockstep())
    await run
    assert spans == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert run.stats.waits["lockstep"] == 4

    spans, model = [], ScriptedModel()  # the negative control
    await start(model, Slow())
    assert spans[0] != (1, 1)


@pytest.mark.asyncio
async def test_a_model_without_room_for_stop_training_trains_all_the_same() -> None:
    class Slotted:
        __slots__ = ()

        def train_batch(self, batch: Any) -> dict[str, float]:
            return {"loss": 1.0}

    assert (await start(Slotted())).history == {"loss": [1.0]}


# ---------------------------------------------------------------- contexts

request: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="none")


class Inline(Callback):
    def __init__(self, name: str) -> None:
        self.name = name
        self.seen: list[str] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.seen.append(request.get())
        request.set(f"{self.name} {epoch}")

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seen.append(request.get())


class Beside(Inline):
    async def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # type: ignore[override]
        super().on_epoch_begin(epoch, logs)

    async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # type: ignore[override]
        super().on_epoch_end(epoch, logs)


@pytest.mark.asyncio
async def test_hooks_see_the_callers_context_and_their_own_changes_which_go_nowhere_else() -> None:
    inline, first, second = Inline("inline"), Beside("first"), Beside("second")
    token = request.set("caller")
    try:
        await start(ScriptedModel(), inline, first, second, epochs=2)
        assert request.get() == "caller"
    finally:
        request.reset(token)
    assert inline.seen == ["caller", "inline 0", "inline 0", "inline 1"]
    assert first.seen == ["caller", "first 0", "first 0", "first 1"]
    assert second.seen == ["caller", "second 0", "second 0", "second 1"]


@pytest.mark.asyncio
async def test_what_a_hook_changes_is_unknown_to_the_next_training() -> None:
    inline = Inline("inline")
    trainer = Trainer(ScriptedModel())
    for _ in range(2):
        await trainer.fit(X, verbose=0, callbacks=inline)
    assert inline.seen == ["none", "inline 0"] * 2


# ---------------------------------------------------------------- copies asked for from the loop


@pytest.mark.asyncio
async def test_a_queued_run_has_nothing_to_copy() -> None:
    run = start(ScriptedModel())
    with pytest.raises(NotStarted, match="is queued"):
        await run.snapshot()
    await run


@pytest.mark.asyncio
async def test_a_copy_of_a_running_model_is_made_after_the_batch_under_way_and_stays_as_it_is() -> None:
    model = ScriptedModel(gated=True)
    run = start(model)
    await model.open(1)
    asked = asyncio.create_task(run.snapshot())
    await asyncio.sleep(0)
    assert not asked.done()
    await model.open(1)
    snapshot = await asked
    model.open_for_good()
    await run
    assert (trained(snapshot), snapshot.epoch, model.steps) == (2, 0, 4)
    assert snapshot.to_model().steps == 2
    with pytest.raises(ValueError, match="read-only"):
        snapshot.arrays["weights"][0] = 7


@pytest.mark.asyncio
async def test_a_copy_in_a_pause_is_made_at_once() -> None:
    run = start(ScriptedModel(), epochs=10**6)
    run.pause()
    await until(lambda: run.state == "paused")
    step = run.step
    assert trained(await run.snapshot()) == step
    assert (run.state, run.step) == ("paused", step)
    run.stop()
    await run


@pytest.mark.asyncio
async def test_a_lockstep_hook_may_await_a_copy() -> None:
    class Copies(Callback):
        lockstep = True

        async def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            copies.append(trained(await self.run.snapshot()))

    copies: list[float] = []
    await start(ScriptedModel(), Copies())
    assert copies == [1, 2, 3, 4]


@pytest.mark.asyncio
async def test_a_hook_of_train_begin_may_await_a_copy() -> None:
    class Copies(Callback):
        async def on_train_begin(self, logs: Any = None) -> None:
            copies.append(trained(await self.run.snapshot()))

    copies: list[float] = []
    await start(ScriptedModel(), Copies())
    assert copies == [0]


@pytest.mark.asyncio
async def test_a_copy_is_made_between_two_batches_of_a_validation() -> None:
    recorder, model = Recorder(), ScriptedModel(gated=True)
    run = start(model, recorder, validation_data=(X, None))
    await model.open(5)  # four trained, one validated
    asked = asyncio.create_task(run.snapshot())
    await asyncio.sleep(0)
    await model.open(1)
    assert trained(await asked) == 4
    assert "on_test_end" not in recorder.hooks
    model.open_for_good()
    await run


@pytest.mark.asyncio
async def test_all_who_ask_before_one_safe_point_share_one_copy_and_release_it_each_for_himself() -> None:
    model = ScriptedModel(gated=True)
    run = start(model)
    await model.open(1)
    asked = [asyncio.create_task(run.snapshot()) for _ in range(5)]
    await asyncio.sleep(0)
    asked.pop().cancel()  # whoever no longer wants it does no harm
    await model.open(1)
    first, *others = await asyncio.gather(*asked)
    assert run.stats.snapshots == 1
    first.release()
    assert [trained(other) for other in others] == [2, 2, 2]
    with pytest.raises(RuntimeError, match="was released"):
        first.to_model()
    model.open_for_good()
    await run


@pytest.mark.asyncio
async def test_after_the_end_a_copy_has_the_final_weights_for_as_many_as_ask() -> None:
    model = ScriptedModel()
    run = start(model)
    await run
    first, second = await asyncio.gather(run.snapshot(), run.snapshot())
    assert (trained(first), trained(second)) == (4, 4)
    assert (await start(model)).outcome == "completed"  # nothing holds the model any more


@pytest.mark.asyncio
async def test_while_the_run_drains_a_copy_has_the_final_weights() -> None:
    class Copies(Callback):
        async def on_train_end(self, logs: Any = None) -> None:
            await until(lambda: not any(t.name == f"asynccb {self.run.name}" for t in threading.enumerate()))
            copies.append(trained(await self.run.snapshot()))

    copies: list[float] = []
    model = ScriptedModel()
    await start(model, Copies())
    assert copies == [4]
    assert (await start(model)).outcome == "completed"


def test_after_the_loop_has_gone_a_copy_can_be_had_on_another() -> None:
    async def main() -> Run:
        run = start(ScriptedModel())
        await run
        return run

    run = asyncio.run(main())
    assert trained(asyncio.run(run.snapshot())) == 4


@pytest.mark.asyncio
async def test_after_the_end_a_copy_is_refused_while_another_run_has_the_model() -> None:
    model = ScriptedModel()
    ended = start(model)
    await ended
    other = start(model)
    with pytest.raises(ModelBusy, match=f"the model is already in {other.name}"):
        await ended.snapshot()
    await other


@pytest.mark.asyncio
async def test_no_copy_is_made_of_a_model_that_raised_inside_a_batch() -> None:
    class Copies(Callback):
        def on_exception(self, exception: BaseException) -> None:
            try:
                self.snapshot()
            except TornState as error:
                errors.append(error)

    errors: list[TornState] = []
    model = ScriptedModel(raises={1: OSError("!")}, gated=True)
    run = start(model, Copies())
    await model.open(1)
    asked = asyncio.create_task(run.snapshot())
    await asyncio.sleep(0)
    model.open_for_good()
    with pytest.raises(TornState, match="half updated"):
        await asked
    with pytest.raises(OSError, match="!"):
        await run
    with pytest.raises(TornState, match="half updated"):
        await run.snapshot()
    assert len(errors) == 1
    assert len(set(model.weights.tolist())) == 2  # so it would have been torn


@pytest.mark.asyncio
async def test_a_copy_after_a_hook_raised_is_whole() -> None:
    class Raises(Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            raise OSError("!")

    run = start(ScriptedModel(), Raises())
    with pytest.raises(OSError, match="!"):
        await run
    assert trained(await run.snapshot()) == 1


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", [OSError, SystemExit, StopIteration])
async def test_a_model_that_cannot_be_copied_tells_who_asked_and_trains_on(kind: type[BaseException]) -> None:
    class Uncopied(ScriptedModel):
        def capture(self) -> Any:
            raise kind("cannot")

    model = Uncopied(gated=True)
    run = start(model)
    await model.open(1)
    asyncio.get_running_loop().call_soon(model.open_for_good)
    with pytest.raises(ModelError if kind is StopIteration else kind, match="cannot"):
        await run.snapshot()
    assert (await run).outcome == "completed"


@pytest.mark.asyncio
async def test_a_model_without_capture_says_what_to_add() -> None:
    class Bare:
        def train_batch(self, batch: Any) -> dict[str, float]:
            return {"loss": 1.0}

    run = start(Bare())
    await run
    with pytest.raises(ArgumentError, match="capture is needed for snapshots"):
        await run.snapshot()


# ---------------------------------------------------------------- copies in hooks


class CopiesInline(Callback):
    changes_model = False

    def __init__(self) -> None:
        self.copies: list[Snapshot] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.copies.append(self.snapshot())


@pytest.mark.asyncio
async def test_a_copy_in_an_inline_hook_is_of_this_very_moment_and_shared_by_all_of_its_event() -> None:
    first, second = CopiesInline(), CopiesInline()
    run = start(ScriptedModel(), first, second)
    await run
    assert [trained(copy) for copy in first.copies] == [1, 2, 3, 4]
    assert [trained(copy) for copy in second.copies] == [1, 2, 3, 4]
    assert run.stats.snapshots == 4
    first.copies[0].release()
    assert trained(second.copies[0]) == 1


@pytest.mark.asyncio
async def test_a_copy_that_a_hook_gave_back_at_once_is_made_anew_for_the_next_one() -> None:
    class ReleasesAtOnce(CopiesInline):
        changes_model = False

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.snapshot().release()

    second = CopiesInline()
    run = start(ScriptedModel(), ReleasesAtOnce(), second)
    await run
    assert [trained(copy) for copy in second.copies] == [1, 2, 3, 4]
    assert run.stats.snapshots == 8


@pytest.mark.asyncio
async def test_a_copy_after_a_hook_that_changed_the_model_shows_the_change() -> None:
    class Doubles(Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.model.weights *= 2

    before, after = CopiesInline(), CopiesInline()
    await start(ScriptedModel(), before, Doubles(), after)
    pairs = zip(before.copies, after.copies, strict=True)
    assert [copy.arrays["weights"][0] * 2 == other.arrays["weights"][0] for copy, other in pairs] == [
        True
    ] * 4


@pytest.mark.asyncio
async def test_a_copy_in_a_hook_on_the_loop_is_refused_and_points_to_the_right_one() -> None:
    class Copies(Callback):
        async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            try:
                self.snapshot()
            except RuntimeError as error:
                errors.append(str(error))

    errors: list[str] = []
    await start(ScriptedModel(), Copies())
    (said,) = errors
    assert said.startswith("Copies.snapshot() is legal in inline (`def`) hooks only")
    assert "await self.run.snapshot()" in said
    with pytest.raises(RuntimeError, match="serves no run"):
        Copies().snapshot()


# ---------------------------------------------------------------- what goes wrong around the loop


@pytest.mark.asyncio
async def test_a_model_that_refuses_its_mark_on_the_thread_fails_the_run_and_does_not_hang_it() -> None:
    class Refuses(ScriptedModel):
        @property
        def training_thread(self) -> int | None:
            return None

        @training_thread.setter
        def training_thread(self, thread: int | None) -> None:
            if threading.current_thread() is not threading.main_thread():
                raise TypeError("read only")

    async with asyncio.timeout(5):
        with pytest.raises(TypeError, match="read only"):
            await start(Refuses())
