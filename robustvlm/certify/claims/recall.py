"""The recall claim: the text that belongs to an image stays among the k nearest of a gallery, by its mean feature."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from robustvlm.certify import classes
from robustvlm.certify.bands import ell_band
from robustvlm.certify.certifier import Finding, Stage, mean_feature, unit_rows
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
from robustvlm.certify.deployed import class_margin_needed
from robustvlm.certify.normal import Array
from robustvlm.certify.shapes import halfspace_shift
from robustvlm.errors import UserError

# Recall at k of an image against a gallery of texts or images, which the attacker does not change: unit vectors t_j.
#
# Entry y is among the k nearest to m(x') exactly if fewer than k others j have <m', t_j> >= <m', t_y>. Let C be k - 1
# entries that the pilot names. If <m', t_y - t_j> > 0 for every j outside of C, at most the k - 1 in C can be nearer.
# These are claims that are linear in m' and fixed before the estimation samples are drawn, each tested at level alpha
# (T5); their intersection needs no correction (T8), however large the gallery. C are the entries that the pilot finds
# nearest, for they are those that an attack would raise first. Scaling m' to unit length, as the deployed model does,
# changes no order.


class RecallRadius(Labelled):
    """The radius within which an entry of a gallery stays among the k nearest to the mean feature.

    The label is `own`, the entry that belongs to the image, if the pilot finds it among its first k, else the nearest.
    Column: `deployed_radius`, where the mean of `deployed` fresh copies keeps it among the k with probability 1 - alpha
    over these (same event).

    Args:
        text: unit vectors of the gallery [K, D], fixed before the noise was drawn. k: how many. own: the entry that
            belongs to the image, -1 where that is unknown. entries: classes of the entries [K], -1 for none; `own` is
            then the image's class, and every entry of it belongs to the image.
        rounding: as in `ClassRadius`.

    Example:
        >>> certifier = RecallRadius(text=np.eye(3), k=2, own=1, sigma=0.25, alpha=0.001, n=1200, n_pilot=200)
        >>> while (wanted := certifier.request()) is not None:
        ...     certifier.take([[0.8, 0.6, 0.0], [0.6, 0.8, 0.0]] * (wanted.sure // 2))
        >>> certifier.finding().prediction, round(certifier.finding().radius, 2)
        (1, 0.44)
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
        rounding: float = 0.0,
        deployed: int | None = None,
        radius: float | None = None,
        entries: tuple[int, ...] | None = None,
    ) -> None:
        settings = ("recall", k, own) if entries is None else ("recall", k, own, entries)
        super().__init__(text=text, sigma=sigma, alpha=alpha, n=n, n_pilot=n_pilot, radius=radius, settings=settings)
        self.entries = entries
        self.k, self.own = require_rank(k, len(self.text)), own
        self.of_image = (own,)
        if not (rounding >= 0.0 and np.isfinite(rounding)):
            raise UserError(f"the bound of the features' rounding must be a finite number >= 0, got {rounding}")
        self.rounding, self.deployed = float(rounding), deployed
        self.beaten: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        """The entries that have to stay behind the label: all but the label and C."""

    def _absorb(self, stage: Stage, rows: Array) -> None:
        super()._absorb(stage, rows)
        if stage == "pilot":
            order = np.argsort(-(self.text @ mean_feature(rows)[0]), kind="stable")
            first = order[: self.k].tolist()
            self.label = next((entry for entry in first if self._belongs(entry)), first[0])
            self.beaten = order[order != self.label][self.k - 1 :]

    def _belongs(self, entry: int) -> bool:
        return self.own >= 0 and self.own == (entry if self.entries is None else self.entries[entry])

    def finding(self) -> Finding:
        rows = self._rows["estimation"]
        band = ell_band(len(rows), self.alpha)
        normals = classes.rival_normals(self.text[[self.label, *self.beaten]], 0)

        def radius(margin: float) -> float:
            least = margin + self.rounding
            return 0.0 if normals is None else self.sigma * halfspace_shift(rows, normals, lambda _: least, band)

        columns = {}
        if self.deployed is not None:
            columns["deployed_radius"] = radius(class_margin_needed(len(self.beaten), self.deployed, self.alpha))
        return self._found(radius(0.0), columns)


class RecallAtRadius(RecallRadius):
    """Does an entry stay among the k nearest within this radius? Samples until yes, hopeless, or n (T6, T8).

    The tests of `ClassTest`, against the entries that have to stay behind.

    Example:
        >>> certifier = RecallAtRadius(
        ...     text=np.eye(3), radius=0.1, k=2, own=1, sigma=0.25, alpha=0.001, n=5000, n_pilot=200
        ... )
        >>> while (wanted := certifier.request()) is not None:
        ...     certifier.take([[0.8, 0.6, 0.0], [0.6, 0.8, 0.0]] * (wanted.sure // 2))
        >>> certifier.finding().radius, certifier.finding().n < 200
        (0.1, True)
    """

    def _absorb(self, stage: Stage, rows: Array) -> None:
        super()._absorb(stage, rows)
        if stage == "pilot":
            entries = self.text[[self.label, *self.beaten]]
            self._test = classes.ClassTest(rows, entries, 0, a=self._at / self.sigma, alpha=self.alpha)
        else:
            self._test.update(rows)

    def _decided(self) -> bool:
        return self._test.decision != "open"

    def finding(self) -> Finding:
        decision = self._test.decision
        return self._found(self._at if decision == "certified" else 0.0, {}, stop_of(decision))


@dataclass(frozen=True, kw_only=True, eq=False)
class RecallQuantity(Quantity):
    """The k-th smallest margin of the label over an entry: above zero, the label is among the k nearest."""

    text: Array
    label: int
    k: int
    radius: float

    words = "k-th smallest margin of the certified entry, <m(x'), v> over unit directions v to the others"

    @cached_property
    def normals(self) -> Array:
        """Unit directions [K-1, D] from the other entries to the label; of an entry with the same vector, zero."""
        apart = self.text[self.label] - np.delete(self.text, self.label, axis=0)
        return np.asarray(apart / np.maximum(np.linalg.norm(apart, axis=1, keepdims=True), 1e-12))

    def bound(self, eps: float) -> float:
        return 0.0 if eps <= self.radius else -1.0

    def score(self, features: Tensor, aim: Tensor) -> Tensor:
        normals = torch.as_tensor(self.normals, dtype=features.dtype, device=features.device)
        least = (features.mean(dim=1) @ normals.T).topk(self.k, dim=1, largest=False).values
        # Aim 0 follows the k-th margin; the others lower the first k together.
        return torch.where(aim % 2 == 0, least[:, -1], least.mean(dim=1))

    def value(self, features: Array) -> float:
        return float(np.sort(self.normals @ mean_feature(features)[0])[self.k - 1])

    def upper(self, features: Array, alpha: float) -> float:
        """Of k entries that some features choose, the largest margin over one is at least the value."""
        first, rest, level = choose_and_judge(features, len(self.normals), alpha)
        chosen = np.argsort(self.normals @ mean_feature(first)[0])[: self.k]
        rows = unit_rows(rest)
        return max(upper_mean(rows @ self.normals[entry], level) for entry in chosen)


@dataclass(frozen=True, kw_only=True)
class _Recall(Claim):
    def plan(self, asked: Asked, materials: Materials) -> Plan:
        k = require_rank(asked.top, len(materials.classes))
        early = asked.radius is not None
        common = {"text": materials.classes, "k": k, "entries": materials.entries, **sampling_of(asked)}
        kind: type[RecallRadius] = RecallAtRadius if early else RecallRadius
        common |= {"radius": asked.radius} if early else {"rounding": materials.rounding, "deployed": asked.deployed}
        tool = "anytime test" if early else "ELL band"
        what, belongs = ("list", "the one that belongs to the image")
        rule = self.rule
        if materials.entries is not None:
            what, belongs = ("gallery", "one of the image's class")
            rule = rule.replace("texts", "gallery images")
        return Plan(
            statement=f"an entry of the {what} stays among the {k} nearest to the mean feature: {belongs}, or the "
            f"nearest where the pilot does not have that among its {k}",
            rule=f"{rule}; k = {k}",
            theorem="T6" if early else "T5",
            bound="tangent" if early else "ell",
            stop_rule="anytime" if early else "fixed",
            alpha_split={f"margin to each entry that has to stay behind ({tool}; no correction, T8)": asked.alpha},
            best=self.linear_best(asked, 0.5),
            certifier=partial(kind, **common),
            by_label=lambda own: kind(own=own, **common),
            label_source="pilot",
        )

    def correct(self, label: int, prediction: int) -> bool | None:
        # The nearest entry of a gallery may be of no known class, -1, which is wrong and not unknown.
        return prediction == label if label >= 0 else None

    def audited(
        self, row: Mapping[str, Any], asked: Asked, materials: Materials, *, steering: Array, evidence: Array
    ) -> Quantity:
        del steering, evidence
        k = require_rank(asked.top, len(materials.classes))
        return RecallQuantity(text=materials.classes, label=row["prediction"], k=k, radius=row["radius"])


RECALL = _Recall(
    name="recall",
    kept="the text (or gallery image) that belongs to the image is certified to stay among the k nearest",
    about_class=True,
    columns=("radius", "deployed_radius"),
    rule="the k texts that are nearest to the mean feature m over the noise, of infinitely many copies",
    deployed="the certified text is among the k nearest to the mean of {n0:,} fresh copies",
    options=("top",),
    tests_radius=True,
    bounds_rounding=True,
    quantity=RecallQuantity.words,
)
