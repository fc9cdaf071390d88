"""Addresses that open doors: used, and neither stored nor shown; a run goes on under a fresh signature."""

from __future__ import annotations

import functools
import io
import tarfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from command_line import Call

pytest.importorskip("webdataset")
pytestmark = pytest.mark.usefixtures("own_place")


@pytest.fixture
def shard(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str]]]:
    """The address of a shard with the pictures, and what its server was asked with."""
    (place / "served").mkdir()
    with tarfile.open(place / "served" / "a.tar", "w") as tar:
        for number, picture in enumerate(sorted(place.glob("photos/*/*.png"))):
            for suffix, data in (("png", picture.read_bytes()), ("txt", picture.parent.name.encode())):
                member = tarfile.TarInfo(f"{number:03d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    asked: list[str] = []

    class Quiet(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.path} {self.headers.get('Authorization')}")
            super().do_GET()

        def log_message(self, format: str, *args: object) -> None:
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (place / "names").write_text("blue\nred\n")
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(place / "served"))) as http:
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"127.0.0.1:{http.server_address[1]}/a.tar", asked
        http.shutdown()


def test_a_signature_is_used_once_and_kept_nowhere(call: Call, place: Path, shard: tuple[str, list[str]]) -> None:
    address, asked = shard
    for number, signature in enumerate(("s3cretOne", "s3cretTwo")):
        data = f"wds:http://me:s3cretWord@{address}?X-Amz-Date={number}&X-Amz-Signature={signature}"
        ended = call(
            "attack", "own_encoders:Mean", "--data", data, "--classes", "names", "--attack", "pgd:steps=2", "--checks",
            "none", *(["--resume"] if number else []),
        )  # fmt: skip
        assert ended.code == 0, ended.err
        assert "s3cret" not in ended.out + ended.err
    assert asked[0] == "/a.tar?X-Amz-Date=0&X-Amz-Signature=s3cretOne Basic bWU6czNjcmV0V29yZA=="
    assert len(list((place / "runs").glob("attack-*"))) == 1
    for file in [*(place / "runs").rglob("*"), *(place / "cache").rglob("*")]:
        assert "s3cret" not in file.name
        assert not file.is_file() or b"s3cret" not in file.read_bytes(), file


def test_a_stored_address_does_not_open_again(call: Call, shard: tuple[str, list[str]]) -> None:
    address, asked = shard
    ended = call("data", f"wds:http://***@{address}?sig=***", "--classes", "names", "--check")
    assert ended.code == 2
    assert "was stored without its password or signature: give the whole address" in ended.err
    assert not asked


def test_a_refusal_of_the_server_does_not_show_the_signature(call: Call, shard: tuple[str, list[str]]) -> None:
    address, _ = shard
    missing = address.replace("a.tar", "b.tar")
    ended = call("data", f"wds:http://me:s3cret@{missing}?sig=s3cret", "--classes", "names", "--check")
    assert ended.code == 2
    assert "404" in ended.err
    assert "s3cret" not in ended.out + ended.err
