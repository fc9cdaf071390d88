"""The encoder as certificates see it: noisy pixels in, unit features out, a function of one image at a time."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from robustvlm.attacks.oracle import PRECISIONS
from robustvlm.core.batches import steady_sizes
from robustvlm.core.foreign_text import one_line
from robustvlm.core.memory import is_out_of_memory
from robustvlm.defenses import SmoothedVLM
from robustvlm.errors import UserError, nearest
from robustvlm.evaluation.certifying.draws import find_dependence
from robustvlm.models import VLM
from robustvlm.models.borrowed import borrowed, placed
from robustvlm.models.device import full_precision_kernels
from robustvlm.runs.summary import Check

# Rounding between batch shapes moves a feature by about 1e-6; batch statistics move it by percents.
_COUPLED = 1e-3


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
        self.seconds = 0.0

    @property
    def fingerprint(self) -> str:
        """Digest of the model with everything behind the noise, and the precision that it runs in."""
        return f"{self.vlm.fingerprint}:{self.precision}"

    def __call__(self, noisy: Tensor) -> Tensor:
        """Return unit features [R, D] of noisy images [R, 3, S, S]."""
        began = time.perf_counter()
        half = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")
        with borrowed(self.vlm), torch.inference_mode(), full_precision_kernels(), half:
            features = self._encode(noisy.double() if self.precision == "fp64" else noisy)
        self.passes += len(noisy)
        self.seconds += time.perf_counter() - began
        return features


@dataclass(frozen=True)
class Probed:
    """What the first passes say of an encoder.

    Args:
        rungs: batch sizes, descending, in all of which and at every place an image gets the same bits (`steady_sizes`);
            the full one alone for an encoder that is random.
        dim: length of a feature. rate: noisy images per second. checks: findings about it.
    """

    rungs: tuple[int, ...]
    dim: int
    rate: float
    checks: tuple[Check, ...]


def probe_encoder(encoder: NoisyEncoder, images: Tensor, sigma: float, lanes: int, *, model: str) -> Probed:
    """Ask an encoder about a full batch of noisy images, its repetition and the same rows among others.

    Args:
        images: a few images [M, 3, S, S]; lanes: rows of a full batch, halved for as long as memory runs out.

    Raises:
        UserError: the encoder fails, its answer for an image depends on the others of the batch, or its own random
            draws do.
    """
    checks: list[Check] = []
    while True:
        rows = images[torch.arange(lanes) % len(images)].to(encoder.device)
        noisy = rows + sigma * torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)).to(encoder.device)
        try:
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
    if _change(again, first) > _COUPLED:
        found.append(_random(encoder, noisy, model=model))
        return Probed((len(noisy),), first.shape[1], rate, tuple(found))
    if len(noisy) > 1 and _change(encoder(_among_others(noisy))[-1:], first[:1]) > _COUPLED:
        raise UserError(
            f"model '{model}' treats an image differently depending on the others in its batch (batch normalisation in "
            "training mode, or quantisation over the batch?): certificates are about functions of one image"
        )
    if not torch.equal(again, first):
        return Probed((len(noisy),), first.shape[1], rate, tuple(found))
    sizes = steady_sizes(lambda rows: [encoder(noisy[rows.to(noisy.device)])], len(noisy), [first])
    return Probed(sizes, first.shape[1], rate, tuple(found))


def _random(encoder: NoisyEncoder, noisy: Tensor, *, model: str) -> Check:
    """Return what there is to say of an encoder that draws at random; refuse one whose rows depend on each other."""
    dependence = find_dependence(encoder, noisy)
    if dependence is not None:
        raise UserError(
            f"model '{model}' {dependence}: certificates count noisy copies as independent, so draw anew for every "
            "image of every call, as torch.randn_like(pixels) does, and use no statistics of the batch"
        )
    return Check(
        name="random encoder",
        level="warning",
        message="The encoder gives different features for the same image. Certificates are then about its mean over "
        "noise and its own draws, and hold only if these are fresh and independent for every image of every call and "
        "their law does not depend on the image. A test on one image found nothing against it, which is no proof.",
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
