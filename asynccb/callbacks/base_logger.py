"""Means of an epoch, over its samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from asynccb.callbacks.base import Callback

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["BaseLogger"]


def _reads_late(hook: Any) -> Any:
    """Marks a hook that does no more than keep the logs of a model that accumulates."""
    hook.reads_late = True
    return hook


class BaseLogger(Callback):
    """Adds the epoch's mean of each training metric to the logs of ``on_epoch_end``.

    Every training has one, first in the list. Batches are weighted by their ``size``; if no batch of the
    epoch tells its size, all count alike. Means are taken for the names in ``params["metrics"]`` that
    batches logged (where the model does not name its metrics before it trains: for every number that they
    logged but ``batch`` and ``size``), over the batches that logged them. They are plain floats. All other
    keys in the epoch's logs, ``val_*`` above all, are left alone. Of a model whose batches already log values
    of the epoch so far (``params["accumulated"]``; a Keras model), the last ones are the epoch's.

    Args:
        stateful_metrics: names of metrics whose value in a batch already stands for the epoch so far: their
            last value is logged in place of a mean. Default: none.
    """

    changes_model: ClassVar[bool] = False

    def __init__(self, *, stateful_metrics: Iterable[str] | None = None) -> None:
        self.stateful_metrics = frozenset(stateful_metrics or ())
        self._reset()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._reset()

    @_reads_late
    def on_batch_end(self, batch: int, logs: Any = None) -> None:
        # After every batch of every training: what can be prepared once is prepared in _turn_to.
        if not logs:
            return
        if len(logs) != self._width:
            self._turn_to(logs)
        size = logs.get("size")
        if not size:
            self._add_without_size(logs)
            return
        totals = self._totals
        try:
            for name in self._averaged:
                value = logs[name]
                totals[name] += (value if value.__class__ is float else _plain(value)) * size
        except KeyError:
            self._add_rest(logs, size, name)
        self._samples += size
        if self._stateful:
            self._keep_last(logs)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if logs is None:
            return
        self._weigh()
        for name in self._metrics() or [*self._totals, *self._last]:
            if name in self._last:
                logs[name] = _plain(self._last[name])
            elif self._weights.get(name):
                logs[name] = self._totals[name] / self._weights[name]
            elif name in self._unweighted:
                total, batches = self._unweighted[name]
                logs[name] = total / batches

    def state_dict(self) -> dict[str, Any]:
        self._weigh()
        return {
            "totals": self._totals,
            "weights": self._weights,
            "unweighted": {name: [total, batches] for name, (total, batches) in self._unweighted.items()},
            "last": {name: _plain(value) for name, value in self._last.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._reset()
        self._totals.update(state["totals"])
        self._weights.update(state["weights"])
        for name, (total, batches) in state["unweighted"].items():
            self._unweighted[name] = total, batches
        self._last.update(state["last"])

    def _reset(self) -> None:
        self._width = 0
        self._averaged: list[str] = []
        self._stateful: list[str] = []
        self._samples = 0  # seen since _turn_to
        self._totals: dict[str, Any] = {}
        self._weights: dict[str, int] = {}
        self._unweighted: dict[str, tuple[Any, int]] = {}
        self._last: dict[str, Any] = {}

    def _metrics(self) -> list[str]:
        return list((self.params or {}).get("metrics") or ())

    def _turn_to(self, logs: Mapping[str, Any]) -> None:
        """Prepares for batches whose logs have these keys; in a plain training once an epoch."""
        self._weigh()
        self._width = len(logs)
        names = [name for name in self._metrics() or _numbers(logs) if name in logs]
        accumulated = (self.params or {}).get("accumulated", False)
        self._stateful = [name for name in names if accumulated or name in self.stateful_metrics]
        self._averaged = [name for name in names if name not in self._stateful]
        for name in self._averaged:
            self._totals.setdefault(name, 0.0)

    def _weigh(self) -> None:
        for name in self._averaged:
            self._weights[name] = self._weights.get(name, 0) + self._samples
        self._samples = 0

    def _add_rest(self, logs: Mapping[str, Any], size: int, missing: str) -> None:
        """As many keys as before, but others: goes on behind the names that this batch has added."""
        added = self._averaged[: self._averaged.index(missing)]
        self._turn_to(logs)
        for name in self._averaged:
            if name not in added:
                self._totals[name] += _plain(logs[name]) * size

    def _keep_last(self, logs: Mapping[str, Any]) -> None:
        self._last.update((name, logs[name]) for name in self._stateful if name in logs)

    def _add_without_size(self, logs: Mapping[str, Any]) -> None:
        if not logs.keys() >= set(self._averaged):
            self._turn_to(logs)
        self._keep_last(logs)
        for name in self._averaged:
            total, batches = self._unweighted.get(name, (0.0, 0))
            self._unweighted[name] = total + _plain(logs[name]), batches + 1


def _numbers(logs: Mapping[str, Any]) -> list[str]:
    return [name for name, value in logs.items() if name not in ("batch", "size") and _is_number(value)]


def _is_number(value: Any) -> bool:
    if isinstance(value, (int, float, np.generic)):
        return not isinstance(value, np.generic) or isinstance(value, np.number)
    return hasattr(value, "ndim")  # an array, of a framework too


def _plain(value: Any) -> Any:
    """A Python float, or a float64 array. A float32 would stay one through a sum, with its rounding."""
    if isinstance(value, float):
        return float(value)
    array = np.asarray(value, dtype=np.float64)
    return array.item() if array.ndim == 0 else array
