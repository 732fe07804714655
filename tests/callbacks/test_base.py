"""The contract of every callback: hooks that do nothing, attributes, and what a subclass may leave out."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import numpy as np
import pytest

from asynccb import Callback, CallbackBusy, HookRefused, Trainer, callbacks
from asynccb.callbacks.hooks import read_hooks
from asynccb.testing import ScriptedModel

HOOKS = {
    "on_train_begin": 0,
    "on_train_end": 0,
    "on_epoch_begin": 1,
    "on_epoch_end": 1,
    "on_batch_begin": 1,
    "on_batch_end": 1,
    "on_train_batch_begin": 1,
    "on_train_batch_end": 1,
    "on_test_begin": 0,
    "on_test_end": 0,
    "on_test_batch_begin": 1,
    "on_test_batch_end": 1,
    "on_predict_begin": 0,
    "on_predict_end": 0,
    "on_predict_batch_begin": 1,
    "on_predict_batch_end": 1,
}

X = np.zeros((5, 1))


@pytest.mark.parametrize(("hook", "indices"), HOOKS.items())
def test_every_hook_is_there_does_nothing_and_needs_no_logs(hook: str, indices: int) -> None:
    method = getattr(Callback(), hook)
    assert method(*[0] * indices) is None
    assert method(*[0] * indices, {}) is None
    assert inspect.signature(method).parameters["logs"].default is None


def test_the_two_hooks_without_logs_do_nothing_either() -> None:
    callback = Callback()
    assert callback.on_exception(ValueError()) is None
    assert callback.on_checkpoint_saved("a.h5", 0) is None


def test_the_attributes_of_a_callback_that_serves_nobody() -> None:
    callback = Callback()
    assert (callback.model, callback.params, callback.validation_data, callback.run) == (
        None,
        None,
        None,
        None,
    )
    assert (callback.lockstep, callback.overflow, callback.on_error) == (False, "wait", "raise")
    assert callback.mailbox_size == 1024
    assert callback.state_dict() == {}
    assert callback.load_state_dict({"any": 1}) is None  # type: ignore[func-returns-value]


def test_set_model_and_set_params_keep_what_they_are_given() -> None:
    callback, model = Callback(), object()
    callback.set_model(model)
    callback.set_params({"epochs": 3})
    assert callback.model is model
    assert callback.params == {"epochs": 3}


@pytest.mark.asyncio
async def test_a_subclass_need_not_call_the_constructor_and_may_default_logs_to_a_dict() -> None:
    class LossHistory(Callback):
        def __init__(self) -> None:
            pass

        def on_train_begin(self, logs: Any = {}) -> None:  # noqa: B006  (as users of Keras write it)
            self.losses: list[float] = []

        def on_batch_end(self, batch: int, logs: Any = {}) -> None:  # noqa: B006
            self.losses.append(logs.get("loss"))

    callback = LossHistory()
    await Trainer(ScriptedModel([1.0, 2.0, 3.0])).fit(
        X, batch_size=2, epochs=2, callbacks=callback, verbose=0
    )
    assert callback.losses == [1.0, 2.0, 3.0, 1.0, 2.0, 3.0]


@pytest.mark.asyncio
async def test_model_params_and_data_are_set_before_train_begin_and_the_run_goes_with_the_training() -> None:
    seen: list[Any] = []

    class Order(Callback):
        def set_model(self, model: Any) -> None:
            seen.append("set_model")
            super().set_model(model)

        def set_params(self, params: dict[str, Any]) -> None:
            seen.append("set_params")
            super().set_params(params)

        def on_train_begin(self, logs: Any = None) -> None:
            seen.extend(["on_train_begin", dict(logs), self.model is model, self.validation_data is not None])
            seen.append(self.run is not None)

    model, callback = ScriptedModel(), Order()
    await Trainer(model).fit(X, validation_data=(X, None), callbacks=callback, verbose=0)
    assert seen == ["set_model", "set_params", "on_train_begin", {}, True, True, True]
    assert callback.run is None


@pytest.mark.asyncio
async def test_a_stop_set_in_train_begin_is_honoured() -> None:
    class Stops(Callback):
        def on_train_begin(self, logs: Any = None) -> None:
            self.model.stop_training = True

    model = ScriptedModel()
    history = await Trainer(model).fit(X, callbacks=Stops(), verbose=0)
    assert (model.steps, history.epoch, history.outcome) == (0, [], "stopped")


@pytest.mark.asyncio
async def test_one_instance_serves_one_live_run_at_a_time_and_then_the_next() -> None:
    callback = Callback()
    first = Trainer(ScriptedModel()).start(X, callbacks=[callback], verbose=0)
    with pytest.raises(CallbackBusy, match=r"Callback already serves .*: give each run its own instance"):
        Trainer(ScriptedModel()).start(X, callbacks=[callback], verbose=0)
    await first
    assert (await Trainer(ScriptedModel()).fit(X, callbacks=[callback], verbose=0)).outcome == "completed"


@pytest.mark.asyncio
async def test_async_set_up_is_done_before_the_first_batch_however_quick_the_thread_is() -> None:
    """The thread may be quicker than the callback's task: the event lies there before it begins."""
    early: list[int] = []

    class SetsUp(Callback):
        ready = False

        async def on_train_begin(self, logs: Any = None) -> None:
            for _ in range(3):
                await asyncio.sleep(0)
            self.ready = True

    class Looks(Callback):
        def __init__(self, other: SetsUp) -> None:
            self.other = other

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            if not self.other.ready:
                early.append(batch)

    for _ in range(30):
        other = SetsUp()
        await Trainer(ScriptedModel()).fit(X, callbacks=[Looks(other), other], verbose=0)
    assert early == []


@pytest.mark.asyncio
async def test_a_disabled_callback_gets_no_inline_hook_either_until_the_end() -> None:
    class Breaks(Callback):
        on_error = "disable"
        lockstep = True

        def __init__(self) -> None:
            self.seen: list[Any] = []

        def on_epoch_end(self, epoch: int, logs: Any = None) -> Any:
            self.seen.append(epoch)
            return self.later(epoch)

        async def later(self, epoch: int) -> None:
            if epoch == 1:
                raise OSError("disk full")

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.seen.append("batch")

        def on_test_end(self, logs: Any = None) -> None:
            self.seen.append("test")

        def on_train_end(self, logs: Any = None) -> None:
            self.seen.append("end")

    callback = Breaks()
    history = await Trainer(ScriptedModel()).fit(
        X, epochs=4, validation_data=(X, None), callbacks=callback, verbose=0
    )
    assert callback.seen == ["batch", "test", 0, "batch", "test", 1, "end"]
    assert (history.outcome, len(history.failures)) == ("completed", 1)


@pytest.mark.parametrize("setter", ["set_model", "set_params"])
def test_a_setter_that_nobody_would_await_is_refused(setter: str) -> None:
    async def never(self: Any, given: Any) -> None: ...

    callback = type("Mine", (Callback,), {setter: never})()
    with pytest.raises(
        HookRefused, match=rf"Mine.{setter}=async def {setter}: it is called before the training"
    ):
        read_hooks(callback)


@pytest.mark.asyncio
async def test_nothing_has_to_be_made_durable_unless_a_class_says_so() -> None:
    assert await Callback().sync() is None  # type: ignore[func-returns-value]
    say_so = [
        kind.__name__
        for name in callbacks.__all__
        if (kind := getattr(callbacks, name)) is not Callback and kind.sync is not Callback.sync
    ]
    assert say_so == ["CSVLogger", "ModelCheckpoint", "TensorBoard"]
