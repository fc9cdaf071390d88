"""What is written about one class, by a person or a language model, and how it becomes antibodies."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from robustvlm.defenses.immunity.antibodies.texts import CONTEXT, HARD_NEGATIVE, AntibodyText, Proposal


class Entry(BaseModel):
    """Three lists of noun phrases about one class.

    Attributes:
        same: other names of the class, and kinds of it: what must not become an antibody.
        look_alikes: other things that look like it (hard negatives).
        impossible: the thing where or as it cannot be (contextual anomalies).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    same: tuple[str, ...] = ()
    look_alikes: tuple[str, ...] = ()
    impossible: tuple[str, ...] = ()


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
        for kind, phrases in ((HARD_NEGATIVE, entry.look_alikes), (CONTEXT, entry.impossible))
        for text in phrases
    ]
    return Proposal(tuple(texts), {name: entry.same for name, entry in entries.items() if entry.same})
