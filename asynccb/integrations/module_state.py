"""Copies of a torch module that somebody else trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from asynccb.models.torch.state import TorchState, copied, optimizer_part, slot_names, split

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["CopiedModule", "is_module"]


def is_module(model: object) -> bool:
    """Whether it is a ``torch.nn.Module``; torch is not imported for that."""
    return any(kind.__module__ == "torch.nn.modules.module" for kind in type(model).__mro__)


class CopiedModule:
    """Tells a run how to copy a module, and with it the state of its optimizers.

    Args:
        module: callbacks see it as ``self.model``.
        optimizers: of it; copied too.
    """

    def __init__(self, module: Any, optimizers: Iterable[Any] = ()) -> None:
        self.user_model = module
        self._optimizers = list(optimizers)

    def capture(self) -> TorchState:
        """A copy on the CPU, which has files as those of a ``TorchModel``, but makes no model."""
        module, name, tensors = self.user_model, type(self.user_model).__name__, list[Any]()
        found = {"weights": module.state_dict()}
        classes = {}
        for at, optimizer in enumerate(self._optimizers):
            found[part := optimizer_part(at)] = optimizer.state_dict()
            classes[part] = type(optimizer).__name__
        tree = split({**found, "classes": classes}, tensors, name)
        slots = [slot_names(module, optimizer) for optimizer in self._optimizers]

        def rebuild(state: dict[str, Any]) -> NoReturn:
            raise NotImplementedError(
                f"how to make another {name} is not known here: give one the weights by load_state_dict"
            )

        return TorchState(name, tree, [copied(tensor) for tensor in tensors], slots, rebuild)
