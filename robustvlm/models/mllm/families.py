"""Types of multimodal models in transformers: how pixels become image tokens, and how the language model reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from robustvlm.errors import UserError
from robustvlm.models.transformers_load import checked_preprocessing
from robustvlm.models.transformers_pixels import Preprocessing


@dataclass(frozen=True)
class Family:
    """One type: an image tower, a projector, and a language model in whose input projected tokens take a place.

    Args:
        layers, drop_first: the tower's hidden states that are used, and whether their first token is left out.

    Attributes:
        model: class of transformers.
        chats: whether its prompts come from a chat template; else a question stands behind the image as it is.
        plain: the prompt of a folder without a template; "": it must have one.
        opening, closing: names of the tokenizer's tokens before and behind an image, which its processor adds.
        settings: what its processor is told, so that an image is one square.
        image_sees_itself: image tokens see each other both ways. prompt_sees_itself: all of the prompt does.
        first_place: position of the first token.
        generates: whether the library's `generate` takes a prompt that has the image in it already.
    """

    layers: tuple[int, ...] = (-1,)
    drop_first: bool = False

    model: ClassVar[str]
    chats: ClassVar[bool] = True
    plain: ClassVar[str] = ""
    opening: ClassVar[str] = ""
    closing: ClassVar[str] = ""
    settings: ClassVar[Mapping[str, bool]] = {}
    image_sees_itself: ClassVar[bool] = False
    prompt_sees_itself: ClassVar[bool] = False
    first_place: ClassVar[int] = 0
    generates: ClassVar[bool] = True

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Family:
        """Return the family as a model's config sets it."""
        del config
        return cls()

    def tokens(self, net: Any, images: Tensor) -> Tensor:
        """Return image tokens [B, T, D] of normalised images [B, 3, S, S], as the projector receives them."""
        found: Tensor = net.vision_tower(images).last_hidden_state
        return found

    def project(self, net: Any, tokens: Tensor) -> Tensor:
        """Return what stands in the language model's input [B, P, H] for image tokens [B, T, D]."""
        found: Tensor = net.multi_modal_projector(tokens)
        return found

    def sees(self, before: int, image: int, after: int, further: int, device: torch.device) -> Tensor:
        """Return, bool [S, S], which token of prompt and `further` ones sees which: those before it, and see above."""
        whole = before + image + after + further
        mask = torch.ones(whole, whole, dtype=torch.bool, device=device).tril()
        if self.image_sees_itself:
            mask[before : before + image, before : before + image] = True
        if self.prompt_sees_itself:
            mask[: whole - further, : whole - further] = True
        return mask

    def places(self, before: int, image: int, after: int, depth: Tensor) -> Tensor:
        """Return the positions [S], or [3, S], of a prompt's tokens and of further ones, `depth` [L] behind it."""
        prompt = before + image + after
        return torch.cat([torch.arange(prompt, device=depth.device), prompt + depth]) + self.first_place

    def inputs(self, images: Tensor, before: int, image: int, after: int) -> dict[str, Tensor]:
        """Return what the library's own forward is given of a normalised image [1, 3, S, S], besides the prompt."""
        given = {"pixel_values": images}
        if self.image_sees_itself or self.prompt_sees_itself:
            kinds = torch.zeros(1, before + image + after, dtype=torch.long, device=images.device)
            if self.image_sees_itself:
                kinds[:, before : before + image] = 1
            given["token_type_ids"] = kinds
        return given

    def preprocessing(self, processor: Any, spec: str) -> Preprocessing:
        """Return what the family's image processor does to images, compared with what it says."""
        return checked_preprocessing(processor, spec)

    def write(self, tokenizer: Any, image: str, asked: str) -> str:
        """Return a prompt with the marks that the family's processor puts around an image.

        Args:
            image: the image token. asked: the prompt as the chat template gives it; the image and the question of what
                has none.
        """
        del tokenizer, image
        return asked

    @property
    def identity(self) -> tuple[str, ...]:
        """What of it decides features, besides the config."""
        return repr(self.layers), str(self.drop_first)


