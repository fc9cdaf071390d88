"""From the words of a command to a detect run; every mistake is found before any work begins."""

from __future__ import annotations

from pathlib import Path

from robustvlm.attacks.own import is_foreign
from robustvlm.attacks.straight_through import open_gradients
from robustvlm.core.ranks import current_ranks
from robustvlm.data import DataSource, open_data
from robustvlm.data.nouns import same_things
from robustvlm.data.unlabelled import open_unlabelled
from robustvlm.defenses import load_classifier
from robustvlm.detect import outside, read_words, tree_words
from robustvlm.errors import UserError
from robustvlm.evaluation.describe import code_facts, describe_data, facts_of, probe_of, remarks_of
from robustvlm.evaluation.detecting.run import PreparedDetect
from robustvlm.evaluation.detecting.settings import Settings
from robustvlm.models.device import resolve_device
from robustvlm.models.fingerprint import fingerprint
from robustvlm.runs.detect_config import DetectConfig
from robustvlm.runs.folder import RunFolder, default_name
from robustvlm.runs.manifest import make_manifest


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
