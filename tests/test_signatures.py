"""What plain functions tell by their code: the same that ``inspect`` says, and never of yesterday."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest

from asynccb import Callback
from asynccb.callbacks.hooks import read_hooks
from asynccb.errors import HookRefused
from asynccb.protocols import Batch
from asynccb.signatures import plain


class Methods:
    def none(self) -> None: ...

    def one(self, a: int) -> None: ...

    def optional(self, a: int, b: int = 0) -> None: ...

    def by_position(self, a: int, /, b: int) -> None: ...

    def catches_all(self, *rest: int) -> None: ...

    def by_name(self, a: int, b: int, *, c: int = 0) -> None: ...

    def names(self, a: int, b: int, **rest: int) -> None: ...

    async def later(self, a: int, b: int) -> None: ...

    def self_is_optional(self=None, a=1, b=2) -> None: ...  # type: ignore[no-untyped-def, assignment, misc]


FUNCTIONS = [
    pytest.param(how, id=f"{name}, {'a method' if bound else 'a function'}")
    for name, function in vars(Methods).items()
    if inspect.isfunction(function)
    for bound, how in [(True, getattr(Methods(), name)), (False, function)]
]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("count", range(5))
def test_what_is_said_to_fit_does_fit_and_only_rest_and_keyword_parameters_are_left_to_inspect(
    function: Any, count: int
) -> None:
    told, signature = plain(function), inspect.signature(function)
    assert told is not None
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    try:
        signature.bind(*range(count))
        fits = True
    except TypeError:
        fits = False
    if kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.KEYWORD_ONLY}:
        assert fits or not told.takes(count)
    else:
        assert told.takes(count) is fits
    assert told.positional() == tuple(
        name
        for name, parameter in signature.parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    )


def test_more_than_code_is_not_answered_for() -> None:
    def inner(a: int) -> None: ...

    @functools.wraps(inner)
    def wrapper(*rest: Any) -> None: ...

    class Called:
        def __call__(self, a: int) -> None: ...

    for function in (wrapper, functools.partial(inner, 1), Called(), print, Batch, [].append):
        assert plain(function) is None


def test_a_hook_that_its_class_is_given_later_is_read_at_the_next_run() -> None:
    class Mine(Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None: ...

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None: ...

    assert "on_epoch_end" in read_hooks(Mine()).inline

    async def later(self: Any, epoch: int, logs: Any = None) -> None: ...

    Mine.on_epoch_end = later  # type: ignore[method-assign, assignment]
    with pytest.raises(HookRefused, match="all `def` or all `async def`"):
        read_hooks(Mine())


def test_a_hook_whose_code_is_replaced_is_read_as_it_is_now() -> None:
    class Mine(Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None: ...

    def too_few(self: Any) -> None: ...

    assert read_hooks(Mine()).inline
    Mine.on_epoch_end.__code__ = too_few.__code__  # as tools that reload modules in place do
    with pytest.raises(HookRefused, match=r"on_epoch_end\(\)"):
        read_hooks(Mine())
    Mine.on_epoch_end.__code__ = (lambda self, epoch, logs: (yield)).__code__  # type: ignore[misc]
    with pytest.raises(HookRefused, match="generator"):
        read_hooks(Mine())
