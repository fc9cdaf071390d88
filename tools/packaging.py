"""Build the wheel and the sdist, look into both, and try the wheel as somebody would who has nothing else.

    python -m tools.packaging                     # the wheel is tried on this Python
    python -m tools.packaging --every-python      # on 3.10 to 3.13, those that are found; the others are named
    python -m tools.packaging --no-install        # on none
    python -m tools.packaging --upload            # nothing is built: what lies in dist goes to the index, if it may

Both are built from the files that git knows, as they are in this tree; what else lies here is named and left out. Needs
`build` and `twine`; for `--every-python` and as a tool the wheel is installed by uv, on this Python by pip. The extras
are resolved together by uv, for every Python, where it is there; else by pip, which takes many minutes. That and the
environments for the wheel need the package index, and the latter minutes and six gigabytes, one after another. Exit
code 1 at the first mistake.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterable, Mapping
from email.parser import Parser
from pathlib import Path

from tools.address import address_in, whole_links

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
EXTRAS = "external,hub,wds,wordnet,tensorboard,mlflow,wandb"
# What must be in each, and what must not: the first folder of a file, or the file itself.
WHEEL_FOLDERS = {"robustvlm"}
WHEEL_HAS = ("robustvlm/__init__.pyi", "robustvlm/py.typed", "robustvlm/report/report.schema.json")
SDIST_HAS = (
    "pyproject.toml", "README.md", "LICENSE", "NOTICE", "CHANGELOG.md", "conftest.py", "Makefile",
    "robustvlm/py.typed", "tests/test_docs.py", "docs/attacks.md", "examples/README.md", "tools/packaging.py",
    "benchmarks/README.md", "robustvlm/report/report.schema.json", "mkdocs.yml",
)  # fmt: skip
# What the installed program is asked to do, in an empty folder: each loads other parts of the package.
TRIED = (
    ("--version",),
    ("attack", "--help"),
    ("attack", "tiny", "--limit", "2", "--attack", "fgsm", "--checks", "none"),
    ("certify", "tiny", "--limit", "1", "--samples", "200"),
    ("report", "runs"),
)
# Tests that need little beside the package itself, run in what the sdist unpacks to.
SDIST_TESTS = ("tests/core", "tests/pins/test_layers.py", "tests/pins/test_help.py")


def main() -> None:
    """Do all of it, with a line for each step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-install", action="store_true", help="do not try the wheel in an environment of its own")
    parser.add_argument("--every-python", action="store_true", help=f"try it on each of {', '.join(PYTHONS)}")
    parser.add_argument("--upload", action="store_true", help="hand what was built to the index, with twine")
    given = parser.parse_args()
    if given.upload:
        upload()
        return
    wheel, sdist = build()
    resolve(wheel)
    if not given.no_install:
        try_wheel(wheel, sdist, every_python=given.every_python)
    print(next_step(metadata_of(wheel), changed_files()), flush=True)


def build() -> tuple[Path, Path]:
    """Build wheel and sdist into dist, and end the program if one lacks something or has too much."""
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "robustvlm"
        files, strange = tracked_files()
        if strange:
            print(f"left out, as git does not know them: {', '.join(strange)}", flush=True)
        export(files, place)
        package = package_files(place)
        run(sys.executable, "-m", "build", "--outdir", ROOT / "dist", place)
    (wheel,), (sdist,) = ((ROOT / "dist").glob(pattern) for pattern in ("*.whl", "*.tar.gz"))
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    end_if([*wheel_faults(names, package), *metadata_faults(metadata_of(wheel))], wheel)
    with tarfile.open(sdist) as packed:
        names = [one.name for one in packed.getmembers() if not one.isdir()]
    end_if([*sdist_faults(names, package), *strangers(names, files)], sdist)
    print(f"{wheel.name} and {sdist.name} hold what they should", flush=True)
    return wheel, sdist


def try_wheel(wheel: Path, sdist: Path, *, every_python: bool) -> None:
    """Install the wheel where nothing else is and use it: on this Python, and on every other that is found."""
    here = "{}.{}".format(*sys.version_info)
    try_with_pip(wheel, sdist)
    missing = [python for python in PYTHONS if python != here and not interpreter(python)]
    for python in PYTHONS if every_python else ():
        if python != here and python not in missing:
            try_with_uv(wheel, python)
    if every_python and missing:
        print(f"not tried, as no such Python was found: {', '.join(missing)}", flush=True)


def tracked_files() -> tuple[list[str], list[str]]:
    """Return the files that git knows, as paths from the root, and those here that it neither knows nor ignores.

    In a tree without git, such as an unpacked sdist, everything is known.
    """

    def listed(*which: str) -> list[str] | None:
        words = ["git", "-C", str(ROOT), "ls-files", "-z", *which]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        return None if done.returncode else sorted(name for name in done.stdout.split("\0") if name)

    known = listed() if (ROOT / ".git").exists() else None
    if known is None:
        made = re.compile(r"(dist|build|site|runs|\.venv[^/]*|\.\w+_cache|\.hypothesis)/|(.*/)?__pycache__/")
        found = (path for path in ROOT.rglob("*") if path.is_symlink() or path.is_file())
        names = (path.relative_to(ROOT).as_posix() for path in found)
        return sorted(name for name in names if not made.match(name)), []
    there = [name for name in known if (ROOT / name).exists() or (ROOT / name).is_symlink()]
    return there, listed("--others", "--exclude-standard") or []


