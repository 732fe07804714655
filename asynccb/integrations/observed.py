"""The model of a training whose loop is somebody else's: it is looked at and copied, never driven."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from asynccb.errors import ArgumentError
from asynccb.events import TrainBegin, TrainEnd
from asynccb.integrations.module_state import CopiedModule, is_module
from asynccb.models.adapt import adapt

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from asynccb.protocols import ModelState
    from asynccb.training.prefetch import AsyncFeed

__all__ = ["NoModel", "Observed", "OtherLoop"]


class NoModel:
    """What callbacks see as ``self.model`` where nobody has given one: they may stop the training by it."""

    def __init__(self) -> None:
        self.stop_training = False

    def __repr__(self) -> str:
        return "None"


class Observed:
    """As much of a :class:`~asynccb.protocols.Model` as a run asks whose batches somebody else trains.

    It has no ``live``: the foreign loop asks no gate, so a copy is made at once, while the loop waits.

    Args:
        model: what callbacks see, or (where it has ``user_model``) an object that knows how to copy that.
    """

    metrics_names: Sequence[str] = ()

    def __init__(self, model: Any) -> None:
        self._model = NoModel() if model is None else model
        self.user_model = getattr(self._model, "user_model", self._model)
        self._copies: Any = self._model if callable(getattr(self._model, "capture", None)) else None

    def direction(self, metric: str) -> str | None:
        own = getattr(self._copies, "direction", None)
        if callable(own):
            return cast("str | None", own(metric))
        return "min" if metric in ("loss", "val_loss") else None

    def require_capture(self) -> None:
        """Finds out how the model is copied.

        Raises:
            ArgumentError: there is none, or nobody knows how.
        """
        if self._copies is not None:
            return
        if isinstance(self._model, NoModel):
            raise ArgumentError(
                "model", None, "snapshots and checkpoints need it", "Write Background(..., model=model)"
            )
        if is_module(self._model):
            self._copies = CopiedModule(self._model)
            return
        if callable(getattr(self._model, "train_batch", None)):
            raise ArgumentError(
                "model",
                self._model,
                "capture is needed for snapshots and checkpoints",
                "Add capture() -> an object with arrays, save(path) and to_model()",
            )
        self._copies = adapt(self._model)

    def check_path(self, path: str, *, weights_only: bool) -> None:
        self.require_capture()
        check = getattr(self._copies, "check_path", None)
        if check is not None:
            check(path, weights_only=weights_only)

    def capture(self) -> ModelState:
        self.require_capture()
        return cast("ModelState", self._copies.capture())


class OtherLoop:
    """The program of a run that is opened and closed around somebody else's loop.

    Args:
        params: what callbacks get as ``self.params``.
    """

    takes_turns = False
    opening = TrainBegin
    closing = TrainEnd

    def __init__(self, params: Mapping[str, Any]) -> None:
        self._params = dict(params)
        self.feeds: list[AsyncFeed] = []
        self.validation_data: Any = None
        self.result: Any = None
        self.closing_logs: dict[str, Any] = {}

    def prepare(self, model: object) -> dict[str, Any]:
        return dict(self._params)
