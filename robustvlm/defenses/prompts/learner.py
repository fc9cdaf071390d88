"""Context vectors in front of class names, and the tokens that they stand among."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from robustvlm.core.seeds import generator
from robustvlm.errors import UserError
from robustvlm.models.clip import ClipVLM
from robustvlm.models.vlm import VLM

# Where context vectors enter a text tower: its token embedding, and the places that placeholders hold for them

_PLACEHOLDER = "x"


def text_tower(vlm: VLM) -> ClipVLM:
    """Return the open_clip model whose text tower `vlm` uses, past the wrappers around it.

    Raises:
        UserError: there is none, so that no token embedding can be reached.
    """
    inner: Any = vlm
    while not isinstance(inner, ClipVLM) and isinstance(getattr(inner, "base", None), VLM):
        inner = inner.base
    if not isinstance(inner, ClipVLM):
        raise UserError(
            f"prompts can be tuned for open_clip models, whose token embeddings can be reached; '{vlm.spec}' is none"
        )
    return inner


def token_embedding(clip: ClipVLM) -> nn.Module:
    """Return the module that turns token ids into vectors.

    Raises:
        UserError: the text tower has none at the places where open_clip keeps it.
    """
    text = getattr(clip.model, "text", clip.model)
    found = getattr(text, "token_embedding", None)
    if found is None and hasattr(getattr(text, "transformer", None), "get_input_embeddings"):
        found = text.transformer.get_input_embeddings()  # a text tower of transformers
    if not isinstance(found, nn.Embedding):
        raise UserError(f"the text tower of '{clip.spec}' has no token embedding that can be reached")
    return found


def prompt_tokens(clip: ClipVLM, class_names: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Return the token ids [K, T] of `length` placeholders before each class name, and each row's first place [K].

    Raises:
        UserError: a tokenizer that cuts the placeholder up, or a context too short for so many.

    Example:
        >>> from robustvlm.models import load_model
        >>> tokens, first = prompt_tokens(load_model("tiny"), ["apple", "hot dog"], 4)
        >>> tuple(tokens.shape), first.tolist()
        ((2, 24), [1, 1])
    """
    mark = _mark(clip)
    tokens = clip.tokenizer([" ".join([_PLACEHOLDER] * length + [f"{name}."]) for name in class_names])
    runs = (tokens == mark).unfold(1, length, 1).all(dim=-1) if tokens.shape[1] >= length else tokens[:, :0] == mark
    if not runs.any(dim=1).all():
        room = tokens.shape[1]
        raise UserError(f"{length} context vectors do not fit into the {room} tokens of '{clip.spec}': pass fewer")
    return tokens, runs.long().argmax(dim=1)


def word_vectors(clip: ClipVLM, text: str) -> Tensor:
    """Return the token embeddings [n, W] of a text, without the tokens that begin, end and fill a sequence."""
    filled = clip.tokenizer([text])[0].tolist()
    empty = set(clip.tokenizer([""])[0].tolist())
    ids = torch.tensor([token for token in filled if token not in empty], dtype=torch.long)
    with torch.no_grad():
        return token_embedding(clip)(ids.to(clip.device)).float()


@contextmanager
def context_in_place(embedding: nn.Module, context: Tensor, first: Tensor) -> Iterator[None]:
    """Let `embedding` return the context vectors [M, W] at each row's places `first` [K] to `first + M - 1`."""
    places = first[:, None] + torch.arange(len(context), device=first.device)

    def put(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        del module, inputs
        index = places[:, :, None].expand(-1, -1, output.shape[-1])
        return output.scatter(1, index, context.to(output.dtype).expand(len(output), -1, -1))

    handle = embedding.register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()


def _mark(clip: ClipVLM) -> int:
    """Return the token id of the placeholder."""
    own = set(clip.tokenizer([_PLACEHOLDER])[0].tolist()) - set(clip.tokenizer([""])[0].tolist())
    if len(own) != 1:
        raise UserError(f"the tokenizer of '{clip.spec}' has no single token for '{_PLACEHOLDER}'")
    return own.pop()


# The prompts that are learnt: context vectors shared by all classes, in front of each class name

_SPREAD = 0.02
_ROWS = 128


class PromptLearner(nn.Module):
    """Class embeddings as a function of M context vectors: text encoder("[v_1] ... [v_M] CLASS.").

    CoOp with one context for all classes and the class name last (Zhou et al. 2022, arXiv 2109.01134, section 3.2). The
    context begins as the embeddings of `start`, where it has M tokens; further vectors in front of these, or all, are
    drawn from N(0, 0.02^2) by `seed`. The text tower itself stays as it is.

    Raises:
        UserError: a model without a token embedding that can be reached, or too many context vectors.

    Example:
        >>> from robustvlm.models import load_model
        >>> learner = PromptLearner(load_model("tiny"), ["apple", "hot dog"], length=3, start="a picture of", seed=0)
        >>> tuple(learner().shape), tuple(learner.context.shape)
        ((2, 192), (3, 128))
    """

    def __init__(self, vlm: VLM, class_names: Sequence[str], *, length: int, start: str, seed: int) -> None:
        super().__init__()
        self._clip = [text_tower(vlm)]  # in a list: the tower is used, not owned, so that no optimiser sees it
        self.tokens, self.first = (part.to(vlm.device) for part in prompt_tokens(self._clip[0], class_names, length))
        self.context = nn.Parameter(self._start(length, start, seed))

    def _start(self, length: int, start: str, seed: int) -> Tensor:
        words = word_vectors(self._clip[0], start)[-length:]
        drawn = torch.randn(length, words.shape[1], generator=generator(seed, "prompt context")) * _SPREAD
        drawn[length - len(words) :] = words.cpu()
        return drawn.to(self._clip[0].device)

    def forward(self) -> Tensor:
        """Return unit class embeddings [K, D], differentiable in the context."""
        parts = [
            checkpoint(self._encode, self.tokens[i : i + _ROWS], self.first[i : i + _ROWS], use_reentrant=False)
            if len(self.tokens) > _ROWS and torch.is_grad_enabled()
            else self._encode(self.tokens[i : i + _ROWS], self.first[i : i + _ROWS])
            for i in range(0, len(self.tokens), _ROWS)
        ]
        return torch.cat(parts)

    def _encode(self, tokens: Tensor, first: Tensor) -> Tensor:
        clip = self._clip[0]
        with context_in_place(token_embedding(clip), self.context, first):
            return F.normalize(clip.model.encode_text(tokens).float(), dim=-1)
