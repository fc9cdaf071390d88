"""A soup as a run: several models averaged, measured, and written as a model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from robustvlm.attacks import ThreatModel
from robustvlm.core.reading import read_json
from robustvlm.data import DataSource, open_data
from robustvlm.defenses import load_pipeline
from robustvlm.defenses.finetune.saved import overlay, save_finetuned
from robustvlm.defenses.finetune.soup import Tasting, averaged, greedy, require_alike
from robustvlm.errors import UserError, nearest
from robustvlm.evaluation.describe import describe_data, probe_of
from robustvlm.evaluation.finetuning.validation import ZeroShotValidation, validation_images
from robustvlm.models import VLM
from robustvlm.models.device import resolve_device
from robustvlm.models.probe import probe_encoder
from robustvlm.models.saved import Card, read_card, require_ground
from robustvlm.runs.checksums import forget_checksums, require_unchanged, write_checksums
from robustvlm.runs.files import write_text
from robustvlm.runs.folder import RunFolder, default_name
from robustvlm.runs.manifest import make_manifest, require_shape
from robustvlm.runs.soup_config import SoupConfig
from robustvlm.stats import Mean, Rate
from robustvlm.training import RobustValidation

NAME = "soup.json"
METHODS = ("uniform", "greedy")
MEASURES = {"robust": "robust accuracy", "clean": "clean accuracy"}


class Soup(BaseModel):
    """What `soup.json` holds: the ingredients, each as it was tried, and measures of the soup if there were images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    tasted: list[Tasting]
    measures: dict[str, Rate | Mean | float] = {}


def make_soup(
    config: SoupConfig, *, out: Path = Path("runs"), name: str | None = None, command: str = "", fresh: bool = False
) -> tuple[Soup, RunFolder]:
    """Average the models of a config into a run folder, and return what came of it; of a finished run, what it says.

    Raises UserError for fewer than two models, different architectures, or greedy without images.
    """
    _check(config)
    if name is not None:
        RunFolder(out, name)
    config = config.model_copy(update={"device": str(resolve_device(config.device))})
    source = None if config.data is None else _open(config)
    if source is not None:
        _require_untaught(config.models, source)
    models = [load_pipeline(spec, device=config.device) for spec in config.models]
    facts: dict[str, Any] = {"spec": config.model, "fingerprint": models[0].fingerprint}
    facts |= {"ingredients": {spec: vlm.fingerprint for spec, vlm in zip(config.models, models, strict=True)}}
    data_facts = {} if source is None else describe_data(source)
    identity = config.model_dump() | {"model facts": facts, "data facts": data_facts}
    folder = RunFolder(out, name or default_name("soup", config.model, config.method, identity))
    manifest = make_manifest(
        kind="soup", name=folder.name, command=command, config=config, model=facts, data=data_facts,
        probe=_probe_of_all(models),
    )  # fmt: skip
    with folder.opened(manifest, fresh=fresh) as known:
        path = folder.path / NAME
        if not (path.exists() and folder.sealed):
            forget_checksums(folder.path)
            soup = _cook(config, models, source, folder.path)
            write_text(path, soup.model_dump_json(indent=2) + "\n")
            write_checksums(folder.path, known)
        require_unchanged(folder.path, known, what="soup ")
        content = read_json(path, advice="delete it, the command makes it again")
        require_shape(Soup, content, path, ": delete it, the command makes it again")
        return Soup.model_validate(content), folder


def _probe_of_all(models: Sequence[VLM]) -> dict[str, Any]:
    """Return the answers of every ingredient to fixed inputs, as one probe."""
    probes = [probe_of(vlm) for vlm in models]
    parts = {f"{name} (model {n})": part for n, one in enumerate(probes, 1) for name, part in one["parts"].items()}
    return probes[0] | {"parts": parts}


