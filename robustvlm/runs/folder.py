"""A run's folder: its name, its lock for one process or several, and whether a run starts, goes on or starts over."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from robustvlm.core.files import is_temporary, kind_of, named_disk_errors, open_own, read_json, write_text
from robustvlm.errors import UserError
from robustvlm.runs.manifest import FILES, Manifest, read_manifest, require_same, sealed
from robustvlm.text import secrets_cut, without_secrets

# A run's folder: its name, its lock, and the choice between starting, continuing and starting over

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")
_LOCK = "run.lock"
_RANK_JOURNAL = re.compile(r"journal-[1-9][0-9]*\.jsonl")

_FILES = tuple(name for name in FILES if name != "summary.json")  # which goes before the journals


def default_name(kind: str, model: str, data: str, config: dict[str, Any]) -> str:
    """Return a readable name that is the same for the same settings, so that the same command finds its run again.

    Example:
        >>> default_name("attack", "tiny", "emoji", {"seed": 0})
        'attack-tiny-emoji-...'
    """
    # A URL that is signed anew names the same run, and no part of a signature may end up in a folder's name.
    text = json.dumps(secrets_cut(config), sort_keys=True)
    digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    model, data = without_secrets(model), without_secrets(data)
    words = (re.sub(r"[^A-Za-z0-9]+", "-", word).strip("-")[-32:].strip("-") for word in (kind, model, data))
    return "-".join([*(word for word in words if word), digest])


class RunFolder:
    """The files of one run, `OUT/NAME/`; the name cannot lead out of `OUT`.

    Raises:
        UserError: for a name with anything but letters, digits, dot, dash and underscore.
    """

    def __init__(self, out: Path, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise UserError(
                f"the run name '{name}' is not allowed: use letters, digits, '.', '_' and '-', 120 at most, "
                "beginning with a letter or digit"
            )
        self.path = out / name
        self.name = name

    @property
    def manifest_path(self) -> Path:
        return self.path / "manifest.json"

    @property
    def journal_path(self) -> Path:
        return self.path / "journal.jsonl"

    def journal_of(self, rank: int) -> Path:
        """Return where one of several processes keeps its journal; a process on its own is rank 0."""
        return self.journal_path if rank == 0 else self.path / f"journal-{rank}.jsonl"

    def journals(self) -> list[Path]:
        """Return the journals that are there, of however many processes, that of rank 0 first."""
        others = (path for path in self.path.glob("journal-*.jsonl") if _RANK_JOURNAL.fullmatch(path.name))
        found = [self.journal_path, *sorted(others, key=lambda path: (len(path.name), path.name))]
        return [path for path in found if os.path.lexists(path)]

    @property
    def results_path(self) -> Path:
        return self.path / "results.parquet"

    @property
    def summary_path(self) -> Path:
        return self.path / "summary.json"

    @property
    def report_path(self) -> Path:
        return self.path / "report.html"

    @property
    def gallery_path(self) -> Path:
        return self.path / "gallery"

    @property
    def adversarial_path(self) -> Path:
        return self.path / "adversarial"

    @property
    def attacked_path(self) -> Path:
        return self.path / "attacked.parquet"

    @property
    def features_path(self) -> Path:
        return self.path / "features"

    @property
    def finished(self) -> bool:
        """Whether the results are complete; the report may still have to be made from them."""
        return self.holds(self.summary_path.name, self.results_path.name)

    def holds(self, *names: str) -> bool:
        """Whether the files of these names are there, all results are sealed, and no summary says "unfinished"."""
        if not (all((self.path / name).exists() for name in names) and self.sealed):
            return False
        if self.summary_path.name not in names:
            return True
        summary = read_json(self.summary_path, advice="delete it, the run makes it again")
        return not (isinstance(summary, dict) and summary.get("unfinished"))

    @property
    def sealed(self) -> bool:
        """Whether the run has written down the digests of its results, which it does last."""
        return sealed(self.path, self.manifest() or {})

    def manifest(self) -> Manifest | None:
        """Return the manifest on disk, or None when the run has not begun."""
        try:
            return read_manifest(self.manifest_path, advice="choose another --name")
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write_manifest(self, manifest: Manifest) -> None:
        """Write the manifest, whole or not at all."""
        write_text(self.manifest_path, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")

    @contextmanager
    def opened(self, manifest: Manifest, *, fresh: bool = False, resume: bool = False) -> Iterator[Manifest]:
        """Hold the folder's lock for a run with this manifest; yield the manifest on disk (an older one if continued).

        Args:
            fresh: delete an earlier run of this name first.
            resume: insist on continuing an earlier run.
        """
        with named_disk_errors(self.path):
            self._check_not_foreign()
            if resume and not fresh and self.manifest() is None:
                raise UserError(f"there is no run to resume in '{self.path}': leave out --resume to start one")
            self.path.mkdir(parents=True, exist_ok=True)
            with self._lock():
                if fresh:
                    self._clear()
                self._check_entries()
                self._sweep()
                old = self.manifest()
                if old is None:
                    self._check_empty()
                    self.write_manifest(manifest)
                else:
                    require_same(old, manifest, self.path, finished=lambda: self.finished)
                yield old or manifest

    def joined(self, manifest: Manifest) -> Manifest:
        """Return the manifest on disk to a process whose rank 0 has opened the folder; raise if it is another run's."""
        with named_disk_errors(self.path):
            old = self.manifest()
        if old is None:
            raise UserError(
                f"rank 0 has begun a run that is not in '{self.path}': all machines must see one folder, see --out"
            )
        require_same(old, manifest, self.path, finished=lambda: self.finished)
        return old

    def _check_not_foreign(self) -> None:
        """Refuse a folder that holds somebody's other files: a run neither mixes with those nor deletes them."""
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_dir()):
            raise UserError(f"'{self.path}' is no folder: choose another --name")
        if not self.path.exists() or (self.path / _LOCK).exists() or self.manifest() is not None:
            return
        self._check_empty(advice="bring it back, or choose another --name")
        strangers = sorted(entry.name for entry in self.path.iterdir())
        if strangers:
            raise UserError(
                f"'{self.path}' holds other files and no run (for example '{strangers[0]}'): choose another --name"
            )

    def _check_empty(self, *, advice: str = "bring it back, choose another --name, or start over with --fresh") -> None:
        """Refuse results without a manifest: nothing says what they are, and a new one would say something false."""
        left = [path.name for path in self._own() if path.name != self.manifest_path.name and os.path.lexists(path)]
        if left:
            raise UserError(
                f"'{self.path}' holds what a run has written ('{left[0]}') but no {self.manifest_path.name} that says "
                f"which run it was: {advice}"
            )

    def _check_entries(self) -> None:
        """Refuse links and pipes in place of what a run writes: they could lead out of the folder, or never answer."""
        for entry in (self.path / _LOCK, *self._own()):
            inside = entry.rglob("*") if entry.is_dir() and not entry.is_symlink() else ()
            for path in (entry, *inside):
                if os.path.lexists(path) and kind_of(path) not in ("a file", "a folder"):
                    raise UserError(
                        f"'{path}' is {kind_of(path)}, which no run makes: remove it, choose another --name, or start "
                        "over with --fresh"
                    )

    def _own(self) -> list[Path]:
        """Return the paths of everything that a run writes besides its lock, there or not, in the order of deletion."""
        return [self.summary_path, *self.journals(), *(self.path / name for name in _FILES)]

    def _clear(self) -> None:
        for path in self._own():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Delete the temporary files of a process that was killed; nobody else writes here while the lock is held."""
        inside = [path for path in self._own() if path.is_dir() and not path.is_symlink()]
        for left in (self.path.glob(".*"), *(folder.rglob(".*") for folder in inside)):
            for path in [path for path in left if is_temporary(path.name) and not path.is_dir()]:
                path.unlink(missing_ok=True)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Keep a second process out; the operating system frees the lock when the process dies, however it dies."""
        try:
            import fcntl
        except ImportError:  # Windows: no advisory locks; two processes on one run are the user's to avoid
            yield
            return
        with open_own(self.path / _LOCK, "r+b") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    f"another process is working on the run in '{self.path}': wait for it, or choose another --name"
                ) from None
            yield
