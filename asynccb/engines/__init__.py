"""Where a training runs."""

from asynccb.engines.pool import ThreadPoolEngine
from asynccb.engines.thread import ThreadEngine

__all__ = ["ThreadEngine", "ThreadPoolEngine"]
