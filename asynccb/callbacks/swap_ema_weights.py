"""Averages of the weights, which take the weights' place where the model is looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from asynccb.callbacks.base import Callback
from asynccb.callbacks.weights import averaged_weights, copied_weights, current_weights, require_weights
from asynccb.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["SwapEMAWeights"]


class SwapEMAWeights(Callback):
    """Keeps the exponential moving average of the weights, and evaluates the model with it.

    After each training batch ``average = momentum * average + (1 - momentum) * weights``, beginning with the
    weights after the first batch, as the optimizers of Keras do with ``use_ema=True``. Trainable weights are
    averaged; others (running means) stay with the model, and so do those that are no floats.

    Before an evaluation or a prediction inside the training the averages take the weights' place, and the
    weights come back after it. With ``swap_on_epoch`` the averages are there from the end of each epoch to
    the begin of the next one. As in Keras, the model has the averages when the training has come to its end,
    completed or stopped, so that they are what is saved and used then; after a cancel or a failure it has its
    own weights. A training that is resumed goes on from its own weights.

    It runs inline. A callback sees the averages or the weights by its place in the list: to save checkpoints
    of the averages give ``swap_on_epoch=True`` and list ModelCheckpoint behind this callback; listed before
    it, ModelCheckpoint saves the weights that are trained. EarlyStopping with ``restore_best_weights`` has
    the last word only if it is listed behind. The averages are updated in place: no batch makes new arrays,
    if the model shows its own (``weights`` with arrays as ``value``, as Sequential does).

    Args:
        momentum: how much of the average stays at each batch, from 0 to below 1. Default 0.99.
        swap_on_epoch: the averages stand in between the epochs too. Default False.

    Raises:
        ArgumentError: ``momentum`` out of range; when the training starts, a model without ``get_weights``
            and ``set_weights``.
    """

    _averages: list[tuple[int, Array, Array]]  # index of the weight, average, room for what is added to it
    _weights: list[Array] | None  # the model's own, while the averages stand in

    def __init__(self, momentum: float = 0.99, swap_on_epoch: bool = False) -> None:
        if not isinstance(momentum, (int, float)) or not 0 <= momentum < 1:
            raise ArgumentError("momentum", momentum, "a number from 0 to below 1")
        self.momentum = float(momentum)
        self.swap_on_epoch = swap_on_epoch
        self._forget()

    def on_train_begin(self, logs: Any = None) -> None:
        self._forget()
        require_weights(self.model, "SwapEMAWeights")

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        weights = current_weights(self.model)
        if not self._averages:
            self._begin(weights)
            return
        momentum, rest = self.momentum, 1.0 - self.momentum
        for index, average, part in self._averages:
            np.multiply(weights[index], rest, out=part)
            np.multiply(average, momentum, out=average)
            np.add(average, part, out=average)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._swap_back()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self.swap_on_epoch:
            self._swap_in()

    def on_test_begin(self, logs: Any = None) -> None:
        self._swap_in()

    def on_test_end(self, logs: Any = None) -> None:
        self._swap_back()

    def on_predict_begin(self, logs: Any = None) -> None:
        self._swap_in()

    def on_predict_end(self, logs: Any = None) -> None:
        self._swap_back()

    def on_exception(self, exception: BaseException) -> None:
        self._swap_back()
        self._forget()

    def on_train_end(self, logs: Any = None) -> None:
        self._swap_in()
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        return {
            "averages": [[index, average] for index, average, _ in self._averages],
            "weights": self._weights,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        averages = [(int(index), average) for index, average in state["averages"]]
        self._averages = _with_room(averages)
        self._weights = state["weights"]

    def _forget(self) -> None:
        self._averages = []
        self._weights = None

    def _begin(self, weights: list[Array]) -> None:
        chosen = averaged_weights(self.model, weights)
        self._averages = _with_room([(index, weights[index].copy()) for index in chosen])

    def _swap_in(self) -> None:
        if not self._averages or self._weights is not None:
            return
        self._weights = copied_weights(self.model)
        standing_in = list(self._weights)
        for index, average, _ in self._averages:
            standing_in[index] = average
        self.model.set_weights(standing_in)

    def _swap_back(self) -> None:
        weights, self._weights = self._weights, None
        if weights is not None:
            self.model.set_weights(weights)


def _with_room(averages: list[tuple[int, Array]]) -> list[tuple[int, Array, Array]]:
    """Each average with a place for what is added to it; one memory for all of them, the largest one's."""
    largest = max((average.nbytes for _, average in averages), default=0)
    memory = np.empty(largest, np.uint8)
    return [
        (index, average, memory[: average.nbytes].view(average.dtype).reshape(average.shape))
        for index, average in averages
    ]
