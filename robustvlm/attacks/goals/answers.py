"""Goals about an answer as a whole: that it belongs to another picture, that it means something else."""

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from robustvlm.attacks.goals.base import GOALS, Case, GoalKind, GoalWords, Known
from robustvlm.attacks.goals.matching import CROPPED, TO
from robustvlm.attacks.goals.words import Say, Speech, WordsGoal, speech_of
from robustvlm.attacks.objectives import Objective
from robustvlm.errors import UserError, nearest

# The goal of an answer that belongs to another picture, by moving the image tokens to those of that picture

_USUAL = "tokens"


class Match(Say):
    """The greedy answer is the one that the model gives to a picture, to the token; attacks follow its tokens.

    Of several draws of a random model they are the answer to most draws, and the mean tokens.

    Args:
        tokens: of the picture, as the language model reads them [T * D], or of draws [N, T * D]. name: of the picture.
        way: a key of `matching.TO`. Of those that crop, outputs hold the tokens of the image and of a crop of it.

    Raises:
        UserError: no answer is that to most draws.
    """

    def __init__(self, speech: Speech, tokens: Tensor, name: str, *, way: str = _USUAL) -> None:
        draws = tokens.view(-1, *speech.shape)
        ids = _answer_to_most(speech.in_type(tokens.dtype), draws, name)
        self.target = draws if len(draws) == 1 else draws.mean(0, keepdim=True)
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


def _answer_to_most(speech: Speech, draws: Tensor, name: str) -> Tensor:
    """Return the ids [L] of the greedy answer to more than half of the draws [N, T, D] of a picture's tokens."""
    answers = [speech.greedy(draw[None])[0] for draw in draws]
    read = [tuple(-1 if token in speech.ends else token for token in ids.tolist()) for ids in answers]
    usual, count = Counter(read).most_common(1)[0]
    if 2 * count <= len(draws):
        raise UserError(
            f"the model is random and says different things of '{name}', the most frequent in {count} of {len(draws)} "
            "draws, so that there is no answer to aim at: pass another picture, or a model that draws less"
        )
    return answers[read.index(usual)]


def _split(text: str) -> tuple[str, str]:
    """Split `[WAY:]FILE.png`.

    Example:
        >>> _split("foa:a.png"), _split("a.png")
        (('foa', 'a.png'), ('tokens', 'a.png'))
    """
    way, colon, name = text.partition(":")
    return (way, name) if colon and way in TO else (_USUAL, text)


def _read_match(text: str, known: Known) -> tuple[Match, ...]:
    way, name = _split(text)
    speech = speech_of(known, "match")
    if not name:
        raise UserError(f"the goal match:{text} names no picture: pass match:{way}:FILE.png")
    if known.tokens_of is None:
        raise UserError("the goal match cannot be read here: pass robustvlm.attacks.goals.answers.Match(...)")
    try:
        with torch.no_grad():
            tokens = known.tokens_of(name)
    except UserError as error:
        before, colon, _ = name.partition(":")
        raise (UserError(f"unknown way '{before}' to a picture: {nearest(before, TO)}") if colon else error) from None
    return (Match(speech, tokens, name, way=way),)


def _words_match(text: str, can_reject: bool, min_cos: float | None) -> GoalWords:
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
    ("match:FILE.png", *(f"match:{way}:FILE.png" for way in TO if way != _USUAL)),
    _read_match,
    _words_match,
    refuses=False,
)


# The goal of an answer that means something else than the clean one, by the similarity of the two as sentences

USUAL = 0.5


class Reword(WordsGoal):
    """The greedy answer's cosine to the clean answer, as sentences, lies below a threshold; classes play no part.

    Attacks raise the loss of the clean answer. An answer that is the same to the token has the cosine 1, so that
    nothing is generated or compared as long as each of its tokens leads.

    Args:
        encode: from N texts to unit vectors [N, E]. below: the threshold.
    """

    refers, labelled = True, False

    def __init__(self, speech: Speech, encode: Callable[[Sequence[str]], Tensor], below: float = USUAL) -> None:
        super().__init__(speech)
        self.encode, self.below = encode, below
        self.spec = "reword" if below == USUAL else f"reword:{below:g}"
        self._known: dict[str, Tensor] = {}

    def reference(self, output: Tensor, label: Tensor) -> Tensor:
        """Return the ids of the clean answers [B, L]."""
        del label
        speech, tokens = self._tokens(output)
        return speech.greedy(tokens).to(output)

    @torch.no_grad()
    def margin(self, output: Tensor, case: Case) -> Tensor:
        ids = self._answer(case)
        leads = self._read(output, ids)[0].masked_fill(ids < 0, float("inf")).amin(1)
        similar = torch.ones_like(leads)
        changed = (leads <= 0).nonzero().flatten()
        if len(changed):
            speech, tokens = self._tokens(output[changed])
            said = [speech.text_of(row) for row in speech.greedy(tokens).tolist()]
            before = [speech.text_of(row) for row in ids[changed].tolist()]
            similar[changed] = (self._meaning(said) * self._meaning(before)).sum(1).to(similar)
        return similar - self.below

    def loss(self, output: Tensor, objective: Objective, case: Case) -> Tensor:
        ids = self._answer(case)
        leads, surprise = self._read(output, ids)
        said = ids >= 0
        if objective.name.startswith("ce"):
            return (surprise * said).sum(1) / said.sum(1).clamp_min(1)
        return -leads.masked_fill(~said, float("inf")).amin(1).nan_to_num(posinf=0.0)

    def tells(self, objective: Objective) -> bool:
        del objective
        return True  # another meaning needs another token first

    def _answer(self, case: Case) -> Tensor:
        assert case.reference is not None, "the goal needs the clean answers"
        ids = case.reference
        return ids[:, : max(1, int((ids >= 0).sum(1).amax()))].long()

    def _meaning(self, texts: Sequence[str]) -> Tensor:
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._known |= dict(zip(new, self.encode(new).cpu(), strict=True))
        return torch.stack([self._known[text] for text in texts])


def _below(text: str) -> float:
    try:
        below = float(text or USUAL)
    except ValueError:
        below = 2.0
    if not -1 < below < 1:
        raise UserError(f"the goal reword:{text} needs a similarity between -1 and 1: pass reword or reword:0.7")
    return below


def _read_reword(text: str, known: Known) -> tuple[Reword, ...]:
    below, speech = _below(text), speech_of(known, "reword")
    if known.sentences is None:
        raise UserError("the goal reword cannot be read here: pass robustvlm.attacks.goals.answers.Reword(...)")
    return (Reword(speech, known.sentences(), below),)


def _words_reword(text: str, can_reject: bool, min_cos: float | None) -> GoalWords:
    del can_reject, min_cos
    below = f"{_below(text):g}"
    return GoalWords(
        title=f"answers that mean something else (similarity below {below})",
        effect=f"make the answer mean something else (similarity to the clean one below {below}) on",
        whom="images",
        before="images",
        held="answer means the same",
        nothing="The answer to no image could be compared with itself: the model is random.",
    )


GOALS["reword"] = GoalKind(("reword", "reword:SIMILARITY"), _read_reword, _words_reword, refuses=False)
