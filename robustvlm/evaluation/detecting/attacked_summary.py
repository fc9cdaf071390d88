"""From the attacked scores to the summary: AUROC and acceptance before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from robustvlm.detect import auroc_interval
from robustvlm.evaluation.detecting.attacking import KNOWN, worst_scores
from robustvlm.evaluation.detecting.ledger import AttackLedger
from robustvlm.evaluation.detecting.summarising import Scored, measure, share, title_of
from robustvlm.runs.detect_summary import Adversarial, AttackedOnSet, AttackedScore, Measured

Array = NDArray[np.float64]


def summarise_attacks(
    ledger: AttackLedger,
    names: Sequence[str],
    thresholds: Mapping[str, float],
    known: Scored,
    unknown: Sequence[Scored],
) -> list[AttackedScore]:
    """Return every attacked score before and after, on the images that were attacked; sets without any are left out."""
    found = []
    for name in names:
        rows, clean, worst = _arrays(ledger, name, KNOWN)
        if not rows:
            continue
        groups = [known.groups[row] for row in rows]
        on = []
        for other in unknown:
            other_rows, before, after = _arrays(ledger, name, other.name)
            if other_rows:
                others = [other.groups[row] for row in other_rows]
                on.append(
                    AttackedOnSet(
                        unknown=other.name,
                        auroc_clean=_auroc(clean, before, groups, others),
                        auroc_intrude=_auroc(clean, after, groups, others),
                        auroc_deny=_auroc(worst, before, groups, others),
                        auroc_both=_auroc(worst, after, groups, others),
                        accepted_clean=share(before > thresholds[name]),
                        accepted_attacked=share(after > thresholds[name]),
                    )
                )
        found.append(
            AttackedScore(
                name=name,
                title=title_of(name),
                threshold=thresholds[name],
                accepted_clean=share(clean > thresholds[name]),
                accepted_attacked=share(worst > thresholds[name]),
                on=on,
            )
        )
    return found


def summarise_adversarial(known: Scored, fooled: Scored, attacked: Sequence[str]) -> Adversarial | None:
    """Return how every score tells fooled images from the known ones that were not attacked; None if none was fooled.

    Args:
        attacked: ids of the known images that were attacked, which are left out of the clean side.
    """
    apart = {known.groups[known.ids.index(name)] for name in attacked if name in known.ids}
    rest = [row for row, group in enumerate(known.groups) if group not in apart]
    if not rest or not len(fooled):
        return None
    groups = [known.groups[row] for row in rest]
    return Adversarial(
        attacked=len(attacked),
        fooled=len(fooled),
        auroc={
            name: _auroc(known.scores[name][rest], fooled.scores[name], groups, fooled.groups) for name in known.scores
        },
    )


def _arrays(ledger: AttackLedger, name: str, set_name: str) -> tuple[list[int], Array, Array]:
    rows, clean, worst = worst_scores(ledger, name, set_name)
    return rows, clean.numpy(), worst.numpy()


def _auroc(known: Array, unknown: Array, known_groups: Sequence[str], unknown_groups: Sequence[str]) -> Measured:
    return measure(auroc_interval(known, unknown, known_groups=known_groups, unknown_groups=unknown_groups))
