"""`robustvlm certify`: radii inside which no attack can do certain things to a smoothed model; and their audit."""

from __future__ import annotations

import json
from dataclasses import replace
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
    require_none,
    say_remarks,
)
from robustvlm.cli.terminal import say, say_json
from robustvlm.core.defaults import LAMBDA_INF
from robustvlm.core.ranks import current_ranks

if TYPE_CHECKING:
    from robustvlm.cli.console import Console
    from robustvlm.commands.certify.config import Settings
    from robustvlm.commands.certify.setup import PreparedCertify
    from robustvlm.commands.certify.summary import CertifySummary


# `robustvlm certify`: radii inside which no attack can do certain things to a smoothed model

_MODEL = "Any model (`robustvlm models` lists the forms); of MODEL+smooth:SIGMA the smoothing is certified."
_CLAIM = (
    "feature (cosine to the smoothed clean feature), class (of the mean feature), vote (hard vote, another rule), "
    "openset (accepted or rejected), or module:callable of your own [default: feature; with --from-cache: class]."
)


def certify(
    model: Annotated[str, typer.Argument(help=_MODEL)] = "tiny",
    data: Annotated[str, typer.Option(help="The images; `robustvlm data` lists the forms.")] = "emoji",
    classes: Classes = None,
    templates: Templates = None,
    tree: TreeFile = None,
    claim: Annotated[str | None, typer.Option(help=_CLAIM)] = None,
    sigma: Annotated[float | None, typer.Option(help="Noise level in pixels scaled to [0, 1] [default: 0.25].")] = None,
    samples: Annotated[int, typer.Option(help="Noisy copies per image, at most.")] = 10_000,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="Probability that an image's certificate is false, at most [default: 0.001; with --from-cache that of "
            "the run]."
        ),
    ] = None,
    min_cos: Annotated[float, typer.Option(help="Cosine to certify (feature claims).")] = 0.5,
    radius: Annotated[
        float | None,
        typer.Option(help="Decide only whether this l2 radius is certified, with as few samples as that takes."),
    ] = None,
    at: Annotated[str | None, typer.Option(help="Radii to count images at, as 0.1,0.25 [default: by sigma].")] = None,
    tau: Annotated[
        float | None,
        typer.Option(help="Threshold of the score, from other images (openset); in place of the model's own."),
    ] = None,
    antibodies: Annotated[Path | None, typer.Option(help="File of names to score against (openset).")] = None,
    weight: Annotated[float, typer.Option(help="Weight of the antibodies (openset).")] = LAMBDA_INF,
    deployed: Annotated[
        int | None,
        typer.Option(help="Also certify what this many fresh copies keep [default: N0 of MODEL+smooth:SIGMA:N0]."),
    ] = None,
    cache: Annotated[
        str | None, typer.Option(help="Keep the noisy features as float16 or float32, to certify other prompts later.")
    ] = None,
    from_cache: Annotated[
        str | None,
        typer.Option("--from-cache", help="A run made with --cache: certify --classes by text passes only."),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="With --from-cache: independent if the prompts were fixed without looking at what the features gave, "
            "else adaptive (the default, valid always, smaller radii)."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Certify this many images, chosen by a hash of their ids.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    lanes: Annotated[int | None, typer.Option(help="Noisy images per batch [default: 128; GPU: 512].")] = None,
    device: Device = "auto",
    precision: Annotated[
        str, typer.Option(help="fp32, bf16 or fp64: part of the encoder that is certified, to be deployed alike.")
    ] = "fp32",
    out: Out = Path("runs"),
    name: RunName = None,
    resume: Resume = None,
    audit: Annotated[
        str | None,
        typer.Option(help="Attack the certificates of this finished run; exit code 1 if one breaks."),
    ] = None,
    audit_starts: Annotated[int | None, typer.Option(help="Descents per image and distance (audit).")] = None,
    audit_steps: Annotated[int | None, typer.Option(help="Gradient steps per descent (audit).")] = None,
    as_json: SummaryAsJson = False,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(help="End with exit code 1 if this holds, e.g. 'certified@0.25<50%' or 'mean_radius<0.1'."),
    ] = None,
) -> None:
    """Certify a smoothed model: a radius per image inside which, with confidence 1 - alpha, no attack succeeds.

    Stopped or killed at any moment, the same command goes on where it was and ends with the same results.
    """
    # The heavy libraries are loaded here, so that --help and --version answer at once.
    from robustvlm.certify.claims import DEFAULT, DEFAULT_KEPT
    from robustvlm.cli.console import Console
    from robustvlm.commands.certify.config import Settings
    from robustvlm.commands.certify.summary import parse_certify_condition

    if audit is not None:
        others = {"--fail-if": fail_if, "--from-cache": from_cache, "--prompts": prompts, "--name": name}
        require_none(others, "is not for --audit: what is audited stands in the run")
        broken = run_audit(
            audit,
            out=out,
            limit=limit,
            seed=seed,
            device=device,
            starts=audit_starts,
            steps=audit_steps,
            as_json=as_json,
        )
        if broken:
            raise typer.Exit(broken)
        return
    require_none({"--audit-starts": audit_starts, "--audit-steps": audit_steps}, "is for --audit RUN")
    conditions = [parse_certify_condition(text) for text in fail_if or []]
    ranks = current_ranks()
    console = Console(stderr=as_json, quiet=not ranks.leader)
    settings = Settings(
        model=model,
        data=data,
        classes=classes,
        templates=templates,
        tree=tree,
        claim=claim or (DEFAULT if from_cache is None else DEFAULT_KEPT),
        sigma=sigma,
        samples=samples,
        alpha=alpha,
        min_cos=min_cos,
        radius=radius,
        at=at,
        tau=tau,
        antibodies=antibodies,
        weight=weight,
        deployed=deployed,
        cache=cache,
        limit=limit,
        seed=seed,
        lanes=lanes,
        device=device,
        precision=precision,
    )
    with console.status("Loading model and data"):
        prepared = _prepare(settings, from_cache, prompts, out, name)
    summary = _work(prepared, console, fresh=resume is False, resume=resume is True)
    if not ranks.leader:
        return
    _show(summary, prepared, console, as_json=as_json)
    end_if_any_holds(conditions, summary)


