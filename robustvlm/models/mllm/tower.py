"""The bundled CLIP's image tower as transformers builds it into a LLaVA; imported with the `hub` extra alone."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

MODEL_TYPE = "robustvlm_tiny_tower"
GRID = 4
TOKENS = 1 + GRID * GRID
"""The pooled feature, and a grid of 4 x 4 places."""


class TinyTowerConfig(PretrainedConfig):
    """Sizes of the tower; `base` names the bundled model whose weights it takes where a folder leaves them out."""

    model_type = MODEL_TYPE

    def __init__(
        self,
        hidden_size: int = 1152,
        image_size: int = 64,
        patch_size: int = 16,
        width: int = 24,
        layers: tuple[int, ...] = (2, 2, 2, 2),
        embed_dim: int = 192,
        heads: int = 16,
        num_hidden_layers: int = 1,
        base: str = "tiny",
        **kwargs: Any,
    ) -> None:
        self.hidden_size, self.image_size, self.patch_size = hidden_size, image_size, patch_size
        self.width, self.layers, self.embed_dim, self.heads = width, list(layers), embed_dim, heads
        self.num_hidden_layers, self.base = num_hidden_layers, base
        super().__init__(**kwargs)


class TinyTower(PreTrainedModel):
    """open_clip's ModifiedResNet as a LLaVA tower: pixels [B, 3, 64, 64] in [0, 1] to tokens [B, 17, 1152].

    Token 0 is the pooled CLIP feature, filled up with zeros; tokens 1 to 16 are the places of a 4 x 4 grid, the third
    stage's channels beside the fourth's, each channel standardised by fixed numbers. All have the norm sqrt(1152),
    so that a mean of unit tokens, brought back to that norm, is what the language model was trained on.
    """

    config_class = TinyTowerConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True
    centre: Tensor
    spread: Tensor

    def __init__(self, config: TinyTowerConfig) -> None:
        super().__init__(config)
        from open_clip.modified_resnet import ModifiedResNet

        self.visual: Any = ModifiedResNet(
            config.layers, config.embed_dim, config.heads, config.image_size, config.width
        )
        self.register_buffer("centre", torch.zeros(config.hidden_size))
        self.register_buffer("spread", torch.ones(config.hidden_size))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        del module

    def stages(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pooled feature [B, E] and the grid [B, 16, D] before its channels are standardised."""
        net = self.visual
        third = net.layer3(net.layer2(net.layer1(net.stem(pixels))))
        fourth = net.layer4(third)
        wide = fourth.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return net.attnpool(fourth), torch.cat([third, wide], 1).flatten(2).transpose(1, 2)

    def tokens(self, pooled: Tensor, grid: Tensor) -> Tensor:
        """Return the tokens [B, 17, D] of what `stages` gives."""
        first = F.pad(pooled, (0, self.config.hidden_size - pooled.shape[-1]))[:, None]
        rows = torch.cat([first, (grid - self.centre) / self.spread], 1)
        return F.normalize(rows, dim=-1) * math.sqrt(self.config.hidden_size)

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Return the tokens as the last and only hidden state."""
        del kwargs
        pooled, grid = self.stages(pixel_values)
        tokens = self.tokens(pooled, grid)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=pooled, hidden_states=(tokens,) * 2)


def register() -> None:
    """Make the tower known to the library's automatic classes."""
    AutoConfig.register(MODEL_TYPE, TinyTowerConfig, exist_ok=True)
    AutoModel.register(TinyTowerConfig, TinyTower, exist_ok=True)
