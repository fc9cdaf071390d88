"""The model card of an exported model: what it is, how it was made, what was measured on it, and what is not known."""

import copy
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robustvlm import __version__
from robustvlm.attacks.goals.base import ROBUST
from robustvlm.commands import open_run
from robustvlm.commands.attack.record import words_of
from robustvlm.commands.certify import record as certify_words
from robustvlm.core.files import read_text
from robustvlm.core.object_graph import fingerprint
from robustvlm.core.size import sides
from robustvlm.defenses import load_pipeline, split_spec
from robustvlm.errors import UserError
from robustvlm.models import VLM, export, saved, transformers_files, zoo
from robustvlm.models.transformers_vlm import TowerVLM, TransformersVLM
from robustvlm.models.weights import stored_weights
from robustvlm.report.words import ball, count_of, interval, percent, plain
from robustvlm.runs.manifest import kind_of_run, read_manifest, trained_on_attacks
from robustvlm.runs.run import FinishedRun
from robustvlm.runs.tools import versions_of
from robustvlm.stats import Rate

CARD = "README.md"
_MEASURING = ("attack", "certify")
_HUB = "hf-hub:"
_MOST_STEPS = 20


# What was measured, read from runs of this very model


@dataclass(frozen=True)
class Row:
    """One figure: what it is the share of, and that share with its interval."""

    what: str
    rate: Rate


@dataclass(frozen=True)
class Measurement:
    """What a run says of the model.

    Args:
        command: that gave the figures. model: what was measured, in words. data: spec of the images. notes: sentences.
    """

    command: str
    model: str
    data: str
    images: int
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = field(default=())


def measured(vlm: VLM, runs: Sequence[str | Path], *, half: bool) -> list[Measurement]:
    """Return what attack and certify runs of a model say of it.

    Args:
        half: the exported weights are rounded to 16 bits; runs of both forms are taken, and the card says of which.

    Raises:
        UserError: a run cannot be read, is of another kind, or its fingerprint is not this model's.
    """
    found = []
    for name in runs:
        run = open_run(name)
        if run.kind not in _MEASURING:
            raise UserError(f"'{name}' is a run of `robustvlm {run.kind}`, expected one of {' or '.join(_MEASURING)}")
        what = _whose(vlm, run, half=half)
        read = _attack if run.kind == "attack" else _certify
        rows, notes = read(run.summary)
        facts = run.manifest
        found.append(
            Measurement(facts["command"], what, facts["data"]["spec"], _images(run), tuple(rows), tuple(notes))
        )
    return found


def _images(run: FinishedRun[Any]) -> int:
    return int(run.summary.images.evaluated if run.kind == "attack" else run.summary.images)


def _whose(vlm: VLM, run: FinishedRun[Any], *, half: bool) -> str:
    """Say in words what a run measured; refuse one that measured another model."""
    model = run.manifest["model"]
    wanted, spec = model["fingerprint"], str(model["spec"])
    exported = _halved(vlm) if half else vlm.fingerprint
    rounded = "" if exported == vlm.fingerprint else ", before they were rounded to 16 bits"
    if wanted == exported:
        return "these weights"
    if wanted == vlm.fingerprint:
        return f"these weights{rounded}"
    operations = split_spec(spec)[1]
    if operations:
        behind = "".join(f"+{operation}" for operation in operations)
        try:
            if load_pipeline(f"{vlm.spec}{behind}").fingerprint == wanted:
                return f"these weights behind `{behind}`{rounded}"
        except UserError:  # an operator that makes no encoder
            pass
    raise UserError(
        f"the run '{run.folder}' measured another model ('{spec}', fingerprint {wanted}): '{vlm.spec}' has "
        f"{vlm.fingerprint}; run it on this one"
    )


