"""Layers. A layer declares shapes, weights and config; the operations that it makes compute."""

from __future__ import annotations

from asynccb.models.layers.activation import Activation
from asynccb.models.layers.base import Layer, Operation, Weight, WeightSpec
from asynccb.models.layers.dense import Dense
from asynccb.models.layers.dropout import Dropout
from asynccb.models.layers.embedding import Embedding
from asynccb.models.layers.flatten import Flatten
from asynccb.models.layers.normalization import BatchNormalization

CLASSES: dict[str, type[Layer]] = {
    kind.__name__: kind for kind in (Activation, BatchNormalization, Dense, Dropout, Embedding, Flatten)
}

__all__ = [
    "CLASSES",
    "Activation",
    "BatchNormalization",
    "Dense",
    "Dropout",
    "Embedding",
    "Flatten",
    "Layer",
    "Operation",
    "Weight",
    "WeightSpec",
]
