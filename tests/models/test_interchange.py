"""Files as Keras 3 writes them, made here by hand, become models; what does not exist here is refused."""

from __future__ import annotations

import copy
import json
import warnings
import zipfile

import h5py
import numpy as np
import pytest

from asynccb.errors import FileRefused
from asynccb.models import BatchNormalization, Dense, Dropout, Sequential, load_model
from asynccb.protocols import Batch

X = np.random.default_rng(0).normal(size=(12, 5)).astype("float32")
Y = np.eye(3, dtype="float32")[np.arange(12) % 3]

POLICY = {
    "module": "keras",
    "class_name": "DTypePolicy",
    "config": {"name": "float32"},
    "registered_name": None,
    "shared_object_id": 140181236302928,
}


def initializer(name):
    return {
        "module": "keras.initializers",
        "class_name": name,
        "config": {"seed": None},
        "registered_name": None,
    }


def layer(kind, name, **settings):
    return {
        "module": "keras.layers",
        "class_name": kind,
        "config": {"name": name, "trainable": True, "dtype": POLICY, **settings},
        "registered_name": None,
        "build_config": {"input_shape": [None, 5]},
    }


def dense(name, units, activation):
    return layer(
        "Dense",
        name,
        units=units,
        activation=activation,
        use_bias=True,
        kernel_initializer=initializer("GlorotUniform"),
        bias_initializer=initializer("Zeros"),
        kernel_regularizer=None,
        bias_regularizer=None,
        kernel_constraint=None,
        bias_constraint=None,
        quantization_config=None,
    )


def model_config():
    normalization = layer(
        "BatchNormalization",
        "norm",
        axis=-1,
        momentum=0.99,
        epsilon=0.001,
        center=True,
        scale=True,
        beta_initializer=initializer("Zeros"),
        gamma_initializer=initializer("Ones"),
        moving_mean_initializer=initializer("Zeros"),
        moving_variance_initializer=initializer("Ones"),
        gamma_regularizer=None,
        synchronized=False,
        renorm=False,
        renorm_clipping=None,
        renorm_momentum=0.99,
    )
    entry = {"class_name": "InputLayer", "config": {"batch_shape": [None, 5], "name": "input"}}
    middle = layer("Dropout", "dropout", rate=0.2, seed=None, noise_shape=None)
    return {
        "module": "keras",
        "class_name": "Sequential",
        "config": {
            "name": "seq",
            "trainable": True,
            "dtype": POLICY,
            "layers": [entry, dense("first", 4, "relu"), normalization, middle, dense("last", 3, "softmax")],
            "build_input_shape": [None, 5],
        },
        "build_config": {"input_shape": [None, 5]},
    }


def compile_config():
    optimizer = {
        "name": "adam",
        "learning_rate": 0.0010000000474974513,
        "weight_decay": None,
        "clipnorm": None,
        "use_ema": False,
        "ema_momentum": 0.99,
        "loss_scale_factor": None,
        "beta_1": 0.9,
        "beta_2": 0.999,
        "epsilon": 1e-07,
        "amsgrad": False,
    }
    return {
        "optimizer": {"module": "keras.optimizers", "class_name": "Adam", "config": optimizer},
        "loss": "categorical_crossentropy",
        "loss_weights": None,
        "metrics": ["accuracy"],
        "weighted_metrics": None,
        "run_eagerly": False,
        "steps_per_execution": 1,
        "jit_compile": True,
    }


def twin(steps=2):
    """The model that the config tells of, trained."""
    layers = [
        Dense(4, activation="relu", input_dim=5, name="first"),
        BatchNormalization(name="norm"),
        Dropout(0.2, name="dropout"),
        Dense(3, activation="softmax", name="last"),
    ]
    model = Sequential(layers, seed=3, name="seq")
    model.compile("adam", "categorical_crossentropy", ["accuracy"])
    for _ in range(steps):
        model.train_batch(Batch(X, Y, None, 12))
    return model


def archive(path, model, config=None, compiled=None, **options):
    """A ``.keras`` file; our file of weights has the layout of Keras' own, beside much that it lacks."""
    weights = path.with_suffix(".weights.h5")
    model.save(weights)
    with h5py.File(weights, "r+") as file:
        del file["model_weights"], file["asynccb"]
        for name in list(file.attrs):
            del file.attrs[name]
    config = copy.deepcopy(model_config() if config is None else config)
    config["compile_config"] = compile_config() if compiled is None else compiled
    with zipfile.ZipFile(path, "w", **options) as file:
        file.writestr("metadata.json", '{"keras_version": "3.15.1"}')
        file.writestr("config.json", json.dumps(config))
        file.write(weights, "model.weights.h5")
    return path


