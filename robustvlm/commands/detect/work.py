"""The work of `robustvlm detect`: encode every set, score it, attack the scores, and write down what was found."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from robustvlm.attacks import LaneAttack
from robustvlm.attacks.catalog import is_foreign
from robustvlm.attacks.honesty import open_gradients
from robustvlm.commands.common import inputs
from robustvlm.commands.common.inputs import code_facts, describe_data, facts_of, probe_of, remarks_of
from robustvlm.commands.detect import (
    DetectSettings,
    adversarial,
    corrupted,
    cropping,
    measures,
    promised,
    remarks,
    scoring,
)
from robustvlm.commands.detect import summary as record
from robustvlm.commands.detect.attack import AttackLedger, ScoreAttacks, Target
from robustvlm.commands.detect.encoding import Answers, Encoded, Encoder, embed_words
from robustvlm.commands.detect.measures import Scored, save_mistakes
from robustvlm.commands.detect.promised_attack import attack_promises
from robustvlm.commands.detect.summary import parse_condition
from robustvlm.commands.detect.view import detect_report as report_of
from robustvlm.commands.detect.view import read_run, show, write_report
from robustvlm.core import files, object_graph, ranks, size
from robustvlm.data import DataSource, open_data, select
from robustvlm.data.corruptions import Corruption, parse_corruptions, table_side, written
from robustvlm.data.names import same_things, some_of
from robustvlm.data.specs import Unlabelled, open_unlabelled
from robustvlm.defenses import Classifier, load_classifier
from robustvlm.detect import find_score
from robustvlm.detect.words import words_outside
from robustvlm.errors import UserError, setting
from robustvlm.runs.records import Check, write_rows
from robustvlm.runs.run import Facts, Session
from robustvlm.stats import rate, worth_of

__all__ = ["RESULTS", "open_work", "parse_condition", "read_run", "report_of", "show", "write_report"]

RESULTS = ("summary.json", "results.parquet")


@dataclass(frozen=True, eq=False)
class Sets:
    """What the model says of every set of images.

    Args:
        encoded: the known images, and the unknown ones by the name of their set. fit: those to learn from.
            stream: those that came in before, whatever they show.
        left_out: known images without a known class; known_after_all: images of known classes in unknown sets, by set
            and class.
    """

    encoded: Mapping[str, Encoded]
    fit: Encoded | None
    stream: Encoded | None
    left_out: int
    known_after_all: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True, eq=False)
class DetectWork:
    """A run's facts, model and data.

    Args:
        scores: of the catalogue; under_attack: how scores are attacked, None for not at all, by `attacks`.
        known: images of known classes; unknown: sets of other images, by name; fit: images to learn from.
        stream: images that came in before.
        words: outside the known classes.
        naming: words that name a class of an unknown set, with the set's name: left out, unless oracles are asked for.
        negatives: the model's own negative prompts.
    """

    facts: Facts
    settings: DetectSettings
    scores: tuple[str, ...]
    classifier: Classifier
    known: DataSource
    unknown: list[tuple[str, Unlabelled]]
    fit: DataSource | None
    stream: DataSource | None
    words: tuple[str, ...]
    naming: dict[str, str]
    under_attack: record.UnderAttack | None
    attacks: list[LaneAttack]
    corruptions: tuple[Corruption, ...] = ()
    promise: promised.Level | None = None
    negatives: scoring.LearntWords = field(default_factory=scoring.LearntWords)

    def run(self, session: Session) -> None:
        """Do what is left to do, and write results, summary and pictures; the report is made from these."""
        began = time.monotonic()
        answers = Answers(self.classifier, batch_size=self._batch_size())
        encoder = Encoder(
            answers,
            session.folder.features_path,
            owner=session.manifest,
            seed=self.settings.seed,
            observer=session.observer,
        )
        found = self._encode(encoder)
        panel = scoring.make_panel(
            self.classifier,
            self.known.templates,
            self.scores,
            found.fit,
            self._word_embeddings(session),
            stream=found.stream,
            crops=self._crops(encoder, found.fit),
            negatives=self.negatives.embeddings,
            temperature=self.settings.temperature,
        )
        sets = measures.usable([self._scored(name, source, found, panel) for name, source in self._sources()], panel)
        thresholds = measures.thresholds_of(sets[0])
        under = self._under_corruptions(encoder, panel, sets[0])
        rules = None
        if self.promise is not None:
            rules = promised.rules_of(sets[0], self.promise, len(self.known.class_names))
        attacked, noticed, wrong, checks = self._attacked(panel, answers, sets, thresholds, found, session, rules)
        promises = None
        if rules is not None:
            promises = promised.summarise(rules, sets[0], sets[1:], self.known.class_names, wrong)
        checks = [*self._remarks(sets, found, panel), *checks, *promised.remarks(promises)]
        summary = self._summary(panel, sets, found, thresholds, checks=checks)
        familiar = remarks.of_familiar_strangers(summary.scores, sets, thresholds)
        summary = summary.model_copy(update={"checks": [*summary.checks, *familiar]})
        shown = record.OWN if panel.may_refuse else summary.best
        save_mistakes(
            session.folder.gallery_path,
            [(part, source) for part, (_, source) in zip(sets, self._sources(), strict=True)],
            shown,
            thresholds[shown],
            framing=self.classifier.framing,
        )
        if under:
            side = table_side(min(size.sides(self.classifier.image_size)))
            found_under = corrupted.summarise(sets[0], under, thresholds, side)
            summary = summary.model_copy(update={"corrupted": found_under})
        summary = summary.model_copy(
            update={
                "attacked": attacked,
                "adversarial": noticed,
                "promised": promises,
                "seconds": time.monotonic() - began,
            }
        )
        with session.results() as folder:
            write_rows(session.folder.results_path, measures.rows_of(sets))
            if under:
                write_rows(folder / "corrupted.parquet", measures.rows_of(list(under.values())))
            session.folder.report_path.unlink(missing_ok=True)
            files.write_text(session.folder.summary_path, summary.model_dump_json(indent=2) + "\n")

    def _sources(self) -> list[tuple[str, DataSource]]:
        return [(record.KNOWN, self.known), *self.unknown]

    def _batch_size(self) -> int:
        """Return how many images are asked about at a time: no more than the largest set has."""
        limits = [(source, self.settings.limit) for _, source in self._sources()]
        limits += [(self.fit, self.settings.fit_limit)] if self.fit is not None else []
        limits += [(self.stream, None)] if self.stream is not None else []
        listed = [(source.ids(), limit) for source, limit in limits]
        counts = [limit if ids is None else len(select(ids, limit)) for ids, limit in listed]
        return min(self.settings.batch_size, max(self.settings.batch_size if n is None else n for n in counts))

    def _encode(self, encoder: Encoder) -> Sets:
        """Encode every set, those of unknown images and those to learn from without the images that are not."""
        encoded: dict[str, Encoded] = {}
        known_after_all: dict[str, dict[str, int]] = {}
        for number, (name, source) in enumerate(self._sources()):
            file = f"unknown-{number}" if number else record.KNOWN
            encoded[name] = encoder.encode(source, file, limit=self.settings.limit, title=f"Encoding {name}")
            if number:
                encoded[name], known_after_all[name] = self._without_known(encoded[name], source.spec)
        encoded[record.KNOWN], left_out = scoring.of_known_classes(encoded[record.KNOWN])
        if not encoded[record.KNOWN].ids:
            raise UserError(f"no image of '{self.known.spec}' has one of its known classes: nothing can be judged")
        fit, stream = self._encode_fit(encoder, encoded[record.KNOWN]), self._encode_stream(encoder, encoded)
        return Sets(encoded, fit, stream, left_out, known_after_all)

    def _under_corruptions(self, encoder: Encoder, panel: scoring.Panel, known: Scored) -> dict[Corruption, Scored]:
        """Return the known images under every corruption, scored as those without are."""
        under = {}
        for one in self.corruptions:
            file, title = f"corrupted-{one.name}-{one.severity}", f"Encoding {record.KNOWN}, {one.text}"
            made = encoder.encode(
                self.known, file, limit=self.settings.limit, title=title, views=corrupted.views_of(one)
            )
            found, _ = scoring.of_known_classes(made)
            scored = self._scored_of(one.text, self.known, found, panel, labels=found.labels.tolist())
            under[one] = replace(scored, scores={name: scored.scores[name] for name in known.scores})
        return under

    def _encode_fit(self, encoder: Encoder, known: Encoded) -> Encoded | None:
        if self.fit is None:
            return None
        limit = self.settings.fit_limit
        fit, _ = scoring.of_known_classes(encoder.encode(self.fit, "fit", limit=limit, title="Encoding fit"))
        if not fit.ids:
            none = setting("fit", "none")
            raise UserError(
                f"no image of '{self.fit.spec}' has a known class: pass others with {setting('fit')}, or {none}"
            )
        scoring.require_apart(known, fit, self.known.spec, self.fit.spec)
        return fit

    def _encode_stream(self, encoder: Encoder, judged: Mapping[str, Encoded]) -> Encoded | None:
        if self.stream is None:
            return None
        stream = encoder.encode(self.stream, "stream", limit=None, title="Encoding stream")
        if not stream.ids:
            raise UserError(f"'{self.stream.spec}' holds no image: pass others with {setting('stream')}")
        specs = {name: source.spec for name, source in self._sources()}
        scoring.require_before(stream, self.stream.spec, {name: (found, specs[name]) for name, found in judged.items()})
        return stream

    def _crops(self, encoder: Encoder, fit: Encoded | None) -> tuple[Tensor, Tensor] | None:
        """Return crops of some images to learn from, with their labels, if a score wants any."""
        if "krnft" not in self.scores or self.fit is None or fit is None or fit.features is None or not self.words:
            return None
        wanted, seed = cropping.few_of_each(fit, seed=self.settings.seed), self.settings.seed
        found = encoder.encode(
            self.fit,
            "crops",
            limit=self.settings.fit_limit,
            title=f"Encoding {cropping.CROPS} crops of each of {len(wanted):,} images",
            only=wanted,
            views=cropping.random_crops(seed),
        )
        return cropping.by_image(cropping.require_all(found, wanted, self.fit.spec))

    def _without_known(self, found: Encoded, spec: str) -> tuple[Encoded, dict[str, int]]:
        """Return a set of unknown images without those of known classes, and how many of which these were."""
        counts = Counter(found.labels.tolist())
        known = {self.known.class_names[label]: count for label, count in sorted(counts.items()) if label >= 0}
        rest = found.rows((found.labels < 0).nonzero().flatten())
        if not rest.ids:
            raise UserError(
                f"every image of '{spec}' is of a known class ({some_of(known)}): pass others to {setting('ood')}"
            )
        return rest, known

    def _word_embeddings(self, session: Session) -> Tensor | None:
        wanted = any("words" in find_score(name).needs for name in self.scores)
        if not wanted or not self.words or self.classifier.vlm is None:
            return None
        session.observer.begin(f"Embedding {len(self.words):,} words")
        path = session.folder.features_path / "words.safetensors"
        return embed_words(self.classifier.vlm, self.words, self.known.templates, path, owner=session.manifest)

    def _remarks(self, sets: Sequence[Scored], found: Sets, panel: scoring.Panel) -> Iterator[Check]:
        """Yield what the reader has to know of the data, the words and the scores."""
        yield from remarks.of_unknown_sets(self.unknown, found.known_after_all, found.encoded)
        if self._needed("words", panel):
            yield from remarks.of_words(self.naming, oracle=self.settings.oracle_words)
        if self._needed("negatives", panel):
            told = "LAPT is told what it is tested on"
            oracle = self.settings.oracle_words
            yield from remarks.of_words(self.negatives.naming, oracle=oracle, what="negative prompts", told=told)
        yield from remarks.of_own_texts(self.classifier, self.unknown)
        yield from remarks.remarks(found.encoded, found.fit, panel, sets)
        yield from remarks.of_memory(found.stream, found.encoded, panel)
        yield from remarks.of_constant_scores(sets)

    def _needed(self, need: str, panel: scoring.Panel) -> bool:
        return any(need in find_score(name).needs for name in self.scores if name in panel.detectors)

    def _told(self, used: Sequence[str], naming: Mapping[str, str]) -> record.WordsSummary:
        return record.WordsSummary(used=len(used), naming=dict(naming), oracle=self.settings.oracle_words)

    def _scored(self, name: str, source: DataSource, sets: Sets, panel: scoring.Panel) -> Scored:
        found = sets.encoded[name]
        labels = found.labels.tolist() if name == record.KNOWN else [-1] * len(found.ids)
        return self._scored_of(name, source, found, panel, labels=labels)

    def _scored_of(
        self, name: str, source: DataSource, found: Encoded, panel: scoring.Panel, *, labels: list[int]
    ) -> Scored:
        return Scored(
            name,
            found.ids,
            [source.group(sample_id) for sample_id in found.ids],
            labels,
            panel.predictions(found).tolist(),
            measures.as_arrays(panel.scores(found)),
        )

    def _attacked(
        self,
        panel: scoring.Panel,
        answers: Answers,
        sets: Sequence[Scored],
        thresholds: dict[str, float],
        found: Sets,
        session: Session,
        rules: promised.Rules | None,
    ) -> tuple[list[record.AttackedScore], record.Adversarial | None, Mapping[str, record.WrongAnswers], list[Check]]:
        """Attack the scores, ask which of them notice adversarial images, and attack promised answers; if at all."""
        config = self.under_attack
        if config is None:
            return [], None, {}, []
        ledger = AttackLedger(session.folder)
        try:
            work = ScoreAttacks(
                config=config,
                attacks=self.attacks,
                classifier=self.classifier,
                panel=panel,
                thresholds=thresholds,
                clean={part.name: {k: torch.from_numpy(v) for k, v in part.scores.items()} for part in sets},
                encoded=found.encoded,
                ledger=ledger,
                observer=session.observer,
                seed=self.settings.seed,
            )
            work.run([Target(source, name, name == record.KNOWN) for name, source in self._sources()])
            wrong = attack_promises(work, rules, config.scores, sets[0], self.known) if rules is not None else {}
            write_rows(session.folder.attacked_path, ledger.table())
            attacked = measures.summarise_attacks(ledger, config.scores, thresholds, sets[0], sets[1:])
            seen, said = adversarial.noticed(
                config, self.attacks[0], answers, panel, sets[0], self.known, session, seed=self.settings.seed
            )
            return attacked, seen, wrong, [*ledger.checks, *said]
        finally:
            ledger.close()

    def _summary(
        self,
        panel: scoring.Panel,
        sets: Sequence[Scored],
        found: Sets,
        thresholds: dict[str, float],
        *,
        checks: list[Check],
    ) -> record.DetectSummary:
        known, unknown = sets[0], sets[1:]
        scores = measures.summarise_scores(
            known,
            unknown,
            thresholds=thresholds,
            microseconds=panel.microseconds,
            draws=self.settings.draws,
            seed=self.settings.seed,
        )
        right = sum(a == b for a, b in zip(known.labels, known.predictions, strict=True))
        config = self.under_attack
        return record.DetectSummary(
            known=self._set_summary(record.KNOWN, self.known, found.encoded[record.KNOWN]),
            unknown=[self._set_summary(name, source, found.encoded[name]) for name, source in self.unknown],
            fit=None if found.fit is None or self.fit is None else self._set_summary("fit", self.fit, found.fit),
            left_out=found.left_out,
            classes=len(self.known.class_names),
            accuracy=rate(right, len(known), independent=worth_of(known.groups)),
            scores=scores,
            skipped=panel.skipped,
            best=measures.best_score(scores),
            encode_ms=scoring.mean_time(found.encoded),
            own=measures.own_decision(known, unknown),
            words=self._told(self.words, self.naming) if self._needed("words", panel) else None,
            negatives=self._told(self.negatives.words, self.negatives.naming)
            if self._needed("negatives", panel)
            else None,
            eps_text=None if config is None else config.eps_text,
            norm=None if config is None else config.norm,
            seconds=0.0,
            checks=checks,
            unreadable=[image for part in found.encoded.values() for image in part.unreadable],
        )

    def _set_summary(self, name: str, source: DataSource, found: Encoded) -> record.SetSummary:
        groups = {source.group(sample_id) for sample_id in found.ids}
        return record.SetSummary(
            name=name,
            spec=source.spec,
            images=len(found.ids),
            groups=len(groups),
            unreadable=len(found.unreadable),
        )


def open_work(settings: DetectSettings) -> DetectWork:
    """Check all settings, open the data and load the model."""
    scoring.check(settings)
    corruptions = () if settings.corrupt is None else parse_corruptions(settings.corrupt)
    level = None if settings.promise is None else promised.read_level(settings.promise)
    device = str(ranks.resolve_device(settings.device))
    known = open_data(settings.known, classes=settings.classes, templates=settings.templates, tree=settings.tree)
    named = scoring.unknown_sets(settings)
    unknown = [(one.name, open_unlabelled(one.spec, known.class_names)) for one in named]
    fit = None if settings.learnt_from is None else _open_fit(settings, settings.learnt_from, known)
    stream = None if settings.stream is None else open_unlabelled(settings.stream)
    words = words_outside(known.class_names, known.tree, settings.words)
    naming = {word: name for name, source in reversed(unknown) for word in same_things(words, source.things())}
    if not settings.oracle_words:
        words = tuple(word for word in words if word not in naming)
    classifier = load_classifier(settings.model, known.class_names, known.templates, device=device)
    if scoring.asks_own(settings) and not classifier.can_reject:
        raise UserError(f"the model never refuses, so it has no score of its own: leave out own in {setting('scores')}")
    scores = scoring.scores_of(settings)
    negatives = scoring.LearntWords()
    if "lapt" in scores:
        negatives = scoring.negative_prompts(classifier, unknown, oracle=settings.oracle_words)
    under_attack = scoring.under_attack_of(settings, may_refuse=classifier.can_reject)
    if under_attack is not None:
        open_gradients(classifier)
    attacks = scoring.attacks_of(settings)
    config = settings.stored(
        unknown=[one.model_dump() for one in named],
        scores=list(scores),
        words=object_graph.fingerprint({}, words),
        device=device,
        under_attack=None if under_attack is None else under_attack.model_dump(),
        **({"corrupt": written(corruptions)} if corruptions else {}),
        **({"promise": level.text} if level else {}),
        **({"negatives": object_graph.fingerprint({}, negatives.words)} if negatives.words else {}),
    )
    for text in settings.fail_if:
        parse_condition(text).require(record.DetectConfig.model_validate(config), may_refuse=classifier.can_reject)
    beside = (*(source for _, source in unknown), *(one for one in (fit, stream) if one))
    others = [remark for source in beside for remark in source.remarks]
    facts = Facts(
        (settings.model, settings.known),
        config,
        facts_of(classifier, "can_reject") | code_facts([*scores, *(a.name for a in attacks if is_foreign(a))]),
        describe_data(known)
        | {
            "unknown": {name: source.fingerprint() for name, source in unknown},
            "fit": None if fit is None else fit.fingerprint(),
        }
        | ({} if stream is None else {"stream": stream.fingerprint()})
        | inputs.contents_of({f"unknown {name}": one for name, one in unknown} | {"fit": fit, "stream": stream}),
        probe=probe_of(classifier, known.class_names, known.templates),
        remarks=list(dict.fromkeys([*remarks_of(known, classifier), *others])),
    )
    return DetectWork(
        facts,
        settings,
        scores,
        classifier,
        known,
        unknown,
        fit,
        stream,
        words,
        naming,
        under_attack,
        attacks,
        corruptions,
        level,
        negatives,
    )


def _open_fit(settings: DetectSettings, spec: str, known: DataSource) -> DataSource:
    """Open the images to learn from; their classes must be those of the known set."""
    fit = open_data(spec, classes=settings.classes)
    if fit.class_names != known.class_names:
        raise UserError(
            f"'{spec}' has other classes than '{settings.known}' ({_first_difference(fit, known)}): pass images of the "
            f"same classes with {setting('fit')}, or {setting('fit', 'none')}"
        )
    return fit


def _first_difference(one: DataSource, other: DataSource) -> str:
    if len(one.class_names) != len(other.class_names):
        return f"{len(one.class_names)} instead of {len(other.class_names)}"
    pairs = zip(one.class_names, other.class_names, strict=True)
    return next(f"'{a}' instead of '{b}'" for a, b in pairs if a != b)
