"""Where the artwork and the names come from: pinned npm packages, fetched once into tools/.cache."""

from __future__ import annotations

import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CACHE = Path(__file__).resolve().parents[1] / ".cache"


@dataclass(frozen=True)
class Style:
    """One drawing style: the iconify package that ships it, the pinned version and the licence of the artwork."""

    name: str
    version: str
    license: str
    omit: frozenset[str] = frozenset()  # emoji labels whose drawing is left out

    @property
    def package(self) -> str:
        return f"@iconify-json/{self.name}"


# Fluent's paperclip and video game drawings show trade dress; they are left out.
_FLUENT_OMIT = frozenset({"paperclip", "video game"})

STYLES = (
    Style("noto", "1.2.9", "Apache-2.0"),
    Style("noto-v1", "1.2.5", "Apache-2.0"),
    Style("fluent-emoji", "1.2.7", "MIT", _FLUENT_OMIT),
    Style("fluent-emoji-flat", "1.2.6", "MIT", _FLUENT_OMIT),
    Style("fxemoji", "1.2.2", "CC-BY-4.0"),
    Style("twemoji", "1.2.5", "CC-BY-4.0"),
    Style("emojione", "1.2.3", "CC-BY-4.0"),
    Style("streamline-emojis", "1.2.4", "CC-BY-4.0"),
)
EMOJIBASE = ("emojibase-data", "17.0.0")


def fetch(package: str, version: str) -> Path:
    """Return the unpacked folder of `package@version`, downloading it with `npm pack` when it is not cached."""
    stem = package.removeprefix("@").replace("/", "-") + f"-{version}"
    folder = CACHE / stem
    if folder.exists():
        return folder / "package"
    CACHE.mkdir(parents=True, exist_ok=True)
    archive = CACHE / f"{stem}.tgz"
    if not archive.exists():
        subprocess.run(["npm", "pack", "--silent", f"{package}@{version}"], cwd=CACHE, check=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / "package"


def read_json(path: Path) -> Any:
    """Parse one JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
