"""Certificates held against attacks: descent inside the certified ball for the image that breaks the claim."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from robustvlm.certify.claims import Quantity
from robustvlm.certify.normal import Array
from robustvlm.commands.certify.audit_balls import Ball, ball_of, lengths, unit
from robustvlm.core.seeds import derive_seed
from robustvlm.defenses import SmoothedVLM
from robustvlm.errors import UserError, is_out_of_memory

# Search inside a certified ball for the image that breaks the claim: l2 descent on the smoothed model, many starts

# From features [R, n, D] of n noisy copies of R points, and each row's aim [R], to values [R] to be made small.
Score = Callable[[Tensor, Tensor], Tensor]

STARTS = ("random", "curvature", "encoder", "correlation")
BLIND_STARTS = ("random", "correlation")
"""Kinds of starts without and with an encoder that gives no gradient."""
_MOMENTUM = 0.7
_ROUNDS = 3
_CORRELATED, _BLIND_CORRELATED = 1024, 4096
# Estimates from values alone are noisy: more draws, and a velocity that averages over more steps.
_BLIND_DRAWS = 128
_BLIND_MOMENTUM = 0.95


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How hard an audit tries.

    Attributes:
        starts: descents per image at the full radius; kinds take turns (see `STARTS`).
        steps: gradient steps per descent.
        draws: fresh noisy copies per gradient (expectation over transformation).
        choice: fresh copies that choose among the points found.
        evidence: fresh copies that judge the chosen one, and as many of the clean image.
        fractions: parts of the radius at which the bound is checked.
        alpha: probability that a true bound is called broken, over the whole audit.
    """

    starts: int = 8
    steps: int = 30
    draws: int = 16
    choice: int = 128
    evidence: int = 2048
    fractions: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    alpha: float = 0.001


def gradient(vlm: SmoothedVLM, x: Tensor, score: Score, aim: Tensor, draws: int, *, blind: bool = False) -> Tensor:
    """Return the gradient [R, 3, S, S] of the score at points x [R, 3, S, S], over fresh noise.

    Args:
        blind: estimate it from values alone, of more draws, for an encoder without a gradient.
    """
    one, draws = (_estimate, max(draws, _BLIND_DRAWS)) if blind else (_gradient, draws)
    return torch.cat([one(vlm, x[rows], score, aim[rows], draws) for rows in _groups(vlm, len(x), draws)])


def has_gradient(vlm: SmoothedVLM, points: Tensor, score: Score, aim: Tensor) -> bool:
    """Whether the encoder gives a gradient at points [R, 3, S, S] that is not zero everywhere; no random state is used.

    Parts that cut the gradient make torch refuse; others (rounding, steps, saturation) make it vanish.
    """
    with torch.random.fork_rng(devices=[vlm.device] if vlm.device.type == "cuda" else []):
        try:
            return bool(gradient(vlm, points, score, aim, 4).abs().amax() > 0.0)
        except Exception as error:  # the encoder may be the user's code, which fails in any way
            if is_out_of_memory(error):
                raise
            return False


def _estimate(vlm: SmoothedVLM, x: Tensor, score: Score, aim: Tensor, draws: int) -> Tensor:
    """Return `E[noise score(x + sigma noise)] / sigma`, a smoothed score's gradient (Stein), from opposed pairs."""
    half = max(1, draws // 2)
    noise = torch.randn(len(x), half, *x.shape[1:], device=x.device, dtype=x.dtype)
    moved = (vlm.sigma * torch.stack([noise, -noise], dim=1)).flatten(1, 2)
    with torch.no_grad():
        features = vlm.encode_noisy((x[:, None] + moved).flatten(0, 1))[:, None]
        values = torch.nan_to_num(score(features, aim.repeat_interleave(2 * half))).view(len(x), 2, half)
    return torch.einsum("rn,rnchw->rchw", values[:, 0] - values[:, 1], noise) / (2.0 * half * vlm.sigma)


def _gradient(vlm: SmoothedVLM, x: Tensor, score: Score, aim: Tensor, draws: int) -> Tensor:
    x = x.detach().requires_grad_()
    noisy = x.repeat_interleave(draws, dim=0)
    if draws > 1:
        # Noise by itself: with images rounded first (8bit), all points near the clean one would have its gradient.
        noisy = noisy + vlm.noise.fresh(torch.zeros_like(noisy))
    features = vlm.encode_noisy(noisy).view(len(x), draws, -1)
    (grad,) = torch.autograd.grad(score(features, aim).sum(), x)
    return torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0)


