"""Train the bundled multimodal model: python -m tools.train_tiny_mllm (about 25 minutes on one core; --help).

A LLaVA: the bundled CLIP's image tower, frozen; a projector; a Llama of three layers. The tower's tokens are computed
once, a part of them behind pixel noise, so that the language model also reads what smoothing gives it. The validation
style is watched while it trains; the test style is measured once, at the end, with --test.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.data.emoji import TEST_STYLE, VALIDATION_STYLE, compose_on
from robustvlm.models import load_model
from robustvlm.models.mllm.tower import TOKENS, TinyTowerConfig, register
from tools.tiny.augment import augment
from tools.tiny.sprites import Sprites, Taxonomy
from tools.tiny.talk import (
    BOS,
    COLOURS,
    EOS,
    IMAGE,
    PAD,
    QUESTIONS,
    Encoded,
    Facts,
    make_tokenizer,
    pack,
    with_article,
    yes_no,
)

FOLDER = Path(__file__).resolve().parents[1] / "robustvlm" / "assets" / "tiny-mllm"
NOISY = 0.5
"""Share of the training pictures behind noise, whose level is drawn evenly from 0 to the most."""
WARMUP = 100


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--copies", type=int, default=12, help="augmented pictures of each drawing")
    parser.add_argument("--noise", type=float, default=0.12, help="most noise, in [0, 1] pixels")
    parser.add_argument("--base", default="tiny", help="bundled model whose image tower it has")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--test", action="store_true", help="measure the test style as well: final figures only")
    parser.add_argument("--out", type=Path, default=FOLDER)
    return parser.parse_args()


@dataclass(frozen=True)
class Seen:
    """Pictures as the tower gives them, in half precision, and what is true of each."""

    pooled: Tensor
    grid: Tensor
    facts: list[Facts]

    def tokens(self, tower: Any, rows: list[int]) -> Tensor:
        """Return the tokens [B, 17, D] of some pictures."""
        return tower.tokens(self.pooled[rows].float(), self.grid[rows].float())


@torch.no_grad()
def look(tower: Any, sprites: Sprites, taxonomy: Taxonomy, *, copies: int, seed: int, how: Any, noise: float) -> Seen:
    """Return `copies` pictures of every drawing as the tower sees them."""
    draws = torch.Generator().manual_seed(seed)
    pooled, grids, facts = [], [], []
    for _ in range(copies):
        for chunk in torch.arange(len(sprites.labels)).split(128):
            pixels, colours = how(sprites.as_float(chunk.tolist()), draws)
            level = torch.rand(len(pixels), 1, 1, 1, generator=draws) * noise
            level = level * (torch.rand(level.shape, generator=draws) < NOISY)
            first, grid = tower.stages(pixels + level * torch.randn(pixels.shape, generator=draws))
            pooled.append(first.half())
            grids.append(grid.half())
            facts += [
                fact_of(taxonomy, label, colour)
                for label, colour in zip(sprites.labels[chunk].tolist(), colours.tolist(), strict=True)
            ]
    return Seen(torch.cat(pooled), torch.cat(grids), facts)


def fact_of(taxonomy: Taxonomy, label: int, colour: int) -> Facts:
    """Return what is true of a picture of a class on a background."""
    return Facts(
        taxonomy.names[label],
        taxonomy.superclasses[taxonomy.superclass_of[label]],
        taxonomy.domains[taxonomy.domain_of[label]],
        COLOURS[colour],
    )


def build(words: int, options: argparse.Namespace) -> Any:
    """Return the model with fresh weights around the bundled tower."""
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    register()
    text = LlamaConfig(
        vocab_size=words,
        hidden_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=3 * options.width,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    config = LlavaConfig(
        vision_config=TinyTowerConfig(base=options.base),
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
        # Faster than the fused kernel for short sequences on a CPU, above all backwards.
        attn_implementation="eager",
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.visual.load_state_dict(load_model(options.base).model.visual.state_dict())
    model.model.vision_tower.requires_grad_(False).eval()
    return model


def loss_of(model: Any, tokens: Tensor, packed: Any) -> Tensor:
    """Return the mean loss of the answers' tokens."""
    inner = model.model
    embeds = inner.get_input_embeddings()(packed.ids)
    image = inner.multi_modal_projector(tokens).to(embeds.dtype)
    embeds = torch.cat([embeds[:, :1], image, embeds[:, 1 + TOKENS :]], 1)
    hidden = inner.language_model(
        inputs_embeds=embeds, attention_mask=packed.mask, position_ids=packed.positions, use_cache=False
    ).last_hidden_state[:, :-1]
    wanted = packed.labels[:, 1:]
    kept = wanted != -100
    return F.cross_entropy(model.lm_head(hidden[kept]).float(), wanted[kept], label_smoothing=0.02)


