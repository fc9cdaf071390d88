"""A command: its word, its settings, and the module that does its work, which is loaded only when there is some."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from robustvlm.runs.settings import Observer, Settings

if TYPE_CHECKING:
    from rich.console import Console

    from robustvlm.runs.run import FinishedRun, Work


class Home(Protocol):
    """What the module of a command's work holds: functions of these names. Importing it may take seconds."""

    RESULTS: tuple[str, ...]
    """The files without which a run of this kind has not ended; none if the command does all of it every time."""

    def open_work(self, settings: Any, /) -> Work:
        """Check all settings, open data and model; every mistake is found here, before anything is written."""

    def read_run(self, folder: Path, /) -> FinishedRun[Any]:
        """Read a finished run back; UserError where it has not ended, or a file is damaged or not the run's own."""

    def show(self, run: FinishedRun[Any], console: Console, /) -> None:
        """Print what came of it."""

    # And, where the kind has a report:  def write_report(folder: Path, out: Path | None = None) -> Path
    # And, for --fail-if:                def parse_condition(text: str) -> Condition


@dataclass(frozen=True)
class Command:
    """A command that makes runs.

    Args:
        name: its word on the command line, which is the kind in manifests.
        settings: its options; their class's docstring is the help.
        home: name of the module with its work, a `Home`.
        doing: what the terminal says it does, as "Purifying"; "" to say nothing.
        kept: what an interrupted run has kept, for the user who presses Ctrl-C.
        shares: what several processes share, as "every batch"; None if it works in one process only.
        plain: whether progress without a terminal is a line for each stage, as it begins or as it ends.
        loading: what is said while settings are checked and a model is loaded.
    """

    name: str
    settings: type[Settings]
    home: str
    doing: str = ""
    kept: str = "everything so far is kept"
    shares: str | None = None
    plain: Literal["", "begin", "end"] = ""
    loading: str = "Loading model and data"

    def load(self) -> Home:
        """Return the module of the command's work."""
        return cast(Home, import_module(self.home))

    def start(self, *, observer: Observer | None = None, **options: Any) -> FinishedRun[Any]:
        """Make a run, or go on with it, and return it; a finished one is read. For users of the library.

        Args:
            observer: told of the progress.
            options: by the names of the settings, and `fresh=True` to start over.
        """
        from robustvlm.runs.run import Run

        if options.get("fresh") and "fresh" not in self.settings.model_fields:
            options["resume"] = False
        if "fresh" not in self.settings.model_fields:
            options.pop("fresh", None)
        settings = self.settings(**options)
        return Run(self, settings).start(observer)
