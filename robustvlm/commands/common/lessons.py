"""Which data taught a model, or chose its weights: what its run says, and those of the models that it stands on."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robustvlm.core.files import read_json
from robustvlm.data import DataSource, select
from robustvlm.data.specs import open_raw, parse_spec
from robustvlm.data.splits import on_the_net, same_data, same_place, seen_images
from robustvlm.errors import UserError
from robustvlm.models.saved import read_card, split_folder

_TAUGHT = ("finetune", "purify", "tune-prompts")
_FILES = ("imagefolder", "parquet")
"""Kinds of data whose spec is a path that is there or not."""


@dataclass(frozen=True)
class Lesson:
    """Data that a run was made with.

    Args:
        run: its folder. about: spec, fingerprint and number of the images, as its manifest has them.
        limit: how many of them were used, None for all.
        chose: whether they chose among weights, rather than being trained on.
    """

    run: Path
    about: Mapping[str, Any]
    limit: int | None = None
    chose: bool = False


@dataclass(frozen=True)
class Overlap:
    """Which of the images to judge by are known to a model.

    Args:
        taught: the first lesson that has some of them, and their ids; none where it is the same data as a whole.
        remarks: what chose weights before, and what could not be compared.
    """

    taught: tuple[Lesson, list[str]] | None = None
    remarks: list[str] = field(default_factory=list)


def overlap(specs: Sequence[str], judged: DataSource, limit: int | None) -> Overlap:
    """Compare images to judge models by with all that taught the models or those that they stand on.

    Args:
        specs: the models; limit: how many of the images, those of `--val`, are used.
    """
    own, remarks = judged.ids(), list[str]()
    about: dict[str, str | None] = {"spec": judged.spec, "fingerprint": judged.fingerprint()}
    about |= {"content": judged.content()} if on_the_net(judged.spec) else {}
    ids = own if own is None or limit is None else select(own, limit)
    for lesson in _lessons(specs):
        same = same_data(lesson.about, about)
        both, gone = ([], None) if same else _both(lesson, judged, ids)
        if (same or both) and not lesson.chose:
            return Overlap((lesson, both))
        if same or both:
            count = "the images" if same else f"{len(both)} images"
            remarks.append(
                f"{count} of --val chose the weights of '{lesson.run}': figures on them are a little too high"
            )
        if gone is not None and not lesson.chose:
            remarks.append(f"whether --val holds images that taught '{lesson.run}' cannot be told: {gone}")
    return Overlap(None, list(dict.fromkeys(remarks)))


def remarks_on(model: str, val: DataSource | None, limit: int | None = None) -> list[str]:
    """Return what a reader of measures has to know, where `--val` holds what taught the model that is gone on from."""
    if val is None:
        return []
    found = overlap([model], val, limit)
    if found.taught is None:
        return found.remarks
    lesson, both = found.taught
    count = f"{len(both)} images" if both else "the images"
    return [f"{count} of --val taught '{lesson.run}' before: figures on them are too high"]


def _lessons(specs: Sequence[str]) -> Iterator[Lesson]:
    """Yield the lessons of the models that are runs, and of all that they stand on or are made of."""
    left, known = list(specs), set[Path]()
    while left:
        place, _ = split_folder(left.pop(0))
        if place is None or place.resolve() in known:
            continue
        known.add(place.resolve())
        yield from _of_run(place)
        card = read_card(place)
        if card is not None:
            left += [] if card.base is None else [card.base]
            made_of = card.settings.get("models") if card.kind == "soup" else None
            left += [_beside(place, str(one)) for one in made_of] if isinstance(made_of, list) else []


def _of_run(folder: Path) -> Iterator[Lesson]:
    manifest = None
    with contextlib.suppress(OSError, UserError):
        manifest = read_json(folder / "manifest.json")
    if not isinstance(manifest, dict):
        return
    kind, config, data = manifest.get("kind"), manifest.get("config"), manifest.get("data")
    if not isinstance(config, dict) or not isinstance(data, dict):
        return
    if kind in _TAUGHT:
        yield Lesson(folder, data, _count(config.get("limit")))
    if kind == "finetune" and isinstance(data.get("val"), dict):
        yield Lesson(folder, data["val"], _count(config.get("val_limit")), chose=True)
    if kind == "soup" and config.get("method") == "greedy":
        yield Lesson(folder, data, _count(config.get("limit")), chose=True)


def _both(lesson: Lesson, judged: DataSource, ids: list[str] | None) -> tuple[list[str], str | None]:
    """Return the judged ids that a lesson has, too, and why that cannot be told, if it cannot."""
    spec = str(lesson.about.get("spec"))
    try:
        if not same_place(judged.spec, spec):
            parsed = parse_spec(spec)
            if on_the_net(spec) and lesson.about.get("fingerprint") == judged.fingerprint():
                return [], f"'{spec}' has shards of the same names at another address"
            there = parsed.kind not in _FILES or Path(parsed.rest).expanduser().exists()
            return [], None if there else f"'{spec}' is not there any more"
        source = open_raw(parse_spec(spec))
        found = source.ids()
    except UserError as error:
        return [], f"'{spec}' cannot be opened any more ({error})"
    if ids is None or found is None:
        return [], None
    gone = None if len(found) == lesson.about.get("images") else f"'{spec}' holds other images now"
    return seen_images(judged, ids, source, found if lesson.limit is None else select(found, lesson.limit)), gone


def _beside(folder: Path, spec: str) -> str:
    """Return an ingredient's spec, as it was written or, where that is nothing here, beside the run's folder."""
    near = folder.parent / Path(spec).name
    return str(near) if not Path(spec).is_dir() and near.is_dir() else spec


def _count(value: object) -> int | None:
    return value if isinstance(value, int) else None
