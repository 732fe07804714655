"""The threads that linear algebra computes with: one number for all pools of the process, saved and restored.

What is reached: the BLAS and OpenMP libraries that threadpoolctl knows (OpenBLAS, MKL, BLIS, FlexiBLAS,
libgomp, libomp, libiomp), and torch's own pool if torch was imported. What is not: JAX, whose pool on the CPU
is made when it starts and has no switch after that, and Apple's Accelerate, which threadpoolctl does not
know. Held to one thread, these go on with as many as they like.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

__all__ = ["Pools", "blas_threads"]


def blas_threads() -> int | None:
    """Threads that the linear algebra under numpy computes with; None where it does not tell. Results depend
    on it to the last bit."""
    counts = [int(library.num_threads) for library in _libraries() if library.user_api == "blas"]
    return max(counts, default=None)


_lock = threading.Lock()
_known: list[Any] = []
_modules = 0


def _libraries() -> list[Any]:
    """Threadpoolctl's handles of the libraries that are loaded.

    To look for them takes 0.2 to 0.5 ms, so it is done when the number of Python's modules has changed:
    numerical libraries come with modules.
    """
    global _known, _modules
    with _lock:
        count = len(sys.modules)
        if count != _modules:
            from threadpoolctl import ThreadpoolController

            _known = ThreadpoolController().lib_controllers
            _modules = len(sys.modules)  # the import above has added some
        return _known


def _after_fork() -> None:
    # Whoever looked for libraries at that moment is not in the child: it would wait for the lock for ever.
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_after_fork)


class Pools:
    """Holds all pools to one number of threads, and puts back what was there before. Not thread-safe."""

    def __init__(self) -> None:
        self.threads: int | None = None
        """The number held; None: everything is as found."""
        self._before: dict[str, tuple[Any, int]] = {}
        self._torch_before: int | None = None

    def hold(self, threads: int) -> None:
        """Sets every pool to ``threads``, also those that were loaded since the last call."""
        fresh = threads != self.threads
        self.threads = threads
        for library in _libraries():
            if library.user_api != "openmp" and (fresh or library.filepath not in self._before):
                self._before.setdefault(library.filepath, (library, int(library.num_threads)))
                _set(library, threads)
        torch = _torch()
        if torch is not None and self._torch_before is None:
            self._torch_before = int(torch.get_num_threads())

    def hold_here(self) -> list[tuple[Any, int]]:
        """Sets what counts for the calling thread alone. OpenMP keeps the number for each thread that calls
        it, and new threads begin with the environment's.

        Returns:
            What was found, for :func:`put_back_here` on the same thread.
        """
        if self.threads is None:
            return []
        found = []
        for library in _libraries():
            if library.user_api == "openmp" and (count := int(library.num_threads)) != self.threads:
                found.append((library, count))
                _set(library, self.threads)
        torch = _torch()
        if torch is not None:
            torch.set_num_threads(self.threads)
        return found

    def restore(self) -> None:
        """Everything as it was before the first ``hold``."""
        self.threads = None
        for library, count in self._before.values():
            _set(library, count)
        self._before.clear()
        torch, before, self._torch_before = _torch(), self._torch_before, None
        if torch is not None and before is not None:
            torch.set_num_threads(before)


def put_back_here(found: list[tuple[Any, int]]) -> None:
    for library, count in found:
        _set(library, count)


def _set(library: Any, count: int) -> None:
    # threadpoolctl lets only the thread that was the first set OpenBLAS, newer versions do, for as long as it
    # lives, and silently ignores the others. The number held here belongs to the process: any training's
    # thread may be the first to come, and who ends the last one puts it back.
    setter = getattr(library, "_real_set_num_threads", library.set_num_threads)
    setter(count)


def _torch() -> Any:
    """Torch if it was imported and is whole: another thread may be in the midst of importing it."""
    torch = sys.modules.get("torch")
    return torch if hasattr(torch, "set_num_threads") and hasattr(torch, "get_num_threads") else None
