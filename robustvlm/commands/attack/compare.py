"""Attack runs against each other on the images they share: paired exact tests, corrected for how many were made."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from robustvlm.attacks.goals import goal_words
from robustvlm.commands.attack import plots
from robustvlm.commands.attack.record import AttackedRun, headline, load_run
from robustvlm.commands.attack.report import share
from robustvlm.commands.attack.summary import EpsSummary
from robustvlm.commands.attack.verdicts import tree_levels
from robustvlm.data.splits import same_images
from robustvlm.report import sections as doc
from robustvlm.report.page import drawing, page_of, write_page
from robustvlm.report.words import manifest_rows, norm_name, plain, sentence
from robustvlm.runs.records import find_run
from robustvlm.stats import PairedTest, Rate, holm, mcnemar_exact, rate, worth_of

LEVEL = 0.05
CLEAN = "unperturbed"
CRITERION = f"paired test, p <= {LEVEL:g} after Holm's correction"
"""What makes a difference count as shown."""


@dataclass(frozen=True)
class Comparison:
    """Two runs (positions in the list given) on the same images under one `condition`.

    The rates count images answered right, unperturbed or after every attack; `adjusted` is Holm's p-value over all
    comparisons of the report.
    """

    first: int
    second: int
    condition: str
    first_rate: Rate
    second_rate: Rate
    test: PairedTest
    adjusted: float

    @property
    def finding(self) -> int | None:
        """Position of the run shown to be right more often; None when the difference may be chance."""
        if self.adjusted > LEVEL or self.test.only_first == self.test.only_second:
            return None
        return self.first if self.test.only_first > self.test.only_second else self.second

    def as_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the comparison as plain JSON values, runs by name."""
        return {
            "first": names[self.first],
            "second": names[self.second],
            "condition": self.condition,
            "first_rate": self.first_rate.model_dump(mode="json"),
            "second_rate": self.second_rate.model_dump(mode="json"),
            "test": self.test.model_dump(mode="json"),
            "p_value_holm": self.adjusted,
            "better": None if self.finding is None else names[self.finding],
        }


Answers = dict[tuple[str, str], bool]
"""Whether the model is right, by image id and true class."""


def compare(*given: AttackedRun | str | Path) -> list[Comparison]:
    """Test every pair of runs, unperturbed and at each norm, eps and goal that both ran, on the images both decided.

    An image is the same when its data (`robustvlm.data.splits.same_images`), its id and the name of its class agree; of
    runs on other data nothing is tested. Where a run stopped early and has undecided images
    there is no test: those that it has decided are the ones that fall easily. Copies of one thing, as far as ids tell
    them, count once in tests and intervals. Source: McNemar's exact test, Holm's correction.

    Args:
        given: finished attack runs, as they were returned or by folder, or by name under `runs/`.

    Raises:
        UserError: a folder holds no finished attack run.
    """
    runs = [run if isinstance(run, AttackedRun) else load_run(find_run(run)) for run in given]
    tested: list[tuple[int, int, str, PairedTest, float]] = []
    answers = [_answers(run) for run in runs]
    for (i, first), (j, second) in itertools.combinations(enumerate(answers), 2):
        if not _same_images(runs[i], runs[j]):
            continue
        group = {image.image_id: image.group for image in runs[i].verdicts().images}
        for condition in [c for c in first if c in second]:
            shared = [image for image in first[condition] if image in second[condition]]
            if shared:
                groups = [group[name] for name, _ in shared]
                test = mcnemar_exact(
                    [first[condition][image] for image in shared],
                    [second[condition][image] for image in shared],
                    groups=groups,
                )
                tested.append((i, j, _text(runs[i], condition), test, worth_of(groups)))
    adjusted = holm([test.p_value for *_, test, _ in tested])
    return [
        Comparison(
            first=i,
            second=j,
            condition=text,
            first_rate=rate(test.both + test.only_first, test.total, independent=worth),
            second_rate=rate(test.both + test.only_second, test.total, independent=worth),
            test=test,
            adjusted=p,
        )
        for (i, j, text, test, worth), p in zip(tested, adjusted, strict=True)
    ]


def untold_copies(run: AttackedRun) -> bool:
    """Whether there are copies among the images of a run which their ids do not tell, as in a source of one's own."""
    worth = run.summary.images.worth
    return worth is not None and worth < worth_of(image.group for image in run.verdicts().images)


def _same_images(first: AttackedRun, second: AttackedRun) -> bool:
    return same_images(*(run.manifest.get("data") or {} for run in (first, second)))


