"""A model as a folder that open_clip or transformers reads, with a model card."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from robustvlm.commands.export.card import CARD, measured, model_card
from robustvlm.core.files import is_temporary, named_disk_errors, read_json, read_text, write_text
from robustvlm.defenses import load_pipeline
from robustvlm.errors import UserError, arguments_named, nearest, setting
from robustvlm.models.clip import MERGES, ClipVLM
from robustvlm.models.clip_folder import clip_config, stored_weights, write_clip_folder
from robustvlm.models.clip_to_transformers import LAYOUT, translate
from robustvlm.models.transformers_files import CONFIG, WEIGHTS
from robustvlm.models.transformers_vlm import TransformersVLM
from robustvlm.models.weights import CONFIG_NAME, WEIGHT_NAMES


@dataclass(frozen=True)
class Layout:
    """A kind of folder.

    Args:
        files: all that an export writes beside the card; config: the file among them that is written last.
        prepare: looks at a model and its `half`, and returns what writes a folder and what knows one again.
    """

    files: tuple[str, ...]
    config: str
    prepare: Callable[[ClipVLM, bool], tuple[Callable[[Path], None], Callable[[Path], bool]]]


@arguments_named()
def export(
    model: str | Path,
    out: str | Path,
    *,
    to: str = "open_clip",
    evaluated: Sequence[str | Path] = (),
    half: bool = False,
) -> Path:
    """Write a model as a folder that open_clip or transformers reads, with a model card (README.md); return the folder.

    An export that was cut short is made anew, and one that is there already stays; its card is written anew where runs
    are given.

    Args:
        model: a run folder, or any other open_clip model's spec.
        out: the folder to write, new or empty.
        to: "open_clip" or "transformers".
        evaluated: folders or names of attack and certify runs of this model, whose figures the card shows.
        half: store weights with 16 bits.

    Raises:
        UserError: the model is not a plain open_clip model, or one that transformers cannot express; `out` holds
            anything else; a run is not of this model.

    Example:
        >>> import tempfile
        >>> out = export("tiny", Path(tempfile.mkdtemp()) / "exported")
        >>> sorted(path.name for path in out.iterdir() if path.suffix in (".md", ".safetensors"))
        ['README.md', 'open_clip_model.safetensors']
    """
    write_export(str(model), Path(out), to=to, evaluated=evaluated, half=half)
    return Path(out)


def write_export(spec: str, out: Path, *, to: str, evaluated: Sequence[str | Path], half: bool) -> None:
    """As `export`, with errors that name options as the command line has them."""
    if to not in LAYOUTS:
        raise UserError(f"{setting('to')} is one of {', '.join(LAYOUTS)}, got '{to}': {nearest(to, LAYOUTS)}")
    layout = LAYOUTS[to]
    taken = UserError(f"'{out}' is there already and not an empty folder: choose another one to export to")
    if out.exists() and (not out.is_dir() or not _ours(out, layout)):
        raise taken
    vlm = load_pipeline(spec)
    if isinstance(vlm, TransformersVLM):
        raise UserError(f"'{spec}' stands on a model of transformers, and only open_clip models are exported so far")
    if not isinstance(vlm, ClipVLM):
        raise UserError(
            f"'{spec}' is more than an open_clip model (a {type(vlm).__name__}), which {to} cannot hold: "
            "export the fine-tuned encoder that it stands on"
        )
    write, holds = layout.prepare(vlm, half)
    card = model_card(vlm, to=to, half=half, measurements=measured(vlm, evaluated, half=half))
    there = (out / layout.config).exists()  # it is written last
    if there and not holds(out):
        raise taken
    with named_disk_errors(out):
        if not there:
            out.mkdir(parents=True, exist_ok=True)
            for left in [path for path in out.glob(".*") if is_temporary(path.name)]:
                left.unlink()
        if evaluated or not (out / CARD).exists() or not there:
            write_text(out / CARD, card)
        if not there:
            write(out)


def _ours(folder: Path, layout: Layout) -> bool:
    """Whether a folder holds nothing but what an export writes, whole or cut short."""
    names = [path.name for path in folder.iterdir()]
    return all(name in (*layout.files, CARD) or is_temporary(name) for name in names)


def _as_open_clip(vlm: ClipVLM, half: bool) -> tuple[Callable[[Path], None], Callable[[Path], bool]]:
    def write(folder: Path) -> None:
        write_clip_folder(vlm, folder, half=half)

    def holds(folder: Path) -> bool:
        merges = folder / MERGES
        config = clip_config(vlm, merges if merges.exists() else None)
        weights = stored_weights(vlm.model.state_dict(), half=half)
        return _is_json(folder / CONFIG_NAME, config) and _same_weights(folder / WEIGHT_NAMES[0], weights)

    return write, holds


def _for_transformers(vlm: ClipVLM, half: bool) -> tuple[Callable[[Path], None], Callable[[Path], bool]]:
    found = translate(vlm, half=half)

    def holds(folder: Path) -> bool:
        try:
            same = all(read_text(folder / name) == text for name, text in found.texts.items())
        except (OSError, UserError):
            return False
        return same and _is_json(folder / CONFIG, found.config) and _same_weights(folder / WEIGHTS, found.weights)

    return found.write, holds


def _is_json(path: Path, wanted: object) -> bool:
    try:
        return bool(read_json(path) == json.loads(json.dumps(wanted)))
    except (OSError, UserError):
        return False


def _same_weights(path: Path, wanted: dict[str, torch.Tensor]) -> bool:
    try:
        kept = load_file(path)
    except (OSError, SafetensorError):
        return False
    return kept.keys() == wanted.keys() and all(
        kept[name].dtype == tensor.dtype and torch.equal(kept[name], tensor) for name, tensor in wanted.items()
    )


LAYOUTS = {
    "open_clip": Layout((MERGES, WEIGHT_NAMES[0], CONFIG_NAME), CONFIG_NAME, _as_open_clip),
    "transformers": Layout(LAYOUT, CONFIG, _for_transformers),
}
