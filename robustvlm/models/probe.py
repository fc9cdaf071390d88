"""Asking a model the fixed questions by which it is known again; see `robustvlm.core.probe`."""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustvlm.core import probe as known
from robustvlm.core.boundary import borrowed, same_random_state
from robustvlm.core.probe import Array
from robustvlm.core.seeds import full_precision_kernels
from robustvlm.core.size import Size
from robustvlm.models.vlm import VLM

TOLERANCE = 1e-4
"""How far sketches of unit features in float32 may move between machines; measured in docs/runs.md."""

_TEXTS = ("a photo of a cat", "a photo of a dog")
_DRAWS = 16
# Threads that add up in another order move a sketch by about 1e-7, draws of a model's own by more than this.
_RANDOM = 1e-5
_NUDGE = 1e-6
_AMPLIFIED = 4.0
_ROUNDINGS = 8.0
_MOST = 0.1

Answer = Callable[[Tensor], Tensor]


def probe_model(
    model: VLM | nn.Module,
    *,
    image_size: Size,
    device: torch.device,
    texts: Sequence[str] = (),
    class_vectors: Tensor | None = None,
    outputs: bool = False,
) -> dict[str, Any]:
    """Return what a manifest keeps of a model's answers to fixed inputs.

    Noise of a smoothing is left out (its level and number of draws are settings); a model that draws by itself is asked
    often, under seeds that are always the same, and its mean is compared within the spread. Random states, the caller's
    settings of kernels and the model are left as they were.

    Args:
        model: an encoder, whose features are asked for, or a classifier on top of one or on its own.
        image_size: of the images asked about.
        texts: prompts to ask about; two fixed ones where there are none.
        class_vectors: text embeddings [K, D] that decide the classes.
        outputs: ask for the outputs of `model` as well: logits, perhaps with an acceptance score.
    """
    encoder = model if isinstance(model, VLM) else getattr(model, "vlm", None)
    pixels = torch.from_numpy(known.probe_pixels(image_size))
    parts: dict[str, Any] = {}
    with _as_is(model) as sigma:
        noisy = pixels + sigma * torch.from_numpy(known.probe_noise(tuple(pixels.shape)))
        rounding = _rounding(model)
        questions: dict[str, Callable[[], dict[str, Any]]] = {}
        if encoder is not None:
            wanted = list(texts) or list(_TEXTS)
            questions["image features"] = lambda: _asked(encoder.embed_image, noisy, device, rounding, unit=True)
            questions["text features"] = lambda: known.part(_rows(encoder.encode_text(wanted)), tolerance=rounding)
        if class_vectors is not None:
            questions["class vectors"] = lambda: _of_vectors(_rows(class_vectors), rounding)
        if outputs:
            questions["outputs"] = lambda: _asked(model, noisy, device, rounding)
        for name, question in questions.items():
            # What a user's model fails on here it fails on in the run as well, which says so in its own words; an
            # answer that was there before and is missing now counts as another one.
            with contextlib.suppress(Exception):
                parts[name] = question()
    return {"format": known.FORMAT, "image_size": image_size, "parts": parts}


def probe_encoder(vlm: VLM) -> dict[str, Any]:
    """Return an encoder's answers to the fixed inputs alone, for the card of a model that stands on it.

    Example:
        >>> from robustvlm.models import load_model
        >>> sorted(probe_encoder(load_model("tiny"))["parts"])
        ['image features', 'text features']
    """
    return probe_model(vlm, image_size=vlm.image_size, device=vlm.device)


