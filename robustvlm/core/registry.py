"""One door for all that has a name: a built-in one, or the user's own by `module:callable`.

A `Table` holds what is built in. Its entries stand in the table itself or, one file each, in modules of the table's
package, which add themselves and are imported when a name is first looked up. `load` takes a name from a table, or
the object of a `module:callable`, imported under the rules of `robustvlm.core.user_code` (announced where a file names
it, refused by `--no-code`).
"""

import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any, Generic, TypeVar

from robustvlm.core.user_code import import_user_module, may_be_imported, no_exit
from robustvlm.errors import UserError, nearest
from robustvlm.text import one_line

T = TypeVar("T")
Thing = TypeVar("Thing")


class Table(MutableMapping[str, T], Generic[T]):
    """Named things of one kind, in a fixed order: those given first, then those of other files by name.

    Args:
        home: the package whose modules may add to the table; they are imported when somebody asks for all names, or
            for one that is not there yet.
        first: the entries that the table begins with.

    Example:
        >>> table = Table("robustvlm.core", {"one": 1})
        >>> table["zero"] = 0
        >>> dict(table)
        {'one': 1, 'zero': 0}
    """

    def __init__(self, home: str, first: Mapping[str, T] | None = None) -> None:
        self._home, self._first, self._more = home, dict(first or {}), dict[str, T]()
        self._complete = False

    def named(self, name: str) -> Callable[[Thing], Thing]:
        """Return a decorator that adds a class or function under a name, and leaves it as it is."""

        def add(thing: Thing) -> Thing:
            self[name] = thing  # type: ignore[assignment]  # what an entry is, each table says
            return thing

        return add

    def __getitem__(self, name: str) -> T:
        if name not in self._first and name not in self._more:
            self._find()
        return self._first[name] if name in self._first else self._more[name]

    def __setitem__(self, name: str, thing: T) -> None:
        (self._first if name in self._first else self._more)[name] = thing

    def __delitem__(self, name: str) -> None:
        del (self._first if name in self._first else self._more)[name]

    def __iter__(self) -> Iterator[str]:
        self._find()
        return iter([*self._first, *sorted(self._more)])

    def __len__(self) -> int:
        self._find()
        return len(self._first) + len(self._more)

    def _find(self) -> None:
        """Import the modules of the package, once; they may look into the table meanwhile."""
        if self._complete:
            return
        self._complete = True
        for module in pkgutil.iter_modules(getattr(import_module(self._home), "__path__", ())):
            if not module.ispkg:
                import_module(f"{self._home}.{module.name}")


LIBRARIES = ("timm", "torchvision")
"""Whose classifiers are named `LIBRARY:NAME`, which is no `module:callable`."""

NOT_CODE = (*LIBRARIES, "transformers", "mllm")
"""Libraries and kinds whose models are named `LIBRARY:NAME`, though that looks like `module:callable`."""


def names_a_callable(spec: str) -> bool:
    """Whether a spec has the form `module:callable`, and is no model of a library.

    Example:
        >>> names_a_callable("my.module:make"), names_a_callable("hf-hub:org/name")
        (True, False)
        >>> names_a_callable("timm:resnet18"), names_a_callable("timm.models:resnet18")
        (False, True)
    """
    form = re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", spec)
    return form is not None and spec.partition(":")[0] not in NOT_CODE


def names_own(spec: str) -> bool:
    """Whether a spec is `module:callable` with a module that is there, so that it can hardly mean anything else.

    Example:
        >>> names_own("json:loads"), names_own("targetd:cat")
        (True, False)
    """
    return names_a_callable(spec) and may_be_imported(spec)


def load(name: str, table: Mapping[str, T], what: str, *, also: Iterable[str] = ()) -> T | Any:
    """Return the entry of a table, or the object that `module:callable` names.

    Args:
        what: the kind of thing, as errors call it: "attack".
        also: names that are understood elsewhere, for the hint.

    Raises:
        UserError: the name is neither, or the module or its object is not there, fails, or is refused.

    Example:
        >>> load("b", {"b": 2}, "letter"), load("math:tau", {}, "number")
        (2, 6.28...)
        >>> load("beta", {"b": 2}, "letter")
        Traceback (most recent call last):
        robustvlm.errors.UserError: unknown letter 'beta': known: 'b'
    """
    if name in table:
        return table[name]
    if names_own(name):
        return resolve(name)
    known = [*table, *also]
    if names_a_callable(name):
        kind, where = name.partition(":")[0], "neither in this folder nor among the installed packages"
        raise UserError(f"unknown {what} '{name}': {nearest(kind, known)} (of your own: no module '{kind}', {where})")
    raise UserError(f"unknown {what} '{name}': {nearest(name, known)}")


