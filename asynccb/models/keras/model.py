"""A Keras 3 model, driven as it is: compiled by its user, trained on a thread.

Loss, metrics and optimizer are the model's own, and the functions that compute a batch are those of Keras'
``fit``: with the same data in the same order the weights after a training are equal to the last bit. The logs
of a batch are Keras' too: values since the epoch began. Their last ones are the epoch's.

The backends JAX and torch are tried; TensorFlow is not, nor is a distribution over several devices.

Several models in several threads give, each, what it gives alone if every initializer and Dropout has a seed.
``keras.utils.set_random_seed`` and ``keras.utils.clear_session`` change what all threads share: not while a
training is under way. Nor may anybody else use the model meanwhile, be it to predict: with JAX the training
ends in an error then. Inline hooks may, and ``(await run.snapshot()).to_model()`` is one for everybody else.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from asynccb.errors import ArgumentError, in_words
from asynccb.models.keras.state import Blueprint, KerasState, check_path, fingerprint, restore
from asynccb.models.keras.steps import Surroundings, floats_as, steps_of
from asynccb.protocols import Unread

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from asynccb.protocols import Batch, Gate, ModelState

__all__ = ["KerasModel", "adapt"]


def adapt(model: Any) -> KerasModel:
    """The ``Model`` around a Keras model.

    Raises:
        ArgumentError: an object of Keras that is no model.
    """
    import keras

    if not isinstance(model, keras.Model):
        raise ArgumentError("model", model, "of Keras' objects a keras.Model trains")
    return KerasModel(model)


class KerasModel:
    """The ``Model`` around a Keras model.

    Attributes:
        user_model: the Keras model.
    """

    def __init__(self, model: Any) -> None:
        self.user_model = model
        self._steps = steps_of(model)
        self._surroundings = Surroundings()
        self._thread: int | None = None
        self._blueprint: Blueprint | None = None
        self._float = ""

    @property
    def metrics_names(self) -> Sequence[str]:
        """Keras' names, the loss first; empty before the model is built, and for a ``train_step`` of the
        user's own."""
        model = self.user_model
        if not model.built or not type(model).train_step.__module__.startswith("keras."):
            return ()
        if model._compile_metrics is not None and not model._compile_metrics.built:
            return ()
        return _loss_first(model.get_metrics_result())

    @property
    def also_trains(self) -> list[Any]:
        """The optimizer and the layers that have weights or will: another model may have them too."""
        model = self.user_model
        layers = list(model._flatten_layers(include_self=False))
        found = [layer for layer in layers if not layer.built or layer.variables]
        optimizer = getattr(model, "optimizer", None)
        return found if optimizer is None else [*found, optimizer]

    def check_ready(self, *, training: bool) -> None:
        """Refuses a model that is not compiled.

        Called by who starts a training: the thread that computes will have this one's dtype policy.
        """
        if not self.user_model.compiled:
            raise ArgumentError(
                "model",
                self.user_model,
                "must be compiled to train and to evaluate",
                "Call model.compile(optimizer, loss) first",
            )
        self._surroundings = Surroundings()
        self._thread = None

    def check_data(
        self, x: Any, y: Any, sample_weight: Any, *, name: str = "x", training: bool = True
    ) -> None:
        """Refuses samples of another shape than the model's inputs; builds what is not built yet.

        Raises:
            ArgumentError: shapes or dtypes that can never fit.
            ValueError: Keras' own, for targets that the loss does not take.
        """
        self._enter()
        _check_inputs(self.user_model, x, name)
        if training and self.user_model.compiled:
            rows = [_first_row(part) for part in (x, y, sample_weight)]
            try:
                self._steps.build(self._data(*rows))
            except (AttributeError, TypeError, ValueError) as error:
                if y is not None or self.user_model.loss is None:
                    raise
                fix = "Write fit(x, y), or give batches of (x, y)"
                raise ArgumentError(_targets(name), None, "the model's loss needs targets", fix) from error

    def direction(self, metric: str) -> str | None:
        """As the metric itself says."""
        if metric in ("loss", "val_loss"):
            return "min"
        told = {"up": "max", "down": "min"}
        for found in self.user_model.metrics:
            for each in (found, *(getattr(found, "metrics", None) or ())):
                if each.name == metric.removeprefix("val_"):
                    return told.get(getattr(each, "_direction", None) or "")
        return None

    def begin_pass(self) -> None:
        """The next batch is the first of an epoch or an evaluation: from here on its values count."""
        self._enter()
        self._steps.reset()

    def end_training(self) -> None:
        """Where the optimizer keeps averages of the weights (``use_ema``), they take the weights' place."""
        model = self.user_model
        if getattr(model.optimizer, "use_ema", False):
            model.optimizer.finalize_variable_values(model.trainable_weights)

    def train_batch(self, batch: Batch, before_update: Gate | None = None) -> Mapping[str, Any]:
        """One update. The logs are values since :meth:`begin_pass`."""
        if before_update is not None:
            before_update()
        self._enter()
        return self._logs(self._steps.train(self._data(batch.x, batch.y, batch.sample_weight)))

    def test_batch(self, batch: Batch) -> Mapping[str, Any]:
        """Loss and metrics without an update; values since :meth:`begin_pass`."""
        self._enter()
        return self._logs(self._steps.test(self._data(batch.x, batch.y, batch.sample_weight)))

    def predict_batch(self, batch: Batch) -> Any:
        """The outputs as a numpy array, or the arrays of several outputs in Keras' structure."""
        import keras

        self._enter()
        outputs = self._steps.predict(floats_as(self._float, batch.x))
        return keras.tree.map_structure(_copied, outputs)

    def capture(self) -> ModelState:
        """A copy of weights, seeds, optimizer and metrics.

        Raises:
            ArgumentError: the model is not built: it has no weights yet.
        """
        self._steps.build_optimizer()
        return KerasState(self.user_model, self._plan())

    def check_path(self, path: str, *, weights_only: bool) -> None:
        """Refuses what cannot be written: another ending, a model that Keras cannot make anew."""
        check_path(path, weights_only=weights_only)
        if self.user_model.built:
            self._plan().check()

    def fingerprint(self) -> dict[str, Any]:
        """Architecture, loss, metrics and optimizer, without the learning rate and without names."""
        self._steps.build_optimizer()
        return fingerprint(self.user_model, self._plan())

    def restore(self, path: str, accept: Callable[[Mapping[str, Any]], object]) -> None:
        """Overwrites all that :meth:`capture` copies; see :class:`asynccb.protocols.Resumes`."""
        self._steps.build_optimizer()
        restore(self.user_model, path, accept)

    def _plan(self) -> Blueprint:
        model = self.user_model
        if not model.built:
            fix = "Begin the model with keras.Input(shape), or call model.build(shape)"
            raise ArgumentError("model", model, "must be built before it can be copied or resumed", fix)
        if self._blueprint is None or not self._blueprint.fits(model):
            self._blueprint = Blueprint(model)
        return self._blueprint

    def _enter(self) -> None:
        """What Keras keeps for each thread, here as at the caller's."""
        here = threading.get_ident()
        if self._thread != here:
            import keras

            self._surroundings.enter()
            self._float = keras.config.floatx()
            self._thread = here

    def _logs(self, logs: Mapping[str, Any]) -> Mapping[str, Any]:
        if not self._steps.answers_early:
            return _numbers(logs)
        return Unread({name: logs[name] for name in _loss_first(logs)}, _numbers)

    def _data(self, x: Any, y: Any, sample_weight: Any) -> tuple[Any, ...]:
        parts = (x,) if y is None else (x, y) if sample_weight is None else (x, y, sample_weight)
        converted: tuple[Any, ...] = floats_as(self._float, parts)
        return converted


