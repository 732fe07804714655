"""How an optimizer goes over the arrays of a model: in blocks, behind a gate, by the rows of a table.

Parameters, gradients and slots are flat arrays of equal length, so an update is a handful of numpy calls
however many tensors there are. Long arrays are updated block by block, all calls on one block before the
next: the block stays in the processor's cache from call to call, and scratch memory is that of one block.
Every call computes element by element, so blocks change no bit of the result.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from asynccb.errors import ArgumentError
from asynccb.models.arrays import aligned, read_only
from asynccb.models.memory import parts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from asynccb.models.arrays import Array
    from asynccb.models.tables import Table
    from asynccb.protocols import Gate

BLOCK = 512 << 10
"""Bytes of each array in a block. Measured with Adam and RMSprop and 1 MiB of second-level cache: 128 KiB to
1 MiB take the same time within a few per cent, arrays of 40 MB in one piece 1.4 times as long. Of these sizes
a large one, because each call on a block gives the interpreter lock away and has to get it back."""


class Optimizer:
    """Base class: the learning rate, the count of updates, and the slots.

    Args:
        learning_rate: step size; ``lr`` and ``learning_rate`` are one settable float.

    Attributes:
        iterations: updates made.
        flat_slots: slot name -> flat array, in the order in which Keras keeps them; empty until the model is
            built. The live arrays: nobody but the model's update and its loading writes to them.
        table_slots: the same for a table that is updated row by row; empty if there is none.
        groups: parts of the flat arrays, (start, stop), in the order in which they are overwritten; a gate is
            asked before each.
    """

    slot_initial: float = 0.0
    slots_by_variable: ClassVar[bool] = (
        False  # files: all slots of one variable together (Adam), or slot by slot
    )

    def __init__(self, learning_rate: float) -> None:
        self.learning_rate = learning_rate
        self.iterations = 0
        self.flat_slots: dict[str, Array] = {}
        self.table_slots: dict[str, Array] = {}
        self._params: Array | None = None
        self._layout: object = None
        self._owner: weakref.ref[object] | None = None

    @property
    def learning_rate(self) -> float:
        """The step size, a Python float."""
        return self._learning_rate

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        self._learning_rate = float(value)

    @property
    def lr(self) -> float:
        """The same as ``learning_rate``."""
        return self._learning_rate

    @lr.setter
    def lr(self, value: float) -> None:
        self._learning_rate = float(value)

    @property
    def slots(self) -> dict[str, Array]:
        """``flat_slots``, read-only: a hook that wrote to them would tear the copy of the model under way."""
        return {name: read_only(slot) for name, slot in self.flat_slots.items()}

    @property
    def name(self) -> str:
        """The name by which ``compile`` knows this optimizer."""
        return type(self).__name__.lower()

    def slot_names(self) -> tuple[str, ...]:
        """Slots that these settings need."""
        return ()

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments; Keras 3 takes the same ones."""
        return {"learning_rate": self._learning_rate}

    @property
    def by_rows(self) -> bool:
        """Whether gradients of zero change nothing, to the bit, so that rows without may be left out. That
        is so for learning rates that are finite and not negative."""
        return False

    def build(self, params: Array, grads: Array, table: Table | None = None, layout: object = None) -> None:
        """Binds the optimizer to a model's arrays.

        Args:
            params: dense trainable weights, flat.
            grads: their gradients.
            table: the weight that is updated row by row.
            layout: what lies where; slots of an equal layout are kept.
        """
        kept = (self.flat_slots, self.table_slots) if layout == self._layout else ({}, {})
        self._params, self._table, self._layout = params, table, layout
        self.flat_slots = self._slots_like(params, kept[0])
        self.table_slots = {} if table is None else self._slots_like(table.value, kept[1])
        size = BLOCK // params.itemsize
        if params.size <= 2 * size:  # one block in place of a long and a short one
            size = max(1, params.size)
        self.groups = parts(params, arrays=1 + len(self.flat_slots), multiple=size)
        scratch, slots = aligned(min(size, params.size), params.dtype), tuple(self.flat_slots.values())
        self._blocks = [
            [
                (params[part], grads[part], scratch[: part.stop - part.start], [slot[part] for slot in slots])
                for part in (slice(at, min(at + size, stop)) for at in range(start, stop, size))
            ]
            for start, stop in self.groups
        ]

    def _slots_like(self, like: Array, kept: Mapping[str, Array]) -> dict[str, Array]:
        found = {}
        for name in self.slot_names():
            old = kept.get(name)
            if old is None or old.shape != like.shape or old.dtype != like.dtype:
                old = aligned(like.shape, like.dtype, fill=self.slot_initial)
            found[name] = old
        return found

    def claim(self, model: object) -> None:
        """Makes ``model`` the one that this optimizer serves.

        Raises:
            ArgumentError: if it serves another model that is still alive: its slots belong to those weights.
        """
        owner = None if self._owner is None else self._owner()
        if owner is not None and owner is not model:
            fix = "Make one optimizer per model"
            raise ArgumentError("optimizer", self, "serves another model already", fix)
        self._owner = weakref.ref(model)

    def update(self, gate: Gate | None = None) -> None:
        """Overwrites the parameters by the gradients, behind ``gate`` where that is copying."""
        if gate is not None and gate.copying:
            self._follow(gate)
        else:
            self.iterations += 1
            for group in self._blocks:
                for block in group:
                    self.step(*block)
        if self._table is not None:
            self._update_rows(self._table, gate)

    def _follow(self, gate: Gate) -> None:
        """The update of the flat arrays, one group behind the copy of the next."""
        segments = 1 + len(self.flat_slots)
        if self._blocks:
            gate(segments)  # where it raises, nothing has changed yet
        self.iterations += 1
        for number, group in enumerate(self._blocks, 1):
            if number > 1:
                gate(number * segments)
            for block in group:
                self.step(*block)

    def _update_rows(self, table: Table, gate: Gate | None) -> None:
        rows = table.rows
        if gate is not None and gate.copying:
            for array in range(1 + len(self.table_slots)):  # these come first in memory.lay_out
                gate.keep(array, rows)
        values, slots = table.value[rows], [slot[rows] for slot in self.table_slots.values()]
        self.step(values, table.sums, np.empty_like(values), slots)
        table.value[rows] = values
        for slot, changed in zip(self.table_slots.values(), slots, strict=True):
            slot[rows] = changed

    def step(self, p: Array, g: Array, a: Array, slots: Sequence[Array]) -> None:
        """Updates ``p`` and ``slots`` by ``g``, element by element; ``a`` is scratch; all of one shape.

        ``iterations`` counts this update already.
        """
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        # Bound arrays are views of a model's memory: a copy of the optimizer is bound anew by its own model.
        unbound = ("_params", "_table", "_blocks", "_owner")
        state = {key: value for key, value in vars(self).items() if key not in unbound}
        return {
            **state,
            "flat_slots": {name: slot.copy() for name, slot in self.flat_slots.items()},
            "table_slots": {name: slot.copy() for name, slot in self.table_slots.items()},
            "_params": None,
            "_owner": None,
        }
