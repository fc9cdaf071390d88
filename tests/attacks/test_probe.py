"""Planted faults: each is seen by the probe, and a sound model raises none."""

from __future__ import annotations

import pytest
import torch
from toy import Curved, images

from robustvlm.attacks import Oracle
from robustvlm.attacks.probe import probe


class Coupled(Curved):
    """Normalises logits over the batch, as batch statistics at test time do."""

    def forward(self, x):
        logits = super().forward(x)
        return (logits - logits.mean(0)) / (logits.std(0) + 1e-6)


class Random(Curved):
    def forward(self, x):
        return super().forward(x + 0.1 * torch.randn_like(x))


class Quantised(Curved):
    """Rounds the pixels: no gradient passes."""

    def forward(self, x):
        return super().forward(torch.round(x * 4) / 4)


class Sick(Curved):
    def forward(self, x):
        return super().forward(x) * torch.where(x[:, :1, 0, 0] > 0.5, float("nan"), 1.0)


def ask(model):
    return probe(Oracle(model), images(16), torch.zeros(16, dtype=torch.int64))


def test_a_sound_model_raises_nothing():
    found = ask(Curved())
    assert found.finite
    assert not found.random
    assert not found.coupled
    assert found.zero_gradients == 0
    assert found.rungs[0] == 16


def test_batch_coupling_is_seen():
    assert ask(Coupled()).coupled


class Seldom(Curved):
    """Gives the opposite of its answer in three of ten draws, image by image."""

    def forward(self, x):
        return super().forward(x) * torch.where(torch.rand(len(x), 1) < 0.3, -1.0, 1.0)


def test_what_draws_seldom_is_random_and_not_coupled():
    found = [probe(Oracle(Seldom(), seed=seed), images(6), torch.zeros(6, dtype=torch.int64)) for seed in range(60)]
    assert not any(one.coupled for one in found)
    assert sum(one.random for one in found) >= 58, "asking twice would miss it in one of 26"


def test_randomness_is_seen_and_not_taken_for_coupling():
    found = ask(Random())
    assert found.random
    assert not found.coupled
    assert found.rungs == (16, 8, 4, 2, 1), "no two answers are the same to the bit in any batch"


def test_missing_gradients_are_seen():
    assert ask(Quantised()).zero_gradients == 1.0


def test_nan_is_seen():
    assert not ask(Sick()).finite


@pytest.mark.equality
def test_rungs_are_batch_sizes_on_which_rows_are_the_same_to_the_bit():
    class Shaped(Curved):
        """Rounds differently below eight rows, as many matrix kernels do."""

        def forward(self, x):
            # Row by row, so that no kernel of this machine adds a rounding of its own.
            rows = torch.cat([super(Shaped, self).forward(row[None]) for row in x])
            return rows * (1.0 if len(x) >= 8 else 1.0 + 1e-6)

    found = ask(Shaped())
    assert found.rungs == (16, 8)


@pytest.mark.parametrize("count", [1, 2])
def test_few_images_are_enough(count):
    found = probe(Oracle(Curved()), images(count), torch.zeros(count, dtype=torch.int64))
    assert found.finite
    assert not found.coupled


class Running(Curved):
    """Mixes every row with the rows before it: the first row never notices."""

    def forward(self, x):
        return super().forward(x).cumsum(0)


class ShapedWithoutGradient(Curved):
    """Rounds by the batch size, but only when no gradient is asked for, as fused inference kernels may."""

    def forward(self, x):
        logits = super().forward(x)
        return logits if torch.is_grad_enabled() else logits * (1 + 1e-6 * len(x))


def test_rows_that_look_only_at_earlier_ones_are_coupled_too():
    assert ask(Running()).coupled


def test_smaller_batches_must_give_the_same_bits_without_a_gradient_too():
    assert ask(Curved()).rungs != (16,)
    assert ask(ShapedWithoutGradient()).rungs == (16,)


@pytest.mark.equality
def test_rungs_are_sizes_on_which_an_image_gets_the_same_bits_at_every_place():
    class RestApart(Curved):
        """Rounds the rows behind the last whole block of six in another way, as kernels of CPUs with AVX2 do."""

        def forward(self, x):
            place = torch.arange(len(x))[:, None]
            return super().forward(x) * torch.where(place < len(x) // 6 * 6, 1.0, 1.0 + 1e-6)

    oracle = Oracle(RestApart())
    found = probe(oracle, images(8), torch.zeros(8, dtype=torch.int64))
    assert found.rungs[0] < 8
    answers = [oracle.confirm(images(1).expand(size, -1, -1, -1)) for size in found.rungs]
    assert all(torch.equal(row, answers[0][0]) for answer in answers for row in answer)
    assert (
        found.fewer_than(8)
        == f"{found.rungs[0]} lanes are used, as in more the last digits of an answer tell an image's place"
    )
    assert found.fewer_than(found.rungs[0]) is None
    assert "memory did not suffice" in (found.fewer_than(16) or "")
