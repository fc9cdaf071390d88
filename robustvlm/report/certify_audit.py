"""The outcome of an audit as a table: in the terminal and in the report of the run it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from robustvlm.certify import floor_to, format_down
from robustvlm.core.reading import read_json
from robustvlm.errors import UserError
from robustvlm.evaluation.audit import BLIND
from robustvlm.report.wording import plain
from robustvlm.runs.manifest import Manifest, run_identity


@dataclass(frozen=True)
class AuditRow:
    """All images at one part of their radius, in words."""

    fraction: str
    images: int
    bound: str
    lowest: str
    room: str
    unsettled: int
    broken: int


@dataclass(frozen=True)
class AuditView:
    """An audit as shown."""

    sentence: str
    quantity: str
    broken: bool
    rows: list[AuditRow]
    worst: list[tuple[str, str]]


def audit_view(content: dict[str, Any]) -> AuditView:
    """Return an audit (the content of audit.json) in words.

    Raises KeyError, TypeError or ValueError where it is not one.
    """
    findings: list[dict[str, Any]] = content["findings"]
    fractions = sorted({float(f["fraction"]) for f in findings})
    images = len({f["image_id"] for f in findings})
    broken = [f for f in findings if f["upper"] < f["bound"]]
    return AuditView(
        sentence=_sentence(images, broken) + _search(findings),
        quantity=plain(content.get("quantity", "certified quantity"), 120),
        broken=bool(broken),
        rows=[_row(x, [f for f in findings if float(f["fraction"]) == x]) for x in fractions],
        worst=[
            (
                plain(f["image_id"], 80),
                f"{f['lowest']:.4f} (at most {_up(f['upper'])}) at distance {_up(f['eps'])}, certified "
                f"{format_down(f['bound'], 4)}",
            )
            for f in sorted(broken or findings, key=lambda f: float(f["lowest"] - f["bound"]))[:5]
        ],
    )


def _sentence(images: int, broken: Sequence[dict[str, Any]]) -> str:
    if not images:
        return "No image has a certificate, so there was nothing to attack."
    if broken:
        names = len({f["image_id"] for f in broken})
        return f"Attacks broke the certified bound of {names:,} of {images:,} images: these certificates are false."
    return f"No attack got below a certified bound on any of {images:,} images."


def _search(findings: Sequence[dict[str, Any]]) -> str:
    """Say where the search had no gradient to follow, which makes it the weaker one."""
    blind = len({f["image_id"] for f in findings if str(f.get("start", "")).endswith(BLIND)})
    if not blind:
        return ""
    return f" The encoder gave no gradient on {blind:,} of them, which were searched without one: that finds less."


def _up(value: float) -> str:
    """Return an upper limit with four decimals, rounded up."""
    return f"{-floor_to(-float(value), 4):.4f}"


def _row(fraction: float, findings: Sequence[dict[str, Any]]) -> AuditRow:
    lowest, bound = (np.array([float(f[key]) for f in findings]) for key in ("lowest", "bound"))
    broken = sum(f["upper"] < f["bound"] for f in findings)
    return AuditRow(
        fraction=f"{100 * fraction:.3g}%",
        images=len(findings),
        bound=format_down(float(np.median(bound)), 3),
        lowest=f"{lowest.min():.3f} / {np.median(lowest):.3f}",
        room=f"{(lowest - bound).min():.3f} / {np.median(lowest - bound):.3f}",
        unsettled=int((lowest < bound).sum()) - broken,
        broken=broken,
    )


def load_audit(path: Path, manifest: Manifest) -> AuditView | None:
    """Return the audit stored beside the run of a manifest, or None when there is none that can be read.

    Raises:
        UserError: it is the audit of another run.
    """
    try:
        content = read_json(path)
        view = audit_view(content)
    except (OSError, UserError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if content.get("of") != run_identity(manifest):
        raise UserError(f"'{path}' is the audit of another run: delete it, or give `robustvlm certify --audit` again")
    return view


def audit_table(content: dict[str, Any]) -> RenderableType:
    """Return the closing table of an audit for the terminal.

    Example:
        >>> from rich.console import Console
        >>> finding = {"image_id": "a", "fraction": 1.0, "eps": 0.1, "bound": 0.5, "lowest": 0.9, "upper": 0.95}
        >>> console = Console(width=110)
        >>> with console.capture() as shown:
        ...     console.print(audit_table({"quantity": "cosine", "findings": [finding]}))
        >>> "No attack got below a certified bound on any of 1 images." in shown.get()
        True
    """
    view = audit_view(content)
    table = Table(title=Text(view.quantity, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("of the radius", "images", "bound (median)", "lowest reached (min / median)", "room above the bound",
                 "below, not certain", "broken"):  # fmt: skip
        table.add_column(name, justify="right")
    for row in view.rows:
        style = "bold red" if row.broken else ""
        cells = (
            row.fraction,
            f"{row.images:,}",
            row.bound,
            row.lowest,
            row.room,
            f"{row.unsettled:,}",
            f"{row.broken:,}",
        )
        table.add_row(*cells, style=style)
    closest = [Text(f"  {name}: {text}", style="dim") for name, text in view.worst]
    parts: list[RenderableType] = [table, Text("Least room:", style="dim"), *closest] if view.rows else []
    return Group(*parts, Text(view.sentence, style="bold red" if view.broken else "bold"))
