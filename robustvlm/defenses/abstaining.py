"""A smoothed classifier that answers only where its copies decide: one rule, deployed, attacked and certified."""

from __future__ import annotations

import math
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from robustvlm.defenses.classifier import Classifier, ZeroShot
from robustvlm.defenses.smoothing import SmoothedVLM
from robustvlm.errors import UserError
from robustvlm.models import VLM

_LEAST = 1e-5
"""What the last column is at least where the model answers."""


class Abstaining(Classifier):
    """Logits, and by how much the copies decide for the leading class: no answer unless that is above 0 (T10).

    It is `robustvlm.certify.predict`, or `vote_predict` of a rule by votes, as a module that attacks can climb: the
    last column is the log evidence less ln(1 / alpha). By the mean, logits are those of the first half's mean, and the
    evidence is the least log wealth of bets of the second half against one rival each. By votes, logits are log shares
    of votes, and the evidence is minus the log of the test's p-value; gradients are those of mean probabilities.

    Args:
        inner: the zero-shot classifier on a `SmoothedVLM` with a rule.

    Raises:
        UserError: the encoder has no rule.

    Example:
        >>> from robustvlm.defenses.smoothing import Rule, smooth
        >>> from robustvlm.models import load_model, zero_shot
        >>> vlm = smooth(load_model("tiny"), 0.1, 32, rule=Rule(0.01))
        >>> model = Abstaining(ZeroShot(zero_shot(vlm, ["apple", "dog"], ["{}"], cache=False)))
        >>> model.predict(torch.rand(2, 3, 64, 64)).abstained.shape, model(torch.rand(2, 3, 64, 64)).shape
        (torch.Size([2]), torch.Size([2, 3]))
    """

    abstains = withholds = True
    random_draws = 10
    """Draws that a gradient is averaged over: copies that all agree do not show that it is random."""

    def __init__(self, inner: ZeroShot) -> None:
        super().__init__(
            spec=inner.spec,
            class_names=inner.class_names,
            logit_scale=inner.logit_scale,
            can_reject=True,
            **inner.framing.options(),
        )
        if not isinstance(inner.vlm, SmoothedVLM) or inner.vlm.rule is None:
            raise UserError(f"'{inner.spec}' has no rule of abstention: pass for example tiny+smooth:0.25:64:0.001")
        self.inner, self.encoder, self.rule = inner, inner.vlm, inner.vlm.rule

    @property
    def vlm(self) -> VLM:
        return self.encoder

    @property
    def class_embeddings(self) -> Tensor:
        return self.inner.class_embeddings

    @property
    def fingerprint(self) -> str:
        return self.inner.fingerprint

    @property
    def says(self) -> str:
        """How an answer comes about, in words."""
        return self.rule.words(self.encoder.n0)

    def refusal(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log evidence of each image and ln(1 / alpha), which it has to exceed; [N] each."""
        needed = torch.full_like(output[:, -1], math.log(1.0 / self.rule.alpha))
        return output[:, -1] + needed, needed

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits and the evidence less what is needed, [B, K + 1]; fresh noise on every call."""
        features = self.encoder.drawn(pixels, self.encoder.n0)
        with torch.autocast(pixels.device.type, enabled=False):
            answer = by_vote if self.rule.votes else by_mean
            assert self.logit_scale is not None
            logits, evidence = answer(features, self.class_embeddings, self.logit_scale)
            column = (evidence - math.log(1.0 / self.rule.alpha)).to(logits.dtype)
            # Evidence that is just enough answers, as in `vote_predict`, and an image is accepted above 0 only.
            column = column + _LEAST * ((column >= 0) & (column < _LEAST))
            return torch.cat([logits, column[:, None]], dim=1)


def by_mean(features: Tensor, text: Tensor, logit_scale: float) -> tuple[Tensor, Tensor]:
    """Return logits [B, K] of the first half's mean feature, and the second half's log wealth [B] for their argmax.

    Args:
        features: [B, n, D] of fresh noise, n >= 2; failed copies as rows that are not finite.
        text: unit vectors [K, D].

    Example:
        >>> rows = torch.tensor([[0.9, 0.43589]]).expand(1, 256, -1)
        >>> logits, evidence = by_mean(rows, torch.eye(2), 1.0)
        >>> logits.argmax(1).item(), round(evidence.item(), 2)
        (0, 33.61)
    """
    half = features.shape[1] // 2
    first = torch.nan_to_num(features[:, :half], nan=0.0, posinf=0.0, neginf=0.0).mean(dim=1)
    logits = logit_scale * F.normalize(first, dim=-1).to(text.dtype) @ text.T
    labels = logits.argmax(dim=1)
    # An image at a time, and made again for its gradient: copies times classes of a large vocabulary fill the memory.
    again = torch.is_grad_enabled() and features.requires_grad
    least = partial(checkpoint, _least_wealth, use_reentrant=False) if again else _least_wealth
    evidence = [least(rows, text, int(label)) for rows, label in zip(features[:, half:], labels, strict=True)]
    return logits, torch.stack(evidence)


def _least_wealth(rows: Tensor, text: Tensor, label: int) -> Tensor:
    """Return the least log wealth over the rivals of `label`, of bets that its margins are above 0 on average."""
    from robustvlm.certify.means import FRACTIONS  # certificates' mathematics, which attacks do without

    wide = text.double()
    unit = F.normalize(rows.double(), dim=-1)
    keep = torch.arange(len(text), device=text.device) != label
    apart = (wide[label] - wide[keep]).norm(dim=1)
    cosines = unit @ wide.T
    # A rival with the label's own vector cannot be beaten; a failed copy counts as the worst.
    margins = torch.where(apart > 1e-9, (cosines[:, label, None] - cosines[:, keep]) / apart.clamp_min(1e-9), 0.0)
    margins = torch.nan_to_num(margins, nan=-1.0, posinf=-1.0, neginf=-1.0).clamp(-1.0, 1.0)
    gains = torch.stack([torch.log1p(fraction * margins).sum(dim=0) for fraction in FRACTIONS])
    return (gains.logsumexp(dim=0) - math.log(len(FRACTIONS))).amin()


def by_vote(features: Tensor, text: Tensor, logit_scale: float) -> tuple[Tensor, Tensor]:
    """Return log shares of votes [B, K], (votes + 1 / K) / (n + 1), and minus the log p-value [B] that the first leads.

    Example:
        >>> rows = torch.cat([torch.tensor([[1.0, 0.0]]).expand(90, -1), torch.tensor([[0.0, 1.0]]).expand(10, -1)])
        >>> logits, evidence = by_vote(rows[None], torch.eye(2), 1.0)
        >>> logits.argmax(1).item(), round(evidence.item(), 1)
        (0, 38.0)
    """
    scores = logit_scale * features.to(text.dtype) @ text.T
    cast = scores.isfinite().all(dim=2)
    scores = torch.where(cast[:, :, None], scores, 0.0)
    votes = (F.one_hot(scores.argmax(dim=2), len(text)) * cast[:, :, None]).sum(dim=1)
    soft = (scores.softmax(dim=2) * cast[:, :, None]).sum(dim=1) + 1e-6
    logits = ((votes + 1.0 / len(text)) / (features.shape[1] + 1)).log().to(soft.dtype)
    leading = votes.topk(2, dim=1)
    pairs = leading.values.tolist()
    found = [minus_log_p(top, top + second) for top, second in pairs]
    lead = soft.gather(1, leading.indices)
    slope = lead[:, 0] - lead[:, 1]  # of the log p-value the sign and, roughly, the size
    evidence = torch.tensor(found, dtype=torch.float64, device=features.device) + (slope - slope.detach()).double()
    return logits + (soft.log() - soft.log().detach()), evidence


@lru_cache(maxsize=65_536)
def minus_log_p(top: int, total: int) -> float:
    """Return minus the log of the two-sided exact binomial p-value of `top` of `total` votes.

    Example:
        >>> round(minus_log_p(9, 10), 3), minus_log_p(0, 0)
        (3.84, 0.0)
    """
    from robustvlm.certify.classes import vote_p_value  # certificates' mathematics, which attacks do without

    return math.log(1.0 / max(vote_p_value(top, total), 1e-300))
