"""How a question and its answers are read: a multimodal model's tokenizer with the prompts that it was tuned on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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
