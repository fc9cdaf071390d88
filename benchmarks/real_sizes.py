"""Models of the size that people use, with random weights: what every command costs beside the encoder itself.

python -m benchmarks.real_sizes --models ViT-B-32,ViT-L-14 --out sizes.json

Weights, images and class names are made on the spot; nothing is downloaded (a text tower whose tokenizer would be gets
CLIP's). Every command runs in a process of its own, "load" with an empty cache, the others with what it has kept. Rows
through the towers, hashed bytes and peak memory are held against limits; the exit code is 1 above one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

import robustvlm as rv
import robustvlm.commands.attack.work
import robustvlm.commands.certify.work
import robustvlm.commands.finetune.work  # all that is imported here is no part of what a command takes
from benchmarks.common import exit_code_of, markdown
from robustvlm.core import object_graph
from robustvlm.core.framing import to_pixels
from robustvlm.core.size import sides
from robustvlm.models.clip import ClipVLM

TEMPLATES = ("a photo of a {}.",)
IMAGES = 2
LIMITS = {
    # text rows beside the classes that were never embedded before, image rows, weights hashed, memory over the weights
    "load": (0, 0, 2.0, 2.4),
    "attack": (8, 60, 2.0, 2.6),
    "certify": (8, 120, 2.0, 2.6),
    "finetune": (10, 80, 2.0, 4.5),
}
"""What a command may cost: the counts of today and a little more, so that what is done twice shows."""
_ROOM = 400.0
"""MiB beside the weights: images, activations, results."""
HEAD = ("model", "command", "text rows", "image rows", "weights hashed", "peak MiB", "of weights", "s", "outside")


class Cost(NamedTuple):
    """What a command cost, forward rows alone.

    `hashed` and `of_weights` are over the size of the weights; `peak` are MiB beyond those of the libraries; `outside`
    is the share of the wall time that was not spent in the towers, on their way forward and back.
    """

    model: str
    command: str
    texts: int
    images: int
    hashed: float
    peak: float
    of_weights: float
    seconds: float
    outside: float

    @property
    def row(self) -> list[str]:
        """The cells of the table."""
        counts = (f"{self.texts:,}", f"{self.images:,}", f"{self.hashed:.2f}", f"{self.peak:,.0f}")
        return [
            self.model,
            self.command,
            *counts,
            f"{self.of_weights:.2f}",
            f"{self.seconds:.0f}",
            f"{self.outside:.0%}",
        ]

    def above(self, new_texts: int) -> list[str]:
        """Return which limits are broken."""
        texts, images, hashed, memory = LIMITS[self.command]
        weights = self.peak / self.of_weights
        most = {
            "text rows": (self.texts, texts + new_texts),
            "image rows": (self.images, images),
            "weights hashed": (self.hashed, hashed),
            "peak MiB": (self.peak, memory * weights + _ROOM),
        }
        return [
            f"{self.model} {self.command}: {what} {value:,.2f}, at most {limit:,.2f}"
            for what, (value, limit) in most.items()
            if value > limit
        ]


def main() -> None:
    """Measure, print the table, write the JSON; exit code 1 when a count is above its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="ViT-B-32", help="architectures of open_clip, or files with a model_cfg")
    parser.add_argument("--commands", default=",".join(LIMITS))
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--out", type=Path, help="file for the JSON")
    options = parser.parse_args()
    costs, above = [], []
    for model in options.models.split(","):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            _child("weights", folder, model, options.classes)
            commands = options.commands.split(",")
            for number, command in enumerate(commands):
                cost = Cost(Path(model).stem, command, **_child(command, folder, model, options.classes))
                costs.append(cost)
                above += cost.above((options.classes + 1) * len(TEMPLATES) if number == 0 else 0)
                print("|", " | ".join(cost.row), "|", file=sys.stderr, flush=True)
                if number == 0 and len(commands) > 1:
                    _child("images", folder, model, options.classes)
    print(markdown(HEAD, [cost.row for cost in costs]))
    if options.out is not None:
        options.out.write_text(json.dumps([cost._asdict() for cost in costs], indent=1) + "\n")
    if above:
        sys.exit("\n".join(above))


