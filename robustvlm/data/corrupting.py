"""The fifteen common corruptions as functions of pixels (Hendrycks and Dietterich 2019, arXiv 1903.12261).

Every function takes an image [H, W, 3] in [0, 1], the numbers that its severity means, the unit (how many pixels a
length of 1 is, 1 on images of the side that severities are defined for) and a source of draws, and returns the image
changed; values outside [0, 1] are cut off by the caller. Written from the paper's formulas. Three differ from its
program: the ice of `frost` is drawn here, where ImageNet-C lays photographs of ice over the image, `fog`'s clouds are a
sum of octaves where it has the diamond-square algorithm, and in `glass_blur` pixels change places, where one of the two
was lost in it.
"""

# ruff: noqa: ARG001 - all kinds are called alike, and not each needs the unit or draws

import io
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.float64]
Draws = np.random.Generator
Level = Sequence[float]

# Noise


def gaussian_noise(image: Array, level: Level, unit: float, random: Draws) -> Array:
    """Add normal noise; level: its standard deviation."""
    return image + level[0] * random.standard_normal(image.shape)


def shot_noise(image: Array, level: Level, unit: float, random: Draws) -> Array:
    """Count photons; level: how many white is."""
    return random.poisson(image * level[0]) / level[0]


def impulse_noise(image: Array, level: Level, unit: float, random: Draws) -> Array:
    """Set values to black or white, as often the one as the other; level: the share of them."""
    drawn = random.random(image.shape)
    return np.where(drawn < level[0] / 2, 0.0, np.where(drawn > 1 - level[0] / 2, 1.0, image))


# Blur


def defocus_blur(image: Array, level: Level, unit: float, random: Draws) -> Array:
    """Average over a disc with a soft edge; level: radius, standard deviation of the edge."""
    from scipy.ndimage import gaussian_filter

    radius = level[0] * unit
    soft = 1 if radius <= 8 else 2
    reach = math.floor(radius) + soft
    across = np.arange(-reach, reach + 1)
    disc = (across[:, None] ** 2 + across[None, :] ** 2 <= radius**2).astype(np.float64)
    kernel = gaussian_filter(disc, level[1], radius=soft, mode="constant")
    around = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    shape = (around.shape[0], around.shape[1])
    waves = np.fft.rfft2(around, axes=(0, 1)) * np.fft.rfft2(kernel / kernel.sum(), shape)[..., None]
    return np.fft.irfft2(waves, shape, axes=(0, 1))[2 * reach :, 2 * reach :]


def glass_blur(image: Array, level: Level, unit: float, random: Draws) -> Array:
    """Blur, let every pixel change places with one near it, and blur; level: deviation, distance, how often."""
    height, width = image.shape[:2]
    reach = min(max(1, round(level[1] * unit)), (min(height, width) - 1) // 2)
    blurred = _gaussian(image, level[0] * unit)
    if reach < 1:
        return blurred
    place = list(range(height * width))
    rows, columns = range(height - reach, reach, -1), range(width - reach, reach, -1)
    for _ in range(int(level[2])):
        steps = random.integers(-reach, reach, size=(len(rows), len(columns), 2))
        jumps = (steps[..., 0] * width + steps[..., 1]).tolist()
        for row, line in zip(rows, jumps, strict=True):
            for here, jump in zip(
                range(row * width + columns.start, row * width + columns.stop, -1), line, strict=True
            ):
                there = here + jump
                place[here], place[there] = place[there], place[here]
    return _gaussian(blurred.reshape(-1, 3)[place].reshape(image.shape), level[0] * unit)


def motion_blur(image: Array, level: Level, unit: float, random: Draws) -> Array:
    """Draw the image out along a line at most 45 degrees from the horizontal; level: radius, standard deviation."""
    return _drawn_out(image, level[0] * unit, level[1] * unit, random.uniform(-45, 45))


def zoom_blur(image: Array, level: Level, unit: float, random: Draws) -> Array:
    """Average the image, and the image at ever larger scales; level: the largest scale, the step."""
    scales = np.arange(1.0, level[0] + level[1] / 2, level[1])
    theta = torch.zeros(len(scales), 2, 3, dtype=torch.float64)
    theta[:, 0, 0] = theta[:, 1, 1] = torch.from_numpy(1.0 / scales)
    planes = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).expand(len(scales), -1, -1, -1)
    grid = F.affine_grid(theta, list(planes.shape), align_corners=False)
    larger = F.grid_sample(planes, grid, padding_mode="border", align_corners=False).sum(dim=0)
    return (image + larger.numpy().transpose(1, 2, 0)) / (len(scales) + 1)


