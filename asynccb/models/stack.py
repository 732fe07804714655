"""The stack under a Sequential: layers in order, how they are built, their weights, their config."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from asynccb.errors import ArgumentError, ModelBusy, in_words
from asynccb.models import config
from asynccb.models.layers import Embedding, Layer
from asynccb.models.layers.base import check_name, shape_of
from asynccb.models.names import numbered, snake_case
from asynccb.models.network import Network
from asynccb.models.summary import summary_lines

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from asynccb.models.arrays import Array
    from asynccb.models.layers import Weight
    from asynccb.protocols import Gate

    Shape = tuple[int, ...]

_INITIAL, _DROPOUT = 0, 1  # which random stream of a layer


class Stack:
    """Layers in order, without a training. The arguments are those of ``Sequential``."""

    def __init__(
        self,
        layers: Sequence[Layer] | None = None,
        name: str | None = None,
        seed: int | None = None,
        dtype: str = "float32",
    ) -> None:
        if dtype not in ("float32", "float64"):
            raise ArgumentError("dtype", dtype, 'must be "float32" or "float64"')
        if seed is not None and (
            isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0
        ):
            raise ArgumentError("seed", seed, "must be None or a whole number that is not negative")
        self.name = "sequential" if name is None else check_name(name)
        self.layers: list[Layer] = []
        self.training_thread: int | None = None
        self.training_gate: Gate | None = None
        self._seed = None if seed is None else int(seed)
        self._entropy = self._seed if self._seed is not None else np.random.SeedSequence().entropy
        self._dtype: np.dtype[Any] = np.dtype(dtype)
        self._input_shape: Shape | None = None
        self._output_shape: Shape | None = None
        self._network: Network | None = None
        for layer in layers or ():
            self.add(layer)

    def add(self, layer: Layer) -> None:
        """Appends a layer; it is built at once if the shape of its input is known.

        Raises:
            ArgumentError: for what is no layer, a layer of another model, a name that is taken, an Embedding
                that is not the first layer.
            ModelBusy: from another thread during a training.
        """
        self._check_free("add")
        self._check_layer(layer)
        shape = self._output_shape if self.layers else layer.input_shape
        if shape is not None:
            _shapes_behind([layer], shape)
        taken = {other.name for other in self.layers}
        layer.name = layer.name or numbered(snake_case(type(layer).__name__), taken)
        layer.in_model = True
        if not self.layers:
            self._input_shape = self._output_shape = layer.input_shape
        self.layers.append(layer)
        self._unbind()
        if shape is not None:
            self._build_layer(len(self.layers) - 1)

    def _check_layer(self, layer: Layer) -> None:
        if isinstance(layer, type):
            raise ArgumentError("layer", layer, "is a class, not an instance", f"Write {layer.__name__}(...)")
        if not isinstance(layer, Layer):
            raise ArgumentError("layer", layer, "must be a layer of asynccb.models, such as Dense(10)")
        if layer.in_model:
            raise ArgumentError(
                "layer", layer, "is part of a model already", "Make a new one; weights are not shared"
            )
        if layer.name and any(layer.name == other.name for other in self.layers):
            raise ArgumentError("name", layer.name, "is the name of another layer of this model")
        if isinstance(layer, Embedding) and self.layers:
            raise ArgumentError(
                "layer", layer, "an Embedding takes whole numbers, so it must be the first layer"
            )

    def _build_layer(self, index: int) -> None:
        layer, shape = self.layers[index], self._output_shape
        assert shape is not None
        layer.build(shape, self._dtype, self._stream(_INITIAL, index))
        layer.seed_random(self._stream(_DROPOUT, index))
        self._output_shape = layer.output_shape(shape)

    def _stream(self, purpose: int, index: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self._entropy, spawn_key=(purpose, index)))

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Makes the weights of all layers.

        Args:
            input_shape: of a batch, its first entry (the batch axis, usually None) is ignored; as in Keras.
        """
        self._check_free("build")
        self._build(tuple(input_shape)[1:])

    def _build(self, sample: Sequence[Any]) -> None:
        if self._input_shape is not None:
            if tuple(sample) != self._input_shape:
                raise ArgumentError(
                    "input_shape", sample, f"the model is built for {self._input_shape} already"
                )
            return
        shape = shape_of("input_shape", tuple(sample))
        _shapes_behind(self.layers, shape)
        self._input_shape = self._output_shape = shape
        for index in range(len(self.layers)):
            self._build_layer(index)

    @property
    def built(self) -> bool:
        """Whether the layers have their weights."""
        return self._input_shape is not None

    def _settle(self) -> None:
        """Completes a copy of the model that is under way: what comes now changes what it copies, or how that
        is divided."""
        gate = self.training_gate
        if gate is not None and gate.copying:
            gate()

    def _unbind(self) -> None:
        """Forgets what was bound to the layers as they were."""
        self._settle()
        self._network = None

    def _bind(self) -> Network:
        return Network(self.layers, self._dtype)

    def _ready_network(self) -> Network:
        if self._network is None:
            if self._output_shape is None or not self.layers:
                what = "has no layers" if not self.layers else "is not built: its input shape is unknown"
                fix = "Give its first layer input_shape=..., or call model.build((None, features))"
                raise ArgumentError("model", self, what, fix)
            self._network = self._bind()
        return self._network

    @property
    def weights(self) -> list[Weight]:
        """All weights, layer by layer. Their values are live; :meth:`get_weights` copies."""
        return [weight for layer in self.layers for weight in layer.weights]

    def get_weights(self) -> list[Array]:
        """Copies of all weights, layer by layer.

        Raises:
            ModelBusy: from another thread during a training.
        """
        self._check_free("get_weights")
        self._ready_network()
        return [weight.numpy() for weight in self.weights]

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Overwrites all weights.

        Args:
            weights: arrays in the order and shapes of :meth:`get_weights`.

        Raises:
            ArgumentError: for another number of arrays or other shapes; nothing is changed then.
            ModelBusy: from another thread during a training.
        """
        self._check_free("set_weights")
        network = self._ready_network()
        own, given = self.weights, [np.asarray(array) for array in weights]
        if len(own) != len(given):
            raise ArgumentError("weights", in_words(f"{len(given)} arrays"), f"the model has {len(own)}")
        for weight, array in zip(own, given, strict=True):
            if weight.shape != array.shape:
                shown = in_words(f"shape {array.shape}")
                raise ArgumentError("weights", shown, f"{weight.path} has shape {weight.shape}")
        self._settle()
        network.write(given)

    def _input(self, samples: Any) -> Array:
        x: Array = np.asarray(samples)
        if x.ndim == 1 and self._input_shape == (1,):
            x = x[:, None]
        if isinstance(self.layers[0], Embedding):
            return x if x.dtype.kind in "iu" else x.astype(np.intp)
        return x if x.dtype == self._dtype else x.astype(self._dtype)

    def summary(self, print_fn: Callable[[str], object] = print) -> None:
        """Prints layers, output shapes and numbers of parameters, one call of ``print_fn`` per line."""
        for line in summary_lines(self.name, self.layers, self._input_shape):
            print_fn(line)

    def get_config(self) -> dict[str, Any]:
        """The architecture as JSON, in the form of Keras 3; weights and compile are not part of it."""
        return config.model_to_config(self.name, self.layers, self._input_shape, self._dtype.name, self._seed)

    @classmethod
    def from_config(cls, model_config: Mapping[str, Any]) -> Self:
        """A new model from what :meth:`get_config` gave.

        Raises:
            ArgumentError: for unknown layers or settings.
        """
        parsed = config.model_from_config(model_config)
        model = cls(parsed.layers, parsed.name, parsed.seed, parsed.dtype)
        if parsed.input_shape is not None:
            model._build(parsed.input_shape)
        return model

    def _check_free(self, verb: str) -> None:
        owner = self.training_thread
        if owner is not None and owner != threading.get_ident():
            raise ModelBusy(
                f"model.{verb}: the model is in a training that is under way, its weights change right now. "
                "Take a copy: `snapshot = await run.snapshot()`, then `snapshot.to_model()`"
            )

    def __repr__(self) -> str:
        return f"<Sequential {self.name}: {len(self.layers)} layers>"


def _shapes_behind(layers: Sequence[Layer], shape: Shape) -> None:
    """Raises what a layer has against the shape of its samples, before anything is built."""
    for layer in layers:
        layer.weight_specs(shape)
        shape = layer.output_shape(shape)
