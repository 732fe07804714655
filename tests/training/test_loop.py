"""The story of a training, told to a host that is a list: which events, in which order, with which logs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asynccb import Callback, Trainer
from asynccb.bus.dispatch import Emit
from asynccb.errors import ArgumentError
from asynccb.models.adapt import BareModel
from asynccb.protocols import Place, Unread
from asynccb.testing import ScriptedModel
from asynccb.training.feed import ArrayFeed, IterableFeed
from asynccb.training.loop import NO_EPOCH, Plan, add_metrics, as_number, evaluate, predict, train

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from asynccb.protocols import Batch

KINDS = [kind for kind in Emit._fields if kind not in ("logs", "late")]
BATCHES = [kind for kind in KINDS if "batch" in kind]


class ListHost:
    """The world as the loop knows it: a list of what it was told.

    Args:
        unwanted: the batch events that nobody wants.
        stop: asked, with what was told so far, whether to end here.
    """

    def __init__(
        self,
        unwanted: Collection[str] = (),
        stop: Callable[[list[tuple[Any, ...]]], bool] = lambda told: False,
        before_update: Any = None,
    ) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.looked: list[tuple[Any, ...]] = []
        self.places: list[tuple[Place | None, int, bool]] = []
        self.epoch = self.step = 0
        self.logs: Any = {}
        self.before_update = before_update
        self.broken = False
        self._stop = stop
        emitters: Any = {kind: None if kind in unwanted else self._emitter(kind) for kind in KINDS}
        self.emit: Any = Emit(logs=dict, late=False, **emitters)

    def _emitter(self, kind: str) -> Callable[..., None]:
        def emit(*fields: Any) -> None:
            # Copied, because a hook or the loop may add to them afterwards.
            self.told.append((kind, *(dict(f) if isinstance(f, dict) else f for f in fields)))

        return emit

    def skip(self) -> None:
        self.told.append(("skip",))

    def next(self, source: Any) -> Batch | None:
        batch: Batch | None = source.next()
        return batch

    def enter(self, place: Place | None, *, last: bool = False) -> None:
        self.places.append((place, self.step, last))

    def safe_point(self) -> None:
        self.told.append(("safe point",))

    def stopped(self) -> bool:
        self.looked.append(self.told[-1] if self.told else ())
        return self._stop(self.told)

    def broke_inside(self) -> None:
        self.broken = True

    @property
    def story(self) -> list[tuple[Any, ...]]:
        """What callbacks would see of it."""
        return [event for event in self.told if event[0] not in ("safe point", "skip")]

    @property
    def kinds(self) -> list[str]:
        return [event[0] for event in self.story]


def feed(samples: int = 5, batch_size: int = 2) -> ArrayFeed:
    x = np.arange(float(samples)).reshape(-1, 1)
    return ArrayFeed(x, None, None, batch_size=batch_size)


def plan(source: Any = None, validation: Any = None, **given: Any) -> Plan:
    first = Place(given.pop("initial_epoch", 0))
    asked: dict[str, Any] = {"epochs": 1, "start": first, "validate_after": range(1000)} | given
    return Plan(feed() if source is None else source, validation, **asked)


def model(*losses: float, **more: Any) -> BareModel:
    return BareModel(ScriptedModel(losses or (1.0,), **more))


class CountingModel:
    """Its loss tells which batch it saw."""

    def train_batch(self, batch: Batch, before_update: Any = None) -> dict[str, float]:
        return {"loss": float(np.sum(batch.x))}

    test_batch = train_batch


def after(kind: str, index: int, epoch: int = 0) -> Callable[[list[tuple[Any, ...]]], bool]:
    """A stop that somebody asks for in this event."""

    def stop(told: list[tuple[Any, ...]]) -> bool:
        if "epoch" in kind:
            return any(event[:2] == (kind, index) for event in told)
        return any(event[0] == kind and event[1] == index and event[3] == epoch for event in told)

    return stop


class CuttingHost(ListHost):
    """Notes every place from which a resumed training would go on, and how much of the story was told."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.cuts: list[tuple[Place, int, int]] = []
        self._place: Place | None = None
        self._counted = 0

    def enter(self, place: Place | None, *, last: bool = False) -> None:
        super().enter(place, last=last)
        self._place, self._counted = place, self.step
        self._cut()

    def safe_point(self) -> None:
        super().safe_point()
        self._cut()

    def _cut(self) -> None:
        place = self._place
        if place is not None and place.phase == "batches":
            place = place._replace(batch=place.batch + self.step - self._counted)
        if place is not None:
            self.cuts.append((place, self.step, len(self.story)))


