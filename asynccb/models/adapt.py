"""Making the training thread's ``Model`` out of the object that a user gave."""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any, TypeGuard, cast

from asynccb.errors import ArgumentError
from asynccb.protocols import Model
from asynccb.signatures import plain

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from asynccb.protocols import Batch, Gate, LiveState, ModelState

_MEMBERS = tuple(name for name in vars(Model) if not name.startswith("_"))
_WANTED = "a model is a Sequential, or any object with train_batch(batch) -> dict of logs"
_FRAMEWORKS = {"keras": "keras", "torch": "torch", "sklearn": "sklearn"}
"""Whose objects are models too: the package that one of their classes is of, and our module for it."""
_OF_JAX = {"equinox", "flax", "jax", "jaxlib"}
_OPTIONAL = ("begin_pass", "check_path", "end_epoch", "end_training")


def adapt(model: object) -> Model:
    """What drives ``model``: itself if it is a full ``Model``, else a :class:`BareModel` around it.

    Args:
        model: a ``Sequential``, or an object with ``train_batch(batch)``; ``test_batch``, ``predict_batch``,
            ``capture``, ``metrics_names``, ``direction``, ``check_data`` and ``check_ready`` are used where
            it has them. One that computes elsewhere (on a device, in another process) and mostly waits says
            so by ``needs_cpu = False``: it takes no turns with other trainings.

    Raises:
        ArgumentError: for a class in place of an instance, and for objects that cannot train.
    """
    if isinstance(model, type):
        raise ArgumentError("model", model, "is a class, not an instance", f"Write {model.__name__}(...)")
    if (_is_full(model) or isinstance(model, Model)) and _takes_gate(model.train_batch):
        return model
    if callable(getattr(model, "train_batch", None)):
        return BareModel(model)
    packages = [kind.__module__.partition(".")[0] for kind in type(model).__mro__]
    for package in packages:
        if package in _FRAMEWORKS:
            made = importlib.import_module(f"asynccb.models.{_FRAMEWORKS[package]}").adapt(model)
            return cast("Model", made)
    if inspect.isroutine(model) or not _OF_JAX.isdisjoint(packages):
        raise ArgumentError("model", model, _WANTED, "A step in JAX trains as JaxModel(step, state)")
    raise ArgumentError("model", model, _WANTED, "Give it a train_batch method")


