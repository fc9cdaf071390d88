"""What `make packaging` finds wrong with archives and metadata."""

from __future__ import annotations

import doctest
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools import address, packaging
from tools.packaging import (
    EXTRAS,
    SDIST_HAS,
    export,
    interpreter,
    lacking,
    metadata_faults,
    next_step,
    package_files,
    sdist_faults,
    stale_faults,
    tracked_files,
    upload_faults,
    wheel_faults,
)

ROOT = Path(__file__).parents[2]
GOOD = [
    "robustvlm/__init__.pyi",
    "robustvlm/py.typed",
    "robustvlm/report/report.schema.json",
    "robustvlm-1.data/data/share/doc/robustvlm/attacks.md",
    "robustvlm-1.dist-info/licenses/LICENSE",
]
METADATA = """\
Metadata-Version: 2.4
Name: robustvlm
Summary: Attack, certify and defend
License-Expression: Apache-2.0
Requires-Python: >=3.10
Requires-Dist: torch>=2.3
Requires-Dist: torchattacks>=3.5.1; extra == 'external'
"""
PROVIDED = "".join(f"Provides-Extra: {extra}\n" for extra in EXTRAS.split(","))


def test_a_whole_wheel_has_no_fault() -> None:
    assert wheel_faults(GOOD, GOOD[:3]) == []


@pytest.mark.parametrize("stray", ["tests/test_a.py", "tools/__init__.py", "benchmarks/run.py"])
def test_a_folder_beside_the_package_is_found(stray: str) -> None:
    (said,) = wheel_faults([*GOOD, stray], [])
    assert f"{stray.split('/')[0]}/" in said


@pytest.mark.parametrize("lost", GOOD)
def test_what_a_wheel_lacks_is_found(lost: str) -> None:
    assert len(wheel_faults([name for name in GOOD if name != lost], [])) == 1


def test_what_a_sdist_lacks_is_found_and_what_is_asked_for_exists() -> None:
    whole = [f"robustvlm-1/{name}" for name in SDIST_HAS]
    assert sdist_faults(whole, []) == []
    assert sdist_faults(whole[1:], []) == [f"{SDIST_HAS[0]} is missing"]
    assert [name for name in SDIST_HAS if not (ROOT / name).is_file()] == []


def test_a_folder_of_the_package_that_an_archive_lacks_is_found() -> None:
    # Links in the root once kept two folders out of the sdist, and so out of the wheel that is built from it.
    package = package_files()
    assert {"robustvlm/attacks/apgd.py", "robustvlm/certify/certifier.py", "robustvlm/py.typed"} < set(package)
    without = [name for name in package if not name.startswith("robustvlm/attacks/")]
    lost = sum(name.startswith("robustvlm/attacks/") and name.count("/") == 2 for name in package)
    assert lost > 3
    assert f"{lost} files of robustvlm/attacks/ are missing" in wheel_faults([*without, *GOOD], package)
    whole = [f"robustvlm-1/{name}" for name in (*without, *SDIST_HAS)]
    assert f"{lost} files of robustvlm/attacks/ are missing" in sdist_faults(whole, package)


def test_what_is_lacking_is_named_one_by_one_only_where_it_is_little() -> None:
    few = {f"a/{number}" for number in range(3)}
    assert lacking(few, []) == ["a/0 is missing", "a/1 is missing", "a/2 is missing"]
    assert lacking({*few, "a/3"}, []) == ["4 files of a/ are missing"]
    assert lacking(few, few) == []


def test_the_sdist_is_not_gathered_by_a_walk_from_the_root() -> None:
    # There `attacks` is met before robustvlm/attacks, and a folder that was met is passed over.
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[tool.hatch.build.targets.sdist]\n")[2].partition("\n[")[0]
    named = re.findall(r'"([^"]+)"', section)
    assert section.startswith("only-include = [")
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_only_a_python_that_runs_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    program = tmp_path / "python3.99"
    assert interpreter("3.99") is None
    program.write_text("#!/bin/sh\nexit 127\n")
    program.chmod(0o755)
    assert interpreter("3.99") is None
    program.write_text("#!/bin/sh\nexit 0\n")
    assert interpreter("3.99") == str(program)
    program.unlink()
    other = tmp_path / "versions/3.99.1/bin/python3.99"
    other.parent.mkdir(parents=True)
    other.symlink_to("/bin/true")
    assert interpreter("3.99") == str(other)


def test_metadata_that_lack_something_or_pin_others_are_found() -> None:
    assert metadata_faults(METADATA + PROVIDED) == []
    assert metadata_faults(METADATA) == [f"there is no extra {extra}" for extra in EXTRAS.split(",")]
    assert "License-Expression" in metadata_faults(METADATA.replace("License-E", "E") + PROVIDED)[0]
    (said,) = metadata_faults(METADATA + "Requires-Dist: torchattacks>=3.5.1\n" + PROVIDED)
    assert "pins others" in said


def test_the_extras_are_those_of_the_project_but_for_tests_and_docs() -> None:
    section = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]")[2]
    named = re.findall(r"^(\w+) = \[", section.partition("\n[project.scripts]")[0], re.M)
    assert set(named) - {"test", "docs"} == set(EXTRAS.split(","))


