"""Participation ratios: closed forms, what moves them not, and the truth of simulations at few images."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from robustvlm.detect import class_dimensions, participation_ratio
from robustvlm.errors import UserError

SPREAD = torch.tensor([3.0, 2.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.1])
TRUTH = float(SPREAD.square().sum() ** 2 / SPREAD.pow(4).sum())


def draws(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, len(SPREAD), generator=torch.Generator().manual_seed(seed)) * SPREAD


def test_the_truth_of_many_images() -> None:
    assert participation_ratio(draws(20_000, 0)) == pytest.approx(TRUTH, rel=0.05)


def test_few_images_are_not_taken_for_few_dimensions() -> None:
    """The plug-in ratio of 6 images in 200 dimensions is below 5; here the median over draws is near the truth."""
    generator = torch.Generator().manual_seed(0)
    found = [participation_ratio(torch.randn(6, 200, generator=generator)) for _ in range(200)]
    assert 100 < float(np.nanmedian(found)) < 400


def test_it_does_not_see_position_scale_or_rotation() -> None:
    z, turned = draws(40, 1), torch.linalg.qr(draws(8, 2)).Q
    for other in (z + 5, 0.01 * z, z @ turned):
        assert participation_ratio(other) == pytest.approx(participation_ratio(z), rel=1e-3)


def test_classes() -> None:
    z, labels = (
        torch.cat([draws(30, 3), draws(30, 4) * torch.eye(8)[0], draws(3, 5)]),
        torch.tensor([0] * 30 + [1] * 30 + [2] * 3),
    )
    found = class_dimensions(z, labels, 4)
    assert found[0] == participation_ratio(z[:30])
    assert found[1] == pytest.approx(1.0, abs=0.1)
    assert np.isnan(found[2:]).all()


def test_what_has_no_dimension() -> None:
    assert math.isnan(participation_ratio(torch.ones(5, 3)))
    with pytest.raises(UserError, match="at least 4 images"):
        participation_ratio(torch.ones(3, 3))
