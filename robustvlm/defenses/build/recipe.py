"""What a pipeline is put together from, and the order in which its parts stand."""

from __future__ import annotations

from dataclasses import dataclass

from robustvlm.defenses.pipeline import Operation, check_operations, split_spec
from robustvlm.errors import UserError

KIND_OF = {"purify": "purify", "immunize": "immunize"}
"""For every part that is a run: the kind of run that it has to be."""


@dataclass(frozen=True)
class Recipe:
    """The parts of a pipeline: purifier, encoder, mapper, smoothing, immunised head.

    Args:
        encoder: spec of the encoder, plain or robust, without operators.
        purify: folder of a purify run: purifier and mapper.
        smooth: noise and samples as `SIGMA[:N0]`.
        immunize: folder of an immunize run: adapter, prototypes, antibodies and thresholds.

    Raises:
        UserError: an operator on the encoder, or nothing to build.

    Example:
        >>> Recipe("tiny", smooth="0.25:32").smoothing
        (Operation(name='smooth', arguments=('0.25', '32')),)
    """

    encoder: str
    purify: str | None = None
    smooth: str | None = None
    immunize: str | None = None

    def __post_init__(self) -> None:
        operations = split_spec(self.encoder)[1]
        if operations:
            advice = "pass --smooth instead" if operations[0].name == "smooth" else "leave it out"
            raise UserError(f"the encoder '{self.encoder}' comes with an operator, +{operations[0]}: {advice}")
        check_operations(f"--smooth {self.smooth}", self.smoothing)
        if not (self.purify or self.smooth or self.immunize):
            raise UserError("nothing to build: pass --purify RUN, --smooth SIGMA or --immunize RUN")

    @property
    def smoothing(self) -> tuple[Operation, ...]:
        """The smoothing as an operation, if there is one."""
        return smoothing_of(self.smooth)

    @property
    def sigma(self) -> float | None:
        """Noise level of the smoothing, None without one."""
        return float(self.smoothing[0].arguments[0]) if self.smoothing else None

    @property
    def parts(self) -> tuple[tuple[str, str], ...]:
        """Name and folder of the parts that are runs, in the order in which they stand on each other."""
        named = (("purify", self.purify), ("immunize", self.immunize))
        return tuple((name, folder) for name, folder in named if folder is not None)


def smoothing_of(smooth: str | None) -> tuple[Operation, ...]:
    """Return `SIGMA[:N0]` as an operation, nothing for None.

    Example:
        >>> smoothing_of("0.25")
        (Operation(name='smooth', arguments=('0.25',)),)
    """
    return () if smooth is None else (Operation("smooth", tuple(smooth.split(":"))),)
