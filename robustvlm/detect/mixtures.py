"""A mixture of Gaussians for every class: the density of the likeliest class."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from robustvlm.core.seeds import generator
from robustvlm.detect.base import FittedDetector, check_known
from robustvlm.detect.covariance import Estimator, inverse_root, shrunk, squared_distances
from robustvlm.errors import UserError

# Steps of k-means from the spread-out starts.
_SETTLING = 10


@dataclass(frozen=True, eq=False)
class Mixture:
    """Components of all classes: means [M, D], log-weights [M] within their class, class of each [M], W [D, R]."""

    means: Tensor
    log_weights: Tensor
    of_class: Tensor
    root: Tensor


@dataclass(frozen=True, eq=False)
class ClassMixtures(FittedDetector):
    """Log-density of the likeliest class, each class a mixture of Gaussians of one covariance shared by all.

    In the manner of HVCM, which learns such mixtures together with the network; here the features are given, and the
    mixtures are fitted by expectation maximisation (our reading). One covariance for all components, since a class
    has too few images for one of its own. With one component it is Mahalanobis up to a factor of 2.

    Args:
        n_components: Gaussians per class; a class gets at most one per two of its images.
        covariance: estimator of the covariance; n_iter: steps of expectation maximisation.
        seed: of the first means, which are spread by k-means++.

    Source: Li et al. 2023, arXiv 2308.15580.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [1.2, 0.0], [0.0, 1.0], [0.0, 1.2]])
        >>> detector = ClassMixtures(1).fit_features(features, torch.tensor([0, 0, 1, 1]))
        >>> near, far = detector.score(torch.tensor([[1.1, 0.0], [1.0, 1.0]]))
        >>> bool(near > far)
        True
    """

    n_components: int = 2
    covariance: Estimator = "ledoit-wolf"
    n_iter: int = 50
    seed: int = 0
    mixture: Mixture | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.n_components < 1 or self.n_iter < 1:
            raise UserError(f"a mixture needs at least 1 component and 1 step, got {self.n_components}, {self.n_iter}")

    def fit_features(self, features: Tensor, labels: Tensor) -> ClassMixtures:
        check_known(features, labels)
        wide = features.detach().cpu().double()
        found = fit_mixtures(wide, labels.cpu(), self.n_components, self.covariance, self.n_iter, self.seed)
        return replace(self, mixture=replace(found, means=found.means.to(features), root=found.root.to(features)))

    def score(self, features: Tensor) -> Tensor:
        found = self.learnt(self.mixture)
        root = found.root.to(features)
        distances = squared_distances(features @ root, found.means.to(features) @ root)
        terms = found.log_weights.to(features) - 0.5 * distances
        classes = found.of_class.unique().tolist()
        of_class = found.of_class.to(features.device)
        return torch.stack([terms[:, of_class == label].logsumexp(dim=1) for label in classes]).amax(dim=0)


def fit_mixtures(
    features: Tensor, labels: Tensor, n_components: int, covariance: Estimator, n_iter: int, seed: int
) -> Mixture:
    """Fit all classes together by expectation maximisation: their responsibilities apart, their covariance in common.

    Args:
        features, labels: float64 [N, D] and int64 [N]; the other arguments as in `ClassMixtures`.
    """
    classes, index, counts = labels.unique(return_inverse=True, return_counts=True)
    starts, owner = [], []
    for row, label in enumerate(classes.tolist()):
        own = features[index == row]
        starts.append(_spread_out(own, min(n_components, max(1, len(own) // 2)), generator(seed, "mixture", label)))
        owner += [row] * len(starts[-1])
    means, of_class = torch.cat(starts), torch.tensor(owner)
    share = _nearest(features, means, of_class, index)
    for _ in range(_SETTLING):  # k-means first: a covariance of scattered starts would melt the components together
        means = share.T @ features / share.sum(dim=0).clamp_min(1e-12)[:, None]
        share = _nearest(features, means, of_class, index)
    for _ in range(n_iter):
        mass = share.sum(dim=0)
        means = share.T @ features / mass.clamp_min(1e-12)[:, None]
        log_weights = (mass / counts[of_class]).clamp_min(1e-300).log()
        root, _ = inverse_root(shrunk(_deviations(features, means, share), covariance))
        moved = _responsibilities(features @ root, means @ root, log_weights, of_class, index)
        done = torch.allclose(moved, share, rtol=0.0, atol=1e-9)
        share = moved
        if done:
            break
    return Mixture(means, log_weights, classes[of_class], root)


def _nearest(features: Tensor, means: Tensor, of_class: Tensor, index: Tensor) -> Tensor:
    """Return one-hot shares [N, M]: each image belongs to the nearest mean of its class."""
    gaps = squared_distances(features, means).masked_fill(of_class[None, :] != index[:, None], float("inf"))
    return torch.zeros_like(gaps).scatter(1, gaps.argmin(dim=1, keepdim=True), 1.0)


def _responsibilities(points: Tensor, centres: Tensor, log_weights: Tensor, of_class: Tensor, index: Tensor) -> Tensor:
    """Return the share [N, M] that each component has in each image; components of other classes have none."""
    terms = log_weights - 0.5 * squared_distances(points, centres)
    return terms.masked_fill(of_class[None, :] != index[:, None], float("-inf")).softmax(dim=1)


def _deviations(features: Tensor, means: Tensor, share: Tensor) -> Tensor:
    """Return rows [N', D] whose mean outer product is the components' common covariance.

    An image counts once per component, scaled by the root of its share; rows without weight are left out, and the
    rest is scaled so that the mean over rows is the sum over images divided by their number.
    """
    image, component = (share > 1e-8).nonzero(as_tuple=True)
    rows = (features[image] - means[component]) * share[image, component].sqrt()[:, None]
    return rows * (len(rows) / len(features)) ** 0.5


def _spread_out(points: Tensor, count: int, draws: torch.Generator) -> Tensor:
    """Return `count` of the points [N, D], drawn far from each other (k-means++, Arthur and Vassilvitskii 2007).

    A single one is the mean, which is where it ends anyway.
    """
    if count == 1:
        return points.mean(dim=0, keepdim=True)
    chosen = [int(torch.randint(len(points), (1,), generator=draws))]
    for _ in range(count - 1):
        gap = squared_distances(points, points[chosen]).amin(dim=1)
        weights = gap if float(gap.sum()) > 0 else torch.ones_like(gap)
        chosen.append(int(torch.multinomial(weights, 1, generator=draws)))
    return points[chosen]