# ---------------------------------------------------------------- the whole story


def test_five_samples_in_batches_of_two_with_a_validation_are_exactly_these_events() -> None:
    host = ListHost()
    assert train(model(3.0, 2.0, 1.0), plan(validation=feed(3)), host)
    assert host.story == [
        ("epoch_begin", 0, {}, 0),
        ("batch_begin", 0, {"batch": 0, "size": 2}, 0, 0),
        ("batch_end", 0, {"batch": 0, "size": 2, "loss": 3.0}, 0, 1),
        ("batch_begin", 1, {"batch": 1, "size": 2}, 0, 1),
        ("batch_end", 1, {"batch": 1, "size": 2, "loss": 2.0}, 0, 2),
        ("batch_begin", 2, {"batch": 2, "size": 1}, 0, 2),
        ("batch_end", 2, {"batch": 2, "size": 1, "loss": 1.0}, 0, 3),
        ("test_begin", 3, {}),
        ("test_batch_begin", 0, {"batch": 0, "size": 2}, 0, 3),
        ("test_batch_end", 0, {"batch": 0, "size": 2, "loss": 3.0}, 0, 3),
        ("test_batch_begin", 1, {"batch": 1, "size": 1}, 0, 3),
        ("test_batch_end", 1, {"batch": 1, "size": 1, "loss": 3.0}, 0, 3),
        ("test_end", 3, {"loss": 3.0}),
        ("epoch_end", 0, {"val_loss": 3.0}, 3),
    ]


def test_the_keys_of_logs_have_their_order() -> None:
    host = ListHost()
    train(model(), plan(validation=feed(1)), host)
    keys = {event[0]: list(event[2]) for event in host.story if isinstance(event[2], dict)}
    assert keys["batch_end"] == ["batch", "size", "loss"]
    assert keys["test_end"] == ["loss"]


def test_what_an_inline_hook_adds_to_the_logs_of_an_epoch_is_in_the_logs_of_the_run() -> None:
    host = ListHost()
    host.emit = host.emit._replace(epoch_end=lambda epoch, logs, step: logs.update(lr=0.1))
    train(model(), plan(), host)
    assert host.logs == {"lr": 0.1}


def test_each_event_of_an_epoch_and_of_a_batch_has_logs_of_its_own() -> None:
    host = ListHost()
    seen: list[Any] = []
    keep: Any = lambda *fields: seen.append(next(f for f in fields if isinstance(f, dict)))  # noqa: E731
    host.emit = Emit(logs=dict, late=False, **dict.fromkeys(KINDS, keep))
    train(model(), plan(epochs=2, validation=feed(2)), host)
    assert len({id(logs) for logs in seen}) == len(seen)


def test_no_epochs_to_train_is_no_event_and_a_whole_training() -> None:
    host = ListHost()
    assert train(model(), plan(epochs=3, initial_epoch=3), host)
    assert host.told == []


def test_epochs_is_the_index_of_the_end_and_epochs_are_counted_from_nought() -> None:
    host = ListHost()
    assert train(model(), plan(epochs=5, initial_epoch=3), host)
    assert [event[1] for event in host.story if event[0] == "epoch_begin"] == [3, 4]
    assert [event[1] for event in host.story if event[0] == "epoch_end"] == [3, 4]
    assert (host.epoch, host.step) == (4, 6)


