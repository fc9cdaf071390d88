"""AutoAttack: ours against pyautoattack, the whole ensemble, or with --single each attack and those of torchattacks.

    python -m benchmarks.autoattack MODEL --data DATA --limit 200 --eps 4/255
    python -m benchmarks.autoattack MODEL --data DATA --limit 200 --eps 4/255 --single

Both programs attack the same images (those the model gets right when clean) in one process, with equal steps, queries
and batch size. In the ensemble an image leaves when it is fooled; ours tell one another what they have found out of it,
and those that take gradients share the batches, as in a run of `robustvlm attack`. Passes count rows through the model,
forward and backward as one each; the questions that each program puts to the model first are counted too.
What is known is kept in a file under benchmarks/out/, and a repeated command goes on from there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.common import Counted, Subject, clock, exit_code_of, load_subject, markdown
from benchmarks.duel import HEADER, OURS, SPARE, TIME_HEADER, Part, Record, run_together, versus, where_time_goes
from benchmarks.parity import SINGLES, single
from benchmarks.published import CHECKS, set_budget, watch_autoattack
from robustvlm.attacks import LaneAttack, Oracle, Probe, ThreatModel, parse_attacks, parse_eps, parse_norm
from robustvlm.attacks.probe import probe
from robustvlm.errors import UserError

THEIRS = "pyautoattack"
ENSEMBLE = ("apgd-ce", "apgd-t", "fab-t", "square")


def main() -> None:
    """Run the comparison and print its tables as Markdown."""
    options = _options()
    torch.set_num_threads(options.threads)
    (text, eps), *_ = parse_eps(options.eps)
    threat = ThreatModel(parse_norm(options.norm), eps)
    subject = load_subject(options.model, options.data, options.limit, device=options.device)
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "ours")}
    record = _record(options, settings | {"images": [job.image_id for job in subject.jobs]})
    print(f"{options.model} on {options.data}: {len(subject.jobs)} of {subject.seen} images right when clean,")
    print(
        f"{threat.norm} eps {text}, batches of {options.lanes}, {torch.get_num_threads()} thread(s), {options.device}\n"
    )
    if options.single:
        _singles(record, subject, threat, options)
    else:
        _ensemble(record, subject, threat, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--data", default="emoji")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--norm", default="Linf")
    parser.add_argument("--eps", default="4/255")
    parser.add_argument("--lanes", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, help="of both programs [default: the published numbers]")
    parser.add_argument("--queries", type=int, help="of Square in both programs [default: the published number]")
    parser.add_argument("--single", action="store_true", help="each attack by itself, on all images")
    parser.add_argument("--only", default="", help="only these attacks, separated by commas")
    parser.add_argument("--ours", action="store_true", help="this program alone; theirs when called again without it")
    parser.add_argument("--out", type=Path, help="file of the results [default: named after the settings]")
    return parser.parse_args()


def _record(options: argparse.Namespace, settings: dict[str, object]) -> Record:
    name = f"{options.model}-{options.norm}-{options.eps}-{options.limit}{'-single' if options.single else ''}"
    path = options.out or Path("benchmarks/out") / f"autoattack-{''.join(c if c.isalnum() else '-' for c in name)}.json"
    try:
        return Record(path, settings)
    except UserError as error:
        sys.exit(str(error))


def _names(known: tuple[str, ...], options: argparse.Namespace) -> list[str]:
    wanted = options.only.split(",") if options.only else known
    return [name for name in known if name in wanted]


def _ensemble(record: Record, subject: Subject, threat: ThreatModel, options: argparse.Namespace) -> None:
    model = Counted(subject.classifier)
    found = _ask(record, model, subject, options.lanes)
    names = _names(ENSEMBLE, options)
    groups = [[name for name in names if (name == "square") == alone] for alone in (False, True)]
    for group in groups:
        if not all(record.has(OURS, name) for name in group):
            parsed = parse_attacks(",".join(budgeted(name, options) for name in group))
            attacks = [item for item in parsed if isinstance(item, LaneAttack)]
            jobs = [record.told(job) for job in subject.jobs if job.image_id not in record.fooled(OURS)]
            found_by = run_together(model, attacks, threat, jobs, found, seed=options.seed)
            _note(record, OURS, *(replace(p, name=_spare(group)) if p.name == SPARE else p for p in found_by))
    if options.ours:
        return
    for name in names:
        if record.has(THEIRS, name):
            continue
        jobs = [job for job in subject.jobs if job.image_id not in record.fooled(THEIRS)]
        parts = [Part(name, 0, [], 0, 0.0)]
        if jobs:
            budget = set_budget(options.steps, options.queries)
            given = {"seed": options.seed, "batch_size": options.lanes, "attacks": [name], "adjust": budget}
            parts = watch_autoattack(model, jobs, threat, **given)
        for part in parts:
            # A call for one attack repeats the checks, which a call for all makes once.
            if not record.has(THEIRS, part.name):
                _note(record, THEIRS, part)
    ids = [job.image_id for job in subject.jobs]
    spare = [_spare(group) for group in groups if group]
    print(markdown(HEADER, versus(record, THEIRS, [CHECKS, *names, *spare], ids=ids, seen=subject.seen)), "\n")
    print(markdown(_PART_HEADER, [_part_row(record, name) for name in [CHECKS, *names, *spare]]), "\n")
    print(markdown(TIME_HEADER, [where_time_goes(record, [*group, _spare(group)]) for group in groups if group]))


def _spare(group: Sequence[str]) -> str:
    return f"{SPARE} of {', '.join(group)}"


def _ask(record: Record, model: Counted, subject: Subject, lanes: int) -> Probe:
    """Put our questions to the model; counted the first time."""
    before = model.passes
    oracle = Oracle(model, device=next(model.parameters()).device)
    with clock() as measured:
        found = probe(oracle, subject.pixels[:lanes], subject.labels[:lanes])
    if not record.has(OURS, CHECKS):
        record.add(OURS, Part(CHECKS, len(subject.jobs), [], model.passes - before, measured.seconds))
    return found


def budgeted(name: str, options: argparse.Namespace) -> str:
    """Return the text of an attack of ours with the budget of the command."""
    steps = options.queries if name == "square" else options.steps
    return name if steps is None else f"{name}:{'queries' if name == 'square' else 'steps'}={steps}"


def _note(record: Record, side: str, *parts: Part) -> None:
    record.add(side, *parts)
    for part in parts:
        what = f"{len(part.fooled)} of {part.attacked}, {part.passes:,} passes, {part.seconds:.0f} s"
        print(f"{side} {part.name}: {what}", file=sys.stderr, flush=True)


_PART_HEADER = ("attack", *(f"{side} {what}" for side in (OURS, THEIRS) for what in ("fooled", "passes", "seconds")))


def _part_row(record: Record, name: str) -> list[object]:
    row: list[object] = [name]
    for side in (OURS, THEIRS):
        part = record.part(side, name)
        row += [f"{len(part.fooled)} of {part.attacked}", f"{part.passes:,}", f"{part.seconds:.1f}"]
    return row


def _singles(record: Record, subject: Subject, threat: ThreatModel, options: argparse.Namespace) -> None:
    model = Counted(subject.classifier)
    oracle = Oracle(model, device=options.device)
    found = probe(oracle, subject.pixels[: options.lanes], subject.labels[: options.lanes])
    ids, rows = [job.image_id for job in subject.jobs], []
    for name in _names(tuple(SINGLES), options):
        if name == "fgsm" and threat.norm != "Linf":
            continue
        theirs = SINGLES[name]
        for side in (OURS, theirs):
            if not record.has(side, name):
                part = single(
                    side, name, model, subject.jobs, threat, found, text=budgeted(name, options), options=options
                )
                _note(record, side, part)
        rows += [[name, *row] for row in versus(record, theirs, [name], ids=ids, seen=subject.seen)]
    print(markdown(("attack", *HEADER), rows))


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
