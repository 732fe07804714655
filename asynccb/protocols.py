"""The shapes of the system on one page: what a model, a feed, an engine and the loop's host look like.

Nothing here does anything; every room may import it and it imports no room but :mod:`asynccb.events`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from os import PathLike

    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[Any]


class Batch(NamedTuple):
    """What one step trains on.

    ``x`` is one array or, for a model of several inputs, the same tuple, list or dict of arrays that the caller
    gave; every array has the samples on axis 0. ``y`` and ``sample_weight`` are None where there are none.
    ``size`` is the number of samples.
    """

    x: Any
    y: Any = None
    sample_weight: Any = None
    size: int = 0


class Gate(Protocol):
    """Called by a model just before it overwrites its parameters; blocks until they may be overwritten."""

    def __call__(self, tensors: Sequence[str] | None = None) -> None: ...


class ModelState(Protocol):
    """A consistent copy of a model at one moment. It owns its memory: training on does not change it."""

    @property
    def arrays(self) -> Mapping[str, np.ndarray[Any, Any]]:
        """Read-only arrays by name: weights first, then optimizer slots (names start with ``optimizer/``)."""

    def save(self, path: str | PathLike[str], *, weights_only: bool = False) -> None:
        """Writes the state as a file of the model's own format, atomically. Blocks; never call it on the loop."""

    def to_model(self) -> Any:
        """A new model with this state, independent of the one it was taken from."""


@runtime_checkable
class TrainsBatches(Protocol):
    """The smallest model there is. ``test_batch`` and all of :class:`Model` beyond it are optional."""

    def train_batch(self, batch: Batch) -> Mapping[str, Any]:
        """One update. Returns the logs of this batch (``loss`` and metrics), means over its samples."""


@runtime_checkable
class Model(Protocol):
    """What the training thread drives. Everything here is called on that thread only.

    ``Sequential`` is one; :func:`asynccb.models.adapt` makes one of any object that has ``train_batch``.
    """

    @property
    def user_model(self) -> Any:
        """The object that the user gave; callbacks see it as ``self.model``."""

    @property
    def metrics_names(self) -> Sequence[str]:
        """The names in a batch's logs, ``loss`` first. Empty where the model does not tell before it trains."""

    def check_data(self, x: Any, y: Any, sample_weight: Any, *, name: str = "x", training: bool = True) -> None:
        """Refuses data that the model can never take (shapes, dtypes) with :class:`~asynccb.ArgumentError`."""

    def direction(self, metric: str) -> str | None:
        """``"min"`` or ``"max"`` if the model knows in which direction this metric improves, else None."""

    def train_batch(self, batch: Batch, before_update: Gate | None = None) -> Mapping[str, Any]: ...

    def test_batch(self, batch: Batch) -> Mapping[str, Any]: ...

    def predict_batch(self, batch: Batch) -> Any: ...

    def capture(self) -> ModelState:
        """A consistent copy of weights and optimizer state; legal between two batches only."""


class Source(Protocol):
    """Where batches come from. ``begin`` opens a pass, ``next`` answers None at its end."""

    @property
    def steps(self) -> int | None:
        """Batches in one epoch, where known."""

    @property
    def samples(self) -> int | None:
        """Samples in one epoch, where known."""

    def begin(self, epoch: int) -> None: ...

    def next(self) -> Batch | None: ...


class EmitIndexed(Protocol):
    def __call__(self, index: int, logs: dict[str, Any]) -> None: ...


class Engine(Protocol):
    """Where a run's training function is executed."""

    def start(self, target: Callable[[], None], name: str) -> None:
        """Runs ``target`` to its end, beside the caller. Never blocks."""
