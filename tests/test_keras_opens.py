"""What a training leaves on the disk is a Keras model: real Keras opens it and predicts the same."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

from asynccb import Trainer
from asynccb.callbacks import ModelCheckpoint
from asynccb.models import Activation, BatchNormalization, Dense, Dropout, Sequential, load_model

if TYPE_CHECKING:
    from pathlib import Path

KERAS = """
import sys
import keras
import numpy as np

assert keras.__version__.startswith("3.") and keras.backend.backend() == "jax"
checkpoint, samples, predictions = sys.argv[1:]
model = keras.models.load_model(checkpoint)
np.save(predictions, model.predict(np.load(samples), verbose=0))
"""

# Looked for and not imported: importing Keras here would choose its backend for the whole process.
INSTALLED = all(importlib.util.find_spec(name) is not None for name in ("keras", "jax"))

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.timeout(120),
    pytest.mark.skipif(not INSTALLED, reason="needs Keras and JAX"),
]


def predicted_by_keras(checkpoint: Path, x: np.ndarray) -> np.ndarray:
    samples, predictions = checkpoint.with_name("samples.npy"), checkpoint.with_name("predictions.npy")
    np.save(samples, x)
    subprocess.run(
        [sys.executable, "-c", KERAS, checkpoint, samples, predictions],
        env={**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"},
        check=True,
    )
    return np.load(predictions)


@pytest.mark.asyncio
async def test_keras_opens_the_best_checkpoint_of_a_fit_and_predicts_the_same(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    x = chance.normal(size=(256, 12)).astype("f4")
    y = np.eye(3, dtype="f4")[x[:, :3].argmax(axis=1)]
    layers = [
        Dense(16, activation="relu", input_dim=12),
        BatchNormalization(),
        Dropout(0.2),
        Dense(3),
        Activation("softmax"),
    ]
    model = Sequential(layers, seed=7)
    model.compile(optimizer="adam", loss="categorical_crossentropy", metrics=["accuracy"])
    untrained = model.predict(x)
    checkpoint = tmp_path / "best.hdf5"
    await Trainer(model, seed=7).fit(
        x,
        y,
        epochs=5,
        verbose=0,
        validation_split=0.25,
        callbacks=[ModelCheckpoint(checkpoint, save_best_only=True)],
    )
    ours = load_model(checkpoint).predict(x)
    theirs = predicted_by_keras(checkpoint, x)
    assert ours.shape == theirs.shape == (256, 3)
    assert float(np.abs(ours - theirs).max()) <= 1e-6
    assert float(np.abs(untrained - theirs).max()) > 0.1
