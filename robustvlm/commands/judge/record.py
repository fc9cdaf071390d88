"""What a judgement holds: the facts in its journal, and the summary that is made of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from robustvlm.commands.common.store import JournalLedger
from robustvlm.commands.judge import attacks
from robustvlm.defenses.zoo.base import Passes
from robustvlm.runs.folder import RunFolder
from robustvlm.runs.records import Check, Record
from robustvlm.stats import PairedTest, Rate, holm, mcnemar_exact, rate, worth_of

_SAME = 1e-4
"""Logits that differ by less are called the same."""


class ModelFacts(Record):
    """What a model is found to be before it is attacked.

    Attributes:
        defences: its operators, as written; base: the spec of the undefended model, None for one.
        modes: gradient modes that were tried. random, eot, draws: whether it draws, and how many draws are averaged
            in a gradient and judge a point.
        forward, backward: passes of a clean answer, counted at the encoder; equivalents: a backward one counts two.
        change: the largest difference of a logit to the undefended model's, on clean and on attacked images; None for
            random models.
    """

    spec: str
    base: str | None
    defences: list[str]
    modes: list[str]
    random: bool
    eot: int
    draws: int
    forward: float
    backward: float
    equivalents: float
    change: float | None = None
    checks: list[Check]


class Act(Record):
    """One attack on one model: how many images it was made on, and on how many the answer stayed right.

    Attributes:
        left_only: it was made on images that the attacks before it had left.
        alone: images that it alone fooled; None where images leave at the first mode that fools them.
        passes: the same as they are allotted to images, a judged point with every draw that it may take.
        forward, backward: passes of the encoder that it took, on all images, those that judged its points among them.
    """

    name: str
    tried: int
    right: int
    alone: int | None
    left_only: bool
    passes: int
    forward: int = 0
    backward: int = 0


class ImageFate(Record):
    """One image under one model: in which acts the answer stayed right, of those that were made on it."""

    id: str
    label: int
    right: dict[str, bool]

    @property
    def held(self) -> bool:
        """Whether it stayed right throughout."""
        return all(self.right.values())

    def held_in(self, acts: Iterable[str]) -> bool:
        """Whether it is right when clean and in all of these acts that were made on it."""
        return self.right[attacks.CLEAN] and all(self.right.get(act, True) for act in acts)


class ModelJudgement(Record):
    """What a model is worth under attack.

    Attributes:
        clean: accuracy without an attack.
        unaware: by attack, accuracy at points made on the undefended model (for that one: under the attack itself).
        own_label: the same with the undefended model's own prediction in the label's place, by PGD.
        adaptive: right under everything but Square: when clean, under every attack through the defence and on
            features, and at the points made on the undefended model: who knows the defence knows what stands behind it.
        worst: right throughout, search without gradients included: the robust accuracy.
        gain: worst against the undefended model's worst on the same images; gain_p: its p-value, Holm over the run.
        protocol: unaware PGD against worst.
    """

    spec: str
    facts: ModelFacts
    clean: Rate
    unaware: dict[str, Rate]
    own_label: Rate
    adaptive: Rate
    worst: Rate
    acts: list[Act]
    images: list[ImageFate]
    checks: list[Check]
    gain: PairedTest | None = None
    gain_p: float | None = None
    protocol: PairedTest | None = None


class Unreproduced(Record):
    """A defence that has no figures here: what was published, with its setting, and why it cannot be run."""

    spec: str
    title: str
    reference: str
    claimed: str
    reason: str


class Judgement(Record):
    """The summary of a run: every model, undefended ones before what stands on them.

    `worth` is how many independent images the images are worth, where copies of one thing are among them: the intervals
    are those of so many. None in runs of before, whose intervals count every image. `targets` are the wrong classes
    that APGD was aimed at; None in runs of before, which aimed at none or at nine.
    """

    norm: str
    eps: float
    eps_text: str
    steps: int
    queries: int
    images: int
    unreadable: int
    unknown: int
    seconds: float
    models: list[ModelJudgement]
    not_reproduced: tuple[Unreproduced, ...] = ()
    effort: int = 1
    targets: int | None = None
    worth: float | None = None

    def of(self, spec: str) -> ModelJudgement:
        """Return what was found of a model."""
        return next(found for found in self.models if found.spec == spec)


# The facts as they come


@dataclass
class _Part:
    fates: list[attacks.Fate]
    seconds: float
    spent: Passes


class JudgeLedger(JournalLedger):
    """Facts of a judgement: what models are, and the fates of images by model, act and part of the images."""

    def __init__(self, folder: RunFolder, *, rank: int = 0) -> None:
        self.models: dict[str, ModelFacts] = {}
        self.parts: dict[tuple[str, str, int], _Part] = {}
        super().__init__(folder, rank=rank)

    def add_model(self, facts: ModelFacts) -> None:
        """Record what a model is."""
        self._add({"kind": "model", **facts.model_dump()})

    def add_part(
        self, model: str, act: str, part: int, fates: Sequence[attacks.Fate], seconds: float, spent: Passes
    ) -> None:
        """Record what came of the images of a part; all in one line, so that a killed session leaves all or none."""
        place = {"model": model, "act": act, "part": part}
        passes = {"forward": spent.forward, "backward": spent.backward}
        self._add(
            {"kind": "part", **place, "rows": [fate.model_dump() for fate in fates], "seconds": seconds, **passes}
        )

    def fates(self, model: str, act: str) -> dict[int, attacks.Fate]:
        """Return the fates of images in one act by their index."""
        parts = (part.fates for (spec, name, _), part in self.parts.items() if (spec, name) == (model, act))
        return {fate.index: fate for fates in parts for fate in fates}

    def spent(self, model: str, act: str) -> Passes:
        """Return the passes of the encoder in one act."""
        parts = [part.spent for (spec, name, _), part in self.parts.items() if (spec, name) == (model, act)]
        return Passes(sum(one.forward for one in parts), sum(one.backward for one in parts))

    @property
    def seconds(self) -> float:
        """Time of all acts over all sessions."""
        return sum(part.seconds for part in self.parts.values())

    def _take_own(self, kind: str, fact: dict[str, Any]) -> None:
        if kind == "model":
            facts = ModelFacts.model_validate(fact)
            self.models[facts.spec] = facts
        elif kind == "part":
            rows = [attacks.Fate.model_validate(row) for row in fact["rows"]]
            spent = Passes(*(int(fact[name]) for name in ("forward", "backward")))
            part = _Part(rows, float(fact["seconds"]), spent)
            self.parts[str(fact["model"]), str(fact["act"]), int(fact["part"])] = part
        else:
            raise ValueError(kind)


# From facts to figures


@dataclass(frozen=True)
class Images:
    """What the summary says of the images: ids and labels of those judged on, and how many were left aside.

    `groups` are what each is a copy of, where copies of one thing are among them; none: every image is its own.
    """

    ids: Sequence[str]
    labels: Sequence[int]
    unreadable: int = 0
    unknown: int = 0
    acts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    groups: Sequence[str] = ()
    every_mode: bool = False

    @property
    def worth(self) -> float:
        """How many independent images they are worth."""
        return worth_of(self.groups or self.ids)

    def paired(self, first: Sequence[bool], second: Sequence[bool]) -> PairedTest:
        """Test whether two models hold equally often on these images, copies of one thing counted once."""
        return mcnemar_exact(first, second, groups=self.groups or None)


def judged(ledger: JudgeLedger, images: Images) -> list[ModelJudgement]:
    """Return what the journal says of every model, with paired tests against what each stands on."""
    found = [_of_model(ledger, facts, images, images.acts[spec]) for spec, facts in ledger.models.items()]
    by_spec = {one.spec: one for one in found}
    compared = []
    for one in found:
        base = None if one.facts.base is None else by_spec[one.facts.base]
        held = [image.held for image in one.images]
        unaware = [image.right[next(iter(attacks.UNAWARE))] for image in one.images]
        update: dict[str, object] = {"protocol": images.paired(unaware, held)}
        if base is not None:
            update["gain"] = images.paired(held, [image.held for image in base.images])
            update["checks"] = [*one.checks, *compared_checks(one)]
        compared.append(one.model_copy(update=update))
    tested = [one for one in compared if one.gain is not None]
    adjusted = dict(
        zip(
            (one.spec for one in tested),
            holm([one.gain.p_value for one in tested if one.gain is not None]),
            strict=True,
        )
    )
    return [one.model_copy(update={"gain_p": adjusted.get(one.spec)}) for one in compared]


def _of_model(ledger: JudgeLedger, facts: ModelFacts, images: Images, acts: Sequence[str]) -> ModelJudgement:
    fates = {act: ledger.fates(facts.spec, act) for act in acts}
    rows = [
        ImageFate(id=name, label=label, right={act: fates[act][i].right for act in acts if i in fates[act]})
        for i, (name, label) in enumerate(zip(images.ids, images.labels, strict=True))
    ]

    def share(holds: Iterable[bool]) -> Rate:
        return rate(sum(holds), len(rows), independent=images.worth)

    return ModelJudgement(
        spec=facts.spec,
        facts=facts,
        clean=share(row.right[attacks.CLEAN] for row in rows),
        unaware={act: share(row.right[act] for row in rows) for act in attacks.UNAWARE},
        own_label=share(row.right[attacks.LABEL] for row in rows),
        adaptive=_adaptive(rows, images.worth),
        worst=share(row.held for row in rows),
        acts=[
            _of_act(act, rows, fates[act].values(), ledger.spent(facts.spec, act), every_mode=images.every_mode)
            for act in acts
            if act != attacks.CLEAN
        ],
        images=rows,
        checks=facts.checks,
    )


def _adaptive(rows: Sequence[ImageFate], worth: float | None) -> Rate:
    held = sum(row.held_in(act for act in row.right if act != attacks.SQUARE) for row in rows)
    return rate(held, len(rows), independent=worth)


def as_read(summary: Judgement) -> Judgement:
    """Return a summary that an earlier version may have written, its figures by the present rules.

    There, what was right at the transferred points did not count for the adaptive figure, and there were no short
    attacks, which it is told to lack; or its attacks saw less than those of today.
    """
    models = []
    weaker = "Of a version before, whose attacks saw less of gates, votes and random defences: a fresh run may differ."
    less = [Check(name="attacks", level="note", message=weaker)] if summary.effort < attacks.EFFORT else []
    for found in summary.models:
        lacks = summary.steps >= attacks.SHORTER and not any(act.name.startswith(attacks.SHORT) for act in found.acts)
        said = "Of a version before, which did not try a quarter of the steps: a fresh run may find more."
        checks = [*found.checks, *([Check(name="more steps", level="note", message=said)] if lacks else []), *less]
        models.append(found.model_copy(update={"adaptive": _adaptive(found.images, summary.worth), "checks": checks}))
    return summary.model_copy(update={"models": models})


def _of_act(
    act: str, rows: Sequence[ImageFate], fates: Iterable[attacks.Fate], spent: Passes, *, every_mode: bool
) -> Act:
    made = [row for row in rows if act in row.right]
    alone = [row for row in made if not row.right[act] and sum(not right for right in row.right.values()) == 1]
    return Act(
        name=act,
        tried=len(made),
        right=sum(row.right[act] for row in made),
        alone=len(alone) if every_mode else None,
        left_only=act in (attacks.FEATURE, attacks.SQUARE)
        or act.startswith((attacks.SHORT, attacks.START, attacks.TARGETED))
        or (act.startswith(attacks.MODE) and not every_mode),
        passes=sum(fate.passes for fate in fates),
        forward=int(spent.forward),
        backward=int(spent.backward),
    )


# Signs that gradients were masked, from the figures alone


def compared_checks(found: ModelJudgement) -> list[Check]:
    """Return what the attacks on a defended model say of each other.

    Raises nothing; a check that finds nothing is not there.
    """
    found_of = (_transfer, _budget, _blind, _label, _nothing)
    return [check for check in (one(found) for one in found_of) if check is not None]


def _transfer(found: ModelJudgement) -> Check | None:
    through = [
        act.name
        for act in found.acts
        if act.name.startswith((attacks.MODE, attacks.SHORT)) or act.name == attacks.FEATURE
    ]
    missed = [row for row in found.images if row.held_in(through) and not row.held_in(attacks.TRANSFER)]
    if not missed:
        return None
    least = min(one.successes for one in (*found.unaware.values(), found.own_label))
    beaten = sum(row.held_in(through) for row in found.images) > least
    message = (
        f"On {len(missed)} of {len(found.images)} images the points made on the undefended model fool this one where "
        "gradients through the defence do not; robust accuracy counts them as fooled."
    )
    return Check(name="transfer against gradients", level="warning" if beaten else "note", message=message)


def _budget(found: ModelJudgement) -> Check | None:
    acts = [act for act in found.acts if act.name.startswith(attacks.SHORT)]
    fooled = sum(act.tried - act.right for act in acts)
    if not fooled:
        return None
    chance = " (or its draws, which are others each time)" if found.facts.random else ""
    return Check(
        name="more steps",
        level="note" if found.facts.random else "warning",
        message=f"A quarter of the steps{chance} fools {fooled} of the {acts[0].tried} images that all steps left: "
        "more effort would have helped the defence. They count as fooled; other steps may find more.",
    )


def _blind(found: ModelJudgement) -> Check | None:
    square = next((act for act in found.acts if act.name == attacks.SQUARE), None)
    if square is None or square.right == square.tried:
        return None
    fooled = square.tried - square.right
    return Check(
        name="black box against white box",
        level="warning",
        message=f"Square, which sees no gradient, fools {fooled} of the {square.tried} images that gradients left: "
        "the gradients through the defence hide something.",
    )


def _label(found: ModelJudgement) -> Check | None:
    most = max(found.unaware.values(), key=lambda one: one.successes)
    if most.successes <= found.clean.successes:
        return None
    return Check(
        name="robust above clean",
        level="warning",
        message=f"Under attacks unaware of the defence {most.successes} images are right, and {found.clean.successes} "
        "without any attack: the attacked images carry the label.",
    )


def _nothing(found: ModelJudgement) -> Check | None:
    change = found.facts.change
    if change is None or change >= _SAME:
        return None
    return Check(
        name="does nothing here",
        level="warning",
        message=f"No logit differs from the undefended model's by more than {change:.1g}, on clean or attacked images: "
        "here the defence is the undefended model, and whatever an attack finds harder is the gradient.",
    )
