"""Bad options, files, folders, cards and archives by the hundred, and how the program takes each of them."""

from __future__ import annotations

import inspect
import io
import json
import random
import shlex
import shutil
import tarfile
import typing
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.torture.commands import BY_NAME, Bench
from benchmarks.torture.forking import Ended
from benchmarks.torture.mutate import NEVER_RIGHT, STRANGE, damaged, mistaken_json, strange_file

REFUSED, WORKED, TRACEBACK, HUNG, SILENT, OTHER = "refused", "worked", "traceback", "hung", "silent", "other"
OUTCOMES = (REFUSED, WORKED, TRACEBACK, HUNG, SILENT, OTHER)


@dataclass(frozen=True)
class Bad:
    """One bad input.

    Args:
        kind: what sort of input, for the table.
        what: what is wrong with it.
        line: the command that meets it.
        spoil: makes the input, in the place where the command will run.
        wrong: whether nothing but a refusal is right; otherwise it may also be taken as it is.
        needs: the commands whose results must lie there.
        clue: where exit code 0 is right as long as the output says this.
    """

    kind: str
    what: str
    line: str
    spoil: Callable[[Path], object] = lambda _: None
    wrong: bool = False
    needs: tuple[str, ...] = ()
    clue: str | None = None


@dataclass
class Tally:
    """Outcomes by kind of input, and the faults to be mended."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def add(self, bad: Bad, ended: Ended) -> None:
        """Count one input."""
        outcome = judged(bad, ended)
        self.counts.setdefault(bad.kind, Counter())[outcome] += 1
        if outcome not in (REFUSED, WORKED):
            last = [line for line in (ended.err or ended.out).splitlines() if line.strip()][-1:]
            self.faults.append(f"{outcome}: {bad.kind}: {bad.what[:150]}: `robustvlm {bad.line[:200]}` -> {last}")

    def total(self, outcome: str) -> int:
        """How many inputs had this outcome."""
        return sum(found[outcome] for found in self.counts.values())


def judged(bad: Bad, ended: Ended) -> str:
    """Return the outcome of one bad input."""
    if ended.hung:
        return HUNG
    if ended.traceback:
        return TRACEBACK
    if ended.refused:
        return REFUSED
    if ended.code == 0:
        told = bad.clue is not None and bad.clue in ended.out + ended.err
        return SILENT if bad.wrong and not told else WORKED
    return OTHER


def generate(count: int, draws: random.Random) -> list[Bad]:
    """Return so many bad inputs: a fixed list of every kind first, then seeded ones of all kinds by turns."""
    fixed = [*_planted(), *_strange_files()]
    draws.shuffle(fixed)
    found = fixed[: count * 2 // 3]
    endless = [_options(draws), _cards(draws), _bytes(draws)]
    while len(found) < count:
        found.append(next(endless[len(found) % len(endless)]))
    return found


def torture(bench: Bench, bad: list[Bad], report: Callable[[int, Tally], None] = lambda *_: None) -> Tally:
    """Give every bad input to the program."""
    tally = Tally()
    for number, item in enumerate(bad):
        place = bench.place(f"bad-{number}", item.needs)
        _pictures(place)
        item.spoil(place)
        tally.add(item, bench.run(shlex.split(item.line), place))
        shutil.rmtree(place, ignore_errors=True)
        report(number + 1, tally)
    return tally


# --- the place ---------------------------------------------------------------------------------------------------

_NAMES = ("apple", "dog", "house")


def _pictures(place: Path) -> None:
    """Write a good image folder, Parquet file, shard and lists of names, templates and classes by level."""
    draws = random.Random(1)
    rows = []
    for name in _NAMES:
        folder = place / "photos" / name
        folder.mkdir(parents=True)
        for number in range(2):
            colour = tuple(draws.randrange(256) for _ in range(3))
            Image.new("RGB", (20, 16), colour).save(folder / f"{number}.png")
            rows.append((folder / f"{number}.png", _NAMES.index(name)))
    contents = [path.read_bytes() for path, _ in rows]
    pq.write_table(pa.table({"image": contents, "label": [label for _, label in rows]}), place / "photos.parquet")
    with tarfile.open(place / "photos.tar", "w") as archive:
        for number, (content, (_, label)) in enumerate(zip(contents, rows, strict=True)):
            for suffix, data in (("png", content), ("cls", str(label).encode())):
                entry = tarfile.TarInfo(f"{number:04}.{suffix}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    (place / "classes.txt").write_text("\n".join(_NAMES) + "\n")
    (place / "templates.txt").write_text("a photo of a {}\n")
    (place / "tree.json").write_text(json.dumps({"thing": {"living": ["apple", "dog"], "built": ["house"]}}))


_IMAGES = "--data imagefolder:photos"
_READS = {
    "evaluate": "evaluate tiny --device cpu",
    "data": "data imagefolder:photos --check",
    "attack": "attack tiny --attack fgsm --eps 1/255 --limit 4 --checks none --device cpu --name bad",
}


def _write(name: str, content: str | bytes) -> Callable[[Path], object]:
    def spoil(place: Path) -> None:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(
            content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape")
        )

    return spoil


def _instead(name: str, kind: str) -> Callable[[Path], object]:
    return lambda place: strange_file(place / name, kind)


# --- files that are no such files ----------------------------------------------------------------------------------


def _strange_files() -> Iterator[Bad]:
    """Every file that a command reads, replaced by everything that it is not."""
    reads = {
        "classes.txt": f"{_READS['evaluate']} {_IMAGES} --classes classes.txt",
        "templates.txt": f"{_READS['evaluate']} {_IMAGES} --templates templates.txt",
        "tree.json": f"{_READS['evaluate']} {_IMAGES} --tree tree.json",
        "photos.parquet": f"{_READS['evaluate']} --data parquet:photos.parquet --classes classes.txt",
        "photos.tar": f"{_READS['evaluate']} --data wds:photos.tar --classes classes.txt",
    }
    text = {"classes.txt", "templates.txt", "tree.json"}
    for name, line in reads.items():
        for kind in STRANGE:
            wrong = kind in NEVER_RIGHT if name in text else True
            if name == "templates.txt" and kind in ("brackets", "deep", "list", "surrogates"):
                wrong = False  # a line of text with or without braces
            if name == "classes.txt" and kind in ("brackets", "deep"):
                wrong = True
            yield Bad("file", f"{name} is {kind}", line, _instead(name, kind), wrong)
    results = {
        "manifest.json": ("attack", "runs/r"),
        "summary.json": ("attack", "runs/r"),
        "results.parquet": ("attack", "runs/r"),
        "journal.jsonl": ("attack", "runs/r"),
    }
    for name, (made_by, folder) in results.items():
        for kind in STRANGE:
            spoil = _instead(f"{folder}/{name}", kind)
            may = name == "journal.jsonl"  # not needed to report a finished run
            yield Bad("run folder", f"{name} is {kind}", f"report {folder}", spoil, not may, (made_by,))
            again = BY_NAME[made_by].line
            yield Bad("run folder", f"{name} is {kind}", again, spoil, name == "manifest.json", (made_by,))
    for name in ("open_clip_config.json", "open_clip_model.safetensors", "bpe_merges.txt.gz"):
        for kind in STRANGE:
            line = "evaluate exported --limit 4 --device cpu"
            yield Bad("model folder", f"{name} is {kind}", line, _instead(f"exported/{name}", kind), False, ("export",))
    for made_by, name in (("build", "model.json"), ("tuned", "training.json"), ("tune-prompts", "prompts.json")):
        folder = BY_NAME[made_by].result
        for kind in STRANGE:
            line = f"evaluate {folder} --limit 4 --device cpu"
            yield Bad("card", f"{name} is {kind}", line, _instead(f"{folder}/{name}", kind), True, (made_by,))


# --- inputs that are plainly wrong ---------------------------------------------------------------------------------


def _planted() -> Iterator[Bad]:
    """Inputs that can only be refused: a wrong answer would look right."""
    evaluate, attack = _READS["evaluate"], _READS["attack"]
    lists = {
        "one class": "apple\n",
        "a class twice": "apple\ndog\nhouse\ndog\n",
        "twice but for blanks": "apple\ndog\nhouse\n dog \n",
        "too few": "apple\ndog\n",
        "other names": "red\ngreen\nblue\n",
        "a name of blanks in JSON": '["apple", "dog", " "]',
        "a number in JSON": '["apple", "dog", 3]',
        "an object": '{"apple": 0}',
        "half a list": '["apple", "dog"',
        "a list in a list": '[["apple"], "dog", "house"]',
        "names that differ beyond the context": "\n".join(f"{'very ' * 90}{end}" for end in _NAMES),
        "decomposed twice": "caf\u00e9\ncafe\u0301\nhouse\n",
    }
    for what, text in lists.items():
        yield Bad("classes", what, f"{evaluate} {_IMAGES} --classes classes.txt", _write("classes.txt", text), True)
    for what, text in {
        "no place for the name": "a photo\n",
        "two kinds of braces": "a {} {name}\n",
        "none": "\n",
    }.items():
        yield Bad(
            "templates", what, f"{evaluate} {_IMAGES} --templates templates.txt", _write("templates.txt", text), True
        )
    trees = {
        "no class of it": '{"a": ["x", "y"], "b": ["z"]}',
        "a class missing": '{"a": ["apple"], "b": ["dog"]}',
        "a class twice": '{"a": ["apple", "dog"], "b": ["dog", "house"]}',
        "a number": '{"a": [1, 2], "b": 3}',
        "cycle": "parent,child\na,b\nb,a\n",
    }
    for what, text in trees.items():
        name = "tree.csv" if what == "cycle" else "tree.json"
        yield Bad("tree", what, f"{evaluate} {_IMAGES} --tree {name}", _write(name, text), True)

    def no_images(place: Path) -> None:
        shutil.rmtree(place / "photos")
        (place / "photos" / "apple").mkdir(parents=True)

    yield Bad("images", "no image at all", f"{evaluate} {_IMAGES}", no_images, True)
    yield Bad("images", "no folder", f"{evaluate} --data imagefolder:nowhere", wrong=True)
    yield Bad(
        "images",
        "one class",
        f"{evaluate} {_IMAGES}",
        lambda place: [shutil.rmtree(place / "photos" / n) for n in _NAMES[1:]],
        True,
    )
    for name, content in {
        "text": b"no image", "cut": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", "empty": b"",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>", "bomb": _bomb(),
    }.items():  # fmt: skip
        spoil = _write("photos/apple/0.png", content)
        yield Bad("images", f"a file that is {name}", f"{evaluate} {_IMAGES}", spoil, True, clue="1 ")
        yield Bad("images", f"a file that is {name}", "data imagefolder:photos --check", spoil, True, clue="0.png")
        every = lambda place, content=content: [p.write_bytes(content) for p in (place / "photos").rglob("*.png")]  # noqa: E731
        yield Bad("images", f"every file is {name}", f"{evaluate} {_IMAGES}", every, True)
        yield Bad("images", f"every file is {name}", f"{attack} {_IMAGES}", every, True)
    for what, table in {
        "no image column": {"label": [0, 1]}, "no labels": {"image": [b"x", b"y"]}, "labels out of range": {"image": [b"x"] * 2, "label": [0, 99]},
        "negative labels": {"image": [b"x"] * 2, "label": [-1, -1]}, "labels of fractions": {"image": [b"x"] * 2, "label": [0.5, 1.5]},
        "no rows": {"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())},
        "images of numbers": {"image": [1, 2], "label": [0, 1]}, "null labels": {"image": [b"x"] * 2, "label": pa.array([None, None], pa.int64())},
    }.items():  # fmt: skip
        spoil = partial(_table, table=table)
        yield Bad("parquet", what, f"{evaluate} --data parquet:photos.parquet --classes classes.txt", spoil, True)
    for what, label in {
        "no number": b"x",
        "huge": b"9" * 5000,
        "negative": b"-3",
        "a fraction": b"1.5",
        "empty": b"",
        "none": None,
    }.items():
        yield Bad(
            "shard",
            f"label is {what}",
            f"{evaluate} --data wds:photos.tar --classes classes.txt",
            partial(_shard, label=label),
            True,
        )
    yield from _swapped()


def _bomb() -> bytes:
    """A PNG that says it has 4 thousand million pixels."""
    return b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + (65500).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00" + bytes(40)


def _table(place: Path, table: dict[str, Any]) -> None:
    pq.write_table(pa.table(table), place / "photos.parquet")


def _shard(place: Path, label: bytes | None) -> None:
    image = (place / "photos" / "apple" / "0.png").read_bytes()
    with tarfile.open(place / "photos.tar", "w") as archive:
        for number in range(3):
            for suffix, data in (("png", image), ("cls", label)):
                if data is not None:
                    entry = tarfile.TarInfo(f"{number:04}.{suffix}")
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))


def _swapped() -> Iterator[Bad]:
    """Files of one run in the folder of another, and settings changed behind a run's back."""

    def other_results(place: Path) -> None:
        (place / "runs/r/results.parquet").write_bytes((place / "runs/tuned/last.safetensors").read_bytes()[:100])

    def changed(path: str, *keys: str, by: Any) -> Callable[[Path], None]:
        def spoil(place: Path) -> None:
            content = json.loads((place / path).read_text())
            inner = content
            for key in keys[:-1]:
                inner = inner[key]
            inner[keys[-1]] = by
            (place / path).write_text(json.dumps(content))

        return spoil

    def unfinished(place: Path) -> None:
        for name in ("summary.json", "results.parquet", "report.html"):
            (place / "runs/r" / name).unlink(missing_ok=True)

    attack, certify, tuned = (BY_NAME[name].line for name in ("attack", "certify", "tuned"))
    manifest = "runs/r/manifest.json"
    yield Bad("swapped", "no results in the results", "report runs/r", other_results, True, ("attack", "tuned"))
    for key, by in (
        ("seed", 7),
        ("eps", [0.5, 0.6]),
        ("norm", "L2"),
        ("limit", 3),
        ("model", "tiny-robust"),
        ("attack", ["fgsm"]),
    ):
        yield Bad(
            "swapped",
            f"config.{key} of the manifest changed",
            attack,
            changed(manifest, "config", key, by=by),
            True,
            ("attack",),
        )
    for section in ("model", "data"):
        spoil = changed(manifest, section, "fingerprint", by="0" * 32)
        yield Bad("swapped", f"fingerprint of the {section} changed", attack, spoil, True, ("attack",))
    yield Bad(
        "swapped",
        "manifest of another kind of run",
        attack,
        partial(_copied, "runs/tuned/manifest.json", manifest),
        True,
        ("attack", "tuned"),
    )
    yield Bad(
        "swapped",
        "other settings under one name",
        attack.replace("steps=3", "steps=4"),
        lambda _: None,
        True,
        ("attack",),
    )
    yield Bad("swapped", "other seed under one name", f"{certify} --seed 5", lambda _: None, True, ("certify",))
    yield Bad(
        "swapped", "another method under one name", tuned.replace("tecoa", "fare"), lambda _: None, True, ("tuned",)
    )

    def gone(place: Path) -> None:
        unfinished(place)
        (place / manifest).unlink()

    yield Bad(
        "swapped", "manifest deleted, journal left", attack.replace("1/255,2/255", "8/255"), gone, True, ("attack",)
    )
    yield Bad("swapped", "certify a run of attacks", "certify --audit runs/r", lambda _: None, True, ("attack",))
    yield Bad(
        "swapped",
        "certify from the cache of a run without",
        "certify tiny --from-cache runs/r --name c",
        lambda _: None,
        True,
        ("certify",),
    )
    yield Bad("swapped", "soup of a run with another network", "soup runs/r tiny", lambda _: None, True, ("attack",))
    yield Bad(
        "swapped",
        "weights of 16 numbers",
        "evaluate runs/tuned --limit 4",
        _write("runs/tuned/weights.safetensors", bytes(16)),
        False,
        ("tuned",),
    )