def test_validation_follows_the_epochs_that_are_asked_for() -> None:
    host = ListHost()
    train(model(), plan(epochs=4, validation=feed(1), validate_after={1, 3}), host)
    ends = {event[1]: list(event[2]) for event in host.story if event[0] == "epoch_end"}
    assert ends == {0: [], 1: ["val_loss"], 2: [], 3: ["val_loss"]}


# ---------------------------------------------------------------- what nobody wants


@pytest.mark.parametrize("unwanted", BATCHES)
def test_an_event_that_nobody_wants_takes_its_number_and_the_story_goes_on(unwanted: str) -> None:
    def tell(host: ListHost) -> list[str]:
        if unwanted.startswith("predict"):
            predict(model(), feed(), host)
        else:
            train(model(), plan(validation=feed(3)), host)
        return [event[0] for event in host.told]

    wanted, without = tell(ListHost()), tell(ListHost(unwanted=[unwanted]))
    assert without == ["skip" if kind == unwanted else kind for kind in wanted]
    assert "skip" in without


def test_the_means_of_a_validation_do_not_need_anybody_who_listens() -> None:
    host = ListHost(unwanted=BATCHES)
    train(model(), plan(validation=feed(3)), host)
    assert host.story[-1] == ("epoch_end", 0, {"val_loss": 3.0}, 3)


def test_a_table_that_changes_between_two_batches_is_used_from_the_next_event_on() -> None:
    host = ListHost(unwanted=["batch_begin", "batch_end"])
    full = ListHost()
    host_safe_point = host.safe_point

    def joins() -> None:
        host_safe_point()
        host.emit = full.emit

    host.safe_point = joins  # type: ignore[method-assign]
    train(model(), plan(), host)
    assert [event[:2] for event in full.story] == [
        ("batch_begin", 1),
        ("batch_end", 1),
        ("batch_begin", 2),
        ("batch_end", 2),
        ("epoch_end", 0),
    ]


# ---------------------------------------------------------------- stops


def test_a_stop_after_a_batch_leaves_the_epoch_at_once_and_still_ends_it() -> None:
    host = ListHost(stop=after("batch_end", 1))
    assert not train(model(1.0, 2.0, 3.0), plan(epochs=3, validation=feed()), host)
    assert [event[:2] for event in host.story] == [
        ("epoch_begin", 0),
        ("batch_begin", 0),
        ("batch_end", 0),
        ("batch_begin", 1),
        ("batch_end", 1),
        ("epoch_end", 0),
    ]


def test_a_stop_in_the_last_batch_skips_the_validation_too() -> None:
    host = ListHost(stop=after("batch_end", 2))
    assert not train(model(), plan(validation=feed()), host)
    assert "test_begin" not in host.kinds
    assert host.story[-1] == ("epoch_end", 0, {}, 3)


def test_a_stop_in_an_epoch_end_begins_no_other_epoch() -> None:
    host = ListHost(stop=after("epoch_end", 0))
    assert not train(model(), plan(epochs=3), host)
    assert [event[1] for event in host.story if event[0].startswith("epoch")] == [0, 0]


def test_a_stop_in_the_last_epoch_end_comes_too_late_to_be_one() -> None:
    host = ListHost(stop=after("epoch_end", 0))
    assert train(model(), plan(epochs=1), host)


def test_a_stop_before_the_first_epoch_is_no_event() -> None:
    host = ListHost(stop=lambda told: True)
    assert not train(model(), plan(), host)
    assert host.told == []


@pytest.mark.parametrize("kind", ["epoch_begin", "batch_begin"])
def test_a_stop_in_a_begin_waits_for_the_batch_that_it_begins(kind: str) -> None:
    host = ListHost(stop=after(kind, 0))
    assert not train(model(), plan(epochs=2), host)
    assert [event[:2] for event in host.story] == [
        ("epoch_begin", 0),
        ("batch_begin", 0),
        ("batch_end", 0),
        ("epoch_end", 0),
    ]