def older(path, model, config=None, compiled=None, suffix=""):
    """A ``.h5`` file as Keras' ``save`` writes it."""
    state = model.capture()
    names = h5py.string_dtype()
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = json.dumps(model_config() if config is None else config)
        training = compile_config() if compiled is None else compiled
        training["optimizer_config"] = training.pop("optimizer", None)
        file.attrs["training_config"] = json.dumps(training)
        weights = file.create_group("model_weights")
        weights.attrs.create("layer_names", [one.name for one in model.layers], dtype=names)
        weights.create_group("top_level_model_weights")
        for one in model.layers:
            group = weights.create_group(one.name)
            for weight in one.weights:
                group[f"seq/{weight.path}{suffix}"] = weight.numpy()
        slots = file.create_group("optimizer_weights/adam")
        slots["iteration"], slots["learning_rate"] = np.int32(model.optimizer.iterations), np.float32(0.001)
        for slot, arrays in state.optimizer.slots.items():
            trained = [weight for one in model.layers for weight in one.weights if weight.trainable]
            for weight, array in zip(trained, arrays, strict=True):
                slots[f"seq_{weight.path.replace('/', '_')}_{slot}"] = array
    return path


KINDS = {"archive": (archive, "m.keras"), "older": (older, "m.h5")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_goes_on_from_a_file_of_keras(kind, tmp_path):
    make, name = KINDS[kind]
    model = twin()
    loaded = load_model(make(tmp_path / name, model))
    assert [one.name for one in loaded.layers] == ["first", "norm", "dropout", "last"]
    np.testing.assert_array_equal(loaded.predict(X), model.predict(X))
    assert loaded.optimizer.iterations == 2
    for one in (model, loaded):
        one.layers[2].seed_random(np.random.default_rng(5))  # their streams are those of other generators
        one.train_batch(Batch(X, Y, None, 12))
    for ours, theirs in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_alone_go_into_a_model_that_is_there(kind, tmp_path):
    make, name = KINDS[kind]
    model, other = twin(), twin(steps=7)
    rate = other.optimizer.learning_rate
    other.load_weights(make(tmp_path / name, model))
    np.testing.assert_array_equal(other.predict(X), model.predict(X))
    assert (other.optimizer.iterations, other.optimizer.learning_rate) == (7, rate)


def test_names_of_the_first_keras_are_read_and_a_file_without_model_weights_is_one_of_weights(tmp_path):
    model, other = twin(), twin(steps=7)
    path = older(tmp_path / "m.h5", model, suffix=":0")
    other.load_weights(path)
    np.testing.assert_array_equal(other.predict(X), model.predict(X))
    with h5py.File(path) as file, h5py.File(tmp_path / "w.h5", "w") as alone:
        for name in file["model_weights"]:
            file.copy(f"model_weights/{name}", alone)
    other = twin(steps=7)
    other.load_weights(tmp_path / "w.h5")
    np.testing.assert_array_equal(other.predict(X), model.predict(X))


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_compiled_and_not_trained_begins_with_its_first_step(kind, tmp_path):
    make, name = KINDS[kind]
    path = make(tmp_path / name, twin(steps=0))
    if kind == "older":
        with h5py.File(path, "r+") as file:
            del file["optimizer_weights"]
    assert load_model(path).optimizer.iterations == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"loss": "huber"}, "loss='huber'"),
        ({"loss": {"class_name": "X", "config": {"name": "mse", "reduction": "sum"}}}, "reduction='sum'"),
        ({"metrics": [{"class_name": "AUC"}]}, "metrics="),
        ({"loss_weights": [2.0]}, "loss_weights="),
        (
            {"loss": {"class_name": "function", "config": "mine", "registered_name": "function"}},
            "loss='mine'",
        ),
        ({"loss": {"class_name": "MeanSquaredError", "registered_name": "my>MeanSquaredError"}}, "loss='my>"),
        ({"loss": {"class_name": "Mine", "config": {"name": "mse"}}}, "loss='mine'"),
        ({"optimizer": {"class_name": "Lion", "config": {}}}, "optimizer='Lion'"),
        ({"optimizer": {"class_name": "Adam", "registered_name": "my>Adam"}}, "optimizer='my>Adam'"),
        (
            {"optimizer": {"class_name": "Adam", "config": {"gradient_accumulation_steps": 4}}},
            "gradient_accumulation_steps",
        ),
        ({"optimizer": {"class_name": "SGD", "config": {"learning_rate": {"class_name": "Decay"}}}}, "Decay"),
    ],
    ids=[
        *("loss", "reduction", "metric", "loss weights", "function", "own loss", "loss called like another"),
        *("optimizer", "own optimizer", "accumulation", "schedule"),
    ],
)
def test_compiled_with_what_does_not_exist_here_it_comes_back_uncompiled_and_says_why(
    kind, change, said, tmp_path
):
    make, name = KINDS[kind]
    model = twin()
    path = make(tmp_path / name, model, compiled=compile_config() | change)
    with pytest.warns(UserWarning, match="comes back uncompiled") as warned:
        loaded = load_model(path)
    assert said in str(warned[0].message)
    assert warned[0].filename == __file__
    assert loaded.optimizer is None
    np.testing.assert_array_equal(loaded.predict(X), model.predict(X))


