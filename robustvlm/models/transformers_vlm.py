"""Models of the transformers library as VLMs: CLIP-like pairs, and image towers with a text side of another model."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustvlm.core.size import sides
from robustvlm.errors import UserError
from robustvlm.models.transformers_pixels import Preprocessing, patches
from robustvlm.models.vlm import VLM

# Which models are known, and what is peculiar to each


@dataclass(frozen=True)
class Family:
    """A kind of model, by the `model_type` of its config.

    Args:
        name: class of transformers that computes it.
        texts: it has a text tower.
        fixed: texts are padded to the context length, as the model saw them in training.
        mask: padding is masked out; SigLIP was trained without a mask.
        lower: texts are lower-cased, as in training.
        end: the text feature is that of the token that ends the text, whose place the model seeks by its id.
        types: the text tower takes token types.
        offset: position ids begin behind the padding index, so that this many fewer tokens fit.
    """

    name: str
    texts: bool = True
    fixed: bool = True
    mask: bool = True
    lower: bool = False
    end: bool = False
    types: bool = False
    offset: bool = False


FAMILIES = {
    "clip": Family("CLIPModel", end=True),
    "metaclip_2": Family("MetaClip2Model", end=True),
    "siglip": Family("SiglipModel", mask=False, lower=True),
    "siglip2": Family("Siglip2Model", mask=False, lower=True),
    "altclip": Family("AltCLIPModel", fixed=False, offset=True),
    "chinese_clip": Family("ChineseCLIPModel", fixed=False, types=True),
    "clip_vision_model": Family("CLIPVisionModel", texts=False),
    "metaclip_2_vision_model": Family("MetaClip2VisionModel", texts=False),
    "siglip_vision_model": Family("SiglipVisionModel", texts=False),
    "siglip2_vision_model": Family("Siglip2VisionModel", texts=False),
    "vit": Family("ViTModel", texts=False),
    "dinov2": Family("Dinov2Model", texts=False),
    "dinov2_with_registers": Family("Dinov2WithRegistersModel", texts=False),
    "dinov3_vit": Family("DINOv3ViTModel", texts=False),
}
NO_POOLER = ("vit",)  # its pooler is of the language model's kind, and untrained in most checkpoints


def pooled(output: Any, what: str) -> torch.Tensor:
    """Return pooled features [B, D]; version 4 of the library returns them bare, version 5 inside of an object.

    Never its first entry: that is the sequence of tokens.
    """
    found = output if torch.is_tensor(output) else getattr(output, "pooler_output", None)
    if not torch.is_tensor(found) or found.ndim != 2:
        shape = list(found.shape) if torch.is_tensor(found) else "none"
        raise UserError(f"{what} must give features [B, D], got {shape}: this version of transformers does not")
    return found


# Both towers of one model


class Words:
    """A tokenizer with the way in which a family's texts are read."""

    def __init__(self, tokenizer: Any, family: Family, room: int, digest: str) -> None:
        self.tokenizer, self.family, self.room, self.digest = tokenizer, family, room, digest
        # Its tokenizer lower-cases in most versions of the library; where it does not, we do.
        self.lower = family.lower and self._ids(["A CAT"]) != self._ids(["a cat"])

    def __call__(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return what the text tower takes of texts."""
        found = self.tokenizer(
            self._written(texts),
            padding="max_length" if self.family.fixed else "longest",
            max_length=self.room,
            truncation=True,
            return_tensors="pt",
        )
        wanted = ["input_ids"]
        wanted += ["attention_mask"] if self.family.mask else []
        wanted += ["token_type_ids"] if self.family.types and "token_type_ids" in found else []
        return {name: found[name] for name in wanted}

    def cut(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens of each text do not fit."""
        return [max(0, len(ids) - self.room) for ids in self._ids(self._written(texts))]

    def identity(self) -> tuple[str, ...]:
        """Return texts naming all that decides the token ids."""
        return self.digest, str(self.room)

    def _written(self, texts: Sequence[str]) -> list[str]:
        return [text.lower() for text in texts] if getattr(self, "lower", False) else list(texts)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(texts, verbose=False)["input_ids"]
        return ids


_NOT_OF_TEXTS = ("vision_model.", "visual_projection.", "logit_scale", "logit_bias")


class TransformersVLM(VLM):
    """A model with an image and a text tower, its tokenizer, and the preprocessing of its processor.

    `logit_bias` is what SigLIP adds to its logits: the same for every class, so that only statements on one pair of an
    image and a text need it. `folder` is where the files are that it was read from, `config` what its config says.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self, model: nn.Module, words: Words, how: Preprocessing, folder: Path, *, spec: str, config: str
    ) -> None:
        scale: Any = model.logit_scale
        super().__init__(spec=spec, logit_scale=float(scale.detach().float().exp()), **how.framing.options())
        bias: Any = getattr(model, "logit_bias", None)
        self.logit_bias = None if bias is None else float(bias.detach())
        self.model, self.words, self.how, self.folder, self.config = model, words, how, folder, config
        _take_channels(self, how)
        self.eval().requires_grad_(False)

    def _image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        return pooled(self._call("get_image_features", **_image_input(self, self.how, pixels)), "the image tower")

    def _text_features(self, texts: list[str]) -> torch.Tensor:
        given = {name: tensor.to(self.device) for name, tensor in self.words(texts).items()}
        return pooled(self._call("get_text_features", **given), "the text tower")

    @property
    def text_fingerprint(self) -> str:
        """Digest of the text tower and the tokenizer: models whose image tower alone was trained share it."""
        texts = {name: value for name, value in self.model.state_dict().items() if not name.startswith(_NOT_OF_TEXTS)}
        return self._digest("text", texts, ("text", *self._identity()))

    def cut_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens of each text are cut off at the context length."""
        return self.words.cut(texts)

    def _call(self, name: str, **given: torch.Tensor) -> Any:
        method: Any = getattr(self.model, name)
        return method(**given)

    def _identity(self) -> Iterable[str]:
        return type(self.model).__name__, self.config, *self.words.identity()


def _take_channels(vlm: VLM, how: Preprocessing) -> None:
    vlm.register_buffer("mean", torch.tensor(how.mean, dtype=torch.float32).view(1, -1, 1, 1))
    vlm.register_buffer("std", torch.tensor(how.std, dtype=torch.float32).view(1, -1, 1, 1))


def _image_input(vlm: Any, how: Preprocessing, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what an image tower takes of pixels in [0, 1] at its own size; differentiable."""
    values = (pixels - vlm.mean) / vlm.std
    if not how.patch:
        return {"pixel_values": values}
    grid = [side // how.patch for side in sides(how.framing.image_size)]
    rows = patches(values, how.patch)
    return {
        "pixel_values": rows,
        "pixel_attention_mask": torch.ones(rows.shape[:2], dtype=torch.int32, device=rows.device),
        "spatial_shapes": torch.tensor([grid], device=rows.device).expand(len(rows), 2),
    }


# An image tower on its own, or beside the text tower of another model


class TowerVLM(VLM):
    """An image tower, with the text side of another model or none.

    Args:
        tower: gives image features of its inputs.
        text: the model whose texts share the space; without one, texts are refused.
        weight, bias: a linear map of image features [D_image] into the text side's space [D_text].
        mapped: that map says itself that it leads into the space of this text side.
    """

    mean: torch.Tensor
    std: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(
        self,
        tower: nn.Module,
        how: Preprocessing,
        folder: Path,
        *,
        spec: str,
        config: str,
        text: VLM | None = None,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        mapped: bool = False,
    ) -> None:
        super().__init__(spec=spec, logit_scale=1.0 if text is None else text.logit_scale, **how.framing.options())
        self.logit_bias = None if text is None else text.logit_bias
        self.remarks = () if text is None or mapped else (_unchecked(spec, text.spec),)
        self.tower, self.text, self.how, self.folder, self.config = tower, text, how, folder, config
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        _take_channels(self, how)
        self.eval().requires_grad_(False)

    def _image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        features = image_features(self.tower, _image_input(self, self.how, pixels))
        return features if self.weight is None else nn.functional.linear(features, self.weight, self.bias)

    def _text_features(self, texts: list[str]) -> torch.Tensor:
        if self.text is None:
            raise UserError(
                f"'{self.spec}' is an image tower without a text side: name the model whose texts share its space, as "
                f"{self.spec}@MODEL, or ask for features alone (from Python: perturb with goal='feature')"
            )
        return self.text.embed_text(texts)

    @property
    def text_fingerprint(self) -> str:
        return self.fingerprint if self.text is None else self.text.text_fingerprint

    def cut_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens of each text are cut off at the context length."""
        return [0] * len(texts) if self.text is None else self.text.cut_tokens(texts)

    def _state(self) -> Mapping[str, object]:
        own = dict(self.state_dict())
        if self.text is None:
            return own
        # A model knows best what its own weights are, be they out of a state dict's sight.
        theirs = {f"text.{name}": value for name, value in self.text._state().items()}
        return {name: value for name, value in own.items() if not name.startswith("text.")} | theirs

    def _identity(self) -> Iterable[str]:
        return type(self.tower).__name__, self.config, *(() if self.text is None else self.text.design)


def _unchecked(spec: str, text: str) -> str:
    return (
        f"nothing shows that the image tower of '{spec}' and the texts of '{text}' share one space, only their "
        f"dimensions agree: if they do not, every figure here is chance; compare clean accuracy with that of '{text}'"
    )


def image_features(tower: nn.Module, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the pooled features [B, D] of an image tower: projected ones if it has them, else as it pools."""
    output: Any = tower(**given)
    if (projected := getattr(output, "image_embeds", None)) is not None:
        return pooled(projected, "the image tower")
    if getattr(tower.config, "model_type", None) in NO_POOLER:
        return pooled(output.last_hidden_state[:, 0], "the image tower")
    return pooled(output, "the image tower")
