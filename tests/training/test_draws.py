"""Random numbers of images: a reference stream, the laws they follow, and that cutting a batch changes nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from robustvlm.core.seeds import derive_seed
from robustvlm.training import Draws

_MASK = (1 << 64) - 1


def splitmix(seed: int, index: int) -> int:
    """The published algorithm on Python's whole numbers."""
    z = (seed + 0x9E3779B97F4A7C15 * index) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


@given(seed=st.integers(0, 2**31), step=st.integers(0, 10**6), name=st.text(max_size=5))
@settings(max_examples=30, deadline=None)
def test_the_stream_is_splitmix64_of_the_image_s_seed(seed: int, step: int, name: str) -> None:
    found = Draws(seed, step, ["x", "y"]).uniform(torch.empty(2, 3, 2), name)
    for row, image in enumerate("xy"):
        start = derive_seed(seed, "image", step, image, name)
        wanted = [(splitmix(start, k) >> 40 & 0xFFFFFF) / 2**24 for k in range(1, 7)]
        assert found[row].flatten().tolist() == pytest.approx(wanted, abs=0)


def test_numbers_follow_their_laws() -> None:
    draws = Draws(1, 2, ["a"])
    uniform, normal = (
        draws.uniform(torch.empty(1, 50_000)).flatten(),
        draws.normal(torch.empty(1, 50_000), "n").flatten(),
    )
    assert stats.kstest(uniform.numpy(), "uniform").pvalue > 0.001
    assert stats.kstest(normal.numpy(), "norm").pvalue > 0.001
    assert float(uniform.min()) >= 0
    assert float(uniform.max()) < 1
    assert abs(float(torch.corrcoef(torch.stack([uniform[:-1], uniform[1:]]))[0, 1])) < 0.02


def test_other_seed_step_image_or_name_gives_other_numbers() -> None:
    like = torch.empty(1, 64)
    streams = [
        Draws(seed, step, [image]).normal(like, name)
        for seed, step, image, name in [
            (0, 0, "a", ""),
            (1, 0, "a", ""),
            (0, 1, "a", ""),
            (0, 0, "b", ""),
            (0, 0, "a", "n"),
        ]
    ]
    cosines = torch.corrcoef(torch.cat(streams)) - torch.eye(5)
    assert float(cosines.abs().max()) < 0.5


def test_a_step_s_own_generator_does_not_depend_on_the_images() -> None:
    one, other = (torch.rand(4, generator=Draws(3, 9, ids).generator("mix")) for ids in (["a"], ["b", "c"]))
    assert torch.equal(one, other)
