"""The prompts that are learnt: context vectors shared by all classes, in front of each class name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from robustvlm.core.seeds import generator
from robustvlm.defenses.prompts.tokens import context_in_place, prompt_tokens, text_tower, token_embedding, word_vectors
from robustvlm.models.vlm import VLM

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
