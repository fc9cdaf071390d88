"""Text towers that context vectors can enter: their token embedding, and the places that placeholders hold for them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from robustvlm.errors import UserError, setting
from robustvlm.models import VLM
from robustvlm.models.clip import ClipVLM
from robustvlm.models.custom import CustomVLM
from robustvlm.models.sentences import LONGEST, SentenceEncoder

_PLACEHOLDER = "x"


class PromptTower(ABC):
    """Class names behind `length` placeholders, as one text tower reads them.

    Attributes:
        device: where the tower is.
        count: how many classes there are.
    """

    device: torch.device
    count: int

    @abstractmethod
    def word_vectors(self, text: str) -> Tensor:
        """Return the token embeddings [n, W] of a text, without the tokens that begin, end and fill a sequence."""

    @abstractmethod
    def encode(self, context: Tensor, rows: slice) -> Tensor:
        """Return features [K, D] of some classes, not of unit norm, with context vectors [M, W] for placeholders."""


def prompt_tower(vlm: VLM, class_names: Sequence[str], length: int) -> PromptTower:
    """Return the classes behind placeholders for the text tower that a model uses.

    Raises:
        UserError: a tower whose token embeddings cannot be reached, or too many context vectors for it.
    """
    inner = _inside(vlm)
    if isinstance(inner, CustomVLM) and len(found := _sentence_encoders(inner)) == 1:
        return SentencePrompts(inner, found[0], class_names, length)
    return ClipPrompts(text_tower(vlm), class_names, length)


def _inside(vlm: VLM) -> VLM:
    """Return the model past the wrappers around it."""
    inner: Any = vlm
    while not isinstance(inner, (ClipVLM, CustomVLM)) and isinstance(getattr(inner, "base", None), VLM):
        inner = inner.base
    found: VLM = inner
    return found


def _behind_placeholders(class_names: Sequence[str], length: int) -> list[str]:
    return [" ".join([_PLACEHOLDER] * length + [f"{name}."]) for name in class_names]


def _require_room(class_names: Sequence[str], counts: Sequence[int], room: int, length: int, spec: str) -> None:
    """Refuse so many context vectors that a name behind them is cut: classes that are cut alike are one class.

    Args:
        counts: tokens of every class's text, uncut; room: how many the text tower reads.
    """
    longest = max(range(len(counts)), key=counts.__getitem__)
    cut = counts[longest] - room
    if cut <= 0:
        return
    fits = length - cut
    advice = f"pass {setting('context', str(fits))} or fewer" if fits > 0 else "shorten the name"
    raise UserError(
        f"{length} context vectors do not fit into the {room} tokens of '{spec}': with {class_names[longest]!r} behind "
        f"them they make {counts[longest]}; {advice}"
    )


# open_clip's text towers


def text_tower(vlm: VLM) -> ClipVLM:
    """Return the open_clip model whose text tower `vlm` uses, past the wrappers around it.

    Raises:
        UserError: there is none, so that no token embedding can be reached.
    """
    inner = _inside(vlm)
    if not isinstance(inner, ClipVLM):
        raise UserError(
            "prompts can be tuned for open_clip models and for encoders with one SentenceEncoder, whose token "
            f"embeddings can be reached; '{vlm.spec}' is none"
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
        UserError: a tokenizer that cuts the placeholder up, or a context too short for so many and a name.

    Example:
        >>> from robustvlm.models import load_model
        >>> tokens, first = prompt_tokens(load_model("tiny"), ["apple", "hot dog"], 4)
        >>> tuple(tokens.shape), first.tolist()
        ((2, 24), [1, 1])
    """
    mark, texts = _mark(clip), _behind_placeholders(class_names, length)
    tokens = clip.tokenizer(texts)
    room = tokens.shape[1]
    _require_room(class_names, [room + cut for cut in clip.cut_tokens(texts)], room, length, clip.spec)
    runs = (tokens == mark).unfold(1, length, 1).all(dim=-1) if tokens.shape[1] >= length else tokens[:, :0] == mark
    if not runs.any(dim=1).all():
        raise UserError(f"{length} context vectors do not fit into the {room} tokens of '{clip.spec}': pass fewer")
    return tokens, runs.long().argmax(dim=1)


def word_vectors(clip: ClipVLM, text: str) -> Tensor:
    """Return the token embeddings [n, W] of a text, without the tokens that begin, end and fill a sequence."""
    filled = clip.tokenizer([text])[0].tolist()
    empty = set(clip.tokenizer([""])[0].tolist())
    ids = torch.tensor([token for token in filled if token not in empty], dtype=torch.long)
    with torch.no_grad():
        return token_embedding(clip)(ids.to(clip.device)).float()


