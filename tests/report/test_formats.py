"""Reports for machines: by their schemas and standards, with texts that try to be more than text, and odd numbers.

After a change of the JSON document that is meant, renew its schema with

    PYTHONPATH=. python tests/report/test_formats.py
"""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import pydantic
import pytest
from pages import HOSTILE

from robustvlm.cli.acts import report as report_command
from robustvlm.commands import COMMANDS, command_of
from robustvlm.commands.index import batch_of
from robustvlm.errors import UserError
from robustvlm.report import document as made
from robustvlm.report import sections as doc
from robustvlm.report.copies import table_of
from robustvlm.report.document import SCHEMA, Batch, Document, Gate, LeftOut, Told, schema
from robustvlm.report.formats import FORMATS, written
from robustvlm.report.words import DASH, bar, finding, plain
from robustvlm.stats import Mean, rate

BEFORE = Path(__file__).parents[1] / "pins" / "before"
KINDS = ("attack", "certify", "detect", "finetune", "immunize", "purify")
ODD = ["\ufffe\uffff", "{0} {{1}}", "[a](1)", "]]>", "=1+1", "```", "\udc80", "é\N{EN DASH}"]
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def batch() -> Batch:
    return batch_of([BEFORE / kind for kind in KINDS], ["robust_accuracy.low<30%", "auroc<0"])


def hostile(text: str) -> Batch:
    """Return a run with `text` in every place, and numbers that JSON has no words for."""
    measures = [
        doc.Measure.of(found) for found in (NAN, INF, None, rate(1, 3), Mean(total=2, value=NAN, low=NAN, high=None))
    ]
    table = doc.Table(
        [doc.Column(text, group=text), *doc.numbers(text)], [text, *((doc.Name(text), m) for m in measures)]
    )
    checks = doc.Checks([finding(level, text, text) for level in ("fault", "warning", "note", "ok")])
    more = doc.More(text, [doc.Verbatim(text, text), doc.Facts([(text, text)], title=text)])
    blocks: list[doc.Block] = [doc.Text(text), table, checks, more, doc.Closing({text: text})]
    report = doc.Report(text, text, text, text, [doc.Verdict([text], "held")], [doc.Section(text, blocks)])
    manifest = {"kind": "attack", "name": text, "command": text, "config": {"model": text, "data": text}, "id": text}
    run: Any = SimpleNamespace(
        name=text, kind="attack", folder=Path("a b/" + text.replace("\0", "")), manifest=manifest,
        summary={"nan": NAN, "inf": [INF, -INF], text: text},
    )  # fmt: skip
    return Batch([Told(run, report, [Gate(text, True)])], report, [LeftOut(Path(text), text)])


def test_the_schema_is_up_to_date() -> None:
    if pydantic.VERSION.split(".")[:2] < ["2", "11"]:
        pytest.skip("older releases of pydantic write the same schema in other words")
    assert SCHEMA.read_text(encoding="utf-8") == schema(), "run this file to renew it"


def valid(value: Any, by: dict[str, Any], root: dict[str, Any]) -> bool:
    """Judge a value by the part of JSON Schema that pydantic writes; an unknown word in it is an error."""
    if "$ref" in by:
        return valid(value, root["$defs"][by["$ref"].removeprefix("#/$defs/")], root)
    types = {
        "string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None), "array": list,
        "object": dict,
    }  # fmt: skip
    rules = {
        "type": lambda said: isinstance(value, types[said]) and (said == "boolean" or not isinstance(value, bool)),
        "const": lambda said: value == said,
        "enum": lambda said: value in said,
        "anyOf": lambda said: any(valid(value, one, root) for one in said),
        "oneOf": lambda said: sum(valid(value, one, root) for one in said) == 1,
        "items": lambda said: all(valid(item, said, root) for item in value),
        "required": lambda said: set(said) <= set(value),
        "properties": lambda said: all(valid(value[name], one, root) for name, one in said.items() if name in value),
        "additionalProperties": lambda said: said is True or set(value) <= set(by["properties"]),
    }
    aside = {"$schema", "$defs", "title", "description", "default", "discriminator"}
    words = sorted(by.keys() - aside, key=lambda word: word != "type")  # the others hold of values of that type alone
    return all(rules[word](by[word]) for word in words)


