"""``load_model``: a file becomes a model, by its config alone."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from asynccb.errors import ArgumentError, FileRefused
from asynccb.models import config, optimizers
from asynccb.models.files import (
    LayerLayout,
    WeightLayout,
    expected,
    group_names,
    optimizer_order,
    unpack_random,
)
from asynccb.models.resuming import unpack_optimizer
from asynccb.models.sequential import Sequential
from asynccb.models.state import OptimizerState, SequentialState
from asynccb.storage.hdf5 import read_model_file

if TYPE_CHECKING:
    from asynccb.models.arrays import Array
    from asynccb.models.updates import Optimizer
    from asynccb.storage.hdf5 import Expected, Header


def load_model(path: str | os.PathLike[str]) -> Sequential:
    """A new model from a file that ``save`` or ``ModelCheckpoint`` wrote.

    Architecture, weights, compile and optimizer state come back, and with them the random streams: training
    goes on as if it had not been interrupted. From a file of weights alone the model comes back uncompiled.

    Args:
        path: an HDF5 file. Whatever its name is, it is read by what it holds.

    Raises:
        FileNotFoundError: if there is no such file.
        FileRefused: for a file that is damaged or not safe to load. Nothing of it is read or allocated before
            the shapes that its config asks for are found in it.
    """
    path, plan = os.fspath(path), _Plan()
    try:
        contents = read_model_file(path, plan.expect)
        return plan.model(contents.weights, contents.optimizer)
    except FileRefused:
        raise
    except (ArgumentError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise FileRefused(path, f"its config is not that of a model: {error}") from error


class _Plan:
    """Reads the header without allocating anything, then makes the model from the arrays."""

    def expect(self, header: Header) -> Expected:
        if header.model_config is None:
            raise ArgumentError("model_config", None, "is missing: the file holds weights, not a model")
        self._header, self._config = header, header.model_config
        parsed = config.model_from_config(self._config)
        if parsed.input_shape is None:
            raise ArgumentError("model_config", None, "has no input shape")
        self._layout: list[LayerLayout] = []
        shape = parsed.input_shape
        for layer, group in zip(parsed.layers, group_names(parsed.layers), strict=True):
            specs = tuple(
                WeightLayout(s.name, s.shape, s.learned and layer.trainable)
                for s in layer.weight_specs(shape)
            )
            self._layout.append(LayerLayout(layer.name, group, specs))
            shape = layer.output_shape(shape)
        self._dtype = np.dtype(parsed.dtype)
        self._compiled: config.Compiled | None = None
        self._optimizer: Optimizer | None = None
        slots: list[tuple[int, ...]] | None = None
        if header.training_config is not None:
            self._compiled = config.compiled_from(header.training_config)
            self._optimizer = optimizers.from_config(self._compiled.optimizer)
            trainable = [w.shape for layer in self._layout for w in layer.weights if w.trainable]
            slots = [(), (), *(trainable[index] for _, index in self._order(len(trainable)))]
        return expected(self._layout, slots)

    def _order(self, trainable: int) -> list[tuple[str, int]]:
        assert self._optimizer is not None
        names = self._optimizer.slot_names()
        return optimizer_order(names, trainable, by_variable=self._optimizer.slots_by_variable)

    def model(self, weights: list[Array], slots: list[Array] | None) -> Sequential:
        trainable = sum(weight.trainable for layer in self._layout for weight in layer.weights)
        state = SequentialState(
            config=self._config,
            compiled=self._compiled,
            layout=tuple(self._layout),
            weights=weights,
            optimizer=None if slots is None else self._optimizer_state(slots, trainable),
            random=unpack_random(self._header),
            rebuild=Sequential._from_state,
        )
        return Sequential._from_state(state)

    def _optimizer_state(self, slots: list[Array], trainable: int) -> OptimizerState:
        assert self._optimizer is not None
        return unpack_optimizer(self._optimizer, slots, trainable)