def export(files: Iterable[str], place: Path) -> None:
    """Copy files of this tree to a folder; the README's links are made whole where the project has an address."""
    for name in files:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, place / name, follow_symlinks=False)
    if address := address_in((place / "pyproject.toml").read_text(encoding="utf-8")):
        readme = place / "README.md"
        readme.write_text(whole_links(readme.read_text(encoding="utf-8"), address), encoding="utf-8")


def changed_files() -> list[str]:
    """Return the files that git knows and that differ from the last commit."""
    words = ["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return [line[3:] for line in done.stdout.splitlines()]


def package_files(root: Path = ROOT) -> list[str]:
    """Return the files of the package in a tree, as paths from its root."""
    found = (path for path in (root / "robustvlm").rglob("*") if path.is_file() and path.suffix != ".pyc")
    return sorted(path.relative_to(root).as_posix() for path in found)


def metadata_of(wheel: Path) -> str:
    """Return a wheel's METADATA."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return archive.read(name).decode()


def wheel_faults(names: Iterable[str], package: Iterable[str]) -> list[str]:
    """Return what is wrong with the names of a wheel's files, given those of the package.

    Example:
        >>> wheel_faults([*WHEEL_HAS, "tests/test_a.py"], ["robustvlm/py.typed"])
        ['it installs tests/ beside robustvlm/', 'docs/attacks.md is missing', 'the licence is missing']
    """
    names = list(names)
    tops = {name.split("/")[0] for name in names}
    strange = sorted(top for top in tops - WHEEL_FOLDERS if not top.endswith((".dist-info", ".data")))
    found = [f"it installs {top}/ beside robustvlm/" for top in strange]
    found += lacking({*WHEEL_HAS, *package}, names)
    if not any(name.endswith(".data/data/share/doc/robustvlm/attacks.md") for name in names):
        found.append("docs/attacks.md is missing")
    if not any(name.endswith("/LICENSE") for name in names):
        found.append("the licence is missing")
    return found


def sdist_faults(names: Iterable[str], package: Iterable[str]) -> list[str]:
    """Return what a sdist lacks, by the names of its files, all in one folder, given those of the package."""
    return lacking({*SDIST_HAS, *package}, (name.partition("/")[2] for name in names))


def strangers(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Return the files of a sdist, by their names in it, that are not of the tree.

    Example:
        >>> strangers(["robustvlm-1/PKG-INFO", "robustvlm-1/a", "robustvlm-1/docs/notes.txt"], ["a"])
        ['docs/notes.txt is in no commit']
    """
    own = {*known, "PKG-INFO"}
    return [f"{name} is in no commit" for name in sorted(name.partition("/")[2] for name in names) if name not in own]


def lacking(wanted: set[str], names: Iterable[str]) -> list[str]:
    """Return what is missing, folder by folder where that is more than a few files.

    Example:
        >>> lacking({"a/1", "a/2", "a/3", "a/4", "b"}, ["c"])
        ['4 files of a/ are missing', 'b is missing']
    """
    by_folder: dict[str, list[str]] = {}
    for name in sorted(wanted.difference(names)):
        by_folder.setdefault(name.rpartition("/")[0], []).append(name)
    few = {folder: lost for folder, lost in by_folder.items() if len(lost) <= 3}
    many = [f"{len(lost)} files of {folder}/ are missing" for folder, lost in by_folder.items() if folder not in few]
    return many + [f"{name} is missing" for lost in few.values() for name in lost]


def metadata_faults(text: str) -> list[str]:
    """Return what is wrong with a wheel's METADATA, beyond what twine looks at."""
    told = Parser().parsestr(text)
    found = [
        f"there is no {field}" for field in ("License-Expression", "Requires-Python", "Summary") if not told[field]
    ]
    extras = set(told.get_all("Provides-Extra") or ())
    found += [f"there is no extra {extra}" for extra in EXTRAS.split(",") if extra not in extras]
    core = [need for need in told.get_all("Requires-Dist") or () if "extra ==" not in need]
    return found + [f"the core needs {need}, which pins others" for need in core if need.startswith("torchattacks")]


def upload_faults(metadata: str, changed: Iterable[str]) -> list[str]:
    """Return why something built must not be uploaded.

    Example:
        >>> upload_faults("Project-URL: Source, https://host.example/a/b\\n", [])
        []
    """
    found = [f"{name} differs from the last commit" for name in changed]
    if not Parser().parsestr(metadata).get_all("Project-URL"):
        found.append("it names no place where the project lives: python -m tools.address https://... writes it")
    return found


def stale_faults(wheel: Path) -> list[str]:
    """Return how the package in a wheel differs from that of this tree, as after a commit since it was built."""
    with zipfile.ZipFile(wheel) as archive:
        packed = {name: archive.read(name) for name in archive.namelist() if name.startswith("robustvlm/")}
    here = {name: (ROOT / name).read_bytes() for name in tracked_files()[0] if name.startswith("robustvlm/")}
    other = sorted(name for name in here.keys() | packed.keys() if here.get(name) != packed.get(name))
    return [f"it was not built from this tree ({', '.join(other[:3])}): make release"] if other else []


def next_step(metadata: str, changed: Iterable[str]) -> str:
    """Return what a release needs after it was built and tried."""
    faults = upload_faults(metadata, changed)
    if faults:
        return f"built and tried, but not fit for an upload: {'; '.join(faults)}"
    return f"fit for an upload: tag this commit v{Parser().parsestr(metadata)['Version']}, then make upload"


def upload() -> None:
    """Hand what lies in dist to the package index, unless something speaks against it."""
    found = sorted((ROOT / "dist").glob("*.whl"))
    if len(found) != 1:
        sys.exit("dist holds no release: make release")
    end_if([*upload_faults(metadata_of(found[0]), changed_files()), *stale_faults(found[0])], found[0])
    run(sys.executable, "-m", "twine", "upload", *sorted((ROOT / "dist").iterdir()))


def resolve(wheel: Path) -> None:
    """Let a resolver find releases of everything that all extras need together; nothing is installed."""
    wanted = f"robustvlm[{EXTRAS}] @ {wheel.as_uri()}"
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder) / "all.in"
        asked.write_text(wanted + "\n", encoding="utf-8")
        if uv := shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv"):
            for python in PYTHONS:
                made = Path(folder) / f"all-{python}.txt"
                run(uv, "pip", "compile", "--quiet", "--python-version", python, "--output-file", made, asked)
        else:
            run(sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "-r", asked)
    print(f"the extras {EXTRAS} resolve together", flush=True)


