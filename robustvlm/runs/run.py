"""A command, and a run of it: folder and manifest, and the one way to start it, go on with it and read it back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar, cast

from robustvlm.core.files import read_json
from robustvlm.core.loading import quick_imports
from robustvlm.core.ranks import Ranks, current_ranks
from robustvlm.errors import UserError, arguments_named
from robustvlm.runs import manifest as made
from robustvlm.runs.folder import RunFolder, default_name
from robustvlm.runs.settings import Observer, Settings
from robustvlm.runs.tools import other_tools, with_session

if TYPE_CHECKING:
    from rich.console import Console

S = TypeVar("S")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Facts:
    """What makes a run this run, and what its manifest says besides.

    Args:
        about: the two words of the default name, such as model and data.
        config: the settings that decide the results, all resolved; its "device" is described in the manifest.
        model, data: spec, fingerprint and what else describes them.
        probe: what the model answers to fixed inputs; no part of the name.
        remarks: what a reader has to know of the data; said before the work begins. None: the kind has none.
        more: further entries of the manifest, which define nothing, such as the plan of a certificate; or what makes
            them of the run's folder and manifest.
        named_files: digests of files whose names alone are settings; a run is not gone on with once they have changed.
        named_by_config: the default name is a digest of the config alone, for what can be named before it is loaded.
    """

    about: tuple[str, str]
    config: Mapping[str, Any]
    model: dict[str, Any]
    data: dict[str, Any] = field(default_factory=dict)
    probe: dict[str, Any] | None = None
    remarks: list[str] | None = None
    more: Mapping[str, Any] | Callable[[RunFolder, made.Manifest], Mapping[str, Any]] = field(default_factory=dict)
    named_files: Mapping[str, str] = field(default_factory=dict)
    named_by_config: bool = False

    @property
    def identity(self) -> dict[str, Any]:
        """What the default name is a digest of."""
        data = made.without_contents(self.data)
        facts = {} if self.named_by_config else {"model facts": self.model, "data facts": data}
        return dict(self.config) | facts


@dataclass(frozen=True)
class Session:
    """The run's folder in one process, held while work is done in it.

    Args:
        folder: where everything goes; manifest: the one on disk, an older one if the run is continued.
        observer: told of the progress; silent on all ranks but the first.
        ranks: this process among those of the job.
    """

    folder: RunFolder
    manifest: made.Manifest
    observer: Observer
    ranks: Ranks

    @property
    def path(self) -> Path:
        """The folder's path."""
        return self.folder.path

    @contextmanager
    def results(self) -> Iterator[Path]:
        """Yield the folder's path to write the final files into; afterwards their digests are written.

        Until then the run has not ended, whatever was there before. For rank 0 only.
        """
        assert self.ranks.leader, "results are written by one process"
        made.forget_checksums(self.path)
        yield self.path
        made.write_checksums(self.path, self.manifest)


class Work(Protocol):
    """What a command has made of its settings: checked, data opened, model loaded."""

    @property
    def facts(self) -> Facts:
        """What makes the run this run."""

    def run(self, session: Session, /) -> None:
        """Do what is left to do, on every rank; rank 0 writes the results."""


@dataclass(frozen=True)
class FinishedRun(Generic[S]):
    """A run read back from its folder: manifest and summary.

    A kind with more to show, such as rows, has a class of its own that adds them.
    """

    folder: Path
    manifest: made.Manifest
    summary: S

    @property
    def name(self) -> str:
        """The run's name: the one in its manifest, else that of its folder."""
        return str(self.manifest.get("name") or self.folder.resolve().name)

    @property
    def kind(self) -> str:
        """The command that made it."""
        return str(self.manifest["kind"])

    @property
    def report(self) -> Path:
        """Where its report is."""
        return self.folder / "report.html"

    def show(self) -> None:
        """Print what came of it, as the command does."""
        from rich.console import Console

        # Found by name, as every command's work is: which kinds there are is not known here.
        command: Command = import_module("robustvlm.commands").command_of(self.kind)
        command.load().show(self, Console())


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

    # And, where the kind has a report:  def report_of(run: FinishedRun) -> Report  # robustvlm.report.sections
    #                                    def write_report(folder: Path, out: Path | None = None) -> Path
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
        with quick_imports():
            return cast(Home, import_module(self.home))

    def start(self, *, observer: Observer | None = None, **options: Any) -> FinishedRun[Any]:
        """Make a run, or go on with it, and return it; a finished one is read. For users of the library.

        Args:
            observer: told of the progress.
            options: by the names of the settings, and `fresh=True` to start over.
        """
        self.settings.require_for_callers(options)
        if options.get("fresh") and "fresh" not in self.settings.model_fields:
            options["resume"] = False
        if "fresh" not in self.settings.model_fields:
            options.pop("fresh", None)
        with arguments_named():
            return Run(self, self.settings(**options)).start(observer)