def _copied(source: str, target: str, place: Path) -> None:
    (place / target).write_bytes((place / source).read_bytes())


# --- seeded damage -------------------------------------------------------------------------------------------------


def _options(draws: random.Random) -> Iterator[Bad]:
    """Every option of every command with values of the wrong kind."""
    from robustvlm.cli import main as program

    base = {
        "attack": _READS["attack"], "evaluate": f"{_READS['evaluate']} --limit 4", "data": "data emoji --limit 4",
        "certify": BY_NAME["certify"].line, "detect": BY_NAME["detect"].line, "finetune": BY_NAME["finetune"].line,
        "purify": BY_NAME["purify"].line, "tune_prompts": BY_NAME["tune-prompts"].line, "immunize": BY_NAME["immunize"].line,
        "soup": "soup tiny tiny --name r", "build": "build --encoder tiny --smooth 0.05:4 --name r", "report": "report nothing",
        "export": "export tiny exported",
    }  # fmt: skip
    while True:
        command = draws.choice(sorted(base))
        function = getattr(program, command)
        hints = typing.get_type_hints(function, include_extras=False)
        name = draws.choice([name for name in inspect.signature(function).parameters if name in hints])
        option = _spelled(function, name)
        if option is None:
            continue
        value, wrong = _value(hints[name], name, draws)
        if value is None:
            continue
        line = f"{base[command]} {option}={shlex.quote(value)}"
        yield Bad("option", f"{command} {option} {value[:40]!r}", line, wrong=wrong)


