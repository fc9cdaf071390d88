"""`robustvlm models`: what a MODEL can be."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from robustvlm.cli.terminal import say, say_json


def models(
    text: Annotated[str, typer.Option("--filter", help="Only specs that contain this text (case ignored).")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
) -> None:
    """List the forms a model spec can take, and every model that has a name."""
    # open_clip takes seconds to load; --help and other commands should not wait for it.
    from robustvlm.defenses import OPERATORS
    from robustvlm.errors import UserError, nearest
    from robustvlm.models import list_models
    from robustvlm.models.zoo import SPEC_FORMS

    operators = [(f"MODEL+{operator.form}", operator.meaning) for operator in OPERATORS.values()]
    all_forms = [*SPEC_FORMS, *operators]
    known = list_models()
    found = [model for model in known if text.lower() in model.spec.lower()]
    if not found:
        raise UserError(f"no model's name contains '{text}'; {nearest(text, [model.spec for model in known])}")
    if as_json:
        forms = [{"form": form, "meaning": meaning} for form, meaning in all_forms]
        say_json(json.dumps({"forms": forms, "models": [asdict(model) for model in found]}, indent=2))
        return
    if not text:
        width = max(len(form) for form, _ in all_forms)
        lines = [f"  {form:<{width}}  {meaning}" for form, meaning in all_forms]
        say("MODEL is one of\n" + "\n".join(lines) + "\n")
    for model in found:
        say(f"{model.spec}  ({model.source})" if model.source == "bundled" else model.spec)