def _halved(vlm: VLM) -> str:
    """Return the fingerprint that a model has after its weights were stored with 16 bits."""
    place = "tower" if isinstance(vlm, TowerVLM) else "model"
    state = stored_weights(_module(vlm).state_dict(), half=True)
    rounded = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    read = copy.copy(vlm)
    if "logit_scale" in rounded:
        read.logit_scale = float(rounded["logit_scale"].exp())
    return fingerprint(dict(vlm._state()) | {f"{place}.{name}": value for name, value in rounded.items()}, read.design)


def _module(vlm: VLM) -> Any:
    """Return the library's own module, open_clip's or transformers'."""
    return export.inner(vlm) if isinstance(vlm, TransformersVLM | TowerVLM) else vlm.model


def _attack(summary: Any) -> tuple[Iterator[Row], list[str]]:
    plainly = summary.goal == "misclassify"
    notes = [] if plainly else [f"Goal of the attacks: {code(summary.goal)}."]
    if summary.unfinished:
        notes.append(
            f"The run stopped early ({text(summary.unfinished)}): images it did not decide count as not robust."
        )

    def rows() -> Iterator[Row]:
        if summary.images.uncounted:  # of a stream that the run did not see the end of
            return
        yield Row("right on unperturbed images", summary.clean_accuracy)
        # Of a model that refuses or abstains, what is not answered is not fooled, and not right either.
        held = words_of(summary).held
        kept = ("right" if held == ROBUST else held) + " after the attacks" if plainly else "goal not reached"
        for one in summary.per_eps:
            yield Row(f"{kept}. {ball(summary.norm, one.eps_text)}", one.robust_accuracy)

    return rows(), [*notes, *_shared(summary)]


def _noise(summary: Any) -> str:
    against = "" if summary.threat is None else f" against {summary.threat}"
    return f"{'Gaussian ' if summary.against.gaussian else ''}noise of {summary.sigma:g}{against}"


def _certify(summary: Any) -> tuple[Iterator[Row], list[str]]:
    notes = [
        f"Of the model smoothed by {_noise(summary)}: {text(summary.statement)}.",
        *(text(say(summary), 600) for say in (certify_words.rule, certify_words.confidence, certify_words.source)),
    ]
    if summary.unfinished:
        notes.append(f"The run stopped early ({text(summary.unfinished)}).")
    if (summary.looks or 0) > 1:
        notes.append(f"These images were looked at {summary.looks} times, in runs of different settings.")

    short = summary.against.short

    def rows() -> Iterator[Row]:
        if summary.correct is not None:
            yield Row("right when smoothed, without attack", summary.correct)
        for one in summary.at:
            yield Row(f"certified at {short} radius {one.radius:g}", one.certified)
            if one.correct is not None:
                yield Row(f"certified at {short} radius {one.radius:g} and right", one.correct)

    return rows(), [*notes, *_shared(summary)]


def _shared(summary: Any) -> Iterator[str]:
    """Yield what every run says of itself: images it could not read, and checks that fired."""
    if summary.unreadable:
        yield f"{count_of(len(summary.unreadable), 'images')} could not be read and left out."
    for check in summary.checks:
        if check.level != "ok":
            yield f"Check {code(check.name)} ({text(check.level)}): {text(check.message, 600)}"


# How the model was made, as far as folders say it


@dataclass(frozen=True)
class Origin:
    """One step back: the run that made a model from another one, or nothing where no run did."""

    spec: str
    fingerprint: str = ""
    manifest: Mapping[str, Any] | None = None


def origins(vlm: VLM) -> list[Origin]:
    """Return a model and what it was made from, step by step, as far as their folders are there."""
    found, spec, mark = [], vlm.spec, vlm.fingerprint
    for _ in range(_MOST_STEPS):  # a folder that stands on itself
        folder = Path(os.path.expanduser(spec))
        manifest = (
            read_manifest(folder / "manifest.json")
            if spec not in zoo.BUNDLED and kind_of_run(folder) is not None
            else None
        )
        found.append(Origin(spec, mark, manifest))
        if manifest is None:
            break
        card = saved.read_card(folder)
        model = manifest.get("model") or {}
        base = model.get("spec")
        if card is not None and card.base is not None and not (isinstance(base, str) and _there(base)):
            base = os.path.normpath(card.base) if _there(card.base) else card.base  # it was moved
        if not isinstance(base, str) or not base or base == spec:
            break
        spec, mark = base, str((card.base_fingerprint if card is not None else None) or model.get("fingerprint") or "")
    return found