def resolve(spec: str) -> Any:
    """Return the object that `module:name` stands for, or raise a UserError that says why it cannot be had."""
    module_name, _, attribute = spec.partition(":")
    try:
        with _put_back():
            target: Any = import_user_module(spec)
    except UserError:
        raise
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            where = "neither in this folder nor among the installed packages"
            if module_name.endswith(".py"):
                where = f"which is a file: write '{module_name[:-3].replace('/', '.')}:{attribute}'"
            raise UserError(f"'{spec}': no module '{error.name}', {where}") from error
        raise UserError(f"'{spec}': importing {module_name} needs '{error.name}', which is not installed") from error
    except Exception as error:  # the user's module may fail in any way
        raise UserError(
            f"'{spec}': importing {module_name} failed: {type(error).__name__}: {one_line(error)}"
        ) from error
    for part in attribute.split("."):
        if not hasattr(target, part):
            hint = nearest(part, [name for name in dir(target) if not name.startswith("_")])
            raise UserError(f"'{spec}': {module_name} has no '{part}'; {hint}")
        target = getattr(target, part)
    return target


@contextmanager
def _put_back() -> Iterator[None]:
    """Put back what a user's code changes for the whole process, and its random states."""
    from robustvlm.core.boundary import same_process, same_random_state  # imports torch, which names do without

    with same_process(), same_random_state():
        yield


def create(spec: str, what: str = "the encoder") -> Any:
    """Return what the callable of a `module:callable` spec returns, or raise a UserError that says why it cannot.

    A network that stands there ready made is what is meant, and is not called.
    """
    target = resolve(spec)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(target, torch.nn.Module):
        return target
    return call(spec, target, what)


def call(spec: str, target: Any, what: str, *given: Any, **options: Any) -> Any:
    """Return what a user's object returns when called; `what` it is to return, in words.

    Raises:
        UserError: it cannot be called, fails, or ends the program; of its own UserErrors, those.
    """
    if not callable(target):
        raise UserError(f"'{spec}' is a {type(target).__name__}, not a callable that returns {what}")
    if missing := _missing(target, given, options):
        count = len(given) + len(options)
        told = f"with {count} argument{'s' * (count > 1)}" if count else "without arguments"
        raise UserError(
            f"'{spec}' is called {told} and is to return {what}, but it needs {', '.join(missing)} as well: give these "
            "defaults, or name a function that needs none (docs/extend.md)"
        )
    try:
        with no_exit(f"'{spec}'"), _put_back():
            return target(*given, **options)
    except UserError:
        raise
    except Exception as error:  # the user's code may fail in any way
        raise UserError(f"'{spec}' failed: {type(error).__name__}: {one_line(error)}") from error


def _missing(target: Any, given: Sequence[Any], options: Mapping[str, Any]) -> list[str]:
    """Return the parameters of a callable that have no default and are not given; none where nobody can tell."""
    try:
        parameters = list(inspect.signature(target).parameters.values())[len(given) :]
    except (TypeError, ValueError):
        return []
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [one.name for one in parameters if one.default is inspect.Parameter.empty and one.kind not in several]
    return [name for name in needed if name not in options]


def expect(spec: str, thing: Any, kind: type, what: str, has: Iterable[str] = ()) -> Any:
    """Return a user's object if it keeps the contract of its kind; a UserError says in one line which that is.

    Example:
        >>> expect("mine:Blur", 3, dict, "a mapping", ("keys",))
        Traceback (most recent call last):
        robustvlm.errors.UserError: 'mine:Blur': expected a mapping (robustvlm's dict, with keys), got an int
    """
    if isinstance(thing, kind):
        return thing
    members = f", with {', '.join(has)}" if has else ""
    article = "an" if type(thing).__name__[0].lower() in "aeiou" else "a"
    raise UserError(
        f"'{spec}': expected {what} (robustvlm's {kind.__name__}{members}), got {article} {type(thing).__name__}"
    )


class CallableModule(ModuleType, Generic[T]):
    """A module that hands a call on to a function elsewhere, which is imported when it is first called.

    A package and a command may share a name, and Python binds that name to the package as soon as anything in it is
    imported; so the package itself has to be what is called.
    """

    def __call__(self, *args: Any, **options: Any) -> T:
        """Call the verb; its own signature and errors count."""
        return self.__wrapped__(*args, **options)

    @property
    def __wrapped__(self) -> Callable[..., T]:
        """The verb: what `inspect.signature` and `inspect.unwrap` look at."""
        module, _, name = str(self.__dict__["__verb__"]).partition(":")
        found: Callable[..., T] = getattr(import_module(module), name)
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
