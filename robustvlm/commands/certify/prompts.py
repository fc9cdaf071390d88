"""Prompts for kept features: how they came about, what that makes of their certificates, and how many copies do."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from robustvlm.certify.claims import pilot_size
from robustvlm.certify.limits import samples_needed
from robustvlm.certify.noise import settings_digest
from robustvlm.errors import UserError
from robustvlm.report.words import count_of

PROMPTS = ("adaptive", "independent")


def why_valid(prompts: str) -> str:
    """Say why prompts of this kind may be certified."""
    if prompts == "adaptive":
        return (
            "The prompts may have been chosen after looking at what these features gave, so the radius comes from "
            "bounds of mean, covariance and reach of the features, which hold for all prompts at once. If they were "
            "fixed without looking, --prompts independent gives the larger radius of the usual certificate; if they "
            "are drawn from names that were, --candidates FILE gives one in between."
        )
    return (
        "You said that the prompts were fixed without looking at what these features gave; the usual certificate "
        "(P1-CDF) is then valid for them. Were they tuned on these results, it would not be."
    )


@dataclass(frozen=True)
class Candidates:
    """The names of which every class list of kept features is drawn; certificates hold for all such lists at once.

    Raises:
        UserError: there are fewer than two, or one stands there twice.

    Example:
        >>> Candidates(("cat", "dog")).require(["cat", "cow"])
        Traceback (most recent call last):
        robustvlm.errors.UserError: the class 'cow' is none of the 2 candidates: draw the classes from ...
    """

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        twice = [name for name, count in Counter(self.names).items() if count > 1]
        if len(self.names) < 2 or twice:
            what = f"'{twice[0]}' stands there twice" if twice else f"got {len(self.names)}"
            raise UserError(f"expected candidates, at least two names, each once: {what}")

    @property
    def digest(self) -> str:
        """What the list is known by."""
        return settings_digest(self.names)

    @property
    def note(self) -> str:
        """What a run says of them."""
        return (
            f"You said that the {len(self.names):,} candidates (digest {self.digest}) were fixed without looking at "
            "what these features gave; the certificates hold for every list of classes that is drawn from them, with "
            "the templates of this run, whenever and however: all pairs of candidates share alpha."
        )

    def require(self, classes: Sequence[str]) -> None:
        """Refuse a class that is no candidate.

        Raises:
            UserError: which.
        """
        known = set(self.names)
        other = [name for name in classes if name not in known]
        if other:
            raise UserError(
                f"the class '{other[0]}' is none of the {len(self.names):,} candidates: draw the classes from them, "
                "spelled alike"
            )


def copies_line(needed: Sequence[float], samples: int) -> str:
    """Say how many noisy copies would certify some radius for half of the images, of the first few; "" if these do.

    Args:
        needed: estimation samples that each image needs, 0 where no number does. samples: kept of each image.

    Example:
        >>> copies_line([900.0, 300.0, 2000.0], 300)
        'With these prompts about 1,100 copies an image would certify a radius for half of...'
    """
    ordered = sorted(need if need > 0.0 else float("inf") for need in needed)
    half = ordered[(len(ordered) - 1) // 2] if ordered else 0.0
    if half <= samples - pilot_size(samples, early=False):
        return ""
    by = f"(by the first {len(ordered)})"
    if half == float("inf"):
        return f"With these prompts no number of copies would certify a radius for half of the images {by}"
    copies = samples_needed(lambda n: float(n - pilot_size(n, early=False)), half)
    more = "make the run again with more, or fix the prompts without looking"
    return (
        f"With these prompts about {count_of(copies or 0, 'copies')} an image would certify a radius for half of the "
        f"images {by}; kept are {samples:,}: {more}"
    )
