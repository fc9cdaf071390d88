"""Endless seeded inputs: options of the wrong kind, cards with one value changed, files with damaged bytes."""

from __future__ import annotations

import inspect
import random
import shlex
import typing
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.torture.bad import IMAGES, READS, Bad
from benchmarks.torture.commands import BY_NAME
from benchmarks.torture.mutate import damaged, mistaken_json

_BASE = {
    "attack": READS["attack"],
    "evaluate": f"{READS['evaluate']} --limit 4",
    "data": "data emoji --limit 4",
    "predict": "predict tiny --data emoji --limit 4",
    "certify": BY_NAME["certify"].line,
    "detect": BY_NAME["detect"].line,
    "finetune": BY_NAME["finetune"].line,
    "purify": BY_NAME["purify"].line,
    "tune_prompts": BY_NAME["tune-prompts"].line,
    "immunize": BY_NAME["immunize"].line,
    "soup": "soup tiny tiny --name r",
    "build": "build --encoder tiny --smooth 0.05:4 --name r",
    "report": "report nothing",
    "export": "export tiny exported",
}
"""By command the line that an option is added to."""

_SPEC = {
    "attack": "attack {} --attack fgsm --eps 1/255 --limit 4 --checks none",
    "evaluate": "evaluate {} --limit 4",
    "certify": "certify {} --samples 64 --limit 3 --lanes 32",
    "detect": "detect {} --limit 8 --fit-limit 16 --draws 100",
    "data": "data {}",
    "soup": "soup {} tiny --name r",
    "report": "report {}",
    "export": "export {} exported",
    "build": "build --encoder {} --name r",
}
"""By command the line that a model, a data set or a run is put into."""

_NO_NUMBERS = ("x", "", "nan", "1,5", "0x10", "--")
_ODD_NUMBERS = ("0", "1e30", "inf", "99999999999999999999", "9" * 400, "1e-300")
_TEXTS = (
    *("", " ", "x", "-", "a=b=c", "::", ":" * 50, "../..", "/", "/dev/null", "\x1b[31m", "\udcff", "e\u0301"),
    *("x" * 100_000, "1e400", "nan", "1/0", "1/255,1/255", "0,0", "cpu:5", "cuda:99", "os:system", "sys:exit"),
    *("pgd:steps=1:steps=2", "pgd:steps=-1", "fgsm:x=1", "imagefolder:", "parquet:/dev/null", "wds:", "hf:"),
    *("torchvision::", "http://user:pass@127.0.0.1:9/x"),
)
_SPECS = (
    *(
        "",
        " ",
        "nowhere",
        ".",
        "..",
        "/",
        "/dev/null",
        "photos",
        "photos.tar",
        "classes.txt",
        "runs",
        "tiny/",
        "tiny/x",
    ),
    *(
        "tiny+",
        "tiny+smooth",
        "tiny+smooth:",
        "tiny+smooth:nan",
        "tiny+smooth:-1",
        "tiny+reject:x",
        "tiny+smooth:0.1:0",
    ),
    *("tiny+tiny", "+smooth:0.1", "ViT-B-32/nowhere", "ViT-B-32/photos.tar", "hf-hub:", "hf-hub:a/b", "nowhere:f"),
    *("os:system", "os:nowhere", "sys:exit", "json:", ":loads", "tiny:tiny", "ti\x1b[31mny", "\udcff", "x" * 5000),
    *("emoji?", "emoji?x=1", "emoji?split=nowhere", "emoji?copies=-1", "imagefolder:", "imagefolder:nowhere"),
    *("parquet:", "parquet:classes.txt", "wds:", "wds:classes.txt", "wds:{0..99999999}.tar", "torchvision:", "hf:"),
    *("torchvision:CIFAR10:nowhere", "http://user:pass@127.0.0.1:9/x.tar", "wds:http://127.0.0.1:9/x.tar"),
)
_MAY_BE_EMPTY = ("smooth", "purify", "immunize")

