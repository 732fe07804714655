"""LambdaCallback: how its functions are called."""

from __future__ import annotations

import functools
import inspect
import json
from typing import TYPE_CHECKING, Any

import pytest

from asynccb.callbacks.base import Callback
from asynccb.callbacks.hooks import read_hooks
from asynccb.callbacks.lambda_callback import LambdaCallback
from asynccb.errors import HookRefused

if TYPE_CHECKING:
    from pathlib import Path

HOOKS = [
    "on_epoch_begin",
    "on_epoch_end",
    "on_batch_begin",
    "on_batch_end",
    "on_train_begin",
    "on_train_end",
]


def test_the_pages_parameters_keep_their_order_and_defaults() -> None:
    parameters = inspect.signature(LambdaCallback).parameters
    assert list(parameters) == [*HOOKS, "kwargs"]
    assert [parameters[hook].default for hook in HOOKS] == [None] * 6


@pytest.mark.parametrize("position", range(4))
def test_functions_of_epochs_and_batches_get_two_positionals(position: int) -> None:
    calls: list[tuple[Any, ...]] = []
    callback = LambdaCallback(*[None] * position, lambda i, l: calls.append((i, l)))  # noqa: E741
    getattr(callback, HOOKS[position])(3, {"loss": 1.0})
    assert calls == [(3, {"loss": 1.0})]


@pytest.mark.parametrize("position", [4, 5])
def test_functions_of_the_training_get_one_positional(position: int) -> None:
    calls: list[tuple[Any, ...]] = []
    callback = LambdaCallback(*[None] * position, lambda *arguments: calls.append(arguments))
    getattr(callback, HOOKS[position])({})
    assert calls == [({},)]


def test_hooks_that_were_not_given_do_nothing_and_cost_no_event() -> None:
    callback = LambdaCallback(on_epoch_end=lambda epoch, logs: None)
    assert [getattr(callback, hook)(0, {}) for hook in HOOKS[:4]] == [None] * 4
    assert [getattr(callback, hook)({}) for hook in HOOKS[4:]] == [None] * 2
    hooks = read_hooks(callback)
    assert (list(hooks.inline), list(hooks.beside)) == (["on_epoch_end"], [])


def test_other_keywords_become_attributes_hooks_and_settings_alike() -> None:
    callback = LambdaCallback(on_test_end=lambda logs: "tested", on_error="warn", overflow="latest", note=7)
    assert callback.on_test_end({}) == "tested"
    assert (callback.on_error, callback.overflow, callback.note) == ("warn", "latest", 7)  # type: ignore[attr-defined]
    assert list(read_hooks(callback).inline) == ["on_test_end"]


class Plain:
    """An object that is called, with an async body."""

    async def __call__(self, epoch: int, logs: Any) -> str:
        return f"object {epoch}"


async def late(epoch: int, logs: Any) -> str:
    return f"late {epoch}"


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("function", "answer"),
    [
        (late, "late 3"),
        (Plain(), "object 3"),
        (lambda epoch, logs: late(epoch, logs), "late 3"),
        (functools.partial(late, logs=None), "late 3"),
    ],
)
async def test_an_async_function_becomes_a_def_hook_that_returns_its_coroutine(
    function: Any, answer: str
) -> None:
    arguments = (3,) if isinstance(function, functools.partial) else (3, {})
    callback = LambdaCallback(on_epoch_end=function)
    assert not inspect.iscoroutinefunction(callback.on_epoch_end)
    assert await callback.on_epoch_end(*arguments) == answer


def test_functions_of_both_kinds_may_be_mixed_where_hooks_of_a_class_may_not() -> None:
    hooks = read_hooks(LambdaCallback(on_epoch_begin=lambda epoch, logs: None, on_epoch_end=late))
    assert (sorted(hooks.inline), list(hooks.beside)) == (["on_epoch_begin", "on_epoch_end"], [])

    class Mixed(Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None: ...
        async def on_epoch_end(self, epoch: int, logs: Any = None) -> None: ...

    with pytest.raises(HookRefused):
        read_hooks(Mixed())


@pytest.mark.parametrize(
    "options",
    [{"on_epoch_end": lambda epoch: None}, {"on_train_end": lambda: None}, {"on_batch_end": 3}],
)
def test_a_function_that_cannot_be_called_so_is_refused_when_the_training_starts(
    options: dict[str, Any],
) -> None:
    with pytest.raises(HookRefused, match=next(iter(options))):
        read_hooks(LambdaCallback(**options))


def test_an_async_function_of_the_wrong_shape_is_refused_too() -> None:
    async def takes_nothing() -> None: ...

    with pytest.raises(HookRefused, match="on_epoch_end"):
        read_hooks(LambdaCallback(on_epoch_end=takes_nothing))


class Process:
    """What the page's clean-up example ends."""

    def __init__(self, alive: bool) -> None:
        self.alive, self.terminated = alive, False

    def is_alive(self) -> bool:
        return self.alive

    def terminate(self) -> None:
        self.terminated = True


def test_the_pages_three_examples_run_as_they_stand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    batch_print_callback = LambdaCallback(on_batch_begin=lambda batch, logs: print(batch))
    json_log = open(tmp_path / "loss_log.json", mode="w", buffering=1)  # noqa: SIM115
    json_logging_callback = LambdaCallback(
        on_epoch_end=lambda epoch, logs: json_log.write(
            json.dumps({"epoch": epoch, "loss": logs["loss"]}) + "\n"
        ),
        on_train_end=lambda logs: json_log.close(),
    )
    processes = [Process(alive=True), Process(alive=False)]
    cleanup_callback = LambdaCallback(
        on_train_end=lambda logs: [p.terminate() for p in processes if p.is_alive()]
    )

    callbacks = [batch_print_callback, json_logging_callback, cleanup_callback]
    for callback in callbacks:
        callback.on_train_begin({})
        for batch in range(2):
            callback.on_batch_begin(batch, {"batch": batch, "size": 1})
        callback.on_epoch_end(0, {"loss": 0.5})
        callback.on_train_end({})

    assert capsys.readouterr().out == "0\n1\n"
    assert (tmp_path / "loss_log.json").read_text() == '{"epoch": 0, "loss": 0.5}\n'
    assert [process.terminated for process in processes] == [True, False]
