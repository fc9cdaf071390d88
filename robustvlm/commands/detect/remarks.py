"""What the reader of a detect run has to know of its data."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from robustvlm.commands.detect.encoding import Encoded
from robustvlm.commands.detect.measures import Scored, title_of
from robustvlm.commands.detect.scoring import Panel, copies_of
from robustvlm.commands.detect.summary import KNOWN, ScoreSummary
from robustvlm.data.names import readings, same_things, some_of
from robustvlm.data.specs import Unlabelled, is_code
from robustvlm.defenses import Classifier
from robustvlm.detect import AdaNeg
from robustvlm.runs.records import Check

# Below this, percentile intervals of rates at the ends of the scale are known to be too short.
_FEW = 50


def of_unknown_sets(
    unknown: Sequence[tuple[str, Unlabelled]], known: Mapping[str, Mapping[str, int]], encoded: Mapping[str, Encoded]
) -> Iterator[Check]:
    """Yield findings about sets of unknown images: known classes in them, images that are known ones, no names."""
    for name, source in unknown:
        counts = known.get(name, {})
        if counts:
            classes = some_of(f"{class_name} ({count:,})" for class_name, count in counts.items())
            count = sum(counts.values())
            message = f"{count:,} images of the set '{name}' are of known classes and were left out: {classes}."
            yield Check(name=f"known classes, in {name}", level="warning", message=message)
        copies = copies_of(encoded[name], encoded[KNOWN])
        if copies:
            message = (
                f"{copies:,} of {len(encoded[name].ids):,} images of the set '{name}' look to the model like images "
                "of --id: an image cannot be known and unknown, and no score can tell it from itself."
            )
            yield Check(name=f"known images, in {name}", level="warning", message=message)
        if not any(readings(thing) and not is_code(thing) for thing in source.things()):
            message = (
                f"The set '{name}' has no names for its classes: whether known classes are among them, or words name "
                "them, cannot be told."
            )
            yield Check(name=f"classes without names, in {name}", level="note", message=message)


def of_words(
    naming: Mapping[str, str],
    *,
    oracle: bool,
    what: str = "words",
    told: str = "NegLabel and S_DIS are told what they are tested on",
) -> Iterator[Check]:
    """Yield the finding that words name classes of unknown sets: left out, or an oracle."""
    if not naming:
        return
    sets = ", ".join(f"{count} of '{name}'" for name, count in Counter(naming.values()).items())
    if oracle:
        message = (
            f"Oracle: {len(naming)} {what} name classes of the unknown sets ({sets}: {some_of(naming)}) and were kept "
            f"(--oracle-words): {told}."
        )
        yield Check(name=f"oracle {what}", level="warning", message=message)
        return
    message = f"{len(naming)} {what} that name classes of the unknown sets were left out ({sets}): {some_of(naming)}."
    yield Check(name=what, level="note", message=message)


def of_own_texts(classifier: Classifier, unknown: Sequence[tuple[str, Unlabelled]]) -> Iterator[Check]:
    """Yield the finding that a model's own antibodies, or words it is tuned against, name unknown classes."""
    antibodies, negatives = getattr(classifier, "antibody_texts", ()), getattr(classifier, "negative_words", ())
    for name, source in unknown:
        if found := same_things(antibodies, source.things()):
            message = (
                f"Oracle: {len(found)} antibodies of the model name classes of the unknown set '{name}' "
                f"({some_of(found)}): its own score is told what it is tested on there."
            )
            yield Check(name=f"antibodies that name unknown classes, in {name}", level="warning", message=message)
        if found := same_things(negatives, source.things()):
            message = (
                f"Oracle: the prompts of the model's classes were learnt against {len(found)} words that name classes "
                f"of the unknown set '{name}' ({some_of(found)}): every score of its logits knows something of it."
            )
            yield Check(name=f"prompts learnt against unknown classes, in {name}", level="warning", message=message)


def of_constant_scores(sets: Sequence[Scored]) -> Iterator[Check]:
    """Yield scores that are the same for every image, whose AUROC of 0.5 is no measurement."""
    flat = [
        name for name in sets[0].scores if len(np.unique(np.concatenate([part.scores[name] for part in sets]))) == 1
    ]
    if flat:
        yield Check(
            name="constant scores",
            level="warning",
            message=f"The same for every image, so that they tell nothing: {', '.join(map(title_of, flat))}.",
        )