def interpreter(python: str) -> str | None:
    """Return the program of a Python like "3.12", from the path or from pyenv; None: there is none that runs."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    places = sorted((pyenv / "versions").glob(f"{python}.*/bin/python{python}"))
    for program in (shutil.which(f"python{python}"), *map(str, places)):
        # What pyenv puts on the path is there for every version, and fails for those that are not chosen.
        if program and subprocess.run([program, "-c", ""], capture_output=True, check=False).returncode == 0:
            return program
    return None


def try_with_pip(wheel: Path, sdist: Path) -> None:
    """Install the wheel with pip on this Python and use it; then some tests of the unpacked sdist."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "venv", Path(folder) / "venv")
        scripts = Path(folder) / "venv" / ("Scripts" if sys.platform == "win32" else "bin")
        run(scripts / "python", "-m", "pip", "install", "--quiet", wheel)
        use(scripts / "robustvlm", Path(folder) / "empty")
        run(scripts / "python", "-m", "pip", "install", "--quiet", "pytest", "hypothesis")
        with tarfile.open(sdist) as packed:
            packed.extractall(folder)
        unpacked = Path(folder) / sdist.name.removesuffix(".tar.gz")
        run(scripts / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *SDIST_TESTS, cwd=unpacked)
    told("pip", "{}.{}".format(*sys.version_info), began)


def try_with_uv(wheel: Path, python: str) -> None:
    """Install the wheel as a tool, as `uv tool install` and pipx do it, on another Python, and use it."""
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if uv is None:
        sys.exit("for --every-python install uv: pip install uv")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        places = {"UV_TOOL_DIR": f"{folder}/tools", "UV_TOOL_BIN_DIR": f"{folder}/bin"}
        run(uv, "tool", "install", "--quiet", "--python", interpreter(python) or python, wheel, more=places)
        use(Path(folder) / "bin" / "robustvlm", Path(folder) / "empty")
    told("uv tool install", python, began)


def use(program: Path, empty: Path) -> None:
    """Give the installed program its commands, in a folder that is made for it."""
    empty.mkdir()
    for words in TRIED:
        run(program, *words, cwd=empty)


def told(way: str, python: str, began: float) -> None:
    """Say that an environment worked, and how long all of it took."""
    print(f"the wheel works on Python {python} by {way} ({time.monotonic() - began:.0f} s)", flush=True)


def run(*words: str | Path, cwd: Path = ROOT, more: Mapping[str, str] | None = None) -> None:
    """Run a program, with more environment variables, and end with its exit code where that is not 0."""
    # What lies in this checkout must not stand in for what was installed.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(word) for word in words], cwd=cwd, check=False, env=environment | dict(more or {}))
    if done.returncode:
        sys.exit(f"failed with exit code {done.returncode}: {' '.join(map(str, words))}")


def end_if(faults: list[str], archive: Path) -> None:
    """End the program if something is wrong with an archive."""
    if faults:
        sys.exit(f"{archive.name}: {'; '.join(faults)}")


if __name__ == "__main__":
    main()
