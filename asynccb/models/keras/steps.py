"""One batch of a Keras model, and the surroundings that its thread needs: what is not Keras' public interface
stands here.

Keras' own loop keeps the state of a step apart from the model for a whole epoch (JAX), and its
``train_on_batch`` assigns every variable anew after each step. Here the values go out of the variables and
back into them directly, which costs less than a microsecond a variable: the model is whole between any two
batches, for whoever looks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from asynccb.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["JaxSteps", "Steps", "Surroundings", "steps_of"]

Variables = tuple[list[Any], ...]


def steps_of(model: Any) -> Steps:
    """What makes the steps of a model with the backend that Keras has in this process.

    Raises:
        ArgumentError: a backend that cannot train.
    """
    import keras

    backend = keras.backend.backend()
    kinds = {"jax": JaxSteps, "torch": TorchSteps, "tensorflow": Steps}
    if backend not in kinds:
        raise ArgumentError("model", model, f"Keras' backend {backend} cannot train; {', '.join(kinds)} can")
    return kinds[backend](model)


class Steps:
    """Calls the functions that ``fit`` calls, one batch at a time; as it stands for TensorFlow.

    The logs are values since :meth:`reset`, as Keras shows them: means, or whatever a metric makes of all
    that it has seen.

    Attributes:
        answers_early: whether a batch may still be computed when its logs are there, which no later batch
            changes.
    """

    answers_early = False

    def __init__(self, model: Any) -> None:
        self._model = model
        self._made: dict[str, Any] = {}  # the functions for which everything is built

    def reset(self) -> None:
        """The next batch is the first of a pass."""
        self._model.reset_metrics()
        self._made.clear()

    def train(self, data: tuple[Any, ...]) -> dict[str, Any]:
        self._ready("train", data)
        return dict(self._call("train", data))

    def test(self, data: tuple[Any, ...]) -> dict[str, Any]:
        self._ready("test", data)
        return dict(self._call("test", data))

    def predict(self, x: Any) -> Any:
        model = self._model
        if not all(layer.built for layer in model._flatten_layers()):
            model(x)
        self._ready("predict", None)
        return self._call("predict", (x,))

    def build(self, data: tuple[Any, ...]) -> None:
        """Makes the variables of model, loss, metrics and optimizer that are not there yet."""
        self._model._symbolic_build(data_batch=data)
        self.build_optimizer()

    def build_optimizer(self) -> None:
        """Makes the optimizer's slots, where the weights are there."""
        model = self._model
        optimizer = getattr(model, "optimizer", None)
        if model.built and optimizer is not None and not optimizer.built:
            optimizer.build(model.trainable_variables)

    def _ready(self, what: str, data: tuple[Any, ...] | None) -> None:
        """Makes the function, once for each pass and whenever ``compile`` has thrown it away."""
        model, name = self._model, f"{what}_function"
        function = getattr(model, name)
        if function is not None and self._made.get(what) is function:
            return
        if data is not None:
            self.build(data)
        getattr(model, f"make_{name}")()
        self._made[what] = getattr(model, name)
        self._look(what)

    def _look(self, what: str) -> None:
        """The function for ``what`` was made, or a new pass begins."""

    def _call(self, what: str, data: tuple[Any, ...]) -> Any:
        return self._made[what](iter((data,)))


class JaxSteps(Steps):
    """The functions are pure: they take the values of the variables, whose memory they use again, and answer
    the new ones."""

    answers_early = True

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._variables: dict[str, Variables] = {}

    def _look(self, what: str) -> None:
        model = self._model
        found = [list(model.trainable_variables), list(model.non_trainable_variables)]
        if what == "train":
            found.append(list(model.optimizer.variables))
        if what != "predict":
            found.append(list(model.metrics_variables))
        self._variables[what] = tuple(found)

    def _call(self, what: str, data: tuple[Any, ...]) -> Any:
        groups = self._variables[what]
        state = tuple([variable._value for variable in group] for group in groups)
        answer, state = self._made[what](state, iter((data,)))
        for group, values in zip(groups, state, strict=True):
            for variable, value in zip(group, values, strict=True):
                variable._value = value
        return answer


class TorchSteps(Steps):
    """Torch updates the variables in place."""

    def _call(self, what: str, data: tuple[Any, ...]) -> Any:
        model, trains = self._model, what == "train"
        if model.training is not trains:
            model.train(trains)
        return self._made[what]([_map_arrays(_writable, data)])


class Surroundings:
    """What Keras and its backend keep for each thread, as it is where this is made: dtype policy,
    distribution, the device of JAX. A training has it on its own thread as on its caller's."""

    def __init__(self) -> None:
        import keras

        self._policy = keras.config.dtype_policy()
        self._distribution = keras.distribution.distribution()
        self._jax = keras.backend.backend() == "jax"
        self._device: Any = None
        if self._jax:
            import jax

            self._device = jax.config.jax_default_device

    def enter(self) -> None:
        """On the thread that calls, until another one is entered there."""
        import keras

        keras.config.set_dtype_policy(self._policy)
        keras.distribution.set_distribution(self._distribution)
        if self._jax:
            import jax

            if jax.config.jax_default_device != self._device:
                # Left by the end of the thread: there is no other way to set it for one thread.
                jax.default_device(self._device).__enter__()


def floats_as(dtype: str, data: Any) -> Any:
    """Arrays of other floats in the dtype that Keras computes in, as its own ``fit`` hands them over."""

    def convert(array: Any) -> Any:
        if isinstance(array, np.ndarray) and array.dtype.kind == "f" and array.dtype.name != dtype:
            return array.astype(dtype)
        return array

    return _map_arrays(convert, data)


def _writable(array: Any) -> Any:
    """Torch warns of what it may not write to, though it only reads."""
    return array.copy() if isinstance(array, np.ndarray) and not array.flags.writeable else array


def _map_arrays(function: Any, data: Any) -> Any:
    if isinstance(data, dict):
        return {name: _map_arrays(function, part) for name, part in data.items()}
    if isinstance(data, (list, tuple)):
        parts: Sequence[Any] = [_map_arrays(function, part) for part in data]
        return parts if isinstance(data, list) else tuple(parts)
    return function(data)
