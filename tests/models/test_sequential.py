from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asynccb.errors import ArgumentError, ModelBusy
from asynccb.models import (
    Activation,
    Adam,
    BatchNormalization,
    Dense,
    Dropout,
    Embedding,
    Flatten,
    Sequential,
)
from asynccb.protocols import Batch, Model


def digits(seed=0, samples=96):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((samples, 8)).astype(np.float32)
    return x, np.eye(3, dtype=np.float32)[x[:, :3].argmax(axis=1)]


def make(seed=7, dropout=0.25, **compiled):
    layers = [Dense(6, activation="relu", input_dim=8), BatchNormalization(), Dropout(dropout), Dense(3)]
    model = Sequential([*layers, Activation("softmax")], seed=seed)
    model.compile(
        **{"optimizer": "adam", "loss": "categorical_crossentropy", "metrics": ["accuracy"], **compiled}
    )
    return model


def train(model, batches=5, size=32):
    x, y = digits()
    return [
        model.train_batch(Batch(x[at : at + size], y[at : at + size], None, size))
        for at in [(index * size) % len(x) for index in range(batches)]
    ]


def all_bytes(model):
    return {name: array.tobytes() for name, array in model.capture().arrays.items()}


def test_a_sequential_is_a_model_of_the_protocol():
    model = make()
    assert isinstance(model, Model)
    assert model.user_model is model


def test_equal_seeds_give_equal_bytes():
    one, other = make(seed=3), make(seed=3)
    assert train(one) == train(other)
    assert all_bytes(one) == all_bytes(other)


def test_two_processes_give_equal_bytes(tmp_path):
    """Weights, slots and the dropout stream, in the file of a model that has trained."""
    code = (
        "import sys, numpy as np\n"
        "from asynccb.models import Dense, Dropout, Sequential\n"
        "from asynccb.protocols import Batch\n"
        "layers = [Dense(6, activation='gelu', input_dim=8), Dropout(0.3), Dense(3, 'softmax')]\n"
        "model = Sequential(layers, seed=7)\n"
        "model.compile('adam', 'categorical_crossentropy')\n"
        "rng = np.random.default_rng(0)\n"
        "for _ in range(20):\n"
        "    y = np.eye(3)[rng.integers(0, 3, 32)]\n"
        "    model.train_batch(Batch(rng.standard_normal((32, 8)), y, None, 32))\n"
        "model.save(sys.argv[1])\n"
    )
    paths = [tmp_path / "one.h5", tmp_path / "other.h5"]
    for path, salt in zip(paths, ("1", "2"), strict=True):
        environment = {**os.environ, "PYTHONHASHSEED": salt}
        subprocess.run([sys.executable, "-c", code, path], check=True, env=environment)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_other_seeds_give_other_bytes():
    assert all_bytes(make(seed=3)) != all_bytes(make(seed=4))
    assert all_bytes(make(seed=None)) != all_bytes(make(seed=None))


def test_the_process_wide_generator_is_neither_read_nor_moved():
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    first = train(make(seed=3))
    assert np.array_equal(np.random.get_state()[1], before)
    np.random.seed(2)
    assert train(make(seed=3)) == first


def test_dropout_draws_from_a_stream_of_its_own():
    """Another rate changes no initial weight of the layers behind."""
    assert make(dropout=0.25).get_weights()[-2].tobytes() == make(dropout=0.5).get_weights()[-2].tobytes()


def test_training_learns():
    model = make(dropout=0.0, optimizer=Adam(0.02))
    x, y = digits()
    before = model.evaluate(x, y)
    train(model, 150)
    after = model.evaluate(x, y)
    assert after["loss"] < 0.5 * before["loss"]
    assert after["accuracy"] > 0.9


def test_all_logs_are_python_floats_with_the_loss_first():
    model = make(metrics=["accuracy", "mse"])
    x, y = digits()
    for logs in (train(model)[0], model.test_batch(Batch(x, y, None, len(x))), model.evaluate(x, y)):
        assert list(logs) == ["loss", "accuracy", "mse"] == list(model.metrics_names)
        assert {type(value) for value in logs.values()} == {float}


