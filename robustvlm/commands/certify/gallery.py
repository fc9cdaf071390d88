"""A gallery of images that an image is looked up in: features of the same model, fixed before any noise is drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from robustvlm.certify import settings_digest
from robustvlm.certify.normal import Array
from robustvlm.commands.certify.config import CertifyConfig
from robustvlm.core.framing import to_pixels
from robustvlm.core.seeds import derive_seed
from robustvlm.data.source import DataSource, Sample, select
from robustvlm.data.specs import open_unlabelled
from robustvlm.defenses import SmoothedVLM
from robustvlm.errors import UserError, setting
from robustvlm.models import VLM


@dataclass(frozen=True, eq=False)
class Gallery:
    """Images as unit vectors [G, D], which the attacker does not change.

    Attributes:
        labels: their classes, in the numbering of the images that are certified; -1 for any other.
        names: ids. spec: where they are from. copies: of which each vector is the mean; 0: features without noise.
        left_out: images that are certified themselves, by name or by their pixels, and so are not in it.
    """

    vectors: Array
    labels: tuple[int, ...]
    names: tuple[str, ...]
    spec: str
    copies: int
    left_out: int

    @property
    def digest(self) -> str:
        """Digest of all that decides a certificate against it: another gallery meets other noise."""
        return settings_digest("gallery", self.vectors.astype(np.float32), self.labels)

    @property
    def words(self) -> list[str]:
        """What is in it, for readers of the run."""
        how = f"means of {self.copies:,} noisy copies" if self.copies else "features without noise"
        known = sum(label >= 0 for label in self.labels)
        said = [
            f"The gallery is {len(self.names):,} images of '{self.spec}' ({known:,} of them of a known class), as "
            f"{how} of the same model. It is taken as it is: an attacker who can change an image in it is not covered."
        ]
        if self.left_out:
            said.append(f"{self.left_out:,} images that are certified themselves are left out of the gallery.")
        return said

    @property
    def facts(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {"gallery": {"spec": self.spec, "names": list(self.names), "copies": self.copies}}


def open_gallery(config: CertifyConfig, vlm: VLM, source: DataSource) -> Gallery | None:
    """Return the gallery of a run, None where it has none.

    Images of a smoothed model are encoded as it is deployed, by the mean of its copies, drawn from their ids; those of
    any other without noise. Those that are certified by the same run, and those that show the same pixels as one of
    them, are left out: each would be nearest to itself.

    Args:
        source: the images that are certified, whose classes tell which entries belong to one.

    Raises:
        UserError: no image is left, one cannot be read, or its feature is not finite.
    """
    if config.gallery is None:
        return None
    other = open_unlabelled(config.gallery, source.class_names)
    same = other.spec == source.spec
    queries = _queries(config, source) if same else frozenset()
    shown = frozenset() if same else _pixels_shown(config, vlm, source)
    vectors: list[Array] = []
    labels: list[int] = []
    names: list[str] = []
    left_out = 0
    for item in other.samples():
        if item.id in queries:
            left_out += 1
            continue
        if not isinstance(item, Sample):
            raise UserError(f"'{item.id}' of the gallery '{config.gallery}' cannot be read ({item.reason})")
        if shown and _digest(vlm, item) in shown:
            left_out += 1
            continue
        vectors.append(_encoded(vlm, item))
        labels.append(item.label)
        names.append(item.id)
    if not vectors:
        what = "holds only images that are certified" if left_out else "holds no image"
        raise UserError(f"the gallery '{config.gallery}' {what}: pass {setting('gallery')} other data")
    if not any(label >= 0 for label in labels):
        raise UserError(
            f"no image of the gallery '{config.gallery}' is of a class of '{source.spec}', so that none could be one "
            f"of an image's class: pass {setting('gallery')} labelled data with the same class names"
        )
    table = np.stack(vectors)
    if not np.isfinite(table).all():
        raise UserError(f"model '{vlm.spec}' gives NaN or infinite features for images of '{config.gallery}'")
    copies = vlm.n0 if isinstance(vlm, SmoothedVLM) else 0
    return Gallery(table, tuple(labels), tuple(names), other.spec, copies, left_out)


def _queries(config: CertifyConfig, source: DataSource) -> frozenset[str]:
    ids = source.ids()
    if ids is None:
        raise UserError(
            f"'{source.spec}' is a stream, and cannot be both certified and searched in: pass {setting('gallery')} "
            "other data"
        )
    return frozenset(ids if config.limit is None else select(ids, config.limit))


def _pixels_shown(config: CertifyConfig, vlm: VLM, source: DataSource) -> frozenset[str]:
    """Return digests of the images that are certified, as the model sees them: data may be named in several ways."""
    found = source.samples(limit=config.limit)
    return frozenset(_digest(vlm, item) for item in found if isinstance(item, Sample))


def _digest(vlm: VLM, item: Sample) -> str:
    return hashlib.blake2b(to_pixels(item.image, vlm.framing).numpy().tobytes(), digest_size=16).hexdigest()


@torch.no_grad()
def _encoded(vlm: VLM, item: Sample) -> Array:
    pixels = to_pixels(item.image, vlm.framing)[None].to(vlm.device)
    with torch.random.fork_rng(devices=[vlm.device] if vlm.device.type == "cuda" else []):
        torch.manual_seed(derive_seed(0, "gallery", item.id))
        feature = vlm.encode_image(pixels)[0]
    return np.asarray(F.normalize(feature.double(), dim=-1).cpu().numpy())


def entries_of(gallery: Gallery | None) -> tuple[int, ...] | None:
    """Return the classes of the entries of a gallery; None where the entries are the classes themselves."""
    return None if gallery is None else gallery.labels


def names_of(gallery: Gallery | None, class_names: Sequence[str]) -> tuple[str, ...]:
    """Return what the entries are called that certificates name."""
    return tuple(class_names) if gallery is None else gallery.names
