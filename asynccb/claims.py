"""Which models and callbacks are in a run now: each serves one live run at a time."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from asynccb.errors import CallbackBusy, ModelBusy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["Claim"]

_lock = threading.Lock()
_holders: dict[int, str] = {}


class Claim:
    """A run's hold on its model and callbacks, until its thread and its supervisor have both let go.

    Raises:
        ModelBusy, CallbackBusy: another run has one of them; then nothing is claimed.
    """

    def __init__(self, run_name: str, model: Any, callbacks: Iterable[Any]) -> None:
        self._objects = [model, *callbacks]  # kept alive: an id is only good as long as its object
        self._holds = 2
        with _lock:
            for held in self._objects:
                holder = _holders.get(id(held))
                if holder is None:
                    continue
                if held is model:
                    raise ModelBusy(
                        f"the model is already in {holder}: wait for it, or take a copy with "
                        "`(await run.snapshot()).to_model()`"
                    )
                raise CallbackBusy(
                    f"{type(held).__name__} already serves {holder}: give each run its own instance"
                )
            _holders.update((id(held), run_name) for held in self._objects)

    def hold(self) -> bool:
        """One more hold, to be let go of too. False: it is free, somebody else may have what it claimed."""
        with _lock:
            held = self._holds > 0
            self._holds += held
            return held

    def let_go(self, clean_up: Callable[[], None] | None = None) -> None:
        """Called once by the thread, once by the supervisor, and once for each hold; the last one frees.

        Args:
            clean_up: called by the last one, before the claim falls: nobody else can have the objects yet.
        """
        with _lock:
            self._holds -= 1
            if self._holds:
                return
        if clean_up is not None:
            clean_up()
        with _lock:
            for held in self._objects:
                _holders.pop(id(held), None)
            self._objects.clear()

    @property
    def freed(self) -> bool:
        return self._holds == 0
