"""From the words of a command to an immunize run; every mistake is found before any work begins."""

from __future__ import annotations

import math
from pathlib import Path

from robustvlm.core.ranks import current_ranks
from robustvlm.data import DataSource, open_data
from robustvlm.data.unlabelled import open_unlabelled
from robustvlm.defenses import SmoothedVLM, load_pipeline
from robustvlm.defenses.immunity.antibodies import Band, open_source
from robustvlm.defenses.immunity.recipe import KAPPAS
from robustvlm.errors import UserError, nearest
from robustvlm.evaluation.describe import describe_data, probe_of, remarks_of
from robustvlm.evaluation.immunizing.images import open_held_out
from robustvlm.evaluation.immunizing.run import PreparedImmunize, vaccine_settings
from robustvlm.evaluation.immunizing.texts import source_spec
from robustvlm.llm import LlmClient
from robustvlm.models import VLM, resolve_device
from robustvlm.runs.folder import RunFolder, default_name
from robustvlm.runs.immunize_config import ImmunizeConfig
from robustvlm.runs.manifest import make_manifest


def prepare_immunize(
    config: ImmunizeConfig,
    *,
    client: LlmClient | None = None,
    out: Path = Path("runs"),
    name: str | None = None,
    command: str = "",
) -> PreparedImmunize:
    """Check all settings, open the data, load the model and return a run that is ready to start.

    Example:
        >>> import tempfile
        >>> config = ImmunizeConfig(data="emoji?split=train&styles=noto,fxemoji&copies=1", steps=10, min_images=5)
        >>> record = prepare_immunize(config, out=Path(tempfile.mkdtemp())).run()
        >>> len(record["classes"])
        101
    """
    config = config.model_copy(update={"antibodies": source_spec(config.antibodies)})
    check_config(config, client)
    if name is not None:
        RunFolder(out, name)
    place = resolve_device(config.device)
    config = config.model_copy(update={"device": str(place)})
    source = open_data(
        config.data, classes=_path(config.classes), templates=_path(config.templates), tree=_path(config.tree)
    )
    held = open_held_out(config, source) if config.images else None
    unknown = [open_unlabelled(spec, source.class_names) for spec in config.ood]
    vlm = load_pipeline(config.model, device=place)
    require_bare(vlm, config.model)
    model_facts = {"spec": vlm.spec, "fingerprint": vlm.fingerprint, "logit_scale": vlm.logit_scale}
    data_facts = describe_data(source)
    if isinstance(held, DataSource):
        data_facts |= {"held out": held.fingerprint()}
    if unknown:
        data_facts |= {"ood": [other.fingerprint() for other in unknown]}
    identity = config.model_dump() | {"model facts": model_facts, "data facts": data_facts}
    folder = RunFolder(out, name or default_name("immunize", config.model, config.data, identity))
    manifest = make_manifest(
        kind="immunize",
        name=folder.name,
        command=command,
        config=config,
        model=model_facts,
        data=data_facts,
        probe=probe_of(vlm, source.class_names, source.templates),
    )
    manifest["remarks"] = remarks_of(source, vlm)
    return PreparedImmunize(config, folder, manifest, vlm, source, client, unknown)


def require_bare(vlm: VLM, spec: str) -> None:
    """Refuse a smoothed model: an adapter behind the averaging is not inside the expectation."""
    if isinstance(vlm, SmoothedVLM):
        raise UserError(
            f"'{spec}' is smoothed: immunise the model below (--sigma {vlm.sigma:g} sets thresholds for the noise), "
            "and put +smooth behind the result"
        )


def check_config(config: ImmunizeConfig, client: LlmClient | None) -> None:
    """Refuse settings that make no sense on their own.

    Raises:
        UserError: what is wrong, and what to pass.
    """
    if current_ranks().size > 1:
        raise UserError("`robustvlm immunize` works in one process: start it without torchrun")
    if config.antibodies not in ("noise", "none"):
        open_source(config.antibodies, client=client)
    if config.kappa not in KAPPAS:
        raise UserError(f"unknown --kappa '{config.kappa}': {nearest(config.kappa, KAPPAS)}")
    for option, value in (("--prototypes-per-class", config.per_class), ("--min-images", config.min_images)):
        if value < 1:
            raise UserError(f"{option} must be at least 1, got {value}")
    if config.xi is not None and not 0.0 <= config.xi <= 180.0:
        raise UserError(f"--xi is an angle between 0 and 180 degrees, got {config.xi:g}")
    if not 0.0 < config.miss < 0.5:
        raise UserError(f"--miss must lie between 0 and 0.5, got {config.miss:g}: pass for example 0.05")
    if not (config.weight >= 0.0 and math.isfinite(config.weight)):
        raise UserError(f"--lambda-inf must not be negative, got {config.weight:g}")
    for sigma in config.sigmas:
        if not 0.0 < sigma <= 10.0:
            raise UserError(f"--sigma must be above 0 and at most 10, got {sigma:g}: pass 0.25")
    if config.safe is not None and config.risk is not None:
        Band(config.safe, config.risk)
    vaccine_settings(config, config.margin if config.margin is not None else 0.0)
    if not config.images:
        _check_text_only(config)


def _check_text_only(config: ImmunizeConfig) -> None:
    if config.antibodies in ("none", "noise"):
        raise UserError(
            f"without images, antibodies alone tell the unknown, and --antibodies {config.antibodies} has none that "
            "mean anything: pass bank, a file, llm or wordnet"
        )
    if config.sigmas or config.ood or config.shots is not None or config.per_class > 1:
        raise UserError("--sigma, --ood, --shots and --prototypes-per-class need images: leave out --no-images")


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)
