"""Copies of models: all that a folder's model needs, and nothing of the run that made it."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

from robustvlm.defenses.pipeline import split_spec
from robustvlm.errors import UserError
from robustvlm.models.saved import CARD_NAME, Card, read_card, write_card
from robustvlm.runs.files import replacing

RECORDS = frozenset(
    {
        "manifest.json",
        "checksums.json",
        "run.lock",
        "summary.json",
        "training.json",
        "report.html",
        "results.parquet",
        "audit.json",
        "audit.jsonl",
        "training",
        "gallery",
        "adversarial",
        "features",
    }
)
"""What a run keeps beside its model: records, checkpoints, pictures."""

_DEEPEST = 20


def copy_model(spec: str, target: Path) -> str:
    """Copy the model that `spec` names to the folder `target` if it is a folder; return the spec of the copy.

    The models that it stands on are copied too, as far as they are folders, each into `base` within. Anything but a
    folder (a bundled or published model, a checkpoint file, the user's own code) is left where it is and named.

    Raises:
        UserError: cards that lead back to themselves.

    Example:
        >>> import tempfile
        >>> copy_model("tiny", Path(tempfile.mkdtemp()) / "encoder")
        'tiny'
    """
    return _copied(spec, target, depth=0)


def copy_part(source: Path, target: Path, card: Card) -> None:
    """Copy a folder's model without the models that it stands on, under another card, which is written last."""
    _copy_files(source, target)
    write_card(target, card)


def _copy_files(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in _files(source):
        with replacing(target / path.relative_to(source)) as temporary:
            shutil.copyfile(path, temporary)


def _copied(spec: str, target: Path, *, depth: int) -> str:
    if depth > _DEEPEST:
        raise UserError(f"the models below '{spec}' stand on each other without end")
    place, operations = split_spec(spec)
    source = Path(os.path.expanduser(place))
    if not source.is_dir():
        return spec
    card = read_card(source)
    if card is None:
        _copy_files(source, target)
    else:
        base = None if card.base is None else _copied(card.base, target / "base", depth=depth + 1)
        copy_part(source, target, dataclasses.replace(card, base=base))
    return "+".join([str(target), *map(str, operations)])


def _files(folder: Path) -> list[Path]:
    """Return the files of a model: not the card, nor the run's records and leftovers, nor models inside its folder."""
    found: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.name in RECORDS or path.name == CARD_NAME or path.name.startswith((".", "journal")):
            continue
        if path.is_file():
            found.append(path)
        elif path.is_dir() and not path.is_symlink() and not (path / CARD_NAME).is_file():
            found += _files(path)
    return found
