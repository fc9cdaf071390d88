"""Text embeddings that are trained through the text projection alone: the text tower runs once, before training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from robustvlm.data.prompts import fill
from robustvlm.models import VLM

_TEXTS_PER_PASS = 256
_TOLERANCE = 1e-4


class ProjectedTexts(nn.Module):
    """Embeddings [N, D] of named things as a function of the text projection: the mean of their prompts' features.

    What comes out of the text tower is kept; a call costs one matrix product. Works for text towers that end in a
    linear map called `text_projection`, or `proj` for those of transformers, which is checked on the texts themselves;
    for others (`trainable` is False) the embeddings are constants.

    Our reading: the mean is taken before texts are scaled to unit norm, which differs from the usual zero-shot
    embedding only as far as the lengths of a name's prompts differ.

    Args:
        vlm: the model; its projection is used where it stands, so what an optimiser does to it counts.
        names: put in place of the {} of every template.

    Example:
        >>> from robustvlm.models import load_model
        >>> texts = ProjectedTexts(load_model("tiny"), ["apple", "dog"], ["{}", "a {}"])
        >>> texts().shape, texts.trainable
        (torch.Size([2, 192]), True)
    """

    features: Tensor

    def __init__(self, vlm: VLM, names: Sequence[str], templates: Sequence[str]) -> None:
        super().__init__()
        embedded = _mean_prompts(vlm, names, templates)
        # A list keeps the model out of this module's own parameters: they belong to the model.
        self._found = _projections(vlm)
        features = None
        if len(self._found) == 1:
            with _without(*self._found[0]):
                features = _mean_prompts(vlm, names, templates)
            if not _reproduces(self._found[0], features, embedded):
                features = None
        self.trainable = features is not None
        self.register_buffer("features", embedded if features is None else features, persistent=False)

    def forward(self) -> Tensor:
        """Return the embeddings [N, D] under the present projection, differentiable in it."""
        return _apply(self._found[0], self.features) if self.trainable else self.features

    def projection(self) -> list[nn.Parameter]:
        """Return the parameters of the projection, none where the embeddings are constants."""
        if not self.trainable:
            return []
        owner, name = self._found[0]
        found = getattr(owner, name)
        return [found] if isinstance(found, nn.Parameter) else list(found.parameters())


def _mean_prompts(vlm: VLM, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    prompts = [fill(template, name) for name in names for template in templates]
    with torch.no_grad():
        rows = [
            vlm.embed_text(prompts[i : i + _TEXTS_PER_PASS]).float() for i in range(0, len(prompts), _TEXTS_PER_PASS)
        ]
    return torch.cat(rows).view(len(names), len(templates), -1).mean(dim=1)


def _projections(vlm: VLM) -> list[tuple[nn.Module, str]]:
    """Return where text projections stand: (module, attribute)."""
    found = []
    for path, module in vlm.named_modules():
        part = getattr(module, "text_projection", None)
        if isinstance(part, (nn.Linear, nn.Parameter)):
            found.append((module, "text_projection"))
        elif path.split(".")[-1] == "text" and isinstance(getattr(module, "proj", None), nn.Linear):
            found.append((module, "proj"))
    return found


@contextmanager
def _without(owner: nn.Module, name: str) -> Iterator[None]:
    """Take a projection out for a while; open_clip leaves it out where there is none."""
    part = getattr(owner, name)
    setattr(owner, name, nn.Identity() if name == "proj" else None)
    try:
        yield
    finally:
        setattr(owner, name, part)


def _apply(place: tuple[nn.Module, str], features: Tensor) -> Tensor:
    part = getattr(*place)
    projected: Tensor = features @ part if isinstance(part, nn.Parameter) else part(features)
    return projected


def _reproduces(place: tuple[nn.Module, str], features: Tensor, embedded: Tensor) -> bool:
    """Tell whether the linear map is all that stands between the features and the embeddings."""
    part = getattr(*place)
    width = part.shape[0] if isinstance(part, nn.Parameter) else part.in_features
    if features.shape[1] != width:
        return False
    with torch.no_grad():
        error = (_apply(place, features) - embedded).norm() / embedded.norm()
    return bool(error < _TOLERANCE)
