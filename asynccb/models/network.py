"""Layers bound together: flat memory for all weights, and the two passes as prebuilt lists of bound calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asynccb.models.arrays import aligned, pack, views
from asynccb.models.layers import Operation
from asynccb.models.layers.activation import Apply

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from asynccb.models.arrays import Array
    from asynccb.models.layers import Layer, Weight


class Network:
    """The computing side of built layers.

    Making one moves the weights of the layers into flat arrays: each ``Weight.value`` becomes a view.

    Args:
        layers: built layers, in order.
        dtype: of weights and values.

    Attributes:
        params: all trainable weights, flat.
        grads: their gradients, flat, same layout; written by :meth:`backward`.
        frozen: all other weights (running means), flat.
        last_activation: the name of the activation at the very end, if there is one.
    """

    def __init__(self, layers: Sequence[Layer], dtype: Any) -> None:
        weights = [weight for layer in layers for weight in layer.weights]
        self.trainable = [weight for weight in weights if weight.trainable]
        self.params = _move(self.trainable, dtype)
        self.frozen = _move([weight for weight in weights if not weight.trainable], dtype)
        self.grads = aligned(self.params.size, dtype, fill=0.0)
        shapes = [weight.shape for weight in self.trainable]
        for weight, grad in zip(self.trainable, views(self.grads, shapes), strict=True):
            weight.grad = grad

        operations: list[Operation[Any]] = []
        self._ends: list[int] = []  # where the operations of each layer end
        first_trainable = None
        for layer in layers:
            made = layer.operations()
            if first_trainable is None and any(weight.trainable for weight in layer.weights):
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

    def leave_out_last(self, left_out: bool) -> None:
        """Whether training and evaluation end before the last activation, which the head computes."""
        upto = len(self._operations) - int(left_out)
        self._train = tuple(operation.train for operation in self._operations[:upto])
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


def _move(weights: Sequence[Weight], dtype: Any) -> Array:
    flat = pack([weight.value for weight in weights], dtype)
    for weight, view in zip(weights, views(flat, [weight.shape for weight in weights]), strict=True):
        weight.value = view
    return flat
