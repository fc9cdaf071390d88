"""Every command and the functions on tensors, on the CPU and on a simulated GPU; run by test_simulated_gpu.py.

    python everything.py FOLDER [quick]

FOLDER holds the inputs; the runs of a device stand in a folder of its name, and report.json says how they ended. Quick:
an attack and a certificate only.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import pkgutil
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import budget
import make_before
import simulated
import torch

import robustvlm as rv
from robustvlm.certify import engine, noise
from robustvlm.commands.attack import work as attack_work
from robustvlm.commands.certify import work as certify_work

_DATA = ["--data", "parquet:test.parquet", "--limit", "6"]
_ATTACK = ["--data", "parquet:test.parquet", "--lanes", "4"]
_PLAIN = [*_ATTACK, "--checks", "none", "--limit", "6", "--eps", "40/255"]
_ALL = "pgd:steps=4,apgd-ce:steps=6,apgd-t:steps=4:targets=2,fab-t:steps=4:targets=2,fmn:steps=4,square:queries=12"

COMMANDS: dict[str, list[str]] = {
    **{name: command for name, command in make_before.RUNS.items() if name not in ("certify", "recertify")},
    "attack-linf": ["attack", "model", *_PLAIN, "--attack", _ALL],
    "attack-l2": [
        "attack",
        "model",
        *_ATTACK,
        "--checks",
        "none",
        "--limit",
        "6",
        "--norm",
        "L2",
        "--eps",
        "1.5",
        "--attack",
        _ALL,
    ],
    "attack-checks": ["attack", "model", *_ATTACK, "--attack", "pgd:steps=3", "--checks", "quick", "--limit", "4"],
    "attack-feature": ["attack", "model", *_PLAIN, "--attack", "pgd:steps=4", "--goal", "feature"],
    "attack-smooth": [
        "attack",
        "model+smooth:0.1:4",
        *_ATTACK,
        "--checks",
        "none",
        "--limit",
        "3",
        "--attack",
        "pgd:steps=2",
    ],
    "attack-refusal": ["attack", "immunize", *_PLAIN, "--attack", "pgd:steps=3", "--goal", "deny"],
    "attack-tiny": ["attack", "tiny", "--attack", "apgd-t:steps=2:targets=2", "--limit", "4", "--checks", "none"],
    "certify": make_before.RUNS["certify"],
    "recertify": make_before.RUNS["recertify"],
    "certify-feature": ["certify", "model", *_DATA, "--claim", "feature", "--sigma", "0.1", "--samples", "600"],
    "certify-radius": ["certify", "model", *_DATA, "--claim", "class", "--sigma", "0.1", "--radius", "0.05"],
    "certify-purified": ["certify", "purify", *_DATA, "--claim", "feature", "--sigma", "0.1", "--samples", "400"],
}
"""Name and command of every run, in the order in which they are made: some stand on others."""

QUICK: dict[str, list[str]] = {
    "attack": ["attack", "model", *_PLAIN, "--attack", "pgd:steps=3,apgd-ce:steps=3"],
    "certify": ["certify", "model", *_DATA, "--claim", "feature", "--sigma", "0.1", "--samples", "300"],
}
"""What is run where there is little time."""

_ASKED = {
    "evaluate": ["evaluate", "model", "--json", "--data", "parquet:test.parquet"],
    "evaluate-smooth": ["evaluate", "model+smooth:0.1:4", "--json", "--data", "parquet:test.parquet", "--limit", "4"],
    "evaluate-immune": ["evaluate", "immunize", "--json", "--data", "parquet:test.parquet"],
    "predict": ["predict", "model", "--data", "parquet:test.parquet", "--to", "predict.json"],
}
"""Commands that keep no run: their answer is what they print."""


def main(folder: Path, *, quick: bool) -> None:
    """Run everything on the CPU, then on the GPU, and write down how it went."""
    os.chdir(folder)
    everything = _quickly if quick else _everything
    if quick:
        attack_work.write_report = certify_work.write_report = lambda _: None  # type: ignore[assignment]
    else:
        _import_all()
    _one_noise()
    report = {"cpu": everything("cpu")}
    simulated.pretend()
    report["cuda:0"] = everything("cuda:0")
    report["waits"] = {"certify": budget.certify_waits()}
    if quick:
        few = ("pgd:steps=6", "apgd-ce:steps=8")
        report["waits"]["fp32"] = budget.attack_waits(precision="fp32", attacks=few, radii=budget.RADII[:1])
    else:
        report["waits"]["fp32"] = budget.attack_waits(precision="fp32")
        report["waits"]["bf16"] = budget.attack_waits(precision="bf16", attacks=("pgd:steps=4", "apgd-ce:steps=4"))
    (folder / "report.json").write_text(json.dumps(report))


def _import_all() -> None:
    """Import what looks at torch while it is imported, before torch is changed."""
    for name in ("open_clip", "torch.distributed.tensor"):
        importlib.import_module(name)
    for module in pkgutil.walk_packages(rv.__path__, "robustvlm."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def _one_noise() -> None:
    """A GPU draws the noise of certificates itself, other numbers than the CPU; here both have the CPU's."""

    def chunk(stream: int, number: int, shape: Any, device: Any = "cpu", *, kind: Any = "normal") -> torch.Tensor:
        return noise.noise_chunk(stream, number, shape, kind=kind).to(device, non_blocking=True)

    engine.noise_chunk = chunk


