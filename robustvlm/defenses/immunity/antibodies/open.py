"""From the words of a command to a source of antibodies."""

from __future__ import annotations

from collections.abc import Callable

from robustvlm.defenses.immunity.antibodies.bank import BankSource
from robustvlm.defenses.immunity.antibodies.files import FileSource
from robustvlm.defenses.immunity.antibodies.llm import LlmSource
from robustvlm.defenses.immunity.antibodies.texts import AntibodySource
from robustvlm.defenses.immunity.antibodies.wordnet import WordNetSource
from robustvlm.errors import UserError, nearest
from robustvlm.llm import LlmClient

FORMS = (
    ("bank", "the bundled ones"),
    ("file:PATH", "your own"),
    ("llm", "written by a language model"),
    ("wordnet", "WordNet's neighbours"),
)
"""What a source can be; noise, which has no texts, is made by `noise_antibodies`."""


def open_source(
    spec: str, *, client: LlmClient | None = None, on_classes: Callable[[int], None] | None = None
) -> AntibodySource:
    """Return the source that `spec` names, one of `FORMS`.

    Raises:
        UserError: an unknown form, or no language model named where one is needed.

    Example:
        >>> type(open_source("bank")).__name__
        'BankSource'
    """
    kind, _, rest = spec.partition(":")
    if kind == "file" and rest:
        return FileSource(rest)
    if spec == "bank":
        return BankSource()
    if spec == "wordnet":
        return WordNetSource()
    if spec != "llm":
        forms = ", ".join(form for form, _ in FORMS)
        hint = nearest(kind, [form.partition(":")[0] for form, _ in FORMS])
        raise UserError(f"antibodies come from {forms}; got '{spec}': {hint}")
    if client is None:
        raise UserError("antibodies by a language model need --llm URL and --llm-model NAME")
    return LlmSource(client, on_classes=on_classes)
