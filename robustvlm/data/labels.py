"""The one place that decides which label a name, a number or a folder means."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from robustvlm.data.names import check_names, clean_name, words_of
from robustvlm.errors import UserError, nearest
from robustvlm.text import name_key, one_line

_DIGITS = re.compile(r"([0-9]+)")
_LEADING_CODE = re.compile(r"^(n\d{8}|\d+)[\s._-]+(?=\D)")
# Signs that tell names apart ("C++" from "C#"), and numbers that are more than one run of digits ("1.5" is not "15").
_TELLING = re.compile(r"[^\w\s\-'\u2019\".,;:()&/!?]|\d[.,:/]\d|(?:^|\s)-\d")
_MOST_SHOWN = 12
_FEW = 4
_LONGEST_NUMBER = 18

_IMAGENET = 1000
"""Lists of so many classes are ImageNet's, whose order is fixed while the wordings differ from list to list."""


@dataclass(frozen=True)
class Own:
    """What a source itself calls its classes, in the order of its labels.

    Args:
        marks: folder names, text labels or the names in its schema, as they are there.
        names: the same as words; None when the source has numbers only.
    """

    marks: tuple[str, ...] = ()
    names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Settled:
    """The classes of a source after all that was given.

    Args:
        names: class names in label order.
        labels: the label of each of the source's own classes; None where they stay as they are.
        notes: what a reader has to know of it.
    """

    names: tuple[str, ...]
    labels: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()


def natural_key(name: str) -> tuple[object, ...]:
    """Return the sort key that puts "class_2" before "class_10", whatever way accents are stored.

    Example:
        >>> sorted(["10", "2", "1"], key=natural_key)
        ['1', '2', '10']
    """
    parts = _DIGITS.split(unicodedata.normalize("NFC", name))
    # Numbers by length, then digits: no limit on how long they are.
    return (*((len(p.lstrip("0")), p.lstrip("0")) if i % 2 else (p,) for i, p in enumerate(parts)), (name,))


class TextLabels:
    """Labels of a column of texts: each different text is a class, in natural order; "-1" among numbers is none.

    Args:
        values: the texts that occur; where: opens error messages.

    Raises:
        UserError: an empty text, or texts that differ in spaces or in the way accents are stored only.

    Example:
        >>> labels = TextLabels(["10", "2", "-1"], "x")
        >>> labels.marks, labels["10"], labels["-1"], labels[None]
        (('2', '10'), 1, -1, -1)
    """

    def __init__(self, values: Iterable[str], where: str) -> None:
        texts = sorted(set(values), key=natural_key)
        if not all(text.strip() for text in texts):
            raise UserError(f"{where} holds an empty label: leave out the value (null) where the class is unknown")
        if "-1" in texts and all(number_of(text) is not None for text in texts):
            texts.remove("-1")
        self.marks = tuple(texts)
        self._label_of = {text: label for label, text in enumerate(texts)}
        of: dict[str, str] = {}
        for text in texts:
            first = of.setdefault(clean_name(text, where), text)
            if first != text:
                raise UserError(f"{where} holds the labels {first!a} and {text!a}, which are one name: join them")

    def __getitem__(self, text: str | None) -> int:
        return -1 if text is None else self._label_of.get(text, -1)


def settle_names(own: Own, given: Sequence[str] | Mapping[str, str] | None, where: str) -> Settled:
    """Return class names and labels from what the source holds and what the user gave.

    Of a given list, every name goes to the class it certainly means: the one of the same name (case, "_", "-",
    plural, article, a number before it and synonyms after a comma aside), else the one of its number ("7", "class_7";
    from 0, or from 1 where that alone fits). Anything else is refused with the table of what was found; only of
    ImageNet's 1000 classes half may be worded anew, by their place. A list may be longer than what the source holds: a
    part of a set has not all classes.
    A given mapping renames single classes, by their name or by what the source calls them.

    Raises:
        UserError: no names at all, or a list that does not say for certain which class each name means.

    Example:
        >>> settle_names(Own(("cat", "dog"), ("cat", "dog")), ["dogs", "cats"], "x").names
        ('cats', 'dogs')
        >>> settle_names(Own(("0", "2", "10"), ("0", "2", "10")), [f"n{i}" for i in range(11)], "x").labels
        (0, 2, 10)
        >>> settle_names(Own(("cat", "dog"), ("cat", "dog")), ["Katze", "Hund"], "x")
        Traceback (most recent call last):
        robustvlm.errors.UserError: x: the class names file does not say for certain which class each name means \
('cat' -> ?, 'dog' -> ?; no class: 'Katze', 'Hund'): give the names of the data in any order, or a JSON object \
{"cat": "NAME", ...}
    """
    if given is None:
        if own.names is None:
            raise UserError(f"{where} holds no class names: pass --classes FILE with one name a line, in label order")
        return Settled(own.names)
    if isinstance(given, Mapping):
        return _from_mapping(own, given, where)
    if own.names is None:
        return Settled(tuple(given))
    return _from_list(own, tuple(given), where)


