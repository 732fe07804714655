"""Callbacks of a few loose functions."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

from asynccb.callbacks.base import Callback

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["LambdaCallback"]


class LambdaCallback(Callback):
    """A callback made of functions, which are called by position.

    ``on_epoch_*`` get ``(epoch, logs)``, ``on_batch_*`` ``(batch, logs)``, ``on_train_*`` ``(logs)``. Each
    function may be a ``def`` or lambda, which runs inline on the training thread, or an ``async def`` (or a
    lambda that returns a coroutine), which the event loop runs beside the training, in this callback's
    order. Unlike the hooks of a class, the functions of one LambdaCallback may be of both kinds: they share
    no object but what they share themselves. A function that does not take these arguments is refused when
    the training starts.

    Args:
        on_epoch_begin: called at the beginning of every epoch. Default None: nothing.
        on_epoch_end: called at the end of every epoch.
        on_batch_begin: called at the beginning of every batch.
        on_batch_end: called at the end of every batch.
        on_train_begin: called at the beginning of the training, which waits for its coroutine.
        on_train_end: called at the end of the training.
        **kwargs: become attributes: functions for any other hook (``on_test_end``, ``on_exception``, ...),
            or settings of a callback (``overflow="latest"``), as in Keras 3.
    """

    def __init__(
        self,
        on_epoch_begin: Callable[..., Any] | None = None,
        on_epoch_end: Callable[..., Any] | None = None,
        on_batch_begin: Callable[..., Any] | None = None,
        on_batch_end: Callable[..., Any] | None = None,
        on_train_begin: Callable[..., Any] | None = None,
        on_train_end: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> None:
        functions = {
            "on_epoch_begin": on_epoch_begin,
            "on_epoch_end": on_epoch_end,
            "on_batch_begin": on_batch_begin,
            "on_batch_end": on_batch_end,
            "on_train_begin": on_train_begin,
            "on_train_end": on_train_end,
        }
        for name, given in {name: f for name, f in functions.items() if f is not None}.items():
            setattr(self, name, _inline(given))
        for name, given in kwargs.items():
            setattr(self, name, _inline(given) if _is_hook(name) else given)


def _is_hook(name: str) -> bool:
    return name.startswith("on_") and callable(getattr(Callback, name, None))


def _inline(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as a ``def`` that returns its coroutine, so that an object has hooks of one kind."""
    if not inspect.iscoroutinefunction(function) and not inspect.iscoroutinefunction(type(function).__call__):
        return function

    @functools.wraps(function, assigned=("__doc__", "__module__", "__name__", "__qualname__"), updated=())
    def hook(*arguments: Any) -> Any:
        return function(*arguments)

    return hook
