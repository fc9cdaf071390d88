"""Runs a published attack over a stream of jobs, and judges what comes back by our own rules."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from robustvlm.attacks.base import FAILED, FOOLED, ROBUST, Job, Result
from robustvlm.attacks.external import VERSIONS, ExternalAttack, package, require_fit
from robustvlm.attacks.goals import Case, Goal, Misclassify
from robustvlm.attacks.oracle import Answer, Oracle
from robustvlm.attacks.threat import ThreatModel, lengths, perturbation_norms, project
from robustvlm.core.batches import narrower_after, smallest
from robustvlm.core.boundary import same_random_state
from robustvlm.core.seeds import derive_seed, full_precision_kernels
from robustvlm.errors import UserError, is_out_of_memory
from robustvlm.text import one_line

# The model as a published package sees it: an ordinary module whose every pass we count


class Watched(nn.Module):
    """Pixels [B, 3, H, W] in [0, 1] to float32 logits [B, K], always in evaluation mode, passes counted in the oracle.

    `permit` is asked before every pass, `on_pass` told after it. The model itself is hidden from the package: changing
    the wrapper's mode or weights cannot reach it.

    Example:
        >>> oracle = Oracle(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)))
        >>> model = Watched(oracle).train()
        >>> x = torch.rand(5, 3, 2, 2, requires_grad=True)
        >>> model(x).sum().backward()
        >>> model.training, oracle.passes.forward, oracle.passes.backward
        (False, 5, 5)
    """

    def __init__(
        self,
        oracle: Oracle,
        on_pass: Callable[[int, int], None] | None = None,
        permit: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__()
        self._hidden = (oracle,)
        self._on_pass, self._permit = on_pass, permit
        self.refusal: Exception | None = None
        # Packages ask for the device of the first parameter.
        self.anchor = nn.Parameter(torch.empty(0, device=oracle.device), requires_grad=False)
        self.training = False

    def train(self, mode: bool = True) -> Watched:
        """Stay in evaluation mode: torchattacks switches to whatever mode it found."""
        del mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        (oracle,) = self._hidden
        self._ask(len(x) * (2 if x.requires_grad and torch.is_grad_enabled() else 1))
        began, ended = time.perf_counter(), [0.0]
        # A view, so that a hook can tell when the backward pass has come back to the pixels.
        x = x.view_as(x)
        with full_precision_kernels():
            logits: Tensor = oracle.outputs(x).float()
        self._count(len(x), began, backward=False)
        if logits.requires_grad:
            logits.register_hook(lambda _: ended.__setitem__(0, time.perf_counter()))
            x.register_hook(lambda grad: self._count(len(grad), ended[0], backward=True))
        return logits

    def _ask(self, passes: int) -> None:
        try:
            if self._permit is not None:
                self._permit(passes)
        except Exception as error:
            self.refusal = error
            raise

    def _count(self, images: int, began: float, *, backward: bool) -> None:
        (oracle,) = self._hidden
        if oracle.device.type == "cuda":
            torch.cuda.synchronize(oracle.device)
        oracle.passes.watch.add(time.perf_counter() - began)
        oracle.passes.forward += 0 if backward else images
        oracle.passes.backward += images if backward else 0
        if self._on_pass is not None:
            self._on_pass(images, images)


# From the description of a published attack to a function on batches

# (images [B, 3, H, W], labels [B], seed) to points [B, 3, H, W].
Program = Callable[[Tensor, Tensor, int], Tensor]

_TARGETS = 9  # target classes of the published ensembles
_LOGGER = "auto-attack"


def program(attack: ExternalAttack, model: Watched, threat: ThreatModel, n_classes: int) -> Program:
    """Return the attack as a function; a call leaves the global random state as it was and prints nothing."""
    make = _torchattacks if attack.package == "torchattacks" else _autoattack

    def run(x: Tensor, y: Tensor, seed: int) -> Tensor:
        cuda = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(seed)
            points: Tensor = make(attack, model, threat, n_classes, seed)(x, y)
        return points.detach()

    return run


def _torchattacks(attack: ExternalAttack, model: Watched, threat: ThreatModel, n_classes: int, seed: int) -> Any:
    kind = getattr(package("torchattacks"), attack.kind)
    known = inspect.signature(kind).parameters
    decided = {
        "eps": threat.eps,
        "max_epsilon": threat.eps,
        "norm": threat.norm,
        "seed": seed,
        "n_classes": min(n_classes, _TARGETS + 1),
    }
    return kind(model, **{key: value for key, value in decided.items() if key in known}, **attack.settings)


def _autoattack(attack: ExternalAttack, model: Watched, threat: ThreatModel, n_classes: int, seed: int) -> Any:
    version = attack.kind if attack.kind in VERSIONS else "standard"
    whole = package("pyautoattack").AutoAttack(
        model, norm=threat.norm, eps=threat.eps, seed=seed, version=version, device=model.anchor.device
    )
    if attack.kind not in VERSIONS:
        whole.attacks_to_run = [attack.kind]
    _set_steps(whole, attack.settings.get("steps"))
    targets = min(attack.settings.get("targets", _TARGETS), n_classes - 1)
    whole.apgd_targeted.n_target_classes = whole.fab.n_target_classes = targets
    whole.square.n_queries = attack.settings.get("queries", whole.square.n_queries)
    if "restarts" in attack.settings:
        for part in (whole.apgd, whole.apgd_targeted, whole.fab, whole.square):
            part.n_restarts = attack.settings["restarts"]
    return lambda x, y: whole.run_standard_evaluation(x, y, batch_size=len(x))[0]


def _set_steps(whole: Any, steps: int | None) -> None:
    """Change the number of steps; APGD derives its checkpoints from it when it is made, so it is made again."""
    if steps is None:
        return
    whole.fab.n_iter = steps
    for name in ("apgd", "apgd_targeted"):
        old = getattr(whole, name)
        fields = ("norm", "n_restarts", "eps", "seed", "eot_iter", "device", "logger")
        setattr(whole, name, type(old)(old.model, n_iter=steps, **{field: getattr(old, field) for field in fields}))


class _Warnings(logging.Handler):
    def __init__(self, heard: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.heard = heard

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(record.getMessage().split(" See flags_doc.md")[0])


@contextlib.contextmanager
def listening() -> Iterator[list[str]]:
    """Keep what the packages print off the terminal, and yield the list of the warnings that they give."""
    heard: list[str] = []
    logger, handler, trace = logging.getLogger(_LOGGER), _Warnings(heard), sys.gettrace()
    before = logger.propagate
    logger.propagate = False
    logger.addHandler(handler)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield heard
    finally:
        logger.removeHandler(handler)
        logger.propagate = before
        sys.settrace(trace)  # pyautoattack takes it away to look for dynamic defences


# Runs a published attack over a stream of jobs, and judges what comes back by our own rules

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

    A point outside the ball is projected back, and every point is judged by the oracle in full precision; a success on
    a random model is to hold in as many more draws as one of ours. The seed of
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
        >>> from robustvlm.attacks.external import parse_external
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
        found = [Finding(f"words of the program, {self.attack.name}", "note", f"{text}.") for text in self._heard]
        if self._outside:
            message = (
                f"{self._outside} points of '{self.attack.name}' lay outside the ball, by up to "
                f"{self._farthest - 1:.2%} of eps: they were projected back and judged there."
            )
            found.append(Finding(f"ball, of {self.attack.name}", "warning", message))
        if self._broken:
            message = f"{self._broken} points of '{self.attack.name}' were not finite and count as unchanged images."
            found.append(Finding(f"output, of {self.attack.name}", "warning", message))
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
                    self.rungs = narrower_after(error, self.rungs, self.oracle.device)
                    continue
                yield from results
                batch = later

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
        about: dict[str, Any] = {"seconds": seconds, "attack": self.attack.name}
        return [
            _result(job, answer, row, points[row].cpu(), passes=passes[row], steps=steps[row], **about)
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
        answer, _ = self.oracle.decide(points[spare], self.goal, Case(label[spare]))
        return answer.head(len(points))

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
    job: Job, answer: Answer, row: int, adversarial: Tensor, *, passes: int, steps: int, seconds: float, attack: str
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
        attack=attack,
    )
