"""What a run changes: the trained parameters and the buffers of a module, their optimiser and their average."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from robustvlm.errors import UserError
from robustvlm.training.config import TrainingConfig

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class Weights:
    """The parameters of a module that require gradients, by name, and its buffers that are stored.

    Raises UserError when nothing is to be trained.
    """

    def __init__(self, module: nn.Module) -> None:
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise UserError("nothing is to be trained: every parameter is frozen; choose another --trainable")
        stored = module.state_dict(keep_vars=True).keys()
        self.buffers = {name: b for name, b in module.named_buffers() if name in stored and b.numel()}

    def state(self) -> dict[str, Tensor]:
        """Return copies of all values, by name."""
        both: dict[str, Tensor] = {**self.parameters, **self.buffers}
        return {name: value.detach().clone() for name, value in both.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy values of `state` in place; raise UserError where names or shapes are others."""
        own: dict[str, Tensor] = {**self.parameters, **self.buffers}
        if own.keys() != state.keys() or any(own[name].shape != state[name].shape for name in own):
            raise UserError("the checkpoint is of another model or trains other parts: start over with --fresh")
        for name, value in own.items():
            value.copy_(state[name])

    @contextmanager
    def lent(self, state: Mapping[str, Tensor] | None) -> Iterator[None]:
        """Put other values in place for a while; None leaves the own ones."""
        if state is None:
            yield
            return
        own = self.state()
        self.load(state)
        try:
            yield
        finally:
            self.load(own)


class Average:
    """An exponential moving average of weights, which forgets faster in the first steps.

    The decay of step t is min(decay, (1 + t) / (10 + t)), so that the start does not weigh on short runs.
    """

    def __init__(self, weights: Weights, decay: float) -> None:
        self.weights, self.decay = weights, decay
        self.values = weights.state()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` steps."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, value in {**self.weights.parameters, **self.weights.buffers}.items():
            if value.is_floating_point():
                self.values[name].lerp_(value, share)
            else:
                self.values[name].copy_(value)


def make_optimizer(weights: Weights, config: TrainingConfig) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) that does not decay vectors and single numbers."""
    groups = [
        {"params": [p for p in weights.parameters.values() if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in weights.parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas)


def moments(weights: Weights, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Return the optimiser's state as named tensors; parameters that never had a gradient have none."""
    return {
        f"{name}|{key}": optimizer.state[p][key].detach().cpu()
        for name, p in weights.parameters.items()
        if optimizer.state.get(p)
        for key in _MOMENTS
    }


def load_moments(weights: Weights, optimizer: torch.optim.AdamW, state: Mapping[str, Tensor]) -> None:
    """Put back what `moments` gave."""
    for name, p in weights.parameters.items():
        if f"{name}|step" in state:
            # AdamW counts steps on the CPU, and keeps the moments with the parameter.
            found = {key: state[f"{name}|{key}"].clone() for key in _MOMENTS}
            optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in found.items()}
