"""WebDataset shards made here: labels, names, damage, and what they must not do."""

from __future__ import annotations

import functools
import io
import json
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from open_clip import IMAGENET_CLASSNAMES

from robustvlm.data.classes import imagenet_names
from robustvlm.data.source import Sample, Unreadable
from robustvlm.data.specs import open_data, open_raw, open_unlabelled, parse_spec
from robustvlm.data.splits import require_unseen
from robustvlm.errors import UserError

pytest.importorskip("webdataset")

Plain = Callable[..., bytes]


def write_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read(spec: str) -> tuple[dict[str, int], dict[str, str]]:
    """Return labels of the readable images and reasons of the others."""
    items = list(open_data(spec).samples())
    good = {item.id: item.label for item in items if isinstance(item, Sample)}
    return good, {item.id: item.reason for item in items if isinstance(item, Unreadable)}


@pytest.fixture
def shards(tmp_path: Path, plain: Plain) -> Path:
    """Two shards with class names beside them."""
    (tmp_path / "classnames.txt").write_text("cat\nred fox\n")
    for n in range(2):
        members = []
        for i in range(4):
            members += [(f"{i:04d}.png", plain((i, n, 0))), (f"{i:04d}.cls", str(i % 2).encode())]
        write_tar(tmp_path / f"test-{n}.tar", members)
    return tmp_path


@pytest.mark.parametrize("rest", ["", "/test-{0..1}.tar", "/classnames.txt"])
def test_folders_and_braces(shards: Path, rest: str) -> None:
    if rest.endswith(".txt"):
        with pytest.raises(UserError, match="holds no sample"):
            read(f"wds:{shards}{rest}")
        return
    source = open_data(f"wds:{shards}{rest}")
    assert source.class_names == ("cat", "red fox")
    assert source.ids() is None
    items = list(source.samples())
    assert [item.id for item in items] == [f"test-{n}/{i:04d}" for n in range(2) for i in range(4)]
    assert [item.image.getpixel((0, 0)) for item in items if isinstance(item, Sample)][5] == (1, 1, 0)
    assert [item.id for item in source.samples(limit=3)] == [item.id for item in items[:3]]


def test_label_formats(tmp_path: Path, plain: Plain) -> None:
    (tmp_path / "classnames.txt").write_text("cat\nred fox\n")
    labels = [
        ("cls", b"1\n"),
        ("txt", b"Red_Fox"),
        ("txt", b" 0 "),
        ("json", json.dumps({"label": 1, "other": "x"}).encode()),
        ("json", json.dumps({"class": "cat"}).encode()),
        ("json", b"1"),
        ("cls", b"-1"),
    ]
    members = [
        member
        for i, (kind, data) in enumerate(labels)
        for member in ((f"{i}.jpg", plain(kind="JPEG")), (f"{i}.{kind}", data))
    ]
    write_tar(tmp_path / "a.tar.gz", members, "w:gz")
    good, bad = read(f"wds:{tmp_path / 'a.tar.gz'}")
    assert list(good.values()) == [1, 1, 0, 1, 0, 1, -1]
    assert not bad


def test_damaged_samples_are_recorded(tmp_path: Path, plain: Plain) -> None:
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    image = plain()
    members = [
        ("good.png", image), ("good.cls", b"0"),
        ("junk.png", b"junk"), ("junk.cls", b"0"),
        ("alone.png", image),
        ("text.cls", b"1"), ("text.txt", b"cat"),
        ("../../etc/evil.png", image), ("../../etc/evil.cls", b"0"),
        ("/root/evil.png", image), ("/root/evil.cls", b"0"),
        ("good.webp", plain(kind="WEBP")), ("good.cls", b"1"),
    ]  # fmt: skip
    good, bad = read(f"wds:{write_tar(tmp_path / 'a.tar', members)}")
    assert good == {"a/good": 0}
    assert set(bad) == {"a/good", "a/junk", "a/alone", "a/text", "a/../../etc/evil", "a//root/evil"}
    assert bad["a/alone"] == "no label among its members (png)"
    assert bad["a/text"] == "no image among its members (cls txt)"
    assert bad["a/good"].startswith("the same key twice in one shard")
    assert "leads out" in bad["a/../../etc/evil"]


