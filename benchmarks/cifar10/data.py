"""CIFAR-10 Parquet (Hugging Face image format) to uint8 tensors, and the training augmentation."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from robustvlm.data.classes import CIFAR10
from robustvlm.errors import UserError

PAD = 4


@dataclass(frozen=True)
class Images:
    """Decoded images: uint8 [N, H, W, 3], labels int64 [N], and the class names the labels index."""

    pixels: Tensor
    labels: Tensor
    class_names: tuple[str, ...]


def read_images(path: Path, *, cache: Path, size: int = 32) -> Images:
    """Decode a Parquet file once; later calls read the pixels from `cache` (keyed by the file's content).

    Raises UserError when the file is missing or lacks the columns `image` (bytes) and `label`.
    """
    if not path.is_file():
        raise UserError(f"expected a CIFAR-10 Parquet file, found no file '{path}': check --train and --test")
    file = pq.ParquetFile(path)
    missing = {"image", "label"} - set(file.schema_arrow.names)
    if missing:
        raise UserError(f"expected columns 'image' and 'label' in '{path}', found no {sorted(missing)}")
    stored = cache / f"pixels-{hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()}.npz"
    if not stored.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        columns = file.read(columns=["image", "label"]).to_pydict()
        decoded = np.stack([_decode(row, size) for row in columns["image"]])
        partial = stored.with_suffix(".partial.npz")
        np.savez(partial, pixels=decoded, labels=np.asarray(columns["label"], dtype=np.int64))
        partial.replace(stored)
    with np.load(stored, allow_pickle=False) as arrays:
        pixels, labels = torch.from_numpy(arrays["pixels"]), torch.from_numpy(arrays["labels"])
    names = _class_names(file.schema_arrow.metadata or {})
    if not len(labels) or labels.min() < 0 or labels.max() >= len(names):
        raise UserError(f"expected labels from 0 to {len(names) - 1} in '{path}', found others or no rows at all")
    return Images(pixels, labels, names)


def _decode(row: bytes | dict[str, bytes], size: int) -> np.ndarray:
    image = Image.open(io.BytesIO(row if isinstance(row, bytes) else row["bytes"])).convert("RGB")
    return np.asarray(image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BICUBIC))


def _class_names(metadata: dict[bytes, bytes]) -> tuple[str, ...]:
    """Names from a `classes` list or Hugging Face features in the schema's metadata, else CIFAR-10's own."""
    if b"classes" in metadata:
        return tuple(json.loads(metadata[b"classes"]))
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return tuple(features.get("label", {}).get("names", CIFAR10))


def batches(images: Images, size: int, total: int, *, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `total` augmented batches (pixels [size, 3, H, W], labels), every epoch in a fresh order."""
    generator = torch.Generator().manual_seed(seed)
    padded, n = pad(images.pixels), len(images.labels)
    per_epoch = n // size
    rows: tuple[Tensor, ...] = ()
    for step in range(total):
        if step % per_epoch == 0:
            rows = torch.randperm(n, generator=generator).split(size)
        chosen = rows[step % per_epoch]
        yield augment(padded, chosen, generator), images.labels[chosen]


def pad(pixels: Tensor) -> Tensor:
    """Reflect-pad uint8 [N, H, W, 3] by PAD on each side, for `augment`."""
    return torch.from_numpy(np.pad(pixels.numpy(), ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0)), mode="reflect"))


def augment(padded: Tensor, rows: Tensor, generator: torch.Generator) -> Tensor:
    """Random translation and horizontal flip of the chosen `rows`; float pixels in [0, 1], [B, 3, H, W].

    The result is channels_last in memory, which CPU convolutions prefer.
    """
    n, size = len(rows), padded.shape[1] - 2 * PAD
    steps = torch.arange(size)
    top, left = torch.randint(0, 2 * PAD + 1, (2, n, 1), generator=generator)
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    columns = left + torch.where(mirrored, steps.flip(0), steps)
    crops = padded[rows[:, None, None], (top + steps)[:, :, None], columns[:, None, :]]
    return to_unit(crops)


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] to float [B, 3, H, W] in [0, 1], channels_last in memory."""
    return pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.channels_last) / 255
