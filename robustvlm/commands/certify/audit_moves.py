"""Certificates of threats with few parameters held against attacks: every move that there is, on a grid.

One, two or three parameters leave nothing to descend along: moves of all directions and lengths within the radius are
tried, then those between them where the values fall, the most promising again with more copies, and the worst of these
is judged on noise that chose nothing.
"""

import numpy as np
import torch
from torch import Tensor

from robustvlm.certify.claims import Quantity
from robustvlm.certify.normal import Array
from robustvlm.certify.threats import Moving
from robustvlm.commands.certify.audit_search import INSIDE, Effort, Finding, Target, looked_at, noisy_features
from robustvlm.defenses import SmoothedVLM

_AGAIN = 4
"""How many moves are looked at again, and with how many times the copies."""
_FINER, _BETWEEN = 20, 4
"""How many times as fine the second grid is, and the part of the first one's size that is tried of it."""
_SURER = 2
"""How many times the evidence of a descent: what is saved in the search."""
KIND = "grid of moves"


def audit_moves(
    vlm: SmoothedVLM, target: Target, effort: Effort, *, threat: Moving, alpha: float, seed: int
) -> list[Finding]:
    """Attack one certificate at every fraction of its radius with moves of all directions and lengths within it.

    Args:
        vlm: the smoothed model with the certificate's noise. threat: what the certificate is about.
        alpha: probability of calling a true bound broken, over the findings of this image.
        seed: of the run; noise is fresh, from streams of its own.
    """
    with looked_at(vlm, target, effort, seed) as (clean, claim):
        count = max(8, effort.starts * effort.steps // 4)
        found = []
        for fraction in sorted(effort.fractions):
            eps = fraction * target.radius * INSIDE
            moves = threat.inside(eps, count)
            if not len(moves):  # no whole shift is so short
                continue
            finer = threat.inside(eps, _FINER * count) if threat.moves > 1 or threat.bumpy else moves[:0]
            worst = _worst(vlm, clean, moves, finer, claim, effort, threat)
            evidence = noisy_features(vlm, _moved(clean, worst, threat), _SURER * effort.evidence)
            share = alpha / len(effort.fractions)
            found.append(target.judged(claim, evidence, eps=eps, fraction=fraction, alpha=share, start=KIND))
    return found


def _worst(
    vlm: SmoothedVLM, clean: Tensor, moves: Array, finer: Array, claim: Quantity, effort: Effort, threat: Moving
) -> Array:
    """Return the move [P] whose copies give the lowest value, of a grid and some of a finer one, the lowest few judged
    again."""

    def values(some: Array, copies: int) -> Array:
        rows = (noisy_features(vlm, _moved(clean, move, threat), copies) for move in some)
        return np.array([claim.value(features) for features in rows])

    found = values(moves, effort.choice)
    if between := between_moves(moves, found, finer, len(moves) // _BETWEEN):
        moves = np.concatenate([moves, finer[between]])
        found = np.concatenate([found, values(finer[between], effort.choice)])
    lowest = moves[np.argsort(found, kind="stable")[:_AGAIN]]
    return np.asarray(lowest[values(lowest, _AGAIN * effort.choice).argmin()])


def between_moves(moves: Array, values: Array, finer: Array, count: int) -> list[int]:
    """Return which of finer moves [M, P] to try, from the values [N] of moves [N, P]: about `count` of them.

    Half are those that lie farthest down the slope which fits all values best (one move's value is noisy, the slope of
    all is not), half are next to the move of the lowest value.

    Example:
        >>> coarse, fine = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]]), np.array([[0.6, 0.8], [0.8, -0.6]])
        >>> between_moves(coarse, coarse @ [-0.6, -0.8], fine, 2)
        [0]
    """
    if not len(finer):
        return []
    slope = np.linalg.lstsq(np.column_stack([moves, np.ones(len(moves))]), np.nan_to_num(values), rcond=None)[0][:-1]
    apart = np.linalg.norm(finer - moves[np.argmin(values)], axis=1)
    half = max(1, count // 2)
    down, near = (np.argsort(order, kind="stable")[:half].tolist() for order in (finer @ slope, apart))
    return list(dict.fromkeys([*down, *near]))


def _moved(clean: Tensor, move: Array, threat: Moving) -> Tensor:
    return threat.move(clean, torch.as_tensor(move[None], dtype=torch.float32, device=clean.device))
