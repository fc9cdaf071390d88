"""A classifier from class names alone: each class is the mean of its prompts' embeddings, which are kept."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from robustvlm.core.boundary import borrowed
from robustvlm.core.seeds import full_precision_kernels
from robustvlm.errors import UserError
from robustvlm.models.class_cache import Parts, cache_key, embeddings_of, in_batches
from robustvlm.models.vlm import VLM

# A classifier from class names alone: each class is the mean of its prompts' embeddings

_TEXTS_PER_BATCH = 256

_SAME = 1e-5
"""Largest distance of two unit embeddings that count as one: of the same text, computed in two batches."""


class ZeroShotClassifier(nn.Module):
    """A VLM with one unit embedding per class: logits = logit_scale * cosine(image, class), [B, K].

    Example:
        >>> from robustvlm.models import load_model
        >>> classifier = zero_shot(load_model("tiny"), ["apple", "dog"], ["a drawing of {}"], cache=False)
        >>> classifier(torch.rand(3, 3, 64, 64)).shape
        torch.Size([3, 2])
    """

    class_embeddings: torch.Tensor

    def __init__(self, vlm: VLM, class_names: Sequence[str], class_embeddings: torch.Tensor) -> None:
        super().__init__()
        self.vlm = vlm
        self.class_names = tuple(class_names)
        self.register_buffer("class_embeddings", class_embeddings.to(vlm.device))

    @property
    def logit_scale(self) -> float:
        """What cosines are multiplied with."""
        return self.vlm.logit_scale

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return logits [B, K], in the precision of the weights, of square pixels [B, 3, H, H] in [0, 1]."""
        features = self.vlm.encode_image(pixels)
        # Under autocast the encoder may run in bfloat16; the last product would lose the margins attacks turn on.
        with torch.autocast(pixels.device.type, enabled=False):
            return self.vlm.logit_scale * features.to(self.class_embeddings.dtype) @ self.class_embeddings.T


def zero_shot(
    vlm: VLM, class_names: Sequence[str], templates: Sequence[str], *, cache: bool = True
) -> ZeroShotClassifier:
    """Return the zero-shot classifier of `class_names`, each put in place of the {} of every template.

    A class's embedding is the normalised mean of its prompts' normalised embeddings (Radford et al. 2021,
    arXiv 2103.00020, section 3.1.4). With `cache`, embeddings are kept in memory and in the user's cache folder.
    Raises UserError for fewer than 2 or repeated classes, classes that the text encoder gives one embedding, and for a
    template without {}.

    Example:
        >>> from robustvlm.models import load_model
        >>> zero_shot(load_model("tiny"), ["apple"], ["{}"])
        Traceback (most recent call last):
        robustvlm.errors.UserError: a classifier needs at least 2 classes, got 1: 'apple'
    """
    _check_names(class_names)
    _check_templates(templates)
    embeddings = class_embeddings(vlm, class_names, templates, cache=cache)
    if not torch.isfinite(embeddings).all():
        raise UserError(f"the text encoder of '{vlm.spec}' gives NaN or infinite values for these classes")
    require_distinct(vlm, class_names, templates, embeddings)
    classifier = ZeroShotClassifier(vlm, class_names, embeddings)
    classifier.training = False  # but not the caller's model, which is part of it
    return classifier


