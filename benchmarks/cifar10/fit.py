"""The training loop, clean or adversarial."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .attack import pgd
from .data import Images, batches
from .evaluate import accuracy
from .model import CifarCLIP, save
from .prompts import class_embeddings, random_prompts

LOG_EVERY = 50  # steps


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
    attack_steps: int = 1
    bf16: bool = True
    seed: int = 0


def fit(model: CifarCLIP, images: Images, test: Images, recipe: Recipe, *, out: Path | None = None) -> CifarCLIP:
    """Fit `model` in place and return it holding the averaged weights, frozen and in eval mode.

    Clean training fits both towers to randomly worded prompts; with `eps` only the image tower moves, towards
    the text embeddings as they are, on adversarial images of those (Mao et al. 2023, TeCoA, equations 1-3).
    With `out`, the averaged weights are written there after every epoch.
    """
    model.train().requires_grad_(True)
    if recipe.eps:
        model.text.requires_grad_(False)
        model.log_scale.requires_grad_(False)
    fixed = class_embeddings(model, images.class_names) if recipe.eps else None
    recipe = replace(recipe, batch=min(recipe.batch, len(images.labels)))
    per_epoch = len(images.labels) // recipe.batch
    total = max(10, round(recipe.epochs * per_epoch))  # the schedule needs a warm-up of two steps
    optimizer = torch.optim.AdamW(_groups(model, recipe.weight_decay), lr=recipe.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.lr, total_steps=total, pct_start=recipe.warmup, cycle_momentum=False
    )
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    started = time.perf_counter()
    for step, (pixels, labels) in enumerate(batches(images, recipe.batch, total, seed=recipe.seed), start=1):
        targets = _prompted(model, images.class_names, recipe.seed + step) if fixed is None else fixed
        loss = _loss(model, pixels, labels, targets, recipe)
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


def _prompted(model: CifarCLIP, class_names: Sequence[str], seed: int) -> Tensor:
    """Unit embeddings [K, D] of one randomly worded prompt a class."""
    return nn.functional.normalize(model.encode_text(random_prompts(class_names, random.Random(seed))), dim=-1)


def _loss(model: CifarCLIP, pixels: Tensor, labels: Tensor, targets: Tensor, recipe: Recipe) -> Tensor:
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
