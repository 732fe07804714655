"""The story of a training. Plain code: no thread, no clock, no asyncio; everything else is the host's.

An evaluation inside a training goes through the same host, so that a stop, a snapshot or a pause reaches it
too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from asynccb.events import Logs
from asynccb.protocols import Place, Unread
from asynccb.training.feed import refuse_empty, warn_nothing_to_test

if TYPE_CHECKING:
    from collections.abc import Container, Mapping

    from asynccb.protocols import Host, Model, Source

__all__ = ["Plan", "evaluate", "predict", "test_batches", "train"]

NO_EPOCH = -1


class Plan(NamedTuple):
    """What to train on and for how long.

    Attributes:
        source: the training data.
        validation: the validation data, or None.
        epochs: index of the last epoch plus one.
        start: where to begin, or to go on.
        validate_after: the 0-based epochs that end with a validation.
    """

    source: Source
    validation: Source | None
    epochs: int
    start: Place
    validate_after: Container[int]


def train(model: Model, plan: Plan, host: Host) -> bool:
    """Trains from ``plan.start`` to ``plan.epochs``.

    Returns:
        True if every epoch was trained to its end, False if a stop ended it earlier.
    """
    place = plan.start
    while place.epoch < plan.epochs and not place.over:
        if not _train_epoch(model, plan, place, host):
            return False
        place = Place(place.epoch + 1)
    return not place.over


def _train_epoch(model: Model, plan: Plan, at: Place, host: Host) -> bool:
    """One epoch, from where ``at`` says; whether there may be a next one."""
    epoch, source = at.epoch, plan.source
    if at.phase == "epoch":
        if host.stopped():
            host.enter(at, last=True)
            return False
        host.enter(None)
        host.epoch = epoch
        host.emit.epoch_begin(epoch, Logs(), host.step)
    means, whole = at.means, True
    if at.phase != "validated":
        source.begin(epoch, at.batch)
        if not at.batch:
            begin_pass(model)
        host.enter(Place(epoch, "batches", at.batch))
        trained, whole = _train_batches(model, source, epoch, host, at.batch)
        if trained == 0:
            if not host.stopped():
                refuse_empty(host.step == 0, said=source.exhausted)
            host.enter(Place(epoch, "batches"), last=True)
            return False
        stands = Place(epoch, "batches", trained)
        if whole and plan.validation is not None and epoch in plan.validate_after:
            host.enter(stands)
            host.enter(None)
            means = evaluate(model, plan.validation, host, epoch)
            whole = means is not None
        if not whole:
            # The partial end of this epoch is not what an uninterrupted training would do: behind it there
            # is nothing to go on from.
            host.enter(stands, last=True)
        elif means is not None:
            host.enter(Place(epoch, "validated", means=means))
    host.enter(None)
    host.logs = logs = Logs({f"val_{name}": value for name, value in (means or {}).items()})
    host.emit.epoch_end(epoch, logs, host.step)
    if not whole:
        return False
    if (end_epoch := getattr(model, "end_epoch", None)) is not None:
        end_epoch()
    over = source.exhausted
    host.enter(Place(epoch + 1, over=over), last=over or epoch + 1 == plan.epochs)
    return not over


def _train_batches(model: Model, source: Source, epoch: int, host: Host, trained: int) -> tuple[int, bool]:
    """The batches of one epoch behind the first ``trained``: how many are trained then, and whether the epoch
    came to its end."""
    if trained and host.stopped():
        return trained, False
    step, whole = host.step, True
    train_batch, gate = model.train_batch, host.before_update
    behind = None  # the batch before: its logs, where nobody has read them yet
    while (batch := host.next(source)) is not None:
        emit = host.emit
        if emit.batch_begin is None:
            host.skip()
        else:
            logs = emit.logs()
            logs["batch"], logs["size"] = trained, batch.size  # as keyword arguments they cost twice as much
            emit.batch_begin(trained, logs, epoch, step)
        try:
            metrics = train_batch(batch) if gate is None else train_batch(batch, gate)
            emit = host.emit
            late = emit.late and metrics.__class__ is Unread
            if metrics.__class__ is Unread and not late:
                metrics = metrics.read()
            if behind is not None:
                host.logs = _read(*behind)
                behind = None
        except BaseException:
            host.broke_inside()
            raise
        host.step = step = step + 1
        if emit.batch_end is None:
            host.skip()
        else:
            logs = emit.logs()
            logs["batch"], logs["size"] = trained, batch.size
            if late:
                logs.update(metrics)
                behind = logs, metrics
            else:
                add_metrics(logs, metrics)
                host.logs = logs
            emit.batch_end(trained, logs, epoch, step)
        trained += 1
        host.safe_point()
        if host.stopped():
            whole = False
            break
    if behind is not None:
        try:
            host.logs = _read(*behind)
        except BaseException:
            host.broke_inside()
            raise
    return trained, whole and not host.stopped()


def _read(logs: dict[str, Any], metrics: Any) -> Mapping[str, Any]:
    """Waits for a batch; its logs as numbers."""
    return {**logs, **metrics.read()}


def evaluate(model: Model, source: Source, host: Host, epoch: int = NO_EPOCH) -> dict[str, Any] | None:
    """Means over all samples of ``source``, or None if a stop ended it before its end."""
    host.emit.test_begin(host.step, Logs())
    means, whole = test_batches(model, source, host, epoch)
    host.emit.test_end(host.step, Logs(means))
    return means if whole else None


def test_batches(model: Model, source: Source, host: Host, epoch: int) -> tuple[dict[str, Any], bool]:
    """The batches of an evaluation: means over the samples seen, and whether it came to its end. Of a model
    whose logs stand for the pass so far, the last ones."""
    source.begin(max(epoch, 0))
    accumulates = begin_pass(model)
    sums: dict[str, Any] = {}
    behind: Any = None  # the batch before, where nobody has read its logs yet
    seen = index = 0
    while (batch := host.next(source)) is not None:
        emit = host.emit
        if emit.test_batch_begin is None:
            host.skip()
        else:
            emit.test_batch_begin(index, emit.logs(batch=index, size=batch.size), epoch, host.step)
        emit = host.emit
        logs = emit.logs(batch=index, size=batch.size)
        metrics: Any = model.test_batch(batch)
        if behind is not None:
            behind.read()
            behind = None
        if metrics.__class__ is not Unread:
            add_metrics(logs, metrics)
        elif emit.test_batch_end is None:
            behind = metrics
        else:
            add_metrics(logs, metrics.read())
        seen += batch.size
        for name, value in logs.items():
            sums[name] = value if accumulates else sums.get(name, 0.0) + value * batch.size
        if emit.test_batch_end is None:
            host.skip()
        else:
            emit.test_batch_end(index, logs, epoch, host.step)
        index += 1
        host.safe_point()
        if host.stopped():
            break
    if behind is not None:
        sums |= behind.read()
    stopped = host.stopped()
    if not seen:
        if not stopped and not source.exhausted:
            warn_nothing_to_test()
        return {}, not stopped
    over = 1 if accumulates else seen
    means = {name: total / over for name, total in sums.items() if name not in ("batch", "size")}
    return means, not stopped


def begin_pass(model: Model) -> bool:
    """Tells a model that accumulates (:class:`~asynccb.protocols.Accumulates`); whether it does."""
    begin = getattr(model, "begin_pass", None)
    if begin is None:
        return False
    begin()
    return True


def predict(model: Model, source: Source, host: Host) -> list[Any]:
    """The model's outputs, batch by batch; fewer than all if a stop ended it."""
    source.begin(0)
    outputs: list[Any] = []
    while (batch := host.next(source)) is not None:
        index = len(outputs)
        emit = host.emit
        if emit.predict_batch_begin is None:
            host.skip()
        else:
            emit.predict_batch_begin(index, emit.logs(batch=index, size=batch.size), NO_EPOCH, host.step)
        outputs.append(model.predict_batch(batch))
        emit = host.emit
        if emit.predict_batch_end is None:
            host.skip()
        else:
            logs = emit.logs(batch=index, size=batch.size, outputs=outputs[-1])
            emit.predict_batch_end(index, logs, NO_EPOCH, host.step)
        host.safe_point()
        if host.stopped():
            break
    return outputs


def add_metrics(logs: dict[str, Any], metrics: Mapping[str, Any]) -> None:
    """Adds the metrics of a batch to its logs, as Python numbers (arrays stay arrays)."""
    for name, value in metrics.items():
        kind = value.__class__
        logs[name] = value if kind is float or kind is int else as_number(value)


def as_number(value: Any) -> Any:
    """A NumPy or framework scalar as a Python number, so that it goes into JSON; anything else as it is."""
    if isinstance(value, (bool, int, float)) and hasattr(value, "item"):
        return value.item()
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    return value
