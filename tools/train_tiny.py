"""Train the bundled model: python -m tools.train_tiny (about an hour on one core; --help for the options)."""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip import ClipLoss
from torch import Tensor

from tools.tiny import network
from tools.tiny.score import validation_accuracy
from tools.tiny.sprites import Batch, Batches, Sprites, Taxonomy

CACHE = Path(__file__).resolve().parent / ".cache"
WARMUP = 150
MAX_SCALE = math.log(100)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.15)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--hierarchy", type=float, default=0.6, help="weight of superclass and domain prompts")
    parser.add_argument("--init", type=Path, help="start from the weights in this folder")
    parser.add_argument("--out", type=Path, default=network.FOLDER)
    parser.add_argument("--state", type=Path, default=CACHE / "tiny_state.pt", help="resumed from when it exists")
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


class Trainer:
    """Model, moving average and optimiser, and the step count they stand at."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(options.seed)
        self.options = options
        self.step = 0
        self.seconds = 0.0
        self.model = network.load(options.init) if options.init else network.build()
        self.model = self.model.train().to(memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.model).eval()
        self.optimizer = self._optimizer()
        self.taxonomy = Taxonomy.load()
        self.batches = Batches(Sprites.load(self.taxonomy), self.taxonomy, seed=options.seed)
        self.tokens = network.tokenizer()
        self.clip_loss = ClipLoss()

    def _optimizer(self) -> torch.optim.AdamW:
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": self.options.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.options.lr, betas=(0.9, 0.98))

    def learning_rate(self) -> float:
        """Linear warm-up, then a half cosine down to a hundredth."""
        cosine = 0.5 * (1 + math.cos(math.pi * self.step / self.options.steps))
        return float(self.options.lr * min(1, (self.step + 1) / WARMUP) * (0.99 * cosine + 0.01))

    def loss(self, batch: Batch, *, with_nodes: bool) -> Tensor:
        """CLIP's loss over the batch, plus picture-to-superclass and picture-to-domain cross-entropy."""
        tokens = self.tokens(batch.captions + (batch.nodes if with_nodes else []))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            pictures = self.model.encode_image(batch.pixels.contiguous(memory_format=torch.channels_last))
            texts = self.model.encode_text(tokens)
        pictures, texts = F.normalize(pictures.float(), dim=-1), F.normalize(texts.float(), dim=-1)
        scale, n = self.model.logit_scale.exp(), len(batch.captions)
        loss: Tensor = self.clip_loss(pictures, texts[:n], scale)
        if with_nodes:
            logits = scale * pictures @ texts[n:].T
            split = len(self.taxonomy.superclasses)
            loss = loss + self.options.hierarchy * (
                F.cross_entropy(logits[:, :split], self.taxonomy.superclass_of[batch.labels])
                + F.cross_entropy(logits[:, split:], self.taxonomy.domain_of[batch.labels])
            )
        return loss

    def advance(self) -> float:
        """Take one step and return its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        loss = self.loss(self.batches.at(self.step), with_nodes=self.step % 2 == 0)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, MAX_SCALE)
        self.step += 1
        self._update_average()
        return loss.item()

    @torch.no_grad()
    def _update_average(self) -> None:
        keep = min(self.options.ema, (1 + self.step) / (10 + self.step))
        current = self.model.state_dict()
        for key, value in self.average.state_dict().items():
            if value.is_floating_point():
                value.lerp_(current[key], 1 - keep)
            else:
                value.copy_(current[key])

    def save_state(self) -> None:
        """Write everything needed to go on, so that a kill at any moment loses little."""
        parts = {"model": self.model, "average": self.average, "optimizer": self.optimizer}
        state = {name: part.state_dict() for name, part in parts.items()}
        temporary = self.options.state.with_suffix(".part")
        self.options.state.parent.mkdir(parents=True, exist_ok=True)
        torch.save({**state, "step": self.step, "seconds": self.seconds}, temporary)
        temporary.replace(self.options.state)

    def load_state(self) -> None:
        """Go on from a saved state."""
        state = torch.load(self.options.state, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]


def record(trainer: Trainer, accuracy: dict[str, float]) -> None:
    """Write how the weights came about next to them."""
    options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(trainer.options).items()}
    content = {
        "command": " ".join(["python", "-m", "tools.train_tiny", *sys.argv[1:]]),
        "options": {key: options[key] for key in ("steps", "seed", "lr", "weight_decay", "ema", "hierarchy")},
        "train_sprites": len(trainer.batches.sprites.styles),
        "train_styles": sorted(set(trainer.batches.sprites.styles)),
        "train_minutes": round(trainer.seconds / 60, 1),
        "validation": accuracy,
    }
    if trainer.options.init:
        before = trainer.options.init / "training.json"
        content["started_from"] = json.loads(before.read_text(encoding="utf-8")) if before.exists() else None
    (trainer.options.out / "training.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Train to the last step and write the weights."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    trainer = Trainer(options)
    if options.state.exists():
        trainer.load_state()
        print(f"going on from step {trainer.step} ({options.state})", flush=True)
    while trainer.step < options.steps:
        start = time.monotonic()
        loss = trainer.advance()
        trainer.seconds += time.monotonic() - start
        if trainer.step % 20 == 0:
            scale = trainer.model.logit_scale.exp().item()
            print(f"{trainer.step} {trainer.seconds:.0f}s loss {loss:.3f} scale {scale:.1f}", flush=True)
        if trainer.step % options.save_every == 0:
            trainer.save_state()
        if trainer.step % 400 == 0:
            print(trainer.step, validation_accuracy(trainer.average, trainer.taxonomy), flush=True)
    accuracy = validation_accuracy(trainer.average, trainer.taxonomy)
    print("validation", accuracy, flush=True)
    network.save(trainer.average, options.out)
    record(trainer, accuracy)
    options.state.unlink(missing_ok=True)  # the next training starts afresh


if __name__ == "__main__":
    main()