def _everything(device: str) -> dict[str, Any]:
    with _place(device):
        ended = {name: make_before.call([*command, *_end(name, device)]) for name, command in COMMANDS.items()}
        said = {name: _said([*command, "--device", device]) for name, command in _ASKED.items()}
        return {"ended": ended, "said": said, "library": _library(device)}


def _quickly(device: str) -> dict[str, Any]:
    with _place(device):
        return {"ended": {name: make_before.call([*command, *_end(name, device)]) for name, command in QUICK.items()}}


@contextlib.contextmanager
def _place(device: str) -> Iterator[None]:
    """Work in a folder of the device's own, with the inputs in it."""
    place = Path(device)
    place.mkdir()
    for path in Path().iterdir():
        if path.name not in ("cpu", "cuda:0"):
            (place / path.name).symlink_to(path.resolve())
    os.chdir(place)
    try:
        yield
    finally:
        os.chdir("..")


def _end(name: str, device: str) -> list[str]:
    return ["--device", device, "--out", ".", "--name", name]


def _said(arguments: list[str]) -> list[Any]:
    """Return exit code and printed answer of a command."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = make_before.call(arguments)
    file = Path("predict.json")
    return [code, json.loads(file.read_text() if "--to" in arguments else out.getvalue()) if not code else None]


def _library(device: str) -> dict[str, Any]:
    """Return what the functions on tensors say, or the trace of what they failed with."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 4)).to(device)
    images, labels = torch.rand(6, 3, 8, 8).to(device), torch.tensor([0, 1, 2, 3, 0, 1]).to(device)
    found: dict[str, Any] = {}
    try:
        for attack in ("pgd", "apgd-t", "fab-t", "square"):
            budget = "queries" if attack == "square" else "steps"
            done = rv.perturb(net, images, labels, attack=f"{attack}:{budget}=5", eps=0.1)
            assert done.images.device == images.device
            found[attack] = done.images.cpu().flatten().tolist()
        smoothed = rv.Smoothed(net, sigma=0.1)
        found["predict"] = smoothed.predict(images, n=100).cpu().tolist()
        votes = rv.certify_tensors(smoothed, images, n=200)
        found["classes"], found["radius"] = votes.classes.cpu().tolist(), votes.radius.cpu().tolist()
    except Exception:
        found["failed"] = traceback.format_exc()
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), quick="quick" in sys.argv[2:])