def test_a_truncated_shard_does_not_end_the_run(shards: Path) -> None:
    first = shards / "test-0.tar"
    first.write_bytes(first.read_bytes()[:3000])
    good, bad = read(f"wds:{shards}")
    assert sum(name.startswith("test-1/") for name in good) == 4
    assert "test-0" in bad
    (shards / "test-1.tar").write_bytes(b"junk" * 1000)
    first.write_bytes(b"junk" * 1000)
    with pytest.raises(UserError, match="holds no sample: "):
        read(f"wds:{shards}")


@pytest.fixture
def server(shards: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(shards))) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_address[1]}"
        http.shutdown()


def test_addresses(server: str, shards: Path) -> None:
    names = shards / "classnames.txt"
    source = open_data(f"wds:{server}/test-{{0..2}}.tar?token=x", classes=names)
    items = list(source.samples())
    assert sum(isinstance(item, Sample) for item in items) == 8
    faults = [item for item in items if isinstance(item, Unreadable)]
    assert [item.id for item in faults] == ["test-2"]
    assert faults[0].reason.startswith("damaged shard: HTTP Error 404")


def test_faults_are_one_clear_line(shards: Path, tmp_path: Path, plain: Plain) -> None:
    marker = tmp_path / "ran"
    word = write_tar(shards / "word.tar", [("a.png", plain()), ("a.txt", b"red fix")])
    number = write_tar(shards / "number.tar", [("a.png", plain()), ("a.cls", b"7")])
    broken = write_tar(shards / "broken.tar", [("a.png", plain()), ("a.json", b"{")])
    empty = write_tar(shards / "empty.tar", [])
    (tmp_path / "folder").mkdir()
    for rest, message in (
        (f"pipe:touch {marker}", "files and http"),
        ("s3://bucket/a.tar", "files and http"),
        (f"{shards / 'none.tar'}", "no shard"),
        (f"{tmp_path / 'folder'}", "holds no tar file"),
        (f"{shards}/test-{{0..1.tar", "braces .* are not balanced"),
        (f"{word}", "'word/a' has the label 'red fix', neither a number nor a class: did you mean 'red fox'"),
        (f"{number}", r"has label 7 \(number/a\) but 2 class names"),
        (f"{broken}", "the label of 'broken/a' is not valid JSON"),
        (f"{empty}", "holds no sample"),
        ("", "names no shard"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            read(f"wds:{rest}")
        assert "\n" not in str(caught.value)
    assert not marker.exists()


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, shards: Path) -> None:
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(UserError, match=r"pip install 'robustvlm\[wds\]'"):
        open_data(f"wds:{shards}")


def test_captions_are_lines_or_json_and_need_no_classes(tmp_path: Path, plain: Plain) -> None:
    members = [
        ("0.png", plain((1, 0, 0))), ("0.txt", b"a cat\n\na small cat\n"),
        ("1.png", plain((2, 0, 0))), ("1.txt", b'["a fox", " "]'),
        ("2.png", plain((3, 0, 0))), ("2.txt", b'{"captions": ["5"]}'),
        ("3.png", plain((4, 0, 0))), ("3.txt", b"5"), ("3.cls", b"0"),
        ("4.png", plain((5, 0, 0))),
    ]  # fmt: skip
    source = open_data(f"wds:{write_tar(tmp_path / 'test.tar', members)}?captions=txt")
    items = [item for item in source.samples() if isinstance(item, Sample)]
    assert [item.captions for item in items] == [("a cat", "a small cat"), ("a fox",), ("5",), ("5",), ()]
    assert {item.label for item in items} == {-1}
    assert source.captioned
    assert source.fingerprint() != open_data(f"wds:{tmp_path / 'test.tar'}?captions=json").fingerprint()


def test_files_of_clip_benchmark_beside_the_shards_are_used(tmp_path: Path, plain: Plain) -> None:
    for split, label in (("train", b"0"), ("test", b"744")):
        (tmp_path / split).mkdir()
        write_tar(tmp_path / split / "0.tar", [("0.webp", plain(kind="WEBP")), ("0.cls", label)])
    names = list(IMAGENET_CLASSNAMES)
    assert (names[657], names[744]) == ("missile", "missile")  # in the published list, as are two sunglasses
    (tmp_path / "classnames.txt").write_text("\n".join(names))
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a bad photo of a {c}.\na {c} seen from afar\n")
    with pytest.raises(UserError, match=r"are splits.*\?split=test"):
        open_data(f"wds:{tmp_path}")
    source = open_data(f"wds:{tmp_path}?split=test")
    assert [item.label for item in source.samples() if isinstance(item, Sample)] == [744]
    assert source.class_names == imagenet_names()
    assert source.templates == ("a bad photo of a {}.", "a {} seen from afar")
    assert source.tree is not None
    assert any("744 'missile' -> 'projectile', 836 'sunglasses' -> 'sunglass'" in remark for remark in source.remarks)
    assert any("2 prompt templates" in remark for remark in source.remarks)
    mine = tmp_path / "mine.txt"
    mine.write_text("\n".join(imagenet_names()))
    assert open_data(f"wds:{tmp_path / 'test'}", classes=mine).class_names == imagenet_names()
    mine.write_text("\n".join(names))
    assert open_data(f"wds:{tmp_path / 'test'}", classes=mine).class_names == imagenet_names()


@pytest.mark.parametrize(("kind", "labels"), [("txt", (b"dog", b"cat")), ("cls", (b"1", b"0"))])
def test_labels_are_those_of_the_names_beside_the_shards_whatever_list_is_given(
    tmp_path: Path, plain: Plain, kind: str, labels: tuple[bytes, bytes]
) -> None:
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    members = [pair for n, label in enumerate(labels) for pair in ((f"{n}.png", plain()), (f"{n}.{kind}", label))]
    write_tar(tmp_path / "a.tar", members)
    mine = tmp_path / "mine.json"
    for names, wanted in (
        (["bird", "cat", "fox", "dog"], ["dog", "cat"]),
        (["dogs", "cats"], ["dogs", "cats"]),
        ({"cat": "kitten"}, ["dog", "kitten"]),
    ):
        mine.write_text(json.dumps(names))
        source = open_data(f"wds:{tmp_path}", classes=mine)
        assert [source.class_names[item.label] for item in source.samples() if isinstance(item, Sample)] == wanted
    write_tar(tmp_path / "a.tar", [("0.png", plain()), ("0.cls", b"2")])
    mine.write_text(json.dumps(["bird", "cat", "fox", "dog"]))
    with pytest.raises(UserError, match="has label 2"):
        list(open_data(f"wds:{tmp_path}", classes=mine).samples())


@pytest.mark.parametrize(
    ("kind", "label", "names"),
    [
        ("cls", b"9" * 5000, "cat\ndog"),
        ("json", b"true", "cat\ndog"),
        ("json", b'{"label": 1.0}', "cat\ndog"),
        ("json", b"[" * 100_000, "cat\ndog"),
        ("cls", b"1", "1\n2\n0"),
        ("json", b'{"label": 1}', "1\n2\n0"),
        ("txt", b"Cat", "cat\nCAT"),
    ],
)
def test_labels_that_mean_nothing_for_certain_are_refused(
    tmp_path: Path, plain: Plain, kind: str, label: bytes, names: str
) -> None:
    (tmp_path / "classnames.txt").write_text(names)
    write_tar(tmp_path / "a.tar", [("0.png", plain()), (f"0.{kind}", label)])
    with pytest.raises(UserError, match="label"):
        read(f"wds:{tmp_path}")


def test_members_that_stand_apart_are_faults(shards: Path, plain: Plain) -> None:
    members = [("0.png", plain()), ("1.png", plain()), ("0.cls", b"0"), ("1.cls", b"1")]
    good, bad = read(f"wds:{write_tar(shards / 'apart.tar', members)}")
    assert not good
    assert "side by side" in bad["apart/0"]


def test_shards_of_several_splits_are_asked_for(tmp_path: Path, plain: Plain) -> None:
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    for name in ("train-000", "val-000"):
        write_tar(tmp_path / f"{name}.tar", [("0.png", plain()), ("0.cls", b"0")])
    with pytest.raises(UserError, match="several splits"):
        open_data(f"wds:{tmp_path}")
    assert list(read(f"wds:{tmp_path}?split=val")[0]) == ["val-000/0"]


def test_the_root_of_a_set_with_one_split_is_enough(tmp_path: Path, plain: Plain) -> None:
    (tmp_path / "test").mkdir()
    write_tar(tmp_path / "test/0.tar", [("0.png", plain()), ("0.cls", b"1")])
    (tmp_path / "test/nshards.txt").write_text("1\n")
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    source = open_data(f"wds:{tmp_path}")
    assert source.class_names == ("cat", "dog")
    assert [item.label for item in source.samples() if isinstance(item, Sample)] == [1]
    assert source.fingerprint() == open_data(f"wds:{tmp_path}?split=test").fingerprint()
    (tmp_path / "test").rename(tmp_path / "train")
    with pytest.raises(UserError, match=r"only shards of .* are of the split 'train': choose it with \?split=train"):
        open_data(f"wds:{tmp_path}")


def test_doubled_names_of_older_lists_are_told_apart(tmp_path: Path, plain: Plain) -> None:
    """Older lists call both cranes "crane" and both maillots "maillot"."""
    names, twice = list(IMAGENET_CLASSNAMES), {134: "crane", 517: "crane", 638: "maillot", 639: "maillot"}
    for label, name in twice.items():
        names[label] = name
    (tmp_path / "classnames.txt").write_text("\n".join(names))
    members = [pair for n in twice for pair in ((f"{n}.png", plain()), (f"{n}.cls", str(n).encode()))]
    write_tar(tmp_path / "0.tar", members)
    source = open_data(f"wds:{tmp_path}")
    assert len(set(source.class_names)) == 1000
    usual = imagenet_names()
    assert all(source.class_names[label] == usual[label] for label in twice)
    assert sorted(item.label for item in source.samples() if isinstance(item, Sample)) == sorted(twice)
    assert any("134 'crane' -> " in remark for remark in source.remarks)


def test_the_content_follows_the_bytes_of_local_shards(shards: Path) -> None:
    before = open_data(f"wds:{shards}")
    known = before.content()
    file = sorted(shards.rglob("*.tar"))[0]
    data = bytearray(file.read_bytes())
    data[600] ^= 1
    file.write_bytes(bytes(data))
    after = open_data(f"wds:{shards}")
    assert after.fingerprint() == before.fingerprint()
    assert None is not known != after.content()


def test_shards_of_several_sets_are_not_read_by_the_names_of_one(tmp_path: Path, plain: Plain) -> None:
    for folder, names in (("a", "cat\ndog\n"), ("b", "dog\ncat\n"), ("c", None), ("d", "cat\ndog\n")):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "0.tar", [("0.png", plain()), ("0.cls", b"1")])
        if names:
            (tmp_path / folder / "classnames.txt").write_text(names)
    mine = tmp_path / "mine.txt"
    mine.write_text("cats\ndogs\n")
    for other, said in (("b", "different classnames.txt beside them: pass --classes"), ("c", "one of them has none: ")):
        mixed = f"wds:{tmp_path}/{{a,{other}}}/0.tar"
        with pytest.raises(UserError, match=said):
            open_data(mixed)
        assert {sample.label for sample in open_unlabelled(mixed).samples() if isinstance(sample, Sample)} == {-1}
        with pytest.raises(UserError, match=said):
            open_unlabelled(mixed, known=["dog"])
    with pytest.raises(UserError, match="by the names of --classes, too, a label is not the same class"):
        open_data(f"wds:{tmp_path}/{{a,b}}/0.tar", classes=mine)
    source = open_data(f"wds:{tmp_path}/{{a,c}}/0.tar", classes=mine)
    assert [source.class_names[sample.label] for sample in source.samples() if isinstance(sample, Sample)] == [
        "dogs"
    ] * 2
    mine.write_text("dogs\ncats\n")
    with pytest.raises(UserError, match="not the same class in both"):
        open_data(f"wds:{tmp_path}/{{a,c}}/0.tar", classes=mine)
    (tmp_path / "e").mkdir()
    write_tar(tmp_path / "e/0.tar", [("0.png", plain()), ("0.cls", b"2")])
    (tmp_path / "e/classnames.txt").write_text("cat\ndog\nfox\n")
    (tmp_path / "f").mkdir()
    write_tar(tmp_path / "f/0.tar", [("0.png", plain()), ("0.cls", b"2")])
    (tmp_path / "f/classnames.txt").write_text("cat\ndog\nowl\n")
    mine.write_text("cat\ndog\nowl\nfox\n")
    with pytest.raises(UserError, match="not the same class in both"):
        open_data(f"wds:{tmp_path}/{{e,a,f}}/0.tar", classes=mine)
    assert open_unlabelled(f"wds:{tmp_path}/{{e,f}}/0.tar").things() == ("cat", "dog", "fox", "owl")
    mine.write_text("fox\ndog\ncat\n")
    source = open_data(f"wds:{tmp_path}/{{a,e}}/0.tar", classes=mine)
    assert [source.class_names[sample.label] for sample in source.samples() if isinstance(sample, Sample)] == [
        "dog",
        "fox",
    ]
    both = f"wds:{tmp_path}/{{a,d}}/0.tar"
    assert open_data(both).class_names == ("cat", "dog")
    for folder, text in (("a", "a {c}."), ("d", "the {c}.")):
        (tmp_path / folder / "zeroshot_classification_templates.txt").write_text(text)
        with pytest.raises(UserError, match=r"different zeroshot_classification_templates.txt .*pass --templates"):
            open_data(both)
    texts = tmp_path / "texts.txt"
    texts.write_text("my {}.")
    assert open_data(both, templates=texts).templates == ("my {}.",)
    assert open_unlabelled(both).ids() is None
    (tmp_path / "d/zeroshot_classification_templates.txt").write_text("a {c}.")
    assert open_data(both).templates == ("a {}.",)


