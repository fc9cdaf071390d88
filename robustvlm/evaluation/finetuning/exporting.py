"""A model as a folder that open_clip reads."""

from __future__ import annotations

from pathlib import Path

from robustvlm.defenses import load_pipeline
from robustvlm.errors import UserError
from robustvlm.models.clip import ClipVLM
from robustvlm.models.clip_folder import write_clip_folder
from robustvlm.runs.files import named_disk_errors


def export_model(spec: str, out: Path, *, half: bool = False) -> None:
    """Write the open_clip model that `spec` names into the folder `out`.

    Raises UserError when the model is not a plain open_clip model, or `out` holds other files.

    Example:
        >>> import tempfile
        >>> out = Path(tempfile.mkdtemp()) / "exported"
        >>> export_model("tiny", out)
        >>> (out / "open_clip_model.safetensors").is_file()
        True
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"'{out}' is there already and not an empty folder: choose another one to export to")
    vlm = load_pipeline(spec)
    if not isinstance(vlm, ClipVLM):
        raise UserError(
            f"'{spec}' is more than an open_clip model (a {type(vlm).__name__}), which open_clip cannot hold: "
            "export the fine-tuned encoder that it stands on"
        )
    with named_disk_errors(out):
        write_clip_folder(vlm, out, half=half)