def test_a_stop_is_looked_for_after_batches_and_before_epochs_never_between() -> None:
    host = ListHost()
    train(model(), plan(epochs=2), host)
    assert {looked[0] for looked in host.looked if looked} == {"safe point", "epoch_end"}


def test_after_every_batch_comes_a_safe_point_and_nothing_comes_between_them() -> None:
    host = ListHost()
    train(model(), plan(epochs=2, validation=feed()), host)
    for at, event in enumerate(host.told):
        assert (event[0] == "safe point") == (host.told[at - 1][0] in ("batch_end", "test_batch_end"))


def test_a_stop_in_a_validation_ends_it_and_the_epoch_has_no_values_of_it() -> None:
    host = ListHost(stop=after("test_batch_end", 0))
    assert not train(model(), plan(epochs=2, validation=feed(6)), host)
    assert [event[0] for event in host.story[-4:]] == [
        "test_batch_begin",
        "test_batch_end",
        "test_end",
        "epoch_end",
    ]
    assert host.story[-1] == ("epoch_end", 0, {}, 3)


class CountsEpochs(CountingModel):
    """It changes behind each epoch."""

    def __init__(self) -> None:
        self.host: ListHost | None = None
        self.ended_at: list[tuple[str, Any]] = []

    def end_epoch(self) -> None:
        assert self.host is not None
        self.ended_at.append((self.host.kinds[-1], self.host.places[-1][0]))


def test_a_model_hears_of_the_end_of_an_epoch_behind_its_hooks_and_before_the_next_place() -> None:
    """A place before it would be gone on from as if the model had not changed, or had changed twice."""
    model = CountsEpochs()
    model.host = host = ListHost()
    train(model, plan(epochs=2), host)  # type: ignore[arg-type]
    assert model.ended_at == [("epoch_end", None)] * 2


def test_a_model_does_not_hear_of_an_epoch_that_a_stop_has_cut_short() -> None:
    model = CountsEpochs()
    model.host = host = ListHost(stop=lambda told: ("safe point",) in told)
    train(model, plan(epochs=2), host)  # type: ignore[arg-type]
    assert host.kinds[-1] == "epoch_end"
    assert model.ended_at == []


def test_an_epoch_without_a_trained_batch_has_no_end() -> None:
    """A stop that ends the wait for the first batch."""
    host = ListHost(stop=after("epoch_begin", 0))
    host.next = lambda source: None  # type: ignore[method-assign]
    assert not train(model(), plan(), host)
    assert host.kinds == ["epoch_begin"]


# ---------------------------------------------------------------- data that ends


def test_data_without_a_batch_is_refused_in_the_first_epoch() -> None:
    host = ListHost()
    with pytest.raises(ArgumentError, match="x=an iterable without batches"):
        train(model(), plan(IterableFeed([], steps=None)), host)
    assert host.kinds == ["epoch_begin"]


def test_data_that_gives_no_batch_later_ends_the_training_with_a_warning() -> None:
    host = ListHost()
    once = iter([np.zeros((2, 1))])
    with pytest.warns(UserWarning, match="gave no batch this epoch"):
        assert not train(model(), plan(IterableFeed(once, steps=None), epochs=3), host)
    assert host.kinds == ["epoch_begin", "batch_begin", "batch_end", "epoch_end", "epoch_begin"]


def test_data_that_runs_out_in_mid_epoch_ends_that_epoch_and_the_training() -> None:
    host = ListHost()
    source = IterableFeed(iter([np.zeros((2, 1))] * 5), steps=3)
    with pytest.warns(UserWarning, match="ran out with 1 batches"):
        assert not train(model(), plan(source, epochs=4), host)
    assert [event[1:3:2] for event in host.story if event[0] == "epoch_end"] == [(0,), (1,)]
    assert host.step == 5