def _there(spec: str) -> bool:
    return os.path.isdir(os.path.expanduser(spec))


def licence_of(root: str) -> tuple[str | None, str]:
    """Return the licence of a base model, as the hub writes it if it is known, and a sentence about it.

    Example:
        >>> licence_of("tiny")[0], licence_of("ViT-B-32/openai")[0]
        ('apache-2.0', None)
    """
    if root in zoo.BUNDLED:
        return "apache-2.0", (
            f"The base, robustvlm's bundled `{root}`, is under Apache-2.0; the drawings that it was trained on keep "
            "the licences that robustvlm's NOTICE lists."
        )
    place = Path(os.path.expanduser(_place(root)))
    said = _said_licence(place / CARD) if os.path.isdir(place) else None
    if said:
        return said, f"The card of the base, {code(root)}, names the licence {code(said)}; look there for its terms."
    return None, (
        f"The licence of the base, {code(root)}, is unknown to robustvlm: ask whoever published it before you hand "
        "this on."
    )


def _place(root: str) -> str:
    """Return the folder or repository that a spec of transformers names, without the text side of another model."""
    return (
        transformers_files.split_sides(root.removeprefix(transformers_files.PREFIX))[0]
        if root.startswith(transformers_files.PREFIX)
        else root
    )


def _said_licence(path: Path) -> str | None:
    """Return the licence that the front matter of a model card names."""
    try:
        matter = re.match(r"---\n(.*?)\n---\n", read_text(path), re.DOTALL)
    except (OSError, UserError):
        return None
    found = re.search(r"^license:[ \t]*([\w.+-]+)[ \t]*$", matter[1], re.MULTILINE) if matter else None
    return found[1] if found and found[1] not in ("other", "unknown") else None


# Text that came from outside, as text


def text(value: object, limit: int = 300) -> str:
    """Return a text on one line in which no character means anything to Markdown or HTML.

    Example:
        >>> print(text("a [link](http://x) <b> | `c`"))
        a \\[link\\]\\(http://x\\) &lt;b&gt; \\| \\`c\\`
    """
    marked = re.sub(r"([\\`*_{}\[\]()#+!|~$])", r"\\\1", plain(value, limit).replace("&", "&amp;"))
    return marked.replace("<", "&lt;").replace(">", "&gt;")


def code(value: object, limit: int = 300) -> str:
    """Return a text on one line as a span of code, whatever backticks it holds.

    Example:
        >>> code("a`b"), code("runs/x")
        ('`` a`b ``', '`runs/x`')
    """
    shown = plain(value, limit)
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {shown} {fence}" if longest else f"{fence}{shown}{fence}"


