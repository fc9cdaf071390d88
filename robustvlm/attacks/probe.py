"""What a model is asked before an attack: is it finite, repeatable, and does it treat each image on its own?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustvlm.attacks.objectives import objective
from robustvlm.attacks.oracle import DRAWS_IF_RANDOM, EOT_IF_RANDOM, UPHOLDING_DRAWS, Oracle
from robustvlm.core.batches import COUPLED, TRIES, steady_sizes
from robustvlm.errors import UserError, is_out_of_memory
from robustvlm.text import one_line

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
        return self.repeat_change > COUPLED

    @property
    def coupled(self) -> bool:
        """Whether an image's logits depend on the other images of its batch (a random model cannot be told)."""
        return not self.shown_random and self.batch_change > COUPLED


def probe(oracle: Oracle, images: Tensor, label: Tensor) -> Probe:
    """Ask the model about a full batch of images [L, 3, H, W], its repetition, and the same rows among others.

    Example:
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
    batch = _neighbour_change(oracle, images, confirmed)
    repeat, thrice = _relative_change(again, logits), _relative_change(confirmed, logits)
    if thrice > COUPLED and oracle.precision != "bf16":  # one that draws seldom may say the same thing twice
        repeat = max(repeat, thrice)
    if batch > COUPLED >= repeat:
        repeat = _seldom(oracle, images, confirmed) or repeat
    rungs: tuple[int, ...] = (len(images),)
    declared = declared_draws(oracle.model)
    if finite and (repeat or declared):
        rungs = tuple(len(images) >> k for k in range(len(images).bit_length()))
    elif finite:
        rungs = _rungs(oracle, images, label, (logits, grad, confirmed))
    return Probe(
        finite=finite,
        repeat_change=repeat,
        batch_change=batch,
        zero_gradients=(grad.flatten(1).abs().amax(1) == 0).double().mean().item(),
        rungs=rungs,
        rows=len(images),
        declared=declared,
    )


def declared_draws(model: object) -> int:
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
    """Let the oracle average over the draws of a random model and judge it by fresh ones, as told or as is usual.

    A success is to hold in more draws besides, but for who asks for one draw, to know what one draw says.
    """
    eot_if_random = max(eot_if_random, found.declared)
    oracle.eot = eot if eot is not None else eot_if_random if found.random else 1
    oracle.draws = draws if draws is not None else DRAWS_IF_RANDOM if found.random else 1
    oracle.upholding = UPHOLDING_DRAWS if found.random and 1 < oracle.draws < UPHOLDING_DRAWS else 0


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
    repeat, batch = _relative_change(oracle.confirm(images), logits), _neighbour_change(oracle, images, logits)
    if batch > COUPLED >= repeat:
        repeat = _seldom(oracle, images, logits) or repeat
    return repeat, batch


def _seldom(oracle: Oracle, images: Tensor, logits: Tensor) -> float:
    """Return how far the same question moves logits in a few more tries: one that draws seldom seems to be coupled."""
    return max(_relative_change(oracle.confirm(images), logits) for _ in range(TRIES))


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
