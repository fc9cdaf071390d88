"""Known images under common corruptions: which scores refuse them, and whether they refuse the right ones."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from robustvlm.commands.detect import measures
from robustvlm.commands.detect.encoding import Views
from robustvlm.commands.detect.measures import Scored
from robustvlm.commands.detect.summary import CorruptedKnown, CorruptedScore, DetectSummary, RefusedUnder
from robustvlm.data.corruptions import NAMES, Corruption, weights_of
from robustvlm.report import sections as doc
from robustvlm.report.words import DASH, as_rate, count_of, percent, plain
from robustvlm.stats import Rate, mean_share, worth_of

Array = NDArray[np.float64]


def views_of(corruption: Corruption) -> Views:
    """Return what stands in place of an image: the image corrupted."""
    return lambda pixels, name: corruption(pixels, name)[None]


def summarise(
    known: Scored, under: Mapping[Corruption, Scored], thresholds: Mapping[str, float], side: int
) -> CorruptedKnown:
    """Return the shares of the known images that every score refuses, at the threshold that it is deployed with.

    Args:
        known: the images without corruption. under: the same images under each corruption, in the same order.
        thresholds: by score; refused are values not above it.
    """
    corruptions = list(under)
    weights = np.array(weights_of(corruptions))
    labels, worth = np.array(known.labels), worth_of(known.groups)
    right = np.array([np.array(part.predictions) == labels for part in under.values()])
    refused = {
        name: np.array([~(part.scores[name] > thresholds[name]) for part in under.values()]) for name in known.scores
    }
    found = [
        RefusedUnder(
            name=one.name,
            severity=one.severity,
            right=measures.share(right[row], known.groups),
            refused={name: measures.share(table[row], known.groups) for name, table in refused.items()},
        )
        for row, one in enumerate(corruptions)
    ]
    scores = [
        CorruptedScore(
            name=name,
            title=measures.title_of(name),
            clean=measures.share(~(known.scores[name] > thresholds[name]), known.groups),
            refused=mean_share((weights @ table).tolist(), independent=worth),
            of_right=_within(weights, table, right),
            of_wrong=_within(weights, table, ~right),
        )
        for name, table in refused.items()
    ]
    accuracy = mean_share((weights @ right).tolist(), independent=worth)
    return CorruptedKnown(side=side, images=len(known), right=accuracy, scores=scores, found=found)


def _within(weights: Array, refused: NDArray[np.bool_], chosen: NDArray[np.bool_]) -> float | None:
    """Return the share refused [C, N] among the chosen [C, N], corruptions weighted; None where there are none."""
    total = float((weights @ chosen).sum())
    return float((weights @ (refused & chosen)).sum()) / total if total else None


# What is said of it


def sentence(summary: DetectSummary, shown: str) -> str:
    """Say in one sentence what the shown score does to corrupted known images; nothing without them."""
    found = summary.corrupted
    if found is None:
        return ""
    score = next(one for one in found.scores if one.name == shown)
    parts = [
        f"{percent(share)} of those then classified {how}"
        for how, share in (("right", score.of_right), ("wrong", score.of_wrong))
        if share is not None
    ]
    return (
        f"Under common corruptions {score.title} refuses {percent(score.refused.value)} of the known images "
        f"({percent(score.clean.value)} without): {' and '.join(parts)}."
    )


def section(summary: DetectSummary, shown: str) -> Iterator[doc.Section]:
    """Yield the section of the report: every score over all corruptions, and the shown one under each."""
    found = summary.corrupted
    if found is None:
        return
    lead = (
        "Known images as they may come, refused at the threshold of the clean ones. A refusal is right where the class "
        "would have been wrong, and a loss where it would have been right."
    )
    columns = [doc.Column("Score"), *doc.numbers("clean", "corrupted")]
    columns += [doc.Column(how, number=True, group="corrupted, classified") for how in ("right", "wrong")]
    rows: list[doc.Row] = [
        (
            one.title,
            doc.Measure.bare(one.clean),
            doc.Measure.of(as_rate(one.refused)),
            *(doc.Measure.bare(share) for share in (one.of_right, one.of_wrong)),
        )
        for one in found.scores
    ]
    caption = (
        f"Share refused of {count_of(found.images, 'known images')}, {percent(found.right.value)} of them classified "
        f"right when corrupted; every kind counts alike. Severities are those of images of {found.side} pixels."
    )
    title = next(one.title for one in found.scores if one.name == shown)
    blocks: list[doc.Block] = [
        doc.Text(lead, kind="lead"),
        doc.Table(columns, rows, title="Corrupted known images, refused", caption=caption),
        _each(found.found, f"Refused by {plain(title, 40)}", lambda one: one.refused[shown]),
        _each(found.found, "Classified right", lambda one: one.right),
    ]
    yield doc.Section("Under common corruptions", blocks, key="corruptions", short="Corruptions")


def _each(found: Sequence[RefusedUnder], title: str, share: Callable[[RefusedUnder], Rate]) -> doc.Table:
    """Return a share under each corruption: kinds by severities."""
    severities = sorted({one.severity for one in found})
    cells = {(one.name, one.severity): doc.Measure.bare(share(one)) for one in found}
    rows: list[doc.Row] = [
        (name.replace("-", " "), *(cells.get((name, severity), DASH) for severity in severities))
        for name in NAMES
        if any((name, severity) in cells for severity in severities)
    ]
    heads = [doc.Column(str(severity), number=True, group="severity") for severity in severities]
    return doc.Table([doc.Column("Corruption"), *heads], rows, title=title)
