"""The end of every report: a methods paragraph for a paper, and all that is needed to make the run again."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from robustvlm.errors import UserError
from robustvlm.report import sections as doc
from robustvlm.report.methods import has_methods, methods_of
from robustvlm.report.words import count_of, manifest_rows, moment, plain
from robustvlm.runs.records import Drawn
from robustvlm.runs.tools import sessions_of

_PROGRAM = "robustvlm"


def repeatable(
    report: doc.Report, manifest: Mapping[str, Any], *before: doc.Block, drawn: Drawn | None = None
) -> doc.Report:
    """Return a report with its last two sections; `before` comes between the command and the manifest.

    Args:
        drawn: how an attack run asked a random model.
    """
    fired = list(_fired(report))
    last = [*_methods(manifest, drawn), _manifest(manifest, fired, before)]
    return replace(report, sections=[*report.sections, *last])


def _methods(manifest: Mapping[str, Any], drawn: Drawn | None) -> Iterator[doc.Section]:
    if not has_methods(manifest):
        return
    try:
        made = methods_of(manifest, drawn=drawn)
    except UserError:  # another version's settings: no reason to have no report
        return
    lead = "Written from the settings: say in it what your paper calls the model and the data, and check it."
    texts = [doc.Verbatim(made.text, "Words"), doc.Verbatim(made.latex, "LaTeX (natbib)")]
    if made.keys:
        texts.append(doc.Verbatim(made.bibtex, "BibTeX"))
    paragraph = doc.More("A methods paragraph for a paper, with references", [doc.Text(lead, "lead"), *texts])
    yield doc.Section("For a paper", [paragraph], key="methods", short="Methods")


def _manifest(manifest: Mapping[str, Any], fired: list[str], before: tuple[doc.Block, ...]) -> doc.Section:
    command = manifest.get("command")
    blocks: list[doc.Block] = [doc.Text(doc.Code(command, limit=2000), only="page")] if command else []
    rows: list[tuple[str, doc.Line]] = [*manifest_rows(manifest)]
    blocks += [
        doc.Facts([*_list(manifest), ("Checks that fired", "; ".join(fired) or "none")]),
        *before,
        doc.More("Manifest: configuration, versions, model and data", [doc.Facts(rows, kind="settings")]),
    ]
    return doc.Section("How to repeat this", blocks, key="manifest", short="Manifest")


def _list(manifest: Mapping[str, Any]) -> Iterator[tuple[str, doc.Line]]:
    """Yield what has to be the same for the same results."""
    config, sessions = manifest["config"], sessions_of(manifest)
    yield "Program", "; then ".join(dict.fromkeys(map(_program, sessions)))
    libraries = dict.fromkeys(filter(None, map(_libraries, sessions)))
    if libraries:
        yield "Libraries", "; then ".join(libraries)
    if manifest.get("device"):
        yield "Device", plain(manifest["device"], 120)
    if config.get("seed") is not None:
        yield "Seed", f"{config['seed']}"
    for what in ("model", "data"):
        about = manifest.get(what) or {}
        print_, images = about.get("fingerprint"), about.get("images")
        if about.get("spec") is None:
            continue
        line: list[doc.Inline] = [doc.Code(str(about["spec"]))]
        line += [", digest ", doc.Code(str(print_))] if print_ else []
        line += [f", {count_of(images, 'images')}"] if isinstance(images, int) else []
        yield what.capitalize(), line
    if manifest.get("id"):
        yield "Run", [doc.Code(str(manifest["id"]))]
    if manifest.get("created"):
        yield "Started", moment(str(manifest["created"]))


def _program(session: Mapping[str, Any]) -> str:
    program = [f"{_PROGRAM} {plain(session['versions'].get(_PROGRAM, 'of an unknown version'), 40)}"]
    if commit := session.get("git_commit"):
        changed = ", with changes that are in no commit" if str(commit).endswith("+") else ""
        program.append(f"commit {plain(str(commit).rstrip('+'), 40)}{changed}")
    return ", ".join(program)


def _libraries(session: Mapping[str, Any]) -> str:
    numbers = session["versions"].items()
    return ", ".join(f"{plain(name, 30)} {plain(number, 30)}" for name, number in numbers if name != _PROGRAM)


def _fired(report: doc.Report) -> Iterator[str]:
    """Yield the faults and warnings that a report shows, by their names."""
    for section in report.sections:
        for block in doc.flat(section.blocks):
            if isinstance(block, doc.Checks):
                found = [one for one in block.findings if one.level in ("fault", "warning")]
                yield from (f"{one.word}: {one.name or plain(one.message, 80)}" for one in found)
