"""Phase 1, prototypes: where images of a class lie, pulled towards its text as far as a bound on the angle asks for."""

import math
from dataclasses import dataclass
from functools import cache
from math import lgamma, log, pi

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from numpy.polynomial import Polynomial
from numpy.typing import ArrayLike
from scipy.special import ive
from torch import Tensor

from robustvlm.core.seeds import generator
from robustvlm.errors import UserError

# Several directions for one class: spherical k-means

_ROUNDS = 50


def spherical_kmeans(features: Tensor, count: int, *, seed: int, stream: str = "") -> Tensor:
    """Return `count` unit centres [M, D] of unit features [N, D]; copies of a centre where fewer do.

    The hard limit of a mixture of von Mises-Fisher distributions (Banerjee et al., JMLR 6, 2005; several prototypes a
    class as in PALM, arXiv 2402.02653). Starts are spread as in k-means++; draws come from (seed, stream).

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> spherical_kmeans(rows, 2, seed=0).sum(dim=0)
        tensor([1., 1.])
    """
    centres = _spread(features, count, seed, stream)
    for _ in range(_ROUNDS):
        nearest = (features @ centres.T).argmax(dim=1)
        moved = torch.stack(
            [
                F.normalize(features[nearest == m].mean(dim=0), dim=0) if (nearest == m).any() else centre
                for m, centre in enumerate(centres)
            ]
        )
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


def _spread(features: Tensor, count: int, seed: int, stream: str) -> Tensor:
    """Choose the mean first and then, with odds by distance, features far from all chosen; repeats when none is."""
    draws = generator(seed, "spherical k-means", stream)
    if count == 1:
        return F.normalize(features.mean(dim=0), dim=0)[None]
    chosen = [features[int(torch.randint(len(features), (1,), generator=draws))]]
    while len(chosen) < count:
        far = (1.0 - (features @ torch.stack(chosen).T).amax(dim=1)).clamp_min(0.0).double().cpu()
        if float(far.sum()) < 1e-9:
            chosen.append(chosen[0])
            continue
        chosen.append(features[int(torch.multinomial(far, 1, generator=draws))])
    return torch.stack(chosen)


# The von Mises-Fisher distribution on the unit sphere: its log-normaliser, and how concentrated data are

Array = npt.NDArray[np.float64]

# Below this order SciPy's scaled Bessel function neither overflows nor underflows for kappa from 1e-8 on; from it on,
# Debye's expansion with the terms kept is exact to about 1e-13.
_LARGE_ORDER = 20.0
_TERMS = 9
_NEXT_TO_ZERO = 1e-8


def log_normaliser(kappa: ArrayLike, dim: int) -> Array:
    """Return log C_D(kappa), the log-density of vMF(mu, kappa) being log C_D(kappa) + kappa <mu, z> on S^{D-1}.

    C_D(kappa) = kappa^v / ((2 pi)^{D/2} I_v(kappa)) with v = D/2 - 1. For large orders I_v comes from Debye's uniform
    asymptotic expansion (NIST DLMF 10.41.3), in which the powers of kappa cancel on paper instead of in the computer.

    Args:
        kappa: concentrations >= 0, any shape. dim: D >= 2.

    Raises:
        UserError: a negative concentration, or fewer than two dimensions.

    Example:
        >>> log_normaliser([0.0, 10.0, 1e6], 512).round(3).tolist()
        [867.968, 867.87, -996939.682]
    """
    values = np.asarray(kappa, dtype=np.float64)
    if dim < 2:
        raise UserError(f"directions need at least 2 dimensions, got {dim}")
    if not (values >= 0.0).all():
        raise UserError("concentrations must not be negative")
    order = 0.5 * dim - 1.0
    if order >= _LARGE_ORDER:
        return _by_debye(values, order, dim)
    safe = np.maximum(values, _NEXT_TO_ZERO)
    direct = order * np.log(safe) - 0.5 * dim * log(2 * pi) - np.log(ive(order, safe)) - safe
    uniform = lgamma(0.5 * dim) - log(2.0) - 0.5 * dim * log(pi)
    return np.asarray(np.where(values < _NEXT_TO_ZERO, uniform, direct))