def test_the_program_needs_nothing_but_python_to_tell_what_it_does() -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-m", "tools.packaging", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--no-install" in done.stdout
    assert "--every-python" in done.stdout


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small checkout in the place of this one: one commit, a file that git ignores and one that it does not know."""
    place = tmp_path / "here"
    (place / "robustvlm").mkdir(parents=True)
    for name, text in {
        "pyproject.toml": "[project.scripts]\n", "README.md": "[a](docs/a.md)\n", "robustvlm/a.py": "one\n",
        ".gitignore": "/dist/\n",
    }.items():  # fmt: skip
        (place / name).write_text(text)
    (place / "attacks").symlink_to("robustvlm")
    git = ("git", "-C", str(place), "-c", "user.name=a", "-c", "user.email=a@b.example")
    for words in (("init", "-q"), ("add", "."), ("commit", "-q", "-m", "a")):
        subprocess.run([*git, *words], check=True)
    (place / "dist").mkdir()
    (place / "dist/old.whl").touch()
    (place / "robustvlm/notes.txt").touch()
    monkeypatch.setattr(packaging, "ROOT", place)
    return place


def test_what_git_does_not_know_is_left_out_and_named(checkout: Path, tmp_path: Path) -> None:
    (checkout / "robustvlm/a.py").write_text("two\n")
    files, strange = tracked_files()
    assert files == [".gitignore", "README.md", "attacks", "pyproject.toml", "robustvlm/a.py"]
    assert strange == ["robustvlm/notes.txt"]
    export(files, tmp_path / "there")
    assert package_files(tmp_path / "there") == ["robustvlm/a.py"]
    assert (tmp_path / "there/robustvlm/a.py").read_text() == "two\n"
    assert (tmp_path / "there/attacks").is_symlink()
    assert packaging.changed_files() == ["robustvlm/a.py"]
    shutil.rmtree(checkout / ".git")
    assert tracked_files() == ([*files, "robustvlm/notes.txt"], [])


def test_a_release_without_an_address_is_not_uploaded(checkout: Path, tmp_path: Path) -> None:
    (fault,) = upload_faults(METADATA, [])
    assert "tools.address" in fault
    assert "not fit for an upload" in next_step(METADATA, [])
    told = METADATA + "Project-URL: Source, https://host.example/a/b\nVersion: 1.2\n"
    assert upload_faults(told, ["a.py"]) == ["a.py differs from the last commit"]
    assert "tag this commit v1.2" in next_step(told, [])
    text = address.with_urls((checkout / "pyproject.toml").read_text(), "https://host.example/a/b")
    (checkout / "pyproject.toml").write_text(text)
    export(tracked_files()[0], tmp_path / "there")
    assert (tmp_path / "there/README.md").read_text() == "[a](https://host.example/a/b/blob/HEAD/docs/a.md)\n"
    assert (checkout / "README.md").read_text() == "[a](docs/a.md)\n"


def test_a_release_of_another_commit_is_not_uploaded(checkout: Path) -> None:
    wheel = checkout / "dist" / "a-1-py3-none-any.whl"
    wheel.parent.mkdir(exist_ok=True)
    names = [name for name in tracked_files()[0] if name.startswith("robustvlm/")]
    assert names
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in names:
            archive.write(checkout / name, name)
    assert stale_faults(wheel) == []
    (checkout / names[0]).write_text("later", encoding="utf-8")
    assert names[0] in stale_faults(wheel)[0]
    (checkout / names[0]).unlink()
    assert names[0] in stale_faults(wheel)[0]


def test_an_address_is_written_once_and_can_be_changed() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    first = address.with_urls(text, "https://host.example/a/b")
    assert address.address_in(first) == "https://host.example/a/b"
    assert address.with_urls(first, "https://host.example/a/b") == first
    second = address.with_urls(first, "https://host.example/c/d")
    assert "a/b" not in second
    assert first.replace("/a/b", "/c/d") == second
    assert len(first.splitlines()) - len(text.splitlines()) == (0 if address.address_in(text) else 5)
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    once = address.with_repository(cited, "https://host.example/a/b")
    assert address.with_repository(once, "https://host.example/a/b") == once


@pytest.mark.parametrize(
    "wrong",
    ["robustvlm", "http://host.example/a", "https://host.example", "https://me:secret@host.example/a", "https://h/a?b"],
)
def test_what_is_no_address_is_refused_without_its_password(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"address|password") as told:
        address.checked(wrong)
    assert "secret" not in str(told.value)


def test_the_examples_of_the_tools_are_right() -> None:
    for module in (address, packaging):
        done = doctest.testmod(module)
        assert done.attempted
        assert not done.failed