# Weather


def snow(image: Array, level: Level, unit: float, random: Draws) -> Array:
    """Whiten the image and let flakes fall through it, from two sides.

    Level: mean, deviation, size and threshold of the flakes, radius and deviation of their fall, what is left of the
    image's colours.
    """
    mean, deviation, size, threshold, radius, sigma, kept = level
    scale = max(1.0, size * unit)
    height, width = image.shape[:2]
    coarse = random.normal(mean, deviation, (math.ceil(height / scale), math.ceil(width / scale)))
    flakes = _resized(coarse, math.ceil(coarse.shape[0] * scale), math.ceil(coarse.shape[1] * scale))[:height, :width]
    flakes = np.where(flakes < threshold, 0.0, flakes).clip(0.0, 1.0)[..., None]
    flakes = _drawn_out(flakes, radius * unit, sigma * unit, random.uniform(-135, -45))
    grey = (image @ _GREY)[..., None]
    whiter = kept * image + (1 - kept) * np.maximum(image, 1.5 * grey + 0.5)
    return whiter + flakes + flakes[::-1, ::-1]


def frost(image: Array, level: Level, unit: float, random: Draws) -> Array:
    """Lay ice over the image; level: weight of the image, weight of the ice."""
    return level[0] * image + level[1] * _ice(image.shape[0], image.shape[1], random)


def fog(image: Array, level: Level, unit: float, random: Draws) -> Array:
    """Mix the image with bright clouds; level: how thick, by how much clouds of half the size are weaker (twice)."""
    brightest = image.max()
    thick = image + level[0] * _clouds(image.shape[0], image.shape[1], level[1], random)[..., None]
    return thick * brightest / (brightest + level[0])


def brightness(image: Array, level: Level, unit: float, random: Draws) -> Array:
    """Raise the value (the largest of the three channels), hue and saturation kept; level: by how much."""
    value = image.max(axis=2, keepdims=True)
    raised = np.minimum(value + level[0], 1.0)
    return np.where(value > 0, image * raised / np.where(value > 0, value, 1.0), raised)


# Digital


def contrast(image: Array, level: Level, unit: float, random: Draws) -> Array:
    """Move every value towards its channel's mean; level: what is left of the distance."""
    mean = image.mean(axis=(0, 1), keepdims=True)
    return (image - mean) * level[0] + mean


