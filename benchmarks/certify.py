"""The certify engine measured: its rate against the bare encoder, bf16, prompts from the cache, and audits.

    python -m benchmarks.certify rate MODEL --data DATA
    python -m benchmarks.certify bf16 MODEL --data DATA --limit 20
    python -m benchmarks.certify cache MODEL --data DATA --limit 20 --classes other.txt
    python -m benchmarks.certify audit MODEL --data DATA --limit 50 --sigma 0.12,0.25,0.5 --out runs

`audit` certifies and attacks every certificate; it goes on where it was stopped. The radii of all certificates are
compared by benchmarks.certify_radii. Times are CPU seconds of one thread (wall seconds on a GPU).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import exit_code_of, markdown
from robustvlm.certify import FeatureRadius, FeatureTest, Job, SamplingEngine
from robustvlm.commands.certify import CERTIFY, CertifySettings
from robustvlm.commands.certify import certify as certified
from robustvlm.commands.certify.audit import audit_folder
from robustvlm.commands.certify.audit_search import Effort
from robustvlm.commands.certify.encoder import NoisyEncoder
from robustvlm.commands.certify.view import write_certify_report
from robustvlm.core.framing import to_pixels
from robustvlm.data import open_data
from robustvlm.data.source import Sample
from robustvlm.defenses import load_pipeline
from robustvlm.runs.run import Run


def main() -> None:
    """Run one of the measurements and print its table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rate", "bf16", "cache", "audit"))
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--data", default="emoji")
    parser.add_argument("--classes", type=Path, help="other class names, for cache")
    parser.add_argument("--candidates", type=Path, help="names that the classes are drawn from, for cache")
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--sigma", default="0.25")
    parser.add_argument("--lanes", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--starts", type=int, default=6)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--choice", type=int, default=64)
    parser.add_argument("--evidence", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    options = parser.parse_args()
    {"rate": rate, "bf16": bf16, "cache": cache, "audit": audit}[options.what](options)


def _images(options: argparse.Namespace, count: int) -> Tensor:
    vlm = load_pipeline(options.model)
    samples = [item for item in open_data(options.data).samples(limit=count) if isinstance(item, Sample)]
    return torch.stack([to_pixels(item.image, vlm.framing) for item in samples])


def rate(options: argparse.Namespace) -> None:
    """Compare noisy images per second through the engine with bare forward passes of full batches, in turns."""
    vlm = load_pipeline(options.model, device=options.device)
    encoder = NoisyEncoder(vlm)
    images, sigma = _images(options, 16), float(options.sigma.split(",")[0])
    batch = (
        images[torch.arange(options.lanes) % len(images)] + sigma * torch.randn(options.lanes, *images.shape[1:])
    ).to(vlm.device)
    jobs = [Job(str(i), i, image) for i, image in enumerate(images)]
    common: Any = {"cos0": 0.5, "sigma": sigma, "alpha": 0.001}

    def bare() -> int:
        for _ in range(8):
            encoder(batch)
        return 8 * len(batch)

    def fixed() -> int:
        return _engine(encoder, options, jobs[:4], lambda _: FeatureRadius(**common, n=512, n_pilot=200))

    def early() -> int:
        return _engine(encoder, options, jobs, lambda _: FeatureTest(**common, n=64, radius=0.25 * sigma))

    rates: dict[str, list[float]] = {"bare encoder": [], "engine, fixed n": [], "engine, early stopping": []}
    bare()
    for _ in range(options.rounds):
        for name, run in zip(rates, (bare, fixed, early), strict=True):
            rates[name].append(_rate(run, vlm.device.type))
    best = {name: float(np.median(values)) for name, values in rates.items()}
    rows = [(name, f"{value:,.0f}", f"{value / best['bare encoder']:.3f}") for name, value in best.items()]
    print(f"{options.model}, batches of {options.lanes}, median of {options.rounds} rounds in turns\n")
    print(markdown(("", "noisy images/s", "of the bare rate"), rows))


def _engine(encoder: NoisyEncoder, options: argparse.Namespace, jobs: list[Job], make: Callable[[Job], object]) -> int:
    engine = SamplingEngine(encoder, seed=0, lanes=options.lanes, device=options.device)
    for _ in engine.run(jobs, make):  # type: ignore[arg-type]
        pass
    return engine.passes


def _rate(run: Callable[[], int], device: str) -> float:
    clock = time.process_time if device == "cpu" else time.perf_counter
    began = clock()
    passes = run()
    if device == "cuda":
        torch.cuda.synchronize()
    return passes / (clock() - began)


def bf16(options: argparse.Namespace) -> None:
    """Certify the same images with the encoder in float32 and in bfloat16: two encoders, two fingerprints."""
    rows = []
    for precision in ("fp32", "bf16"):
        began = time.process_time()
        sigma = float(options.sigma.split(",")[0])
        summary = certified(
            options.model, data=options.data, limit=options.limit, samples=options.samples, sigma=sigma,
            precision=precision, device=options.device, out=options.out, name=f"benchmark-{precision}", fresh=True,
        ).summary  # fmt: skip
        spent = time.process_time() - began
        encoder = NoisyEncoder(load_pipeline(options.model), precision=precision)
        rows.append(
            (precision, encoder.fingerprint[-12:], f"{summary.mean_radius:.4f}",
             f"{summary.cost.forward_passes / spent:,.0f}")
        )  # fmt: skip
    print(markdown(("encoder", "fingerprint ends in", "mean radius", "passes per CPU second"), rows))


def cache(options: argparse.Namespace) -> None:
    """Certify classes while keeping the noisy features, then another prompt set from what was kept."""
    sigma = float(options.sigma.split(",")[0])
    common = {"claim": "class", "device": options.device, "out": options.out}
    sampled = CertifySettings(
        model=options.model, data=options.data, limit=options.limit, samples=options.samples, sigma=sigma,
        cache="float16", name="benchmark-cache", **common,
    )  # fmt: skip
    rows = []
    first = 0.0
    for name, prompts in (("first, by sampling", None), ("adaptive, from cache", "adaptive"),
                          ("candidates, from cache", "candidates"),
                          ("independent, from cache", "independent")):  # fmt: skip
        if prompts == "candidates" and options.candidates is None:
            continue
        began = time.process_time()
        settings = sampled
        if prompts is not None:
            source = str(options.out / "benchmark-cache")
            settings = CertifySettings(
                classes=options.classes,
                from_cache=source,
                name=f"benchmark-{prompts}",
                prompts=None if prompts == "candidates" else prompts,
                candidates=options.candidates if prompts == "candidates" else None,
                **common,
            )
        run = Run(CERTIFY, settings)
        loaded = time.process_time()
        summary = run.start(fresh=True).summary
        done = time.process_time()
        first = first or done - loaded
        share = f"{100 * (done - loaded) / first:.2f}%"
        seconds = (f"{loaded - began:.1f}", f"{done - loaded:.2f}", share)
        rows.append((name, summary.cost.forward_passes, *seconds, f"{summary.mean_radius:.4f}"))
    header = ("certificates", "image passes", "CPU s to load", "CPU s to certify", "of the first", "mean radius")
    print(markdown(header, rows))


def audit(options: argparse.Namespace) -> None:
    """Certify features at every sigma, attack every certificate, and print the lowest cosines beside the bounds."""
    effort = Effort(
        starts=options.starts, steps=options.steps, draws=options.draws, choice=options.choice,
        evidence=options.evidence, fractions=(0.5, 1.0),
    )  # fmt: skip
    rows = []
    for sigma in map(float, options.sigma.split(",")):
        folder = certified(
            options.model, data=options.data, limit=options.limit, samples=options.samples, sigma=sigma,
            device=options.device, out=options.out, name=f"audit-{sigma}",
        ).folder  # fmt: skip
        if not (folder / "audit.json").exists():
            audit_folder(folder, effort, device=options.device)
            write_certify_report(folder)
        rows += _audit_rows(json.loads((folder / "audit.json").read_text(encoding="utf-8")), sigma)
    header = (
        "sigma",
        "of the radius",
        "images",
        "bound, median",
        "lowest, min",
        "lowest, median",
        "room, min",
        "broken",
    )
    print(markdown(header, rows))


def _audit_rows(content: dict[str, object], sigma: float) -> list[tuple[object, ...]]:
    findings: list[dict[str, float]] = content["findings"]  # type: ignore[assignment]
    rows = []
    for fraction in sorted({f["fraction"] for f in findings}):
        some = [f for f in findings if f["fraction"] == fraction]
        lowest, bound = np.array([f["lowest"] for f in some]), np.array([f["bound"] for f in some])
        broken = sum(f["upper"] < f["bound"] for f in some)
        numbers = (np.median(bound), lowest.min(), np.median(lowest), (lowest - bound).min())
        rows.append((sigma, fraction, len(some), *(f"{x:.3f}" for x in numbers), broken))
    return rows


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
