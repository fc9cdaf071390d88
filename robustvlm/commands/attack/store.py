"""All facts of an attack run: in memory, in the journal, as result rows, and as pictures."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from safetensors.torch import save
from torch import Tensor

from robustvlm.attacks import ROBUST, Attack, Goal, Result, ThreatModel
from robustvlm.commands.attack.cost import MeteredOracle
from robustvlm.commands.attack.verdicts import NO_ANSWER
from robustvlm.commands.common.store import JournalLedger, cost_of
from robustvlm.core.files import replacing
from robustvlm.data.source import DataSource, select
from robustvlm.runs.folder import RunFolder
from robustvlm.runs.records import Check, Cost, Drawn, Estimate, Passes

# Result rows: a row per image, attack and eps, from the facts in the journal

SCHEMA = pa.schema(
    [
        ("index", pa.int32()),
        ("image_id", pa.string()),
        ("label", pa.int32()),
        ("clean_prediction", pa.int32()),
        ("attack", pa.string()),
        ("norm", pa.string()),
        ("eps", pa.float64()),
        ("goal", pa.string()),
        ("outcome", pa.string()),
        ("adversarial_prediction", pa.int32()),
        ("steps", pa.int32()),
        ("passes", pa.int32()),
        ("linf", pa.float64()),
        ("l2", pa.float64()),
        ("clean_margin", pa.float64()),
        ("margin", pa.float64()),
        ("clean_confidence", pa.float64()),
        ("confidence", pa.float64()),
        ("clean_cosine", pa.float64()),
        ("cosine", pa.float64()),
        ("restart", pa.int32()),
        ("seconds", pa.float64()),
    ]
)

_STAGE = ("index", "attack", "eps", "goal")  # the first fields of a fact; the others are named as in an attack's result
_UNATTACKED: dict[str, Any] = {"steps": 0, "passes": 0, "linf": 0.0, "l2": 0.0, "seconds": 0.0}

CLEAN_WRONG, FOOLED, SKIPPED, FAILED, UNDECIDED = "clean_wrong", "fooled", "skipped", "failed", "undecided"


@dataclass(frozen=True)
class CleanFact:
    """What the model says of an unperturbed image, under the run's first goal.

    Args:
        prediction: class, -1 for a rejected image, -2 where the output is not finite.
        margin: the goal's margin, positive as long as the goal is not reached.
        targets: the classes worth aiming at, the likeliest first.
        exposed: the goal is not reached and the output finite, so that there is something to attack.
        cosine: the cosine that a feature goal is about.
    """

    index: int
    image_id: str
    label: int
    prediction: int
    margin: float
    confidence: float
    targets: list[int]
    exposed: bool
    cosine: float | None = None


@dataclass(frozen=True)
class AttackFact:
    """What one attack found for one image at one eps under one goal.

    Args:
        beyond: classes shown to be out of reach, each with the radius within which it is.
    """

    index: int
    attack: str
    eps: float
    goal: str
    outcome: str
    prediction: int
    steps: int
    passes: int
    linf: float
    l2: float
    margin: float
    confidence: float
    run: int
    seconds: float
    cosine: float | None = None
    beyond: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # As keys of a journal's objects, classes are texts.
        object.__setattr__(self, "beyond", {int(label): radius for label, radius in self.beyond.items()})

    def written(self) -> dict[str, Any]:
        """Return the fact for the journal; classes that are out of reach only where there are any."""
        return {name: value for name, value in asdict(self).items() if name != "beyond" or value}


def make_rows(
    clean: Sequence[CleanFact],
    found: Sequence[AttackFact],
    *,
    norm: str,
    eps: Sequence[float],
    attacks: Sequence[str],
    goals: Sequence[str] = ("misclassify",),
) -> pa.Table:
    """Return the full table, ordered by eps, goal, attack and image, with a row also for what needed no attack.

    Images for which the goal was reached unperturbed are "clean_wrong"; images fooled by an earlier attack or at a
    smaller eps are "skipped"; those that the run did not come to are "undecided". None of these was attacked, so their
    measured columns hold what is known of the clean image.
    """
    by_stage = {(fact.eps, fact.goal, fact.attack, fact.index): fact for fact in found}
    images = sorted(clean, key=lambda fact: fact.index)
    fallen: set[tuple[str, int]] = set()
    exposed: dict[tuple[str, int], bool] = {}
    for found_one in by_stage.values():
        if found_one.outcome != FAILED:
            exposed.setdefault((found_one.goal, found_one.index), found_one.outcome != CLEAN_WRONG)
    rows = []
    for value in eps:
        for goal in goals:
            for attack in attacks:
                stage = {"attack": attack, "norm": norm, "eps": value, "goal": goal}
                for image in images:
                    fact = by_stage.get((value, goal, attack, image.index))
                    open_to = exposed.get((goal, image.index), image.exposed)
                    rows.append(_row(image, fact, stage, exposed=open_to, fallen=(goal, image.index) in fallen))
                    if fact is not None and fact.outcome == FOOLED:
                        fallen.add((goal, image.index))
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _row(
    image: CleanFact, fact: AttackFact | None, stage: dict[str, Any], *, exposed: bool, fallen: bool
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "index": image.index,
        "image_id": image.image_id,
        "label": image.label,
        "clean_prediction": image.prediction,
        **stage,
        "outcome": CLEAN_WRONG if not exposed else SKIPPED if fallen else UNDECIDED,
        "adversarial_prediction": NO_ANSWER,
        "clean_margin": image.margin,
        "margin": image.margin,
        "clean_confidence": image.confidence,
        "confidence": image.confidence,
        "clean_cosine": image.cosine,
        "cosine": image.cosine,
        "restart": -1,
        **_UNATTACKED,
    }
    if fact is not None:
        prediction = NO_ANSWER if fact.outcome == FAILED else fact.prediction
        row |= {name: value for name, value in asdict(fact).items() if name in row}
        row |= {"adversarial_prediction": prediction, "restart": fact.run}
    return row


# All facts of an attack run: kept in memory, and appended to the run's journal as they come


class Ledger(JournalLedger):
    """The facts of an attack run: unperturbed answers, what the attacks found, why a session stopped."""

    def __init__(self, folder: RunFolder, *, rank: int = 0, session: str | None = None) -> None:
        self.clean: dict[int, CleanFact] = {}
        self.found: dict[tuple[float, str, str, int], AttackFact] = {}
        self.fooled: set[tuple[str, int]] = set()
        self.left_out: dict[int, str] = {}
        self._beyond: dict[tuple[str, int], dict[int, float]] = {}
        self.drawn: Drawn | None = None
        self._as_is: dict[tuple[str, int], bool] = {}
        self._stops: dict[str, str] = {}
        self.estimate: Estimate | None = None
        super().__init__(folder, rank=rank, session=session)

    @property
    def seen(self) -> set[str]:
        """Ids of the images of which the clean pass knows the answer."""
        named = {image.id for image in self._unreadable.values()} | set(self.left_out.values())
        return {fact.image_id for fact in self.clean.values()} | named

    def count_images(self, source: DataSource, limit: int | None) -> int | None:
        """Return how many images the run covers, or None when only streaming can tell."""
        ids = source.ids()
        return len(select(ids, limit)) if ids is not None else limit

    def remaining(
        self, eps: float, goal: str, attack: str, *, leave: bool = True, everyone: bool = False
    ) -> dict[str, CleanFact]:
        """Return, by image id, the images this stage has still to attack.

        Args:
            leave: images that the goal has been reached on before are not attacked again.
            everyone: images are attacked also where the goal is reached unperturbed.
        """
        return {
            fact.image_id: fact
            for index, fact in sorted(self.clean.items())
            if (fact.exposed or (everyone and fact.prediction != NO_ANSWER))
            and not (leave and (goal, index) in self.fooled)
            and (eps, goal, attack, index) not in self.found
        }

    def beyond(self, eps: float, goal: str, index: int) -> dict[int, float]:
        """Return the classes that attacks have shown to be out of reach of an image at this radius."""
        known = self._beyond.get((goal, index), {})
        return {label: radius for label, radius in known.items() if radius > eps}

    def reached(self, eps: float, goal: str, index: int, names: Collection[str]) -> float:
        """Return the lowest margin that attacks of these names have brought an image to; infinite where none did."""
        rows = (self.found.get((eps, goal, name, index)) for name in names)
        return min((row.margin for row in rows if row is not None and row.outcome == ROBUST), default=float("inf"))

    def reached_as_is(self, goal: str, index: int) -> bool | None:
        """Return what the stages of a goal have found of an image unperturbed; None where none has asked."""
        return self._as_is.get((goal, index))

    def attacked(self, eps: float, goal: str, attack: str) -> int:
        """Return how many images this stage has finished."""
        return sum(1 for *stage, _ in self.found if tuple(stage) == (eps, goal, attack))

    def add_clean(self, fact: CleanFact) -> None:
        """Record what the model says of an unperturbed image."""
        self._add({"kind": "clean", **asdict(fact)})

    def add_left_out(self, index: int, image_id: str) -> None:
        """Record an image that the goal is not about, such as one of an unknown class."""
        self._add({"kind": "left out", "index": index, "image_id": image_id})

    def add_result(self, result: Result, attack: str, eps: float, goal: str) -> None:
        """Record the answer of one attack for one image."""
        measured = {field.name: getattr(result, field.name) for field in fields(AttackFact) if field.name not in _STAGE}
        fact = AttackFact(index=result.job.index, attack=attack, eps=eps, goal=goal, **measured)
        self._add({"kind": "attack", **fact.written()})

    def add_lost(self, clean: CleanFact, attack: str, eps: float, goal: str, reason: str) -> None:
        """Record an image that was readable in the clean pass and is no longer: the attack could not be made."""
        nothing = AttackFact(
            index=clean.index,
            attack=attack,
            eps=eps,
            goal=goal,
            outcome=FAILED,
            prediction=NO_ANSWER,
            margin=clean.margin,
            confidence=clean.confidence,
            run=-1,
            cosine=clean.cosine,
            **_UNATTACKED,
        )
        self._add({"kind": "attack", **nothing.written()})
        message = f"image '{clean.image_id}' could not be read again for the attack: {reason}"
        self.add_checks([Check(name=f"lost image, number {clean.index}", level="warning", message=message)])

    def add_cost(self, oracle: MeteredOracle, seconds: float) -> None:
        """Record what this session has cost so far."""
        passes = oracle.passes
        self._add_cost(
            cost_of(
                forward=passes.forward,
                backward=passes.backward,
                seconds=seconds,
                model_seconds=passes.seconds,
                passes=Passes(**oracle.spent),
            )
        )

    @property
    def cost(self) -> Cost:
        """Passes and time over all sessions, with what the passes were for.

        What the attacks paid beyond the passes of finished images was spare. A killed session counts up to its last
        note of them; images that it finished after that tell of more passes, which are counted too.
        """
        cost = super().cost
        if cost.passes is None:
            return cost
        known, given = cost.passes, sum(fact.passes for fact in self.found.values())
        unnoted = max(0, given - known.images - known.untold)
        rest = known.images + known.untold + unnoted - given
        spare = min(rest, known.images)
        parts = {"images": given, "spare": known.spare + spare, "untold": rest - spare}
        return cost_of(
            forward=cost.forward_passes + unnoted - unnoted // 2,
            backward=cost.backward_passes + unnoted // 2,
            seconds=cost.seconds,
            model_seconds=cost.model_seconds,
            passes=known.model_copy(update=parts),
        )

    def add_drawn(self, drawn: Drawn) -> None:
        """Record how a random model is asked and judged, unless that is known."""
        if drawn != self.drawn:
            self._add({"kind": "drawn", **drawn.model_dump()})

    def add_stop(self, reason: str) -> None:
        """Record that this session stops before all is decided, and why."""
        self._add({"kind": "stop", "session": self.session, "reason": reason})

    @property
    def stopped(self) -> str | None:
        """Why this session has stopped before all was decided, on whichever process; None if it has not."""
        return self._stops.get(self.session)

    def add_estimate(self, estimate: Estimate) -> None:
        """Record what the run was expected to cost before its first stage; later estimates are of what is left."""
        if self.estimate is None:
            self._add({"kind": "estimate", **estimate.model_dump(exclude_none=True)})

    def add_likely(self, least: int, most: int) -> None:
        """Record what the run's first finished images let expect; later ones know better, and are not recorded."""
        if self.estimate is not None and self.estimate.likely_least is None:
            likely = {"likely_least": least, "likely_most": most, "likely_after": len(self.found)}
            self._add({"kind": "estimate", **self.estimate.model_dump(exclude_none=True), **likely})

    def _take_own(self, kind: str, fact: dict[str, Any]) -> None:
        if kind == "clean":
            self.clean[fact["index"]] = CleanFact(**fact)
        elif kind == "left out":
            self.left_out[fact["index"]] = fact["image_id"]
        elif kind == "attack":
            row = AttackFact(**fact)
            self.found[row.eps, row.goal, row.attack, row.index] = row
            if row.beyond:
                self._beyond.setdefault((row.goal, row.index), {}).update(row.beyond)
            if row.outcome == FOOLED:
                self.fooled.add((row.goal, row.index))
            if row.outcome != FAILED:  # which may say no more than that the image could not be read again
                self._as_is.setdefault((row.goal, row.index), row.outcome == CLEAN_WRONG)
        elif kind == "stop":
            self._stops[fact["session"]] = fact["reason"]
        elif kind == "drawn":
            self.drawn = Drawn(**fact)
        elif kind == "estimate":
            self.estimate = Estimate(**fact)
        else:
            raise ValueError(f"unknown kind of fact '{kind}'")


