"""What was checked, for machines that gate a change: JUnit's XML, and SARIF 2.1.0.

A fault, or a condition that holds, fails. A warning is one in SARIF and passes in JUnit, which knows none, with its
words beside it. Sources: the Jenkins JUnit schema; the OASIS standard SARIF 2.1.0, by its sections.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes
from xml.sax.saxutils import escape, quoteattr

from robustvlm import __version__
from robustvlm.report.copies import words_of
from robustvlm.report.document import Batch, Told, findings_of, rule_of, specs_of
from robustvlm.report.words import Finding, plain
from robustvlm.runs.manifest import NAME

_LONG = 4000

# JUnit: a suite a run, a test case a check and a condition


def as_junit(batch: Batch) -> str:
    """Return runs as JUnit XML, in ASCII, so that it is the same in every encoding."""
    suites = [_suite(told) for told in batch.runs]
    suites += [_unread(str(one.folder), one.reason, fault=one.fault) for one in batch.left_out]
    counts = {what: sum(count[what] for count, _ in suites) for what in _counted([])}
    lines = ['<?xml version="1.0" encoding="UTF-8"?>', f"<testsuites{_attributes(name='robustvlm', **counts)}>"]
    lines += [line for _, suite in suites for line in suite]
    return "\n".join([*lines, "</testsuites>"]).encode("ascii", "xmlcharrefreplace").decode()


def _suite(told: Told) -> tuple[dict[str, int], list[str]]:
    manifest = told.run.manifest
    seed = (manifest.get("config") or {}).get("seed")
    model, data = specs_of(told.run)
    verdict = " ".join(words_of(line, _LONG) for verdict in told.report.verdicts for line in verdict.lines)
    group = f"robustvlm.{told.run.kind}"
    cases = [_case(group, "run", said=verdict)]
    cases += [_check(group, finding) for finding in findings_of(told.report)]
    cases += [
        _case(group, f"condition {gate.text}", failed=f"the condition holds: {gate.text}" if gate.holds else "")
        for gate in told.gates
    ]
    named = {"model": model, "data": data, "seed": seed, "folder": told.run.folder}
    properties = [
        f"<property{_attributes(name=name, value=value)}/>" for name, value in named.items() if value is not None
    ]
    created = re.fullmatch(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\+00:00", str(manifest.get("created")))
    return _suite_of(told.run.name, cases, properties, timestamp=created[1] if created else None)


def _suite_of(name: str, cases: list[str], properties: list[str], **more: object) -> tuple[dict[str, int], list[str]]:
    counts = _counted(cases)
    inside = ["<properties>", *properties, "</properties>"] if properties else []
    return counts, [f"<testsuite{_attributes(name=name, **counts, **more)}>", *inside, *cases, "</testsuite>"]


def _unread(folder: str, reason: str, *, fault: bool) -> tuple[dict[str, int], list[str]]:
    tag = "error" if fault else "skipped"
    inside = f"<{tag}{_attributes(message=reason)}/>"
    return _suite_of(folder, [f"<testcase{_attributes(classname='robustvlm', name='run')}>{inside}</testcase>"], [])


def _counted(cases: list[str]) -> dict[str, int]:
    tags = {"failures": "<failure", "errors": "<error", "skipped": "<skipped"}
    return {"tests": len(cases)} | {name: sum(tag in case for case in cases) for name, tag in tags.items()}


def _check(group: str, finding: Finding) -> str:
    said = f"{finding.message} {finding.meaning}".strip()
    name = f"check {finding.name or finding.message}"
    if finding.level == "fault":
        return _case(group, name, failed=said, kind="fault")
    return _case(group, name, said=said if finding.level == "ok" else f"{finding.word}: {said}")


def _case(group: str, name: str, *, said: str = "", failed: str = "", kind: str = "condition") -> str:
    inside = f"<failure{_attributes(message=failed, type=kind)}>{_text(failed)}</failure>" if failed else ""
    inside += f"<system-out>{_text(said)}</system-out>" if said else ""
    return f"<testcase{_attributes(classname=group, name=name)}>{inside}</testcase>"


def _attributes(**values: object) -> str:
    found = ((name, value) for name, value in values.items() if value is not None)
    return "".join(f" {name}={quoteattr(_allowed(value))}" for name, value in found)


def _text(value: object) -> str:
    return escape(_allowed(value))


def _allowed(value: object) -> str:
    """Return a text with what no XML may hold (section 2.2 of XML 1.0) left out; `plain` leaves two of these."""
    return plain(value, _LONG).replace("\ufffe", "").replace("\uffff", "")


# SARIF: a run a run, a result for every check that fired and every condition that holds

_LEVELS = {"fault": "error", "warning": "warning", "note": "note"}
_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_CONDITION = "condition"
_HELP = {
    _CONDITION: "A condition given with --fail-if holds of this run, or could not be decided on it.",
    "fault": "The numbers of this run should not be used before this is mended.",
    "warning": "The numbers of this run may say less than they seem to.",
    "note": "Good to know when the numbers of this run are read.",
}


def as_sarif(batch: Batch) -> str:
    """Return runs as a SARIF log; what is not a run is told as a failure of the tool."""
    runs = [_log(told) for told in batch.runs]
    missing = [one for one in batch.left_out if one.fault]
    if missing or not runs:
        notes = [{"level": "error", "message": _message(f"{one.folder}: {one.reason}")} for one in missing]
        invocation = {"executionSuccessful": not missing, "toolExecutionNotifications": notes}
        runs.append({"tool": _tool([]), "results": [], "invocations": [invocation]})
    log = {"$schema": _SCHEMA, "version": "2.1.0", "runs": runs}
    return json.dumps(log, indent=2, ensure_ascii=False, allow_nan=False)


def _log(told: Told) -> dict[str, Any]:
    manifest = told.run.manifest
    found = [(rule_of(one), one.level, one.name, one.message, one.meaning) for one in findings_of(told.report)]
    found += [
        (_CONDITION, _CONDITION, "A condition of --fail-if", f"the condition holds: {gate.text}", "")
        for gate in told.gates
        if gate.holds
    ]
    fired = [one for one in found if one[1] != "ok"]
    rules: dict[str, dict[str, Any]] = {}
    results = []
    for rule, level, name, message, meaning in fired:
        ident = f"{told.run.kind}/{rule}"
        detail = message if level == _CONDITION else name.partition(",")[2]
        rules.setdefault(ident, _rule(ident, level, name, meaning))
        results.append(
            {
                "ruleId": ident,
                "ruleIndex": list(rules).index(ident),
                "level": _LEVELS.get(level, "error"),
                "message": _message(message),
                "locations": [_location(told.run.folder)],
                "partialFingerprints": {"robustvlmCheck/v1": _fingerprint(ident, detail, told)},
            }
        )
    return {
        "tool": _tool(list(rules.values())),
        "automationDetails": {"id": f"robustvlm/{told.run.kind}/{plain(told.run.name)}"},
        "invocations": [_invocation(manifest)],
        "results": results,
    }


def _tool(rules: list[dict[str, Any]]) -> dict[str, Any]:
    return {"driver": {"name": "robustvlm", "version": __version__, "rules": rules}}


def _rule(ident: str, level: str, name: str, meaning: str) -> dict[str, Any]:
    title = plain(name.partition(",")[0]) or "A remark"  # of what it was found in, the result tells
    about = meaning or _HELP[level]
    return {
        "id": ident,
        "shortDescription": {"text": _literal(title)},
        "fullDescription": {"text": _literal(f"{title}. {about}")},
        "help": {"text": _literal(f"{about} {_HELP[level]}" if meaning else about)},
        "defaultConfiguration": {"level": _LEVELS.get(level, "error")},
    }


def _message(text: str) -> dict[str, str]:
    return {"text": _literal(text)}


def _literal(text: str) -> str:
    """Return a text that no reader takes for more: braces are doubled (3.11.5), what would be a link is none (3.11.6).

    Example:
        >>> _literal("{0} [a](1)")
        '{{0}} [a] (1)'
    """
    return plain(text, _LONG).replace("{", "{{").replace("}", "}}").replace("](", "] (")


def _location(folder: Path) -> dict[str, Any]:
    """Return where the run is: its manifest, relative where the folder was given so, as a valid URI reference."""
    path = folder / NAME
    address = quote_from_bytes(bytes(path), safe="/")
    return {"physicalLocation": {"artifactLocation": {"uri": f"file://{address}" if path.is_absolute() else address}}}


def _fingerprint(ident: str, detail: str, told: Told) -> str:
    """Return what is the same for the same check of the same model and data, whatever the numbers in its message.

    Args:
        detail: what tells it from others of its rule in the run: the condition, or the set that it was found in.
    """
    what = [ident, detail, *map(str, specs_of(told.run))]
    return hashlib.blake2b(json.dumps(what).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _invocation(manifest: Mapping[str, Any]) -> dict[str, Any]:
    command = plain(manifest.get("command") or "", _LONG)
    return {"executionSuccessful": True} | ({"commandLine": command} if command else {})
