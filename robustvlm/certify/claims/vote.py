"""The vote claims: what most noisy copies are taken for, or named as in words, stays (Cohen et al. 2019)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from robustvlm.certify import classes
from robustvlm.certify.certifier import Certifier, Finding, Stage
from robustvlm.certify.claims.base import Asked, Claim, Given, Materials, Plan, Quantity, sampling_of
from robustvlm.certify.claims.class_ import Labelled, stop_of
from robustvlm.certify.deployed import (
    answered_share_needed,
    vote_share_needed,
)
from robustvlm.certify.limits import best_vote_radius, best_vote_test_radius
from robustvlm.certify.means import SequentialTest, clopper_pearson_lower
from robustvlm.certify.normal import Array
from robustvlm.certify.threats import find_threat
from robustvlm.core import MOST_WORDS
from robustvlm.errors import UserError, setting


class VoteRadius(Labelled):
    """The radius of the hard vote, another deployed rule than the mean feature's class (Cohen et al. 2019).

    Columns: `votes`, the share of estimation votes for the label; `deployed_radius`, where most of `deployed` fresh
    votes are for the label with probability 1 - alpha over these (same event); of a model that abstains at
    `abstains_at`, where it answers with that class.

    Example:
        >>> certifier = VoteRadius(text=[[1.0, 0.0], [0.0, 1.0]], sigma=0.25, alpha=0.001, n=1000, n_pilot=200)
        >>> while (wanted := certifier.request()) is not None:
        ...     certifier.take([[0.8, 0.6], [1.0, 0.0]] * (wanted.sure // 2))
        >>> round(certifier.finding().radius, 2)
        0.6
    """

    def __init__(
        self,
        *,
        text: ArrayLike,
        sigma: float,
        alpha: float,
        n: int,
        n_pilot: int,
        deployed: int | None = None,
        abstains_at: float | None = None,
        threat: str | None = None,
    ) -> None:
        super().__init__(text=text, sigma=sigma, alpha=alpha, n=n, n_pilot=n_pilot)
        self.deployed, self.abstains_at, self.threat = deployed, abstains_at, threat

    def _choose(self, pilot: Array) -> int:
        return vote_winner(pilot, self.text)

    def finding(self) -> Finding:
        rows = self._rows["estimation"]
        successes = int(self._won(rows).sum())
        columns = {"votes": successes / len(rows)}
        if self.deployed is not None:
            share = self._share_needed(self.deployed)
            columns["deployed_radius"] = self._radius(successes, len(rows), share)
        return self._found(self._radius(successes, len(rows), 0.5), columns)

    def _won(self, rows: Array) -> Array:
        """Return which features [n, D] are votes for the label."""
        return votes_for(rows, self.text, self.label)

    def _radius(self, successes: int, n: int, share: float) -> float:
        return classes.vote_radius(successes, n, self.sigma, self.alpha, share=share, threat=self.threat)

    def _share_needed(self, n0: int) -> float:
        if self.abstains_at is None:
            return vote_share_needed(n0, self.alpha)
        return answered_share_needed(n0, self.abstains_at, self.alpha)


class VoteAtRadius(Labelled):
    """Does the hard vote keep its class within this radius? Samples until yes, hopeless, or n (T0; betting on votes).

    Example:
        >>> certifier = VoteAtRadius(text=[[1.0, 0.0], [0.0, 1.0]], radius=0.1, sigma=0.25, alpha=0.001, n=5000,
        ...                          n_pilot=200)
        >>> while (wanted := certifier.request()) is not None:
        ...     certifier.take([[0.8, 0.6], [1.0, 0.0]] * (wanted.sure // 2))
        >>> certifier.finding().radius
        0.1
    """

    def __init__(
        self,
        *,
        text: ArrayLike,
        radius: float,
        sigma: float,
        alpha: float,
        n: int,
        n_pilot: int,
        threat: str | None = None,
    ) -> None:
        super().__init__(text=text, sigma=sigma, alpha=alpha, n=n, n_pilot=n_pilot, radius=radius)
        self._test = SequentialTest(find_threat(threat).needed(0.5, self._at, self.sigma), alpha=alpha)
        self._won = 0

    def _choose(self, pilot: Array) -> int:
        return vote_winner(pilot, self.text)

    def _absorb(self, stage: Stage, rows: Array) -> None:
        if stage == "pilot":
            self.label = self._choose(rows)
            return
        votes = votes_for(rows, self.text, self.label)
        self._won += int(votes.sum())
        self._test.update(votes.astype(np.float64))

    def _decided(self) -> bool:
        return self._test.decision != "open"

    def finding(self) -> Finding:
        decision = self._test.decision
        share = self._won / max(1, self.counts["estimation"])
        return self._found(self._at if decision == "certified" else 0.0, {"votes": share}, stop_of(decision))


def votes_for(rows: Array, text: Array, label: int) -> np.ndarray:
    """Return which features [n, D] are closest to the text of `label`.

    Failed rows are votes for no class, and so are those that are as close to another, as an answer that names none is.

    Example:
        >>> votes_for(np.array([[1.0, 0.0], [np.nan, 0.0], [0.0, 0.0]]), np.eye(2), 0).tolist()
        [True, False, False]
    """
    finite = np.asarray(np.isfinite(rows).all(axis=1))
    near = np.where(finite[:, None], rows, 0.0) @ text.T
    alone = (near == near.max(axis=1, keepdims=True)).sum(axis=1) == 1
    return np.asarray(finite & alone & (near.argmax(axis=1) == label))


def vote_winner(rows: Array, text: Array) -> int:
    """Return the class with the most votes of features [n, D], the first of several; -1 if there is no vote.

    Example:
        >>> vote_winner(np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]), np.eye(2))
        1
    """
    near = rows[np.asarray(np.isfinite(rows).all(axis=1))] @ text.T
    alone = near[(near == near.max(axis=1, keepdims=True, initial=-np.inf)).sum(axis=1) == 1]
    return int(np.bincount(alone.argmax(axis=1), minlength=len(text)).argmax()) if len(alone) else -1


@dataclass(frozen=True, kw_only=True, eq=False)
class VoteQuantity(Quantity):
    """More than half of the noisy copies are classified as `label` (Cohen et al. 2019)."""

    text: Array
    label: int
    radius: float
    logit_scale: float

    words = "share of noisy copies classified as the certified class"

    def bound(self, eps: float) -> float:
        return 0.5 if eps <= self.radius else -1.0

    def score(self, features: Tensor, aim: Tensor) -> Tensor:
        text = torch.as_tensor(self.text, dtype=features.dtype, device=features.device)
        logits = self.logit_scale * features @ text.T
        rivals = logits.clone()
        rivals[..., self.label] = -torch.inf
        nearest = rivals.mean(dim=1, keepdim=True).argsort(dim=-1, descending=True)
        # Aim 0 lowers the label's share; the others raise the margin of one of the leading rivals each.
        pursued = nearest.gather(2, ((aim - 1).clamp_min(0) % (logits.shape[2] - 1))[:, None, None])
        margin = logits[..., self.label] - logits.gather(2, pursued.expand(-1, logits.shape[1], 1))[..., 0]
        share = logits.softmax(dim=-1)[..., self.label].mean(dim=1)
        return torch.where(aim == 0, share, torch.sigmoid(margin).mean(dim=1))

    def value(self, features: Array) -> float:
        return float(self._votes(features).mean())

    def upper(self, features: Array, alpha: float) -> float:
        against = len(features) - int(self._votes(features).sum())
        return 1.0 - float(clopper_pearson_lower(against, len(features), alpha))

    def _votes(self, features: Array) -> npt.NDArray[np.bool_]:
        said = votes_for(features, self.text, self.label)
        return said | np.isnan(features).any(axis=1)  # a failed pass must not look like a broken claim


WORDS = tuple(f"words{count}_radius" for count in range(MOST_WORDS + 1))


@dataclass(frozen=True, kw_only=True)
class _Vote(Claim):
    """Args: states: the statement of its certificates. theorem: which one they rest on, under Gaussian noise."""

    states: str
    theorem: str = "T0"

    def plan(self, asked: Asked, materials: Materials) -> Plan:
        common = {"text": materials.classes, "threat": asked.threat, **sampling_of(asked)}
        early = asked.radius is not None
        certifier: Callable[[], Certifier]
        if early:
            certifier = partial(VoteAtRadius, **common, radius=asked.radius or 0.0)
        else:
            certifier = partial(VoteRadius, **common, deployed=asked.deployed, abstains_at=asked.abstains_at)
        best = best_vote_test_radius if early else best_vote_radius
        return Plan(
            statement=self.states,
            rule=self.rule,
            theorem=self.theorem if find_threat(asked.threat).gaussian else "total variation",
            bound="betting" if early else "clopper-pearson",
            stop_rule="anytime" if early else "fixed",
            alpha_split={f"share of votes ({'betting' if early else 'Clopper-Pearson'})": asked.alpha},
            best=lambda n: best(self.rest(asked, n), asked.alpha, asked.sigma, threat=asked.threat),
            certifier=certifier,
            label_source="pilot",
        )

    def correct(self, label: int, prediction: int) -> bool | None:
        # Where no copy is a vote for a class, -1, the vote is wrong and not unknown.
        return prediction == label if label >= 0 else None

    def audited(
        self, row: Mapping[str, Any], asked: Asked, materials: Materials, *, steering: Array, evidence: Array
    ) -> Quantity:
        del asked, steering, evidence
        return VoteQuantity(
            text=materials.classes, label=row["prediction"], radius=row["radius"], logit_scale=materials.logit_scale
        )


VOTE = _Vote(
    name="vote",
    states="the class that most noisy copies are put into stays the same (hard vote)",
    kept="the class that most noisy copies get is right and certified to stay",
    about_class=True,
    columns=("radius", "deployed_radius", "noise_radius", "level_radius", *WORDS),
    rule="the class that most of infinitely many noisy copies are put into (hard vote), another rule than the class "
    "of the mean feature",
    deployed="the class with most of {n0:,} fresh votes is the certified one",
    known_best=True,
    tests_radius=True,
    quantity=VoteQuantity.words,
)

NONE = "none of the classes"
"""What a copy votes for that an immunised model rejects; its number is that of the classes."""


@dataclass(frozen=True, kw_only=True)
class _OpenVote(_Vote):
    def check(self, given: Given, *, refuses: bool) -> None:
        if not refuses:
            raise UserError(
                f"'{given.model}' never refuses an image, and the claim '{self.name}' is about votes for a class or "
                f"for none: pass {setting('claim', VOTE.name)}, or a folder of `robustvlm immunize`"
            )
        super().check(given, refuses=refuses)

    def correct(self, label: int, prediction: int) -> bool | None:
        # Of an image of no known class nothing counts as right, as for all claims of classes.
        return prediction == label if label >= 0 else None

    def outcome(self, prediction: int, class_names: Sequence[str]) -> str:
        return NONE if prediction == len(class_names) else class_names[prediction]


OPEN_VOTE = _OpenVote(
    name="open-vote",
    theorem="T28",
    states="the answer that most noisy copies vote for, a class or that it is none of them, stays the same",
    kept="the class that most noisy copies vote for is right and certified to stay",
    about_class=True,
    columns=("radius", "deployed_radius"),
    rule='the class, or "none of the classes", that most of infinitely many noisy copies vote for, each judged by the '
    "head of the model with thresholds for single copies at this noise",
    deployed="the answer with most of {n0:,} fresh votes is the certified one",
    known_best=True,
    tests_radius=True,
    head="votes",
    quantity="share of noisy copies that vote for the certified answer",
)

NAMED = replace(
    VOTE,
    name="named",
    states="the answers to most noisy copies go on naming this class first",
    kept="the class that the answers to most noisy copies name is right and certified to stay named by most",
    rule="the class that the free answers to most of infinitely many noisy copies name first, as whole words; an "
    "answer that names none is a vote for none",
    deployed="most of {n0:,} fresh answers name the certified class first",
    quantity="share of noisy copies whose answer names the certified class first",
)
