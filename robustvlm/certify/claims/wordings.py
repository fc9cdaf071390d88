"""Claims about classes for all wordings of their texts at once (T23), by the mean feature and by vote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustvlm.certify import classes
from robustvlm.certify.claims.base import Asked, Claim, Materials, Plan, Quantity, sampling_of
from robustvlm.certify.claims.class_ import ClassQuantity, ClassRadius
from robustvlm.certify.claims.vote import VoteQuantity, VoteRadius
from robustvlm.certify.normal import Array
from robustvlm.certify.wordings import Wordings
from robustvlm.errors import UserError

ANY = ", whichever of its wordings each class is written with"
TOGETHER = ", whichever of the wordings all classes are written with"


class AnyWordingRadius(ClassRadius):
    """The radius at which the mean feature keeps its class under every choice of texts (T23).

    Args:
        wordings: the texts of every class. text: one vector of each class, by which the pilot names the label.
    """

    def __init__(self, *, wordings: Wordings, **options: Any) -> None:
        self.wordings = wordings
        super().__init__(**options, baselines=False)

    def _extra(self) -> tuple[object, ...]:
        return (*self.wordings.vectors, self.wordings.aligned)

    def _normals(self) -> Array | None:
        return self.wordings.normals(self.label)


class SureVoteRadius(VoteRadius):
    """The radius at which most copies are put into the label under every choice of texts at once (T23)."""

    def __init__(self, *, wordings: Wordings, **options: Any) -> None:
        self.wordings = wordings
        super().__init__(**options)

    def _extra(self) -> tuple[object, ...]:
        return (*self.wordings.vectors, self.wordings.aligned)

    def _won(self, rows: Array) -> Array:
        return np.asarray(self.wordings.sure(rows, self.label))


def worded_plan(claim: Claim, asked: Asked, materials: Materials, *, votes: bool) -> Plan:
    """Return the plan of a claim about classes for all wordings of `materials` at once.

    Args:
        votes: the claim is about the vote, else about the mean feature.
    """
    wordings = _wordings_of(materials)
    plan = claim.plan(asked, replace(materials, wordings=None))
    options = {"text": materials.classes, **sampling_of(asked)}
    options |= {"deployed": asked.deployed, "abstains_at": asked.abstains_at}
    kind = SureVoteRadius if votes else AnyWordingRadius
    options |= {"threat": asked.threat} if votes else {"rounding": materials.rounding}
    whichever = TOGETHER if wordings.aligned else ANY
    every = f"all {wordings.count:,} texts at once (no union, T23)"
    split = {f"{name}, {every}": part for name, part in plan.alpha_split.items()}
    return replace(
        plan,
        statement=f"{plan.statement}{whichever}",
        theorem="T23",
        alpha_split=split,
        certifier=partial(kind, wordings=wordings, **options),
    )


def _wordings_of(materials: Materials) -> Wordings:
    if materials.wordings is None:
        raise UserError("the claim is about several wordings of the classes, and there are none")
    return materials.wordings


@dataclass(frozen=True, kw_only=True, eq=False)
class AnyWordingQuantity(ClassQuantity):
    """The least margin over all texts of the certified class and of its rivals."""

    wordings: Wordings

    words = "least margin of the certified class over all wordings"

    @cached_property
    def normals(self) -> Array:
        found = self.wordings.normals(self.label)
        assert found is not None  # such a certificate would have abstained
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class SureVoteQuantity(VoteQuantity):
    """More than half of the noisy copies are put into the class under every choice of texts at once."""

    wordings: Wordings

    words = "share of noisy copies put into the certified class under all wordings"

    def score(self, features: Tensor, aim: Tensor) -> Tensor:
        normals = self._directions(features)
        margins = features @ normals.T
        # Aim 0 follows each copy's least margin; the others pursue one of the pairs that are nearest on the whole.
        order = margins.mean(dim=1).argsort(dim=-1)
        pursued = order.gather(1, ((aim - 1).clamp_min(0) % margins.shape[2])[:, None])
        one = margins.gather(2, pursued[:, None].expand(-1, margins.shape[1], 1))[..., 0]
        least = torch.where((aim == 0)[:, None], margins.amin(dim=2), one)
        return torch.sigmoid(self.logit_scale * least).mean(dim=1)

    def _directions(self, features: Tensor) -> Tensor:
        found = self.wordings.normals(self.label)
        if found is None:
            found = classes.rival_normals(self.text, self.label)
        return torch.as_tensor(found, dtype=features.dtype, device=features.device)

    def _votes(self, features: Array) -> Any:
        return self.wordings.sure(features, self.label) | np.isnan(features).any(axis=1)


def worded_quantity(row: Mapping[str, Any], materials: Materials, *, votes: bool) -> Quantity:
    """Return what an audit attacks of a row of results of a run about all wordings."""
    facts = {"text": materials.classes, "label": row["prediction"], "radius": row["radius"]}
    wordings = _wordings_of(materials)
    if votes:
        return SureVoteQuantity(**facts, wordings=wordings, logit_scale=materials.logit_scale)
    return AnyWordingQuantity(**facts, wordings=wordings)
