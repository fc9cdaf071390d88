"""The manifest: what was run, with what, on what; and whether a run on disk may be continued."""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import subprocess
import sys
import uuid
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from robustvlm.core.foreign_text import secrets_cut
from robustvlm.core.probe import change_of
from robustvlm.core.reading import read_json
from robustvlm.errors import UserError

FORMAT = 1
_PACKAGES = ("robustvlm", "torch", "torchvision", "open_clip_torch", "numpy", "scipy", "statsmodels", "pyarrow")

Manifest = dict[str, Any]

NAME = "manifest.json"
_DEFINING = ("format", "kind", "id", "created", "config", "model", "data", "probe")
"""What makes a run this run and no other."""


def make_manifest(
    *,
    kind: str,
    name: str,
    command: str,
    config: BaseModel | Mapping[str, Any],
    model: dict[str, Any],
    data: dict[str, Any],
    probe: dict[str, Any] | None = None,
) -> Manifest:
    """Return the manifest of a new run of any kind, without the passwords and signatures of URLs.

    Args:
        config: every setting that decides the results, its `device` among them.
        model, data: spec, fingerprint and what else describes them.
        probe: what the model answers to fixed inputs (`robustvlm.models.probe`); compared apart from the settings,
            within its tolerance, and no part of a run's name.
    """
    settings = config.model_dump() if isinstance(config, BaseModel) else dict(config)
    manifest: Manifest = {
        "id": uuid.uuid4().hex,
        "format": FORMAT,
        "kind": kind,
        "name": name,
        "command": command,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "config": settings,
        "versions": versions(),
        "device": describe_device(str(settings.get("device", "cpu"))),
        "git_commit": git_commit(),
        "model": model,
        "data": data,
    }
    cut: Manifest = secrets_cut(manifest if probe is None else manifest | {"probe": probe})
    return cut


def read_manifest(path: Path, *, advice: str = "") -> Manifest:
    """Return the manifest at a path, after a look at its shape.

    Raises:
        FileNotFoundError: there is none. UserError: it is damaged, or another program's.
    """
    content = read_json(path, advice=advice)
    more = f": {advice}" if advice else ""
    if not is_manifest(content):
        raise UserError(f"'{path}' is not the manifest of a run{more}")
    require_shape(_Shape, content, path, more)
    return dict(content)


def kind_of_run(folder: Path) -> str | None:
    """Return the kind that a folder's manifest names; None where there is no manifest that can be read."""
    try:
        content = read_json(folder / NAME)
    except (OSError, UserError):
        return None
    kind = content.get("kind") if isinstance(content, dict) else None
    return kind if isinstance(kind, str) else None


def run_identity(manifest: Manifest) -> str | None:
    """Return a digest of all that makes a run this one; its journals and results carry it.

    None for runs from before there were identities, whose files carry nothing.

    Example:
        >>> base = {"format": 1, "kind": "attack", "id": "1f", "config": {"seed": 0}}
        >>> run_identity(base) == run_identity(base | {"config": {"seed": 1}}), run_identity({"format": 1})
        (False, None)
    """
    if manifest.get("id") is None:
        return None
    text = json.dumps({key: manifest.get(key) for key in _DEFINING}, default=str)
    plain = json.dumps(json.loads(text), sort_keys=True)  # keys as a file would hold them
    return hashlib.blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def carried(manifest: Manifest) -> dict[str, str]:
    """Return what a file of a run's folder has to say of its run, under "run"; `require_owner` compares it.

    Example:
        >>> carried({"format": 1})
        {}
    """
    identity = run_identity(manifest)
    return {} if identity is None else {"run": identity}


def require_owner(found: str | None, manifest: Manifest, path: Path, *, old: bool = True) -> None:
    """Refuse a file of a run's folder that does not carry the run's identity.

    Args:
        found: the identity that the file carries, None for none.
        old: accept a file without one in a run from before there were identities.

    Raises:
        UserError: the file is another run's, or nothing shows that it is this one's.
    """
    identity = run_identity(manifest)
    if found != identity or (found is None and not old):
        whose = "another run's" if found is not None else "not known to be of this run"
        raise UserError(
            f"'{path}' is {whose}: put the run's own file back, or give the run's command with --fresh or another "
            "--name"
        )


