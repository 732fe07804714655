"""Sequential: a stack of layers on numpy, trained one batch at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from asynccb.errors import ArgumentError
from asynccb.models import checking, config, files, inspection, losses, optimizers, resuming
from asynccb.models import metrics as metrics_room
from asynccb.models.layers import Embedding
from asynccb.models.layers.base import whole
from asynccb.models.live import live_state
from asynccb.models.memory import lay_out
from asynccb.models.network import Network, kinds_of
from asynccb.models.stack import Stack
from asynccb.models.step import Step

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence

    from asynccb.models.arrays import Array
    from asynccb.models.layers import Layer
    from asynccb.models.state import OptimizerState, SequentialState
    from asynccb.models.updates import Optimizer
    from asynccb.protocols import Batch, Gate, LiveState

    Shape = tuple[int, ...]


class Sequential(Stack):
    """A linear stack of layers; it satisfies ``asynccb.protocols.Model`` itself.

    Args:
        layers: layers to add at once.
        name: default ``"sequential"``.
        seed: initial weights and dropout come from it alone; equal seeds give equal bytes. None draws one.
        dtype: ``"float32"`` or ``"float64"``, of weights and computation.

    Attributes:
        layers: the layers, in order.
        optimizer: set by :meth:`compile`; its ``lr`` and ``learning_rate`` are one settable float.
        stop_training: set it True from a callback to end the training after the batch.
        training_thread: identity of the thread that trains the model, None outside of trainings. While it is
            set, other threads are refused with ``ModelBusy`` instead of getting half-updated weights.
        training_gate: the gate of the training under way, None outside of trainings; ``set_weights`` asks it,
            for a hook may set weights while a copy of them is made.
    """

    has_test = has_predict = has_capture = has_restore = True
    always_asks = True  # nothing overwrites its arrays but what asks the gate: others see them read-only

    def __init__(
        self,
        layers: Sequence[Layer] | None = None,
        name: str | None = None,
        seed: int | None = None,
        dtype: str = "float32",
    ) -> None:
        self.optimizer: Optimizer | None = None
        self.stop_training = False
        self._loss: losses.Loss | None = None
        self._metrics: tuple[str, ...] = ()
        self._compiled: config.Compiled | None = None
        self._step: Step | None = None
        self._blueprint: tuple[dict[str, Any], tuple[files.LayerLayout, ...]] | None = None
        self._live: LiveState | None = None
        self._live_version = -1
        super().__init__(layers, name, seed, dtype)

    def _unbind(self) -> None:
        super()._unbind()
        self._step = self._blueprint = self._live = None

    def compile(
        self,
        optimizer: str | Optimizer = "rmsprop",
        loss: str | None = None,
        metrics: Sequence[str] | None = None,
    ) -> None:
        """Says how to train, and takes over which layers are ``trainable`` now.

        Args:
            optimizer: a name (``sgd``, ``rmsprop``, ``adagrad``, ``adam``, ``adamw``) or an optimizer.
            loss: a name, such as ``"categorical_crossentropy"`` or ``"mse"``.
            metrics: names; ``"acc"`` and ``"accuracy"`` become the accuracy that fits the loss. A name is the
                key in the logs as it is given.

        Raises:
            ArgumentError: for unknown names; it suggests the nearest ones.
            ModelBusy: from another thread during a training.
        """
        self._check_free("compile")
        if loss is None:
            raise ArgumentError(
                "loss", loss, "a loss is needed", 'For example loss="categorical_crossentropy"'
            )
        names = (metrics,) if isinstance(metrics, str) else tuple(metrics or ())
        chosen, found = losses.get(loss), optimizers.get(optimizer)
        metrics_room.check(names)
        self._settle()
        found.claim(self)
        self.optimizer, self._loss, self._metrics = found, chosen, names
        self._compiled = config.compiled_of(found, loss, names)
        self._step = self._live = None
        if self._network is not None and self._network.kinds != kinds_of(self.layers, found.by_rows):
            self._unbind()
        if self.built:
            self._ready_network()  # now, for what is trainable now is what counts

    def _bind(self) -> Network:
        # Config and layout are those of now: what is trainable may be changed later, but counts from the next
        # compile on.
        self._blueprint = (self.get_config(), files.layout_of(self.layers))
        return Network(self.layers, self._dtype, self.optimizer is not None and self.optimizer.by_rows)

    def _ready_step(self, x: Any = None) -> Step:
        if self._step is None:
            self.check_ready(training=True)
            if x is not None and not self.built:
                self._build(checking.sample_shape(np.shape(x), None))
            assert self._loss is not None
            assert self.optimizer is not None
            network, shape = self._ready_network(), self._output_shape
            assert shape is not None
            self._step = Step(network, shape, self._loss, self._metrics, self.optimizer)
        return self._step

    # -- the Model protocol
    # ---------------------------------------------------------------------------------------

    @property
    def user_model(self) -> Sequential:
        """The model itself."""
        return self

    @property
    def metrics_names(self) -> list[str]:
        """The keys of a batch's logs: ``loss`` first, then the metrics as named in :meth:`compile`."""
        return [] if self._loss is None else metrics_room.log_names(self._metrics)

    def direction(self, metric: str) -> str | None:
        """``"min"`` for losses, ``"max"`` for accuracies (``val_`` or not), None for other names."""
        return metrics_room.direction(metric)

    def check_ready(self, *, training: bool) -> None:
        """Refuses a model that cannot be used as it stands.

        Args:
            training: whether it is to be trained or evaluated (needs a compile), or only to predict.

        Raises:
            ArgumentError: saying what is missing.
        """
        if not self.layers:
            raise ArgumentError(
                "model", self, "has no layers", "Add some: model.add(Dense(10, input_dim=64))"
            )
        if training and self._loss is None:
            fix = 'For example model.compile(optimizer="rmsprop", loss="categorical_crossentropy")'
            raise ArgumentError("model", self, "is not compiled", fix)

    def check_data(
        self, x: Any, y: Any, sample_weight: Any, *, name: str = "x", training: bool = True
    ) -> None:
        """Refuses data that the model can never take; reads shapes, dtypes and the range of class numbers.

        A model whose input shape is unknown is built for the samples in ``x``.

        Args:
            x: samples.
            y: targets; None only where ``training`` is False.
            sample_weight: one number per sample, or None.
            name: what the caller calls ``x``.
            training: whether targets are needed (training and evaluation).

        Raises:
            ArgumentError: naming the argument, what was given and what is wanted.
        """
        self.check_ready(training=training)
        first = self.layers[0]
        classes = first.input_dim if isinstance(first, Embedding) else None
        x = checking.check_inputs(x, self._input_shape, classes, name)
        if not self.built:
            self._build(checking.sample_shape(x.shape, None))
        target = "y" if name == "x" else f"{name}'s y"
        if y is not None and self._loss is not None:
            assert self._output_shape is not None
            checking.check_targets(y, len(x), self._output_shape, self._loss, target)
        elif training:
            raise ArgumentError(target, y, "targets are needed to train and to evaluate")
        if sample_weight is not None:
            checking.check_weights(sample_weight, len(x))

    def train_batch(self, batch: Batch, before_update: Gate | None = None) -> dict[str, float]:
        """One update.

        Args:
            batch: ``x``, ``y`` and optionally ``sample_weight``.
            before_update: the gate of the run. While it is copying, it is asked before each part of the state
                is overwritten. None, as when a hook trains a batch of its own: that of the training under
                way.

        Returns:
            ``loss`` and metrics of this batch before the update, Python floats.
        """
        step = self._step or self._ready_step(batch.x)
        gate = self.training_gate if before_update is None else before_update
        return step.train(self._input(batch.x), batch.y, batch.sample_weight, gate)

    def test_batch(self, batch: Batch) -> dict[str, float]:
        """``loss`` and metrics of a batch, without dropout and without an update."""
        step = self._step or self._ready_step(batch.x)
        return step.test(self._input(batch.x), batch.y, batch.sample_weight)

    def predict_batch(self, batch: Batch) -> Array:
        """The outputs for a batch; a new array."""
        if not self.built:
            self._build(checking.sample_shape(np.shape(batch.x), None))
        with np.errstate(all="ignore"):
            return self._ready_network().predict(self._input(batch.x)).copy()

    def check_path(self, path: str, *, weights_only: bool) -> None:
        """Refuses the name of a file that its copies could not be saved as.

        Raises:
            ArgumentError: unless it ends in ``.h5``, ``.hdf5`` or ``.weights.h5``.
        """
        files.check_extension(path)

    def capture(self) -> SequentialState:
        """A copy of weights, optimizer state and random streams; legal between two batches only."""
        self._check_free("capture")
        live = self.live()
        state: SequentialState = live.complete([array.copy() for array in live.arrays])  # type: ignore[assignment]
        return state

    def live(self) -> LiveState:
        """What :meth:`capture` copies, as it lies in memory now; legal between two batches only."""
        self._check_free("live")
        network = self._ready_network()
        if self._live is None or self._live_version != network.version:
            assert self._blueprint is not None
            self._live_version = network.version
            self._live = live_state(
                memory=lay_out(network, None) if self._compiled is None else self._ready_step().memory,
                version=network.version,
                blueprint=self._blueprint,
                layers=self.layers,
                optimizer=self.optimizer,
                compiled=self._compiled,
                rebuild=type(self)._from_state,
            )
        return self._live

    @classmethod
    def _from_state(cls, state: SequentialState) -> Sequential:
        model = cls.from_config(state.config)
        model._restore(state)
        return model

    def _restore(self, state: SequentialState) -> None:
        compiled = state.compiled
        if compiled is not None:
            self.compile(optimizers.from_config(compiled.optimizer), compiled.loss, compiled.metrics)
        self._put(list(state.weights().values()), None if compiled is None else state.optimizer, state.random)

    def _put(self, weights: list[Array], state: OptimizerState | None, random: Mapping[str, Any]) -> None:
        """Overwrites all that changes while the model trains."""
        self.set_weights(weights)
        for layer in self.layers:
            if layer.name in random:
                layer.set_random_state(random[layer.name])
        if state is None:
            return
        memory, own = self._ready_step().memory, self.optimizer
        assert own is not None
        own.learning_rate, own.iterations = state.learning_rate, state.iterations
        for slot, arrays in state.slots.items():
            for place, array in zip(memory.slots[slot], arrays, strict=True):
                place.of(memory.arrays)[...] = array

    def fingerprint(self) -> dict[str, Any]:
        """Architecture and compile as plain data, without the seed: what it made is part of the state."""
        self._ready_network()
        assert self._blueprint is not None
        assert self._compiled is not None
        architecture = {key: value for key, value in self._blueprint[0].items() if key != "asynccb"}
        trainable = {
            f"{layer.name}/{weight.name}": weight.trainable
            for layer in self._blueprint[1]
            for weight in layer.weights
        }
        return {
            "architecture": architecture,
            "dtype": self._dtype.name,
            "trainable": trainable,
            "optimizer": self._compiled.optimizer,
            "loss": self._compiled.loss,
            "metrics": list(self._compiled.metrics),
        }

    def restore(self, path: str, accept: Callable[[Mapping[str, Any]], object]) -> None:
        """Overwrites weights, optimizer state and random streams by those of a backup.

        Args:
            path: a file that ``save`` of a state wrote with ``extra``.
            accept: given what is kept in the file beside the model, before anything is overwritten.

        Raises:
            FileRefused: for a file that is damaged, not safe, or of other shapes; nothing is changed then.
            ModelBusy: from another thread during a training.
        """
        self._check_free("restore")
        self._ready_step()
        assert self._blueprint is not None
        assert self.optimizer is not None
        saved = resuming.read_saved(path, self._blueprint[1], self.optimizer, accept)
        self._put(saved.weights, saved.optimizer, saved.random)

    # -- what people call
    # -----------------------------------------------------------------------------------------

    def predict(self, x: Any, batch_size: int = 32) -> Array:
        """The outputs for all samples; blocks.

        Args:
            x: samples on axis 0.
            batch_size: samples computed at a time.

        Raises:
            ArgumentError: for data of the wrong shape.
            ModelBusy: from another thread during a training.
        """
        self._check_free("predict")
        self.check_data(x, None, None, training=False)
        x, size = np.asarray(x), whole("batch_size", batch_size)
        network = self._ready_network()
        assert self._output_shape is not None
        out = np.empty((len(x), *self._output_shape), self._dtype)
        with np.errstate(all="ignore"):
            for start in range(0, len(x), size):
                out[start : start + size] = network.predict(self._input(x[start : start + size]))
        return out

    def evaluate(self, x: Any, y: Any, batch_size: int = 32, sample_weight: Any = None) -> dict[str, float]:
        """``loss`` and metrics, means over all samples; blocks.

        Raises:
            ArgumentError: for data that does not fit, or a model that is not compiled.
            ModelBusy: from another thread during a training.
        """
        self._check_free("evaluate")
        self.check_data(x, y, sample_weight)
        x, y, size = np.asarray(x), np.asarray(y), whole("batch_size", batch_size)
        weights = None if sample_weight is None else np.asarray(sample_weight)
        step, sums = self._ready_step(), dict.fromkeys(self.metrics_names, 0.0)
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            chosen = None if weights is None else weights[part]
            samples = self._input(x[part])
            for key, value in step.test(samples, y[part], chosen).items():
                sums[key] += value * len(samples)
        return {key: total / max(1, len(x)) for key, total in sums.items()}

    def activations(self, x: Any) -> dict[str, Array]:
        """The output of every layer for all samples at once, as in :meth:`predict`; blocks.

        Args:
            x: samples on axis 0, one batch.

        Returns:
            Layer name -> array, in the order of the layers; the last one is what :meth:`predict` gives.

        Raises:
            ArgumentError: for data of the wrong shape.
            ModelBusy: from another thread during a training.
        """
        self._check_free("activations")
        self.check_data(x, None, None, training=False)
        return inspection.activations(self._ready_network(), self.layers, self._input(x))

    def gradients(self, x: Any, y: Any, sample_weight: Any = None) -> dict[str, Array]:
        """The gradients that an update by these samples as one batch would use, without the update; blocks.

        Dropout and batch normalization act as in training; random streams and running means stay as they are.

        Returns:
            Weight path (``"dense/kernel"``) -> array in the weight's shape, for all trainable weights.

        Raises:
            ArgumentError: for data that does not fit, or a model that is not compiled.
            ModelBusy: from another thread during a training.
        """
        self._check_free("gradients")
        self.check_data(x, y, sample_weight)
        step, network = self._ready_step(), self._ready_network()
        return inspection.gradients(network, step, self.layers, self._input(x), y, sample_weight)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the whole model, with optimizer state, as an HDF5 file that Keras 3 opens too; see
        ``load_model``.

        Raises:
            ArgumentError: if ``path`` ends in anything but ``.h5``, ``.hdf5`` or ``.weights.h5``.
            CheckpointWriteError: if it could not be written; the file that stood there before is untouched.
            ModelBusy: from another thread during a training.
        """
        self._check_free("save")
        self.capture().save(path)

    def save_weights(self, path: str | os.PathLike[str]) -> None:
        """Like :meth:`save`, without the optimizer and without how the model was compiled."""
        self._check_free("save_weights")
        self.capture().save(path, weights_only=True)

    def load_weights(self, path: str | os.PathLike[str]) -> None:
        """Overwrites all weights by those of a file; the optimizer is left as it is.

        Raises:
            FileRefused: for a file that is damaged, not safe, or of other shapes; nothing is changed then.
            ModelBusy: from another thread during a training.
        """
        self._check_free("load_weights")
        self._ready_network()
        self.set_weights(files.load_weights(path, files.layout_of(self.layers)))

    def __getstate__(self) -> dict[str, Any]:
        # Live buffers and bound calls stay behind: a copy is rebuilt from config, as a file would be.
        state = self.capture() if self.built else None
        # The config of the state: a layer may be trainable or not since the compile that made its slots.
        config = self.get_config() if state is None else state.config
        return {"config": config, "compiled": self._compiled, "state": state}

    def __setstate__(self, pickled: dict[str, Any]) -> None:
        self.__dict__.update(vars(type(self).from_config(pickled["config"])))
        if pickled["state"] is not None:
            self._restore(pickled["state"])
        elif pickled["compiled"] is not None:
            compiled = pickled["compiled"]
            self.compile(optimizers.from_config(compiled.optimizer), compiled.loss, compiled.metrics)
