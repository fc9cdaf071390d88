"""What callers bring to the library, checked and made fit for the engine, and what a model says of it unperturbed."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustvlm.attacks.base import Job
from robustvlm.attacks.goals import Case, Goal
from robustvlm.attacks.oracle import Answer, Oracle, Tally
from robustvlm.core.boundary import Boundary, borrowed, in_own_precision
from robustvlm.core.ranks import require_float64, resolve_device
from robustvlm.errors import UserError, is_out_of_memory
from robustvlm.text import one_line

# What callers bring to the library: images, labels and a model of their own, checked and made fit for the engine

# Decoding and resizing in float32 may leave [0, 1] by this much; such pixels are clipped.
_ROUNDING = 1e-5


def as_images(images: Any) -> Tensor:
    """Return images [N, C, H, W] as a detached float tensor in [0, 1], or say in one line what is wrong with them.

    Raises:
        UserError: no tensor of floats [N, C, H, W], no image, or pixels that are not finite or not in [0, 1].

    Example:
        >>> as_images(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
        Traceback (most recent call last):
        robustvlm.errors.UserError: images must be floats in [0, 1], got torch.uint8: divide 8-bit images by 255
    """
    if not isinstance(images, Tensor):
        raise UserError(f"images must be a tensor [N, C, H, W], got a {type(images).__name__}: pass torch.stack(...)")
    if images.ndim != 4:
        hint = ": pass images[None] for a single one" if images.ndim == 3 else ""
        raise UserError(f"images must have the shape [N, C, H, W], got {list(images.shape)}{hint}")
    if not images.is_floating_point():
        raise UserError(f"images must be floats in [0, 1], got {images.dtype}: divide 8-bit images by 255")
    if not images.numel():
        raise UserError(f"there is no pixel in images of the shape {list(images.shape)}: pass at least one image")
    images = images.detach()
    low, high = (float(bound) for bound in images.aminmax())
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
        # NaN compares as false, and is named where it stands.
        broken = (~images.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        if broken:
            raise UserError(f"image {broken[0]} holds NaN or infinite pixels: leave it out")
        raise UserError(
            f"images must lie in [0, 1], got pixels from {low:.4g} to {high:.4g}: divide 8-bit images by 255, and "
            "leave normalisation by mean and standard deviation to the model"
        )
    return images.clamp(0, 1)


def as_labels(labels: Any, count: int, classes: int | None) -> Tensor:
    """Return labels [N] as int64 on the CPU, checked against the number of images and of classes (None: any).

    Raises:
        UserError: no whole numbers [N], or a label that is none of the classes.

    Example:
        >>> as_labels([0, 3], 2, 3)
        Traceback (most recent call last):
        robustvlm.errors.UserError: labels must be from 0 to 2, the model's 3 classes, got 3 for image 1
    """
    try:
        found = torch.as_tensor(labels).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"labels must be whole numbers [N], got a {type(labels).__name__}: {error}") from None
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise UserError(f"labels must be whole numbers, the classes' places, got {found.dtype}")
    if found.shape != (count,):
        hint = ": pass labels.argmax(1) for one-hot rows" if found.ndim == 2 and len(found) == count else ""
        raise UserError(f"labels must have the shape [{count}], one for each image, got {list(found.shape)}{hint}")
    found = found.long()
    wrong = (found < 0) | (found >= classes) if classes is not None else found < 0
    if wrong.any():
        place = int(wrong.nonzero()[0])
        known = "0 or more" if classes is None else f"from 0 to {classes - 1}, the model's {classes} classes"
        raise UserError(f"labels must be {known}, got {int(found[place])} for image {place}")
    return found


def image_ids(images: Tensor) -> list[str]:
    """Return a name for each image [N, C, H, W], a digest of its pixels: random draws follow it and nothing else.

    Example:
        >>> x = torch.rand(3, 1, 2, 2)
        >>> image_ids(x)[1:] == image_ids(x[1:])
        True
    """
    rows = images.detach().float().cpu().contiguous()
    return [hashlib.blake2b(row.numpy().tobytes(), digest_size=16).hexdigest() for row in rows]


def own_device(model: Any, images: Tensor) -> torch.device:
    """Return where a model's weights are; the images' device for one without weights."""
    tensors = itertools.chain(model.parameters(), model.buffers()) if isinstance(model, nn.Module) else iter(())
    place = next((tensor.device for tensor in tensors), images.device)
    require_float64(place)
    return place


class AskedModel(nn.Module):
    """A caller's model as the engine takes it: pixels [N, C, H, W] in [0, 1] to a tensor of outputs [N, O].

    An output with an attribute `logits`, as Hugging Face's models give, is read there. The model keeps its precision,
    which is part of what is attacked; it is neither copied nor changed here.

    Args:
        model: any module or function. unit: scale outputs to unit length, for goals about features.

    Example:
        >>> AskedModel(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)))(torch.rand(2, 3, 2, 2)).shape
        torch.Size([2, 3])
    """

    def __init__(self, model: Any, *, unit: bool = False) -> None:
        super().__init__()
        if isinstance(model, str) or not callable(model):
            hint = f": pass load_classifier({model!r}, classes)" if isinstance(model, str) else ""
            raise UserError(f"model must be a module or function of pixels, got a {type(model).__name__}{hint}")
        self.model, self.unit = model, unit
        # A plain function is no part that `modules()` visits, so what it declares is repeated here.
        self.differentiable = isinstance(model, nn.Module) or getattr(model, "differentiable", True)
        self.surrogate = None if isinstance(model, nn.Module) else getattr(model, "surrogate", None)
        self._boundary = Boundary(self._call, what="the model", parts=model)
        kinds = {tensor.dtype for tensor in self.parameters() if tensor.is_floating_point()}
        self.dtype = torch.float64 if kinds == {torch.float64} else torch.float32

    @property
    def in_half(self) -> bool:
        """Whether outputs are computed in half precision."""
        return self._boundary.in_half

    def forward(self, pixels: Tensor) -> Tensor:
        """Return outputs [N, O], in float32 at least."""
        return self._boundary(pixels)

    def try_out(self, images: Tensor, *, classes: bool = True) -> int:
        """Ask about the first images, and learn how the model has to be asked; return the number of outputs.

        Raises:
            UserError: the model fails, or what it returns is not finite outputs [N, O], O >= 2 for `classes`.
        """
        pixels = images[:2].to(own_device(self.model, images), self.dtype)
        try:
            with borrowed(self), torch.no_grad():
                output = self._boundary.settle(pixels)
        except UserError:
            raise
        except Exception as error:  # the caller's model may fail in any way
            if is_out_of_memory(error):
                raise
            said = f"{type(error).__name__}: {one_line(error, limit=200)}"
            raise UserError(f"the model failed on images {list(pixels.shape)} in [0, 1]: {said}") from error
        if not output.isfinite().all():
            raise UserError("the model gives NaN or infinite outputs for the first images: mend it first")
        if classes and output.shape[1] < 2:
            raise UserError(f"the model must return logits of at least 2 classes, got {list(output.shape)}")
        return output.shape[1]

    def _call(self, pixels: Tensor) -> Any:
        output = self.model(pixels)
        logits = getattr(output, "logits", None)
        if isinstance(logits, Tensor):
            return logits
        if isinstance(output, (Sequence, Mapping)):
            raise UserError(
                f"the model must return its logits as one tensor [N, classes], got a {type(output).__name__}: "
                "pass lambda x: model(x)[0], or whichever part they are"
            )
        return F.normalize(output, dim=-1) if self.unit and isinstance(output, Tensor) else output

    def _apply(self, fn: Any, recurse: bool = True) -> AskedModel:
        return super()._apply(in_own_precision(fn), recurse)


def chosen_device(device: str | torch.device, model: Any, images: Tensor) -> torch.device:
    """Return the device named, "auto" being the model's own."""
    return own_device(model, images) if str(device) == "auto" else resolve_device(device)


