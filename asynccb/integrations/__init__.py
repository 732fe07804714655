"""Other people's libraries and loops beside our callbacks; each library has a file that alone imports it."""

from asynccb.integrations.background import Background

__all__ = ["Background"]
