"""What a GPU makes of the program, in one go: correctness against the CPU in float64, rates, noise and memory.

    python -m benchmarks.gpu                    on a GPU, under 6 minutes on one of the H100 class
    python -m benchmarks.gpu --tiny             the bundled model on the CPU, in seconds: whether it runs

Prints one table as Markdown and the same as a line of JSON (`--out FILE` writes it too). Nothing is downloaded: the
large encoders have random weights, which cost what trained ones cost. Rates count rows of full batches through the
engines and through the bare encoder; a batch has as many rows as the free memory allows, at most 256. What does not fit
into `--seconds` is left out and named.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import exit_code_of, markdown
from robustvlm import certify
from robustvlm.attacks import APGD, Job, LaneAttack, LaneEngine, Oracle, ThreatModel, parse_attacks
from robustvlm.attacks.objectives import objective
from robustvlm.certify.noise import CHUNK, noise_chunk
from robustvlm.core.ranks import resolve_device
from robustvlm.core.seeds import full_precision_kernels
from robustvlm.core.size import sides
from robustvlm.models import load_model

PATHS = ("fp32", "bf16", "compile")
_ATTACKS = "pgd:steps=10,apgd-ce:steps=10,apgd-t:steps=8:targets=3,fab-t:steps=8:targets=3,square:queries=40"
_CLASSES = 100
_MOST_LANES = 256
# So much of the free memory may be filled; fragments and the engine's own tensors take some of the rest.
_FILLED = 0.7
_WORDS = ("what", "model", "path", "value", "of the bare encoder")


@dataclass(frozen=True)
class Figure:
    """One line of the table: a number and, for rates of the engines, its share of the bare encoder's."""

    what: str
    model: str
    path: str
    value: float | str
    share: float | None = None


class Classifier(nn.Module):
    """An image encoder against random class directions: pixels [B, 3, S, S] in [0, 1] to logits [B, K]."""

    def __init__(self, encoder: nn.Module, size: int, dim: int) -> None:
        super().__init__()
        self.encoder, self.size = encoder, size
        texts = torch.randn(_CLASSES, dim, generator=torch.Generator().manual_seed(0))
        self.register_buffer("texts", F.normalize(texts, dim=1))
        self.eval().requires_grad_(False)

    def features(self, pixels: Tensor) -> Tensor:
        """Return unit features [B, D]."""
        return F.normalize(self.encoder(pixels), dim=1)

    def forward(self, pixels: Tensor) -> Tensor:
        return 50 * self.features(pixels) @ self.get_buffer("texts").T


