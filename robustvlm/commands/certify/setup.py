"""From the words of a command to a certify run that is ready to start or go on; every mistake is found before work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import save
from torch import Tensor

from robustvlm.certify import OpensetRule, format_exact, settings_digest
from robustvlm.certify.claims import Materials, Plan, find_claim, is_own, make_plan, own_digest, require_possible
from robustvlm.certify.normal import Array
from robustvlm.commands.certify.config import (
    DEFAULT_ALPHA,
    DEFAULT_SIGMA,
    CertifyConfig,
    Settings,
    describe_trail,
    noise_settings,
    record_look,
)
from robustvlm.commands.certify.encoder import NoisyEncoder
from robustvlm.commands.certify.run import SamplingRun
from robustvlm.commands.certify.store import CertifyLedger, CertifyObserver, Recorder, make_certify_rows
from robustvlm.commands.certify.summary import CertifySummary, summarise_certify
from robustvlm.commands.certify.view import write_certify_report
from robustvlm.commands.common.inputs import Images, describe_data, facts_of, probe_of, remarks_of
from robustvlm.commands.common.store import new_session
from robustvlm.core.device import resolve_device
from robustvlm.core.files import read_json, replacing, write_text
from robustvlm.core.framing import Framing, to_pixels
from robustvlm.core.object_graph import fingerprint
from robustvlm.core.ranks import Ranks, current_ranks
from robustvlm.core.seeds import generator
from robustvlm.data import open_data
from robustvlm.data.classes import read_class_names
from robustvlm.data.source import DataSource, Sample
from robustvlm.defenses import SmoothedVLM, load_pipeline
from robustvlm.defenses.pipeline import saved_model
from robustvlm.defenses.spec import split_spec
from robustvlm.errors import UserError
from robustvlm.models import VLM, zero_shot
from robustvlm.models.zero_shot import class_embeddings
from robustvlm.runs.folder import RunFolder, default_name, opened_by_all
from robustvlm.runs.manifest import (
    Manifest,
    forget_checksums,
    make_manifest,
    require_shape,
    require_unchanged,
    write_checksums,
)
from robustvlm.runs.read import write_rows

# A certify run that is ready to start or continue, in one process or in several

CERTIFICATES = "certificates.jsonl"


class Work(Protocol):
    """What certifies images: by sampling, or from kept features."""

    def run(self) -> None:
        """Do what is left to do."""


@dataclass(frozen=True)
class PreparedCertify:
    """A certify run that is ready to start.

    Under `torchrun` every process prepares and runs it; each takes its share of the images, and rank 0 alone holds the
    lock, reports progress and writes the results.

    Args:
        begin: makes the work of this process, given ledger, observer and ranks.
        illustrate: given a folder and the rows, keeps pictures for the report; None if the images are not at hand.
    """

    config: CertifyConfig
    folder: RunFolder
    manifest: Manifest
    begin: Callable[[CertifyLedger, CertifyObserver, Ranks], Work]
    illustrate: Callable[[Path, list[dict[str, Any]]], None] | None = None

    def run(
        self, observer: CertifyObserver | None = None, *, fresh: bool = False, resume: bool = False
    ) -> CertifySummary:
        """Start or continue the run, write its files and return the summary; of a finished run, return its summary."""
        ranks = current_ranks()
        with opened_by_all(self.folder, self.manifest, ranks, fresh=fresh, resume=resume) as manifest:
            if self.folder.finished:
                require_unchanged(self.folder.path, manifest, what="certify ")
                if ranks.leader and not self.folder.report_path.exists():  # a crash may leave the last file unwritten
                    write_certify_report(self.folder.path)
            else:
                if ranks.leader and "trail" in manifest:
                    record_look(self.folder, manifest["trail"])
                ledger = CertifyLedger(self.folder, rank=ranks.rank, session=ranks.share(new_session()))
                try:
                    self.begin(ledger, (observer if ranks.leader else None) or CertifyObserver(), ranks).run()
                    ranks.barrier()
                    if ranks.leader:
                        ledger.sync()
                        finish(ledger, manifest)
                        self._report(manifest)
                finally:
                    ledger.close()
            ranks.barrier()
            return read_summary(self.folder)

    def _report(self, manifest: Manifest) -> None:
        """Write pictures and report; with the pictures the results are complete."""
        if self.illustrate is not None:
            self.illustrate(self.folder.gallery_path, pq.read_table(self.folder.results_path).to_pylist())
        write_checksums(self.folder.path, manifest)
        write_certify_report(self.folder.path)


def finish(ledger: CertifyLedger, manifest: Manifest) -> CertifySummary:
    """Write `results.parquet` and `summary.json` from what the ledger holds; return the summary."""
    if not ledger.found:
        reasons = [f"'{image.id}': {image.reason}" for image in ledger.unreadable]
        raise UserError(f"none of the {len(reasons)} images can be read (the first, {', '.join(reasons[:1])})")
    rows = make_certify_rows(ledger.found.values())
    summary = summarise_certify(rows, manifest, cost=ledger.cost, checks=ledger.checks, unreadable=ledger.unreadable)
    forget_checksums(ledger.folder.path)
    write_rows(ledger.folder.results_path, rows)
    # One record a line, for whoever takes a certificate elsewhere; the same as in the column of the results.
    records = rows.column("certificate").to_pylist()
    write_text(ledger.folder.path / CERTIFICATES, "".join(f"{record}\n" for record in records))
    write_text(ledger.folder.summary_path, summary.model_dump_json(indent=2) + "\n")
    return summary


def read_summary(folder: RunFolder) -> CertifySummary:
    """Return the summary of a finished run."""
    advice = "delete it, the run makes it again"
    content = read_json(folder.summary_path, advice=advice)
    require_shape(CertifySummary, content, folder.summary_path, f": {advice}")
    return CertifySummary.model_validate(content)


# Keeps the images that were hardest and easiest to certify, each with a noisy copy, for the report

ENDS = 6


def save_extremes(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    source: DataSource,
    *,
    framing: Framing,
    sigma: float,
    seed: int,
) -> None:
    """Write the `ENDS` images with the smallest and the largest radii to `folder`, clean and under their noise.

    Among equal radii, as of a test at one radius, the images that took more copies count as smaller.

    Args:
        folder: made if need be; a file per image, named by its number.
        rows: of the results: index, image_id, label, prediction, radius, n.
        framing: how the run brought images to the resolution where the noise is added.
        sigma, seed: noise level and run seed; the noise shown is drawn from a stream of its own.
    """
    order = sorted(rows, key=lambda row: (row["radius"], -row["n"], row["index"]))
    chosen = {row["image_id"]: row for row in (order if len(order) <= 2 * ENDS else order[:ENDS] + order[-ENDS:])}
    if not chosen:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for item in source.samples(keep=lambda name: name in chosen):
        row = chosen.pop(item.id, None)
        if row is None or not isinstance(item, Sample):
            continue
        clean = to_pixels(item.image, framing)
        noise = torch.randn(clean.shape, generator=generator(seed, item.id, "noise that is shown"))
        facts = {key: str(row.get(key)) for key in ("image_id", "index", "label", "prediction", "radius", "n")}
        content = save({"clean": clean.contiguous(), "noisy": (clean + sigma * noise).contiguous()}, metadata=facts)
        with replacing(folder / f"{int(row['index']):06d}.safetensors") as temporary:
            temporary.write_bytes(content)
        if not chosen:
            return


# From the words of a command to a certify run; every mistake is found before any work begins

OWN_CLAIM = (
    "The claim '{spec}' is code beside this program: that it is true with the probability stated is for its author to "
    "prove"
)


def prepare_certify(
    settings: Settings, *, out: Path = Path("runs"), name: str | None = None, command: str = ""
) -> PreparedCertify:
    """Check all settings, open the data, load the model and return a run that is ready to start.

    Settings under which every image would have to abstain are refused, with what would do.

    Example:
        >>> import tempfile
        >>> run = prepare_certify(Settings(limit=2, samples=64), out=Path(tempfile.mkdtemp()))
        >>> run.run().images
        2
    """
    made = saved_model(split_spec(settings.model)[0])
    settings.checked(refuses=made is not None and made.refuses)
    sigma = settle_sigma(settings)
    device = str(resolve_device(settings.device))
    config = make_config(settings, sigma=sigma, device=device)
    if find_claim(config.claim).known_best:
        require_possible(make_plan(config.claim, config, Materials(text=np.eye(2))), config)
    if name is not None:
        RunFolder(out, name)
    source = open_data(settings.data, classes=settings.classes, templates=settings.templates, tree=settings.tree)
    vlm = load_pipeline(settings.model, device=device).at_noise(sigma)
    _check_smoothing(vlm, settings)
    config = config.model_copy(update={"resolution": vlm.image_size, "deployed": settle_deployed(settings, vlm)})
    rule = rule_of(config, source.class_names)
    text = vectors_of_classes(config, vlm, source.class_names, source.templates)
    plan = make_plan(config.claim, config, materials_of(config, vlm, text, source.templates, rule=rule))
    best = require_possible(plan, config)
    probe = probe_of(vlm, source.class_names, source.templates)
    encoder = NoisyEncoder(vlm, precision=config.precision)
    model_facts, data_facts = (
        facts_of(encoder.vlm, "interpolation") | describe_head(config, source.class_names),
        describe_data(source),
    )
    config = config.model_copy(update={"noise": noise_of(config, model_facts, source.class_names, source.templates)})
    prompts = prompts_of(config, model_facts, source.templates)
    recorder = Recorder(config, plan, encoder.fingerprint, text, source.class_names, rule, prompts)

    def begin(ledger: CertifyLedger, observer: CertifyObserver, ranks: Ranks) -> Work:
        return SamplingRun(
            recorder=recorder,
            encoder=encoder,
            images=Images(source, limit=config.limit, resolution=vlm.framing),
            best_radius=best,
            ledger=ledger,
            observer=observer,
            ranks=ranks,
        )

    illustrate = partial(
        save_extremes,
        source=source,
        framing=vlm.framing,
        sigma=sigma,
        seed=config.seed,
    )
    identity = config.model_dump() | {"model facts": model_facts, "data facts": data_facts}
    folder = RunFolder(out, name or default_name("certify", settings.model, settings.data, identity))
    manifest = make_manifest(
        kind="certify",
        name=folder.name,
        command=command,
        config=config,
        model=model_facts,
        data=data_facts,
        probe=probe,
    )
    remarks = remarks_of(source, vlm)
    plan_facts = describe_plan(plan, config, best)
    plan_facts["notes"] += remarks
    described = {"plan": plan_facts, "trail": describe_trail(folder, manifest), "remarks": remarks}
    return PreparedCertify(config, folder, manifest | described, begin, illustrate)


def settle_sigma(settings: Settings) -> float:
    """Return the noise level: that of a model that is smoothed already, or the one given; both must agree."""
    base, operations = split_spec(settings.model)
    smoothing = [part for part in operations if part.name == "smooth"]
    made = saved_model(base)
    within = None if made is None else made.sigma
    if len(smoothing) + (within is not None) > 1:
        raise UserError(f"'{settings.model}' is smoothed twice: certify one +smooth at a time")
    if not smoothing and within is None:
        return DEFAULT_SIGMA if settings.sigma is None else settings.sigma
    if within is None:
        try:
            within = float(smoothing[0].arguments[0])
        except (IndexError, ValueError):
            raise UserError(f"'+{smoothing[0]}' must be written +smooth:SIGMA[:N0], as +smooth:0.25") from None
    if settings.sigma is not None and settings.sigma != within:
        raise UserError(
            f"'{settings.model}' is smoothed with noise of {format_exact(within)}, and --sigma says "
            f"{format_exact(settings.sigma)}: leave out --sigma"
        )
    return within


def settle_deployed(settings: Settings, vlm: VLM) -> int | None:
    """Return how many copies the deployed model averages over: those of a smoothed model, else those asked for.

    Raises:
        UserError: the smoothed model averages over another number than the one asked for.
    """
    if not isinstance(vlm, SmoothedVLM):
        return settings.deployed
    if settings.deployed not in (None, vlm.n0):
        raise UserError(
            f"'{settings.model}' is deployed with {vlm.n0:,} copies, and --deployed says {settings.deployed:,}: leave "
            "it out, or write the number into the model, as +smooth:0.25:1000"
        )
    return vlm.n0


def noise_of(
    config: CertifyConfig, model: dict[str, Any], class_names: tuple[str, ...], templates: tuple[str, ...]
) -> str:
    """Return the digest of all that decides a run's certificates; see `robustvlm.certify.noise` for what it is for."""
    texts = {"classes": class_names, "templates": templates, "antibodies": _antibodies(config)}
    return noise_settings(config, model, texts | ({"claim": (model["claim"],)} if "claim" in model else {}))


