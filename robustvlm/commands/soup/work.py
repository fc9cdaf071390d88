"""The work of `robustvlm soup`: several models averaged, measured, written as a model, and how it is shown."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from torch import Tensor

from robustvlm.attacks.threat import ThreatModel, parse_norm, radius_or_default
from robustvlm.commands.common.inputs import describe_data, joined_probes, probe_of
from robustvlm.commands.common.lessons import overlap
from robustvlm.commands.soup import MEASURES, SoupSettings
from robustvlm.core.files import write_text
from robustvlm.core.ranks import resolve_device
from robustvlm.data import DataSource, open_data
from robustvlm.defenses import load_pipeline
from robustvlm.defenses.finetune.saved import Tasting, averaged, greedy, overlay, require_alike, save_finetuned
from robustvlm.errors import UserError, setting
from robustvlm.models import VLM
from robustvlm.models.probe import probe_encoder
from robustvlm.models.saved import Card, read_card, require_ground
from robustvlm.report import screen
from robustvlm.report.sections import Block, Closing, Code, Column, Measure, Row, Table, numbers
from robustvlm.runs.run import Facts, FinishedRun, Session, read_finished
from robustvlm.runs.settings import Observer
from robustvlm.stats import Mean, Rate
from robustvlm.training.validation import RobustValidation, ZeroShotValidation, validation_images

NAME = "soup.json"
RESULTS = (NAME,)


class Soup(BaseModel):
    """What `soup.json` holds: the ingredients, each as it was tried, and measures of the soup if there were images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    tasted: list[Tasting]
    measures: dict[str, Rate | Mean | float] = {}


@dataclass(frozen=True)
class SoupWork:
    """A soup's facts and ingredients, and the images to measure it on, if there are any."""

    facts: Facts
    settings: SoupSettings
    models: list[VLM]
    threat: ThreatModel
    source: DataSource | None

    def run(self, session: Session) -> None:
        """Average the models and write the mean as a model, with the record."""
        with session.results() as folder:
            soup = self._cook(folder, session.observer)
            write_text(folder / NAME, soup.model_dump_json(indent=2) + "\n")

    def _cook(self, folder: Path, observer: Observer) -> Soup:
        specs, method = self.settings.models, self.settings.method
        states = [
            (spec, {key: value.clone() for key, value in vlm.state_dict().items()})
            for spec, vlm in zip(specs, self.models, strict=True)
        ]
        require_alike(states)
        _require_one_function(specs, self.models)
        vlm = self.models[0]
        fingerprint, probe = vlm.fingerprint, probe_encoder(vlm)
        measure = None if self.source is None else self._measure(vlm, self.source, observer)
        if measure is not None:  # each alone, each with those before it, and the soup itself
            observer.begin("Measuring", 1 if method == "uniform" else 2 * len(states))
        tasted = [Tasting(spec, 0.0, True) for spec, _ in states]
        if method == "uniform":
            state = averaged([values for _, values in states])
        else:
            assert measure is not None
            by = MEASURES[self.settings.by]
            state, tasted = greedy(states, lambda values: _number(measure(values)[by]))
        overlay(vlm, state, what="the soup")
        made_of = {"method": method, "models": [step.name for step in tasted if step.kept]}
        card = Card("soup", base=specs[0], base_fingerprint=fingerprint, settings=made_of, base_probe=probe)
        save_finetuned(folder, vlm, card)
        return Soup(method=method, tasted=tasted, measures={} if measure is None else dict(measure(state)))

    def _measure(
        self, vlm: VLM, source: DataSource, observer: Observer
    ) -> Callable[[Mapping[str, Tensor]], Mapping[str, Rate | Mean | float]]:
        """Return a function that puts weights into the model and measures it."""
        images = validation_images(source, size=vlm.framing, limit=self.settings.limit)
        robust = RobustValidation(images, self.threat, n_iter=self.settings.val_steps)
        validation = ZeroShotValidation(vlm, source.class_names, source.templates, robust, texts_change=True)

        def measure(state: Mapping[str, Tensor]) -> Mapping[str, Rate | Mean | float]:
            overlay(vlm, dict(state), what="the soup")
            found = validation()
            observer.advance()
            return found

        return measure


