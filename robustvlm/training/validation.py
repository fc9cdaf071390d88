"""Clean and robust accuracy while a model is trained, quick and on the same held-out images every time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.attacks.threat import ThreatModel, l2_norms, per_image, project
from robustvlm.core.framing import Framing, to_pixels
from robustvlm.core.size import Size
from robustvlm.data import UNKNOWN, DataSource, Sample, select
from robustvlm.errors import UserError, setting
from robustvlm.models import VLM
from robustvlm.models.zero_shot import class_embeddings
from robustvlm.stats import rate, worth_of
from robustvlm.training.distributed import rank_and_size, summed
from robustvlm.training.task import Draws, Measure

# Clean and robust accuracy of a classifier while it is trained, quick and on the same images every time

Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LabelledImages:
    """Images of known classes in memory: 8-bit pixels [N, 3, S, S], labels [N], ids.

    All labels are -1 where unlabelled images were asked for and no class is known. Images of one group
    (`DataSource.group`) are copies, which count once in intervals; without groups every image counts.
    """

    pixels: Tensor
    labels: Tensor
    ids: tuple[str, ...]
    groups: tuple[str, ...] = ()

    @property
    def known(self) -> bool:
        """Whether the images have classes to judge by."""
        return bool((self.labels != UNKNOWN).all())

    @property
    def worth(self) -> float:
        """How many independent images they are worth."""
        return worth_of(self.groups) if self.groups else float(len(self.labels))

    @classmethod
    def read(
        cls,
        source: DataSource,
        *,
        size: Size | Framing,
        limit: int | None = None,
        keep: Callable[[str], bool] | None = None,
        labelled: bool = True,
    ) -> LabelledImages:
        """Read the images of known classes, those that `keep` accepts; raise UserError if there is none.

        Args:
            labelled: False takes all images where none of them has a known class.
        """
        found: list[tuple[Tensor, int, str]] = []
        framing = Framing.of(size)
        for item in source.samples(limit=limit, keep=keep):
            if isinstance(item, Sample) and not (labelled and item.label == UNKNOWN):
                picture = to_pixels(item.image, framing)
                found.append(((picture * 255).round().to(torch.uint8), item.label, item.id))
        found = [one for one in found if one[1] != UNKNOWN] or found
        if not found:
            of = " of a known class" if labelled else ""
            raise UserError(f"'{source.spec}' holds no readable image{of} to validate on")
        pixels = torch.stack([picture for picture, _, _ in found])
        ids = tuple(name for _, _, name in found)
        return cls(pixels, torch.tensor([label for _, label, _ in found]), ids, tuple(map(source.group, ids)))


@dataclass(frozen=True)
class RobustValidation:
    """Accuracy of a classifier on fixed images: unperturbed, under noise, under FGSM and under PGD, all of size eps.

    PGD starts at the image, with steps of 2.5 eps / n_iter; an image that is fooled at any iterate is fooled. A quick
    estimate for choosing weights, not an evaluation: `robustvlm attack` with the standard ensemble finds more.

    Args:
        images: on which; threat: norm and eps.
        n_iter: steps of PGD; batch_size: images per pass; seed: of the noise.

    Raises:
        UserError: no step of PGD.

    Example:
        >>> black = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
        >>> images = LabelledImages(black, torch.tensor([0, 0, 1, 1]), tuple("abcd"))
        >>> validation = RobustValidation(images, ThreatModel("Linf", 0.1), n_iter=2)
        >>> found = validation.measure(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2)))
        >>> found["clean accuracy"].value, sorted(found)[1:]
        (0.5, ['clean accuracy', 'noise accuracy', 'robust accuracy'])
    """

    images: LabelledImages
    threat: ThreatModel
    n_iter: int = 10
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_iter < 1:
            raise UserError(
                f"a robust validation needs at least 1 step of PGD ({setting('val_steps')}), got {self.n_iter}"
            )

    def measure(self, logits: Logits, *, device: torch.device | str = "cpu") -> Mapping[str, Measure]:
        """Return the accuracies; of several ranks each looks at its share of the images."""
        rank, ranks = rank_and_size()
        # A rank may have none, if there are fewer images than ranks.
        mine = torch.arange(len(self.images.labels))[rank::ranks]
        counts = torch.zeros(4, dtype=torch.int64, device=device)
        for rows in mine.split(self.batch_size) if len(mine) else ():
            pixels = self.images.pixels[rows].to(device).float() / 255
            labels = self.images.labels[rows].to(device)
            draws = Draws(self.seed, 0, [self.images.ids[row] for row in rows], device=device)
            counts += torch.stack([right.sum() for right in self._right(logits, pixels, labels, draws)])
        clean, noise, fgsm, pgd = summed(counts).tolist()
        total, worth = len(self.images.labels), self.images.worth
        right = {"clean accuracy": clean, "noise accuracy": noise, "FGSM accuracy": fgsm, "robust accuracy": pgd}
        return {name: rate(count, total, independent=worth) for name, count in right.items()}

    def _right(self, logits: Logits, pixels: Tensor, labels: Tensor, draws: Draws) -> tuple[Tensor, ...]:
        """Return per image whether it is right: unperturbed, and also with noise, after FGSM, after PGD."""
        clean = _right(logits, pixels, labels)
        noise = clean & _right(logits, _noisy(pixels, self.threat, draws), labels)
        fgsm, pgd = clean.clone(), clean.clone()
        alive = clean.nonzero().flatten()
        if len(alive):
            gradient = _gradient(logits, pixels[alive], labels[alive])
            once = _stepped(pixels[alive], pixels[alive], gradient, self.threat, self.threat.eps)
            fgsm[alive] = _right(logits, once, labels[alive])
        x = pixels.clone()
        for _ in range(self.n_iter):
            alive = pgd.nonzero().flatten()
            if not len(alive):
                break
            gradient = _gradient(logits, x[alive], labels[alive])
            x[alive] = _stepped(x[alive], pixels[alive], gradient, self.threat, 2.5 * self.threat.eps / self.n_iter)
            pgd[alive] = _right(logits, x[alive], labels[alive])
        return clean, noise, fgsm, pgd


def _right(logits: Logits, pixels: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        found = logits(pixels)
        # The argmax of NaN would be class 0.
        return (found.argmax(dim=1) == labels) & found.isfinite().all(dim=1)


def _gradient(logits: Logits, pixels: Tensor, labels: Tensor) -> Tensor:
    with torch.enable_grad():
        x = pixels.detach().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(logits(x), labels, reduction="sum"), x)[0]


def _stepped(x: Tensor, x0: Tensor, gradient: Tensor, threat: ThreatModel, length: float) -> Tensor:
    if threat.norm == "Linf":
        return project(x + length * gradient.sign(), x0, threat)
    direction = gradient / per_image(l2_norms(gradient).clamp_min(1e-12), gradient)
    return project(x + length * direction, x0, threat)


def _noisy(pixels: Tensor, threat: ThreatModel, draws: Draws) -> Tensor:
    if threat.norm == "Linf":
        return project(pixels + threat.eps * (2 * draws.uniform(pixels) - 1), pixels, threat)
    noise = draws.normal(pixels)
    return project(pixels + noise * per_image(threat.eps / l2_norms(noise), noise), pixels, threat)


# What is measured of a model while it is fine-tuned: clean and robust zero-shot accuracy on images held out

_SPREAD_IMAGES = 256
_SHARE = 0.1


@dataclass
class ZeroShotValidation:
    """Accuracy of the zero-shot classifier of a model on fixed images, and how far its features lie apart.

    Args:
        vlm: the model in training.
        class_names, templates: of the validation images.
        robust: images and attack.
        texts_change: whether texts have to be embedded anew every time.
        in_training: whether the text tower is what is trained, so that none of its embeddings is worth keeping.
    """

    vlm: VLM
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    robust: RobustValidation
    texts_change: bool = False
    in_training: bool = False
    _embeddings: Tensor | None = None

    def __call__(self) -> Mapping[str, Measure]:
        """Return clean, noise, FGSM and robust accuracy, and the feature spread, of the present weights."""
        if self._embeddings is None or self.texts_change:
            self._embeddings = class_embeddings(self.vlm, self.class_names, self.templates, cache=not self.in_training)
        measures = self.robust.measure(self._logits, device=self.vlm.device)
        return {**measures, **FeatureValidation(self.vlm, self.robust.images, self.robust.batch_size)()}

    def _logits(self, pixels: Tensor) -> Tensor:
        assert self._embeddings is not None
        return self.vlm.logit_scale * self.vlm.encode_image(pixels) @ self._embeddings.T


@dataclass
class FeatureValidation:
    """How far the features of fixed images lie apart: all that can be measured where no class is known."""

    vlm: VLM
    images: LabelledImages
    batch_size: int = 64

    def __call__(self) -> Mapping[str, Measure]:
        """Return the feature spread, 1 - |mean unit feature|²; 0 if all images have one feature."""
        total, images = torch.zeros((), device=self.vlm.device), self.images.pixels[:_SPREAD_IMAGES]
        with torch.no_grad():
            for rows in images.split(self.batch_size):
                total = total + self.vlm.encode_image(rows.to(self.vlm.device).float() / 255).sum(dim=0)
        return {"feature spread": float(1 - (total / len(images)).square().sum())}


def validation_images(
    source: DataSource, *, size: Size | Framing, limit: int, only: Collection[str] | None = None, labelled: bool = True
) -> LabelledImages:
    """Return up to `limit` images of known classes, of those named by `only` if it is given.

    Args:
        labelled: False takes all images where none of them has a known class.
    """
    if only is None:
        return LabelledImages.read(source, size=size, limit=limit, labelled=labelled)
    return LabelledImages.read(source, size=size, keep=only.__contains__, labelled=labelled)


def held_out(source: DataSource, ids: list[str], limit: int) -> set[str]:
    """Return the ids to validate on: a tenth of the images, `limit` at most, chosen by a hash of their groups.

    Images of one group (copies of one drawing) stay together, so that none is trained on beside its twin. Where there
    is room for no group at all, nothing is chosen.

    Example:
        >>> from robustvlm.data import open_data
        >>> source = open_data("emoji?split=train&copies=2")
        >>> chosen = held_out(source, source.ids(), limit=10)
        >>> len(chosen), len({source.group(name) for name in chosen})
        (10, 5)
    """
    members, room = _members(source, ids), min(limit, int(_SHARE * len(ids)))
    chosen: set[str] = set()
    for group in select(members, None):
        if len(chosen) + len(members[group]) <= room:
            chosen.update(members[group])
        elif chosen:  # smaller groups behind it stay in training, as ever: another choice would be another run
            break
    return chosen


def some_held_out(source: DataSource, ids: list[str], limit: int, *, data: str) -> set[str]:
    """Return what `held_out` chooses; a UserError where that is nothing, which names the data as they were given."""
    chosen = held_out(source, ids, limit)
    if chosen:
        return chosen
    least = min(map(len, _members(source, ids).values()), default=0)
    if limit < least <= int(_SHARE * len(ids)):
        raise UserError(
            f"the images of '{data}' belong together in groups of {least} or more, which are held out whole, and "
            f"{setting('val_limit')} is {limit}: pass {setting('val_limit', str(least))} or more, or "
            f"{setting('val', 'DATA')}"
        )
    raise UserError(f"'{data}' is too small ({len(ids)} images) to hold a part out: pass {setting('val', 'DATA')}")


def _members(source: DataSource, ids: list[str]) -> dict[str, list[str]]:
    """Return the ids of each group, groups and ids in their order."""
    members: dict[str, list[str]] = {}
    for name in ids:
        members.setdefault(source.group(name), []).append(name)
    return members