def main() -> None:
    """Measure, and print the table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--models", default="ViT-B-32,ViT-L-14", help="architectures of open_clip")
    parser.add_argument("--paths", default=",".join(PATHS))
    parser.add_argument("--seconds", type=float, default=330, help="begin nothing new after this")
    parser.add_argument("--each", type=float, default=3.0, help="seconds of one measurement")
    parser.add_argument("--tiny", action="store_true", help="the bundled model on the CPU, without torch.compile")
    parser.add_argument("--out", type=Path, help="file for the JSON")
    options = parser.parse_args()
    if options.tiny:
        options.device, options.models, options.paths, options.each = "cpu", "tiny", "fp32,bf16", 0.2
    figures = list(measured(options))
    print(markdown(_WORDS, [_row(figure) for figure in figures]))
    told = json.dumps({"machine": _machine(options.device), "figures": [asdict(figure) for figure in figures]})
    print(told)
    if options.out is not None:
        options.out.write_text(told + "\n")


def _row(figure: Figure) -> list[str]:
    value = figure.value if isinstance(figure.value, str) else f"{figure.value:,.4g}"
    share = "" if figure.share is None else f"{figure.share:.3f}"
    return [figure.what, figure.model, figure.path, value, share]


def _machine(device: str) -> dict[str, str]:
    place = resolve_device(device)
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else place.type
    return {"device": name, "torch": torch.__version__, "cuda": str(torch.version.cuda)}


def measured(options: argparse.Namespace) -> Iterator[Figure]:
    """Yield every figure; what there is no time for, or what fails, as a word in place of a number."""
    ends, place = time.monotonic() + options.seconds, resolve_device(options.device)
    paths = [path for path in PATHS if path in options.paths.split(",")]
    tiny = classifier("tiny")
    steps: list[tuple[str, str, str, Callable[[], Iterator[Figure]]]] = [
        ("correctness", "tiny", path, partial(errors, tiny, place, path)) for path in paths
    ]
    steps += [("same outcomes as float64", "tiny", "fp32", lambda: outcomes(tiny, place, 4 if options.tiny else 16))]
    steps += [("noise", "", "fp32", lambda: noise(place, options.each))]
    made: dict[str, Classifier] = {}

    def kept(name: str) -> Classifier:
        if name not in made:  # one at a time in the memory of the GPU
            made.clear()
            made[name] = classifier(name).to(place)
        return made[name]

    def timed(name: str, path: str) -> Iterator[Figure]:
        return rates(kept(name), name, place, path, options.each)

    for name in options.models.split(","):
        for path in paths:
            steps.append(("rates", name, path, partial(timed, name, path)))
    for what, name, path, step in steps:
        if time.monotonic() > ends:
            yield Figure(what, name, path, "left out: no time")
            continue
        try:
            yield from step()
        except Exception as error:  # one path that fails on a machine must not hide what the others say
            yield Figure(what, name, path, f"failed: {type(error).__name__}: {str(error).splitlines()[0][:120]}")


def classifier(name: str) -> Classifier:
    """Return the bundled encoder, or one of open_clip with random weights."""
    torch.manual_seed(0)
    if name == "tiny":
        vlm = load_model("tiny")
        encoder, size = vlm, sides(vlm.image_size)[0]
    else:
        import open_clip

        encoder = open_clip.create_model(name, pretrained=None).visual
        height = encoder.image_size[0] if isinstance(encoder.image_size, tuple) else encoder.image_size
        size = int(height)
    with torch.no_grad():
        dim = encoder(torch.rand(1, 3, size, size)).shape[1]
    return Classifier(encoder, size, dim)


def _oracle(model: nn.Module, place: torch.device, path: str) -> Oracle:
    return Oracle(model, device=place, precision="bf16" if path == "bf16" else "fp32", compiled=path == "compile")


def _jobs(model: Classifier, count: int, place: torch.device) -> list[Job]:
    """Return images labelled with the model's own answers, and their likeliest other classes."""
    x = torch.rand(count, 3, model.size, model.size, generator=torch.Generator().manual_seed(1))
    oracle = Oracle(model, device=place)
    order = torch.cat([oracle.confirm(part) for part in x.split(32)]).argsort(1, descending=True).tolist()
    return [Job(str(i), i, x[i], row[0], tuple(row[1:10])) for i, row in enumerate(order)]


def errors(model: Classifier, place: torch.device, path: str) -> Iterator[Figure]:
    """Compare outputs and input gradients with those of the CPU in float64."""
    x = torch.rand(8, 3, model.size, model.size, generator=torch.Generator().manual_seed(2))
    label = torch.arange(8) % _CLASSES
    exact = Oracle(model, precision="fp64").gradient(x.double(), objective("ce"), label, label)
    there = label.to(place)
    found = _oracle(model, place, path).gradient(x.to(place), objective("ce"), there, there)
    for what, ours, theirs in zip(("logits", "losses", "gradients"), found, exact, strict=True):
        error = float((ours.cpu().double() - theirs).norm() / theirs.norm())
        yield Figure(f"relative error of {what}", "tiny", path, error)


def outcomes(model: Classifier, place: torch.device, count: int) -> Iterator[Figure]:
    """Attack the same images here in float32 and on the CPU in float64; count equal outcomes."""
    jobs, threat = _jobs(model, count, torch.device("cpu")), ThreatModel("Linf", 2 / 255)
    for attack in parse_attacks(_ATTACKS):
        assert isinstance(attack, LaneAttack)
        found = []
        for oracle in (Oracle(model, device=place), Oracle(model, precision="fp64")):
            results = LaneEngine(oracle, attack, threat, lanes=count, seed=0).run(jobs)
            found.append({result.job.index: result.outcome for result in results})
        same = sum(found[0][job.index] == found[1][job.index] for job in jobs)
        yield Figure("same outcomes as float64", "tiny", attack.name, f"{same} of {len(jobs)}")


def noise(place: torch.device, each: float) -> Iterator[Figure]:
    """Measure how many noise images of 224 pixels are made in a second, and their mean and deviation."""
    shape, number = (3, 224, 224), iter(range(10**9))
    chunk = noise_chunk(0, next(number), shape, place)
    yield Figure("noise: deviation from 1", "", "fp32", float(chunk.std()) - 1)
    rate = _rate(lambda: noise_chunk(0, next(number), shape, place), CHUNK, place, each)
    yield Figure("noise images/s, 224 pixels", "", "fp32", rate)


