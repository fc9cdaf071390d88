"""`robustvlm finetune`: from the settings of a command to a run folder that is a model."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from robustvlm.attacks import ThreatModel
from robustvlm.commands.common.inputs import code_facts, describe_data, facts_of, probe_of, remarks_of
from robustvlm.core.device import device_of_rank, resolve_device
from robustvlm.core.files import write_text
from robustvlm.core.ranks import Ranks, current_ranks
from robustvlm.data import DataSource, open_data
from robustvlm.data.make_trees import BY_KIND, MAKERS, make_forest
from robustvlm.data.source import select
from robustvlm.data.splits import require_unseen_validation
from robustvlm.data.trees import Forest, Tree, load_forest, save_forest
from robustvlm.defenses import load_pipeline
from robustvlm.defenses.finetune import (
    FinetuneSettings,
    FinetuneTask,
    HierarchicalOptions,
    InnerAttack,
    find_method,
    finetune_task,
)
from robustvlm.defenses.finetune.saved import save_finetuned
from robustvlm.defenses.finetune.trainable import require_trainable
from robustvlm.errors import UserError, nearest
from robustvlm.llm import Endpoint, LlmClient
from robustvlm.models import VLM
from robustvlm.models.probe import probe_encoder
from robustvlm.models.saved import Card
from robustvlm.report.training import NAME, TrainingSummary, load_training_run, write_training_report
from robustvlm.runs.folder import RunFolder, default_name, opened_by_all
from robustvlm.runs.manifest import Manifest, forget_checksums, make_manifest, run_identity, write_checksums
from robustvlm.training import (
    LabelledImages,
    RobustValidation,
    Trainer,
    TrainingConfig,
    TrainingImages,
    TrainingObserver,
    ids_of,
    parse_augmentation,
)
from robustvlm.training.validation import ZeroShotValidation, held_out, validation_images

# What defines a fine-tuning run: the settings that decide its weights


class FinetuneConfig(BaseModel):
    """Every setting that the weights of a run depend on; a run is resumed only under an equal one.

    Args:
        val: the images to validate on; None: a part of `data` that is then not trained on.
        trees: files of class trees in place of the data's own, or "wordnet" or "llm"; several make a forest.
        tree_by, llm, llm_model: what a language model sorts the classes by, its endpoint and its name.
        method, options: the loss, and its own options that are not at their defaults.
        norm, eps, alpha, inner_steps: the inner attack; `eps` is the size of the attack in validations as well.
        trainable: which parameters (all, lora[:RANK], ssf, last:N); augment: name of the augmentation.
        limit, val_limit: images used of each set; val_steps: PGD steps of a validation.
        steps ... validate_every: see `robustvlm.training.TrainingConfig`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = "tiny"
    data: str
    val: str | None = None
    classes: str | None = None
    templates: str | None = None
    trees: list[str] = []
    tree_by: list[str] = []
    llm: str | None = None
    llm_model: str | None = None
    method: str = "hierarchical"
    options: dict[str, Any] = {}
    norm: str = "Linf"
    eps: float = 1 / 255
    eps_text: str = "1/255"
    alpha: float | None = None
    inner_steps: int = 3
    trainable: str = "all"
    augment: str = "crop"
    limit: int | None = None
    val_limit: int = 512
    val_steps: int = 10
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 128
    lr: float = 1e-5
    warmup: float = 0.05
    weight_decay: float = 1e-4
    clip: float | None = 1.0
    accumulate: int = 1
    precision: str = "fp32"
    ema: float | None = None
    compile: bool = False
    gradient_checkpointing: bool = False
    seed: int = 0
    validate_every: float = 0.1
    device: str = "cpu"


# A method's own options, given as NAME=VALUE


def parse_options(method: str, texts: Sequence[str]) -> dict[str, Any]:
    """Return the options of a method by name; the values are those of `HierarchicalOptions` or of the method's class.

    Raises UserError for an unknown method or option, or a value of another kind than the default's.

    Example:
        >>> parse_options("hierarchical", ["curvature=0.5", "negatives=false"])
        {'curvature': 0.5, 'negatives': False}
    """
    known = _switches(method)
    found: dict[str, Any] = {}
    for text in texts:
        name, mark, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not mark:
            raise UserError(f"an option is written NAME=VALUE, got '{text}'")
        if name not in known:
            hint = nearest(name, known) if known else "it has none"
            raise UserError(f"the method '{method}' has no option '{name}': {hint}")
        found[name] = _value(name, value, known[name])
    return found


def _switches(method: str) -> dict[str, bool]:
    """Return the options of a method, and of each whether it is on or off rather than a number."""
    kind = find_method(method)
    if method == "hierarchical":
        return {field.name: "bool" in str(field.type) for field in dataclasses.fields(HierarchicalOptions)}
    parameters = list(inspect.signature(kind).parameters.values())[1:]
    return {p.name: isinstance(p.default, bool) for p in parameters}