@pytest.mark.parametrize(
    ("given_names", "keys"),
    [
        (["acc"], ["loss", "acc"]),
        (["accuracy"], ["loss", "accuracy"]),
        ("acc", ["loss", "acc"]),
        (["acc", "acc", "acc"], ["loss", "acc", "acc_2", "acc_3"]),
        (["mse", "mean_squared_error"], ["loss", "mse", "mean_squared_error"]),
        (None, ["loss"]),
    ],
)
def test_log_keys_are_the_names_as_given_and_doubles_are_numbered(given_names, keys):
    assert make(metrics=given_names).metrics_names == keys


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        ("loss", "min"), ("val_loss", "min"), ("acc", "max"), ("val_accuracy", "max"), ("acc_2", "max"),
        ("mse", "min"), ("val_mean_absolute_error_2", "min"), ("sparse_categorical_accuracy", "max"),
        ("lr", None), ("x_2", None),
    ],
)  # fmt: skip
def test_the_direction_of_a_metric_follows_from_its_name(name, direction):
    assert make().direction(name) == direction


def test_dropout_acts_in_training_only():
    model, (x, _) = make(dropout=0.9), digits()
    assert np.array_equal(model.predict(x), model.predict(x))
    logs = [model.train_batch(Batch(x, np.eye(3)[[0] * len(x)], None, len(x)))["loss"] for _ in range(3)]
    assert len(set(logs)) == 3


def test_predictions_do_not_depend_on_the_batch_size_and_own_their_memory():
    model, (x, _) = make(), digits()
    whole = model.predict(x, batch_size=len(x))
    np.testing.assert_allclose(model.predict(x, batch_size=7), whole, atol=1e-6)
    kept = model.predict_batch(Batch(x[:8], None, None, 8))
    before = kept.copy()
    model.predict_batch(Batch(x[8:16], None, None, 8))
    np.testing.assert_array_equal(kept, before)


def test_an_evaluation_between_two_batches_changes_nothing():
    one, other, (x, y) = make(), make(), digits()
    train(one, 3)
    train(other, 3)
    other.evaluate(x, y)
    other.predict(x)
    assert train(one, 3) == train(other, 3)


def test_evaluate_averages_over_samples_and_not_over_batches():
    model, (x, y) = make(dropout=0.0), digits(samples=33)
    assert model.evaluate(x, y, batch_size=32) == pytest.approx(model.evaluate(x, y, batch_size=33), abs=1e-6)
    parts = [
        model.test_batch(Batch(x[:32], y[:32], None, 32)),
        model.test_batch(Batch(x[32:], y[32:], None, 1)),
    ]
    naive = sum(part["loss"] for part in parts) / 2
    assert naive != pytest.approx(
        model.evaluate(x, y)["loss"], abs=1e-6
    )  # the control: means of means differ


def test_sample_weights_scale_the_loss_and_leave_metrics_alone():
    """As in Keras: the weighted sum over the number of samples, not over the sum of weights."""
    model, (x, y) = make(), digits()
    plain = model.evaluate(x, y)
    double = model.evaluate(x, y, sample_weight=np.full(len(x), 2.0))
    assert double["loss"] == pytest.approx(2 * plain["loss"], rel=1e-5)
    assert double["accuracy"] == plain["accuracy"]


def test_a_diverging_model_says_so_in_its_loss_and_not_in_warnings():
    model, (x, y) = make(optimizer="sgd"), digits()
    model.optimizer.lr = 1e30
    losses = [model.train_batch(Batch(x, y, None, len(x)))["loss"] for _ in range(5)]
    assert not np.isfinite(losses[-1])


@given(st.integers(0, 2**32), st.lists(st.integers(1, 9), min_size=1, max_size=3))
@settings(max_examples=25, deadline=None)
def test_weights_that_are_set_are_the_weights_that_are_got(seed, units):
    model = Sequential([Dense(units[0], input_dim=3), *[Dense(unit) for unit in units[1:]]])
    rng = np.random.default_rng(seed)
    given_weights = [rng.standard_normal(weight.shape).astype(np.float32) for weight in model.get_weights()]
    model.set_weights(given_weights)
    for one, other in zip(model.get_weights(), given_weights, strict=True):
        np.testing.assert_array_equal(one, other)


def test_get_weights_gives_copies():
    model = make()
    model.get_weights()[0][...] = 9.0
    assert not np.any(model.get_weights()[0] == 9.0)


def test_weights_of_other_shapes_are_refused_and_nothing_is_changed():
    model = make()
    before = all_bytes(model)
    weights = [np.zeros_like(weight) for weight in model.get_weights()]
    with pytest.raises(ArgumentError, match="arrays: the model has 8"):
        model.set_weights(weights[:-1])
    weights[-1] = np.zeros(5)
    with pytest.raises(ArgumentError, match=r"weights=shape \(5,\): dense_1/bias has shape \(3,\)"):
        model.set_weights(weights)
    assert all_bytes(model) == before


