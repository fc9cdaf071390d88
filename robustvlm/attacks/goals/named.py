"""Goals by name, for a model in hand and nothing else: no data, no class tree."""

from __future__ import annotations

from typing import Any

from robustvlm.attacks.goals.base import Goal
from robustvlm.attacks.goals.classes import Misclassify, Targeted
from robustvlm.attacks.goals.feature import FeatureAway
from robustvlm.attacks.goals.refusal import AcceptedMistake, Deny, Intrude
from robustvlm.errors import UserError, nearest

_WORDS = ("misclassify", "targeted:CLASS", "deny", "intrude", "feature")


def goal_named(text: str, model: Any) -> Goal:
    """Return the goal of a word, for a model that may say `can_reject`, `class_names` and `class_embeddings`.

    Raises:
        UserError: an unknown word or class, or a goal that the model does not allow.

    Example:
        >>> goal_named("targeted:1", object()).target
        1
    """
    kind, _, rest = str(text).strip().partition(":")
    refuses = bool(getattr(model, "can_reject", False))
    if kind in ("deny", "intrude") and not rest:
        if not refuses:
            raise UserError(
                f"goal '{kind}' needs a model that may refuse: pass load_classifier('MODEL+reject:0.5', ...)"
            )
        return Deny() if kind == "deny" else Intrude()
    if kind == "misclassify" and not rest:
        return AcceptedMistake() if refuses else Misclassify()
    if kind == "feature" and not rest:
        embeddings = getattr(model, "class_embeddings", None)
        return FeatureAway(head=None if embeddings is None else (model.logit_scale * embeddings).detach())
    if kind == "targeted" and rest:
        if refuses:
            raise UserError("goal 'targeted' is for models that never refuse: attack the model without its refusal")
        return _targeted(rest.strip(), list(getattr(model, "class_names", ())))
    raise UserError(
        f"unknown goal '{text}': {nearest(kind, _WORDS)} (or an object, as robustvlm.attacks.Superclass(...))"
    )


def _targeted(text: str, names: list[str]) -> Targeted:
    if text in names:
        return Targeted(names.index(text), text)
    if text.isascii() and text.isdigit() and (not names or int(text) < len(names)):
        return Targeted(int(text))
    raise UserError(f"goal 'targeted:{text}' names no class: {nearest(text, names) if names else 'pass its number'}")
