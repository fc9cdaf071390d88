"""A model as a folder that open_clip reads."""

from __future__ import annotations

from pathlib import Path

from robustvlm.defenses import load_pipeline
from robustvlm.errors import UserError
from robustvlm.models.clip import ClipVLM
from robustvlm.models.clip_folder import MERGES, write_clip_folder
from robustvlm.models.hub import WEIGHT_NAMES
from robustvlm.runs.files import TEMPORARY, named_disk_errors


def export_model(spec: str, out: Path, *, half: bool = False) -> None:
    """Write the open_clip model that `spec` names into the folder `out`.

    An export that was cut short is made anew. Raises UserError when the model is not a plain open_clip model, or `out`
    holds other files.

    Example:
        >>> import tempfile
        >>> out = Path(tempfile.mkdtemp()) / "exported"
        >>> export_model("tiny", out)
        >>> (out / "open_clip_model.safetensors").is_file()
        True
    """
    if out.exists() and (not out.is_dir() or not _ours(out)):
        raise UserError(f"'{out}' is there already and not an empty folder: choose another one to export to")
    vlm = load_pipeline(spec)
    if not isinstance(vlm, ClipVLM):
        raise UserError(
            f"'{spec}' is more than an open_clip model (a {type(vlm).__name__}), which open_clip cannot hold: "
            "export the fine-tuned encoder that it stands on"
        )
    with named_disk_errors(out):
        for left in out.glob(f".*{TEMPORARY}"):
            left.unlink()
        write_clip_folder(vlm, out, half=half)


def _ours(folder: Path) -> bool:
    """Whether a folder holds nothing but what an export that was cut short leaves: the config is written last."""
    names = [path.name for path in folder.iterdir()]
    return all(name in (MERGES, WEIGHT_NAMES[0]) or name.endswith(TEMPORARY) for name in names)
