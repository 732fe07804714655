"""The records that travel from a training to its callbacks, and where in the loop each one is made.

::

    TrainBegin
    for epoch in range(initial_epoch, epochs):
        EpochBegin(epoch)
        for batch in feed:
            BatchBegin(batch)
            model.train_batch
            BatchEnd(batch)
        if validation is due:
            TestBegin
            for batch in validation data:  TestBatchBegin(batch), model.test_batch, TestBatchEnd(batch)
            TestEnd
        EpochEnd(epoch)
    ExceptionRaised            only on a failure or a cancel
    TrainEnd

    CheckpointSaved(epoch)     at any time: a file has become durable

``evaluate`` is the TestBegin .. TestEnd part alone, ``predict`` the same with Predict in place of Test.

Every record names the hook that it calls in ``hook``. ``seq`` numbers the events of a run from 0 in the order
in which they happen; an event that nobody wanted is never built, but its number is taken. Where a hook takes
an index, it stands in field 1 and the logs in field 2, so that the delivery need not know the kinds apart.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, NoReturn

__all__ = [
    "BatchBegin",
    "BatchEnd",
    "CheckpointSaved",
    "EpochBegin",
    "EpochEnd",
    "Event",
    "ExceptionRaised",
    "FrozenLogs",
    "Gap",
    "Logs",
    "PredictBatchBegin",
    "PredictBatchEnd",
    "PredictBegin",
    "PredictEnd",
    "RunChanged",
    "RunEvent",
    "TestBatchBegin",
    "TestBatchEnd",
    "TestBegin",
    "TestEnd",
    "TrainBegin",
    "TrainEnd",
]


class Logs(dict[str, Any]):
    """The logs of one event while inline hooks may still add to them. A plain dict in all but name.

    When the last inline hook has run, the very same object becomes a :class:`FrozenLogs` (its class is
    changed, nothing is copied), because from then on other threads read it.
    """

    __slots__ = ()

    def freeze(self) -> None:
        # The one line that makes sharing without a copy safe: assigning the class is atomic, and both classes
        # have the layout of dict, so a hook that kept the object cannot change it behind a reader's back any
        # more.
        self.__class__ = FrozenLogs


class FrozenLogs(Logs):
    """Logs that are shared between threads: reading as a dict, changing raises TypeError.

    ``copy()``, ``copy.copy``, ``copy.deepcopy`` and pickle give a plain dict.
    """

    __slots__ = ()

    def freeze(self) -> None:
        pass

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            "these logs are shared by all callbacks and can no longer be changed; "
            "add keys in an inline (`def`) hook, or change a copy: dict(logs)"
        )

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def copy(self) -> dict[str, Any]:
        return dict(self)

    def __copy__(self) -> dict[str, Any]:
        return dict(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        import copy

        return {key: copy.deepcopy(value, memo) for key, value in self.items()}

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return dict, (dict(self),)


class Event:
    """What all records have in common: the hook that they call, and the arguments that the hook is called
    with."""

    __slots__ = ()
    hook: ClassVar[str]
    seq: int

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The positional arguments of the hook."""
        raise NotImplementedError


class _Phase(NamedTuple):
    seq: int
    step: int
    logs: dict[str, Any]

    @property
    def arguments(self) -> tuple[Any, ...]:
        return (self.logs,)


class _Epoch(NamedTuple):
    seq: int
    epoch: int
    logs: dict[str, Any]
    step: int

    @property
    def arguments(self) -> tuple[Any, ...]:
        return (self.epoch, self.logs)


class _Batch(NamedTuple):
    seq: int
    batch: int
    logs: dict[str, Any]
    epoch: int
    step: int

    @property
    def arguments(self) -> tuple[Any, ...]:
        return (self.batch, self.logs)


class _Raised(NamedTuple):
    seq: int
    exception: BaseException

    @property
    def arguments(self) -> tuple[Any, ...]:
        return (self.exception,)


class _Saved(NamedTuple):
    seq: int
    path: str
    epoch: int

    @property
    def arguments(self) -> tuple[Any, ...]:
        return (self.path, self.epoch)


class Gap(NamedTuple):
    """In an event stream: ``missing`` events before the next one are gone from the ring, or were never
    built."""

    missing: int


class TrainBegin(_Phase, Event):
    """Before the first batch; all awaitables of this hook are done before it trains."""

    __slots__ = ()
    hook = "on_train_begin"


class TrainEnd(_Phase, Event):
    """The last hook of a training, on every way out.

    A file that was still being written may be announced after this event, though to each callback before its
    ``on_train_end``.
    """

    __slots__ = ()
    hook = "on_train_end"


class EpochBegin(_Epoch, Event):
    """``epoch`` is 0-based."""

    __slots__ = ()
    hook = "on_epoch_begin"


class EpochEnd(_Epoch, Event):
    """``logs``: ``val_*`` means first, then the means of the training metrics, then what hooks added."""

    __slots__ = ()
    hook = "on_epoch_end"


class BatchBegin(_Batch, Event):
    """``logs``: ``batch`` and ``size`` (samples); ``step`` counts the batches trained before."""

    __slots__ = ()
    hook = "on_train_batch_begin"


class BatchEnd(_Batch, Event):
    """``logs``: ``batch``, ``size``, ``loss`` and the metrics of this batch."""

    __slots__ = ()
    hook = "on_train_batch_end"


class TestBegin(_Phase, Event):
    """An evaluation starts, inside a training or on its own."""

    __slots__ = ()
    hook = "on_test_begin"


class TestEnd(_Phase, Event):
    """``logs``: the means over all samples."""

    __slots__ = ()
    hook = "on_test_end"


class TestBatchBegin(_Batch, Event):
    """``epoch`` is -1 outside of a training."""

    __slots__ = ()
    hook = "on_test_batch_begin"


class TestBatchEnd(_Batch, Event):
    """``epoch`` is -1 outside of a training."""

    __slots__ = ()
    hook = "on_test_batch_end"


class PredictBegin(_Phase, Event):
    """A prediction starts."""

    __slots__ = ()
    hook = "on_predict_begin"


class PredictEnd(_Phase, Event):
    """A prediction is over."""

    __slots__ = ()
    hook = "on_predict_end"


class PredictBatchBegin(_Batch, Event):
    """``epoch`` is -1."""

    __slots__ = ()
    hook = "on_predict_batch_begin"


class PredictBatchEnd(_Batch, Event):
    """``logs`` holds the ``outputs`` of this batch."""

    __slots__ = ()
    hook = "on_predict_batch_end"


class ExceptionRaised(_Raised, Event):
    """The training fails or was cancelled; ``exception`` is what ``fit`` will raise."""

    __slots__ = ()
    hook = "on_exception"


class CheckpointSaved(_Saved, Event):
    """The file at ``path`` is durable. ``epoch`` is the 0-based epoch whose state it holds."""

    __slots__ = ()
    hook = "on_checkpoint_saved"


class RunChanged(NamedTuple):
    """A run of an orchestrator has come into another state: ``"queued"``, ``"running"``, or its outcome."""

    state: str


class RunEvent(NamedTuple):
    """One event in the stream of an orchestrator.

    Attributes:
        seq: numbers the events of the orchestrator from 0.
        run: the name of the run.
        event: of that run, with its own ``seq``; a :class:`Gap` in its numbers; or a :class:`RunChanged`.
    """

    seq: int
    run: str
    event: Event | Gap | RunChanged
