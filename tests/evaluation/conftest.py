"""Makes the helper module beside the tests importable, and builds small labelled image folders."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

CLASSES = ("cat", "dog", "fox")


def picture(number: int) -> Image.Image:
    """A 16-pixel image of coarse coloured noise."""
    values = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((16, 16), Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def labelled_pictures() -> list[tuple[Image.Image, str]]:
    """Pictures with the class that the small encoder gives them; every fifth has another one, so some are wrong."""
    from small_encoders import Encoder

    from robustvlm.data import to_pixels
    from robustvlm.models import VLM, zero_shot
    from robustvlm.models.custom import CustomVLM

    vlm: VLM = CustomVLM(Encoder(), spec="small_encoders:Encoder")
    classifier = zero_shot(vlm, CLASSES, ["a photo of a {}."], cache=False)
    pictures = [picture(number) for number in range(36)]
    with torch.no_grad():
        said = classifier(torch.stack([to_pixels(image, 16) for image in pictures])).argmax(1).tolist()
    labels = [CLASSES[(label + (number % 5 == 4)) % 3] for number, label in enumerate(said)]
    return list(zip(pictures, labels, strict=True))


@pytest.fixture
def make_folder(tmp_path: Path, labelled_pictures: list[tuple[Image.Image, str]]) -> Callable[..., Path]:
    """Write the first `count` pictures as an image folder and return it."""

    def make(count: int = 36, name: str = "photos") -> Path:
        root = tmp_path / name
        for label in CLASSES:
            (root / label).mkdir(parents=True)
        for number, (image, label) in enumerate(labelled_pictures[:count]):
            image.save(root / label / f"{number:03d}.png")
        return root

    return make