def descend(
    vlm: SmoothedVLM,
    clean: Tensor,
    start: Tensor,
    eps: float,
    score: Score,
    aim: Tensor,
    effort: Effort,
    *,
    blind: bool = False,
    ball: Ball | None = None,
) -> Tensor:
    """Return the points [R, 3, S, S] where normalised momentum descent from `clean + start` ends, inside the ball.

    Pixels are not clipped: a certificate holds on the whole ball, outside of [0, 1] too.
    """
    delta, velocity, ball = start, torch.zeros_like(start), ball or Ball()
    for step in range(effort.steps):
        grad = gradient(vlm, clean + delta, score, aim, effort.draws, blind=blind)
        velocity = (_BLIND_MOMENTUM if blind else _MOMENTUM) * velocity + unit(grad)
        size = eps * (1.0 - step / effort.steps)
        delta = ball.inside(delta - size * ball.direction(velocity), eps)
    return clean + delta


def starts(
    vlm: SmoothedVLM, clean: Tensor, eps: float, score: Score, aim: Tensor, *, blind: bool = False
) -> tuple[Tensor, list[str]]:
    """Return one start [R, 3, S, S] of length `eps` per aim, and its kind.

    * random: uniform on the sphere;
    * curvature: descent directions at nearby points, iterated, which turns towards the directions in which the smoothed
      feature moves most (at the clean image itself the gradient of a cosine to its own feature vanishes);
    * encoder: where a descent on the plain encoder ends, without noise;
    * correlation: away from the noise that goes with high values, `E[noise score] = sigma^2 grad` (Stein's identity),
      which needs no gradient of the encoder.

    With `blind`, those that need none: random and correlation.
    """
    known = BLIND_STARTS if blind else STARTS
    kinds = [known[i % len(known)] for i in range(len(aim))]
    points = eps * unit(torch.randn(len(aim), *clean.shape[1:], device=clean.device, dtype=clean.dtype))
    correlate = partial(_correlate, draws=_BLIND_CORRELATED if blind else _CORRELATED)
    for kind, move in (("curvature", _turn), ("encoder", _turn_plain), ("correlation", correlate)):
        rows = [i for i, name in enumerate(kinds) if name == kind]
        if rows:
            points[rows] = eps * unit(move(vlm, clean, points[rows], score, aim[rows]))
    return points, kinds


def _turn(vlm: SmoothedVLM, clean: Tensor, points: Tensor, score: Score, aim: Tensor) -> Tensor:
    for _ in range(_ROUNDS):
        points = _downhill(points, gradient(vlm, clean + 0.2 * points, score, aim, 16))
    return points


def _turn_plain(vlm: SmoothedVLM, clean: Tensor, points: Tensor, score: Score, aim: Tensor) -> Tensor:
    for _ in range(_ROUNDS):
        points = _downhill(points, gradient(vlm, clean + points, score, aim, 1))
    return points


def _downhill(points: Tensor, grad: Tensor) -> Tensor:
    """Return steps against the gradient, as long as the points are; where it vanishes, the points themselves."""
    return lengths(points) * unit(1e-3 * unit(points) - unit(grad))


