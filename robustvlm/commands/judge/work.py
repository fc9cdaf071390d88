"""The work of `robustvlm judge`: models and images opened, every act made on every model, figures written."""

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from robustvlm.attacks.catalog import parse_attacks
from robustvlm.attacks.honesty import open_gradients
from robustvlm.attacks.threat import ThreatModel, parse_norm, radius_or_default
from robustvlm.commands.common.inputs import Images as Stream
from robustvlm.commands.common.inputs import describe_data, joined_probes, probe_of, remarks_of
from robustvlm.commands.judge import JudgeSettings, attacks, record
from robustvlm.commands.judge.paper import write_markdown, write_tex
from robustvlm.commands.judge.view import judge_report as report_of
from robustvlm.commands.judge.view import read_run, show, write_report
from robustvlm.core.files import first_line, replacing, require_regular, write_text
from robustvlm.core.ranks import current_ranks, device_of_rank, resolve_device
from robustvlm.core.size import size_text
from robustvlm.data import DataSource, Unreadable, open_data
from robustvlm.defenses import Classifier, load_classifier
from robustvlm.defenses.pipeline import check_operations
from robustvlm.defenses.specs import split_spec, undefended
from robustvlm.defenses.zoo.base import Passes
from robustvlm.defenses.zoo.unpublished import unpublished
from robustvlm.defenses.zoo.wrap import defended
from robustvlm.errors import UserError, setting
from robustvlm.runs.manifest import carried, require_owner
from robustvlm.runs.run import Facts, Session

__all__ = ["RESULTS", "JudgeWork", "open_work", "read_run", "report_of", "show", "write_report"]

RESULTS = ("summary.json",)

FIRST = next(iter(attacks.UNAWARE))
"""The transferred points that attacks begin at."""


@dataclass(frozen=True, eq=False)
class JudgeWork:
    """The models of a run with what each stands on, and its images.

    Args:
        bases: by defended spec, the spec of the undefended model. models: all classifiers by spec, undefended first.
    """

    facts: Facts
    settings: JudgeSettings
    threat: ThreatModel
    eps_text: str
    source: DataSource
    bases: dict[str, str]
    models: dict[str, Classifier]
    unpublished: tuple[record.Unreproduced, ...]

    def run(self, session: Session) -> None:
        """Make every act that is not in the journal yet, and write the figures."""
        ranks = session.ranks
        ledger = record.JudgeLedger(session.folder, rank=ranks.rank)
        try:
            images, aside = self._images(ledger, session)
            trial = _Trial(self, ledger, session, images)
            acts = {spec: trial.judge(spec) for spec in self.models}
            ledger.meet(ranks)
            ledger.sync()
            ranks.barrier()
            if not ranks.leader:
                return
            aside = replace(aside, acts=acts, every_mode=self.settings.every_mode)
            first = next(iter(images.values()))
            summary = record.Judgement(
                norm=self.threat.norm,
                eps=self.threat.eps,
                eps_text=self.eps_text,
                steps=self.settings.steps,
                queries=self.settings.queries,
                targets=self.settings.targets,
                images=len(first.ids),
                unreadable=aside.unreadable,
                unknown=aside.unknown,
                worth=aside.worth,
                seconds=ledger.seconds,
                models=record.judged(ledger, aside),
                not_reproduced=self.unpublished,
                effort=attacks.EFFORT,
            )
        finally:
            ledger.close()
        with session.results() as folder:
            write_markdown(folder / "report.md", summary, session.manifest)
            write_tex(folder / "report.tex", summary, session.manifest)
            write_text(folder / "summary.json", summary.model_dump_json(indent=2) + "\n")

    def _images(self, ledger: record.JudgeLedger, session: Session) -> tuple[dict[str, attacks.Images], record.Images]:
        """Return the images as every undefended model takes them, by its spec, and what was left aside."""
        found: dict[str, attacks.Images] = {}
        aside = record.Images((), ())
        for spec in dict.fromkeys(self.bases.values()):
            ids, labels, pixels, unknown = [], [], [], 0
            stream = Stream(self.source, limit=self.settings.limit, resolution=self.models[spec].framing)
            for item in stream.stream():
                if isinstance(item, Unreadable):
                    if session.ranks.leader:
                        ledger.add_unreadable(stream.index(item.id), item)
                elif item.label < 0:
                    unknown += 1
                else:
                    ids.append(item.id)
                    labels.append(item.label)
                    pixels.append(item.pixels)
            if not ids:
                raise UserError(f"'{self.source.spec}' holds no readable image of a known class to judge on")
            found[spec] = attacks.Images(ids, torch.stack(pixels), torch.tensor(labels))
            groups = list(map(self.source.group, ids))
            aside = record.Images(ids, labels, len(ledger.unreadable), unknown, groups=groups)
        return found, aside


