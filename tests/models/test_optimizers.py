"""Every optimizer against its formula, written out one number at a time in Python floats."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asynccb.errors import ArgumentError
from asynccb.models import SGD, Adagrad, Adam, AdamW, Dense, RMSprop, Sequential, optimizers, updates
from asynccb.protocols import Batch


def sgd(lr=0.01, momentum=0.0, nesterov=False):
    m = 0.0
    while True:
        p, g = yield
        m = momentum * m - lr * g
        yield p + (momentum * m - lr * g if nesterov else m)


def rmsprop(lr=0.001, rho=0.9, momentum=0.0, epsilon=1e-7, centered=False):
    v = mean = m = 0.0
    while True:
        p, g = yield
        v = rho * v + (1 - rho) * g * g
        mean = rho * mean + (1 - rho) * g
        step = lr * g / math.sqrt((v - mean * mean if centered else v) + epsilon)
        m = momentum * m + step
        yield p - m


def adagrad(lr=0.001, start=0.1, epsilon=1e-7):
    s = start
    while True:
        p, g = yield
        s += g * g
        yield p - lr * g / math.sqrt(s + epsilon)


def adam(lr=0.001, b1=0.9, b2=0.999, epsilon=1e-7, decay=0.0):
    m = v = 0.0
    t = 0
    while True:
        p, g = yield
        t += 1
        p -= lr * decay * p
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        rate = lr * math.sqrt(1 - b2**t) / (1 - b1**t)
        yield p - rate * m / (math.sqrt(v) + epsilon)


CASES = [
    (lambda: SGD(), lambda: sgd()),
    (lambda: SGD(0.1, momentum=0.9), lambda: sgd(0.1, 0.9)),
    (lambda: SGD(0.1, momentum=0.9, nesterov=True), lambda: sgd(0.1, 0.9, nesterov=True)),
    (lambda: RMSprop(), lambda: rmsprop()),
    (lambda: RMSprop(0.01, rho=0.8, momentum=0.5), lambda: rmsprop(0.01, 0.8, 0.5)),
    (lambda: RMSprop(0.01, centered=True), lambda: rmsprop(0.01, centered=True)),
    (lambda: Adagrad(0.05), lambda: adagrad(0.05)),
    (lambda: Adam(), lambda: adam()),
    (lambda: Adam(0.1, beta_1=0.5, beta_2=0.9), lambda: adam(0.1, 0.5, 0.9)),
    (lambda: AdamW(0.1, weight_decay=0.3), lambda: adam(0.1, decay=0.3)),
]


@pytest.mark.parametrize(("make", "formula"), CASES)
def test_updates_follow_the_formula_number_by_number(make, formula):
    optimizer, rng = make(), np.random.default_rng(4)
    params, grads = rng.standard_normal(6), np.empty(6)
    optimizer.build(params, grads)
    golden = [formula() for _ in params]
    expected = params.tolist()
    for _ in range(12):
        grads[:] = rng.standard_normal(6)
        optimizer.update()
        for index, one in enumerate(golden):
            next(one)
            expected[index] = one.send((expected[index], grads[index]))
        np.testing.assert_allclose(params, expected, rtol=1e-12)
    assert optimizer.iterations == 12


@pytest.mark.parametrize(("make", "formula"), CASES)
def test_an_update_allocates_no_array(make, formula):
    """Equal addresses before and after: parameters and slots are overwritten in place."""
    optimizer, params = make(), np.ones(64, np.float32)
    optimizer.build(params, np.full(64, 0.5, np.float32))
    slots = {name: slot.ctypes.data for name, slot in optimizer.slots.items()}
    optimizer.update()
    assert {name: slot.ctypes.data for name, slot in optimizer.slots.items()} == slots
    assert all(slot.dtype == np.float32 for slot in optimizer.slots.values())


def updated(optimizer, size, block, dtype, monkeypatch):
    """Parameters and slots after three updates in blocks of so many numbers."""
    rng = np.random.default_rng(size)
    params, grads = rng.standard_normal(size).astype(dtype), np.empty(size, dtype)
    with monkeypatch.context() as patch:
        patch.setattr(updates, "BLOCK", block * params.itemsize)
        optimizer.build(params, grads)
    for _ in range(3):
        grads[:] = rng.standard_normal(size)
        optimizer.update()
    return [array.tobytes() for array in (params, *optimizer.slots.values())], optimizer


@given(
    case=st.integers(0, len(CASES) - 1),
    size=st.integers(1, 400),
    block=st.integers(1, 50),
    dtype=st.sampled_from([np.float32, np.float64]),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_an_update_in_blocks_is_the_whole_one_to_the_byte(case, size, block, dtype, monkeypatch):
    make, _ = CASES[case]
    whole, one = updated(make(), size, size, dtype, monkeypatch)
    in_blocks, many = updated(make(), size, block, dtype, monkeypatch)
    assert in_blocks == whole
    assert [len(group) for group in one._blocks] == [1]
    assert sum(len(group) for group in many._blocks) == (1 if size <= 2 * block else -(-size // block))


def test_scratch_memory_is_that_of_one_block(monkeypatch):
    monkeypatch.setattr(updates, "BLOCK", 400)
    optimizer, params = Adam(), np.zeros(10_000, np.float32)
    optimizer.build(params, params.copy())
    scratch = {block[2].ctypes.data: block[2].nbytes for group in optimizer._blocks for block in group}
    assert list(scratch.values()) == [400]


def test_groups_cover_the_parameters_in_order():
    optimizer, params = Adam(), np.zeros(3_000_000, np.float32)
    optimizer.build(params, params)
    starts, stops = zip(*optimizer.groups, strict=True)
    assert (starts[0], *stops) == (*starts, len(params))
    assert all(2 << 20 < 12 * (stop - start) <= 4 << 20 for start, stop in optimizer.groups[:-1])


@pytest.mark.parametrize("name", ["sgd", "rmsprop", "adagrad", "adam", "adamw", "SGD", "RMSprop", "Adam"])
def test_names_give_optimizers_with_their_defaults(name):
    optimizer = optimizers.get(name)
    assert optimizer.name == name.lower()
    assert optimizer.lr == (0.01 if name.lower() == "sgd" else 0.001)


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(ArgumentError, match=r"optimizer='adm'.*Did you mean \"adam\""):
        optimizers.get("adm")


def test_a_class_is_refused_with_the_call_to_write():
    with pytest.raises(ArgumentError, match=r"Write Adam\(\)"):
        optimizers.get(Adam)


def test_lr_and_learning_rate_are_one_settable_python_float():
    optimizer = Adam(np.float32(0.5))
    optimizer.lr = np.float32(0.25)
    assert optimizer.learning_rate == 0.25
    optimizer.learning_rate = 1
    assert type(optimizer.lr) is float
    assert optimizer.lr == 1.0


@pytest.mark.parametrize(("make", "formula"), CASES)
def test_a_config_gives_the_same_optimizer_back(make, formula):
    optimizer = make()
    again = optimizers.from_config(optimizers.to_config(optimizer))
    assert type(again) is type(optimizer)
    assert again.get_config() == optimizer.get_config()


def test_settings_of_keras_that_change_the_training_are_refused():
    config = {"class_name": "Adam", "config": {"learning_rate": 0.1, "clipnorm": 1.0}}
    with pytest.raises(ArgumentError, match="clipnorm"):
        optimizers.from_config(config)
    config["config"]["clipnorm"] = None
    assert optimizers.from_config(config).lr == 0.1


def test_one_optimizer_serves_one_model():
    """Its slots belong to the weights of that model; shared, two trainings would mix their moments."""
    optimizer = Adam()
    first, second = (Sequential([Dense(2, input_dim=2)]) for _ in range(2))
    first.compile(optimizer, "mse")
    with pytest.raises(ArgumentError, match="serves another model"):
        second.compile(optimizer, "mse")
    first.compile(optimizer, "mae")


def test_compiling_anew_with_the_same_optimizer_keeps_its_slots():
    model = Sequential([Dense(2, input_dim=2)], seed=1)
    optimizer = Adam()
    model.compile(optimizer, "mse")
    model.train_batch(Batch(np.ones((3, 2)), np.zeros((3, 2)), None, 3))
    moments = optimizer.slots["momentum"].copy()
    model.compile(optimizer, "mae")
    model.check_data(np.ones((3, 2)), np.zeros((3, 2)), None)
    assert np.any(moments)
    np.testing.assert_array_equal(optimizer.slots["momentum"], moments)


def test_a_pickled_optimizer_owns_its_slots():
    optimizer = Adam()
    optimizer.build(np.zeros(4), np.ones(4))
    optimizer.update()
    copy = pickle.loads(pickle.dumps(optimizer))
    optimizer.update()
    assert copy.iterations == 1
    assert not np.array_equal(copy.slots["momentum"], optimizer.slots["momentum"])


@pytest.mark.parametrize("settings", [{"momentum": 1.5}, {"momentum": -0.1}])
def test_fractions_out_of_range_are_refused(settings):
    with pytest.raises(ArgumentError, match="between 0 and 1"):
        SGD(**settings)


def test_slots_are_shown_and_cannot_be_written_to():
    """Whoever wrote to them would tear the copy of the model that may be under way."""
    model = Sequential([Dense(2, input_dim=3)], seed=1)
    model.compile("adam", "mse")
    model.train_batch(Batch(np.ones((4, 3), "float32"), np.ones((4, 2), "float32"), None, 4))
    slots = model.optimizer.slots
    assert list(slots) == ["momentum", "velocity"]
    assert all(np.any(slot) for slot in slots.values())
    with pytest.raises(ValueError, match="read-only"):
        slots["momentum"].fill(0)
