"""The class claim: the class nearest to the mean feature stays (T5, T6, T8), for fixed prompts or for any (T7)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from robustvlm.certify.claims.base import Asked, Claim, Materials, Plan, sampling_of
from robustvlm.certify.claims.quantity import Quantity, upper_mean
from robustvlm.certify.class_claim import ClassAtRadius, ClassRadius, VocabularyRadius
from robustvlm.certify.class_margin import rival_normals
from robustvlm.certify.limits import best_class_radius
from robustvlm.certify.normal import Array
from robustvlm.certify.sampling import Certifier
from robustvlm.certify.scores import mean_feature, unit_rows

_STATEMENT = "the mean feature of the noisy copies keeps its class"


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassQuantity(Quantity):
    """The smoothed feature is closer to the text of `label` than to any other: the least margin is above zero (P1)."""

    text: Array
    label: int
    radius: float

    words = "least margin of the certified class, <m(x'), v> over unit directions v to its rivals"

    @cached_property
    def normals(self) -> Array:
        """Unit directions [K-1, D] from rivals to the label."""
        found = rival_normals(self.text, self.label)
        assert found is not None  # such a certificate would have abstained
        return found

    @cached_property
    def _nearest(self) -> npt.NDArray[np.int64]:
        """Rivals in order of nearness to the label's text: where an attack is likeliest to end."""
        return np.argsort(self.normals @ self.text[self.label]).astype(np.int64)

    def bound(self, eps: float) -> float:
        return 0.0 if eps <= self.radius else -1.0

    def score(self, features: Tensor, aim: Tensor) -> Tensor:
        normals = torch.as_tensor(self.normals, dtype=features.dtype, device=features.device)
        margins = features.mean(dim=1) @ normals.T
        # Aim 0 follows the smallest margin wherever it is; the others pursue one of the nearest rivals each.
        pursued = torch.as_tensor(self._nearest, device=features.device)[(aim - 1).clamp_min(0) % len(normals)]
        return torch.where(aim == 0, margins.amin(dim=1), margins.gather(1, pursued[:, None])[:, 0])

    def value(self, features: Array) -> float:
        return float((self.normals @ mean_feature(features)[0]).min())

    def upper(self, features: Array, alpha: float) -> float:
        """Half the features choose the rival, the other half bound its margin."""
        half = len(features) // 2
        rival = int((self.normals @ mean_feature(features[:half])[0]).argmin())
        return upper_mean(unit_rows(features[half:]) @ self.normals[rival], alpha)


@dataclass(frozen=True, kw_only=True)
class _Class(Claim):
    def plan(self, asked: Asked, materials: Materials) -> Plan:
        if asked.prompts == "adaptive":
            return self._any_prompts(asked, materials)
        common = {"text": materials.classes, **sampling_of(asked)}
        early = asked.radius is not None
        certifier: Callable[[], Certifier]
        if early:
            certifier = partial(ClassAtRadius, **common, radius=asked.radius or 0.0)
        else:
            certifier = partial(ClassRadius, **common, rounding=materials.rounding, deployed=asked.deployed)
        tool = "anytime test" if early else "ELL band"
        return Plan(
            statement=_STATEMENT,
            rule=self.rule,
            theorem="T6" if early else "T5",
            bound="tangent" if early else "ell",
            stop_rule="anytime" if early else "fixed",
            alpha_split={f"margin to each rival ({tool}; no correction for their number, T8)": asked.alpha},
            best=self.linear_best(asked, 0.5),
            certifier=certifier,
            label_source="pilot",
        )

    def _any_prompts(self, asked: Asked, materials: Materials) -> Plan:
        alpha, sigma = asked.alpha, asked.sigma
        return Plan(
            statement=f"{_STATEMENT}, for prompts chosen at any time",
            rule=self.rule,
            theorem="T7",
            bound="mcdiarmid+kl",
            stop_rule="fixed",
            alpha_split={"ball around the mean": 0.5 * alpha, "covariance": 0.5 * alpha},
            best=lambda n: best_class_radius(self.rest(asked, n), alpha, sigma),
            certifier=partial(
                VocabularyRadius, text=materials.classes, **sampling_of(asked), rounding=materials.rounding
            ),
            label_source="pilot",
        )

    def audited(
        self, row: Mapping[str, Any], asked: Asked, materials: Materials, *, steering: Array, evidence: Array
    ) -> Quantity:
        del asked, steering, evidence
        return ClassQuantity(text=materials.classes, label=row["prediction"], radius=row["radius"])


CLASS = _Class(
    name="class",
    kept="the smoothed model's class is right and certified to stay",
    about_class=True,
    columns=("radius", "deployed_radius", "mean_radius"),
    rule="the class whose text is nearest to the mean feature m over the noise, of infinitely many copies",
    deployed="the class nearest to the mean of {n0:,} fresh copies is the certified one",
    known_best=True,
    tests_radius=True,
    any_prompts=True,
    bounds_rounding=True,
    quantity=ClassQuantity.words,
)