def rates(model: Classifier, name: str, place: torch.device, path: str, each: float) -> Iterator[Figure]:
    """Measure rows per second of the bare encoder and of the engines, and the peak of memory."""
    oracle = _oracle(model, place, path)
    lanes = lanes_that_fit(oracle, model.size, place)
    yield Figure("lanes", name, path, lanes)
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place)
    jobs = _jobs(model, lanes, place)
    x, label = torch.stack([job.pixels for job in jobs]).to(place), torch.tensor([job.label for job in jobs])
    label = label.to(place)
    with full_precision_kernels():
        net: Any = torch.compile(model) if path == "compile" else model
        bare = _rate(lambda: _backward(net, x, label, path), lanes, place, each)
        forward = _rate(lambda: _forward(model, x, path), lanes, place, each)
    yield Figure("rows/s forward and backward, bare", name, path, bare)
    # A ball this small fools nobody, so every lane stays occupied to the end.
    steps = max(3, min(200, int(each * bare / lanes)))
    engine = LaneEngine(oracle, APGD(n_iter=steps), ThreatModel("Linf", 1e-7), lanes=lanes, seed=0)
    attacked = lanes * (steps + 1) / _seconds(lambda: list(engine.run(jobs)), place)
    yield Figure("rows/s, attack engine", name, path, attacked, attacked / bare)
    yield Figure("rows/s forward, bare", name, path, forward)
    passes = max(4, min(400, int(each * forward / lanes)))
    sampling = certify.SamplingEngine(lambda noisy: _forward(model, noisy, path), seed=0, lanes=lanes, device=place)
    common: Any = {"cos0": 0.5, "sigma": 0.25, "alpha": 0.001}
    few = [certify.Job(job.image_id, job.index, job.pixels) for job in jobs[:4]]

    def sampled() -> list[Any]:
        claim = lambda _: certify.FeatureRadius(**common, n=100 + passes * lanes // len(few), n_pilot=50)  # noqa: E731
        return list(sampling.run(few, claim))

    seconds = _seconds(sampled, place)
    yield Figure(
        "rows/s, certification engine", name, path, sampling.passes / seconds, sampling.passes / seconds / forward
    )
    if place.type == "cuda":
        yield Figure("peak memory, GiB", name, path, torch.cuda.max_memory_allocated(place) / 2**30)


def lanes_that_fit(oracle: Oracle, size: int, place: torch.device) -> int:
    """Return the largest power of two of rows whose gradients fit into the free memory, from what a few rows take."""
    if place.type != "cuda":
        return 8
    few, label = 8, torch.zeros(8, dtype=torch.int64, device=place)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(place)
    torch.cuda.reset_peak_memory_stats(place)
    oracle.gradient(torch.rand(few, 3, size, size, device=place), objective("ce"), label, label)
    a_row = max(1.0, (torch.cuda.max_memory_allocated(place) - before) / few)
    free, _ = torch.cuda.mem_get_info(place)
    lanes = 1
    while lanes < _MOST_LANES and 2 * lanes * a_row <= _FILLED * free:
        lanes *= 2
    return lanes


def _backward(net: nn.Module, x: Tensor, label: Tensor, path: str) -> Tensor:
    pixels = x.detach().requires_grad_(True)
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=path == "bf16"):
        logits = net(pixels)
    return torch.autograd.grad(F.cross_entropy(logits.float(), label, reduction="sum"), pixels)[0]


@torch.no_grad()
def _forward(model: Classifier, x: Tensor, path: str) -> Tensor:
    with full_precision_kernels(), torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=path == "bf16"):
        return model.features(x).float()


def _seconds(run: Callable[[], object], place: torch.device) -> float:
    _done(place)
    began = time.perf_counter()
    run()
    _done(place)
    return time.perf_counter() - began


def _rate(run: Callable[[], object], rows: int, place: torch.device, each: float) -> float:
    """Return rows per second over about `each` seconds, once it is warm."""
    run()
    times = max(2, min(1000, int(each / max(_seconds(run, place), 1e-6))))
    return rows * times / _seconds(lambda: [run() for _ in range(times)], place)


def _done(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize(place)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
