"""Build robustvlm/assets/emoji and its tree from the npm packages: python -m tools.emoji.build"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tools.emoji.catalogue import (
    DEFAULT_PER_SUPERCLASS,
    FAR_MIN_STYLES,
    FAR_PER_SUBGROUP,
    FAR_SUBGROUPS,
    TREE,
    parse_entry,
)
from tools.emoji.icons import Emoji, IconSet, load_emoji
from tools.emoji.packages import STYLES
from tools.emoji.render import render

ASSETS = Path(__file__).resolve().parents[2] / "robustvlm" / "assets"
Row = dict[str, Any]


def concepts(emoji: list[Emoji], icons: list[IconSet]) -> Iterator[tuple[Row, Emoji]]:
    """Yield (split, domain, superclass, name) and the emoji that show it, in catalogue order."""
    by_label = {item.label: item for item in emoji}
    for domain, superclasses in TREE.items():
        for superclass, (known, near) in superclasses.items():
            for split, entries in (("id", known), ("near", near)):
                for name, labels in map(parse_entry, entries):
                    row = {"split": split, "domain": domain, "superclass": superclass, "name": name}
                    yield from ((row, by_label[label]) for label in labels)
    for subgroup in FAR_SUBGROUPS:
        for item in _far_choice(subgroup, emoji, icons):
            yield {"split": "far", "domain": "symbol", "superclass": subgroup, "name": item.label}, item


def _far_choice(subgroup: str, emoji: list[Emoji], icons: list[IconSet]) -> list[Emoji]:
    """Choose by a hash of the code points: fixed, and blind to what the drawings look like."""
    drawn = [
        item
        for item in emoji
        if item.subgroup == subgroup and sum(icon.find(item) is not None for icon in icons) >= FAR_MIN_STYLES
    ]
    return sorted(drawn, key=lambda item: hashlib.blake2b(item.hexcode.encode()).digest())[:FAR_PER_SUBGROUP]


def sprite_rows() -> Iterator[Row]:
    """Yield one row per drawing: the encoded sprite and its metadata."""
    icons = [IconSet.load(style) for style in STYLES]
    for row, emoji in concepts(load_emoji(), icons):
        for icon_set in icons:
            name = icon_set.find(emoji)
            if name is None:
                continue
            svg, mirrored = icon_set.svg(name)
            pixels = render(svg, mirrored=mirrored)
            if pixels is None:
                print(f"nothing visible, left out: {icon_set.style.name} {name}")
                continue
            yield {
                "image": encode(Image.fromarray(pixels)),
                **row,
                "label": emoji.label,
                "hexcode": emoji.hexcode,
                "style": icon_set.style.name,
                "license": icon_set.style.license,
                "tags": list(emoji.tags),
            }


def encode(image: Image.Image) -> bytes:
    """Compress one RGBA sprite (WebP at quality 90 is visually lossless at this size)."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=90, method=6, alpha_quality=95)
    return buffer.getvalue()


def class_table() -> dict[str, Any]:
    """Return the contents of classes.json; the default label set is chosen by a rule blind to the drawings."""
    classes = []
    for domain, superclasses in TREE.items():
        for superclass, (known, _) in superclasses.items():
            names = [parse_entry(entry)[0] for entry in known]
            default = sorted(names)[:DEFAULT_PER_SUPERCLASS]
            classes += [
                {"name": name, "superclass": superclass, "domain": domain, "default": name in default} for name in names
            ]
    return {"classes": classes}


def tree() -> dict[str, Any]:
    """Return the nested tree: root -> domain -> superclass -> class."""
    return {
        "name": "root",
        "children": [
            {
                "name": domain,
                "children": [
                    {"name": superclass, "children": [{"name": parse_entry(entry)[0]} for entry in known]}
                    for superclass, (known, _) in superclasses.items()
                ],
            }
            for domain, superclasses in TREE.items()
        ],
    }


def write_json(path: Path, content: Any) -> None:
    """Write readable JSON with a closing newline."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Render everything and write the assets."""
    rows = list(sprite_rows())
    folder = ASSETS / "emoji"
    write_json(folder / "classes.json", class_table())
    write_json(ASSETS / "trees" / "emoji.json", tree())
    pq.write_table(pa.Table.from_pylist(rows), folder / "sprites.parquet", compression="zstd")
    for split in ("id", "near", "far"):
        chosen = [row for row in rows if row["split"] == split]
        print(split, len(chosen), "sprites,", len({row["name"] for row in chosen}), "names")
    print((folder / "sprites.parquet").stat().st_size, "bytes")


if __name__ == "__main__":
    main()
