"""The card of a model that this program made: what kind it is and which model it stands on."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robustvlm.core.files import first_line, parse_json, read_text, write_text
from robustvlm.errors import UserError

CARD_NAME = "model.json"
FORMAT = 1


@dataclass(frozen=True)
class Card:
    """What a model's folder says of itself.

    Attributes:
        kind: which program part made it and can load it, such as "purify".
        base: spec of the model that it stands on, None for a model that needs no other.
        base_fingerprint: digest of that model when this one was made.
        settings: whatever else the kind needs, as plain JSON.
        base_probe: what that model answered to fixed inputs then (`robustvlm.models.probe`).
    """

    kind: str
    base: str | None = None
    base_fingerprint: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    base_probe: Mapping[str, Any] | None = field(default=None, repr=False)


def write_card(folder: Path, card: Card) -> None:
    """Write `model.json`; a base that is a folder is also named relative to this one, so that both can be moved.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_card(folder, Card("purify", base="tiny", base_fingerprint="ab12", settings={"sigma": [0.25]}))
        >>> read_card(folder)
        Card(kind='purify', base='tiny', base_fingerprint='ab12', settings={'sigma': [0.25]})
    """
    content: dict[str, Any] = {"format": FORMAT, "kind": card.kind, "settings": dict(card.settings)}
    if card.base is not None:
        content["base"] = {"spec": card.base, "fingerprint": card.base_fingerprint}
        if card.base_probe is not None:
            content["base"] |= {"probe": dict(card.base_probe)}
        place, operators = split_folder(card.base)
        if place is not None:
            # Folders are compared where links lead: a relative way out of a linked folder would miss.
            content["base"] |= {"relative": os.path.relpath(place.resolve(), folder.resolve()), "operators": operators}
    write_text(folder / CARD_NAME, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_card(folder: Path) -> Card | None:
    """Return the card of a folder, None if it has none; `base` is found beside the folder first, then as written.

    Raises UserError for a card that cannot be read or is of a later format.
    """
    path = folder / CARD_NAME
    try:
        content = parse_json(read_text(path))
        version, kind, settings, base = (content.get(key) for key in ("format", "kind", "settings", "base"))
        if (
            not isinstance(version, int)
            or isinstance(version, bool)
            or not isinstance(kind, str)
            or not isinstance(settings, dict)
        ):
            raise ValueError("no format, kind or settings")
        if base is not None and not isinstance(base["spec"], str):
            raise ValueError("base names no spec")
        for key in ("relative", "operators", "fingerprint") if base is not None else ():
            if not isinstance(base.get(key), str | None):
                raise ValueError(f"base {key} must be text, got {base[key]!r}")
        if base is not None and not isinstance(base.get("probe"), dict | None):
            raise ValueError(f"base probe must be an object, got a {type(base['probe']).__name__}")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"'{path}' is not the card of a model ({first_line(error)}): make the model again") from None
    if version > FORMAT:
        raise UserError(f"'{path}' is of format {version}, this robustvlm reads up to {FORMAT}: update robustvlm")
    if base is None:
        return Card(kind, settings=settings)
    return Card(kind, _found(folder, base), base.get("fingerprint"), settings, base.get("probe"))


def require_ground(folder: Path, card: Card) -> None:
    """Refuse a model whose card leads back to itself, over whatever models between: it would never end.

    Example:
        >>> require_ground(Path("runs/some"), Card("purify", base="tiny"))
    """
    passed = [folder.resolve()]
    below: Card | None = card
    while below is not None and below.base is not None:
        place, _ = split_folder(below.base)
        if place is None:
            return
        if place.resolve() in passed:
            raise UserError(f"the model '{folder}' stands on itself: the cards below it lead back to '{place}'")
        passed.append(place.resolve())
        below = read_card(place)


def _found(folder: Path, base: dict[str, Any]) -> str:
    near = folder / base["relative"] if base.get("relative") else None
    return f"{near}{base.get('operators') or ''}" if near is not None and near.is_dir() else str(base["spec"])


def split_folder(spec: str) -> tuple[Path | None, str]:
    """Split a spec into the folder that it begins with, if it does, and the operators behind."""
    rest = spec
    while True:
        place = os.path.expanduser(rest)
        if os.path.isdir(place):
            return Path(place), spec[len(rest) :]
        if "+" not in rest:
            return None, ""
        rest = rest.rpartition("+")[0]
