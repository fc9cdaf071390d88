"""The Poincare ball of curvature -r: points x with r |x|^2 < 1, for float32 or wider tensors [..., D].

| function | formula |
|---|---|
| `exp0` | tanh(s) v / s, s = sqrt(r) abs(v): from a tangent vector at the origin into the ball |
| `log0` | artanh(s) x / s, s = sqrt(r) abs(x): the inverse |
| `mobius_add` | ((1 + 2r<x,y> + r y.y) x + (1 - r x.x) y) / (1 + 2r<x,y> + r^2 x.x y.y) |
| `distance` | (2 / sqrt r) artanh(sqrt(r) abs(-x + y)), with Mobius addition |
| `hyp_avg` | the Einstein midpoint: sum of w g k / sum of w g in Klein coordinates k with Lorentz factors g |

Sources: Ungar 2008 (A Gyrovector Space Approach to Hyperbolic Geometry); Ganea et al. 2018 (arXiv 1805.09112,
section 2); Khrulkov et al. 2020 (arXiv 1904.02239, equation 10: the midpoint). As r -> 0 distances become 2 |x - y|.

Every function leaves autocast and computes in float32 at least: half precision has no digits left near the rim.
"""

import math

import torch
from torch import Tensor

from robustvlm.errors import UserError

# How far points stay from the rim, as 1 - sqrt(r) |x|: 1 - r |x|^2 then keeps at least four digits in its dtype.
_RIM = {torch.float32: 1e-3, torch.float64: 1e-9}
# Below this norm tanh(s) / s is 1 to the last bit of float32; it only keeps 0 / 0 away.
_TINY = 1e-12


def check_curvature(r: float) -> float:
    """Return r, or raise a UserError unless it is positive and finite.

    Example:
        >>> check_curvature(0.5)
        0.5
    """
    if not 0 < r < math.inf:
        raise UserError(f"the curvature must be a positive number, got {r:g}: pass 1 (the ball then has radius 1)")
    return r


def project(x: Tensor, r: float) -> Tensor:
    """Return points [..., D] moved off the rim: sqrt(r) |x| is at most 0.999 in float32, 1 - 1e-9 in float64.

    Example:
        >>> project(torch.tensor([3.0, 4.0]), 1.0).norm().item()
        0.99...
    """
    with _no_autocast(x):
        x = _wide(x)
        return x * _within(x, (1 - _RIM[x.dtype]) / math.sqrt(r))


def exp0(v: Tensor, r: float) -> Tensor:
    """Return the points that the tangent vectors [..., D] at the origin lead to, kept off the rim.

    Example:
        >>> exp0(torch.tensor([2.0, 0.0]), 1.0)
        tensor([0.9640, 0.0000])
    """
    with _no_autocast(v):
        v = _wide(v)
        s = math.sqrt(r) * _norm(v)
        return project(v * (torch.tanh(s) / s), r)


def log0(x: Tensor, r: float) -> Tensor:
    """Return the tangent vectors [..., D] at the origin that lead to the points: the inverse of `exp0`.

    Example:
        >>> log0(exp0(torch.tensor([1.5, 0.0]), 1.0), 1.0).round(decimals=4)
        tensor([1.5000, 0.0000])
    """
    with _no_autocast(x):
        x = project(x, r)
        s = math.sqrt(r) * _norm(x)
        return x * (torch.atanh(s) / s)


def mobius_add(x: Tensor, y: Tensor, r: float) -> Tensor:
    """Return the Mobius sums [..., D] of points, not commutative; -x is the inverse of x.

    Example:
        >>> x = torch.tensor([0.3, 0.4])
        >>> mobius_add(-x, x, 1.0)
        tensor([0., 0.])
    """
    with _no_autocast(x):
        x, y = _wide(x), _wide(y)
        xy, xx, yy = ((a * b).sum(-1, keepdim=True) for a, b in ((x, y), (x, x), (y, y)))
        top = (1 + 2 * r * xy + r * yy) * x + (1 - r * xx) * y
        return top / (1 + 2 * r * xy + r**2 * xx * yy)


