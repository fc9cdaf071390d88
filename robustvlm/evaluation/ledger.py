"""All facts of an attack run: kept in memory, and appended to the run's journal as they come."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from robustvlm.attacks import FAILED, FOOLED, Result
from robustvlm.data.source import DataSource, select
from robustvlm.evaluation.budget import MeteredOracle
from robustvlm.evaluation.journal_ledger import JournalLedger, cost_of
from robustvlm.runs.folder import RunFolder
from robustvlm.runs.results import NO_ANSWER, AttackFact, CleanFact
from robustvlm.runs.summary import Check, Cost, Estimate, Passes


class Ledger(JournalLedger):
    """The facts of an attack run: unperturbed answers, what the attacks found, why a session stopped."""

    def __init__(self, folder: RunFolder, *, rank: int = 0, session: str | None = None) -> None:
        self.clean: dict[int, CleanFact] = {}
        self.found: dict[tuple[float, str, str, int], AttackFact] = {}
        self.fooled: set[tuple[str, int]] = set()
        self.left_out: dict[int, str] = {}
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
        fact = AttackFact(
            index=result.job.index,
            attack=attack,
            eps=eps,
            goal=goal,
            outcome=result.outcome,
            prediction=result.prediction,
            steps=result.steps,
            passes=result.passes,
            linf=result.linf,
            l2=result.l2,
            margin=result.margin,
            confidence=result.confidence,
            run=result.run,
            seconds=result.seconds,
            cosine=result.cosine,
        )
        self._add({"kind": "attack", **asdict(fact)})

    def add_lost(self, clean: CleanFact, attack: str, eps: float, goal: str, reason: str) -> None:
        """Record an image that was readable in the clean pass and is no longer: the attack could not be made."""
        nothing = AttackFact(
            index=clean.index,
            attack=attack,
            eps=eps,
            goal=goal,
            outcome=FAILED,
            prediction=NO_ANSWER,
            steps=0,
            passes=0,
            linf=0.0,
            l2=0.0,
            margin=clean.margin,
            confidence=clean.confidence,
            run=-1,
            seconds=0.0,
            cosine=clean.cosine,
        )
        self._add({"kind": "attack", **asdict(nothing)})
        message = f"image '{clean.image_id}' could not be read again for the attack: {reason}"
        self.add_checks([Check(name=f"lost image {clean.index}", level="warning", message=message)])

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
            self._add({"kind": "estimate", **estimate.model_dump()})

    def _take_own(self, kind: str, fact: dict[str, Any]) -> None:
        if kind == "clean":
            self.clean[fact["index"]] = CleanFact(**fact)
        elif kind == "left out":
            self.left_out[fact["index"]] = fact["image_id"]
        elif kind == "attack":
            row = AttackFact(**fact)
            self.found[row.eps, row.goal, row.attack, row.index] = row
            if row.outcome == FOOLED:
                self.fooled.add((row.goal, row.index))
        elif kind == "stop":
            self._stops[fact["session"]] = fact["reason"]
        elif kind == "estimate":
            self.estimate = Estimate(**fact)
        else:
            raise ValueError(f"unknown kind of fact '{kind}'")
