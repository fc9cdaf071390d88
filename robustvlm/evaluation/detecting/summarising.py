"""From the scores of all images to the summary: every metric with its interval, compared in pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor

from robustvlm.detect import BASELINES, Bootstrap, Interval, auroc_interval, difference, find_score, threshold_at_tpr
from robustvlm.detect.intervals import intervals_of
from robustvlm.detect.metrics import all_metrics
from robustvlm.errors import UserError
from robustvlm.evaluation.detecting.scoring import Panel
from robustvlm.runs.detect_summary import OWN, OWN_SDIS, Measured, OnSet, OwnDecision, ScoreSummary, Versus
from robustvlm.stats import Rate, holm, rate

Array = NDArray[np.float64]
_OF_THE_MODEL = {OWN: "the model's own", OWN_SDIS: "S_DIS of the model"}


@dataclass(frozen=True, eq=False)
class Scored:
    """The scores of one set: ids, groups, labels and predictions of its images, and every score by name [N]."""

    name: str
    ids: list[str]
    groups: list[str]
    labels: list[int]
    predictions: list[int]
    scores: dict[str, Array]

    def __len__(self) -> int:
        return len(self.ids)


def title_of(name: str) -> str:
    """Return a score's name as tables show it."""
    return _OF_THE_MODEL.get(name) or find_score(name).title


def usable(sets: Sequence[Scored], panel: Panel) -> list[Scored]:
    """Return the sets without the scores that are not finite for some image, which the panel then names as skipped.

    Raises UserError when no score is left.
    """
    bad = {
        name: sum(int((~np.isfinite(part.scores[name])).sum()) for part in sets)
        for name in sets[0].scores
        if not all(np.isfinite(part.scores[name]).all() for part in sets)
    }
    for name, count in bad.items():
        panel.detectors.pop(name, None)
        panel.skipped[name] = f"it is NaN or infinite for {count:,} images"
    if len(bad) == len(sets[0].scores):
        raise UserError(
            f"no score is finite for every image; the first, '{next(iter(bad))}', fails on {bad[next(iter(bad))]}"
        )
    kept = [name for name in sets[0].scores if name not in bad]
    return [replace(part, scores={name: part.scores[name] for name in kept}) for part in sets]


def decision_threshold(known: Array) -> float:
    """Return a threshold below which lie at most 5% of the known images; accepted are scores strictly above it.

    It is the float32 number below the score at 95% TPR, since a model's decision is a difference in float32.

    Example:
        >>> scores = np.arange(1.0, 101.0)
        >>> bool((scores > decision_threshold(scores)).mean() == 0.95)
        True
    """
    return float(np.nextafter(np.float32(threshold_at_tpr(known)), np.float32(-np.inf)))


def thresholds_of(known: Scored) -> dict[str, float]:
    """Return the threshold of every score; that of a model's own acceptance is 0."""
    return {name: 0.0 if name == OWN else decision_threshold(values) for name, values in known.scores.items()}


def summarise_scores(
    known: Scored,
    unknown: Sequence[Scored],
    *,
    thresholds: Mapping[str, float],
    microseconds: Mapping[str, float],
    draws: int,
    seed: int,
) -> list[ScoreSummary]:
    """Return every score's metrics on every set of unknown images, in the order of the catalogue."""
    on: dict[str, list[OnSet]] = {name: [] for name in known.scores}
    for other in unknown:
        for name, found in _on_set(known, other, draws=draws, seed=seed).items():
            on[name].append(found)
    return [
        ScoreSummary(
            name=name,
            title=title_of(name),
            source="" if name in _OF_THE_MODEL else find_score(name).where,
            needs=[] if name in _OF_THE_MODEL else list(find_score(name).needs),
            threshold=thresholds[name],
            microseconds=microseconds.get(name, 0.0),
            on=on[name],
        )
        for name in known.scores
    ]