def block(lines: str, language: str = "") -> str:
    """Return lines as a block of code that none of them can end."""
    longest = max((len(run) for run in re.findall("`+", lines)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{lines}\n{fence}"


# The card

_ATTACK = {"norm": "norm of the attack in training", "eps_text": "its radius", "inner_steps": "its steps"}
_MEASURED = {"norm": "norm of the attack that validated", "eps_text": "its radius", "val_steps": "its steps"}
_SETTINGS = {
    "method": "method",
    "data": "data",
    "val": "validation data",
    "limit": "images used, at most",
    "steps": "optimiser steps",
    "epochs": "epochs",
    "batch_size": "batch size",
    "lr": "learning rate",
    "trainable": "what was trained",
    "models": "models averaged",
    "by": "chosen by",
    "seed": "seed",
}


def model_card(vlm: VLM, *, to: str, half: bool, measurements: Sequence[Measurement]) -> str:
    """Return the README.md of an exported model, with the front matter that the Hugging Face hub reads."""
    chain = origins(vlm)
    licence, sentence = licence_of(chain[-1].spec)
    parts = [
        _front_matter(chain, to, licence, tower=isinstance(vlm, TowerVLM)),
        f"# {text(_title(vlm.spec))}",
        _what_it_is(vlm, to, half),
        "## Use",
        _use(vlm, to),
        "## How it was made",
        *_how(chain),
        "## Measured robustness",
        *_measured(measurements),
        "## Limits",
        _limits(measurements),
        "## Licence",
        sentence + " Weights made from it, and what was learnt from the training data, may be bound by both.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _title(spec: str) -> str:
    return Path(spec).name if os.path.isdir(os.path.expanduser(spec)) else spec


def _front_matter(chain: Sequence[Origin], to: str, licence: str | None, *, tower: bool) -> str:
    task = "image-feature-extraction" if tower else "zero-shot-image-classification"
    lines = [f"library_name: {to}", f"pipeline_tag: {task}"]
    lines += [f"license: {licence}"] if licence else ["license: other", "license_name: unknown"]
    root = chain[-1].spec
    place = _place(root.removeprefix(_HUB))
    if place != root and re.fullmatch(r"[\w.-]+/[\w.-]+", place) and not os.path.isdir(place):
        lines.append(f"base_model: {json.dumps(place)}")
    tags = ["robustvlm"] if tower else ["clip", "zero-shot-image-classification", "robustvlm"]
    trained = any(one.manifest and trained_on_attacks(one.manifest) for one in chain)
    tags += ["adversarial-robustness"] if trained or root in zoo.ADVERSARIALLY_TRAINED else []
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _what_it_is(vlm: VLM, to: str, half: bool) -> str:
    model = _module(vlm)
    weights = sum(value.numel() for value in model.parameters())
    bits = "16 bits" if half else "32 bits"
    # Of transformers the name of the whole is known to readers, of open_clip that of the tower.
    name = text(type(getattr(model, "visual", model)).__name__)
    size = "{} by {} pixels".format(*sides(vlm.image_size))
    if isinstance(vlm, TowerVLM):
        what = f"An image tower ({name}, {size}) without a text side"
    else:
        what = f"A CLIP model: an image tower ({name}, {size}) and a text tower with one space of features"
    return (
        f"{what}, {weights:,} weights of {bits}, written for {text(to)} by robustvlm {__version__}. The fingerprint of "
        f"the model that was exported is `{vlm.fingerprint}`."
    )


def _use(vlm: VLM, to: str) -> str:
    if isinstance(vlm, TransformersVLM | TowerVLM) and to == "transformers":
        name = type(_module(vlm)).__name__
        readers = ["AutoImageProcessor", *(["AutoTokenizer"] if isinstance(vlm, TransformersVLM) else [])]
        lines = f"from transformers import {', '.join([*readers, name])}\n\n"
        lines += f'model = {name}.from_pretrained("FOLDER")\nprocessor = AutoImageProcessor.from_pretrained("FOLDER")'
        lines += '\ntokenizer = AutoTokenizer.from_pretrained("FOLDER")' if len(readers) > 1 else ""
    elif to == "transformers":
        lines = (
            "from transformers import CLIPModel, CLIPProcessor\n\n"
            'model = CLIPModel.from_pretrained("FOLDER")\nprocessor = CLIPProcessor.from_pretrained("FOLDER")'
        )
    else:
        lines = (
            "import open_clip\n\n"
            'model, preprocess = open_clip.create_model_from_pretrained("local-dir:FOLDER")\n'
            'tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")'
        )
    spec = f"{transformers_files.PREFIX}FOLDER" if to == "transformers" else "FOLDER"
    if isinstance(vlm, TowerVLM):
        spec += f"@{vlm.text.spec}" if vlm.text is not None else "@MODEL"
    return f"{block(lines, 'python')}\n\nMeasure it on your own data: {code(f'robustvlm attack {spec} --data ...')}."


def _how(chain: Sequence[Origin]) -> Iterator[str]:
    if chain[0].manifest is None:
        yield f"No run of robustvlm changed the weights: they are those of {code(chain[0].spec)}."
        if chain[0].spec in zoo.ADVERSARIALLY_TRAINED:
            yield "These come with robustvlm and were trained to withstand attacks (its docs/bundled.md says how)."
        return
    for origin in chain:
        if origin.manifest is None:
            mark = f", fingerprint `{plain(origin.fingerprint)}`" if origin.fingerprint else ""
            yield f"It began with {code(origin.spec)}{mark}."
            return
        config = origin.manifest.get("config") or {}
        data = (origin.manifest.get("data") or {}).get("spec")
        known = {**config, **({"data": data} if data else {})}
        rows = [
            f"| {label} | {_cell(known[name])} |"
            for name, label in _labels(origin.manifest).items()
            if known.get(name) not in (None, "", [])
        ]
        versions = " and ".join(text(one) for one in versions_of(origin.manifest, "robustvlm"))
        yield f"Made by `robustvlm {plain(origin.manifest.get('kind'))}` {versions}:"
        yield block(plain(origin.manifest.get("command", ""), 2000))
        if rows:
            yield "\n".join(["| setting | value |", "|---|---|", *rows])


def _labels(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings that had a part in how the weights came about, and what a reader knows them by."""
    config, labels = manifest.get("config") or {}, dict(_SETTINGS)
    if trained_on_attacks(manifest):
        return labels | _ATTACK
    if manifest.get("kind") != "soup":
        return labels | _MEASURED
    if config.get("method") != "greedy":
        del labels["by"]
    if config.get("data") is None:  # a mean of weights alone, which no image was asked of
        del labels["limit"]
        return labels
    return labels | _MEASURED | {"data": "data it was measured on"}


def _cell(value: Any) -> str:
    return text(", ".join(map(str, value)) if isinstance(value, list) else value)


def _measured(measurements: Sequence[Measurement]) -> Iterator[str]:
    if not measurements:
        yield (
            "Nothing was measured on these weights, or it was not handed to the export. Figures of the base, and the "
            "validations that chose these weights while they were trained, say little of them and are left out."
        )
    for one in measurements:
        rows = [
            f"| {text(row.what)} | {percent(row.rate.value)} | {interval(row.rate)} | "
            f"{row.rate.successes:,} of {row.rate.total:,} |"
            for row in one.rows
            if row.rate.value is not None
        ]
        levels = sorted({f"{row.rate.confidence:.0%}" for row in one.rows})
        yield f"Of {one.model}, on {count_of(one.images, 'images')} of {code(one.data)}, by"
        yield block(plain(one.command, 2000))
        yield "\n".join([f"| share of images | | {' '.join(levels)} interval | count |", "|---|---|---|---|", *rows])
        if one.notes:
            yield " ".join(one.notes)


def _limits(measurements: Sequence[Measurement]) -> str:
    items = [
        "The model is zero-shot: what it answers hangs on the class names and prompts, which are part of every figure.",
        "Robust is meant of small changes of pixels in a ball. Nothing is said of other changes: crops, patches, text "
        "in the image, other cameras, classes that were not asked about.",
    ]
    if measurements:
        items += [
            "An attack that found nothing proves nothing: a stronger one may find more, so that shares right after "
            "attacks are bounds from above. Certificates are no such bounds, but hold for the smoothed model alone.",
            "Intervals are exact binomial ones (Clopper and Pearson) over images that are taken as independent; "
            "several images of one thing are not. They say nothing of other data.",
        ]
    return "\n".join(f"* {item}" for item in items)
