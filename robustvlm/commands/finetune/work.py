"""The work of `robustvlm finetune`: from settings to a run folder that is a model."""

import hashlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from robustvlm import training as learning
from robustvlm.attacks import ThreatModel, parse_norm
from robustvlm.attacks.threat import one_radius, radius_or_default
from robustvlm.commands.common.inputs import code_facts, describe_data, facts_of, probe_of, remarks_of
from robustvlm.commands.common.lessons import remarks_on
from robustvlm.commands.finetune import FinetuneSettings
from robustvlm.core.files import write_text
from robustvlm.core.ranks import Ranks, current_ranks, device_of_rank, resolve_device
from robustvlm.data import DataSource, open_data
from robustvlm.data.make_trees import BY_KIND, MAKERS, make_forest
from robustvlm.data.source import select
from robustvlm.data.splits import require_unseen_validation
from robustvlm.data.trees import Forest, Tree, load_forest, save_forest
from robustvlm.defenses import finetune as methods
from robustvlm.defenses import load_pipeline
from robustvlm.defenses.finetune import FinetuneSettings as Tuning
from robustvlm.defenses.finetune.saved import save_finetuned
from robustvlm.defenses.finetune.task import require_teachable
from robustvlm.defenses.finetune.trainable import require_trainable
from robustvlm.defenses.library import require_texts
from robustvlm.errors import UserError, nearest, setting
from robustvlm.llm import Endpoint, LlmClient
from robustvlm.models import VLM
from robustvlm.models.probe import probe_encoder
from robustvlm.models.saved import Card
from robustvlm.report import screen
from robustvlm.report import training as report
from robustvlm.report.training import told
from robustvlm.runs.manifest import run_identity
from robustvlm.runs.run import Facts, FinishedRun, Session
from robustvlm.training.history import Warned
from robustvlm.training.validation import FeatureValidation, ZeroShotValidation, some_held_out, validation_images

# What a fine-tuning run does, in one process or in several

TREES = "trees.json"
RESULTS = (report.NAME,)
_UNJUDGED = (
    "no image to validate on has one of several known classes: nothing chooses among the weights, and those of the "
    "last step are kept"
)
_CALIBRATION = 64
_AHEAD = 4

read_run, report_of, write_report = report.load_training_run, report.training_report, report.write_training_report


