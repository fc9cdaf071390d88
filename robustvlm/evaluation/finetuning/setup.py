"""From the settings of a command to a fine-tuning run; every mistake is found before any work begins."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from robustvlm.attacks import ThreatModel
from robustvlm.core.ranks import Ranks, current_ranks
from robustvlm.data import DataSource, open_data
from robustvlm.data.llm_tree import BY_KIND
from robustvlm.data.made_trees import MAKERS, make_forest
from robustvlm.data.taxonomy import Forest, Tree
from robustvlm.data.tree_files import load_forest
from robustvlm.defenses import load_pipeline
from robustvlm.defenses.finetune import FinetuneSettings, HierarchicalOptions, InnerAttack, find_method
from robustvlm.defenses.finetune.trainable import require_trainable
from robustvlm.errors import UserError
from robustvlm.evaluation.describe import code_facts, describe_data, facts_of, probe_of, remarks_of
from robustvlm.evaluation.finetuning.prepared import PreparedFinetune
from robustvlm.evaluation.overlap import require_unseen_validation
from robustvlm.llm import Endpoint, LlmClient
from robustvlm.models.device import device_of_rank, resolve_device
from robustvlm.runs.finetune_config import FinetuneConfig
from robustvlm.runs.folder import RunFolder, default_name
from robustvlm.runs.manifest import make_manifest
from robustvlm.training import TrainingConfig, parse_augmentation


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
