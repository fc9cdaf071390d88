"""Whether an encoder that draws at random does so anew for every image: a test of one noisy image, many times over.

Certificates count the noisy copies of an image as independent. An encoder that draws once for a whole call (a random
crop or time step, say) makes all rows of a call depend on each other, and one with batch statistics makes an image
depend on its company; noise on top of that hides both from a comparison of single answers, not from their laws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CALLS, ROWS = 8, 12
"""Calls with one image in every row, and as many with other images in every second row: 192 rows in all."""

_PERMUTATIONS = 1999
_LEVEL = 1e-3
_ROUNDS = 3
# Three groupings, two sides each, every one a permutation test at 0.001 (exact: independent rows may be relabelled at
# will), and an encoder is refused only if three rounds of fresh calls all find something: (6 * 0.001)^3 < 3e-7.

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
    count = min(ROWS, len(noisy))
    same = noisy[:1].expand(count, -1, -1, -1).contiguous()
    mixed = same.clone()
    # Of half the contrast, and dark beside a bright image or bright beside a dark one: the others differ in mean and
    # spread, which is what batch statistics are made of.
    away = -0.5 if float(noisy[0].mean()) > 0.5 else 1.0
    mixed[1::2] = 0.5 * noisy.flip(0)[: count // 2] + away
    return Answers(
        torch.stack([encode(same) for _ in range(CALLS)]),
        torch.stack([encode(mixed)[::2] for _ in range(CALLS)]),
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
