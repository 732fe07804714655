"""What happened, epoch by epoch: the record that ``fit`` returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from asynccb.callbacks.base import Callback

if TYPE_CHECKING:
    from collections.abc import Mapping

    from asynccb.errors import Failure

__all__ = ["History"]


class History(Callback):
    """Records the logs of every epoch. Every training has one; ``fit`` returns it.

    A History that you put into ``callbacks`` replaces the automatic one. It starts anew with each training.
    All of it may be read from any thread at any time; while the training runs, :meth:`rows` alone shows
    whole epochs only, as the lists of ``history`` grow one after the other.

    Attributes:
        history: for each key of the logs (``lr`` and the like included) the list of its values. As in
            Keras, a key that some epoch lacks has a shorter list; :meth:`rows` keeps values and epochs
            together.
        epoch: the 0-based indices of the epochs recorded.
        outcome: ``"completed"``, ``"stopped"``, ``"cancelled"`` or ``"failed"``; None until the training is
            over.
        reason: why it stopped, in words; None where nobody gave a reason.
        failures: the first failure of each hook of each callback that ran beside the training, with its
            count.
    """

    changes_model: ClassVar[bool] = False

    history: dict[str, list[Any]]
    epoch: list[int]
    outcome: str | None
    reason: str | None
    failures: list[Failure]
    _regular: bool  # every epoch has the same keys, in the same order

    def __init__(self) -> None:
        self._reset()

    def on_train_begin(self, logs: Any = None) -> None:
        self._reset()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._record(epoch, dict(logs or {}))

    def state_dict(self) -> dict[str, Any]:
        if self._regular:  # columns are copied and written many times quicker than rows
            return {"epochs": self.epoch, "columns": self.history}
        return {"epochs": self.epoch, "logs": [logs for _, logs in self._rows]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "columns" in state:
            keys, columns = list(state["columns"]), state["columns"].values()
            rows = [dict(zip(keys, values, strict=True)) for values in zip(*columns, strict=True)]
        else:
            rows = state["logs"]
        for epoch, logs in zip(state["epochs"], rows or [{} for _ in state["epochs"]], strict=True):
            self._record(epoch, logs)

    def recorded(self) -> list[tuple[int, dict[str, Any]]]:
        """The 0-based epochs, each with the logs as they were; not to be changed."""
        return list(self._rows)

    def rows(self) -> list[dict[str, Any]]:
        """One dict for each epoch: ``epoch`` (0-based) first, then the logs of that epoch, and only those.

        The list and its dicts are the caller's own. What ``csv.DictWriter`` or a data frame takes::

            pandas.DataFrame(history.rows())
        """
        return [{"epoch": epoch} | logs | {"epoch": epoch} for epoch, logs in list(self._rows)]

    def _record(self, epoch: int, logs: dict[str, Any]) -> None:
        self._regular = self._regular and (not self._rows or list(logs) == list(self.history))
        self._rows.append((epoch, logs))
        self.epoch.append(epoch)
        new = [key for key in logs if key not in self.history]
        if new:
            # A new dict in place of the old one: somebody may be iterating over that in another thread.
            self.history = {**self.history, **{key: [] for key in new}}
        for key, value in logs.items():
            self.history[key].append(value)

    def _reset(self) -> None:
        self.history = {}
        self.epoch = []
        self.outcome = None
        self.reason = None
        self.failures = []
        self._regular = True
        self._rows: list[tuple[int, dict[str, Any]]] = []