@pytest.mark.parametrize(
    "loss",
    [
        {
            "class_name": "CategoricalCrossentropy",
            "config": {"name": "of_mine", "reduction": "sum_over_batch_size", "from_logits": False},
        },
        {"class_name": "function", "config": "categorical_crossentropy", "registered_name": "function"},
    ],
)
def test_a_loss_of_keras_that_is_an_object_with_its_defaults_or_a_function_is_known(loss, tmp_path):
    path = archive(tmp_path / "m.keras", twin(), compiled=compile_config() | {"loss": loss})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_model(path).capture().compiled.loss == "categorical_crossentropy"


def changed(**settings):
    config = model_config()
    config["config"]["layers"][2]["config"].update(settings)
    return config


def of_kind(kind, **more):
    config = model_config()
    config["config"]["layers"][3].update(class_name=kind, **more)
    return config


REFUSED = {
    "a functional model": (model_config() | {"class_name": "Functional"}, "must be a Sequential"),
    "a layer that is not known": (of_kind("Conv2D"), "layer='Conv2D'"),
    "a layer of its own": (
        of_kind("Dropout", module="my", registered_name="my>Dropout"),
        "layer='my>Dropout'",
    ),
    "a regularizer": (changed(gamma_regularizer={"class_name": "L2"}), "gamma_regularizer="),
    "another axis": (changed(axis=1), "axis=1"),
    "a setting that is not known": (changed(rate_of_rates=2), "rate_of_rates=2"),
    "half precision": (changed(dtype="mixed_float16"), "dtype='mixed_float16'"),
    "two precisions": (changed(dtype="float64"), "must be the same in all layers"),
    "an activation of its own": (
        changed(name={"registered_name": "mine>swish2", "class_name": "swish2", "config": {}}),
        "must be known by its name",
    ),
}


def test_an_optimizer_of_keras_that_is_of_a_backend_is_keras_own(tmp_path):
    compiled = compile_config()
    compiled["optimizer"] |= {"module": "keras.src.backend.torch.optimizers.torch_adam"}
    compiled["optimizer"] |= {"registered_name": "Adam"}
    path = archive(tmp_path / "m.keras", twin(), compiled=compiled)
    assert load_model(path).optimizer.iterations == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", REFUSED)
