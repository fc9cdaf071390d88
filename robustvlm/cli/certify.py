"""`robustvlm certify --audit RUN`: attacks on the certificates of a finished run."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import typer

from robustvlm.cli.app import start_and_show
from robustvlm.cli.terminal import say, say_json

if TYPE_CHECKING:
    from robustvlm.commands.certify import CertifySettings
    from robustvlm.commands.certify.audit_search import Effort
    from robustvlm.runs.run import Command
    from robustvlm.runs.settings import Settings


def certify_or_audit(command: Command, settings: Settings) -> None:
    """Certify, or audit the run that the settings name: exit code 1 if one of its bounds is broken."""
    given = cast("CertifySettings", settings)
    if given.audit is None:
        start_and_show(command, settings)
    elif broken := run_audit(given):
        raise typer.Exit(broken)


def run_audit(settings: CertifySettings, default: Effort | None = None) -> int:
    """Audit the run that the settings name, print what was found and return the exit code: 1 if a bound is broken.

    Args:
        default: how much is searched where the settings do not say.

    Raises:
        UserError: the audit could not be made, for whatever reason: 1 is kept for certificates that are false.
    """
    from robustvlm.cli.console import Console
    from robustvlm.cli.progress import Bars
    from robustvlm.commands.certify.audit import audit_folder
    from robustvlm.commands.certify.audit_search import Effort
    from robustvlm.commands.certify.view import show_audit, write_certify_report
    from robustvlm.core.ranks import resolve_device
    from robustvlm.errors import UserError, is_out_of_memory
    from robustvlm.runs.read import find_run
    from robustvlm.text import one_line

    run, as_json, default = str(settings.audit), settings.as_json, default or Effort()
    effort = replace(
        default, starts=settings.audit_starts or default.starts, steps=settings.audit_steps or default.steps
    )
    folder = find_run(run, root=settings.out)
    with Bars(Console(stderr=True, quiet=as_json)) as progress:
        try:
            result = audit_folder(
                folder,
                effort,
                limit=settings.limit,
                seed=settings.seed,
                device=str(resolve_device(settings.device)),
                observer=progress,
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
        show_audit(content, Console())
        say(f"{result.passes:,} encoder passes in {result.seconds:.0f} s. Report: {report}")
    return 1 if result.broken else 0