@dataclass(frozen=True, eq=False)
class _Trial:
    """All acts on all models, part by part of the images; each part is one process's throughout."""

    work: JudgeWork
    ledger: record.JudgeLedger
    session: Session
    images: dict[str, attacks.Images]
    known: dict[str, attacks.Attacked] = field(default_factory=dict)

    def judge(self, spec: str) -> tuple[str, ...]:
        """Make the acts on a model that are not made yet; return all."""
        base = self.work.bases.get(spec)
        images, attacked = self.images[base or spec], self._attacked(spec)
        assert attacked.probe.rows  # asked before what follows is counted
        ranks, parts = self.session.ranks, list(enumerate(self._parts(images)))
        if ranks.leader:
            self._look_at(spec, attacked, images)
        own = [(part, places) for part, places in parts if ranks.mine(part)]
        for act in attacked.acts:
            self.session.observer.begin(f"{spec}: {act}", sum(len(places) for _, places in own))
            for part, places in own:
                ranks.check()
                if (spec, act, part) not in self.ledger.parts:
                    self._make(spec, act, part, attacked, images, places)
                self.session.observer.advance(len(places))
        return attacked.acts

    def _make(
        self, spec: str, act: str, part: int, attacked: attacks.Attacked, images: attacks.Images, places: Sequence[int]
    ) -> None:
        began = time.monotonic()
        fallen = self._fallen(spec, act, attacked)
        wanted = [place for place in places if place not in fallen]
        base, chosen, purpose = self.work.bases.get(spec, spec), images.rows(wanted), f"{act} {part}"
        with attacked.counted() as seen:
            if not wanted:
                fates = []
            elif act == attacks.CLEAN or act in attacks.TRANSFER:
                points = chosen.pixels if act == attacks.CLEAN else self._points(base, act, part)
                fates = attacked.look(points, chosen.labels, purpose)
            else:
                rows = [places.index(place) for place in wanted]
                start = self._lowest(spec, base, part, places)[rows] if act.startswith(attacks.START) else None
                fates = attacked.act(act, chosen, start)
        numbered = [fate.model_copy(update={"index": wanted[fate.index]}) for fate in fates]
        spent = Passes(seen.forward, seen.backward)
        self.ledger.add_part(spec, act, part, numbered, time.monotonic() - began, spent)
        self.session.observer.passed(len(wanted), seen.forward + seen.backward)

    def _fallen(self, spec: str, act: str, attacked: attacks.Attacked) -> set[int]:
        """Return the images that an act is not made on, by what came of them in the acts before."""
        if act == attacks.CLEAN or act in attacks.TRANSFER:
            return set()
        before = attacked.acts[: attacked.acts.index(act)]
        if act.startswith(attacks.MODE) and self.work.settings.every_mode:
            before = (attacks.CLEAN,)
        elif (
            act.startswith((attacks.MODE, attacks.SHORT)) or act == attacks.FEATURE
        ):  # to count what gradients alone find
            before = tuple(one for one in before if one not in attacks.TRANSFER)
        fates = (fate for one in before for fate in self.ledger.fates(spec, one).values())
        return {fate.index for fate in fates if not fate.right}

    def _look_at(self, spec: str, attacked: attacks.Attacked, images: attacks.Images) -> None:
        """Note what a model is, once."""
        if spec in self.ledger.models:
            return
        self.session.observer.begin(f"{spec}: questions")
        base = self.work.bases.get(spec)
        cost, change = attacked.cost(images), None
        if base is not None and not attacked.random:
            plain = self._attacked(base)
            if not plain.random:
                points = [images.rows(self._parts(images)[0]).pixels, self._points(base, FIRST, 0)]
                change = max(float((attacked.outputs(x) - plain.outputs(x)).abs().max()) for x in points)
        self.ledger.add_model(
            record.ModelFacts(
                spec=spec,
                base=base,
                defences=[str(part.defence) for part in reversed(defended(attacked.model))],
                modes=list(attacked.modes),
                random=attacked.random,
                eot=attacked.gradient_draws,
                draws=attacked.judging_draws,
                forward=cost.forward,
                backward=cost.backward,
                equivalents=cost.equivalents,
                change=change,
                checks=attacked.checks(images),
            )
        )

    def _lowest(self, spec: str, base: str, part: int, places: Sequence[int]) -> Tensor:
        """Return, of the points made on the undefended model, each image's one with the lowest margin on this model."""
        margins = torch.tensor([[self.ledger.fates(spec, act)[p].margin for p in places] for act in attacks.TRANSFER])
        points = torch.stack([self._points(base, act, part) for act in attacks.TRANSFER])
        return points[margins.nan_to_num(-torch.inf).argmin(0), torch.arange(len(places))]

    def _points(self, base: str, act: str, part: int) -> Tensor:
        """Return the points of an attack on an undefended model for a part of its images, made once and kept."""
        digest = hashlib.blake2b(f"{base} {act}".encode("utf-8", "surrogateescape"), digest_size=6).hexdigest()
        path = self.session.folder.adversarial_path / f"{digest}-{part:05d}.safetensors"
        images = self.images[base]
        chosen = images.rows(self._parts(images)[part])
        about = {"model": base, "act": act, **carried(self.session.manifest)}
        if (kept := self._kept(path)) is not None:
            return kept
        points = self._made(base, act, part, chosen).contiguous()
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(save({"points": points}, metadata=about))
        return points

    def _kept(self, path: Path) -> Tensor | None:
        """Return points that this run has kept; None for none, and of an earlier version, which said not whose."""
        if not path.exists():
            return None
        try:
            require_regular(path)
            with safe_open(path, framework="pt") as file:
                found = file.metadata() or {}
                points: Tensor = file.get_tensor("points")
        except (OSError, SafetensorError) as error:
            said = f"cannot read the kept points '{path}' ({first_line(error)})"
            raise UserError(f"{said}: delete it, the run makes it again") from None
        if found.keys() == {"model", "act"}:  # which are made again, from the same seed
            return None
        require_owner(found.get("run"), self.session.manifest, path)
        return points

    def _made(self, base: str, act: str, part: int, chosen: attacks.Images) -> Tensor:
        if act != attacks.LABEL:
            return self._attacked(base).unaware_points(chosen, act)
        # Where the undefended model is right, its word is the label, and the points are there already.
        points = self._points(base, FIRST, part).clone()
        clean, places = self.ledger.fates(base, attacks.CLEAN), self._parts(self.images[base])[part]
        said = torch.tensor([clean[place].prediction for place in places])
        other = (said != chosen.labels).nonzero().flatten().tolist()
        if other:
            asked = replace(chosen.rows(other), labels=said[other])
            points[other] = self._attacked(base).unaware_points(asked, act)
        return points

    def _attacked(self, spec: str) -> attacks.Attacked:
        """Return a model as it is attacked, which is asked the first questions once."""
        if spec not in self.known:
            self.known[spec] = self._new(spec)
        return self.known[spec]

    def _new(self, spec: str) -> attacks.Attacked:
        settings, models, base = self.work.settings, self.work.models, self.work.bases.get(spec)
        images = self.images[base or spec]
        lanes = min(settings.lanes, len(images.ids))
        model = models[spec]
        return attacks.Attacked(
            model=model,
            features=model if model.vlm is not None or base is None else models[base],
            first=images.rows(range(lanes)),
            threat=self.work.threat,
            steps=settings.steps,
            queries=settings.queries,
            targets=settings.targets,
            lanes=lanes,
            seed=settings.seed,
            eot=settings.eot,
            draws=settings.draws,
        )

    def _parts(self, images: attacks.Images) -> list[list[int]]:
        size, count = self.work.settings.lanes, len(images.ids)
        return [list(range(start, min(start + size, count))) for start in range(0, count, size)]


