"""What the benchmarks share: images and classifier of a spec, pass counting for other programs, tables."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustvlm.attacks import Job, Misclassify, Oracle
from robustvlm.core.framing import to_pixels
from robustvlm.data import open_data
from robustvlm.data.source import Sample
from robustvlm.defenses import load_pipeline
from robustvlm.errors import UserError
from robustvlm.models import load_model, zero_shot


def exit_code_of(run: Callable[[], None]) -> int:
    """Run the work of a benchmark's command line and return its exit code; a user error ends in one line."""
    try:
        run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def certifying(doc: str | None, *, limit: int, samples: int, sigma: str | float | None) -> argparse.ArgumentParser:
    """Return the options that every benchmark of certificates has: model, data, images, copies and, if any, noise."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--data", default="emoji")
    parser.add_argument("--limit", type=int, default=limit, help="images")
    parser.add_argument("--samples", type=int, default=samples, help="noisy copies of each")
    if sigma is not None:
        parser.add_argument("--sigma", type=type(sigma), default=sigma)
    return parser


MADE_WITH = "made with"
"""Name of what a kept result says of the model, the data and the settings behind it."""


def require_made_with(path: Path, told: Mapping[str, Any] | None, of: Mapping[str, Any]) -> None:
    """Refuse what a file holds unless it was made with the model, data and settings `of` now asked for.

    Raises:
        UserError: it was made with others, or does not say.
    """
    if told is None:
        raise UserError(f"'{path}' does not say what it was made with: delete it, or name another file")
    differ = [
        f"{name} {told.get(name)!r} (asked for: {value!r})" for name, value in of.items() if told.get(name) != value
    ]
    if differ:
        raise UserError(f"'{path}' was made with {', '.join(differ)}: pass that, or name another file")


def kept_features(path: Path | None, of: Mapping[str, Any], draw: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Return arrays from a file of an earlier call, or draw them, and keep them there if one is named.

    Raises:
        UserError: the file was made with another model, other data or other settings than `of`.
    """
    if path is not None and path.exists():
        kept = dict(np.load(path))
        told = kept.pop(MADE_WITH, None)
        require_made_with(path, None if told is None else json.loads(str(told)), of)
        return kept
    found = dict(draw())
    if path is not None:
        made: dict[str, Any] = {MADE_WITH: np.array(json.dumps(of))}
        np.savez(path, **found, **made)
    return found


def copies_made_with(options: argparse.Namespace) -> dict[str, Any]:
    """Return what noisy copies of images are made with, beside how many images there are."""
    model, data = load_pipeline(options.model), open_data(options.data)
    told = {"model": model.fingerprint, "data": data.fingerprint()}
    return {**told, "samples": options.samples, "sigma": options.sigma}


@dataclass(frozen=True)
class Subject:
    """A classifier and the images that it classifies right when clean, all in memory."""

    classifier: nn.Module
    jobs: list[Job]
    seen: int

    @property
    def pixels(self) -> Tensor:
        return torch.stack([job.pixels for job in self.jobs])

    @property
    def labels(self) -> Tensor:
        return torch.tensor([job.label for job in self.jobs])


def load_subject(model: str, data: str, limit: int | None, *, device: str = "cpu", n_targets: int = 9) -> Subject:
    """Load model and images of two specs and keep the images that are right when clean."""
    source = open_data(data)
    vlm = load_model(model, device=device)
    classifier = zero_shot(vlm, source.class_names, source.templates)
    oracle = Oracle(classifier, device=device)
    jobs: list[Job] = []
    seen = 0
    for batch in _batches(source.samples(limit=limit)):
        x = torch.stack([to_pixels(s.image, vlm.framing) for s in batch])
        for sample, image, logits in zip(batch, x, oracle.confirm(x).cpu(), strict=True):
            seen += 1
            if int(logits.argmax()) == sample.label:
                targets = tuple(Misclassify().targets(logits, sample.label, n_targets))
                jobs.append(Job(sample.id, len(jobs), image, sample.label, targets))
    return Subject(classifier, jobs, seen)


def _batches(samples: Iterator[object], size: int = 64) -> Iterator[list[Sample]]:
    batch: list[Sample] = []
    for item in samples:
        if isinstance(item, Sample):
            batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


class Counted(nn.Module):
    """A model that counts the rows which pass through it forward and backward, whoever calls it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.forward_rows = 0
        self.backward_rows = 0
        # torchattacks restores the mode that it found; found in training mode, batch normalisation would then classify
        # the adversarial images by their batch and learn from them.
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        self.forward_rows += len(x)
        logits: Tensor = self.model(x)
        if logits.requires_grad:
            logits.register_hook(self._count_backward)
        return logits

    def _count_backward(self, grad: Tensor) -> None:
        # AutoAttack differentiates rows that cannot matter too: they cost the same.
        self.backward_rows += len(grad)

    @property
    def passes(self) -> int:
        return self.forward_rows + self.backward_rows


@dataclass
class Clock:
    """Wall time of a block."""

    seconds: float = field(default=0.0)


@contextmanager
def clock() -> Iterator[Clock]:
    """Measure the wall time of the block."""
    measured, began = Clock(), time.perf_counter()
    yield measured
    measured.seconds = time.perf_counter() - began


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [list(map(str, header)), ["---"] * len(header), *[list(map(str, row)) for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