class BareModel:
    """The ``Model`` around an object that has little more than ``train_batch``.

    Attributes:
        user_model: the object, or what it drives itself where it says so.
        has_test: whether it has ``test_batch``.
        has_predict: whether it has ``predict_batch``.
        has_capture: whether it has ``capture``.
        has_live: whether it has ``live``.
        has_restore: whether its training can be resumed: it has ``fingerprint`` and ``restore``, or
            ``state_dict`` and ``load_state_dict`` of plain data.
        plain_state: what answers a copy of its state for a backup, where it has the latter; None: its
            snapshots can be restored.
        begin_pass, check_path, end_epoch, end_training: the object's own; there only where it has them (see
            :mod:`asynccb.protocols`).
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.user_model = getattr(model, "user_model", model)
        self._train: Callable[..., Mapping[str, Any]] = model.train_batch
        self._gated = _takes_before_update(self._train)
        self.has_test = callable(getattr(model, "test_batch", None))
        self.has_predict = callable(getattr(model, "predict_batch", None))
        self.has_capture = callable(getattr(model, "capture", None))
        self.has_live = callable(getattr(model, "live", None))
        own, plain = (
            all(callable(getattr(model, name, None)) for name in names)
            for names in (("fingerprint", "restore"), ("state_dict", "load_state_dict"))
        )
        self.has_restore = own or plain
        self.plain_state = self._plain_state if plain and not own else None
        for name in _OPTIONAL:
            if callable(method := getattr(model, name, None)):
                setattr(self, name, method)

    @property
    def metrics_names(self) -> Sequence[str]:
        """The object's own, else empty: not known before it trains."""
        return tuple(getattr(self._model, "metrics_names", None) or ())

    def check_ready(self, *, training: bool) -> None:
        """Refuses to test without ``test_batch``; asks the object's own ``check_ready``, if it has one."""
        if not training:
            self._require_test()
        own = getattr(self._model, "check_ready", None)
        if callable(own):
            own(training=training)

    def check_data(
        self, x: Any, y: Any, sample_weight: Any, *, name: str = "x", training: bool = True
    ) -> None:
        """Asks the object's own ``check_data``, if it has one."""
        own = getattr(self._model, "check_data", None)
        if callable(own):
            own(x, y, sample_weight, name=name, training=training)

    def direction(self, metric: str) -> str | None:
        """The object's own answer; without one ``"min"`` for ``loss`` and ``val_loss``, else None."""
        own = getattr(self._model, "direction", None)
        if callable(own):
            return cast("str | None", own(metric))
        return "min" if metric in ("loss", "val_loss") else None

    def train_batch(self, batch: Batch, before_update: Gate | None = None) -> Mapping[str, Any]:
        """One update; a ``train_batch`` without ``before_update`` is gated as a whole, before it begins."""
        if self._gated:
            return self._train(batch, before_update=before_update)
        if before_update is not None:
            before_update()
        return self._train(batch)

    def test_batch(self, batch: Batch) -> Mapping[str, Any]:
        """The logs of a batch without an update.

        Raises:
            ArgumentError: if the object has no ``test_batch``.
        """
        self._require_test()
        return cast("Mapping[str, Any]", self._model.test_batch(batch))

    def predict_batch(self, batch: Batch) -> Any:
        """The outputs for a batch.

        Raises:
            ArgumentError: if the object has no ``predict_batch``.
        """
        self.require("predict_batch", self.has_predict, "to predict", "predict_batch(batch) -> outputs")
        return self._model.predict_batch(batch)

    def capture(self) -> ModelState:
        """A copy of the object's state.

        Raises:
            ArgumentError: if the object has no ``capture``.
        """
        shown = "capture() -> an object with arrays, save(path) and to_model()"
        self.require("capture", self.has_capture, "for snapshots and checkpoints", shown)
        return cast("ModelState", self._model.capture())

    def live(self) -> LiveState | None:
        """The object's own answer; None where it has no ``live``."""
        return cast("LiveState | None", self._model.live()) if self.has_live else None

    def fingerprint(self) -> dict[str, Any]:
        """The object's own answer, else the name of its class."""
        own = getattr(self._model, "fingerprint", None)
        return dict(own()) if callable(own) else {"class": type(self._model).__qualname__}

    def restore(self, path: str, accept: Callable[[Mapping[str, Any]], object]) -> None:
        """Puts back what a backup holds; see :class:`asynccb.protocols.Resumes`."""
        if self.plain_state is None:
            self._model.restore(path, accept)
        else:
            from asynccb.models.plain import read_plain

            self._model.load_state_dict(read_plain(path, accept))

    def _plain_state(self) -> ModelState:
        from asynccb.models.plain import PlainState

        return PlainState(type(self._model).__name__, self._model.state_dict())

    def _require_test(self) -> None:
        shown = "test_batch(batch) -> dict of logs"
        self.require("test_batch", self.has_test, "to validate and to evaluate", shown)

    def require(self, method: str, present: bool, purpose: str, shown: str) -> None:
        """Raises ArgumentError saying what to add, unless it is present."""
        if not present:
            raise ArgumentError("model", self._model, f"{method} is needed {purpose}", f"Add {shown}")


def _is_full(model: object) -> TypeGuard[Model]:
    """Whether its class alone makes it a full model, which is quickly seen; False: ``isinstance`` decides."""
    kind, own = type(model), getattr(model, "__dict__", {})
    return all(getattr(kind, name, None) is not None and name not in own for name in _MEMBERS)


def _takes_gate(train_batch: Callable[..., Any]) -> bool:
    """Whether the loop can call it with the batch and the gate, by position."""
    told = plain(train_batch)
    if told is not None:
        return told.positional()[1:2] == ("before_update",)
    try:
        parameters = list(inspect.signature(train_batch).parameters.values())
    except (TypeError, ValueError):
        return True
    by_position = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return by_position[1:2] == ["before_update"]


def _takes_before_update(train_batch: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(train_batch).parameters.values()
    except (TypeError, ValueError):
        return False  # compiled methods may tell no signature
    return any(p.name == "before_update" or p.kind is p.VAR_KEYWORD for p in parameters)
