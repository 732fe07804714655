"""The shapes of the system on one page: what a model, a feed, an engine and the loop's host look like.

Nothing here does anything; every room may import it and it imports no room but :mod:`asynccb.events`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from os import PathLike

    import numpy as np

    from asynccb.events import Logs


class Batch(NamedTuple):
    """What one step trains on.

    ``x`` is one array or, for a model of several inputs, the same tuple, list or dict of arrays that the
    caller gave; every array has the samples on axis 0. ``y`` and ``sample_weight`` are None where there are
    none. ``size`` is the number of samples.
    """

    x: Any
    y: Any = None
    sample_weight: Any = None
    size: int = 0


class Gate(Protocol):
    """What a model asks before it overwrites its state, because a copy of it may be under way beside the
    training.

    One object for a whole run. Segments are those of the model's :class:`LiveState`, in its order.
    """

    copying: bool
    """False: no copy is under way and everything may be overwritten. A model may look here and spare itself
    the calls; only the training thread makes it True, and never inside a batch."""

    def __call__(self, segments: int | None = None) -> None:
        """Returns when the first ``segments`` segments are copied (None: all of them), and copies some of
        them itself where nobody has come to them yet."""

    def keep(self, array: int, rows: np.ndarray[Any, Any]) -> None:
        """Called in place of waiting, before a few rows (axis 0) of ``LiveState.arrays[array]`` are
        overwritten: the copy gets these rows as they are now. Never blocks for long."""


class LiveState(NamedTuple):
    """What a model's state is made of, as it lies in memory now; the arrays are the live ones.

    Attributes:
        arrays: C-contiguous arrays. Always the same number in the same shapes while the model trains; whether
            they are the same objects each time is the model's affair.
        segments: (index of the array, start, stop) along axis 0, in the order in which an update overwrites
            them. Together they cover every array once.
        versions: for each array, a number that changes whenever its content may have changed; None: any batch
            may change it. What kept its version is not copied again.
        complete: makes the state from arrays of the same shapes, which then hold the copies. Called at the
            moment of the copy, before they are filled: what is small (counters, random streams) it copies
            itself, the arrays it only keeps.
    """

    arrays: Sequence[np.ndarray[Any, Any]]
    segments: Sequence[tuple[int, int, int]]
    versions: Sequence[int | None]
    complete: Callable[[Sequence[np.ndarray[Any, Any]]], ModelState]


class ModelState(Protocol):
    """A consistent copy of a model at one moment. It owns its memory: training on does not change it."""

    @property
    def arrays(self) -> Mapping[str, np.ndarray[Any, Any]]:
        """Read-only arrays by name: weights first, then optimizer slots (names start with ``optimizer/``)."""

    def save(
        self,
        path: str | PathLike[str],
        *,
        weights_only: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes the state as a file of the model's own format, atomically. Blocks; never call it on the
        loop.

        Args:
            path: the file.
            weights_only: leave out what only training needs.
            extra: plain data to be kept in the same file; only for models that can be resumed.
        """

    def to_model(self) -> Any:
        """A new model with this state, independent of the one it was taken from."""


@runtime_checkable
class TrainsBatches(Protocol):
    """The smallest model there is. ``test_batch`` and all of :class:`Model` beyond it are optional."""

    def train_batch(self, batch: Batch) -> Mapping[str, Any]:
        """One update. Returns the logs of this batch (``loss`` and metrics), means over its samples."""


@runtime_checkable
class Model(Protocol):
    """What the training thread drives. Everything here is called on that thread only.

    ``Sequential`` is one; :func:`asynccb.models.adapt` makes one of any object that has ``train_batch``.
    """

    @property
    def user_model(self) -> Any:
        """The object that the user gave; callbacks see it as ``self.model``."""

    @property
    def metrics_names(self) -> Sequence[str]:
        """The names in a batch's logs, ``loss`` first. Empty where the model does not tell before it
        trains."""

    def check_ready(self, *, training: bool) -> None:
        """Refuses a model that cannot train (or test) yet: not compiled, without layers, without
        ``test_batch``."""

    def check_data(
        self, x: Any, y: Any, sample_weight: Any, *, name: str = "x", training: bool = True
    ) -> None:
        """Refuses data that the model can never take (shapes, dtypes) with
        :class:`~asynccb.ArgumentError`."""

    def direction(self, metric: str) -> str | None:
        """``"min"`` or ``"max"`` if the model knows in which direction this metric improves, else None."""

    def train_batch(self, batch: Batch, before_update: Gate | None = None) -> Mapping[str, Any]: ...

    def test_batch(self, batch: Batch) -> Mapping[str, Any]: ...

    def predict_batch(self, batch: Batch) -> Any: ...

    def capture(self) -> ModelState:
        """A consistent copy of weights and optimizer state, made at once; legal between two batches only."""


