"""Fine-tuning methods: their contract, the short ones (`clean`, `tecoa`, `fare`, `simclip`), and the inner attack."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustvlm.attacks import ThreatModel
from robustvlm.attacks.threat import l2_norms, per_image, pixel_box, project
from robustvlm.data.trees import Forest
from robustvlm.errors import UserError
from robustvlm.models import VLM
from robustvlm.training import Draws

# PGD inside training: adversarial images of a batch for whatever loss is trained on (arXiv 1706.06083)

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
            raise UserError(f"the inner attack needs at least 1 step, got {self.steps}")
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


# What a fine-tuning method is: the loss terms of a batch


@dataclass(frozen=True)
class Materials:
    """What a method may build on.

    Attributes:
        student: the model that is trained, in evaluation mode.
        attack: makes the adversarial images.
        class_embeddings: unit text embeddings of the classes before training, [K, D].
        class_names, templates: of the training data.
        forest: class trees over the same classes, None if there are none.
        teacher: the student as it was before training, or another model where the method allows one, frozen; there if
            the method asks for it (`needs_teacher`).
        calibration: some training images [B, 3, S, S] that constants may be fitted to.
        adapters: whether the tower is trained through added parameters, at the high learning rate that these want.
    """

    student: VLM
    attack: InnerAttack
    class_embeddings: Tensor
    class_names: Sequence[str]
    templates: Sequence[str]
    calibration: Tensor
    forest: Forest | None = None
    teacher: VLM | None = None
    adapters: bool = False


class Method(ABC):
    """A fine-tuning method; a subclass implements `terms` and says in class attributes what it needs.

    Attributes:
        labelled: whether labels are read.
        attacked: whether the inner attack is used.
        needs_teacher: whether a frozen copy of the model is wanted.
        other_teacher: whether another model may stand in its place.
        loss: what is minimised, in words, of a method whose loss once was another: it goes into the manifest, so that
            a run under the other loss is not gone on with under this one.
    """

    labelled = True
    attacked = True
    needs_teacher = False
    other_teacher = False
    loss = ""

    def __init__(self, materials: Materials) -> None:
        self.student, self.attack = materials.student, materials.attack
        self.class_embeddings = materials.class_embeddings
        self._teacher = materials.teacher

    @abstractmethod
    def terms(self, pixels: Tensor, labels: Tensor, draws: Draws) -> dict[str, Tensor]:
        """Return scalars by name: "loss" is minimised, the others are recorded; means over the batch.

        Args:
            pixels: augmented images [B, 3, S, S] in [0, 1].
            labels: int64 [B].
            draws: random numbers of the step.
        """

    def also_trained(self) -> list[nn.Parameter]:
        """Return parameters that the method trains beside the vision tower."""
        return []

    def settings(self) -> dict[str, object]:
        """Return every choice and fitted constant as plain JSON, for the record and the model's card."""
        return {}

    def measures(self) -> dict[str, float]:
        """Return what a validation should show of the method itself."""
        return {}

    @property
    def teacher(self) -> VLM:
        """The frozen copy of the model before training, or the model that stands in its place."""
        assert self._teacher is not None, "a method that uses its teacher sets needs_teacher"
        return self._teacher

    def logits(self, vlm: VLM, pixels: Tensor) -> Tensor:
        """Return zero-shot logits [B, K] of the training classes, under the text embeddings before training."""
        features = vlm.encode_image(pixels)
        with torch.autocast(pixels.device.type, enabled=False):
            return vlm.logit_scale * features @ self.class_embeddings.to(features.dtype).T

    def fooling(self, pixels: Tensor, labels: Tensor, draws: Draws) -> Tensor:
        """Return images [B, 3, S, S] that raise the cross-entropy of the student's logits."""
        with frozen(self.student):
            return self.attack(
                lambda x, _: nn.functional.cross_entropy(self.logits(self.student, x), labels, reduction="sum"),
                pixels,
                draws,
            )[0]


# `clean`: the control, ordinary fine-tuning on unperturbed images


class Clean(Method):
    """Cross-entropy of clean images against the frozen class embeddings."""

    attacked = False

    def terms(self, pixels: Tensor, labels: Tensor, draws: Draws) -> dict[str, Tensor]:
        del draws
        return {"loss": F.cross_entropy(self.logits(self.student, pixels), labels)}


# `tecoa`: text-guided contrastive adversarial training (Mao et al. 2023, arXiv 2212.07016)


class TeCoA(Method):
    """Cross-entropy of adversarial images against the frozen class embeddings (equations 1 to 3)."""

    def terms(self, pixels: Tensor, labels: Tensor, draws: Draws) -> dict[str, Tensor]:
        adversarial = self.fooling(pixels, labels, draws)
        return {"loss": F.cross_entropy(self.logits(self.student, adversarial), labels)}


# `fare`: unsupervised adversarial fine-tuning of the vision tower (Schlarmann et al. 2024, arXiv 2402.12336)


class FARE(Method):
    """Squared distance of the worst case's features to those the original model has of the clean image (equation 3).

    Features are taken before they are scaled to unit norm.
    """

    labelled = False
    needs_teacher = True

    def terms(self, pixels: Tensor, labels: Tensor, draws: Draws) -> dict[str, Tensor]:
        del labels
        goal, adversarial = self.worst_case(pixels, draws)
        return {"loss": self._error(adversarial, goal).mean()}

    def worst_case(self, pixels: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Return the original model's features [B, D] of clean images, and the images [B, 3, S, S] farthest from them.

        Neither carries a gradient.
        """
        with torch.no_grad():
            goal = self.teacher.embed_image(pixels).float()
        with frozen(self.student):
            adversarial, _ = self.attack(lambda x, _: self._error(x, goal).sum(), pixels, draws)
        return goal, adversarial

    def _error(self, pixels: Tensor, goal: Tensor) -> Tensor:
        return (self.student.embed_image(pixels).float() - goal).square().sum(-1)


# `simclip`: Siamese adversarial fine-tuning with cosine similarity (Hossain and Imteaj 2024, arXiv 2407.14971)


class SimCLIP(FARE):
    """Negative cosine of the worst case's features to those the original model has of the clean image, symmetric.

    As the authors' program has it (speedlab-git/SimCLIP, train/adversarial_training_simclip.py): the partner is the
    frozen original, so its half of the symmetric loss counts in the value and has no gradient, and the inner attack is
    FARE's, on the squared distance of features that are not scaled. With the student's own features of the clean image
    as the partner, as a Siamese network would have it, nothing ties the features to the texts and they collapse.
    """

    loss = "cosine to the frozen original's features"

    def terms(self, pixels: Tensor, labels: Tensor, draws: Draws) -> dict[str, Tensor]:
        del labels
        original, adversarial = self.worst_case(pixels, draws)
        student = self.student.embed_image(adversarial).float()
        return {"loss": (_apart(student, original) + _apart(original, student)) / 2}


def _apart(moved: Tensor, held: Tensor) -> Tensor:
    """Return the mean negative cosine of features [B, D], the second of them held constant."""
    return -F.cosine_similarity(moved, held.detach(), dim=-1).mean()
