"""What Keras says, in a process of its own: prints one JSON object. ``test_keras_agreement`` runs it.

Usage: ``KERAS_BACKEND=jax python keras_side.py FOLDER``. The folder is scratch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import keras
import numpy as np

from asynccb import models
from asynccb.protocols import Batch

ROWS, STEPS = 48, 25


def data(loss: str, outputs: int = 3):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((ROWS, 5)).astype(np.float32)
    labels = x[:, :outputs].argmax(axis=1)
    if loss.startswith("sparse"):
        return x, labels
    if loss in ("mse", "mae"):
        return x, rng.standard_normal((ROWS, outputs)).astype(np.float32)
    return x, np.eye(outputs, dtype=np.float32)[labels]


def distance(ours, theirs) -> float:
    return max(float(np.abs(one - other).max()) for one, other in zip(ours, theirs, strict=True))


def stack(last: str, hidden: str = "relu", normalized: bool = True):
    middle = [models.BatchNormalization(), models.Dropout(0.0)] if normalized else []
    ends = [models.Dense(3), models.Activation(last)]
    return [models.Dense(8, activation=hidden, input_dim=5, name="first"), *middle, *ends]


def twins(optimizer: models.SGD, loss: str, layers, metrics=()):
    ours = models.Sequential(layers, seed=3)
    ours.compile(optimizer, loss, list(metrics))
    theirs = keras.Sequential.from_config(ours.get_config()["config"])
    kind = getattr(keras.optimizers, type(optimizer).__name__)
    theirs.compile(kind(**optimizer.get_config()), loss, metrics=list(metrics))
    theirs.set_weights(ours.get_weights())
    return ours, theirs


def steps(
    optimizer, loss="categorical_crossentropy", last="softmax", hidden="relu", weighted=False, normalized=True
) -> float:
    """The largest distance of any weight after any of the steps."""
    ours, theirs = twins(optimizer, loss, stack(last, hidden, normalized))
    x, y = data(loss)
    weight = np.linspace(0, 2, ROWS).astype(np.float32) if weighted else None
    worst = 0.0
    for _ in range(STEPS):
        ours.train_batch(Batch(x, y, weight, ROWS))
        theirs.train_on_batch(x, y, sample_weight=weight)
        worst = max(worst, distance(ours.get_weights(), theirs.get_weights()))
    return worst


OPTIMIZERS = {
    "sgd": lambda: models.SGD(),
    "momentum": lambda: models.SGD(0.01, momentum=0.9),
    "nesterov": lambda: models.SGD(0.01, momentum=0.9, nesterov=True),
    "rmsprop": lambda: models.RMSprop(),
    "rmsprop centered": lambda: models.RMSprop(momentum=0.5, centered=True),
    "adagrad": lambda: models.Adagrad(),
    "adam": lambda: models.Adam(),
    "adamw": lambda: models.AdamW(),
}
LOSSES = [
    ("categorical_crossentropy", "softmax"),
    ("sparse_categorical_crossentropy", "softmax"),
    ("binary_crossentropy", "sigmoid"),
    ("mse", "linear"),
    ("mae", "linear"),
    ("mse", "sigmoid"),
    ("categorical_crossentropy", "sigmoid"),
]
HIDDEN = [
    "relu6",
    "leaky_relu",
    "sigmoid",
    "hard_sigmoid",
    "tanh",
    "softplus",
    "softsign",
    "elu",
    "selu",
    "silu",
    "swish",
    "hard_silu",
    "gelu",
]


def evaluations() -> dict[str, float]:
    found = {}
    for loss, last in LOSSES:
        names = ["accuracy", "mse"] if "crossentropy" in loss and "binary" not in loss else ["mse", "mae"]
        if loss.startswith("sparse"):
            names = ["accuracy"]
        ours, theirs = twins(models.SGD(), loss, stack(last), names)
        x, y = data(loss)
        their_logs = theirs.evaluate(x, y, verbose=0, return_dict=True)
        logs = ours.evaluate(x, y)
        found[f"{loss} {last}"] = max(abs(logs[key] - their_logs[key]) for key in ["loss", *names])
    return found


def files(folder: Path, optimizer) -> dict[str, float]:
    """Our file of a trained model, opened by Keras under each name, and trained on."""
    ours = models.Sequential(stack("softmax"), seed=3)
    ours.compile(optimizer, "categorical_crossentropy", ["acc"])
    x, y = data("categorical_crossentropy")
    for _ in range(5):
        ours.train_batch(Batch(x, y, None, ROWS))
    predictions, found = ours.predict(x), {}
    for name in ("m.h5", "m.hdf5", "m.weights.h5"):
        for kind, save in (("whole", ours.save), ("weights", ours.save_weights)):
            path = folder / name
            save(path)
            loaded = keras.models.load_model(path)
            found[f"load_model {kind} {name}"] = distance([predictions], [loaded.predict(x, verbose=0)])
            fresh = keras.Sequential.from_config(loaded.get_config())
            fresh.load_weights(path)
            found[f"load_weights {kind} {name}"] = distance([predictions], [fresh.predict(x, verbose=0)])
    ours.save(folder / "m.h5")
    plain = keras.models.load_model(folder / "m.h5")
    found["compiled loss is ours"] = float(plain.loss is None)
    plain.fit(x, y, epochs=1, verbose=0)  # fails where slots are missing
    found.update(continued(folder, ours, optimizer, x, y))
    return found


def continued(folder: Path, ours, optimizer, x, y) -> dict[str, float]:
    path = folder / "m.weights.h5"
    ours.save(path)
    theirs = keras.models.load_model(path)
    kind = getattr(keras.optimizers, type(optimizer).__name__)
    theirs.compile(kind(**optimizer.get_config()), "categorical_crossentropy")
    theirs.optimizer.build(theirs.trainable_variables)
    theirs.load_weights(path)
    found = {"iterations": float(abs(int(theirs.optimizer.iterations) - 5))}
    for _ in range(10):
        ours.train_batch(Batch(x, y, None, ROWS))
        theirs.train_on_batch(x, y)
    found["trained on"] = distance(ours.get_weights(), theirs.get_weights())
    return found


def embedding(folder: Path) -> dict[str, float]:
    found = {}
    for name in ("adam", "sgd", "adagrad"):  # the last two update the table row by row
        layers = [
            models.Embedding(7, 3, input_length=4),
            models.Flatten(),
            models.Dense(2, activation="softmax", use_bias=False),
        ]
        ours = models.Sequential(layers, seed=1)
        ours.compile(name, "sparse_categorical_crossentropy")
        rng = np.random.default_rng(0)
        x, y = rng.integers(0, 7, (ROWS, 4)), rng.integers(0, 2, ROWS)
        ours.save(folder / "e.h5")
        theirs = keras.models.load_model(folder / "e.h5")
        found[f"predictions {name}"] = distance([ours.predict(x)], [theirs.predict(x, verbose=0)])
        theirs.compile(name, "sparse_categorical_crossentropy")
        for _ in range(STEPS):
            ours.train_batch(Batch(x, y, None, ROWS))
            theirs.train_on_batch(x, y)
        found[f"steps {name}"] = distance(ours.get_weights(), theirs.get_weights())
    return found


def trainable() -> dict[str, float]:
    """Layers frozen from the start, and frozen and freed between two compiles."""
    found = {}
    x, y = data("categorical_crossentropy")
    for frozen in ([0], [1], [0, 1], [1, 3], []):
        layers = stack("softmax")
        for index in frozen:
            layers[index].trainable = False
        ours, theirs = twins(models.RMSprop(), "categorical_crossentropy", layers)
        found[f"config {frozen}"] = float([bool(one.trainable) for one in theirs.layers][:4] != [
            one.trainable for one in ours.layers
        ][:4])  # fmt: skip
        start = ours.get_weights()
        for turn in range(2):
            for _ in range(STEPS):
                ours.train_batch(Batch(x, y, None, ROWS))
                theirs.train_on_batch(x, y)
            found[f"steps {frozen} {turn}"] = distance(ours.get_weights(), theirs.get_weights())
            for model in (ours, theirs):
                for index in (0, 1):
                    model.layers[index].trainable = not model.layers[index].trainable
                model.compile("sgd", "categorical_crossentropy")
        found[f"moved {frozen}"] = float(distance(ours.get_weights(), start) < 1e-3)
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    sgd = models.SGD
    report = {
        "optimizers": {name: steps(make()) for name, make in OPTIMIZERS.items()},
        "losses": {f"{loss} {last}": steps(sgd(0.05), loss, last) for loss, last in LOSSES},
        "sample weights": {
            f"{loss} {last}": steps(sgd(0.05), loss, last, weighted=True) for loss, last in LOSSES
        },
        "activations": {name: steps(sgd(0.05), hidden=name, normalized=False) for name in HIDDEN},
        "evaluate": evaluations(),
        "files": {
            f"{name}: {what}": value
            for name, make in OPTIMIZERS.items()
            for what, value in files(folder, make()).items()
        },
        "embedding": embedding(folder),
        "trainable": trainable(),
    }
    print("\n" + json.dumps(report))


if __name__ == "__main__":
    main()