def strict(text: str) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_json_is_what_the_schema_says(batch: Batch) -> None:
    by = json.loads(SCHEMA.read_text(encoding="utf-8"))
    content = strict(written(batch, "json"))
    assert valid(content, by, by)
    assert Document.model_validate(content) == made.document(batch)
    assert not valid(content | {"more": 1}, by, by)
    assert not valid(content | {"runs": [content["runs"][0] | {"name": 1}]}, by, by)
    assert not valid({key: value for key, value in content.items() if key != "runs"}, by, by)
    for run, told in zip(content["runs"], batch.runs, strict=True):
        assert run["summary"] == json.loads(told.run.summary.model_dump_json())


def test_numbers_are_those_of_the_summary_with_all_their_digits(batch: Batch) -> None:
    run = made.document(batch).runs[0]
    (robust,) = (figure.value for figure in run.report.figures if figure.what.startswith("Robust accuracy"))
    at = batch.runs[0].run.summary.per_eps[-1].robust_accuracy
    assert (robust.value, robust.low, robust.high) == (at.value, at.low, at.high)
    lines = list(csv.DictReader(io.StringIO(written(batch, "csv"))))
    found = [float(line["high"]) for line in lines if line["kind"] == "attack" and line["column"] == "Robust accuracy"]
    assert found == [at.robust_accuracy.high for at in batch.runs[0].run.summary.per_eps]
    assert {line["run"] for line in lines} == set(KINDS)


def test_bars_have_all_digits_too() -> None:
    bars = doc.Bars([bar("a", rate(1, 3)), bar("none", rate(0, 0))], "")
    third, none = (made.cell_of(row[1]) for row in table_of(bars).rows)
    assert (third.value, third.low, third.high) == (1 / 3, rate(1, 3).low, rate(1, 3).high)
    assert (none.value, none.low, none.high) == (None, None, None)


def test_a_name_of_digits_is_no_number() -> None:
    table = doc.Table([doc.Column("Class"), *doc.numbers("Taken for", "Number")], [("9", doc.Name("7"), "1,234")])
    report = doc.Report("a", "a", "a", "a", [], [doc.Section("a", [table])])
    told = hostile("a").runs[0]
    lines = list(csv.DictReader(io.StringIO(written(Batch([Told(told.run, report)]), "csv"))))
    assert [(line["text"], line["value"]) for line in lines] == [("7", ""), ("1,234", "1234.0")]


def test_what_is_written_as_a_number_is_one_for_programs() -> None:
    written_as = {"12.5%": 0.125, "100%": 1.0, "0.1%": 0.001, "-3": -3.0, "1e-05": 1e-05, "1,234,567": 1234567.0}
    written_as["1,234.5"] = 1234.5
    assert {text: made.cell_of(text).value for text in written_as} == written_as
    others = ("3 of 4", "1 / 0", "1,23", "5 %", "12%\u201313%", "", DASH, "nan", "inf", "1e999", "\u0663")
    assert [text for text in others if made.cell_of(text).value is not None] == []


def test_a_condition_is_put_once_to_a_run_that_is_named_twice() -> None:
    batch = batch_of([BEFORE / "attack", BEFORE / "attack"], ["asr>0", "asr>0"])
    assert [len(told.gates) for told in batch.runs] == [1, 1]


