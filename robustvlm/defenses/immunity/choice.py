"""How much antibodies may take off the largest cosine: weight and floor of the hinge, chosen on known images alone.

S_DIS takes the nearest antibody off every image, and loses to the largest cosine where texts say little (docs/
immunize.md). The hinge counts an antibody only where it is nearer than known images usually have one, and its weight is
what known classes ask for that are left out in turn, which may be nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robustvlm.core.seeds import generator
from robustvlm.defenses.immunity.antibodies import Antibodies, Returning
from robustvlm.defenses.immunity.state import antibody_score, class_scores
from robustvlm.detect.metrics import auroc
from robustvlm.errors import UserError

WEIGHTS = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0)
FLOOR_QUANTILE = 0.95
FOLDS = 5


@dataclass(frozen=True)
class Choice:
    """The weight and floor chosen, and why.

    Attributes:
        gains: by weight, the mean change of the AUROC against weight 0 and its standard error over the folds; empty
            where nothing could be tried.
    """

    weight: float
    floor: float
    gains: dict[float, tuple[float, float]]


def choose_hinge(
    features: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    antibodies: Antibodies,
    class_names: Sequence[str],
    *,
    returning: Returning | None = None,
    seed: int = 0,
    weights: Sequence[float] = WEIGHTS,
) -> Choice:
    """Return the hinge for features of images of known classes.

    The floor is the 95% quantile of the known images' cosine to their nearest antibody. For the weight the classes are
    dealt into five folds, and each fold is left out in turn, with its prototypes and the antibodies that guard it: its
    images stand for unknown ones. Antibodies of the other classes that name a class of the fold come back. The weight
    with the largest mean gain of AUROC is chosen if that gain is above its standard error, the smaller one of equal
    ones; otherwise 0, which is the largest cosine.

    Args:
        features: adapted features [N, D], unit. labels: [N], classes of `class_names`. prototypes: [K, M, D].
        returning: the antibodies that were dropped for naming a known class (`antibodies.returning`).

    Raises:
        UserError: no features.

    Example:
        >>> from robustvlm.defenses.immunity.antibodies import AntibodyText
        >>> one = Antibodies((AntibodyText("wolf", "dog"),), torch.eye(3)[2:])
        >>> choose_hinge(torch.eye(3)[:2], torch.tensor([0, 1]), torch.eye(3)[:2, None], one, ["dog", "cat"]).weight
        0.0
    """
    if not len(features):
        raise UserError("the weight of antibodies needs images of known classes: pass --lambda-inf with --rule s-dis")
    floor = _floor(antibody_score(features, antibodies.embeddings))
    folds = min(FOLDS, len(class_names))
    if not len(antibodies) or folds < 2:
        return Choice(0.0, floor, {})
    cosines = class_scores(features, prototypes)
    near = features @ antibodies.embeddings.to(features).T
    place = {name: k for k, name in enumerate(class_names)}
    guarded = torch.tensor([place.get(text.of_class, -1) for text in antibodies.texts])
    fold = torch.randperm(len(class_names), generator=generator(seed, "classes left out")) % folds
    tried = []
    for f in range(folds):
        unknown = fold[labels] == f
        if not bool(unknown.any()) or bool(unknown.all()):
            continue
        there = near[:, ~torch.isin(guarded, (fold == f).nonzero())]
        if returning is not None:
            back = (fold[returning.named] == f) & (fold[returning.of_class] != f)
            there = torch.cat([there, features @ returning.embeddings[back].to(features).T], dim=1)
        tried.append(_gains(cosines[:, fold != f], there, unknown, weights))
    if len(tried) < 2:
        return Choice(0.0, floor, {})
    table = np.array(tried)
    means, errors = table.mean(axis=0), table.std(axis=0, ddof=1) / len(table) ** 0.5
    gains = {w: (float(mean), float(error)) for w, mean, error in zip(weights, means, errors, strict=True)}
    best = max(gains, key=lambda w: (gains[w][0], -w))
    return Choice(best if gains[best][0] > gains[best][1] else 0.0, floor, gains)


def _floor(nearest: Tensor) -> float:
    return min(1.0, max(-1.0, float(torch.quantile(nearest.double(), FLOOR_QUANTILE))))


def _gains(cosines: Tensor, near: Tensor, unknown: Tensor, weights: Sequence[float]) -> list[float]:
    """Return the change of AUROC by each weight, with some images [N] playing the unknown ones."""
    leading = cosines.amax(dim=1)
    nearest = near.amax(dim=1) if near.shape[1] else torch.zeros_like(leading)
    above = (nearest - _floor(nearest[~unknown])).clamp_min(0.0) if near.shape[1] else nearest

    def area(weight: float) -> float:
        scores = (leading - weight * above).double().numpy()
        return auroc(scores[~unknown.numpy()], scores[unknown.numpy()])

    plain = area(0.0)
    return [area(weight) - plain for weight in weights]
