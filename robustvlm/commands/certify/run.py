"""The work of a certify run: every image sampled until its claim is decided, with noisy features kept for later."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from robustvlm.certify import Certificate, Sampled, SamplingEngine, Task, source_norm
from robustvlm.certify.certifier import Stage
from robustvlm.commands.certify.config import CacheType
from robustvlm.commands.certify.encoder import NoisyEncoder, Probed, probe_encoder
from robustvlm.commands.certify.store import CertifyLedger, CertifyObserver, Forecast, Recorder
from robustvlm.commands.common.inputs import Images, Picture
from robustvlm.core.files import replacing, require_regular
from robustvlm.core.ranks import Ranks
from robustvlm.data.source import Unreadable, select
from robustvlm.errors import UserError
from robustvlm.runs.manifest import Manifest, run_identity

# Noisy features kept on disk, a file per image, so that other prompts can be certified without encoder passes

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
            f"{free / 1e6:,.1f} MB are free in '{place}': pass --cache float16, fewer --samples or another --out"
        )


class FeatureWriter:
    """Gathers the features of images in work and writes them when an image is done, each file whole or not at all.

    Args:
        run: identity of the run that samples, which each file carries: features are evidence for its model alone.
    """

    def __init__(self, folder: Path, kind: CacheType, *, run: str | None = None) -> None:
        self.folder, self.kind, self.run = folder, kind, run
        self._parts: dict[int, dict[Stage, list[NDArray[Any]]]] = {}

    def add(self, task: Task, stage: Stage, rows: NDArray[np.float32]) -> None:
        """Add the next rows of a stage."""
        kept = rows.astype(np.float16 if self.kind == "float16" else np.float32)
        self._parts.setdefault(task.index, {}).setdefault(stage, []).append(kept)

    def write(self, task: Task) -> None:
        """Write the file of a finished image."""
        stages = self._parts.pop(task.index, {})
        tensors: dict[str, NDArray[Any]] = {stage: np.concatenate(parts) for stage, parts in stages.items()}
        about = {"image_id": task.image_id, "dtype": self.kind} | ({} if self.run is None else {"run": self.run})
        with replacing(feature_file(self.folder, task.index)) as temporary:
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
    path = feature_file(folder, index)
    try:
        require_regular(path)
        with safe_open(path, framework="np") as file:
            about = file.metadata() or {}
            owner = about.get("image_id")
            names = set(file.keys())
            stages = {stage: file.get_tensor(stage).astype(np.float32) for stage in STAGES if stage in names}
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read the kept features '{path}' ({error}): make them again with --cache") from None
    if owner != image_id or "estimation" not in stages:
        raise UserError(f"'{path}' holds features of '{owner}', expected '{image_id}': make them again with --cache")
    if about.get("run") is None or about["run"] != run_identity(source):
        raise UserError(
            f"nothing shows that the kept features '{path}' are of the run that they lie in (another run's, or from a "
            "version that did not note it): make them again with --cache"
        )
    return Kept(stages)


# The work of a certify run: sample every image until its claim is decided, or judge samples that were kept

# A killed session loses its count of passes since the last note of it.
_COST_SECONDS = 5.0
_PROBE_IMAGES = 8


class SamplingRun:
    """Certifies the images of a source by sampling, as far as the ledger does not know them yet.

    Args:
        recorder: settings and plan of the claim, and how rows are made.
        encoder: the encoder below the noise.
        images: the images, at the resolution where the noise is added.
        best_radius: the largest radius that the settings can give.
        ledger, observer: told what is found; ranks: the processes that share the images.
    """

    def __init__(
        self,
        *,
        recorder: Recorder,
        encoder: NoisyEncoder,
        images: Images,
        best_radius: float,
        ledger: CertifyLedger,
        observer: CertifyObserver,
        ranks: Ranks,
    ) -> None:
        self.recorder, self.config = recorder, recorder.config
        self.encoder, self.images = encoder, images
        self.best_radius = best_radius
        self.ledger, self.observer, self.ranks = ledger, observer, ranks
        self._norms: dict[int, float | None] = {}
        self._began = self._noted = time.monotonic()

    def run(self) -> None:
        """Do what is left to do; every finished image goes to the ledger at once."""
        self._began = self._noted = time.monotonic()
        try:
            probed = self._probe()
            self._announce(probed)
            writer = (
                None
                if self.config.cache is None
                else FeatureWriter(self._features, self.config.cache, run=self.ledger.owner)
            )
            engine = SamplingEngine(
                self.encoder,
                seed=self.config.seed,
                settings=self.config.noise,
                lanes=probed.rungs[0],
                device=self.encoder.device,
                rungs=probed.rungs,
                keep=None if writer is None else writer.add,
                on_pass=self._passed,
            )
            for sampled in engine.run(self._tasks(), lambda _: self.recorder.plan.certifier()):
                if writer is not None:  # a row in the journal means that the features are there
                    writer.write(sampled.task)
                fact = self.recorder.fact(sampled, resize_norm=self._norms.pop(sampled.task.index))
                self.ledger.add_image(fact)
                self.observer.image_done(fact)
        finally:
            self._note_cost()

    @property
    def _features(self) -> Path:
        return self.ledger.folder.features_path

    def _probe(self) -> Probed:
        """Question the encoder on the first images."""
        first: list[Picture] = []
        reasons: list[str] = []
        for item in self.images.stream():
            if isinstance(item, Unreadable):
                reasons.append(f"'{item.id}': {item.reason}")
            else:
                first.append(item)
            if len(first) == _PROBE_IMAGES:
                break
        if not first:
            why = f"none of its {len(reasons)} images can be read (the first, {reasons[0]})" if reasons else "none"
            raise UserError(f"no image to certify in '{self.images.source.spec}': {why}")
        pixels = torch.stack([picture.pixels for picture in first])
        probed = probe_encoder(self.encoder, pixels, self.config.sigma, self.config.lanes, model=self.config.model)
        self.ledger.add_checks(list(probed.checks))
        return probed

    def _announce(self, probed: Probed) -> None:
        ids, done = self.images.source.ids(), len(self.ledger.seen)
        total = len(select(ids, self.images.limit)) if ids is not None else self.images.limit
        left = None if total is None else max(0, total - done)
        passes = None if left is None else left * self.config.samples
        size = 0
        if self.config.cache is not None and left is not None:
            size = cache_bytes(left, self.config.samples, probed.dim, self.config.cache)
            require_room(self._features, size)
        self.observer.forecast(
            Forecast(
                images=left,
                samples=self.config.samples,
                passes=passes,
                seconds=None if passes is None else passes / probed.rate / self.ranks.size,
                best_radius=self.best_radius,
                cache_bytes=size,
            )
        )
        self.observer.begin(total, done)

    def _tasks(self) -> Iterator[Task]:
        known, index = self.ledger.seen, self.images.index
        handed_on: set[str] = set()
        for item in self.images.stream(lambda name: name not in known and self.ranks.mine(index(name))):
            # Streams also name what no one asked for: damaged shards, and second images of the same name.
            if item.id in handed_on or item.id in known or not self.ranks.mine(index(item.id)):
                continue
            handed_on.add(item.id)
            if isinstance(item, Unreadable):
                self.ledger.add_unreadable(index(item.id), item)
                self.observer.image_done(None)
                continue
            number = index(item.id)
            self._norms[number] = source_norm(*item.source_size, self.config.resolution)
            yield Task(item.id, number, item.pixels, item.label)

    def _passed(self, rows: int, used: int) -> None:
        self.ranks.check()
        self.observer.passed(rows, used)
        if time.monotonic() - self._noted >= _COST_SECONDS:
            self._note_cost()

    def _note_cost(self) -> None:
        self._noted = time.monotonic()
        self.ledger.add_cost(
            passes=self.encoder.passes, seconds=self._noted - self._began, model_seconds=self.encoder.seconds
        )


class ReplayRun:
    """Certifies images from the features that another run kept: no encoder pass is made.

    Args:
        rows: of the run that kept the features: index, image_id, resize_norm, certificate.
        features: folder of the kept features; source: manifest of the run that they must be of.
        labels: the images' classes in the new list, by index; -1 where it is not in it.
    """

    def __init__(
        self,
        *,
        recorder: Recorder,
        rows: Sequence[Mapping[str, Any]],
        features: Path,
        source: Manifest,
        labels: Mapping[int, int],
        best_radius: float,
        ledger: CertifyLedger,
        observer: CertifyObserver,
        ranks: Ranks,
    ) -> None:
        self.recorder, self.rows, self.features, self.labels = recorder, rows, features, labels
        self.source = source
        self.best_radius = best_radius
        self.ledger, self.observer, self.ranks = ledger, observer, ranks

    def run(self) -> None:
        """Do what is left to do; every finished image goes to the ledger at once."""
        began = time.monotonic()
        known = {fact.index for fact in self.ledger.found.values()}
        left = [row for row in self.rows if row["index"] not in known]
        samples = self.recorder.config.samples
        self.observer.forecast(Forecast(len(left), samples, 0, 0.0, self.best_radius))
        self.observer.begin(len(self.rows), len(known))
        try:
            for row in left:
                if self.ranks.mine(row["index"]):
                    self.ranks.check()
                    # Earlier versions kept the norm of a resize that was rounded, which certifies nothing.
                    norm = 1.0 if row["resize_norm"] == 1.0 else None
                    fact = self.recorder.fact(self._judged(row), resize_norm=norm)
                    self.ledger.add_image(fact)
                    self.observer.image_done(fact)
        finally:
            self.ledger.add_cost(passes=0, seconds=time.monotonic() - began, model_seconds=0.0)

    def _judged(self, row: Mapping[str, Any]) -> Sampled:
        began = time.perf_counter()
        kept = read_features(self.features, row["index"], row["image_id"], self.source)
        certifier = self.recorder.plan.certifier()
        used = dict.fromkeys(kept.stages, 0)
        while (wanted := certifier.request()) is not None:
            start = used.get(wanted.stage, 0)
            rows = kept.stages.get(wanted.stage, ())[start : start + wanted.sure]
            if len(rows) < wanted.sure:
                raise UserError(f"the kept features of '{row['image_id']}' lack {wanted.stage} samples: make them anew")
            used[wanted.stage] = start + wanted.sure
            certifier.take(rows)
        task = Task(row["image_id"], row["index"], torch.zeros(0), self.labels[row["index"]])
        drawn = Certificate.from_dict(json.loads(row["certificate"]))  # the samples are those of the first run
        return Sampled(
            task=task,
            finding=certifier.finding(),
            passes=0,
            seconds=time.perf_counter() - began,
            sigma=certifier.sigma,
            image=drawn.image,
            seeds=drawn.provenance.seeds,
        )
