"""Match emoji (by code point or by name) to the icons of each style."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from tools.emoji.packages import EMOJIBASE, Style, fetch, read_json


@dataclass(frozen=True)
class Emoji:
    """One emoji of emojibase: its code points, CLDR short name, subgroup and search tags."""

    hexcode: str
    label: str
    subgroup: str
    tags: tuple[str, ...]


def load_emoji() -> list[Emoji]:
    """Return all emoji that belong to a group (components such as skin tones have none)."""
    folder = fetch(*EMOJIBASE)
    subgroups = read_json(folder / "meta" / "groups.json")["subgroups"]
    return [
        Emoji(
            hexcode=item["hexcode"],
            label=item["label"].replace("\u2019", "'"),
            subgroup=subgroups[str(item["subgroup"])],
            tags=tuple(item.get("tags", ())),
        )
        for item in read_json(folder / "en" / "data.json")
        if "group" in item
    ]


def slug(label: str) -> str:
    """Return the icon name iconify would derive from an emoji's name.

    Example:
        >>> slug("woman's boot")
        'womans-boot'
    """
    text = label.lower().replace("'", "").replace("&", "and").replace(".", "")
    text = text.replace("ñ", "n").replace("é", "e")
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def _plain_code(code: str) -> str:
    """Drop the emoji variation selector, which the packages write inconsistently."""
    return code.lower().replace("-fe0f", "")


@dataclass(frozen=True)
class IconSet:
    """The icons of one style and the lookup tables from code points and names."""

    style: Style
    data: dict[str, Any]
    by_code: dict[str, str]
    by_squeezed_name: dict[str, str] = field(repr=False)

    @classmethod
    def load(cls, style: Style) -> IconSet:
        folder = fetch(style.package, style.version)
        data = read_json(folder / "icons.json")
        chars_file = folder / "chars.json"
        chars = read_json(chars_file) if chars_file.exists() else {}
        names = [*data["icons"], *data.get("aliases", {})]
        return cls(
            style=style,
            data=data,
            by_code={_plain_code(code): name for code, name in chars.items()},
            by_squeezed_name={name.replace("-", ""): name for name in names},
        )

    def find(self, emoji: Emoji) -> str | None:
        """Return the icon's name, first by code point, then by name; None when the style does not draw it."""
        if emoji.label in self.style.omit:
            return None
        by_code = self.by_code.get(_plain_code(emoji.hexcode))
        return by_code or self.by_squeezed_name.get(slug(emoji.label).replace("-", ""))

    def svg(self, name: str) -> tuple[str, bool]:
        """Return the icon as an SVG document and whether it must be mirrored (iconify aliases may flip)."""
        mirrored = False
        while name not in self.data["icons"]:
            alias = self.data["aliases"][name]
            mirrored ^= bool(alias.get("hFlip"))
            name = alias["parent"]
        icon = self.data["icons"][name]
        width, height = (icon.get(key, self.data.get(key, 16)) for key in ("width", "height"))
        left, top = icon.get("left", 0), icon.get("top", 0)
        body = icon["body"].replace("currentColor", "#222")
        head = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">'
        )
        return f"{head}{body}</svg>", mirrored
