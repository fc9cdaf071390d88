"""The work of a detect run: encode every set, score it, attack the scores, and write down what was found."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robustvlm.attacks import LaneAttack, ThreatModel
from robustvlm.data.source import DataSource
from robustvlm.data.unlabelled import Unlabelled
from robustvlm.defenses import Classifier
from robustvlm.detect import find_score
from robustvlm.errors import UserError
from robustvlm.evaluation.detecting import attacked_summary, summarising
from robustvlm.evaluation.detecting.adversarial import fool
from robustvlm.evaluation.detecting.attacking import KNOWN, ScoreAttacks, Target
from robustvlm.evaluation.detecting.encoding import Encoded, Encoder, embed_words, kept
from robustvlm.evaluation.detecting.gallery import save_mistakes
from robustvlm.evaluation.detecting.ledger import AttackLedger
from robustvlm.evaluation.detecting.observer import DetectObserver
from robustvlm.evaluation.detecting.remarks import (
    of_antibodies,
    of_constant_scores,
    of_unknown_sets,
    of_words,
    remarks,
    some_of,
)
from robustvlm.evaluation.detecting.scoring import Panel, make_panel, mean_time, of_known_classes, require_apart
from robustvlm.evaluation.detecting.summarising import Scored
from robustvlm.evaluation.images import Images, Picture
from robustvlm.runs.checksums import forget_checksums, write_checksums
from robustvlm.runs.detect_config import DetectConfig, UnderAttack
from robustvlm.runs.detect_summary import OWN, Adversarial, AttackedScore, DetectSummary, SetSummary, WordsSummary
from robustvlm.runs.files import write_text
from robustvlm.runs.folder import RunFolder
from robustvlm.runs.manifest import Manifest
from robustvlm.runs.results import write_rows
from robustvlm.runs.summary import Check
from robustvlm.stats import rate


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
        sets = summarising.usable([self._scored(name, source, panel) for name, source in self._sources()], panel)
        thresholds = summarising.thresholds_of(sets[0])
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
        write_rows(self.folder.results_path, summarising.rows_of(sets))
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
            summarising.as_arrays(panel.scores(found)),
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
            found = attacked_summary.summarise_attacks(ledger, config.scores, thresholds, sets[0], sets[1:])
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
        scores = summarising.as_arrays(panel.scores(fooled))
        part = Scored("adversarial", fooled.ids, groups, fooled.labels.tolist(), [-1] * len(groups), scores)
        return attacked_summary.summarise_adversarial(known, part, [picture.id for picture in pictures])

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
        scores = summarising.summarise_scores(
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
            best=summarising.best_score(scores),
            encode_ms=mean_time(self.encoded),
            own=summarising.own_decision(known, unknown),
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