def _asked(
    answer: Answer, pixels: Tensor, device: torch.device, rounding: float, *, unit: bool = False
) -> dict[str, Any]:
    """Ask about the images two at a time, then moved by what rounding could move them, then under another seed.

    How far the second answers are from the first tells how much of a difference two machines may make. Other third
    answers are those of a random model.

    Args:
        unit: answers are features, of which the direction counts.
    """

    def scaled(rows: Array) -> Array:
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12) if unit else rows

    def ask(pixels: Tensor, seed: int, *, swapped: bool = False) -> Array:
        return scaled(_answers(answer, pixels, device, seed=seed, swapped=swapped))

    raw = _answers(answer, pixels, device, seed=0)
    rounding, first = max(rounding, _ROUNDINGS * _coarseness(raw)), scaled(raw)
    again, moved = ask(pixels, 1), ask(pixels + _NUDGE * (1.0 - 2.0 * pixels), 0, swapped=True)
    size = max(1.0, float(np.nan_to_num(np.linalg.norm(first, axis=1)).max()))
    if _apart(again, first) / size <= _RANDOM:
        allowed = max(rounding, _AMPLIFIED * _apart(moved, first) / size)
        return known.part(first, tolerance=size * min(allowed, _MOST))
    rows = [first, again, *(ask(pixels, seed) for seed in range(2, _DRAWS))]
    spread = np.std([_sketched(row) for row in rows], axis=0, ddof=1) / np.sqrt(_DRAWS)
    return known.part(np.mean(rows, axis=0), tolerance=size * rounding, spread=spread)


def _answers(answer: Answer, pixels: Tensor, device: torch.device, *, seed: int, swapped: bool = False) -> Array:
    """Return the answers [N, D] in double precision; the images of a pair may change places."""
    _seed(seed)
    found = []
    for start in range(0, len(pixels), 2):
        pair = pixels[start : start + 2]
        rows = _rows(answer((pair.flip(0) if swapped else pair).to(device)))
        found.append(rows[::-1] if swapped else rows)
    return np.concatenate(found)


def _coarseness(rows: Array) -> float:
    """Return the precision of the half-precision type that all answers are numbers of; 0 where there is none.

    Example:
        >>> _coarseness(np.array([[0.5, 0.25]])), _coarseness(np.array([[0.1]]))
        (0.0009765625, 0.0)
    """
    tensor = torch.from_numpy(np.nan_to_num(rows))
    kinds = (torch.float16, torch.bfloat16)
    return next((torch.finfo(kind).eps for kind in kinds if torch.equal(tensor.to(kind).double(), tensor)), 0.0)


def _apart(one: Array, other: Array) -> float:
    return float(np.nan_to_num(np.abs(_sketched(one) - _sketched(other))).max())


def _of_vectors(rows: Array, rounding: float) -> dict[str, Any]:
    """Return the sketch of all class vectors [K, D] in two rows: each class with a sign, and with another."""
    signs = np.where(np.array(known.sketch(np.eye(len(rows)))).T[:2] > 0, 1.0, -1.0)
    return known.part(signs @ rows, tolerance=rounding * float(np.sqrt(len(rows))))


def _sketched(rows: Array) -> Array:
    return np.array(known.sketch(rows), dtype=np.float64)


def _rows(found: Tensor) -> Array:
    return np.asarray(found.detach().double().cpu().numpy())


def _rounding(model: nn.Module) -> float:
    """Return the tolerance of the number type that the model computes in: the coarsest of its weights."""
    kinds = {tensor.dtype for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()}
    coarsest = max((torch.finfo(kind).eps for kind in kinds), default=0.0)
    return max(TOLERANCE, _ROUNDINGS * coarsest)


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@contextlib.contextmanager
def _as_is(model: nn.Module) -> Iterator[float]:
    """Ask without gradients, in full float32, and leave all as it was; yield the noise level of a smoothing inside."""
    smoothing = [part for part in model.modules() if isinstance(part, VLM) and hasattr(part, "still")]
    modes = borrowed(model, frozen=False)
    with same_random_state(), torch.no_grad(), full_precision_kernels(), modes, contextlib.ExitStack() as stack:
        for part in smoothing:
            still: Callable[[], contextlib.AbstractContextManager[None]] = part.still  # type: ignore[assignment]
            stack.enter_context(still())
        yield max((float(getattr(part, "sigma", 0.0)) for part in smoothing), default=0.0)
