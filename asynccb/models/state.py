"""A consistent copy of a Sequential at one moment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from asynccb.models.arrays import read_only
from asynccb.models.files import optimizer_order, save_state

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence

    from asynccb.models.arrays import Array
    from asynccb.models.config import Compiled
    from asynccb.models.files import LayerLayout


class OptimizerState(NamedTuple):
    """What an optimizer has gathered."""

    iterations: int
    learning_rate: float
    slots: Mapping[str, Sequence[Array]]  # an array for each trainable weight, in their order
    by_variable: bool


class SequentialState:
    """Weights, optimizer state and random streams of a Sequential; satisfies ``ModelState``.

    Its arrays are copies, handed out as read-only views: training on does not change them.

    Attributes:
        config: the model's config (JSON).
        compiled: loss, metrics and optimizer settings, None if the model is not compiled.
        layout: layers with names and shapes of their weights, and which of them the optimizer has slots for.
        optimizer: None if the model is not compiled.
        random: layer name -> state of its random stream.
    """

    def __init__(
        self,
        *,
        config: dict[str, Any],
        compiled: Compiled | None,
        layout: tuple[LayerLayout, ...],
        weights: Sequence[Array],
        optimizer: OptimizerState | None,
        random: dict[str, Any],
        rebuild: Callable[[SequentialState], Any],
    ) -> None:
        self.config, self.compiled, self.layout = config, compiled, layout
        self.optimizer, self.random = optimizer, random
        self._weights, self._rebuild = weights, rebuild
        self._arrays: dict[str, Array] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_arrays": None}  # else every array would be written twice

    @property
    def tensors(self) -> Sequence[Array]:
        """The arrays of :meth:`weights`, as they lie in memory."""
        return self._weights

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._weights[0].dtype if len(self._weights) else np.dtype(np.float32)

    def weights(self) -> dict[str, Array]:
        """``"<layer>/<weight>"`` -> read-only array, in the order of ``get_weights``."""
        return {name: read_only(array) for (name, _), array in zip(self._names(), self._weights, strict=True)}

    def optimizer_arrays(self) -> dict[str, Array]:
        """``optimizer/iteration``, ``optimizer/learning_rate``, then the slots in the order of the file."""
        state = self.optimizer
        if state is None:
            return {}
        names = [name for name, trainable in self._names() if trainable]
        arrays = {
            "optimizer/iteration": np.array(state.iterations, np.int64),
            "optimizer/learning_rate": np.array(state.learning_rate, np.float64),
        }
        for slot, index in optimizer_order(list(state.slots), len(names), by_variable=state.by_variable):
            arrays[f"optimizer/{names[index]}/{slot}"] = state.slots[slot][index]
        return {name: read_only(array) for name, array in arrays.items()}

    @property
    def arrays(self) -> Mapping[str, Array]:
        """Read-only arrays by name: weights first, then ``optimizer/...``."""
        if self._arrays is None:
            self._arrays = {**self.weights(), **self.optimizer_arrays()}
        return self._arrays

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        weights_only: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes an HDF5 file, atomically; blocks until it is durable.

        Args:
            path: ends in ``.h5``, ``.hdf5`` or ``.weights.h5``.
            weights_only: leaves out the optimizer and how the model was compiled.
            extra: plain data that goes into the file beside; not with ``weights_only``.

        Raises:
            ArgumentError: for another extension.
            CheckpointWriteError: if it could not be written; the file that stood there before is untouched.
        """
        save_state(self, path, weights_only=weights_only, extra=extra)

    def to_model(self) -> Any:
        """A new model with this state, compiled as the old one was."""
        return self._rebuild(self)

    def _names(self) -> list[tuple[str, bool]]:
        return [
            (f"{layer.name}/{weight.name}", weight.trainable)
            for layer in self.layout
            for weight in layer.weights
        ]
