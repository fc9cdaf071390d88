"""How a question and its answers are read: a tokenizer with the prompts it was tuned on, closed answers as one tree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustvlm.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """A question as the language model reads it: token ids before the image and behind it, and as a text."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Tongue:
    """A tokenizer with the way in which questions are asked.

    Args:
        tokenizer: of transformers. chat: from a question to the text that the library's processor takes.
        write: to that text as the processor writes it, with one image token for all.
        image: id of that token. ends: ids that end an answer. digest: of all that decides ids and prompts.
    """

    tokenizer: Any
    chat: Callable[[str], str]
    write: Callable[[str], str]
    image: int
    ends: tuple[int, ...]
    digest: str

    def prompt(self, question: str) -> Prompt:
        """Return a question as token ids around the place of the image, as the library's own processor gives them."""
        text = self.write(question)
        ids = self._ids(text)
        if ids.count(self.image) != 1:
            raise UserError(f"the prompt '{text}' has {ids.count(self.image)} image tokens, expected one")
        self._require_words("question", question, ids, (self.tokenizer.unk_token_id,))
        place = ids.index(self.image)
        return Prompt(tuple(ids[:place]), tuple(ids[place + 1 :]), text)

    def answer_ids(self, question: str, answer: str) -> list[int]:
        """Return the ids of an answer, read together with the question before it, without the end."""
        text = self.write(question)
        between = "" if text[-1:].isspace() else " "
        asked, told = (self._ids(part) for part in (text, f"{text}{between}{answer}"))
        while told and told[-1] in self.ends:  # of tokenizers that end every text
            told.pop()
        while asked and asked[-1] in self.ends:
            asked.pop()
        found = told[len(asked) :] if told[: len(asked)] == asked else self._apart(answer)
        if not found:
            raise UserError(f"'{answer}' is no answer: it has no token")
        self._require_words("answer", answer, found, self.tokenizer.all_special_ids)
        return found

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=not self.begun(text))["input_ids"])

    def begun(self, text: str) -> bool:
        """Whether a text already has the token that the tokenizer would begin it with, as chat templates write it."""
        return bool(self.tokenizer.bos_token) and self.tokenizer.bos_token in text

    def _require_words(self, what: str, text: str, ids: Sequence[int], unfit: Sequence[int | None]) -> None:
        """Refuse a text of which the model reads a part as an unknown or special token: another text than is meant."""
        wrong = set(ids) & {token for token in unfit if token is not None}
        if not wrong:
            return
        words = [word for word in text.split() if wrong & set(self._apart(word))] or [text]
        listed = ", ".join(f"'{word}'" for word in words[:5])
        raise UserError(f"the {what} '{text}' has words that the language model does not know: {listed}")

    def _apart(self, answer: str) -> list[int]:
        return list(self.tokenizer(answer, add_special_tokens=False)["input_ids"])

    def text(self, ids: Sequence[int]) -> str:
        """Return token ids up to the end as a text in one line."""
        kept: list[int] = []
        for token in ids:
            if token in self.ends or token < 0:
                break
            kept.append(token)
        return " ".join(str(self.tokenizer.decode(kept, skip_special_tokens=True)).split())


# The answers to a closed question as one tree of tokens, so that a language model scores all of them in one pass


@dataclass(frozen=True, eq=False)
class Options:
    """Answers as a tree: a node is a token behind those that lead to it, and shared by all answers that begin so.

    An answer is scored by the log probability that what the model says begins with it. Where one answer begins
    another ("train", "train station"), it must end there as well, by any of the tokens that end an answer. No two can
    then both be said, so that the probabilities are those of different events.

    Args:
        ids: the token of each inner node [N]. seen: bool [N, N], whether a node sees another: itself and what leads to
            it. depth: place of each behind the prompt [N].
        places, tokens, owner: every factor of every answer: the row of its distribution (0 is the prompt's end, n the
            node n - 1), the token, and the answer that it belongs to; each [F].
        closing: bool [F], which factors are that the answer ends. ends: the tokens that end one. count: answers.

    Example:
        >>> options = Options.of([[5], [6, 7], [6, 8]], ends=(2,))
        >>> options.ids.tolist(), options.count, options.places.tolist()
        ([6], 3, [0, 0, 1, 0, 1])
    """

    ids: Tensor
    seen: Tensor
    depth: Tensor
    places: Tensor
    tokens: Tensor
    owner: Tensor
    closing: Tensor
    ends: tuple[int, ...]
    count: int

    @classmethod
    def of(cls, answers: Sequence[Sequence[int]], ends: Sequence[int]) -> Options:
        """Return the tree of answers, each its token ids without the end; `ends` are the tokens that end one.

        Raises:
            UserError: two answers are the same tokens.
        """
        known = {tuple(answer) for answer in answers}
        if len(known) < len(answers):
            raise UserError("two of the answers are the same tokens to the language model: leave out one of them")
        begun = {answer[:cut] for answer in known for cut in range(1, len(answer))}
        whole = [(*answer, ends[0]) if tuple(answer) in begun else tuple(answer) for answer in answers]
        inner = sorted({answer[:cut] for answer in whole for cut in range(1, len(answer))}, key=lambda p: (len(p), p))
        number = {path: place for place, path in enumerate(inner)}
        seen = torch.zeros(len(inner), len(inner), dtype=torch.bool)
        for path, place in number.items():
            for cut in range(1, len(path) + 1):
                seen[place, number[path[:cut]]] = True
        factors = [
            (0 if cut == 0 else 1 + number[answer[:cut]], answer[cut], which, cut == len(answers[which]))
            for which, answer in enumerate(whole)
            for cut in range(len(answer))
        ]
        places, tokens, owners, closing = (torch.tensor(column) for column in zip(*factors, strict=True))
        return cls(
            ids=torch.tensor([path[-1] for path in inner], dtype=torch.long),
            seen=seen,
            depth=torch.tensor([len(path) - 1 for path in inner], dtype=torch.long),
            places=places,
            tokens=tokens,
            owner=owners,
            closing=closing,
            ends=tuple(ends),
            count=len(answers),
        )

    def gather(self, logits: Tensor) -> Tensor:
        """Return log probabilities [B, K] of the answers from logits [B, 1 + N, V]: prompt's end, nodes."""
        known = logits.log_softmax(dim=-1)
        factors = known[:, self.places.to(known.device), self.tokens.to(known.device)]
        if len(self.ends) > 1:
            closing = self.closing.to(known.device)
            at_end = known[:, self.places.to(known.device)[closing]]
            factors[:, closing] = at_end[..., list(self.ends)].logsumexp(-1)
        scores = known.new_zeros(len(known), self.count)
        return scores.index_add(1, self.owner.to(known.device), factors)
