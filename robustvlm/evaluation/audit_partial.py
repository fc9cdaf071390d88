"""An audit that has not ended, kept so that a killed one goes on where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from robustvlm.evaluation.audit import Finding
from robustvlm.runs.journal import Journal, read_journal


def _is_fact(fact: dict[str, Any]) -> bool:
    """Whether a line of the journal is one of those that `Partial.add` writes; others count as not there."""
    try:
        findings = [Finding(**finding) for finding in fact["findings"]]
        return isinstance(fact["image_id"], str) and float(
            fact["radius"] + fact["passes"] + fact["seconds"]
        ) >= 0 <= len(findings)
    except (KeyError, TypeError, ValueError):
        return False


class Partial:
    """The images that an audit has finished, in a journal whose first line holds the settings.

    Facts of an audit with other settings, or of a radius that is another one now, do not count.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        facts = list(read_journal(path))
        if facts[:1] != [header]:
            path.unlink(missing_ok=True)
        self.done: dict[str, dict[str, Any]] = {
            fact["image_id"]: fact for fact in facts[1:] if facts[0] == header and _is_fact(fact)
        }
        self._journal = Journal(path)
        if facts[:1] != [header]:
            self._journal.append(header)

    def has(self, row: dict[str, Any]) -> bool:
        """Whether the image was audited at this radius; forget it if it was another one."""
        known = self.done.get(row["image_id"])
        if known is not None and known["radius"] != row["radius"]:
            del self.done[row["image_id"]]
            known = None
        return known is not None

    def add(self, row: dict[str, Any], findings: list[Finding], *, passes: int, seconds: float) -> None:
        """Keep what was found for an image."""
        fact = {
            "image_id": row["image_id"], "radius": row["radius"], "passes": passes, "seconds": seconds,
            "findings": [finding.model_dump() for finding in findings],
        }  # fmt: skip
        self._journal.append(fact)
        self.done[row["image_id"]] = fact

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, *exception: object) -> None:
        self._journal.close()
