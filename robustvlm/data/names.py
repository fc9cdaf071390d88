"""Class names: how they are read and checked, and when two of them say the same thing."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from robustvlm.core import files
from robustvlm.errors import UserError

# Class names: how two spellings are compared, how they are read from files and checked

# Marks that turn the direction of writing: a name that holds one reads differently from what it is.
_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_STREAMS = ("/dev/fd/", "/dev/stdin", "/proc/")
_NO_TEXT = frozenset({"Cc", "Cs", "Zl", "Zp"})


def clean_name(name: str, where: str) -> str:
    r"""Return a name composed (NFC), with single spaces; refuse one that a terminal or a reader would take wrongly.

    Raises:
        UserError: control characters, half of a surrogate pair, or marks that turn the direction of writing.

    Example:
        >>> clean_name(" red  fox\n", "the list")
        'red fox'
        >>> clean_name("cat\x1b[2J", "the list")
        Traceback (most recent call last):
        robustvlm.errors.UserError: the list holds the name 'cat\x1b[2J' with the control character U+001B: remove it
    """
    text = " ".join(unicodedata.normalize("NFC", name).split())
    bad = next((char for char in text if unicodedata.category(char) in _NO_TEXT or char in _TURNING), None)
    if bad is not None:
        shown = ascii(text if len(text) <= 60 else text[:57] + "...")
        raise UserError(f"{where} holds the name {shown} with the control character U+{ord(bad):04X}: remove it")
    return text


def readable(names: Sequence[str]) -> tuple[str, ...]:
    """Return folder-like names as words for a prompt ("pickup_truck" as "pickup truck"), if they stay distinct.

    Example:
        >>> readable(["pickup_truck", "cat"])
        ('pickup truck', 'cat')
    """
    spaced = tuple(re.sub(r"[\s_]+", " ", name).strip() for name in names)
    return spaced if len(set(spaced)) == len(spaced) and all(spaced) else tuple(names)


def read_text(path: Path, what: str) -> str:
    """Return the text of a small user file; `what` names its purpose in the error."""
    try:
        if str(path).startswith(_STREAMS):  # the shell's own pipes: `--classes <(...)`
            return path.read_text(encoding="utf-8-sig")
        return files.read_text(path, encoding="utf-8-sig")
    except files.NotRegular as error:
        raise UserError(f"cannot read the {what} file: {error}") from None
    except FileNotFoundError:
        raise UserError(f"no {what} file at {path}") from None
    except UnicodeDecodeError:
        raise UserError(f"the {what} file {path} is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"cannot read the {what} file {path}: {error.strerror or error}") from None


def read_lines(path: Path, what: str) -> list[str] | dict[str, str]:
    """Return the lines of a text file (blank ones and # comments skipped), or a JSON list or object of strings.

    Raises:
        UserError: no such file, no text, no such JSON, a key twice, or a control character (see `clean_name`).
    """
    text = read_text(path, what)
    where = f"the {what} file {path}"
    if path.suffix.lower() != ".json":
        lines = (line.strip() for line in text.splitlines())
        return [clean_name(line, where) for line in lines if line and not line.startswith("#")]
    try:
        value = json.loads(text, object_pairs_hook=lambda pairs: keys_once(pairs, where))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {error}") from None
    items = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise UserError(f"{where} must hold a JSON list of strings")
    if isinstance(value, dict):
        return {clean_name(key, where): clean_name(item, where) for key, item in value.items()}
    return [clean_name(item, where) for item in items]


def check_names(names: Sequence[str], where: str) -> None:
    """Refuse an empty list, an empty name and a name given twice."""
    if not names:
        raise UserError(f"{where} holds no class name")
    if not all(name.strip() for name in names):
        raise UserError(f"{where} holds an empty class name")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{where} names '{twice[0]}' {names.count(twice[0])} times: class names must differ")


def keys_once(pairs: list[tuple[str, object]], where: str) -> dict[str, object]:
    """Return a JSON object, in which a key given twice would lose its first value without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise UserError(f"{where} has the key {twice!a} twice")
    return found


# When two names say the same thing: case, accents as they are stored, hyphens, articles and plurals do not count

_ARTICLES = frozenset(("a", "an", "the", "some"))
_UNCHANGED = ("ss", "us", "is")
_BUSES = re.compile("[^aeiou]uses$")  # octopuses and buses, not houses
_IRREGULAR = {
    "mice": "mouse",
    "geese": "goose",
    "men": "man",
    "women": "woman",
    "children": "child",
    "feet": "foot",
    "teeth": "tooth",
    "oxen": "ox",
    "people": "person",
    "glasses": "glasses",  # to be told from a glass; of other pairs (scissors, jeans) there is no one half
    "wolves": "wolf",
    "leaves": "leaf",
    "knives": "knife",
    "loaves": "loaf",
    "calves": "calf",
    "halves": "half",
    "shelves": "shelf",
    "scarves": "scarf",
    "hooves": "hoof",
}


@lru_cache(maxsize=65536)
def words_of(text: str) -> tuple[str, ...]:
    """Return the words that two spellings of one noun phrase share: case, hyphens, articles and plurals do not count.

    Plurals by rule (a handful of irregular ones by list): good enough to compare two names with each other, where a
    wrong singular does no harm as long as it is the same for both.

    Example:
        >>> words_of("The Ice-Creams"), words_of("cherries"), words_of("wolves"), words_of("vitamin A")
        (('ice', 'cream'), ('cherry',), ('wolf',), ('vitamin', 'a'))
    """
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).replace("'s", "").casefold())
    words = re.sub(r"[^\w\s]|_", " ", folded).split()
    # An "a" at the end is no article: it tells "vitamin A" from "vitamin".
    last = words[-1:] == ["a"]
    return tuple(_singular(word) for word in words if word not in _ARTICLES) + ("a",) * last


