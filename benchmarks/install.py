"""What it takes to install this program and others and to see a first result of each, in environments of their own.

python -m benchmarks.install --also before=dist-old/robustvlm-0.1.0-py3-none-any.whl

PyTorch and torchvision are installed once, and counted apart: every environment sees that one copy. Needs the package
index and about eight gigabytes, which are freed again. Seconds of installing are those of the machine, its disk, its
network and its load; of use, processor seconds on one thread, which say less of who else is there.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

_ATTACKED = """
import torch, torchvision
torch.manual_seed(0)
model = torchvision.models.resnet18(num_classes=10).eval()
x = torch.rand(20, 3, 64, 64)
y = model(x).argmax(1)
"""
_INSPECT = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import match

@task
def hello():
    return Task(dataset=[Sample(input="Say hello", target="hello")], scorer=match())
"""


@dataclass(frozen=True)
class Subject:
    """A program: how it is installed, what a first result of it is, and how it says what it can do.

    Args:
        torch: whether it stands on PyTorch. first: Python code, or words of a command (`files` are written before).
        shows: what the first result is, in words. module: what is imported.
    """

    name: str
    requirement: str
    module: str
    first: str | tuple[str, ...]
    shows: str
    torch: bool = False
    command: str = ""
    files: tuple[tuple[str, str], ...] = ()


_OURS = ("robustvlm", "attack", "tiny", "--limit", "20", "--steps", "20", "--device", "cpu")
_SHOWS = "two attacks on 20 images; HTML report"


def ours(name: str, requirement: str) -> Subject:
    """Return this program, as a wheel or a folder has it."""
    return Subject(name, requirement, "robustvlm", _OURS, _SHOWS, torch=True, command="robustvlm")


OTHERS = (
    Subject(
        "torchattacks", "torchattacks", "torchattacks",
        _ATTACKED + "import torchattacks\nprint(torchattacks.PGD(model, 8/255, 2/255, 20)(x, y).shape)",
        "PGD on 20 images; a tensor", torch=True,
    ),
    Subject(
        "pyautoattack", "pyautoattack", "pyautoattack",
        _ATTACKED + "from pyautoattack import AutoAttack\nattack = AutoAttack(model, norm='Linf', eps=8/255, "
        "version='custom', attacks=['apgd-ce'], device='cpu')\nattack.run_standard_evaluation(x, y, batch_size=20)",
        "APGD on 20 images; lines of text", torch=True,
    ),
    Subject(
        "torchmetrics", "torchmetrics", "torchmetrics",
        "import torch, torchmetrics\nmetric = torchmetrics.Accuracy('multiclass', num_classes=10)\n"
        "print(metric(torch.rand(20, 10), torch.randint(10, (20,))))",
        "an accuracy; a tensor", torch=True,
    ),
    Subject(
        "inspect_ai", "inspect_ai", "inspect_ai",
        ("inspect", "eval", "hello.py", "--model", "mockllm/model", "--display", "plain"),
        "one question to a model that is none; a log", command="inspect", files=(("hello.py", _INSPECT),),
    ),
    Subject("httpx", "httpx[cli]", "httpx", "import httpx\nprint(httpx.Client())", "a client", command="httpx"),
    Subject(
        "ruff", "ruff", "ruff", ("ruff", "check", "--exit-zero", "a.py"), "findings in a file of one line",
        command="ruff", files=(("a.py", "import os\n"),),
    ),
    Subject("uv", "uv", "uv", ("uv", "venv", "--quiet", "new"), "an environment", command="uv"),
)  # fmt: skip

# Public names of a module, and what their docstrings have; submodules that it holds are none.
_API = """
import importlib, inspect, json, pathlib, sys
module = importlib.import_module(sys.argv[1])
names = getattr(module, "__all__", None) or [name for name in dir(module) if not name.startswith("_")]
found = [getattr(module, name, None) for name in names]
found = [one for one in found if inspect.isclass(one) or inspect.isroutine(one)]
docs = [inspect.getdoc(one) or "" for one in found]
typed = (pathlib.Path(module.__file__).parent / "py.typed").exists()
print(json.dumps([len(found), sum(map(bool, docs)), sum(">>>" in text for text in docs), typed]))
"""