def _check_inputs(model: Any, x: Any, name: str) -> None:
    """As far as a model tells its inputs; one that does not is checked by Keras with the first batch."""
    arrays = list(x.values()) if isinstance(x, dict) else list(x) if isinstance(x, (list, tuple)) else [x]
    for array in arrays:
        if getattr(getattr(array, "dtype", None), "kind", "") == "O":
            fix = "Convert it first: np.asarray(values, dtype=np.float32)"
            raise ArgumentError(name, in_words("an array of dtype object"), "must hold numbers", fix)
    inputs = getattr(model, "inputs", None) if model.built else None
    if not inputs or isinstance(x, dict):
        return
    if len(arrays) != len(inputs):
        raise ArgumentError(name, in_words(f"{len(arrays)} arrays"), f"the model has {len(inputs)} inputs")
    for array, wanted in zip(arrays, inputs, strict=True):
        given, shape = tuple(array.shape[1:]), tuple(wanted.shape[1:])
        # One axis more or less is Keras' to add or to drop.
        if len(given) == len(shape) and any(n not in (None, m) for n, m in zip(shape, given, strict=True)):
            raise ArgumentError(
                name, in_words(f"shape {array.shape}"), f"the model takes samples of shape {shape}"
            )


def _targets(name: str) -> str:
    return "y" if name == "x" else f"y of {name}"


def _first_row(part: Any) -> Any:
    if isinstance(part, dict):
        return {key: _first_row(value) for key, value in part.items()}
    if isinstance(part, (list, tuple)):
        rows = [_first_row(value) for value in part]
        return rows if isinstance(part, list) else tuple(rows)
    return None if part is None else part[:1]


def _numbers(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the backend as Python numbers, in our order; waits for the batch to be computed."""
    return {name: _number(logs[name]) for name in _loss_first(logs)}


def _number(value: Any) -> Any:
    if isinstance(value, (int, float)):
        return value
    array = _copied(value)
    return array.item() if array.ndim == 0 else array


def _copied(value: Any) -> Any:
    import keras

    return np.array(keras.ops.convert_to_numpy(value))


def _loss_first(names: Any) -> list[str]:
    return sorted(names, key=lambda name: name != "loss")
