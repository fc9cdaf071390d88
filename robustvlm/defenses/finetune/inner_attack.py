"""PGD inside training: adversarial images of a batch for whatever loss is trained on (arXiv 1706.06083)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robustvlm.attacks import ThreatModel
from robustvlm.attacks.threat import l2_norms, per_image, pixel_box, project
from robustvlm.errors import UserError
from robustvlm.training import Draws

# What the attack raises: a scalar or one number per image, from perturbed pixels and the perturbation of the texts.
Objective = Callable[[Tensor, "Tensor | None"], Tensor]


@dataclass(frozen=True, kw_only=True)
class InnerAttack:
    """Projected gradient ascent on a batch, in float32 whatever the precision of the model.

    Args:
        threat: the ball around each image.
        steps: gradient steps.
        step_size: in pixel units; None: 2.5 * eps / (steps + 1), which is FGSM-RS's 1.25 eps for one step
            (Wong et al. 2020, arXiv 2001.03994).
        random_start: begin at a random point of the ball (Linf: uniform; L2: on its sphere), else at the image.

    Raises:
        UserError: no step, or a step size that is not positive.

    Example:
        >>> attack = InnerAttack(threat=ThreatModel("Linf", 1 / 255), steps=2)
        >>> x = torch.full((1, 3, 2, 2), 0.5)
        >>> x_adv, _ = attack(lambda pixels, _: pixels.sum(), x, Draws(0, 0, ["a"]))
        >>> round((x_adv - x).max().item() * 255, 3)
        1.0
    """

    threat: ThreatModel = field(default_factory=lambda: ThreatModel("Linf", 1 / 255))
    steps: int = 3
    step_size: float | None = None
    random_start: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"the inner attack needs at least 1 step, got {self.steps}: use the method 'clean'")
        if self.step_size is not None and not self.step_size > 0:
            raise UserError(f"the step of the inner attack must be positive, got {self.step_size:g}")

    @property
    def alpha(self) -> float:
        """The step that is made, in pixel units."""
        return self.step_size if self.step_size is not None else 2.5 * self.threat.eps / (self.steps + 1)

    def __call__(
        self,
        objective: Objective,
        pixels: Tensor,
        draws: Draws,
        *,
        texts: Tensor | None = None,
        eps_text: float = 0.0,
        name: str = "",
    ) -> tuple[Tensor, Tensor | None]:
        """Return adversarial images [B, 3, S, S] and the perturbation of the texts that goes with them.

        Args:
            objective: what to raise. Gradients are taken for the pixels and the perturbation alone, so nothing is left
                in the parameters; `frozen` spares their part of the work.
            pixels: clean images in [0, 1].
            draws: random numbers of the images, so that a start does not depend on the batch.
            texts: embeddings [N, D] of whose shape a perturbation (Linf radius `eps_text`) is raised along; None: none.
            name: tells several attacks of one step apart.
        """
        x0 = pixels.detach().float()
        box = pixel_box(x0, self.threat.eps)
        x = self._start(x0, box, draws, name)
        delta = torch.zeros_like(texts) if texts is not None and eps_text > 0 else None
        for _ in range(self.steps):
            x.requires_grad_(True)
            inputs = [x] if delta is None else [x, delta.requires_grad_(True)]
            grads = torch.autograd.grad(objective(x, delta), inputs, allow_unused=True)
            x = project(x.detach() + self.alpha * self._direction(grads[0]), x0, self.threat, box)
            if delta is not None and grads[1] is not None:
                step = eps_text * self.alpha / self.threat.eps
                delta = (delta.detach() + step * grads[1].sign()).clamp(-eps_text, eps_text)
        return x.detach(), None if delta is None else delta.detach()

    def _start(self, x0: Tensor, box: tuple[Tensor, Tensor], draws: Draws, name: str) -> Tensor:
        if not self.random_start:
            return x0.clone()
        if self.threat.norm == "Linf":
            noise = (2 * draws.uniform(x0, name) - 1) * self.threat.eps
        else:
            noise = draws.normal(x0, name)
            noise = noise * per_image(self.threat.eps / l2_norms(noise), noise)
        return project(x0 + noise, x0, self.threat, box)

    def _direction(self, grad: Tensor) -> Tensor:
        # A gradient that is not finite would lose the image; a step of zero leaves it where it is.
        grad = torch.nan_to_num(grad.float(), nan=0.0, posinf=0.0, neginf=0.0)
        return grad.sign() if self.threat.norm == "Linf" else grad / per_image(l2_norms(grad), grad).clamp_min(1e-12)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Hold a module in evaluation mode and without parameter gradients, then give back what it had.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> with frozen(layer):
        ...     layer.training, layer.weight.requires_grad
        (False, False)
        >>> layer.training, layer.weight.requires_grad
        (True, True)
    """
    modes = [(part, part.training) for part in module.modules()]
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    module.eval()
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
        for parameter in trained:
            parameter.requires_grad_(True)
