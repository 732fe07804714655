"""One batch of a compiled model: forward, loss, metrics, backward, the gate, the update."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from asynccb.models import metrics as metrics_room
from asynccb.models.heads import head_for
from asynccb.models.memory import lay_out

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asynccb.models.arrays import Array
    from asynccb.models.losses import Loss
    from asynccb.models.network import Network
    from asynccb.models.optimizers import Optimizer
    from asynccb.protocols import Gate


class Step:
    """A network with its head, metrics and optimizer.

    Args:
        network: the bound layers.
        output_shape: shape of one sample's output.
        loss: what is minimized.
        metrics: names of metrics.
        optimizer: built on the network's arrays by this constructor.

    Attributes:
        memory: where the state of both lies.
    """

    def __init__(
        self,
        network: Network,
        output_shape: tuple[int, ...],
        loss: Loss,
        metrics: Sequence[str],
        optimizer: Optimizer,
    ) -> None:
        self._network = network
        self._head, fused = head_for(loss, network.last_activation)
        network.leave_out_last(fused)
        self._sparse = loss.sparse
        self._outputs = output_shape[-1]
        self._dtype = network.params.dtype
        keys = metrics_room.log_names(metrics)[1:]
        self._metrics = [
            (key, metrics_room.resolve(name, loss, self._outputs))
            for key, name in zip(keys, metrics, strict=True)
        ]
        self._optimizer = optimizer
        optimizer.build(network.params, network.grads, network.table, network.layout)
        self.memory = lay_out(network, optimizer)

    def train(self, x: Array, y: Any, sample_weight: Any, gate: Gate | None) -> dict[str, float]:
        """One update, behind ``gate`` where that is copying."""
        # A diverging model overflows; that is for the callbacks to see in the loss, not for a warning per
        # batch.
        with np.errstate(all="ignore"):
            network = self._network
            logs = self._pass(x, y, sample_weight)
            self._optimizer.update(gate)
            if network.commits:
                if gate is not None and gate.copying:
                    gate(self.memory.through_moving)
                for commit in network.commits:
                    commit()
        return logs

    def differentiate(self, x: Array, y: Any, sample_weight: Any) -> None:
        """Fills the gradients of the network as :meth:`train` does, and stops there."""
        with np.errstate(all="ignore"):
            self._pass(x, y, sample_weight)

    def test(self, x: Array, y: Any, sample_weight: Any) -> dict[str, float]:
        """Loss and metrics without an update."""
        with np.errstate(all="ignore"):
            return self._logs(self._network.evaluate(x), y, sample_weight)

    def _pass(self, x: Array, y: Any, sample_weight: Any) -> dict[str, float]:
        network = self._network
        logs = self._logs(network.forward(x), y, sample_weight)
        network.backward(self._gradient())
        return logs

    def _logs(self, z: Array, y: Any, sample_weight: Any) -> dict[str, float]:
        self._shape = z.shape
        if z.ndim != 2:
            z = z.reshape(-1, self._outputs)
        targets = self._targets(y, z)
        head = self._head
        logs = {"loss": head.forward(targets, z, self._weights(sample_weight, len(z)))}
        if self._metrics:
            prediction = head.prediction()
            for key, metric in self._metrics:
                logs[key] = metric(targets, prediction)
        return logs

    def _gradient(self) -> Array:
        g = self._head.backward()
        return g if len(self._shape) == 2 else g.reshape(self._shape)

    def _targets(self, targets: Any, z: Array) -> Array:
        y: Array = np.asarray(targets)
        if self._sparse:
            y = y.reshape(-1)
            return y if y.dtype.kind in "iu" else y.astype(np.intp)
        if y.dtype != self._dtype:
            y = y.astype(self._dtype)
        return y if y.shape == z.shape else y.reshape(z.shape)

    def _weights(self, sample_weight: Any, rows: int) -> Array | None:
        if sample_weight is None:
            return None
        weights = np.asarray(sample_weight, self._dtype).reshape(-1)
        return weights if len(weights) == rows else np.repeat(weights, rows // max(1, len(weights)))
