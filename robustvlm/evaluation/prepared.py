"""An attack run that is ready to start, continue or be estimated, in one process or in several."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from robustvlm.attacks.plan import Attack
from robustvlm.core.ranks import Ranks, current_ranks
from robustvlm.data import DataSource
from robustvlm.defenses import Classifier
from robustvlm.evaluation.aims import Aim
from robustvlm.evaluation.attack_run import AttackRun
from robustvlm.evaluation.budget import Budget
from robustvlm.evaluation.finish import finish
from robustvlm.evaluation.journal_ledger import new_session
from robustvlm.evaluation.ledger import Ledger
from robustvlm.evaluation.observer import Observer
from robustvlm.evaluation.shared_folder import opened_by_all
from robustvlm.report.html import write_report
from robustvlm.report.record import load_run
from robustvlm.runs.config import AttackConfig
from robustvlm.runs.folder import RunFolder
from robustvlm.runs.manifest import Manifest
from robustvlm.runs.summary import Estimate, Summary

NOTHING_LEFT = Estimate(images=0, passes_least=0, passes_most=0, seconds_least=0.0, seconds_most=0.0)


@dataclass(frozen=True)
class Prepared:
    """An attack run that is ready to start.

    Under `torchrun` every process prepares and runs it; each takes its share of the images, and rank 0 alone holds the
    lock, reports progress and writes the results.
    """

    config: AttackConfig
    attacks: list[Attack]
    source: DataSource
    classifier: Classifier
    aim: Aim
    folder: RunFolder
    manifest: Manifest

    def run(
        self,
        observer: Observer | None = None,
        *,
        fresh: bool = False,
        resume: bool = False,
        budget: Budget | None = None,
    ) -> Summary:
        """Start or continue the run, write its files and return the summary; of a finished run, return its summary.

        A budget is no part of what defines the run: with a larger one, or none, the same run goes on.
        """
        ranks = current_ranks()
        with opened_by_all(self.folder, self.manifest, ranks, fresh=fresh, resume=resume) as manifest:
            if self.folder.finished:
                return self._as_finished(ranks)
            with self._working(ranks, observer, budget) as work:
                work.run()
                if ranks.leader:
                    finish(work.ledger, manifest, self.attacks)
            ranks.barrier()
            return load_run(self.folder.path).summary

    def estimate(self, observer: Observer | None = None, *, fresh: bool = False, resume: bool = False) -> Estimate:
        """Return what the attacks will cost, or what is left of them; the clean pass is made for it, and kept."""
        ranks = current_ranks()
        with opened_by_all(self.folder, self.manifest, ranks, fresh=fresh, resume=resume):
            if self.folder.finished:
                return NOTHING_LEFT
            with self._working(ranks, observer, None) as work:
                return work.estimate() or NOTHING_LEFT

    @contextmanager
    def _working(self, ranks: Ranks, observer: Observer | None, budget: Budget | None) -> Iterator[AttackRun]:
        ledger = Ledger(self.folder, rank=ranks.rank, session=ranks.share(new_session()))
        try:
            yield AttackRun(
                config=self.config,
                source=self.source,
                aim=self.aim,
                attacks=self.attacks,
                ledger=ledger,
                observer=(observer if ranks.leader else None) or Observer(),
                framing=self.classifier.framing,
                ranks=ranks,
                budget=budget,
            )
        finally:
            ledger.close()

    def _as_finished(self, ranks: Ranks) -> Summary:
        if ranks.leader and not self.folder.report_path.exists():  # a crash may leave the last file unwritten
            write_report([self.folder.path], self.folder.report_path)
        return load_run(self.folder.path).summary
