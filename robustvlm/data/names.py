"""Class names: how two spellings are compared, how they are read from files and checked."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from robustvlm.errors import UserError


def name_key(name: str) -> str:
    """Return what two spellings of one class name share: case, "_" and "-" do not count.

    Example:
        >>> name_key("Aquarium_Fish") == name_key("aquarium fish")
        True
    """
    return re.sub(r"[\s_\-]+", " ", name).strip().casefold()


def readable(names: Sequence[str]) -> tuple[str, ...]:
    """Return folder-like names as words for a prompt ("pickup_truck" as "pickup truck"), if they stay distinct.

    Example:
        >>> readable(["pickup_truck", "cat"])
        ('pickup truck', 'cat')
    """
    spaced = tuple(re.sub(r"[\s_]+", " ", name).strip() for name in names)
    return spaced if len(set(spaced)) == len(spaced) and all(spaced) else tuple(names)


def read_text(path: Path, what: str) -> str:
    """Return the text of a small user file; `what` names its purpose in the error."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"no {what} file at {path}") from None
    except UnicodeDecodeError:
        raise UserError(f"the {what} file {path} is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"cannot read the {what} file {path}: {error.strerror or error}") from None


def read_lines(path: Path, what: str) -> list[str] | dict[str, str]:
    """Return the lines of a text file (blank ones and # comments skipped), or a JSON list or object of strings."""
    text = read_text(path, what)
    if path.suffix.lower() != ".json":
        lines = (line.strip() for line in text.splitlines())
        return [line for line in lines if line and not line.startswith("#")]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the {what} file {path} is not valid JSON: {error}") from None
    items = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise UserError(f"the {what} file {path} must hold a JSON list of strings")
    return value


def read_class_names(path: Path) -> tuple[str, ...] | dict[str, str]:
    """Return class names in label order from a text file (one a line) or JSON list; a JSON object renames classes.

    Raises:
        UserError: no file, not text, no name, a name twice.
    """
    found = read_lines(path, "class names")
    check_names(list(found.values()) if isinstance(found, dict) else found, f"the class names file {path}")
    return found if isinstance(found, dict) else tuple(found)


def check_names(names: Sequence[str], where: str) -> None:
    """Refuse an empty list, an empty name and a name given twice."""
    if not names:
        raise UserError(f"{where} holds no class name")
    if not all(name.strip() for name in names):
        raise UserError(f"{where} holds an empty class name")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{where} names '{twice[0]}' {names.count(twice[0])} times: class names must differ")


def settle_names(found: Sequence[str] | None, given: Sequence[str] | Mapping[str, str] | None, where: str) -> list[str]:
    """Return the class names in label order, from what the source holds and what the user gave.

    A given list replaces the source's names by position, unless it only reorders them, which labels cannot follow:
    then the source's order stays. A given mapping renames single classes.

    Raises:
        UserError: no names at all, another count, or a list that moves a name of the source to another label.

    Example:
        >>> settle_names(["n01", "n02"], ["tench", "goldfish"], "x")
        ['tench', 'goldfish']
        >>> settle_names(["cat", "dog"], ["dog", "cat"], "x")
        ['cat', 'dog']
    """
    if given is None:
        if found is None:
            raise UserError(f"{where} holds no class names: pass --classes FILE with one name a line, in label order")
        return list(found)
    if isinstance(given, Mapping):
        return _renamed(found, given, where)
    if found is None:
        return list(given)
    if len(found) != len(given):
        raise UserError(f"{where} has {len(found)} classes, the class names file {len(given)}: they must be as many")
    at = {name_key(name): i for i, name in enumerate(found)}
    if {name_key(name) for name in given} == set(at):
        by_key = {name_key(name): name for name in given}
        return [by_key[name_key(name)] for name in found]
    for i, name in enumerate(given):
        if at.get(name_key(name), i) != i:
            raise UserError(
                f"class name {i + 1} of the file is '{name}', but {where} has '{found[i]}' there and "
                f"'{name}' at {at[name_key(name)] + 1}: give the names in the order of the source"
            )
    return list(given)


def _renamed(found: Sequence[str] | None, given: Mapping[str, str], where: str) -> list[str]:
    if found is None:
        raise UserError(f"{where} holds no class names to rename: pass a list of names, not a JSON object")
    unknown = [name for name in given if name not in found]
    if unknown:
        raise UserError(f"{where} has no class '{unknown[0]}', which the class names file renames")
    names = [given.get(name, name) for name in found]
    check_names(names, f"{where} after renaming")
    return names
