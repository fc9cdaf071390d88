"""Qwen2-VL and Qwen2.5-VL with square images: patches as their processor folds them, tokens with rows and columns."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from robustvlm.core.framing import Framing, to_pixels
from robustvlm.core.size import sides
from robustvlm.errors import UserError
from robustvlm.models import transformers_files as files
from robustvlm.models.mllm.families import Family
from robustvlm.models.transformers_pixels import Preprocessing, filter_of, normalisation_of, sides_of, trial_image
from robustvlm.models.weights import brief

MOST_SIDE = 448
"""Longest side in pixels of the squares that images become, where the processor allows for more."""
_ROUNDING = 1e-4


@dataclass(frozen=True)
class Qwen2VL(Family):
    """Qwen2-VL: patches of two equal frames, four neighbours merged into one token, with a row and a column each.

    The tokens are those behind the merger, as the language model reads them, so that nothing projects them.

    Args:
        patch: side of a patch in pixels. merge: patches to a token in each direction. frames: of a patch.
    """

    patch: int = 14
    merge: int = 2
    frames: int = 2
    model: ClassVar[str] = "Qwen2VLForConditionalGeneration"
    generates: ClassVar[bool] = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Family:
        """Return the sizes of patches that the config names."""
        told = config.get("vision_config") or {}
        patch, merge, frames = (
            int(told.get(name, usual))
            for name, usual in (("patch_size", 14), ("spatial_merge_size", 2), ("temporal_patch_size", 2))
        )
        return cls(patch=patch, merge=merge, frames=frames)

    def tokens(self, net: Any, images: Tensor) -> Tensor:
        """Return the merged tokens [B, T, H] in the order of rows."""
        found = net.visual(self.folded(images), grid_thw=self._grid(images))
        merged: Tensor = found if torch.is_tensor(found) else found.pooler_output
        return merged.view(len(images), -1, merged.shape[-1])

    def project(self, net: Any, tokens: Tensor) -> Tensor:
        """Return the tokens: the merger stands in the tower."""
        del net
        return tokens

    def places(self, before: int, image: int, after: int, depth: Tensor) -> Tensor:
        """Return positions [3, S] in time, rows and columns; text counts on in all three, behind the longer side."""
        side, device = math.isqrt(image), depth.device
        rows = torch.arange(side, device=device).repeat_interleave(side)
        columns = torch.arange(side, device=device).repeat(side)
        seen = before + torch.stack([torch.zeros_like(rows), rows, columns])
        behind = before + side + torch.cat([torch.arange(after, device=device), after + depth])
        first = torch.arange(before, device=device)
        return torch.cat([first.expand(3, -1), seen, behind.expand(3, -1)], dim=1)

    def inputs(self, images: Tensor, before: int, image: int, after: int) -> dict[str, Tensor]:
        """Return folded patches, their grid, and which tokens are of the image."""
        kinds = torch.zeros(1, before + image + after, dtype=torch.long, device=images.device)
        kinds[:, before : before + image] = 1
        return {
            "pixel_values": self.folded(images),
            "image_grid_thw": self._grid(images),
            "mm_token_type_ids": kinds,
        }

    def preprocessing(self, processor: Any, spec: str) -> Preprocessing:
        """Return squares of a size that the processor leaves as it is, compared with what it makes of one."""
        size = sides_of(processor.size)
        least = size.get("shortest_edge") or getattr(processor, "min_pixels", None)
        most = size.get("longest_edge") or getattr(processor, "max_pixels", None)
        if not least or not most:
            raise UserError(f"the processor of '{spec}' has size {size}: expected the least and the most pixels")
        unit = self.patch * self.merge
        side = unit * max(math.isqrt(min(int(most), MOST_SIDE**2)) // unit, math.ceil(math.sqrt(least) / unit))
        if side**2 > most:
            raise UserError(f"the processor of '{spec}' asks for {least} to {most} pixels, which no square has")
        mean, std = normalisation_of(processor, spec)
        found = Preprocessing(Framing(side, filter_of(processor, spec)), mean, std)
        self._require_equal(found, processor, spec)
        return found

    def folded(self, images: Tensor) -> Tensor:
        """Return normalised images [B, 3, S, S] as rows of patches [B N, 3 frames patch^2]; neighbours that merge
        follow each other."""
        high, wide = images.shape[2] // self.patch, images.shape[3] // self.patch
        m, p = self.merge, self.patch
        cut = images.reshape(len(images), 3, high // m, m, p, wide // m, m, p).permute(0, 2, 5, 3, 6, 1, 4, 7)
        frames = cut[..., None, :, :].expand(*cut.shape[:6], self.frames, p, p)
        return frames.reshape(len(images) * high * wide, -1)

    def _grid(self, images: Tensor) -> Tensor:
        one = [1, images.shape[2] // self.patch, images.shape[3] // self.patch]
        return torch.tensor([one] * len(images), device=images.device)

    def _require_equal(self, found: Preprocessing, processor: Any, spec: str) -> None:
        high, wide = sides(found.framing.image_size)
        image = trial_image(wide, high)
        try:
            with files.quiet():
                theirs = processor(images=image, return_tensors="pt")["pixel_values"].float()
        except Exception as error:  # a processor with wrong settings fails in any way
            raise UserError(f"the processor of '{spec}' fails on an image: {brief(error)}") from error
        mean, std = (torch.tensor(part).view(1, -1, 1, 1) for part in (found.mean, found.std))
        ours = self.folded((to_pixels(image, found.framing)[None] - mean) / std)
        if ours.shape != theirs.shape or not (ours - theirs).abs().max() <= _ROUNDING * ours.abs().max().clamp_min(1):
            raise UserError(
                f"the processor of '{spec}' ({type(processor).__name__}) gives other patches than its settings say "
                f"(of a square of {high} pixels): use another model"
            )


@dataclass(frozen=True)
class Qwen25VL(Qwen2VL):
    """Qwen2.5-VL: the same of another tower."""

    model: ClassVar[str] = "Qwen2_5_VLForConditionalGeneration"