def test_layers_are_numbered_per_model_and_class():
    def names():
        return [
            layer.name for layer in Sequential([Dense(2, input_dim=2), Dense(2), Dense(2), Flatten()]).layers
        ]

    assert names() == names() == ["dense", "dense_1", "dense_2", "flatten"]


def test_a_name_that_the_user_took_is_skipped():
    model = Sequential([Dense(2, name="dense_1"), Dense(2), Dense(2)])
    assert [layer.name for layer in model.layers] == ["dense_1", "dense", "dense_2"]


def test_a_model_without_input_shape_is_built_by_its_data():
    model = Sequential([Dense(4), Dense(3)], seed=1)
    model.compile("sgd", "mse")
    assert not model.built
    model.check_data(np.zeros((5, 2)), np.zeros((5, 3)), None)
    assert model.built
    again = Sequential([Dense(4), Dense(3)], seed=1)
    again.build((None, 2))
    assert [weight.tobytes() for weight in again.get_weights()] == [w.tobytes() for w in model.get_weights()]


def test_a_shape_that_a_layer_cannot_take_leaves_the_model_as_it_was():
    model = Sequential([Dense(4), BatchNormalization()], seed=1)
    with pytest.raises(ArgumentError, match="at least one axis"):
        model.build((None,))
    assert not model.built
    model.build((None, 2))
    with pytest.raises(ArgumentError, match=r"built for \(2,\) already"):
        model.build((None, 3))
    with pytest.raises(ArgumentError, match="at least one axis"):
        Sequential().add(Dense(3, input_shape=()))


def test_layers_may_be_added_to_a_model_that_has_trained():
    model = Sequential([Dense(3, input_dim=8)], seed=1)
    model.compile("adam", "mse")
    x, y = digits()
    model.train_batch(Batch(x, y, None, len(x)))
    kernel = model.get_weights()[0]
    model.add(Activation("softmax"))
    np.testing.assert_array_equal(model.get_weights()[0], kernel)
    model.train_batch(Batch(x, y, None, len(x)))
    np.testing.assert_allclose(model.predict(x).sum(axis=1), 1.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Dense, r"Write Dense\(\.\.\.\)"),
        (object(), "must be a layer"),
        (Embedding(3, 2), "must be the first layer"),
        (Dense(3, name="mine"), "is the name of another layer"),
    ],
)
def test_what_cannot_be_added_is_refused(layer, message):
    model = Sequential([Dense(2, input_dim=2, name="mine")])
    with pytest.raises(ArgumentError, match=message):
        model.add(layer)
    assert len(model.layers) == 1


@pytest.mark.parametrize("layer", [Dense(2, input_dim=2), Dense(2)], ids=["built", "not built"])
def test_a_layer_belongs_to_one_model(layer):
    Sequential([layer])
    with pytest.raises(ArgumentError, match="part of a model already"):
        Sequential([layer])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer": "adm", "loss": "mse"}, 'Did you mean "adam"'),
        (
            {"optimizer": "adam", "loss": "categorical_crossentropi"},
            'Did you mean "categorical_crossentropy"',
        ),
        ({"optimizer": "adam", "loss": "mse", "metrics": ["acuracy"]}, 'Did you mean "accuracy"'),
        ({"optimizer": "adam"}, "a loss is needed"),
    ],
)
def test_unknown_names_in_compile_suggest_the_nearest(arguments, message):
    model = Sequential([Dense(2, input_dim=2)])
    with pytest.raises(ArgumentError, match=message):
        model.compile(**arguments)
    assert model.optimizer is None


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Dense(10, activation="rleu"), 'Did you mean "relu"'),
        (lambda: Dense(10, kernel_initializer="glorot"), "glorot_uniform"),
        (lambda: Dense(0), "positive whole number"),
        (lambda: Dense(2.5), "positive whole number"),
        (lambda: Dropout(1.0), "less than 1"),
        (lambda: Dropout("half"), "less than 1"),
        (lambda: Dropout(0.5, seed=-3), "not negative"),
        (lambda: BatchNormalization(epsilon=0), "must be positive"),
        (lambda: Dense(3, name="a/b"), "without a slash"),
        (lambda: Sequential(name="a/b"), "without a slash"),
        (lambda: Sequential(dtype="float16"), "float32"),
        (lambda: Sequential(seed=-1), "not negative"),
        (lambda: Dense(3, input_shape=(0,)), "positive whole numbers"),
        (lambda: BatchNormalization(momentum=2), "between 0 and 1"),
    ],
)
def test_bad_settings_are_refused_where_they_are_written(build, message):
    with pytest.raises(ArgumentError, match=message):
        build()


