"""A class tree by a language model: first the groups, then each class into one of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence

from pydantic import BaseModel, ConfigDict

from robustvlm.data.names import name_key
from robustvlm.data.taxonomy import Tree
from robustvlm.data.tree_build import build_tree
from robustvlm.errors import UserError
from robustvlm.llm import LlmClient, LlmError

PROMPT_VERSION = 1
BY_KIND = "kind of thing"
CLASSES_PER_QUESTION = 40
_LONGEST = 60

SYSTEM = "You sort the classes of an image classifier into a small hierarchy. You answer with short English nouns."

GROUPS = """\
These are the classes of an image classifier:
{classes}

Make two levels of groups above them, by this criterion: {criterion}.
Between {fewest} and {most} groups, such that every class belongs to exactly one; look-alike classes belong together.
Put every group under one of a few domains (2 to 8), the coarser level. No group may have the name of a class.

Answer as JSON: {{"groups": [{{"domain": "...", "group": "..."}}, ...]}}"""

MEMBERS = """\
These are groups of classes, by this criterion: {criterion}.
{groups}

Put each of the following classes into exactly one of these groups. Copy the names as they are.
{classes}

Answer as JSON: {{"members": [{{"name": "...", "group": "..."}}, ...]}}"""


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid")

    domain: str
    group: str


class _Groups(BaseModel):
    model_config = ConfigDict(extra="forbid")

    groups: list[_Group]


class _Member(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    group: str


class _Members(BaseModel):
    model_config = ConfigDict(extra="forbid")

    members: list[_Member]


def llm_tree(
    client: LlmClient,
    class_names: Sequence[str],
    *,
    criterion: str = BY_KIND,
    on_classes: Callable[[int], None] | None = None,
) -> Tree:
    """Return a tree class -> group -> domain -> root, where the root is named after the criterion.

    Trees by several criteria make a forest. Every class ends up in exactly one group, or there is no tree: one that the
    model leaves out or puts nowhere is asked for once more.

    Raises:
        LlmError: no usable answer, or none for some class.
        UserError: fewer than 2 classes.
    """
    if len(class_names) < 2:
        raise UserError(f"a tree needs at least 2 classes, got {len(class_names)}")
    domain_of = _ask_groups(client, class_names, criterion)
    group_of: dict[str, str] = {}
    for part in _parts(class_names):
        group_of |= _ask_members(client, part, domain_of, criterion)
        left = [name for name in part if name not in group_of]
        if left:
            group_of |= _ask_members(client, left, domain_of, criterion)
        missing = [name for name in part if name not in group_of]
        if missing:
            raise LlmError(
                f"the language model '{client.endpoint.model}' puts the class '{missing[0]}' into no group, asked "
                "twice: try another model, or write the tree into a file"
            )
        if on_classes is not None:
            on_classes(len(group_of))
    return _build(class_names, group_of, domain_of, criterion)


def _ask_groups(client: LlmClient, class_names: Sequence[str], criterion: str) -> dict[str, str]:
    """Return the domain of each group, by the group's name."""
    fewest, most = max(2, len(class_names) // 12), max(3, min(40, len(class_names) // 3))
    prompt = GROUPS.format(classes=_quoted(class_names), criterion=criterion, fewest=fewest, most=most)
    reply = client.ask(prompt, _Groups, system=SYSTEM)
    domain_of: dict[str, str] = {}
    for row in reply.groups:
        group, domain = _short(row.group), _short(row.domain)
        if group and domain and name_key(group) not in map(name_key, domain_of):
            domain_of[group] = domain
    if not domain_of:
        raise LlmError(f"the language model '{client.endpoint.model}' names no group: try another model")
    return domain_of


def _ask_members(client: LlmClient, part: Sequence[str], domain_of: dict[str, str], criterion: str) -> dict[str, str]:
    prompt = MEMBERS.format(groups=_quoted(list(domain_of)), classes=_quoted(part), criterion=criterion)
    reply = client.ask(prompt, _Members, system=SYSTEM)
    wanted, groups = ({name_key(name): name for name in names} for names in (part, domain_of))
    found: dict[str, str] = {}
    for row in reply.members:
        name, group = wanted.get(name_key(row.name)), groups.get(name_key(_short(row.group)))
        if name is not None and group is not None:
            found.setdefault(name, group)
    return found


def _build(class_names: Sequence[str], group_of: dict[str, str], domain_of: dict[str, str], criterion: str) -> Tree:
    """Return the tree with names that no two nodes share: coarser ones yield, marked as such."""
    taken = {name_key(name) for name in class_names}
    root = _free(criterion, "all", taken)
    used = [group for group in domain_of if group in group_of.values()]
    group_names = {group: _free(group, "group", taken) for group in used}
    domains = {name_key(domain_of[group]): domain_of[group] for group in used}
    domain_names = {key: _free(domain, "domain", taken) for key, domain in domains.items()}
    links = [(root, name) for name in domain_names.values()]
    links += [(domain_names[name_key(domain_of[group])], name) for group, name in group_names.items()]
    links += [(group_names[group_of[name]], name) for name in class_names]
    return build_tree(links, class_names, where="the language model's tree")


def _free(name: str, mark: str, taken: set[str]) -> str:
    while name_key(name) in taken:
        name = f"{name} ({mark})"
    taken.add(name_key(name))
    return name


def _short(name: str) -> str:
    return " ".join(name.split())[:_LONGEST].strip()


def _quoted(names: Sequence[str]) -> str:
    return json.dumps(list(names), ensure_ascii=False)


def _parts(names: Sequence[str]) -> Iterator[Sequence[str]]:
    return (names[start : start + CLASSES_PER_QUESTION] for start in range(0, len(names), CLASSES_PER_QUESTION))