def prompts_of(config: CertifyConfig, model: dict[str, Any], templates: tuple[str, ...]) -> str | None:
    """Return the digest of what tells the classes of a claim apart beside their names; None where none are told."""
    if not find_claim(config.claim).needs_classes:
        return None
    return settings_digest(list(templates), list(_antibodies(config)), config.weight, model.get("head"))


def _antibodies(config: CertifyConfig) -> tuple[str, ...]:
    return () if config.antibodies is None else list_of_names(Path(config.antibodies))


def _check_smoothing(vlm: VLM, settings: Settings) -> None:
    if "+smooth" in settings.model and not isinstance(vlm, SmoothedVLM):
        raise UserError(f"'{settings.model}': smoothing must be the last operator to be certified")


def make_config(settings: Settings, *, sigma: float, device: str) -> CertifyConfig:
    """Return the configuration of a run that samples; its resolution is the model's and not settled yet."""
    claim = find_claim(settings.claim)
    lanes = settings.lanes or (512 if device.startswith("cuda") else 128)
    return CertifyConfig(
        model=settings.model,
        data=settings.data,
        classes=_text(settings.classes),
        templates=_text(settings.templates),
        tree=_text(settings.tree),
        claim=settings.claim,
        sigma=sigma,
        samples=settings.samples,
        n_pilot=claim.pilot(settings.samples, early=settings.radius is not None),
        alpha=DEFAULT_ALPHA if settings.alpha is None else settings.alpha,
        min_cos=settings.min_cos if "min_cos" in claim.options else None,
        radius=settings.radius,
        at=settings.radii(sigma),
        tau=settings.tau,
        antibodies=_text(settings.antibodies),
        weight=settings.weight if "weight" in claim.options else 0.0,
        deployed=settings.deployed,
        cache=settings.cache,  # type: ignore[arg-type]
        limit=settings.limit,
        seed=settings.seed,
        lanes=lanes,
        device=device,
        precision=settings.precision,
        resolution=0,
    )


