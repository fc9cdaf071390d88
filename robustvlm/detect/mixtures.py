"""Scores from classifiers fitted on features: mixtures of Gaussians, a linear probe, an ensemble of heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax
from torch import Tensor

from robustvlm.core.seeds import generator
from robustvlm.detect.base import FittedDetector, Head, check_known, confidence
from robustvlm.detect.distances import Estimator, inverse_root, shrunk, squared_distances
from robustvlm.errors import UserError

# A mixture of Gaussians for every class: the density of the likeliest class

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

    Source: Li et al. 2023, arXiv 2408.15580.

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


# A linear probe: multinomial logistic regression on frozen features


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A linear classifier of features: weights [K, D] and biases [K].

    Example:
        >>> LinearProbe(torch.eye(2), torch.zeros(2)).logits(torch.tensor([[1.0, 2.0]]))
        tensor([[1., 2.]])
    """

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """Return logits [N, K] of features [N, D]."""
        return features @ self.weight.to(features).T + self.bias.to(features)


def fit_probe(
    features: Tensor, labels: Tensor, n_classes: int, *, strength: float = 10.0, n_iter: int = 500
) -> LinearProbe:
    """Return the probe that minimises |W|^2 / 2 + strength * (sum of cross-entropies); biases are not penalised.

    The problem is convex: L-BFGS (SciPy) from zero, in float64, always ends at the same probe. A class without images
    gets a bias that keeps its probability low.

    Args:
        features, labels: unit features [N, D] and labels [N] below `n_classes`.
        strength: inverse of the penalty, the C of scikit-learn's LogisticRegression.
        n_iter: iterations at most.

    Example:
        >>> features = torch.eye(2).repeat(10, 1)
        >>> fit_probe(features, torch.arange(20) % 2, 2).logits(torch.eye(2)).argmax(1)
        tensor([0, 1])
    """
    check_known(features, labels)
    if int(labels.max()) >= n_classes:
        raise UserError(f"label {int(labels.max())} has no class among {n_classes}")
    if not strength > 0:
        raise UserError(f"the strength of the fit must be positive, got {strength}")
    x = features.detach().cpu().double().numpy()
    wanted = np.eye(n_classes)[labels.cpu().numpy()]
    dim, count = x.shape[1], len(x)

    from scipy.optimize import minimize

    def loss(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        theta = flat.reshape(n_classes, dim + 1)
        weight, bias = theta[:, :dim], theta[:, dim]
        logs = log_softmax(x @ weight.T + bias, axis=1)
        # Over the strength and the count, so that the solver's tolerances mean the same for any data.
        value = -(logs * wanted).sum() / count + np.square(weight).sum() / (2 * strength * count)
        surplus = (np.exp(logs) - wanted) / count
        slope = np.column_stack([surplus.T @ x + weight / (strength * count), surplus.sum(axis=0)])
        return float(value), slope.ravel()

    start, settings = np.zeros(n_classes * (dim + 1)), {"maxiter": n_iter, "ftol": 1e-14, "gtol": 1e-8}
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options=settings)
    theta = torch.from_numpy(found.x.reshape(n_classes, dim + 1))
    return LinearProbe(theta[:, :dim].to(features), theta[:, dim].to(features))


# An ensemble of heads: the zero-shot one, a linear probe, and any others, by the mean of their probabilities


@dataclass(frozen=True, eq=False)
class COOkeD(FittedDetector):
    """Maximum softmax probability of the mean of the heads' probabilities, as log-odds.

    The paper's third head, a network trained for the known classes, is left out where there is none (our reading):
    `mean_probabilities` takes any number of heads.

    Args:
        head: the zero-shot head, at the model's own temperature.
        strength: inverse penalty of the linear probe.

    Source: Humblot-Renaux et al. 2025, arXiv 2507.22576.

    Example:
        >>> features = torch.eye(2).repeat(10, 1)
        >>> detector = COOkeD(Head(torch.eye(2), 10.0)).fit_features(features, torch.arange(20) % 2)
        >>> sure, unsure = detector.score(torch.tensor([[1.0, 0.0], [0.7, 0.7]]))
        >>> bool(sure > unsure)
        True
    """

    head: Head
    strength: float = 10.0
    probe: LinearProbe | None = field(default=None, repr=False)

    def fit_features(self, features: Tensor, labels: Tensor) -> COOkeD:
        check_known(features, labels)
        n_classes = len(self.head.class_embeddings)
        return replace(self, probe=fit_probe(features, labels, n_classes, strength=self.strength))

    def log_probabilities(self, features: Tensor) -> Tensor:
        """Return the ensemble's log-probabilities [N, K]; it is a classifier too."""
        return mean_probabilities([self.head.logits(features), self.learnt(self.probe).logits(features)])

    def score(self, features: Tensor) -> Tensor:
        return confidence(self.log_probabilities(features))


def mean_probabilities(logits: Sequence[Tensor]) -> Tensor:
    """Return the logarithm of the mean softmax of several heads' logits, each [N, K] -> [N, K].

    Example:
        >>> mean_probabilities([torch.zeros(1, 2), torch.tensor([[0.0, -50.0]])]).exp()
        tensor([[0.7500, 0.2500]])
    """
    return torch.stack([each.log_softmax(dim=1) for each in logits]).logsumexp(dim=0) - math.log(len(logits))
