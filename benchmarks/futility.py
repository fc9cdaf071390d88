"""When attacks may be given up: full walks and searches are recorded, and the rules are replayed on what was recorded.

    python -m benchmarks.futility walks tiny --eps 1/255,2/255,4/255 --out walks.safetensors
    python -m benchmarks.futility searches tiny --eps 2/255 --out searches.safetensors
    python -m benchmarks.futility show *.safetensors

`walks` records FAB's walk along the boundary to every target class of every image that is right, `searches` Square's
best loss after every query, both without any early end. `show` replays the rules of `robustvlm.attacks.futility`: what
they would have lost, by how much what a walk says after k steps exceeds the shortest perturbation of the whole walk,
and the steps that are paid where there is nothing to find.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.common import Subject, exit_code_of, load_subject, markdown
from robustvlm.attacks import (
    ROBUST,
    Job,
    LaneAttack,
    LaneEngine,
    Objective,
    Oracle,
    Square,
    ThreatModel,
    futility,
    objective,
    parse_attacks,
    parse_eps,
    parse_norm,
)
from robustvlm.attacks.apgd import CLOSE, FIRST_CLOSE, LONGEST_WALK
from robustvlm.attacks.fab import boundary_step
from robustvlm.attacks.threat import lengths
from robustvlm.core.seeds import generator
from robustvlm.errors import UserError

_STEPS = (3, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 75, 100)


@dataclass(frozen=True, eq=False)
class Walks:
    """FAB's walks to one class of one image each, all from the image: distances, lengths and successes, [N, steps]."""

    name: str
    norm: str
    radii: tuple[float, ...]
    distances: Tensor
    lengths: Tensor
    success: Tensor

    @property
    def shortest(self) -> Tensor:
        """Return the length of the shortest perturbation of each whole walk, [N]; infinite where there is none."""
        return torch.where(self.success, self.lengths, torch.inf).amin(1)

    def reaches(self) -> Iterator[tuple[int, Tensor]]:
        """Yield after every step what the rule knows of the boundary's distance, [N]; infinite before a success."""
        one = futility.nothing_known(torch.zeros(1, 1))
        state = {key: value.expand(len(self.lengths), *value.shape[1:]) for key, value in one.items()}
        for step in range(self.lengths.shape[1]):
            seen = (self.distances[:, step], self.lengths[:, step], self.success[:, step])
            state = futility.learn(state, *seen)
            yield step, torch.where(state["shortest"].isfinite(), futility.reach(state), torch.nan)


@dataclass(frozen=True, eq=False)
class Searches:
    """Square's searches on one image each: the best loss after every query, [N, queries + 1].

    Zero and more is a success, after which nothing is recorded (NaN).
    """

    name: str
    norm: str
    eps: float
    best: Tensor


def record_walks(
    subject: Subject, name: str, norm: str, radii: Sequence[float], aim: Objective, *, steps: int = 100, lanes: int = 64
) -> Walks:
    """Walk from every image to each of its targets."""
    found: list[list[Tensor]] = [[], [], []]
    pairs = [(job, target) for job in subject.jobs for target in job.targets]
    for start in range(0, len(pairs), lanes):
        chosen = pairs[start : start + lanes]
        x0 = torch.stack([job.pixels for job, _ in chosen])
        label, target = torch.tensor([job.label for job, _ in chosen]), torch.tensor([one for _, one in chosen])
        x, rows = x0, []
        for _ in range(steps + 1):
            loss, grad = _gradient(subject.classifier, aim, x, label, target)
            moved, distance = boundary_step(x0, x, loss, grad, norm)
            rows.append((distance, lengths(x - x0, norm), loss > 0))
            x = moved
        for column, values in zip(found, zip(*rows, strict=True), strict=True):
            column.append(torch.stack(values, dim=1))
    return Walks(f"{name}, {aim.name}", norm, tuple(radii), *(torch.cat(column) for column in found))


