"""What a thread has of torch's own settings, and what a model has of its random numbers."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import TracebackType


class Ambient:
    """The settings of torch that count for one thread alone, as the thread that makes this has them: gradient
    mode, default device, autocast.

    Args:
        device: the type of device whose autocast counts.
    """

    def __init__(self, device: str) -> None:
        import torch

        self._gradients = torch.is_grad_enabled()
        self._device = torch.get_default_device()
        self._autocast: dict[str, Any] | None = None
        if torch.is_autocast_enabled(device):
            self._autocast = {
                "device_type": device,
                "dtype": torch.get_autocast_dtype(device),
                "cache_enabled": torch.is_autocast_cache_enabled(),
            }
        self._entered: tuple[int, contextlib.ExitStack] | None = None

    def enter(self) -> None:
        """Gradient mode and default device, for this thread until :meth:`leave`.

        Not autocast: it keeps what it has cast until its block ends, which must not be later than the batch.
        """
        import torch

        stack = contextlib.ExitStack()
        if torch.is_grad_enabled() != self._gradients:
            stack.enter_context(torch.set_grad_enabled(self._gradients))
        if torch.get_default_device() != self._device:
            stack.enter_context(self._device)
        self._entered = threading.get_ident(), stack

    def leave(self) -> None:
        """Undoes :meth:`enter`; does nothing on any other thread."""
        if self._entered is not None and self._entered[0] == threading.get_ident():
            self._entered[1].close()
            self._entered = None

    def autocast(self) -> Any:
        """A context of the batch; None where there was no autocast."""
        import torch

        return None if self._autocast is None else torch.autocast(**self._autocast)


class OwnRandom:
    """A stream of random numbers that takes the place of torch's process-wide ones inside of a ``with``
    block.

    Who draws on another thread at the same time draws from the same stream.

    Args:
        seed: of the stream; it begins as that of ``torch.manual_seed(seed)`` does.
        device: whose generator is meant, besides the CPU's.
    """

    def __init__(self, seed: int, device: Any) -> None:
        import torch

        self._generators = generators(device)
        self.states = [
            torch.Generator(generator.device).manual_seed(seed).get_state() for generator in self._generators
        ]
        self._outside: list[Any] = []

    def __enter__(self) -> None:
        outside = [generator.get_state() for generator in self._generators]
        for generator, state in zip(self._generators, self.states, strict=True):
            generator.set_state(state)
        self._outside = outside

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.states = [generator.get_state() for generator in self._generators]
        for generator, state in zip(self._generators, self._outside, strict=True):
            generator.set_state(state)


def generators(device: Any) -> list[Any]:
    """The process-wide generators that a model on ``device`` draws from."""
    import torch

    found = [torch.default_generator]
    if device.type == "cuda":
        torch.cuda.init()
        found.append(torch.cuda.default_generators[device.index or 0])
    return found