def main() -> None:
    """Measure each, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", default=".", help="this program: a wheel, or a folder to build one from")
    parser.add_argument("--also", action="append", default=[], metavar="NAME=WHEEL", help="another version of it")
    parser.add_argument(
        "--base", type=Path, help="an environment of this Python that has PyTorch and torchvision already"
    )
    parser.add_argument("--only", default="", help="names, with commas between")
    given = parser.parse_args()
    subjects = [ours("robustvlm", given.wheel)]
    subjects += [ours(f"robustvlm, {name}", wheel) for name, _, wheel in (text.partition("=") for text in given.also)]
    subjects += OTHERS
    wanted = given.only.split(",") if given.only else [one.name for one in subjects]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        base, took = given.base or Path(folder) / "torch", "not measured"
        if given.base is None:
            took = in_words(*install(base, "torch", "torchvision"))
        rows.append(["PyTorch, torchvision", took, *sizes(base), *[""] * 6])
        _tell(rows[-1])
        for subject in subjects:
            if subject.name in wanted:
                rows.append(measured(subject, Path(folder), base))
                _tell(rows[-1])
    print(table(rows))


HEADS = (
    "program",
    "install, s (of a processor)",
    "MB",
    "packages",
    "first result",
    "first time, processor s",
    "again",
    "help: lines, processor s",
    "public names / with docstring / with example",
    "typed",
)


def measured(subject: Subject, folder: Path, base: Path) -> list[str]:
    """Install a program into an environment, use it twice, ask for its help, and return a row; the place is freed."""
    place, work = folder / "one", folder / "work"
    work.mkdir()
    try:
        took = in_words(*install(place, subject.requirement, sees=base if subject.torch else None))
        for name, text in subject.files:
            (work / name).write_text(text, encoding="utf-8")
        words = [str(place / "bin/python"), "-c", subject.first] if isinstance(subject.first, str) else [
            str(place / "bin" / subject.first[0]), *subject.first[1:]
        ]  # fmt: skip
        first, _ = timed(words, work)
        for made in ("runs", "new", "logs"):
            shutil.rmtree(work / made, ignore_errors=True)
        again, _ = timed(words, work)
        helped = ""
        if subject.command:
            spent, text = timed([str(place / "bin" / subject.command), "--help"], work)
            helped = f"{len(text.splitlines())}, {spent:.1f}"
        asked = [str(place / "bin/python"), "-c", _API, subject.module]
        public, told, shown, typed = json.loads(
            subprocess.run(asked, capture_output=True, text=True, check=True, cwd=work).stdout.splitlines()[-1]
        )
        use = [subject.shows, f"{first:.1f}", f"{again:.1f}", helped]
        api = [f"{public} / {told} / {shown}", "yes" if typed else "no"]
        return [subject.name, took, *sizes(place), *use, *api]
    except subprocess.CalledProcessError as error:
        said = str(error.stderr or error.stdout or "").strip().splitlines()
        return [subject.name, "failed", *[""] * 2, (said or [str(error)])[-1][:120], *[""] * 5]
    finally:
        shutil.rmtree(place, ignore_errors=True)
        shutil.rmtree(work)


def install(place: Path, *requirements: str, sees: Path | None = None) -> tuple[float, float]:
    """Make an environment with packages and return how long pip took, in seconds and in processor seconds.

    Args:
        sees: another environment that it stands on, whose packages it has.
    """
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    if sees is not None:
        (site(place) / "base.pth").write_text(f"{site(sees)}\n", encoding="utf-8")
    began, before = time.perf_counter(), _spent()
    pip = (str(place / "bin/python"), "-m", "pip", "--quiet", "--no-cache-dir", "--disable-pip-version-check")
    subprocess.run([*pip, "install", *requirements], check=True, capture_output=True, text=True)
    return time.perf_counter() - began, _spent() - before


def timed(words: list[str], work: Path) -> tuple[float, str]:
    """Return the processor seconds of a program, its children's included, and what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["OMP_NUM_THREADS"] = "1"  # threads that wait for one another on a busy machine count as work
    before = _spent()
    done = subprocess.run(words, cwd=work, check=True, capture_output=True, text=True, env=environment)
    return _spent() - before, done.stdout


def _spent() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def site(place: Path) -> Path:
    """Return the folder of an environment's packages."""
    (found,) = place.glob("lib/python3*/site-packages")
    return found


def megabytes(place: Path) -> float:
    """Return the size of an environment's packages, without pip's own."""
    files = (path for path in site(place).rglob("*") if path.is_file() and not path.is_symlink())
    own = {"pip", "setuptools", "_distutils_hack", "pkg_resources"}
    return sum(path.stat().st_size for path in files if path.relative_to(site(place)).parts[0] not in own) / 1e6


def sizes(place: Path) -> list[str]:
    """Return megabytes and number of the packages of an environment, without pip and setuptools."""
    count = sum(not path.name.startswith(("pip-", "setuptools-")) for path in site(place).glob("*.dist-info"))
    return [f"{megabytes(place):,.0f}", str(count)]


def in_words(seconds: float, spent: float) -> str:
    """Return how long something took."""
    return f"{seconds:.0f} ({spent:.0f})"


def table(rows: list[list[str]]) -> str:
    """Return rows as Markdown, below the heads."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (HEADS, ["---"] * len(HEADS), *rows))


def _tell(row: list[str]) -> None:
    print(" | ".join(row), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