def _prepare(
    settings: Settings, from_cache: str | None, prompts: str | None, out: Path, name: str | None
) -> PreparedCertify:
    from robustvlm.commands.certify.replay import prepare_replay
    from robustvlm.commands.certify.setup import prepare_certify
    from robustvlm.errors import UserError

    command = given_command()
    if from_cache is not None:
        return prepare_replay(settings, from_cache, prompts=prompts, out=out, name=name, command=command)
    if prompts is not None:
        raise UserError(
            "--prompts is for --from-cache: a run that samples draws noise of its own for its prompts, fixed before it"
        )
    return prepare_certify(settings, out=out, name=name, command=command)


def _work(prepared: PreparedCertify, console: Console, *, fresh: bool, resume: bool) -> CertifySummary:
    from robustvlm.cli.progress import CertifyProgress

    console.print(
        f"Certifying [bold]{plain(prepared.manifest['model']['spec'])}[/bold] -> {plain(prepared.folder.path)}"
    )
    say_remarks(console, prepared.manifest)
    with (
        interruptible(f"everything so far is kept in '{prepared.folder.path}'"),
        CertifyProgress(console, samples=prepared.config.samples) as progress,
    ):
        return prepared.run(progress, fresh=fresh, resume=resume)


def _show(summary: CertifySummary, prepared: PreparedCertify, console: Console, *, as_json: bool) -> None:
    from robustvlm.commands.certify.terminal import certify_table

    if as_json:
        say_json(summary.model_dump_json(indent=2))
        return
    console.print(certify_table(summary, prepared.manifest["plan"], prepared.manifest.get("trail")))
    console.print(f"Report:  {plain(prepared.folder.report_path)}")
    console.print(f"Results: {plain(prepared.folder.results_path)}")


# `robustvlm certify --audit RUN`: attacks on the certificates of a finished run


def run_audit(
    run: str,
    *,
    out: Path = Path("runs"),
    limit: int | None = None,
    seed: int = 0,
    device: str = "auto",
    starts: int | None = None,
    steps: int | None = None,
    as_json: bool = False,
) -> int:
    """Audit a run given by folder or name, print what was found and return the exit code: 1 if a bound is broken.

    Raises:
        UserError: the audit could not be made, for whatever reason: 1 is kept for certificates that are false.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from robustvlm.cli.console import Console
    from robustvlm.commands.certify.audit import audit_folder
    from robustvlm.commands.certify.audit_search import Effort
    from robustvlm.commands.certify.terminal import audit_table
    from robustvlm.commands.certify.view import write_certify_report
    from robustvlm.core.device import resolve_device
    from robustvlm.errors import UserError, is_out_of_memory
    from robustvlm.runs.read import find_run
    from robustvlm.text import one_line

    for name, value in (("starts", starts), ("steps", steps), ("images (--limit)", limit)):
        if value is not None and value < 1:
            raise UserError(f"the audit needs at least 1 of its {name}, got {value}")
    default = Effort()
    effort = replace(default, starts=starts or default.starts, steps=steps or default.steps)
    folder = find_run(run, root=out)
    console = Console(stderr=True)
    columns = (TextColumn("Attacking"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=as_json or not console.is_terminal) as progress:
        task = progress.add_task("audit", total=None)
        try:
            result = audit_folder(
                folder,
                effort,
                limit=limit,
                seed=seed,
                device=str(resolve_device(device)),
                on_image=lambda done, total: progress.update(task, completed=done, total=total),
            )
        except (UserError, OSError, MemoryError):
            raise
        except Exception as error:  # the encoder may be the user's code, which fails in any way
            if is_out_of_memory(error):
                raise
            said = one_line(error, limit=200)
            raise UserError(f"the audit of '{run}' failed: {type(error).__name__}: {said}") from error
    report = write_certify_report(folder)
    content = result.model_dump(mode="json")
    if as_json:
        say_json(json.dumps(content | {"broken": len(result.broken), "report": str(report)}, indent=2))
    else:
        Console().print(audit_table(content))
        say(f"{result.passes:,} encoder passes in {result.seconds:.0f} s. Report: {report}")
    return 1 if result.broken else 0
