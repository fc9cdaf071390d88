"""A detect run: prepared from a command's words, encoded, scored, attacked, written down."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from robustvlm.attacks import LaneAttack, ThreatModel
from robustvlm.attacks.catalog import is_foreign
from robustvlm.attacks.honesty import open_gradients
from robustvlm.commands.common.inputs import Images, Picture, code_facts, describe_data, facts_of, probe_of, remarks_of
from robustvlm.commands.detect import measures
from robustvlm.commands.detect.attack import KNOWN, AttackLedger, ScoreAttacks, Target, fool
from robustvlm.commands.detect.config import OWN, DetectConfig, DetectObserver, Settings, UnderAttack
from robustvlm.commands.detect.encoding import Encoded, Encoder, embed_words, kept
from robustvlm.commands.detect.measures import Scored, save_mistakes
from robustvlm.commands.detect.remarks import of_antibodies, of_constant_scores, of_unknown_sets, of_words, remarks
from robustvlm.commands.detect.scoring import Panel, make_panel, mean_time, of_known_classes, require_apart
from robustvlm.commands.detect.summary import Adversarial, AttackedScore, DetectSummary, SetSummary, WordsSummary
from robustvlm.commands.detect.view import load_detect_run, write_detect_report
from robustvlm.core.device import resolve_device
from robustvlm.core.files import write_text
from robustvlm.core.object_graph import fingerprint
from robustvlm.core.ranks import current_ranks
from robustvlm.data import DataSource, open_data
from robustvlm.data.names import same_things, some_of
from robustvlm.data.specs import Unlabelled, open_unlabelled
from robustvlm.defenses import Classifier, load_classifier
from robustvlm.detect import find_score, outside, read_words, tree_words
from robustvlm.errors import UserError
from robustvlm.runs.folder import RunFolder, default_name
from robustvlm.runs.manifest import Manifest, forget_checksums, make_manifest, write_checksums
from robustvlm.runs.read import write_rows
from robustvlm.runs.records import Check
from robustvlm.stats import rate

# The work of a detect run: encode every set, score it, attack the scores, and write down what was found


@dataclass(eq=False)
class Session:
    """One go at a detect run; see `PreparedDetect` for the arguments."""

    config: DetectConfig
    manifest: Manifest
    folder: RunFolder
    classifier: Classifier
    known: DataSource
    unknown: list[tuple[str, Unlabelled]]
    fit: DataSource | None
    words: tuple[str, ...]
    naming: dict[str, str]
    attacks: list[LaneAttack]
    batch_size: int
    observer: DetectObserver
    encoded: dict[str, Encoded] = field(default_factory=dict)
    left_out: int = 0
    known_after_all: dict[str, dict[str, int]] = field(default_factory=dict)

    def run(self) -> None:
        """Do what is left to do, and write results, summary and pictures; the report is made from these."""
        began = time.monotonic()
        fit = self._encode()
        panel = make_panel(
            self.classifier,
            self.known.templates,
            self.config.scores,
            fit,
            self._word_embeddings(),
            temperature=self.config.temperature,
        )
        sets = measures.usable([self._scored(name, source, panel) for name, source in self._sources()], panel)
        thresholds = measures.thresholds_of(sets[0])
        attacked, adversarial, checks = self._under_attack(panel, sets, thresholds)
        summary = self._summary(panel, sets, fit, thresholds, checks=[*self._remarks(sets, fit, panel), *checks])
        summary = summary.model_copy(
            update={"attacked": attacked, "adversarial": adversarial, "seconds": time.monotonic() - began}
        )
        shown = OWN if panel.may_refuse else summary.best
        save_mistakes(
            self.folder.gallery_path,
            [(part, source) for part, (_, source) in zip(sets, self._sources(), strict=True)],
            shown,
            thresholds[shown],
            framing=self.classifier.framing,
        )
        forget_checksums(self.folder.path)
        write_rows(self.folder.results_path, measures.rows_of(sets))
        self.folder.report_path.unlink(missing_ok=True)
        write_text(self.folder.summary_path, summary.model_dump_json(indent=2) + "\n")
        write_checksums(self.folder.path, self.manifest)

    def _sources(self) -> list[tuple[str, DataSource]]:
        return [(KNOWN, self.known), *self.unknown]

    def _encode(self) -> Encoded | None:
        """Encode every set; return the images to learn from, without those of unknown classes."""
        encoder = Encoder(
            self.classifier,
            self.folder.features_path,
            owner=self.manifest,
            seed=self.config.seed,
            batch_size=self.batch_size,
            observer=self.observer,
        )
        for number, (name, source) in enumerate(self._sources()):
            file = KNOWN if number == 0 else f"unknown-{number}"
            self.encoded[name] = encoder.encode(source, file, limit=self.config.limit, title=f"Encoding {name}")
            if number:
                self._leave_out_known(name, source.spec)
        self.encoded[KNOWN], self.left_out = of_known_classes(self.encoded[KNOWN])
        if not self.encoded[KNOWN].ids:
            raise UserError(f"no image of '{self.known.spec}' has one of its known classes: nothing can be judged")
        if self.fit is None:
            return None
        fit, _ = of_known_classes(encoder.encode(self.fit, "fit", limit=self.config.fit_limit, title="Encoding fit"))
        if not fit.ids:
            raise UserError(f"no image of '{self.fit.spec}' has a known class: pass others with --fit, or --fit none")
        require_apart(self.encoded[KNOWN], fit, self.known.spec, self.fit.spec)
        return fit

    def _leave_out_known(self, name: str, spec: str) -> None:
        """Leave the images of known classes out of a set of unknown ones, and remember how many of which."""
        found = self.encoded[name]
        self.encoded[name], counts = found.rows((found.labels < 0).nonzero().flatten()), Counter(found.labels.tolist())
        self.known_after_all[name] = {
            self.known.class_names[label]: count for label, count in sorted(counts.items()) if label >= 0
        }
        if not self.encoded[name].ids:
            classes = some_of(self.known_after_all[name])
            raise UserError(f"every image of '{spec}' is of a known class ({classes}): pass others to --ood")

    def _word_embeddings(self) -> Tensor | None:
        wanted = any("words" in find_score(name).needs for name in self.config.scores)
        if not wanted or not self.words or self.classifier.vlm is None:
            return None
        self.observer.begin(f"Embedding {len(self.words):,} words", None, 0)
        path = self.folder.features_path / "words.safetensors"
        return embed_words(self.classifier.vlm, self.words, self.known.templates, path, owner=self.manifest)

    def _remarks(self, sets: Sequence[Scored], fit: Encoded | None, panel: Panel) -> Iterator[Check]:
        """Yield what the reader has to know of the data, the words and the scores."""
        yield from of_unknown_sets(self.unknown, self.known_after_all, self.encoded)
        if self._from_words(panel):
            yield from of_words(self.naming, oracle=self.config.oracle_words)
        yield from of_antibodies(self.classifier, self.unknown)
        yield from remarks(self.encoded, fit, panel)
        yield from of_constant_scores(sets)

    def _from_words(self, panel: Panel) -> bool:
        return any("words" in find_score(name).needs for name in self.config.scores if name in panel.detectors)

    def _scored(self, name: str, source: DataSource, panel: Panel) -> Scored:
        found = self.encoded[name]
        return Scored(
            name,
            found.ids,
            [source.group(sample_id) for sample_id in found.ids],
            found.labels.tolist() if name == KNOWN else [-1] * len(found.ids),
            panel.predictions(found).tolist(),
            measures.as_arrays(panel.scores(found)),
        )

    def _under_attack(
        self, panel: Panel, sets: Sequence[Scored], thresholds: dict[str, float]
    ) -> tuple[list[AttackedScore], Adversarial | None, list[Check]]:
        """Attack the scores, and find out which of them notice adversarial images; nothing without --under-attack."""
        config = self.config.under_attack
        if config is None:
            return [], None, []
        ledger = AttackLedger(self.folder)
        try:
            work = ScoreAttacks(
                config=config,
                attacks=self.attacks,
                classifier=self.classifier,
                panel=panel,
                thresholds=thresholds,
                clean={part.name: {k: torch.from_numpy(v) for k, v in part.scores.items()} for part in sets},
                encoded=self.encoded,
                ledger=ledger,
                observer=self.observer,
                seed=self.config.seed,
            )
            work.run([Target(source, name, name == KNOWN) for name, source in self._sources()])
            write_rows(self.folder.attacked_path, ledger.table())
            found = measures.summarise_attacks(ledger, config.scores, thresholds, sets[0], sets[1:])
            return found, self._adversarial(config, panel, sets[0]), ledger.checks
        finally:
            ledger.close()

    def _adversarial(self, config: UnderAttack, panel: Panel, known: Scored) -> Adversarial | None:
        """Fool the classifier on known images that it gets right, and see which scores notice."""
        right = {
            name for name, label, said in zip(known.ids, known.labels, known.predictions, strict=True) if label == said
        }
        images = Images(
            self.known,
            limit=config.limit,
            resolution=self.classifier.framing,
        )
        pictures = [p for p in images.stream(lambda name: name in right) if isinstance(p, Picture) and p.id in right]
        if not pictures:
            return None
        self.observer.begin(f"{self.attacks[0].name}, misclassify", None, 0)
        threat = ThreatModel(config.norm, config.eps)
        fooled = kept(
            self.folder.features_path / "adversarial.safetensors",
            lambda: fool(self.classifier, pictures, self.attacks[0], threat, lanes=config.lanes, seed=self.config.seed),
            owner=self.manifest,
        )
        if not fooled.ids:
            return None
        groups = [self.known.group(name) for name in fooled.ids]
        scores = measures.as_arrays(panel.scores(fooled))
        part = Scored("adversarial", fooled.ids, groups, fooled.labels.tolist(), [-1] * len(groups), scores)
        return measures.summarise_adversarial(known, part, [picture.id for picture in pictures])

    def _summary(
        self,
        panel: Panel,
        sets: Sequence[Scored],
        fit: Encoded | None,
        thresholds: dict[str, float],
        *,
        checks: list[Check],
    ) -> DetectSummary:
        known, unknown = sets[0], sets[1:]
        scores = measures.summarise_scores(
            known,
            unknown,
            thresholds=thresholds,
            microseconds=panel.microseconds,
            draws=self.config.draws,
            seed=self.config.seed,
        )
        right = sum(a == b for a, b in zip(known.labels, known.predictions, strict=True))
        config = self.config.under_attack
        return DetectSummary(
            known=self._set_summary(KNOWN, self.known, self.encoded[KNOWN]),
            unknown=[self._set_summary(name, source, self.encoded[name]) for name, source in self.unknown],
            fit=None if fit is None or self.fit is None else self._set_summary("fit", self.fit, fit),
            left_out=self.left_out,
            classes=len(self.known.class_names),
            accuracy=rate(right, len(known)),
            scores=scores,
            skipped=panel.skipped,
            best=measures.best_score(scores),
            encode_ms=mean_time(self.encoded),
            own=measures.own_decision(known, unknown),
            words=WordsSummary(used=len(self.words), naming=self.naming, oracle=self.config.oracle_words)
            if self._from_words(panel)
            else None,
            eps_text=None if config is None else config.eps_text,
            norm=None if config is None else config.norm,
            seconds=0.0,
            checks=checks,
            unreadable=[image for part in self.encoded.values() for image in part.unreadable],
        )

    def _set_summary(self, name: str, source: DataSource, found: Encoded) -> SetSummary:
        groups = {source.group(sample_id) for sample_id in found.ids}
        return SetSummary(
            name=name,
            spec=source.spec,
            images=len(found.ids),
            groups=len(groups),
            unreadable=len(found.unreadable),
        )


# A detect run that is ready to start, or to go on


@dataclass(frozen=True, eq=False)
class PreparedDetect:
    """A detect run that is ready to start.

    Args:
        config: its settings; folder: where it goes; manifest: what is written first.
        classifier: the model; known: images of known classes; unknown: sets of other images, by name.
        fit: images to learn from, None for none; words: outside the known classes.
        naming: words that name a class of an unknown set, with the set's name: left out, unless oracles are asked for.
        attacks: on scores, empty without --under-attack; batch_size: images per encoder pass.
    """

    config: DetectConfig
    folder: RunFolder
    manifest: Manifest
    classifier: Classifier
    known: DataSource
    unknown: list[tuple[str, Unlabelled]]
    fit: DataSource | None
    words: tuple[str, ...]
    naming: dict[str, str]
    attacks: list[LaneAttack]
    batch_size: int

    def run(
        self, observer: DetectObserver | None = None, *, fresh: bool = False, resume: bool = False
    ) -> DetectSummary:
        """Start or continue the run, write its files and return the summary; of a finished run, return its summary."""
        with self.folder.opened(self.manifest, fresh=fresh, resume=resume) as manifest:
            if not self.folder.finished:
                session = Session(
                    config=self.config,
                    manifest=manifest,
                    folder=self.folder,
                    classifier=self.classifier,
                    known=self.known,
                    unknown=self.unknown,
                    fit=self.fit,
                    words=self.words,
                    naming=self.naming,
                    attacks=self.attacks,
                    batch_size=self.batch_size,
                    observer=observer or DetectObserver(),
                )
                session.run()
            if not self.folder.report_path.exists():  # also after a crash between the last two files
                write_detect_report(self.folder.path)
            return load_detect_run(self.folder.path).summary


# From the words of a command to a detect run; every mistake is found before any work begins


def prepare_detect(
    settings: Settings, *, out: Path = Path("runs"), name: str | None = None, command: str = ""
) -> PreparedDetect:
    """Check all settings, open the data, load the model and return a run that is ready to start.

    Example:
        >>> import tempfile
        >>> run = prepare_detect(Settings(limit=8, scores="mcm", draws=100, fit="none"), out=Path(tempfile.mkdtemp()))
        >>> [at.unknown for at in run.run().scores[0].on]
        ['near', 'far']
    """
    settings.checked()
    if current_ranks().size > 1:
        raise UserError("`robustvlm detect` works in one process: start it without torchrun")
    if name is not None:
        RunFolder(out, name)
    device = str(resolve_device(settings.device))
    known = open_data(settings.known_spec, classes=settings.classes, templates=settings.templates, tree=settings.tree)
    unknown = [(named, open_unlabelled(named.spec, known.class_names)) for named in settings.unknown_sets()]
    fit = None if settings.fit_spec is None else _open_fit(settings, known)
    words = outside(read_words(settings.words) if settings.words else tree_words(), known.class_names, known.tree)
    naming = {word: named.name for named, source in reversed(unknown) for word in same_things(words, source.things())}
    if not settings.oracle_words:
        words = tuple(word for word in words if word not in naming)
    classifier = load_classifier(settings.model, known.class_names, known.templates, device=device)
    if settings.asks_own and not classifier.can_reject:
        raise UserError("the model never refuses, so it has no score of its own: leave out own in --scores")
    probe = probe_of(classifier, known.class_names, known.templates)
    under_attack = settings.under_attack_config(may_refuse=classifier.can_reject)
    if under_attack is not None:
        open_gradients(classifier)
    config = DetectConfig(
        model=settings.model,
        known=settings.known_spec,
        unknown=[named for named, _ in unknown],
        fit=settings.fit_spec,
        scores=list(settings.catalogue()),
        words=fingerprint({}, words),
        oracle_words=settings.oracle_words,
        temperature=settings.temperature,
        classes=_text(settings.classes),
        templates=_text(settings.templates),
        tree=_text(settings.tree),
        limit=settings.limit,
        fit_limit=settings.fit_limit,
        draws=settings.draws,
        seed=settings.seed,
        device=device,
        under_attack=under_attack,
    )
    attacked = [item.name for item in settings.attacks() if is_foreign(item)] if settings.under_attack else []
    model_facts = facts_of(classifier, "can_reject") | code_facts([*config.scores, *attacked])
    data_facts = describe_data(known) | {
        "unknown": {named.name: source.fingerprint() for named, source in unknown},
        "fit": None if fit is None else fit.fingerprint(),
    }
    identity = config.model_dump() | {"model facts": model_facts, "data facts": data_facts}
    folder = RunFolder(out, name or default_name("detect", settings.model, settings.known_spec, identity))
    manifest = make_manifest(
        kind="detect",
        name=folder.name,
        command=command,
        config=config,
        model=model_facts,
        data=data_facts,
        probe=probe,
    )
    others = [
        remark for source in (*(source for _, source in unknown), *([fit] if fit else [])) for remark in source.remarks
    ]
    manifest["remarks"] = list(dict.fromkeys([*remarks_of(known, classifier.vlm), *others]))
    return PreparedDetect(
        config=config,
        folder=folder,
        manifest=manifest,
        classifier=classifier,
        known=known,
        unknown=[(named.name, source) for named, source in unknown],
        fit=fit,
        words=words,
        naming=naming,
        attacks=settings.attacks() if under_attack is not None else [],
        batch_size=settings.batch_size,
    )


def _open_fit(settings: Settings, known: DataSource) -> DataSource:
    """Open the images to learn from; their classes must be those of the known set."""
    assert settings.fit_spec is not None
    fit = open_data(settings.fit_spec, classes=settings.classes)
    if fit.class_names != known.class_names:
        raise UserError(
            f"'{settings.fit_spec}' has other classes than '{settings.known_spec}' ({_first_difference(fit, known)}): "
            "pass images of the same classes with --fit, or --fit none"
        )
    return fit


def _first_difference(one: DataSource, other: DataSource) -> str:
    if len(one.class_names) != len(other.class_names):
        return f"{len(one.class_names)} instead of {len(other.class_names)}"
    pairs = zip(one.class_names, other.class_names, strict=True)
    return next(f"'{a}' instead of '{b}'" for a, b in pairs if a != b)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