def captions_of(value: object) -> tuple[str, ...]:
    """Return the captions in a cell: one text, several, or the lines of one; empty ones are none.

    Raises:
        UserError: what stands there is no text.

    Example:
        >>> captions_of("a dog"), captions_of(["a dog", " ", "a cat"]), captions_of(None)
        (('a dog',), ('a dog', 'a cat'), ())
    """
    texts = value if isinstance(value, list | tuple) else [value]
    kept = [one for one in texts if isinstance(one, str)]
    if wrong := [one for one in texts if one is not None and not isinstance(one, str)]:
        raise UserError(f"a caption must be a text or a list of texts, got {one_line(repr(wrong[0]), limit=60)}")
    lines = kept if isinstance(value, list | tuple) else [line for one in kept for line in one.splitlines()]
    return tuple(text for text in (line.strip() for line in lines) if text)


def number_of(text: str) -> int | None:
    """Return the whole number that a label's text is, or None; of absurd length it is none.

    Example:
        >>> number_of(" 07 "), number_of("-1"), number_of("7.0")
        (7, -1, None)
    """
    digits = text.strip()
    bare = digits.removeprefix("-")
    return int(digits) if bare.isascii() and bare.isdigit() and len(bare) <= _LONGEST_NUMBER else None


def label_of(text: str, class_names: Sequence[str], where: str) -> int:
    """Return the label that a text beside an image means: a number, or the name of a class.

    Raises:
        UserError: neither, a name that several classes share, or a number that is also the name of another class.

    Example:
        >>> label_of("Red_Fox", ["cat", "red fox"], "x"), label_of("1", ["cat", "red fox"], "x")
        (1, 1)
    """
    number, key = number_of(text), name_key(text)
    named = [label for label, name in enumerate(class_names) if name_key(name) == key]
    if len(named) > 1:
        exact = [label for label in named if class_names[label] == text]
        if len(exact) != 1:
            raise UserError(f"{where} has the label '{text[:40]}', which {len(named)} classes are called: name one")
        named = exact
    if named and number is not None and named[0] != number:
        raise UserError(
            f"{where} has the label '{text[:40]}', which may mean class number {number} or the class called "
            f"'{class_names[named[0]]}' (number {named[0]}): pass --classes FILE with names that are no numbers"
        )
    if named or number is not None:
        return named[0] if named else int(number or 0)
    shown = text[:40]
    raise UserError(f"{where} has the label '{shown}', neither a number nor a class: {nearest(shown, class_names)}")


def _from_mapping(own: Own, given: Mapping[str, str], where: str) -> Settled:
    if own.names is None:
        numbers = {number_of(key): name for key, name in given.items()}
        if set(numbers) != set(range(len(given))):
            raise UserError(
                f"{where} has numbers for labels: a JSON object of class names must then have the keys "
                f'"0" to "{len(given) - 1}", or pass a list of names'
            )
        return Settled(tuple(numbers[label] for label in range(len(given))))
    places = _places(own)
    new: dict[int, str] = {}
    for name, renamed in given.items():
        found = places.get(name_key(name), ())
        exact = [place for place in found if name in (own.marks[place], own.names[place])]
        if len(exact or found) != 1:
            what = f"{len(found)} classes called" if found else "no class"
            raise UserError(f"{where} has {what} '{name}', which the class names file renames")
        place = next(iter(exact or found))
        if new.setdefault(place, renamed) != renamed:
            raise UserError(f"{where}: the class names file renames the class '{own.names[place]}' twice")
    names = tuple(new.get(place, name) for place, name in enumerate(own.names))
    check_names(names, f"{where} after renaming")
    return Settled(names)


def _from_list(own: Own, given: tuple[str, ...], where: str) -> Settled:
    assert own.names is not None
    matches = _by_name(own, given)
    if None not in matches.values():
        return _placed(own, given, [place for place in matches.values() if place is not None])
    found = None if any(place is not None for place in matches.values()) else _by_number(own.marks, given)
    if found is not None:
        labels, first = found
        settled = _placed(own, given, labels)
        if first == 0:
            return settled
        note = f"the classes are numbered from 1: '{own.marks[0]}' is '{given[labels[0]]}'"
        return Settled(settled.names, settled.labels, (note, *settled.notes))
    if len(own.names) != len(given):
        raise UserError(
            f"{where} has {len(own.names)} classes, the class names file {len(given)}, and not every class has its "
            f"name there ({_table(own, given, matches)})"
        )
    moved = next((place for place, at in matches.items() if at is not None and at != place), None)
    reworded = [place for place, at in matches.items() if at is None]
    if moved is None and len(given) == _IMAGENET and len(reworded) <= len(given) // 2:
        shown = ", ".join(f"{place} '{own.names[place]}' -> '{given[place]}'" for place in reworded[:_FEW])
        return Settled(given, None, (f"{len(reworded)} names of the list are taken by their place: {shown}, ...",))
    where_else = "" if moved is None else f", and '{own.names[moved]}' stands at another place"
    raise UserError(
        f"{where}: the class names file does not say for certain which class each name means "
        f"({_table(own, given, matches)}){where_else}: give the names of the data in any order, or a JSON object "
        f'{{"{own.marks[0]}": "NAME", ...}}'
    )


