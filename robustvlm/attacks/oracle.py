"""The model as attacks see it: every pass counted, answers summed over its draws, and what it is asked beforehand."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robustvlm.attacks.goals import Case, Goal
from robustvlm.attacks.objectives import Mixture, Objective, objective
from robustvlm.core.batches import steady_sizes
from robustvlm.core.boundary import Boundary, borrowed, placed
from robustvlm.core.device import Stopwatch, sent
from robustvlm.core.seeds import derive_seed, full_precision_kernels, own_draws
from robustvlm.errors import UserError, is_out_of_memory, nearest
from robustvlm.text import one_line

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
        return goal.loss(output, objective, case)

    def loss_of(one: Objective, rows: Tensor) -> Tensor:
        rows = sent(rows, output.device)
        return goal.loss(output[rows], one, case.rows(rows))

    return objective.loss(loss_of)


def _layout(model: nn.Module) -> torch.memory_format:
    """Channels last for convolutional encoders, whose kernels are faster on it; the default for others."""
    spatial = [part for part in model.modules() if isinstance(part, nn.Conv2d) and max(part.kernel_size) > 1]
    # A transformer has one such layer, which cuts the image into patches; a convolutional encoder has many.
    return torch.channels_last if len(spatial) > 3 else torch.contiguous_format


# Questions put to a model before the attack: is it finite, repeatable, and does it treat each image on its own?

# Rounding between batch shapes moves a logit by about 1e-6 of its size; batch statistics move it by percents.
_COUPLED = 1e-3

# Draws of a random model per gradient, and those that judge a point, unless the user says otherwise; the latter odd, so
# that there is a majority.
EOT_IF_RANDOM, DRAWS_IF_RANDOM = 10, 21

# An attack puts one image to the question hundreds of times, and one lucky majority of few draws ends it: of a model
# that is wrong in 30 % of its draws, 21 are mostly wrong in 2.6 % of the cases, 101 in 0.002 %. So a success is to hold
# in the majority of so many fresh draws as well, where the caller of an attack asks for that.
UPHOLDING_DRAWS = 101

# What torch says when nothing leads from the output back to the pixels.
_NO_GRADIENT = ("does not require grad", "not have been used in the graph")


@dataclass(frozen=True)
class Probe:
    """What a model's answers to one batch of images say about it.

    Args:
        finite: all logits are finite.
        repeat_change: largest change of a logit when the same batch is asked again, relative to the logits' spread.
        batch_change: largest relative change of an image's logits when its neighbours in the batch are replaced.
        zero_gradients: share of images whose cross-entropy gradient is exactly zero.
        rungs: batch sizes, descending, in all of which and at every place an image gets the same bits (`steady_sizes`);
            halves of the full one where no two answers are the same, the full one alone where they are not finite.
        rows: images of the full batch, for which memory sufficed.
        declared: draws that a gradient should be averaged over, by the word of a part of the model that draws at
            random (its attribute `random_draws`); 0 where none says so. The first images need not show it.
    """

    finite: bool
    repeat_change: float
    batch_change: float
    zero_gradients: float
    rungs: tuple[int, ...]
    rows: int = 0
    declared: int = 0

    def fewer_than(self, lanes: int) -> str | None:
        """Say why batches have fewer rows than `lanes`; None where they do not."""
        if self.rungs[0] >= lanes:
            return None
        if self.rows == lanes:
            return f"{self.rungs[0]} lanes are used, as in more the last digits of an answer tell an image's place"
        return f"memory did not suffice for more than {self.rungs[0]} lanes"

    @property
    def random(self) -> bool:
        """Whether two identical queries differ by more than rounding, or a part says that they may."""
        return self.shown_random or self.declared > 0

    @property
    def shown_random(self) -> bool:
        """Whether two identical queries did differ by more than rounding."""
        return self.repeat_change > _COUPLED

    @property
    def coupled(self) -> bool:
        """Whether an image's logits depend on the other images of its batch (a random model cannot be told)."""
        return not self.shown_random and self.batch_change > _COUPLED


