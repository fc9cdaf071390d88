"""Writing files: whole or not at all, and the disk's refusals in one line."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from robustvlm.core.files import TEMPORARY, named_disk_errors, replacing, write_text
from robustvlm.errors import UserError


def test_a_written_file_is_whole_and_leaves_no_temporary(tmp_path: Path) -> None:
    target = tmp_path / "new" / "note.txt"
    write_text(target, "grüße\n")
    assert target.read_text(encoding="utf-8") == "grüße\n"
    assert [entry.name for entry in target.parent.iterdir()] == ["note.txt"]


@pytest.mark.parametrize("interruption", [OSError(errno.ENOSPC, "no space"), KeyboardInterrupt(), ValueError("bug")])
def test_whatever_interrupts_a_write_leaves_the_old_content(tmp_path: Path, interruption: BaseException) -> None:
    target = tmp_path / "note.txt"
    write_text(target, "old")
    with pytest.raises(type(interruption)), replacing(target) as temporary:  # noqa: PT012
        temporary.write_text("half of the n")
        assert target.read_text() == "old"
        raise interruption
    assert target.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["note.txt"]


def test_the_temporary_lies_beside_the_target_and_is_known_by_its_name(tmp_path: Path) -> None:
    with replacing(tmp_path / "a.json") as temporary:
        assert temporary.parent == tmp_path
        assert temporary.name.startswith(".")
        assert temporary.name.endswith(TEMPORARY)


def test_files_are_readable_as_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_text(tmp_path / "a", "x")
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644
        assert os.umask(0o022) == 0o022, "the umask itself is left as it was"
    finally:
        os.umask(before)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_that_says_how_to_go_on(tmp_path: Path, code: int) -> None:
    text = r"full .* free some space and repeat the command"
    with pytest.raises(UserError, match=text) as caught, named_disk_errors(tmp_path):
        raise OSError(code, os.strerror(code))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "code", [errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG]
)
def test_a_refusing_folder_is_one_line_that_names_another_way(tmp_path: Path, code: int) -> None:
    text = r"cannot write to .* choose another folder with --out"
    with pytest.raises(UserError, match=text) as caught, named_disk_errors(tmp_path):
        raise OSError(code, os.strerror(code))
    assert os.strerror(code) in str(caught.value)


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="odd"), named_disk_errors(tmp_path):
        raise OSError(errno.EIO, "odd")
    with pytest.raises(KeyError), named_disk_errors(tmp_path):
        raise KeyError("not of the disk")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_really_full_device_is_recognised(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is full"), named_disk_errors(tmp_path), Path("/dev/full").open("wb") as handle:
        handle.write(b"x")
