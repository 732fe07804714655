"""Consistent copies of a model in training.

The copy is plain: it is made at a safe point, on the training thread, by the model's own ``capture``, and
owns its memory. All who ask at the same safe point share one copy, and each holds a handle of its own on it,
so that nobody's ``release`` takes the arrays from under another.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike
    from types import TracebackType

    import numpy as np

    from asynccb.protocols import ModelState

__all__ = ["Snapshot"]


class Snapshot:
    """A model at one moment: training on does not change it.

    Attributes:
        step: batches trained when it was taken, over all epochs.
        epoch: 0-based epoch in which it was taken.
    """

    def __init__(self, state: ModelState, step: int, epoch: int) -> None:
        self._state: ModelState | None = state
        self.step = step
        self.epoch = epoch

    @property
    def arrays(self) -> Mapping[str, np.ndarray[Any, Any]]:
        """Read-only arrays by name; optimizer slots have the prefix ``optimizer/``."""
        return MappingProxyType(dict(self._held().arrays))

    def save(self, path: str | PathLike[str], *, weights_only: bool = False) -> None:
        """Writes the model as a file, atomically: at any instant the name holds the old file or the new one.

        Blocks while it writes; on an event loop use ``loop.run_in_executor``.

        Raises:
            CheckpointWriteError: the file could not be written; the old one is untouched.
        """
        self._held().save(path, weights_only=weights_only)

    def to_model(self) -> Any:
        """A new model with this state, to predict with or to train from while the original trains on."""
        return self._held().to_model()

    def another(self) -> Snapshot:
        """A second handle on the same copy."""
        return Snapshot(self._held(), self.step, self.epoch)

    @property
    def released(self) -> bool:
        return self._state is None

    def release(self) -> None:
        """Gives the memory back. Legal any number of times; everything else then raises RuntimeError."""
        self._state = None

    def _held(self) -> ModelState:
        if self._state is None:
            raise RuntimeError(f"this snapshot of step {self.step} was released")
        return self._state

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        released = ", released" if self._state is None else ""
        return f"<Snapshot step={self.step} epoch={self.epoch}{released}>"
