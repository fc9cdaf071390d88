"""Images that teach and images that judge must be others: what is known of that before any of them is looked at."""

from __future__ import annotations

import os
from collections.abc import Iterable

from robustvlm.data import DataSource
from robustvlm.data.source import select
from robustvlm.data.specs import parse_spec
from robustvlm.errors import UserError


def same_place(first: str, second: str) -> bool:
    """Whether equal ids mean equal images: ids of files are relative to their folder, those of emoji stand alone.

    Example:
        >>> same_place("emoji?split=train", "emoji?copies=1"), same_place("imagefolder:a/", "imagefolder:b/../a")
        (True, True)
        >>> same_place("imagefolder:a", "imagefolder:b")
        False
    """
    one, other = parse_spec(first), parse_spec(second)
    if one.kind != other.kind:
        return False
    return one.kind == "emoji" or (_resolved(one.rest), one.options) == (_resolved(other.rest), other.options)


def in_both(first: str, ids: Iterable[str], second: str, other_ids: Iterable[str]) -> list[str]:
    """Return the ids of images of two data specs that are one image, sorted; none where that cannot be told by ids."""
    return sorted(set(ids) & set(other_ids)) if same_place(first, second) else []


def require_unseen(
    judged: DataSource,
    taught: DataSource,
    *,
    option: str,
    limits: tuple[int | None, int | None] = (None, None),
    advice: str = "pass other images",
) -> None:
    """Refuse images to judge by that are among those that teach, as far as ids and contents tell.

    Args:
        option: that named the judging images; limits: how many of each are used, judging images first.
        advice: what to do instead.

    Raises:
        UserError: the two are the same data, or some ids are in both.
    """
    if judged.fingerprint() == taught.fingerprint():
        raise UserError(f"{option} names the training data, '{taught.spec}': {advice}")
    both: list[str] = []
    found = [(source.ids(), limit) for source, limit in zip((judged, taught), limits, strict=True)]
    chosen = [select(ids, limit) if limit is not None else ids for ids, limit in found if ids is not None]
    if len(chosen) == 2:
        both = in_both(judged.spec, chosen[0], taught.spec, chosen[1])
    if both:
        raise UserError(
            f"{len(both)} images of {option} '{judged.spec}' are also trained on (the first, '{both[0]}'): {advice}"
        )


def require_unseen_validation(
    val: DataSource | None, taught: DataSource, *, val_limit: int | None, limit: int | None
) -> None:
    """Refuse `--val` images of a training that are among those that it is taught with; see `require_unseen`."""
    if val is not None:
        advice = "leave --val out, and a part of them is held out"
        require_unseen(val, taught, option="--val", limits=(val_limit, limit), advice=advice)


def _resolved(rest: str) -> str:
    """Return a path in one spelling, links followed; whatever is no path stays as it is in effect."""
    return os.path.realpath(os.path.expanduser(rest)) if rest else rest