def test_an_uncompiled_model_says_what_to_write():
    model = Sequential([Dense(2, input_dim=2)])
    for call in (
        lambda: model.train_batch(Batch(np.zeros((1, 2)), np.zeros((1, 2)), None, 1)),
        lambda: model.evaluate(np.zeros((1, 2)), np.zeros((1, 2))),
        lambda: model.check_ready(training=True),
    ):
        with pytest.raises(ArgumentError, match=r"is not compiled.*model\.compile\("):
            call()
    model.check_ready(training=False)
    assert model.predict(np.zeros((1, 2))).shape == (1, 2)


def test_an_empty_model_says_what_to_write():
    with pytest.raises(ArgumentError, match="has no layers"):
        Sequential().predict(np.zeros((1, 2)))


def test_a_pickled_model_trains_on_as_the_original():
    """Weights, slots, iterations and the dropout stream travel; live buffers do not."""
    model = make()
    train(model)
    copy = pickle.loads(pickle.dumps(model))
    assert train(copy) == train(model)
    assert all_bytes(copy) == all_bytes(model)


def test_a_model_that_is_not_built_yet_pickles_with_its_compile():
    model = Sequential([Dense(2)], seed=1)
    model.compile("adam", "mse", ["mae"])
    copy = pickle.loads(pickle.dumps(model))
    assert copy.metrics_names == ["loss", "mae"]
    assert copy.optimizer.name == "adam"


def test_a_config_gives_the_same_architecture_back():
    model = make()
    again = Sequential.from_config(model.get_config())
    assert again.get_config() == model.get_config()
    assert [w.tobytes() for w in again.get_weights()] == [
        w.tobytes() for w in model.get_weights()
    ]  # same seed


@pytest.mark.parametrize(
    "entry",
    [
        {"class_name": "Lambda", "config": {"function": "__import__('os').system('true')"}},
        {"class_name": "Dense", "config": {"units": 3, "surprise": 1}},
        {"class_name": "Dense", "config": {}},
    ],
)
def test_a_config_with_anything_unknown_is_refused(entry):
    config = {"class_name": "Sequential", "config": {"name": "s", "layers": [entry]}}
    with pytest.raises(ArgumentError):
        Sequential.from_config(config)


def test_the_summary_counts_parameters_line_by_line():
    lines = []
    make().summary(print_fn=lines.append)
    assert any("dense (Dense)" in line and "(None, 6)" in line and line.endswith("54") for line in lines)
    assert lines[-1] == "Parameters: 99, trainable: 87"


# -- the busy rule
# --------------------------------------------------------------------------------------------------

X, Y = digits()
VERBS = {
    "predict": lambda model, path: model.predict(X),
    "evaluate": lambda model, path: model.evaluate(X, Y),
    "get_weights": lambda model, path: model.get_weights(),
    "set_weights": lambda model, path: model.set_weights([weight.numpy() for weight in model.weights]),
    "save": lambda model, path: model.save(path / "a.h5"),
    "save_weights": lambda model, path: model.save_weights(path / "b.h5"),
    "load_weights": lambda model, path: model.load_weights(path / "w.h5"),
    "compile": lambda model, path: model.compile("adam", "categorical_crossentropy"),
    "add": lambda model, path: model.add(Activation("softmax")),
    "capture": lambda model, path: model.capture(),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_model_in_training_refuses_other_threads_and_serves_its_own(verb, tmp_path):
    model = make()
    model.save_weights(tmp_path / "w.h5")
    outcome = []

    def elsewhere():
        with pytest.raises(ModelBusy, match=rf"model\.{verb}.*run\.snapshot\(\).*snapshot\.to_model\(\)"):
            VERBS[verb](model, tmp_path)
        outcome.append("refused")

    model.training_thread = threading.get_ident()
    VERBS[verb](model, tmp_path)
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    model.training_thread = None
    VERBS[verb](model, tmp_path)
    assert outcome == ["refused"]
