"""The work of a certify run: every image sampled until its claim is decided, or samples judged that were kept."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow.parquet as pq
import torch

from robustvlm.certify import Certificate, Job, Sampled, SamplingEngine, source_norm
from robustvlm.certify.claims import find_claim
from robustvlm.certify.threats import Noise
from robustvlm.commands.certify.config import CertifyConfig, record_look
from robustvlm.commands.certify.encoder import (
    FeatureWriter,
    NoisyEncoder,
    Probed,
    cache_bytes,
    probe_encoder,
    read_features,
    require_room,
    same_bits,
)
from robustvlm.commands.certify.prompts import copies_line
from robustvlm.commands.certify.store import CertifyFact, CertifyLedger, Recorder, make_certify_rows
from robustvlm.commands.certify.summary import summarise_certify
from robustvlm.commands.common.inputs import Images, Picture
from robustvlm.commands.common.questions import copies
from robustvlm.commands.common.store import new_session
from robustvlm.core.files import write_text
from robustvlm.core.ranks import Ranks
from robustvlm.data.source import Unreadable, select
from robustvlm.defenses.pipeline import saved_model
from robustvlm.defenses.specs import split_spec
from robustvlm.errors import UserError
from robustvlm.report.words import count_of, duration
from robustvlm.runs.manifest import Manifest
from robustvlm.runs.records import Check, write_rows
from robustvlm.runs.run import Facts, Session
from robustvlm.runs.settings import Observer
from robustvlm.text import format_up

CERTIFICATES = "certificates.jsonl"
_STAGE = "Certifying"

# A run that is ready: images to certify, by sampling or from kept features, and the files that come of them


class Share(Protocol):
    """What certifies images: by sampling, or from kept features."""

    def run(self) -> None:
        """Do what is left to do."""


@dataclass(frozen=True)
class CertifyWork:
    """A certify run that is ready to start; of several processes each takes its share of the images.

    Args:
        begin: makes the share of this process, given ledger, observer and ranks.
        group: returns what an image, by its id, is a copy of; None where nothing tells: intervals count every image.
        illustrate: given a folder and the rows, keeps pictures for the report; None if the images are not at hand.
        told: what there is to say of the images besides.
    """

    facts: Facts
    config: CertifyConfig
    begin: Callable[[CertifyLedger, Observer, Ranks], Share]
    group: Callable[[str], str] | None
    told: Sequence[Check] = ()
    illustrate: Callable[[Path, list[dict[str, Any]]], None] | None = None

    def run(self, session: Session) -> None:
        """Certify what is left to certify; rank 0 writes results, certificates, summary and pictures."""
        ranks = session.ranks
        if ranks.leader and "trail" in session.manifest:
            record_look(session.folder, session.manifest["trail"])
        ledger = CertifyLedger(session.folder, rank=ranks.rank, session=ranks.share(new_session()))
        try:
            self.begin(ledger, session.observer, ranks).run()
            ledger.meet(ranks)
            if ranks.leader:
                ledger.sync()
                require_some(ledger)
                group = self.group or str
                ledger.add_checks([*copies(group(fact.image_id) for fact in ledger.found.values()), *self.told])
                with session.results() as folder:
                    finish(ledger, session.manifest, self.group)
                    if self.illustrate is not None:
                        rows = pq.read_table(folder / "results.parquet").to_pylist()
                        self.illustrate(session.folder.gallery_path, rows)
        finally:
            ledger.close()


def require_some(ledger: CertifyLedger) -> None:
    """Refuse to make results of no image at all."""
    if not ledger.found:
        reasons = [f"'{image.id}': {image.reason}" for image in ledger.unreadable]
        raise UserError(f"none of the {len(reasons)} images can be read (the first, {', '.join(reasons[:1])})")


def finish(ledger: CertifyLedger, manifest: Manifest, group: Callable[[str], str] | None) -> None:
    """Write `results.parquet`, the certificates and `summary.json` from what the ledger holds."""
    rows = make_certify_rows(ledger.found.values())
    summary = summarise_certify(
        rows,
        manifest,
        cost=ledger.cost,
        checks=ledger.checks,
        unreadable=ledger.unreadable,
        directions={fact.index: fact.direction for fact in ledger.found.values() if fact.direction is not None},
        group=group,
    )
    write_rows(ledger.folder.results_path, rows)
    # One record a line, for whoever takes a certificate elsewhere; the same as in the column of the results.
    records = rows.column("certificate").to_pylist()
    write_text(ledger.folder.path / CERTIFICATES, "".join(f"{record}\n" for record in records))
    write_text(ledger.folder.summary_path, summary.model_dump_json(indent=2) + "\n")


# What is said meanwhile


def forecast_line(
    images: int | None,
    samples: int,
    passes: int | None,
    seconds: float | None,
    best_radius: float,
    cache_bytes: int = 0,
) -> str:
    """Say what a run will cost and can give, before it starts.

    Args:
        images: images still to certify (None: not known before streaming). samples: noisy copies of each, at most.
        passes, seconds: encoder passes and wall time at most, on all processes together; None with `images`.
        best_radius: the largest radius that the settings can give.
        cache_bytes: what the kept features will take on disk; 0 if none are kept.

    Example:
        >>> forecast_line(10, 1000, 10_000, 42.0, 0.5)
        '10 images, at most 1,000 samples each: up to 10,000 encoder passes, about 42.0 s; radius at best 0.5'
    """
    some = "images" if images is None else count_of(images, "images")
    cost = ""
    if passes is not None and seconds is not None:
        cost = f": up to {count_of(passes, 'encoder passes')}, about {duration(seconds)}"
    kept = f"; kept features take {cache_bytes / 1e6:,.1f} MB" if cache_bytes else ""
    best = format_up(best_radius, 3)
    return f"{some}, at most {count_of(samples, 'samples')} each{cost}; radius at best {best}{kept}"


_FORECAST_IMAGES = 20


class Told:
    """Tells an observer of each image that is done, with the share certified and what early stopping has saved."""

    def __init__(self, observer: Observer, samples: int) -> None:
        self._observer, self._samples = observer, samples
        self._images = self._certified = self._used = 0

    def image_done(self, fact: CertifyFact | None) -> None:
        """An image is finished; None if it could not be read."""
        self._images += 1
        if fact is not None:
            self._certified += fact.radius > 0.0
            self._used += fact.n + fact.n_pilot
        saved = 1.0 - self._used / (self._samples * self._images)
        self._observer.advance(certified=f"{self._certified / self._images:.0%},", samples_saved=f"{saved:.0%}")


_MOVING = (
    "The encoder does not give an image the same bits wherever in a batch it stands. Noise and sum are exact, but the "
    "certificate is about an encoder that is one function of its input; what differs by place is not covered."
)

# The share of a process: images sampled, or samples judged that were kept

# A killed session loses its count of passes since the last note of it.
_COST_SECONDS = 5.0
_PROBE_IMAGES = 8


class SamplingRun:
    """Certifies the images of a source by sampling, as far as the ledger does not know them yet.

    Args:
        recorder: settings and plan of the claim, and how rows are made.
        encoder: the encoder below the noise.
        images: the images, at the resolution where the noise is added.
        best_radius: the largest radius that the settings can give.
        ledger, observer: told what is found; ranks: the processes that share the images.
    """

    def __init__(
        self,
        *,
        recorder: Recorder,
        encoder: NoisyEncoder,
        images: Images,
        best_radius: float,
        ledger: CertifyLedger,
        observer: Observer,
        ranks: Ranks,
    ) -> None:
        self.recorder, self.config = recorder, recorder.config
        self.encoder, self.images = encoder, images
        self.best_radius = best_radius
        self.ledger, self.observer, self.ranks = ledger, observer, ranks
        self._told = Told(observer, self.config.samples)
        self._norms: dict[int, float | None] = {}
        self._began = self._noted = time.monotonic()

    def run(self) -> None:
        """Do what is left to do; every finished image goes to the ledger at once."""
        self._began = self._noted = time.monotonic()
        try:
            probed = self._probe()
            self._announce(probed)
            writer = (
                None
                if self.config.cache is None
                else FeatureWriter(self._features, self.config.cache, run=self.ledger.owner)
            )
            engine = SamplingEngine(
                self.encoder,
                seed=self.config.seed,
                settings=self.config.noise,
                lanes=probed.rungs[0],
                device=self.encoder.device,
                rungs=probed.rungs,
                keep=None if writer is None else writer.add,
                on_pass=self._passed,
                random=probed.random,
                threat=self.config.against.threat.name,
            )
            for sampled in engine.run(self._jobs(), lambda job: self.recorder.plan.certifier_of(job.label)):
                if writer is not None:  # a row in the journal means that the features are there
                    writer.write(sampled.job)
                fact = self.recorder.fact(sampled, resize_norm=self._norms.pop(sampled.job.index))
                self.ledger.add_image(fact)
                self._told.image_done(fact)
        finally:
            self._note_cost()

    @property
    def _features(self) -> Path:
        return self.ledger.folder.features_path

    def _probe(self) -> Probed:
        """Question the encoder on the first images."""
        first: list[Picture] = []
        reasons: list[str] = []
        for item in self.images.stream():
            if isinstance(item, Unreadable):
                reasons.append(f"'{item.id}': {item.reason}")
            else:
                first.append(item)
            if len(first) == _PROBE_IMAGES:
                break
        if not first:
            why = f"none of its {len(reasons)} images can be read (the first, {reasons[0]})" if reasons else "none"
            raise UserError(f"no image to certify in '{self.images.source.spec}': {why}")
        pixels = torch.stack([picture.pixels for picture in first])
        noise, lanes = self.config.against, self.config.lanes
        probed = probe_encoder(self.encoder, pixels, noise, lanes, model=self.config.model)
        self.ledger.add_checks([*probed.checks, *self._exactness(pixels, noise, probed.rungs[0]), *self._refusals()])
        return probed

    def _refusals(self) -> list[Check]:
        """Say where a certificate of the class leaves out that the model may refuse to answer."""
        made, claim = saved_model(split_spec(self.config.model)[0]), find_claim(self.config.claim)
        if made is None or not made.refuses or not claim.needs_classes or claim.head in ("rule", "votes"):
            return []
        message = (
            "This model may refuse an image, and this claim is about the class alone: inside the radius the class "
            "stays, whether or not the image is refused. --claim openset is about the refusal, and a model smoothed "
            "with SIGMA:N0:ALPHA:vote about both."
        )
        return [Check(name="refusal", level="note", message=message)]

    def _exactness(self, pixels: torch.Tensor, noise: Noise, lanes: int) -> list[Check]:
        """Say where a certificate that is free of rounding meets an encoder whose answers move with the batch."""
        if not noise.threat.exact:
            return []
        rows = pixels[torch.arange(lanes) % len(pixels)].cpu()
        noisy = noise.fresh(rows, torch.Generator().manual_seed(0)).to(self.encoder.device)
        if same_bits(self.encoder, noisy):
            return []
        return [Check(name="rounding", level="warning", message=_MOVING)]

    def _announce(self, probed: Probed) -> None:
        ids, done = self.images.source.ids(), len(self.ledger.seen)
        total = len(select(ids, self.images.limit)) if ids is not None else self.images.limit
        left = None if total is None else max(0, total - done)
        passes = None if left is None else left * self.config.samples
        size = 0
        if self.config.cache is not None and left is not None:
            size = cache_bytes(left, self.config.samples, probed.dim, self.config.cache)
            require_room(self._features, size)
        seconds = None if passes is None else passes / probed.rate / self.ranks.size
        self.observer.say(forecast_line(left, self.config.samples, passes, seconds, self.best_radius, size))
        self.observer.begin(_STAGE, total, done)

    def _jobs(self) -> Iterator[Job]:
        known, index = self.ledger.seen, self.images.index
        handed_on: set[str] = set()
        for item in self.images.stream(lambda name: name not in known and self.ranks.mine(index(name))):
            # Streams also name what no one asked for: damaged shards, and second images of the same name.
            if item.id in handed_on or item.id in known or not self.ranks.mine(index(item.id)):
                continue
            handed_on.add(item.id)
            if isinstance(item, Unreadable):
                self.ledger.add_unreadable(index(item.id), item)
                self._told.image_done(None)
                continue
            number = index(item.id)
            self._norms[number] = source_norm(*item.source_size, self.images.framing)
            yield Job(item.id, number, item.pixels, item.label)

    def _passed(self, rows: int, used: int) -> None:
        self.ranks.check()
        self.observer.passed(used, rows)
        if time.monotonic() - self._noted >= _COST_SECONDS:
            self._note_cost()

    def _note_cost(self) -> None:
        self._noted = time.monotonic()
        self.ledger.add_cost(
            passes=self.encoder.passes, seconds=self._noted - self._began, model_seconds=self.encoder.seconds
        )


class ReplayRun:
    """Certifies images from the features that another run kept: no encoder pass is made.

    Args:
        rows: of the run that kept the features: index, image_id, resize_norm, certificate.
        features: folder of the kept features; source: manifest of the run that they must be of.
        labels: the images' classes in the new list, by index; -1 where it is not in it.
    """

    def __init__(
        self,
        *,
        recorder: Recorder,
        rows: Sequence[Mapping[str, Any]],
        features: Path,
        source: Manifest,
        labels: Mapping[int, int],
        best_radius: float,
        ledger: CertifyLedger,
        observer: Observer,
        ranks: Ranks,
    ) -> None:
        self.recorder, self.rows, self.features, self.labels = recorder, rows, features, labels
        self.source = source
        self.best_radius = best_radius
        self.ledger, self.observer, self.ranks = ledger, observer, ranks
        self._told = Told(observer, recorder.config.samples)

    def run(self) -> None:
        """Do what is left to do; every finished image goes to the ledger at once."""
        began = time.monotonic()
        known = {fact.index for fact in self.ledger.found.values()}
        left = [row for row in self.rows if row["index"] not in known]
        samples = self.recorder.config.samples
        self.observer.say(forecast_line(len(left), samples, 0, 0.0, self.best_radius))
        if self.recorder.config.prompts == "adaptive":
            found = [self._judged(row).finding for row in left[:_FORECAST_IMAGES]]
            if line := copies_line([finding.columns.get("needed", 0.0) for finding in found], samples):
                self.observer.say(line)
        self.observer.begin(_STAGE, len(self.rows), len(known))
        try:
            for row in left:
                if self.ranks.mine(row["index"]):
                    self.ranks.check()
                    # Earlier versions kept the norm of a resize that was rounded, which certifies nothing.
                    norm = 1.0 if row["resize_norm"] == 1.0 else None
                    fact = self.recorder.fact(self._judged(row), resize_norm=norm)
                    self.ledger.add_image(fact)
                    self._told.image_done(fact)
        finally:
            self.ledger.add_cost(passes=0, seconds=time.monotonic() - began, model_seconds=0.0)

    def _judged(self, row: Mapping[str, Any]) -> Sampled:
        began = time.perf_counter()
        kept = read_features(self.features, row["index"], row["image_id"], self.source)
        certifier = self.recorder.plan.certifier_of(self.labels[row["index"]])
        used = dict.fromkeys(kept.stages, 0)
        while (wanted := certifier.request()) is not None:
            start = used.get(wanted.stage, 0)
            rows = kept.stages.get(wanted.stage, ())[start : start + wanted.sure]
            if len(rows) < wanted.sure:
                raise UserError(f"the kept features of '{row['image_id']}' lack {wanted.stage} samples: make them anew")
            used[wanted.stage] = start + wanted.sure
            certifier.take(rows)
        job = Job(row["image_id"], row["index"], torch.zeros(0), self.labels[row["index"]])
        drawn = Certificate.from_dict(json.loads(row["certificate"]))  # the samples are those of the first run
        return Sampled(
            job=job,
            finding=certifier.finding(),
            passes=0,
            seconds=time.perf_counter() - began,
            sigma=certifier.sigma,
            image=drawn.image,
            seeds=drawn.provenance.seeds,
        )
