"""From the words of a command to everything an attack run needs; every mistake is found before any work begins."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustvlm.attacks import PRECISIONS, LaneAttack, ThreatModel, parse_attacks, parse_eps, parse_norm
from robustvlm.data import DataSource, open_data
from robustvlm.defenses import load_pipeline
from robustvlm.errors import UserError, nearest
from robustvlm.evaluation.attack_run import AttackRun
from robustvlm.evaluation.finish import finish
from robustvlm.evaluation.ledger import Ledger
from robustvlm.evaluation.observer import Observer
from robustvlm.models import ZeroShotClassifier, zero_shot
from robustvlm.models.device import resolve_device
from robustvlm.report.html import write_report
from robustvlm.report.record import load_run
from robustvlm.runs.config import AttackConfig
from robustvlm.runs.folder import RunFolder, default_name
from robustvlm.runs.manifest import Manifest, make_manifest
from robustvlm.runs.summary import Summary

_DEFAULT_EPS = {"Linf": "2/255", "L2": "0.5"}


@dataclass(frozen=True)
class Prepared:
    """An attack run that is ready to start."""

    config: AttackConfig
    attacks: list[LaneAttack]
    source: DataSource
    classifier: ZeroShotClassifier
    folder: RunFolder
    manifest: Manifest

    def run(self, observer: Observer | None = None, *, fresh: bool = False, resume: bool = False) -> Summary:
        """Start or continue the run, write its files and return the summary; of a finished run, return its summary."""
        with self.folder.opened(self.manifest, fresh=fresh, resume=resume) as manifest:
            if self.folder.finished:
                return self._as_finished()
            ledger = Ledger(self.folder)
            try:
                AttackRun(
                    config=self.config,
                    source=self.source,
                    classifier=self.classifier,
                    attacks=self.attacks,
                    ledger=ledger,
                    observer=observer or Observer(),
                    interpolation=self.classifier.vlm.interpolation,
                ).run()
                return finish(ledger, manifest, self.attacks)
            finally:
                ledger.close()

    def _as_finished(self) -> Summary:
        if not self.folder.report_path.exists():  # the last file to be written may be missing after a crash
            write_report([self.folder.path], self.folder.report_path)
        return load_run(self.folder.path).summary


def prepare(
    *,
    model: str = "tiny",
    data: str = "emoji",
    classes: Path | None = None,
    templates: Path | None = None,
    tree: Path | None = None,
    attack: str = "apgd-ce,apgd-t",
    norm: str = "Linf",
    eps: str | None = None,
    steps: int | None = None,
    restarts: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    lanes: int | None = None,
    device: str = "auto",
    precision: str = "fp32",
    resolution: int | None = None,
    save_adversarial: bool = False,
    out: Path = Path("runs"),
    name: str | None = None,
    command: str = "",
) -> Prepared:
    """Check all settings, open the data, load the model and return a run that is ready to start.

    Cheap checks come first, so that a mistyped option is not found only after a model was loaded.

    Example:
        >>> import tempfile
        >>> run = prepare(attack="pgd", steps=2, limit=4, lanes=4, out=Path(tempfile.mkdtemp()))
        >>> run.run().images.evaluated
        4
    """
    attacks = parse_attacks(attack, steps=steps, restarts=restarts)
    norm = parse_norm(norm)
    radii = parse_eps(eps if eps is not None else _DEFAULT_EPS[norm])
    for _, value in radii:
        ThreatModel(norm, value)
    device = str(resolve_device(device))
    lanes = _lanes(lanes, device)
    _check_numbers(limit=limit, seed=seed, resolution=resolution, precision=precision)
    if name is not None:
        RunFolder(out, name)
    source = open_data(data, classes=classes, templates=templates, tree=tree)
    classifier = zero_shot(load_pipeline(model, device=device), source.class_names, source.templates)
    config = AttackConfig(
        model=model,
        data=data,
        classes=None if classes is None else str(classes),
        templates=None if templates is None else str(templates),
        tree=None if tree is None else str(tree),
        attack=[item.name for item in attacks],
        norm=norm,
        eps=[value for _, value in radii],
        eps_text=[text for text, _ in radii],
        steps=steps,
        restarts=restarts,
        limit=limit,
        seed=seed,
        lanes=lanes,
        device=device,
        precision=precision,
        resolution=resolution or classifier.vlm.image_size,
        save_adversarial=save_adversarial,
    )
    model_facts, data_facts = _describe_model(classifier), _describe_data(source)
    identity = config.model_dump() | {"model facts": model_facts, "data facts": data_facts}
    folder = RunFolder(out, name or default_name("attack", model, data, identity))
    manifest = make_manifest(
        kind="attack",
        name=folder.name,
        command=command,
        config=config,
        model=model_facts,
        data=data_facts,
    )
    _require_text(manifest)
    return Prepared(config, attacks, source, classifier, folder, manifest)


def _lanes(lanes: int | None, device: str) -> int:
    if lanes is None:
        return 256 if device.startswith("cuda") else 64
    if lanes < 1:
        raise UserError(f"--lanes must be at least 1, got {lanes}")
    return lanes


def _check_numbers(*, limit: int | None, seed: int, resolution: int | None, precision: str) -> None:
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1 image, got {limit}")
    if seed < 0:
        raise UserError(f"--seed must not be negative, got {seed}")
    if resolution is not None and not 8 <= resolution <= 4096:
        raise UserError(f"--resolution must be between 8 and 4096 pixels, got {resolution}")
    if precision not in PRECISIONS:
        raise UserError(f"unknown precision '{precision}': {nearest(precision, PRECISIONS)}")


def _require_text(manifest: Manifest) -> None:
    """Refuse file names that are no text, as Linux allows: they could not be written down in any file of the run."""
    try:
        json.dumps(manifest, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        shown = ascii(error.object[max(0, error.start - 30) : error.end + 10])
        raise UserError(f"a path or name in the settings is not valid text (UTF-8), near {shown}: rename it") from None


def _describe_model(classifier: ZeroShotClassifier) -> dict[str, Any]:
    vlm = classifier.vlm
    return {
        "spec": vlm.spec,
        "fingerprint": vlm.fingerprint,
        "image_size": vlm.image_size,
        "logit_scale": vlm.logit_scale,
    }


def _describe_data(source: DataSource) -> dict[str, Any]:
    ids = source.ids()
    return {
        "spec": source.spec,
        "fingerprint": source.fingerprint(),
        "images": None if ids is None else len(ids),
        "class_names": list(source.class_names),
        "templates": list(source.templates),
        "superclasses": _superclasses(source),
    }


def _superclasses(source: DataSource) -> dict[str, str] | None:
    """Return the superclass of every class in the first tree of the data, if there is one."""
    if source.tree is None:
        return None
    tree = source.tree[0]
    return dict(zip(tree.class_names, tree.superclasses(tree.superclass_level), strict=True))
