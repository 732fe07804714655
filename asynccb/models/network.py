"""Layers bound together: flat memory for all weights, and the two passes as prebuilt lists of bound calls."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from asynccb.models.arrays import aligned, pack, read_only, views
from asynccb.models.layers import Operation
from asynccb.models.layers.activation import Apply
from asynccb.models.tables import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from asynccb.models.arrays import Array
    from asynccb.models.layers import Layer, Weight

_versions = itertools.count()


class Network:
    """The computing side of built layers.

    Making one moves the weights of the layers to where they are computed with: each ``Weight.value`` becomes
    a read-only view of one of the arrays below. What is trainable is read from the layers now and stays as it
    is.

    Args:
        layers: built layers, in order.
        dtype: of weights and values.
        by_rows: whether the table of an Embedding gets its gradient row by row.

    Attributes:
        weights: all weights, in order.
        kinds: for each weight where it lies: ``"dense"`` in ``params``, ``"table"``, ``"moving"`` or
            ``"constant"``.
        trainable: the weights that are ``"dense"`` or ``"table"``.
        params: dense trainable weights, flat.
        grads: their gradients, flat, same layout; written by :meth:`backward`.
        table: the one weight that is updated row by row, None if there is none.
        moving: what batches change other than by gradients (running means), flat.
        constants: weights of layers that are not trainable, flat; only :meth:`write` changes them.
        version: a number that no other content of ``constants`` of any network has.
        last_activation: the name of the activation at the very end, if there is one.
    """

    def __init__(self, layers: Sequence[Layer], dtype: Any, by_rows: bool = False) -> None:
        self.weights = [weight for layer in layers for weight in layer.weights]
        self.kinds = kinds_of(layers, by_rows)
        self.trainable = [*self._of("table"), *self._of("dense")]  # a table is in the first layer
        self.params = _move(self._of("dense"), dtype)
        self.moving = _move(self._of("moving"), dtype)
        self.constants = _move(self._of("constant"), dtype)
        self.table = next(map(_move_table, self._of("table")), None)
        self._targets = [weight.value for weight in self.weights]
        self.version = next(_versions)
        self.grads = aligned(self.params.size, dtype, fill=0.0)
        self._bind_gradients()
        self._bind_operations(layers)
        for weight in self.weights:
            # The operations have the arrays themselves. Whoever else wrote to them, a hook of a user's say,
            # would tear the copy of the model that may be under way: `set_weights` asks first.
            weight.value = read_only(weight.value)

    @property
    def layout(self) -> object:
        """What lies where among the trainable weights; equal layouts have equal memory."""
        return [
            (kind, weight.path, weight.shape)
            for kind, weight in zip(self.kinds, self.weights, strict=True)
            if kind in ("dense", "table")
        ]

    def _of(self, kind: str) -> list[Weight]:
        return [weight for weight, own in zip(self.weights, self.kinds, strict=True) if own == kind]

    def _bind_gradients(self) -> None:
        for weight in self.weights:
            weight.grad = weight.table = None
        dense = self._of("dense")
        for weight, grad in zip(dense, views(self.grads, [one.shape for one in dense]), strict=True):
            weight.grad = grad
        for weight in self._of("table"):
            weight.table = self.table

    def _bind_operations(self, layers: Sequence[Layer]) -> None:
        operations: list[Operation[Any]] = []
        self._ends: list[int] = []  # where the operations of each layer end
        trainable = {id(weight) for weight in self.trainable}
        first_trainable = None
        for layer in layers:
            made = layer.operations()
            if first_trainable is None and any(id(weight) in trainable for weight in layer.weights):
                first_trainable = len(operations)
            operations.extend(made)
            self._ends.append(len(operations))
        self._operations = operations
        # Nothing below the first trainable weight needs a gradient, so the backward pass ends there.
        self._lowest = len(operations) if first_trainable is None else first_trainable
        if first_trainable is not None:
            operations[first_trainable].needs_input_gradient = False
        last = operations[-1] if operations else None
        self.last_activation = last.function.name if isinstance(last, Apply) else None
        self._infer = tuple(operation.infer for operation in operations)
        self.commits = tuple(
            operation.commit for operation in operations if type(operation).commit is not Operation.commit
        )
        self.leave_out_last(False)

    def write(self, values: Iterable[Array]) -> None:
        """Overwrites all weights, in order."""
        for target, value in zip(self._targets, values, strict=True):
            target[...] = value
        self.version = next(_versions)

    def leave_out_last(self, left_out: bool) -> None:
        """Whether training and evaluation end before the last activation, which the head computes."""
        upto = len(self._operations) - int(left_out)
        self._train = tuple(
            operation.infer if type(operation).train is Operation.train else operation.train
            for operation in self._operations[:upto]
        )
        self._evaluate = self._infer[:upto]
        self._back = tuple(operation.back for operation in reversed(self._operations[self._lowest : upto]))

    def predict(self, x: Array) -> Array:
        """The whole network without chance. The result is a buffer that the next call overwrites."""
        return _run(self._infer, x)

    def outputs(self, x: Array) -> list[Array]:
        """Copies of what each layer gives in :meth:`predict`, in order."""
        found, begin = [], 0
        for end in self._ends:
            x = _run(self._infer[begin:end], x)
            found.append(x.copy())
            begin = end
        return found

    def evaluate(self, x: Array) -> Array:
        """Like :meth:`predict`, up to where the head begins."""
        return _run(self._evaluate, x)

    def forward(self, x: Array) -> Array:
        """The training pass, up to where the head begins."""
        return _run(self._train, x)

    def backward(self, g: Array) -> None:
        """Fills ``grads`` from the gradient by the result of :meth:`forward`; may overwrite ``g``."""
        _run(self._back, g)


def _run(calls: tuple[Callable[[Array], Array], ...], value: Array) -> Array:
    for call in calls:
        value = call(value)
    return value


def kinds_of(layers: Sequence[Layer], by_rows: bool) -> tuple[str, ...]:
    """For each weight, how it changes in training; see :class:`Network`."""
    return tuple(_kind(layer, weight, by_rows) for layer in layers for weight in layer.weights)


def _kind(layer: Layer, weight: Weight, by_rows: bool) -> str:
    if not layer.trainable:
        return "constant"
    if not weight.learned:
        return "moving"
    return "table" if weight.by_rows and by_rows else "dense"


def _move(weights: Sequence[Weight], dtype: Any) -> Array:
    flat = pack([weight.value for weight in weights], dtype)
    for weight, view in zip(weights, views(flat, [weight.shape for weight in weights]), strict=True):
        weight.value = view
    return flat


def _move_table(weight: Weight) -> Table:
    if weight.table is not None:  # it lies in memory of its own already
        weight.value = weight.table.value
    elif weight.value.base is not None:  # part of a flat array, which would be kept alive for it
        weight.value = weight.value.copy()
    return Table(weight.value)
