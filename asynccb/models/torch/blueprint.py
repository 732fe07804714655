"""What a ``TorchModel`` is made of without the numbers in it, so that its copies make models of their own."""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Any

from asynccb.errors import ArgumentError, FileRefused, in_words

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


class Blueprint:
    """A copy of module, loss, optimizer, scheduler and metrics as they are now, with tensors that have no
    memory in place of those that a state has.

    Made once, for a module cannot be copied while another thread uses it.

    Args:
        torch: the package.
        parts: module, loss, optimizer, scheduler, metrics.
        make: makes a model of such parts.
    """

    def __init__(self, torch: Any, parts: tuple[Any, ...], make: Callable[..., Any]) -> None:
        self._make = make
        self._why: Exception | None = None
        self._hollow: dict[int, tuple[Any, Any]] = {}
        memo: dict[int, Any] = {}
        for tensor in _tensors(torch, parts):
            memo[id(tensor)] = hollow = _like(torch, tensor, "meta")
            self._hollow[id(hollow)] = hollow, tensor.device
        for state in parts[2].state.values():  # what an optimizer has already comes with the state
            memo |= {id(held): torch.empty(0) for held in state.values() if isinstance(held, torch.Tensor)}
        try:
            self._parts = copy.deepcopy(parts, memo)
        except Exception as error:  # of whatever the module is made of
            self._why = error
        self._torch = torch

    def build(self, state: Mapping[str, Any]) -> Any:
        """A model with this state, which is thawed.

        Raises:
            ArgumentError: the module, or what came with it, cannot be copied.
        """
        if self._why is not None:
            name = in_words("the module, or what was given with it,")
            raise ArgumentError("model", name, f"cannot be copied: {self._why}") from self._why
        memo: dict[int, Any] = {
            key: _like(self._torch, hollow, device) for key, (hollow, device) in self._hollow.items()
        }
        parts = copy.deepcopy(self._parts, memo)
        module, _, optimizer, scheduler, _ = parts
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(state["trainable"][name])
        if scheduler is not None:
            _watch(optimizer)
        return self._make(parts, state)


def _tensors(torch: Any, parts: tuple[Any, ...]) -> Iterator[Any]:
    """Those of the state dicts that are of torch's own kinds and lie in one piece of memory."""
    kinds = (torch.nn.Parameter, torch.Tensor)
    for part in parts[:2]:
        if isinstance(part, torch.nn.Module):
            for tensor in part.state_dict(keep_vars=True).values():
                if type(tensor) in kinds and tensor.layout is torch.strided:
                    yield tensor


def _like(torch: Any, tensor: Any, device: Any) -> Any:
    made = torch.empty_like(tensor, device=device, requires_grad=False)
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(made, requires_grad=tensor.requires_grad)
    return made


def _watch(optimizer: Any) -> None:
    """Marks a copied optimizer as a scheduler marks its own, so that it does not warn of another one."""
    step = optimizer.step

    @functools.wraps(step)
    def watched(*args: Any, **kwargs: Any) -> Any:
        optimizer._opt_called = True
        return step(*args, **kwargs)

    watched._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = watched


def check_fits(path: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses a state of another module or optimizer.

    Raises:
        FileRefused: it names what differs.
    """
    for part in ("weights", "loss"):
        if part in saved or part == "weights":
            _check_tensors(path, saved[part], now.get(part, {}))
    for part in ("optimizer", "scheduler"):
        there, here = (held.get("classes", {}).get(part) for held in (saved, now))
        if part in saved and part in now and there != here:
            told = f"its {part} is of {there}, this one of {here}"
            raise FileRefused(
                path, f"{told}. For the weights alone: module.load_state_dict(load_weights(path))"
            )
    if "optimizer" in saved:
        there, here = (
            [len(group["params"]) for group in held["optimizer"]["param_groups"]] for held in (saved, now)
        )
        if there != here:
            why = f"its optimizer has groups of {there} parameters, this one's of {here}"
            raise FileRefused(path, why)


def _check_tensors(path: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if saved.keys() != now.keys():
        strange = sorted(map(str, saved.keys() ^ now.keys()))
        told = ", ".join(strange[:4]) + (", ..." if len(strange) > 4 else "")
        raise FileRefused(path, f"it is of another module: {told} are not in both")
    for name, tensor in saved.items():
        there, here = (getattr(held, "shape", None) for held in (tensor, now[name]))
        if there != here:
            raise FileRefused(path, f"{name} has the shape {there} there and {here} here")