def _correlate(vlm: SmoothedVLM, clean: Tensor, points: Tensor, score: Score, aim: Tensor, *, draws: int) -> Tensor:
    total = 1e-6 * unit(points)
    for _ in range(draws // vlm.rows_per_pass + 1):
        noise = torch.randn(vlm.rows_per_pass, *clean.shape[1:], device=clean.device, dtype=clean.dtype)
        with torch.no_grad():
            features = vlm.encode_noisy(clean + vlm.sigma * noise)[:, None]
        for row, goal in enumerate(aim):
            values = torch.nan_to_num(score(features, goal.expand(len(noise))))
            total[row] -= ((values - values.mean()).view(-1, 1, 1, 1) * noise).sum(dim=0)
    return total


def _groups(vlm: SmoothedVLM, rows: int, draws: int) -> list[slice]:
    """Split rows so that a pass has at most `rows_per_pass` noisy images, or the draws of one point."""
    size = max(1, vlm.rows_per_pass // draws)
    return [slice(i, i + size) for i in range(0, rows, size)]


# Certificates held against attacks: how low an attacked smoothed model gets, beside the bound that it must keep

# Bounds hold strictly inside the radius, and up to floating point.
INSIDE = 1.0 - 1e-5

BLIND = ", without a gradient"
"""What is added to a start's kind where the encoder gave no gradient."""


class Finding(BaseModel):
    """The lowest value that the audit reached for one image at one distance, beside the certified bound.

    `upper` is an upper confidence bound of the true value at the point found: the bound counts as broken only if even
    that is below it, so that Monte-Carlo error is never called a violation (error probability: see `Effort.alpha`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_id: str
    fraction: float
    eps: float
    bound: float
    lowest: float
    upper: float
    start: str

    @property
    def broken(self) -> bool:
        """Whether the certified bound is shown to be false."""
        return self.upper < self.bound


@dataclass(frozen=True, kw_only=True)
class Target:
    """A certificate to audit: pixels [1, 3, S, S] at the model's resolution, its radius, and what it claims.

    `claim` is made from two independent samples of the clean image's features: one to steer by, one as evidence.
    """

    image_id: str
    pixels: Tensor
    radius: float
    claim: Callable[[Array, Array], Quantity]

    def judged(
        self, quantity: Quantity, evidence: Array, *, eps: float, fraction: float, alpha: float, start: str
    ) -> Finding:
        """Return what features [n, D] of a point at distance `eps`, of noise that chose nothing, say of the bound."""
        return Finding(
            image_id=self.image_id,
            fraction=fraction,
            eps=eps,
            bound=quantity.bound(eps),
            lowest=quantity.value(evidence),
            upper=quantity.upper(evidence, alpha),
            start=start,
        )


def audit_image(vlm: SmoothedVLM, target: Target, effort: Effort, *, alpha: float, seed: int) -> list[Finding]:
    """Attack one certificate at every fraction of its radius; the search starts anew at the full radius.

    Args:
        vlm: the smoothed model with the certificate's noise level.
        alpha: probability of calling a true bound broken, over the findings of this image.
        seed: of the run; noise is fresh, from streams of its own.

    Raises:
        UserError: the certificate is about another noise level than the model's.
    """
    with looked_at(vlm, target, effort, seed) as (clean, claim):
        level = getattr(claim, "sigma", None)
        if level not in (None, vlm.sigma):
            raise UserError(f"the certificate is about noise of {level}, the model's is {vlm.sigma}")
        ball, full = ball_of(vlm.noise.threat), target.radius * INSIDE
        blind = not _sees(vlm, clean, full, claim)
        aim = torch.arange(effort.starts, device=vlm.device) // len(BLIND_STARTS if blind else STARTS)
        begin, kinds = starts(vlm, clean, full, claim.score, aim, blind=blind)
        begin = ball.started(begin, full)
        found = descend(vlm, clean, begin, full, claim.score, aim, effort, blind=blind, ball=ball)
        findings = []
        for fraction in sorted(effort.fractions, reverse=True):
            eps = fraction * full
            points = ball.pushed(clean, found, eps)
            if fraction < 1.0:
                points = _refined(vlm, clean, points, eps, claim, aim, effort, blind=blind, ball=ball)
            values = [claim.value(noisy_features(vlm, point[None], effort.choice)) for point in points]
            best = int(np.argmin(values))
            evidence = noisy_features(vlm, points[best : best + 1], effort.evidence)
            start, share = kinds[best % len(kinds)] + (BLIND if blind else ""), alpha / len(effort.fractions)
            findings.append(target.judged(claim, evidence, eps=eps, fraction=fraction, alpha=share, start=start))
    return findings[::-1]


@contextlib.contextmanager
def looked_at(vlm: SmoothedVLM, target: Target, effort: Effort, seed: int) -> Iterator[tuple[Tensor, Quantity]]:
    """Yield the clean image and the quantity that its certificate bounds, under noise of an audit's own streams."""
    cuda = [vlm.device] if vlm.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(derive_seed(seed, target.image_id, "audit"))
        clean = target.pixels.to(vlm.device)
        yield (
            clean,
            target.claim(noisy_features(vlm, clean, effort.choice), noisy_features(vlm, clean, effort.evidence)),
        )


def _sees(vlm: SmoothedVLM, clean: Tensor, eps: float, claim: Quantity) -> bool:
    """Whether there is a gradient to follow, at the clean image or at a random point of the ball."""
    draws = torch.Generator().manual_seed(0)
    aside = torch.randn(clean.shape, generator=draws).to(clean.device, clean.dtype)
    points = torch.cat([clean, clean + eps * unit(aside)])
    return has_gradient(vlm, points, claim.score, torch.zeros(len(points), dtype=torch.long, device=clean.device))


def _refined(
    vlm: SmoothedVLM,
    clean: Tensor,
    drawn_in: Tensor,
    eps: float,
    claim: Quantity,
    aim: Tensor,
    effort: Effort,
    *,
    blind: bool,
    ball: Ball,
) -> Tensor:
    """Return points at a smaller distance: those of the full radius drawn in, as they are and after a short descent."""
    short = Effort(steps=max(1, effort.steps // 4), draws=effort.draws)
    refined = descend(vlm, clean, drawn_in - clean, eps, claim.score, aim, short, blind=blind, ball=ball)
    return torch.cat([drawn_in, ball.pushed(clean, refined, eps)])


def noisy_features(vlm: SmoothedVLM, pixels: Tensor, n: int) -> Array:
    """Return features [n, D] of one image [1, 3, S, S] under fresh noise."""
    with torch.no_grad():
        return vlm.noisy_features(pixels, n)[0].double().cpu().numpy()


def worst(findings: Sequence[Finding]) -> Finding | None:
    """Return the finding with the least room above its bound, or None when there is none."""
    return min(findings, key=lambda finding: finding.lowest - finding.bound, default=None)
