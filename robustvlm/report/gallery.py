"""Adversarial examples as pictures: clean, adversarial and their amplified difference, embedded as PNG."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from safetensors import SafetensorError, safe_open

from robustvlm.core.reading import require_regular
from robustvlm.report.wording import percent, plain

Pixels = npt.NDArray[np.float32]

_MAX_SIDE = 256
"""Larger pictures are scaled down for the page, or a gallery would weigh tens of megabytes."""


@dataclass(frozen=True)
class Example:
    """One gallery entry, ready to show: three data URIs, names and confidences in words."""

    image_id: str
    clean: str
    adversarial: str
    difference: str
    gain: int
    label: str
    clean_prediction: str
    prediction: str
    clean_confidence: str
    confidence: str
    attack: str
    eps: str


def load_gallery(folder: Path, class_names: Sequence[str], eps_texts: dict[float, str]) -> list[Example]:
    """Return the examples stored in `folder` in order of file name; files that cannot be read are left out."""
    examples = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            examples.append(_load(path, class_names, eps_texts))
        except (SafetensorError, OSError, KeyError, ValueError, IndexError):
            continue
    return examples


def _load(path: Path, class_names: Sequence[str], eps_texts: dict[float, str]) -> Example:
    require_regular(path)
    with safe_open(path, framework="np") as file:
        clean, adversarial = file.get_tensor("clean"), file.get_tensor("adversarial")
        about = file.metadata() or {}
    if clean.ndim != 3 or clean.shape[0] != 3 or clean.shape != adversarial.shape:
        raise ValueError(f"{path.name}: need two images of one shape [3, H, W]")
    shown, gain = amplified_difference(clean, adversarial)
    return Example(
        image_id=plain(about["image_id"]),
        clean=data_uri(clean),
        adversarial=data_uri(adversarial),
        difference=data_uri(shown),
        gain=gain,
        label=_name(class_names, about["label"], "an unknown class"),
        clean_prediction=_name(class_names, about["clean_prediction"], "rejected"),
        prediction=_name(class_names, about["prediction"], "rejected"),
        clean_confidence=percent(float(about["clean_confidence"])),
        confidence=percent(float(about["confidence"])),
        attack=plain(about["attack"]),
        eps=eps_texts.get(float(about["eps"]), about["eps"]),
    )


def _name(class_names: Sequence[str], index: str, none: str) -> str:
    if int(index) == -1:
        return none
    if not 0 <= int(index) < len(class_names):
        raise ValueError(f"class {index} is not among {len(class_names)} classes")
    return class_names[int(index)]


def amplified_difference(clean: Pixels, adversarial: Pixels) -> tuple[Pixels, int]:
    """Return grey plus `gain` times the difference, and the largest whole gain that needs no clipping (at least 1).

    Example:
        >>> image = np.zeros((3, 1, 1), dtype=np.float32)
        >>> shown, gain = amplified_difference(image, image + 0.01)
        >>> (gain, shown.max().round(2).item())
        (50, 1.0)
    """
    difference = adversarial - clean
    largest = float(np.abs(difference).max(initial=0.0))
    # The small allowance keeps float32 rounding from turning 50 into 49.
    gain = max(1, int(0.5 / largest + 1e-3)) if largest > 0 else 1
    return np.clip(0.5 + gain * difference, 0.0, 1.0), gain


def data_uri(pixels: Pixels) -> str:
    """Return an image [3, H, W] with values in [0, 1] as a PNG data URI of 8 bits, at most 256 pixels a side."""
    array = np.rint(np.clip(np.nan_to_num(pixels), 0.0, 1.0) * 255).astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(array.transpose(1, 2, 0)))
    image.thumbnail((_MAX_SIDE, _MAX_SIDE), Image.Resampling.BOX)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