class ShowsItself(Protocol):
    """What a :class:`Model` may have beyond the rest, so that it is copied beside its training."""

    def live(self) -> LiveState | None:
        """What ``capture`` copies; legal between two batches only. None: it can only ``capture``, while the
        training waits.

        A model that answers anything else asks the gate of ``train_batch`` before it overwrites any of it.
        One that has an attribute ``always_asks = True`` promises that for whatever else overwrites it too,
        hooks of users' callbacks included; for all others a copy is completed before such a hook runs.
        """


class ChecksPaths(Protocol):
    """What a :class:`Model` may have beyond the rest, if not every path will do for its files."""

    def check_path(self, path: str, *, weights_only: bool) -> None:
        """Refuses, before the first batch, a path that ``capture().save`` would refuse after it, with
        :class:`~asynccb.ArgumentError`."""


class Unread(dict[str, Any]):
    """Logs of a batch that a device may still be computing, by a model that :class:`Accumulates`.

    Where nobody wants them before the epoch ends, the training waits for those of a batch only once the next
    one is under way. They must stay as they are whatever the model does then.

    Args:
        logs: by their names.
        read: waits for them, and makes numbers of them.
    """

    def __init__(self, logs: Mapping[str, Any], read: Callable[[Mapping[str, Any]], dict[str, Any]]) -> None:
        super().__init__(logs)
        self._read = read

    def read(self) -> dict[str, Any]:
        """The numbers."""
        return self._read(self)


class Accumulates(Protocol):
    """What a :class:`Model` may have beyond the rest, if the logs of its batches are not of that batch alone:
    they stand for all batches since the pass began, as Keras' do."""

    def begin_pass(self) -> None:
        """The next batch is the first of an epoch or of an evaluation. Not called where a training goes on in
        the middle of an epoch: what the values stand for is then part of what ``restore`` has put back."""


class Finishes(Protocol):
    """What a :class:`Model` may have beyond the rest, if something is done to it when a training has ended,
    by itself or by a stop."""

    def end_training(self) -> None:
        """Called once, behind the last epoch and before ``on_train_end``. Backups were cut before it, so that
        a training that goes on from one goes on without it, and has it at its own end."""


class Resumes(Protocol):
    """What a :class:`Model` may have beyond the rest, so that its training can be resumed."""

    def fingerprint(self) -> dict[str, Any]:
        """What must be equal for a resumed training to give the same bytes: architecture, loss, optimizer; as
        plain data. Legal as soon as the model has seen its data (``check_data``)."""

    def restore(self, path: str, accept: Callable[[Mapping[str, Any]], object]) -> None:
        """Overwrites all that :meth:`Model.capture` copies by what is in a file that the state's ``save``
        wrote. Blocks.

        Args:
            path: the file.
            accept: given the ``extra`` of the file before anything is overwritten; what it raises goes to the
                caller.

        Raises:
            FileRefused: the file is damaged or of another model; nothing is changed then.
        """


class CountsEpochs(Protocol):
    """What a :class:`Model` may have beyond the rest, because it changes from epoch to epoch."""

    def end_epoch(self) -> None:
        """An epoch has come to its end, and the inline hooks of it have run. Not called for one that a stop
        cut short. What it changes belongs to the state that :meth:`Model.capture` copies, and what of it
        :class:`ShowsItself` shows asks the gate."""


class Source(Protocol):
    """Where batches come from. ``begin`` opens a pass, ``next`` answers None at its end."""

    @property
    def steps(self) -> int | None:
        """Batches in one epoch, where known."""

    @property
    def samples(self) -> int | None:
        """Samples in one epoch, where known."""

    @property
    def exhausted(self) -> bool:
        """Whether the data ended in mid-epoch, so that there can be no further epoch."""

    def begin(self, epoch: int, at: int = 0) -> None:
        """Opens the pass of ``epoch``, behind its first ``at`` batches."""

    def next(self) -> Batch | None: ...

    def close(self) -> None:
        """Lets go of what the pass under way has opened: no batch is asked for any more. On the training
        thread."""

    def check_seekable(self, argument: str, purpose: str) -> None:
        """Raises :class:`~asynccb.ArgumentError` about ``argument`` if it cannot go on in the middle of its
        data in a new process; ``purpose`` says who wants it to."""

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, as plain data, as far as the loop's :class:`Place` does not tell."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next ``begin`` goes on from there."""


