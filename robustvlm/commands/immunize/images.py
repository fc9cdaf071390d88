"""The images and the texts of an immunize run: which teach, which are held out, and the antibodies."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import acos, degrees
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from robustvlm.commands.immunize import ImmunizeSettings
from robustvlm.core.files import first_line, parse_json, replacing, require_regular
from robustvlm.core.seeds import generator
from robustvlm.data import DataSource, open_data
from robustvlm.data.classes import read_class_names
from robustvlm.data.names import same_things
from robustvlm.data.specs import Unlabelled
from robustvlm.data.splits import in_both
from robustvlm.defenses.immunity import antibodies as known
from robustvlm.defenses.prompts import Features, choose_shots, encode_source
from robustvlm.errors import UserError, setting
from robustvlm.llm import LlmClient
from robustvlm.llm.client import open_client, spent
from robustvlm.models import VLM
from robustvlm.models.zero_shot import class_embeddings
from robustvlm.report.training import counted
from robustvlm.runs.manifest import Manifest, carried, require_owner
from robustvlm.runs.settings import Observer
from robustvlm.stats import rate
from robustvlm.text import name_key

# The images of an immunize run: which teach and which are held out, and their features, kept in the run's folder


def held_back(group: str, share: float, seed: int) -> bool:
    """Whether a group of images is held out: a fixed choice by a hash of its name.

    Example:
        >>> sum(held_back(f"g{i}", 0.2, 0) for i in range(1000)) in range(160, 240)
        True
    """
    digest = hashlib.blake2b(f"{seed} held out {group}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def open_held_out(settings: ImmunizeSettings, source: DataSource) -> DataSource | float:
    """Return the held-out data, or the share of `source` to hold out; UserError for data with other classes."""
    if isinstance(settings.held_out, float):
        return settings.held_out
    return with_same_classes(settings.held_out, source, "held_out")


def with_same_classes(spec: str, source: DataSource, name: str) -> DataSource:
    """Return the data of a spec, given as setting `name`; UserError for data with other classes than `source`."""
    found = open_data(spec)
    if [name_key(name) for name in found.class_names] != [name_key(name) for name in source.class_names]:
        raise UserError(f"'{spec}' has other classes than '{source.spec}': {setting(name)} needs the same ones")
    return found


def encode_both(
    vlm: VLM,
    settings: ImmunizeSettings,
    source: DataSource,
    folder: Path,
    observer: Observer,
    *,
    owner: Manifest,
) -> tuple[Features, Features]:
    """Return the features of the images to learn from and of the held-out ones, kept in `folder` of the run `owner`."""
    other = open_held_out(settings, source)
    chosen = frozenset(choose_shots(source, settings.shots, settings.seed)) if settings.shots else None
    share = other if isinstance(other, float) else 0.0

    def teaches(name: str) -> bool:
        return (chosen is None or name in chosen) and not held_back(source.group(name), share, settings.seed)

    fit = _encoded(vlm, source, folder / "fit.safetensors", "fit", observer, owner=owner, keep=teaches)
    if isinstance(other, DataSource):
        held = _encoded(vlm, other, folder / "held-out.safetensors", "held out", observer, owner=owner)
        _require_apart(fit, held, source.spec, other.spec)
    else:
        held = _encoded(
            vlm, source, folder / "held-out.safetensors", "held out", observer, owner=owner,
            keep=lambda name: held_back(source.group(name), share, settings.seed),
        )  # fmt: skip
    return fit, held


def encode_calibration(vlm: VLM, source: DataSource, folder: Path, observer: Observer, *, owner: Manifest) -> Features:
    """Return the features of the images of `--calibrate` data, kept in `folder` of the run `owner`."""
    return _encoded(vlm, source, folder / "held-out.safetensors", "held out", observer, owner=owner)


def encode_unknown(
    vlm: VLM, source: Unlabelled, name: str, number: int, folder: Path, observer: Observer, *, owner: Manifest
) -> Features:
    """Return the features of the images of `--ood` data; those of a known class have it as their label."""
    return _encoded(vlm, source, folder / f"ood-{number}.safetensors", name, observer, owner=owner)


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
    observer: Observer,
    *,
    owner: Manifest,
    keep: Callable[[str], bool] | None = None,
) -> Features:
    """Encode once; a run that was cut short finds what it had finished. The settings are the same, or it would not be
    the same folder."""
    if not path.exists():
        observer.begin(f"Encoding {title}", count_of_images(source, keep))
        seed = int(owner["config"]["seed"])  # a random encoder's draws differ between runs of different seeds
        found = encode_source(vlm, source, keep=keep, seed=seed, on_images=counted(observer))
        if not torch.isfinite(found.features).all():
            raise UserError(f"model '{vlm.spec}' gives NaN or infinite features for images of '{source.spec}'")
        write_features(path, found, owner)
    return read_features(path, owner)


def count_of_images(source: DataSource, keep: Callable[[str], bool] | None = None) -> int | None:
    """Return how many images of a source are used, where it knows that beforehand."""
    ids = source.ids()
    if ids is None:
        return None
    return len(ids) if keep is None else sum(map(keep, ids))


def _require_apart(fit: Features, held: Features, fit_spec: str, held_spec: str) -> None:
    both = in_both(fit_spec, fit.ids, held_spec, held.ids)
    if both:
        raise UserError(
            f"{len(both)} images are both in '{fit_spec}' and held out (the first, '{both[0]}'): "
            "thresholds need images that taught nothing"
        )


# The texts of an immunize run: class embeddings, and antibodies from whichever source, filtered and judged

NOISE_PER_CLASS = 10
_FOLDS = 5


@dataclass(frozen=True, eq=False)
class Made:
    """The antibodies of a run, those dropped with reasons, and the band (None where nothing was filtered).

    `naming` are the proposed texts that name a class of an unknown set that is measured on, with its name; `proposal`
    is what was held against the band.
    """

    antibodies: known.Antibodies
    dropped: tuple[known.Dropped, ...]
    band: known.Band | None
    naming: Mapping[str, str] = field(default_factory=dict)
    proposal: known.Proposal | None = None

    def returning(self, class_names: Sequence[str], text: Tensor, prototypes: Tensor) -> known.Returning:
        """Return the antibodies that were dropped for naming a known class."""
        return known.returning(self.proposal, class_names, text, prototypes=prototypes, band=self.band)


def embedder(vlm: VLM, templates: Sequence[str]) -> Callable[[Sequence[str]], Tensor]:
    """Return the function from names to unit text embeddings [N, D] on the CPU, with the prompts of the data."""
    return lambda texts: class_embeddings(vlm, list(texts), templates).float().cpu()


def client_of(settings: ImmunizeSettings) -> LlmClient | None:
    """Return the client of the language model that the settings name; None where they name none."""
    return open_client(settings.llm, settings.llm_model, settings.llm_prices)


def antibody_file(settings: ImmunizeSettings) -> Path | None:
    """Return the file of the user's antibodies, where they come from one."""
    kind, _, rest = settings.antibodies.partition(":")
    return Path(rest) if kind == "file" else None


