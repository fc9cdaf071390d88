"""A model with the layers of LLaVA-1.5 through attack, certify and purify: python -m benchmarks.mllm.memory.

Random weights in the shapes of LLaVA-1.5-7B, in fewer layers: tower (336 pixels, 576 tokens of 1,024), projector and
language model (4,096 wide). Logits are held against transformers' own. Each command runs in a process of its own, whose
peak memory is held against a bound: a multiple of the weights, and room for one pass. The exit code is 1 above one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

SIDE, PATCH, TOKENS = 336, 14, 576
NAMES = ("cat", "dog")
WORDS = ("<pad>", "<s>", "</s>", "<image>", "<unk>", ":", "?", "user", "assistant", "what", "is", "it", "a", *NAMES)
TIMES, ROOM = 2.0, 1.5
"""A command may take the weights this many times, and GB for libraries, activations of a batch and 32 noisy copies."""
ACTS = {
    "attack": ("--goal", "say:a cat", "--attack", "pgd:steps=2", "--limit", "1", "--lanes", "1", "--checks", "none"),
    "certify": ("--claim", "tokens", "--sigma", "0.02", "--samples", "96", "--limit", "1", "--lanes", "4"),
    "purify": (
        "--sigma",
        "0.02",
        "--steps",
        "2",
        "--mapper-steps",
        "2",
        "--batch-size",
        "2",
        "--val",
        "imagefolder:held",
    ),
}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=1, help="of the language model; the tower has one more")
    parser.add_argument("--only", nargs="+", choices=ACTS, default=list(ACTS))
    parser.add_argument("--logits", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def make_model(folder: Path, layers: int) -> int:
    """Write a model with random weights, and return the size of its weights in bytes."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        PreTrainedTokenizerFast,
    )

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    special = dict(
        zip(("pad_token", "bos_token", "eos_token", "unk_token"), ("<pad>", "<s>", "</s>", "<unk>"), strict=True)
    )
    made = PreTrainedTokenizerFast(tokenizer_object=inner, additional_special_tokens=["<image>"], **special)
    made.save_pretrained(str(folder))
    square = {"height": SIDE, "width": SIDE}
    processor = {
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": SIDE}, "crop_size": square,
        "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "resample": 3,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    tower = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=layers + 1,
        image_size=SIDE, patch_size=PATCH,
    )  # fmt: skip
    language = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=32,
        num_hidden_layers=layers, max_position_embeddings=2048, vocab_size=len(WORDS), pad_token_id=0, bos_token_id=1,
        eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=tower,
            text_config=language,
            image_token_index=3,
            image_seq_length=TOKENS,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
    )
    model.save_pretrained(str(folder))
    return sum(value.numel() * value.element_size() for value in model.parameters())


def make_pictures(folder: Path) -> None:
    """Write a few pictures of noise of the model's size, in a folder for each class."""
    draws = np.random.default_rng(0)
    for place in [folder / kind / name for kind in ("photos", "held") for name in NAMES]:
        place.mkdir(parents=True)
        for number in range(2):
            noise = draws.integers(0, 256, (21, 21, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((SIDE, SIDE)).save(place / f"{number}.png")
    (folder / "names.txt").write_text("\n".join(NAMES) + "\n")


def logits_apart(folder: Path) -> float:
    """Return the largest difference of our logits to the library's own."""
    from transformers import AutoTokenizer, LlavaForConditionalGeneration

    from robustvlm.models import load_model
    from robustvlm.models.mllm import MllmVLM

    ours = load_model(f"mllm:{folder}")
    assert isinstance(ours, MllmVLM)
    theirs = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    pixels = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    text = ours.prompt.text.replace("<image>", "<image>" * TOKENS)
    ids = AutoTokenizer.from_pretrained(folder)([text], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        wanted = theirs(pixel_values=(pixels - ours.mean) / ours.std, input_ids=ids).logits[:, -1]
        found = ours.next_logits(ours.tokens(pixels), torch.zeros(1, 1, dtype=torch.long))[:, 0]
    return float((wanted - found).abs().max() / wanted.abs().max())


def measured(words: list[str], place: Path) -> tuple[float, float]:
    """Run a command in a process of its own, and return its peak memory in GB and its seconds.

    Raises:
        SystemExit: it failed.
    """
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, *words], cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    said = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(words)}:\n{said[-2000:]}")
    if "-c" in words or "--logits" in words:
        print(said.strip().splitlines()[-1], flush=True)
    return usage.ru_maxrss * 1024 / 1e9, time.monotonic() - began


def main() -> None:
    """Measure every act, and say which is above its bound."""
    options = parse_arguments()
    if options.logits is not None:
        apart = logits_apart(options.logits)
        print(f"logits differ from transformers' own by {apart:.1e} of the largest")
        raise SystemExit(apart > 1e-4)
    above = []
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        code = f"from benchmarks.mllm.memory import *; print(make_model(Path('model'), {options.layers}))"
        (place / "model").mkdir()
        make_pictures(place)
        measured(["-c", code], place)
        weights = sum(file.stat().st_size for file in (place / "model").glob("*.safetensors")) / 1e9
        print(f"weights: {weights:.2f} GB", flush=True)
        measured(["-m", "benchmarks.mllm.memory", "--logits", "model"], place)
        load = ["-c", "import robustvlm.models as m; print(m.load_model('mllm:model').shape)"]
        runs: dict[str, list[str]] = {"load": load}
        for act in options.only:
            classes = () if act == "purify" else ("--classes", "names.txt")
            runs[act] = ["-m", "robustvlm", act, "mllm:model", *ACTS[act], "--data", "imagefolder:photos", *classes]
        for act, words in runs.items():
            peak, seconds = measured(words, place)
            bound = TIMES * weights + ROOM
            print(f"| {act} | {peak:.2f} GB | {bound:.2f} GB | {seconds:.0f} s |", flush=True)
            above += [act] if peak > bound else []
    if above:
        raise SystemExit(f"above the bound: {', '.join(above)}")


if __name__ == "__main__":
    main()
