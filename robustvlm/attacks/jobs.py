"""What goes into the lanes and what comes out: one job and one result per image."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from robustvlm.errors import UserError

FOOLED, ROBUST, FAILED = "fooled", "robust", "failed"

# Decoding and resizing in float32 may leave [0, 1] by this much.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Job:
    """One image to attack.

    Args:
        image_id: stable name; with the run's seed it determines every random draw made for this image.
        index: position in the data set, carried through to the result.
        pixels: clean image [3, H, W] in [0, 1]; excursions of a rounding error are clipped.
        label: true class; -1 when it is none of the classes.
        targets: classes for targeted sub-runs, the likeliest first.
        reference: what the goal has to know of the clean image (its feature), a vector [R], or None.

    Raises:
        UserError: the pixels are no floats, or not in [0, 1].
    """

    image_id: str
    index: int
    pixels: Tensor = field(repr=False)
    label: int
    targets: tuple[int, ...] = ()
    reference: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.pixels.is_floating_point():
            raise UserError(f"image '{self.image_id}' has pixels of {self.pixels.dtype}: divide 8-bit images by 255")
        low, high = (float(bound) for bound in self.pixels.aminmax())
        if low >= 0 and high <= 1:
            return
        if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
            raise UserError(
                f"image '{self.image_id}' has pixels from {low:.4g} to {high:.4g}, expected [0, 1]: divide 8-bit "
                "images by 255, and leave normalisation by mean and standard deviation to the model"
            )
        object.__setattr__(self, "pixels", self.pixels.clamp(0, 1))


@dataclass(frozen=True)
class Result:
    """The answer for one image.

    Args:
        outcome: "fooled" when the goal was reached, "robust", or "failed" when the model's output was not finite.
        prediction: class predicted at the recorded point; -1 for a rejected image.
        confidence: softmax probability of the leading class.
        margin: the goal's margin there; the lowest met unless the image was fooled at once.
        cosine: the cosine that a feature goal is about, there; None for other goals.
        steps: gradient steps made over all sub-runs.
        passes: encoder passes spent on this image, forward and backward counted as one each.
        run: sub-run (restart or target) that holds the recorded point.
        linf, l2: norms of the recorded perturbation in pixel units.
        seconds: the image's share of the wall time of the batches it rode in.
        adversarial: recorded point [3, H, W], the first success or the point of lowest margin.
    """

    job: Job
    outcome: str
    prediction: int
    confidence: float
    margin: float
    cosine: float | None
    steps: int
    passes: int
    run: int
    linf: float
    l2: float
    seconds: float
    adversarial: Tensor = field(repr=False)
