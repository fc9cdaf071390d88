"""Adversarial images of a run, as safetensors files named by image number."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from robustvlm.runs.files import replacing

GALLERY_SIZE = 12


def save_pair(folder: Path, index: int, clean: Tensor, adversarial: Tensor, facts: dict[str, str]) -> None:
    """Write `clean` and `adversarial` [3, H, W] float32 of one image, with `facts` as the file's metadata."""
    tensors = {"clean": clean.float().contiguous(), "adversarial": adversarial.float().contiguous()}
    with replacing(_path(folder, index)) as temporary:
        # Written here and not by the library, whose errors for a full disk are not those of the operating system.
        temporary.write_bytes(save(tensors, metadata=facts))


def save_to_gallery(folder: Path, index: int, clean: Tensor, adversarial: Tensor, facts: dict[str, str]) -> None:
    """Keep the `GALLERY_SIZE` images of lowest number, whatever the order in which they come."""
    numbers = _numbers(folder)
    if len(numbers) >= GALLERY_SIZE and index > numbers[-1]:
        return
    save_pair(folder, index, clean, adversarial, facts)
    trim_gallery(folder)


def trim_gallery(folder: Path) -> None:
    """Delete the images beyond `GALLERY_SIZE`; of several processes that save at once, each may leave one too many."""
    for surplus in _numbers(folder)[GALLERY_SIZE:]:
        _path(folder, surplus).unlink(missing_ok=True)


def _numbers(folder: Path) -> list[int]:
    return sorted(int(path.stem) for path in folder.glob("[0-9]*.safetensors"))


def _path(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.safetensors"
