"""A model as a folder that open_clip or transformers reads, with a model card."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from robustvlm.commands.export.card import CARD, measured, model_card
from robustvlm.core.files import is_temporary, named_disk_errors, read_bytes, read_json, write_text
from robustvlm.defenses.library import CLASSES, names_library_model
from robustvlm.defenses.pipeline import load_pipeline
from robustvlm.defenses.specs import split_spec
from robustvlm.errors import UserError, arguments_named, nearest, setting
from robustvlm.models.clip import MERGES, ClipVLM
from robustvlm.models.clip_to_transformers import LAYOUT, translate
from robustvlm.models.export import COPIED, as_clip, clip_config, rewritten, write_clip_folder
from robustvlm.models.transformers_files import CONFIG, WEIGHTS
from robustvlm.models.transformers_vlm import TowerVLM, TransformersVLM
from robustvlm.models.weights import CONFIG_NAME, WEIGHT_NAMES, require_half, stored_weights

Exported = ClipVLM | TransformersVLM | TowerVLM


@dataclass(frozen=True)
class Layout:
    """A kind of folder.

    Args:
        files: all that an export writes beside the card; config: the file among them that is written last.
        prepare: looks at a model and its `half`, and returns what writes a folder and what knows one again.
    """

    files: tuple[str, ...]
    config: str
    prepare: Callable[[Exported, bool], tuple[Callable[[Path], None], Callable[[Path], bool]]]


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
        model: a run folder, or any other spec of a model of open_clip or transformers.
        out: the folder to write, new or empty.
        to: "open_clip" or "transformers".
        evaluated: folders or names of attack and certify runs of this model, whose figures the card shows.
        half: store weights with 16 bits.

    Raises:
        UserError: the model is neither of open_clip nor of transformers, or one that the other cannot express; `out`
            holds anything else; a run is not of this model; 16 bits cannot hold a weight.

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
    if names_library_model(split_spec(spec)[0]):
        raise UserError(f"'{spec}' is a classifier and no CLIP-like model: hand on its own file, with its {CLASSES}")
    vlm = load_pipeline(spec)
    if not isinstance(vlm, ClipVLM | TransformersVLM | TowerVLM):
        raise UserError(
            f"'{spec}' is more than a model of open_clip or transformers (a {type(vlm).__name__}), which {to} cannot "
            "hold: export the fine-tuned encoder that it stands on"
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


def _as_open_clip(given: Exported, half: bool) -> tuple[Callable[[Path], None], Callable[[Path], bool]]:
    if isinstance(given, TowerVLM):
        raise UserError(
            f"'{given.spec}' is an image tower of transformers, and open_clip has no place for one alone: export it "
            f"with {setting('to', 'transformers')}"
        )
    vlm = as_clip(given) if isinstance(given, TransformersVLM) else given
    if half:
        require_half(vlm.model.state_dict())  # before anything is written

    def write(folder: Path) -> None:
        write_clip_folder(vlm, folder, half=half)

    def holds(folder: Path) -> bool:
        merges = folder / MERGES
        config = clip_config(vlm, merges if merges.exists() else None)
        weights = stored_weights(vlm.model.state_dict(), half=half)
        return _is_json(folder / CONFIG_NAME, config) and _same_weights(folder / WEIGHT_NAMES[0], weights)

    return write, holds


def _for_transformers(vlm: Exported, half: bool) -> tuple[Callable[[Path], None], Callable[[Path], bool]]:
    found = translate(vlm, half=half) if isinstance(vlm, ClipVLM) else rewritten(vlm, half=half)

    def holds(folder: Path) -> bool:
        try:
            same = all(read_bytes(folder / name) == content for name, content in found.others.items())
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
    "transformers": Layout((*LAYOUT, *COPIED), CONFIG, _for_transformers),
}
