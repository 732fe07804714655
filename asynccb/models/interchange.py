"""What Keras 3 writes of a model and of its compile, in our words.

Keras says more in a config than a model here can do. What would change the numbers and is not known here is
refused; what says nothing about a trained model (initializers, names of policies, its build) is left out.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from asynccb.errors import ArgumentError
from asynccb.models import config, initializers, losses, metrics, optimizers
from asynccb.models.layers import CLASSES
from asynccb.models.names import lookup, snake_case

if TYPE_CHECKING:
    from collections.abc import Mapping

OURS = "asynccb"
"""The key that a config of our own writing has, and no other."""

_WEIGHTS_ALONE = "Sequential.load_weights(path) reads its weights into a model that you build yourself"

# What a layer of Keras says beside our settings, and the only value of it that changes nothing here.
_NEUTRAL: dict[str, Any] = {
    "activity_regularizer": None,
    "axis": -1,
    "beta_constraint": None,
    "beta_regularizer": None,
    "bias_constraint": None,
    "bias_regularizer": None,
    "data_format": "channels_last",
    "embeddings_constraint": None,
    "embeddings_regularizer": None,
    "gamma_constraint": None,
    "gamma_regularizer": None,
    "kernel_constraint": None,
    "kernel_regularizer": None,
    "lora_alpha": None,
    "lora_rank": None,
    "mask_zero": False,
    "noise_shape": None,
    "quantization_config": None,
    "renorm": False,
    "synchronized": False,
}
_SILENT = {
    "beta_initializer",
    "dtype",
    "gamma_initializer",
    "moving_mean_initializer",
    "moving_variance_initializer",
    "renorm_clipping",
    "renorm_momentum",
    "trainable",  # of layers that have nothing to train
}


def model_config(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a ``Sequential`` as :func:`asynccb.models.config.model_from_config` reads it.

    Args:
        theirs: what ``keras.Model.get_config`` and the files have: ``{"class_name": "Sequential", ...}``.

    Raises:
        ArgumentError: for another kind of model, and for layers or settings that do not exist here.
    """
    if theirs.get("class_name") != "Sequential":
        raise ArgumentError("model_config", theirs.get("class_name"), "must be a Sequential", _WEIGHTS_ALONE)
    inner = theirs["config"]
    shape = inner.get("build_input_shape") or (theirs.get("build_config") or {}).get("input_shape")
    layers, dtypes = [], set()
    for entry in inner["layers"]:
        if entry["class_name"] == "InputLayer":
            shape = entry["config"].get("batch_shape") or shape
        else:
            layers.append(_layer(entry))
            dtypes.add(_dtype(entry["config"].get("dtype")))
    if len(dtypes) > 1:
        raise ArgumentError("dtype", sorted(dtypes), "must be the same in all layers", _WEIGHTS_ALONE)
    if shape is not None:
        layers.insert(0, {"class_name": "InputLayer", "config": {"batch_shape": list(shape)}})
    dtype = dtypes.pop() if dtypes else "float32"
    return {
        OURS: {"dtype": dtype, "seed": None},
        "class_name": "Sequential",
        "config": {"layers": layers, "name": inner.get("name")},
    }


