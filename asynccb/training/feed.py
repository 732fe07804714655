"""Batches, and where in the data they stand.

The order of an epoch depends on (seed, epoch) alone: two fits with one seed shuffle alike, and an epoch can
be shuffled without shuffling the ones before it.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from asynccb.errors import ArgumentError, in_words
from asynccb.protocols import Batch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["ArrayFeed", "IterableFeed", "as_batch", "map_arrays", "samples_in"]


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
        self._seed = seed
        whole = samples_in(x)
        self.steps: int = -(-whole // batch_size) if steps is None else steps
        self.samples: int = min(whole, self.steps * batch_size)
        self._whole = whole
        self.exhausted = False
        self._batches: Iterator[Batch] = iter(())

    def begin(self, epoch: int) -> None:
        self._batches = self._cut(self._ordered(epoch) if self._shuffle else None)

    def next(self) -> Batch | None:
        return next(self._batches, None)

    def _cut(self, order: np.ndarray[Any, Any] | None) -> Iterator[Batch]:
        """The batches of one pass. A generator: what it looks up once is then at hand for every batch."""
        take_x, take_y, weight, full = _taker(self._x), _taker(self._y), self._weight, self._batch_size
        for start in range(0, self.samples, full):
            stop = start + full
            size = full if stop <= self._whole else self._whole - start
            rows = slice(start, stop) if order is None else order[start:stop]
            yield Batch(take_x(rows), take_y(rows), None if weight is None else weight[rows], size)

    def _ordered(self, epoch: int) -> np.ndarray[Any, Any]:
        generator = np.random.default_rng([self._seed, epoch])
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
        self.steps = steps if steps is not None else _length(source)
        self.samples: int | None = None
        self.exhausted = False

    def begin(self, epoch: int) -> None:
        if self._given_steps is None:
            self._iterator = iter(self._source)
        else:
            self._left = self._given_steps
            if self._iterator is None:
                self._iterator = iter(self._source)

    def next(self) -> Batch | None:
        if self._left == 0 or self.exhausted:
            return None
        item = next(self._iterator, _END) if self._iterator is not None else _END
        if item is _END and self._left > 0:
            item = self._next_pass()
        if item is _END:
            return None
        self._left -= 1
        batch = as_batch(item)
        return batch if self._weigh is None else self._weigh(batch)

    def _next_pass(self) -> Any:
        self._iterator = iter(self._source)
        item = next(self._iterator, _END)
        if item is _END:
            self.exhausted = True
            warn_ran_out(self._left)
        return item


_END = object()


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


def refuse_empty(first_epoch: bool, *, said: bool) -> None:
    """A pass over the data gave no batch, and nobody stopped it.

    Raises:
        ArgumentError: in the first epoch; later ones end the training with a warning.
    """
    if first_epoch:
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