def _child(command: str, folder: Path, model: str, classes: int) -> dict[str, Any]:
    """Do something in a process of its own, which has the libraries already; return what it took."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    process = context.Process(target=_one, args=(theirs, command, folder, model, classes))
    process.start()
    theirs.close()
    try:
        found: dict[str, Any] = ours.recv()
    except EOFError:
        found = {}
    process.join()
    if process.exitcode:
        raise SystemExit(f"{model}: {command} failed with status {process.exitcode}")
    return found


# In a process of its own: one command, and what it took


def _one(sender: Connection, command: str, folder: Path, model: str, classes: int) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    things = ("apple", "dog", "tram", "lamp")
    names = sorted(f"{things[number % 4]} {number:04d}" for number in range(classes))  # in the order of their folders
    if command == "weights":
        write_weights(model, folder / "model")
    elif command == "images":
        write_images(folder, names)
    else:
        sender.send(_measured(command, folder, names))


def _measured(command: str, folder: Path, names: list[str]) -> dict[str, float]:
    counted, before, began = Counted(), _peak(), time.monotonic()
    work(command, folder, names)
    seconds, peak = time.monotonic() - began, _peak() - before
    weights = (folder / "model" / "open_clip_model.safetensors").stat().st_size
    return {
        "texts": counted.texts,
        "images": counted.images,
        "hashed": round(counted.hashed / weights, 3),
        "peak": round(peak, 1),
        "of_weights": round(peak / (weights / 2**20), 3),
        "seconds": round(seconds, 2),
        "outside": round(1 - counted.seconds / seconds, 3),
    }


def _peak() -> float:
    """Return the largest resident memory of this process in MiB; where it is not told, that of its parent may count."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1024


class Counted:
    """Counts rows through both towers, bytes that are hashed, and seconds in the towers, forward and backward."""

    def __init__(self) -> None:
        self.texts = self.images = self.hashed = 0
        self.seconds = 0.0
        self._inside = False
        self._time(ClipVLM, "_text_features", lambda _, texts: self._add("texts", len(texts)))
        self._time(ClipVLM, "_image_features", lambda _, pixels: self._add("images", len(pixels)))
        self._time(torch.autograd, "grad", lambda *_: None)
        self._time(torch.Tensor, "backward", lambda *_: None)
        plain = object_graph._raw

        def raw(tensor: torch.Tensor) -> memoryview:
            self._add("hashed", tensor.numel() * tensor.element_size())
            return plain(tensor)

        object_graph._raw = raw

    def _add(self, what: str, count: int) -> None:
        setattr(self, what, getattr(self, what) + count)

    def _time(self, owner: Any, name: str, count: Callable[..., None]) -> None:
        plain = getattr(owner, name)

        def timed(*given: Any, **options: Any) -> Any:
            count(*given)
            if self._inside:
                return plain(*given, **options)
            self._inside, began = True, time.monotonic()
            try:
                return plain(*given, **options)
            finally:
                self._inside = False
                self.seconds += time.monotonic() - began

        setattr(owner, name, timed)


# What is measured, and on what


def write_weights(model: str, folder: Path) -> None:
    """Write a model folder of open_clip with random weights."""
    config = json.loads(Path(model).read_text()) if model.endswith(".json") else open_clip.get_model_config(model)
    if config is None:
        raise SystemExit(f"open_clip knows no '{model}'")
    if config["text_cfg"].pop("hf_tokenizer_name", None):
        config["text_cfg"] = {**config["text_cfg"], "tokenizer_kwargs": {}, "vocab_size": 49408}
    if config["vision_cfg"].get("timm_model_name"):
        config["vision_cfg"]["timm_model_pretrained"] = False
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    network = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file(network.state_dict(), folder / "open_clip_model.safetensors", metadata={"format": "pt"})


def write_images(folder: Path, names: list[str]) -> None:
    """Write images into the folders of the classes that the model takes them for; into all others a grey one."""
    classifier = rv.load_classifier(str(folder / "model"), names, TEMPLATES)
    draws = np.random.default_rng(0)
    for name in names:
        (folder / "images" / name).mkdir(parents=True)
    for number in range(3 * IMAGES):
        small = draws.integers(0, 256, (7, 7, 3), dtype=np.uint8)
        height, width = sides(classifier.image_size)
        image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        with torch.no_grad():
            label = int(classifier(to_pixels(image, classifier.framing)[None]).argmax())
        image.save(folder / "images" / names[label] / f"{number}.png")
    for name in names:
        if not any((folder / "images" / name).iterdir()):
            Image.new("RGB", (8, 8), "grey").save(folder / "images" / name / "grey.png")


def work(command: str, folder: Path, names: list[str]) -> None:
    """Do what is measured: load a model with its classes, or run a command on few images in few steps."""
    spec = str(folder / "model")
    shared: dict[str, Any] = {"data": f"imagefolder:{folder / 'images'}", "out": folder / "runs", "device": "cpu"}
    if command == "load":
        _ = rv.load_classifier(spec, names, TEMPLATES).fingerprint
    elif command == "attack":
        rv.attack(spec, **shared, limit=IMAGES, attack="pgd", steps=3, eps="1/255", lanes=4, checks="none")
    elif command == "certify":
        rv.certify(spec, **shared, limit=IMAGES, claim="feature", sigma=0.1, samples=16, lanes=8)
    else:
        short: dict[str, Any] = {"steps": 2, "batch_size": 2, "inner_steps": 1, "val_limit": 2, "val_steps": 1}
        rv.finetune(spec, **shared, **short, limit=40, method="tecoa", validate_every=0)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