def _mark(clip: ClipVLM) -> int:
    """Return the token id of the placeholder."""
    own = set(clip.tokenizer([_PLACEHOLDER])[0].tolist()) - set(clip.tokenizer([""])[0].tolist())
    if len(own) != 1:
        raise UserError(f"the tokenizer of '{clip.spec}' has no single token for '{_PLACEHOLDER}'")
    return own.pop()


class ClipPrompts(PromptTower):
    """Classes behind placeholders in the tokens of an open_clip model."""

    def __init__(self, clip: ClipVLM, class_names: Sequence[str], length: int) -> None:
        self.clip, self.device, self.count = clip, clip.device, len(class_names)
        self.tokens, self.first = (part.to(clip.device) for part in prompt_tokens(clip, class_names, length))

    def word_vectors(self, text: str) -> Tensor:
        return word_vectors(self.clip, text)

    def encode(self, context: Tensor, rows: slice) -> Tensor:
        first = self.first[rows]
        with context_in_place(token_embedding(self.clip), context, lambda _: first):
            features: Tensor = self.clip.model.encode_text(self.tokens[rows])
        return features


# The sentence encoder, in an encoder of the user's own


class SentencePrompts(PromptTower):
    """Classes behind placeholders in texts, for an encoder of the user's own whose texts pass a SentenceEncoder.

    Whatever the encoder does to a text's embedding stays as it is. It may hand over its texts in any order and in any
    parts: the placeholders are found again among the tokens.

    Raises:
        UserError: an encoder whose features do not follow its token embeddings.
    """

    def __init__(self, vlm: CustomVLM, words: SentenceEncoder, class_names: Sequence[str], length: int) -> None:
        self.vlm, self.words, self.device, self.count = vlm, words, vlm.device, len(class_names)
        self.texts = _behind_placeholders(class_names, length)
        (self.mark,) = self._ids(_PLACEHOLDER)
        _require_room(class_names, _uncut_lengths(words, self.texts), LONGEST, length, vlm.spec)
        width = words.tokens.embedding_dim
        with torch.enable_grad():
            context = torch.zeros(length, width, device=self.device, requires_grad=True)
            if not self.encode(context, slice(0, 1)).requires_grad:
                raise UserError(
                    f"the text features of '{vlm.spec}' have no gradient in its token embeddings: encode_text must "
                    "pass every text through its SentenceEncoder, without torch.no_grad and without keeping results"
                )

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self.words.tokenizer.encode(text, add_special_tokens=False).ids
        return found

    def word_vectors(self, text: str) -> Tensor:
        with torch.no_grad():
            return self.words.tokens(torch.tensor(self._ids(text), dtype=torch.long, device=self.device)).float()

    def encode(self, context: Tensor, rows: slice) -> Tensor:
        def places(ids: Tensor) -> Tensor:
            if ids.shape[1] < len(context):
                return ids.new_full((len(ids),), -1)
            runs = (ids == self.mark).unfold(1, len(context), 1).all(dim=-1)
            return torch.where(runs.any(dim=1), runs.long().argmax(dim=1), -1)

        with context_in_place(self.words.tokens, context, places):
            return self.vlm.embed_text(self.texts[rows])


def _uncut_lengths(words: SentenceEncoder, texts: Sequence[str]) -> list[int]:
    """Return how many tokens each text has before the tokenizer cuts it."""
    uncut = type(words.tokenizer).from_str(words.tokenizer.to_str())  # the encoder's own goes on cutting
    uncut.no_truncation()
    uncut.no_padding()
    return [len(text.ids) for text in uncut.encode_batch(texts)]


def _sentence_encoders(vlm: CustomVLM) -> list[SentenceEncoder]:
    own = vlm.encoder
    parts = own.modules() if isinstance(own, nn.Module) else vars(own).values() if hasattr(own, "__dict__") else ()
    return [part for part in parts if isinstance(part, SentenceEncoder)]


# What both have in common


@contextmanager
def context_in_place(embedding: nn.Module, context: Tensor, first: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let `embedding` return the context vectors [M, W] in place of M tokens of each row.

    Args:
        first: returns the first place [K] of each row of token ids [K, T]; -1 for rows that stay as they are.
    """

    def put(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        del module
        begin = first(inputs[0])
        rows = (begin >= 0).nonzero().flatten()
        places = begin[rows, None] + torch.arange(len(context), device=output.device)
        index = places[:, :, None].expand(-1, -1, output.shape[-1])
        put_in = output[rows].scatter(1, index, context.to(output.dtype).expand(len(rows), -1, -1))
        return output.index_copy(0, rows, put_in)

    handle = embedding.register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()
