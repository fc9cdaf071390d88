"""A method's own options, given as NAME=VALUE."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import yaml

from robustvlm.defenses.finetune import HierarchicalOptions, find_method
from robustvlm.errors import UserError, nearest


def parse_options(method: str, texts: Sequence[str]) -> dict[str, Any]:
    """Return the options of a method by name; the values are those of `HierarchicalOptions` or of the method's class.

    Raises UserError for an unknown method or option, or a value of another kind than the default's.

    Example:
        >>> parse_options("hierarchical", ["curvature=0.5", "negatives=false"])
        {'curvature': 0.5, 'negatives': False}
    """
    known = _switches(method)
    found: dict[str, Any] = {}
    for text in texts:
        name, mark, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not mark:
            raise UserError(f"an option is written NAME=VALUE, got '{text}'")
        if name not in known:
            hint = nearest(name, known) if known else "it has none"
            raise UserError(f"the method '{method}' has no option '{name}': {hint}")
        found[name] = _value(name, value, known[name])
    return found


def _switches(method: str) -> dict[str, bool]:
    """Return the options of a method, and of each whether it is on or off rather than a number."""
    kind = find_method(method)
    if method == "hierarchical":
        return {field.name: "bool" in str(field.type) for field in dataclasses.fields(HierarchicalOptions)}
    parameters = list(inspect.signature(kind).parameters.values())[1:]
    return {p.name: isinstance(p.default, bool) for p in parameters}


def _value(name: str, text: str, switch: bool) -> bool | float:
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # thousands of digits, or of brackets
        value = text
    if switch:
        if not isinstance(value, bool):
            raise UserError(f"the option '{name}' is on or off, got '{text}': write {name}=true or {name}=false")
        return value
    try:
        return float(text)
    except ValueError:
        raise UserError(f"the option '{name}' is a number, got '{text}'") from None
