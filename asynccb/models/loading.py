"""``load_model``: a file becomes a model, by its config alone."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from asynccb.errors import ArgumentError, FileRefused
from asynccb.models import config, interchange, optimizers
from asynccb.models.files import (
    LayerLayout,
    WeightLayout,
    expected,
    group_names,
    names_of,
    optimizer_order,
    unpack_random,
)
from asynccb.models.resuming import unpack_optimizer
from asynccb.models.sequential import Sequential
from asynccb.models.state import OptimizerState, SequentialState
from asynccb.storage.archive import is_archive, unpacked
from asynccb.storage.hdf5 import read_model_file

if TYPE_CHECKING:
    from asynccb.models.arrays import Array
    from asynccb.models.updates import Optimizer
    from asynccb.storage.hdf5 import Expected, Header


def load_model(path: str | os.PathLike[str]) -> Sequential:
    """A new model from a file that ``save`` or ``ModelCheckpoint`` wrote, or Keras 3.

    Architecture, weights, compile and optimizer state come back, and with them the random streams: training
    goes on as if it had not been interrupted. From a file of weights alone the model comes back uncompiled.

    Keras' files (``.keras``, and ``.h5`` as its ``save`` writes them) are read where they hold a
    ``Sequential`` of layers that exist here, without regularizers, constraints and further settings that
    would change its numbers; its predictions agree to a millionth. The streams of its ``Dropout`` layers
    begin anew, as they are those of another generator. Compiled with a loss, an optimizer or a metric that
    do not exist here, the model comes back uncompiled, with a warning.

    Args:
        path: a file. Whatever its name is, it is read by what it holds.

    Raises:
        FileNotFoundError: if there is no such file.
        FileRefused: for a file that is damaged or not safe to load, or of a model that does not exist here.
            Nothing of it is read or allocated before the shapes that its config asks for are found in it. No
            code of a file is ever run.
    """
    path, plan = os.fspath(path), _Plan()
    try:
        if is_archive(path):
            with unpacked(path) as (theirs, weights):
                plan.configs = theirs, theirs.get("compile_config")
                contents = read_model_file(weights, plan.expect)
        else:
            contents = read_model_file(path, plan.expect)
        model = plan.model(contents.weights, contents.optimizer)
    except FileRefused:
        raise
    except (ArgumentError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise FileRefused(path, f"its config is not that of a model: {error}") from error
    if plan.uncompiled is not None:
        warnings.warn(f"The model comes back uncompiled: {plan.uncompiled}", UserWarning, stacklevel=2)
    return model


class _Plan:
    """Reads the header without allocating anything, then makes the model from the arrays.

    Attributes:
        configs: of the model and of its compile, where another file has them than that of the arrays.
        uncompiled: why the model comes back uncompiled though it was compiled.
    """

    configs: tuple[dict[str, Any], dict[str, Any] | None] | None = None
    uncompiled: str | None = None

    def expect(self, header: Header) -> Expected:
        model, training = self.configs or (header.model_config, header.training_config)
        if model is None:
            raise ArgumentError("model_config", None, "is missing: the file holds weights, not a model")
        theirs = interchange.OURS not in model
        if theirs:
            model = interchange.model_config(model)
            try:
                training = interchange.training_config(training) if training else None
            except ArgumentError as error:
                training, self.uncompiled = None, str(error)
        self._header, self._config = header, model
        parsed = config.model_from_config(model)
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
        order: list[tuple[str, int]] = []
        if training is not None:
            self._compiled = config.compiled_from(training)
            self._optimizer = optimizers.from_config(self._compiled.optimizer)
            trainable = [w.shape for layer in self._layout for w in layer.weights if w.trainable]
            order = self._order(len(trainable))
            slots = [(), (), *(trainable[index] for _, index in order)]
        return expected(self._layout, slots, names_of(self._layout, order) if theirs else None)

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
