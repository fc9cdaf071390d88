"""Methods guided by what the original model says of a class distribution: `pmg`, `agft` and `ucat`."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.defenses.finetune.methods import Materials, Method, frozen
from robustvlm.errors import UserError
from robustvlm.models import VLM
from robustvlm.training import Draws


def asked(method: str, *, above: bool = False, **options: float) -> None:
    """Refuse options that are no finite number of at least 0, or above 0."""
    for name, value in options.items():
        if not (value > 0 if above else value >= 0) or value == math.inf:
            kind = "positive" if above else "0 or more"
            raise UserError(f"the option '{name}' of {method} must be {kind} and finite, got {value:g}")


# `pmg`: fine-tuning guided by the pre-trained model (Wang et al. 2024, arXiv 2401.04350)


class PMG(Method):
    """TeCoA's loss, and two divergences of the student's predictions on adversarial images.

    `general` weighs the one from the original model's predictions for them, `clean` the one from the student's own for
    the clean images, both 1. The divergence is KL(reference || adversarial), as in the authors' program, where both
    sides of the second have a gradient; `reverse` turns it round. Their program scales no cosine, which amounts to a
    temperature of 1; ours is the model's own.
    """

    needs_teacher = True
    loss = "KL(reference || adversarial)"

    def __init__(
        self, materials: Materials, *, general: float = 1.0, clean: float = 1.0, reverse: bool = False
    ) -> None:
        super().__init__(materials)
        self.reverse = reverse
        asked("pmg", general=general, clean=clean)
        self.general, self.clean = general, clean

    def settings(self) -> dict[str, object]:
        return {"general": self.general, "clean": self.clean, "reverse": self.reverse}

    def terms(self, pixels: Tensor, labels: Tensor, draws: Draws) -> dict[str, Tensor]:
        adversarial = self.fooling(pixels, labels, draws)
        logits = self.logits(self.student, adversarial)
        with torch.no_grad():
            original = self.logits(self.teacher, adversarial)
        robust = F.cross_entropy(logits, labels)
        general = self._divergence(logits, original)
        clean = self._divergence(logits, self.logits(self.student, pixels))
        loss = robust + self.general * general + self.clean * clean
        return {"loss": loss, "robust": robust, "general": general, "clean": clean}

    def _divergence(self, logits: Tensor, reference: Tensor) -> Tensor:
        """Return the mean over the batch of KL(reference || predictions), or the reverse."""
        first, second = (logits, reference) if self.reverse else (reference, logits)
        return F.kl_div(second.log_softmax(-1), first.log_softmax(-1), reduction="batchmean", log_target=True)


# `agft`: alignment-guided fine-tuning (Cui et al. 2026, arXiv 2603.29410)


class AGFT(Method):
    """Divergence of the worst case's class distribution from the original model's of the clean image.

    L = KL(p || q) with p = softmax(scale * ratio * s * c(x)) of the frozen original and q = softmax(scale * s * c'(x'))
    of the student, where c are cosines to the class texts and s is the model's own logit scale. No label is read. The
    inner attack raises the same divergence. `ratio` below 1 softens what is aimed at: a robust model's cosines are
    smaller than the original's, and `scale` lets it reach the same distribution with them (distribution consistency
    calibration).

    The authors' program has constants for CLIP (YuboCui/AGFT, README): logit scale 180 where CLIP's own is 100, so a
    scale of 1.8, and a ratio of 0.4. *Our reading:* both relative to the model's own scale, so that they fit other
    models, and both 1 by default, targets as they are, which was better in short trainings (benchmarks/finetune). With
    scale 1 and a ratio without bound the targets are the original's best classes, and the loss is TeCoA's on these.
    """

    labelled = False
    needs_teacher = True

    def __init__(self, materials: Materials, *, scale: float = 1.0, ratio: float = 1.0) -> None:
        super().__init__(materials)
        asked("agft", above=True, scale=scale, ratio=ratio)
        self.scale, self.ratio = scale, ratio

    def settings(self) -> dict[str, object]:
        return {"scale": self.scale, "ratio": self.ratio}

    def terms(self, pixels: Tensor, labels: Tensor, draws: Draws) -> dict[str, Tensor]:
        del labels
        with torch.no_grad():
            target = (self.scale * self.ratio * self.logits(self.teacher, pixels)).log_softmax(-1)
        with frozen(self.student):
            adversarial, _ = self.attack(lambda x, _: self._divergences(x, target).sum(), pixels, draws)
        return {"loss": self._divergences(adversarial, target).mean()}

    def _divergences(self, pixels: Tensor, target: Tensor) -> Tensor:
        return divergences(self.scale * self.logits(self.student, pixels), target)


def divergences(logits: Tensor, target: Tensor) -> Tensor:
    """Return KL(target || softmax of the logits) of each image, [B], the target as log-probabilities [B, K]."""
    return F.kl_div(logits.log_softmax(-1), target, reduction="none", log_target=True).sum(-1)


# `ucat`: uncertainty-calibrated adversarial fine-tuning (Lu et al. 2026, arXiv 2512.12997)


class UCAT(Method):
    """TeCoA's loss, and the divergence of Dirichlet distributions: of the worst case from the original's clean image.

    Cosines c to the class texts become concentrations a_k = exp((c_k + 1) / temperature); the second term is
    KL(Dir(a of the student, x') || Dir(b of the original, x)), which sees how large the concentrations are (how sure
    the model is) and not their proportions alone. Their program (VivienLu/UCAT) has 1e5 / exp(2 / 0.07) as its weight.

    *Our reading* of the weight: for large concentrations that divergence is B KL(p_original || p_student), with B the
    sum of b and p the concentrations' proportions. B grows as exp(c / 0.07): the authors' constant amounts to some 200
    for 200 classes at cosines near 0.2, as CLIP has, and was 7,400 for the 101 classes of the bundled model, whose
    cosines to their own class are near 0.8. So `weight` is in units of 1 / (mean of B over the calibration images), and
    means the same for every model. 0 is TeCoA; 10 was no worse than it in any column on validation images of the
    bundled set (benchmarks/finetune).
    """

    needs_teacher = True

    def __init__(self, materials: Materials, *, weight: float = 10.0, temperature: float = 0.07) -> None:
        super().__init__(materials)
        asked("ucat", weight=weight)
        asked("ucat", above=True, temperature=temperature)
        self.weight, self.temperature = weight, temperature
        with torch.no_grad():
            seen = self.concentrations(self.teacher, materials.calibration.to(self.student.device))
        self.unit = float(seen.sum(-1).mean())
        if not 0 < self.unit < math.inf:
            raise UserError(
                f"the concentrations of ucat cannot be computed at a temperature of {temperature:g}: raise it"
            )

    def settings(self) -> dict[str, object]:
        return {"weight": self.weight, "temperature": self.temperature, "mean concentration": self.unit}

    def terms(self, pixels: Tensor, labels: Tensor, draws: Draws) -> dict[str, Tensor]:
        adversarial = self.fooling(pixels, labels, draws)
        logits = self.logits(self.student, adversarial)
        with torch.no_grad():
            original = self.concentrations(self.teacher, pixels)
        apart = dirichlet_divergence(self._concentrations(logits, self.student), original).mean() / self.unit
        robust, uncertainty = F.cross_entropy(logits, labels), apart.to(device=logits.device, dtype=logits.dtype)
        return {"loss": robust + self.weight * uncertainty, "robust": robust, "uncertainty": uncertainty}

    def concentrations(self, vlm: VLM, pixels: Tensor) -> Tensor:
        """Return exp((cosine + 1) / temperature) of images [B, 3, S, S] to the class texts, [B, K] in float64."""
        return self._concentrations(self.logits(vlm, pixels), vlm)

    def _concentrations(self, logits: Tensor, vlm: VLM) -> Tensor:
        # In float64: a concentration may be 1e12, and the divergence is a small difference of its log-gammas.
        device = torch.device("cpu") if logits.device.type == "mps" else logits.device
        cosines = logits.to(device=device, dtype=torch.float64) / vlm.logit_scale
        return ((cosines + 1) / self.temperature).exp()


def dirichlet_divergence(first: Tensor, second: Tensor) -> Tensor:
    """Return KL(Dir(first) || Dir(second)) [...] of concentrations [..., K], all positive.

    Example:
        >>> a, b = torch.tensor([2.0, 3.0]), torch.tensor([1.0, 1.0])
        >>> round(float(dirichlet_divergence(a, b)), 4), float(dirichlet_divergence(b, b))
        (0.2349, 0.0)
    """
    total, other = first.sum(-1), second.sum(-1)
    norms = (total.lgamma() - first.lgamma().sum(-1)) - (other.lgamma() - second.lgamma().sum(-1))
    return norms + ((first - second) * (first.digamma() - total.digamma().unsqueeze(-1))).sum(-1)
