"""Phase 3, vaccination: the adapter is trained on features encoded once, near prototypes, away from antibodies."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.core.seeds import generator
from robustvlm.defenses.immunity.state import Adapter, class_scores
from robustvlm.errors import UserError

# What the vaccine is trained on: near the right prototype, away from antibodies


def log_likelihoods(features: Tensor, prototypes: Tensor, kappa: Tensor, log_c: Tensor) -> Tensor:
    """Return log p_k(z) = log mean_m C_D(kappa_k) exp(kappa_k <mu_km, z>) of features [B, D]: [B, K].

    Immuno-VLM (arXiv 2605.30745), phase 3: log C_D(kappa_k) + kappa_k <mu_k, z>; of several prototypes an even mixture
    (as PALM, arXiv 2402.02653).

    Args:
        prototypes: [K, M, D]. kappa, log_c: [K], constants.

    Example:
        >>> axes = torch.eye(2)[:, None]
        >>> log_likelihoods(torch.eye(2)[:1], axes, torch.tensor([2.0, 2.0]), torch.zeros(2))
        tensor([[2., 0.]])
    """
    cosines = torch.einsum("bd,kmd->bkm", features, prototypes)
    mixed = torch.logsumexp(kappa[:, None] * cosines, dim=2) - math.log(prototypes.shape[1])
    return log_c + mixed


def pull(features: Tensor, labels: Tensor, prototypes: Tensor, kappa: Tensor, log_c: Tensor) -> Tensor:
    """Return the cross-entropy of the likelihoods, a scalar: L_pull.

    Example:
        >>> axes, even = torch.eye(2)[:, None], torch.zeros(2)
        >>> pull(torch.eye(2), torch.tensor([0, 1]), axes, even, even).exp()
        tensor(2.)
    """
    return F.cross_entropy(log_likelihoods(features, prototypes, kappa, log_c), labels)


def push(features: Tensor, antibodies: Tensor, margin: float, nearest: int = 0) -> Tensor:
    """Return the mean over images and antibodies of max(0, <f(z), a> - m)^2, a scalar: L_push; 0 without antibodies.

    Args:
        nearest: of each image, average over so many of its nearest antibodies alone, so that the weight of the loss
            does not depend on how many there are; 0: over all, as in the paper.

    Example:
        >>> z = torch.tensor([[1.0, 0.0]])
        >>> push(z, torch.eye(2), 0.2), push(z, torch.eye(2), 0.2, nearest=1)
        (tensor(0.3200), tensor(0.6400))
    """
    if not len(antibodies):
        return features.new_zeros(())
    cosines = features @ antibodies.T
    if 0 < nearest < len(antibodies):
        cosines = cosines.topk(nearest, dim=1).values
    return F.relu(cosines - margin).square().mean()


@dataclass(frozen=True, eq=False)
class Mixed:
    """Points between images and antibodies: unit vectors [B, D], and how much of each is the image, [B]."""

    points: Tensor
    share: Tensor


def mix(features: Tensor, antibodies: Tensor, draws: torch.Generator) -> Mixed:
    """Return a point between each image [B, D] and an antibody drawn for it, at a share drawn uniformly from [0, 1].

    MixOE (arXiv 2106.03917) mixes pixels of images with those of outliers, at shares from Beta(1, 1); here features
    are mixed with texts, and the mixture scaled to unit norm (our reading, for an encoder that is not trained).

    Example:
        >>> found = mix(torch.eye(2)[:1], torch.eye(2)[1:], torch.Generator().manual_seed(0))
        >>> torch.allclose(found.points, F.normalize(torch.stack([found.share, 1 - found.share], 1)))
        True
    """
    rows = torch.randint(len(antibodies), (len(features),), generator=draws)
    share = torch.rand(len(features), generator=draws).to(features)
    between = share[:, None] * features + (1 - share[:, None]) * antibodies[rows.to(antibodies.device)]
    return Mixed(F.normalize(between, dim=1), share)


def unsure(mixed: Tensor, share: Tensor, labels: Tensor, targets: "Targets") -> Tensor:
    """Return the cross-entropy of mixed points [B, D] to their class by the image's share, else to all: L_mix.

    The target of a point is share y + (1 - share) / K: the nearer to an antibody, the less sure. MixOE, arXiv
    2106.03917, equation 2.

    Example:
        >>> axes, even = torch.eye(2)[:, None], torch.zeros(2)
        >>> targets = Targets(axes, even + 1, even, torch.zeros(0, 2))
        >>> unsure(torch.eye(2)[:1], torch.ones(1), torch.tensor([0]), targets)  # pull, at a share of 1
        tensor(0.3133)
    """
    found = log_likelihoods(mixed, targets.prototypes, targets.kappa, targets.log_c).log_softmax(dim=1)
    own = found.gather(1, labels[:, None]).squeeze(1)
    return -(share * own + (1 - share) * found.mean(dim=1)).mean()


def pushed_share(features: Tensor, antibodies: Tensor, margin: float) -> float:
    """Return the share of pairs of image and antibody that the margin pushes apart at all.

    Example:
        >>> pushed_share(torch.tensor([[1.0, 0.0]]), torch.eye(2), 0.2)
        0.5
    """
    if not len(antibodies) or not len(features):
        return 0.0
    return float((features @ antibodies.T > margin).double().mean())


_PAIRS = 2**24


def automatic_margin(features: Tensor, antibodies: Tensor, quantile: float = 0.9) -> float:
    """Return the cosine that only a tenth of the pairs of image and antibody exceed: these are pushed apart.

    Our reading, for models whose cosines between images and texts all lie above or all below the usual 0.2. 0.2
    without antibodies.

    Example:
        >>> automatic_margin(torch.tensor([[1.0, 0.0]]), torch.eye(2), 0.5)
        0.5
    """
    if not len(antibodies):
        return 0.2
    # Of very many pairs those of every so many images: so many tell the quantile to three digits, and fit into memory.
    step = max(1, -(-len(features) * len(antibodies) // _PAIRS))
    cosines = features[::step] @ antibodies.to(features).T
    return float(np.quantile(cosines.double().cpu().numpy(), quantile))


# Phase 3, vaccination: train the adapter on features that were encoded once, and stop when held-out images say so


@dataclass(frozen=True, kw_only=True)
class VaccineSettings:
    """How the vaccine is trained.

    Args:
        hidden: width of the adapter. steps: optimiser steps at most; batch_size: images a step. lr: of AdamW.
        push_weight: lambda. margin: m of the hinge. push_nearest: over how many antibodies it is averaged for each
            image, its nearest ones; 0 for all. mix_weight: beta of the loss of points between images and antibodies
            (MixOE; 0: none). decay: eta of eta ||theta||^2, which holds the adapter near the
            identity. every: steps between two looks at held-out images; patience: looks without progress before the
            end. worst_loss: largest fall of held-out accuracy that is taken for a smaller loss.

    Raises:
        UserError: a number out of range.
    """

    hidden: int = 128
    steps: int = 400
    batch_size: int = 256
    lr: float = 3e-4
    push_weight: float = 1.0
    margin: float = 0.2
    decay: float = 0.1
    every: int = 10
    patience: int = 10
    worst_loss: float = 0.0
    push_nearest: int = 10
    mix_weight: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden", "batch_size", "every", "patience"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} of the vaccine must be at least 1, got {getattr(self, name)}")
        for name in ("steps", "push_weight", "push_nearest", "mix_weight", "decay", "worst_loss"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise UserError(f"{name} of the vaccine must not be negative, got {getattr(self, name):g}")
        if not 0 < self.lr < math.inf or not -1 <= self.margin <= 1:
            raise UserError(f"the vaccine needs lr > 0 and a margin in [-1, 1], got {self.lr:g} and {self.margin:g}")


@dataclass(frozen=True, eq=False)
class Targets:
    """What features are pulled to and pushed from: prototypes [K, M, D], kappa and log_c [K], antibodies [A, D]."""

    prototypes: Tensor
    kappa: Tensor
    log_c: Tensor
    antibodies: Tensor


@dataclass(frozen=True)
class Look:
    """The losses at one step: of the last batch, and of the held-out images, with their accuracy."""

    step: int
    train: float
    pull: float
    push: float
    held_out: float
    accuracy: float


@dataclass(frozen=True, eq=False)
class Vaccinated:
    """The trained adapter, from the step that held-out images chose, and the way there."""

    adapter: Adapter
    history: tuple[Look, ...]
    chosen: int


def vaccinate(
    features: Tensor,
    labels: Tensor,
    held_out: Tensor,
    held_labels: Tensor,
    targets: Targets,
    settings: VaccineSettings,
    *,
    start: Adapter | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Vaccinated:
    """Return the adapter that minimises L_pull + lambda L_push + beta L_mix + eta ||theta||^2, stopped early.

    Immuno-VLM (arXiv 2605.30745), phase 3; L_mix is MixOE's, and off by default. The start (the identity, unless
    `start` is given) is one of the candidates: of the looks whose held-out accuracy is not below the start's by more
    than `worst_loss`, the one with the smallest held-out loss wins, so that a vaccine that does not help does not
    harm. The same seed gives the same adapter; memory does not grow with the number of steps.

    Args:
        features, held_out: unit features [N, D] and [H, D] of labelled images; labels, held_labels: [N], [H].
        start: begin from this adapter (it is copied).
        on_step: called with the number of steps done.

    Raises:
        UserError: no images, or a loss that is not finite.

    Example:
        >>> axes = torch.eye(2)
        >>> targets = Targets(axes[:, None], torch.ones(2), torch.zeros(2), torch.zeros(0, 2))
        >>> labels = torch.tensor([0, 1])
        >>> vaccinate(axes, labels, axes, labels, targets, VaccineSettings(steps=20, hidden=4)).history[0].step
        0
    """
    if not len(features) or not len(held_out):
        raise UserError("vaccination needs images to train on and held-out images: pass --no-images to do without")
    dim = features.shape[1]
    adapter = Adapter(dim, settings.hidden, seed=settings.seed) if start is None else copy.deepcopy(start)
    adapter = adapter.to(features.device).train().requires_grad_(True)
    history = [_look(adapter, 0, math.nan, held_out, held_labels, targets, settings)]
    best, chosen, stale = _copy(adapter), history[0], 0
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=settings.lr, weight_decay=0.0)
    draws = generator(settings.seed, "vaccine")
    for step in range(1, settings.steps + 1):
        rows = torch.randint(len(features), (min(settings.batch_size, len(features)),), generator=draws)
        rows = rows.to(features.device)
        loss = _loss(adapter, features[rows], labels[rows], targets, settings, draws)
        if not torch.isfinite(loss):
            raise UserError(f"the loss of the vaccine is not finite after {step} steps: pass a smaller --lr")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        if on_step is not None:
            on_step(step)
        if step % settings.every and step < settings.steps:
            continue
        history.append(_look(adapter, step, float(loss.detach()), held_out, held_labels, targets, settings))
        harmless = history[-1].accuracy >= history[0].accuracy - settings.worst_loss - 1e-12
        if harmless and history[-1].held_out < chosen.held_out:
            best, chosen, stale = _copy(adapter), history[-1], 0
        else:
            stale += 1
        if stale >= settings.patience:
            break
    adapter.load_state_dict(best)
    return Vaccinated(adapter.eval().requires_grad_(False), tuple(history), chosen.step)


def _loss(
    adapter: Adapter,
    features: Tensor,
    labels: Tensor,
    targets: Targets,
    settings: VaccineSettings,
    draws: torch.Generator,
) -> Tensor:
    adapted = adapter(features)
    weights = torch.stack([parameter.square().sum() for parameter in adapter.parameters()]).sum()
    return (
        pull(adapted, labels, targets.prototypes, targets.kappa, targets.log_c)
        + settings.push_weight * push(adapted, targets.antibodies, settings.margin, settings.push_nearest)
        + settings.mix_weight * _mixing(adapter, features, labels, targets, settings, draws)
        + settings.decay * weights
    )


def _mixing(
    adapter: Adapter,
    features: Tensor,
    labels: Tensor,
    targets: Targets,
    settings: VaccineSettings,
    draws: torch.Generator,
) -> Tensor:
    """Return L_mix; 0, and no draw, where it has no weight or there is nothing to mix with."""
    if not settings.mix_weight or not len(targets.antibodies):
        return features.new_zeros(())
    mixed = mix(features, targets.antibodies, draws)
    return unsure(adapter(mixed.points), mixed.share, labels, targets)


@torch.no_grad()
def _look(
    adapter: Adapter,
    step: int,
    train: float,
    held_out: Tensor,
    labels: Tensor,
    targets: Targets,
    settings: VaccineSettings,
) -> Look:
    adapted = adapter(held_out)
    drawn = float(pull(adapted, labels, targets.prototypes, targets.kappa, targets.log_c))
    pushed = float(push(adapted, targets.antibodies, settings.margin, settings.push_nearest))
    # The same draws at every look: looks are compared.
    mixed = float(_mixing(adapter, held_out, labels, targets, settings, generator(settings.seed, "held-out mixtures")))
    total = drawn + settings.push_weight * pushed + settings.mix_weight * mixed
    hits = class_scores(adapted, targets.prototypes).argmax(dim=1) == labels
    return Look(step, train, drawn, pushed, total, float(hits.double().mean()))


def _copy(adapter: Adapter) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in adapter.state_dict().items()}
