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

    Args:
        run_name: for the messages that others get.
        model: None where it is not made yet.
        callbacks: of the run, as far as they are known.

    Raises:
        ModelBusy, CallbackBusy: another run has one of them; then nothing is claimed.
    """

    def __init__(self, run_name: str, model: Any, callbacks: Iterable[Any]) -> None:
        self._run_name = run_name
        self._objects: list[Any] = []  # kept alive: an id is only good as long as its object
        self._holds = 2
        self.extend(model, callbacks)

    def extend(self, model: Any, callbacks: Iterable[Any], also: Iterable[Any] = ()) -> None:
        """Claims these too, as far as it does not have them, what the model trains besides itself
        (``also_trains``, or ``also``), and whom callbacks call (``also_serves``).

        Raises:
            ModelBusy, CallbackBusy: another run has one of them; then none of these is claimed.
        """
        mine = set(map(id, self._objects))
        models = (model, *getattr(model, "also_trains", ()), *also)
        given = list(callbacks)
        given += [held for callback in given for held in getattr(callback, "also_serves", ())]
        new = [held for held in (*models, *given) if held is not None and id(held) not in mine]
        with _lock:
            for held in new:
                holder = _holders.get(id(held))
                if holder is None:
                    continue
                if any(held is other for other in models):
                    what = "the model" if held is model else f"the {type(held).__name__} of the model"
                    raise ModelBusy(
                        f"{what} is already in {holder}: wait for it, or take a copy with "
                        "`(await run.snapshot()).to_model()`"
                    )
                raise CallbackBusy(
                    f"{type(held).__name__} already serves {holder}: give each run its own instance"
                )
            _holders.update((id(held), self._run_name) for held in new)
            self._objects += new

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

    def __del__(self) -> None:
        # Of a queued run whose event loop was closed: nobody else lets go of it. No lock: the garbage
        # collector may come while this thread has it.
        for held in self._objects:
            _holders.pop(id(held), None)

    @property
    def freed(self) -> bool:
        return self._holds == 0