# Adversarial images of a run, as safetensors files named by image number

GALLERY_SIZE = 12


def save_pair(folder: Path, index: int, clean: Tensor, adversarial: Tensor, facts: dict[str, str]) -> None:
    """Write `clean` and `adversarial` [3, H, W] of one image, with `facts` as the file's metadata.

    They are in float32, or in float64 where the attack was: rounded, a point may leave its ball or be judged anew.
    """
    kind = torch.float64 if adversarial.dtype == torch.float64 else torch.float32
    tensors = {"clean": clean.to(kind).contiguous(), "adversarial": adversarial.to(kind).contiguous()}
    with replacing(_path(folder, index)) as temporary:
        # Written here and not by the library, whose errors for a full disk are not those of the operating system.
        temporary.write_bytes(save(tensors, metadata=facts))


def save_to_gallery(folder: Path, index: int, clean: Tensor, adversarial: Tensor, facts: dict[str, str]) -> None:
    """Keep the `GALLERY_SIZE` images of lowest number, whatever the order in which they come."""
    numbers = _numbers(folder)
    if len(numbers) >= GALLERY_SIZE and index > numbers[-1]:
        return
    save_pair(folder, index, clean, adversarial, facts)
    trim_gallery(folder)


def trim_gallery(folder: Path) -> None:
    """Delete the images beyond `GALLERY_SIZE`; of several processes that save at once, each may leave one too many."""
    for surplus in _numbers(folder)[GALLERY_SIZE:]:
        _path(folder, surplus).unlink(missing_ok=True)


