"""One line to the person who watches."""

from __future__ import annotations

__all__ = ["say"]


def say(text: str) -> None:
    """Prints ``text`` on what ``sys.stdout`` is at this moment.

    A stdout that is closed, a broken pipe, or one that cannot encode the text is no reason to lose a
    training: the line is dropped.
    """
    try:
        print(text, flush=True)
    except (OSError, ValueError):
        pass
