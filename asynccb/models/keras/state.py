"""A copy of a Keras model at one moment, its files, and what tells whether two models are alike."""

from __future__ import annotations

import os
import re
from types import FunctionType
from typing import TYPE_CHECKING, Any

import numpy as np

from asynccb.errors import ArgumentError, FileRefused
from asynccb.models.plain import PlainState, read_plain
from asynccb.storage.atomic import atomic_write
from asynccb.storage.hdf5 import hdf5_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from asynccb.models.arrays import Array

__all__ = ["Blueprint", "KerasState", "fingerprint", "restore"]

_FORMATS = (".weights.h5", ".keras")
_COUNTED = re.compile(r"(seed_generator)_\d+")


class Blueprint:
    """How to make a model like this one: its configuration without any number in it.

    Made on the thread that trains; used on any.

    Args:
        model: built and compiled.
    """

    def __init__(self, model: Any) -> None:
        import keras

        self._key = _parts(model)
        self.config: dict[str, Any] = {}
        self._error: Exception | None = None
        self._own = _own_objects(model)
        self._to_write: dict[bool, Any] = {}
        try:
            self.config = keras.saving.serialize_keras_object(model)
        except Exception as error:  # a copy is made all the same; only making a model of it needs this
            self._error = error

    def fits(self, model: Any) -> bool:
        """Whether the model was not compiled anew since."""
        return all(one is other for one, other in zip(self._key, _parts(model), strict=True))

    def to_write(self, *, compiled: bool) -> Any:
        """A model that is kept to be written, again and again; used on the thread of HDF5 alone.

        Raises:
            ArgumentError: as :meth:`make`.
        """
        if compiled not in self._to_write:
            self._to_write[compiled] = self.make(compiled=compiled)
        return self._to_write[compiled]

    def make(self, *, compiled: bool) -> Any:
        """A new model, compiled if this one was and ``compiled`` asks for it. Its numbers are no one's yet.

        Raises:
            ArgumentError: Keras cannot make one from this one's configuration.
        """
        import keras

        self.check()
        config = self.config if compiled else {**self.config, "compile_config": None}
        try:
            # What a lambda in it runs is the user's own code: this configuration was in no file.
            return keras.saving.deserialize_keras_object(config, custom_objects=self._own, safe_mode=False)
        except Exception as error:
            raise _cannot_make(error) from error

    def check(self) -> None:
        """Raises ArgumentError if it is known already that :meth:`make` would."""
        if self._error is not None:
            raise _cannot_make(self._error) from self._error


def _cannot_make(error: Exception) -> ArgumentError:
    return ArgumentError("model", error, "Keras must be able to make another model from its get_config()")


