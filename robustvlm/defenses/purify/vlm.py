"""The purified encoder: denoise, encode, map; told the noise level by whoever adds the noise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from robustvlm.defenses.purify.denoiser import OwnDenoiser
from robustvlm.defenses.purify.mapper import Mapper
from robustvlm.defenses.purify.unet import Purifier
from robustvlm.models import VLM
from robustvlm.models.fingerprint import fingerprint


class PurifiedVLM(VLM):
    """An encoder between a purifier and a mapper: f(x) = M(phi(P(x, s)), s) at unit norm, for noise of s.

    Made for noise 0, where it is the encoder itself. Whoever smooths it asks for `at_noise(sigma)`, so purifier and
    mapper see single noisy images and are part of what is averaged: certificates need no property of them (they must
    be functions of one image, which `certify` checks).

    Args:
        base: the encoder; it encodes texts unchanged.
        purifier: `Purifier`, `OwnDenoiser` or None.
        mapper: `Mapper` or None.
        sigma: noise level behind which this one stands.

    Example:
        >>> import torch
        >>> from robustvlm.defenses.purify.unet import PurifierShape
        >>> from robustvlm.models import load_model
        >>> base, pixels = load_model("tiny"), torch.rand(1, 3, 64, 64)
        >>> vlm = PurifiedVLM(base, Purifier(PurifierShape(widths=(8,))), None)
        >>> torch.allclose(vlm.encode_image(pixels), base.encode_image(pixels))
        True
        >>> torch.allclose(vlm.at_noise(0.25).encode_image(pixels), base.encode_image(pixels))
        False
    """

    def __init__(
        self, base: VLM, purifier: Purifier | OwnDenoiser | None, mapper: Mapper | None, *, sigma: float = 0.0
    ) -> None:
        super().__init__(
            spec=base.spec,
            logit_scale=base.logit_scale,
            **base.framing.options(),
        )
        # Behind a purifier of ours the encoder meets denoised images, so a purifier of its own is not told the noise.
        self.base = base if purifier is not None else base.at_noise(sigma)
        self.purifier, self.mapper, self.sigma = purifier, mapper, float(sigma)
        self.eval()
        self.to(base.device)

    def at_noise(self, sigma: float) -> PurifiedVLM:
        """Return the same model behind noise of `sigma`; the weights are shared."""
        same = PurifiedVLM(self.base, self.purifier, self.mapper, sigma=sigma)
        same.spec = self.spec
        return same

    def _image_features(self, pixels: Tensor) -> Tensor:
        if self.sigma == 0.0:
            return self.base.encode_image(pixels)
        clean = pixels if self.purifier is None else self.purifier(pixels, self.sigma)
        features = self.base.encode_image(clean)
        return features if self.mapper is None else self.mapper(features, self.sigma)

    def _text_features(self, texts: list[str]) -> Tensor:
        return self.base.encode_text(texts)

    def cut_tokens(self, texts: Sequence[str]) -> list[int]:
        return self.base.cut_tokens(texts)

    @property
    def fingerprint(self) -> str:
        """Digest of the encoder, of purifier and mapper, and of the noise level."""
        return fingerprint({}, (self.base.fingerprint, "purify", repr(self.sigma), super().fingerprint))

    def _state(self) -> Mapping[str, object]:
        state: dict[str, Any] = {}
        for name, part in (("purifier", self.purifier), ("mapper", self.mapper)):
            own = part.state if isinstance(part, OwnDenoiser) else {} if part is None else part.state_dict()
            state |= {f"{name}.{key}": value for key, value in own.items()}
        return state

    def _identity(self) -> Iterable[str]:
        return (_structure(self.purifier), _structure(self.mapper))


def _structure(part: nn.Module | None) -> str:
    if isinstance(part, OwnDenoiser):
        return f"denoiser {part.fingerprint}"
    return "none" if part is None else f"{type(part).__name__} {getattr(part, 'shape', '')!r}"