@torch.no_grad()
def say(model: Any, tokenizer: Any, tokens: Tensor, questions: list[str]) -> list[str]:
    """Return greedy answers to one question on each picture."""
    rows = [
        [BOS, *[IMAGE] * TOKENS, *tokenizer(f"<q> {q} <a>", add_special_tokens=False)["input_ids"]] for q in questions
    ]
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    embeds = model.get_input_embeddings()(ids)
    embeds = embeds.masked_scatter((ids == IMAGE)[..., None], model.model.multi_modal_projector(tokens))
    out = model.generate(
        inputs_embeds=embeds, attention_mask=(ids != PAD).long(), do_sample=False, max_new_tokens=16, pad_token_id=PAD
    )
    return [tokenizer.decode([token for token in row if token not in (PAD, EOS)]) for row in out.tolist()]


def measure(model: Any, tokenizer: Any, taxonomy: Taxonomy, seen: Seen, *, limit: int) -> dict[str, float]:
    """Return the share of right answers by question, and of captions that name the thing and its background."""
    order = torch.randperm(len(seen.facts), generator=torch.Generator().manual_seed(7))[:limit].tolist()
    tokens, facts = seen.tokens(model.model.vision_tower, order), [seen.facts[row] for row in order]
    rng, found = random.Random(5), {}
    for key, question in QUESTIONS.items():
        said = say(model, tokenizer, tokens, [question] * len(facts))
        found[key] = _share(text == one.answer(key) for text, one in zip(said, facts, strict=True))
        if key == "caption":
            found["caption names it"] = _share(
                text.startswith(f"{with_article(one.name)} on") for text, one in zip(said, facts, strict=True)
            )
    asked = [yes_no(one, taxonomy, rng) for one in facts]
    said = say(model, tokenizer, tokens, [question for question, _ in asked])
    found["yes or no"] = _share(text == answer for text, (_, answer) in zip(said, asked, strict=True))
    return found


def _share(right: Any) -> float:
    marks = list(right)
    return round(sum(marks) / len(marks), 4)


def optimizer_of(model: Any, lr: float) -> torch.optim.AdamW:
    """Return AdamW over all but the tower, with weight decay on matrices alone."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": 0.1},
        {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))


def train(
    model: Any, tokenizer: Any, taxonomy: Taxonomy, seen: Seen, watched: Seen, options: argparse.Namespace
) -> int:
    """Train for the minutes asked for, the learning rate falling to nothing; return the steps made."""
    tower, encoded, rng = model.model.vision_tower, Encoded(tokenizer), random.Random(options.seed)
    optimizer, step, began, running = optimizer_of(model, options.lr), 0, time.monotonic(), 0.0
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    while (done := (time.monotonic() - began) / (60 * options.minutes)) < 1:
        rate = options.lr * min(1.0, (step + 1) / WARMUP) * (0.505 + 0.495 * math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        model.train()
        tower.eval()
        rows = [rng.randrange(len(seen.facts)) for _ in range(options.batch)]
        tokens = F.dropout(seen.tokens(tower, rows), 0.1)
        packed = pack([seen.facts[row] for row in rows], taxonomy, encoded, rng)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, tokens, packed)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        step += 1
        running = loss.item() if step == 1 else 0.98 * running + 0.02 * loss.item()
        if step % 100 == 0:
            print(f"step {step}, {done:.0%}, loss {running:.3f}", flush=True)
        if step % 500 == 0:
            model.eval()
            print(measure(model, tokenizer, taxonomy, watched, limit=120), flush=True)
    model.eval()
    return step


def keep(model: Any, tokenizer: Any, folder: Path, told: dict[str, Any]) -> None:
    """Write the folder; the tower's weights stay in the bundled CLIP."""
    from safetensors.torch import save_file
    from transformers import CLIPImageProcessor

    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    side = model.config.vision_config.image_size
    CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        resample=3,
    ).save_pretrained(folder)
    state = {
        name: value.half().contiguous()
        for name, value in model.state_dict().items()
        if ".visual." not in name and name != "lm_head.weight"
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "training.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Look at all pictures, train, measure, and write the folder."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    taxonomy = Taxonomy.load()
    tokenizer = make_tokenizer(taxonomy)
    model = build(len(tokenizer), options)
    tower, began = model.model.vision_tower, time.monotonic()
    seen = look(
        tower, Sprites.load(taxonomy), taxonomy, copies=options.copies, seed=1, how=augment, noise=options.noise
    )
    some = seen.grid[:4000].float()
    tower.centre.copy_(some.mean((0, 1)))
    tower.spread.copy_(some.std((0, 1)) + 1e-3)
    styles = [VALIDATION_STYLE, *([TEST_STYLE] if options.test else [])]
    held = {
        style: look(
            tower, Sprites.load(taxonomy, styles=(style,)), taxonomy, copies=2, seed=2, how=compose_on, noise=0.0
        )
        for style in styles
    }
    print(f"{len(seen.facts)} pictures in {time.monotonic() - began:.0f} s, {len(tokenizer)} words", flush=True)
    steps = train(model, tokenizer, taxonomy, seen, held[VALIDATION_STYLE], options)
    told: dict[str, Any] = {
        "command": f"python -m tools.train_tiny_mllm {shlex.join(sys.argv[1:])}".strip(),
        "steps": steps,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "threads": options.threads,
        "right": {style: measure(model, tokenizer, taxonomy, one, limit=500) for style, one in held.items()},
    }
    keep(model, tokenizer, options.out, told)
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