class KerasState(PlainState):
    """Weights, optimizer, metrics and seeds of a Keras model; satisfies ``ModelState``.

    Args:
        model: built and compiled.
        blueprint: of the model.
    """

    def __init__(self, model: Any, blueprint: Blueprint) -> None:
        variables = _variables(model)
        copies = {part: [_copy(variable) for variable in found] for part, found in variables.items()}
        super().__init__(type(model).__name__, copies)
        self._names = _names(model, variables)
        self._blueprint = blueprint

    @property
    def arrays(self) -> Mapping[str, Array]:
        """Read-only arrays: weights and seeds by layer and name, then ``optimizer/...``."""
        found = [*self._state["weights"], *self._state["optimizer"]]
        return dict(zip(self._names, found, strict=True))

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        weights_only: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes a file in Keras' own format, atomically; blocks until it is durable.

        Keras writes models, so a second one is made with the first file, and kept for the next ones: memory
        for weights and optimizer once more. Its formats leave out how far the seeds of layers (Dropout) have
        been drawn from.

        Args:
            path: ends in ``.keras`` or ``.weights.h5``.
            weights_only: leaves out the optimizer; not with ``.keras``.
            extra: plain data that goes beside the state into a file of this package's own, whatever its name:
                what a training is resumed from.

        Raises:
            ArgumentError: for another extension, or a model that Keras cannot make anew.
            CheckpointWriteError: it could not be written; the file that stood there before is untouched.
        """
        if extra is not None:
            super().save(path, extra=extra)
            return
        name = os.fspath(path)
        suffix = check_path(name, weights_only=weights_only)
        # Where all that touches HDF5 happens: its library has one lock, which its objects take when they die.
        model = hdf5_thread.call(lambda: self._blueprint.to_write(compiled=not weights_only))

        def write(temporary: str) -> None:
            self._fill(model)
            (model.save if suffix == ".keras" else model.save_weights)(temporary)

        atomic_write(name, lambda temporary: hdf5_thread.call(lambda: write(temporary)), suffix=suffix)

    def to_model(self) -> Any:
        """A new Keras model with this state, compiled as the old one was, with an optimizer of its own.

        Costs what Keras takes to make it (some milliseconds a layer); its functions are compiled anew when it
        is used.
        """
        model = self._blueprint.make(compiled=True)
        self._fill(model)
        return model

    def _fill(self, model: Any) -> None:
        if model.compiled and not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        for part in ("weights", "optimizer") if model.compiled else ("weights",):
            _assign(_variables(model)[part], self._state[part])


def check_path(path: str, *, weights_only: bool) -> str:
    """The ending of the path: the format to write.

    Raises:
        ArgumentError: for another ending.
    """
    suffix = next((suffix for suffix in _FORMATS if path.endswith(suffix)), None)
    if suffix is None or (weights_only and suffix == ".keras"):
        allowed = "a Keras model is written as name.weights.h5" + (
            ": only the weights are asked for" if weights_only else ", or whole as name.keras"
        )
        raise ArgumentError("path", path, allowed)
    return suffix


def fingerprint(model: Any, blueprint: Blueprint) -> dict[str, Any]:
    """What must be equal for equal results. The names that Keras counts up in a process make no difference,
    nor does the learning rate, which is part of the state."""
    if not blueprint.config:
        shapes = [[*variable.shape] for variable in _variables(model)["weights"]]
        return {"class": type(model).__qualname__, "shapes": shapes}
    known = {layer.name: f"layer {number}" for number, layer in enumerate(model._flatten_layers())}
    known |= {model.name: "model", model.optimizer.name: "optimizer"}
    config = {
        key: value
        for key, value in blueprint.config.items()
        if key in ("class_name", "config", "compile_config")
    }
    trainable = [variable.trainable for variable in _variables(model)["weights"]]
    return {"model": _without_names(config, known), "trainable": trainable}


def restore(model: Any, path: str, accept: Callable[[Mapping[str, Any]], object]) -> None:
    """Puts back all that :class:`KerasState` copies.

    Raises:
        FileRefused: the file is damaged or of another model; nothing is changed then.
    """
    state = read_plain(path, accept)
    variables = _variables(model)
    for part, found in variables.items():
        saved = state.get(part)
        if not isinstance(saved, list) or [np.shape(array) for array in saved] != [
            tuple(variable.shape) for variable in found
        ]:
            raise FileRefused(path, f"its {part} are not those of this model")
    for part, found in variables.items():
        _assign(found, state[part])


def _variables(model: Any) -> dict[str, list[Any]]:
    """All that changes while a model trains."""
    optimizer = getattr(model, "optimizer", None)
    slots = [] if optimizer is None else list(optimizer.variables)
    metrics = list(model.metrics_variables) if model.compiled else []
    return {"weights": list(model.variables), "optimizer": slots, "metrics": metrics}


def _copy(variable: Any) -> Array:
    import keras

    array = np.array(keras.ops.convert_to_numpy(variable.value))
    if array.dtype.kind not in "biuf":  # bfloat16 and narrower: float32 holds each of their numbers
        array = array.astype(np.float32)
    array.flags.writeable = False
    return array


def _assign(variables: Sequence[Any], arrays: Sequence[Array]) -> None:
    for variable, array in zip(variables, arrays, strict=True):
        variable.assign(np.array(array))  # torch would look at read-only memory, and warn


def _names(model: Any, variables: Mapping[str, list[Any]]) -> list[str]:
    """``dense/kernel`` for a weight, ``optimizer/dense/kernel/momentum`` for its slot; without what depends
    on when and where Keras made the variable."""
    weights = _distinct(_weight_name(variable.path, model.name) for variable in variables["weights"])
    stems = {name.replace("/", "_") + "_": name for name in weights}
    slots = (
        _slot_name(variable.path.rpartition("/")[2].removeprefix(f"{model.name}_"), stems)
        for variable in variables["optimizer"]
    )
    return [*weights, *(f"optimizer/{name}" for name in _distinct(slots))]


def _weight_name(path: str, model_name: str) -> str:
    return _COUNTED.sub(r"\1", path.removeprefix(f"{model_name}/"))


def _slot_name(name: str, stems: Mapping[str, str]) -> str:
    found = max((stem for stem in stems if name.startswith(stem)), key=len, default="")
    return f"{stems[found]}/{name.removeprefix(found)}" if found else name


def _distinct(names: Any) -> list[str]:
    counts: dict[str, int] = {}
    found = []
    for name in names:
        counts[name] = count = counts.get(name, 0) + 1
        found.append(name if count == 1 else f"{name}_{count}")
    return found


def _without_names(tree: Any, known: Mapping[str, str]) -> Any:
    if isinstance(tree, dict):
        return {
            known.get(key, key): _without_names(value, known)
            for key, value in tree.items()
            if key not in ("learning_rate", "build_config", "shared_object_id")
            or (key == "learning_rate" and isinstance(value, dict))
        }
    if isinstance(tree, (list, tuple)):
        return [_without_names(value, known) for value in tree]
    return known.get(tree, tree) if isinstance(tree, str) else tree


def _own_objects(model: Any) -> dict[str, Any]:
    """The functions and classes of the user's that a configuration tells by name: layers, and what they and
    ``compile`` were given. Keras finds those alone that are registered, or can be imported."""
    import keras

    layers = list(model._flatten_layers())
    given = [*layers, *(value for layer in layers for value in vars(layer).values())]
    if model.compiled:
        given += keras.tree.flatten(dict(model._compile_config.config))
    things = [it if isinstance(it, FunctionType) else type(it) for it in given]
    return {
        thing.__name__: thing
        for thing in things
        if isinstance(thing, FunctionType) or (hasattr(thing, "get_config") and not _is_keras(thing))
    }


def _is_keras(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "keras"


def _parts(model: Any) -> tuple[Any, ...]:
    return tuple(getattr(model, name, None) for name in ("optimizer", "_compile_loss", "_compile_metrics"))
