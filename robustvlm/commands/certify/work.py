"""The home of `robustvlm certify`: from its options to a run that is ready; every mistake is found before any work."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from robustvlm.certify.claims import Materials, find_claim, make_plan, require_possible
from robustvlm.commands.certify import CertifySettings, setup
from robustvlm.commands.certify.config import describe_trail
from robustvlm.commands.certify.encoder import NoisyEncoder
from robustvlm.commands.certify.pictures import save_extremes
from robustvlm.commands.certify.record import load_certify_run
from robustvlm.commands.certify.replay import open_replay
from robustvlm.commands.certify.run import CertifyWork, SamplingRun
from robustvlm.commands.certify.store import CertifyLedger, Recorder
from robustvlm.commands.certify.summary import parse_certify_condition
from robustvlm.commands.certify.view import show, write_certify_report
from robustvlm.commands.common.inputs import Images, describe_data, facts_of, probe_of, remarks_of
from robustvlm.core.device import resolve_device
from robustvlm.core.ranks import Ranks
from robustvlm.data import open_data
from robustvlm.defenses import SmoothedVLM, load_pipeline
from robustvlm.errors import UserError, setting
from robustvlm.runs.folder import RunFolder
from robustvlm.runs.manifest import Manifest
from robustvlm.runs.run import Facts
from robustvlm.runs.settings import Observer

RESULTS = ("summary.json", "results.parquet")

read_run, write_report, parse_condition = load_certify_run, write_certify_report, parse_certify_condition
__all__ = ["RESULTS", "open_work", "parse_condition", "read_run", "show", "write_report"]


def open_work(settings: CertifySettings) -> CertifyWork:
    """Check all settings and return a run that is ready: of new samples, or of the features that another run kept."""
    if settings.audit is not None:
        raise UserError(f"{setting('audit')} is for the command line: from Python call audit_folder (docs/certify.md)")
    if settings.from_cache is not None:
        return open_replay(settings)
    if settings.prompts is not None:
        raise UserError(
            f"{setting('prompts')} is for {setting('from_cache')}: a run that samples draws noise of its own for its "
            "prompts, fixed before it"
        )
    return open_sampling(settings)


def open_sampling(settings: CertifySettings) -> CertifyWork:
    """Check all settings, open the data and load the model.

    Settings under which every image would have to abstain are refused, with what would do.
    """
    setup.check(settings)
    sigma = setup.settle_sigma(settings)
    device = str(resolve_device(settings.device))
    config = setup.make_config(settings, sigma=sigma, device=device)
    if find_claim(config.claim).known_best:
        require_possible(make_plan(config.claim, config, Materials(text=np.eye(2))), config)
    source = open_data(settings.data, classes=settings.classes, templates=settings.templates, tree=settings.tree)
    vlm = load_pipeline(settings.model, device=device).at_noise(sigma)
    if "+smooth" in settings.model and not isinstance(vlm, SmoothedVLM):
        raise UserError(f"'{settings.model}': smoothing must be the last operator to be certified")
    config = config.model_copy(update={"resolution": vlm.image_size, "deployed": setup.settle_deployed(settings, vlm)})
    rule = setup.rule_of(config, source.class_names)
    text = setup.vectors_of_classes(config, vlm, source.class_names, source.templates)
    plan = make_plan(config.claim, config, setup.materials_of(config, vlm, text, source.templates, rule=rule))
    best = require_possible(plan, config)
    probe = probe_of(vlm, source.class_names, source.templates)
    encoder = NoisyEncoder(vlm, precision=config.precision)
    model_facts = facts_of(encoder.vlm, "interpolation") | setup.describe_head(config, source.class_names)
    config = config.model_copy(
        update={"noise": setup.noise_of(config, model_facts, source.class_names, source.templates)}
    )
    prompts = setup.prompts_of(config, model_facts, source.templates)
    recorder = Recorder(config, plan, encoder.fingerprint, text, source.class_names, rule, prompts)

    def begin(ledger: CertifyLedger, observer: Observer, ranks: Ranks) -> SamplingRun:
        return SamplingRun(
            recorder=recorder,
            encoder=encoder,
            images=Images(source, limit=config.limit, resolution=vlm.framing),
            best_radius=best,
            ledger=ledger,
            observer=observer,
            ranks=ranks,
        )

    remarks = remarks_of(source, vlm)
    described = setup.describe_plan(plan, config, best)
    described["notes"] += remarks

    def more(folder: RunFolder, manifest: Manifest) -> dict[str, Any]:
        return {"plan": described, "trail": describe_trail(folder, manifest)}

    facts = Facts(
        (settings.model, settings.data),
        config.model_dump(),
        model_facts,
        describe_data(source),
        probe=probe,
        remarks=remarks,
        more=more,
    )
    illustrate = partial(save_extremes, source=source, framing=vlm.framing, sigma=sigma, seed=config.seed)
    return CertifyWork(facts, config, begin, illustrate)
