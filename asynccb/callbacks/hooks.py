"""Which hooks a callback overrides, and of which kind: asked once, when a run starts."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

from asynccb.callbacks.base import Callback
from asynccb.errors import ArgumentError, HookRefused, in_words, nearest
from asynccb.signatures import plain

if TYPE_CHECKING:
    from collections.abc import Callable

    from asynccb.signatures import Plain

__all__ = ["Hooks", "read_hooks"]

# Hook -> an example of its positional arguments.
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "on_train_begin": ({},),
    "on_train_end": ({},),
    "on_epoch_begin": (0, {}),
    "on_epoch_end": (0, {}),
    "on_batch_begin": (0, {}),
    "on_batch_end": (0, {}),
    "on_train_batch_begin": (0, {}),
    "on_train_batch_end": (0, {}),
    "on_test_begin": ({},),
    "on_test_end": ({},),
    "on_test_batch_begin": (0, {}),
    "on_test_batch_end": (0, {}),
    "on_predict_begin": ({},),
    "on_predict_end": ({},),
    "on_predict_batch_begin": (0, {}),
    "on_predict_batch_end": (0, {}),
    "on_exception": (Exception(),),
    "on_checkpoint_saved": ("", 0),
}
_SETTINGS = {"overflow": ("wait", "drop_oldest", "latest"), "on_error": ("raise", "warn", "disable")}
_NAMES = {1: "logs", 2: "index, logs"}
_MAY_DIFFER = frozenset({"on_train_begin", "on_checkpoint_saved"})
_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


class Hooks(NamedTuple):
    """The overridden hooks of one callback by the name of the event's hook, bound to the callback; and
    whether they may change the model."""

    inline: dict[str, Callable[..., Any]]
    beside: dict[str, Callable[..., Any]]
    changes_model: bool = True


def read_hooks(callback: object) -> Hooks:
    """Reads the hooks of a callback and refuses what could only fail later, in the middle of a training.

    Raises:
        ArgumentError: not an instance of Callback.
        HookRefused: a wrong signature, ``async def`` with ``yield``, or ``def`` and ``async def`` mixed.
    """
    if isinstance(callback, type):
        raise ArgumentError(
            "callbacks", callback, "instances of Callback, not classes", f"Write {callback.__name__}(...)"
        )
    if not isinstance(callback, Callback):
        raise ArgumentError(
            "callbacks", callback, "instances of asynccb.Callback", "Derive the class from asynccb.Callback"
        )
    _check_settings(callback)
    _check_setters(callback)
    inline: dict[str, Callable[..., Any]] = {}
    beside: dict[str, Callable[..., Any]] = {}
    for name in _overridden(callback):
        hook = getattr(callback, name)
        told = plain(hook)
        if told is None or not told.takes(len(_ARGUMENTS[name])) or told.code.co_flags & _GENERATOR:
            _check(callback, name, hook)
        # Always on the loop, whatever its kind: it is announced by the delivery, not by the training thread.
        kind = beside if _is_async(hook, told) or name == "on_checkpoint_saved" else inline
        kind[name] = hook
    _refuse_mixture(callback, inline, beside)
    for side in ("begin", "end"):
        _settle_batch_hook(side, inline, beside)
    return Hooks(inline, beside, _may_change_model(callback))


def _may_change_model(callback: Callback) -> bool:
    """What the class says that the hooks come from: one that overrides hooks of a class which says False has
    not said it for its own."""
    own = vars(callback)
    hooks = [own[name] for name in _ARGUMENTS.keys() & own.keys()]
    if any(getattr(hook, "__self__", None) is not callback for hook in hooks):
        return True
    if own.get("changes_model"):  # one of the instances of its class that do
        return True
    for kind in type(callback).__mro__:
        if "changes_model" in vars(kind):
            return bool(vars(kind)["changes_model"])
        if not _ARGUMENTS.keys().isdisjoint(vars(kind)):
            return True
    return True


def _check_settings(callback: Callback) -> None:
    where = type(callback).__name__
    for name, known in _SETTINGS.items():
        given = getattr(callback, name)
        if given not in known:
            raise ArgumentError(f"{where}.{name}", given, "one of " + ", ".join(known), nearest(given, known))
    size = callback.mailbox_size
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ArgumentError(f"{where}.mailbox_size", size, "a whole number from 1 on")


def _check_setters(callback: Callback) -> None:
    for name, given in {"set_model": "model", "set_params": "params"}.items():
        setter = getattr(callback, name)
        if _is_async(setter, plain(setter)):
            raise HookRefused(
                f"{type(callback).__name__}.{name}",
                in_words(f"async def {name}"),
                "it is called before the training and nobody awaits it",
                f"Write `def {name}(self, {given})`, and what takes time as `async def on_train_begin`",
            )


def _overridden(callback: Callback) -> list[str]:
    own, kind = vars(callback), type(callback)
    base = vars(Callback)
    return [name for name in _ARGUMENTS if name in own or getattr(kind, name) is not base[name]]


def _is_async(hook: Callable[..., Any], told: Plain | None) -> bool:
    if told is not None:
        return bool(told.code.co_flags & inspect.CO_COROUTINE)
    while isinstance(hook, functools.partial):
        hook = hook.func
    return any(inspect.iscoroutinefunction(function) for function in _called(hook))


def _yields(hook: Callable[..., Any]) -> bool:
    return any(inspect.isasyncgenfunction(it) or inspect.isgeneratorfunction(it) for it in _called(hook))


def _called(hook: Callable[..., Any]) -> tuple[Callable[..., Any], ...]:
    """The hook, and what is called where it is an object of a class of its own."""
    return hook, type(hook).__call__


def _check(callback: Callback, name: str, hook: Callable[..., Any]) -> None:
    where = f"{type(callback).__name__}.{name}"
    if not callable(hook):
        raise HookRefused(where, hook, "a hook must be a function")
    if _yields(hook):
        raise HookRefused(
            where,
            hook,
            "a hook with `yield` is a generator: calling it runs nothing of its body",
            "Remove the `yield`",
        )
    try:
        signature = inspect.signature(hook)
    except (TypeError, ValueError):
        return  # a builtin that does not tell
    example = _ARGUMENTS[name]
    try:
        signature.bind(*example)
    except TypeError:
        wanted = {"on_exception": "exception", "on_checkpoint_saved": "path, epoch"}.get(name)
        wanted = wanted or _NAMES[len(example)]
        raise HookRefused(
            where,
            in_words(f"{name}{signature}"),
            f"it is called as {name}({wanted}), by position",
            f"Write `def {name}(self, {wanted})`",
        ) from None


def _refuse_mixture(callback: Callback, inline: dict[str, Any], beside: dict[str, Any]) -> None:
    plain = sorted(set(inline) - _MAY_DIFFER)
    awaited = sorted(set(beside) - _MAY_DIFFER)
    if plain and awaited:
        raise HookRefused(
            type(callback).__name__,
            in_words(f"def {', '.join(plain)}; async def {', '.join(awaited)}"),
            "the hooks of one callback are all `def` or all `async def`, else two threads run it at a time",
            f"Decide in `def`, hand over: `def {awaited[0]}(self, ...): return self._later(captured)`",
        )


def _settle_batch_hook(side: str, inline: dict[str, Any], beside: dict[str, Any]) -> None:
    # `on_batch_*` is the old name; where both are overridden the new one alone is called, as in Keras.
    for hooks in (inline, beside):
        old = hooks.pop(f"on_batch_{side}", None)
        if old is not None and f"on_train_batch_{side}" not in {*inline, *beside}:
            hooks[f"on_train_batch_{side}"] = old
