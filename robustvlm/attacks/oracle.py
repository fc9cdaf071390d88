"""The model as attacks see it: every pass counted, answers summed over its draws."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robustvlm.attacks.goals import Case, Goal
from robustvlm.attacks.objectives import Mixture, Objective
from robustvlm.core.boundary import Boundary, borrowed, placed
from robustvlm.core.device import Stopwatch, sent
from robustvlm.core.seeds import derive_seed, full_precision_kernels, own_draws
from robustvlm.errors import UserError, nearest

# Answers: what the model says at a batch of points, summed up over the draws of a random model


@dataclass(frozen=True)
class Answer:
    """What the model says at a batch of points, measured by a goal; over the model's draws where it is random.

    Args:
        reached: the goal is reached, in more than half of the draws; bool [B].
        margin: distance from the goal, the largest over the draws, [B]: a point is as good as its worst draw.
        prediction: predicted class, the most frequent among the draws that decided; int64 [B], -1 = rejected.
        confidence: softmax probability of the leading class, mean over the draws, [B].
        finite: all of the model's output is finite; bool [B].
        cosine: the cosine that a feature goal is about, mean over the draws, [B]; NaN for other goals.
    """

    reached: Tensor
    margin: Tensor
    prediction: Tensor
    confidence: Tensor
    finite: Tensor
    cosine: Tensor

    @classmethod
    def join(cls, answers: Sequence[Answer]) -> Answer:
        """Return the rows of several answers as one."""
        return cls(*(torch.cat([getattr(answer, name) for answer in answers]) for name in cls.__dataclass_fields__))

    def head(self, rows: int) -> Answer:
        """Return the first rows."""
        return Answer(*(getattr(self, name)[:rows] for name in self.__dataclass_fields__))

    def rows(self, index: Tensor) -> Answer:
        """Return the rows with these numbers."""
        return Answer(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    def replaced(self, rows: Tensor, other: Answer) -> Answer:
        """Return these answers with those of some rows replaced."""
        pairs = ((getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__)
        return Answer(*(mine.index_copy(0, rows, theirs) for mine, theirs in pairs))


class Tally:
    """Sums up outputs [B, O] draw by draw; memory does not grow with the number of draws but by a class each.

    Rows may be left out of a draw, once their majority is decided; each row is then summed up over its own draws.

    Example:
        >>> from robustvlm.attacks.goals import Misclassify
        >>> tally = Tally(Misclassify(), Case(torch.tensor([0])), 1, torch.device("cpu"))
        >>> for logits in ([[1.0, 0.0]], [[0.0, 1.0]], [[0.0, 2.0]]):
        ...     tally.add(torch.tensor(logits))
        >>> tally.answer().reached.item(), tally.answer().margin.item(), tally.answer().prediction.item()
        (True, 1.0, 1)
    """

    def __init__(self, goal: Goal, case: Case, rows: int, device: torch.device) -> None:
        self.goal, self.case, self._rows = goal, case, rows
        self.votes = torch.zeros(rows, dtype=torch.int64, device=device)
        self.drawn = torch.zeros(rows, dtype=torch.int64, device=device)
        self.margin = torch.full((rows,), float("-inf"), device=device)
        self.confidence = torch.zeros(rows, dtype=torch.float64, device=device)
        self.cosine = torch.zeros(rows, dtype=torch.float64, device=device)
        self.finite = torch.ones(rows, dtype=torch.bool, device=device)
        self.reached: list[Tensor] = []
        self.predictions: list[Tensor] = []
        self.taken: list[Tensor] = []

    def undecided(self, draws: int) -> Tensor:
        """Return the rows whose majority of so many draws may still be either."""
        most = torch.maximum(self.votes, self.drawn - self.votes)
        return (2 * most <= draws).nonzero().flatten()

    def add(self, output: Tensor, rows: Tensor | None = None) -> None:
        """Take in the output of one draw, of all rows or of some [R]."""
        if rows is not None:
            self._add_some(output, rows)
            return
        reached, margin = self.goal.reached(output, self.case), self.goal.margin(output, self.case)
        cosine = self.goal.cosine(output, self.case)
        self.votes = self.votes + reached
        self.margin = torch.maximum(self.margin.to(margin.dtype), margin)
        self.confidence = self.confidence + self.goal.confidence(output)
        self.cosine = self.cosine + (float("nan") if cosine is None else cosine.double())
        self.finite = self.finite & output.isfinite().all(1)
        self.drawn = self.drawn + 1
        self.reached.append(reached)
        self.predictions.append(self.goal.prediction(output))
        self.taken.append(torch.ones_like(reached))

    def _add_some(self, output: Tensor, rows: Tensor) -> None:
        part = Tally(self.goal, self.case.rows(rows), len(rows), output.device)
        part.add(output)
        self.votes, self.drawn = self.votes.index_add(0, rows, part.votes), self.drawn.index_add(0, rows, part.drawn)
        self.margin = self.margin.index_copy(0, rows, torch.maximum(self.margin[rows], part.margin))
        self.confidence = self.confidence.index_add(0, rows, part.confidence)
        self.cosine = self.cosine.index_add(0, rows, part.cosine)
        self.finite = self.finite.index_copy(0, rows, self.finite[rows] & part.finite)
        for name in ("reached", "predictions", "taken"):
            [found] = getattr(part, name)
            getattr(self, name).append(found.new_zeros(self._rows).index_copy(0, rows, found))

    def answer(self) -> Answer:
        """Return the answers over all draws so far."""
        n, once = self.drawn, len(self.predictions) == 1
        reached = 2 * self.votes > n
        return Answer(
            reached=reached,
            margin=self.margin,
            prediction=self.predictions[0] if once else self._leading(reached),
            confidence=self.confidence / n,
            finite=self.finite,
            cosine=self.cosine / n,
        )

    def _leading(self, reached: Tensor) -> Tensor:
        """Return each row's most frequent prediction among the draws on the winning side, the lowest where some tie."""
        predictions, sides = torch.stack(self.predictions), torch.stack(self.reached)
        won = (sides == reached) & torch.stack(self.taken)
        # One draw at a time over all rows: nothing depends on a size that a GPU would have to be asked for.
        counts = torch.stack([((predictions == drawn) & won).sum(0) for drawn in predictions])
        counts = torch.where(won, counts, 0)
        most = counts.amax(0)
        beyond = torch.iinfo(predictions.dtype).max
        leading = torch.where((counts == most) & won, predictions, beyond).amin(0)
        return torch.where(most > 0, leading, predictions[0])


