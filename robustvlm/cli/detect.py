"""`robustvlm detect`: how well scores tell images of known classes from others, clean and under attack."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from robustvlm.cli.options import (
    Classes,
    Device,
    Out,
    Resume,
    RunName,
    SummaryAsJson,
    Templates,
    TreeFile,
    end_if_any_holds,
    given_command,
    interruptible,
    plain,
    say_remarks,
)
from robustvlm.cli.terminal import say_json

if TYPE_CHECKING:
    from robustvlm.cli.console import Console
    from robustvlm.commands.detect.run import PreparedDetect
    from robustvlm.commands.detect.summary import DetectSummary

_MODEL = "Any model (`robustvlm models` lists the forms); one that may refuse also shows its own acceptance score."
_OOD = "Images of no known class, as DATA or NAME=DATA; once for each set [default: near and far emoji]."
_FIT = "Images of the known classes to learn from, or none [default: none; the training styles for the bundled data]."
_SCORES = "all, or a list such as mcm,energy,knn (docs/detect.md lists them); own shows a model's own alone."
_ATTACK = "Attacks of --under-attack; objectives do not matter, all climb the acceptance margin."
_ORACLE = "Keep words that name a class of an unknown set: scores from words are then oracles, and the report says so."
_TEMPERATURE = "Temperature of the scores from energies: they divide the logits by it; 1 is the model's own."
_FAIL_IF = (
    "End with exit code 1 if this holds, e.g. 'auroc:mcm@near<0.8' or 'fpr95.high>50%'; without :SCORE or @SET, if it "
    "holds for any."
)
_ATTACK_SCORES = (
    "Scores to attack, and own for a model's own [default: own, mcm, energy, mahalanobis, as far as there]."
)


def detect(
    model: Annotated[str, typer.Argument(help=_MODEL)] = "tiny",
    known: Annotated[
        str | None, typer.Option("--id", help="Images of the known classes [default: emoji].", metavar="DATA")
    ] = None,
    unknown: Annotated[list[str] | None, typer.Option("--ood", help=_OOD, metavar="DATA")] = None,
    fit: Annotated[str | None, typer.Option(help=_FIT, metavar="DATA")] = None,
    scores: Annotated[str, typer.Option(help=_SCORES)] = "all",
    words: Annotated[
        Path | None, typer.Option(help="File of words outside the known classes [default: the bundled class trees].")
    ] = None,
    oracle_words: Annotated[bool, typer.Option("--oracle-words", help=_ORACLE)] = False,
    temperature: Annotated[float, typer.Option(help=_TEMPERATURE)] = 1.0,
    classes: Classes = None,
    templates: Templates = None,
    tree: TreeFile = None,
    limit: Annotated[
        int | None, typer.Option(help="Score this many images of each set, chosen by a hash of their ids.")
    ] = None,
    fit_limit: Annotated[int | None, typer.Option(help="Learn from this many images, chosen likewise.")] = None,
    draws: Annotated[int, typer.Option(help="Bootstrap samples for intervals and comparisons.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of every random draw.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images per encoder pass.")] = 64,
    device: Device = "auto",
    under_attack: Annotated[
        bool,
        typer.Option(
            "--under-attack", help="Also attack the scores: unknown images to be accepted, known ones refused."
        ),
    ] = False,
    attack_scores: Annotated[str | None, typer.Option(help=_ATTACK_SCORES)] = None,
    attack_list: Annotated[str, typer.Option("--attack", help=_ATTACK)] = "pgd,apgd-ce:steps=40",
    norm: Annotated[str, typer.Option(help="Norm of the attacks: Linf or L2, in pixels scaled to [0, 1].")] = "Linf",
    eps: Annotated[str | None, typer.Option(help="Radius of the attacks [default: 2/255; L2: 0.5].")] = None,
    attack_limit: Annotated[int, typer.Option(help="Images of each set that are attacked.")] = 64,
    lanes: Annotated[int, typer.Option(help="Images attacked side by side in one batch.")] = 64,
    out: Out = Path("runs"),
    name: RunName = None,
    resume: Resume = None,
    as_json: SummaryAsJson = False,
    fail_if: Annotated[list[str] | None, typer.Option(help=_FAIL_IF)] = None,
) -> None:
    """Tell images of known classes from others by every score: AUROC, FPR95, AUPR with intervals; table and report.

    Stopped or killed at any moment, the same command goes on where it was and ends with the same results.
    """
    # The heavy libraries are loaded here, so that --help and --version answer at once.
    from robustvlm.cli.console import Console
    from robustvlm.commands.detect.config import Settings
    from robustvlm.commands.detect.run import prepare_detect
    from robustvlm.commands.detect.summary import parse_detect_condition

    conditions = [parse_detect_condition(text) for text in fail_if or []]
    settings = Settings(
        model=model,
        known=known,
        unknown=tuple(unknown or ()),
        fit=fit,
        scores=scores,
        words=words,
        oracle_words=oracle_words,
        temperature=temperature,
        classes=classes,
        templates=templates,
        tree=tree,
        limit=limit,
        fit_limit=fit_limit,
        draws=draws,
        seed=seed,
        batch_size=batch_size,
        device=device,
        under_attack=under_attack,
        attack=attack_list,
        attack_scores=attack_scores,
        norm=norm,
        eps=eps,
        attack_limit=attack_limit,
        lanes=lanes,
    )
    console = Console(stderr=as_json)
    with console.status("Loading model and data"):
        command = given_command()
        prepared = prepare_detect(settings, out=out, name=name, command=command)
    for condition in conditions:
        condition.require(prepared.config, may_refuse=prepared.classifier.can_reject)
    summary = _work(prepared, console, fresh=resume is False, resume=resume is True)
    _show(summary, prepared, console, as_json=as_json)
    end_if_any_holds(conditions, summary)


def _work(prepared: PreparedDetect, console: Console, *, fresh: bool, resume: bool) -> DetectSummary:
    from robustvlm.cli.progress import DetectProgress

    console.print(f"Scoring [bold]{plain(prepared.manifest['model']['spec'])}[/bold] -> {plain(prepared.folder.path)}")
    say_remarks(console, prepared.manifest)
    with interruptible(f"everything so far is kept in '{prepared.folder.path}'"), DetectProgress(console) as progress:
        return prepared.run(progress, fresh=fresh, resume=resume)


def _show(summary: DetectSummary, prepared: PreparedDetect, console: Console, *, as_json: bool) -> None:
    from robustvlm.commands.detect.terminal import detect_table

    if as_json:
        say_json(summary.model_dump_json(indent=2))
        return
    console.print(detect_table(summary))
    console.print(f"Report:  {plain(prepared.folder.report_path)}")
    console.print(f"Results: {plain(prepared.folder.results_path)}")