def test_shards_of_one_name_at_two_places_are_two_sets() -> None:
    one, two, again = (
        open_raw(parse_spec(f"wds:https://host/get?key={key}.tar&sig={sig}"))
        for key, sig in (("val/0", "s3cret"), ("train/0", "s3cret"), ("val/0", "other"))
    )
    assert one.content() == again.content() != two.content()


def test_shards_of_one_name_at_two_addresses_are_not_the_training_data(tmp_path: Path) -> None:
    classes = tmp_path / "names.txt"
    classes.write_text("cat\ndog\n")
    one, other = (open_data(f"wds:https://{host}.invalid/{{0..3}}.tar", classes=classes) for host in ("one", "other"))
    assert one.fingerprint() == other.fingerprint()
    require_unseen(other, one, option="--val")
    with pytest.raises(UserError, match="--val names the training data"):
        require_unseen(one, one, option="--val")


def test_local_shards_changed_in_place_are_the_training_data_still(shards: Path) -> None:
    before = open_data(f"wds:{shards}")
    known = before.content()
    tar = shards / "test-0.tar"
    tar.write_bytes(tar.read_bytes()[:-1] + b"\x01")
    after = open_data(f"wds:{shards}")
    assert after.content() != known
    with pytest.raises(UserError, match="--val names the training data"):
        require_unseen(after, before, option="--val")