def materials_of(
    config: CertifyConfig,
    vlm: VLM,
    text: Array | None,
    templates: tuple[str, ...],
    *,
    rule: OpensetRule | None = None,
    rounding: float = 0.0,
    baselines: bool = True,
) -> Materials:
    """Return what a run's claim is about: a model's classes, the antibodies that were given, its open-set rule."""
    given = rule is None and config.antibodies is not None
    return Materials(
        text=text,
        against=_array(class_embeddings(vlm, _antibodies(config), templates)) if given else None,
        rule=rule,
        rounding=rounding,
        baselines=baselines,
        logit_scale=vlm.logit_scale,
    )


def rule_of(config: CertifyConfig, class_names: tuple[str, ...]) -> OpensetRule | None:
    """Return the open-set rule of a model that has one, with `--tau` in place of its thresholds if that was given.

    Raises:
        UserError: the deployed model follows another rule under this noise.
    """
    made = saved_model(split_spec(config.model)[0]) if find_claim(config.claim).head == "rule" else None
    return None if made is None else made.openset_rule(class_names, config.sigma, config.tau)


def vectors_of_classes(
    config: CertifyConfig, vlm: VLM, class_names: tuple[str, ...], templates: tuple[str, ...]
) -> Array | None:
    """Return unit class vectors [K, D]: those of a model that has its own, else the texts.

    Raises:
        UserError: a claim about classes, and the model has no single vector for each.
    """
    made, claim = saved_model(split_spec(config.model)[0]), find_claim(config.claim)
    if made is not None and claim.head == "vectors":
        own = made.class_vectors(class_names)
        if own is not None:
            return _array(own)
    return embed_classes(vlm, class_names, templates, needed=claim.needs_classes)


