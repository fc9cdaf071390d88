"""Changes of the image and of words of the prompts at once: copies that each read one wording of the classes (T24)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from robustvlm.certify.certifier import Finding
from robustvlm.certify.claims.base import Asked, Claim, Materials, Plan, Quantity, sampling_of, upper_mean
from robustvlm.certify.claims.vote import VoteRadius, votes_for
from robustvlm.certify.classes import vote_radius
from robustvlm.certify.normal import Array
from robustvlm.certify.wordings import Wordings
from robustvlm.errors import UserError, setting

# T24. Let every copy read one of J wordings of all class texts, drawn uniformly, and vote. An attacker changes the
# image by less than R and anything in the texts of a set S of r wordings: so r words wherever they stand, since each
# stands in one wording. Let c = 1 - r / J be the share of copies that read none of S, and p_S the share of these that
# vote for y. The votes for y that S has no part in are c h(z) for one function h of the noisy image with values in
# [0, 1], the mean over the other wordings, and E h = p_S at x. So (T0) y has at least c Phi(Phi^-1(p_S) - a) of all
# votes at x', more than half if a < Phi^-1(p_S) - Phi^-1(1 / (2 c)). A half-space that all wordings share attains it.
# Against another threat its own law of the noise says what E h keeps (`Threat.reach`), to above 1 / (2 c) as well.
#
# From samples: copy i reads wording i mod J. The votes for y among the copies that read none of S are independent, of
# mean p_S; Clopper-Pearson holds for their sum below alpha = 1/4, though it is not binomial (Hoeffding 1956, Theorem
# 5). The radius is the least over all S, without a union: the S with the least true radius depends on no sample (T8).

MOST_ALPHA = 0.25


def words_radius(
    votes: Sequence[int],
    each: int,
    words: int,
    sigma: float,
    alpha: float,
    *,
    share: float = 0.5,
    threat: str | None = None,
) -> float:
    """Return the radius within which a label keeps more than `share` of the votes whichever `words` wordings change.

    Args:
        votes: for the label, by the wording that was read [J]. each: copies that read each wording.
        words: changed words, or wordings. alpha: below 1/4.
        threat: what the noise is against, by name; l2 by default.

    Example:
        >>> [round(words_radius([95] * 6, 100, r, 1.0, 0.001), 2) for r in range(4)]
        [1.38, 1.1, 0.65, 0.0]
    """
    if not alpha < MOST_ALPHA:
        raise UserError(f"votes of several wordings are bounded below alpha = {MOST_ALPHA:g}, got {alpha:g}")
    left = sorted(votes)[: len(votes) - words]  # the worst change is of what has most votes for the label
    kept = len(left) / len(votes)
    if not left or share >= kept:
        return 0.0
    return vote_radius(sum(left), each * len(left), sigma, alpha, share=share / kept, threat=threat)


class WordsRadius(VoteRadius):
    """The radius at which most copies stay with a class though `words` words of the prompts are changed (T24).

    Columns `words0_radius` to that of `words`, each at its own alpha; the last is the certificate.

    Args:
        wordings: aligned texts of every class; copy i reads the (i mod J)-th ones. words: that an attacker changes.

    Example:
        >>> tables = Wordings((np.array([[1.0, 0.0]] * 5), np.array([[0.0, 1.0]] * 5)), aligned=True)
        >>> how = {"text": np.eye(2), "sigma": 0.25, "alpha": 0.001, "n": 1000, "n_pilot": 200}
        >>> certifier = WordsRadius(wordings=tables, words=1, **how)
        >>> while (wanted := certifier.request()) is not None:
        ...     certifier.take([[1.0, 0.0]] * wanted.sure)
        >>> [round(certifier.finding().columns[f"words{r}_radius"], 2) for r in (0, 1)]
        [0.6, 0.5]
    """

    def __init__(self, *, wordings: Wordings, words: int, **options: Any) -> None:
        self.wordings, self.words = wordings, words
        super().__init__(**options)

    def _extra(self) -> tuple[object, ...]:
        return (*self.wordings.vectors, self.words)

    def _choose(self, pilot: Array) -> int:
        counts = [self._by_wording(pilot, label).sum() for label in range(len(self.text))]
        return int(np.argmax(counts)) if max(counts) > 0 else -1

    def _by_wording(self, rows: Array, label: int) -> npt.NDArray[np.int64]:
        """Return the votes [J] for a label among rows of which the i-th has read wording i mod J."""
        tables = self.wordings.tables
        parts = [rows[place :: len(tables)] for place in range(len(tables))]
        return np.array(
            [votes_for(part, table, label).sum() if len(part) else 0 for part, table in zip(parts, tables, strict=True)]
        )

    def finding(self) -> Finding:
        rows = self._rows["estimation"]
        each = len(rows) // len(self.wordings.tables)  # those left over would be read by some wordings only
        votes = self._by_wording(rows[: each * len(self.wordings.tables)], self.label).tolist()
        radius = partial(words_radius, votes, each, sigma=self.sigma, alpha=self.alpha, threat=self.threat)
        columns = {f"words{r}_radius": radius(r) for r in range(self.words + 1)}
        columns["votes"] = sum(votes) / max(1, each * len(votes))
        if self.deployed is not None:
            share = self._share_needed(self.deployed)
            columns["deployed_radius"] = radius(self.words, share=share)
        return self._found(columns[f"words{self.words}_radius"], columns)


def words_plan(claim: Claim, asked: Asked, materials: Materials, words: int) -> Plan:
    """Return the plan of the vote of copies that each read one wording, under changes of image and words (T24).

    Raises:
        UserError: there are too few wordings for so many words.
    """
    wordings = materials.wordings
    assert wordings is not None
    require_wordings(wordings, words)
    count = len(wordings.tables)
    plan = claim.plan(asked, replace(materials, wordings=None))
    options = {"text": materials.classes, "deployed": asked.deployed, "threat": asked.threat, **sampling_of(asked)}

    def best(n: int) -> float:
        each = claim.rest(asked, n) // count
        votes = [each] * count
        return words_radius(votes, each, words, asked.sigma, asked.alpha, threat=asked.threat) if each else 0.0

    changed = "no word" if not words else "one word" if words == 1 else f"{words} words"
    return replace(
        plan,
        statement=f"the class that most noisy copies are put into, each by one of {count} wordings, stays the same "
        f"though up to {changed} of the prompts are changed as well",
        rule=f"the class that most of infinitely many noisy copies are put into, each by one of {count} wordings of "
        f"all classes, drawn anew for each copy, with up to {changed} of the prompts changed",
        theorem="T24",
        alpha_split={f"votes of the copies that read no changed wording, all {count} wordings at once": asked.alpha},
        best=best,
        certifier=partial(WordsRadius, wordings=wordings, words=words, **options),
    )


def require_wordings(wordings: Wordings, words: int) -> None:
    """Refuse a number of changed words that no certificate can bear.

    Raises:
        UserError: half or more of the wordings may be changed by so many words.
    """
    count = len(wordings.tables)
    if 2 * words >= count:
        raise UserError(
            f"{words} changed words can change {words} of {count} wordings, which is half of the votes or more: pass "
            f"at least {2 * words + 1} wordings ({setting('templates')}, {setting('paraphrases')}), or fewer "
            f"{setting('words')}"
        )


# What an audit attacks: the texts by words of a vocabulary, wording by wording, then the image

Encode = Callable[[list[str]], Array]
"""From texts to unit vectors [N, D]."""


@dataclass(frozen=True)
class Prompts:
    """The texts of each wording: [J] lists of one text for each class, and the words that an attacker puts in."""

    texts: tuple[tuple[str, ...], ...]
    vocabulary: tuple[str, ...]

    def changes(self, wording: int, label: int) -> list[tuple[int, str]]:
        """Return every text that one changed word makes of a wording's, with its class: of all classes."""
        found = []
        for place, text in enumerate(self.texts[wording]):
            spoken = text.split()
            for i in range(len(spoken)):
                found += [
                    (place, " ".join([*spoken[:i], word, *spoken[i + 1 :]]))
                    for word in self.vocabulary
                    if word != spoken[i]
                ]
        # The certified class first: its own texts are what most changes go to.
        return sorted(found, key=lambda one: one[0] != label)


