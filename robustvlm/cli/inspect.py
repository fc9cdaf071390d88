"""`robustvlm data`, `models` and `export`: what there is, and handing a model on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robustvlm.cli.terminal import say, say_json
from robustvlm.core.files import named_disk_errors, replacing
from robustvlm.errors import UserError, nearest
from robustvlm.runs.settings import Observer
from robustvlm.text import visible

if TYPE_CHECKING:
    from robustvlm.data import DataSource
    from robustvlm.llm import LlmClient


# `robustvlm data`: what a data spec holds, and whether every image of it can be read

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
    classes: Annotated[
        Path | None,
        typer.Option("--classes", help="Class names, one a line or a JSON list.", rich_help_panel="Model and data"),
    ] = None,
    templates: Annotated[
        Path | None, typer.Option("--templates", help="Prompt templates, one a line.", rich_help_panel="Model and data")
    ] = None,
    tree: Annotated[
        Path | None,
        typer.Option("--tree", help="Class tree: nested JSON or YAML, or a CSV.", rich_help_panel="Model and data"),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, help="Select this many images, as runs do.", rich_help_panel="Model and data"),
    ] = None,
    make_tree: Annotated[
        str | None,
        typer.Option(
            "--make-tree",
            metavar="wordnet|llm",
            help="Make a class tree, and write it to --out.",
            rich_help_panel="Class tree",
        ),
    ] = None,
    tree_by: Annotated[
        list[str] | None,
        typer.Option(
            "--tree-by",
            help="Criterion of a tree by a language model; repeat it for a forest.",
            rich_help_panel="Class tree",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="File for the tree that is made, as trees.json.", rich_help_panel="Class tree"),
    ] = None,
    llm: Annotated[
        str | None,
        typer.Option(
            "--llm",
            metavar="URL",
            help="OpenAI-compatible endpoint, as http://localhost:11434/v1; the key is read from ROBUSTVLM_LLM_KEY or "
            "OPENAI_API_KEY.",
            rich_help_panel="Class tree",
        ),
    ] = None,
    llm_model: Annotated[
        str | None,
        typer.Option(
            "--llm-model", metavar="NAME", help="Model to ask at that endpoint.", rich_help_panel="Class tree"
        ),
    ] = None,
    llm_prices: Annotated[
        str | None,
        typer.Option(
            "--llm-prices",
            metavar="IN,OUT",
            help="Price of a million tokens, to show what was spent.",
            rich_help_panel="Class tree",
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Decode every selected image and count the faults.", rich_help_panel="Output"),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel="Output")] = False,
) -> None:
    """Describe a data set: images, classes, prompts, class tree, and with --check what cannot be read."""
    from robustvlm.data import open_data

    given = {"--tree-by": tree_by, "--out": out, "--llm": llm, "--llm-model": llm_model, "--llm-prices": llm_prices}
    if make_tree is None:
        _require_none(given, "is for --make-tree: say --make-tree wordnet or --make-tree llm")
    source = open_data(spec, classes=classes, templates=templates, tree=tree)
    if make_tree is not None:
        from robustvlm.llm.client import open_client

        _make_tree(source, make_tree, tree_by, out, open_client(llm, llm_model, llm_prices), llm_prices)
    facts = describe(source, limit)
    if check:
        facts["check"] = examine(source, limit, progress=True)
    if as_json:
        say_json(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        _table("", _rows(facts))


def _require_none(given: Mapping[str, object], why: str) -> None:
    """Refuse options that would have no effect."""

    useless = [option for option, value in given.items() if value not in (None, [])]
    if useless:
        raise UserError(f"{useless[0]} {why}")


def _make_tree(
    source: DataSource,
    how: str,
    criteria: list[str] | None,
    out: Path | None,
    client: LlmClient | None,
    prices: str | None,
) -> None:
    """Write a made tree to a file that the user can read and edit, and take it for the data from here on."""
    from robustvlm.cli.console import Bars, Console
    from robustvlm.data.make_trees import make_forest
    from robustvlm.data.trees import save_forest
    from robustvlm.llm.client import spent

    if out is None or out.suffix.lower() != ".json":
        raise UserError("--make-tree writes a JSON file: say which with --out trees.json")
    with Bars(Console(stderr=True), doing="Making trees"):
        named = {"criteria": criteria} if criteria else {}
        source.tree = make_forest(how, source.class_names, client=client, **named)
    with named_disk_errors(out.parent), replacing(out) as temporary:
        save_forest(source.tree, temporary)
    say(f"wrote {out}" + (f"; {spent(client, prices)}" if client is not None else ""), err=True)


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
        "remarks": list(source.remarks),
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
    from robustvlm.cli.console import Bars, Console
    from robustvlm.data import Unreadable

    faults: list[dict[str, str]] = []
    labels: Counter[int] = Counter()
    widths: list[int] = []
    ids = source.ids()
    total = None if ids is None else len(ids) if limit is None else min(limit, len(ids))
    with Bars(Console(stderr=True)) if progress else nullcontext(Observer()) as told:
        told.begin("Decoding", total)
        for item in source.samples(limit=limit):
            if isinstance(item, Unreadable):
                faults.append({"id": item.id, "reason": item.reason})
            else:
                labels[item.label] += 1
                widths = [min([*widths[:1], *item.image.size]), max([*widths[1:], *item.image.size])]
            told.advance()
    return {
        "readable": sum(labels.values()),
        "unreadable": len(faults),
        "faults": faults,
        "pixels_shortest": widths[0] if widths else None,
        "pixels_longest": widths[1] if widths else None,
        "images_per_class": {name: labels[i] for i, name in enumerate(source.class_names)},
        "unknown_class": labels[-1],
    }


def _table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    from robustvlm.cli.console import Console
    from robustvlm.report.screen import show
    from robustvlm.report.sections import Facts

    # What others have written is shown as it is, with escapes in the place of what would move a cursor.
    shown = [(label, visible(value)) for label, value in rows]
    show(Console(), [Facts(shown, kind="sentences", title=title, only="both")])


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
    rows += [("Note", remark) for remark in facts["remarks"]]
    rows.append(("Fingerprint", facts["fingerprint"]))
    return rows + (_check_rows(facts["check"]) if "check" in facts else [])


def _check_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    counts = list(found["images_per_class"].values())
    readable = f"{found['readable']:,}"
    if found["readable"]:
        readable += f", sides {_reach(found['pixels_shortest'], found['pixels_longest'])} pixels"
        readable += f", {_reach(min(counts), max(counts))} images a class"
    rows = [("Readable", readable), ("Unreadable", f"{found['unreadable']:,}")]
    if found["unknown_class"]:
        rows.insert(1, ("Unknown class", f"{found['unknown_class']:,}"))
    bare = [name for name, count in found["images_per_class"].items() if not count]
    if bare:
        rows.append(("No image of", f"{len(bare)} classes: {_some(bare)}"))
    rows += [("", f"{fault['id']}: {fault['reason']}") for fault in found["faults"][:_FAULTS_SHOWN]]
    if found["unreadable"] > _FAULTS_SHOWN:
        rows.append(("", f"... and {found['unreadable'] - _FAULTS_SHOWN:,} more (--json lists all)"))
    return rows


def _reach(least: int, most: int) -> str:
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def _some(names: list[str], count: int = 6) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


# `robustvlm models`: what a MODEL can be


def models(
    text: Annotated[
        str,
        typer.Option("--filter", help="Only specs that contain this text (case ignored).", rich_help_panel="Output"),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.", rich_help_panel="Output")] = False,
) -> None:
    """List the forms a model spec can take, and every model that has a name."""
    # open_clip takes seconds to load; --help and other commands should not wait for it.
    from robustvlm.defenses.pipeline import operators
    from robustvlm.models import list_models
    from robustvlm.models.zoo import SPEC_FORMS

    all_forms = [*SPEC_FORMS, *((f"MODEL+{known.form}", known.meaning) for known in operators().values())]
    known = list_models()
    found = [model for model in known if text.lower() in model.spec.lower()]
    if not found:
        raise UserError(f"no model's name contains '{text}'; {nearest(text, [model.spec for model in known])}")
    if as_json:
        forms = [{"form": form, "meaning": meaning} for form, meaning in all_forms]
        say_json(json.dumps({"forms": forms, "models": [asdict(model) for model in found]}, indent=2))
        return
    if not text:
        _table("MODEL is one of", all_forms)
    for model in found:
        say(f"{model.spec}  ({model.source})" if model.source == "bundled" else model.spec)


# `robustvlm export`: a model as a folder that open_clip or transformers reads


def export(
    model: Annotated[
        str,
        typer.Argument(metavar="RUN", help="A run folder, or any other spec of a model of open_clip or transformers."),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; new or empty.")],
    to: Annotated[
        str, typer.Option("--to", help="Who is to read it: open_clip or transformers.", rich_help_panel="Output")
    ] = "open_clip",
    evaluated: Annotated[
        list[str] | None,
        typer.Option(
            "--evaluated",
            help="An attack or certify run of this model, for the model card; repeatable.",
            rich_help_panel="Output",
        ),
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Store weights with 16 bits.", rich_help_panel="Output")] = False,
) -> None:
    """Write a model as a folder for others: config, weights (safetensors), tokenizer, and a model card (README.md).

    open_clip loads it with create_model("local-dir:OUT"), and robustvlm with OUT as the model. With --to transformers,
    from_pretrained("OUT") of its class there (CLIPModel, ...) loads it, and robustvlm with transformers:OUT.
    """
    # Loading torch and open_clip takes seconds; --help should not wait for them.
    from robustvlm.cli.console import Bars, Console
    from robustvlm.commands.export import write_export

    with Bars(Console(stderr=True), doing="Exporting"):
        write_export(model, out, to=to, evaluated=evaluated or (), half=half)
    say(f"Model: {out}")
    if to == "transformers":
        say(f"transformers: from_pretrained('{out}'), as its card shows; robustvlm: transformers:{out}")
    else:
        say(f"open_clip: create_model('local-dir:{out}'), get_tokenizer('local-dir:{out}')")
    say(f"Card: {out / 'README.md'}")