_EVALUATE = "evaluate runs/r --limit 4"
_FROM_CACHE = "certify tiny --from-cache runs/r --name c"
_BUILD = "build --purify runs/r --smooth 0.12:2 --name b"
_CARDS = (
    ("attack", "manifest.json", "report runs/r"),
    ("attack", "manifest.json", BY_NAME["attack"].line),
    ("attack", "summary.json", "report runs/r"),
    ("certify", "manifest.json", "report runs/r"),
    ("certify", "manifest.json", BY_NAME["certify"].line),
    ("certify", "manifest.json", "certify --audit runs/r --audit-steps 1 --audit-starts 1"),
    ("certify", "summary.json", "report runs/r"),
    ("certify-cache", "manifest.json", _FROM_CACHE),
    ("detect", "manifest.json", "report runs/r"),
    ("detect", "summary.json", "report runs/r"),
    ("tuned", "manifest.json", "report runs/tuned"),
    ("tuned", "manifest.json", BY_NAME["tuned"].line),
    ("tuned", "training.json", "report runs/tuned"),
    ("tuned", "model.json", "evaluate runs/tuned --limit 4"),
    ("export", "open_clip_config.json", "evaluate exported --limit 4"),
    ("build", "model.json", _EVALUATE),
    ("soup", "model.json", _EVALUATE),
    ("soup", "soup.json", "report runs/r"),
    ("tune-prompts", "model.json", _EVALUATE),
    ("purify", "model.json", _EVALUATE),
    ("purify", "model.json", _BUILD),
    ("immunize", "model.json", _EVALUATE),
    ("immunize", "immunity.json", _EVALUATE),
    ("immunize", "manifest.json", "report runs/r"),
)
_FILES = (
    (None, "photos/apple/0.png", f"{READS['evaluate']} {IMAGES}"),
    (None, "photos.parquet", f"{READS['evaluate']} --data parquet:photos.parquet --classes classes.txt"),
    (None, "photos.tar", f"{READS['evaluate']} --data wds:photos.tar --classes classes.txt"),
    (None, "tree.json", f"{READS['evaluate']} {IMAGES} --tree tree.json"),
    (None, "classes.txt", f"{READS['evaluate']} {IMAGES} --classes classes.txt"),
    ("attack", "journal.jsonl", BY_NAME["attack"].line),
    ("attack", "results.parquet", "report runs/r"),
    ("attack", "summary.json", "report runs/r"),
    ("certify", "results.parquet", "report runs/r"),
    ("certify-cache", "features", _FROM_CACHE),
    ("export", "open_clip_model.safetensors", "evaluate exported --limit 4"),
    ("export", "bpe_merges.txt.gz", "evaluate exported --limit 4"),
    ("tuned", "last.safetensors", BY_NAME["tuned"].line),
    ("immunize", "immunity.safetensors", _EVALUATE),
    ("purify", "purifier.safetensors", _BUILD),
)


def options(draws: random.Random) -> Iterator[Bad]:
    """Yield options of every command with values of the wrong kind."""
    from robustvlm.cli.main import app

    functions = {str(info.name).replace("-", "_"): info.callback for info in app.registered_commands}
    while True:
        if draws.random() < 0.2:
            command, value = draws.choice(sorted(_SPEC)), draws.choice(_SPECS)
            yield Bad("spec", f"{command} {value[:40]!r}", _SPEC[command].format(shlex.quote(value)), wrong=True)
            continue
        command = draws.choice(sorted(_BASE))
        function = functions[command]
        assert function is not None
        hints = typing.get_type_hints(function)
        name = draws.choice([name for name in inspect.signature(function).parameters if name != "no_code"])
        option, found = _spelled(function, name), _value(hints[name], name, draws)
        if option is not None and found is not None:
            line = f"{_BASE[command]} {option}={shlex.quote(found[0])}"
            yield Bad("option", f"{command} {option} {found[0][:40]!r}", line, wrong=found[1])


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


def _value(hint: Any, name: str, draws: random.Random) -> tuple[str, bool] | None:
    """Return a bad value for an option, and whether it can only be refused; None for a switch."""
    parts = {hint, *typing.get_args(hint)}
    parts |= {inner for part in parts for inner in typing.get_args(part)}
    if bool in parts:
        return None
    if int in parts or float in parts:
        sure = [
            *_NO_NUMBERS,
            *(["1.5"] if float not in parts else []),
            *(["-1"] if int in parts and name != "seed" else []),
        ]
        value = draws.choice([*sure, *_ODD_NUMBERS])
        return value, value in sure
    value = draws.choice(_TEXTS)
    return value, value == "" and name not in _MAY_BE_EMPTY


def cards(draws: random.Random) -> Iterator[Bad]:
    """Yield manifests, cards, summaries and configs with one value replaced by another, or left out."""
    number = draws.randrange(len(_CARDS))
    while True:
        made_by, name, line = _CARDS[number % len(_CARDS)]
        number += 1
        path, seed = f"{BY_NAME[made_by].result}/{name}", draws.randrange(2**32)
        yield Bad("card", f"{path} of {made_by}, draw {seed}", line, partial(_mistake, path, seed), needs=(made_by,))


def _mistake(path: str, seed: int, place: Path) -> None:
    text, _ = mistaken_json((place / path).read_text(), random.Random(seed))
    (place / path).write_text(text)


def damage(draws: random.Random) -> Iterator[Bad]:
    """Yield files cut short, with bits flipped, parts missing or doubled."""
    number = draws.randrange(len(_FILES))
    while True:
        made_by, name, line = _FILES[number % len(_FILES)]
        number += 1
        path, seed = (f"{BY_NAME[made_by].result}/{name}" if made_by else name), draws.randrange(2**32)
        needs = (made_by,) if made_by else ()
        yield Bad("bytes", f"{path}, draw {seed}", line, partial(_damage, path, seed), needs=needs)


def _damage(path: str, seed: int, place: Path) -> None:
    draws, target = random.Random(seed), place / path
    if target.is_dir():
        target = draws.choice(sorted(inside for inside in target.rglob("*") if inside.is_file()))
    target.write_bytes(damaged(target.read_bytes(), draws))
