"""Where a training runs."""

from asynccb.engines.thread import ThreadEngine

__all__ = ["ThreadEngine"]