def _on_set(known: Scored, other: Scored, *, draws: int, seed: int) -> dict[str, OnSet]:
    """Return every score's metrics on one set, all from the same bootstrap samples."""
    bootstrap = Bootstrap(known.groups, other.groups, n_draws=draws, seed=seed)
    found: dict[str, OnSet] = {}
    aurocs: dict[str, Array] = {}
    for name, values in known.scores.items():
        resampled = bootstrap.draws(values, other.scores[name])
        aurocs[name] = resampled["auroc"]
        intervals = intervals_of(all_metrics(values, other.scores[name]), resampled)
        intervals["auroc"] = auroc_interval(
            values, other.scores[name], known_groups=known.groups, unknown_groups=other.groups
        )
        found[name] = OnSet(
            unknown=other.name,
            auroc=measure(intervals["auroc"]),
            fpr95=measure(intervals["fpr95"]),
            aupr_in=measure(intervals["aupr_in"]),
            aupr_out=measure(intervals["aupr_out"]),
        )
    return _compared(found, aurocs)


def _compared(found: dict[str, OnSet], aurocs: Mapping[str, Array]) -> dict[str, OnSet]:
    """Set every score against the best other baseline of this set, p-values adjusted for the number of comparisons."""
    rivals = {name: _best_baseline(found, name) for name in found}
    gaps = {
        name: difference(found[name].auroc.value - found[rival].auroc.value, aurocs[name] - aurocs[rival])
        for name, rival in rivals.items()
        if rival is not None
    }
    adjusted = dict(zip(gaps, holm([gap.p_value for gap in gaps.values()]), strict=True))
    for name, gap in gaps.items():
        versus = Versus(
            baseline=str(rivals[name]),
            difference=gap.value,
            low=gap.low,
            high=gap.high,
            p_value=gap.p_value,
            p_holm=adjusted[name],
        )
        found[name] = found[name].model_copy(update={"versus": versus})
    return found


def _best_baseline(found: Mapping[str, OnSet], but: str) -> str | None:
    """Return the baseline with the highest AUROC on a set, other than the score that is compared; None without any."""
    others = [name for name in BASELINES if name in found and name != but]
    return max(others, key=lambda name: found[name].auroc.value, default=None)


def best_score(scores: Sequence[ScoreSummary]) -> str:
    """Return the name of the score with the highest AUROC, averaged over the sets."""
    return max(scores, key=lambda score: sum(at.auroc.value for at in score.on)).name


def own_decision(known: Scored, unknown: Sequence[Scored]) -> OwnDecision | None:
    """Return what a model that may refuse decides by itself; None for other models."""
    if OWN not in known.scores:
        return None
    accepted = known.scores[OWN] > 0
    right = np.array(known.predictions) == np.array(known.labels)
    return OwnDecision(
        accepted_known=share(accepted),
        right=share(accepted & right),
        accepted_unknown={other.name: share(other.scores[OWN] > 0) for other in unknown},
    )


def share(chosen: NDArray[np.bool_]) -> Rate:
    """Return the share of images for which something holds, with its exact interval."""
    return rate(int(chosen.sum()), len(chosen))


def measure(interval: Interval) -> Measured:
    """Return an interval as the summary keeps it."""
    return Measured(value=interval.value, low=interval.low, high=interval.high, method=interval.method)


def rows_of(sets: Sequence[Scored]) -> pa.Table:
    """Return a row per image: set, number, id, group, label, prediction, and a column per score."""
    names = list(sets[0].scores)
    columns = {
        "set": pa.array([part.name for part in sets for _ in part.ids], pa.string()),
        "index": pa.array([number for part in sets for number in range(len(part))], pa.int32()),
        "image_id": pa.array([name for part in sets for name in part.ids], pa.string()),
        "group": pa.array([name for part in sets for name in part.groups], pa.string()),
        "label": pa.array([label for part in sets for label in part.labels], pa.int32()),
        "prediction": pa.array([label for part in sets for label in part.predictions], pa.int32()),
    }
    for name in names:
        columns[name] = pa.array(np.concatenate([part.scores[name] for part in sets]), pa.float64())
    return pa.table(columns)


def as_arrays(scores: Mapping[str, Tensor]) -> dict[str, Array]:
    """Return scores as float64 arrays."""
    return {name: values.double().numpy() for name, values in scores.items()}
