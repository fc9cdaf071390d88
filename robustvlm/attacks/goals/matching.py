"""How image tokens are moved: away from an image's own, or to those of a picture, as published attacks do it.

| way          | what attacks follow                                                    | source                    |
|--------------|------------------------------------------------------------------------|---------------------------|
| `tokens`     | mean cosine of each token to its counterpart                           | VEAttack (2505.17440)     |
| `pooled`     | cosine of the mean token                                               | AttackVLM-ii (2305.16934) |
| `prototypes` | as `tokens`, weighted, with a pull to the least alike of some pictures | PA-Attack (2602.19418)    |
| `crops`      | as `pooled`, of a crop of the attacked image, another at every step    | M-Attack (2503.10635)     |
| `foa`        | as `crops`, and clusters of tokens matched by optimal transport        | FOA (2505.21494)          |

The first three lead away (goal `unsay`), all but the third lead to a picture (goal `match`). Tokens are compared at
unit length, and towers differ in what they pool, so that the global feature is the mean of the unit tokens everywhere.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

CLUSTERS, TRANSPORT_WEIGHT = 5, 0.2
"""Of `foa`: groups of tokens, and the weight of their match beside the global cosine (our choice)."""
CROP = (0.5, 0.9)
"""Share of an image's area that a crop has, as in the M-Attack authors' settings; crops here are squares."""
_SHARPNESS = 20.0
_SMOOTHNESS = 0.05
_ROUNDS = 10


def token_cosine(tokens: Tensor, others: Tensor) -> Tensor:
    """Return the mean cosine [B] of tokens [B, T, D] to their counterparts [B or 1, T, D].

    Example:
        >>> token_cosine(torch.eye(2)[None], torch.ones(1, 2, 2)).item()
        0.7071...
    """
    return F.cosine_similarity(tokens, others, dim=2).mean(1)


def pooled_cosine(tokens: Tensor, others: Tensor) -> Tensor:
    """Return the cosine [B] of the mean unit tokens of [B, T, D] and [B or 1, T, D].

    Example:
        >>> round(pooled_cosine(torch.eye(2)[None], torch.eye(2).flip(0)[None]).item(), 6)
        1.0
    """
    return F.cosine_similarity(_pooled(tokens), _pooled(others), dim=1)


def anchored(tokens: Tensor, clean: Tensor, anchors: Tensor, *, pull: float = 1.0) -> Tensor:
    """Return what PA-Attack raises: sum over tokens of w_t (pull cos(v'_t, p_t) - cos(v'_t, v_t)), [B].

    p is the anchor that is least like the clean image. The weights are a softmax at temperature 1/20 of how much a
    token matters: of the class token's attention in the paper, of the cosine to the mean token here, which all towers
    have. (Its second stage, weights anew from the attacked image, is left out.)

    Args:
        tokens, clean: [B, T, D]. anchors: tokens of other pictures [K, T, D].
    """
    units = F.normalize(clean, dim=2)
    weight = (_SHARPNESS * torch.einsum("btd,bd->bt", units, F.normalize(units.mean(1), dim=1))).softmax(1)
    alike = torch.einsum("btd,ktd->bk", units, F.normalize(anchors.to(clean), dim=2))
    anchor = anchors.to(clean)[alike.argmin(1)]
    gain = pull * F.cosine_similarity(tokens, anchor, dim=2) - F.cosine_similarity(tokens, clean, dim=2)
    return (weight.detach() * gain).sum(1)


def aligned(tokens: Tensor, others: Tensor, *, clusters: int = CLUSTERS, weight: float = TRANSPORT_WEIGHT) -> Tensor:
    """Return what FOA raises: the cosine of the mean tokens, and `weight` times `matched`, [B]."""
    return pooled_cosine(tokens, others) + weight * matched(tokens, others, clusters=clusters)


def matched(tokens: Tensor, others: Tensor, *, clusters: int = CLUSTERS, smoothness: float = _SMOOTHNESS) -> Tensor:
    """Return the mean cosine [B] of the clusters of tokens [B, T, D] and [B or 1, T, D] that are matched best.

    Clusters have equal mass; the plan is that of entropic optimal transport with cost 1 - cosine. Gradients leave the
    plan and the clusters' members as they are, which for the plan is the gradient of the entropic cost itself.
    """
    mine, theirs = (cluster_centres(some, clusters) for some in (tokens, others.expand(len(tokens), -1, -1)))
    cosines = torch.einsum("bkd,bld->bkl", mine, theirs)
    return (transport(1 - cosines.detach(), smoothness) * cosines).sum((1, 2))


def cluster_centres(tokens: Tensor, clusters: int) -> Tensor:
    """Return unit centres [B, K, D] of tokens [B, T, D]: k-means by cosines, no more clusters than tokens.

    Begun at the token nearest to the mean, then each time at the one farthest from those there are: nothing is drawn.
    """
    units = F.normalize(tokens, dim=2)
    fixed, rows = units.detach(), torch.arange(len(units), device=units.device)
    first = torch.einsum("btd,bd->bt", fixed, fixed.mean(1)).argmax(1)
    centres = fixed[rows, first][:, None]
    while centres.shape[1] < min(clusters, units.shape[1]):
        nearest = torch.einsum("btd,bkd->btk", fixed, centres).amax(2)
        centres = torch.cat([centres, fixed[rows, nearest.argmin(1)][:, None]], 1)
    for _ in range(_ROUNDS):
        centres = _means(fixed, centres)
    return _means(units, centres)


def _means(units: Tensor, centres: Tensor) -> Tensor:
    """Return the unit means of the tokens nearest to each centre; a centre without any stays."""
    member = F.one_hot(torch.einsum("btd,bkd->btk", units.detach(), centres).argmax(2), centres.shape[1]).to(units)
    sums = torch.einsum("btk,btd->bkd", member, units)
    return F.normalize(torch.where((member.sum(1) > 0)[..., None], sums, centres), dim=2)


def transport(cost: Tensor, smoothness: float = _SMOOTHNESS, rounds: int = 100) -> Tensor:
    """Return the entropic optimal plan [B, K, L] between equal masses for costs [B, K, L] (Cuturi 2013, in logarithms).

    Example:
        >>> transport(torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])).round(decimals=3).tolist()
        [[[0.5, 0.0], [0.0, 0.5]]]
    """
    scores = -cost / smoothness
    left, right = -math.log(cost.shape[1]), -math.log(cost.shape[2])
    v = scores.new_zeros(len(cost), 1, cost.shape[2])
    for _ in range(rounds):
        u = left - (scores + v).logsumexp(2, keepdim=True)
        v = right - (scores + u).logsumexp(1, keepdim=True)
    return (scores + u + v).exp()


def _pooled(tokens: Tensor) -> Tensor:
    return F.normalize(tokens, dim=2).mean(1)


TO: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "tokens": token_cosine,
    "pooled": pooled_cosine,
    "crops": pooled_cosine,
    "foa": aligned,
}
"""Ways to a picture: from tokens and its tokens to what attacks raise, [B]."""
CROPPED = ("crops", "foa")
"""Those that look at a crop of the attacked image."""


def crop(pixels: Tensor, share: tuple[float, float] = CROP) -> Tensor:
    """Return a square part of each image [B, 3, H, W], drawn out to its size; differentiable.

    Where it lies and how large it is (between these shares of the area) follow from the image's own pixels, as a hash
    does: every step of an attack meets another crop, and the same pixels always the same, whatever batch they are in.

    Example:
        >>> x = torch.rand(2, 3, 8, 8)
        >>> crop(x).shape, torch.equal(crop(x)[:1], crop(x[:1])), torch.equal(crop(x), crop(x + 1e-3))
        (torch.Size([2, 3, 8, 8]), True, False)
    """
    size, horizontal, vertical = _draws(pixels.detach())
    side = (share[0] + (share[1] - share[0]) * size).sqrt()
    grid = pixels.new_zeros(len(pixels), 2, 3)
    grid[:, 0, 0] = grid[:, 1, 1] = side.to(grid)
    grid[:, 0, 2] = ((1 - side) * (2 * horizontal - 1)).to(grid)
    grid[:, 1, 2] = ((1 - side) * (2 * vertical - 1)).to(grid)
    places = F.affine_grid(grid, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, places, padding_mode="border", align_corners=False)


def _draws(pixels: Tensor) -> Tensor:
    """Return three numbers [3, B] in [0, 1) that follow from the pixels; integers, so that no order of sums matters."""
    bits = pixels.float().contiguous().view(torch.int32).flatten(1).long()
    mixed = torch.stack([(bits * odd).sum(1) for odd in _odds(bits.shape[1]).to(bits.device)])
    mixed = (mixed ^ (mixed >> 29)) * 0x2545F4914F6CDD1D
    return ((mixed >> 20) & 0xFFFFFFFF).double() / 2**32


@lru_cache(maxsize=4)
def _odds(count: int) -> Tensor:
    return torch.randint(-(2**62), 2**62, (3, count), generator=torch.Generator().manual_seed(0)) * 2 + 1
