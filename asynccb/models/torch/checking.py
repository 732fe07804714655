"""What can be refused of a ``TorchModel`` before its first batch."""

from __future__ import annotations

import inspect
import re
import types
from typing import Any

import numpy as np

from asynccb.errors import ArgumentError, in_words

_HOW = (
    "TorchModel(module, loss, optimizer), as in "
    "TorchModel(net, nn.CrossEntropyLoss(), torch.optim.Adam(net.parameters()))"
)


def import_torch() -> Any:
    """The package.

    Raises:
        ImportError: it is not installed; names the extra.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError('TorchModel needs PyTorch: pip install "asynccb[torch]"') from error
    return torch


def refuse_bare(module: Any) -> ArgumentError:
    """What to say of an object of torch in place of a ``TorchModel``."""
    wanted = "a module trains with a loss and an optimizer"
    return ArgumentError("model", in_words(type(module).__name__), wanted, f"Write {_HOW}")


def check_module(torch: Any, module: Any) -> None:
    if isinstance(module, type) or not isinstance(module, torch.nn.Module):
        raise ArgumentError("module", module, "a torch.nn.Module", f"Write {_HOW}")
    for name, parameter in module.named_parameters():
        if torch.nn.parameter.is_lazy(parameter):
            fix = "Call the module with some data first"
            raise ArgumentError("module", in_words(name), "has no shape before the first pass", fix)
        if parameter.device.type == "meta":
            raise ArgumentError("module", in_words(name), "is on the meta device and has no values")
        if parameter.is_inference():
            fix = "Make the module outside of torch.inference_mode()"
            raise ArgumentError(
                "module", in_words(name), "was made in inference mode and has no gradient", fix
            )


def check_loss(loss: Any) -> None:
    if isinstance(loss, type):
        raise ArgumentError("loss", loss, "is a class, not an instance", f"Write {loss.__name__}()")
    if not callable(loss):
        raise ArgumentError("loss", loss, "a callable (output, target) -> scalar tensor", f"Write {_HOW}")


def check_optimizer(torch: Any, optimizer: Any, module: Any, loss: Any) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        fix = "For example torch.optim.Adam(module.parameters())"
        raise ArgumentError("optimizer", optimizer, "an instance of torch.optim.Optimizer", fix)
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        why = "its step wants a closure that computes the loss again, which a batch cannot give"
        raise ArgumentError("optimizer", in_words(type(optimizer).__name__), why)
    own = {id(parameter) for parameter in module.parameters()}
    if isinstance(loss, torch.nn.Module):
        own |= {id(parameter) for parameter in loss.parameters()}
    given = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    strange = sum(id(parameter) not in own for parameter in given)
    if strange:
        what = in_words(f"{strange} of its {len(given)} parameters")
        fix = "Make it of module.parameters(), after the module was changed or copied"
        raise ArgumentError("optimizer", what, "are not the module's", fix)


def check_scheduler(torch: Any, scheduler: Any, optimizer: Any, step: Any) -> None:
    if step not in ("epoch", "batch"):
        raise ArgumentError("scheduler_step", step, 'one of "epoch", "batch"')
    if scheduler is None:
        return
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        fix = "Use asynccb.callbacks.ReduceLROnPlateau"
        raise ArgumentError("scheduler", in_words("ReduceLROnPlateau"), "wants a metric at each step", fix)
    wanted = "a scheduler of torch.optim.lr_scheduler on this optimizer"
    steps = callable(getattr(scheduler, "step", None)) and callable(getattr(scheduler, "state_dict", None))
    if isinstance(scheduler, type) or not steps:
        raise ArgumentError("scheduler", scheduler, wanted)
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ArgumentError("scheduler", scheduler, f"{wanted}; it is on another one")


def find_device(torch: Any, device: Any, module: Any) -> Any:
    """The device that is meant; None means that of the module's first parameter."""
    if device is None:
        first = next(module.parameters(), None)
        return torch.device("cpu") if first is None else first.device
    try:
        found = torch.device(device)
        return torch.empty(0, device=found).device  # with its index
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise ArgumentError("device", device, f"is not there: {str(error).splitlines()[0]}") from None


def find_amp(torch: Any, amp: Any) -> Any:
    """The type in which autocast computes; None for none."""
    if amp is None:
        return None
    found = getattr(torch, amp, None) if isinstance(amp, str) else amp
    if found not in (torch.float16, torch.bfloat16):
        raise ArgumentError("amp", amp, 'None, "bfloat16" or "float16"')
    return found


def check_positive(name: str, value: Any) -> None:
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < np.inf
    ):
        raise ArgumentError(name, value, "a number above 0, or None")


def check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(name, value, f"a whole number of at least {least}")


def check_arrays(data: Any, name: str) -> None:
    """Refuses arrays of which torch makes no tensors."""
    if isinstance(data, dict):
        data = list(data.values())
    if isinstance(data, (list, tuple)):
        for part in data:
            check_arrays(part, name)
    elif isinstance(data, np.ndarray) and data.dtype.kind not in "biufc":
        raise ArgumentError(name, in_words(f"an array of {data.dtype}"), "numbers")


# What must be equal for a training to be resumed -----------------------------------------------------------


def hyperparameters(optimizer: Any) -> dict[str, Any]:
    """Those of an optimizer that was just made, as plain data."""
    groups = [
        {name: _plain(value) for name, value in group.items() if name not in ("params", "initial_lr")}
        for group in optimizer.param_groups
    ]
    return {"optimizer": {"class": type(optimizer).__name__, "groups": groups}}


def loss_as_plain(loss: Any) -> dict[str, Any]:
    """Its name, and of an object its settings."""
    settings = {} if isinstance(loss, types.FunctionType) else vars(loss) if hasattr(loss, "__dict__") else {}
    return {
        "name": getattr(loss, "__qualname__", type(loss).__name__),
        **{
            name: value
            for name, value in settings.items()
            if isinstance(value, (bool, int, float, str)) and not name.startswith("_") and name != "training"
        },
    }


def without_addresses(text: str) -> str:
    """The text of an object, equal in all processes."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def _plain(value: Any) -> Any:
    if hasattr(value, "detach"):
        return value.tolist()
    if isinstance(value, (tuple, list)):
        return [_plain(part) for part in value]
    return (
        value
        if value is None or isinstance(value, (bool, int, float, str))
        else without_addresses(repr(value))
    )