def _by_debye(kappa: Array, order: float, dim: int) -> Array:
    """I_v(v x) ~ e^{v eta} / (sqrt(2 pi v) (1 + x^2)^{1/4}) sum_k u_k(t) / v^k, eta = 1/t + log(x t / (1 + t))."""
    root = np.hypot(1.0, kappa / order)  # 1 / t
    series = sum(u(1.0 / root) / order**k for k, u in enumerate(_debye_polynomials()))
    # v log(kappa) - v eta, without the log(x) that both hold:
    powers = order * (log(order) + np.log1p(root) - root)
    return np.asarray(
        powers + 0.5 * log(2 * pi * order) + 0.5 * np.log(root) - np.log(series) - 0.5 * dim * log(2 * pi)
    )


@cache
def _debye_polynomials() -> tuple[Polynomial, ...]:
    """u_0 = 1, u_{k+1}(t) = t^2 (1 - t^2) u_k'(t) / 2 + int_0^t (1 - 5 s^2) u_k(s) ds / 8 (DLMF 10.41.9)."""
    found = [Polynomial([1.0])]
    for _ in range(_TERMS - 1):
        u = found[-1]
        found.append(Polynomial([0, 0, 0.5, 0, -0.5]) * u.deriv() + (Polynomial([1, 0, -5]) * u).integ() / 8)
    return tuple(found)


def concentration(resultant: ArrayLike, dim: int) -> Array:
    """Return the usual estimate of kappa from r = ||mean of unit vectors||: r (D - r^2) / (1 - r^2).

    Source: Banerjee et al., JMLR 6 (2005), eq. 4.4.

    Raises:
        UserError: r outside [0, 1).

    Example:
        >>> concentration([0.0, 0.5], 3).round(3).tolist()
        [0.0, 1.833]
    """
    r = np.asarray(resultant, dtype=np.float64)
    if not ((r >= 0.0) & (r < 1.0)).all():
        raise UserError("mean resultant lengths lie in [0, 1): equal features have no finite concentration")
    return np.asarray(r * (dim - r * r) / (1.0 - r * r))


def mean_resultant(length: float, count: int) -> float:
    """Return the resultant length without the bias of few vectors: sqrt((n r^2 - 1) / (n - 1)), at least 0.

    The mean of n independent unit vectors has E r^2 = rho^2 + (1 - rho^2) / n: one image alone would look infinitely
    concentrated (our reading; for many images it is r itself).

    Raises:
        UserError: fewer than two vectors.

    Example:
        >>> round(mean_resultant(0.8, 4), 3), round(mean_resultant(0.8, 10**6), 3)
        (0.721, 0.8)
    """
    if count < 2:
        raise UserError(f"a concentration needs at least 2 images, got {count}")
    return float(np.sqrt(max(0.0, (count * length * length - 1.0) / (count - 1.0))))


# Phase 1, prototypes: where images of a class lie, pulled towards its text as far as a bound on the angle asks for

_SHARE = 0.125
_LARGEST = 1.0 - 1e-6  # of a resultant: images of one class that all look the same


@dataclass(frozen=True, eq=False)
class Prototypes:
    """Unit prototypes [K, M, D], M a class, and how they came about.

    Attributes:
        alpha: weight of the text in each, [K, M]: 1 where a class has no images.
        kappa: concentration of each class's images, [K]; that of all classes together for one with too few images.
        counts: images of each class, [K].
        xi: largest angle to the text, in radians.
    """

    vectors: Tensor
    alpha: Tensor
    kappa: Tensor
    counts: Tensor
    xi: float


def align(visual: Tensor, text: Tensor, xi: float) -> tuple[Tensor, Tensor]:
    """Return mu = Norm((1 - alpha) v + alpha t) and alpha, with the smallest alpha for which arccos(<mu, t>) <= xi.

    Geodesic antigen alignment (Immuno-VLM, arXiv 2605.30745): the point of the ball around t that is nearest to v, in
    closed form on the great circle through both. With theta the angle between v and t, alpha is 0 for theta <= xi, else
    sin(theta - xi) / (sin(theta - xi) + sin(xi)).

    Args:
        visual, text: unit vectors [..., D]. xi: radians, from 0 (the text) to pi (the images).

    Raises:
        UserError: xi outside 0 to pi.

    Example:
        >>> mu, alpha = align(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.pi / 4)
        >>> mu, alpha
        (tensor([[0.7071, 0.7071]]), tensor([0.5000]))
    """
    if not 0.0 <= xi <= torch.pi:
        raise UserError(f"xi must be an angle between 0 and 180 degrees, got {xi * 180 / torch.pi:g}")
    v, t = visual.double(), text.double()
    theta = angle(v, t)
    away = torch.sin((theta - xi).clamp_min(0.0))
    # Opposite vectors span no great circle: the text alone is then within reach.
    alpha = torch.where(theta > torch.pi - 1e-6, 1.0, away / (away + max(math.sin(xi), 1e-300)))
    alpha = torch.where(theta <= xi, 0.0, alpha)
    mu = F.normalize((1.0 - alpha)[..., None] * v + alpha[..., None] * t, dim=-1)
    return mu.to(visual.dtype), alpha.to(visual.dtype)


