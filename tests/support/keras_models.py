"""Small Keras models, with every draw seeded, and the digits."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

# Whoever imports Keras first in a process decides; without a word of theirs it is this.
os.environ.setdefault("KERAS_BACKEND", "torch")

# Keras beside numpy 2 and the newest torch: what they say of each other is not ours.
CALM = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def digits(rows: int = 320) -> tuple[Any, Any]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.data[:rows] / 16).astype("float32"), np.eye(10, dtype="float32")[data.target[:rows]]


def classifier(
    metrics: Any = ("accuracy",), optimizer: Any = "adam", inputs: bool = True, seed: int = 1
) -> Any:
    """64 numbers to 10 classes; ``inputs`` False: it is built by its first data."""
    import keras

    drawn = [keras.initializers.GlorotUniform(seed + number) for number in range(2)]
    layers = keras.layers
    model = keras.Sequential(
        [
            *([keras.Input((64,))] if inputs else []),
            layers.Dense(16, activation="relu", kernel_initializer=drawn[0]),
            layers.BatchNormalization(),
            layers.Dropout(0.2, seed=seed),
            layers.Dense(10, activation="softmax", kernel_initializer=drawn[1]),
        ]
    )
    model.compile(optimizer, "categorical_crossentropy", metrics=list(metrics))
    return model


def numbers(model: Any) -> list[bytes]:
    """All that a training has changed in a model, to the last bit."""
    import keras

    variables = [*model.variables, *model.optimizer.variables]
    return [np.asarray(keras.ops.convert_to_numpy(variable.value)).tobytes() for variable in variables]
