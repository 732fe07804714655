"""``TorchModel``: what a training asks of a module, its loss and its optimizer."""

from __future__ import annotations

import functools
import os
import threading
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from asynccb.errors import ArgumentError, ModelBusy, in_words
from asynccb.models.memory import parts
from asynccb.models.torch import checking
from asynccb.models.torch import metrics as metrics_room
from asynccb.models.torch.blueprint import Blueprint, check_fits
from asynccb.models.torch.setting import Ambient, OwnRandom, generators
from asynccb.models.torch.state import (
    TorchState,
    can_be_shown,
    check_path,
    copied,
    flat,
    like,
    read_state,
    shown,
    slot_names,
    split,
)
from asynccb.models.torch.step import Step, learned, refuse_weights
from asynccb.protocols import LiveState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from asynccb.models.arrays import Array
    from asynccb.protocols import Batch, Gate

__all__ = ["TorchModel", "load_weights"]


def adapt(module: Any) -> NoReturn:
    """Refuses what has no loss and no optimizer: there is nothing to train it with.

    Raises:
        ArgumentError: always; it says how to write it.
    """
    raise checking.refuse_bare(module)


def load_weights(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The weights in a file that a ``TorchModel`` was saved as, for ``module.load_state_dict(...)``: tensors
    on the CPU. No code in the file is run. Blocks.

    Args:
        path: ``.pt``, ``.pth``, ``.safetensors``; all others are HDF5.

    Raises:
        FileNotFoundError: there is no such file.
        FileRefused: it is damaged, not safe, or holds something else.
        ImportError: PyTorch, or for ``.safetensors`` safetensors, is not installed.
    """
    checking.import_torch()
    found: dict[str, Any] = read_state(os.fspath(path))["weights"]
    return found


class Weight(NamedTuple):
    """A tensor of the module's ``state_dict()``, as callbacks see it: ``value`` is a read-only array, on the
    CPU the tensor's own memory."""

    name: str
    value: Array
    trainable: bool


class TorchModel:
    """An ``nn.Module``, trained by a loss and an optimizer of torch.

    A batch is that of a hand-written loop: ``zero_grad``, the module's output, the loss, ``backward``,
    ``optimizer.step``. ``x`` is the module's argument; a tuple or list is its positional arguments, a dict
    its arguments by name. Arrays, and tensors given as all the data, become tensors: floats in the type of
    the module's parameters, whole numbers that are targets as int64 (of a binary cross-entropy as floats).
    Tensors in batches, as a DataLoader gives them, stay of the type that they are. All go to ``device``.

    The module is in train mode in training batches, in eval mode and ``torch.inference_mode`` in all others.
    Parts that are in eval mode while the module is in train mode stay in it. Gradients are computed whatever
    the caller's gradient mode is. Autocast, default device and gradient mode of the thread that starts a
    training count in its batches too.

    Args:
        module: an ``nn.Module``; stays the caller's own, and changes as it trains.
        loss: called as ``loss(output, target)``, answers a scalar tensor, or (``reduction="none"``) one with
            the samples on axis 0, of which the mean is taken. Only then there can be sample weights: the loss
            is ``sum(weight * loss) / samples``.
        optimizer: a ``torch.optim.Optimizer`` of the module's parameters. Callbacks set its learning rate:
            that of its first group; those of other groups keep their proportion to it.
        metrics: names (``"accuracy"``, ``"mae"``, ...), callables ``(output, target) -> number or tensor``,
            objects as torchmetrics has them (their value of each batch), or a dict from names to such.
            Callables get tensors without gradients; a tensor's mean is taken.
        device: where to compute; the module is moved there. None: where its parameters are.
        amp: ``"bfloat16"`` or ``"float16"``: autocast to it. With float16 losses are scaled.
        clip_norm: the largest norm of all gradients together. None: not clipped.
        accumulate: batches in one update, which gets the mean of their gradients. Groups go on from one epoch
            to the next, as in Keras; one that is open when a training ends is closed by the next training.
        scheduler: of ``torch.optim.lr_scheduler``, on this optimizer.
        scheduler_step: ``"epoch"``: stepped behind each whole epoch, after its callbacks. ``"batch"``: after
            each update.
        seed: batches draw random numbers (Dropout) from a stream of the model's own, which begins as after
            ``torch.manual_seed(seed)``, instead of from torch's process-wide one. Two models whose batches
            compute at the same time draw from each other's all the same, and are not exact to the byte:
            torch's generator is one for all threads. None: the process-wide one, which a resumed training
            sets back.

    Attributes:
        module, loss, optimizer, scheduler: as given.
        device: a ``torch.device``.
        stop_training: set it True from a callback to end the training after the batch.
        training_thread: identity of the thread that trains the model, None outside of trainings. While it is
            set, other threads are refused with ``ModelBusy``.
        training_gate: the gate of the training under way, None outside of trainings.

    Raises:
        ArgumentError: what cannot work: see each argument.
        ImportError: PyTorch is not installed.
    """

    has_test = has_predict = has_capture = has_live = has_restore = True
    check_path = staticmethod(check_path)

    def __init__(
        self,
        module: Any,
        loss: Any,
        optimizer: Any,
        metrics: Any = (),
        device: Any = None,
        *,
        amp: Any = None,
        clip_norm: float | None = None,
        accumulate: int = 1,
        scheduler: Any = None,
        scheduler_step: str = "epoch",
        seed: int | None = None,
    ) -> None:
        torch = checking.import_torch()
        checking.check_module(torch, module)
        checking.check_loss(loss)
        checking.check_optimizer(torch, optimizer, module, loss)
        checking.check_scheduler(torch, scheduler, optimizer, scheduler_step)
        checking.check_positive("clip_norm", clip_norm)
        checking.check_whole("accumulate", accumulate, 1)
        if seed is not None:
            checking.check_whole("seed", seed, 0)
        cast_to = checking.find_amp(torch, amp)
        self.device = checking.find_device(torch, device, module)
        self.module, self.loss, self.optimizer, self.scheduler = module, loss, optimizer, scheduler
        self._given = {"module": module, "loss": loss, "optimizer": optimizer, "scheduler": scheduler}
        self.stop_training = False
        self.training_gate: Gate | None = None
        self._thread: int | None = None
        self._torch = torch
        self._move()
        self._metrics = metrics_room.resolve(metrics, loss, self.device)
        self._random = None if seed is None else OwnRandom(seed, self.device)
        options = {"amp": amp, "clip_norm": clip_norm, "accumulate": accumulate}
        self._step = Step(
            torch,
            module=module,
            loss=loss,
            optimizer=optimizer,
            metrics=self._metrics,
            device=self.device,
            scheduler=scheduler if scheduler_step == "batch" else None,
            random=self._random,
            **options | {"amp": cast_to},
        )
        self._counts_epochs = scheduler is not None and scheduler_step == "epoch"
        options["scheduler_step"] = scheduler_step
        self._settings = {**checking.hyperparameters(optimizer), "device": self.device.type, **options}
        self._settings |= {"amp": str(amp), "own_random": seed is not None}
        self._settings["scheduler"] = None if scheduler is None else type(scheduler).__name__
        options["seed"] = seed
        make = functools.partial(_make, type(self), self.device, options)
        self._blueprint = Blueprint(torch, (module, loss, optimizer, scheduler, metrics), make)

    def _move(self) -> None:
        """Everything to the device; parameters stay the objects that the optimizer has."""
        optimizer = self.optimizer
        elsewhere = any(parameter.device != self.device for parameter in learned(optimizer))
        self.module.to(self.device)
        if isinstance(self.loss, self._torch.nn.Module):
            self.loss.to(self.device)
        if elsewhere and optimizer.state:
            optimizer.load_state_dict(optimizer.state_dict())

    # -- the Model protocol
    # ---------------------------------------------------------------------------------------

    @property
    def user_model(self) -> TorchModel:
        """The model itself."""
        return self

    @property
    def metrics_names(self) -> list[str]:
        """The keys of a batch's logs: ``loss`` first."""
        return ["loss", *self._metrics]

    def direction(self, metric: str) -> str | None:
        """``"min"`` for losses, ``"max"`` for accuracies, else what the metric says of itself."""
        return metrics_room.direction(metric, self._metrics)

    @property
    def also_trains(self) -> tuple[Any, ...]:
        """What nobody else may train meanwhile."""
        return (self.module, *learned(self.optimizer))

    def check_ready(self, *, training: bool) -> None:
        """Refuses what was changed since the model was made, so that a training would not train it.

        Raises:
            ArgumentError: an attribute was replaced, or a layer whose parameters the optimizer has.
        """
        for name, given in self._given.items():
            if getattr(self, name) is not given:
                raise ArgumentError(name, in_words("another one"), "stays that which the model was made with")
        if training:
            checking.check_optimizer(self._torch, self.optimizer, self.module, self.loss)

    def check_data(
        self, x: Any, y: Any, sample_weight: Any, *, name: str = "x", training: bool = True
    ) -> None:
        """Refuses data that is no numbers, missing targets, and sample weights that the loss does not allow.

        Raises:
            ArgumentError: naming the argument, what was given and what is wanted.
        """
        target = "y" if name == "x" else f"{name}'s y"
        checking.check_arrays(x, name)
        checking.check_arrays(y, target)
        if training and y is None:
            raise ArgumentError(target, y, "targets are needed to train and to evaluate")
        if sample_weight is not None and getattr(self.loss, "reduction", "none") != "none":
            refuse_weights()

    def train_batch(self, batch: Batch, before_update: Gate | None = None) -> dict[str, float]:
        """Forward, backward and, when a group of batches is whole, the update.

        Args:
            batch: ``x``, ``y`` and optionally ``sample_weight``.
            before_update: the gate of the run; it is asked before the optimizer's step. None: that of the
                training under way.

        Returns:
            ``loss`` and metrics of this batch before the update, Python floats.

        Raises:
            ArgumentError: the loss is no scalar of this graph, or does not allow the sample weights given.
        """
        gate = self.training_gate if before_update is None else before_update
        return self._step.train(batch, gate)

    def test_batch(self, batch: Batch) -> dict[str, float]:
        """``loss`` and metrics of a batch, in eval mode and without an update."""
        return self._step.test(batch, self.training_gate)

    def predict_batch(self, batch: Batch) -> Any:
        """The outputs for a batch, in eval mode: new arrays (float32 where numpy has no such type), in the
        structure that the module gives."""
        return self._step.predict(batch, self.training_gate)

    def end_epoch(self) -> None:
        """A whole epoch is over, its callbacks too: steps a scheduler that counts epochs."""
        if self._counts_epochs:
            gate = self.training_gate
            if gate is not None and gate.copying:
                gate()  # a learning rate that is a tensor is overwritten in its place
            self.scheduler.step()

    # -- copies, and back
    # ---------------------------------------------------------------------------------------

    def capture(self) -> TorchState:
        """A copy on the CPU of all that changes; legal between two batches only. Not of what is in no
        ``state_dict()``, such as buffers that are not persistent."""
        self._check_free("capture")
        tensors: list[Any] = []
        tree = self._state_tree(tensors)
        return self._state(tree, [copied(tensor) for tensor in tensors])

    def live(self) -> LiveState | None:
        """What :meth:`capture` copies, as it lies in memory now; None for a model that is not on the CPU, or
        has tensors that do not lie in one piece.

        Parameters may change in the optimizer's step, buffers in a forward pass too, and nothing at any other
        moment: a module that overwrites its own parameters in ``forward`` tears the copy under way.
        """
        self._check_free("live")
        tensors: list[Any] = []
        tree = self._state_tree(tensors)
        if not all(map(can_be_shown, tensors)):
            return None
        arrays = [flat(tensor) for tensor in tensors]
        buffers = {id(buffer) for part in self._modules() for buffer in part.buffers()}
        first = [index for index, tensor in enumerate(tensors) if id(tensor) in buffers]
        rest = sorted(set(range(len(tensors))) - set(first))
        moving, others = (
            [(index, *span) for index in chosen for span in parts(arrays[index])] for chosen in (first, rest)
        )
        self._step.buffer_segments = len(moving)

        def complete(copies: Sequence[Array]) -> TorchState:
            return self._state(tree, copies)

        return LiveState(arrays, moving + others, [None] * len(arrays), complete)

    def _modules(self) -> list[Any]:
        return [part for part in (self.module, self.loss) if isinstance(part, self._torch.nn.Module)]

    def _state(self, tree: dict[str, Any], arrays: Sequence[Array]) -> TorchState:
        slots = [slot_names(self.module, self.optimizer)]
        return TorchState(type(self.module).__name__, tree, arrays, slots, self._blueprint.build)

    def _state_tree(self, tensors: list[Any]) -> dict[str, Any]:
        found = self._state_dicts()
        if self._step.pending:  # the next backward adds to them, and asks nobody
            found["gradients"] = [None if p.grad is None else p.grad.clone() for p in learned(self.optimizer)]
        tree: dict[str, Any] = split(found, tensors)
        return tree

    def _state_dicts(self) -> dict[str, Any]:
        module, loss = self.module, self.loss
        found = {"weights": module.state_dict(keep_vars=True)}
        if isinstance(loss, self._torch.nn.Module) and (held := loss.state_dict(keep_vars=True)):
            found["loss"] = held
        found["optimizer"] = self.optimizer.state_dict()
        found["classes"] = {part: type(getattr(self, part)).__name__ for part in ("optimizer", "scheduler")}
        if self.scheduler is not None:
            found["scheduler"] = self.scheduler.state_dict()
        if self._step.scaler is not None:
            found["scaler"] = self._step.scaler.state_dict()
        found["trainable"] = {name: p.requires_grad for name, p in module.named_parameters()}
        found["pending"] = self._step.pending
        if self._random is not None:
            found["random"] = self._random.states
        else:
            found["random"] = [generator.get_state() for generator in generators(self.device)]
        return found

    def fingerprint(self) -> dict[str, Any]:
        """Module, loss, optimizer and options as plain data; the seed is not among them: what it made is part
        of the state."""
        weights = {
            name: [str(tensor.dtype), list(tensor.shape)]
            for name, tensor in self.module.state_dict().items()
            if isinstance(tensor, self._torch.Tensor)
        }
        return {
            "module": checking.without_addresses(str(self.module)),
            "weights": weights,
            "loss": checking.loss_as_plain(self.loss),
            "metrics": list(self._metrics),
            **self._settings,
        }

    def restore(self, path: str, accept: Callable[[Mapping[str, Any]], object]) -> None:
        """Overwrites weights, optimizer, scheduler and random numbers by those of a backup.

        Raises:
            FileRefused: the file is damaged or of another model; nothing is changed then.
            ModelBusy: from another thread during a training.
        """
        self._check_free("restore")
        self._put(path, read_state(path, accept), random=True)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Overwrites the weights by those of a file that the model was saved as, and the states of optimizer,
        scheduler and scaler where the file has them. No code in the file is run. Blocks.

        Args:
            path: ``.pt``, ``.pth``, ``.safetensors``; all others are HDF5.

        Raises:
            FileNotFoundError: there is no such file.
            FileRefused: it is damaged, not safe, or of another model; nothing is changed then.
            ModelBusy: from another thread during a training.
        """
        self._check_free("load")
        path = os.fspath(path)
        self._put(path, read_state(path), random=False)

    def _put(self, path: str, saved: dict[str, Any], *, random: bool) -> None:
        check_fits(path, saved, self._state_dicts())
        self.module.load_state_dict(saved["weights"])
        if "loss" in saved:
            self.loss.load_state_dict(saved["loss"])
        for name, held in (
            ("optimizer", self.optimizer),
            ("scheduler", self.scheduler),
            ("scaler", self._step.scaler),
        ):
            if name in saved and held is not None:
                held.load_state_dict(like(held.state_dict(), saved[name]))
        if self.scheduler is not None and "scheduler" in saved:
            # Else torch warns that the scheduler is stepped before the optimizer: it was another process'.
            self.optimizer._opt_called = True
        self._step.pending = saved.get("pending", 0)
        for parameter, gradient in zip(learned(self.optimizer), saved.get("gradients", ()), strict=False):
            parameter.grad = None if gradient is None else gradient.to(parameter.device)
        if random and self._random is not None:
            self._random.states = saved["random"]
        elif random:
            for generator, state in zip(generators(self.device), saved["random"], strict=True):
                generator.set_state(state)

    # -- what callbacks and people use
    # ----------------------------------------------------------------------------

    @property
    def weights(self) -> list[Weight]:
        """The tensors of the module's ``state_dict()``, in its order, as they are now."""
        both = self.module.named_parameters(remove_duplicate=False)  # a tensor may have two names
        trainable = {name: p.requires_grad for name, p in both}
        return [
            Weight(name, shown(tensor), trainable.get(name, False))
            for name, tensor in self.module.state_dict().items()
            if isinstance(tensor, self._torch.Tensor)
        ]

    def get_weights(self) -> list[Array]:
        """Copies of all tensors of the module's ``state_dict()``, in its order.

        Raises:
            ModelBusy: from another thread during a training.
        """
        self._check_free("get_weights")
        return [np.array(weight.value) for weight in self.weights]

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Overwrites all tensors of the module's ``state_dict()``, in its order, by arrays or tensors.

        Raises:
            ArgumentError: another number of arrays, or of another shape; nothing is changed then.
            ModelBusy: from another thread during a training.
        """
        self._check_free("set_weights")
        own = [t for t in self.module.state_dict().values() if isinstance(t, self._torch.Tensor)]
        given, wanted = [np.shape(weight) for weight in weights], [tuple(tensor.shape) for tensor in own]
        if given != wanted:
            raise ArgumentError("weights", in_words(f"shapes {given}"), f"must have the shapes {wanted}")
        with self._torch.no_grad():
            for tensor, weight in zip(own, weights, strict=True):
                held = isinstance(weight, self._torch.Tensor)
                tensor.copy_(weight if held else self._torch.from_numpy(np.array(weight)))

    @property
    def training_thread(self) -> int | None:
        return self._thread

    @training_thread.setter
    def training_thread(self, thread: int | None) -> None:
        if self._step.ambient is not None and thread is None:
            self._step.ambient.leave()
            self._step.ambient = None
        elif thread == -1:  # somebody starts a run, and is on this thread
            self._step.ambient = Ambient(self.device.type)
        elif self._step.ambient is not None and thread == threading.get_ident():
            self._step.ambient.enter()
        self._thread = thread

    def _check_free(self, verb: str) -> None:
        if self._thread is not None and self._thread != threading.get_ident():
            raise ModelBusy(
                f"model.{verb}: the model is in a training that is under way, its weights change right now. "
                "Take a copy: `snapshot = await run.snapshot()`, then `snapshot.to_model()`"
            )

    def __repr__(self) -> str:
        return f"<TorchModel of {type(self.module).__name__} on {self.device}>"


def _make(
    kind: type[TorchModel],
    device: Any,
    options: Mapping[str, Any],
    parts: tuple[Any, ...],
    state: dict[str, Any],
) -> TorchModel:
    """A model of copied parts, with a state."""
    module, loss, optimizer, scheduler, metrics = parts
    made = kind(module, loss, optimizer, metrics, device, scheduler=scheduler, **options)
    made._put("the copy", state, random=options["seed"] is not None)
    return made
