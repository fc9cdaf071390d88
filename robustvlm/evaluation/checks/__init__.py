"""Findings about the evaluation itself: signs that a number should not be believed, each in a plain sentence.

Levels: "ok"; "note", good to know; "warning", the numbers may say less than they seem to; "fault", do not use them.
"""

from __future__ import annotations

from robustvlm.evaluation.checks.model import SANITY_NAMES, fit_for, of_probe, of_sanity, require_independent_rows
from robustvlm.evaluation.checks.rows import of_results
from robustvlm.evaluation.checks.second_opinion import of_second_opinion

__all__ = [
    "SANITY_NAMES",
    "fit_for",
    "of_probe",
    "of_results",
    "of_sanity",
    "of_second_opinion",
    "require_independent_rows",
]
