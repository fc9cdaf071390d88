"""Prompt templates: the built-in ensembles and template files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from robustvlm.data.names import read_lines
from robustvlm.errors import UserError

DEFAULT: tuple[str, ...] = ("a photo of a {}.",)
"""What a source without known classes is asked with."""

CIFAR: tuple[str, ...] = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a small photo of a {}.",
    "a blurry photo of a {}.",
    "a low resolution photo of a {}.",
    "a low contrast photo of a {}.",
    "a bad photo of a {}.",
    "a close-up photo of a {}.",
)
"""For thumbnails: wordings that fit images of 32 pixels."""

IMAGENET: tuple[str, ...] = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a photo of one {}.",
    "a close-up photo of a {}.",
    "a bright photo of a {}.",
    "a dark photo of a {}.",
    "a blurry photo of a {}.",
    "a photo of a small {}.",
    "a photo of a large {}.",
    "a drawing of a {}.",
    "a {} in its surroundings.",
    "many {} together.",
)
"""For photographs of single objects in varied light, size and style."""


def fill(template: str, name: str) -> str:
    """Return the prompt for one class name.

    Example:
        >>> fill("a photo of a {}.", "cat")
        'a photo of a cat.'
    """
    return template.replace("{}", name)


def read_templates(path: Path) -> tuple[str, ...]:
    """Return the templates in a text file (one a line; blank lines and # comments skipped) or JSON list.

    Raises:
        UserError: no file, no template, or one that does not hold `{}` once.
    """
    found = read_lines(path, "templates")
    if isinstance(found, dict):
        raise UserError(f"the templates file {path} must hold a list, got a JSON object")
    return check_templates(found, f"the templates file {path}")


def check_templates(templates: Sequence[str], where: str) -> tuple[str, ...]:
    """Return the templates without repeats, each holding `{}` once and no other brace."""
    for template in templates:
        rest = template.replace("{}", "", 1)
        if rest == template:
            raise UserError(f"{where}: the template '{template}' lacks {{}}, the place of the class name")
        if "{" in rest or "}" in rest:
            raise UserError(f"{where}: the template '{template}' must hold {{}} once and no other brace")
    if not templates:
        raise UserError(f"{where} holds no template: write one a line, such as: a photo of a {{}}.")
    return tuple(dict.fromkeys(templates))