class Place(NamedTuple):
    """Where a training stands, so that another process can go on from there.

    Attributes:
        epoch: 0-based.
        phase: ``"epoch"``: before the epoch begins. ``"batches"``: ``batch`` of its batches are trained.
            ``"validated"``: it has been validated and has not ended.
        batch: batches trained, in the phase ``"batches"``.
        means: of the validation, in the phase ``"validated"``.
        over: nothing follows, because the data has ended.
    """

    epoch: int
    phase: Literal["epoch", "batches", "validated"] = "epoch"
    batch: int = 0
    means: Mapping[str, Any] | None = None
    over: bool = False


class Emit(Protocol):
    """One version of the hook table: a function for each kind of event.

    Batch events are None where nobody wants them; the loop then calls ``Host.skip`` in place of building
    them.
    """

    logs: Callable[..., dict[str, Any]]
    """Makes the logs of a batch event."""
    late: bool
    """Whether those who want ``batch_end`` look at its logs only when the epoch ends."""
    epoch_begin: Callable[[int, Logs, int], None]
    epoch_end: Callable[[int, Logs, int], None]
    test_begin: Callable[[int, Logs], None]
    test_end: Callable[[int, Logs], None]
    batch_begin: EmitBatch | None
    batch_end: EmitBatch | None
    test_batch_begin: EmitBatch | None
    test_batch_end: EmitBatch | None
    predict_batch_begin: EmitBatch | None
    predict_batch_end: EmitBatch | None


class EmitBatch(Protocol):
    def __call__(self, index: int, logs: dict[str, Any], epoch: int, step: int, /) -> None: ...


class Host(Protocol):
    """What the loop knows of the world: six verbs and three places to publish where it is.

    No thread, clock or asyncio shows through it. ``stopped`` and ``safe_point`` may leave the loop by a
    BaseException.
    """

    epoch: int
    step: int
    logs: Mapping[str, Any]

    @property
    def emit(self) -> Any:
        """The present version of the hook table, an :class:`Emit`. Looked up each time: it changes when a
        reader joins."""

    @property
    def before_update(self) -> Gate | None:
        """Called by the model before it overwrites its parameters, where somebody still copies them."""

    def skip(self) -> object:
        """Takes the number of an event that nobody wants."""

    def next(self, source: Source) -> Batch | None:
        """The next batch; None at the end of the pass, or where a stop ended the wait for it."""

    def enter(self, place: Place | None, *, last: bool = False) -> None:
        """The training stands at ``place``, and a resume unit may be cut here; batches trained from now on
        are counted by ``step``. None: until the next call it cannot be resumed where it is.

        Args:
            last: this is where the training ends, or is interrupted.
        """

    def safe_point(self) -> None:
        """Between two batches: here snapshots are taken, pauses are kept, and resume units may be cut."""

    def stopped(self) -> bool:
        """Whether to end the training here."""

    def broke_inside(self) -> None:
        """The model raised inside a batch: its weights may be half updated."""


class QueueStatistics(NamedTuple):
    """Counts of something that waits for somebody slower, other than a mailbox.

    Attributes:
        bound: how many may wait.
        policy: what happens when that many do: ``"wait"`` (for room), ``"drop_oldest"``, ``"drop_newest"``,
            ``"supersede"`` (the newer takes the older one's place) or ``"skip"`` (it is not begun).
        waiting: how many wait now, one that is being worked on included.
        overflowed: how often the policy was used.
    """

    bound: int
    policy: str
    waiting: int
    overflowed: int


class Share(Protocol):
    """A training's right to compute beside others: it computes while ``granted``.

    Attributes:
        contended: whether others share the budget now, so that ``batch_done`` is to be called.
        granted: it holds what it needs.
        spent: seconds that it has held it.
        weight: its part in comparison with others; may be set at any time.
    """

    @property
    def contended(self) -> bool: ...

    @property
    def granted(self) -> bool: ...

    @property
    def spent(self) -> float: ...

    weight: float

    def request(self) -> None:
        """Takes what it needs, or queues for it. Never blocks."""

    def give_back(self) -> None:
        """Lets others compute, or gives up its place in the queue."""

    def look_at_others(self) -> None:
        """Called now and then while it waits for its turn."""

    def batch_done(self) -> bool:
        """Whether its slice is over and somebody else waits. Called behind each batch while contended."""

    def leave(self) -> None:
        """For good; legal any number of times, on any thread."""


class Engine(Protocol):
    """Where a run's training function is executed."""

    def start(self, target: Callable[[], None], name: str) -> None:
        """Runs ``target`` to its end, beside the caller. Never blocks."""
