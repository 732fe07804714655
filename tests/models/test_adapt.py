from __future__ import annotations

import numpy as np
import pytest

from asynccb.errors import ArgumentError
from asynccb.models import Dense, Sequential, adapt
from asynccb.models.adapt import BareModel
from asynccb.protocols import Batch, Model

BATCH = Batch([1.0], [2.0], None, 1)


class Bare:
    def __init__(self):
        self.calls = []

    def train_batch(self, batch):
        self.calls.append(("train", batch))
        return {"loss": 1.0}


class Gated(Bare):
    def train_batch(self, batch, before_update=None):
        self.calls.append("forward")
        if before_update is not None:
            before_update()
        self.calls.append("update")
        return {"loss": 1.0}


class Full(Bare):
    metrics_names = ("loss", "score")

    def test_batch(self, batch):
        return {"loss": 2.0}

    def predict_batch(self, batch):
        return "outputs"

    def capture(self):
        return "state"

    def direction(self, metric):
        return "max" if metric == "score" else None

    def check_data(self, x, y, sample_weight, *, name="x", training=True):
        self.calls.append((x, y, sample_weight, name, training))

    def check_ready(self, *, training):
        self.calls.append(training)


def test_a_sequential_is_taken_as_it_is():
    model = Sequential([Dense(1, input_dim=1)])
    assert adapt(model) is model


def test_the_smallest_model_is_an_object_with_train_batch():
    bare = Bare()
    model = adapt(bare)
    assert isinstance(model, Model)
    assert model.user_model is bare
    assert model.train_batch(BATCH) == {"loss": 1.0}
    assert bare.calls == [("train", BATCH)]
    assert tuple(model.metrics_names) == ()
    assert (model.direction("val_loss"), model.direction("acc")) == ("min", None)
    model.check_data(None, None, None)
    model.check_ready(training=True)
    assert [model.has_test, model.has_predict, model.has_capture] == [False] * 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda model: model.test_batch(BATCH),
            r"test_batch is needed to validate and to evaluate. Add test_batch\(",
        ),
        (
            lambda model: model.predict_batch(BATCH),
            r"predict_batch is needed to predict. Add predict_batch\(",
        ),
        (lambda model: model.capture(), r"capture is needed for snapshots and checkpoints. Add capture\("),
    ],
)
def test_what_a_bare_model_lacks_is_named_when_it_is_asked_for(call, message):
    with pytest.raises(ArgumentError, match=message):
        call(adapt(Bare()))


def test_a_model_that_can_be_gated_gets_the_gate_at_its_update():
    gated = Gated()
    adapt(gated).train_batch(BATCH, before_update=lambda: gated.calls.append("gate"))
    assert gated.calls == ["forward", "gate", "update"]


def test_a_model_that_cannot_be_gated_is_gated_as_a_whole():
    """Without this its parameters would be overwritten while somebody still copies them."""
    bare = Bare()
    adapt(bare).train_batch(BATCH, before_update=lambda: bare.calls.append("gate"))
    assert bare.calls == ["gate", ("train", BATCH)]


def test_all_that_the_object_has_is_used():
    full = Full()
    model = adapt(full)
    assert model.metrics_names == ("loss", "score")
    assert model.test_batch(BATCH) == {"loss": 2.0}
    assert model.predict_batch(BATCH) == "outputs"
    assert model.capture() == "state"
    assert model.direction("score") == "max"
    model.check_ready(training=False)
    model.check_data(1, 2, 3, name="validation_data", training=False)
    assert full.calls == [False, (1, 2, 3, "validation_data", False)]


@pytest.mark.parametrize("name", ["begin_pass", "check_path", "end_epoch", "end_training"])
def test_what_an_object_may_say_beyond_the_rest_is_asked_of_it(name):
    bare = Bare()
    assert not hasattr(adapt(bare), name)
    setattr(bare, name, lambda: "its own")
    assert getattr(adapt(bare), name)() == "its own"


def test_a_function_and_a_module_of_jax_are_told_what_trains_them():
    module = type("Module", (), {"__module__": "equinox._module"})()
    for model in (lambda state, batch: state, module):
        with pytest.raises(ArgumentError, match=r"A step in JAX trains as JaxModel\(step, state\)"):
            adapt(model)


def test_a_class_is_refused_with_the_call_to_write():
    with pytest.raises(ArgumentError, match=r"is a class, not an instance. Write Bare\(\.\.\.\)"):
        adapt(Bare)


@pytest.mark.parametrize("thing", [None, 3, "model", object(), [Dense(1)]])
def test_what_cannot_train_is_refused_with_what_a_model_is(thing):
    with pytest.raises(ArgumentError, match="a model is a Sequential, or any object with train_batch"):
        adapt(thing)


@pytest.mark.parametrize("by_keyword", [False, True])
def test_a_full_model_whose_batches_take_no_gate_by_position_is_gated_as_a_whole(by_keyword):
    """A subclass that overrides ``train_batch(batch)``, or takes the gate by keyword alone."""
    asked = []

    class Plain(Sequential):
        def train_batch(self, batch):
            asked.append("trains")
            return super().train_batch(batch)

    class Keyword(Sequential):
        def train_batch(self, batch, *, before_update=None):
            asked.append("trains")
            before_update()
            return super().train_batch(batch)

    model = (Keyword if by_keyword else Plain)([Dense(2, input_dim=3)], seed=1)
    model.compile("sgd", "mse")
    adapted = adapt(model)
    assert adapted is not model
    assert adapted.user_model is model
    batch = Batch(np.ones((4, 3), "float32"), np.ones((4, 2), "float32"), None, 4)

    class Gate:
        copying = False

        def __call__(self, segments=None):
            asked.append("asks")

    adapted.train_batch(batch, Gate())
    assert asked == (["trains", "asks"] if by_keyword else ["asks", "trains"])


def test_an_adapter_that_has_no_live_drives_its_users_model_as_before():
    class Adapter:
        user_model = object()
        metrics_names = ("loss",)

        def check_ready(self, *, training): ...
        def check_data(self, x, y, sample_weight, *, name="x", training=True): ...
        def direction(self, metric): ...
        def train_batch(self, batch, before_update=None): ...
        def test_batch(self, batch): ...
        def predict_batch(self, batch): ...
        def capture(self): ...

    given = Adapter()
    assert adapt(given) is given


MEMBERS = [name for name in vars(Model) if not name.startswith("_")]


def without(name):
    """A full model but for one member: of its class, or of this instance."""
    kind = type("Lacks", (), {member: lambda self, *_, **__: None for member in MEMBERS if member != name})
    kind.train_batch = lambda self, batch, before_update=None: {}
    return kind


def test_a_model_is_full_exactly_if_it_has_every_member_of_the_protocol():
    assert len(MEMBERS) == 9
    for name in MEMBERS:
        if name != "train_batch":
            assert isinstance(adapt(without(name)()), BareModel), name
    whole = without("")()
    assert adapt(whole) is whole
    by_instance = without("user_model")()
    by_instance.user_model = by_instance
    assert adapt(by_instance) is by_instance
    taken_back = without("")()
    taken_back.capture = None
    assert isinstance(adapt(taken_back), BareModel) is not isinstance(taken_back, Model)


def test_a_class_whose_train_batch_is_replaced_is_read_again():
    kind = without("")
    assert adapt(one := kind()) is one
    kind.train_batch = lambda self, batch: {}
    assert isinstance(adapt(kind()), BareModel)
