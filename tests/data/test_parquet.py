"""Parquet files in the hub's format: columns, names, labels, damage."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from robustvlm.data.parquet import ParquetSource
from robustvlm.data.source import Sample, Unreadable
from robustvlm.data.specs import open_data, open_unlabelled
from robustvlm.data.splits import one_split, require_unseen
from robustvlm.errors import UserError

Plain = Callable[..., bytes]
HUB = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def hub_metadata(names: list[str], label: str = "label") -> dict[str, str]:
    features = {"image": {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}
    return {"huggingface": json.dumps({"info": {"features": features}})}


def write(path: Path, images: list[Any], labels: list[Any], *, names: list[str] | None = None, **kinds: Any) -> Path:
    """Write a file; `image`/`label` give other column types, `rows` the size of row groups, `columns` other names."""
    columns = kinds.get("columns", ("image", "label"))
    schema = pa.schema([(columns[0], kinds.get("image", HUB)), (columns[1], kinds.get("label", pa.int64()))])
    if names:
        schema = schema.with_metadata(hub_metadata(names, columns[1]))
    table = pa.table(dict(zip(columns, (images, labels), strict=True)), schema=schema)
    pq.write_table(table, path, row_group_size=kinds.get("rows", 4))
    return path


def struct(data: bytes | None) -> dict[str, Any]:
    return {"bytes": data, "path": "somewhere.png"}


def test_hub_format(tmp_path: Path, plain: Plain) -> None:
    path = write(
        tmp_path / "a.parquet",
        [struct(plain((i, 0, 0))) for i in range(10)],
        [i % 2 for i in range(10)],
        names=["cat", "dog"],
    )
    source = open_data(f"parquet:{path}")
    assert source.class_names == ("cat", "dog")
    assert source.ids() == [f"a/{i}" for i in range(10)]
    items = [item for item in source.samples() if isinstance(item, Sample)]
    assert [item.label for item in items] == [i % 2 for i in range(10)]
    assert [item.image.getpixel((0, 0)) for item in items] == [(i, 0, 0) for i in range(10)]
    kept = [item.id for item in source.samples(keep=lambda name: name in {"a/1", "a/9"})]
    assert kept == ["a/1", "a/9"]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_plain_bytes_under_other_names(tmp_path: Path, plain: Plain, kind: pa.DataType) -> None:
    path = write(
        tmp_path / "a.parquet", [plain()] * 3, [0, 1, 0], names=["x", "y"], image=kind, columns=("photo", "fine")
    )
    with pytest.raises(UserError, match=r"no image column: name one of its columns with \?image=NAME \(photo, fine\)"):
        open_data(f"parquet:{path}")
    assert len(list(open_data(f"parquet:{path}?image=photo&label=fine").samples())) == 3


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_text_labels_are_class_names(tmp_path: Path, plain: Plain, kind: pa.DataType) -> None:
    path = write(tmp_path / "a.parquet", [struct(plain())] * 5, ["dog", "cat", "dog", None, "cat"], label=kind)
    source = open_data(f"parquet:{path}")
    assert source.class_names == ("cat", "dog")
    assert [item.label for item in source.samples() if isinstance(item, Sample)] == [1, 0, 1, -1, 0]


def test_a_folder_of_files(tmp_path: Path, plain: Plain) -> None:
    for name in ("b", "a"):
        write(tmp_path / f"{name}.parquet", [struct(plain())] * 2, [0, 1], names=["cat", "dog"])
    assert open_data(f"parquet:{tmp_path}").ids() == ["a/0", "a/1", "b/0", "b/1"]
    write(tmp_path / "c.parquet", [struct(plain())], ["cat"], label=pa.string())
    with pytest.raises(UserError, match=r"texts in one of .*a.parquet and .*c.parquet, numbers in"):
        open_data(f"parquet:{tmp_path}")


def test_damaged_rows_are_recorded(tmp_path: Path, plain: Plain) -> None:
    images = [struct(plain()), struct(b""), struct(None), struct(b"junk"), None]
    path = write(tmp_path / "a.parquet", images, [0, 0, 1, 1, 1], names=["cat", "dog"])
    items = list(open_data(f"parquet:{path}").samples())
    assert [item.id for item in items if isinstance(item, Unreadable)] == ["a/1", "a/2", "a/3", "a/4"]
    reasons = [item.reason for item in items if isinstance(item, Unreadable)]
    assert reasons == [
        "empty file",
        "no image bytes in this row",
        "not an image of a known format",
        "no image bytes in this row",
    ]


def test_a_damaged_row_group_costs_its_rows_only(tmp_path: Path, noise: bytes) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"image": [noise + bytes([i]) for i in range(12)], "label": [i % 2 for i in range(12)]})
    schema = table.schema.with_metadata(hub_metadata(["cat", "dog"]))
    pq.write_table(table.cast(schema), path, row_group_size=4, compression="gzip", use_dictionary=False)
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    middle = chunk.data_page_offset + chunk.total_compressed_size // 2
    data[middle : middle + 64] = bytes(64)
    path.write_bytes(data)
    items = list(open_data(f"parquet:{path}").samples())
    assert [item.id for item in items] == [f"a/{i}" for i in range(12)]
    damaged = [item.id for item in items if isinstance(item, Unreadable)]
    assert set(damaged) <= {"a/4", "a/5", "a/6", "a/7"}
    assert damaged


def test_fingerprint_follows_content(tmp_path: Path, plain: Plain) -> None:
    images = [struct(plain((i, 0, 0))) for i in range(4)]
    prints = set()
    for labels, pictures in (
        ([0, 1, 0, 1], images),
        ([0, 1, 1, 1], images),
        ([0, 1, 0, 1], [*images[:3], struct(b"x")]),
    ):
        path = write(tmp_path / "a.parquet", pictures, labels, names=["cat", "dog"])
        assert ParquetSource(path).fingerprint() == ParquetSource(path).fingerprint()
        prints.add(ParquetSource(path).fingerprint())
    assert len(prints) == 3


def test_class_names_from_a_file(tmp_path: Path, plain: Plain) -> None:
    path = write(tmp_path / "a.parquet", [struct(plain())] * 2, [0, 1])
    names = tmp_path / "names.txt"
    names.write_text("# labels 0 and 1\nred fox\n\nlynx\n")
    with pytest.raises(UserError, match="holds no class names: pass --classes FILE"):
        open_data(f"parquet:{path}")
    assert open_data(f"parquet:{path}", classes=names).class_names == ("red fox", "lynx")
    names.write_text("red fox\n")
    with pytest.raises(UserError, match=r"has label 1 \(column 'label'\) but 1 class names"):
        open_data(f"parquet:{path}", classes=names)


def test_faults_are_one_clear_line(tmp_path: Path, plain: Plain) -> None:
    good = write(tmp_path / "good.parquet", [struct(plain())], [0], names=["cat"])
    text_images = write(tmp_path / "text.parquet", ["x"], [0], names=["cat"], image=pa.string())
    float_labels = write(tmp_path / "float.parquet", [struct(plain())], [0.5], label=pa.float64())
    out_of_range = write(tmp_path / "range.parquet", [struct(plain())] * 2, [0, 7], names=["cat", "dog"])
    below = write(tmp_path / "below.parquet", [struct(plain())] * 2, [0, -2], names=["cat", "dog"])
    no_rows = write(tmp_path / "none.parquet", [], [], names=["cat"])
    twice = write(tmp_path / "twice.parquet", [struct(plain())], [0], names=["cat", "cat"])
    (tmp_path / "junk.parquet").write_bytes(b"PAR1 junk")
    os.mkfifo(tmp_path / "pipe.parquet")
    (tmp_path / "folder").mkdir()
    for spec, message in (
        (f"{tmp_path / 'missing.parquet'}", "no file"),
        (f"{tmp_path / 'pipe.parquet'}", "is no regular file"),
        (f"{tmp_path / 'junk.parquet'}", "is not a readable Parquet file"),
        (f"{tmp_path / 'folder'}", "holds no .parquet file"),
        (f"{good}?image=imag", "has no column 'imag': did you mean 'image'"),
        (f"{good}?label=lable", "has no column 'lable': did you mean 'label'"),
        (f"{good}?image=label", "column 'label' is int64; images are bytes or a struct"),
        (f"{good}?labels=label", "no option 'labels': did you mean 'label'"),
        (f"{text_images}", "column 'image' is string"),
        (f"{float_labels}", "column 'label' is double; labels are integers or text"),
        (f"{out_of_range}", "has label 7 .* but 2 class names, for labels 0 to 1"),
        (f"{below}", "has label -2"),
        (f"{no_rows}", "holds no row"),
        (f"{twice}", "names 'cat' 2 times"),
        ("", "names no file: write parquet:FILE"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            open_data(f"parquet:{spec}")
        assert "\n" not in str(caught.value)


def test_texts_that_are_numbers_are_the_labels_of_those_numbers(tmp_path: Path, plain: Plain) -> None:
    order = [3, 0, 11, 10, 1, 2, 4, 5, 6, 7, 8, 9]
    texts = [*map(str, order), "-1", None]
    path = write(tmp_path / "a.parquet", [struct(plain())] * 14, texts, label=pa.string())
    names = tmp_path / "names.txt"
    names.write_text("".join(f"name{i}\n" for i in range(12)))
    source = open_data(f"parquet:{path}", classes=names)
    found = [
        source.class_names[item.label] for item in source.samples() if isinstance(item, Sample) and item.label >= 0
    ]
    assert found == [f"name{i}" for i in order]
    assert [item.label for item in source.samples() if isinstance(item, Sample)][-2:] == [-1, -1]
    assert "are or begin with numbers" in open_data(f"parquet:{path}").remarks[0]


def test_labels_that_begin_at_one_are_told(tmp_path: Path, plain: Plain) -> None:
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\ncat\n")
    path = write(tmp_path / "a.parquet", [struct(plain())] * 3, [1, 2, 3])
    with pytest.raises(UserError, match=r"has label 3 .* but 3 class names.*if the labels begin at 1"):
        open_data(f"parquet:{path}", classes=names)
    path = write(tmp_path / "b.parquet", [struct(plain())] * 2, [1, 2])
    assert open_data(f"parquet:{path}", classes=names).remarks == [
        "no image has label 0 ('ant'): do the labels begin at 1?"
    ]


def test_a_split_is_named_whole(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("train-0.parquet", "test-0.parquet", "odd_ones-0.parquet")]
    assert one_split(files, "odd_ones", tmp_path) == files[2:]
    with pytest.raises(UserError, match="no file of the split 't'"):
        one_split(files, "t", tmp_path)


def test_splits_in_one_folder_are_asked_for(tmp_path: Path, plain: Plain) -> None:
    for name in ("train-00000-of-00001", "test-00000-of-00001"):
        write(tmp_path / f"{name}.parquet", [struct(plain())], [0], names=["cat"])
    with pytest.raises(UserError, match=r"several splits, test .*train .*choose one with \?split=test"):
        open_data(f"parquet:{tmp_path}")
    assert open_data(f"parquet:{tmp_path}?split=test").ids() == ["test-00000-of-00001/0"]
    with pytest.raises(UserError, match="no file of the split 'val'"):
        open_data(f"parquet:{tmp_path}?split=val")
    for name in ("train", "validation"):
        (tmp_path / "sub" / name).mkdir(parents=True)
        write(tmp_path / "sub" / name / "a.parquet", [struct(plain())], [0], names=["cat"])
    with pytest.raises(UserError, match="are splits"):
        open_data(f"parquet:{tmp_path / 'sub'}")
    assert open_data(f"parquet:{tmp_path / 'sub'}?split=val").ids() == ["a/0"]


def test_files_that_disagree_about_names_or_labels_are_refused(tmp_path: Path, plain: Plain) -> None:
    for name, names in (("a", ["cat", "dog"]), ("b", ["dog", "cat"])):
        write(tmp_path / f"{name}.parquet", [struct(plain())], [0], names=names)
    with pytest.raises(UserError, match=r"label 0 is 'cat' in .*a.parquet and 'dog' in .*b.parquet"):
        open_data(f"parquet:{tmp_path}")
    for texts, message in (
        (["cat", ""], "an empty label"),
        (["cat", "cat "], "are one name"),
        (["ca\x1b", "x"], "U.001B"),
    ):
        path = write(tmp_path / "c.parquet", [struct(plain())] * 2, texts, label=pa.string())
        with pytest.raises(UserError, match=message):
            open_data(f"parquet:{path}")


def test_the_content_follows_images_of_the_same_sizes(tmp_path: Path, plain: Plain) -> None:
    def written(name: str, color: int, rows: int, **kinds: Any) -> ParquetSource:
        images = [struct(plain((i, color, 0), kind="BMP")) for i in range(100)]
        return ParquetSource(write(tmp_path / name, images, [0] * 100, names=["cat"], rows=rows, **kinds))

    for rows in (4, 1000):
        before = written("a.parquet", 1, rows)
        known, print_ = before.content(), before.fingerprint()
        assert known is not None
        after = written("a.parquet", 2, rows)
        assert after.fingerprint() == print_
        assert after.content() != known
        assert written("a.parquet", 1, rows).content() == known
        named = [name for name, data in after._stored() if data]
        assert len(set(named)) == (32 if rows == 4 else 64)
        assert set(named) <= set(after.ids())
    by_label = ParquetSource(tmp_path / "a.parquet", label="", captions=None)
    assert by_label.content() == known


def test_a_damaged_file_has_a_content_all_the_same(tmp_path: Path, plain: Plain) -> None:
    path = write(tmp_path / "a.parquet", [plain((i, 0, 0)) for i in range(8)], [0] * 8, names=["c"], image=pa.binary())
    whole = ParquetSource(path).content()
    data = bytearray(path.read_bytes())
    data[10:200] = b"x" * 190
    path.write_bytes(data)
    assert ParquetSource(path).content() != whole


def test_images_read_for_other_labels_were_trained_on_all_the_same(tmp_path: Path, plain: Plain) -> None:
    path = write(tmp_path / "a.parquet", [plain((i, 0, 0)) for i in range(8)], [0] * 8, names=["c"], image=pa.binary())
    taught, judged = open_data(f"parquet:{path}"), open_unlabelled(f"parquet:{path}?label=")
    with pytest.raises(UserError, match=r"8 images of --val .* are also trained on"):
        require_unseen(judged, taught, option="--val")