def _value(name: str, text: str, switch: bool) -> bool | float:
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # thousands of digits, or of brackets
        value = text
    if switch:
        if not isinstance(value, bool):
            raise UserError(f"the option '{name}' is on or off, got '{text}': write {name}=true or {name}=false")
        return value
    try:
        return float(text)
    except ValueError:
        raise UserError(f"the option '{name}' is a number, got '{text}'") from None


# A fine-tuning run that is ready to start or continue, in one process or in several

TREES = "trees.json"
_CALIBRATION = 64
_AHEAD = 4


@dataclass(frozen=True)
class PreparedFinetune:
    """A fine-tuning run that is ready to start.

    Under `torchrun` every process prepares and runs it; each takes its share of every batch, and rank 0 alone holds the
    lock, reports progress and writes the model.
    """

    config: FinetuneConfig
    settings: FinetuneSettings
    training: TrainingConfig
    source: DataSource
    val: DataSource | None
    forest: Forest | None
    vlm: VLM
    folder: RunFolder
    manifest: Manifest

    def run(
        self, observer: TrainingObserver | None = None, *, fresh: bool = False, resume: bool = False
    ) -> TrainingSummary:
        """Train, or go on training, write the model and the report, and return the record; of a finished run, its."""
        ranks = current_ranks()
        with opened_by_all(self.folder, self.manifest, ranks, fresh=fresh, resume=resume) as manifest:
            if not ((self.folder.path / NAME).exists() and self.folder.sealed):
                self._train(ranks, observer, manifest)
            ranks.barrier()
            summary = load_training_run(self.folder.path).summary
            if ranks.leader and not self.folder.report_path.exists():
                write_training_report(self.folder.path)
        return summary

    def _train(self, ranks: Ranks, observer: TrainingObserver | None, manifest: Manifest) -> None:
        base, fingerprint, probe = self.vlm.spec, self.vlm.fingerprint, probe_encoder(self.vlm)
        images, held = self._images()
        batch = next(iter(images.batches([range(min(_CALIBRATION, len(images)))])))
        task = finetune_task(
            self.vlm,
            self.settings,
            class_names=self.source.class_names,
            templates=self.source.templates,
            calibration=batch.pixels.to(self.vlm.device),
            forest=self.forest,
            in_place=True,
        )
        validation = self._validation(task, held)
        history = Trainer(task, images, self.training, validation=validation, ranks=ranks, observer=observer).fit(
            self.folder.path, run=run_identity(manifest)
        )
        if not ranks.leader:
            return
        forget_checksums(self.folder.path)
        trained = sum(p.numel() for p in self.vlm.parameters() if p.requires_grad)
        if self.forest is not None:
            save_forest(self.forest, self.folder.path / TREES)
        method = {"method": self.config.method, **task.method.settings()}
        card = Card("finetune", base=base, base_fingerprint=fingerprint, settings=method, base_probe=probe)
        save_finetuned(self.folder.path, self.vlm, card)
        summary = TrainingSummary(
            kind="finetune",
            method=self.config.method,
            settings=task.method.settings(),
            trained_parameters=trained,
            parameters=sum(p.numel() for p in self.vlm.parameters()),
            ranks=ranks.size,
            best_by=task.best_by,
            steps=history.steps[-1].step,
            history=history,
        )
        write_text(self.folder.path / NAME, summary.model_dump_json(indent=2) + "\n")
        write_checksums(self.folder.path, manifest)
        write_training_report(self.folder.path)

    def _images(self) -> tuple[TrainingImages, LabelledImages]:
        """Return the images to train on and those to validate on."""
        framing = self.vlm.framing
        ids = ids_of(self.source)
        ids = select(ids, self.config.limit) if self.config.limit is not None else ids
        limit = self.config.val_limit
        if self.val is not None:
            held = validation_images(self.val, size=framing, limit=limit)
        else:
            chosen = held_out(self.source, ids, limit)
            if not chosen:
                raise UserError(
                    f"'{self.config.data}' is too small ({len(ids)} images) to hold a part out: pass --val DATA"
                )
            held = validation_images(self.source, size=framing, limit=limit, only=chosen)
            ids = [name for name in ids if name not in chosen]
        images = TrainingImages(
            self.source,
            size=framing,
            seed=self.config.seed,
            how=parse_augmentation(self.config.augment),
            labelled=find_method(self.config.method).labelled,
            ids=ids,
            ahead=_AHEAD if self.vlm.device.type != "cpu" else 0,
        )
        return images, held

    def _validation(self, task: FinetuneTask, held: LabelledImages) -> ZeroShotValidation:
        source = self.val or self.source
        robust = RobustValidation(
            held, self.settings.attack.threat, n_iter=self.config.val_steps, seed=self.config.seed
        )
        return ZeroShotValidation(
            self.vlm, source.class_names, source.templates, robust, texts_change=bool(task.method.also_trained())
        )


# From the settings of a command to a fine-tuning run; every mistake is found before any work begins