def _cook(config: SoupConfig, models: list[VLM], source: DataSource | None, folder: Path) -> Soup:
    states = [
        (spec, {key: value.clone() for key, value in vlm.state_dict().items()})
        for spec, vlm in zip(config.models, models, strict=True)
    ]
    require_alike(states)
    _require_one_function(config.models, models)
    vlm, fingerprint, probe = models[0], models[0].fingerprint, probe_encoder(models[0])
    measure = None if source is None else _measure(config, vlm, source)
    tasted = [Tasting(spec, 0.0, True) for spec, _ in states]
    if config.method == "uniform":
        state = averaged([values for _, values in states])
    else:
        assert measure is not None
        by = MEASURES[config.by]
        state, tasted = greedy(states, lambda values: _number(measure(values)[by]))
    overlay(vlm, state, what="the soup")
    settings = {"method": config.method, "models": [step.name for step in tasted if step.kept]}
    card = Card("soup", base=config.model, base_fingerprint=fingerprint, settings=settings, base_probe=probe)
    save_finetuned(folder, vlm, card)
    return Soup(method=config.method, tasted=tasted, measures={} if measure is None else dict(measure(state)))


def _require_one_function(specs: Sequence[str], models: Sequence[VLM]) -> None:
    """Refuse models that are not one function of their weights, or that were tuned from different models."""
    first, roots = models[0], [_root(spec) for spec in specs]
    fixed = dict(first.named_buffers(recurse=False))  # such as the mean and std of pixels: no tuning changes them
    for spec, vlm, root in zip(specs, models, roots, strict=True):
        own = dict(vlm.named_buffers(recurse=False))
        same = own.keys() == fixed.keys() and all(torch.equal(own[name], value) for name, value in fixed.items())
        if not same or type(vlm) is not type(first) or _design(vlm) != _design(first):
            raise UserError(
                f"'{specs[0]}' and '{spec}' are not one function of their weights (preprocessing, activation, "
                "tokenizer or temperature differ): a soup needs models tuned from one"
            )
        known = {one for one in (roots[0], root) if one is not None}
        if len(known) > 1:
            raise UserError(f"'{specs[0]}' and '{spec}' were tuned from different models: a soup needs one")


def _design(vlm: VLM) -> list[str]:
    """Return what decides the features beside weights; an own encoder counts its spec among that."""
    return [text for text in vlm.design if text != vlm.spec]


def _root(spec: str) -> str | None:
    """Return the fingerprint of the model that a run was tuned from, through all runs between; None if not known."""
    found, folder = None, Path(spec)
    while (card := read_card(folder) if folder.is_dir() else None) is not None and card.base is not None:
        if found is None:
            require_ground(folder, card)
        found, folder = card.base_fingerprint, Path(card.base)
    return found


def _measure(
    config: SoupConfig, vlm: VLM, source: DataSource
) -> Callable[[Mapping[str, Tensor]], Mapping[str, Rate | Mean | float]]:
    """Return a function that puts weights into the model and measures it."""
    images = validation_images(source, size=vlm.framing, limit=config.limit)
    robust = RobustValidation(images, ThreatModel(config.norm, config.eps), n_iter=config.val_steps)
    validation = ZeroShotValidation(vlm, source.class_names, source.templates, robust, texts_change=True)

    def measure(state: Mapping[str, Tensor]) -> Mapping[str, Rate | Mean | float]:
        overlay(vlm, dict(state), what="the soup")
        return validation()

    return measure


def _number(measure: Rate | Mean | float) -> float:
    return float(measure if isinstance(measure, float) else measure.value or 0.0)


def _open(config: SoupConfig) -> DataSource:
    assert config.data is not None
    classes, templates = (None if text is None else Path(text) for text in (config.classes, config.templates))
    return open_data(config.data, classes=classes, templates=templates)


def _require_untaught(specs: Sequence[str], source: DataSource) -> None:
    """Refuse to choose or measure on the data that one of the runs was trained on, as their manifests name them."""
    for spec in specs:
        manifest = None
        with contextlib.suppress(OSError, UserError):
            manifest = read_json(Path(spec) / "manifest.json")
        data = manifest.get("data") if isinstance(manifest, dict) else None
        if isinstance(data, dict) and data.get("fingerprint") == source.fingerprint():
            raise UserError(f"'{spec}' was trained on '{source.spec}': pass --val images that no run was trained on")


def _check(config: SoupConfig) -> None:
    if len(config.models) < 2:
        raise UserError(f"a soup is made of at least 2 models, got {len(config.models)}")
    for what, value, known in (("method", config.method, METHODS), ("measure", config.by, tuple(MEASURES))):
        if value not in known:
            raise UserError(f"unknown {what} '{value}': {nearest(value, known)}")
    if config.method == "greedy" and config.data is None:
        raise UserError("a greedy soup is chosen on images: pass --val DATA, which none of the models was trained on")
