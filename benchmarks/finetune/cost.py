"""What a training step of each method costs: CPU seconds and memory, steps of all methods in turns."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from robustvlm.defenses.finetune import FinetuneSettings, FinetuneTask, InnerAttack, finetune_task
from robustvlm.models import load_model
from robustvlm.training import Draws, TrainingImages

from .rows import CALIBRATION, Plan
from .sets import BenchmarkSet
from .variants import Variant

_RESET = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def costs(
    benchmark: BenchmarkSet, variants: Mapping[str, Variant], data: TrainingImages, plan: Plan, rounds: int
) -> dict[str, dict[str, float]]:
    """Return per variant the median CPU seconds of a step and the most memory (MB) it took beyond what was held.

    CPU seconds, as a shared machine's clock says little. Memory is read from /proc: 0 where there is none.
    """
    tasks = {name: _task(benchmark, variant, data, plan) for name, variant in variants.items() if variant.method}
    batch = next(iter(data.batches([range(benchmark.batch)])))
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    memory = dict.fromkeys(tasks, 0.0)
    for number in range(rounds + 1):
        for name, task in tasks.items():
            before = _settled()
            began = time.process_time()
            _step(task, batch.pixels, batch.labels, Draws(0, number, batch.ids))
            spent = time.process_time() - began
            if number:  # the first round warms up
                seconds[name].append(spent)
                memory[name] = max(memory[name], _peak() - before)
    return {name: {"seconds": statistics.median(seconds[name]), "megabytes": memory[name]} for name in tasks}


def _task(benchmark: BenchmarkSet, variant: Variant, data: TrainingImages, plan: Plan) -> FinetuneTask:
    assert variant.method is not None
    forest = benchmark.forest if variant.forest else type(benchmark.forest)((benchmark.forest[0],))
    attack = InnerAttack(threat=plan.threat, steps=plan.inner_steps)
    return finetune_task(
        load_model(benchmark.model),
        FinetuneSettings(method=variant.method, attack=attack, options=variant.options),
        class_names=benchmark.train.class_names,
        templates=benchmark.train.templates,
        calibration=next(iter(data.batches([range(CALIBRATION)]))).pixels,
        forest=forest,
    )


def _step(task: FinetuneTask, pixels: torch.Tensor, labels: torch.Tensor, draws: Draws) -> None:
    """Loss and gradient; the optimiser's part is the same for all."""
    task.train_mode()
    with torch.autocast("cpu", torch.bfloat16):
        loss = task.losses(pixels, labels, 0, draws)["loss"]
    loss.backward()
    task.module.zero_grad(set_to_none=True)


def _settled() -> float:
    """Give freed memory back to the system, begin a new peak, and return the megabytes held."""
    gc.collect()
    if not _RESET.exists():
        return 0.0
    ctypes.CDLL(None).malloc_trim(0)
    _RESET.write_text("5")
    return _peak()


def _peak() -> float:
    if not _STATUS.exists():
        return 0.0
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024
