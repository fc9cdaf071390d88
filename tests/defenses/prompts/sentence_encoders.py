"""A sentence encoder of the real one's making with small random weights, and models of one's own that use it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from robustvlm.models.sentences import LONGEST, SentenceEncoder

WIDTH = 16
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_WORDS = ("x", "a", "picture", "of", "apple", "hot", "dog", "guitar", "violin", ".")


class Small(SentenceEncoder):
    """Tokens are whole words, and a text is the mean over a layer in which every token sees all others."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        vocabulary = {word: place for place, word in enumerate((*_SPECIAL, *_WORDS))}
        self.tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        self.tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self.tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        self.tokenizer.enable_truncation(LONGEST)
        self.tokenizer.enable_padding()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.tokens, self.norm = nn.Embedding(len(vocabulary), WIDTH), nn.LayerNorm(WIDTH)
            self.register_buffer("places", torch.randn(LONGEST, WIDTH))
            self.layers = nn.ModuleList([_Mixed()])
        self.requires_grad_(False)


class _Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        weight = mask[:, 0, 0, :, None].to(x)
        around = (x * weight).sum(dim=1, keepdim=True) / weight.sum(dim=1, keepdim=True)
        mixed: Tensor = torch.tanh(self.linear(x * around))
        return mixed


class Own(nn.Module):
    """An encoder of one's own, whose texts go on through a layer behind the sentence encoder."""

    image_size, logit_scale = 8, 10.0

    def __init__(self) -> None:
        super().__init__()
        self.words, self.behind, self.images = Small(), nn.Linear(WIDTH, 12), nn.Linear(3, 12)

    def encode_image(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.images(pixels.mean((2, 3)))
        return found

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        found: Tensor = self.behind(self.words(texts))
        return found


class Closed(Own):
    """One that gives no gradient to its texts."""

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        with torch.no_grad():
            return super().encode_text(texts)


class Without(Own):
    """One without a sentence encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Identity()  # type: ignore[assignment]

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        return torch.eye(12)[: len(texts)]
