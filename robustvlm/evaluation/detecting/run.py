"""A detect run that is ready to start, or to go on."""

from __future__ import annotations

from dataclasses import dataclass

from robustvlm.attacks import LaneAttack
from robustvlm.data.source import DataSource
from robustvlm.data.unlabelled import Unlabelled
from robustvlm.defenses import Classifier
from robustvlm.evaluation.detecting.observer import DetectObserver
from robustvlm.evaluation.detecting.session import Session
from robustvlm.report.detect_html import write_detect_report
from robustvlm.report.detect_record import load_detect_run
from robustvlm.runs.detect_config import DetectConfig
from robustvlm.runs.detect_summary import DetectSummary
from robustvlm.runs.folder import RunFolder
from robustvlm.runs.manifest import Manifest


@dataclass(frozen=True, eq=False)
class PreparedDetect:
    """A detect run that is ready to start.

    Args:
        config: its settings; folder: where it goes; manifest: what is written first.
        classifier: the model; known: images of known classes; unknown: sets of other images, by name.
        fit: images to learn from, None for none; words: outside the known classes.
        naming: words that name a class of an unknown set, with the set's name: left out, unless oracles are asked for.
        attacks: on scores, empty without --under-attack; batch_size: images per encoder pass.
    """

    config: DetectConfig
    folder: RunFolder
    manifest: Manifest
    classifier: Classifier
    known: DataSource
    unknown: list[tuple[str, Unlabelled]]
    fit: DataSource | None
    words: tuple[str, ...]
    naming: dict[str, str]
    attacks: list[LaneAttack]
    batch_size: int

    def run(
        self, observer: DetectObserver | None = None, *, fresh: bool = False, resume: bool = False
    ) -> DetectSummary:
        """Start or continue the run, write its files and return the summary; of a finished run, return its summary."""
        with self.folder.opened(self.manifest, fresh=fresh, resume=resume) as manifest:
            if not self.folder.finished:
                session = Session(
                    config=self.config,
                    manifest=manifest,
                    folder=self.folder,
                    classifier=self.classifier,
                    known=self.known,
                    unknown=self.unknown,
                    fit=self.fit,
                    words=self.words,
                    naming=self.naming,
                    attacks=self.attacks,
                    batch_size=self.batch_size,
                    observer=observer or DetectObserver(),
                )
                session.run()
            if not self.folder.report_path.exists():  # also after a crash between the last two files
                write_detect_report(self.folder.path)
            return load_detect_run(self.folder.path).summary
