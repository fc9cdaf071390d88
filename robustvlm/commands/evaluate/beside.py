"""An evaluation and attacks on the same model in one report: accuracy without change, under chance, under attack."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from robustvlm.attacks.goals.base import ROBUST
from robustvlm.commands.attack.record import AttackedRun, load_run, words_of
from robustvlm.commands.attack.report import share
from robustvlm.commands.evaluate.record import Group, uneven
from robustvlm.commands.evaluate.view import Evaluation, evaluate_report, read_run, spread_cells
from robustvlm.data.splits import group_of_run, same_images
from robustvlm.errors import UserError
from robustvlm.report import sections as doc
from robustvlm.report.page import drawing, page_of, write_page
from robustvlm.report.words import as_rate, norm_name, plain
from robustvlm.stats import Rate, rate, worth_of


def write_beside(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of an evaluation with attack runs beside it, by default to `comparison.html` beside the first.

    Args:
        folders: the evaluation, then one attack run or more.

    Raises:
        UserError: a run has not ended, is of another kind, or of another model; or the page cannot be written.
    """
    run, attacked = read_run(folders[0]), [load_run(folder) for folder in folders[1:]]
    beside = beside_report(run, attacked)
    path = out or run.folder.resolve().parent / "comparison.html"
    with drawing(run.folder):
        report = evaluate_report(run)
        text = page_of(replace(report, sections=[*beside.sections, *report.sections]))
    write_page(path, text)
    return path


def beside_report(run: Evaluation, attacked: Sequence[AttackedRun]) -> doc.Report:
    """Return what is said of an evaluation and attacks on the same model together.

    Raises:
        UserError: a run is of another model, other classes or other prompt templates.
    """
    for other in attacked:
        _require_same_model(run, other)
    blocks: list[doc.Block] = [table(run, attacked), *evenness(run, attacked)]
    return doc.Report(
        kind="comparison",
        name=" · ".join(plain(name, 60) for name in (run.name, *(other.name for other in attacked))),
        kicker="Clean, corrupted, attacked",
        facts="",
        verdicts=[],
        sections=[doc.Section("Clean, corrupted, attacked", blocks, key="beside", short="All")],
    )


def _require_same_model(run: Evaluation, other: AttackedRun) -> None:
    mine, theirs = ((one.manifest.get("model") or {}).get("fingerprint") for one in (run, other))
    if mine != theirs:
        raise UserError(f"'{other.name}' attacked another model than '{run.name}' evaluated: name runs of one model")
    if run.class_names != list(other.class_names):
        raise UserError(f"'{other.name}' has other classes than '{run.name}': name runs on the same classes")
    mine, theirs = ((one.manifest.get("data") or {}).get("templates") for one in (run, other))
    if mine != theirs:
        raise UserError(f"'{other.name}' has other prompt templates than '{run.name}': name runs with the same ones")


def table(run: Evaluation, attacked: Sequence[AttackedRun]) -> doc.Table:
    """Return a row for the images as they are, one for all corruptions, and one for each radius of each attack run."""
    result = run.summary
    rows: list[doc.Row] = [("as they are", doc.Measure.of(result.accuracy), f"{result.images:,}")]
    if result.corruptions is not None:
        over = doc.Measure.of(as_rate(result.corruptions.accuracy))
        rows.append(("common corruptions, mean", over, f"{result.images:,}"))
    rows += [row for other in attacked for row in _attacked(other)]
    columns = [doc.Column("Images"), *doc.numbers("Right", "Number")]
    caption = "Attacks look for the worst change within a radius; corruptions are drawn without regard to the model."
    seen = {result.images, *(at.robust_accuracy.total for other in attacked for at in other.summary.per_eps)}
    if len(seen) > 1 or not all(_saw_the_same(run, other) for other in attacked):
        caption += " The runs saw different images."
    if any(other.summary.images.worth is None and _untold_copies(run, other) for other in attacked):
        caption += " In attacked rows, copies of one thing count one by one: ids do not tell them."
    return doc.Table(columns, rows, caption=caption, strong=frozenset({0}))


