"""Gaussian noise by address: every row is a function of (seed, image, settings, stage, row) and of nothing else.

*Why the settings are part of the address.* A certificate is valid for a claim that was fixed before its noise was
drawn. Prompts, thresholds, noise level, model and whatever else decides a claim can be changed after a look at the
results; if the next run met the same noise, its claim would have been chosen by it. With the digest of the settings and
of the image in the address, other settings meet other noise. Take the address function for random, as every use of a
generator does. Let a user choose settings s_1, s_2, ... in turn, each with all results before it in view. If s_j is
none of the earlier ones, its noise is independent of everything that s_j was chosen by, so given all of that its
certificate is false with probability at most alpha; if s_j is an earlier one, its result is the earlier result. Hence
every certificate holds at its alpha, however its settings came about. What no noise can repair is a choice *among*
results: the best of J looks is false with probability at most J alpha (union bound), so a run counts the looks.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from robustvlm.core.seeds import derive_seed
from robustvlm.errors import UserError

NoiseStage = Literal["noise", "pilot", "estimation", "inference"]
STAGES: tuple[NoiseStage, ...] = ("noise", "pilot", "estimation", "inference")

Kind = Literal["normal", "bits"]
"""What noise is made of: N(0, 1) in float32, or whole numbers of 64 bits, each as likely as any other."""

CHUNK = 32
"""Rows of noise that are made at once, and after which an anytime-valid test looks at its samples."""


def stream_seed(run_seed: int, image_id: str, stage: str, *, image: str = "", settings: str = "") -> int:
    """Return the seed of one image's noise in one stage; another image, stage, run seed or setting has another stream.

    Args:
        image: digest of the image's pixels (`image_digest`). settings: digest of all that decides the claim. Noise
            without them is that of runs from before both were part of the address.

    Raises:
        UserError: the stage is none of `STAGES`.

    Example:
        >>> stream_seed(0, "a", "pilot") == stream_seed(0, "a", "estimation")
        False
    """
    if stage not in STAGES:
        raise UserError(f"noise is for one of the stages {', '.join(STAGES)}, got '{stage}'")
    own = (image, settings) if image or settings else ()
    return derive_seed(run_seed, image_id, "certification noise", stage, *own)


@dataclass(frozen=True)
class Address:
    """Where the noise of one image comes from: run seed, image, digest of its pixels, digest of the settings."""

    seed: int
    image_id: str
    image: str
    settings: str

    def stream(self, stage: str) -> int:
        """Return the seed of a stage."""
        return stream_seed(self.seed, self.image_id, stage, image=self.image, settings=self.settings)


def image_digest(pixels: Tensor) -> str:
    """Return the digest of an image [3, H, W] as it receives the noise, in float32: what a certificate is about.

    Example:
        >>> image_digest(torch.zeros(3, 2, 2)) == image_digest(torch.ones(3, 2, 2))
        False
    """
    return settings_digest(pixels.detach().cpu().to(torch.float32).numpy())


def settings_digest(*parts: object) -> str:
    """Return the digest of numbers, texts, arrays and tuples of them; other types, values or orders give another one.

    Example:
        >>> settings_digest(0.25, "a", np.eye(2)) == settings_digest(0.25, "a", np.eye(2)) != settings_digest(0.25, "b")
        True
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, np.ndarray):
            text = f"array:{part.dtype}:{part.shape};".encode()
            content = np.ascontiguousarray(part).tobytes()
        elif isinstance(part, (tuple, list)):
            text, content = b"tuple;", settings_digest(*part).encode()
        else:
            text, content = f"{type(part).__name__};".encode(), repr(part).encode("utf-8", "backslashreplace")
        digest.update(text + str(len(content)).encode() + b";" + content)
    return digest.hexdigest()


def noise_chunk(
    stream: int, number: int, shape: Sequence[int], device: torch.device | str = "cpu", *, kind: Kind = "normal"
) -> Tensor:
    """Return chunk `number` of a stream of noise: N(0, I) [CHUNK, *shape] in float32, on `device`.

    With the kind "bits", whole numbers of 64 bits instead, of which other noise is made (`robustvlm.certify.threats`).

    Always float32: half precision knows a few thousand values of a normal variable, and its law is another one. Rows
    do not depend on batches, order or process. On the CPU the chunks of a stream are disjoint pieces of one sequence of
    a counter-based generator with a 64-bit key (torch's CPU generator keeps 32 bits of a seed, too few for millions of
    chunks); other devices seed a generator of their own with 63 bits per chunk, so that their noise differs from that
    of the CPU.

    Example:
        >>> torch.equal(noise_chunk(7, 0, (3, 2, 2)), noise_chunk(7, 0, (3, 2, 2)))
        True
        >>> torch.equal(noise_chunk(7, 0, (3, 2, 2)), noise_chunk(7, 1, (3, 2, 2)))
        False
    """
    place = torch.device(device)
    if place.type == "cpu":
        draws = np.random.Generator(np.random.Philox(key=stream, counter=[0, 0, 0, number]))
        if kind == "bits":
            words = draws.integers(-(2**63), 2**63, (CHUNK, *shape), dtype=np.int64)
            return torch.from_numpy(words)
        return torch.from_numpy(draws.standard_normal((CHUNK, *shape), dtype=np.float32))
    seeded = torch.Generator(place).manual_seed(derive_seed(stream, number))
    if kind == "bits":
        return torch.empty((CHUNK, *shape), dtype=torch.int64, device=place).random_(-(2**63), None, generator=seeded)
    return torch.randn((CHUNK, *shape), generator=seeded, device=place, dtype=torch.float32)


def chunks_of(rows: int) -> int:
    """Return how many chunks hold `rows` rows.

    Example:
        >>> chunks_of(33)
        2
    """
    return math.ceil(rows / CHUNK)
