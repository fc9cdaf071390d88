"""A package that is a verb too: `robustvlm.certify` holds the mathematics, and called, it certifies."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any, Generic, TypeVar

R = TypeVar("R")


class CallableModule(ModuleType, Generic[R]):
    """A module that hands a call on to a function elsewhere, which is imported when it is first called.

    A package and a command may share a name, and Python binds that name to the package as soon as anything in it is
    imported; so the package itself has to be what is called.
    """

    def __call__(self, *args: Any, **options: Any) -> R:
        """Call the verb; its own signature and errors count."""
        return self.__wrapped__(*args, **options)

    @property
    def __wrapped__(self) -> Callable[..., R]:
        """The verb: what `inspect.signature` and `inspect.unwrap` look at."""
        module, _, name = str(self.__dict__["__verb__"]).partition(":")
        found: Callable[..., R] = getattr(import_module(module), name)
        return found


def make_callable(name: str, verb: str) -> None:
    """Let an imported module be called.

    Args:
        name: of the module, its own `__name__`. verb: "module:function" that a call is handed on to.

    Example:
        >>> sys.modules["stand_in"] = ModuleType("stand_in")
        >>> make_callable("stand_in", "math:hypot")
        >>> sys.modules.pop("stand_in")(3.0, 4.0)
        5.0
    """
    module = sys.modules[name]
    module.__dict__["__verb__"] = verb
    module.__class__ = CallableModule