def _numbers(folder: Path) -> list[int]:
    return sorted(int(path.stem) for path in folder.glob("[0-9]*.safetensors"))


def _path(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.safetensors"


# The stages of an attack run, and the pictures that they leave


@dataclass(frozen=True)
class Stage:
    """One attack at one eps for one goal."""

    attack: Attack
    threat: ThreatModel
    eps_text: str
    goal: Goal

    @property
    def title(self) -> str:
        about = "" if self.goal.spec == "misclassify" else f" {self.goal.spec}"
        return f"{self.attack.name} {self.threat.norm} {self.eps_text}{about}"


def save_pictures(
    folder: RunFolder,
    result: Result,
    fact: CleanFact,
    stage: Stage,
    *,
    every: bool,
    say: Callable[[Tensor], list[str]] | None = None,
) -> None:
    """Keep a success for the gallery, and among all adversarial images if `every` one is wanted.

    Args:
        say: what the model says of images in words, to be kept with them.
    """
    about = picture_facts(result, fact, stage)
    if say is not None:
        before, after = say(torch.stack([result.job.pixels, result.adversarial]))
        about |= {"clean_words": before, "words": after}
    pictures = (result.job.index, result.job.pixels, result.adversarial, about)
    save_to_gallery(folder.gallery_path, *pictures)
    if every:
        save_pair(folder.adversarial_path, *pictures)


def picture_facts(result: Result, fact: CleanFact, stage: Stage) -> dict[str, str]:
    """Return the metadata that goes with a saved pair of images."""
    shown = {
        "image_id": fact.image_id,
        "index": fact.index,
        "label": fact.label,
        "clean_prediction": fact.prediction,
        "prediction": result.prediction,
        "clean_confidence": fact.confidence,
        "confidence": result.confidence,
        "attack": stage.attack.name,
        "eps": stage.threat.eps,
    }
    return {key: str(value) for key, value in shown.items()}