@dataclass(frozen=True)
class FinetuneWork:
    """A run's facts, model, images and trees. Each process under `torchrun` takes its share of every batch.

    Args:
        tuning: what is trained on which loss; training: for how long and in which steps.
        val: the images to validate on; None: a part of the source's, which is then not trained on.
    """

    facts: Facts
    settings: FinetuneSettings
    tuning: Tuning
    training: learning.TrainingConfig
    source: DataSource
    val: DataSource | None
    forest: Forest | None
    vlm: VLM
    teacher: VLM | None = None

    def run(self, session: Session) -> None:
        """Train, or go on training, and write the model and its record."""
        base, fingerprint, probe = self.vlm.spec, self.vlm.fingerprint, probe_encoder(self.vlm)
        images, held = self.images()
        batch = next(iter(images.batches([range(min(_CALIBRATION, len(images)))])))
        task = methods.finetune_task(
            self.vlm,
            self.tuning,
            class_names=self.source.class_names,
            templates=self.source.templates,
            calibration=batch.pixels.to(self.vlm.device),
            forest=self.forest,
            in_place=True,
            teacher=self.teacher,
        )
        validation, ranks = self._validation(task, held), session.ranks
        unjudged = isinstance(validation, FeatureValidation)
        if unjudged:
            task.best_by = None
            session.observer.warn(_UNJUDGED)
        trainer = learning.Trainer(
            task, images, self.training, validation=validation, ranks=ranks, observer=told(session.observer)
        )
        history = trainer.fit(session.path, run=run_identity(session.manifest))
        if not ranks.leader:
            return
        if unjudged:
            history.warnings.append(Warned(step=0, name="no labels", message=_UNJUDGED))
        trained = sum(p.numel() for p in self.vlm.parameters() if p.requires_grad)
        method = {"method": self.settings.method, **task.method.settings()}
        summary = report.TrainingSummary(
            kind="finetune",
            method=self.settings.method,
            settings=task.method.settings(),
            trained_parameters=trained,
            parameters=sum(p.numel() for p in self.vlm.parameters()),
            ranks=ranks.size,
            best_by=task.best_by,
            worth=held.worth,
            steps=history.steps[-1].step,
            history=history,
        )
        with session.results() as folder:
            if self.forest is not None:
                save_forest(self.forest, folder / TREES)
            card = Card("finetune", base=base, base_fingerprint=fingerprint, settings=method, base_probe=probe)
            save_finetuned(folder, self.vlm, card)
            write_text(folder / report.NAME, summary.model_dump_json(indent=2) + "\n")

    def images(self) -> tuple[learning.TrainingImages, learning.LabelledImages]:
        """Return the images to train on and those to validate on."""
        framing = self.vlm.framing
        ids = learning.ids_of(self.source)
        ids = select(ids, self.settings.limit) if self.settings.limit is not None else ids
        limit, labelled = self.settings.val_limit, methods.find_method(self.settings.method).labelled
        if self.val is not None:
            held = validation_images(self.val, size=framing, limit=limit, labelled=labelled)
        else:
            chosen = some_held_out(self.source, ids, limit, data=self.settings.data)
            held = validation_images(self.source, size=framing, limit=limit, only=chosen, labelled=labelled)
            ids = [name for name in ids if name not in chosen]
        images = learning.TrainingImages(
            self.source,
            size=framing,
            seed=self.settings.seed,
            how=learning.parse_augmentation(self.settings.augment),
            labelled=labelled,
            ids=ids,
            ahead=_AHEAD if self.vlm.device.type != "cpu" else 0,
        )
        return images, held

    def _validation(
        self, task: methods.FinetuneTask, held: learning.LabelledImages
    ) -> ZeroShotValidation | FeatureValidation:
        """Return what measures the weights; of images without classes, or of one, no accuracy says which are better."""
        source = self.val or self.source
        if not task.labelled and (not held.known or len(source.class_names) < 2):
            return FeatureValidation(self.vlm, held)
        robust = learning.RobustValidation(
            held, self.tuning.attack.threat, n_iter=self.settings.val_steps, seed=self.settings.seed
        )
        trained = bool(task.method.also_trained())
        return ZeroShotValidation(
            self.vlm, source.class_names, source.templates, robust, texts_change=trained, in_training=trained
        )


# From the settings of a command to a fine-tuning run; every mistake is found before any work begins


def open_work(settings: FinetuneSettings) -> FinetuneWork:
    """Check all settings, open the data and load the model."""
    norm = parse_norm(settings.norm)
    text, radius = radius_or_default(settings.eps, norm, linf="1/255")
    alpha = None if settings.alpha is None else one_radius(settings.alpha, "alpha")[1]
    curvature = [] if settings.curvature is None else [f"curvature={settings.curvature}"]
    options = parse_options(settings.method, [*curvature, *settings.option])
    training, ranks = training_of(settings), current_ranks()
    attack = methods.InnerAttack(threat=ThreatModel(norm, radius), steps=settings.inner_steps, step_size=alpha)
    tuning = Tuning(
        method=settings.method,
        trainable=settings.trainable,
        attack=attack,
        options={"options": methods.HierarchicalOptions(**options)} if settings.method == "hierarchical" else options,
        seed=settings.seed,
    )
    require_teachable(settings.method, settings.teacher is not None)
    if not methods.find_method(settings.method).attacked:
        unused = f"is of the inner attack, and '{settings.method}' makes none: leave it out"
        settings.require_usual(("inner_steps", "alpha"), unused)
    learning.parse_augmentation(settings.augment)
    training.part_size(ranks.size)
    device = device_of_rank(resolve_device(settings.device), ranks)
    source, val = _open(settings, settings.data), None if settings.val is None else _open(settings, settings.val)
    forest = _forest_of_all(source, settings, ranks)
    require_unseen_validation(val, source, val_limit=settings.val_limit, limit=settings.limit)
    if settings.method == "hierarchical" and forest is None:
        raise UserError(
            f"'{settings.data}' has no class tree, which 'hierarchical' needs: pass {setting('tree', 'FILE')}, or "
            f"{setting('method', 'tecoa')}"
        )
    vlm = load_pipeline(settings.model, device=device)
    require_texts(vlm, "fine-tuning")
    require_trainable(vlm, settings.trainable)
    teacher = None if settings.teacher is None else load_pipeline(settings.teacher, device=device)
    model, data = facts_of(vlm), describe_data(source)
    if val is not None:
        data |= {"val": describe_data(val)}
    method = methods.find_method(settings.method)
    if method.loss:
        model |= {"loss": method.loss}
    if teacher is not None:
        require_texts(teacher, "teaching")
        model |= {"teacher": teacher.fingerprint}
    if forest is not None:
        data |= {"trees": [tree.root for tree in forest], "trees fingerprint": _digest(forest)}
    facts = Facts(
        (settings.model, settings.data),
        settings.stored(options=options, norm=norm, eps=radius, eps_text=text, alpha=alpha, device=str(device)),
        model | code_facts([settings.method]),
        data,
        probe=probe_of(vlm, source.class_names, source.templates),
        remarks=[*remarks_of(source, vlm), *remarks_on(settings.model, val, settings.val_limit)],
        more={} if method.attacked else {"attacked": False},
    )
    return FinetuneWork(facts, settings, tuning, training, source, val, forest, vlm, teacher)


