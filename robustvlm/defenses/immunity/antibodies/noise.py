"""Noise as antibodies: the baseline that is worth nothing, which shows what the texts are worth."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from robustvlm.core.seeds import generator
from robustvlm.defenses.immunity.antibodies.texts import NOISE, Antibodies, AntibodyText


def noise_antibodies(count: int, dimensions: int, *, seed: int) -> Antibodies:
    """Return `count` antibodies uniform on the unit sphere of `dimensions`, each a function of seed and number alone.

    In D dimensions P(|cos| > eps) <= 2 exp(-D eps^2 / 2) for a fixed direction (Immuno-VLM, arXiv 2605.30745): such
    antibodies lie far from every class and push nothing. They are not put through the filters, which none would pass.

    Example:
        >>> antibodies = noise_antibodies(2, 64, seed=0)
        >>> antibodies.embeddings.norm(dim=1).round(decimals=4), antibodies.texts[0].text
        (tensor([1., 1.]), 'noise 0')
    """
    rows = [torch.randn(dimensions, generator=generator(seed, "noise antibody", i)) for i in range(count)]
    embeddings = F.normalize(torch.stack(rows), dim=-1) if rows else torch.zeros(0, dimensions)
    return Antibodies(tuple(AntibodyText(f"noise {i}", "", NOISE) for i in range(count)), embeddings)