def open_work(settings: JudgeSettings) -> JudgeWork:
    """Check all settings, open the data and load every model and what it stands on."""
    norm = parse_norm(settings.norm)
    text, radius = radius_or_default(settings.eps, norm, linf="4/255")
    if settings.targets:
        parse_attacks(attacks.targeted(settings.steps, settings.targets))  # more points than can be looked at
    place = resolve_device(settings.device)
    device = str(device_of_rank(place, current_ranks()))
    absent = tuple(_unpublished(settings))
    bases = dict(_bases(settings, {row.spec for row in absent}))
    source = open_data(settings.data, classes=settings.classes, templates=settings.templates)
    models: dict[str, Classifier] = {}
    remarks = []
    for spec in (*dict.fromkeys(bases.values()), *bases):
        found = load_classifier(spec, source.class_names, source.templates, device=device)
        if found.can_reject:
            raise UserError(
                f"'{spec}' may refuse an image, and judge compares models that always answer: leave out +reject, "
                "or ALPHA of +smooth, or attack it with `robustvlm attack`"
            )
        remarks += open_gradients(found)
        models[spec] = found
    for spec, base in bases.items():
        if models[spec].framing != models[base].framing:
            raise UserError(
                f"'{spec}' takes images in another way than '{base}' ({size_text(models[spec].image_size)} and "
                f"{size_text(models[base].image_size)} pixels): both must see the same ones"
            )
    prints = {spec: model.fingerprint for spec, model in models.items()}
    facts = Facts(
        (settings.model, settings.data),
        settings.stored(norm=norm, eps=radius, eps_text=text, device=device, effort=attacks.EFFORT),
        {"spec": settings.model, "fingerprint": prints[next(iter(bases))], "models": prints},
        describe_data(source),
        probe=joined_probes(
            {spec: probe_of(model, source.class_names, source.templates) for spec, model in models.items()}
        ),
        remarks=[*remarks_of(source, models[next(iter(bases.values()))]), *dict.fromkeys(remarks)],
    )
    return JudgeWork(facts, settings, ThreatModel(norm, radius), text, source, bases, models, absent)


