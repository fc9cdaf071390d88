"""Smoothing with a noise level of its own for each image, chosen by a certified vote: `+dual:...` (T22)."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from robustvlm.certify.claims.local_noise import answering_alpha, deployed_for_noise
from robustvlm.certify.local_noise import LocalNoise, read_local_noise
from robustvlm.core.object_graph import fingerprint
from robustvlm.defenses.abstaining import _LEAST, Abstaining, by_mean, by_vote, minus_log_p
from robustvlm.defenses.classifier import ZeroShot
from robustvlm.defenses.smoothing import DEFAULT_N0, DUAL_FORM, RULE_USUAL, Rule, SmoothedVLM, dual_rule
from robustvlm.errors import UserError
from robustvlm.models import VLM
from robustvlm.models.vlm import fitted


class LocalVLM(SmoothedVLM):
    """A smoothed encoder whose noise level is chosen for each image, once there are classes to choose it by.

    As an encoder, without classes, it is the mean feature at the noise `noise.at`. Classified (`LocallyAbstaining`),
    the first half of its `n0` copies choose the noise level and the second half, at that level, answer.

    Args:
        base: the model to smooth. noise: how the level is chosen. n0: copies of an answer. rule: how they answer.

    Raises:
        UserError: the model has parts that are told the one noise level that they stand behind, or so few copies never
            decide anything.

    Example:
        >>> from robustvlm.models import load_model
        >>> LocalVLM(load_model("tiny"), LocalNoise((0.02, 0.05), (0.1,), 0.05), 64, rule=Rule(0.001, votes=True)).spec
        'tiny+dual:0.02,0.05:0.1:0.05:64:0.001:vote'
    """

    per_image = True

    def __init__(self, base: VLM, noise: LocalNoise, n0: int = DEFAULT_N0, *, rule: Rule) -> None:
        if any(getattr(part, "asks_for_noise", False) for part in base.modules()):
            raise UserError(
                f"the purifier or mapper of '{base.spec}' is told the one noise level that it stands behind, and "
                "+dual has several: use +smooth, or the encoder below"
            )
        answering = Rule(answering_alpha(rule.alpha, votes=rule.votes), rule.votes)
        need = 2 * max(Rule(rule.alpha, votes=True).least_copies, answering.least_copies)
        if n0 < need:
            raise UserError(
                f"half of {n0} copies never decide a noise level and the other half a class at alpha {rule.alpha:g}: "
                f"pass {need} or more"
            )
        super().__init__(base, noise.at, n0, rule=rule)
        self.spec = f"{base.spec}+dual:{noise}:{n0}:{rule}"
        self.law, self.choosing, self.class_rule = noise, deployed_for_noise(n0), answering

    def drawn_at(self, pixels: Tensor, n: int, sigmas: Tensor) -> Tensor:
        """Return features [B, n, D] of `n` noisy copies of each image, at noise levels [B]; differentiable."""
        clean = fitted(pixels, self.image_size, self.interpolation)
        if self._still:
            return self.encode_noisy(clean)[:, None].expand(-1, n, -1)
        wide = clean if clean.dtype == torch.float64 else clean.float()
        counts = self._counts(len(wide), n)
        again = len(counts) > 1 and torch.is_grad_enabled() and wide.requires_grad
        part = partial(checkpoint, self._at, use_reentrant=False, preserve_rng_state=True) if again else self._at
        return torch.cat([part(wide, sigmas, count) for count in counts], dim=1)

    def _at(self, wide: Tensor, sigmas: Tensor, count: int) -> Tensor:
        rows, scale = wide.repeat_interleave(count, dim=0), sigmas.to(wide).repeat_interleave(count)
        noisy = rows + scale.view(-1, 1, 1, 1) * torch.randn_like(rows)
        return self.encode_noisy(noisy).view(len(wide), count, -1)

    @property
    def fingerprint(self) -> str:
        return fingerprint({}, (super().fingerprint, "dual", str(self.law)))


def smooth_locally(vlm: VLM, noise: LocalNoise, n0: int = DEFAULT_N0, *, rule: Rule | None = None) -> LocalVLM:
    """Return `vlm` smoothed with a noise level for each image; see `LocalVLM`. It always abstains, at 0.001 by default.

    Example:
        >>> from robustvlm.models import load_model
        >>> smooth_locally(load_model("tiny"), read_local_noise("0.02,0.05:0.1:0.05")).rule
        Rule(alpha=0.001, votes=False)
    """
    return LocalVLM(vlm, noise, n0, rule=rule or Rule(RULE_USUAL))


def dual_as(vlm: VLM, written: str) -> LocalVLM:
    """Return `vlm` smoothed as an operator says that is written like `DUAL_FORM`.

    Raises:
        UserError: it is written otherwise, or a number is out of range.
    """
    noise, arguments = read_dual(written), written.split(":")[1:]
    n0 = arguments[3] if len(arguments) > 3 else str(DEFAULT_N0)
    if not (n0.isascii() and n0.isdigit() and len(n0) < 10):
        raise UserError(f"'+{written}': the number of copies must be a whole number, got '{n0}'")
    return smooth_locally(vlm, noise, int(n0), rule=dual_rule(written))


def read_dual(written: str) -> LocalNoise:
    """Return how an operator chooses the noise level.

    Example:
        >>> read_dual("dual:0.02,0.05:0.1:0.05:64").at
        0.05
    """
    arguments = written.split(":")[1:]
    if not 3 <= len(arguments) <= 6:
        raise UserError(f"'+{written}' must be written +{DUAL_FORM}, as +dual:0.05,0.1,0.2:0.1,0.3:0.1:256:0.001:vote")
    try:
        return read_local_noise(":".join(arguments[:3]))
    except UserError as error:
        raise UserError(f"'+{written}': {error}") from None


class LocallyAbstaining(Abstaining):
    """The deployed rule with noise chosen for each image: no answer unless level and class are both decided (T22).

    The level is decided by a two-sided exact binomial test at alpha of the two levels with the most votes, the class
    as in `Abstaining`, by the mean at alpha / 2. The last column is the lesser evidence less what is needed.

    Gradients go through the answer at the chosen level and, for the choice, through soft votes: a step along them may
    also lead to a level at which the class is another one.

    Args:
        inner: the zero-shot classifier on a `LocalVLM`.

    Example:
        >>> from robustvlm.models import load_model, zero_shot
        >>> vlm = smooth_locally(load_model("tiny"), LocalNoise((0.02, 0.05), (0.1,), 0.05), 64)
        >>> model = LocallyAbstaining(ZeroShot(zero_shot(vlm, ["apple", "dog"], ["{}"], cache=False)))
        >>> model(torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 3])
    """

    encoder: LocalVLM

    def __init__(self, inner: ZeroShot) -> None:
        super().__init__(inner)
        if not isinstance(self.encoder, LocalVLM):
            raise UserError(f"'{inner.spec}' chooses no noise: pass for example tiny+{DUAL_FORM}")

    @property
    def says(self) -> str:
        """How an answer comes about, in words."""
        rest = self.encoder.n0 - self.encoder.choosing
        chosen = f"(the first {self.encoder.choosing:,} of its copies, decided at the same alpha)"
        return f"{self.encoder.class_rule.words(rest)}; at {self.encoder.law.words} {chosen}"

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits and the evidence less what is needed, [B, K + 1]; fresh noise on every call."""
        vlm, text, scale = self.encoder, self.class_embeddings, self.logit_scale
        assert scale is not None
        votes, soft = self._votes(vlm.drawn(pixels, vlm.choosing), text, pixels.device.type)
        level = votes.argmax(dim=1)
        table = torch.tensor(vlm.law.sigmas, device=pixels.device)
        answer, needed = (by_vote if self.rule.votes else by_mean), math.log(1.0 / vlm.class_rule.alpha)
        rest = vlm.n0 - vlm.choosing
        features = vlm.drawn_at(pixels, rest, table[level])
        with torch.autocast(pixels.device.type, enabled=False):
            logits, evidence = answer(features, text, scale)
            if torch.is_grad_enabled() and soft.requires_grad:
                logits = logits + self._aside(pixels, soft, level, table, logits)
            decided = _decided(votes, soft) - math.log(1.0 / self.rule.alpha)
            column = torch.minimum(evidence - needed, decided).to(logits.dtype)
            column = column + _LEAST * ((column >= 0) & (column < _LEAST))
            return torch.cat([logits, column[:, None]], dim=1)

    def _votes(self, features: Tensor, text: Tensor, device: str) -> tuple[Tensor, Tensor]:
        """Return the votes [B, L] of features [B, n, D] for the levels, and soft shares [B, L] with a gradient."""
        with torch.autocast(device, enabled=False):
            near = (features.double() @ text.double().T).topk(2, dim=2).values
            margin = near[..., 0] - near[..., 1]
            cast = margin.isfinite()
            marks = torch.tensor(self.encoder.law.thresholds, dtype=margin.dtype, device=margin.device)
            margin = torch.where(cast, margin, 0.0)
            level = torch.bucketize(margin.detach(), marks, right=True)
            counted = (F.one_hot(level, len(marks) + 1) * cast[..., None]).sum(dim=1)
            width = margin.detach().std(dim=1, keepdim=True).nan_to_num().clamp_min(1e-3)[..., None]
            above = torch.sigmoid(4.0 * (margin[..., None] - marks) / width)
            ends = torch.ones_like(margin)[..., None]
            soft = torch.cat([ends, above], dim=2) - torch.cat([above, 0.0 * ends], dim=2)
            return counted, (soft * cast[..., None]).sum(dim=1) / cast.sum(dim=1, keepdim=True).clamp_min(1)

    def _aside(self, pixels: Tensor, soft: Tensor, level: Tensor, table: Tensor, logits: Tensor) -> Tensor:
        """Return zeros [B, K] with the gradient of choosing other levels, by what is answered there."""
        answer = by_vote if self.rule.votes else by_mean
        copies = max(2, (self.encoder.n0 - self.encoder.choosing) // 2)
        assert self.logit_scale is not None
        with torch.no_grad():
            others = []
            for i, sigma in enumerate(table):
                features = self.encoder.drawn_at(pixels, copies, sigma.expand(len(pixels)))
                there, _ = answer(features, self.class_embeddings, self.logit_scale)
                others.append(torch.where((level == i)[:, None], logits.detach(), there.to(logits)))
        turned = (soft - soft.detach()).to(logits.dtype)
        return torch.einsum("bl,lbk->bk", turned, torch.stack(others))


def _decided(votes: Tensor, soft: Tensor) -> Tensor:
    """Return minus the log p-value [B] that the first level leads the second, with the slope of soft shares."""
    leading = votes.topk(2, dim=1)
    found = [minus_log_p(top, top + second) for top, second in leading.values.tolist()]
    lead = soft.gather(1, leading.indices)
    slope = lead[:, 0] - lead[:, 1]
    return torch.tensor(found, dtype=torch.float64, device=votes.device) + (slope - slope.detach()).double()