# What it means that an image holds: the words for it, and of a goal about superclasses which classes each of them has.
Meaning = tuple[str, frozenset[frozenset[str]]]
Condition = tuple[str, float, str, Meaning] | None


def _meaning(run: AttackedRun) -> Meaning:
    """Return what it means that an image holds: a model that may refuse holds also where it rejects the image."""
    said, config = run.summary, run.manifest["config"]
    words = goal_words(said.goal, can_reject=said.can_reject, min_cos=said.min_cos, abstains=said.abstains)
    kind, _, rest = (config.get("goals") or [said.goal])[0].partition(":")
    root, _, which = rest.rpartition("/")
    levels = tree_levels(run.manifest["data"]) if kind == "superclass" else []
    of = [one.of for one in levels if one.tree == (root or levels[0].tree) and which in ("all", str(one.level))]
    members: dict[tuple[int, int], set[str]] = {}
    for place, numbers in enumerate(of):
        for name, number in zip(run.class_names, numbers, strict=True):
            members.setdefault((place, number), set()).add(name)
    return words.held, frozenset(map(frozenset, members.values()))


def _answers(run: AttackedRun) -> dict[Condition, Answers]:
    """Return who was right, unperturbed (key None) and by norm, eps, goal and meaning; undecided images are left out.

    Of a run that stopped early, only what it has decided of all its images.
    """
    table, early = run.verdicts(), bool(run.summary.unfinished)
    names = dict(enumerate(run.class_names)) | {-1: "an unknown class"}
    result: dict[Condition, Answers] = {}
    meaning = _meaning(run)
    if run.summary.says_classes:
        result[None] = {(image.image_id, names[image.label]): image.clean_correct for image in table.images}
    for i, eps in enumerate(table.eps):
        outcomes = [(image, table.after(image, i)) for image in table.images]
        waits = run.summary.images.waiting or run.summary.images.uncounted
        if early and (waits or any(outcome == "undecided" for _, outcome in outcomes)):
            continue
        result[run.summary.norm, eps, run.goal, meaning] = {
            (image.image_id, names[image.label]): outcome == "robust"
            for image, outcome in outcomes
            if outcome != "undecided"
        }
    return result


def _text(run: AttackedRun, condition: Condition) -> str:
    if condition is None:
        return CLEAN
    norm, eps, goal, _ = condition
    about = "" if goal == "misclassify" else f", {plain(goal, 60)}"
    return f"{norm_name(norm)} {plain(run.eps_texts[eps], 20)}{about}"


def findings(comparisons: Sequence[Comparison], names: Sequence[str]) -> list[str]:
    """Say in one sentence per pair of runs where one was shown to be better, by which criterion, and where neither was.

    Example:
        >>> test = mcnemar_exact([True] * 9, [False] * 9)
        >>> shown = Comparison(0, 1, "L2 0.5", rate(9, 9), rate(0, 9), test, adjusted=0.004)
        >>> findings([shown], ["A", "B"])
        ["A is right more often than B at L2 0.5 (paired test, p <= 0.05 after Holm's correction)."]
    """
    sentences = []
    pairs = dict.fromkeys((c.first, c.second) for c in comparisons)
    for first, second in pairs:
        mine = [c for c in comparisons if (c.first, c.second) == (first, second)]
        # Conditions name their goal where it is not to be right.
        does = "does better" if any("," in c.condition for c in mine) else "is right more often"
        parts = []
        for better, worse in ((first, second), (second, first)):
            where = _places([c.condition for c in mine if c.finding == better])
            if where:
                parts.append(f"{names[better]} {does} than {names[worse]} {where}")
        if parts:
            parts[-1] += f" ({CRITERION})"
        nothing = _places([c.condition for c in mine if c.finding is None])
        if nothing:
            # Names keep their spelling: only our own words begin with a capital.
            parts.append(
                f"{'no' if parts else 'No'} difference between {names[first]} and {names[second]} is shown {nothing}"
                f"{'' if parts else f' ({CRITERION})'}"
            )
        sentences.append("; ".join(parts) + ".")
    return sentences


def stopped(runs: Sequence[AttackedRun], names: Sequence[str]) -> list[str]:
    """Say which runs stopped early, and what of them is not compared."""
    return [
        f"{name} stopped early ({plain(run.summary.unfinished)}): where it has undecided images it is not tested."
        for run, name in zip(runs, names, strict=True)
        if run.summary.unfinished
    ]