def _gradient(model: nn.Module, aim: Objective, x: Tensor, label: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_(True)
    loss = aim(model(x), label, target)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach(), grad


def record_searches(subject: Subject, name: str, threat: ThreatModel, queries: int, lanes: int) -> Searches:
    """Search from every image to the end of the budget or to a success."""
    attack, found = Square(n_iter=queries, futility=False), []
    for start in range(0, len(subject.jobs), lanes):
        found.append(_search(subject.classifier, attack, subject.jobs[start : start + lanes], threat))
    return Searches(name, threat.norm, threat.eps, torch.cat(found))


def _search(model: nn.Module, attack: Square, jobs: Sequence[Job], threat: ThreatModel) -> Tensor:
    labels = torch.tensor([job.label for job in jobs])
    begun = [attack.begin(job.pixels[None], threat, generator(0, job.image_id, attack.name, 0), 0) for job in jobs]
    state = {key: torch.cat([one[key] for one in begun]) for key in begun[0]}
    best = torch.full((len(jobs), attack.n_iter + 1), torch.nan)
    alive = torch.arange(len(jobs))
    for step in range(attack.n_iter + 1):
        with torch.no_grad():
            loss = attack.objective(model(state["x"]), labels[alive], labels[alive])
        steps = torch.full((len(alive),), step)
        state = attack.advance(state, loss, torch.zeros(0), steps, threat)
        best[alive, step] = state["loss_best"].float()
        left = state["loss_best"] < 0
        if not bool(left.all()):
            alive, state = alive[left], {key: value[left] for key, value in state.items()}
        if not len(alive):
            break
    return best


# What was recorded, as files


def save(found: Walks | Searches, path: Path) -> None:
    """Write what was recorded."""
    if isinstance(found, Walks):
        radii = ",".join(map(repr, found.radii))
        tensors = {"distances": found.distances, "lengths": found.lengths, "success": found.success}
        save_file(tensors, path, {"name": found.name, "norm": found.norm, "radii": radii})
    else:
        save_file({"best": found.best}, path, {"name": found.name, "norm": found.norm, "eps": repr(found.eps)})


def read(path: Path) -> Walks | Searches:
    """Read what `save` wrote."""
    with safe_open(path, "pt") as file:
        about, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if "best" in tensors:
        return Searches(about["name"], about["norm"], float(about["eps"]), tensors["best"])
    radii = tuple(map(float, about["radii"].split(",")))
    return Walks(about["name"], about["norm"], radii, tensors["distances"], tensors["lengths"], tensors["success"])


# Replays


def excess(found: Sequence[Walks]) -> list[list[str]]:
    """Return, for some numbers of steps, by which factor at most walks say more than the shortest perturbation."""
    worst = dict.fromkeys(_STEPS, 0.0)
    for walks in found:
        for step, reach in walks.reaches():
            if step in worst:
                ratio = (reach / walks.shortest).nan_to_num(0)
                worst[step] = max(worst[step], float(ratio.max()))
    factors = {step: float(futility.safety(torch.tensor(step))) for step in _STEPS}
    return [[str(k), f"{worst[k]:.2f}", f"{factors[k]:.2f}", _allowance(factors[k], worst[k])] for k in _STEPS]


def _allowance(factor: float, worst: float) -> str:
    return "" if factor == float("inf") else f"{(factor - 1) / max(worst - 1, 1e-9):.1f}"


@dataclass(frozen=True)
class Replay:
    """What the rule does to walks at one radius.

    Attributes:
        classes: walks. near: those with a perturbation within the radius. lost: of these, how many are given up before
            they find one. points: looked at per class that is out of reach, by a walk alone (`fab-t`) and by
            `apgd-t`, which goes on with 100 iterations where a class is not given up.
    """

    classes: int
    near: int
    lost: int
    walked: float
    iterated: float


def replay(walks: Walks, eps: float, *, iterations: int = 100) -> Replay:
    """Give walks up by the rule of now at a radius."""
    count, steps = walks.lengths.shape
    given_up, close = torch.full((count,), steps), torch.full((count,), steps)
    for step, reach in walks.reaches():
        out = reach > futility.safety(torch.tensor(step)) * eps
        given_up = torch.where(out & (given_up == steps), step, given_up)
        near = (reach <= CLOSE * eps) & (step >= FIRST_CLOSE)
        close = torch.where(near & (close == steps), step, close)
    hit = (walks.success & (walks.lengths <= eps)).float()
    first = torch.where(hit.any(1), hit.argmax(1), steps)
    handed = close.clamp_max(LONGEST_WALK)
    iterated = torch.where(given_up <= handed, given_up + 1, handed + 2 + iterations)
    far = walks.shortest > eps
    lost = (walks.shortest <= eps) & (given_up < first)
    paid = [_mean(values[far]) for values in ((given_up + 1).clamp_max(steps), iterated)]
    return Replay(count, int((~far).sum()), int(lost.sum()), *paid)


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if len(values) else float("nan")


def stops(searches: Searches, *, behind: bool = False) -> Tensor:
    """Return after how many queries the rule of now ends each search, [N]; the whole budget where it does not.

    Args:
        behind: take every search for one that is behind what gradients have reached, all the time.
    """
    count, queries = len(searches.best), searches.best.shape[1] - 1
    state = {key: value.expand(count, *value.shape[1:]) for key, value in futility.begin(torch.zeros(1)).items()}
    if behind:
        state |= futility.knowing(state, -torch.inf)
    ended, before = torch.full((count,), queries), torch.full((count,), -torch.inf)
    best = searches.best.nan_to_num(torch.inf)  # of a search that has succeeded
    for query in range(queries + 1):
        now, steps = best[:, query], torch.full((count,), query)
        state |= futility.watch(state, now, now > before, steps, queries)
        over = futility.futile(state, steps, queries) & (now < 0)
        ended, before = torch.where(over & (ended == queries), query, ended), now
    return ended


def table_of_walks(found: Sequence[Walks]) -> str:
    """Return what the rule does to every set of walks at its radii."""
    rows = []
    for walks in found:
        for eps in walks.radii:
            one = replay(walks, eps)
            at = f"{walks.norm} {eps * 255:.3g}/255" if walks.norm == "Linf" else f"L2 {eps:g}"
            rows.append([walks.name, at, one.classes, one.near, one.lost, f"{one.walked:.1f}", f"{one.iterated:.1f}"])
    heads = ["walks", "radius", "classes", "in reach", "lost", "steps of fab-t", "steps of apgd-t"]
    return markdown(heads, rows)


def table_of_searches(found: Sequence[Searches]) -> str:
    """Return what the rule does to every set of searches."""
    rows = []
    for searches in found:
        queries = searches.best.shape[1] - 1
        won = searches.best.nan_to_num(torch.inf).amax(1) >= 0
        first = (searches.best.nan_to_num(torch.inf) >= 0).float().argmax(1)
        ended, late = [stops(searches, behind=behind) for behind in (False, True)], won & (first > futility.FIRST_QUERY)
        at = f"{searches.norm} {searches.eps * 255:.3g}/255" if searches.norm == "Linf" else f"L2 {searches.eps:g}"
        costs = [cell for one in ended for cell in (int((won & (one < first)).sum()), f"{_mean(one[~won]):.0f}")]
        rows.append([searches.name, at, len(won), int(won.sum()), int(late.sum()), *costs, queries])
    heads = [
        "searches",
        "radius",
        "images",
        "fooled",
        f"after query {futility.FIRST_QUERY}",
        "lost",
        "queries where none",
        "lost, all behind gradients",
        "queries where none",
        "of",
    ]
    return markdown(heads, rows)


def main(argv: list[str] | None = None) -> int:
    """Command line; user errors end in one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.futility", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("walks", "searches", "show"))
    parser.add_argument("model", nargs="*", default=["tiny"], help="a model; with show: what was recorded")
    parser.add_argument("--data", default="emoji")
    parser.add_argument("--name", help="what the tables call model and data; default: the model")
    parser.add_argument("--limit", type=int, default=40, help="images")
    parser.add_argument("--norm", default="Linf")
    parser.add_argument("--eps", default="2/255", help="radii of replayed walks; the one of searches")
    parser.add_argument("--objective", default="margin-t", help="of walks")
    parser.add_argument("--queries", type=int, default=5000)
    parser.add_argument("--lanes", type=int, default=64)
    parser.add_argument("--left-robust", action="store_true", help="search on what APGD-CE and APGD-T leave alone")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(argv)
    return exit_code_of(lambda: run(given))


def run(given: argparse.Namespace) -> None:
    """Record or show."""
    if given.what == "show":
        found = [read(Path(path)) for path in given.model]
        walks = [one for one in found if isinstance(one, Walks)]
        searches = [one for one in found if isinstance(one, Searches)]
        if walks:
            print(markdown(["steps", "largest excess", "factor asked for", "allowance"], excess(walks)), end="\n\n")
            print(table_of_walks(walks), end="\n\n")
        if searches:
            print(table_of_searches(searches))
        return
    radii, norm = [radius for _, radius in parse_eps(given.eps)], parse_norm(given.norm)
    subject = load_subject(given.model[0], given.data, given.limit)
    name = given.name or given.model[0]
    if given.out is None:
        raise UserError("name a file with --out")
    if given.what == "walks":
        save(record_walks(subject, name, norm, radii, objective(given.objective), lanes=given.lanes), given.out)
        return
    threat = ThreatModel(norm, radii[0])
    if given.left_robust:
        subject = replace(subject, jobs=_left(subject, threat, given.lanes))
    save(record_searches(subject, name, threat, given.queries, given.lanes), given.out)


def _left(subject: Subject, threat: ThreatModel, lanes: int) -> list[Job]:
    jobs, oracle = subject.jobs, Oracle(subject.classifier)
    for attack in parse_attacks("apgd-ce,apgd-t"):
        assert isinstance(attack, LaneAttack)
        jobs = [
            one.job
            for one in LaneEngine(oracle, attack, threat, lanes=lanes, seed=0).run(jobs)
            if one.outcome == ROBUST
        ]
    return jobs


if __name__ == "__main__":
    sys.exit(main())
