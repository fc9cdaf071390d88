"""Antibodies from a language model: the questions, and what is written about one class.

The templates are part of the method and are therefore published here, with a version that changes when they do.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from robustvlm.defenses.immunity.antibodies.texts import (
    CONTEXT,
    HARD_NEGATIVE,
    SCENE,
    AntibodySource,
    AntibodyText,
    Proposal,
)
from robustvlm.llm import LlmClient, LlmError
from robustvlm.text import name_key

# What is written about one class, by a person or a language model, and how it becomes antibodies


class Entry(BaseModel):
    """Lists of noun phrases about one class.

    Attributes:
        same: other names of the class, and kinds of it: what must not become an antibody.
        look_alikes: other things that look like it (hard negatives).
        impossible: the thing where or as it cannot be (contextual anomalies).
        contexts: scenes in which it is usually found, without it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    same: tuple[str, ...] = ()
    look_alikes: tuple[str, ...] = ()
    impossible: tuple[str, ...] = ()
    contexts: tuple[str, ...] = ()


def to_proposal(entries: Mapping[str, Entry]) -> Proposal:
    """Return what the entries, by class name, propose.

    Example:
        >>> proposal = to_proposal({"dog": Entry(same=("hound",), look_alikes=("wolf",), impossible=("dog in space",))})
        >>> [(text.text, text.kind) for text in proposal.texts], dict(proposal.kin)
        ([('wolf', 'hard-negative'), ('dog in space', 'context')], {'dog': ('hound',)})
    """
    texts = [
        AntibodyText(text, name, kind)
        for name, entry in entries.items()
        for kind, phrases in (
            (HARD_NEGATIVE, entry.look_alikes),
            (CONTEXT, entry.impossible),
            (SCENE, entry.contexts),
        )
        for text in phrases
    ]
    return Proposal(tuple(texts), {name: entry.same for name, entry in entries.items() if entry.same})


# Antibodies written by a language model: the questions asked, and the answers taken

CLASSES_PER_QUESTION = 8

SYSTEM = (
    "You help to test an image classifier. You name things that the classifier could mistake for its classes although "
    "they are something else. You answer with short English noun phrases without an article."
)

QUESTION = """\
An image classifier knows exactly these classes:
{all_classes}

For each of the following classes give three lists.
1. "same": other names of the class, and names of kinds of it (for "dog": "hound", "puppy", "poodle"); up to {count}.
2. "look_alikes": {count} things that look much like the class in a picture but are not of it, and are not of any
other class above either (for "dog": "wolf", "fox", "hyena"). Think of shape, colour, texture and of what is seen in
the same places. No kind of a class, no part of it, no superclass, no brand.
3. "impossible": {few} settings or materials in which the class cannot really be met, each phrase naming the class
(for "car": "car under water", "car made of fruit").

Classes to answer for, in this order:
{classes}

Answer as JSON of this form:
{{"classes": [{{"name": "...", "same": ["..."], "look_alikes": ["..."], "impossible": ["..."]}}, ...]}}"""


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    same: list[str]
    look_alikes: list[str]
    impossible: list[str]


class _Reply(BaseModel):
    model_config = ConfigDict(extra="forbid")

    classes: list[_Row]


class LlmSource(AntibodySource):
    """A language model asked about the classes, a few at a time; what it leaves out is asked for once more.

    Args:
        client: who is asked; its cache makes an interrupted run go on where it was.
        count: look-alikes wanted for each class.
        on_classes: called with the number of classes done so far.

    Raises:
        LlmError: no answer, or none for some class.
    """

    def __init__(self, client: LlmClient, *, count: int = 12, on_classes: Callable[[int], None] | None = None) -> None:
        self.client, self.count, self._on_classes = client, count, on_classes

    def propose(self, class_names: Sequence[str]) -> Proposal:
        entries: dict[str, Entry] = {}
        for group in _groups(class_names, CLASSES_PER_QUESTION):
            entries |= self._ask(group, class_names)
            for name in [name for name in group if name not in entries]:
                entries |= self._ask([name], class_names)
            missing = [name for name in group if name not in entries]
            if missing:
                raise LlmError(
                    f"the language model '{self.client.endpoint.model}' says nothing of the class '{missing[0]}', "
                    "asked twice: try another model, or write antibodies for it into a file"
                )
            if self._on_classes is not None:
                self._on_classes(len(entries))
        return to_proposal({name: entries[name] for name in class_names})

    def _ask(self, group: Sequence[str], class_names: Sequence[str]) -> dict[str, Entry]:
        reply = self.client.ask(question(group, class_names, self.count), _Reply, system=SYSTEM)
        wanted = {name_key(name): name for name in group}
        found: dict[str, Entry] = {}
        for row in reply.classes:
            name = wanted.get(name_key(row.name))
            if name is not None and row.look_alikes:
                same, alike, impossible = (_clean(texts) for texts in (row.same, row.look_alikes, row.impossible))
                found.setdefault(name, Entry(same=same, look_alikes=alike, impossible=impossible))
        return found


def question(group: Sequence[str], class_names: Sequence[str], count: int) -> str:
    """Return what is asked about a group of classes; class names are quoted as JSON, so that none can break out.

    Example:
        >>> print(question(["dog"], ["cat", "dog"], 12).splitlines()[1])
        ["cat", "dog"]
    """
    return QUESTION.format(
        all_classes=json.dumps(list(class_names), ensure_ascii=False),
        classes=json.dumps(list(group), ensure_ascii=False),
        count=count,
        few=max(2, count // 4),
    )


def _clean(texts: Sequence[str]) -> tuple[str, ...]:
    """Return the texts on one line each, without what models add though told not to: articles, stops, blanks."""
    plain = (" ".join(text.split()).strip(" .,;") for text in texts)
    bare = (text.partition(" ")[2] if text.lower().startswith(("a ", "an ", "the ")) else text for text in plain)
    return tuple(dict.fromkeys(text for text in bare if text and len(text) <= 120))


def _groups(names: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (names[start : start + size] for start in range(0, len(names), size))
