"""Runs a published attack over a stream of jobs, and judges what comes back by our own rules."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from robustvlm.attacks.boundary import lengths
from robustvlm.attacks.external.programs import Program, listening, program
from robustvlm.attacks.external.spec import ExternalAttack, require_fit
from robustvlm.attacks.external.watched import Watched
from robustvlm.attacks.goals import Case, Goal, Misclassify
from robustvlm.attacks.jobs import FAILED, FOOLED, ROBUST, Job, Result
from robustvlm.attacks.oracle import Oracle
from robustvlm.attacks.rungs import smallest
from robustvlm.attacks.tally import Answer
from robustvlm.attacks.threat import ThreatModel, perturbation_norms, project
from robustvlm.core.batches import narrower
from robustvlm.core.foreign_text import one_line
from robustvlm.core.memory import is_out_of_memory
from robustvlm.core.seeds import derive_seed
from robustvlm.core.side_effects import same_random_state
from robustvlm.errors import UserError

# Beyond this share of eps a point is outside its ball for more than rounding in float32.
_ROUNDING = 1e-4


@dataclass(frozen=True)
class Finding:
    """Something about the package's answers that a reader should know: a level (note, warning) and a sentence."""

    name: str
    level: str
    message: str


class ExternalEngine:
    """Attacks jobs batch by batch with a published package; the interface is that of `LaneEngine`.

    A point outside the ball is projected back, and every point is judged by the oracle in full precision. The seed of
    a batch follows from the run's seed and the ids of its images, so that a repeated run repeats its answers; other
    batch sizes draw other numbers, since the packages share theirs across a batch.

    Args:
        oracle: the model; passes made inside the package are counted in it.
        attack: what to run; threat: the ball; seed: run seed.
        lanes: images per batch.
        goal: what the attacker wants; the packages know only a wrong class.
        rungs: batch sizes, descending, on which the model gives bit-identical rows.
        on_pass: called after every pass, with the images and the passes in it.
        permit: called before every pass with the passes it will take; what it raises ends the run at once, and the
            batch in hand is lost.

    Example:
        >>> from robustvlm.attacks.external.spec import parse_external
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> attack, ball = parse_external("torchattacks:PGD:steps=3"), ThreatModel("Linf", 0.5)
        >>> engine = ExternalEngine(Oracle(model), attack, ball, lanes=4, seed=0)
        >>> jobs = [Job(str(i), i, torch.rand(3, 2, 2), label=0) for i in range(6)]
        >>> [result.job.index for result in engine.run(jobs)]
        [0, 1, 2, 3, 4, 5]
    """

    def __init__(
        self,
        oracle: Oracle,
        attack: ExternalAttack,
        threat: ThreatModel,
        *,
        lanes: int,
        seed: int,
        goal: Goal | None = None,
        rungs: Sequence[int] = (),
        on_pass: Callable[[int, int], None] | None = None,
        permit: Callable[[int], None] | None = None,
    ) -> None:
        self.oracle, self.attack, self.threat, self.seed = oracle, attack, threat, seed
        self.goal = goal or Misclassify()
        self.rungs = tuple(rungs) or (lanes,)
        self._model = Watched(oracle, on_pass, permit)
        self._program: Program | None = None
        self._outside = self._broken = 0
        self._farthest = 1.0
        self._heard: dict[str, None] = {}

    @property
    def findings(self) -> list[Finding]:
        """What is to be said of the package's answers so far."""
        found = [Finding(f"{self.attack.name} says", "note", f"{text}.") for text in self._heard]
        if self._outside:
            message = (
                f"{self._outside} points of '{self.attack.name}' lay outside the ball, by up to "
                f"{self._farthest - 1:.2%} of eps: they were projected back and judged there."
            )
            found.append(Finding(f"ball of {self.attack.name}", "warning", message))
        if self._broken:
            message = f"{self._broken} points of '{self.attack.name}' were not finite and count as unchanged images."
            found.append(Finding(f"output of {self.attack.name}", "warning", message))
        return found

    def run(self, jobs: Iterable[Job]) -> Iterator[Result]:
        """Attack every job; results come batch by batch, in the order of the jobs."""
        source = iter(jobs)
        while batch := list(islice(source, self.rungs[0])):
            while batch:
                now, later = batch[: self.rungs[0]], batch[self.rungs[0] :]
                try:
                    results = self._attack(now)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error) or self.rungs[0] == 1:
                        raise
                    self._halve()
                    continue
                yield from results
                batch = later

    def _halve(self) -> None:
        """Go on with smaller batches after running out of memory."""
        self.rungs = narrower(self.rungs)
        if self.oracle.device.type == "cuda":
            torch.cuda.empty_cache()

    def _attack(self, batch: list[Job]) -> list[Result]:
        began, before = time.perf_counter(), self._spent()
        x0 = torch.stack([job.pixels for job in batch]).to(self.oracle.device, torch.float32)
        label = torch.tensor([job.label for job in batch], dtype=torch.int64, device=self.oracle.device)
        seed = derive_seed(self.seed, self.attack.name, *(job.image_id for job in batch)) % 2**32
        if self._program is None:
            self._program = self._prepare(x0)
        points = self._inside(self._call(self._program, x0, label, seed), x0)
        answer = self._judge(points, label)
        forward, backward = (after - earlier for after, earlier in zip(self._spent(), before, strict=True))
        seconds = (time.perf_counter() - began) / len(batch)
        passes, steps = _shares(forward + backward, len(batch)), _shares(backward, len(batch))
        return [
            _result(job, answer, row, points[row].cpu(), passes=passes[row], steps=steps[row], seconds=seconds)
            for row, job in enumerate(batch)
        ]

    def _prepare(self, x0: Tensor) -> Program:
        n_classes = self.oracle.confirm(x0[:1]).shape[1]
        require_fit(self.attack, self.threat, n_classes=n_classes, goal=self.goal)
        return program(self.attack, self._model, self.threat, n_classes)

    def _call(self, run: Program, x0: Tensor, label: Tensor, seed: int) -> Tensor:
        """Return the points that the package finds; its failures become one line that names it."""
        with same_random_state(), listening() as heard:
            try:
                points = run(x0.clone(), label.clone(), seed)
            except UserError:
                raise
            except Exception as error:
                if is_out_of_memory(error) or error is self._model.refusal:
                    raise
                said = f"{type(error).__name__}: {one_line(error, limit=200)}"
                raise UserError(
                    f"'{self.attack.name}' failed inside its package on {len(x0)} images ({said}): "
                    "check its options, or take our own attack of that kind"
                ) from error
        self._heard |= dict.fromkeys(heard)
        if points.shape != x0.shape:
            raise UserError(f"'{self.attack.name}' gave back the shape {list(points.shape)}, not {list(x0.shape)}")
        return points.to(x0)

    def _inside(self, points: Tensor, x0: Tensor) -> Tensor:
        """Return the points, those outside the ball projected onto it; by how much they were outside is kept."""
        finite = points.flatten(1).isfinite().all(1)
        self._broken += int((~finite).sum())
        points = torch.where(finite[:, None, None, None], points, x0)
        size = lengths(points.double() - x0.double(), self.threat.norm) / self.threat.eps
        flat = points.double().flatten(1)
        beyond = torch.maximum(-flat.amin(1), flat.amax(1) - 1).clamp_min(0)
        # A pixel beyond [0, 1] counts as being outside by as much.
        size = torch.where(beyond > 0, size.clamp_min(1 + beyond / self.threat.eps), size)
        self._outside += int((size > 1 + _ROUNDING).sum())
        self._farthest = max(self._farthest, size.max().item())
        outside = (size > 1)[:, None, None, None]
        return torch.where(outside, project(points, x0, self.threat), points)

    def _judge(self, points: Tensor, label: Tensor) -> Answer:
        """Return our own answers, from a batch of a shape on which rows are bit-identical where there is one."""
        spare = torch.arange(smallest(self.rungs, len(points)), device=points.device) % len(points)
        return self.oracle.judge(points[spare], self.goal, Case(label[spare])).head(len(points))

    def _spent(self) -> tuple[int, int]:
        return self.oracle.passes.forward, self.oracle.passes.backward


def _shares(total: int, n: int) -> list[int]:
    """Split a number into `n` whole shares that differ by one at most.

    Example:
        >>> _shares(7, 3)
        [3, 2, 2]
    """
    whole, rest = divmod(total, n)
    return [whole + (row < rest) for row in range(n)]


def _result(
    job: Job, answer: Answer, row: int, adversarial: Tensor, *, passes: int, steps: int, seconds: float
) -> Result:
    finite = bool(answer.finite[row])
    linf, l2 = perturbation_norms(adversarial, job.pixels)
    cosine = answer.cosine[row].item()
    return Result(
        job=job,
        outcome=FAILED if not finite else FOOLED if bool(answer.reached[row]) else ROBUST,
        prediction=int(answer.prediction[row]) if finite else -1,
        confidence=answer.confidence[row].item(),
        margin=answer.margin[row].item(),
        cosine=None if cosine != cosine else cosine,
        steps=steps,
        passes=passes,
        run=0,
        linf=linf,
        l2=l2,
        seconds=seconds,
        adversarial=adversarial,
    )