def class_embeddings(
    vlm: VLM,
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    distinct: bool = False,
    cache: bool = True,
) -> torch.Tensor:
    """Return unit embeddings [K, D] of names, encoding a bounded number of prompts at a time.

    They are computed in the precision of the weights, whatever a run's own precision is: bfloat16 moves an embedding
    by up to 2e-3, and CLIP's temperature of 100 makes of that nearly a tenth of a logit in every margin.

    Args:
        distinct: two names with one embedding are a UserError (`require_distinct`).
        cache: keep them, and take what is kept, bit for bit the same (`kept_embeddings`). Not for a text tower in
            training, whose weights are others each time.

    Example:
        >>> from robustvlm.models import load_model
        >>> class_embeddings(load_model("tiny"), ["apple", "dog"], ["{}", "a {}"]).norm(dim=-1).round(decimals=4)
        tensor([1., 1.])
    """
    own = vlm.class_vectors(class_names)
    if own is not None:
        return own

    def of(names: Sequence[str]) -> torch.Tensor:
        prompts = [template.replace("{}", name) for name in names for template in templates]
        # One class may have more templates than a batch holds.
        features = torch.cat(
            [vlm.encode_text(prompts[i : i + _TEXTS_PER_BATCH]) for i in range(0, len(prompts), _TEXTS_PER_BATCH)]
        )
        return F.normalize(features.view(len(names), len(templates), -1).mean(dim=1), dim=-1)

    def all_of(parts: Parts | None = None) -> torch.Tensor:
        per_batch = max(1, _TEXTS_PER_BATCH // len(templates))
        return in_batches(class_names, per_batch, of, parts=parts, texts_each=len(templates))

    with computing(vlm):
        found = kept_embeddings(vlm, class_names, templates, of, all_of) if cache else all_of()
    if distinct:
        require_distinct(vlm, class_names, templates, found)
    return found


def kept_embeddings(
    vlm: VLM,
    names: Sequence[str],
    templates: Sequence[str],
    of: Callable[[Sequence[str]], torch.Tensor],
    all_of: Callable[[Parts | None], torch.Tensor],
    *,
    kind: str = "",
) -> torch.Tensor:
    """Return the rows [K, D] of fixed texts under a frozen text tower: those kept, else computed once and kept.

    Args:
        of: computes the rows of a few names; all_of: those of all, from the parts that an earlier process has left.
        kind: tells rows apart that are made in another way of the same texts.
    """
    # The first name is always computed: should anything but the weights have changed what the text tower does
    # (a library, the device, the encoder's own files), its bits differ, and so does the key.
    first = of(names[:1])
    if len(names) == 1:
        return first
    probe = first.cpu().numpy().tobytes().hex()
    key = cache_key([kind, vlm.text_fingerprint, _machine(first.device), probe, str(len(names)), *names, *templates])
    found = embeddings_of(key, len(names), all_of, in_parts=len(names) * len(templates) > _TEXTS_PER_BATCH)
    return found.to(first.device, copy=True)  # a caller may write into it


def _machine(device: torch.device) -> str:
    """Return what decides the last bits of large batches, where those of one class may be the same."""
    if device.type == "cpu":
        return f"cpu {torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()} {torch.__version__}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return f"{device.type} {name} {torch.__version__}"


@contextmanager
def computing(vlm: VLM) -> Iterator[None]:
    """Compute embeddings that may be kept and trained against, in the precision of the weights."""
    with torch.inference_mode(False), torch.no_grad(), borrowed(vlm), full_precision_kernels():
        yield


def require_distinct(vlm: VLM, class_names: Sequence[str], templates: Sequence[str], embeddings: torch.Tensor) -> None:
    """Refuse classes with the same embedding [K, D]: one of them could never be the answer, whatever the image.

    It happens to names that are cut at the encoder's context length before they differ, to names that differ in case
    or spaces only, and with an encoder that was never trained.

    Raises:
        UserError: it names the first such pair, and how many there are.
    """
    pairs = _same_rows(embeddings)
    if not pairs:
        return
    first, second = pairs[0]
    prompts = [template.replace("{}", class_names[label]) for label in pairs[0] for template in templates]
    cut = max(vlm.cut_tokens(prompts))
    if cut:
        why = (
            f"prompts are truncated to the encoder's context length ({cut} tokens too long) before they differ: shorten"
        )
    else:
        why = "the text encoder cannot tell these names apart: change them"
    more = f" ({len(pairs)} such pairs)" if len(pairs) > 1 else ""
    raise UserError(
        f"the classes {_short(class_names[first])} and {_short(class_names[second])} have the same embedding in "
        f"'{vlm.spec}', so that one of them could never be the answer{more}; {why} with --classes"
    )


def cut_prompts(vlm: VLM, class_names: Sequence[str], templates: Sequence[str]) -> str | None:
    """Return a sentence about the classes whose prompts exceed the encoder's context length, None if there are none.

    Example:
        >>> from robustvlm.models import load_model
        >>> cut_prompts(load_model("tiny"), ["apple", "dog " * 60], ["a {}"])[:43]
        'the prompts of 1 of 2 classes are longer th'
    """
    longest = max(templates, key=len)
    cut = vlm.cut_tokens([longest.replace("{}", name) for name in class_names])
    count = sum(tokens > 0 for tokens in cut)
    if not count:
        return None
    first = next(label for label, tokens in enumerate(cut) if tokens > 0)
    prompt = _short(longest.replace("{}", class_names[first]))
    what = f"{cut[first]} token{'' if cut[first] == 1 else 's'}"
    return (
        f"the prompts of {count} of {len(class_names)} classes are longer than the text encoder reads and are "
        f"truncated: {what} of {prompt} are cut"
    )


def _same_rows(embeddings: torch.Tensor) -> list[tuple[int, int]]:
    """Return the pairs of neighbours among equal rows [K, D], the earlier one first."""
    rows = embeddings.detach().double().cpu()
    # Rows that near are as near in any one direction, so only neighbours in its order need a look.
    direction = F.normalize(torch.linspace(1.0, 40.0, rows.shape[1], dtype=rows.dtype).cos(), dim=0)
    projected = rows @ direction
    along, order, pairs = projected.tolist(), projected.argsort().tolist(), []
    for place, one in enumerate(order):
        for other in order[place + 1 :]:
            if along[other] - along[one] > _SAME:
                break
            if (rows[one] - rows[other]).norm() <= _SAME:
                pairs.append((min(one, other), max(one, other)))
                break
    return sorted(pairs)


def _short(name: str) -> str:
    """Return a name in quotes; of a long one the beginning and the end, where names of one pattern differ."""
    text = " ".join(name.split())
    return f"'{text}'" if len(text) <= 60 else f"'{text[:30].rstrip()} ... {text[-20:].lstrip()}'"


def _check_names(class_names: Sequence[str]) -> None:
    if isinstance(class_names, str):
        raise UserError(f"class names must be a list, got the one text '{class_names}'")
    if len(class_names) < 2:
        shown = "".join(f": '{name}'" for name in class_names)
        none = "" if class_names else ": the data name none, so pass them, or a column of labels"
        raise UserError(f"a classifier needs at least 2 classes, got {len(class_names)}{shown}{none}")
    counts = Counter(" ".join(name.split()) for name in class_names)
    if "" in counts:
        raise UserError(f"class {[name.strip() for name in class_names].index('')} has an empty name")
    repeated = [f"'{name}'" for name, count in counts.items() if count > 1]
    if repeated:
        more = f" and {len(repeated) - 3} more" if len(repeated) > 3 else ""
        raise UserError(f"class names must differ, repeated: {', '.join(repeated[:3])}{more}")


def _check_templates(templates: Sequence[str]) -> None:
    if isinstance(templates, str) or not templates:
        raise UserError(f"prompt templates must be a list of at least one text, got {templates!r}")
    for template in templates:
        if "{}" not in template:
            raise UserError(f"the prompt template '{template}' has no {{}} for the class name")
