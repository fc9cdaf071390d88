"""Accuracy on the validation style, for watching and choosing runs; the test style is never read here."""

from __future__ import annotations

import torch
from open_clip.model import CLIP

from robustvlm.core.seeds import generator
from robustvlm.data.emoji import VALIDATION_STYLE, compose
from tools.tiny.network import class_embeddings, image_features
from tools.tiny.sprites import Sprites, Taxonomy


def validation_accuracy(model: CLIP, taxonomy: Taxonomy, *, copies: int = 4) -> dict[str, float]:
    """Return top-1 over all classes, and accuracy of the superclass and domain of the predicted class."""
    sprites = Sprites.load(taxonomy, styles=(VALIDATION_STYLE,))
    rows = list(range(len(sprites.styles))) * copies
    pixels = compose(sprites.as_float(rows), generator("tiny", "validation"))
    predicted = (image_features(model, pixels) @ class_embeddings(model, taxonomy.names).T).argmax(1)
    labels = sprites.labels[rows]
    levels = {
        "top1": predicted == labels,
        "superclass": taxonomy.superclass_of[predicted] == taxonomy.superclass_of[labels],
        "domain": taxonomy.domain_of[predicted] == taxonomy.domain_of[labels],
    }
    return {name: round(torch.mean(right.float()).item(), 4) for name, right in levels.items()}
