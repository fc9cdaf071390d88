"""Makes the helper modules beside the tests importable, and builds small image folders, and detect runs on them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

if TYPE_CHECKING:
    from detecting import DetectRun

    from robustvlm.runs.run import Run

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
        return write_folder(tmp_path / name, labelled_pictures[:count])

    return make


def write_folder(root: Path, pictures: list[tuple[Image.Image, str]]) -> Path:
    """Write pictures as an image folder and return it."""
    for label in CLASSES:
        (root / label).mkdir(parents=True)
    for number, (image, label) in enumerate(pictures):
        image.save(root / label / f"{number:03d}.png")
    return root


@pytest.fixture(scope="module")
def all_photos(tmp_path_factory: pytest.TempPathFactory, labelled_pictures: list[tuple[Image.Image, str]]) -> Path:
    """All pictures as an image folder that the tests of a file share; runs on it lie beside it."""
    return write_folder(tmp_path_factory.mktemp("shared") / "photos", labelled_pictures)


@pytest.fixture(scope="session")
def detect_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Known images in three classes (to learn from, and to judge) and two sets of others: noisy copies of patterns."""
    root = tmp_path_factory.mktemp("detect")
    draws = np.random.default_rng(5)
    patterns = {name: draws.integers(40, 216, (4, 4, 3)) for name in (*CLASSES, "wolf", "tree")}

    def write(folder: str, name: str, count: int) -> None:
        (root / folder / name).mkdir(parents=True)
        for number in range(count):
            values = np.clip(patterns[name] + draws.normal(0, 12, (4, 4, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(values).resize((16, 16), Image.Resampling.BICUBIC).save(
                root / folder / name / f"{number:02d}.png"
            )

    for name in CLASSES:
        write("fit", name, 8)
        write("known", name, 6)
    (root / "words.txt").write_text("\n".join(f"thing {number}" for number in range(12)))
    write("near", "wolf", 10)
    write("far", "tree", 9)
    return root


@pytest.fixture
def detect_run(detect_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DetectRun:
    """Prepare a run on these images; it is named "run" and lies in a folder of its own.

    Reports take most of the time of so small a run; the tests that look at one make it.
    """
    from robustvlm.commands.detect import DETECT, DetectSettings
    from robustvlm.runs.run import Run

    monkeypatch.setattr("robustvlm.commands.detect.work.write_report", lambda folder: folder)

    def make(model: str = "Encoder", *, name: str = "run", **changes: Any) -> Run:
        options: dict[str, Any] = {
            "model": model if ":" in model or "+" in model else f"small_encoders:{model}",
            "id": f"imagefolder:{detect_images}/known",
            "ood": [f"near=imagefolder:{detect_images}/near", f"far=imagefolder:{detect_images}/far"],
            "fit": f"imagefolder:{detect_images}/fit",
            "words": detect_images / "words.txt",
            "draws": 100,
            "device": "cpu",
            **changes,
        }
        return Run(DETECT, DetectSettings(**options, out=tmp_path, name=name), given="robustvlm detect")

    return make
