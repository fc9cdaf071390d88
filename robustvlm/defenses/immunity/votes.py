"""The open-set rule of a smoothed model: noisy copies vote for a class or for none, and it answers what they decide."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.core.object_graph import fingerprint
from robustvlm.defenses.abstaining import minus_log_p
from robustvlm.defenses.classifier import Answers, Classifier
from robustvlm.defenses.immunity.classifier import ImmunisedClassifier
from robustvlm.defenses.immunity.state import Immunity
from robustvlm.defenses.smoothing import SmoothedVLM
from robustvlm.errors import UserError
from robustvlm.models import VLM

if TYPE_CHECKING:
    from robustvlm.certify.threats import Noise

_LEAST = 1e-5
"""By how much evidence that is just enough counts as more than that."""


class VotingVLM(VLM):
    """What an immunised model says of an image as a feature: an axis for each class, and the last for none of them.

    A feature [K + 1] is the square root of the softmax of logits, which has unit length. Those of the classes are the
    head's; that of "none" is the largest of them less the acceptance score, in the same units, so that it is the
    largest exactly where the head rejects. The whole model stands behind the noise, head and thresholds included.

    Args:
        base: the adapted encoder, not smoothed. immunity: head, with the classes in order and the thresholds in use.
    """

    def __init__(self, base: VLM, immunity: Immunity) -> None:
        super().__init__(spec=base.spec, logit_scale=1.0, **base.framing.options())
        self.immunity = immunity
        self.judge = ImmunisedClassifier(base, immunity)
        self._anchor = self._anchor.to(base.device)
        self.eval().requires_grad_(False)

    def at_noise(self, sigma: float) -> VLM:
        told = self.judge.encoder.at_noise(sigma)
        return self if told is self.judge.encoder else VotingVLM(told, self.immunity)

    def _image_features(self, pixels: Tensor) -> Tensor:
        output = self.judge(pixels)
        logits, scale = output[:, :-1], self.judge.logit_scale or 1.0
        none = logits.amax(dim=1) - scale * output[:, -1]
        return (0.5 * torch.cat([logits, none[:, None]], dim=1).log_softmax(dim=1)).exp()

    def _text_features(self, texts: list[str]) -> Tensor:
        return self.judge.encoder.embed_text(texts)

    def class_vectors(self, class_names: Sequence[str]) -> Tensor:
        """Return the axes [K, K + 1] of the classes."""
        known = {name: place for place, name in enumerate(self.judge.class_names)}
        return torch.eye(len(known) + 1, device=self.device)[[known[name] for name in class_names]]

    def _identity(self) -> Iterable[str]:
        return ("votes of copies", self.judge.fingerprint)


def voting(encoder: VLM, immunity: Immunity, noise: Noise, where: str) -> VLM:
    """Return the votes of single copies at a noise as an encoder, smoothed if `encoder` is; `where` names the model.

    Raises:
        UserError: there are no thresholds for copies at this noise, or hooks of the caller's stand behind the noise.
    """
    judged = at_copies(immunity, noise, where)
    if not isinstance(encoder, SmoothedVLM):
        return VotingVLM(encoder, judged)
    if type(encoder) is not SmoothedVLM:
        raise UserError(
            f"'{encoder.spec}': the copies of an immunised model vote under one noise for all images: pass "
            f"{where}+smooth:{noise}:N0:ALPHA:vote"
        )
    if encoder.purifier is not None or encoder.mapper is not None:
        raise UserError(f"'{encoder.spec}' has hooks behind its noise: build a pipeline of the model with them")
    return SmoothedVLM(
        VotingVLM(encoder.base, judged),
        encoder.sigma,
        encoder.n0,
        rule=encoder.rule,
        rows_per_pass=encoder.rows_per_pass,
        threat=encoder.noise.threat.name,
    )


def at_copies(immunity: Immunity, noise: Noise, where: str) -> Immunity:
    """Return the immunity with the thresholds for single copies at a noise in place of its own.

    Raises:
        UserError: it has none for this noise.
    """
    sigma = noise.sigma
    if not noise.threat.of_pixels or sigma not in immunity.copies:
        levels = ", ".join(f"{level:g}" for level in sorted(immunity.copies))
        known = f"at noise of {levels} only" if levels else "at no noise"
        raise UserError(
            f"'{where}' has thresholds for copies that vote {known}: "
            f"run `robustvlm immunize ... --sigma {sigma:g}`, from images, and put +smooth:{sigma:g} behind the result"
        )
    return replace(immunity, thresholds=immunity.copies[sigma], noisy={}, copies={})


class OpenVotes(Classifier):
    """The deployed open-set rule by vote: a class, "none of them", or no answer where the copies do not decide (T28).

    Each of n0 fresh copies is put into a class or rejected, by the head with thresholds for single copies at this
    noise. Whatever has most votes, a class or "none", is answered where it beats the second in a two-sided exact
    binomial test at the rule's alpha. The output has a log share of votes for each class, and as last column the log
    evidence for the leading class less ln(1 / alpha), or, where "none" leads, minus its own less ln(1 / alpha): a class
    is answered above 0, "none" below -2 ln(1 / alpha), and between them nothing is decided.

    Gradients are those of mean probabilities, as of `Abstaining`.

    Args:
        encoder: smoothed adapted encoder with a rule by vote. immunity: with the classes in the wanted order.

    Raises:
        UserError: a rule by the mean, or no thresholds for the noise.
    """

    withholds = True
    random_draws = 10
    """Draws that a gradient is averaged over: copies that all agree do not show that it is random."""

    def __init__(self, encoder: SmoothedVLM, immunity: Immunity, where: str) -> None:
        super().__init__(
            spec=encoder.spec,
            class_names=immunity.class_names,
            **encoder.framing.options(),
            logit_scale=encoder.logit_scale,
            can_reject=True,
        )
        if encoder.rule is None or not encoder.rule.votes:
            raise UserError(
                "the copies of an immunised model answer by vote: write "
                f"+smooth:{encoder.noise}:{encoder.n0}:ALPHA:vote"
            )
        self.encoder, self.rule = encoder, encoder.rule
        votes = voting(encoder, immunity, encoder.noise, where)
        assert isinstance(votes, SmoothedVLM)
        self.votes = votes
        self.eval().requires_grad_(False)

    @property
    def vlm(self) -> VLM:
        return self.encoder

    @property
    def judge(self) -> ImmunisedClassifier:
        """The head that judges each copy."""
        inner = self.votes.base
        assert isinstance(inner, VotingVLM)
        return inner.judge

    @property
    def class_embeddings(self) -> Tensor:
        return self.judge.class_embeddings

    @property
    def fingerprint(self) -> str:
        return fingerprint({}, ("open votes", self.votes.fingerprint))

    @property
    def says(self) -> str:
        """How an answer comes about, in words."""
        return self.rule.words(self.encoder.n0, refuses=True)

    @property
    def _needed(self) -> float:
        return math.log(1.0 / self.rule.alpha)

    def refusal(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log evidence for a class (below 0: for none) and ln(1 / alpha), which it has to exceed; [N]."""
        needed = torch.full_like(output[:, -1], self._needed)
        return output[:, -1] + needed, needed

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits and the signed evidence less what is needed, [B, K + 1]; fresh noise on every call."""
        features = self.votes.drawn(pixels, self.votes.n0)
        with torch.autocast(pixels.device.type, enabled=False):
            logits, evidence = open_vote(features)
            just = _LEAST * (evidence.abs() >= self._needed) * evidence.sign()
            return torch.cat([logits, (evidence + just - self._needed).to(logits.dtype)[:, None]], dim=1)

    @torch.no_grad()
    def predict(self, images: Tensor, *, alpha: float | None = None, lanes: int = 64) -> Answers:
        """Return what the model says: a class, rejected as none of them, or abstained where nothing is decided."""
        found = super().predict(images, alpha=alpha, lanes=lanes)
        undecided = self.undecided(found.output)
        return replace(found, rejected=found.rejected & ~undecided, abstained=found.rejected & undecided)

    def undecided(self, output: Tensor) -> Tensor:
        none = output[:, -1] < -2.0 * self._needed - 0.5 * _LEAST
        return (output[:, -1] <= 0.0) & ~none


def open_vote(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return log shares of the votes for the classes [B, K], and the signed evidence [B] of features [B, n, K + 1].

    The evidence is minus the log p-value that what leads has more votes than the second, below 0 where "none", the
    last axis, leads. A copy that failed, or whose axes tie for the first place, is a vote for nothing.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0, 0.0]] * 10 + [[0.0, 0.0, 1.0]] * 90)
        >>> logits, evidence = open_vote(torch.stack([rows, rows.flip(1)]))
        >>> logits.argmax(1).tolist(), evidence.round().tolist()
        ([0, 0], [-38.0, 38.0])
    """
    cast = features.isfinite().all(dim=2)
    rows = torch.where(cast[:, :, None], features, 0.0)
    best = rows.amax(dim=2, keepdim=True)
    cast = cast & ((rows == best).sum(dim=2) == 1)
    votes = (F.one_hot(rows.argmax(dim=2), rows.shape[2]) * cast[:, :, None]).sum(dim=1)
    soft = (rows**2 * cast[:, :, None]).sum(dim=1) + 1e-6
    leading = votes.topk(2, dim=1)
    pairs = leading.values.tolist()
    found = torch.tensor([minus_log_p(top, top + second) for top, second in pairs], dtype=torch.float64)
    of_none = leading.indices[:, 0] == rows.shape[2] - 1
    lead = soft.gather(1, leading.indices)
    slope = torch.where(of_none, -1.0, 1.0) * (lead[:, 0] - lead[:, 1])
    signed = torch.where(of_none, -1.0, 1.0) * found.to(features.device)
    shares = ((votes[:, :-1] + 1.0 / rows.shape[2]) / (features.shape[1] + 1)).log().to(soft.dtype)
    logits = soft[:, :-1].log()
    return shares + (logits - logits.detach()), signed + (slope - slope.detach()).double()
