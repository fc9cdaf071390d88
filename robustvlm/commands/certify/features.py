"""Noisy features kept on disk, a file per image, so that other prompts can be certified without encoder passes."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from robustvlm.certify import Job
from robustvlm.certify.certifier import Stage
from robustvlm.commands.certify.config import CacheType
from robustvlm.core.files import replacing, require_regular
from robustvlm.errors import UserError, setting
from robustvlm.runs.manifest import Manifest, run_identity

STAGES: tuple[Stage, ...] = ("pilot", "estimation", "clean")
_BYTES = {"float16": 2, "float32": 4}


def cache_bytes(images: int, samples: int, dim: int, kind: CacheType) -> int:
    """Return what the features of a run take on disk.

    Example:
        >>> cache_bytes(100, 10_000, 512, "float16")
        1024000000
    """
    return images * samples * dim * _BYTES[kind]


def rounding_error(kind: CacheType, dim: int) -> float:
    """Return a bound of the l2 distance between a unit feature [dim] and what its kept numbers read back as, rescaled.

    Rounding to half precision moves an entry by at most 2^-11 of its size, or by 2^-25 where it is tiny; scaling the
    result to unit length again moves it no further than the chord of the angle in between. Float32 is kept as it is.

    Example:
        >>> rounding_error("float32", 512), round(rounding_error("float16", 512), 6)
        (0.0, 0.00049)
    """
    if kind == "float32":
        return 0.0
    moved = 2.0**-11 + sqrt(dim) * 2.0**-25
    return moved * (1.0 + moved * moved) + 1e-6  # features are unit vectors up to float32


def require_room(folder: Path, needed: int) -> None:
    """Refuse to begin a run whose kept features do not fit on the disk."""
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"no space left on the disk for the kept features: they would take {needed / 1e6:,.1f} MB, and "
            f"{free / 1e6:,.1f} MB are free in '{place}': pass "
            f"{setting('cache', 'float16')}, fewer {setting('samples')} or another {setting('out')}"
        )


class FeatureWriter:
    """Gathers the features of images in work and writes them when an image is done, each file whole or not at all.

    Args:
        run: identity of the run that samples, which each file carries: features are evidence for its model alone.
    """

    def __init__(self, folder: Path, kind: CacheType, *, run: str | None = None) -> None:
        self.folder, self.kind, self.run = folder, kind, run
        self._parts: dict[int, dict[Stage, list[NDArray[Any]]]] = {}

    def add(self, job: Job, stage: Stage, rows: NDArray[np.float32]) -> None:
        """Add the next rows of a stage."""
        kept = rows.astype(np.float16 if self.kind == "float16" else np.float32)
        self._parts.setdefault(job.index, {}).setdefault(stage, []).append(kept)

    def write(self, job: Job) -> None:
        """Write the file of a finished image."""
        stages = self._parts.pop(job.index, {})
        tensors: dict[str, NDArray[Any]] = {stage: np.concatenate(parts) for stage, parts in stages.items()}
        about = {"image_id": job.image_id, "dtype": self.kind} | ({} if self.run is None else {"run": self.run})
        with replacing(feature_file(self.folder, job.index)) as temporary:
            temporary.write_bytes(save(tensors, metadata=about))


def feature_file(folder: Path, index: int) -> Path:
    """Return where the features of an image are kept."""
    return folder / f"{index:06d}.safetensors"


@dataclass(frozen=True)
class Kept:
    """The kept features of one image, in float32: [n, D] by stage."""

    stages: dict[Stage, NDArray[np.float32]]


def read_features(folder: Path, index: int, image_id: str, source: Manifest) -> Kept:
    """Return the kept features of an image.

    Raises:
        UserError: the file is missing, damaged, another image's, or does not show that it is of the run `source`.
    """
    path, again = feature_file(folder, index), f"make them again with {setting('cache')}"
    try:
        require_regular(path)
        with safe_open(path, framework="np") as file:
            about = file.metadata() or {}
            owner = about.get("image_id")
            names = set(file.keys())
            stages = {stage: file.get_tensor(stage).astype(np.float32) for stage in STAGES if stage in names}
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot read the kept features '{path}' ({error}): make them again with {setting('cache')}"
        ) from None
    if owner != image_id or "estimation" not in stages:
        raise UserError(f"'{path}' holds features of '{owner}', expected '{image_id}': {again}")
    if about.get("run") is None or about["run"] != run_identity(source):
        raise UserError(
            f"nothing shows that the kept features '{path}' are of the run that they lie in (another run's, or from a "
            f"version that did not note it): {again}"
        )
    return Kept(stages)
