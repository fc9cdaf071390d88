"""A tiny open_clip model and image features that its own class embeddings explain, made once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.models import VLM, load_model
from robustvlm.models.zero_shot import class_embeddings

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def tiny() -> VLM:
    return load_model("tiny")


@pytest.fixture(scope="session")
def images(tiny: VLM) -> tuple[Tensor, Tensor]:
    """Features [24, D] around the class embeddings of an unusual prompt, with labels."""
    from tuned_classes import CLASSES

    texts = class_embeddings(tiny, CLASSES, ["red {} snow"])
    noise = torch.randn(24, texts.shape[1], generator=torch.Generator().manual_seed(0))
    labels = torch.arange(24) % 4
    return F.normalize(texts[labels] + 0.06 * noise, dim=-1), labels
