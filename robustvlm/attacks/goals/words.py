"""Goals about what a language model says of an image, judged by its greedy answer in words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from robustvlm.attacks.goals.base import GOALS, REJECTED, Case, Goal, GoalKind, GoalWords, Known
from robustvlm.attacks.goals.matching import anchored, pooled_cosine, token_cosine
from robustvlm.attacks.objectives import Objective
from robustvlm.errors import UserError, nearest

_LEAST = 1e-4
"""Distance given to an answer of which logits say the one and the words made of them the other."""


class Speech(Protocol):
    """A language model that answers one question about image tokens [B, T, D]; see `robustvlm.models.mllm`."""

    @property
    def shape(self) -> tuple[int, int]:
        """Number and length of the tokens of an image."""
        ...

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end an answer, each as good as another."""
        ...

    def in_type(self, dtype: torch.dtype) -> Speech:
        """Return the model in a number type."""
        ...

    def next_logits(self, tokens: Tensor, ids: Tensor) -> Tensor:
        """Return logits [B, L, V] of each token of answers `ids` [B, L]."""
        ...

    def greedy(self, tokens: Tensor) -> Tensor:
        """Return greedy answers as ids [B, L], -1 behind the end."""
        ...

    def text_of(self, ids: Sequence[int]) -> str:
        """Return an answer's ids as a text."""
        ...

    def anchors(self) -> Tensor:
        """Return the image tokens [K, T, D] of a few pictures that no image is."""
        ...

    def ids_of(self, answer: str) -> list[int]:
        """Return the ids of an answer with one of its ends."""
        ...


def plain_words(text: str) -> str:
    """Return a text in small letters without punctuation, between spaces, to look words up in.

    Example:
        >>> plain_words("A hot-dog, on red.")
        ' a hot dog on red '
    """
    found = re.findall(r"[^\W_]+", text.casefold())
    return f" {' '.join(found)} "


def names(answer: str, word: str) -> bool:
    """Whether an answer has a word, or words in this order; a plural in s or words written as one count as well.

    Example:
        >>> names("It is an egg.", "egg"), names("An eggplant", "egg")
        (True, False)
        >>> names("Two owls", "owl"), names("a hotdog", "hot dog")
        (True, True)
    """
    return _place(plain_words(answer), word) is not None


def first_named(answer: str, class_names: Sequence[str]) -> int | None:
    """Return the class that an answer names first, of two at one place the longer name; None if it names none.

    Example:
        >>> first_named("A hot dog and a cat.", ["cat", "dog", "hot dog"]), first_named("An eggplant", ["egg"])
        (2, None)
    """
    said = plain_words(answer)
    found = [(place, -len(name), number) for number, name in enumerate(class_names) if (place := _place(said, name))]
    # Every place is behind the space that plain words begin with, and so above 0.
    return min(found)[2] if found else None


def _place(said: str, word: str) -> int | None:
    """Return where plain words have a word in one of its forms."""
    wanted = plain_words(word).strip()
    forms = [form + ending for form in (wanted, wanted.replace(" ", "")) for ending in ("", "s", "es")]
    places = [said.find(f" {form} ") + 1 for form in forms] if wanted else []
    return min((place for place in places if place), default=None)


