"""From the settings of the command to a purify run; every mistake is found before any work begins."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from robustvlm.core.ranks import current_ranks
from robustvlm.data import DataSource, open_data
from robustvlm.data.pixels import to_pixels
from robustvlm.data.source import Sample, select
from robustvlm.defenses import load_pipeline
from robustvlm.defenses.purify import load_denoiser
from robustvlm.defenses.purify.train import check_encoder
from robustvlm.errors import UserError
from robustvlm.evaluation.describe import facts_of, probe_of
from robustvlm.evaluation.finetuning.validation import held_out
from robustvlm.evaluation.overlap import require_unseen_validation
from robustvlm.evaluation.purifying.run import PreparedPurify
from robustvlm.evaluation.purifying.settings import stage_settings
from robustvlm.models import VLM
from robustvlm.models.device import device_of_rank, resolve_device
from robustvlm.runs.folder import RunFolder, default_name
from robustvlm.runs.manifest import make_manifest
from robustvlm.runs.purify_config import PurifyConfig
from robustvlm.training import TrainingImages, ids_of, parse_augmentation

_AHEAD = 4


def prepare_purify(
    config: PurifyConfig,
    *,
    out: Path = Path("runs"),
    name: str | None = None,
    command: str = "",
    checkpoint_every: int = 0,
) -> PreparedPurify:
    """Check all settings, open the data, load the model and return a run that is ready to start.

    Example:
        >>> import tempfile
        >>> short = {"limit": 40, "val_limit": 4, "steps": 1, "mapper_steps": 1, "batch_size": 2}
        >>> config = PurifyConfig(model="tiny", data="emoji?split=train", **short)
        >>> prepare_purify(config, out=Path(tempfile.mkdtemp())).run().method
        'purifier and mapper'
    """
    settings = stage_settings(config, checkpoint_every=checkpoint_every)
    if name is not None:
        RunFolder(out, name)
    ranks = current_ranks()
    for stage in settings.trained:
        settings.config(stage).part_size(ranks.size)
    place = device_of_rank(resolve_device(config.device), ranks)
    config = config.model_copy(update={"device": str(place)})
    source = open_data(config.data)
    val = None if config.val is None else open_data(config.val)
    require_unseen_validation(val, source, val_limit=config.val_limit, limit=config.limit)
    encoder = load_pipeline(config.model, device=place)
    check_encoder(encoder, settings)
    images, pixels = _images(config, source, val, encoder)
    model_facts, data_facts = facts_of(encoder, "interpolation"), _describe(source)
    if config.denoiser is not None:
        # Another denoiser of the same name makes another run, or the finished one would be handed back.
        model_facts["denoiser"] = load_denoiser(config.denoiser, encoder.image_size, place).fingerprint
    if val is not None:
        data_facts |= {"val": _describe(val)}
    identity = config.model_dump() | {"model facts": model_facts, "data facts": data_facts}
    folder = RunFolder(out, name or default_name("purify", config.model, config.data, identity))
    manifest = make_manifest(
        kind="purify",
        name=folder.name,
        command=command,
        config=config,
        model=model_facts,
        data=data_facts,
        probe=probe_of(encoder),
    )
    manifest["remarks"] = source.remarks
    return PreparedPurify(config, settings, folder, manifest, encoder, images, pixels)


def _images(
    config: PurifyConfig, source: DataSource, val: DataSource | None, encoder: VLM
) -> tuple[TrainingImages, Tensor]:
    """Return the images to train on, and pixels [N, 3, S, S] of those to watch the score on; labels play no part."""
    ids = ids_of(source)
    ids = select(ids, config.limit) if config.limit is not None else ids
    chosen: set[str] = set()
    if val is None:
        chosen = held_out(source, ids, config.val_limit)
        if not chosen:
            raise UserError(f"'{config.data}' is too small ({len(ids)} images) to hold a part out: pass --val DATA")
    images = TrainingImages(
        source,
        size=encoder.framing,
        seed=config.seed,
        how=parse_augmentation(config.augment),
        labelled=False,
        ids=[name for name in ids if name not in chosen],
        ahead=0 if encoder.device.type == "cpu" else _AHEAD,
    )
    items = source.samples(keep=chosen.__contains__) if val is None else val.samples(limit=config.val_limit)
    pixels = [to_pixels(item.image, encoder.framing) for item in items if isinstance(item, Sample)]
    if not pixels:
        raise UserError(f"'{config.val or config.data}' holds no readable image to watch the score on")
    return images, torch.stack(pixels)


def _describe(source: DataSource) -> dict[str, object]:
    """Return the facts that identify the images; classes play no part."""
    ids = source.ids()
    return {"spec": source.spec, "fingerprint": source.fingerprint(), "images": None if ids is None else len(ids)}