def open_work(settings: SoupSettings) -> SoupWork:
    """Check all settings, open the data and load the models."""
    norm = parse_norm(settings.norm)
    text, radius = radius_or_default(settings.eps, norm, linf="1/255")
    device = resolve_device(settings.device)
    source, remarks = None, list[str]()
    if settings.val is not None:
        source = open_data(settings.val, classes=settings.classes, templates=settings.templates)
        remarks = _require_untaught(settings.models, source, settings.limit)
    models = [load_pipeline(spec, device=str(device)) for spec in settings.models]
    ingredients = {spec: vlm.fingerprint for spec, vlm in zip(settings.models, models, strict=True)}
    facts = Facts(
        (settings.models[0], settings.method),
        settings.stored(norm=norm, eps=radius, eps_text=text, device=str(device)),
        {"spec": settings.models[0], "fingerprint": models[0].fingerprint, "ingredients": ingredients},
        {} if source is None else describe_data(source),
        probe=joined_probes({f"model {n}": probe_of(vlm) for n, vlm in enumerate(models, 1)}),
        remarks=remarks or None,
    )
    return SoupWork(facts, settings, models, ThreatModel(norm, radius), source)


def read_run(folder: Path) -> FinishedRun[Soup]:
    """Read a finished soup back."""
    return read_finished(folder, NAME, Soup, kind="soup")


def show(run: FinishedRun[Soup], console: Console) -> None:
    """Print which models went into the soup, what it measures, and where it is."""
    screen.show(console, blocks(run.summary), Closing({"Model": run.folder}))


def blocks(soup: Soup) -> list[Block]:
    """Return what is said of a soup: what became of each ingredient, and the measures if there were images."""
    greedily = soup.method == "greedy"
    ingredients: list[Row] = [
        (Code(step.name), "kept" if step.kept else "left out", *([Measure.bare(step.value)] if greedily else []))
        for step in soup.tasted
    ]
    measures: list[Row] = [(name, Measure.of(value)) for name, value in soup.measures.items()]
    columns = [Column("Ingredient"), Column(""), *(numbers("Soup with it") if greedily else [])]
    return [
        Table(columns, ingredients, title="Ingredients"),
        Table([Column("Measure"), Column("Value, 95% interval")], measures, title="The soup"),
    ]


def _require_one_function(specs: Sequence[str], models: Sequence[VLM]) -> None:
    """Refuse models that are not one function of their weights, or that were tuned from different models."""
    first, roots = models[0], [root_of(spec) for spec in specs]
    fixed = dict(first.named_buffers(recurse=False))  # such as the mean and std of pixels: no tuning changes them
    for spec, vlm, root in zip(specs, models, roots, strict=True):
        own = dict(vlm.named_buffers(recurse=False))
        same = own.keys() == fixed.keys() and all(torch.equal(own[name], value) for name, value in fixed.items())
        if not same or type(vlm) is not type(first) or vlm.design != first.design:
            raise UserError(
                f"'{specs[0]}' and '{spec}' are not one function of their weights (preprocessing, activation, "
                "tokenizer or temperature differ): a soup needs models tuned from one"
            )
        known = {one for one in (roots[0], root) if one is not None}
        if len(known) > 1:
            raise UserError(f"'{specs[0]}' and '{spec}' were tuned from different models: a soup needs one")


def root_of(spec: str) -> str | None:
    """Return the fingerprint of the model that a run was tuned from, through all runs between; None if not known."""
    found, folder = None, Path(spec)
    while (card := read_card(folder) if folder.is_dir() else None) is not None and card.base is not None:
        if found is None:
            require_ground(folder, card)
        found, folder = card.base_fingerprint, Path(card.base)
    return found


def _number(measure: Rate | Mean | float) -> float:
    return float(measure if isinstance(measure, float) else measure.value or 0.0)


def _require_untaught(specs: Sequence[str], source: DataSource, limit: int) -> list[str]:
    """Refuse to choose or measure on images that one of the models, or any that it stands on, was trained on.

    Returns what a reader has to know: which of the images chose weights before, and what could not be compared.
    """
    found = overlap(specs, source, limit)
    if found.taught is not None:
        lesson, both = found.taught
        what = f"on {len(both)} images of '{source.spec}' (the first, '{both[0]}')" if both else f"on '{source.spec}'"
        raise UserError(
            f"'{lesson.run}' was trained {what}: pass {setting('val')} images that no run was trained on, nor any "
            "that it was tuned from"
        )
    return found.remarks
