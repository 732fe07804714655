"""What the code object of a plain function tells of it, at a hundredth of the price of ``inspect``.

Nothing is kept from one question to the next, so a class whose methods are replaced, and a function whose
code is (a reloaded module), is answered for as it is now.
"""

from __future__ import annotations

from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from types import CodeType

__all__ = ["Plain", "plain"]


class Plain(NamedTuple):
    """A function, or a method bound to its object, that says all about itself in its code.

    Attributes:
        code: of the function.
        bound: 1 for a method, whose first argument is given; else 0.
        optional: how many of the positional parameters have a default.
    """

    code: CodeType
    bound: int
    optional: int

    def positional(self) -> tuple[str, ...]:
        """The names of what can be given by position, beyond the object of a method."""
        return self.code.co_varnames[self.bound : self.code.co_argcount]

    def takes(self, count: int) -> bool:
        """Whether it can be called with ``count`` arguments by position and nothing else. False also where
        it has parameters beyond those, which are left to ``inspect``."""
        code, given = self.code, count + self.bound
        return code.co_argcount - self.optional <= given <= code.co_argcount and not code.co_kwonlyargcount


def plain(function: Any) -> Plain | None:
    """``function`` as its code tells it; None where more than that counts: a callable of another kind, or a
    function with attributes, such as the ``__wrapped__`` and ``__signature__`` of decorators."""
    bound = type(function) is MethodType
    inner = function.__func__ if bound else function
    if type(inner) is not FunctionType or inner.__dict__:
        return None
    defaults = inner.__defaults__
    return Plain(inner.__code__, int(bound), len(defaults) if defaults else 0)
