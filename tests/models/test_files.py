"""Files of models: what goes in comes out, to the byte."""

from __future__ import annotations

import subprocess
import sys

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asynccb.errors import ArgumentError, FileRefused
from asynccb.models import (
    Activation,
    BatchNormalization,
    Dense,
    Dropout,
    Embedding,
    Flatten,
    RMSprop,
    Sequential,
    load_model,
)
from asynccb.protocols import Batch

NAMES = ["model.h5", "model.hdf5", "model.weights.h5"]


def model_of(kinds, optimizer="adam", seed=1, dtype="float32"):
    model = Sequential(kinds, seed=seed, dtype=dtype)
    model.compile(optimizer, "categorical_crossentropy", ["acc", "mse"])
    return model


def dense(optimizer="adam", **kwargs):
    layers = [
        Dense(4, activation="selu", input_dim=5),
        BatchNormalization(),
        Dropout(0.2),
        Dense(3),
        Activation("softmax"),
    ]
    return model_of(layers, optimizer, **kwargs)


def words():
    return model_of(
        [Embedding(7, 3, input_length=4), Flatten(), Dense(3, activation="softmax", use_bias=False)]
    )


def go_on(model, updates=3):
    rng = np.random.default_rng(0)
    first = model.layers[0]
    x = rng.integers(0, 7, (16, 4)) if isinstance(first, Embedding) else rng.standard_normal((16, 5))
    y = np.eye(3)[rng.integers(0, 3, 16)]
    return [model.train_batch(Batch(x, y, None, 16)) for _ in range(updates)]


