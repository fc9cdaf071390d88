"""Radii that a certify run may have beside its own, each in a column of its own, and what tables call them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """What a column of radii is called.

    Attributes:
        title: in the terminal. page: in the report. short: in narrow tables. about: which claim it is about.
    """

    title: str
    page: str
    short: str = ""
    about: str = ""


_PILOT = "cosine to the pilot's direction, another claim"

RADII: dict[str, Column] = {
    "radius": Column("this claim", "this certificate"),
    "deployed_radius": Column(
        "deployed copies", "deployed copies", "deployed", "what finitely many fresh copies keep of this claim"
    ),
    "cone_radius": Column("cone (T3)", "cone (T3)", "T3", "the same claim, closed form"),
    "paper_radius": Column(
        "paper's bound", "paper's bound", "paper", "cosine to the image's own feature f(x), another claim"
    ),
    "fcsb_radius": Column("corrected FCSB", "corrected FCSB", "FCSB", _PILOT),
    "cdf_radius": Column("distribution (T5)", "distribution (T5)", "T5", _PILOT),
    "direction_radius": Column("distribution + covariance (F3)", "distribution and covariance", "F3", _PILOT),
    "mean_radius": Column("mean margins", "mean margins only", "means", "the same claim from means alone"),
}
"""By the name of the column in `results.parquet`."""