_BEYOND_CHANCE = 0.05


def of_familiar_strangers(
    scores: Sequence[ScoreSummary], sets: Sequence[Scored], thresholds: Mapping[str, float]
) -> Iterator[Check]:
    """Yield unknown sets that nearest neighbours tell from known images better than any score of the logits does.

    Things that the pre-training has seen look known to a head of class texts, however little they resemble the images
    of the classes; features of such images lie where those images do not (PT-OOD, arXiv 2310.00847). Beyond chance by
    the paired bootstrap, adjusted for all scores.
    """
    near = next((score for score in scores if score.name == "knn"), None)
    for place, part in enumerate(sets[1:]):
        found = None if near is None else near.on[place].versus
        if found is None or found.low <= 0 or found.p_holm >= _BEYOND_CHANCE:
            continue
        logits = part.scores[found.baseline] > thresholds[found.baseline]
        only = float((logits & ~(part.scores["knn"] > thresholds["knn"])).mean())
        message = (
            f"On '{part.name}' nearest neighbours tell unknown images better than any score of the logits (AUROC "
            f"+{found.difference:.3f} to {title_of(found.baseline)}, which accepts {only:.0%} of the set that they "
            "refuse): the head takes for known what the encoder has seen elsewhere. Do not rely on logits alone there."
        )
        yield Check(name=f"familiar strangers, in {part.name}", level="warning", message=message)


def of_memory(stream: Encoded | None, encoded: Mapping[str, Encoded], panel: Panel) -> Iterator[Check]:
    """Yield how many images of the stream AdaNeg remembers, copies that it remembers, or that nothing remembers any."""
    if stream is None:
        return
    detector = panel.detectors.get("adaneg")
    if not isinstance(detector, AdaNeg):
        why = panel.skipped.get("adaneg")
        cure = "pass --scores all,adaneg" if why is None else f"'adaneg' cannot be used here ({why})"
        message = f"The images of --stream were read for nothing: no score remembers them; {cure}."
        yield Check(name="memory", level="warning", message=message)
        return
    count = detector.remembered
    message = f"AdaNeg remembers {count:,} of the {len(stream.ids):,} images of the stream."
    yield Check(name="memory", level="note" if count else "warning", message=message)
    for name, found in encoded.items():
        copies = copies_of(found, stream)
        if copies:
            message = (
                f"{copies:,} images of the set '{name}' look to the model like some of --stream, which came in before."
            )
            yield Check(name=f"copies of the stream, in {name}", level="warning", message=message)


def remarks(
    encoded: Mapping[str, Encoded], fit: Encoded | None, panel: Panel, sets: Sequence[Scored]
) -> Iterator[Check]:
    """Yield findings: images that were learnt from, classes without images, sets too small for their intervals."""
    groups = {part.name: set(part.groups) for part in sets}
    for name, found in encoded.items():
        copies = copies_of(found, fit)
        if copies:
            message = (
                f"{copies:,} of {len(found.ids):,} images of the set '{name}' look to the model like images of "
                "--fit: scores that learn from images know them by heart."
            )
            yield Check(name=f"images learnt from, in {name}", level="warning", message=message)
        drawings = len(groups[name])
        if drawings < _FEW:
            of = "" if drawings == len(found.ids) else f" of {drawings:,} things"
            message = f"The set '{name}' has {len(found.ids)} images{of}: bootstrap intervals are too short on so few."
            yield Check(name=f"few images, in {name}", level="note", message=message)
    if fit is not None:
        seen, classes = len(fit.labels.unique()), len(panel.head.class_embeddings)
        if seen < classes:
            message = (
                f"The images to learn from show {seen} of {classes} classes: scores that learn from images take known "
                "images of the other classes for unknown ones."
            )
            yield Check(name="classes without images", level="warning", message=message)
    if len(encoded[KNOWN].labels.unique()) < 2:
        yield Check(
            name="one class", level="note", message="All known images are of one class: results are about that class."
        )