def test_what_would_change_the_numbers_and_does_not_exist_here_is_refused_by_name(kind, case, tmp_path):
    make, name = KINDS[kind]
    config, said = REFUSED[case]
    path = make(tmp_path / name, twin(), config=config)
    with pytest.raises(FileRefused) as caught:
        load_model(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_an_initializer_that_does_not_exist_here_matters_no_more(tmp_path):
    config = model_config()
    config["config"]["layers"][1]["config"]["kernel_initializer"] = initializer("VarianceScaling")
    config["config"]["layers"][4]["config"]["kernel_initializer"] = initializer("HeNormal")
    layers = load_model(archive(tmp_path / "m.keras", twin(), config=config)).layers
    assert layers[0].kernel_initializer == "glorot_uniform"
    assert layers[3].kernel_initializer == "he_normal"


# ---------------------------------------------------------------- files that want to do harm


def test_an_array_more_or_less_or_of_another_shape_is_another_models(tmp_path):
    for change, said in (
        (lambda file: file["model_weights/last/seq/last"].pop("bias"), "0 arrays of the name bias"),
        (lambda file: file.create_group("model_weights/x").create_dataset("k", data=[1.0]), "'x'"),
        (lambda file: file["model_weights/last"].create_dataset("bias", data=[1.0]), "2 arrays of the name"),
        (lambda file: file.pop("model_weights/norm"), "lacks ['norm']"),
    ):
        path = older(tmp_path / "m.h5", twin())
        with h5py.File(path, "r+") as file:
            change(file)
        with pytest.raises(FileRefused) as caught:
            load_model(path)
        assert said in str(caught.value)


def test_groups_that_hold_each_other_are_not_followed_for_ever(tmp_path):
    path = older(tmp_path / "m.h5", twin())
    with h5py.File(path, "r+") as file:
        group = file["model_weights/last"]
        group["again"] = group
    with pytest.raises(FileRefused, match="has several names"):
        load_model(path)


def test_an_archive_that_is_cut_changed_compressed_or_lacks_a_part_is_refused(tmp_path):
    whole = archive(tmp_path / "m.keras", twin()).read_bytes()
    at = whole.index(b"\x89HDF") + 900
    cases = {
        "cut": whole[:-100],
        "changed": whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :],
        "no config": whole.replace(b"config.json", b"config.jsox"),
        "no weights": whole.replace(b"model.weights.h5", b"model.weights.h6"),
    }
    for name, content in cases.items():
        path = tmp_path / f"{name}.keras"
        path.write_bytes(content)
        for load in (load_model, twin(0).load_weights):
            with pytest.raises(FileRefused):
                load(path)
    with pytest.raises(FileRefused, match="compressed"):
        load_model(archive(tmp_path / "z.keras", twin(), compression=zipfile.ZIP_DEFLATED))


def test_an_archive_whose_directory_is_damaged_is_refused_however_that_shows(tmp_path):
    """``zipfile`` fails in as many ways."""
    whole = archive(tmp_path / "m.keras", twin()).read_bytes()
    entry = whole.index(b"PK\x01\x02", whole.index(b"PK\x01\x02") + 1)  # of config.json
    cases = {
        "no place in the file": [(entry + 42 + n, 0xFF) for n in range(4)],
        "a name that is no text": [(entry + 9, 0x08), (entry + 46, 0x80)],
        "a way of packing that nobody knows": [(entry + 10, 0x63)],
        "secret": [(entry + 8, 0x01)],
    }
    for name, changes in cases.items():
        path, content = tmp_path / f"{name}.keras", bytearray(whole)
        for at, byte in changes:
            content[at] = byte
        path.write_bytes(content)
        for load in (load_model, twin(0).load_weights):
            with pytest.raises(FileRefused):
                load(path)


def test_weights_that_are_refused_are_those_of_the_archive_and_a_folder_is_no_file(tmp_path):
    path = archive(tmp_path / "m.keras", twin())
    other = Sequential([Dense(4, input_dim=5), BatchNormalization(), Dropout(0.2), Dense(7)])
    with pytest.raises(FileRefused, match=r"dense_1/vars/0 has shape \(4, 3\)") as caught:
        other.load_weights(path)
    assert caught.value.path == str(path)
    for load in (load_model, other.load_weights):
        with pytest.raises(FileRefused):
            load(tmp_path)


def test_a_config_that_is_no_json_or_no_object_is_refused(tmp_path):
    for text in ("{", "[]", "[" * 100_000):
        path = tmp_path / "m.keras"
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("config.json", text)
            file.writestr("model.weights.h5", b"")
        with pytest.raises(FileRefused, match=r"config\.json"):
            load_model(path)


def test_a_part_that_claims_to_be_larger_than_its_archive_is_not_unpacked(tmp_path):
    path = tmp_path / "m.keras"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("config.json", json.dumps(model_config()))
        file.writestr("model.weights.h5", b"0" * 64)
    content = path.read_bytes()
    at = content.rindex(b"PK\x01\x02")  # the entry of the weights in the table at the end: sizes at 20 and 24
    lying = content[: at + 20] + (1 << 30).to_bytes(4, "little") * 2 + content[at + 28 :]
    path.write_bytes(lying)
    with pytest.raises(FileRefused, match=r"model\.weights\.h5 is larger than"):
        load_model(path)


def test_a_setting_that_is_no_argument_is_none_of_ours(tmp_path):
    path = archive(tmp_path / "m.keras", twin(), config=changed(self=1))
    with pytest.raises(FileRefused, match="self=1: is no setting of BatchNormalization"):
        load_model(path)


def test_the_unpacked_weights_are_gone_when_the_model_is_there(tmp_path, monkeypatch):
    path = archive(tmp_path / "m.keras", twin())
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    load_model(path)
    assert list((tmp_path / "scratch").iterdir()) == []
