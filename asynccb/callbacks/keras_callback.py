"""Callbacks of Keras in the list of a training: they run inline, as in Keras' own ``fit``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asynccb.callbacks.base import Callback
from asynccb.errors import ArgumentError
from asynccb.storage.packing import freeze, pack

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["KerasCallback", "is_of_keras", "wrap"]

_WHOLE = ("on_test_begin", "on_test_end", "on_predict_begin", "on_predict_end")
_EPOCHS = ("on_epoch_begin", "on_epoch_end")
_BATCHES = tuple(
    f"on_{part}_batch_{side}" for part in ("train", "test", "predict") for side in ("begin", "end")
)
_OURS = frozenset({"batch", "size"})
_SET_BY_FIT = frozenset({"params", "_model", "validation_data"})
_LONGEST_LIST = 10_000


def is_of_keras(callback: object) -> bool:
    """Whether it is an instance of ``keras.callbacks.Callback``; told by the names of its classes, so that
    Keras is not imported to ask."""
    return any(kind.__name__ == "Callback" and _of_keras(kind) for kind in type(callback).__mro__)


def wrap(callback: Any) -> Callback:
    """The callback, or a :class:`KerasCallback` around one of Keras.

    Raises:
        ArgumentError: one that cannot do its work outside of Keras' own loop.
    """
    if any(kind.__module__ == "asynccb.integrations.keras" for kind in type(callback).__mro__):
        allowed = "callbacks themselves: this one runs them in Keras' own fit"
        raise ArgumentError("callbacks", callback, allowed, "Write callbacks=[...] with what it was given")
    if isinstance(callback, Callback) or not is_of_keras(callback):
        return callback  # type: ignore[no-any-return]  # read_hooks refuses what is no Callback
    kind = type(
        f"keras.{type(callback).__name__}", (KerasCallback,), {}
    )  # the name that errors and counts show
    made: Callback = kind(callback)
    return made


class KerasCallback(Callback):
    """Runs a callback of Keras inline, in its place in the list, on the training thread.

    It sees the Keras model itself, and may change it and set ``model.stop_training``. Logs are as in Keras:
    those of batches hold values of the epoch so far, and neither ``batch`` nor ``size``; what it adds to them
    the callbacks behind it see.

    A resumed training goes on with those of its attributes that have changed since ``on_train_begin`` and are
    plain data: counts, the best value, the best weights. What else it has it begins anew: open files, other
    objects, lists of more than 10,000 items.

    Args:
        callback: of Keras.

    Raises:
        ArgumentError: Keras' BackupAndRestore, which tells Keras' own loop where to go on.
    """

    def __init__(self, callback: Any) -> None:
        names = [kind.__name__ for kind in type(callback).__mro__ if _of_keras(kind)]
        if "BackupAndRestore" in names:
            fix = "Use asynccb.callbacks.BackupAndRestore(folder)"
            raise ArgumentError("callbacks", callback, "a callback that needs not Keras' own loop", fix)
        self._wrapped = callback
        self.also_serves = (callback,)
        self._last_logs: dict[str, Any] = {}
        self._begun: dict[str, Any] = {}
        for name in _WHOLE:
            if _overrides(callback, name):
                setattr(self, name, getattr(callback, name))
        for name in _EPOCHS:
            if _overrides(callback, name):
                setattr(self, name, _returning_nothing(getattr(callback, name)))
        for name in _BATCHES:
            # The old name of Keras, which the new one calls unless it is overridden.
            if (
                _overrides(callback, name) or _overrides(callback, name.replace("train_", ""))
            ) and not _is_idle(callback, name):
                setattr(self, name, _with_logs_of_keras(getattr(callback, name)))
        if _overrides(callback, "on_train_begin"):
            self.on_train_begin = self._begin  # type: ignore[method-assign]
        if _overrides(callback, "on_train_end"):
            self._end_of_epoch = vars(self).get("on_epoch_end")
            self.on_epoch_end = self._keep_logs  # type: ignore[method-assign]
            self.on_train_end = self._end  # type: ignore[method-assign]

    def check_model(self, model: Any) -> None:
        """Refuses a model that is not Keras'.

        Raises:
            ArgumentError: names the callback.
        """
        if not any(_of_keras(kind) for kind in type(model).__mro__):
            raise ArgumentError(
                "callbacks",
                self._wrapped,
                f"a callback of Keras needs a Keras model, and the model is a {type(model).__name__}",
                "Derive it from asynccb.Callback, whose hooks are the same",
            )

    def set_model(self, model: Any) -> None:
        self.check_model(model)
        self.model = model
        self._wrapped.set_model(model)
        self._begun = _plain(self._wrapped)

    def set_params(self, params: dict[str, Any]) -> None:
        self.params = params
        steps, samples = params.get("steps"), params.get("samples")
        if steps is None and samples is not None and params.get("batch_size"):
            steps = -(-samples // params["batch_size"])
        self._wrapped.set_params({**params, "steps": steps})

    def state_dict(self) -> dict[str, Any]:
        now, begun = _plain(self._wrapped), self._begun
        changed = [name for name in now if name not in begun or not _equal(now[name], begun[name])]
        return {"attributes": {name: now[name] for name in changed}, "logs": self._last_logs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vars(self._wrapped).update(state["attributes"])
        self._last_logs = dict(state["logs"])

    def _begin(self, logs: Any = None) -> None:
        self._wrapped.on_train_begin(logs)
        self._begun = _plain(self._wrapped)

    def _keep_logs(self, epoch: int, logs: Any = None) -> None:
        if self._end_of_epoch is not None:
            self._end_of_epoch(epoch, logs)
        self._last_logs = dict(logs or {})

    def _end(self, logs: Any = None) -> None:
        """Keras tells the last epoch's logs once more."""
        self._wrapped.on_train_end({**self._last_logs, **(logs or {})})


def _returning_nothing(hook: Callable[..., Any]) -> Callable[..., None]:
    def call(epoch: int, logs: Any = None) -> None:
        hook(epoch, logs)

    return call


def _with_logs_of_keras(hook: Callable[..., Any]) -> Callable[..., None]:
    def call(batch: int, logs: Any = None) -> None:
        shown = {name: value for name, value in (logs or {}).items() if name not in _OURS}
        hook(batch, logs=shown)
        if logs is not None:
            logs.update(shown)

    return call


def _plain(callback: Any) -> dict[str, Any]:
    """A copy of the attributes that can be kept in a backup."""
    found = {}
    for name, value in vars(callback).items():
        if name in _SET_BY_FIT or (isinstance(value, (list, dict)) and len(value) > _LONGEST_LIST):
            continue
        try:
            found[name] = freeze(value)
        except TypeError:
            continue
    return found


def _equal(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and pack(one) == pack(other))


def _overrides(callback: Any, name: str) -> bool:
    hook = getattr(callback, name, None)  # Keras marks the hooks of its base class
    return hook is not None and not getattr(hook, "_is_default", False)


def _is_idle(callback: Any, name: str) -> bool:
    """A checkpoint at the ends of epochs looks at no batch, though Keras' class has the hook: without it
    nobody waits for the logs."""
    hook = getattr(callback, name)
    own = getattr(hook, "__qualname__", "") == "ModelCheckpoint.on_train_batch_end" and (
        hook.__module__.partition(".")[0] == "keras"
    )
    return own and getattr(callback, "save_freq", None) == "epoch"


def _of_keras(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "keras"