# ---------------------------------------------------------------- the model


class DeviceModel(CountingModel):
    """Says when it begins a batch and when its logs are waited for; the logs of a batch can fail."""

    def __init__(self, host: ListHost, fails: int | None = None) -> None:
        self.host, self.fails, self.trained = host, fails, 0

    def train_batch(self, batch: Batch, before_update: Any = None) -> Unread:
        number, self.trained = self.trained, self.trained + 1
        self.host.told.append(("train", number))

        def read(logs: Mapping[str, Any]) -> dict[str, Any]:
            self.host.told.append(("read", number))
            if number == self.fails:
                raise OSError("the device is lost")
            return {"loss": float(logs["loss"][0])}

        return Unread({"loss": [float(number)]}, read)


@pytest.mark.parametrize("late", [True, False])
def test_logs_that_nobody_wants_yet_are_waited_for_when_the_next_batch_is_under_way(late: bool) -> None:
    host = ListHost()
    host.emit = host.emit._replace(late=late)
    train(BareModel(DeviceModel(host)), plan(), host)
    order = [event for event in host.story if event[0] in ("train", "read", "batch_end")]
    ends = [
        ("batch_end", n, {"batch": n, "size": 2 - n // 2, "loss": loss}, 0, n + 1)
        for n, loss in enumerate([[0.0], [1.0], [2.0]] if late else [0.0, 1.0, 2.0])
    ]
    said = [[("train", n), ("read", n), ends[n]] for n in range(3)]
    if late:
        said = [[("train", 0), ends[0], ("train", 1), ("read", 0), ends[1]], [("train", 2), ("read", 1)]]
        said.append([ends[2], ("read", 2)])
    assert order == [event for part in said for event in part]


@pytest.mark.parametrize("wanted", [True, False])
def test_so_are_those_of_an_evaluation_which_are_its_last_ones(wanted: bool) -> None:
    class Tests(DeviceModel):
        test_batch = DeviceModel.train_batch

        def begin_pass(self) -> None: ...

    host = ListHost(unwanted=[] if wanted else ["test_batch_end"])
    assert evaluate(BareModel(Tests(host)), feed(), host) == {"loss": 2.0}
    order = [event for event in host.told if event[0] in ("train", "read")]
    early = [(what, n) for n in range(3) for what in ("train", "read")]
    late = [*early[::2][:2], early[1], early[4], early[3], early[5]]
    assert order == (early if wanted else late)


@pytest.mark.parametrize("fails", [0, 2])
def test_a_batch_that_fails_on_the_device_is_known_as_broken(fails: int) -> None:
    host = ListHost()
    host.emit = host.emit._replace(late=True)
    with pytest.raises(OSError, match="lost"):
        train(BareModel(DeviceModel(host, fails)), plan(), host)
    assert host.broken
    assert "epoch_end" not in host.kinds


def test_a_model_that_raises_inside_a_batch_is_known_as_broken_and_its_error_goes_on() -> None:
    error = FloatingPointError()
    host = ListHost()
    with pytest.raises(FloatingPointError) as caught:
        train(model(raises={1: error}), plan(), host)
    assert caught.value is error
    assert host.broken
    assert (host.step, host.kinds[-1]) == (1, "batch_begin")


@pytest.mark.parametrize("kind", ["batch_begin", "batch_end", "epoch_end"])
def test_a_hook_that_raises_leaves_a_model_that_is_whole(kind: str) -> None:
    host = ListHost()

    def raises(*fields: Any) -> None:
        raise ValueError(kind)

    host.emit = host.emit._replace(**{kind: raises})
    with pytest.raises(ValueError, match=kind):
        train(model(), plan(), host)
    assert not host.broken


def test_a_gate_is_handed_to_the_model_where_the_host_has_one() -> None:
    passed: list[Any] = []
    host = ListHost(before_update=lambda tensors=None: passed.append(tensors))
    train(model(), plan(), host)
    assert passed == [None, None, None]


def test_logs_hold_python_numbers_that_json_takes() -> None:
    logs: dict[str, Any] = {}
    add_metrics(
        logs,
        {
            "loss": np.float32(0.5),
            "double": np.float64(0.25),
            "count": np.int64(3),
            "scalar": np.array(2.0),
            "flag": np.bool_(True),
        },
    )
    assert json.loads(json.dumps(logs)) == {
        "loss": 0.5,
        "double": 0.25,
        "count": 3,
        "scalar": 2.0,
        "flag": True,
    }
    assert [type(value) for value in logs.values()] == [float, float, int, float, bool]


def test_an_array_among_the_metrics_stays_one() -> None:
    matrix = np.eye(2)
    assert as_number(matrix) is matrix
    assert as_number("text") == "text"


# ---------------------------------------------------------------- evaluate and predict


class Losses:
    """Tests with given losses, batch by batch."""

    def __init__(self, *losses: float) -> None:
        self._losses = iter(losses)

    def test_batch(self, batch: Batch) -> dict[str, float]:
        return {"loss": next(self._losses)}


def test_an_evaluation_is_the_mean_over_samples_and_not_over_batches() -> None:
    tested: Any = Losses(1.0, 4.0)
    means = evaluate(tested, feed(3), ListHost())
    assert means == {"loss": 2.0}  # (2 * 1 + 1 * 4) / 3; over batches it were 2.5


def test_an_evaluation_on_its_own_is_in_no_epoch() -> None:
    host = ListHost()
    evaluate(model(), feed(2), host)
    assert host.story == [
        ("test_begin", 0, {}),
        ("test_batch_begin", 0, {"batch": 0, "size": 2}, NO_EPOCH, 0),
        ("test_batch_end", 0, {"batch": 0, "size": 2, "loss": 0.0}, NO_EPOCH, 0),
        ("test_end", 0, {"loss": 0.0}),
    ]


def test_an_evaluation_that_was_stopped_has_no_means_but_its_end() -> None:
    host = ListHost(stop=after("test_batch_end", 0, NO_EPOCH))
    assert evaluate(model(), feed(6), host) is None
    assert host.story[-1] == ("test_end", 0, {"loss": 0.0})
    assert host.kinds.count("test_batch_end") == 1


def test_an_evaluation_without_batches_has_no_means_and_says_so() -> None:
    host = ListHost()
    with pytest.warns(UserWarning, match="gave no batch"):
        assert evaluate(model(), IterableFeed([], steps=None), host) == {}
    assert host.story == [("test_begin", 0, {}), ("test_end", 0, {})]


def test_a_prediction_gives_the_outputs_batch_by_batch() -> None:
    host = ListHost()
    outputs = predict(model(), feed(3), host)
    assert [output.shape for output in outputs] == [(2, 1), (1, 1)]
    assert [event[:2] for event in host.story] == [
        ("predict_batch_begin", 0),
        ("predict_batch_end", 0),
        ("predict_batch_begin", 1),
        ("predict_batch_end", 1),
    ]
    ends = [event for event in host.told if event[0] == "predict_batch_end"]
    assert [list(event[2]) for event in ends] == [["batch", "size", "outputs"]] * 2
    np.testing.assert_array_equal(ends[1][2]["outputs"], outputs[1])


def test_a_prediction_that_was_stopped_gives_what_there_is() -> None:
    host = ListHost(stop=after("predict_batch_end", 0, NO_EPOCH))
    assert len(predict(model(), feed(6), host)) == 1


# ---------------------------------------------------------------- the same story as callbacks see it

# ---------------------------------------------------------------- going on in its middle


def batches(count: int) -> list[Any]:
    return [(np.full((1, 1), float(at)), None) for at in range(count)]


STORIES: dict[str, Callable[[], tuple[Any, Any, dict[str, Any]]]] = {
    "arrays": lambda: (feed(5), None, {}),
    "arrays, validated": lambda: (feed(5), feed(3), {"epochs": 3}),
    "validated every second epoch": lambda: (feed(3), feed(2), {"epochs": 4, "validate_after": {1, 3}}),
    "from epoch 2 on": lambda: (feed(3), feed(2), {"epochs": 4, "initial_epoch": 2}),
    "a list": lambda: (IterableFeed(batches(3), steps=None), None, {"epochs": 2}),
    "a list in steps": lambda: (
        IterableFeed(batches(5), steps=3),
        IterableFeed(batches(3), steps=2),
        {"epochs": 4},
    ),
}


@pytest.mark.parametrize("name", STORIES)
def test_from_every_place_on_the_rest_of_the_story_is_what_it_would_have_been(name: str) -> None:
    source, validation, more = STORIES[name]()
    whole = CuttingHost()
    states: list[Any] = []

    def state() -> tuple[Any, Any]:
        return source.state_dict(), None if validation is None else validation.state_dict()

    cut = whole._cut

    def noting() -> None:
        before = len(whole.cuts)
        cut()
        if len(whole.cuts) > before:
            states.append(state())

    whole._cut = noting  # type: ignore[method-assign]
    assert train(CountingModel(), plan(source, validation, **more), whole)
    assert len(whole.cuts) > 3
    for (place, step, told), (data, checked) in zip(whole.cuts, states, strict=True):
        again, again_checked, _ = STORIES[name]()
        again.load_state_dict(data)
        if again_checked is not None:
            again_checked.load_state_dict(checked)
        rest = ListHost()
        rest.step = step
        asked = {key: value for key, value in more.items() if key != "initial_epoch"}
        assert train(CountingModel(), plan(again, again_checked, start=place, **asked), rest)
        assert rest.story == whole.story[told:], place


def test_inside_of_a_validation_and_around_the_hooks_of_an_epoch_there_is_no_place() -> None:
    host = ListHost()
    seen: dict[str, set[bool]] = {}

    def note(kind: str) -> Callable[..., None]:
        return lambda *fields: seen.setdefault(kind, set()).add(host.places[-1][0] is not None)

    host.emit = Emit(logs=dict, late=False, **{kind: note(kind) for kind in KINDS})
    train(model(), plan(validation=feed(3), epochs=2), host)
    assert {kind for kind, there in seen.items() if True in there} == {"batch_begin", "batch_end"}


def test_a_stop_in_mid_epoch_is_the_last_place_and_the_partial_end_behind_it_is_none() -> None:
    host = ListHost(stop=after("batch_end", 1))
    assert not train(model(), plan(epochs=3), host)
    last = [(place, step) for place, step, last in host.places if last]
    assert last == [(Place(0, "batches", 2), 2)]
    assert host.places[-1][0] is None
    assert host.kinds[-1] == "epoch_end"


def test_a_stop_in_a_validation_goes_on_before_it() -> None:
    host = ListHost(stop=lambda told: any(event[0] == "test_batch_end" for event in told))
    assert not train(model(), plan(validation=feed(4), epochs=3), host)
    assert [place for place, _, last in host.places if last] == [Place(0, "batches", 3)]


def test_behind_the_last_epoch_nothing_follows_and_that_is_a_place_too() -> None:
    host = ListHost()
    train(model(), plan(epochs=2), host)
    assert [place for place, _, last in host.places if last] == [Place(2)]
    done = ListHost()
    assert train(model(), plan(epochs=2, start=Place(2)), done)
    assert done.story == []


def test_a_stop_that_was_there_already_trains_no_batch_more() -> None:
    host = ListHost(stop=lambda told: True)
    assert not train(model(), plan(start=Place(0, "batches", 2)), host)
    assert host.kinds == ["epoch_end"]


def test_data_that_has_ended_gives_no_further_epoch() -> None:
    host = ListHost()
    assert not train(model(), plan(epochs=5, start=Place(1, over=True)), host)
    assert host.story == []


class Told(Callback):
    """Inline, so that it sees the logs as the loop and the callbacks before it have made them."""

    def __init__(self, stop_at: int = -1) -> None:
        self.told: list[tuple[Any, ...]] = []
        self._stop_at = stop_at

    def _note(self, hook: str, *arguments: Any) -> None:
        self.told.append((hook, *(dict(a) if isinstance(a, dict) else a for a in arguments)))

    def on_train_begin(self, logs: Any = None) -> None:
        self._note("train_begin", logs)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._note("epoch_begin", epoch, logs)

    def on_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._note("batch_begin", batch, logs)

    def on_batch_end(self, batch: int, logs: Any = None) -> None:
        self._note("batch_end", batch, logs)
        if batch == self._stop_at:
            self.model.stop_training = True

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._note("epoch_end", epoch, logs)

    def on_train_end(self, logs: Any = None) -> None:
        self._note("train_end", logs)


async def fit(told: Told, **more: Any) -> Any:
    scripted = ScriptedModel([1.0, 2.0, 5.0])
    x = np.zeros((5, 1))
    return await Trainer(scripted).fit(
        x, batch_size=2, verbose=0, callbacks=told, validation_data=(x, None), **more
    )


@pytest.mark.asyncio
async def test_callbacks_see_exactly_these_hooks_with_these_logs() -> None:
    told = Told()
    await fit(told)
    assert told.told == [
        ("train_begin", {}),
        ("epoch_begin", 0, {}),
        ("batch_begin", 0, {"batch": 0, "size": 2}),
        ("batch_end", 0, {"batch": 0, "size": 2, "loss": 1.0}),
        ("batch_begin", 1, {"batch": 1, "size": 2}),
        ("batch_end", 1, {"batch": 1, "size": 2, "loss": 2.0}),
        ("batch_begin", 2, {"batch": 2, "size": 1}),
        ("batch_end", 2, {"batch": 2, "size": 1, "loss": 5.0}),
        ("epoch_end", 0, {"val_loss": 3.0, "loss": 2.2}),
        ("train_end", {}),
    ]
    assert list(told.told[-2][2]) == ["val_loss", "loss"]


@pytest.mark.asyncio
@pytest.mark.parametrize(("last", "mean"), [(1, 1.5), (2, 2.2)])
async def test_a_stop_in_a_batch_means_what_was_seen_and_skips_the_validation(last: int, mean: float) -> None:
    told = Told(stop_at=last)
    history = await fit(told, epochs=3)
    assert told.told[-3:] == [
        ("batch_end", last, {"batch": last, "size": 2 - last // 2, "loss": [1.0, 2.0, 5.0][last]}),
        ("epoch_end", 0, {"loss": mean}),
        ("train_end", {}),
    ]
    assert (history.epoch, history.history, history.outcome) == ([0], {"loss": [mean]}, "stopped")


@pytest.mark.asyncio
async def test_nothing_to_train_is_a_begin_an_end_and_an_empty_history() -> None:
    told = Told()
    history = await fit(told, epochs=2, initial_epoch=2)
    assert told.told == [("train_begin", {}), ("train_end", {})]
    assert (history.epoch, history.history, history.outcome) == ([], {}, "completed")


@pytest.mark.asyncio
async def test_validation_data_without_a_batch_is_said_and_leaves_no_val_metrics() -> None:
    class Empty:
        def __iter__(self) -> Any:
            return iter(())

    with pytest.warns(UserWarning, match="gave no batch"):
        history = await Trainer(ScriptedModel()).fit(np.zeros((1, 1)), verbose=0, validation_data=Empty())
    assert history.history == {"loss": [1.0]}
