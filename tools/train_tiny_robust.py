"""Train the bundled robust model, from the bundled one: python -m tools.train_tiny_robust (--help for the options)."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from robustvlm.attacks import ThreatModel
from robustvlm.defenses.finetune import InnerAttack
from robustvlm.models import load_model
from robustvlm.models.clip import ClipVLM
from robustvlm.training import Estimate, RobustValidation, Trainer, TrainingConfig, TrainingObserver, Validation, Warned
from tools.tiny import network
from tools.tiny.robust import RobustTiny, SpriteData, Weights, validation_images
from tools.tiny.sprites import Taxonomy

OUT = network.FOLDER.with_name("tiny-robust")
WORK = Path(__file__).resolve().parent / ".cache" / "tiny-robust"
CHECKED = ThreatModel("Linf", 2 / 255)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.15)
    parser.add_argument("--ema", type=float, default=0.99)
    parser.add_argument("--eps", type=float, default=2.0, help="of the inner attack, in 1/255")
    parser.add_argument("--inner-steps", type=int, default=1)
    parser.add_argument("--clean", type=float, default=0.0, help="weight of the clean cross-entropy")
    parser.add_argument("--hierarchy", type=float, default=0.3, help="weight of superclass and domain prompts")
    parser.add_argument("--guided", type=float, default=0.0, help="weight of the divergence from tiny's clean answers")
    parser.add_argument("--start", choices=("tiny", "tiny-robust"), default="tiny", help="the model to train on from")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--work", type=Path, help="checkpoints; resumed from when there are any")
    parser.add_argument("--validate-every", type=int, default=100)
    return parser.parse_args()


class Lines(TrainingObserver):
    """Prints how it goes."""

    def estimated(self, estimate: Estimate) -> None:
        print(f"{estimate.steps} steps, {estimate.passes} passes, {estimate.seconds / 60:.1f} min", flush=True)

    def stepped(self, step: int, terms: Mapping[str, float]) -> None:
        if step % 20 == 0:
            print(step, {name: round(value, 3) for name, value in terms.items()}, flush=True)

    def validated(self, found: Validation) -> None:
        print(found.step, {name: round(found.number(name) or 0.0, 4) for name in found.measures}, flush=True)

    def warned(self, warning: Warned) -> None:
        print("warning:", warning.name, warning.message, flush=True)


def main() -> None:
    """Train to the last step and write the weights of the best validation."""
    options = parse_arguments()
    torch.set_flush_denormal(True)
    vlm = load_model(options.start)
    # Read now, as OUT may be where the new one goes.
    earlier = {} if options.start == "tiny" else json.loads((OUT / "training.json").read_text(encoding="utf-8"))
    assert isinstance(vlm, ClipVLM)
    vlm.to(memory_format=torch.channels_last)
    vlm.model.visual.requires_grad_(True)
    taxonomy = Taxonomy.load()
    attack = InnerAttack(threat=ThreatModel("Linf", options.eps / 255), steps=options.inner_steps)
    task = RobustTiny(
        vlm,
        taxonomy,
        attack=attack,
        weights=Weights(clean=options.clean, hierarchy=options.hierarchy, guided=options.guided),
        teacher=load_model("tiny").eval().requires_grad_(False) if options.guided else None,
        validation=RobustValidation(validation_images(copies=2), CHECKED, n_iter=7),
    )
    config = TrainingConfig(
        steps=options.steps,
        batch_size=len(taxonomy.names),
        lr=options.lr,
        final_lr=0.01,
        warmup=min(50, options.steps // 4),
        weight_decay=options.weight_decay,
        precision="bf16",
        ema=options.ema,
        seed=options.seed,
        validate_every=options.validate_every,
        checkpoint_every=20,
    )
    work = options.work or WORK / f"from-{options.start}-seed-{options.seed}"  # a round must not go on with another's
    work.mkdir(parents=True, exist_ok=True)
    data = SpriteData(taxonomy, seed=options.seed)
    history = Trainer(task, data, config, observer=Lines()).fit(work)
    network.save(vlm.model, options.out)
    shutil.copy(network.BPE, options.out)
    best = history.best()
    record = {
        "command": " ".join(["python", "-m", "tools.train_tiny_robust", *sys.argv[1:]]),
        "options": {key: value for key, value in vars(options).items() if key not in ("out", "work")},
        "started_from": options.start,
        "before": [*earlier.get("before", []), earlier["command"]] if earlier else [],
        "train_sprites": len(data.batches_of.sprites.styles),
        "train_styles": sorted(set(data.batches_of.sprites.styles)),
        "trained": "the vision tower; the text tower is that of tiny",
        "train_minutes": round(history.seconds / 60, 1),
        "best_step": history.best_step,
        "validation": {name: best.number(name) for name in best.measures} if best else {},
    }
    (options.out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