def evenness(run: Evaluation, attacked: Sequence[AttackedRun]) -> Iterator[doc.Block]:
    """Yield how unevenly the subgroups of a class are right, clean and under attack, on the images of both runs.

    MacroStd of Chiu et al. 2023 (arXiv 2212.08649) of clean and of robust accuracy; nothing without subgroups. Attacks
    on other images, or on images under other labels, are left out, which is said.
    """
    wanted = ("image_id", "label", "subgroup", "correct")
    rows = [row for row in run.rows.select(wanted).to_pylist() if row["correct"] is not None and row["subgroup"]]
    if len({row["subgroup"] for row in rows}) < 2:
        return
    found: list[doc.Row] = []
    left: list[str] = []
    group = _group(run)
    for other in attacked:
        verdicts = other.verdicts()
        # Two runs may number the classes of one set in another order.
        mine, theirs = (dict(enumerate(one.class_names)) for one in (run, other))
        named = {(image.image_id, theirs.get(image.label)): image for image in verdicts.images}
        seen = named if _comparable(run, other) else {}
        shared = [(row["label"], row["subgroup"], bool(row["correct"]), seen[row["image_id"], mine[row["label"]]])
                  for row in rows if (row["image_id"], mine[row["label"]]) in seen]  # fmt: skip
        if not shared:
            left.append(plain(other.name, 60))
            continue
        clean = [(label, part, right, group(image.image_id)) for label, part, right, image in shared]
        found += _spread_of(f"as they are, images of {plain(other.name, 60)}", clean)
        for place, at in enumerate(other.summary.per_eps):
            outcomes = [(one, verdicts.after(one[-1], place)) for one in shared]
            robust = [(label, part, said == "robust", group(image.image_id))
                      for (label, part, _, image), said in outcomes if said != "undecided"]  # fmt: skip
            what = f"attacked, {norm_name(other.summary.norm)} {plain(at.eps_text, 20)}{_held(other)}"
            found += _spread_of(what, robust)
    if found:
        columns = [doc.Column("Images"), *doc.numbers("MacroStd", "By chance", "p", "Number")]
        caption = (
            "Spread of right answers over the subgroups of a class, as a mean over classes; \u201cby chance\u201d is "
            "what would be seen if they were alike."
        )
        if _untold_copies(run, run):
            caption += " Copies of one thing count one by one: ids do not tell them."
        yield doc.Table(columns, found, title="How evenly over subgroups", caption=caption)
    if left:
        yield doc.Text(f"Not compared over subgroups, as other images or labels were attacked: {', '.join(left)}.")


def _saw_the_same(run: Evaluation, other: AttackedRun) -> bool:
    """Whether two runs on equally many images saw the same ones: of one set, two limits or parts hold others."""
    mine, theirs = ({*run.rows["image_id"].to_pylist()}, {image.image_id for image in other.verdicts().images})
    return _comparable(run, other) and (len(mine) != len(theirs) or mine == theirs)


def _comparable(run: Evaluation, other: AttackedRun) -> bool:
    return same_images(*(one.manifest.get("data") or {} for one in (run, other)))


def _group(run: Evaluation | AttackedRun) -> Group:
    """Return what images have in common whose copies count once, as far as ids tell it: rows do not store it."""
    return group_of_run(run.manifest)


def _untold_copies(run: Evaluation, other: Evaluation | AttackedRun) -> bool:
    """Whether there are copies, by the evaluation, which the ids of a run do not show: a source of one's own."""
    worth = run.summary.worth
    return worth is not None and worth < run.summary.images and _group(other) is str


def _spread_of(title: str, facts: Sequence[tuple[int, str, bool, str]]) -> Iterator[tuple[Any, ...]]:
    one = uneven(facts)
    if one is not None:
        yield (
            title,
            *spread_cells(*(one[key] for key in ("value", "low", "high", "by_chance", "p_value"))),
            f"{len(facts):,}",
        )


def _held(other: AttackedRun) -> str:
    """Say what an attack run counts where that is not right answers: a model that refuses may also not answer."""
    held = words_of(other.summary).held
    return "" if held == ROBUST else f" ({held})"


def _attacked(other: AttackedRun) -> Iterator[tuple[Any, ...]]:
    images = other.verdicts().images
    each = worth_of(image.group for image in images) / max(1, len(images))
    for at in other.summary.per_eps:
        goal = "" if other.summary.goal == "misclassify" else f", {plain(other.goal, 60)}"
        what = f"attacked, {norm_name(other.summary.norm)} {plain(at.eps_text, 20)}{goal}{_held(other)}"
        least = at.robust_accuracy if other.summary.images.worth is not None else _each_once(at.robust_accuracy, each)
        shown = share(other.summary, least, at.robust_accuracy_at_most)
        number = f"{at.robust_accuracy.total:,}"
        yield ([what, " ", doc.Small(plain(other.name, 60))], shown, number)


def _each_once(found: Rate, each: float) -> Rate:
    """Return a rate of an attack of before, which counts every image, with the interval of images worth `each` of one.

    Beside the rows of the evaluation, which counts copies once, its own would look narrower than it is.
    """
    return rate(found.successes, found.total, independent=each * found.total)
