"""The images of an immunize run: which teach and which are held out, and their features, kept in the run's folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from robustvlm.core.reading import first_line, parse_json, require_regular
from robustvlm.data import DataSource, open_data
from robustvlm.data.names import name_key
from robustvlm.data.unlabelled import Unlabelled
from robustvlm.defenses.prompts import Features, choose_shots, encode_source
from robustvlm.errors import UserError
from robustvlm.evaluation.overlap import in_both
from robustvlm.models import VLM
from robustvlm.runs.files import replacing
from robustvlm.runs.immunize_config import ImmunizeConfig
from robustvlm.runs.manifest import Manifest, carried, require_owner

OnImages = Callable[[str, int], None]


def held_back(group: str, share: float, seed: int) -> bool:
    """Whether a group of images is held out: a fixed choice by a hash of its name.

    Example:
        >>> sum(held_back(f"g{i}", 0.2, 0) for i in range(1000)) in range(160, 240)
        True
    """
    digest = hashlib.blake2b(f"{seed} held out {group}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def open_held_out(config: ImmunizeConfig, source: DataSource) -> DataSource | float:
    """Return the held-out data, or the share of `source` to hold out.

    Raises:
        UserError: a share outside (0, 1), or data with other classes.
    """
    if isinstance(config.held_out, float):
        if not 0.0 < config.held_out < 1.0:
            raise UserError(f"--held-out takes data or a share between 0 and 1, got {config.held_out:g}")
        return config.held_out
    found = open_data(config.held_out)
    if [name_key(name) for name in found.class_names] != [name_key(name) for name in source.class_names]:
        raise UserError(f"'{config.held_out}' has other classes than '{source.spec}': --held-out needs the same ones")
    return found


def encode_both(
    vlm: VLM,
    config: ImmunizeConfig,
    source: DataSource,
    folder: Path,
    on_images: OnImages | None,
    *,
    owner: Manifest,
) -> tuple[Features, Features]:
    """Return the features of the images to learn from and of the held-out ones, kept in `folder` of the run `owner`."""
    other = open_held_out(config, source)
    chosen = None if config.shots is None else frozenset(choose_shots(source, config.shots, config.seed))
    share = other if isinstance(other, float) else 0.0

    def teaches(name: str) -> bool:
        return (chosen is None or name in chosen) and not held_back(source.group(name), share, config.seed)

    fit = _encoded(vlm, source, folder / "fit.safetensors", "fit", on_images, owner=owner, keep=teaches)
    if isinstance(other, DataSource):
        held = _encoded(vlm, other, folder / "held-out.safetensors", "held out", on_images, owner=owner)
        _require_apart(fit, held, source.spec, other.spec)
    else:
        held = _encoded(
            vlm, source, folder / "held-out.safetensors", "held out", on_images, owner=owner,
            keep=lambda name: held_back(source.group(name), share, config.seed),
        )  # fmt: skip
    return fit, held


def encode_unknown(
    vlm: VLM, source: Unlabelled, number: int, folder: Path, on_images: OnImages | None, *, owner: Manifest
) -> Features:
    """Return the features of the images of `--ood` data; those of a known class have it as their label."""
    return _encoded(vlm, source, folder / f"ood-{number}.safetensors", source.spec, on_images, owner=owner)


def write_features(path: Path, found: Features, owner: Manifest) -> None:
    """Write features, whole or not at all, with the identity of their run."""
    about = carried(owner) | {
        "ids": json.dumps(found.ids),
        "groups": json.dumps(found.groups),
        "unreadable": json.dumps(found.unreadable),
    }
    with replacing(path) as temporary:
        tensors = {"features": found.features.contiguous(), "labels": found.labels.contiguous()}
        temporary.write_bytes(save(tensors, metadata=about))


def read_features(path: Path, owner: Manifest) -> Features:
    """Return kept features; UserError where there are none, the file is damaged or another run's than `owner`."""
    try:
        require_regular(path)
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            require_owner(about.get("run"), owner, path)
            return Features(
                file.get_tensor("features"),
                file.get_tensor("labels"),
                tuple(parse_json(about["ids"])),
                tuple(parse_json(about["groups"])),
                int(parse_json(about.get("unreadable", "0"))),
            )
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"cannot read the kept features '{path}' ({first_line(error)}): make the run again") from None


def _encoded(
    vlm: VLM,
    source: DataSource,
    path: Path,
    title: str,
    on_images: OnImages | None,
    *,
    owner: Manifest,
    keep: Callable[[str], bool] | None = None,
) -> Features:
    """Encode once; a run that was cut short finds what it had finished. The settings are the same, or it would not be
    the same folder."""
    if not path.exists():
        told = None if on_images is None else (lambda done: on_images(title, done))
        found = encode_source(vlm, source, keep=keep, on_images=told)
        if not torch.isfinite(found.features).all():
            raise UserError(f"model '{vlm.spec}' gives NaN or infinite features for images of '{source.spec}'")
        write_features(path, found, owner)
    return read_features(path, owner)


def _require_apart(fit: Features, held: Features, fit_spec: str, held_spec: str) -> None:
    both = in_both(fit_spec, fit.ids, held_spec, held.ids)
    if both:
        raise UserError(
            f"{len(both)} images are both in '{fit_spec}' and held out (the first, '{both[0]}'): "
            "thresholds need images that taught nothing"
        )
