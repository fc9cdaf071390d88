"""A run of prompt tuning: encode a few images a class once, learn a context, measure what it changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustvlm.core.foreign_text import without_secrets
from robustvlm.core.ranks import current_ranks
from robustvlm.core.reading import read_json
from robustvlm.core.registry import names_a_callable
from robustvlm.data import UNKNOWN, DataSource, open_data
from robustvlm.data.unlabelled import open_unlabelled
from robustvlm.defenses import load_pipeline
from robustvlm.defenses.pipeline import split_spec
from robustvlm.defenses.prompts import Features, PromptLearner, TuneSettings, choose_shots, encode_source, tune
from robustvlm.defenses.prompts.saved import PROMPTS, save_prompts
from robustvlm.detect import auroc_interval, energy_change
from robustvlm.errors import UserError
from robustvlm.evaluation.describe import describe_data, probe_of, remarks_of
from robustvlm.evaluation.detecting.scoring import copies
from robustvlm.evaluation.overlap import in_both
from robustvlm.models import VLM, resolve_device
from robustvlm.models.probe import probe_encoder
from robustvlm.models.saved import CARD_NAME, Card, write_card
from robustvlm.models.zero_shot import class_embeddings
from robustvlm.runs.checksums import forget_checksums, require_unchanged, write_checksums
from robustvlm.runs.files import write_text
from robustvlm.runs.folder import RunFolder, default_name
from robustvlm.runs.manifest import Manifest, make_manifest
from robustvlm.runs.prompt_config import RECORD, PromptConfig
from robustvlm.stats import rate

Record = dict[str, Any]


@dataclass(frozen=True)
class PreparedPrompts:
    """A run of prompt tuning that is ready to start."""

    config: PromptConfig
    settings: TuneSettings
    folder: RunFolder
    manifest: Manifest
    vlm: VLM
    source: DataSource
    learner: PromptLearner

    def run(
        self,
        *,
        fresh: bool = False,
        on_images: Callable[[int], None] | None = None,
        on_epoch: Callable[[int, dict[str, float]], None] | None = None,
    ) -> Record:
        """Tune the prompts, save them, and return the record; a finished run only returns its record.

        Raises:
            UserError: a class without an image, a loss that is not finite, or an earlier run under other settings.
        """
        with self.folder.opened(self.manifest, fresh=fresh) as manifest:
            path = self.folder.path / RECORD
            if path.exists() and (self.folder.path / CARD_NAME).exists() and self.folder.sealed:
                require_unchanged(self.folder.path, manifest, what="tune-prompts ")
                return dict(read_json(path, advice="delete it, the command makes it again"))
            chosen = frozenset(choose_shots(self.source, self.config.shots, self.config.seed))
            shots = encode_source(self.vlm, self.source, keep=chosen.__contains__, on_images=on_images)
            history = tune(
                self.learner,
                shots.features,
                shots.labels,
                scale=self.vlm.logit_scale,
                settings=self.settings,
                on_epoch=on_epoch,
            )
            with torch.no_grad():
                tuned = self.learner().cpu()
            if not tuned.isfinite().all():
                raise UserError(f"the tuned prompts are not finite: pass a smaller --lr than {self.config.lr:g}")
            record = {"format": 1, "images": len(shots.ids), "history": history, **self._measured(tuned, shots)}
            forget_checksums(self.folder.path)
            self._save(tuned, record)
            write_checksums(self.folder.path, manifest)
            return record

    def _measured(self, tuned: Tensor, shots: Features) -> Record:
        """Return accuracy and detection with the tuned and with the hand-written prompts, on `val` and `ood`."""
        if self.config.val is None:
            return {}
        known = encode_source(self.vlm, _matching(self.config.val, self.source))
        notes: list[str] = []
        taught = set(in_both(self.config.val, known.ids, self.config.data, shots.ids))
        if taught:
            known = known.rows(
                torch.tensor([row for row, name in enumerate(known.ids) if name not in taught], dtype=torch.int64)
            )
            notes.append(f"{len(taught)} images of --val taught the prompts and were left out")
        if not known.ids:
            raise UserError(
                f"every image of --val '{without_secrets(self.config.val)}' taught the prompts: "
                "pass others, or fewer --shots"
            )
        twins = copies(known.features, shots.features)
        if twins:
            notes.append(f"{twins} images of --val look to the model like images that taught the prompts")
        unknown: dict[str, Features] = {}
        for spec in self.config.ood:
            found = encode_source(self.vlm, open_unlabelled(spec, self.source.class_names))
            name = without_secrets(spec)
            unknown[name] = found.rows((found.labels < 0).nonzero().flatten())
            left_out = len(found.ids) - len(unknown[name].ids)
            if not unknown[name].ids:
                raise UserError(f"every image of '{name}' is of a known class: pass others to --ood")
            if left_out:
                notes.append(f"{left_out} images of '{name}' are of known classes and were left out")
        parts = {without_secrets(self.config.data): shots, without_secrets(self.config.val): known, **unknown}
        notes += [f"{p.unreadable} images of '{n}' could not be read" for n, p in parts.items() if p.unreadable]
        plain = class_embeddings(self.vlm, self.source.class_names, self.source.templates).cpu()
        measures = {n: self._measures(known, unknown, texts) for n, texts in (("zero_shot", plain), ("tuned", tuned))}
        return {**measures, "notes": notes}

    def _measures(self, known: Features, unknown: dict[str, Features], texts: Tensor) -> Record:
        labelled = known.labels != UNKNOWN
        hits = (known.features @ texts.T).argmax(dim=1)[labelled] == known.labels[labelled]
        scores = self._scores(known, texts)[labelled.numpy()]
        groups = [group for group, wanted in zip(known.groups, labelled.tolist(), strict=True) if wanted]
        found: Record = {"accuracy": rate(int(hits.sum()), len(hits)).model_dump()}
        for spec, other in unknown.items():
            against = self._scores(other, texts)
            interval = auroc_interval(scores, against, known_groups=groups, unknown_groups=other.groups)
            found.setdefault("auroc", {})[spec] = [interval.value, interval.low, interval.high]
        return found

    def _scores(self, images: Features, texts: Tensor) -> Any:
        logits = self.vlm.logit_scale * images.features @ texts.T
        return energy_change(logits, self.config.n_reset).double().numpy()

    def _save(self, tuned: Tensor, record: Record) -> None:
        """Write the prompts, then the record, and the card last: a folder with a card is whole."""
        save_prompts(self.folder.path, self.learner.context, tuned)
        write_text(self.folder.path / RECORD, json.dumps(record, indent=1) + "\n")
        settings = {"class_names": list(self.source.class_names), "n_reset": self.config.n_reset, "prompts": PROMPTS}
        probe = probe_encoder(self.vlm)
        write_card(self.folder.path, Card("tune-prompts", self.config.model, self.vlm.fingerprint, settings, probe))


def prepare_prompts(
    config: PromptConfig, *, out: Path = Path("runs"), name: str | None = None, command: str = ""
) -> PreparedPrompts:
    """Check all settings, open the data, load the model and return a run that is ready to start.

    Example:
        >>> import tempfile
        >>> config = PromptConfig(model="tiny", data="emoji?split=train&styles=noto&copies=1", epochs=1, shots=1)
        >>> prepare_prompts(config, out=Path(tempfile.mkdtemp())).run()["images"]
        101
    """
    settings = TuneSettings(config.epochs, config.batch_size, config.lr, config.energy_weight, config.seed)
    _check(config)
    if name is not None:
        RunFolder(out, name)
    place = resolve_device(config.device)
    config = config.model_copy(update={"device": str(place)})
    source = open_data(config.data, classes=None if config.classes is None else Path(config.classes))
    val = None if config.val is None else _matching(config.val, source)
    unknown = [open_unlabelled(spec, source.class_names) for spec in config.ood]
    vlm = load_pipeline(config.model, device=place)
    learner = PromptLearner(vlm, source.class_names, length=config.context, start=config.start, seed=config.seed)
    model_facts = {"spec": vlm.spec, "fingerprint": vlm.fingerprint, "logit_scale": vlm.logit_scale}
    data_facts = describe_data(source)
    if val is not None:
        data_facts |= {"val": describe_data(val)}
    if unknown:
        data_facts |= {"ood": [other.fingerprint() for other in unknown]}
    identity = config.model_dump() | {"model facts": model_facts, "data facts": data_facts}
    folder = RunFolder(out, name or default_name("tune-prompts", config.model, config.data, identity))
    manifest = make_manifest(
        kind="tune-prompts",
        name=folder.name,
        command=command,
        config=config,
        model=model_facts,
        data=data_facts,
        probe=probe_of(vlm, source.class_names, source.templates),
    )
    manifest["remarks"] = remarks_of(source)
    return PreparedPrompts(config, settings, folder, manifest, vlm, source, learner)


def _check(config: PromptConfig) -> None:
    base = split_spec(config.model)[0]
    if names_a_callable(base) and not Path(base).is_dir():
        raise UserError(
            f"prompts can be tuned for open_clip models, whose token embeddings can be reached; '{base}' is your own"
        )
    if current_ranks().size > 1:
        raise UserError("`robustvlm tune-prompts` works in one process: start it without torchrun")
    for name, value in (("shots", config.shots), ("context", config.context), ("c", config.n_reset)):
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    if config.ood and config.val is None:
        raise UserError("--ood compares unknown images with known ones: pass --val DATA with known images too")


def _matching(spec: str, source: DataSource) -> DataSource:
    """Open validation data, whose classes must be those of the data."""
    found = open_data(spec)
    if found.class_names != source.class_names:
        raise UserError(
            f"'{spec}' has other classes than '{source.spec}': validation needs the same, in the same order"
        )
    return found