class WordsGoal(Goal):
    """A goal about an answer; the model's output are the image tokens [B, T * D] that the language model reads.

    An answer is read at once, each token given those before it: greedy decoding says exactly these tokens if and only
    if every one of them has the largest logit of all. Tokens that end an answer count as one, whichever is said.

    Args:
        speech: the language model and its question.
    """

    of_features, of_tokens = True, True

    def __init__(self, speech: Speech) -> None:
        self.speech = speech

    def prediction(self, output: Tensor) -> Tensor:
        return torch.full((len(output),), REJECTED, dtype=torch.int64, device=output.device)

    def confidence(self, output: Tensor) -> Tensor:
        return torch.full((len(output),), float("nan"), dtype=torch.float64, device=output.device)

    def _tokens(self, output: Tensor) -> tuple[Speech, Tensor]:
        return self.speech.in_type(output.dtype), output.view(len(output), *self.speech.shape)

    def _read(self, output: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return by how much the logit of each token of answers [B, L] leads, and its negative log probability."""
        speech, tokens = self._tokens(output)
        logits, place = speech.next_logits(tokens, ids), ids.clamp_min(0)[..., None]
        right = logits.gather(2, place).squeeze(2)
        others = logits.scatter(2, place, float("-inf")).amax(2)
        leads, surprise = right - others, logits.logsumexp(2) - right
        if len(speech.ends) == 1:
            return leads, surprise
        ends = torch.tensor(speech.ends, device=ids.device)
        last, ending = torch.isin(ids, ends), logits[..., ends]
        others = logits.index_fill(2, ends, float("-inf")).amax(2)
        return (
            torch.where(last, ending.amax(2) - others, leads),
            torch.where(last, logits.logsumexp(2) - ending.logsumexp(2), surprise),
        )


class Say(WordsGoal):
    """The greedy answer is a text, to the token.

    Args:
        text: the answer aimed at. ids: its tokens, where they are known.
    """

    labelled = False

    def __init__(self, speech: Speech, text: str, *, ids: Tensor | None = None) -> None:
        super().__init__(speech)
        self.spec, self.ids = f"say:{text}", torch.tensor(speech.ids_of(text)) if ids is None else ids

    def margin(self, output: Tensor, case: Case) -> Tensor:
        del case
        return -self._read_all(output)[0].amin(1)

    def loss(self, output: Tensor, objective: Objective, case: Case) -> Tensor:
        del case
        leads, surprise = self._read_all(output)
        return -surprise.mean(1) if objective.name.startswith("ce") else leads.amin(1)

    def tells(self, objective: Objective) -> bool:
        del objective
        return type(self).loss is Say.loss

    def _read_all(self, output: Tensor) -> tuple[Tensor, Tensor]:
        return self._read(output, self.ids.to(output.device).expand(len(output), -1))


class Unsay(WordsGoal):
    """The greedy answer no longer has the name of the image's class, which the clean answer has.

    Attacks raise the loss of the name's tokens in the clean answer; with a `way` they move the image tokens away from
    the clean ones (`goals.matching`), whatever is asked, and the words are but the judge.

    Args:
        class_names: by label. way: "tokens", "pooled" or "prototypes"; "": through the language model.
    """

    refers = True

    def __init__(self, speech: Speech, class_names: Sequence[str], *, way: str = "") -> None:
        super().__init__(speech)
        self.class_names, self.way = tuple(class_names), way
        self.spec, self.still_at_image = ("unsay", False) if not way else (f"unsay:{_SPELT.get(way, way)}", True)
        self.anchors = speech.anchors() if way == "prototypes" else torch.zeros(0)
        self._placed: dict[tuple[int, ...], list[int]] = {}
        # What was found of one output lately; the tensors are kept so that no other takes their place in memory.
        self._last: tuple[object, ...] = ()
        self._seen: tuple[object, ...] = ()

    def reference(self, output: Tensor, label: Tensor) -> Tensor:
        """Return the ids of the clean answers [B, L], and behind them, to go by features, the clean tokens."""
        del label
        speech, tokens = self._tokens(output)
        ids = speech.greedy(tokens).to(output)
        return torch.cat([ids, output], 1) if self.way else ids

    def margin(self, output: Tensor, case: Case) -> Tensor:
        key = self._key(output, case)
        if self._last[:1] != (key,):
            self._last = (key, self._margin(output.detach(), case), output.detach(), case)
        found = self._last[1]
        assert isinstance(found, Tensor)
        return found

    @torch.no_grad()
    def _margin(self, output: Tensor, case: Case) -> Tensor:
        ids = self._answer(output, case)
        known = self._seen[1] if self._seen[:1] == (self._key(output, case),) else None
        leads = known if isinstance(known, Tensor) else self._read(output, ids)[0]
        named = self._named(ids, case.label)
        lead = leads.masked_fill(~named, float("inf")).amin(1)
        # The name may be lost though its tokens lead, where the words before them are others now, and the reverse.
        changed = (leads.masked_fill(ids < 0, float("inf")).amin(1) <= 0).nonzero().flatten()
        lost = ~named.any(1)
        if len(changed):
            speech, tokens = self._tokens(output[changed])
            said = [speech.text_of(row) for row in speech.greedy(tokens).tolist()]
            wanted = [self.class_names[label] for label in case.label[changed].tolist()]
            gone = [not names(text, word) for text, word in zip(said, wanted, strict=True)]
            lost[changed] = lost[changed] | torch.tensor(gone, device=lost.device)
        lead = torch.where(lead.isinf(), torch.zeros_like(lead), lead)
        return torch.where(lost, lead.clamp_max(-_LEAST), lead.clamp_min(_LEAST))

    def loss(self, output: Tensor, objective: Objective, case: Case) -> Tensor:
        if self.way == "prototypes":
            return anchored(*self._both(output, case), self.anchors.to(output))
        if self.way:
            return -self._nearness(output, case)
        ids = self._answer(output, case)
        leads, surprise = self._read(output, ids)
        self._seen = (self._key(output, case), leads.detach(), output.detach(), case)
        named = self._named(ids, case.label)
        if objective.name.startswith("ce"):
            return (surprise * named).sum(1) / named.sum(1).clamp_min(1)
        return -leads.masked_fill(~named, float("inf")).amin(1).nan_to_num(posinf=0.0)

    def cosine(self, output: Tensor, case: Case) -> Tensor | None:
        return self._nearness(output, case) if self.way else None

    def _nearness(self, output: Tensor, case: Case) -> Tensor:
        """Return the cosine [B] of the image tokens to the clean ones: of each, or of the mean token."""
        return (pooled_cosine if self.way == "pooled" else token_cosine)(*self._both(output, case))

    def _both(self, output: Tensor, case: Case) -> tuple[Tensor, Tensor]:
        """Return image tokens [B, T, D] and the clean ones."""
        clean = self._reference(case)[:, -output.shape[1] :].view(len(output), *self.speech.shape)
        return output.view_as(clean), clean

    def _key(self, output: Tensor, case: Case) -> tuple[object, ...]:
        return output.data_ptr(), output._version, output.shape, self._reference(case).data_ptr()

    def _reference(self, case: Case) -> Tensor:
        assert case.reference is not None, "the goal needs the clean answers"
        return case.reference

    def _answer(self, output: Tensor, case: Case) -> Tensor:
        reference = self._reference(case)
        ids = reference[:, : -output.shape[1]] if self.way else reference
        longest = max(1, int((ids >= 0).sum(1).amax()))
        return ids[:, :longest].long()

    def _named(self, ids: Tensor, label: Tensor) -> Tensor:
        """Return which tokens of answers [B, L] make the class's name, bool [B, L]; none where it is not there."""
        found = torch.zeros(ids.shape, dtype=torch.bool)
        for row, (tokens, which) in enumerate(zip(ids.tolist(), label.tolist(), strict=True)):
            key = (which, *tokens)
            if key not in self._placed:
                self._placed[key] = self._places(tokens, self.class_names[which] if which >= 0 else "")
            found[row, self._placed[key]] = True
        return found.to(ids.device)

    def _places(self, tokens: list[int], name: str) -> list[int]:
        """Return the places of the fewest tokens up to the first time that the name is there; none without it."""
        count = next((place for place, token in enumerate(tokens) if token < 0), len(tokens))
        text = self.speech.text_of
        if not name or not names(text(tokens[:count]), name):
            return []
        end = next(stop for stop in range(1, count + 1) if names(text(tokens[:stop]), name))
        start = next(first for first in range(end - 1, -1, -1) if names(text(tokens[first:end]), name))
        return list(range(start, end))


# How these are written, and what they are called

AWAY = {"features": "tokens", "pooled": "pooled", "prototypes": "prototypes"}
"""Ways away from the clean tokens by what they are called in a goal."""
_SPELT = {way: name for name, way in AWAY.items()}


def speech_of(known: Known, form: str) -> Speech:
    if known.speech is None:
        raise UserError(
            f"the goal {form} needs a model that answers in words, as mllm:tiny, and '{known.model}' is none"
        )
    return known.speech


def _read_say(text: str, known: Known) -> tuple[Goal, ...]:
    return (Say(speech_of(known, "say"), text),)


def _read_unsay(text: str, known: Known) -> tuple[Goal, ...]:
    if text and text not in AWAY:
        forms = ["unsay", *(f"unsay:{way}" for way in AWAY)]
        raise UserError(f"unknown goal 'unsay:{text}': {nearest(f'unsay:{text}', forms)}")
    return (Unsay(speech_of(known, "unsay"), known.class_names, way=AWAY.get(text, "")),)


def _say_words(text: str, can_reject: bool, min_cos: float | None) -> GoalWords:
    del can_reject, min_cos
    return GoalWords(
        title=f"answers turned into “{text}”",
        effect=f"make the model say “{text}” of",
        whom="images of which it says something else",
        before="says something else when clean",
        held="says something else",
        nothing=f"The model says “{text}” of every image before any attack, so there was nothing to attack.",
        clean="says something else when clean",
    )


def _unsay_words(text: str, can_reject: bool, min_cos: float | None) -> GoalWords:
    del can_reject, min_cos
    how = f", by moving its tokens{'' if text == 'features' else f' ({text})'}" if text else ""
    return GoalWords(
        title=f"answers that no longer name the class{how}",
        effect="make the answer lose the class's name on",
        whom="images whose class the answer names",
        before="names the class when clean",
        held="answer names the class",
        nothing="The answer named the class of no image before any attack, so there was nothing to attack.",
        clean="names the class when clean",
    )


GOALS["say"] = GoalKind(("say:TEXT",), _read_say, _say_words, refuses=False)
GOALS["unsay"] = GoalKind(("unsay", *(f"unsay:{way}" for way in AWAY)), _read_unsay, _unsay_words, refuses=False)