@pytest.mark.parametrize("text", [*HOSTILE, *ODD])
def test_no_text_is_taken_for_more_than_text(text: str) -> None:
    batch = hostile(text)
    found = {form: written(batch, form) for form in FORMATS}
    content = strict(found["json"])
    assert content["runs"][0]["summary"]["inf"] == [None, None]
    values = [row["cells"][1] for row in content["comparison"]["sections"][0]["blocks"][1]["rows"]]
    assert [cell["value"] for cell in values] == [None, None, None, 1 / 3, None]
    by = json.loads(SCHEMA.read_text(encoding="utf-8"))
    assert valid(content, by, by)

    suites = ElementTree.fromstring(found["junit"])
    wanted = plain(text, 4000).replace("\ufffe", "").replace("\uffff", "")
    assert suites[0].attrib["name"] == wanted
    assert [case.tag for case in suites.iter() if case.tag in ("failure", "error")] == ["failure", "failure", "error"]
    assert found["junit"].isascii()

    (result, *_), uri = sarif(found["sarif"])
    assert "](" not in result["message"]["text"]
    assert result["message"]["text"].replace("{{", "{").replace("}}", "}").replace("] (", "](") == plain(text, 4000)
    assert unquote(uri, errors="surrogateescape").startswith("a b/")

    rows = list(csv.reader(io.StringIO(found["csv"])))
    assert {len(row) for row in rows} == {11}
    assert not any(cell[:1] in "=+-@" and len(cell) > 1 for row in rows for cell in row)
    outside = re.sub(r"(?ms)^(`{3,})\n.*?\n\1$", "", found["md"])
    assert set(re.findall(r"(?<!\\)</?(\w+)", outside)) <= {"details", "summary"}
    assert "\\frac" not in found["tex"] or "\\textbackslash" in found["tex"]


def sarif(text: str) -> tuple[list[dict[str, Any]], str]:
    """Return the results of the first run and its address, after a look at what the standard asks of a log."""
    log = strict(text)
    assert log["version"] == "2.1.0"
    for run in log["runs"]:
        rules = run["tool"]["driver"]["rules"]
        assert len({rule["id"] for rule in rules}) == len(rules)
        assert all(rule["help"]["text"] and rule["shortDescription"]["text"] for rule in rules)
        for result in run["results"]:
            assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
            assert result["level"] in ("error", "warning", "note")
            (place,) = result["locations"]
            uri = place["physicalLocation"]["artifactLocation"]["uri"]
            assert re.fullmatch(r"(file://)?(%[0-9A-F]{2}|[A-Za-z0-9._~/-])+", uri)
        assert isinstance(run["invocations"][0]["executionSuccessful"], bool)
    results: list[dict[str, Any]] = log["runs"][0]["results"]
    return results, results[0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] if results else ""


def test_sarif_has_what_fired_and_junit_what_was_checked(batch: Batch) -> None:
    results, _ = sarif(written(batch, "sarif"))
    checks = batch.runs[0].run.summary.checks
    fired = [check for check in checks if check.level != "ok"]
    assert [one["ruleId"] for one in results] == ["attack/gradient-against-noise", "attack/condition"]
    assert len(fired) == 1
    root = ElementTree.fromstring(written(batch, "junit"))
    first = root[0]
    cases = [case.attrib["name"] for case in first.iter("testcase")]
    assert len(cases) == 1 + len(checks) + 1
    assert cases[-1] == "condition robust_accuracy.low<30%"
    assert (first.attrib["tests"], first.attrib["failures"]) == (str(len(cases)), "1")
    assert root.attrib["failures"] == "1"
    held = [case for case in root.iter("testcase") if case.find("failure") is not None]
    assert [case.attrib["name"] for case in held] == ["condition robust_accuracy.low<30%"]


def test_the_same_check_of_another_run_of_the_model_is_the_same_alert() -> None:
    one, other = hostile("x"), hostile("x")
    prints = [sarif(written(batch, "sarif"))[0][1]["partialFingerprints"] for batch in (one, other)]
    assert prints[0] == prints[1]
    object.__setattr__(other.runs[0].run, "manifest", {"config": {"model": "y"}})
    assert sarif(written(other, "sarif"))[0][1]["partialFingerprints"] != prints[0]


def test_a_rule_is_the_same_for_every_set_and_the_alert_is_not() -> None:
    told = hostile("x").runs[0]
    found = [finding("warning", f"In {name}.", f"known images, in {name}") for name in ("near, a", "far")]
    report = doc.Report("a", "a", "a", "a", [], [doc.Section("a", [doc.Checks(found)])])
    text = written(Batch([Told(told.run, report)]), "sarif")
    results, _ = sarif(text)
    (rule,) = strict(text)["runs"][0]["tool"]["driver"]["rules"]
    assert rule["id"].endswith("/known-images")
    assert rule["shortDescription"]["text"] == "known images"
    assert len({one["partialFingerprints"]["robustvlmCheck/v1"] for one in results}) == 2


