"""What the clean pass keeps of unperturbed images: a fact each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from robustvlm.attacks import Goal
from robustvlm.attacks.unperturbed import Unperturbed
from robustvlm.runs.results import NO_ANSWER, CleanFact


def clean_facts(
    seen: Unperturbed, goal: Goal, about: Sequence[tuple[int, str, int]], *, n_targets: int
) -> Iterator[CleanFact]:
    """Yield a fact per image; `about` holds index, id and label of each, in the order of the rows of `seen`."""
    answer, outputs = seen.answer, seen.output.cpu()
    columns = (answer.reached, answer.margin, answer.prediction, answer.confidence, answer.finite, answer.cosine)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    for (index, image_id, label), output, row in zip(about, outputs, rows, strict=False):
        reached, distance, prediction, confidence, finite, cosine = row
        yield CleanFact(
            index=index,
            image_id=image_id,
            label=label,
            prediction=prediction if finite else NO_ANSWER,
            margin=distance,
            confidence=confidence,
            targets=goal.targets(output, label, n_targets) if finite else [],
            exposed=finite and not reached,
            cosine=None if cosine != cosine else cosine,
        )
