"""A classifier from class names alone: each class is the mean of its prompts' embeddings, which are kept."""

import contextlib
import hashlib
import os
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

import platformdirs
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from robustvlm.core.boundary import borrowed
from robustvlm.core.seeds import full_precision_kernels
from robustvlm.errors import UserError
from robustvlm.models.vlm import VLM

# Class embeddings kept between calls (in memory) and between runs (in the user's cache folder)

_KEPT_IN_MEMORY = 16
_memory: OrderedDict[str, torch.Tensor] = OrderedDict()


def cache_key(parts: Iterable[str]) -> str:
    """Return a hex digest of `parts`, each told apart from its neighbours.

    Example:
        >>> cache_key(["ab", "c"]) == cache_key(["a", "bc"])
        False
    """
    digest = hashlib.blake2b(digest_size=20)
    for part in parts:
        text = part.encode("utf-8", "surrogateescape")
        digest.update(len(text).to_bytes(8, "big") + text)
    return digest.hexdigest()


def cache_file(key: str) -> Path:
    """Return where the embeddings of `key` are kept on disk."""
    return Path(platformdirs.user_cache_dir("robustvlm")) / "class-embeddings" / f"{key}.safetensors"


def load_embeddings(key: str, rows: int) -> torch.Tensor | None:
    """Return the unit embeddings [rows, D] kept under `key`, or None when there are none or the file is damaged."""
    if key in _memory:
        _memory.move_to_end(key)
        return _memory[key]
    try:
        found = load_file(cache_file(key))["class_embeddings"]
    except (OSError, SafetensorError, KeyError):
        return None
    if found.dtype != torch.float32 or found.ndim != 2 or len(found) != rows:
        return None
    # Not a guard against NaN alone: flipped bits in a file that still parses are caught as well, as a rule.
    if not torch.allclose(found.norm(dim=-1), torch.ones(rows), atol=1e-4):
        return None
    _remember(key, found)
    return found


def save_embeddings(key: str, embeddings: torch.Tensor) -> None:
    """Keep `embeddings` [K, D] under `key`; a folder that cannot be written to costs only the time saved."""
    embeddings = embeddings.detach().cpu().contiguous()
    _remember(key, embeddings)
    file = cache_file(key)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(file, save({"class_embeddings": embeddings}))


def forget_embeddings() -> None:
    """Empty the memory, not the disk."""
    _memory.clear()


def _remember(key: str, embeddings: torch.Tensor) -> None:
    _memory[key] = embeddings
    while len(_memory) > _KEPT_IN_MEMORY:
        _memory.popitem(last=False)


def _write_whole(file: Path, content: bytes) -> None:
    # Another process sees the old file or the new one, never half of it.
    handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


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
    with borrowed(vlm):
        embeddings = _embeddings(vlm, class_names, templates, cache=cache)
    if not torch.isfinite(embeddings).all():
        raise UserError(f"the text encoder of '{vlm.spec}' gives NaN or infinite values for these classes")
    require_distinct(vlm, class_names, templates, embeddings)
    classifier = ZeroShotClassifier(vlm, class_names, embeddings)
    classifier.training = False  # but not the caller's model, which is part of it
    return classifier


def class_embeddings(
    vlm: VLM, class_names: Sequence[str], templates: Sequence[str], *, distinct: bool = False
) -> torch.Tensor:
    """Return unit embeddings [K, D], encoding a bounded number of prompts at a time.

    With `distinct`, two names with one embedding are a UserError (`require_distinct`).

    Example:
        >>> from robustvlm.models import load_model
        >>> class_embeddings(load_model("tiny"), ["apple", "dog"], ["{}", "a {}"]).norm(dim=-1).round(decimals=4)
        tensor([1., 1.])
    """
    own = vlm.class_vectors(class_names)
    if own is not None:
        return own
    per_batch = max(1, _TEXTS_PER_BATCH // len(templates))
    rows = []
    with torch.no_grad(), full_precision_kernels():
        for start in range(0, len(class_names), per_batch):
            names = class_names[start : start + per_batch]
            prompts = [template.replace("{}", name) for name in names for template in templates]
            # One class may have more templates than a batch holds.
            features = torch.cat(
                [vlm.encode_text(prompts[i : i + _TEXTS_PER_BATCH]) for i in range(0, len(prompts), _TEXTS_PER_BATCH)]
            )
            rows.append(F.normalize(features.view(len(names), len(templates), -1).mean(dim=1), dim=-1))
    found = torch.cat(rows)
    if distinct:
        require_distinct(vlm, class_names, templates, found)
    return found


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


def _embeddings(vlm: VLM, class_names: Sequence[str], templates: Sequence[str], *, cache: bool) -> torch.Tensor:
    if not cache or vlm.class_vectors(class_names[:1]) is not None:
        return class_embeddings(vlm, class_names, templates)
    # The first class is always computed: should anything but the weights have changed what the text tower does
    # (a library, the device, the encoder's own files), its bits differ, and so does the key.
    first = class_embeddings(vlm, class_names[:1], templates)
    probe = first.cpu().numpy().tobytes().hex()
    key = cache_key([vlm.fingerprint, probe, str(len(class_names)), *class_names, *templates])
    known = load_embeddings(key, len(class_names))
    if known is None:
        known = class_embeddings(vlm, class_names, templates)
        if torch.isfinite(known).all():
            save_embeddings(key, known)
    return known


def _check_names(class_names: Sequence[str]) -> None:
    if isinstance(class_names, str):
        raise UserError(f"class names must be a list, got the one text '{class_names}'")
    if len(class_names) < 2:
        shown = "".join(f": '{name}'" for name in class_names)
        raise UserError(f"a classifier needs at least 2 classes, got {len(class_names)}{shown}")
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
