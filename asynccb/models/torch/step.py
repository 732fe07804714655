"""One batch of a ``TorchModel``: tensors, forward, loss, metrics, backward, the gate, the update."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from asynccb.errors import ArgumentError, in_words
from asynccb.models.torch.metrics import is_binary
from asynccb.models.torch.state import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from asynccb.models.torch.metrics import Metric
    from asynccb.models.torch.setting import Ambient, OwnRandom
    from asynccb.protocols import Batch, Gate


class Step:
    """A module with its loss, metrics and optimizer.

    Args:
        torch: the package.
        module, loss, optimizer, metrics, device, clip_norm, accumulate, scheduler: of the model.
        amp: the type of autocast, or None.
        random: the model's own stream, or None.

    Attributes:
        scaler: of the losses, with float16; else None.
        ambient: the settings of the thread that started the training, or None.
        scheduler: stepped after each update; None for one that counts epochs.
        pending: batches whose gradients wait for the update.
        buffer_segments: how many segments of a copy a pass overwrites (running means); None: some, and not
            known how many.
    """

    def __init__(
        self,
        torch: Any,
        *,
        module: Any,
        loss: Any,
        optimizer: Any,
        metrics: Mapping[str, Metric],
        device: Any,
        amp: Any,
        clip_norm: float | None,
        accumulate: int,
        scheduler: Any,
        random: OwnRandom | None,
    ) -> None:
        self.scaler = torch.amp.GradScaler(device.type) if amp is torch.float16 else None
        self.ambient: Ambient | None = None
        self.scheduler = scheduler
        self.pending = 0
        self.buffer_segments: int | None = None
        self._torch = torch
        self._module, self._loss, self._optimizer, self._metrics = module, loss, optimizer, metrics
        self._device, self._amp, self._clip_norm, self._accumulate = device, amp, clip_norm, accumulate
        self._random = random
        self._modes: list[tuple[Any, bool]] = []
        self._binary = is_binary(loss)
        floats = (parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())
        self._float = next(floats, torch.float32)

    def train(self, batch: Batch, gate: Gate | None) -> dict[str, float]:
        """One batch, and the update behind ``gate`` when a group of batches is whole."""
        self._to_train_mode()
        with self._drawing(), self._torch.enable_grad():
            if not self.pending:
                self._optimizer.zero_grad()
            output, y, loss = self._forward(batch, gate)
            if not loss.requires_grad:
                fix = "Is it detached, or is nothing of the module trainable?"
                raise ArgumentError("loss", in_words("its tensor"), "has no gradient", fix)
            scaled = loss if self._accumulate == 1 else loss / self._accumulate
            (scaled if self.scaler is None else self.scaler.scale(scaled)).backward()
            logs = self._logs(output, y, loss)
            self.pending += 1
            if self.pending >= self._accumulate:
                self._update(gate)
        return logs

    def test(self, batch: Batch, gate: Gate | None) -> dict[str, float]:
        """Loss and metrics without an update."""
        self._to_eval_mode()
        with self._drawing(), self._torch.inference_mode():
            return self._logs(*self._forward(batch, gate))

    def predict(self, batch: Batch, gate: Gate | None) -> Any:
        """The outputs as new arrays, in the structure that the module gives."""
        self._to_eval_mode()
        self._ask_for_buffers(gate)
        with self._drawing(), self._torch.inference_mode():
            with self._cast():
                output = self._call(self._tensors(batch.x))
            return map_tensors(lambda tensor: np.array(shown(tensor)), output)

    def _to_train_mode(self) -> None:
        """Parts that were in eval mode in the batches before (a frozen BatchNorm) are so again."""
        if self._module.training:
            return
        self._module.train()
        for part, mode in self._modes:  # parents first: what sets a mode sets those of all inside
            if part.training is not mode:
                part.train(mode)
        self._modes = []

    def _to_eval_mode(self) -> None:
        if self._module.training:
            self._modes = [(part, part.training) for part in self._module.modules()]
        self._module.eval()

    def _forward(self, batch: Batch, gate: Gate | None) -> tuple[Any, Any, Any]:
        self._ask_for_buffers(gate)
        x, y = self._tensors(batch.x), self._tensors(batch.y, target=True)
        with self._cast():
            output = self._call(x)
            loss = self._scalar(self._loss(output, y), batch)
        return output, y, loss

    def _call(self, x: Any) -> Any:
        if isinstance(x, (tuple, list)):
            return self._module(*x)
        return self._module(**x) if isinstance(x, dict) else self._module(x)

    def _scalar(self, loss: Any, batch: Batch) -> Any:
        """The loss of a batch as one number."""
        if not isinstance(loss, self._torch.Tensor):
            raise ArgumentError("loss", loss, "must return a tensor: loss(output, target)")
        weight = batch.sample_weight
        if loss.ndim == 0:
            if weight is not None:
                refuse_weights()
            return loss
        size = batch.size or len(next(_leaves(batch.x)))
        if loss.shape[0] != size:
            shape = in_words(f"a tensor of shape {tuple(loss.shape)}")
            wanted = f"must return one number, or one for each of {size} samples"
            raise ArgumentError("loss", shape, wanted, "Average it")
        each = loss if loss.ndim == 1 else loss.flatten(1).mean(1)
        return each.mean() if weight is None else (each * self._tensors(weight).reshape(-1)).sum() / size

    def _logs(self, output: Any, y: Any, loss: Any) -> dict[str, float]:
        logs = {"loss": loss.item()}
        if self._metrics:
            # A metric that is reset in inference mode could not collect in training batches.
            with self._torch.inference_mode(False), self._torch.no_grad():
                output = map_tensors(lambda tensor: tensor.detach(), output)
                for name, metric in self._metrics.items():
                    logs[name] = metric(output, y)
        return logs

    def _update(self, gate: Gate | None) -> None:
        optimizer, scaler = self._optimizer, self.scaler
        if self._clip_norm is not None:
            if scaler is not None:
                scaler.unscale_(optimizer)
            self._torch.nn.utils.clip_grad_norm_(learned(optimizer), self._clip_norm)
        if gate is not None and gate.copying:
            gate()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        self.pending = 0
        if self.scheduler is not None:
            self.scheduler.step()

    def _ask_for_buffers(self, gate: Gate | None) -> None:
        if self.buffer_segments != 0 and gate is not None and gate.copying:
            gate(self.buffer_segments)

    def _tensors(self, data: Any, *, target: bool = False) -> Any:
        return _map(lambda array: self._tensor(array, target), data)

    def _tensor(self, array: Any, target: bool) -> Any:
        if isinstance(array, self._torch.Tensor):
            return array.to(self._device, non_blocking=True)
        array = np.asarray(array)
        if target and self._binary and array.dtype.kind in "biu":
            array = array.astype(np.float32)
        elif target and array.dtype.kind in "iu":
            array = array.astype(np.int64, copy=False)
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        if array.base is not None or not array.flags.writeable:
            array = np.array(array)  # a module may overwrite what it gets, and this is the caller's
        dtype = self._float if array.dtype.kind == "f" else None
        return self._torch.from_numpy(array).to(device=self._device, dtype=dtype)

    def _cast(self) -> Any:
        if self._amp is not None:
            return self._torch.autocast(self._device.type, self._amp)
        outer = None if self.ambient is None else self.ambient.autocast()
        return contextlib.nullcontext() if outer is None else outer

    def _drawing(self) -> Any:
        return contextlib.nullcontext() if self._random is None else self._random


def learned(optimizer: Any) -> list[Any]:
    """The parameters of an optimizer, in its order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def refuse_weights() -> NoReturn:
    fix = 'Give one that does not average: reduction="none". The same goes for class_weight'
    raise ArgumentError("sample_weight", in_words("an array"), "needs a loss of each sample", fix)


def map_tensors(function: Callable[[Any], Any], data: Any) -> Any:
    """``function`` of each tensor of a structure (tuple, list, dict), in the same structure."""
    return _map(lambda leaf: function(leaf) if hasattr(leaf, "detach") else leaf, data)


def _map(function: Callable[[Any], Any], data: Any) -> Any:
    if data is None:
        return None
    if isinstance(data, dict):
        return {name: _map(function, part) for name, part in data.items()}
    if isinstance(data, (tuple, list)):
        parts = [_map(function, part) for part in data]
        return parts if isinstance(data, list) else tuple(parts)
    return function(data)


def _leaves(data: Any) -> Iterator[Any]:
    if isinstance(data, (dict, tuple, list)):
        for part in data.values() if isinstance(data, dict) else data:
            yield from _leaves(part)
    else:
        yield data
