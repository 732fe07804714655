"""A model's config: JSON in the form of Keras 3, and the way back. No code is ever loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from asynccb.errors import ArgumentError
from asynccb.models import optimizers
from asynccb.models.layers import CLASSES
from asynccb.models.names import lookup

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from asynccb.models.layers import Layer
    from asynccb.models.updates import Optimizer


_MOST_LAYERS = 10_000  # in a config; a few bytes there are a whole layer in memory


class Compiled(NamedTuple):
    """How a model was compiled, as JSON."""

    optimizer: dict[str, Any]
    loss: str
    metrics: tuple[str, ...]

    def training_config(self, learning_rate: float | str) -> dict[str, Any]:
        """The ``training_config`` of a file; ``learning_rate`` takes the place of the one at compile time."""
        optimizer = dict(self.optimizer)
        optimizer["config"] = {**optimizer["config"], "learning_rate": learning_rate}
        return {
            "loss": self.loss,
            "loss_weights": None,
            "metrics": list(self.metrics) or None,
            "optimizer_config": optimizer,
            "weighted_metrics": None,
        }


def compiled_from(training_config: Mapping[str, Any]) -> Compiled:
    """Reads ``training_config`` back.

    Raises:
        ArgumentError: where it is not what this package, or Keras 3 for the same features, writes.
    """
    loss, metrics = training_config.get("loss"), training_config.get("metrics") or []
    optimizer = training_config.get("optimizer_config")
    if not isinstance(loss, str) or not isinstance(metrics, list) or not isinstance(optimizer, dict):
        raise ArgumentError(
            "training_config", training_config, "needs a loss, metrics and an optimizer by name"
        )
    return Compiled(optimizer, loss, tuple(str(metric) for metric in metrics))


def compiled_of(optimizer: Optimizer, loss: str, metrics: Sequence[str]) -> Compiled:
    """The record of a compile."""
    return Compiled(optimizers.to_config(optimizer), loss, tuple(metrics))


def layer_to_config(layer: Layer, dtype: str) -> dict[str, Any]:
    """One entry of ``layers``."""
    settings = {"name": layer.name, **layer.settings()}
    if dtype != "float32":
        settings["dtype"] = dtype
    return {"class_name": type(layer).__name__, "config": settings}


def model_to_config(
    name: str, layers: Sequence[Layer], input_shape: tuple[int, ...] | None, dtype: str, seed: int | None
) -> dict[str, Any]:
    """The ``model_config`` of a file; what is ours alone is under ``asynccb``, which other readers ignore."""
    entries = [layer_to_config(layer, dtype) for layer in layers]
    if input_shape is not None:
        batch_shape = {"batch_shape": [None, *input_shape]}
        entries.insert(0, {"class_name": "InputLayer", "config": batch_shape})
    return {
        "asynccb": {"dtype": dtype, "seed": seed},
        "class_name": "Sequential",
        "config": {"layers": entries, "name": name},
    }


class Parsed(NamedTuple):
    """A config read back: new layers, not built."""

    name: str
    layers: list[Layer]
    input_shape: tuple[int, ...] | None
    dtype: str
    seed: int | None


def model_from_config(config: Mapping[str, Any]) -> Parsed:
    """Reads a ``model_config`` back.

    Raises:
        ArgumentError: for anything but a Sequential of known layers with known settings.
    """
    if config.get("class_name") != "Sequential" or not isinstance(config.get("config"), dict):
        raise ArgumentError("config", config, 'must be {"class_name": "Sequential", "config": {...}}')
    inner, ours = config["config"], config.get("asynccb")
    ours = ours if isinstance(ours, dict) else {}
    if len(inner.get("layers", ())) > _MOST_LAYERS:
        raise ArgumentError("layers", len(inner["layers"]), f"must be {_MOST_LAYERS} at most")
    input_shape, layers = None, []
    for entry in inner.get("layers", ()):
        if entry.get("class_name") == "InputLayer":
            input_shape = tuple(entry["config"]["batch_shape"][1:])
        else:
            layers.append(_layer(entry))
    seed, dtype = ours.get("seed"), ours.get("dtype", "float32")
    if dtype not in ("float32", "float64"):  # numpy parses, and even compiles, what it is given as a type
        raise ArgumentError("dtype", dtype, 'must be "float32" or "float64"')
    return Parsed(str(inner.get("name")), layers, input_shape, dtype, seed)


def _layer(entry: Mapping[str, Any]) -> Layer:
    kind = lookup("config", entry.get("class_name"), CLASSES)
    settings = {key: value for key, value in dict(entry.get("config") or {}).items() if key != "dtype"}
    try:
        return kind(**settings)
    except TypeError as error:
        raise ArgumentError("config", dict(entry), f"is not a {kind.__name__}: {error}") from None
