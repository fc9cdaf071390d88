"""Makes the runs in `before/` with an earlier version: finished ones of every command, and some that were killed.

    git worktree add ../old COMMIT
    OMP_NUM_THREADS=1 PYTHONPATH=../old python tests/pins/make_before.py tests/pins/before

Everything runs on a model of a few thousand weights and on pictures of 16 pixels, which are made first. What a run can
make again is left out: reports, and the checkpoints of training that has ended.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import runpy
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

COLOURS = {"red": (180, 70, 70), "green": (70, 180, 70), "blue": (70, 70, 180)}
UNKNOWN = {"yellow": (180, 180, 70), "grey": (120, 120, 120)}
_TRAIN, _TEST = ["--data", "parquet:train.parquet"], ["--data", "parquet:test.parquet"]
_SHORT = ["--limit", "24", "--batch-size", "4", "--val-limit", "6", "--checkpoint-every", "2"]

_ATTACK = ["attack", "model", *_TEST, "--attack", "pgd:steps=12,apgd-ce:steps=6", "--eps", "40/255,48/255"]
_ATTACK += ["--limit", "8", "--lanes", "2", "--checks", "quick"]
_CERTIFY = ["certify", "model", *_TEST, "--claim", "class", "--sigma", "0.1", "--samples", "1000"]
_CERTIFY += ["--limit", "6", "--lanes", "50", "--cache", "float16", "--at", "0.05,0.1"]
_DETECT = ["detect", "model", "--id", "parquet:test.parquet", "--ood", "far=parquet:far.parquet"]
_DETECT += ["--fit", "parquet:train.parquet", "--scores", "mcm,energy,mahalanobis,knn", "--draws", "100"]
_DETECT += ["--limit", "8", "--under-attack", "--attack-scores", "mcm,energy", "--attack", "pgd:steps=12"]
_DETECT += ["--attack-limit", "4", "--lanes", "2", "--eps", "40/255"]
_FINETUNE = ["finetune", "model", "--method", "tecoa", *_TRAIN, "--trainable", "lora:1", "--steps", "8", *_SHORT]
_FINETUNE += ["--inner-steps", "1", "--val-steps", "2", "--lr", "0.01", "--validate-every", "4"]
_PURIFY = ["purify", "model", *_TRAIN, "--only", "mapper", "--mapper-steps", "2", "--sigma", "0.1", *_SHORT]
_IMMUNIZE = ["immunize", "model", *_TRAIN, "--held-out", "parquet:test.parquet", "--antibodies", "near.txt"]
_IMMUNIZE += ["--steps", "4", "--hidden", "4", "--min-images", "2", "--ood", "parquet:far.parquet"]
_IMMUNIZE += ["--rule", "s-dis", "--tail", "0.5", "--push-nearest", "0"]  # what there was no choice of then
_PROMPTS = ["tune-prompts", "model", *_TRAIN, "--shots", "2", "--epochs", "2", "--val", "parquet:test.parquet"]
_PROMPTS += ["--ood", "parquet:far.parquet"]

RUNS: dict[str, list[str]] = {
    "attack": _ATTACK,
    "certify": _CERTIFY,
    "recertify": ["certify", "--from-cache", "certify", "--classes", "names.txt"],
    "detect": _DETECT,
    "finetune": _FINETUNE,
    "soup": ["soup", "finetune", "model", "--val", "parquet:test.parquet", "--val-steps", "2", "--limit", "6"],
    "purify": _PURIFY,
    "immunize": _IMMUNIZE,
    "tune-prompts": _PROMPTS,
    "build": ["build", "--encoder", "finetune", "--smooth", "0.1:8"],
}
"""Name and command of every finished run, in the order in which they are made: some stand on others."""

STOPPED: dict[str, tuple[list[str], str, int]] = {
    "attack": (_ATTACK, "journal.jsonl", 16),
    "certify": (_CERTIFY, "journal.jsonl", 4),
    "detect": (_DETECT, "journal.jsonl", 4),
    "finetune": (_FINETUNE, "last.safetensors", 0),
}
"""The runs that were killed as soon as a file of theirs had so many lines; in the folder NAME-stopped."""


def given(name: str, command: list[str]) -> list[str]:
    """Return what is given to the program for a run in the folder `name` of the current folder."""
    return [*command, "--device", "cpu", "--out", ".", "--name", name]


def call(arguments: list[str]) -> int:
    """Run the program in this process and return its exit code."""
    before, sys.argv = sys.argv, ["robustvlm", *arguments]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        runpy.run_module("robustvlm", run_name="__main__")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        sys.argv = before
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0


def main(target: Path) -> None:
    """Make inputs and runs in a folder of their own, then take them to `target`."""
    place = Path(tempfile.mkdtemp(prefix="before"))
    _inputs(place)
    os.chdir(place)
    for name, command in RUNS.items():
        assert call(given(name, command)) == 0, name
    for name, (command, file, lines) in STOPPED.items():
        _killed(place, f"{name}-stopped", command, file, lines)
    for run in (*RUNS, *(f"{name}-stopped" for name in STOPPED)):
        (place / run / "report.html").unlink(missing_ok=True)
        if not run.endswith("-stopped"):
            shutil.rmtree(place / run / "training", ignore_errors=True)
        _without_place(place / run, place)
    shutil.rmtree(target, ignore_errors=True)
    shutil.move(place, target)
    target.chmod(0o755)


def _inputs(place: Path) -> None:
    import numpy as np

    draws: Any = np.random.default_rng(0)
    for name, colours, each, known in (("train", COLOURS, 12, 1), ("test", COLOURS, 4, 1), ("far", UNKNOWN, 4, 0)):
        rows = [
            (_picture(colour, draws), n if known else -1)
            for n, colour in enumerate(colours.values())
            for _ in range(each)
        ]
        _write(place / f"{name}.parquet", rows)
    (place / "names.txt").write_text("yellow\nred\npurple\nblue\n")
    (place / "near.txt").write_text("red: orange\nred: pink\ngreen: lime\ngreen: olive\nblue: cyan\nblue: violet\n")
    _model(place / "model", place / "train.parquet")


def _picture(colour: tuple[int, int, int], draws: Any) -> bytes:
    import numpy as np
    from PIL import Image

    pixels = np.array(colour) + draws.integers(-40, 41, (4, 4, 3)).repeat(4, 0).repeat(4, 1)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "PNG", optimize=True)
    return file.getvalue()


def _write(path: Path, rows: list[tuple[bytes, int]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = {"classes": json.dumps(list(COLOURS))}
    columns = {"image": pa.array([row[0] for row in rows], pa.binary()), "label": pa.array([row[1] for row in rows])}
    pq.write_table(pa.table(columns).replace_schema_metadata(names), path)


def _model(folder: Path, pictures: Path) -> None:
    """Write a vision transformer that was taught to tell the colours."""
    import numpy as np
    import open_clip
    import pyarrow.parquet as pq
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    import robustvlm

    merges = Path(robustvlm.__file__).parent / "assets" / "tiny" / "bpe_4096.txt.gz"
    lines = gzip.decompress(merges.read_bytes()).decode().split("\n")[:65]
    words = 2 * 256 + len(lines) - 1 + 2
    folder.mkdir()
    (folder / f"bpe_{words}.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))
    vision = {"image_size": 16, "patch_size": 8, "layers": 1, "width": 16, "head_width": 8}
    text = {"context_length": 16, "vocab_size": words, "width": 16, "heads": 2, "layers": 1}
    scaling = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "resize_mode": "shortest"}
    config = {"model_cfg": {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": scaling}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}", bpe_path=str(next(folder.glob("bpe_*"))))
    table = pq.read_table(pictures).to_pydict()
    images = np.stack([np.asarray(Image.open(io.BytesIO(image))) for image in table["image"]])
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    tokens, labels = tokenizer([f"a photo of a {name}." for name in COLOURS]), torch.tensor(table["label"])
    steps = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        cosines = model.encode_image(pixels, normalize=True) @ model.encode_text(tokens, normalize=True).T
        steps.zero_grad()
        torch.nn.functional.cross_entropy(10 * cosines, labels).backward()
        steps.step()
    state = {name: value.detach().half().contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")


def _killed(place: Path, name: str, command: list[str], file: str, lines: int) -> None:
    """Run a command and kill it when a file is there and has so many lines; more may have come until it dies."""
    process, path = os.fork(), place / name / file
    if not process:
        os._exit(call(given(name, command)))
    while not (path.exists() and path.read_bytes().count(b"\n") >= lines):
        assert os.waitpid(process, os.WNOHANG) == (0, 0), f"{name} came to its end before it was killed"
        time.sleep(0.0005)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    assert not (place / name / "checksums.json").exists(), f"{name} had come to its end"


def _without_place(run: Path, place: Path) -> None:
    """Take out of a run's files where it was made; the digests of changed files are taken anew."""
    sums = run / "checksums.json"
    known = json.loads(sums.read_text()) if sums.exists() else {"files": {}}
    for path in run.rglob("*.json"):
        text = path.read_text()
        if str(place) not in text or path == sums:
            continue
        path.write_text(text.replace(f"{place}/", ""))
        name = path.relative_to(run).as_posix()
        if name in known["files"]:
            known["files"][name] = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
            sums.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
