"""The vaccine: a small residual network on image features, and an encoder that ends in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustvlm.core.seeds import derive_seed
from robustvlm.models import VLM


class Adapter(nn.Module):
    """f(z) = Norm(z + W2 gelu(W1 z + b1) + b2) on unit features [B, D]; W2 and b2 begin at zero, f at the identity.

    Source: Immuno-VLM, arXiv 2605.30745, phase 3. It looks at one feature at a time.

    Example:
        >>> z = F.normalize(torch.rand(2, 4), dim=-1)
        >>> torch.allclose(Adapter(4, 8, seed=0)(z), z)
        True
    """

    def __init__(self, dim: int, hidden: int, *, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "adapter"))
            self.inner, self.outer = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Return unit features [B, D]."""
        return F.normalize(features + self.outer(F.gelu(self.inner(features))), dim=-1)


class AdaptedVLM(VLM):
    """An encoder whose image features pass an adapter; texts are encoded as before.

    The adapter is part of the encoder, so that a smoothing around it averages adapted features (it is inside the
    expectation, and certificates need no property of it).

    Example:
        >>> from robustvlm.models import load_model
        >>> adapted = AdaptedVLM(load_model("tiny"), Adapter(192, 8))
        >>> adapted.encode_image(torch.rand(1, 3, 64, 64)).shape
        torch.Size([1, 192])
    """

    def __init__(self, base: VLM, adapter: Adapter) -> None:
        super().__init__(
            spec=base.spec,
            logit_scale=base.logit_scale,
            **base.framing.options(),
        )
        self.base, self.adapter = base, adapter
        self.training = False
        self.to(base.device)

    def at_noise(self, sigma: float) -> VLM:
        """Return the same adapter behind the encoder for that noise."""
        told = self.base.at_noise(sigma)
        return self if told is self.base else AdaptedVLM(told, self.adapter)

    def _image_features(self, pixels: Tensor) -> Tensor:
        features = self.base.encode_image(pixels)
        # Under autocast the product would lose the margins that thresholds turn on.
        with torch.autocast(pixels.device.type, enabled=False):
            return self.adapter(features.to(self.adapter.inner.weight.dtype))

    def _text_features(self, texts: list[str]) -> Tensor:
        return self.base.embed_text(texts)  # scaled to unit length once, by this model

    def cut_tokens(self, texts: Sequence[str]) -> list[int]:
        return self.base.cut_tokens(texts)

    def _state(self) -> dict[str, object]:
        return dict(self.adapter.state_dict())

    def _identity(self) -> Iterable[str]:
        return ("adapted", self.base.fingerprint)