def show(run: FinishedRun[report.TrainingSummary], console: Console) -> None:
    """Print the measures before and after, what came of the training, and where the model is."""
    screen.show(console, report.training_report(run), report.training_closing(run))


def training_of(settings: FinetuneSettings) -> learning.TrainingConfig:
    """Return the engine's settings among those of a run; UserError where they are out of range."""
    shared = {field.name for field in fields(learning.TrainingConfig)} & FinetuneSettings.model_fields.keys()
    found = {name: getattr(settings, name) for name in shared}
    return learning.TrainingConfig(**(found | {"epochs": settings.passes, "lr": settings.rate}))


def forest_of(source: DataSource, settings: FinetuneSettings) -> Forest | None:
    """Return the trees that the settings name, those of the data if they name none."""
    if not settings.tree:
        return source.tree
    return Forest(tuple(tree for name in settings.tree for tree in _trees(name, source.class_names, settings)))


def _forest_of_all(source: DataSource, settings: FinetuneSettings, ranks: Ranks) -> Forest | None:
    """Return the trees, those made by rank 0 on every rank: a language model may answer each rank differently."""
    if ranks.size == 1 or not any(name in MAKERS for name in settings.tree):
        return forest_of(source, settings)
    made = forest_of(source, settings) if ranks.leader else None
    text = ranks.share(json.dumps([tree.paths for tree in made]) if made is not None else None)
    return Forest(tuple(Tree(tuple(map(tuple, paths))) for paths in json.loads(text)))


def _trees(name: str, class_names: Sequence[str], settings: FinetuneSettings) -> Forest:
    if name not in MAKERS or Path(name).exists():
        return load_forest(Path(name), class_names)
    client = None
    if settings.llm is not None or settings.llm_model is not None:
        client = LlmClient(Endpoint(settings.llm or "", settings.llm_model or ""))
    return make_forest(name, class_names, client=client, criteria=settings.tree_by or (BY_KIND,))


def _open(settings: FinetuneSettings, spec: str) -> DataSource:
    classes, templates = (None if text is None else Path(text) for text in (settings.classes, settings.templates))
    return open_data(spec, classes=classes, templates=templates)


def _digest(forest: Forest) -> str:
    paths = json.dumps([tree.paths for tree in forest], ensure_ascii=False)
    return hashlib.blake2b(paths.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


# A method's own options, given as NAME=VALUE


def parse_options(method: str, texts: Sequence[str]) -> dict[str, Any]:
    """Return the options of a method by name; the values are those of `HierarchicalOptions` or of the method's class.

    Raises:
        UserError: an unknown method or option, or a value of another kind than the default's.

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
    kind = methods.find_method(method)
    if method == "hierarchical":
        return {field.name: "bool" in str(field.type) for field in fields(methods.HierarchicalOptions)}
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
