"""JAX: a pure ``step(state, batch) -> (state, logs)`` and its state, whatever pytree that is."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np

from asynccb.errors import ArgumentError, FileRefused, in_words
from asynccb.models.files import check_extension
from asynccb.models.jax.state import JaxState, Leaves, framework

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from asynccb.models.arrays import Array
    from asynccb.protocols import Batch, Gate

_SETTINGS = {
    "jax_enable_x64": "enable_x64",
    "jax_default_device": "default_device",
    "jax_default_matmul_precision": "default_matmul_precision",
    "jax_numpy_dtype_promotion": "numpy_dtype_promotion",
    "jax_default_prng_impl": "default_prng_impl",
    "jax_threefry_partitionable": "threefry_partitionable",
    "jax_debug_nans": "debug_nans",
}
"""What a ``with`` may set for one thread alone: the setting, and the name of that ``with``."""


class JaxModel:
    """A training step in JAX, as a model.

    ``step`` and its companions are pure functions. Each gets the state and a batch as the data gave it: ``x``
    alone, ``(x, y)``, or ``(x, y, sample_weight)`` where there are sample weights. A function that is jitted
    already (it has ``lower``, as those of ``jax.jit`` and ``equinox.filter_jit`` do) is called as it is; any
    other is jitted here, ``step`` with its state donated, so that the update needs no second copy of it.

    The state is any pytree: a tuple ``(params, optimizer_state)``, a flax ``TrainState``, an equinox module.
    Random keys belong into it. It is copied, so that a donated step deletes nothing of the caller's. Leaves
    that are no arrays and no numbers stay what they are in snapshots and files.

    Beside the rest of ``Model`` it has what callbacks ask of a model: ``get_weights`` and ``set_weights``
    (floating-point leaves outside of the optimizer's state), ``optimizer.learning_rate`` where the state has
    one, ``stop_training``.

    Args:
        step: ``step(state, batch) -> (state, logs)``; ``logs`` is a dict of real scalars, means over the
            samples. The new state has the structure of the old one, and its arrays their shapes and types.
        state: what ``step`` begins with.
        test_step: ``test_step(state, batch) -> logs``; without it there is no validation and no evaluation.
        predict: ``predict(state, x) -> outputs``, one array with the samples on axis 0.

    Attributes:
        needs_cpu: True. Where the state lies on an accelerator, set it to False before the training: it then
            takes no turns with other trainings.

    Raises:
        ArgumentError: something to be called cannot be.
        ImportError: JAX is not installed.
    """

    def __init__(
        self,
        step: Callable[[Any, Any], tuple[Any, Mapping[str, Any]]],
        state: Any,
        *,
        test_step: Callable[[Any, Any], Mapping[str, Any]] | None = None,
        predict: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        jax = framework()
        for name, function in (("step", step), ("test_step", test_step), ("predict", predict)):
            if not callable(function) and (function is not None or name == "step"):
                raise ArgumentError(name, function, "a function of the state and a batch")
        # The training thread computes as the thread computes that made the model.
        self._settings = {setting: getattr(jax.config, setting) for setting in _SETTINGS}
        self._given = (step, test_step, predict)
        # Where JAX looks for NaN it runs the step once more, with what would have been donated.
        donated = () if jax.config.jax_debug_nans else (0,)
        self._step = step if hasattr(step, "lower") else jax.jit(step, donate_argnums=donated)
        self._test_step, self._predict = (
            function if function is None or hasattr(function, "lower") else jax.jit(function)
            for function in (test_step, predict)
        )
        # equinox takes a number in the state for a constant; JAX traces it as it does an array.
        self._traced = not hasattr(step, "lower") or isinstance(step, type(jax.jit(lambda: None)))
        self._names: tuple[str, ...] = ()
        self._kept = False  # whether a step was seen to keep the structure
        self.needs_cpu = True
        self.stop_training = False
        self.optimizer = LearningRateOfState(self)
        self.state = state

    @property
    def state(self) -> Any:
        """The state as it is now. A step that donates deletes its arrays: to keep it, take a snapshot.

        Set, it is copied.
        """
        return self._state

    @state.setter
    def state(self, state: Any) -> None:
        with self._as_there():
            self._state = Leaves(state).copied(numbers=self._traced)
        self._kept = False

    # What the training thread drives ------------------------------------------------------------------------

    @property
    def user_model(self) -> JaxModel:
        return self

    @property
    def metrics_names(self) -> Sequence[str]:
        """The names in the logs of the last batch; empty before the first."""
        return self._names

    def check_ready(self, *, training: bool) -> None:
        """Refuses to test without ``test_step``, and a state that was donated elsewhere.

        Raises:
            ArgumentError: it cannot.
        """
        if not training and self._test_step is None:
            fix = "Give JaxModel(..., test_step=test_step)"
            raise ArgumentError(
                "model", self, "test_step(state, batch) -> logs is needed to validate and to evaluate", fix
            )
        if Leaves(self._state).deleted():
            raise ArgumentError(
                "model",
                self,
                "its state was donated to a step that was called outside of it, or to one that failed",
                "Set model.state anew, or model.load(path)",
            )

    def check_data(
        self, x: Any, y: Any, sample_weight: Any, *, name: str = "x", training: bool = True
    ) -> None:
        """Refuses arrays that JAX has no type for.

        Raises:
            ArgumentError: texts or objects.
        """
        whose = "y" if name == "x" else f"y of {name}"
        for argument, data in ((name, x), (whose, y)):
            for leaf in framework().tree.leaves(data):
                if leaf.dtype.kind in "OSUMm" or leaf.dtype.names:
                    raise ArgumentError(argument, leaf.dtype, "numbers or bools", "Encode it as numbers")

    def direction(self, metric: str) -> str | None:
        """``"min"`` for ``loss`` and ``val_loss``; what other logs mean, the step alone knows."""
        return "min" if metric in ("loss", "val_loss") else None

    def train_batch(self, batch: Batch, before_update: Gate | None = None) -> Mapping[str, Any]:
        """One step.

        Raises:
            ArgumentError: it did not answer a state of the same structure and a dict of real scalars.
        """
        if before_update is not None:
            before_update()
        with self._as_there():
            answer = self._step(self._state, _as_given(batch))
            if not (isinstance(answer, tuple) and len(answer) == 2):
                raise ArgumentError("step", type(answer), "a function that returns (state, logs)")
            state, logs = answer
            if not self._kept:
                self._check_structure(state)
            self._state = state
            found = _numbers("step", logs)
        self._names = tuple(found)
        return found

    def test_batch(self, batch: Batch) -> Mapping[str, Any]:
        """The logs of a batch without an update."""
        self.check_ready(training=False)
        assert self._test_step is not None
        with self._as_there():
            return _numbers("test_step", self._test_step(self._state, _as_given(batch)))

    def predict_batch(self, batch: Batch) -> Any:
        """The outputs for a batch.

        Raises:
            ArgumentError: there is no ``predict``, or it did not answer one array.
        """
        if self._predict is None:
            fix = "Give JaxModel(..., predict=predict)"
            raise ArgumentError("model", self, "predict(state, x) -> outputs is needed to predict", fix)
        with self._as_there():
            outputs = self._predict(self._state, batch.x)
            if not getattr(outputs, "ndim", 0):
                allowed = "a function that returns one array, with the samples on axis 0"
                raise ArgumentError("predict", type(outputs), allowed)
            return np.array(outputs)

    def check_path(self, path: str, *, weights_only: bool) -> None:
        """Refuses the name of a file that its copies could not be saved as.

        Raises:
            ArgumentError: unless it ends in ``.h5``, ``.hdf5`` or ``.weights.h5``.
        """
        check_extension(path)

    def capture(self) -> JaxState:
        """A copy of the state, made on its device before any later step: nobody waits for it here."""
        with self._as_there():
            return JaxState(Leaves(self._state).copied(), self._another)

    # Going on -----------------------------------------------------------------------------------------------

    def fingerprint(self) -> dict[str, Any]:
        """Names, shapes and types of the state's arrays. What the step does with them it does not show."""
        return {"class": "JaxModel", "state": Leaves(self._state).shapes()}

    def restore(self, path: str, accept: Callable[[Mapping[str, Any]], object]) -> None:
        """Puts back what a backup holds; see :class:`asynccb.protocols.Resumes`."""
        self._read(path, accept, whole=True)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Puts back what a snapshot's ``save`` or a :class:`~asynccb.callbacks.ModelCheckpoint` wrote; a file
        of weights alone leaves the optimizer's state as it is. Blocks.

        Raises:
            FileNotFoundError: there is no such file.
            FileRefused: the file is damaged, not safe, or of another state; nothing is changed then.
        """
        self._read(os.fspath(path), lambda extra: None, whole=False)

    def _read(self, path: str, accept: Callable[[Mapping[str, Any]], object], *, whole: bool) -> None:
        from asynccb.models.plain import read_plain

        saved = read_plain(path, accept).get("leaves")
        if not isinstance(saved, dict):
            raise FileRefused(path, "it holds no state of a JaxModel")
        with self._as_there():
            self._state = Leaves(self._state).told(path, saved, whole=whole)

    # What callbacks ask for ---------------------------------------------------------------------------------

    def get_weights(self) -> list[Array]:
        """Copies of the floating-point leaves outside of the optimizer's state, in their order."""
        with self._as_there():
            return Leaves(self._state).weights()

    def set_weights(self, arrays: Sequence[Array]) -> None:
        """Puts arrays of the same shapes in their place.

        Raises:
            ValueError: another number of arrays, or other shapes.
        """
        with self._as_there():
            self._state = Leaves(self._state).with_weights(arrays)

    # Parts --------------------------------------------------------------------------------------------------

    def _another(self, state: Any) -> JaxModel:
        """A model that does the same to a copy of ``state``."""
        step, test_step, predict = self._given
        with self._as_there():
            return JaxModel(step, state, test_step=test_step, predict=predict)

    def _check_structure(self, state: Any) -> None:
        old, new = Leaves(self._state), Leaves(state)
        if old.structure != new.structure:
            allowed = f"a function that returns a state of the structure {old.structure}"
            raise ArgumentError("step", new.structure, allowed)
        now = new.shapes()
        for name, kind in old.shapes().items():
            if now[name] != kind:
                (was, shape), (dtype, grown) = kind, now[name]
                raise ArgumentError(
                    "step",
                    in_words(f"a state whose {name or 'array'} becomes {dtype}{grown}"),
                    f"it was {was}{shape}, and has to keep its type and shape",
                    "Begin with what the step returns, or convert it there: .astype(...)",
                )
        self._kept = True

    def _as_there(self) -> ExitStack:
        """Inside of it, this thread computes as the one did that made the model."""
        jax, stack = framework(), ExitStack()
        for setting, value in self._settings.items():
            if getattr(jax.config, setting) != value:
                name = _SETTINGS[setting]
                home = jax if hasattr(jax, name) else jax.experimental  # where enable_x64 once was
                stack.enter_context(getattr(home, name)(value))
        return stack


class LearningRateOfState:
    """``model.optimizer`` of a :class:`JaxModel`: the learning rate that lies in its state, if one does."""

    def __init__(self, model: JaxModel) -> None:
        self._model = model

    @property
    def learning_rate(self) -> float:
        """The rate of ``optax.inject_hyperparams``. It may be set between two batches.

        Raises:
            ArgumentError: the state has none, more than one, or one that follows a schedule of its own.
        """
        leaves = Leaves(self._model.state)
        return float(leaves.values[self._where(leaves)])

    @learning_rate.setter
    def learning_rate(self, rate: float) -> None:
        leaves = Leaves(self._model.state)
        with self._model._as_there():
            self._model._state = leaves.with_number(self._where(leaves), rate)

    def _where(self, leaves: Leaves) -> int:
        found = [at for at, name in enumerate(leaves.names) if name.endswith("hyperparams/learning_rate")]
        scheduled = [name for name in leaves.names if "hyperparams_states/learning_rate/" in name]
        if len(found) == 1 and not scheduled:
            return found[0]
        told = "follows a schedule of its own" if scheduled else f"is there {len(found)} times, not once"
        raise ArgumentError(
            "model",
            self._model,
            f"the learning rate in its state {told}",
            "Make the optimizer by optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)",
        )


def _as_given(batch: Batch) -> Any:
    if batch.sample_weight is not None:
        return batch.x, batch.y, batch.sample_weight
    return batch.x if batch.y is None else (batch.x, batch.y)


def _numbers(function: str, logs: Any) -> dict[str, Any]:
    """Logs as Python's numbers, in one transfer, the loss first: a jitted function sorts its dicts."""
    if not hasattr(logs, "items"):
        raise ArgumentError(function, type(logs), "a function whose logs are a dict of scalars")
    found = {}
    for name, value in framework().device_get(dict(logs)).items():
        if getattr(value, "ndim", 0):
            shape = f"of shape {value.shape}, but a log is one number"
            raise ArgumentError(function, name, shape, f"For example its mean: {name}.mean()")
        found[name] = value.item() if hasattr(value, "item") else value
        if not isinstance(found[name], (bool, int, float)):
            kind = f"of type {type(found[name]).__name__}, but a log is one real number"
            raise ArgumentError(function, name, kind)
    return {"loss": found.pop("loss"), **found} if "loss" in found else found
