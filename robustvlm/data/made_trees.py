"""Trees made on demand: `wordnet` or `llm` in the place of a tree file."""

from __future__ import annotations

from collections.abc import Sequence

from robustvlm.data.llm_tree import BY_KIND, llm_tree
from robustvlm.data.taxonomy import Forest
from robustvlm.data.wordnet import open_wordnet
from robustvlm.data.wordnet_tree import wordnet_tree
from robustvlm.errors import UserError, nearest
from robustvlm.llm import LlmClient

MAKERS = ("wordnet", "llm")


def make_forest(
    how: str, class_names: Sequence[str], *, client: LlmClient | None = None, criteria: Sequence[str] = (BY_KIND,)
) -> Forest:
    """Return a tree over the classes from WordNet, or trees by a language model, one for each criterion.

    Raises:
        UserError: an unknown way, no language model named where one is needed, and what the ways themselves refuse.

    Example:
        >>> make_forest("guess", ["cat", "dog"])
        Traceback (most recent call last):
        robustvlm.errors.UserError: a tree is made by 'wordnet' or 'llm', got 'guess': known: 'llm', 'wordnet'
    """
    if how == "wordnet":
        return Forest((wordnet_tree(open_wordnet(), class_names),))
    if how != "llm":
        raise UserError(f"a tree is made by 'wordnet' or 'llm', got '{how}': {nearest(how, MAKERS)}")
    if client is None:
        raise UserError("a tree by a language model needs --llm URL and --llm-model NAME")
    return Forest(tuple(llm_tree(client, class_names, criterion=criterion) for criterion in criteria))