def contents(model):
    return {name: array.tobytes() for name, array in model.capture().arrays.items()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", [dense, words])
def test_a_loaded_model_trains_on_bit_by_bit(tmp_path, name, make):
    model = make()
    go_on(model)
    model.save(tmp_path / name)
    loaded = load_model(tmp_path / name)
    assert contents(loaded) == contents(model)
    assert loaded.metrics_names == ["loss", "acc", "mse"]
    assert go_on(loaded) == go_on(model)


@pytest.mark.parametrize(
    "optimizer", ["sgd", "rmsprop", "adagrad", "adamw", RMSprop(momentum=0.9, centered=True)]
)
def test_every_optimizer_comes_back_with_its_slots_and_exact_learning_rate(tmp_path, optimizer):
    model = dense(optimizer)
    go_on(model)
    model.optimizer.lr = 0.1  # not a float32: the file's array alone would give 0.10000000149
    model.save(tmp_path / "m.h5")
    loaded = load_model(tmp_path / "m.h5")
    assert loaded.optimizer.lr == 0.1
    assert loaded.optimizer.iterations == 3
    assert go_on(loaded) == go_on(model)


def test_float64_models_come_back_in_float64(tmp_path):
    model = dense(dtype="float64")
    model.save(tmp_path / "m.h5")
    assert contents(load_model(tmp_path / "m.h5")) == contents(model)


@given(
    st.lists(st.sampled_from(["dense", "norm", "drop", "act"]), min_size=1, max_size=5), st.integers(0, 2**32)
)
@settings(max_examples=20, deadline=None)
def test_any_stack_survives_a_file(tmp_path_factory, kinds, seed):
    makers = {
        "dense": lambda: Dense(1 + seed % 5), "norm": BatchNormalization, "drop": lambda: Dropout(0.1),
        "act": lambda: Activation("gelu"),
    }  # fmt: skip
    model = Sequential([Dense(3, input_dim=2), *[makers[kind]() for kind in kinds]], seed=seed)
    model.compile("adam", "mse")
    path = tmp_path_factory.mktemp("stack") / "m.h5"
    model.save(path)
    loaded = load_model(path)
    assert contents(loaded) == contents(model)
    assert loaded.get_config() == model.get_config()


def test_equal_models_give_equal_files(tmp_path):
    """Also from another process: no times, no addresses, no order of a set gets into a file."""
    model = dense()
    go_on(model)
    for name in ("a.h5", "b.h5"):
        model.save(tmp_path / name)
    load_model(tmp_path / "a.h5").save(tmp_path / "c.h5")
    code = "import sys; from asynccb.models import load_model\nload_model(sys.argv[1]).save(sys.argv[2])"
    subprocess.run([sys.executable, "-c", code, tmp_path / "a.h5", tmp_path / "d.h5"], check=True)
    assert len({(tmp_path / name).read_bytes() for name in ("a.h5", "b.h5", "c.h5", "d.h5")}) == 1


def test_weights_alone_leave_out_the_optimizer(tmp_path):
    model = dense()
    model.save_weights(tmp_path / "w.h5")
    with h5py.File(tmp_path / "w.h5") as file:
        assert "optimizer" not in file
        assert "training_config" not in file.attrs
        assert "model_weights" in file
    assert load_model(tmp_path / "w.h5").optimizer is None


def test_load_weights_takes_either_kind_of_file_and_leaves_the_optimizer(tmp_path):
    model = dense()
    go_on(model)
    wanted = [weight.tobytes() for weight in model.get_weights()]
    model.save(tmp_path / "whole.h5")
    model.save_weights(tmp_path / "weights.h5")
    for name in ("whole.h5", "weights.h5"):
        other = dense(seed=9)
        go_on(other, 1)
        other.load_weights(tmp_path / name)
        assert [weight.tobytes() for weight in other.get_weights()] == wanted
        assert other.optimizer.iterations == 1


@pytest.mark.parametrize(
    "other",
    [
        lambda: model_of([Dense(4, input_dim=6), Dense(3)]),
        lambda: model_of([Dense(4, input_dim=5)]),
        lambda: model_of([Dense(4, input_dim=5), Dense(3), Dense(3)]),
        lambda: model_of([Dense(4, input_dim=5, use_bias=False), Dense(3)]),
    ],
)
def test_weights_of_another_shape_are_refused_and_nothing_is_changed(tmp_path, other):
    model_of([Dense(4, input_dim=5), Dense(3)]).save_weights(tmp_path / "w.h5")
    model = other()
    before = contents(model)
    with pytest.raises(FileRefused, match=r"w\.h5"):
        model.load_weights(tmp_path / "w.h5")
    assert contents(model) == before


def test_weights_written_by_others_without_a_config_load_too(tmp_path):
    model = model_of([Dense(4, input_dim=5), Dense(3)])
    model.save_weights(tmp_path / "w.h5")
    with h5py.File(tmp_path / "w.h5", "r+") as file:
        assert "asynccb" not in file
        del file.attrs["model_config"]
    other = model_of([Dense(4, input_dim=5), Dense(3)], seed=5)
    other.load_weights(tmp_path / "w.h5")
    assert [w.tobytes() for w in other.get_weights()] == [w.tobytes() for w in model.get_weights()]
    with pytest.raises(FileRefused, match="weights, not a model"):
        load_model(tmp_path / "w.h5")


@pytest.mark.parametrize("name", ["model.keras", "model", "model.txt", "model.h5.bak"])
def test_other_extensions_are_refused_by_name(tmp_path, name):
    with pytest.raises(ArgumentError, match=r"\.h5, \.hdf5 or \.weights\.h5"):
        dense().save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_a_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_model(tmp_path / "none.h5")


def test_a_file_is_never_held_open(tmp_path):
    model = dense()
    model.save(tmp_path / "m.h5")
    load_model(tmp_path / "m.h5")
    with h5py.File(tmp_path / "m.h5", "r+"):
        pass  # the library would refuse if another handle were open in this process


def test_importing_models_does_not_import_h5py():
    code = "import sys, asynccb.models; assert 'h5py' not in sys.modules, 'h5py is imported too early'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_weight_is_stored_once_and_linked_twice(tmp_path):
    model = dense()
    model.save(tmp_path / "m.h5")
    with h5py.File(tmp_path / "m.h5") as file:
        stored, linked = file["layers/dense/vars/0"], file["model_weights/dense/sequential/dense/kernel"]
        assert stored == linked
        assert [name.decode() for name in file["model_weights"].attrs["layer_names"]] == [
            layer.name for layer in model.layers
        ]
        assert file["model_weights/dropout"].attrs["weight_names"].dtype == np.float64
        assert "optimizer_weights" not in file


def test_groups_are_named_by_class_whatever_the_layers_are_called(tmp_path):
    model_of([Dense(4, input_dim=5, name="first"), Dense(3, name="dense")]).save(tmp_path / "m.h5")
    with h5py.File(tmp_path / "m.h5") as file:
        assert set(file["layers"]) == {"dense", "dense_1"}
        assert file["layers/dense/vars/0"].shape == (5, 4)


def test_more_names_than_an_attribute_holds_are_split(tmp_path):
    long = "n" * 200
    layers = [Dense(1, input_dim=1, name=f"{long}{index}") for index in range(400)]
    model = Sequential(layers, seed=1)
    model.save(tmp_path / "m.h5")
    with h5py.File(tmp_path / "m.h5") as file:
        assert "layer_names" not in file["model_weights"].attrs
        assert "layer_names1" in file["model_weights"].attrs
    assert contents(load_model(tmp_path / "m.h5")) == contents(model)