def _unpublished(settings: JudgeSettings) -> Iterator[record.Unreproduced]:
    """Yield a row for every spec with a defence that cannot be run from what its authors give."""
    for spec in (text.strip() for text in settings.model.split(",")):
        found = [(one, known) for one in split_spec(spec)[1] if (known := unpublished(one.name, one.arguments))]
        for _, known in found[:1]:
            yield record.Unreproduced(
                spec=spec, title=known.title, reference=known.reference, claimed=known.claimed, reason=known.reason
            )


def _bases(settings: JudgeSettings, aside: set[str]) -> Iterator[tuple[str, str]]:
    """Yield every defended spec with that of the undefended model, but for those left aside."""
    specs = [spec.strip() for spec in settings.model.split(",")]
    if set(specs) <= aside:
        raise UserError(
            f"'{settings.model}' names no defence that can be run, only such as are shown as not reproduced: add one, "
            f"as {undefended(specs[0])}+bits:3"
        )
    for spec in specs:
        if spec in aside:
            continue
        if not spec or specs.count(spec) > 1:
            raise UserError(f"'{settings.model}' names " + (f"'{spec}' twice" if spec else "an empty model"))
        base = settings.base or undefended(spec)
        if settings.base and settings.base not in (own := undefended(spec), spec) and own != spec:
            raise UserError(
                f"'{spec}' stands on '{own}', and {setting('base')} names '{settings.base}' as the undefended model: "
                f"judge it in a run of its own without {setting('base')}"
            )
        if base == spec:
            check_operations(spec, split_spec(spec)[1])
            raise UserError(
                f"'{spec}' has no defence to judge: write MODEL+DEFENCE, as {spec}+bits:3 (`robustvlm models` lists "
                f"them), or say with {setting('base', 'MODEL')} which model is the undefended one"
            )
        yield spec, base
