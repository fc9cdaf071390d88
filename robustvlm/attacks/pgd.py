"""Projected gradient descent (Madry et al. 2018, arXiv 1706.06083)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Annotated

import torch
from torch import Tensor

from robustvlm.attacks.base import ATTACKS, DONE, MOST, LaneAttack, Option, State
from robustvlm.attacks.objectives import Objective, objective
from robustvlm.attacks.threat import ThreatModel, l2_norms, per_image, pixel_box, project, random_start
from robustvlm.core.device import sent

# Lattice coordinates are whole numbers held in floats; this keeps them exactly representable in float32.
_LARGEST_COORDINATE = 2.0**22
_FINEST_BITS = 16
_WHY = "the least to move a bright pixel in float32"


@dataclass(frozen=True, kw_only=True)
class PGD(LaneAttack):
    """Gradient ascent with a fixed step, projected onto the ball; sign steps for Linf, normalised ones for L2.

    Linf iterates live on a lattice: a perturbation is a whole number of quanta (a step is 2^16 of them, or fewer
    bits for tiny steps), so a point that is visited twice is the same to the bit. From there on a deterministic
    model repeats itself, and the sub-run can end with the answer it would have reached anyway (cycle detection;
    idea: arXiv 2503.19347). Points are compared by 64-bit hashes.

    Args:
        step_size: fixed step in pixel units; default 2.5 * eps / n_iter.
        random_start: let restarts begin at random points of the ball instead of the image.
        image_first: let the first sub-run begin at the image itself all the same: of equally many steps from the image
            and from a random point, those from the image fooled more images wherever we compared them.
        detect_cycles: end a sub-run when an Linf iterate repeats. Must be off for models that are random.

    Example:
        >>> PGD(n_iter=20).name
        'pgd'
    """

    name: str = "pgd"
    n_iter: int = 20
    objective: Objective = objective("ce")
    step_size: Annotated[float | None, Option("step_size", above=0, least=1e-7, most=MOST, why=_WHY)] = None
    random_start: bool = True
    image_first: bool = True
    detect_cycles: bool = True

    def for_random_model(self) -> PGD:
        return replace(self, detect_cycles=False)

    def away_from_image(self) -> PGD:
        return replace(self, random_start=True, image_first=False)

    def begin(self, x0: Tensor, threat: ThreatModel, generator: torch.Generator, run: int) -> State:
        x = self.start(x0, threat, generator, run)
        if threat.norm == "L2":
            return {"x0": x0, "x": x}
        quantum = self._quantum(threat)
        low, high = pixel_box(x0, threat.eps)
        reach = torch.stack([low.double() - x0.double(), high.double() - x0.double()]) / quantum
        # A relative slack of 1e-6 quanta lets the exact ball boundary count as reachable; `_place` clamps anyway.
        k_low, k_high = torch.ceil(reach[0] - 1e-6), torch.floor(reach[1] + 1e-6)
        k = torch.clamp(torch.round((x.double() - x0.double()) / quantum), k_low, k_high)
        state = {"x0": x0, "low": low, "high": high}
        state |= {name: value.to(x0.dtype) for name, value in (("k", k), ("k_low", k_low), ("k_high", k_high))}
        state["x"] = _place(state, quantum)
        if self.detect_cycles:
            visited = torch.zeros(1, self.n_iter + 1, dtype=torch.int64, device=x0.device)
            visited[:, 0] = _hash(state["k"])
            state |= {"visited": visited, DONE: torch.zeros(1, dtype=torch.bool, device=x0.device)}
        return state

    def start(self, x0: Tensor, threat: ThreatModel, generator: torch.Generator, run: int) -> Tensor:
        """Return the point in the ball [1, C, H, W] at which sub-run `run` begins."""
        from_image = not self.random_start or (self.image_first and run == 0)
        return x0.clone() if from_image else random_start(x0, threat, generator)

    def advance(self, state: State, loss: Tensor, grad: Tensor, step: Tensor, threat: ThreatModel) -> State:
        del loss
        if threat.norm == "L2":
            length = per_image(self._step(threat) / l2_norms(grad).clamp_min(1e-12), grad)
            return state | {"x": project(state["x"] + length * grad, state["x0"], threat)}
        quantum = self._quantum(threat)
        stride = round(self._step(threat) / quantum)
        k = torch.minimum(torch.maximum(state["k"] + stride * grad.sign(), state["k_low"]), state["k_high"])
        state = state | {"k": k}
        state["x"] = _place(state, quantum)
        return self._mark_cycles(state, step) if self.detect_cycles else state

    def _mark_cycles(self, state: State, step: Tensor) -> State:
        """End the lanes whose new point was evaluated before in the same sub-run."""
        here = _hash(state["k"])
        seen = torch.arange(self.n_iter + 1, device=here.device)[None, :] <= step[:, None]
        repeats = ((state["visited"] == here[:, None]) & seen).any(dim=1)
        slot = (step + 1).clamp_max(self.n_iter)
        visited = state["visited"].scatter(1, slot[:, None], here[:, None])
        return state | {"visited": visited, DONE: repeats}

    def _step(self, threat: ThreatModel) -> float:
        return self.step_size if self.step_size is not None else 2.5 * threat.eps / self.n_iter

    def _quantum(self, threat: ThreatModel) -> float:
        bits = math.floor(math.log2(_LARGEST_COORDINATE * min(1.0, self._step(threat) / threat.eps)))
        return float(self._step(threat) / 2 ** max(0, min(_FINEST_BITS, bits)))


@dataclass(frozen=True, kw_only=True)
class PGDFrom(PGD):
    """PGD whose first sub-run begins at a point that is known, such as one found on another model.

    Args:
        points: for the digest of each clean image (`image_ids` of it) a point [C, H, W] in its ball; further sub-runs,
            and images that are not among them, begin as usual.
    """

    name: str = "pgd-from"
    points: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def start(self, x0: Tensor, threat: ThreatModel, generator: torch.Generator, run: int) -> Tensor:
        known = self.points.get(_digest(x0)) if run == 0 else None
        if known is None:
            return super().start(x0, threat, generator, run)
        return project(known[None].to(x0), x0, threat)


ATTACKS["pgd"] = PGD
ATTACKS["fgsm"] = lambda: PGD(name="fgsm", n_iter=1, random_start=False)


def _place(state: State, quantum: float) -> Tensor:
    """Return the images at the lattice points, inside the box to the bit."""
    x = state["x0"] + state["k"] * quantum
    return torch.minimum(torch.maximum(x, state["low"]), state["high"])


def _digest(x0: Tensor) -> str:
    return hashlib.blake2b(x0.detach().float().cpu().contiguous().numpy().tobytes(), digest_size=16).hexdigest()


def _hash(k: Tensor) -> Tensor:
    """Return a 64-bit hash per lane of whole-number coordinates [L, ...]: a random linear map modulo 2^64."""
    flat = k.flatten(1).to(torch.int64)
    return (flat * _hash_weights(flat.shape[1], flat.device)).sum(dim=1)


@lru_cache(maxsize=8)
def _hash_weights(size: int, device: torch.device) -> Tensor:
    """Odd 64-bit weights; odd ones are invertible modulo 2^64, so no single changed coordinate goes unnoticed."""
    drawn = torch.randint(-(2**62), 2**62, (size,), generator=torch.Generator().manual_seed(20250319))
    return sent(2 * drawn + 1, device)
