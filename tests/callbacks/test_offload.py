"""Blocking callbacks beside the training. Gates and events decide who comes first, never the clock."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from waiting import until

from asynccb import ArgumentError, Callback, CallbackBusy, CallbackError, RunCancelled, Trainer
from asynccb.callbacks import Offload
from asynccb.testing import ScriptedModel

if TYPE_CHECKING:
    from asynccb import History

DATA = np.zeros((4, 1), np.float32)


class Notes(Callback):
    """Notes what it is told, where, and the weights of the model that it has then."""

    def __init__(self) -> None:
        self.said: list[tuple[Any, ...]] = []
        self.threads: set[str] = set()
        self.inside = 0

    def _note(self, *what: Any) -> None:
        self.inside += 1
        assert self.inside == 1
        self.threads.add(threading.current_thread().name)
        weights = None if self.model is None else int(self.model.weights[0])
        self.said.append((*what, weights))
        self.inside -= 1

    def on_train_begin(self, logs: Any = None) -> None:
        self._note("begin")

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._note(epoch, logs["loss"])
        logs["mine"] = 1.0

    def on_train_end(self, logs: Any = None) -> None:
        self._note("end")


async def fit(model: Any, *callbacks: Callback, epochs: int = 3, **options: Any) -> History:
    history: History = await Trainer(model).fit(
        DATA, DATA, batch_size=2, epochs=epochs, verbose=0, callbacks=list(callbacks), **options
    )
    return history


@pytest.mark.asyncio
async def test_hooks_run_in_order_on_a_thread_of_their_own_with_the_model_of_their_moment() -> None:
    notes = Notes()
    history = await fit(ScriptedModel(losses=[1.0, 3.0]), Offload(notes))
    assert notes.said == [("begin", 0), (0, 2.0, 2), (1, 2.0, 4), (2, 2.0, 6), ("end", 6)]
    assert notes.threads == {"asynccb offload Notes"}
    assert list(history.history) == ["loss"]


@pytest.mark.parametrize("how", ["offloaded", "inline"])
@pytest.mark.asyncio
async def test_the_training_goes_on_while_a_hook_blocks(how: str) -> None:
    """Inline the same hook holds the training: what it waits for never comes."""
    went_on = threading.Event()
    came: list[bool] = []

    class Blocks(Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            if epoch == 0:
                came.append(went_on.wait(20 if how == "offloaded" else 0.01))

    class GoesOn(Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if self.model.steps == 4:
                went_on.set()

    await fit(ScriptedModel(), Offload(Blocks()) if how == "offloaded" else Blocks(), GoesOn())
    assert came == [how == "offloaded"]


@pytest.mark.asyncio
async def test_a_full_mailbox_holds_the_training() -> None:
    go_on, begun = threading.Event(), []

    class Blocks(Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            assert go_on.wait(20)

    class Begins(Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            begun.append(epoch)

    offload = Offload(Blocks(), snapshots=False)
    assert (offload.mailbox_size, Offload(Notes(), mailbox_size=7).mailbox_size) == (2, 7)
    run = Trainer(ScriptedModel()).start(
        DATA, DATA, batch_size=2, epochs=50, verbose=0, callbacks=[offload, Begins()]
    )
    await until(lambda: (begun and run.waits_for) or len(begun) > 10)
    held = len(begun)
    go_on.set()
    await run
    assert held <= 5
    assert len(begun) == 50


@pytest.mark.asyncio
async def test_hooks_of_batches_are_told_all_of_them_and_take_no_copies() -> None:
    class Batches(Callback):
        def __init__(self) -> None:
            self.said: list[Any] = []

        def on_batch_end(self, batch: int, logs: Any = None) -> None:
            self.said.append((batch, logs["loss"]))

    class Bare:
        losses = iter([3.0, 2.0, 1.0, 0.0])

        def train_batch(self, batch: Any) -> dict[str, float]:
            return {"loss": next(self.losses)}

    batches = Batches()
    assert Offload(batches).mailbox_size == 1024
    await fit(Bare(), Offload(batches), epochs=2)
    assert batches.said == [(0, 3.0), (1, 2.0), (0, 1.0), (1, 0.0)]


@pytest.mark.asyncio
async def test_stop_training_on_its_own_model_stops_the_training() -> None:
    class Stops(Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.model.stop_training = True

    history = await fit(ScriptedModel(), Offload(Stops()), epochs=50)
    assert history.outcome == "stopped"
    assert len(history.epoch) <= 5  # no more than wait for it


@pytest.mark.parametrize("on_error", ["raise", "warn", "disable"])
@pytest.mark.asyncio
async def test_an_error_surfaces_as_on_error_says(on_error: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Fails(Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            raise OSError("no room")

    offload = Offload(Fails(), on_error=on_error)
    if on_error == "raise":
        with pytest.raises(CallbackError, match="no room"):
            await fit(ScriptedModel(), offload)
        return
    history = await fit(ScriptedModel(), offload)
    assert history.epoch == [0, 1, 2]
    assert [failure.hook for failure in history.failures] == ["on_epoch_end"]
    assert "no room" in caplog.text


@pytest.mark.asyncio
async def test_a_model_that_cannot_be_copied_is_refused_unless_none_is_wanted() -> None:
    class Bare:
        def train_batch(self, batch: Any) -> dict[str, float]:
            return {"loss": 1.0}

    with pytest.raises(ArgumentError, match="capture"):
        await fit(Bare(), Offload(Notes()))
    notes = Notes()
    await fit(Bare(), Offload(notes, snapshots=False), epochs=1)
    assert notes.said == [("begin", None), (0, 1.0, None), ("end", None)]


@pytest.mark.asyncio
async def test_a_model_that_broke_inside_a_batch_does_not_keep_the_end_from_it() -> None:
    notes = Notes()
    with pytest.raises(ZeroDivisionError):
        await fit(ScriptedModel(raises={3: ZeroDivisionError()}), Offload(notes))
    assert notes.said == [("begin", 0), (0, 1.0, 2), ("end", 2)]


@pytest.mark.asyncio
async def test_a_cancelled_training_leaves_nothing_behind() -> None:
    notes = Notes()
    model = ScriptedModel(gated=True)
    run = Trainer(model).start(DATA, DATA, batch_size=4, epochs=9, verbose=0, callbacks=Offload(notes))
    await model.open(1)
    run.cancel("enough")
    model.open_for_good()
    with pytest.raises(RunCancelled):
        await run
    assert notes.said[-1][0] == "end"


@pytest.mark.asyncio
async def test_one_callback_serves_one_run_also_when_it_is_wrapped_twice() -> None:
    notes, model = Notes(), ScriptedModel(gated=True)
    run = Trainer(model).start(DATA, DATA, verbose=0, callbacks=Offload(notes))
    with pytest.raises(CallbackBusy, match="Notes"):
        await fit(ScriptedModel(), Offload(notes))
    model.open_for_good()
    await run


def test_what_runs_beside_the_training_anyway_is_refused() -> None:
    class Beside(Callback):
        async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            pass

    with pytest.raises(ArgumentError, match="on_epoch_end is `async def`"):
        Offload(Beside())
    with pytest.raises(ArgumentError, match="instances of"):
        Offload(object())
