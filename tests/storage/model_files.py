"""Model files to write: layers with one array each, and an optimizer."""

from __future__ import annotations

import numpy as np

from asynccb.storage.hdf5 import LEARNING_RATE, ArraySpec, Expected, LayerSpec, ModelFile, ModelLayout

TRAINING = f'{{"optimizer_config":{{"config":{{"learning_rate":"{LEARNING_RATE}"}}}}}}'


def layout_of(arrays, optimizer=None, *, order=None, name="m", config='{"a":1}'):
    """The layout of a model with a layer for each array; ``order`` None: as they come."""
    specs = [ArraySpec(array.shape, array.dtype.str) for array in arrays]
    count = len(arrays) + len(optimizer or ())
    return ModelLayout(
        model_name=name,
        model_config=config,
        training_config=None if optimizer is None else TRAINING,
        layers=tuple(
            LayerSpec(f"l{index}", f"dense_{index}", (("kernel", spec),)) for index, spec in enumerate(specs)
        ),
        optimizer=None
        if optimizer is None
        else tuple(ArraySpec(array.shape, array.dtype.str) for array in optimizer),
        order=tuple(range(count)) if order is None else order,
    )


def file_of(arrays, optimizer=None, *, rate=0.1, extra=None, memory=None, **settings):
    layout = layout_of(arrays, optimizer, **settings)
    if memory is None:
        every = [*arrays, *(optimizer or ())]
        memory = tuple(every[index] for index in layout.order if every[index].size)
    return ModelFile(layout, memory, None if optimizer is None else rate, extra or {})


def expect(contents):
    """What ``read_model_file`` is to find."""
    layout = contents.layout
    shapes = {layer.group: tuple(spec.shape for _, spec in layer.weights) for layer in layout.layers}
    slots = None if layout.optimizer is None else tuple(spec.shape for spec in layout.optimizer)
    return lambda header: Expected(shapes, slots)


def numbers(*shapes, dtype=np.float32, seed=0):
    generator = np.random.default_rng(seed)
    return [np.asarray(generator.integers(0, 100, shape)).astype(dtype) for shape in shapes]