@dataclass(frozen=True)
class Llava(Family):
    """LLaVA 1 and 1.5: a hidden layer of the tower (or several side by side), CLIP's first token left out."""

    layers: tuple[int, ...] = (-2,)
    drop_first: bool = True
    plain = "USER: <image>\n{question} ASSISTANT:"
    model = "LlavaForConditionalGeneration"

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Family:
        """Return the layers that the config names; without, those of LLaVA-1.5."""
        layers = config.get("vision_feature_layer", -2)
        first = config.get("vision_feature_select_strategy", "default") == "default"
        return cls(tuple(layers) if isinstance(layers, list) else (int(layers),), first)

    def tokens(self, net: Any, images: Tensor) -> Tensor:
        """Return the chosen hidden states, side by side."""
        states = net.vision_tower(images, output_hidden_states=True).hidden_states
        if states is None or any(states[layer] is None for layer in self.layers):
            raise UserError("the image tower does not give its hidden states under this version of transformers")
        kept = torch.cat([states[layer] for layer in self.layers], dim=-1)
        return kept[:, 1:] if self.drop_first else kept


@dataclass(frozen=True)
class VipLlava(Llava):
    """ViP-LLaVA: several hidden layers of CLIP's tower, whose first token is always left out."""

    model = "VipLlavaForConditionalGeneration"

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Family:
        """Return the layers that the config names; without, the paper's."""
        layers = config.get("vision_feature_layers", config.get("vision_feature_layer", [-2, -5, -8, -11, 6]))
        return cls(tuple(layers) if isinstance(layers, list) else (int(layers),), True)


@dataclass(frozen=True)
class InternVL(Family):
    """InternVL 2.5 and 3 as transformers has them, of one tile: a square of neighbours side by side is one token."""

    drop_first: bool = True
    ratio: float = 0.5
    model = "InternVLForConditionalGeneration"
    opening, closing = "start_image_token", "end_image_token"
    settings: ClassVar[Mapping[str, bool]] = {"crop_to_patches": False}

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Family:
        """Return the layer and the ratio by which the grid of tokens shrinks."""
        layer = config.get("vision_feature_layer", -1)
        first = config.get("vision_feature_select_strategy", "default") == "default"
        return cls((int(layer),), first, float(config.get("downsample_ratio", 0.5)))

    def tokens(self, net: Any, images: Tensor) -> Tensor:
        """Return the tower's tokens after the grid was folded."""
        if self.layers == (-1,):
            found = net.vision_tower(images).last_hidden_state
        else:
            found = net.vision_tower(images, output_hidden_states=True).hidden_states[self.layers[0]]
        found = found[:, 1:] if self.drop_first else found
        side = math.isqrt(found.shape[1])
        folded: Tensor = net.pixel_shuffle(
            found.reshape(len(found), side, side, found.shape[2]), scale_factor=self.ratio
        )
        return folded.flatten(1, 2)

    def write(self, tokenizer: Any, image: str, asked: str) -> str:
        """Return the prompt with the image between its opening and closing token."""
        return asked.replace(image, f"{_token(tokenizer, self.opening)}{image}{_token(tokenizer, self.closing)}")


@dataclass(frozen=True)
class Gemma3(Family):
    """Gemma 3 without pan and scan: SigLIP's tokens, of which the projector averages squares; an image sees itself."""

    model = "Gemma3ForConditionalGeneration"
    opening, closing = "boi_token", "eoi_token"
    settings: ClassVar[Mapping[str, bool]] = {"do_pan_and_scan": False}
    image_sees_itself = True
    generates = False

    def write(self, tokenizer: Any, image: str, asked: str) -> str:
        """Return the prompt with opening, image and closing token, on lines of their own, for the opening alone."""
        start = _token(tokenizer, self.opening)
        return asked.replace(start, f"\n\n{start}{image}{_token(tokenizer, self.closing)}\n\n")


@dataclass(frozen=True)
class PaliGemma(Family):
    """PaliGemma 1 and 2: image first, then the question on a line; all of the prompt sees all of it."""

    model = "PaliGemmaForConditionalGeneration"
    chats = False
    prompt_sees_itself = True
    first_place = 1
    generates = False

    def write(self, tokenizer: Any, image: str, asked: str) -> str:
        """Return the image, the beginning of the text, and the question; there is no chat."""
        return f"{asked.replace(image, f'{image}{tokenizer.bos_token}', 1)}\n"


def _token(tokenizer: Any, name: str) -> str:
    found = getattr(tokenizer, name, None)
    if not isinstance(found, str):
        raise UserError(f"the tokenizer has no {name}, which its type of model puts beside an image")
    return found
