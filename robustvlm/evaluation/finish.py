"""From the facts of a run to its files: rows, summary, report."""

from __future__ import annotations

from collections.abc import Sequence

from robustvlm.attacks import ThreatModel
from robustvlm.attacks.plan import Attack
from robustvlm.evaluation import checks
from robustvlm.evaluation.ledger import Ledger
from robustvlm.evaluation.scrutiny import published
from robustvlm.report.html import write_report
from robustvlm.runs.checksums import forget_checksums, write_checksums
from robustvlm.runs.config import AttackConfig
from robustvlm.runs.files import write_text
from robustvlm.runs.manifest import Manifest
from robustvlm.runs.pictures import trim_gallery
from robustvlm.runs.results import make_rows, write_rows
from robustvlm.runs.summary import Summary, summarise


def finish(ledger: Ledger, manifest: Manifest, attacks: Sequence[Attack]) -> Summary:
    """Write `results.parquet`, `summary.json` and `report.html` from what the ledger holds; return the summary."""
    config = AttackConfig(**manifest["config"])
    clean = [ledger.clean[index] for index in sorted(ledger.clean)]
    found = list(ledger.found.values())
    judged = checks.of_results(
        clean,
        found,
        threats=[ThreatModel(config.norm, eps) for eps in config.eps],
        attacks=attacks,
        n_classes=len(manifest["data"]["class_names"]),
        undefended=config.model if published(config.model) else None,
        pixels=3 * config.resolution**2,
    )
    if config.second_opinion is not None:
        judged += checks.of_second_opinion(clean, found, attack=config.second_opinion)
    if ledger.stopped is None:  # what an unfinished run shows need not hold when it goes on
        ledger.add_checks(judged)
    rows = make_rows(clean, found, norm=config.norm, eps=config.eps, attacks=config.attack, goals=config.goals)
    summary = summarise(
        rows,
        manifest,
        cost=ledger.cost,
        checks=list({check.name: check for check in [*ledger.checks, *judged]}.values()),
        unreadable=ledger.unreadable,
        left_out=len(ledger.left_out),
        waiting=_waiting(ledger, manifest),
        unfinished=_unfinished(ledger, manifest),
        estimate=ledger.estimate,
    )
    trim_gallery(ledger.folder.gallery_path)
    forget_checksums(ledger.folder.path)
    write_rows(ledger.folder.results_path, rows)
    write_text(ledger.folder.summary_path, summary.model_dump_json(indent=2) + "\n")
    write_checksums(ledger.folder.path, manifest)
    write_report([ledger.folder.path], ledger.folder.report_path)
    return summary


def _unfinished(ledger: Ledger, manifest: Manifest) -> str | None:
    """Say in one sentence why the session stopped early, and what it did not come to."""
    if ledger.stopped is None:
        return None
    waiting, seen = _waiting(ledger, manifest), len(ledger.seen)
    return f"{ledger.stopped}, with {seen:,} of {seen + waiting:,} images classified" if waiting else ledger.stopped


def _waiting(ledger: Ledger, manifest: Manifest) -> int:
    """Return how many images a run that stopped early has still to classify, as far as that is known."""
    if ledger.stopped is None:
        return 0
    images, limit = manifest["data"]["images"], manifest["config"]["limit"]
    total = min((count for count in (images, limit) if count is not None), default=0)
    return max(0, total - len(ledger.seen))
