"""Batches, and where in the data they stand.

The order of an epoch depends on (seed, epoch) alone: two fits with one seed shuffle alike, and an epoch can
be shuffled without shuffling the ones before it.
"""

from __future__ import annotations

import itertools
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from asynccb.errors import ArgumentError, in_words
from asynccb.protocols import Batch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

__all__ = ["ArrayFeed", "IterableFeed", "as_batch", "check_seekable", "map_arrays", "samples_in"]


class ArrayFeed:
    """Arrays cut into batches.

    Args:
        x: one array, or a tuple, list or dict of arrays; samples on axis 0.
        y: likewise, or None.
        sample_weight: float array of shape (samples,), or None.
        batch_size: samples in a batch; the last batch of an epoch may be smaller.
        shuffle: True: samples in a new order each epoch. ``"batch"``: whole batches in a new order. False: as
            they are.
        seed: of the order.
        steps: batches in an epoch, where fewer than the arrays give.
    """

    def __init__(
        self,
        x: Any,
        y: Any,
        sample_weight: Any,
        *,
        batch_size: int,
        shuffle: bool | str = False,
        seed: int = 0,
        steps: int | None = None,
    ) -> None:
        self._x, self._y, self._weight = x, y, sample_weight
        self._batch_size = batch_size
        self._shuffle = shuffle
        self.seed = seed
        whole = samples_in(x)
        self.steps: int = -(-whole // batch_size) if steps is None else steps
        self.samples: int = min(whole, self.steps * batch_size)
        self._whole = whole
        self.exhausted = False
        self._batches: Iterator[Batch] = iter(())

    def begin(self, epoch: int, at: int = 0) -> None:
        self._batches = self._cut(self._ordered(epoch) if self._shuffle else None, at)

    def next(self) -> Batch | None:
        return next(self._batches, None)

    def close(self) -> None:
        self._batches = iter(())

    def check_seekable(self, argument: str, purpose: str) -> None:
        """The order is a function of (seed, epoch)."""

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seed = int(state["seed"])

    def _cut(self, order: np.ndarray[Any, Any] | None, first: int) -> Iterator[Batch]:
        """The batches of one pass from the ``first`` on. A generator: what it looks up once is then at hand
        for every batch."""
        take_x, take_y, weight, full = _taker(self._x), _taker(self._y), self._weight, self._batch_size
        for start in range(first * full, self.samples, full):
            stop = start + full
            size = full if stop <= self._whole else self._whole - start
            rows = slice(start, stop) if order is None else order[start:stop]
            yield Batch(take_x(rows), take_y(rows), None if weight is None else weight[rows], size)

    def _ordered(self, epoch: int) -> np.ndarray[Any, Any]:
        generator = np.random.default_rng([self.seed, epoch])
        if self._shuffle != "batch":
            return generator.permutation(self._whole)
        # The last batch, which may be smaller, keeps its place: all others have the size that is promised.
        full = self._whole // self._batch_size
        starts = generator.permutation(full) * self._batch_size
        order = (starts[:, None] + np.arange(self._batch_size)).reshape(-1)
        return np.concatenate([order, np.arange(full * self._batch_size, self._whole)])


def _taker(data: Any) -> Callable[[Any], Any]:
    """A function from rows to these rows of every array of a structure."""
    if isinstance(data, np.ndarray):
        return data.__getitem__
    return lambda rows: map_arrays(lambda array: array[rows], data)


class IterableFeed:
    """Batches from an iterable: a generator, a list of batches, a framework's loader.

    An item is a batch: ``x``, ``(x,)``, ``(x, y)``, ``(x, y, sample_weight)`` or a
    :class:`~asynccb.protocols.Batch`. Without ``steps`` an epoch is one pass; with it, passes follow each
    other and an epoch ends after ``steps`` batches.

    It can go on in the middle of a pass if ``source`` is a list or tuple, or has ``seek(pass, batch)``, which
    tells its next ``iter`` where to begin (passes of a training count from 0, whatever its first epoch), or
    ``state_dict()`` and ``load_state_dict(state)``, as the stateful loaders of torchdata have.

    Args:
        source: iterated on the training thread.
        steps: batches in an epoch, or None for a whole pass.
        weigh: makes sample weights of a batch from class weights, or None.
    """

    def __init__(
        self, source: Iterable[Any], *, steps: int | None, weigh: Callable[[Batch], Batch] | None = None
    ) -> None:
        self._source = source
        self._weigh = weigh
        self._given_steps = steps
        self._iterator: Iterator[Any] | None = None
        self._left = -1
        self._pass, self._taken = -1, 0  # the pass under way, and items taken of it
        self._epoch = -1  # that began last, and where
        self._began = (0, 0)
        self._resumes = False
        self.steps = steps if steps is not None else _length(source)
        self.samples: int | None = None
        self.exhausted = False

    def begin(self, epoch: int, at: int = 0) -> None:
        again, self._epoch = self._resumes and epoch == self._epoch, epoch
        if self._given_steps is None:
            self._open(self._pass if again else self._pass + 1, at)
            return
        self._left = self._given_steps - at
        if not again:
            self._began = (max(self._pass, 0), self._taken)
        elif not at:
            self._pass, self._taken = self._began
        if self._resumes or self._iterator is None:
            self._open(max(self._pass, 0), self._taken)

    def check_seekable(self, argument: str, purpose: str) -> None:
        check_seekable(self._source, argument, purpose, by_state=True)

    def state_dict(self) -> dict[str, Any]:
        own = self._source.state_dict() if _keeps_state(self._source) else None  # type: ignore[attr-defined]
        return {
            "pass": self._pass,
            "taken": self._taken,
            "epoch": self._epoch,
            "began": self._began,
            "exhausted": self.exhausted,
            "source": own,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._pass, self._taken, self._epoch = (int(state[name]) for name in ("pass", "taken", "epoch"))
        self._began = int(state["began"][0]), int(state["began"][1])
        self.exhausted, self._resumes = bool(state["exhausted"]), True
        if state["source"] is not None:
            self._source.load_state_dict(state["source"])  # type: ignore[attr-defined]

    def _open(self, number: int, at: int) -> None:
        """Begins a pass behind its first ``at`` items."""
        resumes, self._resumes = self._resumes, False
        self._pass, self._taken = number, at
        if resumes and callable(seek := getattr(self._source, "seek", None)):
            seek(number, at)
        elif resumes and isinstance(self._source, (list, tuple)):
            self._iterator = itertools.islice(self._source, at, None)
            return
        self._iterator = iter(self._source)  # what keeps a state of its own was told by that where it stands

    def next(self) -> Batch | None:
        if self._left == 0 or self.exhausted:
            return None
        item = next(self._iterator, _END) if self._iterator is not None else _END
        if item is _END and self._left > 0:
            item = self._next_pass()
        if item is _END:
            return None
        self._left -= 1
        self._taken += 1
        batch = as_batch(item)
        return batch if self._weigh is None else self._weigh(batch)

    def close(self) -> None:
        """Closes a generator under way, ends a loader's processes: who keeps the run keeps none of these."""
        self._iterator = None

    def _next_pass(self) -> Any:
        self._open(self._pass + 1, 0)
        assert self._iterator is not None
        item = next(self._iterator, _END)
        if item is _END:
            self.exhausted = True
            warn_ran_out(self._left)
        return item


_END = object()


def _keeps_state(source: object) -> bool:
    return callable(getattr(source, "state_dict", None)) and callable(
        getattr(source, "load_state_dict", None)
    )


def check_seekable(source: object, argument: str, purpose: str, *, by_state: bool) -> None:
    """Refuses data that another process could not go on with in its middle.

    Raises:
        ArgumentError: neither a list or tuple nor something with ``seek``; with ``by_state``, nor something
            that keeps a state of its own.
    """
    if isinstance(source, (list, tuple)) and by_state:
        return
    if callable(getattr(source, "seek", None)) or (by_state and _keeps_state(source)):
        return
    raise ArgumentError(
        argument,
        in_words(type(source).__name__),
        f"data that can go on in its middle, because {purpose}",
        "Give arrays, a list of batches, or an object with seek(pass, batch)"
        + (" or with state_dict() and load_state_dict()" if by_state else ""),
    )


def warn_ran_out(missing: int) -> None:
    """The data ended before the epoch did."""
    warnings.warn(
        f"the data ran out with {missing} batches of the epoch missing, and no epoch gets any more of it. "
        "Give an iterable that yields batches for all epochs, or one that can be iterated again",
        UserWarning,
        stacklevel=2,
    )


def warn_nothing_to_test() -> None:
    """An evaluation had no batch, so that it has no means to give."""
    warnings.warn(
        "the data to validate or evaluate on gave no batch: there are no metrics of it. "
        "Can it be iterated more than once?",
        UserWarning,
        stacklevel=2,
    )


def refuse_empty(first: bool, *, said: bool) -> None:
    """A pass over the data gave no batch, and nobody stopped it.

    Raises:
        ArgumentError: ``first``, nothing was trained before; later it ends the training with a warning.
    """
    if first:
        raise ArgumentError("x", in_words("an iterable without batches"), "there must be data to train on")
    if said:  # by the source itself
        return
    warnings.warn(
        "the data gave no batch this epoch: the training ends here. Can `x` be iterated more than once?",
        UserWarning,
        stacklevel=2,
    )


def _length(source: object) -> int | None:
    try:
        return len(source)  # type: ignore[arg-type]
    except TypeError:
        return None


def as_batch(item: Any) -> Batch:
    """An item of an iterable as a batch.

    Raises:
        ArgumentError: it holds no samples, or more than x, y and sample_weight.
    """
    if isinstance(item, Batch):
        batch = item
    elif isinstance(item, (tuple, list)):
        if not 1 <= len(item) <= 3:
            raise ArgumentError(
                "x",
                in_words(f"an item of {len(item)} parts"),
                "a batch is x, (x, y) or (x, y, sample_weight)",
            )
        batch = Batch(*item)
    else:
        batch = Batch(item)
    size = batch.size or samples_in(batch.x)
    if size == 0:
        raise ArgumentError("x", in_words("a batch without samples"), "every batch has at least one sample")
    return batch if batch.size else batch._replace(size=size)


def map_arrays(function: Callable[[Any], Any], data: Any) -> Any:
    """``function`` of each array of a structure (tuple, list, dict), in the same structure. None stays
    None."""
    if data is None:
        return None
    if isinstance(data, dict):
        return {name: map_arrays(function, part) for name, part in data.items()}
    if isinstance(data, (tuple, list)):
        return type(data)(map_arrays(function, part) for part in data)
    return function(data)


def samples_in(data: Any) -> int:
    """The samples on axis 0 of the first array of a structure. A list of numbers or rows is one array."""
    while isinstance(data, dict) and data:
        data = next(iter(data.values()))
    first = data
    while isinstance(first, (dict, tuple, list)) and len(first):
        first = next(iter(first.values())) if isinstance(first, dict) else first[0]
    shape = getattr(first, "shape", None)
    if shape is not None and len(shape):
        return int(shape[0])
    try:
        return len(data)
    except TypeError:
        return 1