# The model as attacks see it: logits and input gradients of full batches, every pass counted

PRECISIONS = ("fp32", "bf16", "fp64")

# Draws of a random model per gradient, and those that judge a point, unless the user says otherwise; the latter odd, so
# that there is a majority.
EOT_IF_RANDOM, DRAWS_IF_RANDOM = 10, 21

# An attack puts one image to the question hundreds of times, and one lucky majority of few draws ends it: of a model
# that is wrong in 30 % of its draws, 21 are mostly wrong in 2.6 % of the cases, 101 in 0.002 %. So a success is to hold
# in the majority of so many fresh draws as well (`settle_draws`).
UPHOLDING_DRAWS = 101

# A model under attack: pixels [B, 3, H, W] in [0, 1] to outputs [B, O].
Logits = Callable[[Tensor], Tensor]


@dataclass
class Passes:
    """Encoder passes spent, in images (a padded row costs as much as a used one), and the time inside the model."""

    forward: int = 0
    backward: int = 0
    watch: Stopwatch = field(default_factory=Stopwatch, repr=False, compare=False)

    @property
    def seconds(self) -> float:
        """Seconds inside the model; on a GPU by its own clock, and reading them waits for the passes under way."""
        return self.watch.seconds


class Oracle:
    """Answers and input gradients of a model, at a stated precision, with passes and time counted.

    Args:
        model: module from pixels [B, 3, H, W] in [0, 1] to outputs [B, O]; it is in evaluation mode and frozen during
            a pass, and left as it was. One on another device or in another precision is copied here, as it is now.
        device: where the passes run.
        precision: "fp32"; "bf16" for gradients under autocast (answers are confirmed in fp32); "fp64" to check.
        eot: draws of a random model over which losses and gradients are averaged (expectation over transformation,
            Athalye et al. 2018, arXiv 1707.07397), one after the other, so that memory does not grow with them.
        draws: fresh draws of a random model that judge a point, by majority.
        seed: of the model's own draws.
        brisk: judge a point by no more draws than decide the majority of `draws`; margin and confidence are of those.
        compiled: take gradients from a `torch.compile`d copy; the plain model confirms.

    Attributes:
        upholding: draws by whose majority a success is to stand besides, see `UPHOLDING_DRAWS`; 0 for none.

    Example:
        >>> oracle = Oracle(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)))
        >>> oracle.confirm(torch.rand(5, 3, 2, 2)).shape, oracle.passes.forward
        (torch.Size([5, 3]), 5)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: str | torch.device = "cpu",
        precision: str = "fp32",
        eot: int = 1,
        draws: int = 1,
        seed: int = 0,
        brisk: bool = False,
        compiled: bool = False,
    ) -> None:
        if precision not in PRECISIONS:
            raise UserError(f"unknown precision '{precision}': {nearest(precision, PRECISIONS)}")
        self.precision = precision
        self.device = torch.device(device)
        self.dtype = torch.float64 if precision == "fp64" else torch.float32
        self.model = placed(model, self.device, self.dtype)
        self.layout = _layout(model)
        self.eot, self.draws, self.seed, self.brisk = eot, draws, seed, brisk
        self.upholding = 0
        self.passes = Passes()
        self._plain = Boundary(self.model, what="the model", parts=self.model)
        self._fast = (
            Boundary(torch.compile(self.model), what="the model", parts=self.model) if compiled else self._plain
        )
        self._drawn = 0

    @property
    def confirmed(self) -> bool:
        """Whether an answer that comes with a gradient is final, so that it needs no second look."""
        return self.precision != "bf16" and self.eot == self.draws == 1 and self._fast is self._plain

    @property
    def look_passes(self) -> int:
        """Forward passes that one look takes per image."""
        return self.eot

    def made_for(self, purpose: str) -> contextlib.AbstractContextManager[None]:
        """Name what the passes made inside are for; of use to an oracle that tells purposes apart."""
        del purpose
        return contextlib.nullcontext()

    def confirm(self, x: Tensor) -> Tensor:
        """Return full-precision outputs [B, O] of images [B, 3, H, W], one draw of a random model."""
        with self._counted(len(x), backward=False), self._drawing(), torch.no_grad():
            return self.outputs(x).detach()

    def outputs(self, x: Tensor) -> Tensor:
        """Return the model's outputs [B, O] for images on any device; uncounted, and with a gradient if `x` has one.

        The model gets a copy of the images, which it may change in place; its outputs are in float32 at least.
        """
        return self._ask(self._plain, x.to(self.device, self.dtype, memory_format=self.layout))

    def _ask(self, boundary: Boundary, x: Tensor) -> Tensor:
        with borrowed(self.model):
            return boundary(x)

    def judge(self, x: Tensor, goal: Goal, case: Case) -> Answer:
        """Return the answers that decide outcomes: full precision, `draws` fresh draws of a random model."""
        tally = Tally(goal, case, len(x), self.device)
        least = self.draws // 2 + 1 if self.brisk else self.draws
        for _ in range(least):
            tally.add(self.confirm(x))
        for _ in range(self.draws - least):
            rows = tally.undecided(self.draws)
            if not len(rows):
                break
            tally.add(self.confirm(x[rows]), rows)
        return tally.answer()

    def decide(self, x: Tensor, goal: Goal, case: Case) -> tuple[Answer, Tensor]:
        """Return what `judge` does, but where the goal is reached what `upholding` more draws say; and draws [B]."""
        answer = self.judge(x, goal, case)
        spent = torch.full_like(answer.prediction, self.draws)
        rows = answer.reached.nonzero().flatten() if self.upholding else spent[:0]
        if not len(rows):
            return answer, spent
        before, self.draws = self.draws, self.upholding
        try:
            again = self.judge(x[rows], goal, case.rows(rows))
        finally:
            self.draws = before
        return answer.replaced(rows, again), spent.index_add(0, rows, torch.full_like(rows, self.upholding))

    def look(
        self, x: Tensor, goal: Goal, objective: Objective | Mixture, case: Case, *, gradient: bool = True
    ) -> tuple[Answer, Tensor, Tensor]:
        """Return answers, losses [B] and their gradients [B, 3, H, W] (empty without `gradient`), averaged over `eot`.

        A gradient that is not finite is returned as zero: a step along it would lose the image.
        """
        tally = Tally(goal, case, len(x), self.device)
        loss_sum, grad_sum = x.new_zeros(len(x), device=self.device), x.new_zeros(0, device=self.device)
        for _ in range(self.eot):
            output, loss, grad = self._pass(x, lambda out: _loss(goal, out, objective, case), gradient=gradient)
            tally.add(output)
            loss_sum = loss_sum + loss
            grad_sum = grad if not len(grad_sum) else grad_sum + grad
        return tally.answer(), loss_sum / self.eot, grad_sum / self.eot

    def gradient(self, x: Tensor, objective: Objective, label: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return outputs [B, O], losses [B] and input gradients of an objective on the logits; one draw."""
        return self._pass(x, lambda output: objective(output, label, target), gradient=True)

    def _pass(self, x: Tensor, loss_of: Callable[[Tensor], Tensor], *, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
        x = x.detach().to(memory_format=self.layout, copy=True).requires_grad_(gradient)
        with self._counted(len(x), backward=gradient), self._drawing(), torch.set_grad_enabled(gradient):
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
                output = self._ask(self._fast, x)
            output = output.to(self.dtype)
            loss = loss_of(output)
            # Rows do not interact, so the gradient of the sum holds every image's own gradient.
            grad = torch.autograd.grad(loss.sum(), x)[0] if gradient else x.new_zeros(0)
        grad = torch.nan_to_num(grad.contiguous(), nan=0.0, posinf=0.0, neginf=0.0)
        return output.detach(), loss.detach(), grad

    @contextlib.contextmanager
    def _drawing(self) -> Iterator[None]:
        """Give a random model fresh draws that follow from the seed; the caller's random state is left alone."""
        self._drawn += 1
        with own_draws(self.device, derive_seed(self.seed, "draws of the model", self._drawn)):
            yield

    @contextlib.contextmanager
    def _counted(self, images: int, *, backward: bool) -> Iterator[None]:
        with full_precision_kernels():
            self.passes.watch.start(self.device)
            yield
            self.passes.watch.stop(self.device)
        self.passes.forward += images
        self.passes.backward += images if backward else 0


def _loss(goal: Goal, output: Tensor, objective: Objective | Mixture, case: Case) -> Tensor:
    """Return the loss of every row, each by its own objective where the rows belong to several attacks."""
    if not isinstance(objective, Mixture):
        return _loss_of(goal, output, objective, case)

    def loss_of(one: Objective, rows: Tensor) -> Tensor:
        rows = sent(rows, output.device)
        return _loss_of(goal, output[rows], one, case.rows(rows))

    return objective.loss(loss_of)


def _loss_of(goal: Goal, output: Tensor, objective: Objective, case: Case) -> Tensor:
    return (goal.boundary if objective.boundary else goal.loss)(output, objective, case)


def _layout(model: nn.Module) -> torch.memory_format:
    """Channels last for convolutional encoders, whose kernels are faster on it; the default for others."""
    spatial = [part for part in model.modules() if isinstance(part, nn.Conv2d) and max(part.kernel_size) > 1]
    # A transformer has one such layer, which cuts the image into patches; a convolutional encoder has many.
    return torch.channels_last if len(spatial) > 3 else torch.contiguous_format