def changed_tables(
    wordings: Wordings, prompts: Prompts, features: ArrayLike, label: int, words: int, encode: Encode, most: int = 4096
) -> tuple[list[Array], list[str]]:
    """Return the class texts [K, D] of each wording after the worst change of `words` words, and what was changed.

    Every word of every text is replaced by every word of the vocabulary, up to `most` texts a wording; of each wording
    the change is kept that leaves the label fewest votes, and the wordings that lose most are changed.

    Args:
        features: [n, D] of noisy copies that steer the search and judge nothing.
    """
    rows = np.asarray(features, dtype=np.float64)
    found = []
    for place, table in enumerate(wordings.tables):
        options = prompts.changes(place, label)[:most]
        if not options:
            continue
        vectors = encode([text for _, text in options])
        before = votes_for(rows, table, label).mean()
        near = rows @ table.T
        new = rows @ vectors.T
        rivals = np.delete(near, label, axis=1).max(axis=1)
        of = np.array([one for one, _ in options])
        won = np.where(
            of == label, new > rivals[:, None], (near[:, [label]] > new) & (near[:, label] > rivals)[:, None]
        )
        lost = before - won.mean(axis=0)
        best = int(lost.argmax())
        found.append((float(lost[best]), place, of[best], vectors[best], options[best][1]))
    tables, said = [table.copy() for table in wordings.tables], []
    for _, place, one, vector, text in sorted(found, key=lambda change: -change[0])[:words]:
        tables[place][one] = vector
        said.append(text)
    return tables, said


