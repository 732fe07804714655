"""The three things that a run can do: fit, evaluate, predict. Each prepares its data and tells its story to
the loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from asynccb.errors import ArgumentError
from asynccb.events import PredictBegin, PredictEnd, TestBegin, TestEnd, TrainBegin, TrainEnd
from asynccb.protocols import Place
from asynccb.training.loop import NO_EPOCH, Plan, predict, test_batches, train
from asynccb.training.prefetch import AsyncFeed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from asynccb.protocols import Host, Model, Source
    from asynccb.training.arguments import Data, FitArguments

__all__ = ["Evaluate", "Fit", "Predict", "Program"]


class Program(Protocol):
    """What a run does on its thread.

    Attributes:
        opening: the first event; every callback that got it gets ``closing`` too.
        closing: the last event.
        feeds: async sources, to be consumed on the loop.
        validation_data: what callbacks see under this name.
        result: what awaiting the run gives, where it is not the History.
        closing_logs: of the last event.
        takes_turns: whether it computes only while no other training of the process does.
    """

    takes_turns: bool
    opening: Any
    closing: Any
    feeds: list[AsyncFeed]
    validation_data: Any
    result: Any
    closing_logs: dict[str, Any]

    def prepare(self, model: Model) -> dict[str, Any]:
        """Converts and checks the data, on the training thread, before any hook. Answers the callbacks'
        ``params``."""

    def tell(self, model: Model, host: Host) -> bool:
        """Runs to the end. False: a stop or the end of the data came first."""


class Fit:
    """A training. It can be resumed: what is asked about that is legal after :meth:`prepare`.

    Args:
        arguments: of ``fit``, checked.
        seed: of the order.
        seed_drawn: nobody asked for this seed: that of a backup takes its place.
        log_keys_open: whether a callback may add keys to the logs of an epoch.
    """

    takes_turns = True
    opening = TrainBegin
    closing = TrainEnd

    def __init__(
        self, arguments: FitArguments, seed: int, *, seed_drawn: bool = False, log_keys_open: bool
    ) -> None:
        self._arguments = arguments
        self._log_keys_open = log_keys_open
        self._seed = seed
        self.seed_drawn = seed_drawn
        self._plan: Plan | None = None
        self._settings: dict[str, Any] = {}
        self.validation_data: Any = None
        self.result: Any = None
        self.closing_logs: dict[str, Any] = {}
        self._early = {
            data.name: _async_feed(data)
            for data in (arguments.data, arguments.validation)
            if data is not None
        }
        self.feeds = [feed for feed in self._early.values() if feed is not None]

    def prepare(self, model: Model) -> dict[str, Any]:
        asked = self._arguments
        data = asked.data.arrays(model, training=True)
        validation = None if asked.validation is None else asked.validation.arrays(model, training=True)
        if asked.validation_split:
            data, validation = data.split(
                asked.validation_split, batch_size=asked.validation_batch_size, steps=asked.validation_steps
            )
        source = self._feed(data, shuffled=True)
        self._plan = Plan(
            source,
            None if validation is None else self._feed(validation, shuffled=False),
            asked.epochs,
            Place(asked.initial_epoch),
            asked.validate_after,
        )
        self._settings = {
            "samples": source.samples,
            "steps": source.steps,
            "batch_size": data.batch_size if data.kind == "arrays" else None,
            "shuffle": data.shuffle if data.kind == "arrays" else None,
        }
        if validation is not None:
            self.validation_data = _as_given(validation)
        return self._params(model, data, source, validates=validation is not None)

    @property
    def start(self) -> Place:
        """Where it begins or goes on."""
        assert self._plan is not None
        return self._plan.start

    @property
    def over(self) -> bool:
        """Whether nothing is left to train."""
        assert self._plan is not None
        return self.start.over or self.start.epoch >= self._plan.epochs

    def check_seekable(self, purpose: str) -> None:
        """Raises ArgumentError if the data could not be gone on with in its middle."""
        assert self._plan is not None
        self._plan.source.check_seekable("x", purpose)
        # Whole passes over validation data begin anew each time, and none is ever gone on with in its middle.
        if self._plan.validation is not None and self._arguments.validation_steps is not None:
            self._plan.validation.check_seekable("validation_data", purpose)

    def settings(self) -> dict[str, Any]:
        """What must be equal for a resumed training to give the same bytes."""
        return {**self._settings, "seed": self._seed}

    def state_dict(self) -> dict[str, Any]:
        """Where the data stands, as plain data, beyond the loop's place."""
        return {name: source.state_dict() for name, source in self._sources().items()}

    def check_place(self, place: Place) -> None:
        """Raises ArgumentError if fewer epochs are asked for than are trained there."""
        assert self._plan is not None
        begun = place.epoch + (place.phase != "epoch")
        if begun > self._plan.epochs:
            raise ArgumentError(
                "epochs",
                self._plan.epochs,
                f"at least {begun}, the epochs that are trained already, or begun",
            )

    def go_on(self, place: Place, seed: int, state: Mapping[str, Any]) -> None:
        """Makes :meth:`tell` go on from there."""
        assert self._plan is not None
        for name, source in self._sources().items():
            if name in state:
                source.load_state_dict(state[name])
        self._seed = seed
        self._plan = self._plan._replace(start=place)

    def _sources(self) -> dict[str, Source]:
        assert self._plan is not None
        found = {"data": self._plan.source, "validation": self._plan.validation}
        return {name: source for name, source in found.items() if source is not None}

    def tell(self, model: Model, host: Host) -> bool:
        assert self._plan is not None
        try:
            whole = train(model, self._plan, host)
        finally:
            for source in self._sources().values():
                source.close()
        end_training = getattr(model, "end_training", None)
        if end_training is not None and self._arguments.epochs:
            end_training()
        return whole

    def _feed(self, data: Data, *, shuffled: bool) -> Source:
        early = self._early.get(data.name)
        return data.feed(self._seed, shuffled=shuffled) if early is None else early

    def _params(self, model: Model, data: Data, source: Source, *, validates: bool) -> dict[str, Any]:
        metrics = list(model.metrics_names)
        params: dict[str, Any] = {"epochs": self._arguments.epochs, "verbose": self._arguments.verbose}
        if data.kind == "arrays":
            params |= {"batch_size": data.batch_size, "samples": source.samples}
        else:
            params["steps"] = source.steps
        params["do_validation"] = validates
        # Whether a callback may add keys to the logs of an epoch: a file template that needs one is then not
        # refused early.
        params["log_keys_open"] = self._log_keys_open
        # Whether the metrics of a batch stand for the epoch so far, so that no mean is to be made of them.
        params["accumulated"] = hasattr(model, "begin_pass")
        params["metrics"] = metrics + ([f"val_{name}" for name in metrics] if validates else [])
        return params


