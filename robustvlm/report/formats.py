"""A report as text for others: Markdown, LaTeX and CSV of whole reports, and for machines that gate a change what was
checked, as JUnit's XML and SARIF 2.1.0; and the one way to all formats.

In the last two a fault, or a condition that holds, fails. A warning is one in SARIF and passes in JUnit, which knows
none, with its words beside it. Sources: the Jenkins JUnit schema; the OASIS standard SARIF 2.1.0, by its sections.
"""

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes
from xml.sax.saxutils import escape, quoteattr

from markupsafe import escape as escape_html

from robustvlm import __version__
from robustvlm.report import sections as doc
from robustvlm.report.copies import escape_latex, escape_markdown, latex, markdown, table_of, tame, titles_of, words_of
from robustvlm.report.document import Batch, Told, as_json, cell_of, findings_of, leaves, rule_of, specs_of
from robustvlm.report.words import DASH, Finding, plain
from robustvlm.runs.manifest import NAME

_LONG = 4000
HEADS = ("run", "kind", "section", "table", "part", "row", "column", "text", "value", "low", "high")
"""Columns of the CSV: a line a cell, so that every table of every run fits below one heading."""


def written(batch: Batch, form: str) -> str:
    """Return runs in one of `FORMATS`, without a line break at the end."""
    return FORMATS[form](batch)


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


# Markdown, as GitHub shows it in comments and job summaries


def as_markdown(batch: Batch) -> str:
    """Return everything that the page says but its charts and pictures."""
    parts = [text for _, _, report in batch.reports for text in _page(report)]
    if batch.left_out:
        lines = [f"* {escape_markdown(str(one.folder))}: {escape_markdown(one.reason)}" for one in batch.left_out]
        parts += ["## Left out", "\n".join(lines)]
    return "\n\n".join(parts)


def _page(report: doc.Report) -> Iterator[str]:
    yield f"# {escape_markdown(f'{report.kicker}: {report.name}')}"
    if facts := words_of(report.facts, _LONG):
        yield escape_markdown(facts, _LONG)
    for verdict in report.verdicts:
        sign = f"**{' '.join(verdict.sense)}:** " if verdict.sense else ""
        yield sign + "  \n".join(escape_markdown(words_of(line, _LONG), _LONG) for line in verdict.lines)
    for section in report.sections:
        if blocks := list(_blocks(section.blocks)):
            yield f"## {escape_markdown(section.title)}"
            yield from blocks
    if report.footer:
        yield escape_markdown(report.footer, _LONG)


def _blocks(blocks: Sequence[doc.Block]) -> Iterator[str]:
    for block in blocks:
        if isinstance(block, doc.Pair):
            yield from _blocks(block.blocks)
        elif isinstance(block, doc.More):
            if inside := list(_blocks(block.blocks)):
                yield f"<details><summary>{escape_html(words_of(block.summary))}</summary>"
                yield from inside
                yield "</details>"
        elif getattr(block, "only", "both") != "terminal":
            yield from _block(block)


def _block(block: doc.Block) -> Iterator[str]:
    if isinstance(block, doc.Text):
        yield escape_markdown(words_of(block.line, _LONG), _LONG)
    elif isinstance(block, doc.Checks):
        found = [_finding(finding) for finding in block.findings]
        if found or block.none:
            yield "\n".join(found) or escape_markdown(block.none)
    elif isinstance(block, doc.Verbatim):
        fence = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`+", block.text))])
        if block.title:
            yield f"**{escape_markdown(block.title)}**"
        yield f"{fence}\n{block.text}\n{fence}"
    elif isinstance(block, doc.Table | doc.Facts | doc.Bars):
        table = table_of(block)
        if table.rows:
            if title := words_of(table.title):
                yield f"**{escape_markdown(title)}**"
            yield markdown(table)
            if caption := words_of(table.caption, _LONG):
                yield escape_markdown(caption, _LONG)


def _finding(finding: Finding) -> str:
    said = f"**{escape_markdown(finding.name)}**: {escape_markdown(finding.message)}" if finding.name else ""
    meaning = f" {escape_markdown(finding.meaning)}" if finding.meaning and finding.level != "ok" else ""
    return f"* {finding.sign} {finding.word}: {said or escape_markdown(finding.message)}{meaning}"


# LaTeX: the sentences and the tables of a report, to be read into a paper


def as_latex(batch: Batch) -> str:
    """Return sentences and tables; settings and what is to be copied are left to `report --methods` and the page."""
    return "\n\n".join(part for _, _, report in batch.reports for part in _paper(report))


def _paper(report: doc.Report) -> Iterator[str]:
    yield f"\\section*{{{escape_latex(f'{report.kicker}: {report.name}')}}}"
    for verdict in report.verdicts:
        yield "\n".join(escape_latex(words_of(line, _LONG)) for line in verdict.lines)
    for section in report.sections:
        tables = list(_tables(section))
        if tables:
            yield f"\\subsection*{{{escape_latex(plain(section.title))}}}"
        for title, table in tables:
            head = f"\\paragraph{{{escape_latex(title)}}}" if title else "\\noindent"
            caption = words_of(table.caption, _LONG)
            yield "\n".join([head, latex(table), *([f"\n{escape_latex(caption)}"] if caption else [])])


def _tables(section: doc.Section) -> Iterator[tuple[str, doc.Table]]:
    for title, block in leaves(section.blocks):
        settings = isinstance(block, doc.Facts) and block.kind == "settings"
        if isinstance(block, doc.Table | doc.Facts | doc.Bars) and not settings:
            table = table_of(block)
            if table.rows:
                yield title or words_of(table.title), table


# CSV: one table for all tables of all runs


def as_csv(batch: Batch) -> str:
    """Return every cell of every table as a line below `HEADS`; what has no number has empty fields there."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(HEADS)
    for name, kind, report in batch.reports:
        for section in report.sections:
            for title, block in leaves(section.blocks):
                if isinstance(block, doc.Table | doc.Facts | doc.Bars):
                    table = table_of(block)
                    where = (name, kind, section.title, title or words_of(table.title))
                    writer.writerows([tame(str(field)) for field in (*where, *line)] for line in _lines(table))
    return stream.getvalue().rstrip("\n")


def _lines(table: doc.Table) -> Iterator[tuple[object, ...]]:
    heads, part = titles_of(table), ""
    for row in table.rows:
        if isinstance(row, str):
            part = plain(row, 600)
            continue
        cells = [cell_of(cell) for cell in row]
        for head, cell in list(zip(heads, cells, strict=True))[len(cells) > 1 :]:
            numbers = ["" if number is None else f"{number!r}" for number in (cell.value, cell.low, cell.high)]
            yield part, cells[0].text, head, "" if cell.text == DASH else cell.text, *numbers


FORMATS: dict[str, Callable[[Batch], str]] = {
    "json": as_json,
    "md": as_markdown,
    "tex": as_latex,
    "csv": as_csv,
    "junit": as_junit,
    "sarif": as_sarif,
}
"""Every format by its name on the command line."""