def _singular(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) < 4 or not word.endswith("s") or word.endswith(_UNCHANGED):
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if (
        word.endswith(("ches", "shes", "xes", "sses", "zes"))
        or (word.endswith("oes") and len(word) > 5)
        or _BUSES.search(word)
    ):
        return word[:-2]
    return word[:-1]


def readings(name: str, *, loosely: bool = True) -> frozenset[tuple[str, ...]]:
    """Return what a name stands for: itself, each part of a list, and loosely the same without brackets.

    A number is no name: two data sets may number their classes alike and mean different things by it.

    Example:
        >>> sorted(readings("Timber wolves, grey wolf"))
        [('grey', 'wolf'), ('timber', 'wolf'), ('timber', 'wolf', 'grey', 'wolf')]
        >>> sorted(readings("crane (bird)")), sorted(readings("crane (bird)", loosely=False)), sorted(readings("7"))
        ([('crane',), ('crane', 'bird')], [('crane', 'bird')], [])
    """
    parts = [name, *name.split(",")]
    if loosely:
        parts += [re.sub(r"\([^)]*\)", " ", part) for part in parts]
    found = frozenset(words for part in parts if (words := words_of(part)))
    return frozenset(words for words in found if not all(word.isdecimal() for word in words))


def same_things(texts: Iterable[str], names: Iterable[str], *, loosely: bool = True) -> dict[str, str]:
    """Return, for each text that says the same as one of the names, that name; `loosely` as for `readings`.

    Example:
        >>> same_things(["Wolves", "dog"], ["fox", "wolf, lobo"])
        {'Wolves': 'wolf, lobo'}
    """
    meant: dict[tuple[str, ...], str] = {}
    for name in names:
        for words in readings(name, loosely=loosely):
            meant.setdefault(words, name)
    found: dict[str, str] = {}
    for text in texts:
        hits = [meant[words] for words in readings(text, loosely=loosely) if words in meant]
        if hits:
            found[text] = min(hits)
    return found


# Names shown in one sentence.
_SHOWN = 8


def some_of(names: Iterable[str]) -> str:
    """Return the first names of a list, and how many more there are.

    Example:
        >>> some_of("abcdefghij")
        'a, b, c, d, e, f, g, h and 2 more'
    """
    found = list(names)
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(found[:_SHOWN]) + more