def probe(oracle: Oracle, images: Tensor, label: Tensor) -> Probe:
    """Ask the model about a full batch of images [L, 3, H, W], its repetition, and the same rows among others.

    Example:
        >>> import torch
        >>> oracle = Oracle(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)))
        >>> report = probe(oracle, torch.rand(4, 3, 2, 2), torch.zeros(4, dtype=torch.int64))
        >>> report.finite, report.random, report.coupled
        (True, False, False)
    """
    images, label = images.to(oracle.device, oracle.dtype), label.to(oracle.device)
    ce = objective("ce")
    confirmed = oracle.confirm(images)
    label = label.clamp_max(confirmed.shape[1] - 1)  # outputs may be features, fewer than there are classes
    logits, _, grad = oracle.gradient(images, ce, label, label)
    again = oracle.gradient(images, ce, label, label)[0]
    finite = bool(logits.isfinite().all())
    repeat = _relative_change(again, logits)
    rungs: tuple[int, ...] = (len(images),)
    declared = _declared_draws(oracle.model)
    if finite and (repeat or declared):
        rungs = tuple(len(images) >> k for k in range(len(images).bit_length()))
    elif finite:
        rungs = _rungs(oracle, images, label, (logits, grad, confirmed))
    return Probe(
        finite=finite,
        repeat_change=repeat,
        batch_change=_neighbour_change(oracle, images, confirmed),
        zero_gradients=(grad.flatten(1).abs().amax(1) == 0).double().mean().item(),
        rungs=rungs,
        rows=len(images),
        declared=declared,
    )


def _declared_draws(model: object) -> int:
    """Return the most draws that a part of a model asks gradients to be averaged over; 0 where no part says so."""
    parts = model.modules() if isinstance(model, torch.nn.Module) else ()
    return max((int(getattr(part, "random_draws", 0)) for part in parts), default=0)


def ask_first(oracle: Oracle, images: Tensor, label: Tensor, *, model: str) -> Probe:
    """Probe a model on images [L, 3, H, W] and labels [L], with half as many for as long as memory runs out.

    Args:
        model: how errors name it, as "model 'tiny'".

    Raises:
        UserError: the model fails on such a batch, or gives no gradient.
    """
    while True:
        try:
            return probe(oracle, images, label)
        except UserError:
            raise
        except Exception as error:  # the model may be the user's code, which fails in any way
            if not is_out_of_memory(error):
                raise UserError(_failure(error, oracle, len(images), model)) from error
            if len(images) == 1:
                raise
            images, label = images[: len(images) // 2], label[: len(label) // 2]


def settle_draws(
    oracle: Oracle,
    found: Probe,
    *,
    eot: int | None = None,
    draws: int | None = None,
    eot_if_random: int = EOT_IF_RANDOM,
) -> None:
    """Let the oracle average over the draws of a random model and judge it by fresh ones, as told or as is usual."""
    eot_if_random = max(eot_if_random, found.declared)
    oracle.eot = eot if eot is not None else eot_if_random if found.random else 1
    oracle.draws = draws if draws is not None else DRAWS_IF_RANDOM if found.random else 1


def _failure(error: Exception, oracle: Oracle, n_images: int, model: str) -> str:
    if any(sign in str(error) for sign in _NO_GRADIENT):
        return (
            f"{model} gives no gradient with respect to the pixels: its image encoder must be differentiable, "
            "without torch.no_grad, detach or numpy inside"
        )
    said = f"{type(error).__name__}: {one_line(error, limit=200)}"
    return f"{model} failed on a batch of {n_images} images in {oracle.precision}: {said}"


def row_changes(oracle: Oracle, images: Tensor) -> tuple[float, float]:
    """Return the largest relative changes of logits when images [L, ...] are asked again, and among other neighbours.

    Example:
        >>> oracle = Oracle(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)))
        >>> max(row_changes(oracle, torch.rand(4, 3, 2, 2))) < 1e-3
        True
    """
    logits = oracle.confirm(images)
    return _relative_change(oracle.confirm(images), logits), _neighbour_change(oracle, images, logits)


def _neighbour_change(oracle: Oracle, images: Tensor, logits: Tensor) -> float:
    """Put the first row last, among flipped, darkened copies of the others, and see whether its logits notice.

    Moving it shows also what only looks at earlier rows, such as a running mean.
    """
    if len(images) < 2:
        return 0.0
    others = images.flip(-1) * 0.5
    others[-1] = images[0]
    return _relative_change(oracle.confirm(others)[-1:], logits[:1], spread=logits)


def _relative_change(new: Tensor, old: Tensor, *, spread: Tensor | None = None) -> float:
    scale = (old if spread is None else spread).double().std().clamp_min(1e-12)
    change = ((new - old).double().abs().max() / scale).item()
    return change if change == change else 0.0


def _rungs(oracle: Oracle, images: Tensor, label: Tensor, full: tuple[Tensor, Tensor, Tensor]) -> tuple[int, ...]:
    """Return the sizes on which logits, gradients and confirmed logits of an image are the same to the bit."""

    def ask(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = rows.to(images.device)
        logits, _, grad = oracle.gradient(images[rows], objective("ce"), label[rows], label[rows])
        return logits, grad, oracle.confirm(images[rows])

    return steady_sizes(ask, len(images), full)
