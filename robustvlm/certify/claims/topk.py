"""The top-k claim: a class stays among the k that most noisy copies are put into, usually the image's own."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from math import log
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from robustvlm.certify.certifier import Finding, Stage
from robustvlm.certify.claims.base import (
    Asked,
    Claim,
    Materials,
    Plan,
    Quantity,
    choose_and_judge,
    require_rank,
    sampling_of,
    upper_mean,
)
from robustvlm.certify.claims.class_ import Labelled, stop_of
from robustvlm.certify.limits import best_tangent_radius
from robustvlm.certify.means import Decision, clopper_pearson_lower, clopper_pearson_upper
from robustvlm.certify.normal import Array
from robustvlm.certify.ranks import rank_bets, rank_shift

_FUTILITY = 0.01  # error probability of giving up, which costs power and never soundness


class TopVotes(Labelled):
    """The radius within which a class stays among the k with the most votes.

    The pilot puts the classes in order: the label is `own`, the image's class, if it is among the first k there, else
    the first. Columns: `votes`, the share of estimation votes for the label.

    Args:
        k: how many classes. own: the image's class, -1 where that is unknown.

    Example:
        >>> certifier = TopVotes(text=np.eye(3), k=2, own=1, sigma=0.25, alpha=0.001, n=1200, n_pilot=200)
        >>> while (wanted := certifier.request()) is not None:
        ...     certifier.take(np.eye(3)[[0, 0, 1, 1, 0] * (wanted.sure // 5)])
        >>> certifier.finding().prediction, round(certifier.finding().radius, 2)
        (1, 0.26)
    """

    def __init__(
        self,
        *,
        text: ArrayLike,
        k: int,
        own: int = -1,
        sigma: float,
        alpha: float,
        n: int,
        n_pilot: int,
        radius: float | None = None,
    ) -> None:
        super().__init__(
            text=text, sigma=sigma, alpha=alpha, n=n, n_pilot=n_pilot, radius=radius, settings=("top votes", k, own)
        )
        self.k, self.own, self.parts = require_rank(k, len(self.text)), own, 1
        self.of_image = (own,)
        self._rivals: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._counts: npt.NDArray[np.int64] = np.zeros(len(self.text), dtype=np.int64)

    def _absorb(self, stage: Stage, rows: Array) -> None:
        super()._absorb(stage, rows)
        counts = vote_counts(rows, self.text)
        if stage != "pilot":
            self._counts = self._counts + counts
            return
        order = np.argsort(-counts, kind="stable")
        self.label = self.own if self.own in order[: self.k].tolist() else int(order[0])
        self._rivals = order[order != self.label]
        shares = (counts + 0.5) / (len(rows) + 0.5 * len(counts))
        plugged = {t: rank_shift(float(shares[self.label]), self._share(shares, t), t) for t in range(1, self.k + 1)}
        self.parts = max(plugged, key=lambda t: plugged[t])

    def _share(self, votes: npt.NDArray[Any], t: int) -> float:
        """Return the largest sum of t rivals behind the first k - t of the pilot."""
        return float(np.sort(votes[self._rivals[self.k - t :]])[-t:].sum())

    def finding(self) -> Finding:
        n, own = self.counts["estimation"], int(self._counts[self.label])
        lost = n - int(self._counts.sum())  # failed passes may be any rival's
        rivals = min(n, int(self._share(self._counts, self.parts)) + lost)
        return self._found(self.sigma * votes_shift(own, rivals, n, self.parts, self.alpha), {"votes": own / n})


class TopAtRadius(TopVotes):
    """Does a class stay among the k with the most votes within this radius? Copies until yes, hopeless, or n (T6, T8).

    One anytime-valid test for each set T of t rivals (`RankBets`) at alpha, and no correction for their number. The
    wealth falls in the votes of T, so that of the T with the most votes so far is the least.

    Example:
        >>> certifier = TopAtRadius(
        ...     text=np.eye(3), radius=0.03, k=2, own=1, sigma=0.25, alpha=0.001, n=9000, n_pilot=200
        ... )
        >>> while (wanted := certifier.request()) is not None:
        ...     certifier.take(np.eye(3)[np.arange(wanted.sure) % 5 // 2])
        >>> certifier.finding().radius, certifier.finding().stop, certifier.finding().n < 900
        (0.03, 'certified', True)
    """

    decision: Decision = "open"

    def _absorb(self, stage: Stage, rows: Array) -> None:
        super()._absorb(stage, rows)
        if stage == "pilot":
            self._prepare(vote_counts(rows, self.text), len(rows))
            return
        n, own = self.counts["estimation"], int(self._counts[self.label])
        lost = n - int(self._counts.sum())
        most, first = self._share(self._counts, self.parts), self._counts[self._doubted].sum()
        if self.bets.wealth(own, int(most) + lost, n) >= -log(self.alpha):
            self.decision = "certified"
        elif self.bets.doubt(own, int(first) + lost, n) >= -log(_FUTILITY):
            self.decision = "futile"

    def _prepare(self, counts: npt.NDArray[np.int64], n: int) -> None:
        behind = self._rivals[self.k - self.parts :]
        self._doubted = behind[np.argsort(-counts[behind], kind="stable")[: self.parts]]
        own, rivals = ((float(c) + 0.5) / (n + 1.0) for c in (counts[self.label], counts[self._doubted].sum()))
        self.bets = rank_bets(own, min(rivals, 1.0 - 1e-6), self.parts, self._at / self.sigma)
        if not (self.bets.nulls < 1.0 - 1e-9).any():
            self.decision = "futile"

    def _decided(self) -> bool:
        return self.decision != "open"

    def finding(self) -> Finding:
        radius = self._at if self.decision == "certified" else 0.0
        votes = int(self._counts[self.label]) / max(1, self.counts["estimation"])
        return self._found(radius, {"votes": votes}, stop_of(self.decision))


@lru_cache(maxsize=4096)
def votes_shift(own: int, rivals: int, n: int, t: int, alpha: float) -> float:
    """Return `rank_shift` of counts among n votes, its shares bounded at alpha / 2 each.

    Example:
        >>> round(votes_shift(700, 200, 1000, 1, 0.001), 3)
        0.539
    """
    least, most = clopper_pearson_lower(own, n, 0.5 * alpha), clopper_pearson_upper(rivals, n, 0.5 * alpha)
    return rank_shift(float(least), float(most), t)


def vote_counts(rows: Array, text: Array) -> npt.NDArray[np.int64]:
    """Return how many features [n, D] are nearest to each text [K, D]; failed rows are votes for none.

    Example:
        >>> vote_counts(np.array([[1.0, 0.0], [0.0, 1.0], [np.nan, 0.0]]), np.eye(2)).tolist()
        [1, 1]
    """
    finite = rows[np.asarray(np.isfinite(rows).all(axis=1))]
    return np.bincount((finite @ text.T).argmax(axis=1), minlength=len(text)).astype(np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class TopQuantity(Quantity):
    """The label's share of votes less that of the k-th leading rival: above zero, the label is among the first k."""

    text: Array
    label: int
    k: int
    radius: float
    logit_scale: float

    words = "share of noisy copies of the certified class less that of its k-th leading rival"

    def bound(self, eps: float) -> float:
        return 0.0 if eps <= self.radius else -1.0

    def score(self, features: Tensor, aim: Tensor) -> Tensor:
        text = torch.as_tensor(self.text, dtype=features.dtype, device=features.device)
        shares = (self.logit_scale * features @ text.T).softmax(dim=-1).mean(dim=1)
        own = shares[:, self.label]
        rivals = torch.cat([shares[:, : self.label], shares[:, self.label + 1 :]], dim=1).topk(self.k, dim=1).values
        # Aim 0 follows the k-th rival; the others raise the first k together.
        return torch.where(aim % 2 == 0, own - rivals[:, -1], own - rivals.mean(dim=1))

    def value(self, features: Array) -> float:
        shares = vote_counts(features, self.text) / len(features)
        rivals = np.delete(shares, self.label)
        return float(shares[self.label] - np.sort(rivals)[-self.k])

    def upper(self, features: Array, alpha: float) -> float:
        """Of k rivals that some features choose, the most that the label leads one by is at least the value."""
        first, rest, level = choose_and_judge(features, len(self.text) - 1, alpha)
        counts = vote_counts(first, self.text)
        counts[self.label] = -1
        failed = np.asarray(np.isnan(rest).any(axis=1))
        said = np.where(failed[:, None], 0.0, rest) @ self.text.T
        chosen = said.argmax(axis=1)
        leads = [
            np.where(failed, np.nan, (chosen == self.label).astype(float) - (chosen == rival))
            for rival in np.argsort(-counts, kind="stable")[: self.k]
        ]
        return max(upper_mean(lead, level) for lead in leads)


@dataclass(frozen=True, kw_only=True)
class _TopVotes(Claim):
    def plan(self, asked: Asked, materials: Materials) -> Plan:
        k = require_rank(asked.top, len(materials.classes))
        early = asked.radius is not None
        common = {"text": materials.classes, "k": k, **sampling_of(asked)}
        kind: type[TopVotes] = TopVotes
        if early:
            kind, common = TopAtRadius, common | {"radius": asked.radius}
        parts = {"share of the class": 0.5 * asked.alpha, "share of rivals (T8)": 0.5 * asked.alpha}

        def best(n: int) -> float:
            rest, part = self.rest(asked, n), 0.5 * asked.alpha
            if rest < 1:
                return 0.0
            if early:
                return max(
                    best_tangent_radius(rest, asked.alpha, asked.sigma, target=1.0 / (t + 1.0)) for t in range(1, k + 1)
                )
            ours, theirs = clopper_pearson_lower(rest, rest, part), clopper_pearson_upper(0, rest, part)
            return asked.sigma * max(rank_shift(float(ours), float(theirs), t) for t in range(1, k + 1))

        return Plan(
            statement=f"the class stays among the {k} that most noisy copies are put into: the image's own class, or "
            f"the first where the pilot does not have that among its {k}",
            rule=f"{self.rule}; k = {k}",
            theorem="T6" if early else "T5",
            bound="tangent" if early else "clopper-pearson",
            stop_rule="anytime" if early else "fixed",
            alpha_split={"shares of class and rivals (anytime test, T8)": asked.alpha} if early else parts,
            best=best,
            certifier=partial(kind, **common),
            by_label=lambda own: kind(own=own, **common),
            label_source="pilot",
        )

    def audited(
        self, row: Mapping[str, Any], asked: Asked, materials: Materials, *, steering: Array, evidence: Array
    ) -> Quantity:
        del steering, evidence
        return TopQuantity(
            text=materials.classes,
            label=row["prediction"],
            k=require_rank(asked.top, len(materials.classes)),
            radius=row["radius"],
            logit_scale=materials.logit_scale,
        )


TOPK = _TopVotes(
    name="topk",
    kept="the image's class is certified to stay among the k with the most votes",
    about_class=True,
    rule="the k classes that most of infinitely many noisy copies are put into",
    options=("top",),
    tests_radius=True,
    quantity=TopQuantity.words,
)
