"""What a run was made with: packages, commit and hardware; over its sessions, where those were not always the same."""

import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("robustvlm", "torch", "torchvision", "open_clip_torch", "numpy", "scipy", "statsmodels", "pyarrow")


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
    import torch  # loaded here: commands know their kind without it

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


def sessions_of(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the versions and the commit of every session of a run; sessions with the same ones stand once.

    Example:
        >>> sessions_of({"versions": {"torch": "2.4"}})
        [{'versions': {'torch': '2.4'}, 'git_commit': None}]
    """
    return [_tools(manifest), *map(_tools, manifest.get("sessions") or [])]


def versions_of(manifest: Mapping[str, Any], package: str) -> list[str]:
    """Return the versions of a package that a run was made with, in order.

    Example:
        >>> versions_of({"versions": {"torch": "2.4"}, "sessions": [{"versions": {"torch": "2.5"}}]}, "torch")
        ['2.4', '2.5']
    """
    return list(dict.fromkeys(one["versions"][package] for one in sessions_of(manifest) if package in one["versions"]))


def with_session(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's manifest, `old`, with what a session under the manifest `new` is made with, if that is another."""
    known, now = sessions_of(old), _tools(new)
    return dict(old) if now in known else dict(old) | {"sessions": [*known[1:], now]}


def other_tools(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return in words what differs between what a run began with and what it goes on with; "" for nothing.

    Example:
        >>> other_tools({"versions": {"torch": "2.4"}}, {"versions": {"torch": "2.5"}, "git_commit": "ab"})
        'torch: 2.4 -> 2.5; commit: none -> ab'
    """
    return "; ".join(_differences(_tools(old), _tools(new)))


def _tools(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {"versions": dict(manifest.get("versions") or {}), "git_commit": manifest.get("git_commit")}


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    before, after = ({**one["versions"], "commit": one["git_commit"]} for one in (old, new))
    for name in dict.fromkeys([*before, *after]):
        if before.get(name) != after.get(name):
            yield f"{name}: {before.get(name) or 'none'} -> {after.get(name) or 'none'}"
