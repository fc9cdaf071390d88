"""The home of `robustvlm certify`: from its options to a run that is ready; every mistake is found before any work."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from robustvlm.certify.claims import JOINT, Materials, find_claim, require_possible
from robustvlm.certify.threats import PLAIN, find_threat
from robustvlm.commands.certify import CertifySettings, setup
from robustvlm.commands.certify.config import CertifyConfig, describe_trail
from robustvlm.commands.certify.encoder import NoisyEncoder, behind, rounding_error
from robustvlm.commands.certify.gallery import entries_of, names_of, open_gallery
from robustvlm.commands.certify.materials import (
    embed_classes,
    list_of_names,
    materials_of,
    own_vectors,
    rule_of,
    vectors_of_classes,
    wordings_of,
)
from robustvlm.commands.certify.pictures import save_extremes
from robustvlm.commands.certify.prompts import PROMPTS, Candidates, why_valid
from robustvlm.commands.certify.record import load_certify_run
from robustvlm.commands.certify.run import CertifyWork, ReplayRun, SamplingRun
from robustvlm.commands.certify.store import CertifyLedger, Recorder
from robustvlm.commands.certify.summary import parse_certify_condition
from robustvlm.commands.certify.view import certify_report as report_of
from robustvlm.commands.certify.view import show, write_certify_report
from robustvlm.commands.common.inputs import Images, describe_data, facts_of, probe_of, remarks_of
from robustvlm.commands.common.questions import copies_not_told
from robustvlm.core.framing import trial_pixels
from robustvlm.core.probe import change_of
from robustvlm.core.ranks import Ranks, current_ranks, device_of_rank, resolve_device
from robustvlm.core.user_code import named_by
from robustvlm.data import open_data
from robustvlm.data.classes import read_templates
from robustvlm.data.splits import group_of_run
from robustvlm.defenses import SmoothedVLM, load_pipeline
from robustvlm.defenses.answering import AnswerVLM, NamingVLM
from robustvlm.errors import BadSetting, UserError, setting
from robustvlm.models import VLM
from robustvlm.runs.folder import RunFolder
from robustvlm.runs.manifest import Manifest
from robustvlm.runs.records import Check, find_run
from robustvlm.runs.run import Facts
from robustvlm.runs.settings import Observer
from robustvlm.stats import worth_of
from robustvlm.text import places_of

# From the features that another run kept


@dataclass(frozen=True)
class Source:
    """A finished run with kept features."""

    folder: RunFolder
    manifest: Manifest
    config: CertifyConfig
    rows: list[dict[str, Any]]
    worth: float | None
    checks: list[Check]

    @property
    def identity(self) -> str:
        """What tells this run's samples from any other's."""
        return f"{self.manifest['name']} {self.manifest['created']} {self.manifest['model']['fingerprint']}"


def open_source(run: str, *, root: Path) -> Source:
    """Return the run whose features are to be judged; UserError when it is none, unfinished, or kept none."""
    path = find_run(run, root=root)
    folder = RunFolder(path.parent, path.name)
    manifest = folder.manifest()
    if manifest is None or manifest["kind"] != "certify":
        raise UserError(f"'{path}' is no certify run: pass one that was made with {setting('cache')}")
    config = CertifyConfig(**manifest["config"])
    if config.cache is None:
        raise UserError(f"the run '{path}' kept no features: make it with {setting('cache', 'float16')}")
    if not folder.finished:
        raise UserError(f"the run '{path}' has not ended: give its command again to go on")
    finished = load_certify_run(path)
    return Source(folder, manifest, config, finished.rows.to_pylist(), finished.summary.worth, finished.summary.checks)


def open_replay(settings: CertifySettings) -> CertifyWork:
    """Check all settings, and load the model for its text encoder; no image is opened.

    Model, data, noise, samples and seed are those of the run `from_cache`, whose kept features are judged. `prompts` is
    "adaptive" (default): valid whatever the prompts were chosen by; or "independent": the user vouches that they were
    fixed without looking at what the features gave.

    Raises:
        UserError: settings that do not go with kept features, or under which every image would abstain.
    """
    assert settings.from_cache is not None
    source = open_source(settings.from_cache, root=settings.out)
    settings = with_source(settings, source.manifest["config"])
    setup.check(settings)
    _check(settings, source)
    claim = find_claim(setup.claim_of(settings))
    chosen = (settings.prompts or "adaptive") if claim.any_prompts else None
    candidates = None if settings.candidates is None else Candidates(list_of_names(settings.candidates))
    if candidates is not None:
        chosen = "candidates"
    assert source.config.cache is not None
    device = str(device_of_rank(resolve_device(settings.device), current_ranks()))
    data = source.manifest["data"]
    names = tuple(data["class_names"]) if settings.classes is None else list_of_names(settings.classes)
    if candidates is not None:
        candidates.require(names)
    templates = tuple(data["templates"]) if settings.templates is None else read_templates(settings.templates)
    with named_by(f"the manifest of '{source.folder.path}'"):
        vlm = behind(load_pipeline(settings.model, device=device), source.config.against)
    require_same_model(source, vlm)
    config = setup.make_config(settings, noise=source.config.against, device=device).model_copy(
        update={
            "resolution": source.config.resolution,
            "n_pilot": source.config.n_pilot,
            "source": source.identity,
            "prompts": chosen,
            "n_candidates": None if candidates is None else len(candidates.names),
            "candidate_list": None if candidates is None else candidates.digest,
            "noise": source.config.noise,
            "deployed": setup.settle_deployed(settings, vlm),
        }
    )
    config = config.model_copy(update={"abstains_at": setup.settle_abstention(config, vlm)})
    _require_own_vectors(settings, config, tuple(data["class_names"]))
    setup.certified_model(vlm, config, names)  # which refuses what nothing kept can show
    rule = rule_of(config, names)
    if settings.classes is None and settings.templates is None:
        text = vectors_of_classes(config, vlm, names, templates)
    else:
        text = embed_classes(vlm, names, templates, needed=claim.needs_classes)
    dim = NoisyEncoder(vlm, precision=config.precision)(trial_pixels(1, vlm.image_size, device=vlm.device)).shape[1]
    rounding = rounding_error(source.config.cache, dim)
    with named_by(f"the manifest of '{source.folder.path}'"):
        clean_kept = find_claim(source.config.claim).needs_clean
    materials = materials_of(config, vlm, text, templates, rule=rule, rounding=rounding, baselines=clean_kept)
    plan = setup.plan_of(config, materials)
    best = require_possible(plan, config)
    probe = probe_of(vlm, names, templates)
    model_facts = facts_of(vlm, "interpolation") | setup.describe_head(config, names)
    encoder = NoisyEncoder(vlm, precision=config.precision).fingerprint
    recorder = Recorder(config, plan, encoder, text, names, rule, setup.prompts_of(config, model_facts, templates))
    described = setup.describe_plan(plan, config, best)
    described["notes"] += _unnamed(data["class_names"], names)
    if candidates is not None:
        described["notes"].append(candidates.note)
    elif chosen is not None:
        described["notes"].append(why_valid(chosen))

    def begin(ledger: CertifyLedger, observer: Observer, ranks: Ranks) -> ReplayRun:
        return ReplayRun(
            recorder=recorder,
            rows=source.rows,
            features=source.folder.features_path,
            source=source.manifest,
            labels=relabel(source.rows, data["class_names"], names),
            best_radius=best,
            ledger=ledger,
            observer=observer,
            ranks=ranks,
        )

    def more(folder: RunFolder, manifest: Manifest) -> dict[str, Any]:
        return {"plan": described, "trail": describe_trail(folder, manifest, judged=source.manifest)}

    facts = Facts(
        (settings.model, "kept"),
        config.stored(),
        model_facts,
        {**_without_gallery(data), "class_names": list(names), "templates": list(templates)},
        probe=probe,
        more=more,
    )
    return CertifyWork(facts, config, begin, *_groups_of(source))


def _groups_of(source: Source) -> tuple[Callable[[str], str] | None, list[Check]]:
    """Return what images are copies of, by their ids; None, and what is to be said of it, where these do not tell."""
    group = group_of_run(source.manifest)
    told = [check for check in source.checks if check.name == "copies"]
    if source.worth is not None and source.worth < worth_of(group(row["image_id"]) for row in source.rows):
        return None, [copies_not_told(source.worth)]
    return (None, told) if told and group is str else (group, [])


def _without_gallery(data: dict[str, Any]) -> dict[str, Any]:
    """Return the data of a run without the images that it searched: certificates from kept features name classes."""
    return {key: value for key, value in data.items() if key != "gallery"}


def _require_own_vectors(settings: CertifySettings, config: CertifyConfig, class_names: tuple[str, ...]) -> None:
    """Refuse other classes for a model that tells them apart by vectors of its own: texts would be another rule."""
    if own_vectors(config, class_names) is None:
        return
    for name in ("classes", "templates", "candidates"):
        if getattr(settings, name) is not None:
            raise UserError(
                f"'{config.model}' tells classes apart by vectors of its own and by no texts: leave out {setting(name)}"
            )


def with_source(settings: CertifySettings, config: dict[str, Any]) -> CertifySettings:
    """Return the settings with those of the run whose kept features are judged.

    Raises:
        UserError: another alpha: an error probability chosen after a look at the samples is none. Another noise, model
            or number of samples, which would have no effect.
    """
    if settings.alpha not in (None, config["alpha"]):
        raise UserError(
            f"the error probability of kept features is that of their run, {config['alpha']}: leave out "
            f"{setting('alpha')}, or sample anew"
        )
    if settings.threat is not None:  # a map is known by what is in it
        settings = settings.model_copy(update={"threat": find_threat(settings.threat).name})
    names = ("alpha", "model", "data", "sigma", "samples", "limit", "seed", "precision")
    theirs = {name: config[name] for name in names} | {"threat": config.get("threat")}
    usual = type(settings)()
    for name, value in (theirs | {"threat": theirs["threat"] or PLAIN}).items():
        given = getattr(settings, name)
        if given not in (getattr(usual, name), value):
            raise UserError(
                f"{setting(name, given)} is not what the kept features were made with, {value}: leave it out, or "
                "sample anew"
            )
    return settings.model_copy(update=theirs)


def require_same_model(source: Source, vlm: VLM) -> None:
    """Refuse another model than the one whose features were kept, by its digest and by what it answers.

    Raises:
        UserError: what differs.
    """
    before = source.manifest["model"]
    now = facts_of(vlm, "interpolation")
    other = [f"{key} {before.get(key)} -> {value}" for key, value in now.items() if before.get(key) != value]
    data, probe = source.manifest["data"], source.manifest.get("probe")
    if not other and probe is not None:
        answers = change_of(probe, probe_of(vlm, data["class_names"], data["templates"]))
        other = [] if answers is None else [answers]
    if other:
        raise UserError(
            f"the model '{vlm.spec}' is no longer the one of the run '{source.folder.path}': {'; '.join(other)}"
        )


def relabel(rows: list[dict[str, Any]], old: list[str], new: tuple[str, ...]) -> dict[int, int]:
    """Return the images' classes in a new list of class names, by image index; -1 where their class is not in it.

    Example:
        >>> relabel([{"index": 0, "label": 1}, {"index": 1, "label": 0}], ["cat", "dog"], ("wolf", "Dog"))
        {0: 1, 1: -1}
    """
    places = [-1 if place is None else place for place in places_of(old, new)]
    found = [-1 if row["label"] < 0 else places[row["label"]] for row in rows]
    return {row["index"]: label for row, label in zip(rows, found, strict=True)}


def _unnamed(old: list[str], new: tuple[str, ...]) -> list[str]:
    """Say which classes of the kept images the new list does not have: their images count as unknown."""
    lost = [name for name, place in zip(old, places_of(old, new), strict=True) if place is None]
    if not lost:
        return []
    shown = ", ".join(f"'{name}'" for name in lost[:6]) + (", ..." if len(lost) > 6 else "")
    return [f"{len(lost)} of {len(old)} classes of the kept images are not in the new list, so unknown: {shown}"]


def _check(settings: CertifySettings, source: Source) -> None:
    prompts, name = settings.prompts, setup.claim_of(settings)
    if prompts is not None and prompts not in PROMPTS:
        raise BadSetting("prompts", "is adaptive or independent", got=f"'{prompts}'")
    if settings.radius is not None:
        raise UserError(
            f"kept features are all there already, stopping early saves nothing: leave out {setting('radius')}"
        )
    if settings.candidates is not None and (prompts is not None or settings.templates is not None or name != "class"):
        raise UserError(
            f"{setting('candidates')} is for {setting('claim', 'class')} with the templates of the run: leave out "
            f"{setting('prompts')} and {setting('templates')}"
        )
    if settings.cache is not None:
        raise UserError(f"the features are kept already: leave out {setting('cache')}")
    if settings.gallery is not None:
        raise UserError(f"a gallery of images is fixed before the noise is drawn: leave out {setting('gallery')}")
    claim = find_claim(name)
    if claim.head == "votes":
        raise UserError(
            f"the copies of a model vote by its whole head, and kept features are those of its encoder: for "
            f"{setting('claim', name)} leave out {setting('from_cache')}"
        )
    if source.config.cache == "float16" and not claim.bounds_rounding:
        raise UserError(
            f"the run '{source.folder.path}' kept float16 features, whose rounding is accounted for in class claims "
            f"only: for {setting('claim', name)} make it with {setting('cache', 'float32')}"
        )
    # What joint tests depends on its cosine, which is as free as prompts are; feature and tokens hold for all at once.
    chosen = claim is JOINT or (claim.needs_classes and not claim.any_prompts)
    if chosen and prompts != "independent":
        raise UserError(
            f"a certificate of {setting('claim', name)} from kept features is valid only for prompts and settings that "
            f"were fixed without looking at what the features gave: pass {setting('prompts', 'independent')} if they "
            "were, else sample anew"
        )


# From new samples

RESULTS = ("summary.json", "results.parquet")

read_run, write_report, parse_condition = load_certify_run, write_certify_report, parse_certify_condition
__all__ = ["RESULTS", "open_work", "parse_condition", "read_run", "report_of", "show", "write_report"]


def open_work(settings: CertifySettings) -> CertifyWork:
    """Check all settings and return a run that is ready: of new samples, or of the features that another run kept."""
    if settings.audit is not None:
        raise UserError(f"{setting('audit')} is for the command line: from Python call audit_folder (docs/certify.md)")
    if settings.from_cache is not None:
        return open_replay(settings)
    if settings.prompts is not None or settings.candidates is not None:
        given = "prompts" if settings.prompts is not None else "candidates"
        raise UserError(
            f"{setting(given)} is for {setting('from_cache')}: a run that samples draws noise of its own for its "
            "prompts, fixed before it"
        )
    return open_sampling(settings)


def _whole(vlm: VLM) -> list[str]:
    """Say what is certified of a model that answers in words, which is another one than averages image tokens."""
    inner = vlm.base if isinstance(vlm, SmoothedVLM) else vlm
    if not isinstance(inner, AnswerVLM):
        return []
    one, which = (
        ("Naming(load_model(MODEL), class_names)", "class that most answers name")
        if isinstance(inner, NamingVLM)
        else ("rv.load_classifier(MODEL)", "most frequent answer")
    )
    return [
        f"The noise stands before the whole model, which answers each noisy copy; certified is the {which}, and not "
        f"what MODEL+smooth says, which averages image tokens and answers once. From Python: rv.Smoothed({one}, sigma)."
    ]


def open_sampling(settings: CertifySettings) -> CertifyWork:
    """Check all settings, open the data and load the model.

    Settings under which every image would have to abstain are refused, with what would do.
    """
    setup.check(settings)
    noise = setup.settle_noise(settings)
    device = str(device_of_rank(resolve_device(settings.device), current_ranks()))
    config = setup.make_config(settings, noise=noise, device=device)
    if find_claim(config.claim).known_best:
        require_possible(setup.plan_of(config, Materials(text=np.eye(2))), config)
    source = open_data(settings.data, classes=settings.classes, templates=settings.templates, tree=settings.tree)
    vlm = behind(load_pipeline(settings.model, device=device), noise)
    vlm = setup.certified_model(vlm, config, source.class_names)
    if ("+smooth" in settings.model or config.dual is not None) and not isinstance(vlm, SmoothedVLM):
        raise UserError(f"'{settings.model}': smoothing must be the last operator to be certified")
    settled = {"deployed": setup.settle_deployed(settings, vlm), "abstains_at": setup.settle_abstention(config, vlm)}
    config = config.model_copy(update={"resolution": vlm.image_size, **settled})
    rule = rule_of(config, source.class_names)
    gallery = open_gallery(config, vlm, source)
    text = vectors_of_classes(config, vlm, source.class_names, source.templates)
    wordings = wordings_of(config, vlm, text, source.class_names, source.templates)
    materials = materials_of(config, vlm, text, source.templates, rule=rule, gallery=gallery, wordings=wordings)
    plan = setup.plan_of(config, materials)
    best = require_possible(plan, config)
    probe = probe_of(vlm, source.class_names, source.templates)
    encoder = NoisyEncoder(vlm, precision=config.precision)
    model_facts = facts_of(encoder.vlm, "interpolation") | setup.describe_head(config, source.class_names, gallery)
    config = config.model_copy(
        update={"noise": setup.noise_of(config, model_facts, source.class_names, source.templates)}
    )
    prompts = setup.prompts_of(config, model_facts, source.templates)
    entries = names_of(gallery, source.class_names)
    recorder = Recorder(config, plan, encoder.fingerprint, text, entries, rule, prompts, entries_of(gallery))

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
    described["notes"] += [*remarks, *_whole(vlm), *([] if gallery is None else gallery.words)]

    def more(folder: RunFolder, manifest: Manifest) -> dict[str, Any]:
        return {"plan": described, "trail": describe_trail(folder, manifest)}

    facts = Facts(
        (settings.model, settings.data),
        config.stored(),
        model_facts,
        describe_data(source) | ({} if gallery is None else gallery.facts),
        probe=probe,
        remarks=remarks,
        more=more,
    )
    illustrate = partial(save_extremes, source=source, framing=vlm.framing, noise=noise, seed=config.seed)
    return CertifyWork(facts, config, begin, source.group, illustrate=illustrate)
