"""Which hooks a callback overrides, of which kind, and what is refused before a training begins."""

from __future__ import annotations

import asyncio
import functools
import pickle
from typing import Any

import pytest

from asynccb import Callback, Trainer
from asynccb.callbacks import EarlyStopping, LambdaCallback, ModelCheckpoint
from asynccb.callbacks.hooks import read_hooks
from asynccb.errors import ArgumentError, HookRefused
from asynccb.testing import ScriptedModel


def refusal(callback: object) -> str:
    with pytest.raises(HookRefused) as caught:
        read_hooks(callback)
    return str(caught.value)


# ---------------------------------------------------------------- which hooks there are


def test_a_callback_that_overrides_nothing_has_no_hooks() -> None:
    assert read_hooks(Callback())[:2] == ({}, {})


def test_hooks_are_told_apart_by_their_kind() -> None:
    class Inline(Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None: ...

    class Beside(Callback):
        async def on_epoch_end(self, epoch: int, logs: Any = None) -> None: ...

    class Both(Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> Any:
            return self._later(epoch)

        async def _later(self, epoch: int) -> None: ...

    for callback, inline, beside in [
        (Inline(), ["on_epoch_end"], []),
        (Beside(), [], ["on_epoch_end"]),
        (Both(), ["on_epoch_end"], []),
    ]:
        hooks = read_hooks(callback)
        assert (list(hooks.inline), list(hooks.beside)) == (inline, beside)


def test_hooks_are_bound_and_inherited_ones_count() -> None:
    class Parent(Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> Any:
            return (self, epoch)

    class Child(Parent):
        pass

    child = Child()
    assert read_hooks(child).inline["on_epoch_end"](3) == (child, 3)


def test_a_hook_of_the_instance_counts_and_goes_before_that_of_its_class() -> None:
    class Counts(Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> Any:
            return "class"

    callback = Counts()
    callback.on_epoch_end = lambda epoch, logs=None: "instance"  # type: ignore[method-assign]
    assert read_hooks(callback).inline["on_epoch_end"](0) == "instance"


def test_a_subclass_need_not_call_the_constructor_of_its_parent() -> None:
    class Bare(Callback):
        def __init__(self) -> None:
            self.losses: list[float] = []

        def on_train_batch_end(self, batch: int, logs: dict[str, Any] = {}) -> None:  # noqa: B006  # as users write it
            self.losses.append(logs["loss"])

    callback = Bare()
    read_hooks(callback).inline["on_train_batch_end"](0, {"loss": 2.0})
    assert callback.losses == [2.0]


@pytest.mark.parametrize("kind", ["a partial", "an object"])
def test_an_async_hook_is_recognised_through_what_it_is_wrapped_in(kind: str) -> None:
    async def report(prefix: str, epoch: int, logs: Any = None) -> None: ...

    class Report:
        async def __call__(self, epoch: int, logs: Any = None) -> None: ...

    callback: Any = Callback()
    callback.on_epoch_end = functools.partial(report, "a") if kind == "a partial" else Report()
    hooks = read_hooks(callback)
    assert (list(hooks.inline), list(hooks.beside)) == ([], ["on_epoch_end"])


# ---------------------------------------------------------------- the old names of batch hooks


@pytest.mark.parametrize("side", ["begin", "end"])
def test_on_batch_is_called_for_training_batches_where_the_new_name_is_not_overridden(side: str) -> None:
    callback: Any = Callback()
    setattr(callback, f"on_batch_{side}", lambda batch, logs=None: "old")
    hooks = read_hooks(callback)
    assert list(hooks.inline) == [f"on_train_batch_{side}"]
    assert hooks.inline[f"on_train_batch_{side}"](0) == "old"


@pytest.mark.parametrize("side", ["begin", "end"])
def test_where_both_names_are_overridden_the_new_one_alone_is_called(side: str) -> None:
    callback: Any = Callback()
    setattr(callback, f"on_batch_{side}", lambda batch, logs=None: "old")
    setattr(callback, f"on_train_batch_{side}", lambda batch, logs=None: "new")
    hooks = read_hooks(callback)
    assert list(hooks.inline) == [f"on_train_batch_{side}"]
    assert hooks.inline[f"on_train_batch_{side}"](0) == "new"


def test_an_async_on_batch_end_runs_beside_the_training() -> None:
    class Old(Callback):
        async def on_batch_end(self, batch: int, logs: Any = None) -> None: ...

    assert list(read_hooks(Old()).beside) == ["on_train_batch_end"]


def test_old_and_new_names_of_different_sides_live_together() -> None:
    class Mixed(Callback):
        def on_batch_begin(self, batch: int, logs: Any = None) -> None: ...
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None: ...

    assert sorted(read_hooks(Mixed()).inline) == ["on_train_batch_begin", "on_train_batch_end"]


# ---------------------------------------------------------------- def and async def


class Mixture(Callback):
    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None: ...

    async def on_epoch_end(self, epoch: int, logs: Any = None) -> None: ...


def test_def_and_async_def_in_one_callback_are_refused_with_the_form_that_works() -> None:
    said = refusal(Mixture())
    assert said.startswith("Mixture=def on_epoch_begin; async def on_epoch_end: ")
    assert "the hooks of one callback are all `def` or all `async def`" in said
    assert said.endswith("`def on_epoch_end(self, ...): return self._later(captured)`")


def test_a_mixture_is_refused_at_start_and_not_in_the_middle_of_a_training() -> None:
    async def scene() -> None:
        model = ScriptedModel()
        with pytest.raises(HookRefused, match="Mixture"):
            Trainer(model).start([[0.0]], verbose=0, callbacks=[Mixture()])
        assert model.steps == 0

    asyncio.run(scene())


def test_a_mixture_that_inheritance_makes_is_refused_too() -> None:
    class Parent(Callback):
        async def on_train_end(self, logs: Any = None) -> None: ...

    class Child(Parent):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None: ...

    assert "def on_train_batch_end; async def on_train_end" in refusal(Child())


@pytest.mark.parametrize("first", ["def", "async def"])
def test_on_train_begin_may_differ_from_the_other_hooks(first: str) -> None:
    class SetsUp(Callback):
        async def on_train_begin(self, logs: Any = None) -> None: ...
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None: ...

    class Decides(Callback):
        def on_train_begin(self, logs: Any = None) -> None: ...
        async def on_epoch_end(self, epoch: int, logs: Any = None) -> None: ...

    hooks = read_hooks(Decides() if first == "def" else SetsUp())
    (inline,), (beside,), _ = hooks
    assert {inline, beside} == {"on_train_begin", "on_epoch_end"}
    assert (inline == "on_train_begin") is (first == "def")


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_the_news_of_a_file_always_comes_on_the_loop_and_may_be_either(kind: str) -> None:
    class Hears(Callback):
        def on_checkpoint_saved(self, path: str, epoch: int) -> None: ...

    class Awaits(Callback):
        async def on_checkpoint_saved(self, path: str, epoch: int) -> None: ...

    callback: Any = Hears() if kind == "def" else Awaits()
    callback.on_epoch_end = lambda epoch, logs=None: None
    hooks = read_hooks(callback)
    assert (list(hooks.inline), list(hooks.beside)) == (["on_epoch_end"], ["on_checkpoint_saved"])


# ---------------------------------------------------------------- what can never be called


def _no_index(logs: Any = None) -> None: ...
def _three(epoch: int, logs: Any, more: Any) -> None: ...
def _by_name_only(*, epoch: int, logs: Any = None) -> None: ...
def _nothing() -> None: ...


@pytest.mark.parametrize(
    ("hook", "function", "called_as"),
    [
        ("on_epoch_end", _no_index, "on_epoch_end(index, logs)"),
        ("on_epoch_end", _three, "on_epoch_end(index, logs)"),
        ("on_epoch_begin", _by_name_only, "on_epoch_begin(index, logs)"),
        ("on_train_batch_end", _no_index, "on_train_batch_end(index, logs)"),
        ("on_batch_begin", _no_index, "on_batch_begin(index, logs)"),
        ("on_test_batch_end", _no_index, "on_test_batch_end(index, logs)"),
        ("on_train_end", _nothing, "on_train_end(logs)"),
        ("on_train_begin", _three, "on_train_begin(logs)"),
        ("on_exception", _nothing, "on_exception(exception)"),
        ("on_checkpoint_saved", _no_index, "on_checkpoint_saved(path, epoch)"),
    ],
)
def test_a_hook_with_a_wrong_signature_is_refused_with_the_right_one(
    hook: str, function: Any, called_as: str
) -> None:
    callback = Callback()
    setattr(callback, hook, function)
    said = refusal(callback)
    assert said.startswith(f"Callback.{hook}={hook}(")
    assert f"it is called as {called_as}, by position" in said
    assert said.endswith(f"Write `def {hook}(self, {called_as.partition('(')[2][:-1]})`")


@pytest.mark.parametrize(
    "function",
    [
        lambda epoch, logs=None, **more: None,
        lambda *anything: None,
        lambda epoch, logs, verbose=0: None,
        lambda a, b: None,
        functools.partial(lambda prefix, epoch, logs: None, "a"),
        print,
    ],
)
def test_every_function_that_takes_two_positions_may_be_an_epoch_hook(function: Any) -> None:
    callback: Any = Callback()
    callback.on_epoch_end = function
    assert list(read_hooks(callback).inline) == ["on_epoch_end"]


@pytest.mark.parametrize("kind", ["async def", "def", "an object"])
def test_a_hook_with_yield_is_refused_because_its_body_would_never_run(kind: str) -> None:
    class AsyncYield(Callback):
        async def on_epoch_end(self, epoch: int, logs: Any = None) -> Any:
            yield epoch

    class Yield(Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> Any:
            yield epoch

    class Yields:
        async def __call__(self, epoch: int, logs: Any = None) -> Any:
            yield epoch

    callback: Any = {"async def": AsyncYield, "def": Yield, "an object": Callback}[kind]()
    if kind == "an object":
        callback.on_epoch_end = Yields()
    said = refusal(callback)
    assert "a hook with `yield` is a generator: calling it runs nothing of its body" in said
    assert said.startswith(f"{type(callback).__name__}.on_epoch_end=")
    assert said.endswith("Remove the `yield`")


@pytest.mark.parametrize("value", [None, 3, "print"])
def test_a_hook_that_is_no_function_is_refused(value: object) -> None:
    callback = Callback()
    callback.on_epoch_end = value  # type: ignore[method-assign,assignment]
    assert refusal(callback) == f"Callback.on_epoch_end={value!r}: a hook must be a function"


def test_a_class_in_place_of_an_instance_is_refused_with_the_brackets_that_are_missing() -> None:
    with pytest.raises(ArgumentError, match=r"not classes\. Write Mixture\(\.\.\.\)"):
        read_hooks(Mixture)


@pytest.mark.parametrize("stranger", [object(), print, None, 3])
def test_what_is_no_callback_is_refused(stranger: object) -> None:
    with pytest.raises(ArgumentError, match=r"Derive the class from asynccb\.Callback"):
        read_hooks(stranger)


def test_a_refusal_crosses_processes() -> None:
    with pytest.raises(HookRefused) as caught:
        read_hooks(Mixture())
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again)) == (HookRefused, str(caught.value))


# ---------------------------------------------------------------- whether hooks may change the model


class Looks(Callback):
    changes_model = False

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None: ...


class ChangesAgain(Looks):
    def on_epoch_end(self, epoch: int, logs: Any = None) -> None: ...


class LooksToo(Looks):
    pass


class SaysSoItself(Looks):
    changes_model = False

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None: ...


@pytest.mark.parametrize(
    ("callback", "may"),
    [
        (Callback(), True),
        (Looks(), False),
        (LooksToo(), False),
        (ChangesAgain(), True),
        (SaysSoItself(), False),
        (LambdaCallback(on_epoch_end=lambda epoch, logs: None), True),
        (ModelCheckpoint("x.h5", save_freq=2), False),
        (EarlyStopping(), False),
    ],
    ids=lambda it: type(it).__name__,
)
def test_hooks_may_change_the_model_unless_the_very_class_that_has_them_says_no(
    callback: Callback, may: bool
) -> None:
    assert read_hooks(callback).changes_model is may


def test_one_instance_may_say_that_it_changes_the_model_where_its_class_does_not() -> None:
    callback = Looks()
    callback.changes_model = True  # type: ignore[misc]
    assert read_hooks(callback).changes_model
    assert not read_hooks(Looks()).changes_model


def test_a_hook_put_on_an_instance_may_change_the_model_whatever_its_class_says() -> None:
    callback = Looks()
    callback.on_epoch_end = lambda epoch, logs=None: None  # type: ignore[method-assign]
    assert read_hooks(callback).changes_model