def propose(settings: ImmunizeSettings, class_names: Sequence[str], observer: Observer) -> known.Proposal:
    """Return antibodies for classes from the source that the settings name, and say what asking has cost."""
    client = client_of(settings)
    observer.begin("Antibodies", len(class_names))
    opened = known.open_source(settings.antibodies, client=client, on_classes=counted(observer))
    found = opened.propose(class_names)
    if client is not None:
        observer.say(spent(client, settings.llm_prices))
    return found


def make_antibodies(
    settings: ImmunizeSettings,
    source: DataSource,
    embed: Callable[[Sequence[str]], Tensor],
    prototypes: Tensor,
    text: Tensor,
    *,
    unknown: Mapping[str, DataSource] = MappingProxyType({}),
    observer: Observer,
) -> Made:
    """Return the antibodies of all classes: generated, filtered by name and by band.

    Those that name a class of an unknown set are dropped unless the settings ask for an oracle: the model would be told
    what it is then tested on.

    Args:
        prototypes: [K, M, D]. text: class embeddings [K, D]. unknown: the sets that will be measured on, by name.

    Raises:
        UserError: an unknown source, or no band that leaves room.
    """
    dim = text.shape[1]
    if settings.antibodies == "none":
        return Made(known.Antibodies((), torch.zeros(0, dim)), (), None)
    if settings.antibodies == "noise":
        count = NOISE_PER_CLASS * len(source.class_names)
        return Made(known.noise_antibodies(count, dim, seed=settings.seed), (), None)
    proposal = propose(settings, source.class_names, observer)
    texts = [text.text for text in proposal.texts]
    sets = reversed(list(unknown.items()))
    naming = {text: name for name, other in sets for text in same_things(texts, other.things())}
    told = () if settings.oracle_words else tuple(text for text in proposal.texts if text.text in naming)
    proposal = replace(proposal, texts=tuple(text for text in proposal.texts if text not in told))
    band = known.automatic_band(prototypes, text, safe=settings.band[0], risk=settings.band[1])
    found = known.filter_antibodies(
        proposal, embed, prototypes, source.class_names, band=band, above=superclasses(source)
    )
    gone = [known.Dropped(text, f"it names a class of the unknown set '{naming[text.text]}'") for text in told]
    return Made(found.kept, (*found.dropped, *gone), band, naming, proposal)


