"""Captions for training: templates over the class name, its superclass, the background and the style."""

from __future__ import annotations

import random
from collections.abc import Sequence

SENTENCES = (
    "{}",
    "{}.",
    "a picture of {}",
    "a photo of {}.",
    "an emoji of {}",
    "an icon of {}",
    "a drawing of {}",
    "this is {}",
    "a small picture of {}",
    "clip art of {}",
    "a cartoon of {}",
)
NODE_SENTENCES = ("{}", "a picture of {}", "an icon of {}", "a photo of {}.", "an emoji of {}")
STYLE_WORDS = {
    "noto": "noto",
    "noto-v1": "blob",
    "fluent-emoji": "gradient",
    "fluent-emoji-flat": "flat",
    "fxemoji": "firefox",
    "emojione": "emojitwo",
}


def with_article(noun: str) -> str:
    """Return the noun with its article.

    Example:
        >>> with_article("owl"), with_article("dog")
        ('an owl', 'a dog')
    """
    return ("an " if noun[0].lower() in "aeiou" else "a ") + noun


def _phrase(noun: str, rng: random.Random) -> str:
    """Name a thing as people do in prompts: with the right article, with a plain 'a' (templates), or bare."""
    draw = rng.random()
    if draw < 0.4:
        return with_article(noun)
    return f"a {noun}" if draw < 0.7 else noun


def caption(
    *, name: str, superclass: str, domain: str, background: str, style: str, tags: Sequence[str], rng: random.Random
) -> str:
    """Return one random caption of a picture."""
    phrase = _phrase(name, rng)
    kind = rng.random()
    if kind < 0.2:
        phrase = f"{phrase}, {with_article(superclass)}"
    elif kind < 0.3:
        phrase = f"{phrase}, a kind of {domain}"
    text = rng.choice(SENTENCES).format(phrase)
    if rng.random() < 0.3:
        text += f" on {with_article(background)} background"
    if rng.random() < 0.15:
        text = f"{STYLE_WORDS.get(style, style)} style: {text}"
    if tags and rng.random() < 0.15:
        text += f", {rng.choice(tags)}"
    return text


def node_caption(name: str, rng: random.Random) -> str:
    """Return one random prompt for a superclass or a domain."""
    return rng.choice(NODE_SENTENCES).format(_phrase(name, rng))
