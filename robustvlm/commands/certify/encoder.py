"""The encoder under noise, and the features that it gave, kept to be judged with other prompts later."""

import contextlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from robustvlm.attacks.oracle import PRECISIONS
from robustvlm.attacks.probe import declared_draws
from robustvlm.certify import Job
from robustvlm.certify.certifier import Stage
from robustvlm.certify.threats import Noise
from robustvlm.commands.certify.config import CacheType
from robustvlm.core.batches import COUPLED, steady_sizes
from robustvlm.core.boundary import borrowed, placed
from robustvlm.core.device import Stopwatch
from robustvlm.core.files import replacing, require_regular
from robustvlm.core.seeds import derive_seed, full_precision_kernels, own_draws
from robustvlm.defenses import SmoothedVLM
from robustvlm.defenses.smoothing import told_of
from robustvlm.errors import UserError, is_out_of_memory, nearest, setting
from robustvlm.models import VLM
from robustvlm.runs.manifest import Manifest, run_identity
from robustvlm.runs.records import Check
from robustvlm.text import one_line

# Whether an encoder that draws at random does so anew for every image: a test of one noisy image, many times over.
#
# Certificates count the noisy copies of an image as independent. An encoder that draws once for a whole call (a random
# crop or time step, say) makes all rows of a call depend on each other, and one with batch statistics makes an image
# depend on its company; noise on top of that hides both from a comparison of single answers, not from their laws.

CALLS, ROWS = 8, 12
"""Calls with one image in every row, and as many with other images in every second row: 192 rows in all."""

_PERMUTATIONS = 1999
_LEVEL = 1e-3
_ROUNDS = 3
# Three groupings, two sides each, every one a permutation test at 0.001 (exact: independent rows may be relabelled at
# will), and an encoder is refused only if three rounds of fresh calls all find something: (6 * 0.001)^3 < 3e-7.

_APART = 1e-6
"""Rows differ by noise of this size, which no feature shows: what seeds its draws by an image's pixels would draw the
same for rows that are the same to the bit, and noisy copies of an image never are."""

_ROUNDING = 1e-3
"""Distances of features below this are rounding that differs by place or batch, and no randomness."""

Encode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Answers:
    """Features of one noisy image, that should be independent draws of one law.

    Args:
        alone: [calls, rows, D], the image in every row. among: [calls, rows, D], those of the image in calls that it
            shared with other images.
    """

    alone: Tensor
    among: Tensor


def find_dependence(encode: Encode, noisy: Tensor) -> str | None:
    """Return in words how the draws of a random encoder depend on each other or on the batch; None: nothing found.

    Args:
        encode: from noisy images [R, 3, S, S] to features [R, D]. noisy: images, at most as many as a call may have.

    Example:
        >>> rows = torch.rand(12, 3, 4, 4)
        >>> find_dependence(lambda x: x.flatten(1) + torch.randn(len(x), 1), rows)
        >>> find_dependence(lambda x: x.flatten(1) + torch.randn(1, 1), rows)
        'gives images of one call random draws that depend on each other (one draw for the whole call?)'
    """
    if len(noisy) < 2:  # one row a call: there is nobody to depend on
        return None
    found = None
    for number in range(_ROUNDS):
        found = _suspicion(_ask(encode, noisy), torch.Generator().manual_seed(number))
        if found is None:
            return None
    return found


