"""The answers to a closed question as one tree of tokens, so that a language model scores all of them in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robustvlm.errors import UserError


@dataclass(frozen=True, eq=False)
class Options:
    """Answers as a tree: a node is a token behind those that lead to it, and shared by all answers that begin so.

    An answer is scored by the log probability that what the model says begins with it. Where one answer begins
    another ("train", "train station"), it must end there as well. No two can then both be said, so that the
    probabilities are those of different events.

    Args:
        ids: the token of each inner node [N]. seen: bool [N, N], whether a node sees another: itself and what leads to
            it. depth: place of each behind the prompt [N].
        places, tokens, owner: every factor of every answer: the row of its distribution (0 is the prompt's end, n the
            node n - 1), the token, and the answer that it belongs to; each [F].
        count: answers.

    Example:
        >>> options = Options.of([[5], [6, 7], [6, 8]], end=2)
        >>> options.ids.tolist(), options.count, options.places.tolist()
        ([6], 3, [0, 0, 1, 0, 1])
    """

    ids: Tensor
    seen: Tensor
    depth: Tensor
    places: Tensor
    tokens: Tensor
    owner: Tensor
    count: int

    @classmethod
    def of(cls, answers: Sequence[Sequence[int]], end: int) -> Options:
        """Return the tree of answers, each its token ids without the end.

        Raises:
            UserError: two answers are the same tokens.
        """
        known = {tuple(answer) for answer in answers}
        if len(known) < len(answers):
            raise UserError("two of the answers are the same tokens to the language model: leave out one of them")
        begun = {answer[:cut] for answer in known for cut in range(1, len(answer))}
        whole = [(*answer, end) if tuple(answer) in begun else tuple(answer) for answer in answers]
        inner = sorted({answer[:cut] for answer in whole for cut in range(1, len(answer))}, key=lambda p: (len(p), p))
        number = {path: place for place, path in enumerate(inner)}
        seen = torch.zeros(len(inner), len(inner), dtype=torch.bool)
        for path, place in number.items():
            for cut in range(1, len(path) + 1):
                seen[place, number[path[:cut]]] = True
        factors = [
            (0 if cut == 0 else 1 + number[answer[:cut]], answer[cut], which)
            for which, answer in enumerate(whole)
            for cut in range(len(answer))
        ]
        places, tokens, owners = (torch.tensor(column) for column in zip(*factors, strict=True))
        return cls(
            ids=torch.tensor([path[-1] for path in inner], dtype=torch.long),
            seen=seen,
            depth=torch.tensor([len(path) - 1 for path in inner], dtype=torch.long),
            places=places,
            tokens=tokens,
            owner=owners,
            count=len(answers),
        )

    def gather(self, logits: Tensor) -> Tensor:
        """Return log probabilities [B, K] of the answers from logits [B, 1 + N, V]: prompt's end, nodes."""
        known = logits.log_softmax(dim=-1)
        factors = known[:, self.places.to(known.device), self.tokens.to(known.device)]
        scores = known.new_zeros(len(known), self.count)
        return scores.index_add(1, self.owner.to(known.device), factors)
