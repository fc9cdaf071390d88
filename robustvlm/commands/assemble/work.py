"""The work of `robustvlm build`: copy the parts into one folder, which is then a model, and say what does not fit."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from rich.console import Console

from robustvlm.commands.assemble import BuildSettings
from robustvlm.commands.common.inputs import facts_of
from robustvlm.core.files import write_text
from robustvlm.core.ranks import resolve_device
from robustvlm.defenses.assemble import PARTS, Recipe, build_pipeline, read_parts_of
from robustvlm.defenses.pipeline import load_pipeline
from robustvlm.defenses.purify import PurifiedVLM
from robustvlm.defenses.smoothing import SmoothedVLM
from robustvlm.models import VLM
from robustvlm.models.saved import CARD_NAME
from robustvlm.report import screen
from robustvlm.report.sections import Block, Checks, Closing, Code, Text
from robustvlm.report.words import finding
from robustvlm.runs.manifest import CHECKSUMS
from robustvlm.runs.run import Facts, FinishedRun, Session, read_finished

NAME = "summary.json"
RESULTS = ()
"""None: given again, the command copies the parts anew, which may have changed since."""


class Pipeline(BaseModel):
    """What `summary.json` holds: parts in the order in which an image passes them, the whole, and what does not fit.

    `rule` says how a smoothed pipeline answers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    parts: list[str]
    model: dict[str, Any]
    misfits: list[str] = []
    rule: str | None = None


@dataclass(frozen=True)
class BuildWork:
    """A recipe, and where to try it out."""

    facts: Facts
    recipe: Recipe
    device: torch.device
    accept_misfits: bool

    def run(self, session: Session) -> None:
        """Copy the parts, and write down what they are."""
        session.observer.begin("Copying the parts")
        with _given_back(session.path), session.results() as folder:
            vlm, misfits = build_pipeline(self.recipe, folder, accept_misfits=self.accept_misfits, device=self.device)
            record = Pipeline(
                name=session.folder.name,
                parts=_stages(self.recipe, vlm),
                model=facts_of(vlm, "interpolation"),
                misfits=[str(wrong) for wrong in misfits],
                rule=_rule(vlm, refuses=self.recipe.immunize is not None),
            )
            write_text(folder / NAME, record.model_dump_json(indent=2) + "\n")


@contextmanager
def _given_back(folder: Path) -> Iterator[None]:
    """Put an earlier pipeline of the folder aside, and back if the new one cannot be made.

    The card goes first and comes back last: whenever this is killed, a folder with a card is whole, and what lies aside
    is what is missing without one.
    """
    aside = folder / ".before"
    if aside.exists():  # of a session that was killed; it is no longer needed where the new one had come to an end
        if (folder / CARD_NAME).exists() and (folder / PARTS).exists():
            shutil.rmtree(aside)
        else:
            _moved_back(aside, folder)
    aside.mkdir()
    begun = False
    try:
        for name in (CARD_NAME, PARTS, NAME, CHECKSUMS):
            if (folder / name).exists():
                (folder / name).rename(aside / name)
        begun = True
        yield
    except BaseException:
        if begun:  # a card of the new one may be there already
            (folder / CARD_NAME).unlink(missing_ok=True)
        _moved_back(aside, folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _moved_back(aside: Path, folder: Path) -> None:
    """Give a folder what lies aside, in place of what a build that was not finished has left there."""
    put_aside = (aside / CARD_NAME).exists()
    if put_aside:
        (folder / CARD_NAME).unlink(missing_ok=True)
    # Parts are of the new one where others lie aside, or no card at all says whose they are.
    new = (aside / PARTS).exists() or not (put_aside or (folder / CARD_NAME).exists())
    if new and (folder / PARTS).exists():
        shutil.rmtree(folder / PARTS)
    for path in sorted(aside.iterdir(), key=lambda path: path.name == CARD_NAME):
        path.replace(folder / path.name)
    aside.rmdir()


def open_work(settings: BuildSettings) -> BuildWork:
    """Check the recipe, its runs and its encoder; whether they fit is seen as they are put together."""
    recipe, device = Recipe(settings.encoder, settings.purify, settings.smooth, settings.immunize), settings.device
    read_parts_of(recipe)
    load_pipeline(recipe.encoder, device=resolve_device(device))
    facts = Facts((recipe.encoder, ""), settings.stored(), {"spec": recipe.encoder}, named_by_config=True)
    return BuildWork(facts, recipe, resolve_device(device), settings.accept_misfits)


def _stages(recipe: Recipe, vlm: VLM) -> list[str]:
    """Name what an image passes, in order."""
    around = next((part for part in vlm.modules() if isinstance(part, PurifiedVLM)), None)
    purifier = around is not None and around.purifier is not None
    mapper = around is not None and around.mapper is not None
    named = (
        ("purifier", recipe.purify if purifier else None),
        ("encoder", recipe.encoder),
        ("mapper", recipe.purify if mapper else None),
        ("adapter", recipe.immunize),
        ("smoothing", recipe.smooth),
        ("immunised head", recipe.immunize),
    )
    return [f"{what} {where}" for what, where in named if where is not None]


def _rule(vlm: VLM, *, refuses: bool) -> str | None:
    """Say how a smoothed pipeline tells classes, None for one that is not smoothed."""
    if not isinstance(vlm, SmoothedVLM):
        return None
    if vlm.rule is not None:
        return vlm.rule.words(vlm.n0, refuses=refuses)
    return f"the class of the mean of {vlm.n0:,} noisy copies, significant or not"


def read_run(folder: Path) -> FinishedRun[Pipeline]:
    """Read a pipeline's record back."""
    return read_finished(folder, NAME, Pipeline, kind="build")


def show(run: FinishedRun[Pipeline], console: Console) -> None:
    """Print what does not fit, the parts, and where the model is."""
    screen.show(console, blocks(run.summary), Closing({"Model": run.folder}))


def blocks(pipeline: Pipeline) -> list[Block]:
    """Return what is said of a pipeline: what does not fit in it, and its parts in order."""
    misfits = Checks([finding("warning", wrong) for wrong in pipeline.misfits])
    said = [] if pipeline.rule is None else [Text(f"Answers with {pipeline.rule}.")]
    return [misfits, Text(["Parts: ", Code(" > ".join(pipeline.parts), 1000)]), *said]