# What a model says of unperturbed images, over its draws if it is random, and what goals have to know of that


@dataclass(frozen=True)
class Unperturbed:
    """Clean images: the answers of a goal, the model's mean output [B, O], and the goal's reference [B, R] or None."""

    answer: Answer
    output: Tensor
    reference: Tensor | None


def ask_unperturbed(oracle: Oracle, goal: Goal, images: Tensor, label: Tensor) -> Unperturbed:
    """Return what the model says of clean images [B, 3, H, W] with labels [B].

    The clean feature of a random model is the unit mean over its draws; fresh draws are then compared with it. A brisk
    oracle draws until the majority of all images is decided.

    Example:
        >>> from robustvlm.attacks import Misclassify
        >>> oracle = Oracle(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)))
        >>> ask_unperturbed(oracle, Misclassify(), torch.rand(2, 3, 2, 2), torch.tensor([0, 1])).output.shape
        torch.Size([2, 3])
    """
    label = label.to(oracle.device)
    if oracle.brisk and not goal.refers:
        return _ask_briskly(oracle, goal, images, label)
    outputs = [oracle.confirm(images)]
    total = outputs[0]
    keep = not goal.of_features or oracle.draws == 1
    for _ in range(oracle.draws - 1):
        output = oracle.confirm(images)
        total = total + output
        if keep:
            outputs.append(output)
    mean = total / oracle.draws
    case = Case(label, label, goal.reference(mean, label))
    if not keep:
        return Unperturbed(oracle.judge(images, goal, case), mean, case.reference)
    tally = Tally(goal, case, len(images), oracle.device)
    for output in outputs:
        tally.add(output)
    return Unperturbed(tally.answer(), mean, case.reference)


def _ask_briskly(oracle: Oracle, goal: Goal, images: Tensor, label: Tensor) -> Unperturbed:
    """Ask until the majority of all images is decided."""
    tally = Tally(goal, Case(label, label), len(images), oracle.device)
    total: Tensor | None = None
    for drawn in range(1, oracle.draws + 1):
        output = oracle.confirm(images)
        total = output if total is None else total + output
        tally.add(output)
        if 2 * drawn > oracle.draws and not len(tally.undecided(oracle.draws)):
            break
    assert total is not None
    return Unperturbed(tally.answer(), total / drawn, None)


def needs_briefing(goal: Goal) -> bool:
    """Whether a goal has to know more of the clean images than the clean pass keeps."""
    return goal.refers


def brief(
    jobs: Iterable[Job], oracle: Oracle, goal: Goal, rungs: Sequence[int], n_targets: int
) -> Iterator[tuple[Job, bool]]:
    """Yield every job with the goal's reference and targets, and whether its image reaches the goal unperturbed.

    The model is asked in full batches, or in batches of a size at which it is known to give the same answers.
    """
    source = iter(jobs)
    while batch := list(islice(source, rungs[0])):
        rows = torch.arange(min(rung for rung in rungs if rung >= len(batch))) % len(batch)
        images = torch.stack([job.pixels for job in batch])[rows]
        label = torch.tensor([job.label for job in batch])[rows]
        found = ask_unperturbed(oracle, goal, images, label)
        reached, outputs = found.answer.reached.tolist(), found.output.cpu()
        for row, job in enumerate(batch):
            known = None if found.reference is None else found.reference[row]
            aims = tuple(goal.targets(outputs[row], job.label, n_targets))
            yield replace(job, targets=aims, reference=known), reached[row]
