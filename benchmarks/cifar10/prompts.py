"""Class prompts: drawn at random in training, averaged for the zero-shot head."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from robustvlm.data.classes import CIFAR

from .model import CifarCLIP

LOOKS = "blurry,sharp,bad,good,dark,bright,black and white,low contrast,high contrast,low resolution,pixelated,cropped"
QUALITIES = ("", *(f"{look} " for look in LOOKS.split(",")), "close-up ")
KINDS = ("photo", "picture", "image", "photograph")
ARTICLES, SIZES = ("a", "the", "one", "my"), ("", "small ", "big ", "large ")


def random_template(rng: random.Random) -> str:
    """Draw a template such as 'a dark picture of the small {}.', or now and then the bare name."""
    if rng.random() < 0.1:
        return "{}"
    article, quality, kind = rng.choice(("a", "the")), rng.choice(QUALITIES), rng.choice(KINDS)
    stop = rng.choice((".", ""))
    return f"{article} {quality}{kind} of {rng.choice(ARTICLES)} {rng.choice(SIZES)}{{}}{stop}"


def random_prompts(class_names: Sequence[str], rng: random.Random) -> list[str]:
    """One randomly worded prompt for each class."""
    return [random_template(rng).format(name) for name in class_names]


def class_embeddings(model: CifarCLIP, class_names: Sequence[str]) -> Tensor:
    """Unit embeddings [K, D]: the mean over the library's CIFAR templates of unit text features."""
    per_template = [
        torch.nn.functional.normalize(model.encode_text([template.format(name) for name in class_names]), dim=-1)
        for template in CIFAR
    ]
    return torch.nn.functional.normalize(torch.stack(per_template).mean(dim=0), dim=-1)