def angle(one: Tensor, other: Tensor) -> Tensor:
    """Return the angles in radians between unit vectors [..., D], exact for near and for opposite ones too.

    Example:
        >>> angle(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
        tensor(1.5708)
    """
    return 2.0 * torch.atan2((one - other).norm(dim=-1), (one + other).norm(dim=-1))


def automatic_xi(features: Tensor, labels: Tensor, text: Tensor) -> float:
    """Return an eighth of the median angle between the mean image and the text of a class, in radians.

    Our reading; the paper leaves xi open. The share is relative, so that it does not depend on the gap between the two
    modalities in this model; an eighth was chosen on validation data, where prototypes nearer to the images found
    unknown ones less well in a style that was not learnt from (docs/immunize.md has the figures).

    Example:
        >>> round(automatic_xi(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), torch.tensor([[0.0, 1.0]])), 4)
        0.1963
    """
    seen = labels.unique()
    means = torch.stack([F.normalize(features[labels == k].mean(dim=0), dim=0) for k in seen])
    return _SHARE * float(angle(means.double(), text[seen].to(means).double()).median())


def fit_prototypes(
    features: Tensor, labels: Tensor, text: Tensor, *, xi: float | None = None, per_class: int = 1, seed: int = 0
) -> Prototypes:
    """Return the prototypes of all classes; one without images keeps its text (alpha = 1).

    Args:
        features: unit features [N, D] of images. labels: [N], those below 0 are left out.
        text: unit text embeddings [K, D]. xi: radians; None: see `automatic_xi`.
        per_class: M; a class with fewer different images has equal ones.

    Raises:
        UserError: no labelled image, or no prototypes asked for.

    Example:
        >>> found = fit_prototypes(torch.eye(2), torch.tensor([0, 1]), torch.eye(2))
        >>> found.vectors.shape, found.alpha.flatten().tolist()
        (torch.Size([2, 1, 2]), [0.0, 0.0])
    """
    if per_class < 1:
        raise UserError(f"a class needs at least 1 prototype, got {per_class}")
    features, labels = features[labels >= 0], labels[labels >= 0]
    if not len(features):
        raise UserError("there is no image of a known class to make prototypes from: pass --no-images to do without")
    xi = automatic_xi(features, labels, text) if xi is None else xi
    vectors, alphas, lengths = [], [], []
    counts = torch.bincount(labels, minlength=len(text))
    for k in range(len(text)):
        own = features[labels == k]
        centres = spherical_kmeans(own, per_class, seed=seed, stream=str(k)) if len(own) else text[k].expand(1, -1)
        mu, alpha = align(centres, text[k].to(centres).expand_as(centres), xi)
        if not len(own):
            mu, alpha = text[k].expand(per_class, -1).to(features), torch.ones(per_class)
        vectors.append(mu)
        alphas.append(alpha)
        lengths.append(float(own.double().mean(dim=0).norm()) if len(own) else 0.0)
    kappa = _concentrations(lengths, counts, features.shape[1])
    return Prototypes(torch.stack(vectors), torch.stack(alphas), kappa, counts, xi)


def text_prototypes(text: Tensor) -> Prototypes:
    """Return the prototypes of the zero-shot mode: the texts themselves, alpha = 1; there is no kappa (0).

    Example:
        >>> text_prototypes(torch.eye(3)).vectors.shape
        torch.Size([3, 1, 3])
    """
    count = len(text)
    none = torch.zeros(count, dtype=torch.int64)
    return Prototypes(text[:, None, :], torch.ones(count, 1), torch.zeros(count), none, 0.0)


def _concentrations(lengths: list[float], counts: Tensor, dim: int) -> Tensor:
    """Return kappa of each class; classes of one image or none get that of the mean resultant of the others."""
    found = {
        k: min(_LARGEST, mean_resultant(length, int(n)))
        for k, (length, n) in enumerate(zip(lengths, counts, strict=True))
        if n >= 2
    }
    pooled = sum(found.values()) / len(found) if found else 0.0
    return torch.tensor([float(concentration(found.get(k, pooled), dim)) for k in range(len(lengths))])
