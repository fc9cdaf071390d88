"""The goal of an answer that belongs to another picture, by moving the image tokens to those of that picture."""

from __future__ import annotations

import torch
from torch import Tensor

from robustvlm.attacks.goals.base import GOALS, Case, GoalKind, GoalWords, Known
from robustvlm.attacks.goals.matching import CROPPED, TO
from robustvlm.attacks.goals.words import Say, Speech, speech_of
from robustvlm.attacks.objectives import Objective
from robustvlm.errors import UserError, nearest

_USUAL = "tokens"


class Match(Say):
    """The greedy answer is the one that the model gives to a picture, to the token; attacks follow its tokens.

    Args:
        tokens: of the picture, as the language model reads them [T * D]. name: of the picture.
        way: a key of `matching.TO`. Of those that crop, outputs hold the tokens of the image and of a crop of it.
    """

    def __init__(self, speech: Speech, tokens: Tensor, name: str, *, way: str = _USUAL) -> None:
        self.target = tokens.view(1, *speech.shape)
        ids = speech.in_type(tokens.dtype).greedy(self.target)[0]
        super().__init__(speech, speech.text_of(ids.tolist()), ids=ids[ids >= 0])
        self.way, self.cropped = way, way in CROPPED
        self.spec = f"match:{name}" if way == _USUAL else f"match:{way}:{name}"

    def margin(self, output: Tensor, case: Case) -> Tensor:
        return super().margin(self._halves(output)[0], case)

    def loss(self, output: Tensor, objective: Objective, case: Case) -> Tensor:
        del objective, case
        return self._near(self._halves(output)[-1])

    def cosine(self, output: Tensor, case: Case) -> Tensor:
        """Return how near the image's tokens are to the picture's by the attack's own measure, [B]."""
        del case
        return self._near(self._halves(output)[0])

    def _near(self, output: Tensor) -> Tensor:
        return TO[self.way](output.view(len(output), *self.speech.shape), self.target.to(output))

    def _halves(self, output: Tensor) -> tuple[Tensor, ...]:
        return output.chunk(2, dim=1) if self.cropped else (output,)


def _split(text: str) -> tuple[str, str]:
    """Split `[WAY:]FILE.png`.

    Example:
        >>> _split("foa:a.png"), _split("a.png")
        (('foa', 'a.png'), ('tokens', 'a.png'))
    """
    way, colon, name = text.partition(":")
    return (way, name) if colon and way in TO else (_USUAL, text)


def _read(text: str, known: Known) -> tuple[Match, ...]:
    way, name = _split(text)
    speech = speech_of(known, "match")
    if not name:
        raise UserError(f"the goal match:{text} names no picture: pass match:{way}:FILE.png")
    if known.tokens_of is None:
        raise UserError("the goal match cannot be read here: pass robustvlm.attacks.goals.picture.Match(...)")
    try:
        with torch.no_grad():
            tokens = known.tokens_of(name)
    except UserError as error:
        before, colon, _ = name.partition(":")
        raise (UserError(f"unknown way '{before}' to a picture: {nearest(before, TO)}") if colon else error) from None
    return (Match(speech, tokens, name, way=way),)


def _words(text: str, can_reject: bool, min_cos: float | None) -> GoalWords:
    del can_reject, min_cos
    way, name = _split(text)
    how = "" if way == _USUAL else f" ({way})"
    return GoalWords(
        title=f"answers turned into that to {name}{how}",
        effect=f"make the model say what it says of {name} of",
        whom="images of which it says something else",
        before="says something else when clean",
        held="says something else",
        nothing=f"The model says the same of every image as of {name} before any attack: there was nothing to attack.",
        clean="says something else when clean",
    )


GOALS["match"] = GoalKind(
    ("match:FILE.png", *(f"match:{way}:FILE.png" for way in TO if way != _USUAL)), _read, _words, refuses=False
)