def distance(x: Tensor, y: Tensor, r: float) -> Tensor:
    """Return the distances [...] between points [..., D], row by row.

    Computed as (2 / sqrt r) arsinh(sqrt(r) |x - y| / sqrt((1 - r|x|^2)(1 - r|y|^2))), which equals the usual formula
    and keeps its digits both for near neighbours and at the rim, where 1 - artanh's argument has none left.

    Example:
        >>> distance(torch.zeros(2), torch.tensor([0.5, 0.0]), 1.0)  # 2 artanh(0.5)
        tensor(1.0986)
    """
    with _no_autocast(x):
        x, y = _wide(x), _wide(y)
        return _from_squares((x - y).square().sum(-1), _gap(x, r), _gap(y, r), r)


def distances(x: Tensor, y: Tensor, r: float) -> Tensor:
    """Return the distances [N, M] of points [N, D] to points [M, D], by one matrix product.

    |x - y|^2 is taken from inner products, so a distance far below |x| (closer than about 1e-3 |x|) is less exact than
    that of `distance`.

    Example:
        >>> distances(torch.zeros(1, 2), torch.tensor([[0.5, 0.0], [0.0, 0.0]]), 1.0)
        tensor([[1.0986, 0.0000]])
    """
    with _no_autocast(x):
        x, y = _wide(x), _wide(y)
        xx, yy = x.square().sum(-1), y.square().sum(-1)
        squares = (xx[:, None] + yy[None, :] - 2 * x @ y.T).clamp_min(0)
        return _from_squares(squares, (1 - r * xx)[:, None], (1 - r * yy)[None, :], r)


def hyp_avg(x: Tensor, weights: Tensor, r: float) -> Tensor:
    """Return the weighted Einstein midpoints [M, D] of points [N, D] with weights [M, N] >= 0 (HypAvg).

    For two points of equal weight it is the middle of the geodesic between them. Computed on the hyperboloid, where the
    midpoint is the direction of the weighted sum; the square root there is never below the sum of the weights, so that
    gradients stay finite. A row of zero weights gives the origin.

    Example:
        >>> hyp_avg(torch.tensor([[0.5, 0.0], [-0.5, 0.0]]), torch.ones(1, 2), 1.0)
        tensor([[0., 0.]])
    """
    with _no_autocast(x):
        x = _wide(x)
        weights = weights.to(x.dtype)
        gap = _gap(x, r)[:, None]
        time = weights @ ((2 - gap) / gap)  # the Lorentz factor (1 + r|x|^2) / (1 - r|x|^2)
        space = weights @ (2 * x / gap)
        mass = weights.sum(-1, keepdim=True)
        norm = time.square() - r * space.square().sum(-1, keepdim=True)
        root = norm.clamp_min(mass.square().clamp_min(_TINY)).sqrt()
        return project(space / (time + root), r)


def _from_squares(squares: Tensor, gap_x: Tensor, gap_y: Tensor, r: float) -> Tensor:
    ratio = r * squares / (gap_x * gap_y)
    # The root has no derivative at 0: coincident points get the gradient 0.
    apart = ratio > 0
    half = torch.where(apart, torch.where(apart, ratio, 1.0).sqrt(), 0.0)
    return 2 / math.sqrt(r) * torch.asinh(half)


def _gap(x: Tensor, r: float) -> Tensor:
    return 1 - r * x.square().sum(-1)


def _norm(x: Tensor) -> Tensor:
    return x.norm(dim=-1, keepdim=True).clamp_min(_TINY)


def _within(x: Tensor, most: float) -> Tensor:
    """Return the factors [..., 1] that bring norms down to `most`, 1 where they are."""
    return (most / _norm(x)).clamp_max(1.0)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _no_autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)
