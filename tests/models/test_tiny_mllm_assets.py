"""The bundled multimodal model: small, whole, and as good as it says on a style that it never saw."""

from __future__ import annotations

import json

import torch

from robustvlm.commands.common.inputs import Images, Picture
from robustvlm.data import open_data
from robustvlm.defenses import load_classifier
from robustvlm.defenses.answering import Answering
from robustvlm.models.mllm.load import BUNDLED


def test_it_names_and_describes_what_it_never_saw() -> None:
    folder = BUNDLED["tiny"]
    assert sum(file.stat().st_size for file in folder.iterdir()) < 2e6
    data = open_data("emoji?labels=all&copies=1")
    model = load_classifier("mllm:tiny", data.class_names, data.templates)
    assert isinstance(model, Answering)
    seen = [item for item in Images(data, limit=96, resolution=64).stream() if isinstance(item, Picture)]
    pixels, label = torch.stack([one.pixels for one in seen]), torch.tensor([one.label for one in seen])
    told = json.loads((folder / "training.json").read_text())["right"]["twemoji"]
    with torch.no_grad():
        right = (model(pixels).argmax(1) == label).double().mean().item()
        tokens = model.speaker.tokens(pixels)
        captions = model.speaker.asking("Describe the picture.").say(tokens)
    assert abs(right - told["name"]) < 0.15
    named = [f" {data.class_names[which]} on " in text for text, which in zip(captions, label.tolist(), strict=True)]
    assert abs(sum(named) / len(named) - told["caption names it"]) < 0.15
    # All tokens have one length, so that what smoothing hands back is what it was trained on.
    assert torch.allclose(tokens.norm(dim=-1), model.speaker.lengths.expand(96, -1), rtol=1e-4)
