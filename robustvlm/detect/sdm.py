"""SDM: how sure the head is, how near the image is to known ones, and how many of these agree with it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.detect.base import FittedDetector, Head, check_known, confidence
from robustvlm.errors import UserError

_MOST_AGREEING = 1000
"""Neighbours that are looked at for a run: longer ones change the base of the softmax by nothing that matters."""
# Squared distances below rounding: keeps the root's gradient finite at an image of the support.
_TINY = 1e-12


@dataclass(frozen=True, eq=False)
class SDM(FittedDetector):
    """The log-odds of the leading class under the softmax of base 2 + q and exponents d z: similarity, distance, size.

    Of the known images, every second one of a class (by its cosine to the text) is support, the rest calibrates. q is
    how many of the nearest support images, from the nearest on without a gap, show the class that the head says and are
    told right by it. d is the share of calibration images that lie farther from their nearest support image than this
    one does: of the class that the head says, or (`strict`, the paper's) the least over all classes. z are the head's
    logits. With q = e - 2 and d = 1 it is MSP.

    *Our reading:* the paper trains a layer on the features and takes its outputs for z; here z are the zero-shot
    logits. With many classes of few images the least share is nothing nearly everywhere, so `strict` is off. The share
    is interpolated between calibration images and falls on beyond the farthest (the paper's is a staircase that ends at
    0), so that images tie nowhere and attacks have a slope; of q there is none.

    Args:
        head: the zero-shot head. strict: see above.
        support, agrees: unit features [S, D], and the class [S] of those that the head tells right, -1 for others.
        farther: distances of the calibration images with q > 0 to their nearest support image, ascending [K, C] and
            padded with infinity; calibrated: how many each class has [K].

    Source: Schmaltz 2025, arXiv 2509.12760 (and 2502.20167).

    Example:
        >>> head = Head(torch.eye(2), 4.0)
        >>> rows = F.normalize(torch.tensor([[1.0, 0.1], [1.0, 0.2], [0.1, 1.0], [0.2, 1.0]]), dim=1)
        >>> fitted = SDM(head).fit_features(rows, torch.tensor([0, 0, 1, 1]))
        >>> near, far = fitted.score(F.normalize(torch.tensor([[1.0, 0.1], [1.0, 0.9]]), dim=1))
        >>> bool(near > far)
        True
    """

    head: Head
    strict: bool = False
    support: Tensor | None = field(default=None, repr=False)
    agrees: Tensor | None = field(default=None, repr=False)
    farther: Tensor | None = field(default=None, repr=False)
    calibrated: Tensor | None = field(default=None, repr=False)

    def fit_features(self, features: Tensor, labels: Tensor) -> SDM:
        check_known(features, labels)
        features, classes = F.normalize(features.detach(), dim=1), len(self.head.class_embeddings)
        if int(labels.max()) >= classes:
            raise UserError(f"labels go up to {int(labels.max())}, and the head has {classes} classes")
        logits = self.head.logits(features)
        first, said = _every_second(logits, labels), logits.argmax(dim=1).to(labels.device)
        agrees = torch.where(said == labels, labels, -1)
        support = replace(self, support=features[first], agrees=agrees[first])
        if not first.any() or first.all():
            raise UserError("SDM needs support and calibration images: pass at least 2 images of a class")
        run, nearest = support.neighbours(features[~first], said[~first])
        farther, counts = _sorted_by_class(nearest[run > 0], labels[~first][run > 0], classes)
        return replace(support, farther=farther, calibrated=counts)

    def score(self, features: Tensor) -> Tensor:
        return confidence(self.activations(features))

    def activations(self, features: Tensor) -> Tensor:
        """Return d z ln(2 + q), whose softmax is the paper's sdm(z), of unit features [N, D]: [N, K]."""
        logits = self.head.logits(features)
        said = logits.argmax(dim=1)
        run, nearest = self.neighbours(features, said)
        return (self.nearness(nearest, said) * (2 + run).log())[:, None].to(logits) * logits

    def neighbours(self, features: Tensor, said: Tensor) -> tuple[Tensor, Tensor]:
        """Return q, and the distance to the nearest support image, of unit features [N, D] with predictions [N]."""
        support = self.learnt(self.support).to(features)
        agrees = self.learnt(self.agrees).to(said)
        cosines, order = (features @ support.T).topk(min(len(support), _MOST_AGREEING), dim=1)
        run = (agrees[order] == said[:, None]).cumprod(dim=1).sum(dim=1)
        return run, (2 - 2 * cosines[:, 0]).clamp_min(_TINY).sqrt()

    def nearness(self, nearest: Tensor, said: Tensor) -> Tensor:
        """Return d [N] of distances [N] of images with predictions [N]; 0 for a class without calibration images."""
        farther, counts = self.learnt(self.farther).to(nearest), self.learnt(self.calibrated).to(said.device)
        if self.strict:
            every = [_share_beyond(nearest, farther[k], counts[k].expand(len(nearest))) for k in range(len(farther))]
            return torch.stack(every).amin(dim=0)
        return _share_beyond(nearest, farther[said], counts[said])


def _share_beyond(values: Tensor, knots: Tensor, count: Tensor) -> Tensor:
    """Return how large a share of ascending knots [C] or [N, C], padded with infinity, lies beyond values [N].

    Linear between 1 at 0 and 1 - i / (n + 1) at the i-th of n knots; beyond the last it falls by the factor e with each
    further distance of that length.
    """
    rows = knots.expand(len(values), -1)
    below = (rows < values.detach()[:, None]).sum(dim=1)
    padded = torch.cat([torch.zeros_like(rows[:, :1]), rows], dim=1)
    low = padded.gather(1, below[:, None]).squeeze(1)
    high = padded.gather(1, (below + 1).clamp_max(rows.shape[1])[:, None]).squeeze(1)
    inside = below < count
    step = torch.where(inside, (values - low) / (high - low).clamp_min(_TINY), torch.zeros_like(values))
    tail = (-(values - low) / low.clamp_min(_TINY)).exp() / (count + 1)
    return torch.where(inside, 1 - (below + step) / (count + 1), tail) * (count > 0)


def _every_second(logits: Tensor, labels: Tensor) -> Tensor:
    """Return a mask [N] of every second image of each class, in descending order of that class's logits [N, K]."""
    mask = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten()
        mask[rows[logits[rows.to(logits.device), label].argsort(descending=True).to(rows.device)][::2]] = True
    return mask


def _sorted_by_class(values: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return the values of each class, ascending and padded with infinity [K, C], and how many there are [K]."""
    counts = torch.bincount(labels, minlength=classes)
    found = torch.full((classes, max(1, int(counts.max()) if len(values) else 1)), math.inf).to(values)
    for label in range(classes):
        own = values[labels == label].sort().values
        found[label, : len(own)] = own
    return found, counts
