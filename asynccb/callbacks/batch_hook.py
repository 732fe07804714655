"""A batch hook that only some instances of a class have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asynccb.callbacks.base import Callback

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["add_batch_end"]


def add_batch_end(callback: Callback, hook: Callable[..., Any]) -> None:
    """Makes ``hook`` the ``on_train_batch_end`` of this one instance.

    On the class it would have the event of every batch built and delivered for all instances, those without
    any use for it too, and would keep adapters from reading losses late. A subclass that overrides the hook
    wins.
    """
    for name in ("on_train_batch_end", "on_batch_end"):
        if getattr(type(callback), name) is not getattr(Callback, name):
            return
    callback.on_train_batch_end = hook  # type: ignore[method-assign]
