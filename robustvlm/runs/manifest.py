"""The manifest: what was run, with what, on what; and whether a run on disk may be continued."""

from __future__ import annotations

import datetime
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from robustvlm.core.foreign_text import secrets_cut
from robustvlm.errors import UserError

FORMAT = 1
_PACKAGES = ("robustvlm", "torch", "torchvision", "open_clip_torch", "numpy", "scipy", "statsmodels", "pyarrow")

Manifest = dict[str, Any]


def make_manifest(
    *, kind: str, name: str, command: str, config: BaseModel, model: dict[str, Any], data: dict[str, Any]
) -> Manifest:
    """Return the manifest of a new run of any kind, without the passwords and signatures of URLs.

    Args:
        config: every setting that decides the results, its `device` among them.
        model, data: spec, fingerprint and what else describes them.
    """
    manifest: Manifest = {
        "format": FORMAT,
        "kind": kind,
        "name": name,
        "command": command,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "config": config.model_dump(),
        "versions": versions(),
        "device": describe_device(str(getattr(config, "device", "cpu"))),
        "git_commit": git_commit(),
        "model": model,
        "data": data,
    }
    cut: Manifest = secrets_cut(manifest)
    return cut


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
    if found:
        raise UserError(
            f"the run in '{folder}' was made with other settings ({'; '.join(found)}): "
            "choose another --name, or start over with --fresh"
        )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
