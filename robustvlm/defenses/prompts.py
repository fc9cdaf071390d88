"""Prompt tuning: context vectors learnt in front of the class names, encoders untouched (CoOp), with energy terms."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from robustvlm.core.files import replacing
from robustvlm.core.object_graph import fingerprint
from robustvlm.core.seeds import derive_seed, generator, own_draws
from robustvlm.data import UNKNOWN, DataSource, Sample, to_pixels
from robustvlm.defenses.classifier import Classifier, ZeroShot
from robustvlm.defenses.library import require_once
from robustvlm.defenses.pipeline import SavedModel
from robustvlm.defenses.prompt_towers import prompt_tower
from robustvlm.errors import UserError
from robustvlm.models import VLM, ZeroShotClassifier
from robustvlm.models.weights import read_weights
from robustvlm.text import places_of

# The prompts that are learnt: context vectors shared by all classes, in front of each class name

_SPREAD = 0.02
_ROWS = 128


class PromptLearner(nn.Module):
    """Class embeddings as a function of M context vectors: text encoder("[v_1] ... [v_M] CLASS.").

    CoOp with one context for all classes and the class name last (Zhou et al. 2022, arXiv 2109.01134, section 3.2). The
    context begins as the embeddings of `start`, where it has M tokens; further vectors in front of these, or all, are
    drawn from N(0, 0.02^2) by `seed`. The text tower itself stays as it is.

    Raises:
        UserError: a model without a token embedding that can be reached, or too many context vectors.

    Example:
        >>> from robustvlm.models import load_model
        >>> learner = PromptLearner(load_model("tiny"), ["apple", "hot dog"], length=3, start="a picture of", seed=0)
        >>> tuple(learner().shape), tuple(learner.context.shape)
        ((2, 192), (3, 128))
    """

    def __init__(self, vlm: VLM, class_names: Sequence[str], *, length: int, start: str, seed: int) -> None:
        super().__init__()
        self._tower = prompt_tower(vlm, class_names, length)
        self.context = nn.Parameter(self._start(length, start, seed))

    @property
    def count(self) -> int:
        """How many classes there are."""
        return self._tower.count

    def _start(self, length: int, start: str, seed: int) -> Tensor:
        words = self._tower.word_vectors(start)[-length:]
        drawn = torch.randn(length, words.shape[1], generator=generator(seed, "prompt context")) * _SPREAD
        drawn[length - len(words) :] = words.cpu()
        return drawn.to(self._tower.device)

    def forward(self) -> Tensor:
        """Return unit class embeddings [K, D], differentiable in the context."""
        count = self.count
        parts = [
            checkpoint(self._encode, slice(i, i + _ROWS), use_reentrant=False)
            if count > _ROWS and torch.is_grad_enabled()
            else self._encode(slice(i, i + _ROWS))
            for i in range(0, count, _ROWS)
        ]
        return torch.cat(parts)

    def _encode(self, rows: slice) -> Tensor:
        return F.normalize(self._tower.encode(self.context, rows).float(), dim=-1)


# The losses of energy-based prompt tuning


def masked(features: Tensor, texts: Tensor) -> Tensor:
    """Return features [N, D] with only those entries that speak for each one's nearest class [K, D]; others are 0.

    z~ = z * 1[z * h > 0], h the text embedding of the top-1 class (arXiv 2510.11296); not scaled back to unit norm (our
    reading).

    Example:
        >>> masked(torch.tensor([[0.8, -0.6]]), torch.tensor([[1.0, 0.0], [0.6, 0.8]]))
        tensor([[0.8000, -0.0000]])
    """
    nearest = texts[(features @ texts.T).argmax(dim=1)]
    return features * (features * nearest > 0)


def bounded_energy_change(logits: Tensor, masked_logits: Tensor, scale: float) -> Tensor:
    """Return tanh((E(s~) - E(s)) / scale) for logits [N, K] of the whole and of the masked features, [N].

    E(s) = -log sum_k exp(s_k / tau), scale = 1 / tau. Over the scale, an energy change is one of cosines, and the
    hyperbolic tangent keeps the term from outgrowing the cross-entropies (our reading of "lower bound of the energy
    change"). Masking takes away what speaks against the nearest class, so the change is negative as a rule; the larger
    it is, the less there is to take away.

    Example:
        >>> bounded_energy_change(torch.tensor([[2.0, 0.0]]), torch.tensor([[2.0, 0.0]]), 2.0)
        tensor([0.])
    """
    return torch.tanh((logits.logsumexp(dim=1) - masked_logits.logsumexp(dim=1)) / scale)


def tuning_loss(
    features: Tensor, labels: Tensor, texts: Tensor, *, scale: float, weight: float | None
) -> dict[str, Tensor]:
    """Return the terms of the loss by name, `loss` their sum: CE(s) + CE(s~) - weight * mean bounded energy change.

    Args:
        features: unit image features [N, D]; labels [N]; texts: unit class embeddings [K, D].
        scale: factor on cosines, 1 / tau.
        weight: lambda of the energy term; None is CoOp: the first cross-entropy alone.

    Source: arXiv 2510.11296 (EBM), arXiv 2109.01134 (CoOp).

    Example:
        >>> terms = tuning_loss(torch.eye(2), torch.tensor([0, 1]), torch.eye(2), scale=10.0, weight=None)
        >>> list(terms), bool(terms["loss"] < 1e-4)
        (['cross_entropy', 'loss'], True)
    """
    logits = scale * features @ texts.T
    plain = F.cross_entropy(logits, labels)
    if weight is None:
        return {"cross_entropy": plain, "loss": plain}
    masked_logits = scale * masked(features, texts) @ texts.T
    other = F.cross_entropy(masked_logits, labels)
    change = bounded_energy_change(logits, masked_logits, scale).mean()
    return {
        "cross_entropy": plain,
        "masked_cross_entropy": other,
        "energy_change": change,
        "loss": plain + other - weight * change,
    }


# Learning the context vectors on cached image features


@dataclass(frozen=True)
class TuneSettings:
    """How prompts are learnt; `weight` is lambda of the energy term, None for CoOp without the EBM terms.

    Raises:
        UserError: a value out of range.
    """

    epochs: int = 10
    batch_size: int = 256
    lr: float = 0.01
    weight: float | None = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.lr < float("inf"):
            raise UserError(f"the learning rate must be positive, got {self.lr:g}: pass for example 0.01")
        if self.weight is not None and not 0 <= self.weight < float("inf"):
            raise UserError(f"the weight of the energy term must be at least 0, got {self.weight:g}: pass 1")


Terms = Callable[[Tensor, Tensor, int], dict[str, Tensor]]
"""The terms of a loss by name, `loss` their sum, of features [N, D] with labels [N] in a step counted from 0."""


def tune(
    learner: nn.Module,
    features: Tensor,
    labels: Tensor,
    *,
    scale: float,
    settings: TuneSettings,
    on_epoch: Callable[[int, dict[str, float]], None] | None = None,
    terms_of: Terms | None = None,
) -> list[dict[str, float]]:
    """Learn the context of `learner` in place; return the mean terms of each epoch.

    Adam with a cosine schedule; the order of the images is drawn by (seed, epoch). Only the context changes.

    Args:
        features: unit image features [N, D] of known images, labels [N].
        scale: factor on cosines.
        terms_of: another loss than that of CoOp and EBM; the learner's parameters are what it is lowered in.

    Raises:
        UserError: the loss is no longer finite.
    """
    device = next(learner.parameters()).device
    optimizer = torch.optim.Adam(learner.parameters(), lr=settings.lr)
    per_epoch = -(-len(features) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * per_epoch)
    history: list[dict[str, float]] = []
    step = 0
    for epoch in range(settings.epochs):
        order = torch.randperm(len(features), generator=generator(settings.seed, "prompt order", epoch))
        sums: dict[str, float] = {}
        for chosen in order.split(settings.batch_size):
            batch, wanted = features[chosen].to(device), labels[chosen].to(device)
            if terms_of is None:
                terms = tuning_loss(batch, wanted, learner(), scale=scale, weight=settings.weight)
            else:
                terms = terms_of(batch, wanted, step)
            step += 1
            optimizer.zero_grad()
            terms["loss"].backward()
            optimizer.step()
            schedule.step()
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.item() * len(chosen) / len(features)
        if not all(abs(value) < float("inf") for value in sums.values()):
            raise UserError(
                f"the loss is {sums['loss']} in epoch {epoch + 1}: pass a smaller --lr than {settings.lr:g}"
            )
        history.append(sums)
        if on_epoch is not None:
            on_epoch(epoch + 1, sums)
    return history


# A few images of each class, and the features of images, encoded once


@dataclass(frozen=True)
class Features:
    """Unit features [N, D] with labels [N], ids and groups; label -1 is an unknown class.

    Images of one group (`DataSource.group`) show the same thing, and are one observation to an interval. `unreadable`
    counts images that could not be read and are in none of the rows.
    """

    features: Tensor
    labels: Tensor
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    unreadable: int = 0

    def rows(self, index: Tensor) -> Features:
        """Return some of the images."""
        chosen = index.tolist()
        return Features(
            self.features[index],
            self.labels[index],
            tuple(self.ids[i] for i in chosen),
            tuple(self.groups[i] for i in chosen),
            self.unreadable,
        )


def choose_shots(source: DataSource, shots: int | None, seed: int) -> list[str]:
    """Return the ids of `shots` images of each class (all where a class has fewer, or `shots` is None).

    Which ones depends on (seed, id) alone. Labels are known once an image is decoded, so this reads the source once. A
    class without images is no error: the context is shared, and its name is all that it needs.

    Raises:
        UserError: no labelled image at all.
    """
    of_class: list[list[tuple[bytes, str]]] = [[] for _ in source.class_names]
    for item in source.samples():
        if isinstance(item, Sample) and item.label != UNKNOWN:
            of_class[item.label].append((_rank(seed, item.id), item.id))
    if not any(of_class):
        raise UserError(
            f"'{source.spec}' has no readable image of a known class: prompts are learnt from a few of each"
        )
    return [name for found in of_class for _, name in sorted(found)[:shots]]


def encode_source(
    vlm: VLM,
    source: DataSource,
    *,
    keep: Callable[[str], bool] | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    on_images: Callable[[int], None] | None = None,
) -> Features:
    """Return the features of the readable images that `keep` accepts, in source order.

    A random encoder draws for a batch from `seed` and the ids in it: the same call gives the same features.

    Raises:
        UserError: not one image could be read.
    """
    parts: list[Tensor] = []
    labels: list[int] = []
    ids: list[str] = []
    unreadable: list[str] = []
    for batch in _batches(source, keep, limit, batch_size, unreadable):
        pixels = torch.stack([to_pixels(s.image, vlm.framing) for s in batch])
        draws = own_draws(vlm.device, derive_seed(seed, "features", *(sample.id for sample in batch)))
        with draws, torch.no_grad():
            parts.append(vlm.encode_image(pixels.to(vlm.device)).float().cpu())
        labels += [sample.label for sample in batch]
        ids += [sample.id for sample in batch]
        if on_images is not None:
            on_images(len(ids))
    if not parts:
        raise UserError(f"'{source.spec}' has no image that can be read")
    return Features(
        torch.cat(parts), torch.tensor(labels), tuple(ids), tuple(source.group(name) for name in ids), len(unreadable)
    )


def _batches(
    source: DataSource, keep: Callable[[str], bool] | None, limit: int | None, size: int, unreadable: list[str]
) -> Iterator[list[Sample]]:
    batch: list[Sample] = []
    for item in source.samples(keep=keep, limit=limit):
        if isinstance(item, Sample):
            batch.append(item)
        else:
            unreadable.append(item.id)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _rank(seed: int, name: str) -> bytes:
    return hashlib.blake2b(f"{seed} {name}".encode("utf-8", "surrogateescape"), digest_size=16).digest()


# A folder of kind `tune-prompts` as a model: the base model's encoder, and class embeddings from learnt prompts

PROMPTS = "prompts.safetensors"


class TunedClassifier(ZeroShot):
    """A zero-shot classifier whose class embeddings were learnt; they are part of its identity.

    Args:
        negative_embeddings: unit embeddings [M, D] of words outside the classes, learnt with these (LAPT), and the
            words; None where none were.
    """

    def __init__(
        self, head: ZeroShotClassifier, negative_embeddings: Tensor | None = None, negative_words: Sequence[str] = ()
    ) -> None:
        super().__init__(head)
        self.negative_embeddings, self.negative_words = negative_embeddings, tuple(negative_words)

    @property
    def fingerprint(self) -> str:
        """Digest of the encoder and of the learnt embeddings."""
        learnt = {"class_embeddings": self.class_embeddings}
        if self.negative_embeddings is not None:
            learnt["negative_embeddings"] = self.negative_embeddings
        return fingerprint(learnt, (super().fingerprint, *self.class_names))


class PromptTunedModel(SavedModel):
    """The base model with the class embeddings that its tuned prompts give.

    Its detection score is the energy change (`robustvlm.detect.DeltaEnergy`) on its head, as on any zero-shot head.
    """

    def encoder(self, device: torch.device) -> VLM:
        return self.base(device)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        names = self.card.settings.get("class_names")
        return tuple(str(name) for name in names) if isinstance(names, list) else None

    def classifier(
        self, encoder: VLM, class_names: Sequence[str], templates: Sequence[str], *, cache: bool = True
    ) -> Classifier:
        """Return the tuned classifier over `class_names`, which must be among those that prompts were tuned for."""
        del templates, cache  # the prompts are learnt, and kept here
        rows, negatives = self._learnt(class_names)
        words = self.card.settings.get("negative_words")
        words = [str(word) for word in words] if isinstance(words, list) else []
        if len(words) != (0 if negatives is None else len(negatives)):
            raise UserError(f"'{self.folder}' is damaged: its embeddings do not fit its words; tune the prompts again")
        return TunedClassifier(ZeroShotClassifier(encoder, class_names, rows), negatives, words).eval()

    def class_vectors(self, class_names: Sequence[str]) -> Tensor:
        """Return the learnt embeddings, by which the classifier tells the classes apart."""
        return self._learnt(class_names)[0]

    def _learnt(self, class_names: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Return the learnt embeddings of the classes [K, D], and those of words outside them, where there are any."""
        weights = read_weights(self.folder / PROMPTS)
        embeddings, negatives = weights.get("class_embeddings"), weights.get("negative_embeddings")
        names = self.card.settings.get("class_names")
        if embeddings is None or not isinstance(names, list) or len(names) != len(embeddings):
            raise UserError(
                f"'{self.folder}' is damaged: its embeddings do not fit its classes; tune the prompts again"
            )
        places = places_of(class_names, [str(name) for name in names])
        unknown = [name for name, place in zip(class_names, places, strict=True) if place is None]
        if unknown:
            raise UserError(
                f"the prompts of '{self.folder}' were tuned for {len(names)} classes, '{unknown[0]}' is none of them: "
                "pass data with those classes, or tune prompts for these"
            )
        rows = [place for place in places if place is not None]
        require_once(class_names, rows, f"'{self.folder}'")
        return embeddings[rows], negatives


def save_prompts(folder: Path, context: Tensor, class_embeddings: Tensor, **more: Tensor) -> None:
    """Write the context vectors [M, W] and the class embeddings [K, D] that they give, and other tensors by name."""
    tensors = {"context": context, "class_embeddings": class_embeddings, **more}
    with replacing(folder / PROMPTS) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
