"""Train the CIFAR-10 CLIP, clean or adversarially.

python -m benchmarks.cifar10.train --train TRAIN.parquet --test TEST.parquet --out runs/cifar10
python -m benchmarks.cifar10.train ... --out runs/cifar10_robust --robust --start runs/cifar10
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from robustvlm.errors import UserError

from .attack import pgd
from .data import Images, augment, pad, read_images
from .evaluate import accuracy, measure
from .model import CifarCLIP, ModelConfig, load, save
from .prompts import class_embeddings, random_prompts

LOG_EVERY = 50


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run; `eps` 0 trains clean, above 0 on PGD examples (TeCoA)."""

    epochs: float = 18
    batch: int = 256
    lr: float = 5e-3
    weight_decay: float = 0.1
    smoothing: float = 0.1
    warmup: float = 0.2
    ema: float = 0.99
    eps: float = 0.0
    attack_steps: int = 2
    bf16: bool = True
    seed: int = 0


def train(model: CifarCLIP, images: Images, test: Images, recipe: Recipe, *, out: Path | None = None) -> CifarCLIP:
    """Fit `model` in place and return it holding the averaged weights, frozen and in eval mode.

    Clean training fits both towers to randomly worded prompts; with `eps` only the image tower moves, towards
    the text embeddings as they are, on adversarial images of those (Mao et al. 2023, TeCoA, equations 1-3).
    """
    model.train().requires_grad_(True)
    if recipe.eps:
        model.text.requires_grad_(False)
        model.log_scale.requires_grad_(False)
    recipe = replace(recipe, batch=min(recipe.batch, len(images.labels)))
    per_epoch = len(images.labels) // recipe.batch
    total = max(10, round(recipe.epochs * per_epoch))  # the schedule needs a warm-up of two steps
    optimizer = torch.optim.AdamW(_groups(model, recipe.weight_decay), lr=recipe.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.lr, total_steps=total, pct_start=recipe.warmup, cycle_momentum=False
    )
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    started = time.perf_counter()
    for step, (pixels, labels) in enumerate(_batches(images, recipe, total), start=1):
        loss = _loss(model, pixels, labels, images.class_names, recipe, rng=random.Random(recipe.seed + step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        _update(average, model, recipe.ema)
        if step % LOG_EVERY == 0 or step == total:
            rate = step * recipe.batch / (time.perf_counter() - started)
            print(f"step {step}/{total}  loss {loss.item():.3f}  {rate:.0f} images/s", flush=True)
        if out is not None and step % per_epoch == 0:
            _checkpoint(model, average, test, out, epoch=step // per_epoch)
    model.load_state_dict(average)
    return model.eval().requires_grad_(False)


def _groups(model: CifarCLIP, weight_decay: float) -> list[dict[str, object]]:
    """Decay matrices and kernels; leave norms, biases and the temperature alone."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _batches(images: Images, recipe: Recipe, total: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(recipe.seed)
    padded, n = pad(images.pixels), len(images.labels)
    whole = n - n % recipe.batch
    rows: tuple[Tensor, ...] = ()
    for step in range(total):
        position = step % (whole // recipe.batch)
        if position == 0:
            rows = torch.randperm(n, generator=generator)[:whole].split(recipe.batch)
        yield augment(padded, rows[position], generator), images.labels[rows[position]]


def _loss(
    model: CifarCLIP, pixels: Tensor, labels: Tensor, class_names: tuple[str, ...], recipe: Recipe, rng: random.Random
) -> Tensor:
    if recipe.eps:
        with torch.no_grad():
            targets = class_embeddings(model, class_names)
    else:
        targets = nn.functional.normalize(model.encode_text(random_prompts(class_names, rng)), dim=-1)
    with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
        if recipe.eps:
            # 1.25 eps for one step (FGSM-RS, Wong et al. 2020), less for more steps.
            alpha = 2.5 * recipe.eps / (recipe.attack_steps + 1)
            pixels = pgd(model, pixels, labels, targets, eps=recipe.eps, alpha=alpha, steps=recipe.attack_steps)
        logits = model.logits(pixels, targets)
    return nn.functional.cross_entropy(logits, labels, label_smoothing=recipe.smoothing)


@torch.no_grad()
def _update(average: dict[str, Tensor], model: CifarCLIP, decay: float) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            average[name].lerp_(tensor, 1 - decay)
        else:
            average[name].copy_(tensor)


def _checkpoint(model: CifarCLIP, average: dict[str, Tensor], test: Images, out: Path, *, epoch: int) -> None:
    """Write the averaged weights and print their accuracy on 1,000 test images (watched, never selected on)."""
    shadow = CifarCLIP(model.config)
    shadow.load_state_dict(average)
    shadow.eval().requires_grad_(False)
    save(shadow, out)
    watched = Images(test.pixels[:1000], test.labels[:1000], test.class_names)
    print(f"epoch {epoch}  clean accuracy {accuracy(shadow, watched):.3f}  scale {shadow.logit_scale:.1f}", flush=True)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cifar10.train", description="Train the CIFAR-10 CLIP, clean or adversarially."
    )
    parser.add_argument("--train", type=Path, required=True, help="training Parquet file (Hugging Face image format)")
    parser.add_argument("--test", type=Path, required=True, help="test Parquet file")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10"), help="folder for weights and metrics")
    parser.add_argument("--robust", action="store_true", help="fine-tune adversarially from --start")
    parser.add_argument("--start", type=Path, help="run folder to start from (needed with --robust)")
    parser.add_argument("--eps", type=float, default=4, help="training radius of --robust, in 255ths (default 4)")
    parser.add_argument("--attack-steps", type=int, default=2, help="PGD steps of --robust (1: FGSM-RS; default 2)")
    parser.add_argument("--epochs", type=float, help="default: 18 clean, 3.5 robust")
    parser.add_argument("--lr", type=float, help="peak learning rate (default: 5e-3 clean, 2e-3 robust)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--fp32", action="store_true", help="no bfloat16 (for CPUs without avx512_bf16 or AMX)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> None:
    """Read the data, train, measure and write the run folder."""
    if options.robust and options.start is None:
        raise UserError("--robust fine-tunes a trained model: pass its folder, for example --start runs/cifar10")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    started = time.perf_counter()
    images = read_images(options.train, cache=options.out)
    test = read_images(options.test, cache=options.out)
    recipe = Recipe(
        epochs=options.epochs or (3.5 if options.robust else 18),
        lr=options.lr or (2e-3 if options.robust else 5e-3),
        eps=options.eps / 255 if options.robust else 0.0,
        attack_steps=options.attack_steps,
        bf16=not options.fp32,
        seed=options.seed,
    )
    model = load(options.start) if options.start else CifarCLIP(ModelConfig())
    model = train(model.to(memory_format=torch.channels_last), images, test, recipe, out=options.out)
    save(model, options.out)
    metrics = {"train_seconds": round(time.perf_counter() - started), "threads": options.threads, **asdict(recipe)}
    metrics |= measure(model, test)
    (options.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics, indent=2))


def main(argv: list[str] | None = None) -> int:
    """Command line; user errors end in one line and exit code 2."""
    try:
        run(_arguments(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
