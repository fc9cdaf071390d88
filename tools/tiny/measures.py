"""What is measured of the bundled model: accuracy on every level of the tree, and open-set separation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from open_clip.model import CLIP
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from robustvlm.data.emoji import EmojiSource
from robustvlm.data.source import Sample
from tools.tiny.network import class_embeddings, image_features
from tools.tiny.sprites import Taxonomy


@dataclass(frozen=True)
class Encoded:
    """Unit features [N, D] and labels [N] (indices into all 173 classes, -1 for open-set images)."""

    features: Tensor
    labels: Tensor


@torch.no_grad()
def encode(model: CLIP, source: EmojiSource, *, batch: int = 128) -> Encoded:
    """Encode a source of the full label set, a batch of pictures in memory at a time."""
    features: list[Tensor] = []
    labels: list[int] = []
    pending: list[Tensor] = []
    for sample in source.samples():
        if isinstance(sample, Sample):
            pending.append(pil_to_tensor(sample.image).float() / 255)
            labels.append(sample.label)
        if len(pending) == batch:
            features.append(image_features(model, torch.stack(pending)))
            pending.clear()
    if pending:
        features.append(image_features(model, torch.stack(pending)))
    return Encoded(torch.cat(features), torch.tensor(labels))


@dataclass(frozen=True)
class Heads:
    """Class embeddings of every level of the tree and the classes of the default label set."""

    taxonomy: Taxonomy
    classes: Tensor
    superclasses: Tensor
    domains: Tensor
    default: Tensor

    @classmethod
    def build(cls, model: CLIP) -> Heads:
        taxonomy = Taxonomy.load()
        return cls(
            taxonomy=taxonomy,
            classes=class_embeddings(model, taxonomy.names),
            superclasses=class_embeddings(model, taxonomy.superclasses),
            domains=class_embeddings(model, taxonomy.domains),
            default=taxonomy.default.nonzero().flatten(),
        )


def accuracies(encoded: Encoded, heads: Heads) -> dict[str, float]:
    """Return top-1 over 173 and 101 classes, and the levels above: of the predicted class, and by own prompts."""
    features, labels, taxonomy = encoded.features, encoded.labels, heads.taxonomy
    predicted = (features @ heads.classes.T).argmax(1)
    superclass, domain = taxonomy.superclass_of[labels], taxonomy.domain_of[labels]
    known = taxonomy.default[labels]
    of_default = heads.default[(features[known] @ heads.classes[heads.default].T).argmax(1)]
    right = {
        "top1_173": predicted == labels,
        "top1_101": of_default == labels[known],
        "superclass_173": taxonomy.superclass_of[predicted] == superclass,
        "superclass_101": taxonomy.superclass_of[of_default] == superclass[known],
        "domain_173": taxonomy.domain_of[predicted] == domain,
        "superclass_prompted": (features @ heads.superclasses.T).argmax(1) == superclass,
        "domain_prompted": (features @ heads.domains.T).argmax(1) == domain,
    }
    return {name: round(torch.mean(values.float()).item(), 4) for name, values in right.items()}


def separation(known: Encoded, unknown: Encoded, heads: Heads, *, scale: float) -> float:
    """Return the AUROC of the energy score log sum exp(logits) at telling known from unknown pictures apart."""
    inside, outside = (torch.logsumexp(scale * part.features @ heads.classes.T, 1) for part in (known, unknown))
    return round(auroc(inside, outside), 4)


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Return the probability that a known picture scores higher than an unknown one, ties counting half.

    Example:
        >>> auroc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0]))
        0.875
    """
    difference = inside[:, None] - outside[None, :]
    return torch.mean(torch.heaviside(difference, torch.tensor(0.5))).item()
