"""What ``fit`` is given, checked as far as that needs no model.

A training that is queued is no more than this: its model may not be made yet.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict

from asynccb.callbacks.base import Callback
from asynccb.callbacks.history import History
from asynccb.callbacks.hooks import Hooks, read_hooks
from asynccb.callbacks.keras_callback import is_of_keras, wrap
from asynccb.errors import ArgumentError
from asynccb.training.arguments import check_count, check_fit, check_seconds

if TYPE_CHECKING:
    import datetime
    from collections.abc import Iterable, Mapping

    from asynccb.training.arguments import FitArguments

__all__ = ["REPLAY", "FitKeywords", "Prepared", "as_list", "prepare"]

REPLAY = 4096
"""Events kept for readers that come late."""


class FitKeywords(TypedDict, total=False):
    """The keyword arguments of :meth:`asynccb.Trainer.fit` that ``submit`` takes too."""

    batch_size: int | None
    epochs: int
    verbose: str | int
    callbacks: Callback | Iterable[Callback] | None
    validation_split: float
    validation_data: Any
    shuffle: bool | str
    class_weight: Mapping[int, float] | None
    sample_weight: Any
    initial_epoch: int
    steps_per_epoch: int | None
    validation_steps: int | None
    validation_batch_size: int | None
    validation_freq: int | Iterable[int]
    resume: str | os.PathLike[str] | Literal[False] | None
    stop_after: datetime.timedelta | None
    replay: int
    switch_interval: float | None


class Prepared(NamedTuple):
    """What ``fit`` was given, as far as it can be checked without a model.

    Attributes:
        hooked: the user's callbacks, each with its hooks.
        history: the one among them, or a new one.
    """

    fit: FitArguments
    hooked: list[tuple[Callback, Hooks]]
    history: History
    resume: Any
    switch_interval: float | None
    replay: int


def prepare(
    x: Any,
    y: Any,
    *,
    callbacks: Callback | Iterable[Callback] | None = None,
    resume: str | os.PathLike[str] | Literal[False] | None = None,
    switch_interval: float | None = None,
    replay: int = REPLAY,
    **fit: Any,
) -> Prepared:
    """Checks what :meth:`Trainer.fit` is given, by its names; ``fit``: its other arguments.

    Raises:
        ArgumentError: names the argument, what was given and what is allowed.
        HookRefused: a callback's hook cannot be called as it stands.
    """
    if resume is not None and resume is not False and not isinstance(resume, (str, os.PathLike)):
        raise ArgumentError(
            "resume", resume, "the path of a backup or of a folder of backups, None, or False to begin anew"
        )
    hooked = [(callback, read_hooks(callback)) for callback in as_list(callbacks)]
    histories = [callback for callback, _ in hooked if isinstance(callback, History)]
    return Prepared(
        check_fit(x, y, **fit),
        hooked,
        histories[0] if histories else History(),
        resume,
        check_seconds("switch_interval", switch_interval),
        check_count("replay", replay, least=1),
    )


def as_list(callbacks: Callback | Iterable[Callback] | None) -> list[Callback]:
    """The callbacks one by one; each of Keras in one of ours that runs it.

    Raises:
        ArgumentError: no Callback or list of them, or one of them twice.
    """
    if callbacks is None:
        return []
    if isinstance(callbacks, (Callback, type)) or is_of_keras(callbacks):
        given: list[Any] = [callbacks]
    else:
        try:
            given = list(callbacks)
        except TypeError:
            raise ArgumentError("callbacks", callbacks, "a Callback or a list of them") from None
    for position, callback in enumerate(given):
        if any(callback is other for other in given[:position]):
            raise ArgumentError("callbacks", callback, "each instance once", "Make a second instance")
    return [wrap(callback) for callback in given]  # read_hooks refuses what is no Callback
