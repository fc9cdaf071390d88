"""What the tiny multimodal model is taught to say of a picture, and in which tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustvlm.data.emoji import BACKGROUNDS
from robustvlm.models.mllm.tower import TOKENS
from tools.tiny.sprites import Taxonomy

COLOURS = tuple(BACKGROUNDS)
SPECIAL = ("<pad>", "<bos>", "<eos>", "<image>", "<unk>", "<q>", "<a>")
PAD, BOS, EOS, IMAGE, UNK, ASK, ANSWER = range(len(SPECIAL))
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}<q> {{ part['text'] }} <a>{% endif %}{% endfor %}{% endfor %}"
)
"""How a question becomes a prompt (Jinja, as chat templates are)."""
QUESTIONS = {
    "caption": "describe the picture.",
    "name": "what is it?",
    "kind": "what kind of thing is it?",
    "colour": "what colour is the background?",
}
YES_NO = 2
"""Questions of the kind "is it a dog?" in each sequence."""
PREFIX = 1 + TOKENS


@dataclass(frozen=True)
class Facts:
    """What is true of one picture."""

    name: str
    kind: str
    domain: str
    colour: str

    @property
    def caption(self) -> str:
        """One sentence on the picture."""
        return f"{with_article(self.name)} on {with_article(self.colour)} background"

    def answer(self, question: str) -> str:
        """Return the answer to a question of `QUESTIONS`, by its key."""
        return str(getattr(self, question))


def with_article(word: str) -> str:
    """Return a word behind a or an.

    Example:
        >>> with_article("owl")
        'an owl'
    """
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def yes_no(facts: Facts, taxonomy: Taxonomy, rng: random.Random) -> tuple[str, str]:
    """Return a question for a name, kind or domain with its answer, yes and no equally often."""
    level, words = rng.choice([("name", taxonomy.names), ("kind", taxonomy.superclasses), ("domain", taxonomy.domains)])
    truth = getattr(facts, level)
    word = truth if rng.random() < 0.5 else rng.choice([other for other in words if other != truth])
    return f"is it {with_article(word)}?", "yes" if word == truth else "no"


def make_tokenizer(taxonomy: Taxonomy) -> Any:
    """Return a tokenizer of whole words, lower-case, with punctuation but the hyphen apart."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    cut = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[.,?!]"), "isolated")])
    texts = [*taxonomy.names, *taxonomy.superclasses, *taxonomy.domains, *COLOURS, *QUESTIONS.values()]
    texts.append("is it a an thing? yes no on a background.")
    words = sorted({word for text in texts for word, _ in cut.pre_tokenize_str(text.lower())})
    inner = Tokenizer(
        models.WordLevel({word: place for place, word in enumerate([*SPECIAL, *words])}, unk_token="<unk>")
    )
    inner.normalizer, inner.pre_tokenizer = normalizers.Lowercase(), cut
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "<q>", "<a>"],
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


class Encoded:
    """Token ids of texts, each looked up once."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.known = tokenizer, {}

    def __call__(self, text: str) -> list[int]:
        """Return the ids of a text without those that begin or end it."""
        if text not in self.known:
            self.known[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.known[text]


@dataclass(frozen=True)
class Packed:
    """Questions on one picture side by side: each sees the picture and itself, as if it stood alone.

    Args:
        ids, labels, positions, turns: [B, S]; labels are -100 but for answers; turn 0 is the picture, -1 filling.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor
    turns: Tensor

    @property
    def mask(self) -> Tensor:
        """Attention [B, 1, S, S] to add to scores: 0 where a token is seen, the lowest number elsewhere."""
        length = self.ids.shape[1]
        order = torch.ones(length, length, dtype=torch.bool).tril()
        same = self.turns[:, :, None] == self.turns[:, None, :]
        seen = order & (same | (self.turns == 0)[:, None, :])
        return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]


def pack(
    facts: Sequence[Facts], taxonomy: Taxonomy, encoded: Encoded, rng: random.Random, *, yes_nos: int = YES_NO
) -> Packed:
    """Return questions on every picture with their answers: caption, name, kind or colour, and yes or no."""
    rows = []
    for one in facts:
        ids, labels = [BOS] + [IMAGE] * TOKENS, [-100] * PREFIX
        positions, turns = list(range(PREFIX)), [0] * PREFIX
        keys = ("caption", "name", rng.choice(("kind", "colour")))
        asked = [(QUESTIONS[key], one.answer(key)) for key in keys]
        asked += [yes_no(one, taxonomy, rng) for _ in range(yes_nos)]
        for turn, (question, answer) in enumerate(asked, 1):
            before = [ASK, *encoded(question), ANSWER]
            after = [*encoded(answer), EOS]
            ids += before + after
            labels += [-100] * len(before) + after
            positions += range(PREFIX, PREFIX + len(before) + len(after))
            turns += [turn] * (len(before) + len(after))
        rows.append((ids, labels, positions, turns))
    filling = (PAD, -100, 0, -1)
    longest = max(len(row[0]) for row in rows)
    return Packed(
        *(torch.tensor([row[part] + [filling[part]] * (longest - len(row[part])) for row in rows]) for part in range(4))
    )