def _spelled(function: Callable[..., object], name: str) -> str | None:
    """Return how the option is written, or None for an argument."""
    parameter = inspect.signature(function, eval_str=True).parameters[name]
    for extra in getattr(parameter.annotation, "__metadata__", ()):
        if type(extra).__name__ == "ArgumentInfo":
            return None
        names = [word for word in getattr(extra, "param_decls", None) or () if word.startswith("--")]
        if names:
            return str(names[0]).partition("/")[0]
    return "--" + name.replace("_", "-")


_TEXTS = (
    "", " ", "x", "-", "a=b=c", "::", ":" * 50, "pgd:steps=1:steps=2", "pgd:steps=-1", "fgsm:x=1", "1e400", "nan", "1/0",
    "../..", "/", "/dev/null", "\x1b[31m", "\udcff", "e\u0301", "x" * 100_000, "imagefolder:", "parquet:/dev/null", "wds:",
    "hf:", "torchvision::", "http://user:pass@127.0.0.1:9/x", "os:system", "sys:exit", "1/255,1/255", "0,0", "cpu:5", "cuda:99",
)  # fmt: skip


def _value(hint: Any, name: str, draws: random.Random) -> tuple[str | None, bool]:
    """Return a bad value for an option, and whether it can only be refused."""
    kinds = {hint, *typing.get_args(hint)} | {
        inner for part in typing.get_args(hint) for inner in typing.get_args(part)
    }
    if bool in kinds:
        return None, False
    if int in kinds or float in kinds:
        sure = [
            "x",
            "",
            "nan",
            "1,5",
            "0x10",
            "1_0"[:0] or "--",
            *(["1.5"] if int in kinds and float not in kinds else []),
        ]
        if name not in ("seed",):
            sure.append("-1" if int in kinds else "-inf")
        loose = ["0", "1e30", "inf", "99999999999999999999", "9" * 400, "1e-300"]
        value = draws.choice(sure + loose)
        return value, value in sure
    value = draws.choice(_TEXTS)
    return value, value == "" and name not in ("smooth", "purify", "immunize")


