"""Thresholds for a smoothed model: the score of the mean adapted feature under noise, on held-out images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robustvlm.core.seeds import derive_seed
from robustvlm.data import DataSource, Sample, to_pixels
from robustvlm.data.source import UNKNOWN
from robustvlm.defenses.smoothing import smooth
from robustvlm.errors import UserError
from robustvlm.models import VLM

MOST_IMAGES = 512


def noisy_means(
    vlm: VLM,
    source: DataSource,
    sigma: float,
    *,
    draws: int,
    seed: int,
    keep: Callable[[str], bool] | None = None,
    on_images: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the mean features [N, D] of noisy copies of the labelled images, not normalised, and the labels [N].

    That mean is what certificates of smoothed models are about. Noise is drawn per image from (seed, id, sigma).

    Args:
        vlm: the adapted encoder, not smoothed. draws: noisy copies of an image. keep: which ids to use; of these at
            most `MOST_IMAGES`.

    Raises:
        UserError: no image of a known class.
    """
    smoothed = smooth(vlm, sigma, draws)
    means: list[Tensor] = []
    labels: list[int] = []
    cuda = [vlm.device] if vlm.device.type == "cuda" else []
    for item in source.samples(limit=_limit(source, keep), keep=keep):
        if not isinstance(item, Sample) or item.label == UNKNOWN:
            continue
        pixels = to_pixels(item.image, vlm.framing)[None].to(vlm.device)
        with torch.random.fork_rng(devices=cuda), torch.no_grad():
            torch.manual_seed(derive_seed(seed, "noisy thresholds", repr(sigma), item.id))
            means.append(smoothed.mean_feature(pixels, draws).float().cpu())
        labels.append(item.label)
        if on_images is not None:
            on_images(len(labels))
        if len(labels) == MOST_IMAGES:
            break
    if not means:
        raise UserError(f"'{source.spec}' has no image of a known class to set thresholds under noise with")
    return torch.cat(means), torch.tensor(labels)


def _limit(source: DataSource, keep: Callable[[str], bool] | None) -> int | None:
    """Choose by hash among many images, where all of them may be used."""
    ids = source.ids() if keep is None else None
    return MOST_IMAGES if ids is not None and len(ids) > MOST_IMAGES else None