class _OnePass:
    """What evaluate and predict share: one unshuffled pass over data, opened when the thread begins."""

    takes_turns = True
    needs_targets: bool

    def __init__(self, data: Data, seed: int) -> None:
        self._data = data
        self._seed = seed
        self._source: Source | None = _async_feed(data)
        self.validation_data: Any = None
        self.result: Any = None
        self.closing_logs: dict[str, Any] = {}
        self.feeds = [self._source] if isinstance(self._source, AsyncFeed) else []

    def prepare(self, model: Model) -> dict[str, Any]:
        data = self._data.arrays(model, training=self.needs_targets)
        self._source = self._source or data.feed(self._seed, shuffled=False)
        return {
            "steps": self._source.steps,
            "samples": self._source.samples,
            "verbose": 0,
            "metrics": list(model.metrics_names),
        }


class Evaluate(_OnePass):
    opening = TestBegin
    closing = TestEnd
    needs_targets = True

    def tell(self, model: Model, host: Host) -> bool:
        assert self._source is not None
        # The opening and the closing event are those of the evaluation itself.
        try:
            self.closing_logs, whole = test_batches(model, self._source, host, NO_EPOCH)
        finally:
            self._source.close()
        self.result = self.closing_logs if whole else {}
        return whole


class Predict(_OnePass):
    opening = PredictBegin
    closing = PredictEnd
    needs_targets = False

    def tell(self, model: Model, host: Host) -> bool:
        assert self._source is not None
        try:
            outputs = predict(model, self._source, host)
        finally:
            self._source.close()
        self.result = _joined(outputs) if outputs else None
        return not host.stopped()


def _joined(outputs: Sequence[Any]) -> Any:
    """Outputs of all batches, one behind the other; of several outputs, each of them, in their structure.
    None stays None, and of numbers there is one for each batch."""
    first = outputs[0]
    if first is None:
        return None
    if isinstance(first, dict):
        return {name: _joined([output[name] for output in outputs]) for name in first}
    if isinstance(first, (list, tuple)):
        parts = [_joined([output[at] for output in outputs]) for at in range(len(first))]
        return parts if isinstance(first, list) else tuple(parts)
    return np.concatenate(outputs) if np.ndim(first) else np.stack(outputs)


def _async_feed(data: Data) -> AsyncFeed | None:
    feed = data.feed(0, shuffled=False) if data.kind == "async" else None
    if not isinstance(feed, AsyncFeed):
        return None
    feed.name = data.name
    return feed


def _as_given(data: Data) -> Any:
    if data.kind != "arrays":
        return data.x
    return (data.x, data.y) if data.sample_weight is None else (data.x, data.y, data.sample_weight)
