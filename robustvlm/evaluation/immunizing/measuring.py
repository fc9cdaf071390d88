"""What immunisation changed: accuracy, rejections and detection, before and after, on the same images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from robustvlm.defenses.immunity.score import class_scores, open_set_score
from robustvlm.defenses.immunity.state import Immunity
from robustvlm.defenses.prompts import Features
from robustvlm.detect import auroc_interval
from robustvlm.errors import UserError
from robustvlm.evaluation.detecting.scoring import copies
from robustvlm.stats import mcnemar_exact, rate


def judged(immunity: Immunity, features: Tensor) -> tuple[Tensor, Tensor]:
    """Return predicted classes [N] and acceptance scores S_DIS - tau [N] of unit features [N, D] of the base model."""
    with torch.no_grad():
        adapted = immunity.adapter(features)
    cosines = class_scores(adapted, immunity.prototypes)
    predicted = cosines.argmax(dim=1)
    score = open_set_score(adapted, immunity.prototypes, immunity.antibodies.embeddings, immunity.weight)
    return predicted, score - immunity.thresholds[predicted]


def measure(
    immunity: Immunity, text: Tensor, logit_scale: float, held: Features | None, unknown: Mapping[str, Features]
) -> dict[str, Any]:
    """Return the numbers of a run's record; unknown images that are of a known class (a label from 0) do not count.

    Before: the zero-shot head on class texts, with the largest softmax probability (MCM) as its detection score. After:
    classes by the nearest prototype; a right answer "accepted" is one that is not rejected either.
    """
    if held is None:
        return {}
    known = held.labels >= 0
    features, labels = held.features[known], held.labels[known]
    logits = logit_scale * features @ text.T
    predicted, acceptance = judged(immunity, features)
    before, after = (logits.argmax(dim=1) == labels).tolist(), (predicted == labels).tolist()
    accepted = acceptance > 0
    count = len(before)
    found: dict[str, Any] = {
        "accuracy_before": rate(sum(before), count).model_dump(),
        "accuracy_after": rate(sum(after), count).model_dump(),
        "paired": mcnemar_exact(before, after).model_dump(),
        "accepted_right": rate(int((accepted & (predicted == labels)).sum()), count).model_dump(),
        "rejected": rate(int((~accepted).sum()), count).model_dump(),
        "rejected_right": rate(
            int((~accepted & (predicted == labels)).sum()), int((predicted == labels).sum())
        ).model_dump(),
        "unknown": {},
    }
    groups = [group for group, wanted in zip(held.groups, known.tolist(), strict=True) if wanted]
    confidence = logits.softmax(dim=1).amax(dim=1)
    for spec, whole in unknown.items():
        other = whole.rows((whole.labels < 0).nonzero().flatten())
        if not other.ids:
            raise UserError(f"every image of '{spec}' is of a known class: pass others to --ood")
        rival = (logit_scale * other.features @ text.T).softmax(dim=1).amax(dim=1)
        _, theirs = judged(immunity, other.features)
        interval = partial(auroc_interval, known_groups=groups, unknown_groups=other.groups)
        found["unknown"][spec] = {
            "images": len(other.ids),
            "auroc_mcm": asdict(interval(confidence.double().numpy(), rival.double().numpy())),
            "auroc": asdict(interval(acceptance.double().numpy(), theirs.double().numpy())),
            "accepted": rate(int((theirs > 0).sum()), len(theirs)).model_dump(),
            "rejected": rate(int((theirs <= 0).sum()), len(theirs)).model_dump(),
            "known_classes": {
                immunity.class_names[label]: count
                for label, count in sorted(Counter(whole.labels.tolist()).items())
                if label >= 0
            },
            "copies": copies(other.features, held.features),
        }
    return found
