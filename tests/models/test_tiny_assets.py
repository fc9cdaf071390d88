import gzip
import json
import stat
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors import safe_open
from torchvision.transforms.functional import pil_to_tensor

from robustvlm.data.emoji import ASSETS, EmojiSource
from robustvlm.models import load_model, zero_shot

TINY = ASSETS / "tiny"
BPE = TINY / "bpe_4096.txt.gz"
WEIGHTS = TINY / "open_clip_model.safetensors"


@pytest.fixture(scope="module")
def stock():
    """The folder as open_clip itself reads it."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{TINY}")
    return model.eval(), preprocess


@pytest.fixture(scope="module")
def pictures():
    source = EmojiSource()
    samples = list(source.samples(limit=100))
    pixels = torch.stack([pil_to_tensor(sample.image).float() / 255 for sample in samples])
    return source, pixels, torch.tensor([sample.label for sample in samples])


def tokenizer():
    return open_clip.SimpleTokenizer(bpe_path=str(BPE), context_length=24)


def test_vocabulary_is_the_small_one_with_the_end_token_last():
    tokens = tokenizer()
    assert tokens.vocab_size == 4096
    row = tokens(["a dog"])[0]
    assert row.max().item() == 4095  # CLIP reads the text at its largest token: the end token must be that
    assert row.tolist().index(4095) >= 3


def test_merges_are_a_prefix_of_clips_and_end_without_a_newline():
    text = gzip.decompress(BPE.read_bytes()).decode("utf-8")
    assert not text.endswith("\n")
    full = gzip.decompress(Path(open_clip.tokenizer.default_bpe()).read_bytes()).decode("utf-8")
    assert full.startswith(text + "\n")
    assert text.count("\n") == 3582


def test_bpe_file_is_reproducible():
    assert BPE.read_bytes()[4:8] == b"\0\0\0\0"  # no time stamp in the gzip header


def test_weights_are_half_precision_small_readable_and_finite():
    assert WEIGHTS.stat().st_size < 10_000_000
    assert stat.S_IMODE(WEIGHTS.stat().st_mode) & 0o444 == 0o444
    with safe_open(WEIGHTS, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - safe_open is no dictionary
            tensor = file.get_tensor(name)
            assert tensor.dtype in (torch.float16, torch.int64)
            assert torch.isfinite(tensor.float()).all(), name


def test_stock_open_clip_and_load_model_agree(stock, pictures):
    model, _ = stock
    vlm = load_model("tiny")
    _, pixels, _ = pictures
    texts = ["a picture of a dog", "an icon of a sailboat"]
    with torch.no_grad():
        torch.testing.assert_close(
            vlm.encode_image(pixels[:8]), model.encode_image(pixels[:8], normalize=True), atol=1e-5, rtol=0
        )
        torch.testing.assert_close(
            vlm.encode_text(texts), model.encode_text(tokenizer()(texts), normalize=True), atol=1e-5, rtol=0
        )


def test_stock_preprocessing_leaves_bundled_pictures_as_they_are(stock, pictures):
    _, preprocess = stock
    source, pixels, _ = pictures
    sample = next(iter(source.samples(limit=1)))
    torch.testing.assert_close(preprocess(sample.image), pil_to_tensor(sample.image).float() / 255)
    assert pixels.shape[1:] == (3, 64, 64)


def test_accuracy_on_an_unseen_style(pictures):
    source, pixels, labels = pictures
    classifier = zero_shot(load_model("tiny"), source.class_names, source.templates, cache=False)
    with torch.no_grad():
        predicted = classifier(pixels).argmax(1)
    assert (predicted == labels).float().mean() >= 0.75
    superclass = torch.tensor(source.tree[0].superclass_labels(1))
    assert (superclass[predicted] == superclass[labels]).float().mean() >= 0.8


def test_a_picture_is_encoded_alike_in_any_company(pictures):
    _, pixels, _ = pictures
    vlm = load_model("tiny")
    with torch.no_grad():
        torch.testing.assert_close(vlm.encode_image(pixels[:1]), vlm.encode_image(pixels[:9])[:1], atol=1e-5, rtol=0)


def test_training_record_names_command_and_figures():
    record = json.loads((TINY / "training.json").read_text(encoding="utf-8"))
    assert record["command"].startswith("python -m tools.train_tiny")
    assert "twemoji" not in record["train_styles"]
    assert "streamline-emojis" not in record["train_styles"]
    assert record["measured"]["twemoji"]["top1_101"] > 0.8