def _cards(draws: random.Random) -> Iterator[Bad]:
    """One value of a manifest, card, summary or config replaced by another, or left out."""
    cases = [
        ("attack", "manifest.json", "report runs/r"), ("attack", "manifest.json", BY_NAME["attack"].line),
        ("attack", "summary.json", "report runs/r"), ("certify", "manifest.json", "report runs/r"),
        ("certify", "summary.json", "report runs/r"), ("certify", "manifest.json", BY_NAME["certify"].line),
        ("certify", "manifest.json", "certify --audit runs/r --limit 1 --audit-steps 1 --audit-starts 1"),
        ("certify-cache", "manifest.json", "certify tiny --from-cache runs/r --name c"),
        ("tuned", "manifest.json", "report runs/tuned"), ("tuned", "training.json", "evaluate runs/tuned --limit 4"),
        ("tuned", "manifest.json", "evaluate runs/tuned --limit 4"), ("tuned", "manifest.json", BY_NAME["tuned"].line),
        ("export", "open_clip_config.json", "evaluate exported --limit 4"), ("build", "model.json", "evaluate runs/r --limit 4"),
        ("build", "manifest.json", "evaluate runs/r --limit 4"), ("tune-prompts", "prompts.json", "evaluate runs/r --limit 4"),
        ("tune-prompts", "manifest.json", "evaluate runs/r --limit 4"), ("soup", "soup.json", "evaluate runs/r --limit 4"),
        ("purify", "manifest.json", "evaluate runs/r --limit 4"), ("purify", "training.json", "build --purify runs/r --smooth 0.12:2 --name b"),
        ("immunize", "immunity.json", "evaluate runs/r --limit 4"), ("immunize", "manifest.json", "evaluate runs/r --limit 4"),
        ("detect", "manifest.json", "report runs/r"), ("detect", "summary.json", "report runs/r"),
    ]  # fmt: skip
    number = 0
    while True:
        made_by, name, line = cases[number % len(cases)]
        number += 1
        seed = draws.randrange(2**32)
        path = f"{BY_NAME[made_by].result}/{name}"
        yield Bad("card", f"{path} (draw {seed})", line, partial(_mistake, path, seed), False, (made_by,))


