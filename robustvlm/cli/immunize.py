"""`robustvlm immunize`: a model that says "I don't know", from class names and some images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robustvlm.cli.options import (
    Classes,
    Device,
    Fresh,
    LlmModel,
    LlmPrices,
    LlmUrl,
    Out,
    RecordAsJson,
    RunName,
    Templates,
    given_command,
    make_client,
    say_remarks,
    spent,
)
from robustvlm.cli.terminal import say, say_json
from robustvlm.core.defaults import LAMBDA_INF

if TYPE_CHECKING:
    from robustvlm.cli.console import Console
    from robustvlm.commands.immunize.run import ImmunizeObserver

_HELD_OUT = (
    "Data, or a share of --data, that sets the thresholds [default: emoji?split=val&copies=8 for the bundled data, "
    "else 0.2]."
)
_ANTIBODIES = "bank (bundled), a file, llm, wordnet, noise (baseline), none."
_MARGIN = "Cosine of image and antibody above which they are pushed apart; auto takes it from the data."
_NO_IMAGES = "From texts alone: no adapter, thresholds at 0."
_ORACLE = "Keep antibodies that name a class of an --ood set: figures on it are then those of an oracle, and say so."
_ADD_CLASS = "Add this class to the run MODEL, from its images in --data; the result is a new run."


def immunize(
    model: Annotated[str, typer.Argument(help="Any model without smoothing; with --add-class, a run.")] = "tiny",
    data: Annotated[
        str, typer.Option(help="Labelled images to learn from; `robustvlm data` lists the forms.")
    ] = "emoji?split=train",
    held_out: Annotated[str | None, typer.Option("--held-out", help=_HELD_OUT)] = None,
    classes: Classes = None,
    templates: Templates = None,
    tree: Annotated[Path | None, typer.Option(help="Class tree: superclasses are no antibodies.")] = None,
    no_images: Annotated[bool, typer.Option("--no-images", help=_NO_IMAGES)] = False,
    shots: Annotated[int, typer.Option(help="Images of each class to learn from; 0 for all.", min=0)] = 0,
    antibodies: Annotated[str, typer.Option(help=_ANTIBODIES)] = "bank",
    llm: LlmUrl = None,
    llm_model: LlmModel = None,
    llm_prices: LlmPrices = None,
    xi: Annotated[
        str, typer.Option(help="Largest angle of a prototype to its text, degrees; auto: an eighth of the median.")
    ] = "auto",
    per_class: Annotated[int, typer.Option("--prototypes-per-class", help="Prototypes of each class.")] = 1,
    band: Annotated[
        str | None,
        typer.Option(help="Cosines SAFE,RISK that antibodies lie between; either may be auto [default: auto,auto]."),
    ] = None,
    margin: Annotated[str, typer.Option(help=_MARGIN)] = "0.2",
    push_weight: Annotated[float, typer.Option(help="Weight of pushing from antibodies (lambda).")] = 1.0,
    lambda_inf: Annotated[float, typer.Option("--lambda-inf", help="Weight of antibodies in the score.")] = LAMBDA_INF,
    kappa: Annotated[
        str, typer.Option(help="Concentration in training: model (its temperature) or class (vMF estimates).")
    ] = "model",
    miss: Annotated[float, typer.Option(help="Share of known images that thresholds reject.")] = 0.05,
    min_images: Annotated[
        int, typer.Option(help="Held-out images, classified right, that a threshold of its own needs.")
    ] = 30,
    sigma: Annotated[
        list[float] | None, typer.Option(help="Also set thresholds behind noise, for certify and +smooth; repeatable.")
    ] = None,
    hidden: Annotated[int, typer.Option(help="Width of the adapter.")] = 128,
    steps: Annotated[int, typer.Option(help="Training steps of the adapter, at most; 0 for none.", min=0)] = 400,
    lr: Annotated[float, typer.Option(help="Learning rate of the adapter.")] = 3e-4,
    decay: Annotated[float, typer.Option(help="Weight of ||theta||^2 (eta).")] = 0.1,
    ood: Annotated[list[str] | None, typer.Option(help="Unknown images to measure on; may be repeated.")] = None,
    oracle_words: Annotated[bool, typer.Option("--oracle-words", help=_ORACLE)] = False,
    near_names: Annotated[
        Path | None, typer.Option(help="File of names of near things, to measure the antibodies' coverage.")
    ] = None,
    add_class: Annotated[str | None, typer.Option("--add-class", metavar="NAME", help=_ADD_CLASS)] = None,
    seed: Annotated[int, typer.Option(help="Seed of every random draw.")] = 0,
    device: Device = "auto",
    out: Out = Path("runs"),
    name: RunName = None,
    fresh: Fresh = False,
    as_json: RecordAsJson = False,
) -> None:
    """Immunise a model: prototypes, antibodies, a vaccinated adapter, thresholds; the run's folder is a model spec.

    `attack`, `certify`, `evaluate` and `detect` take the folder: it answers with a class or rejects.
    """
    # The heavy libraries are loaded here, so that --help and --version answer at once.
    from robustvlm.cli.console import Console
    from robustvlm.commands.immunize.config import ImmunizeConfig
    from robustvlm.commands.immunize.extend import prepare_extension
    from robustvlm.commands.immunize.run import prepare_immunize

    safe, risk = _band(band)
    config = ImmunizeConfig(
        model=model,
        data=data,
        held_out=_held_out(held_out, data),
        classes=_text(classes),
        templates=_text(templates),
        tree=_text(tree),
        images=not no_images,
        shots=shots or None,
        antibodies=antibodies,
        llm=llm_model,
        xi=_number("--xi", xi),
        per_class=per_class,
        safe=safe,
        risk=risk,
        margin=_number("--margin", margin),
        push_weight=push_weight,
        weight=lambda_inf,
        kappa=kappa,
        miss=miss,
        min_images=min_images,
        hidden=hidden,
        steps=steps,
        lr=lr,
        decay=decay,
        sigmas=sorted(set(sigma or [])),
        ood=ood or [],
        oracle_words=oracle_words,
        near_names=_text(near_names),
        add_class=add_class,
        seed=seed,
        device=device,
    )
    client = make_client(llm, llm_model, llm_prices)
    prepare = prepare_immunize if add_class is None else prepare_extension
    command = given_command()
    prepared = prepare(config, client=client, out=out, name=name, command=command)
    say_remarks(Console(stderr=True), prepared.manifest)
    record = _work(prepared.run, Console(stderr=True), fresh=fresh, quiet=as_json, steps=steps)
    if as_json:
        say_json(json.dumps(record, indent=2, ensure_ascii=False))
    else:
        _show(record, prepared, Console())
    if client is not None and not as_json:
        say(spent(client, llm_prices))


def _held_out(text: str | None, data: str) -> str | float:
    if text is None:
        labels = "&labels=all" if "labels=all" in data else ""
        return f"emoji?split=val&copies=8{labels}" if data.partition("?")[0] == "emoji" else 0.2
    try:
        return float(text)
    except ValueError:
        return text


def _band(text: str | None) -> tuple[float | None, float | None]:
    from robustvlm.errors import UserError

    if text is None:
        return None, None
    parts = text.split(",")
    if len(parts) != 2:
        raise UserError(f"--band takes two cosines SAFE,RISK, as 0.3,0.8 or auto,0.8, got '{text}'")
    safe, risk = (_number("--band", part.strip()) for part in parts)
    return safe, risk


def _number(option: str, text: str) -> float | None:
    from robustvlm.errors import UserError

    if text == "auto":
        return None
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{option} takes a number or auto, got '{text}'") from None


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _work(run: Any, console: Console, *, fresh: bool, quiet: bool, steps: int) -> dict[str, Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from robustvlm.commands.immunize.run import ImmunizeObserver

    hidden = quiet or not console.is_terminal
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        encoding = progress.add_task("Encoding", total=None)
        asking = progress.add_task("Antibodies", total=None, visible=False)
        training = progress.add_task("Vaccinating", total=steps or None)
        observer: ImmunizeObserver = ImmunizeObserver(
            on_images=lambda which, done: progress.update(encoding, description=f"Encoding {which}", completed=done),
            on_step=lambda step: progress.update(training, completed=step),
            on_classes=lambda done: progress.update(asking, completed=done, visible=True),
        )
        record: dict[str, Any] = run(observer, fresh=fresh)
        return record


def _show(record: dict[str, Any], prepared: Any, console: Console) -> None:
    from robustvlm.commands.immunize.view import ImmunizeRun, immunize_closing, immunize_report
    from robustvlm.report.screen import show

    run = ImmunizeRun(prepared.folder.path, prepared.manifest, record)
    show(console, immunize_report(run), immunize_closing(run))
