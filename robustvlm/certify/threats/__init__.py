"""Threats and the noise that certifies against them: `--threat NAME`, or `+smooth:NAME=SIGMA` as part of a model.

Example:
    >>> sorted(THREATS)
    ['8bit', 'brightness', 'colour', 'contrast', 'gamma', 'l1', 'l2', 'light', 'rotation', 'translation']
"""

from robustvlm.certify.threats.base import Move, Moving, Noise, Threat
from robustvlm.certify.threats.ellipsoids import Ellipsoid, Pixels, Spectrum
from robustvlm.certify.threats.integers import Integers
from robustvlm.certify.threats.light import Brightness, Colour, Contrast, Gamma, Light
from robustvlm.certify.threats.pixels import L1, L2
from robustvlm.certify.threats.plane import Rotation, Translation
from robustvlm.core import PLAIN
from robustvlm.errors import UserError, nearest

_KINDS: tuple[type[Threat], ...] = (L2, Integers, L1, Brightness, Contrast, Light, Gamma, Colour, Translation, Rotation)
THREATS: dict[str, Threat] = {kind.name: kind() for kind in _KINDS}
"""All threats that are a name alone."""

FAMILIES: dict[str, type[Pixels | Spectrum]] = {kind.kind_name: kind for kind in (Pixels, Spectrum)}
"""Threats with scales of their own, which are written behind the name: `ellipsoid@1,1,2`."""


def find_threat(name: str | None) -> Threat:
    """Return the threat of that name; l2 where none is given.

    Raises:
        UserError: there is no such threat.

    Example:
        >>> find_threat(None).name, find_threat("gamma").unit, find_threat("ellipsoid@2,2,4.0").name
        ('l2', 'gamma: natural logarithm of the exponent', 'ellipsoid@2,2,4')
    """
    if name is None:
        return THREATS[PLAIN]
    if name in THREATS:
        return THREATS[name]
    family, _, scales = name.partition("@")
    if family not in FAMILIES:
        raise UserError(f"unknown threat '{name}': {nearest(family, [*THREATS, *FAMILIES])}")
    if not scales:
        raise UserError(f"the threat {family} has scales: write {FAMILIES[family].form}")
    return FAMILIES[family](scales)


def read_noise(text: str) -> Noise:
    """Return the noise that is written SIGMA (l2) or THREAT=SIGMA.

    Raises:
        UserError: there is no such threat, or sigma is no number or out of range.

    Example:
        >>> read_noise("translation=4").sigma
        4.0
    """
    name, sign, level = text.rpartition("=")
    threat = find_threat(name if sign else None)
    try:
        sigma = float(level)
    except ValueError:
        raise UserError(f"sigma must be a number, got '{level}': as 0.25, or brightness=0.2") from None
    return Noise.of_model(threat, sigma)


__all__ = [
    "FAMILIES", "PLAIN", "THREATS", "Ellipsoid", "Move", "Moving", "Noise", "Rotation", "Threat", "find_threat",
    "read_noise",
]  # fmt: skip