def prepare_finetune(
    config: FinetuneConfig,
    *,
    out: Path = Path("runs"),
    name: str | None = None,
    command: str = "",
    checkpoint_every: int = 0,
) -> PreparedFinetune:
    """Check all settings, open the data, load the model and return a run that is ready to start.

    Raises UserError for settings that make no sense, data or a model that cannot be had, or a model that cannot be
    fine-tuned.
    """
    training = training_config(config, checkpoint_every=checkpoint_every)
    settings = finetune_settings(config)
    parse_augmentation(config.augment)
    if name is not None:
        RunFolder(out, name)
    for flag, number, unit in (
        ("--limit", config.limit, "image"),
        ("--val-limit", config.val_limit, "image"),
        ("--val-steps", config.val_steps, "step of PGD"),
    ):
        if number is not None and number < 1:
            raise UserError(f"{flag} must be at least 1 {unit}, got {number}")
    ranks = current_ranks()
    training.part_size(ranks.size)
    device = device_of_rank(resolve_device(config.device), ranks)
    config = config.model_copy(update={"device": str(device)})
    source, val = _open(config, config.data), None if config.val is None else _open(config, config.val)
    forest = _forest_of_all(source, config, ranks)
    require_unseen_validation(val, source, val_limit=config.val_limit, limit=config.limit)
    if config.method == "hierarchical" and forest is None:
        raise UserError(
            f"'{config.data}' has no class tree, which 'hierarchical' needs: pass --tree FILE, or --method tecoa"
        )
    vlm = load_pipeline(config.model, device=device)
    require_trainable(vlm, config.trainable)
    model_facts, data_facts = facts_of(vlm), describe_data(source)
    if val is not None:
        data_facts |= {"val": describe_data(val)}
    method = find_method(config.method)
    if method.loss:
        model_facts |= {"loss": method.loss}
    model_facts |= code_facts([config.method])
    if forest is not None:
        data_facts |= {"trees": [tree.root for tree in forest], "trees fingerprint": _digest(forest)}
    identity = config.model_dump() | {"model facts": model_facts, "data facts": data_facts}
    folder = RunFolder(out, name or default_name("finetune", config.model, config.data, identity))
    manifest = make_manifest(
        kind="finetune",
        name=folder.name,
        command=command,
        config=config,
        model=model_facts,
        data=data_facts,
        probe=probe_of(vlm, source.class_names, source.templates),
    )
    manifest["remarks"] = remarks_of(source, vlm)
    return PreparedFinetune(config, settings, training, source, val, forest, vlm, folder, manifest)


def training_config(config: FinetuneConfig, *, checkpoint_every: int = 0) -> TrainingConfig:
    """Return the engine's settings among those of a run; raise UserError where they are out of range."""
    shared = [field.name for field in fields(TrainingConfig) if field.name in FinetuneConfig.model_fields]
    return TrainingConfig(**{name: getattr(config, name) for name in shared}, checkpoint_every=checkpoint_every)


def finetune_settings(config: FinetuneConfig) -> FinetuneSettings:
    """Return what to fine-tune on which loss; raise UserError for unknown names and numbers out of range."""
    options: dict[str, Any] = dict(config.options)
    if config.method == "hierarchical":
        options = {"options": HierarchicalOptions(**options)}
    attack = InnerAttack(threat=ThreatModel(config.norm, config.eps), steps=config.inner_steps, step_size=config.alpha)
    return FinetuneSettings(
        method=config.method, trainable=config.trainable, attack=attack, options=options, seed=config.seed
    )


def forest_of(source: DataSource, config: FinetuneConfig) -> Forest | None:
    """Return the trees that the settings name, those of the data if they name none."""
    if not config.trees:
        return source.tree
    return Forest(tuple(tree for name in config.trees for tree in _trees(name, source.class_names, config)))


def _forest_of_all(source: DataSource, config: FinetuneConfig, ranks: Ranks) -> Forest | None:
    """Return the trees, those made by rank 0 on every rank: a language model may answer each rank differently."""
    if ranks.size == 1 or not any(name in MAKERS for name in config.trees):
        return forest_of(source, config)
    made = forest_of(source, config) if ranks.leader else None
    text = ranks.share(json.dumps([tree.paths for tree in made]) if made is not None else None)
    return Forest(tuple(Tree(tuple(map(tuple, paths))) for paths in json.loads(text)))


def _trees(name: str, class_names: Sequence[str], config: FinetuneConfig) -> Forest:
    if name not in MAKERS or Path(name).exists():
        return load_forest(Path(name), class_names)
    client = None
    if config.llm is not None or config.llm_model is not None:
        client = LlmClient(Endpoint(config.llm or "", config.llm_model or ""))
    return make_forest(name, class_names, client=client, criteria=config.tree_by or (BY_KIND,))


def _open(config: FinetuneConfig, spec: str) -> DataSource:
    classes, templates = (None if text is None else Path(text) for text in (config.classes, config.templates))
    return open_data(spec, classes=classes, templates=templates)


def _digest(forest: Forest) -> str:
    paths = json.dumps([tree.paths for tree in forest], ensure_ascii=False)
    return hashlib.blake2b(paths.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