def test_every_block_that_the_page_shows_is_told(batch: Batch) -> None:
    for told in batch.runs:
        text = written(Batch([told]), "md")
        titles = [section.title for section in told.report.sections]
        assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == [
            title for title in titles if title not in ("Curves", "How training went")
        ]
        assert text.count("<details>") == text.count("</details>") > 0


def test_folders_of_runs_tell_what_they_leave_out(tmp_path: Path) -> None:
    for name in ("attack", "soup", "attack-stopped"):
        shutil.copytree(BEFORE / name, tmp_path / name)
    batch = batch_of([tmp_path], ["asr>0.5"])
    assert [told.run.kind for told in batch.runs] == ["attack"]
    assert [(one.folder.name, one.fault) for one in batch.left_out] == [("attack-stopped", True), ("soup", False)]
    root = ElementTree.fromstring(written(batch, "junit"))
    assert (root.attrib["errors"], root.attrib["skipped"], root.attrib["failures"]) == ("1", "1", "1")
    log = strict(written(batch, "sarif"))
    assert [run["invocations"][0]["executionSuccessful"] for run in log["runs"]] == [True, False]
    with pytest.raises(UserError, match="has no report"):
        batch_of([tmp_path / "soup"])
    with pytest.raises(UserError, match="put to no run"):
        batch_of([tmp_path / "soup"], ["asr>0.5"])
    with pytest.raises(UserError, match="unknown rate 'acc'"):
        batch_of([tmp_path], ["acc>0.5"])


def test_every_kind_with_a_page_has_the_other_formats_too() -> None:
    for kind in COMMANDS:
        home = command_of(kind).load()
        assert hasattr(home, "report_of") == hasattr(home, "write_report"), kind


def test_attack_runs_named_one_by_one_are_compared() -> None:
    twice = batch_of([BEFORE / "attack", BEFORE / "attack"])
    assert twice.comparison is not None
    assert written(twice, "md").startswith("# Comparison of 2 attack runs")


def test_the_command_prints_writes_and_gates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(BEFORE / "attack")
    report_command([run], form="json")
    printed = capsys.readouterr().out
    report_command([run], form="json", out=tmp_path / "a.json")
    assert strict(printed) == strict((tmp_path / "a.json").read_text(encoding="utf-8"))
    with pytest.raises(Exception) as ended:  # noqa: PT011  # typer's, which is none of its own
        report_command([run], form="junit", fail_if=["asr>0.5"])
    assert ended.value.exit_code == 1  # type: ignore[attr-defined]
    out, err = capsys.readouterr()
    assert "<failure" in out
    assert err == "failed: asr>0.5 (attack)\n"
    report_command([run], form="junit", fail_if=["clean_accuracy<0.5"])
    for given, words in (
        ({"form": "xml"}, "unknown --format 'xml'"),
        ({"form": "json", "as_json": True}, "contradict"),
        ({"form": "json", "methods": True}, "leave out --format"),
    ):
        with pytest.raises(UserError, match=words):
            report_command([run], **given)  # type: ignore[arg-type]


def test_no_report_is_written_over_a_run_s_own_files(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(BEFORE / "attack", run)
    for form in ("html", "json"):
        for name in ("summary.json", "results.parquet", "manifest.json", "journal.jsonl"):
            with pytest.raises(UserError, match="is a file of the run itself"):
                report_command([str(run)], form=form, out=run / name)
    report_command([str(run)], form="json", out=run / "report.json")
    with pytest.raises(UserError, match=f"cannot write the report to '{tmp_path}'"):
        report_command([str(run)], form="md", out=tmp_path)


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_keeps_secrets_as_the_terminal_does(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = hostile('wds:https://me:hush"42@host/a.tar')
    shut = Batch([Told(told.run, told.report) for told in batch.runs], batch.comparison, batch.left_out)
    monkeypatch.setattr("robustvlm.cli.acts._batch", lambda *_: shut)
    report_command(["a"], form=form)
    printed = capsys.readouterr().out
    report_command(["a"], form=form, out=tmp_path / "file")
    kept = (tmp_path / "file").read_text(encoding="utf-8")
    assert kept == printed


if __name__ == "__main__":
    SCHEMA.write_text(schema(), encoding="utf-8")