def _placed(own: Own, given: tuple[str, ...], labels: Sequence[int]) -> Settled:
    """Return the source's order with the given spelling, or the given order where the source is only a part of it."""
    if len(given) == len(own.marks):
        return Settled(tuple(given[label] for label in labels))
    note = f"the data holds {len(own.marks)} of the {len(given)} classes named: the others stand for no image"
    return Settled(given, tuple(labels), (note,))


def _by_name(own: Own, given: Sequence[str]) -> dict[int, int | None]:
    """Return, for each class of the source, the one given name that certainly means it, or None."""
    assert own.names is not None
    matches: dict[int, int | None] = dict.fromkeys(range(len(own.names)))
    for forms in (_spelled, _keys, _loose_forms):
        free = set(range(len(given))) - set(matches.values())
        meant: dict[str, set[int]] = {}
        for at in free:
            for form in forms(given[at]):
                meant.setdefault(form, set()).add(at)
        claims: dict[int, set[int]] = {}
        for place in (place for place, at in matches.items() if at is None):
            texts = {own.marks[place], own.names[place]}
            found = {(text, at) for text in texts for form in forms(text) for at in meant.get(form, ())}
            claims[place] = {at for text, at in found if not _numbered_apart(text, given[at])}
        claimed = Counter(at for ats in claims.values() for at in ats)
        for place, ats in claims.items():
            # Certain only where neither side has a choice.
            if len(ats) == 1 and claimed[(at := next(iter(ats)))] == 1:
                matches[place] = at
    return matches


def _spelled(name: str) -> Iterator[str]:
    yield unicodedata.normalize("NFC", name)


def _keys(name: str) -> Iterator[str]:
    yield name_key(name)


def _loose_forms(name: str) -> Iterator[str]:
    """Yield spellings that mean the same: without articles, plurals, joints, number before, synonyms after a comma."""
    for text in dict.fromkeys((name, name.partition(",")[0], _LEADING_CODE.sub("", name))):
        # Rules of English for English: of other scripts the rules would drop signs that tell words apart.
        words = words_of(text) if text.isascii() and not _TELLING.search(text) else name_key(text).split()
        if words:
            yield re.sub(r"(?<!\d) | (?!\d)", "", " ".join(words))


def _numbered_apart(one: str, other: str) -> bool:
    """Whether both names begin with a number or code, and with another one ("1 dollar", "10 dollar")."""
    first, second = _LEADING_CODE.match(one), _LEADING_CODE.match(other)
    return first is not None and second is not None and first[1].lstrip("0") != second[1].lstrip("0")


def _by_number(marks: Sequence[str], given: Sequence[str]) -> tuple[list[int], int] | None:
    """Return the labels that marks such as "7" or "class_7" mean and the first class's number; None if unclear."""
    numbers, frames = [], set()
    for mark in marks:
        parts = _DIGITS.split(name_key(mark))
        if len(parts) != 3 or len(parts[1]) > _LONGEST_NUMBER:
            return None
        numbers.append(int(parts[1]))
        frames.add((parts[0].strip(), parts[2].strip()))
    if len(frames) != 1 or len(set(numbers)) < len(numbers) or not numbers:
        return None
    if 0 in numbers and max(numbers) < len(given):
        return numbers, 0
    if 0 not in numbers and max(numbers) == len(given):
        return [number - 1 for number in numbers], 1
    return None


def _places(own: Own) -> dict[str, set[int]]:
    """Return the classes that a key may mean, by name or by what the source calls them."""
    assert own.names is not None
    found: dict[str, set[int]] = {}
    for place, pair in enumerate(zip(own.names, own.marks, strict=True)):
        for text in pair:
            found.setdefault(name_key(text), set()).add(place)
    return found


def _table(own: Own, given: Sequence[str], matches: Mapping[int, int | None]) -> str:
    """Return the table of matches on one line, open ones first, and the given names that no class has."""
    order = sorted(matches, key=lambda place: (matches[place] is not None, place))
    rows = [f"'{own.marks[p]}' -> " + ("?" if (at := matches[p]) is None else f"'{given[at]}'") for p in order]
    taken = {at for at in matches.values() if at is not None}
    unused = [f"'{name}'" for at, name in enumerate(given) if at not in taken]
    text = ", ".join(rows[:_MOST_SHOWN]) + (", ..." if len(rows) > _MOST_SHOWN else "")
    if unused:
        text += "; no class: " + ", ".join(unused[:_MOST_SHOWN]) + (", ..." if len(unused) > _MOST_SHOWN else "")
    return text