@dataclass(frozen=True, kw_only=True, eq=False)
class WordsQuantity(Quantity):
    """More than half of the pairs of a noisy copy and a wording are for `label`, after words were changed (T24)."""

    tables: list[Array]
    label: int
    radius: float
    logit_scale: float

    words = "share of noisy copies and wordings for the certified class, after words were changed"

    def bound(self, eps: float) -> float:
        return 0.5 if eps <= self.radius else -1.0

    def score(self, features: Tensor, aim: Tensor) -> Tensor:
        tables = torch.as_tensor(np.stack(self.tables), dtype=features.dtype, device=features.device)
        logits = self.logit_scale * torch.einsum("rnd,jkd->rnjk", features, tables)
        own = logits[..., self.label]
        rivals = logits.clone()
        rivals[..., self.label] = -torch.inf
        order = rivals.mean(dim=(1, 2)).argsort(dim=-1, descending=True)
        pursued = order.gather(1, ((aim - 1).clamp_min(0) % (logits.shape[3] - 1))[:, None])
        one = logits.gather(3, pursued[:, None, None].expand(-1, *logits.shape[1:3], 1))[..., 0]
        share = torch.sigmoid(own - torch.where((aim == 0)[:, None, None], rivals.logsumexp(dim=-1), one))
        return share.mean(dim=(1, 2))

    def value(self, features: Array) -> float:
        return float(self._shares(features).mean())

    def upper(self, features: Array, alpha: float) -> float:
        return 0.5 * (1.0 + upper_mean(2.0 * self._shares(features) - 1.0, alpha))

    def _shares(self, features: Array) -> Array:
        failed = np.isnan(features).any(axis=1)
        said = [votes_for(features, table, self.label) | failed for table in self.tables]
        return np.asarray(np.mean(said, axis=0))


def words_quantity(row: Mapping[str, Any], tables: list[Array], materials: Materials) -> WordsQuantity:
    """Return what an audit attacks in the image, of a row of results, once the texts are changed to `tables`."""
    return WordsQuantity(
        tables=tables, label=row["prediction"], radius=row["radius"], logit_scale=materials.logit_scale
    )
