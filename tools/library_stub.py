"""Write `robustvlm/__init__.pyi`: the library's face as editors and type checkers read it.

    python tools/library_stub.py

Names that are loaded when first asked for have no types of their own, and the functions that mirror commands take
`**options`. Both are written out here, from the same settings as `--help`; a test fails when the file is out of date.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from textwrap import indent, wrap
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import robustvlm
from robustvlm.core.registry import CallableModule

FACE = Path(__file__).parents[1] / "robustvlm" / "__init__.pyi"
_WIDTH = 112  # of a docstring's lines, which are indented below
_HEAD = '''\
"""Made by tools/library_stub.py: the names of the library with their types."""

from pathlib import Path
'''


def stub() -> str:
    """Return the text of the stub."""
    imports, functions = {"from robustvlm.runs.settings import Observer"}, []
    for name, home in sorted(robustvlm._HOME.items()):
        found = getattr(robustvlm, name)
        if isinstance(found, CallableModule):  # a package and a verb
            verb = inspect.unwrap(found)  # type: ignore[arg-type]
            result, needed = _result(verb)
            imports |= {*needed, "from robustvlm.core.registry import CallableModule"}
            head, kind = f"class _{name.capitalize()}(CallableModule[{result}]):", f"{name}: _{name.capitalize()}\n"
            written = _function("__call__", verb, result).replace("(\n", "(\n    self,\n", 1)
            functions.append(f"{head}\n{indent(written, '    ')}\n{kind}")
        elif home == f"robustvlm.{name}":
            imports.add(f"from robustvlm import {name} as {name}")
        elif hasattr(found, "__signature__"):
            result, needed = _result(found)
            imports |= needed
            functions.append(_function(name, found, result))
        else:
            imports.add(f"from {home} import {name} as {name}")
    return "\n".join([_HEAD, *sorted(imports), "", "__version__: str", "", *functions])


def _function(name: str, function: Callable[..., Any], result: str) -> str:
    parameters, keyword = [], False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not keyword:
            parameters, keyword = [*parameters, "*"], True
        kind = "Observer | None" if parameter.name == "observer" else _type(parameter.annotation)
        default = "" if parameter.default is inspect.Parameter.empty else f" = {_default(parameter.default)}"
        parameters.append(f"{parameter.name}: {kind}{default}")
    said = (inspect.getdoc(function) or "").replace("\\", "\\\\")
    lines = [part for line in f'"""{said}\n"""'.splitlines() for part in _wrapped(line)]
    body = "\n".join(f"    {line}".rstrip() for line in lines)
    return f"def {name}(\n    " + ",\n    ".join(parameters) + f",\n) -> {result}:\n{body}\n"


def _wrapped(line: str) -> list[str]:
    return wrap(line, _WIDTH, subsequent_indent=" " * (4 + len(line) - len(line.lstrip()))) if line else [""]


def _type(kind: Any) -> str:
    if get_origin(kind) in (Union, UnionType):
        return " | ".join(_type(part) for part in get_args(kind))
    if kind is NoneType:
        return "None"
    if get_origin(kind) is list:
        (inner,) = get_args(kind)
        # A single value is taken for an option that may be repeated.
        return f"list[{_type(inner)}] | {_type(inner)}"
    if kind is Path:
        return "Path | str"
    return str(getattr(kind, "__name__", "Any"))


def _default(value: Any) -> str:
    return f'Path("{value}")' if isinstance(value, Path) else repr(value).replace("'", '"')


def _result(function: Callable[..., Any]) -> tuple[str, set[str]]:
    """Return what a function returns, as text, and the imports that it needs."""
    text = str(function.__annotations__["return"])
    tree = ast.parse(inspect.getsource(import_module(function.__module__)))
    wanted = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    homes = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name in wanted
    }
    local = {node.name for node in tree.body if isinstance(node, ast.ClassDef) and node.name in wanted}
    homes |= dict.fromkeys(local, function.__module__)
    return text, {f"from {home} import {name}" for name, home in homes.items() if home != "typing"} | {
        f"from typing import {name}" for name, home in homes.items() if home == "typing"
    }


if __name__ == "__main__":
    FACE.write_text(stub(), encoding="utf-8")
