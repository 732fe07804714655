"""The default engine: one daemon thread for each run."""

from __future__ import annotations

import contextvars
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ThreadEngine"]


class ThreadEngine:
    """Runs each training in a thread of its own, in a copy of the caller's context.

    The threads are daemons: a batch that never returns must not keep the interpreter alive, and a
    thread cannot be killed.
    """

    def start(self, target: Callable[[], None], name: str) -> None:
        """Starts ``target`` and returns at once.

        Raises:
            RuntimeError: the system has no thread left.
        """
        context = contextvars.copy_context()
        threading.Thread(target=context.run, args=(target,), name=name, daemon=True).start()