def mirrors(command: Command) -> Callable[[F], F]:
    """Give a command's Python function the signature and the help of its settings: what `--help` says, for callers.

    The function itself takes `**options`; `inspect.signature`, `help` and editors see every option with its default.
    Options that only the command line has, such as --json, are left out.
    """

    def named(function: F) -> F:
        own, parameters, lines = inspect.signature(function).parameters, [], []
        for name, known, about in command.settings.options():
            if about.place == "terminal":
                continue
            kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if name in own else inspect.Parameter.KEYWORD_ONLY
            default = inspect.Parameter.empty if known.is_required() else known.get_default(call_default_factory=True)
            parameters.append(
                inspect.Parameter(name, kind, default=default, annotation=about.given or known.annotation)
            )
            lines.append(f"    {name}: {known.description}")
        observer = inspect.Parameter("observer", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Observer)
        function.__signature__ = inspect.Signature([*parameters, observer])  # type: ignore[attr-defined]
        lines.append("    observer: told of the progress.")
        function.__doc__ = inspect.cleandoc(function.__doc__ or "") + "\n\nArgs:\n" + "\n".join(lines) + "\n"
        return function

    return named


class Run:
    """A run of any command: settings checked, model and data at hand, ready to start.

    Under `torchrun` every process makes and starts it; rank 0 alone holds the lock, reports progress and writes the
    results.

    Args:
        command: what to do; settings: its options.
        given: the command line as it can be given again; "" for a user of the library.

    Raises:
        UserError: whatever is wrong with the settings; nothing has been written then.
    """

    def __init__(self, command: Command, settings: Settings, *, given: str = "") -> None:
        out, name = Path(getattr(settings, "out", "runs")), getattr(settings, "name", None)
        self.command, self.settings, self.ranks = command, settings, current_ranks()
        if self.ranks.size > 1 and command.shares is None:
            raise UserError(f"`robustvlm {command.name}` works in one process: start it without torchrun")
        if name is not None:
            RunFolder(out, name)
        self._track: str | None = getattr(settings, "track", None)
        if self._track is not None:
            _tracking().require(self._track)
        self.home = command.load()
        self.work = self.home.open_work(settings)
        facts = self.work.facts
        self.folder = RunFolder(out, name or default_name(command.name, *facts.about, facts.identity))
        self.manifest = made.make_manifest(
            kind=command.name,
            name=self.folder.name,
            command=given,
            config=facts.config,
            model=facts.model,
            data=facts.data,
            probe=facts.probe,
        )
        self.manifest |= facts.more(self.folder, self.manifest) if callable(facts.more) else facts.more
        if facts.named_files:
            self.manifest["named_files"] = dict(facts.named_files)
        if facts.remarks is not None:
            self.manifest["remarks"] = facts.remarks
        made.require_text(self.manifest)

    @property
    def finished(self) -> bool:
        """Whether all results are there, and are sealed; the report may still have to be made from them."""
        return bool(self.home.RESULTS) and self.folder.holds(*self.home.RESULTS)

    def start(self, observer: Observer | None = None, *, fresh: bool = False, resume: bool = False) -> FinishedRun[Any]:
        """Start or go on, write results and report, and return the run; a finished one is only read.

        Args:
            fresh: delete an earlier run of this name first; resume: insist on one. Also where the settings say so.
        """
        with self.opened(observer, fresh=fresh, resume=resume) as session:
            worked = not self.finished
            if worked:
                self.work.run(session)
            session.ranks.barrier()
            found = self.home.read_run(self.folder.path)
            write = getattr(self.home, "write_report", None)
            # A crash may have left the last file unwritten.
            if write is not None and session.ranks.leader and (worked or not self.folder.report_path.exists()):
                write(self.folder.path)
        if self._track is not None and self.ranks.leader:
            told, report_of = observer or Observer(), getattr(self.home, "report_of", None)
            told.begin(f"Logging to {self._track}")
            where = _tracking().track(found, None if report_of is None else report_of(found), self._track)
            told.say(f"Logged to {where}")
        return found

    def estimate(self, observer: Observer | None = None, *, fresh: bool = False, resume: bool = False) -> Any:
        """Return what the rest of the run will cost, where the command can say so; what it takes to know is kept."""
        with self.opened(observer, fresh=fresh, resume=resume) as session:
            return self.work.estimate(session)  # type: ignore[attr-defined]  # only where there is --estimate

    @contextmanager
    def opened(
        self, observer: Observer | None = None, *, fresh: bool = False, resume: bool = False
    ) -> Iterator[Session]:
        """Hold the folder, its lock on rank 0, while all processes work on it; tell the others when this one fails."""
        asked = self.settings.fresh_or_resume
        fresh, resume, ranks = fresh or asked["fresh"], resume or asked["resume"], self.ranks
        told = (observer if ranks.leader else None) or Observer()
        try:
            if ranks.leader:
                with self.folder.opened(self.manifest, fresh=fresh, resume=resume) as known:
                    if not self.finished:
                        known = self._gone_on_with(known, told)
                    ranks.barrier()
                    yield Session(self.folder, known, told, ranks)
                    ranks.barrier()
            else:
                ranks.barrier()
                yield Session(self.folder, self.folder.joined(self.manifest), told, ranks)
                ranks.barrier()
        except BaseException as error:
            ranks.fail(str(error) or "interrupted")
            raise

    def _gone_on_with(self, known: made.Manifest, told: Observer) -> made.Manifest:
        """Note in the manifest on disk what this session is made with, and say so where the run was begun otherwise."""
        if other := other_tools(known, self.manifest):
            told.warn(
                f"This run was begun with other versions ({other}): what is still to do may come out otherwise than it "
                "would have then, and the run names both."
            )
        found = with_session(known, self.manifest)
        if found != known:
            self.folder.write_manifest(found)
        return found


