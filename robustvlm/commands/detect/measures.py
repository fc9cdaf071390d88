"""From the scores of all images to the summary, clean and attacked, and the images that were taken most wrongly."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from robustvlm.commands.detect import summary as record
from robustvlm.commands.detect.attack import AttackLedger, worst_scores
from robustvlm.commands.detect.scoring import Panel
from robustvlm.core.files import replacing
from robustvlm.core.framing import Framing, to_pixels
from robustvlm.data.source import DataSource, Sample
from robustvlm.detect import BASELINES, Bootstrap, Interval, auroc_interval, difference, find_score, threshold_at_tpr
from robustvlm.detect.metrics import all_metrics, intervals_of
from robustvlm.errors import UserError
from robustvlm.stats import Rate, holm, rate, worth_of

# From the scores of all images to the summary: every metric with its interval, compared in pairs

Array = NDArray[np.float64]
_OF_THE_MODEL = {record.OWN: "the model's own", record.OWN_SDIS: "the model's own, before thresholds"}


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
    return {name: 0.0 if name == record.OWN else decision_threshold(values) for name, values in known.scores.items()}


def summarise_scores(
    known: Scored,
    unknown: Sequence[Scored],
    *,
    thresholds: Mapping[str, float],
    microseconds: Mapping[str, float],
    draws: int,
    seed: int,
) -> list[record.ScoreSummary]:
    """Return every score's metrics on every set of unknown images, in the order of the catalogue."""
    on: dict[str, list[record.OnSet]] = {name: [] for name in known.scores}
    for other in unknown:
        for name, found in _on_set(known, other, draws=draws, seed=seed).items():
            on[name].append(found)
    return [
        record.ScoreSummary(
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


def _on_set(known: Scored, other: Scored, *, draws: int, seed: int) -> dict[str, record.OnSet]:
    """Return every score's metrics on one set, all from the same bootstrap samples."""
    bootstrap = Bootstrap(known.groups, other.groups, n_draws=draws, seed=seed)
    found: dict[str, record.OnSet] = {}
    aurocs: dict[str, Array] = {}
    for name, values in known.scores.items():
        resampled = bootstrap.draws(values, other.scores[name])
        aurocs[name] = resampled["auroc"]
        intervals = intervals_of(all_metrics(values, other.scores[name]), resampled)
        intervals["auroc"] = auroc_interval(
            values, other.scores[name], known_groups=known.groups, unknown_groups=other.groups
        )
        found[name] = record.OnSet(
            unknown=other.name,
            auroc=measure(intervals["auroc"]),
            fpr95=measure(intervals["fpr95"]),
            aupr_in=measure(intervals["aupr_in"]),
            aupr_out=measure(intervals["aupr_out"]),
        )
    return _compared(found, aurocs)


def _compared(found: dict[str, record.OnSet], aurocs: Mapping[str, Array]) -> dict[str, record.OnSet]:
    """Set every score against the best other baseline of this set, p-values adjusted for the number of comparisons."""
    rivals = {name: _best_baseline(found, name) for name in found}
    gaps = {
        name: difference(found[name].auroc.value - found[rival].auroc.value, aurocs[name] - aurocs[rival])
        for name, rival in rivals.items()
        if rival is not None
    }
    adjusted = dict(zip(gaps, holm([gap.p_value for gap in gaps.values()]), strict=True))
    for name, gap in gaps.items():
        versus = record.Versus(
            baseline=str(rivals[name]),
            difference=gap.value,
            low=gap.low,
            high=gap.high,
            p_value=gap.p_value,
            p_holm=adjusted[name],
        )
        found[name] = found[name].model_copy(update={"versus": versus})
    return found


def _best_baseline(found: Mapping[str, record.OnSet], but: str) -> str | None:
    """Return the baseline with the highest AUROC on a set, other than the score that is compared; None without any."""
    others = [name for name in BASELINES if name in found and name != but]
    return max(others, key=lambda name: found[name].auroc.value, default=None)


def best_score(scores: Sequence[record.ScoreSummary]) -> str:
    """Return the name of the score with the highest AUROC, averaged over the sets."""
    return max(scores, key=lambda score: sum(at.auroc.value for at in score.on)).name


def own_decision(known: Scored, unknown: Sequence[Scored]) -> record.OwnDecision | None:
    """Return what a model that may refuse decides by itself; None for other models."""
    if record.OWN not in known.scores:
        return None
    accepted = known.scores[record.OWN] > 0
    right = np.array(known.predictions) == np.array(known.labels)
    return record.OwnDecision(
        accepted_known=share(accepted, known.groups),
        right=share(accepted & right, known.groups),
        accepted_unknown={other.name: share(other.scores[record.OWN] > 0, other.groups) for other in unknown},
    )


def share(chosen: NDArray[np.bool_], groups: Sequence[str] | None = None) -> Rate:
    """Return the share of images for which something holds, with its exact interval.

    Images of one of the `groups` are no independent evidence, and count as one in the interval; None: all are.
    """
    return rate(int(chosen.sum()), len(chosen), independent=None if groups is None else worth_of(groups))


def measure(interval: Interval) -> record.Measured:
    """Return an interval as the summary keeps it."""
    return record.Measured(value=interval.value, low=interval.low, high=interval.high, method=interval.method)


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


# From the attacked scores to the summary: AUROC and acceptance before and after


def summarise_attacks(
    ledger: AttackLedger,
    names: Sequence[str],
    thresholds: Mapping[str, float],
    known: Scored,
    unknown: Sequence[Scored],
) -> list[record.AttackedScore]:
    """Return every attacked score before and after, on the images that were attacked; sets without any are left out."""
    found = []
    for name in names:
        rows, clean, worst = _arrays(ledger, name, record.KNOWN)
        if not rows:
            continue
        groups = [known.groups[row] for row in rows]
        on = []
        for other in unknown:
            other_rows, before, after = _arrays(ledger, name, other.name)
            if other_rows:
                others = [other.groups[row] for row in other_rows]
                on.append(
                    record.AttackedOnSet(
                        unknown=other.name,
                        auroc_clean=_auroc(clean, before, groups, others),
                        auroc_intrude=_auroc(clean, after, groups, others),
                        auroc_deny=_auroc(worst, before, groups, others),
                        auroc_both=_auroc(worst, after, groups, others),
                        accepted_clean=share(before > thresholds[name], others),
                        accepted_attacked=share(after > thresholds[name], others),
                    )
                )
        found.append(
            record.AttackedScore(
                name=name,
                title=title_of(name),
                threshold=thresholds[name],
                accepted_clean=share(clean > thresholds[name], groups),
                accepted_attacked=share(worst > thresholds[name], groups),
                on=on,
            )
        )
    return found


def summarise_adversarial(known: Scored, clean: Sequence[int], fooled: Scored, *, attacked: int) -> record.Adversarial:
    """Return how every score tells fooled images from known ones that were not attacked.

    Args:
        clean: rows of the known images that are classified right, without those attacked and their like.
        attacked: how many were attacked.
    """
    groups = [known.groups[row] for row in clean]
    return record.Adversarial(
        attacked=attacked,
        fooled=len(fooled),
        unattacked=len(clean),
        auroc={
            name: _auroc(values[list(clean)], fooled.scores[name], groups, fooled.groups)
            for name, values in known.scores.items()
        },
    )


def _arrays(ledger: AttackLedger, name: str, set_name: str) -> tuple[list[int], Array, Array]:
    rows, clean, worst = worst_scores(ledger, name, set_name)
    return rows, clean.numpy(), worst.numpy()


def _auroc(known: Array, unknown: Array, known_groups: Sequence[str], unknown_groups: Sequence[str]) -> record.Measured:
    return measure(auroc_interval(known, unknown, known_groups=known_groups, unknown_groups=unknown_groups))


# Keeps the images that a score takes most wrongly: unknown ones it likes best, known ones it likes least

SHOWN = 6
"""Images per set."""


def save_mistakes(
    folder: Path,
    pairs: Sequence[tuple[Scored, DataSource]],
    score: str,
    threshold: float,
    *,
    framing: Framing,
) -> None:
    """Write the images to `folder`, each with its facts: set, id, score, label, prediction.

    Args:
        pairs: sets with their sources, that of known images first.
        score: by which images are judged; those on the right side of its threshold are no mistakes.
        framing: how images are brought to the model's resolution.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, (part, source) in enumerate(pairs):
        values = part.scores[score]
        known = number == 0
        order = np.argsort(values if known else -values, kind="stable")
        wrong = [int(row) for row in order if (values[row] <= threshold) == known][:SHOWN]
        rank = {part.ids[row]: place for place, row in enumerate(wrong)}
        rows = {part.ids[row]: row for row in wrong}
        for item in source.samples(keep=lambda name, wanted=rank: name in wanted):  # type: ignore[misc]
            if not isinstance(item, Sample) or item.id not in rank:
                continue
            row = rows[item.id]
            about = {
                "set": part.name,
                "known": str(int(known)),
                "rank": str(rank[item.id]),
                "image_id": item.id,
                "score": repr(float(values[row])),
                "label": str(part.labels[row]),
                "prediction": str(part.predictions[row]),
            }
            pixels = to_pixels(item.image, framing)
            with replacing(folder / f"{number:02d}-{rank[item.id]:02d}.safetensors") as temporary:
                temporary.write_bytes(save({"image": pixels.contiguous()}, metadata=about))
            if len(rank) == sum(1 for _ in folder.glob(f"{number:02d}-*.safetensors")):
                break
