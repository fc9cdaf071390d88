"""Build the wheel and the sdist, look into both, and try the wheel as somebody would who has nothing else.

    python -m tools.packaging [--no-install]

Needs `build` and `twine`. The extras are resolved together by uv, for every Python, where it is there; else by pip,
which takes many minutes. That and the environment for the wheel need the package index, and the latter a few gigabytes.
Exit code 1 at the first mistake.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from email.parser import Parser
from pathlib import Path

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
TRIED = ("--version",), ("attack", "tiny", "--limit", "2", "--attack", "fgsm", "--checks", "none")


def main() -> None:
    """Do all of it, with a line for each step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-install", action="store_true", help="do not try the wheel in an environment of its own")
    given = parser.parse_args()
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", ROOT / "dist", ROOT)
    (wheel,), (sdist,) = ((ROOT / "dist").glob(pattern) for pattern in ("*.whl", "*.tar.gz"))
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))).decode()
        end_if([*wheel_faults(archive.namelist()), *metadata_faults(text)], wheel)
    with tarfile.open(sdist) as packed:
        end_if(sdist_faults(packed.getnames()), sdist)
    print(f"{wheel.name} and {sdist.name} hold what they should", flush=True)
    resolve(wheel)
    if not given.no_install:
        try_out(wheel)


def wheel_faults(names: Iterable[str]) -> list[str]:
    """Return what is wrong with the names of a wheel's files.

    Example:
        >>> wheel_faults([*WHEEL_HAS, "tests/test_a.py"])
        ['it installs tests/ beside robustvlm/', 'docs/attacks.md is missing', 'the licence is missing']
    """
    names = list(names)
    tops = {name.split("/")[0] for name in names}
    strange = sorted(top for top in tops - WHEEL_FOLDERS if not top.endswith((".dist-info", ".data")))
    found = [f"it installs {top}/ beside robustvlm/" for top in strange]
    found += [f"{name} is missing" for name in WHEEL_HAS if name not in names]
    if not any(name.endswith(".data/data/share/doc/robustvlm/attacks.md") for name in names):
        found.append("docs/attacks.md is missing")
    if not any(name.endswith("/LICENSE") for name in names):
        found.append("the licence is missing")
    return found


def sdist_faults(names: Iterable[str]) -> list[str]:
    """Return what a sdist lacks, by the names of its files, all in one folder."""
    inside = {name.partition("/")[2] for name in names}
    return [f"{name} is missing" for name in SDIST_HAS if name not in inside]


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


def try_out(wheel: Path) -> None:
    """Install the wheel into an environment of its own and give it two commands in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "venv", Path(folder) / "venv")
        scripts = Path(folder) / "venv" / ("Scripts" if sys.platform == "win32" else "bin")
        run(scripts / "python", "-m", "pip", "install", "--quiet", wheel)
        (Path(folder) / "empty").mkdir()
        for words in TRIED:
            run(scripts / "robustvlm", *words, cwd=Path(folder) / "empty")
    print("the wheel works in an environment of its own", flush=True)


def run(*words: str | Path, cwd: Path = ROOT) -> None:
    """Run a program, and end with its exit code where that is not 0."""
    done = subprocess.run([str(word) for word in words], cwd=cwd, check=False)
    if done.returncode:
        sys.exit(f"failed with exit code {done.returncode}: {' '.join(map(str, words))}")


def end_if(faults: list[str], archive: Path) -> None:
    """End the program if something is wrong with an archive."""
    if faults:
        sys.exit(f"{archive.name}: {'; '.join(faults)}")


if __name__ == "__main__":
    main()
