"""`robustvlm build` as a run: a folder with a manifest that holds a pipeline."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from robustvlm.defenses.build import Misfit, Recipe, Unfitted, build_pipeline
from robustvlm.defenses.build.building import PARTS
from robustvlm.defenses.purify import PurifiedVLM
from robustvlm.evaluation.describe import facts_of
from robustvlm.models import VLM
from robustvlm.models.device import resolve_device
from robustvlm.runs.checksums import forget_checksums, write_checksums
from robustvlm.runs.files import write_text
from robustvlm.runs.folder import RunFolder, default_name
from robustvlm.runs.manifest import make_manifest


class BuildConfig(BaseModel):
    """Every setting that decides a pipeline."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoder: str
    purify: str | None = None
    smooth: str | None = None
    immunize: str | None = None
    accept_misfits: bool = False


@dataclass(frozen=True)
class Built:
    """A pipeline on disk: its folder, its parts in the order in which an image passes them, and what does not fit."""

    folder: Path
    parts: tuple[str, ...]
    misfits: tuple[Misfit | Unfitted, ...]


def assemble(
    recipe: Recipe,
    *,
    out: Path = Path("runs"),
    name: str | None = None,
    command: str = "",
    accept_misfits: bool = False,
    device: str = "auto",
    fresh: bool = False,
) -> Built:
    """Build a pipeline in a folder of its own; given again, the same command copies the parts anew.

    Raises:
        UserError: whatever `build_pipeline` raises, or the folder holds something else.

    Example:
        >>> import tempfile
        >>> assemble(Recipe("tiny", smooth="0.25:8"), out=Path(tempfile.mkdtemp())).parts
        ('encoder tiny', 'smoothing 0.25:8')
    """
    config = BuildConfig(
        encoder=recipe.encoder,
        purify=recipe.purify,
        smooth=recipe.smooth,
        immunize=recipe.immunize,
        accept_misfits=accept_misfits,
    )
    folder = RunFolder(out, name or default_name("build", recipe.encoder, "", config.model_dump()))
    place = resolve_device(device)
    facts = {"spec": recipe.encoder}
    manifest = make_manifest(kind="build", name=folder.name, command=command, config=config, model=facts, data={})
    with folder.opened(manifest, fresh=fresh) as known:
        forget_checksums(folder.path)
        if (folder.path / PARTS).exists():
            shutil.rmtree(folder.path / PARTS)
        vlm, misfits = build_pipeline(recipe, folder.path, accept_misfits=accept_misfits, device=place)
        stages = _stages(recipe, vlm)
        record = {"name": folder.name, "parts": list(stages), "model": facts_of(vlm, "interpolation")}
        record["misfits"] = [str(wrong) for wrong in misfits]
        write_text(folder.summary_path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        write_checksums(folder.path, known)
    return Built(folder.path, stages, misfits)


def _stages(recipe: Recipe, vlm: VLM) -> tuple[str, ...]:
    """Name what an image passes, in order."""
    around = next((part for part in vlm.modules() if isinstance(part, PurifiedVLM)), None)
    purifier = around is not None and around.purifier is not None
    mapper = around is not None and around.mapper is not None
    named = (
        ("purifier", recipe.purify if purifier else None),
        ("encoder", recipe.encoder),
        ("mapper", recipe.purify if mapper else None),
        ("adapter", recipe.immunize),
        ("smoothing", recipe.smooth),
        ("immunised head", recipe.immunize),
    )
    return tuple(f"{what} {where}" for what, where in named if where is not None)
