"""`robustvlm certify --audit RUN`: attacks on the certificates of a finished run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from robustvlm.cli.terminal import say, say_json


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
    from robustvlm.core.foreign_text import one_line
    from robustvlm.core.memory import is_out_of_memory
    from robustvlm.errors import UserError
    from robustvlm.evaluation.audit_run import audit_folder
    from robustvlm.evaluation.audit_search import Effort
    from robustvlm.models.device import resolve_device
    from robustvlm.report.certify_audit import audit_table
    from robustvlm.report.certify_html import write_certify_report
    from robustvlm.runs.read import find_run

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
