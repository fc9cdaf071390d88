"""`robustvlm attack`: the attack success rate of a model on labelled images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

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
from robustvlm.core.ranks import current_ranks

if TYPE_CHECKING:
    from robustvlm.cli.console import Console
    from robustvlm.commands.attack.setup import Prepared
    from robustvlm.commands.attack.summary import Summary
    from robustvlm.runs.records import Estimate

T = TypeVar("T")

_MODEL = (
    "tiny (bundled), NAME/PRETRAINED or NAME/FILE (open_clip), hf-hub:ORG/NAME, a folder, or module:callable (an "
    "encoder or a classifier); defences follow as +smooth:0.25 or +reject:0.5."
)
_DATA = "emoji (bundled), imagefolder:DIR, parquet:FILE, torchvision:NAME:ROOT, hf:NAME or wds:URL."
_ATTACK = (
    "Attacks in order, each optionally with its own settings, e.g. apgd-ce,apgd-t or pgd:steps=40:objective=dlr; the "
    "plans standard, plus, rand and fare; torchattacks:NAME and autoattack[:VERSION] run those packages."
)
_SECOND_OPINION = (
    "Let another program attack the images again that withstood, and report what only it breaks: autoattack, "
    "autoattack:plus, torchattacks:NAME."
)
_GOAL = (
    "misclassify; superclass:LEVEL, :all (one perturbation for all levels) or :matrix; targeted:CLASS; deny, intrude "
    "(models that may refuse); feature, feature:FILE.png or feature:TEXT."
)


def attack(
    model: Annotated[str, typer.Argument(help=_MODEL)] = "tiny",
    data: Annotated[str, typer.Option(help=_DATA)] = "emoji",
    classes: Classes = None,
    templates: Templates = None,
    tree: TreeFile = None,
    goal: Annotated[str, typer.Option(help=_GOAL)] = "misclassify",
    min_cos: Annotated[
        float, typer.Option(help="--goal feature is reached below this cosine to the clean feature.")
    ] = 0.5,
    attack_list: Annotated[str, typer.Option("--attack", help=_ATTACK)] = "apgd-ce,apgd-t",
    second_opinion: Annotated[str | None, typer.Option(help=_SECOND_OPINION)] = None,
    norm: Annotated[str, typer.Option(help="Linf or L2, in pixels scaled to [0, 1].")] = "Linf",
    eps: Annotated[
        str | None, typer.Option(help="Radius, or radii for a security curve: 1/255,2/255 [default: 2/255; L2: 0.5].")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Gradient steps [default: pgd 20, apgd 100].")] = None,
    restarts: Annotated[int | None, typer.Option(help="Random restarts [default: 1].")] = None,
    limit: Annotated[int | None, typer.Option(help="Attack this many images, chosen by a hash of their ids.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of every random draw.")] = 0,
    lanes: Annotated[
        int | None, typer.Option(help="Images attacked side by side in one batch [default: 64; GPU: 256].")
    ] = None,
    device: Device = "auto",
    precision: Annotated[
        str, typer.Option(help="fp32; bf16 (gradients only, successes confirmed in fp32); fp64.")
    ] = "fp32",
    eot: Annotated[
        int | None,
        typer.Option(help="Draws of a random model averaged in every gradient [default: 10; 1 if not random]."),
    ] = None,
    draws: Annotated[
        int | None,
        typer.Option(
            help="Fresh draws of a random model that judge a success by majority [default: 21; 1 if not random]."
        ),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Take gradients from a torch.compile'd copy; the plain model confirms.")
    ] = False,
    resolution: Annotated[
        int | None, typer.Option(help="Side in pixels of the image that is perturbed [default: the model's].")
    ] = None,
    out: Out = Path("runs"),
    name: RunName = None,
    resume: Resume = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Stop when it is spent, with bounds on what is not decided: 20000passes (over all sessions), 90s, "
            "10min or 2h (of this session). Repeat the command with more, or without, to go on."
        ),
    ] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Make the clean pass, say what the attacks will cost, and stop.")
    ] = False,
    save_adversarial: Annotated[
        bool, typer.Option("--save-adversarial", help="Keep every successful adversarial image (safetensors).")
    ] = False,
    checks: Annotated[
        str,
        typer.Option(help="Checks of the evaluation itself: full (with extra attacks on 32 images), quick or none."),
    ] = "full",
    as_json: SummaryAsJson = False,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            help="End with exit code 1 if this holds at any eps, e.g. 'asr>0.5' or 'robust_accuracy.low<30%'."
        ),
    ] = None,
) -> None:
    """Attack a model on labelled images and report the attack success rate (ASR) with its 95 % interval.

    Stopped or killed at any moment, the same command goes on where it was and ends with the same results.
    """
    # The heavy libraries are loaded here, so that --help and --version answer at once.
    from robustvlm.cli.console import Console
    from robustvlm.commands.attack.cost import parse_budget
    from robustvlm.commands.attack.setup import prepare
    from robustvlm.commands.attack.summary import parse_condition

    conditions = [parse_condition(text) for text in fail_if or []]
    limits = parse_budget(budget)
    ranks = current_ranks()
    console = Console(stderr=as_json, quiet=not ranks.leader)
    with console.status("Loading model and data") if console.is_terminal else _Quiet():
        prepared = prepare(
            model=model,
            data=data,
            classes=classes,
            templates=templates,
            tree=tree,
            goal=goal,
            min_cos=min_cos,
            attack=attack_list,
            second_opinion=second_opinion,
            norm=norm,
            eps=eps,
            steps=steps,
            restarts=restarts,
            limit=limit,
            seed=seed,
            lanes=lanes,
            device=device,
            precision=precision,
            eot=eot,
            draws=draws,
            compiled=compiled,
            resolution=resolution,
            save_adversarial=save_adversarial,
            checks=checks,
            out=out,
            name=name,
            command=given_command(),
        )
    settings: dict[str, Any] = {"fresh": resume is False, "resume": resume is True}
    if estimate:
        _forecast(_work(prepared, prepared.estimate, console, settings), prepared, console, as_json=as_json)
        return
    summary = _work(prepared, prepared.run, console, settings | {"budget": limits})
    if not ranks.leader:
        return
    _show(summary, prepared, console, as_json=as_json)
    end_if_any_holds(conditions, summary)


class _Quiet:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *exception: object) -> None:
        return None


def _work(prepared: Prepared, act: Callable[..., T], console: Console, settings: dict[str, Any]) -> T:
    from robustvlm.cli.progress import AttackProgress

    console.print(
        f"Attacking [bold]{plain(prepared.manifest['model']['spec'])}[/bold] -> {plain(prepared.folder.path)}"
    )
    say_remarks(console, prepared.manifest)
    if current_ranks().size > 1:
        console.print(f"{current_ranks().size} processes share the images; the progress shown is that of the first.")
    with interruptible(f"everything so far is kept in '{prepared.folder.path}'"), AttackProgress(console) as progress:
        return act(progress, **settings)


def _forecast(found: Estimate, prepared: Prepared, console: Console, *, as_json: bool) -> None:
    from robustvlm.report.words import forecast

    if as_json and not console.quiet:
        say_json(found.model_dump_json(indent=2))
    console.print(forecast(found))
    console.print(f"The clean pass is kept in {plain(prepared.folder.path)}; without --estimate the run goes on there.")


def _show(summary: Summary, prepared: Prepared, console: Console, *, as_json: bool) -> None:
    from robustvlm.commands.attack.terminal import attack_table

    if as_json:
        say_json(summary.model_dump_json(indent=2))
        return
    console.print(attack_table(summary))
    console.print(f"Report:  {plain(prepared.folder.report_path)}")
    console.print(f"Results: {plain(prepared.folder.results_path)}")
