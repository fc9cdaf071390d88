"""Runs against each other on the images they share: paired exact tests, corrected for how many were made."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from robustvlm.report.record import RunRecord
from robustvlm.report.wording import norm_name, plain
from robustvlm.stats import PairedTest, Rate, holm, mcnemar_exact, rate

LEVEL = 0.05
CLEAN = "unperturbed"
CRITERION = f"paired test, p <= {LEVEL:g} after Holm's correction"
"""What makes a difference count as shown."""


@dataclass(frozen=True)
class Comparison:
    """Two runs (positions in the list given) on the same images under one `condition`.

    The rates count images answered right, unperturbed or after every attack; `adjusted` is Holm's p-value over all
    comparisons of the report.
    """

    first: int
    second: int
    condition: str
    first_rate: Rate
    second_rate: Rate
    test: PairedTest
    adjusted: float

    @property
    def finding(self) -> int | None:
        """Position of the run shown to be right more often; None when the difference may be chance."""
        if self.adjusted > LEVEL or self.test.only_first == self.test.only_second:
            return None
        return self.first if self.test.only_first > self.test.only_second else self.second

    def as_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the comparison as plain JSON values, runs by name."""
        return {
            "first": names[self.first],
            "second": names[self.second],
            "condition": self.condition,
            "first_rate": self.first_rate.model_dump(mode="json"),
            "second_rate": self.second_rate.model_dump(mode="json"),
            "test": self.test.model_dump(mode="json"),
            "p_value_holm": self.adjusted,
            "better": None if self.finding is None else names[self.finding],
        }


Answers = dict[tuple[str, str], bool]
"""Whether the model is right, by image id and true class."""


def compare(runs: Sequence[RunRecord]) -> list[Comparison]:
    """Test every pair of runs, unperturbed and at each norm, eps and goal that both ran, on the images both decided.

    An image is the same when its id and the name of its class agree. Where a run stopped early and has undecided images
    there is no test: those that it has decided are the ones that fall easily. Source: McNemar's exact test, Holm's
    correction.
    """
    tested: list[tuple[int, int, str, PairedTest]] = []
    answers = [_answers(run) for run in runs]
    for (i, first), (j, second) in itertools.combinations(enumerate(answers), 2):
        for condition in [c for c in first if c in second]:
            shared = [image for image in first[condition] if image in second[condition]]
            if shared:
                test = mcnemar_exact(
                    [first[condition][image] for image in shared], [second[condition][image] for image in shared]
                )
                tested.append((i, j, _text(runs[i], condition), test))
    adjusted = holm([test.p_value for *_, test in tested])
    return [
        Comparison(
            first=i,
            second=j,
            condition=text,
            first_rate=rate(test.both + test.only_first, test.total),
            second_rate=rate(test.both + test.only_second, test.total),
            test=test,
            adjusted=p,
        )
        for (i, j, text, test), p in zip(tested, adjusted, strict=True)
    ]


Condition = tuple[str, float, str] | None


def _answers(run: RunRecord) -> dict[Condition, Answers]:
    """Return who was right, unperturbed (key None) and per norm, eps and goal; undecided images are left out.

    Of a run that stopped early, only what it has decided of all its images.
    """
    table, early = run.verdicts(), bool(run.summary.unfinished)
    names = dict(enumerate(run.class_names)) | {-1: "an unknown class"}
    result: dict[Condition, Answers] = {
        None: {(image.image_id, names[image.label]): image.clean_correct for image in table.images}
    }
    for i, eps in enumerate(table.eps):
        outcomes = [(image, table.after(image, i)) for image in table.images]
        if early and (run.summary.images.waiting or any(outcome == "undecided" for _, outcome in outcomes)):
            continue
        result[run.summary.norm, eps, run.goal] = {
            (image.image_id, names[image.label]): outcome == "robust"
            for image, outcome in outcomes
            if outcome != "undecided"
        }
    return result


def _text(run: RunRecord, condition: Condition) -> str:
    if condition is None:
        return CLEAN
    norm, eps, goal = condition
    about = "" if goal == "misclassify" else f", {plain(goal, 60)}"
    return f"{norm_name(norm)} {plain(run.eps_texts[eps], 20)}{about}"


def findings(comparisons: Sequence[Comparison], names: Sequence[str]) -> list[str]:
    """Say in one sentence per pair of runs where one was shown to be better, by which criterion, and where neither was.

    Example:
        >>> test = mcnemar_exact([True] * 9, [False] * 9)
        >>> shown = Comparison(0, 1, "L2 0.5", rate(9, 9), rate(0, 9), test, adjusted=0.004)
        >>> findings([shown], ["A", "B"])
        ["A is right more often than B at L2 0.5 (paired test, p <= 0.05 after Holm's correction)."]
    """
    sentences = []
    pairs = dict.fromkeys((c.first, c.second) for c in comparisons)
    for first, second in pairs:
        mine = [c for c in comparisons if (c.first, c.second) == (first, second)]
        # Conditions name their goal where it is not to be right.
        does = "does better" if any("," in c.condition for c in mine) else "is right more often"
        parts = []
        for better, worse in ((first, second), (second, first)):
            where = _places([c.condition for c in mine if c.finding == better])
            if where:
                parts.append(f"{names[better]} {does} than {names[worse]} {where}")
        if parts:
            parts[-1] += f" ({CRITERION})"
        nothing = _places([c.condition for c in mine if c.finding is None])
        if nothing:
            # Names keep their spelling: only our own words begin with a capital.
            parts.append(
                f"{'no' if parts else 'No'} difference between {names[first]} and {names[second]} is shown {nothing}"
                f"{'' if parts else f' ({CRITERION})'}"
            )
        sentences.append("; ".join(parts) + ".")
    return sentences


def stopped(runs: Sequence[RunRecord], names: Sequence[str]) -> list[str]:
    """Say which runs stopped early, and what of them is not compared."""
    return [
        f"{name} stopped early ({plain(run.summary.unfinished)}): where it has undecided images it is not tested."
        for run, name in zip(runs, names, strict=True)
        if run.summary.unfinished
    ]


def _places(conditions: Sequence[str]) -> str:
    """Join conditions as in "unperturbed, at L2 0.5 and at L2 1"."""
    places = [c if c == CLEAN else f"at {c}" for c in conditions]
    return " and ".join([", ".join(places[:-1]), places[-1]] if len(places) > 1 else places)
