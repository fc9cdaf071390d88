"""Trees and forests in files: nested JSON or YAML, or a CSV of parent, child (and tree)."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from robustvlm.core.foreign_text import one_line
from robustvlm.core.reading import parse_json
from robustvlm.data.names import clean_name, read_text
from robustvlm.data.taxonomy import Forest, Tree
from robustvlm.data.tree_build import build_tree
from robustvlm.errors import UserError
from robustvlm.runs.files import write_text

Links = list[tuple[str, str]]


def load_tree(path: Path | str, class_names: Sequence[str], *, subset: bool = False) -> Tree:
    """Return the one tree in a file; see `load_forest` for the formats and errors."""
    forest = load_forest(path, class_names, subset=subset)
    if len(forest) > 1:
        raise UserError(f"{path} holds {len(forest)} trees where one is expected")
    return forest[0]


def load_forest(path: Path | str, class_names: Sequence[str], *, subset: bool = False) -> Forest:
    """Return the trees in a file, checked against the classes.

    JSON or YAML: `{"name": "root", "children": [{"name": "pets", "children": [{"name": "cat"}, ...]}]}`, where a
    plain string is a leaf, or a list of such trees. CSV: lines `parent,child`, with a third column `tree` for a
    forest; a header line may give the columns another order.

    Raises:
        UserError: what `build_tree` refuses, a file that cannot be read, a node without a name or with one twice.
    """
    path = Path(path)
    text = read_text(path, "tree")
    if path.suffix.lower() in {".csv", ".tsv"}:
        trees = _from_csv(text, path)
    elif path.suffix.lower() in {".json", ".yaml", ".yml"}:
        trees = _from_nested(_parse(text, path), path)
    else:
        raise UserError(f"{path}: a tree file ends in .json, .yaml, .yml, .csv or .tsv")
    if not trees:
        raise UserError(f"{path}: the file holds no tree")
    return Forest(tuple(build_tree(links, class_names, where=str(path), subset=subset) for links in trees))


def save_forest(forest: Forest, path: Path | str) -> None:
    """Write a forest as nested JSON; a forest of one tree is written as that tree."""
    nested = [tree.to_nested() for tree in forest]
    text = json.dumps(nested[0] if len(nested) == 1 else nested, indent=1, ensure_ascii=False)
    write_text(Path(path), text + "\n")


def _parse(text: str, path: Path) -> Any:
    try:
        return parse_json(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not valid {path.suffix[1:].upper()}: {one_line(error)}") from None


def _from_nested(value: Any, path: Path) -> list[Links]:
    return [list(_walk(tree, path)) for tree in (value if isinstance(value, list) else [value])]


def _walk(tree: Any, path: Path) -> Iterator[tuple[str, str]]:
    """Yield the (parent, child) links of a nested tree; a name met twice ends it, so YAML aliases do no harm."""
    parent_of: dict[str, str | None] = {}
    stack: list[tuple[str | None, Any]] = [(None, tree)]
    while stack:
        parent, node = stack.pop()
        name, children = _node(node, path)
        if name in parent_of:
            first, second = parent_of[name] or "the root", parent or "the root"
            raise UserError(f"{path}: the name '{name}' is there twice, under '{first}' and under '{second}'")
        parent_of[name] = parent
        if parent is not None:
            yield parent, name
        stack.extend((name, child) for child in reversed(children))


def _node(node: Any, path: Path) -> tuple[str, list[Any]]:
    if isinstance(node, str):
        node = {"name": node}
    if not isinstance(node, dict) or not isinstance(node.get("name"), str) or not node["name"].strip():
        raise UserError(f"{path}: a node must be {{'name': TEXT, 'children': [...]}}, got {_short(node)}")
    children = node.get("children") or []
    if not isinstance(children, list):
        raise UserError(f"{path}: the children of '{node['name']}' must be a list, got {_short(children)}")
    return clean_name(node["name"], str(path)), children


def _short(value: object) -> str:
    shown = "nothing" if value is None else type(value).__name__ if isinstance(value, (dict, list)) else repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _from_csv(text: str, path: Path) -> list[Links]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        rows = [
            [clean_name(cell, str(path)) for cell in row] for row in csv.reader(io.StringIO(text), delimiter=delimiter)
        ]
    except csv.Error as error:
        raise UserError(f"{path}: not valid CSV: {error}") from None
    rows = [row for row in rows if any(row)]
    columns = ["parent", "child", "tree"]
    if rows and {"parent", "child"} <= {cell.lower() for cell in rows[0]}:
        columns = [cell.lower() for cell in rows.pop(0)]
    trees: dict[str, Links] = {}
    for number, row in enumerate(rows, start=1):
        cells = dict(zip(columns, row, strict=False))
        if len(row) > len(columns) or not cells.get("parent") or not cells.get("child"):
            raise UserError(f"{path}: row {number} must be parent,child (and tree), got {','.join(row)!r}")
        trees.setdefault(cells.get("tree", ""), []).append((cells["parent"], cells["child"]))
    return list(trees.values())
