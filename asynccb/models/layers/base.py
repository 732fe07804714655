"""What a layer declares, and what an operation computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np

from asynccb.errors import ArgumentError
from asynccb.models.initializers import get

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asynccb.models.arrays import Array
    from asynccb.models.tables import Table

    Shape = tuple[int, ...]

B = TypeVar("B")

_KEPT = 4  # input shapes with kept buffers: full and last batch, of training and of validation


class WeightSpec(NamedTuple):
    """A weight before there is memory for it.

    ``learned``: gradients change it, as long as its layer is trainable. ``by_rows``: a table of which a batch
    touches few rows.
    """

    name: str
    shape: Shape
    initializer: str
    learned: bool = True
    by_rows: bool = False


class Weight:
    """One weight of a built layer.

    Attributes:
        name: such as ``"kernel"``.
        path: ``"<layer name>/<name>"``.
        value: the live array. It may be a view of the model's flat parameters and change at any time during a
            training; :meth:`numpy` copies. Read-only once the model is bound: ``model.set_weights`` writes.
        trainable: whether it is learned and its layer is trainable; set it on the layer. What a compiled
        model does follows from
            how this was when it was compiled.
        learned: whether gradients may change it at all; running means are changed in other ways.
        by_rows: whether a batch touches few rows of it.
        grad: where its gradient is written, None where it has none, or none of its own size.
        table: where the gradients of its rows are gathered, if it is trained row by row.
    """

    __slots__ = ("_trainable", "by_rows", "grad", "learned", "name", "path", "table", "value")

    def __init__(self, path: str, value: Array, spec: WeightSpec, trainable: bool) -> None:
        self.name, self.path, self.value = spec.name, path, value
        self.learned, self.by_rows, self._trainable = spec.learned, spec.by_rows, spec.learned and trainable
        self.grad: Array | None = None
        self.table: Table | None = None

    @property
    def trainable(self) -> bool:
        return self._trainable

    def follow(self, layer_trainable: bool) -> None:
        """Its layer is trainable from now on, or is not."""
        self._trainable = layer_trainable and self.learned

    @property
    def shape(self) -> Shape:
        return tuple(self.value.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.value.dtype)

    def numpy(self) -> Array:
        """A copy of the values."""
        return self.value.copy()

    def gradient(self) -> Array:
        """A copy of its gradient by the last batch that was differentiated; zeros where it has none."""
        if self.table is not None:
            return self.table.gradient()
        return np.zeros_like(self.value) if self.grad is None else self.grad.copy()

    def __repr__(self) -> str:
        return f"<Weight {self.path} shape={self.shape} dtype={self.dtype}>"


class Operation(Generic[B]):
    """One step of the forward and the backward pass, bound to its weights.

    ``train`` may keep ``x`` and its own output until ``back``, and never changes ``x``. ``back`` may
    overwrite the gradient that it is given. What the two return are buffers that the next call overwrites.

    Attributes:
        needs_input_gradient: False where nothing below this operation can be trained; ``back`` may then
            return anything.
    """

    needs_input_gradient = True

    def __init__(self) -> None:
        self._kept: dict[Any, B] = {}

    def infer(self, x: Array) -> Array:
        raise NotImplementedError

    def train(self, x: Array) -> Array:
        return self.infer(x)

    def back(self, g: Array) -> Array:
        raise NotImplementedError

    def commit(self) -> None:
        """Overwrites what the layer learns other than by gradients; called at the update, behind the gate."""

    def allocate(self, shape: Any, dtype: Any) -> B:
        """Makes the buffers for one shape."""
        raise NotImplementedError

    def buffers(self, shape: Any, dtype: Any) -> B:
        """The buffers for this shape, kept from call to call."""
        try:
            return self._kept[shape]
        except KeyError:
            if len(self._kept) >= _KEPT:
                self._kept.clear()
            made = self._kept[shape] = self.allocate(shape, dtype)
            return made


class Layer:
    """Base class of all layers.

    Args:
        name: unique within a model; by default the class in snake case, numbered per model (``dense``,
            ``dense_1``).
        input_shape: shape of one sample; only the first layer of a model needs it, and only to be built at
            once.
        trainable: whether training changes its weights; default True.
    """

    def __init__(
        self,
        name: str | None = None,
        input_shape: Sequence[int] | int | None = None,
        trainable: bool = True,
    ) -> None:
        self._trainable = bool(trainable)
        self.name: str = "" if name is None else check_name(name)
        self.input_shape = None if input_shape is None else shape_of("input_shape", input_shape)
        self.weights: list[Weight] = []
        self.built = False
        self.in_model = False

    @property
    def trainable(self) -> bool:
        """Whether training changes the weights. A change counts from the next ``compile`` on, as in Keras."""
        return self._trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        self._trainable = bool(value)
        for weight in self.weights:
            weight.follow(self._trainable)

    def weight_specs(self, input_shape: Shape) -> list[WeightSpec]:
        """The weights for samples of this shape, in the order of the file. Allocates nothing."""
        return []

    def output_shape(self, input_shape: Shape) -> Shape:
        """The shape of one sample behind this layer.

        Raises:
            ArgumentError: if the layer cannot take samples of ``input_shape``.
        """
        return input_shape

    def operations(self) -> list[Operation[Any]]:
        """New operations, bound to the weights as they lie now."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments that Keras' layer of the same name takes too, name and shapes apart."""
        return {}

    def build(self, input_shape: Shape, dtype: Any, rng: np.random.Generator) -> None:
        """Makes the weights."""
        self.weights = []
        for spec in self.weight_specs(input_shape):
            values = get(spec.initializer)(spec.shape, rng).astype(dtype)
            self.weights.append(Weight(f"{self.name}/{spec.name}", values, spec, self._trainable))
        self.built = True

    def seed_random(self, rng: np.random.Generator) -> None:
        """Gives the layer its random stream; layers without chance ignore it."""

    def random_state(self) -> dict[str, Any] | None:
        """Where the layer's random stream stands (JSON), None where it has none."""
        return None

    def set_random_state(self, state: dict[str, Any]) -> None:
        """Puts the random stream where :meth:`random_state` found it."""

    def get_weights(self) -> list[Array]:
        """Copies of the weights."""
        return [weight.numpy() for weight in self.weights]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name or '(unnamed)'}>"


def check_name(name: object) -> str:
    """A name that can be part of a path inside a file."""
    if not isinstance(name, str) or not name or name == "." or "/" in name or "\0" in name:
        raise ArgumentError("name", name, "must be a non-empty string without a slash")
    return name


def shape_of(argument: str, given: Sequence[int] | int) -> Shape:
    """A tuple of positive integers from one integer or a sequence."""
    sizes = (given,) if isinstance(given, (int, np.integer)) else tuple(given)
    for size in sizes:
        if not isinstance(size, (int, np.integer)) or isinstance(size, bool) or size < 1:
            raise ArgumentError(argument, given, "must be positive whole numbers, without the batch axis")
    return tuple(int(size) for size in sizes)


def whole(argument: str, given: object) -> int:
    """A positive whole number."""
    if not isinstance(given, (int, np.integer)) or isinstance(given, bool) or given < 1:
        raise ArgumentError(argument, given, "must be a positive whole number")
    return int(given)
