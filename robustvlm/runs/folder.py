"""A run's folder: its name, its lock, and the choice between starting, continuing and starting over."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from robustvlm.errors import UserError
from robustvlm.runs.files import named_disk_errors, write_text
from robustvlm.runs.manifest import Manifest, require_same

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,119}$")


def default_name(kind: str, model: str, data: str, config: dict[str, Any]) -> str:
    """Return a readable name that is the same for the same settings, so that the same command finds its run again.

    Example:
        >>> default_name("attack", "tiny", "emoji", {"seed": 0})
        'attack-tiny-emoji-...'
    """
    digest = hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=4).hexdigest()
    words = (re.sub(r"[^A-Za-z0-9]+", "-", word).strip("-")[-32:].strip("-") for word in (kind, model, data))
    return "-".join([*(word for word in words if word), digest])


class RunFolder:
    """The files of one run, `OUT/NAME/`; the name cannot lead out of `OUT`.

    Raises:
        UserError: for a name with anything but letters, digits, dot, dash and underscore.
    """

    def __init__(self, out: Path, name: str) -> None:
        if not _NAME.match(name):
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

    def manifest(self) -> Manifest | None:
        """Return the manifest on disk, or None when the run has not begun."""
        if not self.manifest_path.exists():
            return None
        try:
            manifest: Manifest = json.loads(self.manifest_path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read '{self.manifest_path}' ({error}): start over with --fresh") from None
        return manifest

    @contextmanager
    def opened(self, manifest: Manifest, *, fresh: bool = False, resume: bool = False) -> Iterator[Manifest]:
        """Hold the folder's lock for a run with this manifest; yield the manifest on disk (an older one if continued).

        Args:
            fresh: delete an earlier run of this name first.
            resume: insist on continuing an earlier run.
        """
        with named_disk_errors(self.path):
            self._check_not_foreign()
            self.path.mkdir(parents=True, exist_ok=True)
            with self._lock():
                if fresh:
                    self._clear()
                old = self.manifest()
                if old is None:
                    if resume:
                        raise UserError(f"there is no run to resume in '{self.path}': leave out --resume to start one")
                    write_text(self.manifest_path, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
                else:
                    require_same(old, manifest, self.path)
                yield old or manifest

    def _check_not_foreign(self) -> None:
        """Refuse a folder that holds somebody's other files: `--fresh` must never delete those."""
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_dir()):
            raise UserError(f"'{self.path}' is no folder: choose another --name")
        if self.path.exists() and not self.manifest_path.exists():
            strangers = [entry.name for entry in self.path.iterdir() if entry.name != "run.lock"]
            if any(not name.startswith(".manifest.json.") for name in strangers):
                raise UserError(
                    f"'{self.path}' holds other files and no run (for example '{strangers[0]}'): choose another --name"
                )

    def _clear(self) -> None:
        for entry in self.path.iterdir():
            if entry.name == "run.lock":
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Keep a second process out; the operating system frees the lock when the process dies, however it dies."""
        try:
            import fcntl
        except ImportError:  # Windows: no advisory locks; two processes on one run are the user's to avoid
            yield
            return
        with (self.path / "run.lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    f"another process is working on the run in '{self.path}': wait for it, or choose another --name"
                ) from None
            yield
