"""A model as a folder that open_clip reads."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from robustvlm.core.files import is_temporary, named_disk_errors, read_json
from robustvlm.defenses import load_pipeline
from robustvlm.errors import UserError
from robustvlm.models.clip import MERGES, ClipVLM
from robustvlm.models.clip_folder import clip_config, stored_weights, write_clip_folder
from robustvlm.models.weights import CONFIG_NAME, WEIGHT_NAMES


def export_model(spec: str, out: Path, *, half: bool = False) -> None:
    """Write the open_clip model that `spec` names into the folder `out`.

    An export that was cut short is made anew, and one that is there already stays. Raises UserError when the model is
    not a plain open_clip model, or `out` holds anything else.

    Example:
        >>> import tempfile
        >>> out = Path(tempfile.mkdtemp()) / "exported"
        >>> export_model("tiny", out)
        >>> (out / "open_clip_model.safetensors").is_file()
        True
    """
    taken = UserError(f"'{out}' is there already and not an empty folder: choose another one to export to")
    if out.exists() and (not out.is_dir() or not _ours(out)):
        raise taken
    vlm = load_pipeline(spec)
    if not isinstance(vlm, ClipVLM):
        raise UserError(
            f"'{spec}' is more than an open_clip model (a {type(vlm).__name__}), which open_clip cannot hold: "
            "export the fine-tuned encoder that it stands on"
        )
    if (out / CONFIG_NAME).exists():  # it is written last
        if not _holds(out, vlm, half=half):
            raise taken
        return
    with named_disk_errors(out):
        for left in [path for path in out.glob(".*") if is_temporary(path.name)]:
            left.unlink()
        write_clip_folder(vlm, out, half=half)


def _ours(folder: Path) -> bool:
    """Whether a folder holds nothing but what an export writes, whole or cut short."""
    names = [path.name for path in folder.iterdir()]
    return all(name in (MERGES, WEIGHT_NAMES[0], CONFIG_NAME) or is_temporary(name) for name in names)


def _holds(folder: Path, vlm: ClipVLM, *, half: bool) -> bool:
    """Whether an exported folder is that of this model: what would be written stands there already."""
    merges = folder / MERGES
    try:
        config, kept = read_json(folder / CONFIG_NAME), load_file(folder / WEIGHT_NAMES[0])
    except (OSError, SafetensorError, UserError):
        return False
    wanted = stored_weights(vlm.model.state_dict(), half=half)
    return (
        config == json.loads(json.dumps(clip_config(vlm, merges if merges.exists() else None)))
        and kept.keys() == wanted.keys()
        and all(kept[name].dtype == t.dtype and torch.equal(kept[name], t) for name, t in wanted.items())
    )
