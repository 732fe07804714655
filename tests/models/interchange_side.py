"""Each layer's way between our files and Keras', both ways. ``test_interchange_with_keras`` runs it.

Usage: ``KERAS_BACKEND=jax python interchange_side.py FOLDER``. The folder is scratch. Prints a table of
the largest differences between predictions, and one line of JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import keras
import numpy as np

from asynccb import models
from asynccb.protocols import Batch

ROWS = 48
RNG = np.random.default_rng(0)
NUMBERS = RNG.standard_normal((ROWS, 5)).astype(np.float32)
SQUARES = RNG.standard_normal((ROWS, 2, 3)).astype(np.float32)
WORDS = RNG.integers(0, 7, (ROWS, 4))
LABELS = np.eye(3, dtype=np.float32)[np.arange(ROWS) % 3]
ACTIVATIONS = (
    "elu", "gelu", "hard_sigmoid", "hard_silu", "leaky_relu", "relu", "relu6", "selu", "sigmoid", "silu",
    "softmax", "softplus", "softsign", "tanh",
)  # fmt: skip


def stacks() -> dict[str, tuple[list[tuple[str, dict]], np.ndarray]]:
    """By the layer that it is about: class names and settings that both have, and what goes in."""
    last = ("Dense", {"units": 3, "activation": "softmax"})
    relu = ("Dense", {"units": 8, "activation": "relu"})
    found = {
        "Dense": ([relu, last], NUMBERS),
        "Dense, no bias": ([("Dense", {"units": 8, "use_bias": False}), last], NUMBERS),
        "Dense, frozen": ([("Dense", {"units": 8, "trainable": False}), last], NUMBERS),
        "BatchNormalization": (
            [("Dense", {"units": 8, "activation": "relu"}), ("BatchNormalization", {}), last],
            NUMBERS,
        ),
        "BatchNormalization, bare": (
            [("BatchNormalization", {"center": False, "scale": False, "momentum": 0.9}), last],
            NUMBERS,
        ),
        "Dropout": ([("Dense", {"units": 8}), ("Dropout", {"rate": 0.3, "seed": 1}), last], NUMBERS),
        "Flatten": ([("Flatten", {}), last], SQUARES),
        "Embedding": ([("Embedding", {"input_dim": 7, "output_dim": 3}), ("Flatten", {}), last], WORDS),
    }
    for name in ACTIVATIONS:
        found[f"Activation, {name}"] = (
            [("Dense", {"units": 8}), ("Activation", {"activation": name}), last],
            NUMBERS,
        )
    return found


def ours(layers, x):
    made = [getattr(models, kind)(**settings) for kind, settings in layers]
    model = models.Sequential(made, seed=3)
    model.build((None, *x.shape[1:]))
    model.compile("adam", "categorical_crossentropy", ["accuracy"])
    for _ in range(3):
        model.train_batch(Batch(x, LABELS, None, ROWS))
    return model


def theirs(layers, x, optimizer="adam"):
    made = [getattr(keras.layers, kind)(**settings) for kind, settings in layers]
    model = keras.Sequential([keras.Input(x.shape[1:], dtype=x.dtype.name), *made])
    model.compile(optimizer, "categorical_crossentropy", metrics=["accuracy"])
    for _ in range(3):
        model.train_on_batch(x, LABELS)
    return model


def distance(one, other) -> float:
    return float(np.abs(np.asarray(one) - np.asarray(other)).max())


def of_layer(folder: Path, layers, x) -> dict[str, float]:
    found = {}
    mine = ours(layers, x)
    told = mine.predict(x)
    for name in ("o.h5", "o.weights.h5"):
        mine.save(folder / name)
        loaded = keras.models.load_model(folder / name)
        found[f"ours, load_model {name[1:]}"] = distance(loaded.predict(x, verbose=0), told)
    loaded.set_weights([0 * weight for weight in loaded.get_weights()])
    loaded.load_weights(folder / "o.weights.h5")
    found["ours, load_weights"] = distance(loaded.predict(x, verbose=0), told)

    other = theirs(layers, x)
    told = other.predict(x, verbose=0)
    for name in ("k.keras", "k.h5"):
        other.save(folder / name)
        read = models.load_model(folder / name)
        found[f"Keras', load_model {name[1:]}"] = distance(read.predict(x), told)
    other.save_weights(folder / "k.weights.h5")
    for name in ("k.weights.h5", "k.keras", "k.h5"):
        read.set_weights([0 * weight for weight in read.get_weights()])
        read.load_weights(folder / name)
        found[f"Keras', load_weights {name[1:]}"] = distance(read.predict(x), told)
    return found


OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.01),
    "momentum": lambda: keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True),
    "rmsprop": lambda: keras.optimizers.RMSprop(momentum=0.5, centered=True),
    "adagrad": lambda: keras.optimizers.Adagrad(),
    "adam": lambda: keras.optimizers.Adam(),
    "adamw": lambda: keras.optimizers.AdamW(weight_decay=0.01),
}


def trained_on(folder: Path, name: str) -> dict[str, float]:
    """A training that Keras began goes on here: the largest distance of a weight from Keras' own going on."""
    found = {}
    layers, x = stacks()["BatchNormalization"]
    for file in ("k.keras", "k.h5"):
        other = theirs(layers, x, OPTIMIZERS[name]())
        other.save(folder / file)
        read = models.load_model(folder / file)
        found[f"{name} {file[1:]}: iterations"] = abs(float(read.optimizer.iterations) - 3)
        for _ in range(10):
            other.train_on_batch(x, LABELS)
            read.train_batch(Batch(x, LABELS, None, ROWS))
        pairs = zip(read.get_weights(), other.get_weights(), strict=True)
        found[f"{name} {file[1:]}: weights"] = max(distance(one, two) for one, two in pairs)
    return found


def fresh(folder: Path) -> dict[str, float]:
    """What was compiled and never trained, and what was never compiled."""
    found = {}
    layers, x = stacks()["Dense"]
    made = [getattr(keras.layers, kind)(**settings) for kind, settings in layers]
    model = keras.Sequential([keras.Input(x.shape[1:]), *made])
    for how in ("uncompiled", "compiled"):
        for file in ("f.keras", "f.h5"):
            model.save(folder / file)
            read = models.load_model(folder / file)
            found[f"{how} {file}"] = distance(read.predict(x), model.predict(x, verbose=0))
            found[f"{how} {file}: compiled"] = float((read.optimizer is None) != (how == "uncompiled"))
        model.compile("adam", keras.losses.CategoricalCrossentropy(), metrics=["accuracy"])
    deferred = keras.Sequential([keras.layers.Dense(4)])
    deferred.build((None, 5))
    deferred.save(folder / "d.keras")
    found["built late"] = distance(
        models.load_model(folder / "d.keras").predict(x), deferred.predict(x, verbose=0)
    )
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    table = {name: of_layer(folder, layers, x) for name, (layers, x) in stacks().items()}
    directions = list(next(iter(table.values())))
    for direction in directions:
        print(f"{direction:<32}", *(f"{row[direction]:8.1e}" for row in table.values()))
    print("columns:", *table, sep="\n  ")
    going_on = {what: value for name in OPTIMIZERS for what, value in trained_on(folder, name).items()}
    print("\n" + json.dumps({"layers": table, "optimizers": going_on, "fresh": fresh(folder)}))


if __name__ == "__main__":
    main()