def list_of_names(path: Path) -> tuple[str, ...]:
    """Return the class names of a file that lists them; UserError for one that maps labels to names."""
    names, _ = read_class_names(path)
    if not isinstance(names, tuple):
        raise UserError(f"'{path}' maps labels to names: expected a list, one name a line")
    return names


def embed_classes(
    vlm: VLM, class_names: tuple[str, ...], templates: tuple[str, ...], *, needed: bool = True
) -> Array | None:
    """Return the unit class embeddings [K, D]; None for fewer than two classes where they are only for information."""
    if len(class_names) < 2 and not needed:
        return None
    return _array(zero_shot(vlm, class_names, templates).class_embeddings)


def _array(embeddings: Tensor) -> Array:
    return np.asarray(embeddings.detach().double().cpu().numpy())


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def describe_head(config: CertifyConfig, class_names: tuple[str, ...]) -> dict[str, Any]:
    """Return the digest of what a model decides by besides its encoder, where a claim is about that; else nothing.

    Beside it that of the claim, if it is code of the user's own.
    """
    own_claim = {"claim": own_digest(config.claim)} if is_own(config.claim) else {}
    rule = rule_of(config, class_names)
    if rule is not None:
        parts = (rule.prototypes, rule.antibodies, rule.thresholds)
        tensors = {str(i): torch.from_numpy(np.ascontiguousarray(part)) for i, part in enumerate(parts)}
        return {"head": fingerprint(tensors, (repr(rule.weight),))} | own_claim
    made = saved_model(split_spec(config.model)[0]) if find_claim(config.claim).head == "vectors" else None
    own = None if made is None else made.class_vectors(class_names)
    return ({} if own is None else {"head": fingerprint({"class_vectors": own}, ())}) | own_claim


def describe_plan(plan: Plan, config: CertifyConfig, best: float) -> dict[str, Any]:
    """Return what a reader of the run has to know of its claim: statement, bounds and threat model."""
    size, claim = config.resolution, find_claim(config.claim)
    own = is_own(config.claim)
    return {
        "statement": plan.statement,
        "rule": plan.rule,
        "deployed": claim.deployed_rule(config),
        "theorem": plan.theorem,
        "bound": plan.bound,
        "stop_rule": plan.stop_rule,
        "alpha_split": plan.alpha_split,
        "best_radius": best,
        "notes": [OWN_CLAIM.format(spec=config.claim)] if own else [],
        "threat": [
            f"every image whose l2 distance is below the radius, pixels in [0, 1], measured at {size} x {size} where "
            "the noise is added; of changes made before an image was resized nothing is stated",
            "up to floating point: noise and sum in float32, the encoder in the precision stated; the noise is not "
            "clipped, and what the encoder does after it (clamping, rounding) is part of the encoder",
        ],
    } | ({"claim": asdict(claim.facts)} if own else {})