def elastic_transform(image: Array, level: Level, unit: float, random: Draws) -> Array:
    """Skew the image and stretch parts of it; level, in sides: strength and size of the stretching, and the skew.

    What ImageNet-C calls severity is not one scale here: the first two stretch the whole, the last three small parts.
    """
    from scipy.ndimage import map_coordinates

    height, width = image.shape[:2]
    side = min(height, width)
    strength, size, skew = (share * side for share in level)
    centre, third = np.array([width // 2, height // 2]), side // 3
    corners = centre + third * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = corners + random.uniform(-skew, skew, corners.shape)
    # From where a pixel comes: the affine map that takes the moved corners back.
    back = np.linalg.lstsq(np.hstack([moved, np.ones((3, 1))]), corners.astype(np.float64), rcond=None)[0]
    across, down = np.meshgrid(np.arange(width, dtype=np.float64), np.arange(height, dtype=np.float64))
    stretch = [strength * _gaussian(random.uniform(-1, 1, (height, width)), size, truncate=3) for _ in range(2)]
    across, down = across + stretch[0], down + stretch[1]
    come = [across * back[0, k] + down * back[1, k] + back[2, k] for k in (1, 0)]
    planes = [map_coordinates(image[..., k], come, order=1, mode="mirror") for k in range(3)]
    return np.stack(planes, axis=2)


def pixelate(image: Array, level: Level, unit: float, random: Draws) -> Array:
    """Make the image smaller and large again, in blocks; level: the scale of the smaller one.

    With a unit above 1 blocks grow with it.
    """
    height, width = image.shape[:2]
    scale = level[0] / max(1.0, unit)
    small = (max(1, int(width * scale)), max(1, int(height * scale)))
    picture = _picture(image).resize(small, Image.Resampling.BOX).resize((width, height), Image.Resampling.BOX)
    return np.asarray(picture, dtype=np.float64) / 255


def jpeg_compression(image: Array, level: Level, unit: float, random: Draws) -> Array:
    """Write the image as JPEG and read it; level: the quality."""
    written = io.BytesIO()
    _picture(image).save(written, "JPEG", quality=int(level[0]))
    with Image.open(written) as picture:
        return np.asarray(picture.convert("RGB"), dtype=np.float64) / 255


KINDS: dict[str, Callable[[Array, Level, float, Draws], Array]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        gaussian_noise, shot_noise, impulse_noise, defocus_blur, glass_blur, motion_blur, zoom_blur, snow, frost, fog,
        brightness, contrast, elastic_transform, pixelate, jpeg_compression,
    )
}  # fmt: skip

# What they are made of

_GREY = np.array([0.299, 0.587, 0.114])
_TINT = np.array([0.86, 0.99, 1.05])
"""What colour ice is, beside its brightness."""


def _picture(image: Array) -> Image.Image:
    return Image.fromarray(np.rint(255 * image.clip(0, 1)).astype(np.uint8))


def _gaussian(values: Array, sigma: float, *, truncate: float = 4) -> Array:
    """Return a field [H, W] or an image [H, W, 3] blurred along height and width."""
    from scipy.ndimage import gaussian_filter

    deviations = (sigma, sigma, 0)[: values.ndim]
    return np.asarray(gaussian_filter(values, deviations, mode="reflect", truncate=truncate))


def _resized(field: Array, height: int, width: int) -> Array:
    """Return a field at another size, linear between its values, corners on corners."""
    plane = torch.from_numpy(field)[None, None]
    return F.interpolate(plane, (height, width), mode="bilinear", align_corners=True)[0, 0].numpy()


def _drawn_out(image: Array, radius: float, sigma: float, degrees: float) -> Array:
    """Return the mean of an image [H, W, C] and its copies along a half line, by a Gaussian to twice the radius."""
    count = 2 * max(1, round(radius)) + 1
    weights = np.exp(-(np.arange(count) ** 2) / (2 * max(sigma, 1e-3) ** 2))
    weights /= weights.sum()
    height, width = image.shape[:2]
    around = np.pad(image, ((count, count), (count, count), (0, 0)), mode="edge")
    found = np.zeros_like(image)
    for distance, weight in enumerate(weights):
        down = count + round(distance * math.sin(math.radians(degrees)))
        across = count + round(distance * math.cos(math.radians(degrees)))
        found += weight * around[down : down + height, across : across + width]
    return found


def _clouds(height: int, width: int, decay: float, random: Draws) -> Array:
    """Return a field of clouds in [0, 1]: grids of uniform draws, each twice as fine and decay² times weaker."""
    field, weight = np.zeros((height, width)), 1.0
    for octave in range(1, max(2, math.ceil(math.log2(max(height, width)))) + 1):
        drawn = random.uniform(-1, 1, (2**octave + 1, 2**octave + 1))
        field += weight * _resized(drawn, height, width)
        weight /= decay**2
    spread = field.max() - field.min()
    # One pixel has no darkest and no brightest place: there it is as dense as in the middle.
    return (field - field.min()) / spread if spread > 0 else np.full_like(field, 0.5)


def _ice(height: int, width: int, random: Draws) -> Array:
    """Return drawn ice [H, W, 3]: needles in six directions on a cloudy ground, as bright as photographs of it are."""
    side = min(height, width)
    ground = _clouds(height, width, 1.4, random)
    start = random.uniform(0, 60)
    needles = np.zeros((height, width, 1))
    for direction in range(6):
        seeds = (random.random((height, width, 1)) < 0.01).astype(np.float64)
        needle = _drawn_out(seeds, side / 8, side / 12, start + 60 * direction)
        needles = np.maximum(needles, needle / needle.max() if needle.max() > 0 else needle)
    pattern = ground + needles[..., 0]
    even = (pattern - pattern.mean()) / max(float(pattern.std()), 1e-6)
    bright = random.uniform(0.5, 0.8)
    found: Array = ((bright + 0.14 * even)[..., None] * _TINT).clip(0, 1)
    return found
