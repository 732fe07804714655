"""A consistent copy of a Sequential at one moment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from asynccb.models.arrays import views
from asynccb.models.files import optimizer_order, save_state

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    from asynccb.models.arrays import Array
    from asynccb.models.config import Compiled
    from asynccb.models.files import LayerLayout


class OptimizerState(NamedTuple):
    """What an optimizer has gathered."""

    iterations: int
    learning_rate: float
    slots: dict[str, Array]  # flat, in the layout of the trainable weights
    by_variable: bool


class SequentialState:
    """Weights, optimizer state and random streams of a Sequential; satisfies ``ModelState``.

    It owns its memory, and its arrays are read-only: training on does not change them.

    Attributes:
        config: the model's config (JSON).
        compiled: loss, metrics and optimizer settings, None if the model is not compiled.
        layout: layers with names and shapes of their weights.
        params: trainable weights, flat.
        frozen: other weights, flat.
        optimizer: None if the model is not compiled.
        random: layer name -> state of its random stream.
    """

    def __init__(
        self,
        *,
        config: dict[str, Any],
        compiled: Compiled | None,
        layout: tuple[LayerLayout, ...],
        params: Array,
        frozen: Array,
        optimizer: OptimizerState | None,
        random: dict[str, Any],
        rebuild: Callable[[SequentialState], Any],
    ) -> None:
        self.config, self.compiled, self.layout = config, compiled, layout
        self.params, self.frozen, self.optimizer, self.random = params, frozen, optimizer, random
        self._rebuild = rebuild
        self._arrays: dict[str, Array] | None = None
        for flat in (params, frozen, *(optimizer.slots.values() if optimizer else ())):
            flat.flags.writeable = False

    def weights(self) -> dict[str, Array]:
        """``"<layer>/<weight>"`` -> read-only array, in the order of ``get_weights``."""
        trainable = iter(views(self.params, self._shapes(True)))
        frozen = iter(views(self.frozen, self._shapes(False)))
        return {
            f"{layer.name}/{weight.name}": next(trainable if weight.trainable else frozen)
            for layer in self.layout
            for weight in layer.weights
        }

    def optimizer_arrays(self) -> dict[str, Array]:
        """``optimizer/iteration``, ``optimizer/learning_rate``, then the slots in the order of the file."""
        state = self.optimizer
        if state is None:
            return {}
        names = [
            f"{layer.name}/{weight.name}"
            for layer in self.layout
            for weight in layer.weights
            if weight.trainable
        ]
        slots = {slot: views(flat, self._shapes(True)) for slot, flat in state.slots.items()}
        arrays = {
            "optimizer/iteration": np.array(state.iterations, np.int64),
            "optimizer/learning_rate": np.array(state.learning_rate, np.float64),
        }
        for slot, index in optimizer_order(list(slots), len(names), by_variable=state.by_variable):
            arrays[f"optimizer/{names[index]}/{slot}"] = slots[slot][index]
        for array in arrays.values():
            array.flags.writeable = False
        return arrays

    @property
    def arrays(self) -> Mapping[str, Array]:
        """Read-only arrays by name: weights first, then ``optimizer/...``."""
        if self._arrays is None:
            self._arrays = {**self.weights(), **self.optimizer_arrays()}
        return self._arrays

    def save(self, path: str | os.PathLike[str], *, weights_only: bool = False) -> None:
        """Writes an HDF5 file, atomically; blocks until it is durable.

        Args:
            path: ends in ``.h5``, ``.hdf5`` or ``.weights.h5``.
            weights_only: leaves out the optimizer and how the model was compiled.

        Raises:
            ArgumentError: for another extension.
            CheckpointWriteError: if it could not be written; the file that stood there before is untouched.
        """
        save_state(self, path, weights_only=weights_only)

    def to_model(self) -> Any:
        """A new model with this state, compiled as the old one was."""
        return self._rebuild(self)

    def _shapes(self, trainable: bool) -> list[tuple[int, ...]]:
        return [w.shape for layer in self.layout for w in layer.weights if w.trainable is trainable]
