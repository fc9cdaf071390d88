"""Files that may come from anyone: no pipe is waited for, no device read, no nesting followed without end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from robustvlm.core.files import NotRegular, open_own, parse_json, read_bytes, read_json, require_regular
from robustvlm.errors import UserError


def test_pipes_devices_and_folders_are_refused_at_once(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero"), tmp_path):
        with pytest.raises((NotRegular, IsADirectoryError)):
            read_bytes(path)
        with pytest.raises(NotRegular):
            require_regular(path)
    with pytest.raises(UserError, match="is no regular file"):
        read_json(pipe)


def test_size_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(b"x" * 100)
    assert read_bytes(tmp_path / "big", most=100) == b"x" * 100
    with pytest.raises(NotRegular, match="is larger than"):
        read_bytes(tmp_path / "big", most=99)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 5000, "[" * 70 + "]" * 70, "{", ""])
def test_json_that_cannot_be_walked_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"nested too deeply|Expecting"):
        parse_json(text)


def test_ordinary_json_is_read_and_damage_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_text('{"a": [1, {"b": null}]}')
    assert read_json(path) == {"a": [1, {"b": None}]}
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"cannot read '.*some.json' \(nested too deeply\): mend it") as caught:
        read_json(path, advice="mend it")
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


@pytest.mark.parametrize("mode", ["ab", "r+b"])
def test_files_to_write_into_are_no_links_and_are_not_emptied(tmp_path: Path, mode: str) -> None:
    precious = tmp_path / "precious"
    precious.write_text("x")
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(precious)
    os.mkfifo(pipe)
    for path, kind in ((link, "a link"), (pipe, "a pipe")):
        with pytest.raises(UserError, match=f"is no file but {kind}"):
            open_own(path, mode).close()
    assert precious.read_text() == "x"
    with open_own(precious, mode) as handle:
        assert precious.read_text() == "x"
        handle.seek(0, os.SEEK_END)
        handle.write(b"y")
    assert precious.read_text() == "xy"