def _ask(encode: Encode, noisy: Tensor) -> Answers:
    count, apart = min(ROWS, len(noisy)), torch.Generator().manual_seed(0)

    def asked(rows: Tensor) -> Tensor:
        return encode(rows + _APART * torch.randn(rows.shape, generator=apart, dtype=rows.dtype).to(rows.device))

    same = noisy[:1].expand(count, -1, -1, -1).contiguous()
    mixed = same.clone()
    # Of half the contrast, and dark beside a bright image or bright beside a dark one: the others differ in mean and
    # spread, which is what batch statistics are made of.
    away = -0.5 if float(noisy[0].mean()) > 0.5 else 1.0
    mixed[1::2] = 0.5 * noisy.flip(0)[: count // 2] + away
    return Answers(
        torch.stack([asked(same) for _ in range(CALLS)]),
        torch.stack([asked(mixed)[::2] for _ in range(CALLS)]),
    )


def _suspicion(answers: Answers, generator: torch.Generator) -> str | None:
    calls, rows, _ = answers.alone.shape
    alone = answers.alone.flatten(0, 1)
    everything = torch.cat([alone, answers.among.flatten(0, 1)])
    by_call = torch.arange(calls).repeat_interleave(rows)
    by_place = torch.arange(rows).repeat(calls)
    by_company = (torch.arange(len(everything)) >= len(alone)).long()
    company = _unlikely(everything, by_company, generator)
    place = _unlikely(alone, by_place, generator)
    call = _unlikely(alone, by_call, generator)
    # What is near in one grouping is far in the others, so nearness names the cause.
    if call == "near":
        return "gives images of one call random draws that depend on each other (one draw for the whole call?)"
    if place == "near":
        return "treats an image differently depending on its place in the batch (draws from a generator of fixed seed?)"
    if company is not None:
        return "treats an image differently depending on the others in its batch, beside its own randomness"
    if call is not None or place is not None:
        return "gives images of one call random draws that depend on each other (opposed pairs, or stratified draws?)"
    return None


def _unlikely(features: Tensor, groups: Tensor, generator: torch.Generator) -> str | None:
    """Return whether features [R, D] are "near" to or "far" from others of their group, as chance would not have it.

    Energy statistic: the sum of distances within groups, against the same sum after relabelling the rows. It sees any
    difference between the groups' laws, shared draws (rows too near to each other) and opposed ones (too far apart).
    """
    known = torch.nan_to_num(features.detach().double().cpu())
    apart = torch.cdist(known, known, compute_mode="donot_use_mm_for_euclid_dist")
    apart = (apart - _ROUNDING).clamp_min(0.0)
    observed = _within(apart, groups[None])
    order = torch.rand(_PERMUTATIONS, len(groups), generator=generator).argsort(dim=1)
    chance = _within(apart, groups[order])
    slack = 1e-9 * float(apart.sum())  # equal sums, added in another order, are equal
    near = 1 + int((chance <= observed + slack).sum())
    far = 1 + int((chance >= observed - slack).sum())
    most = _LEVEL * (_PERMUTATIONS + 1)
    return "near" if near <= most else "far" if far <= most else None


def _within(apart: Tensor, groups: Tensor) -> Tensor:
    """Return, for labellings [P, R] of the rows, the sum of distances [R, R] within groups: [P]."""
    total = torch.zeros(len(groups), dtype=apart.dtype)
    for group in groups[0].unique().tolist():
        member = (groups == group).to(apart.dtype)
        total += ((member @ apart) * member).sum(dim=1)
    return total


# The encoder as certificates see it: noisy pixels in, unit features out, a function of one image at a time


def behind(vlm: VLM, noise: Noise) -> VLM:
    """Return the model to use behind this noise, as `told_of`; one that brings its noise has told its parts.

    Raises:
        UserError: a part of the model is smoothed, which would then be smoothed twice, or it brings other noise.
    """
    if any(part is not vlm and isinstance(part, SmoothedVLM) for part in vlm.modules()):
        raise UserError(
            f"a part of '{vlm.spec}' is smoothed, and certificates are about one smoothing, which is the last "
            "operator: certify the model up to it"
        )
    if not isinstance(vlm, SmoothedVLM):
        return told_of(vlm, noise)
    own = vlm.noise
    if (own.sigma, own.threat.name) != (noise.sigma, noise.threat.smoothed_by):
        level, kind = setting("sigma", own.sigma), setting("threat", own.threat.name)
        raise UserError(
            f"'{vlm.spec}' is smoothed with noise of {own}, and certificates under {noise} would be about another "
            f"model: pass {level if own.threat.name == noise.threat.smoothed_by else f'{kind} and {level}'}"
        )
    return vlm


class NoisyEncoder:
    """The encoder f whose smoothed version is certified, in one precision, which is part of it.

    Everything behind the noise belongs to f: of a smoothed model its purifier and mapper too, of a model in bf16 the
    rounding. Noise is added in float32 before.

    Args:
        vlm: the model; of a smoothed one, its encoder below the averaging is taken.
        precision: "fp32", "bf16" (autocast) or "fp64".

    Example:
        >>> from robustvlm.models import load_model
        >>> encoder = NoisyEncoder(load_model("tiny"))
        >>> encoder(torch.rand(2, 3, 64, 64)).norm(dim=1).round(decimals=3).tolist(), encoder.passes
        ([1.0, 1.0], 2)
    """

    def __init__(self, vlm: VLM, *, precision: str = "fp32") -> None:
        if precision not in PRECISIONS:
            raise UserError(f"unknown precision '{precision}': {nearest(precision, PRECISIONS)}")
        self.precision = precision
        self.vlm = placed(vlm, vlm.device, torch.float64) if precision == "fp64" else vlm
        self._encode = self.vlm.encode_noisy if isinstance(self.vlm, SmoothedVLM) else self.vlm.encode_image
        self.device = vlm.device
        self.passes = 0
        self._watch = Stopwatch()

    @property
    def seconds(self) -> float:
        """Seconds inside the encoder; on a GPU by its own clock, and reading them waits for the passes under way."""
        return self._watch.seconds

    @property
    def fingerprint(self) -> str:
        """Digest of the model with everything behind the noise, and the precision that it runs in."""
        return f"{self.vlm.fingerprint}:{self.precision}"

    def __call__(self, noisy: Tensor) -> Tensor:
        """Return unit features [R, D] of noisy images [R, 3, S, S]."""
        self._watch.start(self.device)
        half = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")
        with borrowed(self.vlm), torch.no_grad(), full_precision_kernels(), half:
            features = self._encode(noisy.double() if self.precision == "fp64" else noisy)
        self.passes += len(noisy)
        self._watch.stop(self.device)
        return features


@dataclass(frozen=True)
class Probed:
    """What the first passes say of an encoder.

    Args:
        rungs: batch sizes, descending, in all of which and at every place an image gets the same bits (`steady_sizes`);
            the full one alone for an encoder that is random.
        dim: length of a feature. rate: noisy images per second. checks: findings about it.
        random: it draws at random by itself.
    """

    rungs: tuple[int, ...]
    dim: int
    rate: float
    checks: tuple[Check, ...]
    random: bool = False


def probe_encoder(encoder: NoisyEncoder, images: Tensor, noise: Noise, lanes: int, *, model: str) -> Probed:
    """Ask an encoder about a full batch of noisy images, its repetition and the same rows among others.

    Args:
        images: a few images [M, 3, S, S]; lanes: rows of a full batch, halved for as long as memory runs out.

    Raises:
        UserError: the encoder fails, its answer for an image depends on the others of the batch, or its own random
            draws do.
    """
    checks: list[Check] = []
    while True:
        seeded = torch.Generator().manual_seed(0)
        noisy = noise.fresh(images[torch.arange(lanes) % len(images)].cpu(), seeded).to(encoder.device)
        try:
            with own_draws(encoder.device, derive_seed("questions", model)):  # the caller's random state is left alone
                return _questions(encoder, noisy, checks, model=model)
        except UserError:
            raise
        except Exception as error:  # the encoder may be the user's code, which fails in any way
            if not is_out_of_memory(error):
                said = f"{type(error).__name__}: {one_line(error, limit=200)}"
                raise UserError(f"model '{model}' failed on {lanes} noisy images: {said}") from error
            if lanes == 1:
                raise
            lanes //= 2
            checks = [Check(name="lanes", level="note", message=f"Memory did not suffice for more than {lanes} rows.")]


def _questions(encoder: NoisyEncoder, noisy: Tensor, checks: list[Check], *, model: str) -> Probed:
    first = encoder(noisy)
    _wait(encoder)
    began = time.perf_counter()
    again = encoder(noisy)
    _wait(encoder)
    rate = len(noisy) / max(time.perf_counter() - began, 1e-9)
    found = list(checks)
    shown = _change(again, first) > COUPLED
    if shown:
        _require_fresh(encoder, noisy, model=model)
    if shown or declared_draws(encoder.vlm) > 0:  # which the first images need not show
        found.append(_RANDOM)
        return Probed((len(noisy),), first.shape[1], rate, tuple(found), random=True)
    if len(noisy) > 1 and _change(encoder(_among_others(noisy))[-1:], first[:1]) > COUPLED:
        raise UserError(
            f"model '{model}' treats an image differently depending on the others in its batch (batch normalisation in "
            "training mode, or quantisation over the batch?): certificates are about functions of one image"
        )
    if not torch.equal(again, first):
        return Probed((len(noisy),), first.shape[1], rate, tuple(found))
    sizes = steady_sizes(lambda rows: [encoder(noisy[rows.to(noisy.device)])], len(noisy), [first])
    return Probed(sizes, first.shape[1], rate, tuple(found))


def same_bits(encoder: NoisyEncoder, noisy: Tensor) -> bool:
    """Whether an encoder gives images [R, 3, S, S] the same bits again, at other places and beside other images."""
    first = encoder(noisy)
    others = torch.cat([noisy[1:], noisy[:1]])
    darker = torch.cat([noisy[:1], 0.5 * noisy[1:]])
    same = torch.equal(encoder(others).roll(1, dims=0), first) and torch.equal(encoder(darker)[:1], first[:1])
    return same and torch.equal(encoder(noisy), first)


_RANDOM = Check(
    name="random encoder",
    level="warning",
    message="The encoder gives different features for the same image. Certificates are then about its mean over "
    "noise and its own draws, and hold only if these are fresh and independent for every image of every call and "
    "their law does not depend on the image. A test on one image found nothing against it, which is no proof.",
)


def _require_fresh(encoder: NoisyEncoder, noisy: Tensor, *, model: str) -> None:
    """Refuse an encoder that draws at random, and whose rows depend on each other."""
    dependence = find_dependence(encoder, noisy)
    if dependence is not None:
        raise UserError(
            f"model '{model}' {dependence}: certificates count noisy copies as independent, so draw anew for every "
            "image of every call, as torch.randn_like(pixels) does, and use no statistics of the batch"
        )


def _among_others(noisy: Tensor) -> Tensor:
    """Return darkened copies of the other rows, with the first row last: moving it shows what looks at earlier rows."""
    others = noisy.flip(0) * 0.5
    others[-1] = noisy[0]
    return others


def _change(new: Tensor, old: Tensor) -> float:
    """Return the largest change of a feature's entry; NaN in both is no change."""
    return float(torch.nan_to_num((new - old).double().abs(), nan=0.0).max())


def _wait(encoder: NoisyEncoder) -> None:
    with contextlib.suppress(AssertionError):
        if encoder.device.type == "cuda":
            torch.cuda.synchronize(encoder.device)


# The features of the noise, kept beside the rows: what other prompts are certified with later

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
