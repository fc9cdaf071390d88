"""A certify run that is ready to start or continue, in one process or in several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow.parquet as pq

from robustvlm.core.ranks import Ranks, current_ranks
from robustvlm.core.reading import read_json
from robustvlm.errors import UserError
from robustvlm.evaluation.certifying.ledger import CertifyLedger
from robustvlm.evaluation.certifying.observer import CertifyObserver
from robustvlm.evaluation.journal_ledger import new_session
from robustvlm.evaluation.shared_folder import opened_by_all
from robustvlm.report.certify_html import write_certify_report
from robustvlm.runs.certify_config import CertifyConfig
from robustvlm.runs.certify_looks import record_look
from robustvlm.runs.certify_rows import make_certify_rows
from robustvlm.runs.certify_summary import CertifySummary, summarise_certify
from robustvlm.runs.checksums import forget_checksums, require_unchanged, write_checksums
from robustvlm.runs.files import write_text
from robustvlm.runs.folder import RunFolder
from robustvlm.runs.manifest import Manifest, require_shape
from robustvlm.runs.results import write_rows

CERTIFICATES = "certificates.jsonl"


class Work(Protocol):
    """What certifies images: by sampling, or from kept features."""

    def run(self) -> None:
        """Do what is left to do."""


@dataclass(frozen=True)
class PreparedCertify:
    """A certify run that is ready to start.

    Under `torchrun` every process prepares and runs it; each takes its share of the images, and rank 0 alone holds the
    lock, reports progress and writes the results.

    Args:
        begin: makes the work of this process, given ledger, observer and ranks.
        illustrate: given a folder and the rows, keeps pictures for the report; None if the images are not at hand.
    """

    config: CertifyConfig
    folder: RunFolder
    manifest: Manifest
    begin: Callable[[CertifyLedger, CertifyObserver, Ranks], Work]
    illustrate: Callable[[Path, list[dict[str, Any]]], None] | None = None

    def run(
        self, observer: CertifyObserver | None = None, *, fresh: bool = False, resume: bool = False
    ) -> CertifySummary:
        """Start or continue the run, write its files and return the summary; of a finished run, return its summary."""
        ranks = current_ranks()
        with opened_by_all(self.folder, self.manifest, ranks, fresh=fresh, resume=resume) as manifest:
            if self.folder.finished:
                require_unchanged(self.folder.path, manifest, what="certify ")
                if ranks.leader and not self.folder.report_path.exists():  # a crash may leave the last file unwritten
                    write_certify_report(self.folder.path)
            else:
                if ranks.leader and "trail" in manifest:
                    record_look(self.folder, manifest["trail"])
                ledger = CertifyLedger(self.folder, rank=ranks.rank, session=ranks.share(new_session()))
                try:
                    self.begin(ledger, (observer if ranks.leader else None) or CertifyObserver(), ranks).run()
                    ranks.barrier()
                    if ranks.leader:
                        ledger.sync()
                        finish(ledger, manifest)
                        self._report(manifest)
                finally:
                    ledger.close()
            ranks.barrier()
            return read_summary(self.folder)

    def _report(self, manifest: Manifest) -> None:
        """Write pictures and report; with the pictures the results are complete."""
        if self.illustrate is not None:
            self.illustrate(self.folder.gallery_path, pq.read_table(self.folder.results_path).to_pylist())
        write_checksums(self.folder.path, manifest)
        write_certify_report(self.folder.path)


def finish(ledger: CertifyLedger, manifest: Manifest) -> CertifySummary:
    """Write `results.parquet` and `summary.json` from what the ledger holds; return the summary."""
    if not ledger.found:
        reasons = [f"'{image.id}': {image.reason}" for image in ledger.unreadable]
        raise UserError(f"none of the {len(reasons)} images can be read (the first, {', '.join(reasons[:1])})")
    rows = make_certify_rows(ledger.found.values())
    summary = summarise_certify(rows, manifest, cost=ledger.cost, checks=ledger.checks, unreadable=ledger.unreadable)
    forget_checksums(ledger.folder.path)
    write_rows(ledger.folder.results_path, rows)
    # One record a line, for whoever takes a certificate elsewhere; the same as in the column of the results.
    records = rows.column("certificate").to_pylist()
    write_text(ledger.folder.path / CERTIFICATES, "".join(f"{record}\n" for record in records))
    write_text(ledger.folder.summary_path, summary.model_dump_json(indent=2) + "\n")
    return summary


def read_summary(folder: RunFolder) -> CertifySummary:
    """Return the summary of a finished run."""
    advice = "delete it, the run makes it again"
    content = read_json(folder.summary_path, advice=advice)
    require_shape(CertifySummary, content, folder.summary_path, f": {advice}")
    return CertifySummary.model_validate(content)
