"""Sources stream: memory does not grow with the number of images."""

from __future__ import annotations

import io
import resource
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from robustvlm.data.specs import open_data

COUNT = 4000
"""Images of 12 kB each: 48 MB, which a careless reader holds all at once."""
STATM = Path("/proc/self/statm")


def in_imagefolder(tmp_path: Path, image: bytes) -> str:
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "0.png").write_bytes(image)
    for i in range(1, COUNT):
        (tmp_path / "only" / f"{i}.png").hardlink_to(tmp_path / "only" / "0.png")
    return f"imagefolder:{tmp_path}"


def in_parquet(tmp_path: Path, image: bytes) -> str:
    # One row group, without dictionary or compression, so that it is as large in the file as in memory.
    table = pa.table({"image": [image] * COUNT, "label": ["only"] * COUNT})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=COUNT, use_dictionary=False, compression="none")
    return f"parquet:{tmp_path / 'a.parquet'}"


def in_shard(tmp_path: Path, image: bytes) -> str:
    pytest.importorskip("webdataset")
    (tmp_path / "classnames.txt").write_text("only")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(COUNT):
            for suffix, data in (("png", image), ("cls", b"0")):
                info = tarfile.TarInfo(f"{i}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return f"wds:{tmp_path / 'a.tar'}"


@pytest.mark.skipif(not STATM.exists(), reason="needs /proc")
@pytest.mark.parametrize("write", [in_imagefolder, in_parquet, in_shard])
def test_memory_is_flat(tmp_path: Path, noise: bytes, write: Callable[[Path, bytes], str]) -> None:
    source = open_data(write(tmp_path, noise))
    before = resident()
    held = [resident() for number, _ in enumerate(source.samples()) if number % 200 == 0]
    assert len(held) == COUNT // 200
    assert max(held) - before < 24 * 2**20


def resident() -> int:
    """Return the bytes of memory this process holds."""
    return int(STATM.read_text().split()[1]) * resource.getpagesize()
