"""Inputs whose fault is known: nothing but a refusal, or a word on what is wrong, is right for most of them."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.torture.bad import IMAGES, NAMES, READS, Bad, strange, writing
from benchmarks.torture.commands import BY_NAME
from benchmarks.torture.mutate import NEVER_RIGHT, STRANGE, strange_file

_EVALUATE, _ATTACK = READS["evaluate"], READS["attack"]
_PARQUET = f"{_EVALUATE} --data parquet:photos.parquet --classes classes.txt"
_SHARD = f"{_EVALUATE} --data wds:photos.tar --classes classes.txt"

_LISTS = {
    "one class": "apple\n",
    "a class twice": "apple\ndog\nhouse\ndog\n",
    "a class twice but for blanks": "apple\ndog\nhouse\n dog \n",
    "too few": "apple\ndog\n",
    "other names": "red\ngreen\nblue\n",
    "a name of blanks in JSON": '["apple", "dog", " "]',
    "a number in JSON": '["apple", "dog", 3]',
    "an object": '{"apple": 0}',
    "half a list": '["apple", "dog"',
    "a list in a list": '[["apple"], "dog", "house"]',
    "names that differ beyond the context": "\n".join(f"{'very ' * 90}{end}" for end in NAMES),
    "a name in two compositions": "caf\u00e9\ncafe\u0301\nhouse\n",
}
_TEMPLATES = {"no place for the name": "a photo\n", "two kinds of braces": "a {} {name}\n", "none": "\n"}
_TREES = {
    "no class of the data": '{"a": ["x", "y"], "b": ["z"]}',
    "a class missing": '{"a": ["apple"], "b": ["dog"]}',
    "a class twice": '{"a": ["apple", "dog"], "b": ["dog", "house"]}',
    "numbers": '{"a": [1, 2], "b": 3}',
}
_PICTURES = {
    "text": b"no image",
    "cut": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
    "empty": b"",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "of 4 thousand million pixels": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
    + (65_500).to_bytes(4, "big") * 2
    + b"\x08\x02\x00\x00\x00"
    + bytes(40),
}
_TABLES: dict[str, dict[str, Any]] = {
    "no image column": {"label": [0, 1]},
    "no labels": {"image": [b"x", b"y"]},
    "labels out of range": {"image": [b"x"] * 2, "label": [0, 99]},
    "negative labels": {"image": [b"x"] * 2, "label": [-1, -1]},
    "labels of fractions": {"image": [b"x"] * 2, "label": [0.5, 1.5]},
    "no rows": {"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())},
    "images of numbers": {"image": [1, 2], "label": [0, 1]},
    "null labels": {"image": [b"x"] * 2, "label": pa.array([None, None], pa.int64())},
}
_LABELS = {"text": b"x", "huge": b"9" * 5000, "negative": b"-3", "a fraction": b"1.5", "empty": b"", "missing": None}


def strange_files() -> Iterator[Bad]:
    """Yield every file that a command reads, replaced by everything that it is not."""
    yield from _strange_data()
    attack = ("attack",)
    for name in ("manifest.json", "summary.json", "results.parquet", "journal.jsonl"):
        for kind in STRANGE:
            spoil = strange(f"runs/r/{name}", kind)
            # A journal is not needed to show a finished run; a run without results is unfinished, not wrong.
            wrong = name != "journal.jsonl" and (kind != "missing" or name == "manifest.json")
            yield Bad("run folder", f"{name} is {kind}", "report runs/r", spoil, wrong, attack)
            yield Bad("run folder", f"{name} is {kind}", BY_NAME["attack"].line, spoil, wrong, attack)
    for name in ("open_clip_config.json", "open_clip_model.safetensors", "bpe_merges.txt.gz"):
        for kind in STRANGE:
            line, spoil = "evaluate exported --limit 4 --device cpu", partial(_of_folder, name, kind)
            yield Bad("model folder", f"{name} is {kind}", line, spoil, wrong=True, needs=("export",))
    for made_by, name in (
        ("build", "model.json"),
        ("tune-prompts", "model.json"),
        ("tune-prompts", "prompts.safetensors"),
    ):
        for kind in STRANGE:
            line, spoil = "evaluate runs/r --limit 4 --device cpu", strange(f"runs/r/{name}", kind)
            yield Bad("model folder", f"{name} of {made_by} is {kind}", line, spoil, wrong=True, needs=(made_by,))


def _of_folder(name: str, kind: str, place: Path) -> None:
    """Replace a file of an exported model, whose config must not lead to the folder that this one was copied from."""
    config = place / "exported" / "open_clip_config.json"
    content = json.loads(config.read_text())
    content["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"bpe_path": "bpe_merges.txt.gz"}
    config.write_text(json.dumps(content))
    strange_file(place / "exported" / name, kind)


def _strange_data() -> Iterator[Bad]:
    for name, option in (("classes.txt", "classes"), ("templates.txt", "templates"), ("tree.json", "tree")):
        for kind in STRANGE:
            # Any line of text is a template that only lacks its braces, and some nonsense is a list of names.
            wrong = kind in NEVER_RIGHT and (name != "templates.txt" or kind in ("folder", "fifo", "loop", "missing"))
            line = f"{_EVALUATE} {IMAGES} --{option} {name}"
            yield Bad("text file", f"{name} is {kind}", line, strange(name, kind), wrong)
    for name, line in (("photos.parquet", _PARQUET), ("photos.tar", _SHARD)):
        for kind in STRANGE:
            yield Bad("image file", f"{name} is {kind}", line, strange(name, kind), wrong=True)


def contents() -> Iterator[Bad]:
    """Yield files of the right form with the wrong content."""
    for what, text in _LISTS.items():
        line = f"{_EVALUATE} {IMAGES} --classes classes.txt"
        yield Bad("classes", what, line, writing("classes.txt", text), wrong=True)
    for what, text in _TEMPLATES.items():
        line = f"{_EVALUATE} {IMAGES} --templates templates.txt"
        yield Bad("templates", what, line, writing("templates.txt", text), wrong=True)
    for what, text in _TREES.items():
        yield Bad("tree", what, f"{_EVALUATE} {IMAGES} --tree tree.json", writing("tree.json", text), wrong=True)
    cycle = writing("tree.csv", "parent,child\na,b\nb,a\n")
    yield Bad("tree", "in a circle", f"{_EVALUATE} {IMAGES} --tree tree.csv", cycle, wrong=True)
    yield from _images()
    for what, table in _TABLES.items():
        yield Bad("parquet", what, _PARQUET, partial(_table, table), wrong=True)
    for what, label in _LABELS.items():
        yield Bad("shard", f"the labels are {what}", _SHARD, partial(_shard, label), wrong=True)
    yield from _swapped()


def _images() -> Iterator[Bad]:
    data = f"{_EVALUATE} {IMAGES}"
    yield Bad("images", "no image at all", data, _no_images, wrong=True)
    yield Bad("images", "no folder", f"{_EVALUATE} --data imagefolder:nowhere", wrong=True)
    yield Bad("images", "one class", data, _one_class, wrong=True)
    for what, content in _PICTURES.items():
        one, every = writing("photos/apple/0.png", content), partial(_every_image, content)
        yield Bad("images", f"one is {what}", data, one, wrong=True, clue="could not be read")
        yield Bad("images", f"one is {what}", "data imagefolder:photos --check", one, wrong=True, clue="0.png")
        yield Bad("images", f"every one is {what}", data, every, wrong=True)
        yield Bad("images", f"every one is {what}", f"{_ATTACK} {IMAGES}", every, wrong=True)


def _swapped() -> Iterator[Bad]:
    """Files of one run in the folder of another, and settings changed behind a run's back."""
    attack, certify, tuned = (BY_NAME[name].line for name in ("attack", "certify", "tuned"))
    manifest, here = "runs/r/manifest.json", ("attack",)
    changes = {"seed": 7, "eps": [0.5, 0.6], "norm": "L2", "limit": 3, "model": "tiny-robust", "attack": ["fgsm"]}
    for key, value in changes.items():
        spoil = partial(_changed, manifest, ("config", key), value)
        yield Bad("swapped", f"{key} of the manifest changed", attack, spoil, True, here)
    for section in ("model", "data"):
        spoil = partial(_changed, manifest, (section, "fingerprint"), "0" * 32)
        yield Bad("swapped", f"fingerprint of the {section} changed", attack, spoil, True, here)
    both = ("attack", "tuned")
    spoil = partial(_copied, "runs/tuned/manifest.json", manifest)
    yield Bad("swapped", "the manifest of another kind of run", attack, spoil, True, both)
    spoil = partial(_copied, "runs/tuned/last.safetensors", "runs/r/results.parquet")
    yield Bad("swapped", "weights in place of results", "report runs/r", spoil, True, both)
    yield Bad(
        "swapped", "manifest gone, journal left", attack.replace("1/255,2/255", "8/255"), _no_manifest, True, here
    )
    yield Bad("swapped", "other steps under one name", attack.replace("steps=3", "steps=4"), wrong=True, needs=here)
    yield Bad("swapped", "another seed under one name", f"{certify} --seed 5", wrong=True, needs=("certify",))
    yield Bad("swapped", "another method under one name", tuned.replace("tecoa", "fare"), wrong=True, needs=("tuned",))
    yield Bad("swapped", "an audit of attacks", "certify --audit runs/r", wrong=True, needs=here)
    line = "certify tiny --from-cache runs/r --name c"
    yield Bad("swapped", "the cache of a run without", line, wrong=True, needs=("certify",))
    yield Bad("swapped", "a soup of a run of attacks", "soup runs/r tiny", wrong=True, needs=here)


