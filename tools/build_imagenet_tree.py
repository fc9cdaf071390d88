"""Build robustvlm/assets/trees/imagenet1k.json: the ImageNet-1k classes under WordNet 3.0 hypernyms.

    python tools/build_imagenet_tree.py [--nouns data.noun]

WordNet's noun file is taken from Debian's package wordnet-base (`apt-get download`, unpacked into tools/.cache) unless
--nouns names one; the WordNet ids of the classes come from timm, their names from open_clip.

WordNet's graph is reduced in two steps, both deterministic:
1. of several hypernyms the first one listed is followed, which gives a tree of 5 to 19 levels;
2. of its nodes those stay that some cut selects: the topmost with at most `most` classes, if they have at least
   `least`. Four cuts, each finer than the one before, give six levels: 1000 classes, 137, 101, 44, 8 groups, the root.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections import Counter
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from robustvlm.data.classes import imagenet_names
from robustvlm.text import name_key

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "tools" / ".cache"
TARGET = ROOT / "robustvlm" / "assets" / "trees" / "imagenet1k.json"
CUTS = ((520, 40), (150, 15), (50, 6), (16, 3))
"""(most, least) classes of a node that a cut selects, from the coarsest cut down."""


@dataclass(frozen=True)
class Nouns:
    """WordNet's nouns by their 8-digit offset: the words of each and its first hypernym."""

    words: dict[str, list[str]]
    parent: dict[str, str]

    def above(self, node: str) -> list[str]:
        """Return the ancestors of a node, the nearest first."""
        found = []
        while node in self.parent:
            node = self.parent[node]
            found.append(node)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nouns", type=Path, help="WordNet 3.0's data.noun")
    nouns = read_nouns(parser.parse_args().nouns or fetch_nouns())
    ids = (files("timm") / "data" / "_info" / "imagenet_synsets.txt").read_text().split()
    chains = {wnid[1:]: nouns.above(wnid[1:]) for wnid in ids}
    kept = select_nodes(chains, nouns)
    tree = nest(chains, kept, nouns.words, dict(zip(chains, imagenet_names(), strict=True)))
    TARGET.write_text(json.dumps(tree, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{TARGET.relative_to(ROOT)}: {TARGET.stat().st_size} bytes, {len(ids)} classes, {len(kept)} inner nodes")


def fetch_nouns() -> Path:
    """Download and unpack Debian's wordnet-base and return its noun file."""
    CACHE.mkdir(parents=True, exist_ok=True)
    if not list(CACHE.glob("wordnet-base_*.deb")):
        subprocess.run(["apt-get", "download", "wordnet-base"], cwd=CACHE, check=True)
    package = sorted(CACHE.glob("wordnet-base_*.deb"))[-1]
    subprocess.run(["dpkg-deb", "-x", str(package), str(CACHE / "wordnet")], check=True)
    return CACHE / "wordnet" / "usr" / "share" / "wordnet" / "data.noun"


def read_nouns(path: Path) -> Nouns:
    """Read WordNet's noun file (format: `man 5 wndb`)."""
    words: dict[str, list[str]] = {}
    parent: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):  # the licence
            continue
        cells = line.partition("|")[0].split()
        count = int(cells[3], 16)
        pointers = cells[5 + 2 * count :]
        words[cells[0]] = [cells[4 + 2 * i].replace("_", " ") for i in range(count)]
        hypernyms = [pointers[i + 1] for i in range(0, len(pointers), 4) if pointers[i] in {"@", "@i"}]
        if hypernyms:
            parent[cells[0]] = hypernyms[0]
    return Nouns(words, parent)


def select_nodes(chains: dict[str, list[str]], nouns: Nouns) -> set[str]:
    """Return the root and the nodes that a cut selects."""
    sizes = Counter(node for chain in chains.values() for node in chain)
    return {
        node
        for node, size in sizes.items()
        if node not in nouns.parent or any(least <= size <= most < sizes[nouns.parent[node]] for most, least in CUTS)
    }


def nest(
    chains: dict[str, list[str]], kept: set[str], words: dict[str, list[str]], class_names: dict[str, str]
) -> dict[str, Any]:
    """Return the nested tree; a node takes its first word that no class or node above has taken."""
    used = {name_key(name) for name in class_names.values()}
    nodes: dict[str, dict[str, Any]] = {}
    root: dict[str, Any] = {}
    for leaf, chain in chains.items():
        at = root
        for node in [name for name in reversed(chain) if name in kept]:
            if node not in nodes:
                choices = (*words[node], *(f"{word} (kind)" for word in words[node]))
                name = next(word for word in choices if name_key(word) not in used)
                used.add(name_key(name))
                nodes[node] = {"name": name, "wnid": f"n{node}", "children": []}
                at.setdefault("children", []).append(nodes[node])
            at = nodes[node]
        at["children"].append({"name": class_names[leaf], "wnid": f"n{leaf}"})
    return root["children"][0]  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()