class _Names(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Model(_Names):
    spec: str | None = None
    fingerprint: str | None = None


class _Level(_Names):
    tree: str
    level: int
    of: list[int]


class _Data(_Names):
    spec: str | None = None
    fingerprint: str | None = None
    images: int | None = None
    class_names: list[str] = []
    templates: list[str] = []
    superclasses: dict[str, str] | None = None
    levels: list[_Level] | None = None


class _Plan(_Names):
    statement: str = ""
    theorem: str = ""
    bound: str = ""
    stop_rule: str = ""
    notes: list[str] = []
    threat: list[str] = []
    best_radius: float = 0.0


class _Shape(_Names):
    """What every reader of a manifest may rely on."""

    format: int
    kind: str
    id: str | None = None
    name: str | None = None
    command: str | None = None
    created: str | None = None
    device: str | None = None
    git_commit: str | None = None
    versions: dict[str, str] = {}
    config: dict[str, Any]
    model: _Model | None = None
    data: _Data | None = None
    plan: _Plan | None = None
    probe: dict[str, Any] | None = None


def require_shape(shape: type[BaseModel], content: object, path: Path, more: str = "") -> None:
    """Refuse a parsed file whose parts are not of the types that `shape` names; one line says which."""
    try:
        shape.model_validate(content)
    except ValidationError as error:
        raise UserError(f"'{path}' is damaged ({problem(error)}){more}") from None


def problem(error: ValidationError) -> str:
    """Return the first problem that pydantic found, and where."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'content'}: {first['msg']}"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results may depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def describe_device(device: str) -> str:
    """Return the hardware behind a torch device, in words."""
    if device.startswith("cuda") and torch.cuda.is_available():
        return f"{torch.cuda.get_device_name(device)} (CUDA {torch.version.cuda})"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s), {sys.platform}"


def git_commit() -> str | None:
    """Return the commit of the checkout that the package runs from, with "+" when files differ; None elsewhere."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def differences(old: Manifest, new: Manifest) -> list[str]:
    """Return one "key: old -> new" per setting that decides results and differs between two manifests.

    Example:
        >>> base = {"format": 1, "kind": "attack", "config": {"seed": 0}, "model": {}, "data": {}}
        >>> differences(base, base | {"config": {"seed": 1}})
        ['seed: 0 -> 1']
    """
    found = [f"{key}: {old.get(key)} -> {new.get(key)}" for key in ("format", "kind") if old.get(key) != new.get(key)]
    for section, prefix in (("config", ""), ("model", "model "), ("data", "data ")):
        before, after = old.get(section) or {}, new.get(section) or {}
        for key in sorted({*before, *after}):
            if before.get(key) != after.get(key):
                found.append(f"{prefix}{key}: {_short(before.get(key))} -> {_short(after.get(key))}")
    return found


def is_manifest(content: object) -> bool:
    """Whether a parsed JSON file is the manifest of a run and not some other program's.

    Example:
        >>> is_manifest({"format": 1, "kind": "attack", "config": {}}), is_manifest({"name": "an app"})
        (True, False)
    """
    return isinstance(content, dict) and {"format", "kind", "config"} <= content.keys()


def require_same(old: Manifest, new: Manifest, folder: Path) -> None:
    """Refuse to continue a run under other settings, model or data, and name what differs."""
    found = differences(old, new)
    if not found and old.get("probe") is not None and new.get("probe") is not None:
        answers = change_of(old["probe"], new["probe"])
        if answers is not None:
            raise UserError(
                f"the model '{(new.get('model') or {}).get('spec')}' is not the one that the run in '{folder}' was "
                f"made with: {answers}; bring that model back, choose another --name, or start over with --fresh"
            )
    if found:
        raise UserError(
            f"the run in '{folder}' was made with other settings ({'; '.join(found)}): "
            "choose another --name, or start over with --fresh"
        )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