def _tracking() -> Any:
    """Return what logs finished runs: found by name, since what is told of a run is not known here."""
    return import_module("robustvlm.report.tracking")


def manifest_of(folder: Path) -> made.Manifest:
    """Return the manifest of a run folder; UserError when there is none or it is damaged."""
    try:
        return made.read_manifest(folder / "manifest.json")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"'{folder}' is no run folder: expected a manifest.json in it, or in folders in it") from None


def not_ended(folder: Path, kind: str) -> str:
    """Return what is said of a run that lacks a file which it writes at its end."""
    return f"the run '{folder}' has not ended: give its {kind} command again to go on"


def read_finished(
    folder: Path, name: str, shape: type[Any], *, kind: str, needed: type[Any] | None = None, again: str = ""
) -> FinishedRun[Any]:
    """Read a run whose summary is one JSON file; `shape` is the pydantic class of its content.

    Args:
        needed: the shape of what its reader needs of the manifest. again: how it is made again, where runs of other
            versions are not read.

    Raises:
        UserError: no run of that kind, one that has not ended, or files that are damaged or not those that it wrote.
    """
    manifest = manifest_of(folder)
    if manifest["kind"] != kind:
        raise UserError(f"'{folder}' is no {kind} run: expected a run of kind '{kind}', got {manifest['kind']!r}")
    advice = again or "delete it and give the run's command again"
    article = "an" if kind[0] in "aeiou" else "a"
    more = f": not {article} {kind} run of this version, {again}" if again else f": {advice}"
    if needed is not None:
        made.require_shape(needed, manifest, folder / "manifest.json", more)
    try:
        content = read_json(folder / name, advice=advice)
    except FileNotFoundError:
        raise UserError(not_ended(folder, kind)) from None
    made.require_shape(shape, content, folder / name, more)
    made.require_unchanged(folder, manifest, what=f"{kind} ")
    return FinishedRun(folder, manifest, shape.model_validate(content))
