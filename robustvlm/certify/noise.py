"""Gaussian noise by address: every row is a function of (run seed, image, stage, row number) and of nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from robustvlm.core.seeds import derive_seed
from robustvlm.errors import UserError

NoiseStage = Literal["pilot", "estimation", "inference"]
STAGES: tuple[NoiseStage, ...] = ("pilot", "estimation", "inference")

CHUNK = 32
"""Rows of noise that are made at once, and after which an anytime-valid test looks at its samples."""


def stream_seed(run_seed: int, image_id: str, stage: str) -> int:
    """Return the seed of one image's noise in one stage; other images, stages and run seeds have other streams.

    Raises:
        UserError: the stage is none of pilot, estimation and inference.

    Example:
        >>> stream_seed(0, "a", "pilot") == stream_seed(0, "a", "estimation")
        False
    """
    if stage not in STAGES:
        raise UserError(f"noise is for one of the stages {', '.join(STAGES)}, got '{stage}'")
    return derive_seed(run_seed, image_id, "certification noise", stage)


def noise_chunk(stream: int, number: int, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Return chunk `number` of a stream of noise: N(0, I) [CHUNK, *shape] in float32, on `device`.

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
        return torch.from_numpy(draws.standard_normal((CHUNK, *shape), dtype=np.float32))
    seeded = torch.Generator(place).manual_seed(derive_seed(stream, number))
    return torch.randn((CHUNK, *shape), generator=seeded, device=place, dtype=torch.float32)


def chunks_of(rows: int) -> int:
    """Return how many chunks hold `rows` rows.

    Example:
        >>> chunks_of(33)
        2
    """
    return math.ceil(rows / CHUNK)
