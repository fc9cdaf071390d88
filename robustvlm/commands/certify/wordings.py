"""`--paraphrases`: the wordings of every class that a certificate is to hold for, from the templates or from a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from robustvlm.certify.claims.changed_words import Prompts
from robustvlm.certify.normal import Array
from robustvlm.certify.wordings import Wordings
from robustvlm.data.names import read_lines
from robustvlm.errors import UserError, nearest, setting
from robustvlm.models import VLM
from robustvlm.models.class_cache import in_batches
from robustvlm.models.zero_shot import class_embeddings, computing

TEMPLATES = "templates"
"""Every template by itself, and all of them averaged, each for all classes."""

_VOCABULARY = 64


def paraphrases_in(where: str) -> tuple[str, ...]:
    """Return what else than class names and templates a run about all wordings depends on: the lines of its file."""
    if where == TEMPLATES:
        return (TEMPLATES,)
    found = read_lines(Path(where), "paraphrases")
    return tuple(found if isinstance(found, list) else (f"{key}: {text}" for key, text in found.items()))


def by_class(where: str, class_names: Sequence[str]) -> list[list[str]]:
    """Return the paraphrases of each class that a file has, of lines `CLASS: TEXT`; a class may have none.

    Raises:
        UserError: a line of another form, of an unknown class, or none at all.
    """
    found: dict[str, list[str]] = {name: [] for name in class_names}
    for line in paraphrases_in(where):
        # A class name may itself hold a colon: the longest that fits is meant.
        name = max((one for one in found if line.startswith(f"{one}:")), key=len, default=None)
        text = "" if name is None else line[len(name) + 1 :].strip()
        if name is None or not text:
            said = line.partition(":")[0].strip()
            hint = nearest(said, class_names) if ":" in line else "write CLASS: TEXT, one a line"
            raise UserError(f"'{line}' in the paraphrases file {where} is no text of a class: {hint}")
        if text not in found[name]:
            found[name].append(text)
    if not any(found.values()):
        raise UserError(f"the paraphrases file {where} is empty: write CLASS: TEXT, one a line")
    return list(found.values())


def texts_of(where: str, class_names: tuple[str, ...], templates: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """Return the wordings that copies read by turns: [J] lists of one text for each class.

    Raises:
        UserError: the classes of a file have not equally many texts.
    """
    if where == TEMPLATES:
        return tuple(tuple(template.replace("{}", name) for name in class_names) for template in templates)
    lines = paraphrases_in(where)
    twice = next((line for place, line in enumerate(lines) if line in lines[:place]), None)
    if twice is not None:  # taken once, it would move the texts behind it into other wordings
        raise UserError(
            f"copies read the i-th texts of all classes, and '{twice}' stands twice in {where}: write it once"
        )
    lists = by_class(where, class_names)
    counts = {len(texts) for texts in lists}
    if len(counts) > 1:
        few = min(zip(map(len, lists), class_names, strict=True))
        raise UserError(
            f"copies read the i-th texts of all classes, and '{few[1]}' has {few[0]} in {where}, others {max(counts)}: "
            "write equally many for every class"
        )
    return tuple(zip(*lists, strict=True))


def read_by_turns(vlm: VLM, texts: tuple[tuple[str, ...], ...]) -> Wordings:
    """Return the wordings [J] of all classes, encoded."""
    rows = encoded(vlm, [one for wording in texts for one in wording]).reshape(len(texts), len(texts[0]), -1)
    return Wordings(tuple(rows[:, place] for place in range(rows.shape[1])), aligned=True)


def encoded(vlm: VLM, texts: list[str]) -> Array:
    """Return unit vectors [N, D] of texts."""
    with computing(vlm):
        return _array(in_batches(texts, 64, lambda part: vlm.encode_text(list(part))))


def prompts_of_words(texts: tuple[tuple[str, ...], ...]) -> Prompts:
    """Return the texts with the words that an audit puts in the place of others: those of all the texts."""
    known = dict.fromkeys(word for wording in texts for one in wording for word in one.split())
    return Prompts(texts, tuple(known)[:_VOCABULARY])


def make_wordings(
    where: str, vlm: VLM, text: Array, class_names: tuple[str, ...], templates: tuple[str, ...]
) -> Wordings:
    """Return the wordings that a setting names, encoded; the usual vector of each class [K, D] is one of them.

    Raises:
        UserError: no such file, lines of another form, or a single template.
    """
    if where == TEMPLATES:
        if len(templates) < 2:
            raise UserError(
                f"there is one template, so no other wording: pass more of them, or a file of {setting('paraphrases')}"
            )
        tables = [_array(class_embeddings(vlm, class_names, [template])) for template in templates]
        return Wordings(tuple(np.stack(rows) for rows in zip(text, *tables, strict=True)), aligned=True)
    lists = by_class(where, class_names)
    flat = [one for texts in lists for one in texts]
    rows = encoded(vlm, flat)
    ends = np.cumsum([len(texts) for texts in lists])
    parts = np.split(rows, ends[:-1])
    return Wordings(tuple(np.vstack([own[None], part]) for own, part in zip(text, parts, strict=True)), aligned=False)


def _array(rows: Tensor) -> Array:
    return np.asarray(rows.detach().double().cpu().numpy())
