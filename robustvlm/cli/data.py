"""`robustvlm data`: what a data spec holds, and whether every image of it can be read."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from robustvlm.data import DataSource

_SHOWN = 5
_FAULTS_SHOWN = 20


def data(
    spec: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="emoji, imagefolder:DIR, parquet:FILE, torchvision:NAME:ROOT, hf:NAME or wds:URL, with ?option=value.",
        ),
    ] = "emoji",
    classes: Annotated[Path | None, typer.Option("--classes", help="Class names, one a line or a JSON list.")] = None,
    templates: Annotated[Path | None, typer.Option("--templates", help="Prompt templates, one a line.")] = None,
    tree: Annotated[Path | None, typer.Option("--tree", help="Class tree: nested JSON or YAML, or a CSV.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Select this many images, as runs do.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Decode every selected image and count the faults.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Describe a data set: images, classes, prompts, class tree, and with --check what cannot be read."""
    from robustvlm.data import open_data

    source = open_data(spec, classes=classes, templates=templates, tree=tree)
    facts = describe(source, limit)
    if check:
        facts["check"] = examine(source, limit, progress=not as_json)
    if as_json:
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        _show(facts)


def describe(source: DataSource, limit: int | None = None) -> dict[str, Any]:
    """Return what is known of a source without decoding an image; the number of images is None for streams."""
    from robustvlm.data import select

    ids = source.ids()
    chosen = ids
    if ids is not None and limit is not None:
        selected = frozenset(select(ids, limit))
        chosen = [name for name in ids if name in selected]
    return {
        "spec": source.spec,
        "fingerprint": source.fingerprint(),
        "images": None if ids is None else len(ids),
        "selected": None if chosen is None else len(chosen),
        "first_ids": None if chosen is None else chosen[:_SHOWN],
        "class_names": list(source.class_names),
        "templates": list(source.templates),
        "trees": [
            {
                "root": tree.root,
                "superclass_level": tree.superclass_level,
                "levels": [
                    {"nodes": len(tree.level_names(n)), "names": tree.level_names(n)} for n in range(tree.levels)
                ],
            }
            for tree in source.tree or ()
        ],
    }


def examine(source: DataSource, limit: int | None = None, *, progress: bool = False) -> dict[str, Any]:
    """Decode the selected images and return how many can be read, of which sizes and classes, and every fault."""
    from rich.console import Console
    from rich.progress import track

    from robustvlm.data import Unreadable

    faults: list[dict[str, str]] = []
    labels: Counter[int] = Counter()
    widths: list[int] = []
    items = source.samples(limit=limit)
    for item in track(items, "Decoding", console=Console(stderr=True), transient=True) if progress else items:
        if isinstance(item, Unreadable):
            faults.append({"id": item.id, "reason": item.reason})
        else:
            labels[item.label] += 1
            widths = [min([*widths[:1], *item.image.size]), max([*widths[1:], *item.image.size])]
    return {
        "readable": sum(labels.values()),
        "unreadable": len(faults),
        "faults": faults,
        "pixels_shortest": widths[0] if widths else None,
        "pixels_longest": widths[1] if widths else None,
        "images_per_class": {name: labels[i] for i, name in enumerate(source.class_names)},
        "unknown_class": labels[-1],
    }


def _show(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    # Names and ids are the user's text: as Text objects their brackets are no markup.
    for label, value in _rows(facts):
        table.add_row(label, Text(value))
    Console().print(table)


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    images = "counted while streaming (--check)" if facts["images"] is None else f"{facts['images']:,}"
    if facts["selected"] != facts["images"]:
        images += f", {facts['selected']:,} selected"
    rows = [("Data", facts["spec"]), ("Images", images)]
    if facts["first_ids"]:
        rows.append(("First ids", ", ".join(facts["first_ids"])))
    rows += [
        ("Classes", f"{len(facts['class_names'])}: {_some(facts['class_names'])}"),
        ("Templates", f"{len(facts['templates'])}: {_some(facts['templates'], 3)}"),
    ]
    for tree in facts["trees"]:
        rows.append(("Tree", f"{tree['root']}, {len(tree['levels'])} levels"))
        for n, level in reversed(list(enumerate(tree["levels"]))):
            mark = " (superclasses in reports)" if n == tree["superclass_level"] else ""
            rows.append((f"  level {n}", f"{level['nodes']}: {_some(level['names'])}{mark}"))
    if not facts["trees"]:
        rows.append(("Tree", "none: pass --tree FILE for results by superclass"))
    rows.append(("Fingerprint", facts["fingerprint"]))
    return rows + (_check_rows(facts["check"]) if "check" in facts else [])


def _check_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    counts = list(found["images_per_class"].values())
    readable = f"{found['readable']:,}"
    if found["readable"]:
        readable += f", sides {found['pixels_shortest']} to {found['pixels_longest']} pixels"
        readable += f", {min(counts)} to {max(counts)} images a class"
    rows = [("Readable", readable), ("Unreadable", f"{found['unreadable']:,}")]
    if found["unknown_class"]:
        rows.insert(1, ("Unknown class", f"{found['unknown_class']:,}"))
    rows += [("", f"{fault['id']}: {fault['reason']}") for fault in found["faults"][:_FAULTS_SHOWN]]
    if found["unreadable"] > _FAULTS_SHOWN:
        rows.append(("", f"... and {found['unreadable'] - _FAULTS_SHOWN:,} more (--json lists all)"))
    return rows


def _some(names: list[str], count: int = 6) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