def apart(runs: Sequence[AttackedRun], names: Sequence[str]) -> list[str]:
    """Say which runs are not tested against each other: other images, or a goal that means something else."""
    said, means = list[str](), [_meaning(run) for run in runs]
    for (i, first), (j, second) in itertools.combinations(enumerate(runs), 2):
        if not _same_images(first, second):
            one, other = (plain(run.manifest["config"]["data"], 60) for run in (first, second))
            said.append(f"{names[i]} and {names[j]} saw different images ({one}; {other}): they are not tested.")
        elif first.goal == second.goal and means[i] != means[j]:
            held = [plain(words, 60) for words, _ in (means[i], means[j])]
            why = f"what holds is “{held[0]}” for the one and “{held[1]}” for the other"
            if held[0] == held[1]:
                why = "their superclasses are not the same"
            said.append(f"{names[i]} and {names[j]} are not tested against each other under attack: {why}.")
    return said


def _places(conditions: Sequence[str]) -> str:
    """Join conditions as in "unperturbed, at L2 0.5 and at L2 1"."""
    places = [c if c == CLEAN else f"at {c}" for c in conditions]
    return " and ".join([", ".join(places[:-1]), places[-1]] if len(places) > 1 else places)


# The page of a comparison


def write_comparison(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write a comparison of several runs, by default to `comparison.html` beside the first; return its path.

    Raises:
        UserError: a folder holds no finished attack run, or the page cannot be written.
    """
    runs = [load_run(folder) for folder in folders]
    path = out or runs[0].folder.resolve().parent / "comparison.html"
    with drawing(runs[0].folder):
        text = page_of(comparison_report(runs, compare(*runs)))
    write_page(path, text)
    return path


def comparison_report(runs: Sequence[AttackedRun], comparisons: Sequence[Comparison]) -> doc.Report:
    """Return what is said of several runs side by side."""
    keys = [chr(ord("A") + i) if i < 26 else f"R{i + 1}" for i in range(len(runs))]
    names = [f"{plain(run.name, 60)} ({key})" for run, key in zip(runs, keys, strict=True)]
    early = stopped(runs, names)
    sentences = [*findings(comparisons, names), *apart(runs, names), *early]
    manifests: list[doc.Block] = []
    for key, run in zip(keys, runs, strict=True):
        rows: Sequence[tuple[str, doc.Line]] = manifest_rows(run.manifest)
        manifests.append(doc.More([f"{key} ", doc.Name(run.name)], [doc.Facts(rows, kind="settings")]))
    return doc.Report(
        kind="comparison",
        name=" · ".join(plain(run.name, 60) for run in runs),
        kicker=f"Comparison of {len(runs)} attack runs",
        facts="",
        verdicts=[doc.Verdict(sentences)] if sentences else [],
        sections=[
            doc.Section("The runs", [_about(runs, keys)], key="runs", short="Runs"),
            doc.Section("Robust accuracy", _curves(runs, keys), key="curve", short="Robust accuracy"),
            doc.Section(
                "Paired tests on common images", _tests(comparisons, keys, runs), key="tests", short="Paired tests"
            ),
            *_superclasses(runs, keys, early=bool(early)),
            doc.Section("Manifests", manifests, key="manifest", short="Manifests"),
        ],
    )


def _about(runs: Sequence[AttackedRun], keys: Sequence[str]) -> doc.Table:
    rows: list[doc.Row] = []
    for key, run in zip(keys, runs, strict=True):
        config, summary = run.manifest["config"], run.summary
        clean = share(summary, summary.clean_accuracy, summary.clean_accuracy_at_most)
        images, attacks = f"{summary.images.evaluated:,}", plain(", ".join(config["attack"]), 80)
        spec, data = doc.Code(config["model"], 80), doc.Code(config["data"], 80)
        rows.append(([f"{key} ", doc.Name(run.name, 60)], spec, data, attacks, clean, images))
    titles = ("Run", "Model", "Data", "Attacks", "Clean accuracy")
    return doc.Table([*map(doc.Column, titles), *doc.numbers("Images")], rows)


def _curves(runs: Sequence[AttackedRun], keys: Sequence[str]) -> list[doc.Block]:
    lead = (
        "Share of each run's images still right after every attack; of a model that may refuse, right or without an "
        "answer. Only the paired tests below compare like with like: they use the images that both runs decided."
    )
    blocks: list[doc.Block] = []
    for i, norm in enumerate(dict.fromkeys(run.summary.norm for run in runs)):
        curves = [
            plots.curve_of(run.summary, key)
            for run, key in zip(runs, keys, strict=True)
            if run.summary.norm == norm and not run.summary.images.uncounted
        ]
        if not curves:
            continue
        draw = partial(plots.security_curve, curves, key=f"curve{i}", norm=norm_name(norm))
        what = sentence(plain(plots.held_by(curves), 80))
        blocks.append(doc.Chart(draw, caption=f"{what} under attack in {norm_name(norm)}, with 95% bands."))
    radii = sorted({(run.summary.norm, at.eps, at.eps_text) for run in runs for at in run.summary.per_eps})
    rows: dict[tuple[str, float], doc.Row] = {}
    for norm, eps, text in radii:
        label = f"{norm_name(norm)} {plain(text, 20)}"
        rows.setdefault((norm, eps), (label, *(_robust(run, norm, eps) for run in runs)))
    return [
        doc.Text(lead, "lead"),
        doc.Pair([*blocks, doc.Table([doc.Column("ε"), *map(doc.Column, keys)], list(rows.values()))]),
    ]


def _robust(run: AttackedRun, norm: str, eps: float) -> doc.Measure | doc.Small:
    """Return robust accuracy; as bounds where the run stopped early."""
    for at in run.summary.per_eps if run.summary.norm == norm else ():
        if at.eps == eps:
            return share(run.summary, at.robust_accuracy, at.robust_accuracy_at_most)
    return doc.Small("not run")


def _tests(comparisons: Sequence[Comparison], keys: Sequence[str], runs: Sequence[AttackedRun]) -> list[doc.Block]:
    if not comparisons:
        lead = "These runs have no image in common (same data, id and class), so there is nothing to test pairwise."
        return [doc.Text(lead, "lead")]
    lead = (
        "Exact paired test (McNemar) on the images that both runs decided; p-values are Holm-corrected over all "
        f"{len(comparisons)} tests on this page. “Only the first” counts images that the first of the two runs gets "
        "right and the second does not."
    )
    if any(c.test.things is not None for c in comparisons):
        lead += " Copies of one thing count once, in intervals and in tests, where ids tell them."
    tested = {place for c in comparisons for place in (c.first, c.second)}
    if untold := [keys[place] for place in sorted(tested) if untold_copies(runs[place])]:
        lead += (
            f" In tests of {', '.join(untold)} copies of one thing count one by one, as ids do not tell them: p-values "
            "are too small, and intervals too narrow."
        )
    rows: list[doc.Row] = []
    for c in comparisons:
        found: doc.Line = (
            doc.Small("no difference shown") if c.finding is None else doc.Measure(f"{keys[c.finding]} is better")
        )
        counts = (f"{c.test.total:,}", f"{c.test.only_first:,}", f"{c.test.only_second:,}")
        p = "< 0.0001" if c.adjusted < 0.0001 else f"{c.adjusted:.4f}"
        right = (doc.Measure.of(c.first_rate), doc.Measure.of(c.second_rate))
        rows.append((f"{keys[c.first]} {keys[c.second]}", c.condition, found, *right, *counts, p))
    titles = ("Runs", "Perturbation", "Finding", "Right, the first", "Right, the second")
    columns = [*map(doc.Column, titles), *doc.numbers("Images", "Only the first", "Only the second", "p (Holm)")]
    return [doc.Text(lead, "lead"), doc.Table(columns, rows)]


def _superclasses(runs: Sequence[AttackedRun], keys: Sequence[str], *, early: bool) -> list[doc.Section]:
    """Return the success rate per superclass at each run's largest eps; nothing of runs that stopped early."""
    largest: list[EpsSummary | None] = [None if run.summary.unfinished else headline(run.summary) for run in runs]
    groups = [{g.name: g.attack_success_rate for g in (at.per_superclass if at else [])} for at in largest]
    names = sorted({name for some in groups for name in some})
    if not names:
        return []
    left = "; runs that stopped early are left out" if early else ""
    lead = f"At each run's largest ε, over the images that were right when clean{left}."
    titles = [f"{key} at {plain(at.eps_text, 20)}" if at else key for key, at in zip(keys, largest, strict=True)]
    rows: list[doc.Row] = [
        (doc.Name(name), *(doc.Measure.of(some[name]) if name in some else doc.Small("not run") for some in groups))
        for name in names
    ]
    table = doc.Table([doc.Column("Superclass"), *map(doc.Column, titles)], rows)
    return [
        doc.Section(
            "Attack success rate per superclass",
            [doc.Text(lead, "lead"), table],
            key="superclasses",
            short="Superclasses",
        )
    ]
