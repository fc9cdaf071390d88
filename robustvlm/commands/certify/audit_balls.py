"""The balls that an audit searches: how far a step goes, what lies inside, and which points an attacker may choose."""

import torch
from torch import Tensor

from robustvlm.certify.threats import Ellipsoid, Threat

_SPARSE = (0.01, 0.001, 0.0)
"""Shares of the pixels that an l1 step moves, by turns of the starts; at least one pixel. The number of kinds of starts
has no factor in common with theirs, so that every kind meets every share."""
_LEVELS = 255.0
_FURTHER, _HALVINGS = 64.0, 40
"""How far a change is stretched at most while pixels drop out, and steps of the search for how far."""


def unit(x: Tensor) -> Tensor:
    """Return rows scaled to l2 norm one; rows of zeros stay zero.

    Example:
        >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
        [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    return x / lengths(x).clamp_min(1e-30)


def into_ball(delta: Tensor, eps: float) -> Tensor:
    """Return perturbations scaled down to l2 norm `eps` where they are longer."""
    return delta * (eps / lengths(delta).clamp_min(1e-30)).clamp_max(1.0)


def lengths(x: Tensor) -> Tensor:
    """Return the l2 norms of rows, shaped to broadcast against them."""
    return x.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))


class Ball:
    """The l2 ball: steps along the gradient, and any point inside.

    Example:
        >>> Ball().pushed(torch.zeros(1, 1, 1, 2), torch.tensor([[[[3.0, 4.0]]]]), 10.0).flatten().tolist()
        [6.0, 8.0]
    """

    def direction(self, velocity: Tensor) -> Tensor:
        """Return steps of length one that gain most along `velocity`."""
        return unit(velocity)

    def started(self, delta: Tensor, eps: float) -> Tensor:
        """Return changes of l2 length `eps` as a descent begins with them."""
        del eps
        return delta

    def inside(self, delta: Tensor, eps: float) -> Tensor:
        """Return changes drawn in where they are longer than `eps`."""
        return into_ball(delta, eps)

    def pushed(self, clean: Tensor, points: Tensor, eps: float) -> Tensor:
        """Return points that an attacker may choose, on the rays from the clean image, as far out as `eps` allows."""
        return clean + self.inside(eps * self.direction(points - clean), eps)


class L1Ball(Ball):
    """The l1 ball: steps move the few pixels where the gradient is largest (Tramer and Boneh 2019).

    How few differs from row to row: a linear classifier falls soonest to one pixel, others to a hundredth of them.

    Example:
        >>> L1Ball().inside(torch.tensor([[3.0, -1.0]]), 2.0).tolist()
        [[1.5, -0.5]]
    """

    def direction(self, velocity: Tensor) -> Tensor:
        flat = velocity.flatten(1).abs()
        kept = [max(1, round(_SPARSE[row % len(_SPARSE)] * flat.shape[1])) for row in range(len(flat))]
        ranked = flat.topk(max(kept), dim=1).values
        least = ranked.gather(1, torch.tensor(kept, device=flat.device)[:, None] - 1).clamp_min(1e-30)
        signs = torch.where(flat >= least, velocity.flatten(1).sign(), torch.zeros_like(flat))
        return (signs / signs.abs().sum(dim=1, keepdim=True).clamp_min(1.0)).view_as(velocity)

    def started(self, delta: Tensor, eps: float) -> Tensor:
        return eps * self.direction(delta)

    def inside(self, delta: Tensor, eps: float) -> Tensor:
        length = delta.flatten(1).abs().sum(dim=1).view(-1, *[1] * (delta.ndim - 1))
        return delta * (eps / length.clamp_min(1e-30)).clamp_max(1.0)

    def pushed(self, clean: Tensor, points: Tensor, eps: float) -> Tensor:
        delta = points - clean
        length = delta.flatten(1).abs().sum(dim=1).view(-1, *[1] * (delta.ndim - 1))
        return clean + delta * (eps / length.clamp_min(1e-30))


class EllipsoidBall(Ball):
    """An ellipsoid (T29): steps go further where the scales are larger, as the noise does.

    Example:
        >>> from robustvlm.certify.threats import find_threat
        >>> ball = EllipsoidBall(find_threat("ellipsoid@1,1,8"))
        >>> x = torch.zeros(1, 3, 1, 1)
        >>> ball.pushed(x, torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1), 2.0).flatten().tolist()
        [1.0, 0.0, 0.0]
    """

    def __init__(self, threat: Ellipsoid) -> None:
        self.threat = threat

    def direction(self, velocity: Tensor) -> Tensor:
        scales = self.threat.scales(velocity.shape[1:]).to(velocity)
        return self._stretched(self.threat.back(scales * scales * self.threat.forth(velocity)), 1.0)

    def started(self, delta: Tensor, eps: float) -> Tensor:
        return self._stretched(delta, eps)

    def inside(self, delta: Tensor, eps: float) -> Tensor:
        length = self.threat.length(delta).view(-1, *[1] * (delta.ndim - 1))
        return delta * (eps / length.clamp_min(1e-30)).clamp_max(1.0).to(delta.dtype)

    def pushed(self, clean: Tensor, points: Tensor, eps: float) -> Tensor:
        return clean + self._stretched(points - clean, eps)

    def _stretched(self, delta: Tensor, eps: float) -> Tensor:
        length = self.threat.length(delta).view(-1, *[1] * (delta.ndim - 1))
        return delta * (eps / length.clamp_min(1e-30)).to(delta.dtype)


class WholeBall(Ball):
    """Images of 8 bits in the l2 ball: whole grey levels from 0 to 255, as many and as large as `eps` has room for.

    Example:
        >>> x = torch.tensor([[[[0.0, 100.0, 200.0]]]]) / 255
        >>> found = WholeBall().pushed(x, x + torch.tensor([[[[-1.0, 2.6, 1.4]]]]) / 255, 3.2 / 255)
        >>> (255 * (found - x)).round().flatten().tolist()
        [0.0, 3.0, 1.0]
    """

    def pushed(self, clean: Tensor, points: Tensor, eps: float) -> Tensor:
        levels = (clean.double() * _LEVELS).round()
        reach = eps * _LEVELS
        along = unit((points - clean).double())
        # Pixels that have come to 0 or 255 stay there, and the others go on.
        low, high = (torch.full_like(lengths(along), end) for end in (0.0, reach * _FURTHER))
        for _ in range(_HALVINGS):
            middle = 0.5 * (low + high)
            fits = lengths(_whole(levels, middle * along)) <= reach
            low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
        wanted = low * along
        whole = _whole(levels, wanted)
        left = reach * reach - whole.flatten(1).square().sum(dim=1, keepdim=True)
        more = self._more(levels, whole, wanted).flatten(1)
        # What cannot go on costs nothing: it must not use up what is left for those behind it.
        cost = (2.0 * whole.flatten(1).abs() + 1.0).masked_fill(more == 0, 0.0)
        order = (wanted - whole).flatten(1).abs().argsort(dim=1, descending=True)
        paid = cost.gather(1, order).cumsum(dim=1) <= left
        taken = torch.zeros_like(more).scatter(1, order, paid.to(more.dtype))
        found = whole + (taken * more).view_as(whole)
        return ((levels + found) / _LEVELS).to(clean.dtype)

    def _more(self, levels: Tensor, whole: Tensor, wanted: Tensor) -> Tensor:
        """Return by how much each pixel may go on: one level, away from where it was, within 0 to 255."""
        step = torch.sign(wanted)
        there = levels + whole + step
        return torch.where((there >= 0.0) & (there <= _LEVELS), step, torch.zeros_like(step))


def _whole(levels: Tensor, wanted: Tensor) -> Tensor:
    """Return whole changes, no longer than the wanted ones, that keep levels within 0 to 255."""
    return torch.clamp(levels + wanted.trunc(), 0.0, _LEVELS) - levels


def ball_of(threat: Threat) -> Ball:
    """Return the ball of a threat to single pixels.

    Example:
        >>> from robustvlm.certify.threats import find_threat
        >>> type(ball_of(find_threat("8bit"))).__name__
        'WholeBall'
    """
    if isinstance(threat, Ellipsoid):
        return EllipsoidBall(threat)
    return {"l1": L1Ball, "8bit": WholeBall}.get(threat.name, Ball)()
