"""Every test-time defence on a base model, judged at several radii, and one table of all that was judged.

    python -m benchmarks.zoo --base tiny --out runs/zoo
    python -m benchmarks.zoo --base benchmarks.cifar10.model:load --data parquet:test.parquet --label cifar10
    python -m benchmarks.zoo --base tiny-robust --groups crops,views,draws,drift,counters --screen
    python -m benchmarks.zoo

Without a base it prints the tables of what is there. A run that was stopped goes on where it was. `--screen` takes a
twentieth to a fifth of the time: ten steps, no targets and no queries, few draws. What it leaves is an upper bound
(of a random defence but for a few images, as few draws judge the transferred points), enough to see that a defence adds
nothing; one that seems to add something is to be judged without it.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import robustvlm as rv
from benchmarks.common import exit_code_of, markdown
from robustvlm.commands.judge.attacks import FEATURE, MODE, SHORT
from robustvlm.commands.judge.record import Judgement, ModelJudgement
from robustvlm.core.files import read_text, write_text
from robustvlm.errors import UserError, nearest
from robustvlm.report.words import interval, percent
from robustvlm.runs.tools import sessions_of
from robustvlm.stats import holm


@dataclass(frozen=True)
class Group:
    """Defences that are judged in one run, with as much effort as their cost allows.

    Attributes:
        steps: of every gradient attack; queries: of Square. defences: as written behind a model; those of many views
            draw fewer than their papers, as every view is a pass of every step.
        eot: draws that a gradient averages over; None for what a defence declares. draws: that judge a point.
        screened: the draws of a gradient where a group is only screened. targets: wrong classes that APGD is aimed at.
        lanes: images side by side; few where every image brings many views.
    """

    steps: int
    queries: int
    defences: tuple[str, ...]
    eot: int | None = None
    draws: int = 21
    screened: int | None = None
    targets: int = 9
    lanes: int = 32

    def screen(self) -> Group:
        """Return the group with the least effort that says something: what holds may still fall to more."""
        return replace(self, steps=10, queries=0, targets=0, draws=5, eot=self.screened)


GROUPS = {
    "filters": Group(20, 100, ("jpeg:75", "bits:3", "median:3", "blur:3", "clipure", "bits:3+jpeg:75")),
    "loops": Group(20, 100, ("antiadv", "antiadv:2:0.004", "et3", "csr", "tte:5")),
    "counters": Group(20, 100, ("ttc",), eot=4, draws=5, screened=2),
    "crops": Group(20, 20, ("vote:8", "agc:8"), screened=1),
    "views": Group(20, 20, ("rtpt:views=8", "ttp:views=8"), screened=1),
    "draws": Group(20, 20, ("randpad",), screened=4),
    "drift": Group(20, 20, ("dbd",), screened=1, lanes=8),
}
SCREEN = ".screen"
"""What the name of a file of screened figures ends with, before `.json`."""


def judge(
    base: str, data: str | None, label: str, group: str, eps: str, *, limit: int, out: Path, screen: bool = False
) -> None:
    """Judge the defences of a group on a base, unless it is done; figures go to `LABEL-EPS-GROUP.json`.

    Screened, with little effort, they go to `LABEL-EPS-GROUP.screen.json`.

    Raises:
        UserError: a run of other images or another model has that name.
    """
    name, chosen = f"{label}-{eps.replace('/', 'of')}-{group}", GROUPS[group]
    if screen:
        name, chosen = name + SCREEN, chosen.screen()
    found = rv.judge(
        ",".join(f"{base}+{defence}" for defence in chosen.defences),
        limit=limit,
        eps=eps,
        steps=chosen.steps,
        queries=chosen.queries,
        targets=chosen.targets,
        lanes=chosen.lanes,
        eot=chosen.eot,
        draws=chosen.draws,
        out=out / "runs",
        name=name,
        data=data or "emoji",
    )
    if len(made := sessions_of(found.manifest)) > 1:
        commits = " and ".join(str(one["git_commit"])[:8] for one in made)
        raise UserError(f"the run '{found.folder}' was made by several versions, {commits}: delete it and begin anew")
    write_text(out / f"{name}.json", found.summary.model_dump_json(indent=1) + "\n")


def tables(out: Path) -> Iterator[str]:
    """Yield a table for every base and radius of which figures are there; p-values are by Holm over each table."""
    found: dict[tuple[str, str], tuple[list[Judgement], list[Judgement]]] = {}
    for path in sorted(out.glob("*.json")):
        label, eps, _ = path.stem.rsplit("-", 2)
        full, screened = found.setdefault((label, eps.replace("of", "/")), ([], []))
        judged = Judgement.model_validate_json(read_text(path))
        (screened if path.stem.endswith(SCREEN) else full).append(judged)
    for (label, eps), (full, screened) in found.items():
        images = {judged.images for judged in (*full, *screened)}
        if len(images) > 1:
            raise UserError(f"the groups of '{label}' at {eps} are of different numbers of images: judge them anew")
        yield f"### {label}, L∞ {eps}, {images.pop()} images\n\n{table(full, screened)}"


def table(full: Sequence[Judgement], screened: Sequence[Judgement] = ()) -> str:
    """Return one Markdown table: the undefended model once for each effort, then every defence.

    What is only screened is marked with a star and has no p: the upper bound of one side tells nothing of a difference.
    It is among those that Holm counts, as what a screen chose to be judged was chosen from all of them.
    """
    defended = _defended(full)
    little = {spec: one for spec, one in _defended(screened).items() if spec not in defended}
    values = [one.gain.p_value for one in defended.values() if one.gain is not None]
    adjusted = dict(zip(defended, holm(values + [1.0] * len(little)), strict=False))
    rows = [_row(f"none ({effort})", one, {}) for effort, one in _bases(full)]
    rows += [_row(f"none ({effort}) *", one, {}) for effort, one in _bases(screened)]
    rows += [
        _row(f"`+{spec.removeprefix(f'{one.facts.base}+')}`" + " *" * (spec in little), one, adjusted)
        for spec, one in sorted((defended | little).items(), key=lambda item: -item[1].worst.successes)
    ]
    heads = ["defence", "clean", "unaware: PGD", "APGD", "own label", "gradients alone", "worst", "p", "F / B"]
    return markdown(heads, rows)


def _defended(judgements: Sequence[Judgement]) -> dict[str, ModelJudgement]:
    return {one.spec: one for judged in judgements for one in judged.models if one.facts.base is not None}


def _bases(judgements: Sequence[Judgement]) -> list[tuple[str, ModelJudgement]]:
    """Return the undefended model of every effort, the most first, with what the effort is."""
    found = {
        (-judged.queries, judged.steps, judged.targets): one
        for judged in judgements
        for one in judged.models
        if one.facts.base is None
    }
    ordered = sorted(found.items(), key=lambda item: (item[0][:2], item[0][2] or 0))
    return [(f"{steps} steps, {-queries} queries", one) for (queries, steps, _), one in ordered]


def _row(name: str, one: ModelJudgement, adjusted: Mapping[str, float]) -> list[str]:
    facts, p = one.facts, adjusted.get(one.spec)
    through = [act.name for act in one.acts if act.name.startswith((MODE, SHORT)) or act.name == FEATURE]
    alone = sum(image.held_in(through) for image in one.images) / len(one.images)
    return [
        name,
        *(percent(figure.value) for figure in (one.clean, *one.unaware.values(), one.own_label)),
        percent(alone),
        f"{percent(one.worst.value)} ({interval(one.worst)})",
        "" if p is None else f"{p:.2g}",
        f"{facts.forward:g} / {facts.backward:g}",
    ]


def main(argv: list[str] | None = None) -> int:
    """Command line; user errors end in one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--base", help="the undefended model; without it, only the tables are printed")
    parser.add_argument("--data", help="its images; default: the bundled ones")
    parser.add_argument("--label", help="what the tables call it; default: its spec")
    parser.add_argument("--eps", default="1/255,4/255", help="radii, L-infinity")
    parser.add_argument("--groups", default=",".join(GROUPS), help="of defences, with commas between")
    parser.add_argument("--screen", action="store_true", help="with little effort: upper bounds")
    parser.add_argument("--limit", type=int, default=100, help="images")
    parser.add_argument("--out", type=Path, default=Path("runs/zoo"))
    given = parser.parse_args(argv)
    return exit_code_of(lambda: run(given))


def run(given: argparse.Namespace) -> None:
    """Judge what is missing on the base, if one is named, and print the tables."""
    label, groups = given.label or given.base or "", given.groups.split(",")
    for group in groups:
        if group not in GROUPS:
            raise UserError(f"there is no group '{group}': {nearest(group, list(GROUPS))}")
    if given.base and not re.fullmatch(r"[\w.]+(-[\w.]+)*", label):
        raise UserError(f"'{label}' is no name for a file: pass --label, as --label photowords")
    for group in groups if given.base else ():
        for eps in given.eps.split(","):
            judge(given.base, given.data, label, group, eps, limit=given.limit, out=given.out, screen=given.screen)
    print("\n\n".join(tables(given.out)))


if __name__ == "__main__":
    sys.exit(main())