def training_config(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """How a model was compiled, as :func:`asynccb.models.config.compiled_from` reads it.

    Raises:
        ArgumentError: it was compiled with something that does not exist here.
    """
    optimizer = theirs.get("optimizer_config") or theirs.get("optimizer")
    if not isinstance(optimizer, dict):
        raise ArgumentError("optimizer", optimizer, "must be a class and its config")
    _check_theirs("optimizer", optimizer)
    compiled = config.Compiled(optimizer, _loss(theirs.get("loss")), tuple(_metrics(theirs)))
    for name in ("loss_weights", "weighted_metrics"):
        if theirs.get(name):
            raise ArgumentError(name, theirs[name], "is not known here")
    try:
        made = optimizers.from_config(optimizer)
    except TypeError as error:  # a schedule in place of a learning rate, say
        raise ArgumentError("optimizer", optimizer, f"is not known here: {error}") from None
    return compiled.training_config(made.learning_rate)


def _layer(entry: Mapping[str, Any]) -> dict[str, Any]:
    _check_theirs("layer", entry)
    kind = lookup("layer", entry.get("class_name"), CLASSES)
    known = inspect.signature(kind).parameters
    settings: dict[str, Any] = {}
    for key, value in entry["config"].items():
        if key in known:
            settings[key] = _initializer(value) if key.endswith("_initializer") else _name(key, value)
        elif key in _NEUTRAL and value != _NEUTRAL[key]:
            allowed = f"{kind.__name__} knows only {_NEUTRAL[key]!r}"
            raise ArgumentError(key, value, allowed, _WEIGHTS_ALONE)
        elif key not in _NEUTRAL and key not in _SILENT and value is not None:
            raise ArgumentError(key, value, f"is no setting of {kind.__name__}", _WEIGHTS_ALONE)
    return {
        "class_name": kind.__name__,
        "config": {key: value for key, value in settings.items() if value is not None},
    }


def _check_theirs(kind: str, entry: Mapping[str, Any]) -> None:
    """A class of the user's own may be called like one of Keras', which are of its modules and mostly without
    a name in the registry."""
    if entry.get("registered_name") is not None and not str(entry.get("module")).startswith("keras."):
        raise ArgumentError(kind, entry["registered_name"], "must be one of Keras' own", _WEIGHTS_ALONE)


def _name(key: str, value: Any) -> Any:
    """A function by its name where it is one of Keras' own; numbers and flags as they are."""
    if not isinstance(value, dict):
        return value
    if value.get("registered_name") in (None, value.get("class_name")) and not value.get("config"):
        return snake_case(str(value.get("class_name")))
    if value.get("class_name") == "function" and isinstance(value.get("config"), str):
        return value["config"]
    raise ArgumentError(key, value, "must be known by its name", _WEIGHTS_ALONE)


def _initializer(value: Any) -> str | None:
    """The name of the nearest one here; it is used no more, as the weights are there."""
    name = value if isinstance(value, str) else snake_case(str((value or {}).get("class_name")))
    try:
        initializers.get(name)
    except ArgumentError:
        return None
    return name


def _dtype(policy: Any) -> str:
    if isinstance(policy, dict):
        policy = (policy.get("config") or {}).get("name")
    name = "float32" if policy is None else str(policy)
    if name not in ("float32", "float64"):
        raise ArgumentError("dtype", name, 'must be "float32" or "float64"', _WEIGHTS_ALONE)
    return name


def _loss(theirs: Any) -> str:
    """The name of a loss that is given by its name, a function, or an object with Keras' own settings."""
    if isinstance(theirs, dict) and theirs.get("class_name") == "function":
        theirs = theirs.get("config")
    if isinstance(theirs, dict):
        _check_theirs("loss", theirs)
        settings = dict(theirs.get("config") or {})
        settings.pop("name", None)  # the user's to choose
        name = snake_case(str(theirs.get("class_name")))
        neutral = {"axis": -1, "dtype": "float32", "from_logits": False, "ignore_class": None}
        neutral |= {"label_smoothing": 0.0, "reduction": "sum_over_batch_size"}
        for key, value in settings.items():
            if key not in neutral or value != neutral[key]:
                raise ArgumentError("loss", f"{name} with {key}={value!r}", "is not known here")
        theirs = name
    losses.get(theirs)
    return str(theirs)


def _metrics(theirs: Mapping[str, Any]) -> list[str]:
    found = theirs.get("metrics") or []
    for name in found:
        if not isinstance(name, str):
            raise ArgumentError("metrics", name, "must be a metric by its name")
    metrics.check(found)
    return list(found)