def _no_images(place: Path) -> None:
    shutil.rmtree(place / "photos")
    (place / "photos" / "apple").mkdir(parents=True)


def _one_class(place: Path) -> None:
    for name in NAMES[1:]:
        shutil.rmtree(place / "photos" / name)


def _every_image(content: bytes, place: Path) -> None:
    for path in (place / "photos").rglob("*.png"):
        path.write_bytes(content)


def _table(table: dict[str, Any], place: Path) -> None:
    pq.write_table(pa.table(table), place / "photos.parquet")


def _shard(label: bytes | None, place: Path) -> None:
    image = (place / "photos" / "apple" / "0.png").read_bytes()
    with tarfile.open(place / "photos.tar", "w") as archive:
        for number in range(3):
            for suffix, data in (("png", image), ("cls", label)):
                if data is not None:
                    entry = tarfile.TarInfo(f"{number:04}.{suffix}")
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))


def _changed(path: str, keys: tuple[str, ...], value: Any, place: Path) -> None:
    content = json.loads((place / path).read_text())
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (place / path).write_text(json.dumps(content))


def _copied(source: str, target: str, place: Path) -> None:
    (place / target).write_bytes((place / source).read_bytes())


def _no_manifest(place: Path) -> None:
    for name in ("summary.json", "results.parquet", "report.html", "manifest.json"):
        (place / "runs/r" / name).unlink()