def _mistake(path: str, seed: int, place: Path) -> None:
    target = place / path
    if not target.exists():
        return
    text, _ = mistaken_json(target.read_text(), random.Random(seed))
    target.write_text(text)


def _bytes(draws: random.Random) -> Iterator[Bad]:
    """Files cut short, with bits flipped, parts missing or doubled."""
    evaluate = _READS["evaluate"]
    cases = [
        ((), "photos/apple/0.png", f"{evaluate} {_IMAGES}"), ((), "photos.parquet", f"{evaluate} --data parquet:photos.parquet --classes classes.txt"),
        ((), "photos.tar", f"{evaluate} --data wds:photos.tar --classes classes.txt"), ((), "tree.json", f"{evaluate} {_IMAGES} --tree tree.json"),
        ((), "classes.txt", f"{evaluate} {_IMAGES} --classes classes.txt"), (("attack",), "runs/r/journal.jsonl", BY_NAME["attack"].line),
        (("attack",), "runs/r/results.parquet", "report runs/r"), (("attack",), "runs/r/summary.json", "report runs/r"),
        (("certify",), "runs/r/results.parquet", "report runs/r"), (("export",), "exported/open_clip_model.safetensors", "evaluate exported --limit 4"),
        (("export",), "exported/bpe_merges.txt.gz", "evaluate exported --limit 4"), (("tuned",), "runs/tuned/last.safetensors", BY_NAME["tuned"].line),
        (("certify-cache",), "runs/r/features", "certify tiny --from-cache runs/r --name c"),
        (("immunize",), "runs/r/immunity.safetensors", "evaluate runs/r --limit 4"), (("purify",), "runs/r/purifier.safetensors", "build --purify runs/r --smooth 0.12:2 --name b"),
    ]  # fmt: skip
    number = 0
    while True:
        needs, name, line = cases[number % len(cases)]
        number += 1
        seed = draws.randrange(2**32)
        yield Bad("bytes", f"{name} (draw {seed})", line, partial(_damage, name, seed), False, needs)


def _damage(name: str, seed: int, place: Path) -> None:
    draws = random.Random(seed)
    target = place / name
    if target.is_dir():
        inside = sorted(path for path in target.rglob("*") if path.is_file())
        target = draws.choice(inside) if inside else target
    if target.is_file():
        target.write_bytes(damaged(target.read_bytes(), draws))