def superclasses(source: DataSource) -> tuple[str, ...]:
    """Return the names above the classes in the data's trees: no antibodies either."""
    names: dict[str, None] = {}
    for tree in source.tree or ():
        for level in range(1, tree.levels):
            names.update(dict.fromkeys(tree.level_names(level)))
    classes = set(map(name_key, source.class_names))
    return tuple(name for name in names if name_key(name) not in classes)


def diagnose(
    made: Made,
    prototypes: Tensor,
    text: Tensor,
    class_names: Sequence[str],
    embed: Callable[[Sequence[str]], Tensor],
    near_names: Path | None,
    seed: int,
) -> dict[str, Any]:
    """Return coverage and margins of the antibodies.

    Coverage of the neighbourhood: the share of class names, each left out in turn, that lie nearer to an antibody than
    to another class (`neighbourhood`). Beside it the share of texts within an angle of an antibody, where the angle is
    that of the upper bound of the band (nearer than known classes are to each other): of `near_names`, and always of
    the antibodies themselves, each fifth held against the other four.
    """
    antibodies = made.antibodies
    nearest = known.margins(antibodies, prototypes)
    found: dict[str, Any] = {"margin_min": float(nearest.min()), "margin_median": float(nearest.median())}
    if len(antibodies) and len(class_names) > 1:
        around = known.neighbourhood(
            antibodies, text, class_names, proposal=made.proposal, prototypes=prototypes, band=made.band
        )
        found["neighbourhood"] = {
            "covered": rate(int(around.covered.sum()), len(class_names)).model_dump(),
            "named": int(around.named.sum()),
            "to_antibody": float(around.to_antibody.median()),
            "to_class": float(around.to_class.median()),
        }
    if made.band is None or not len(antibodies):
        return found
    angle = degrees(acos(max(-1.0, min(1.0, made.band.risk))))
    found |= {"angle": angle, "coverage_crossed": _crossed(antibodies, angle, seed)}
    if near_names is not None:
        names, _ = read_class_names(near_names)
        if not isinstance(names, tuple):
            raise UserError(f"'{near_names}' maps labels to names: expected a list, one name a line")
        within = known.coverage(antibodies, embed(list(names)), angle)
        found |= {"coverage_near": float(within.double().mean()), "near_names": len(names)}
    return found


def _crossed(antibodies: known.Antibodies, angle: float, seed: int) -> float | None:
    """Return the share of antibodies that the other four fifths cover; None for fewer than five."""
    count = len(antibodies)
    if count < _FOLDS:
        return None
    fold = torch.randperm(count, generator=generator(seed, "coverage")) % _FOLDS
    hits = 0
    for i in range(_FOLDS):
        rest = [row for row in range(count) if fold[row] != i]
        others = known.Antibodies(tuple(antibodies.texts[row] for row in rest), antibodies.embeddings[rest])
        hits += int(known.coverage(others, antibodies.embeddings[fold == i], angle).sum())
    return hits / count
