"""Data specs, class-name and template files, and what comes with known classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from robustvlm.data.classes import CIFAR10, read_class_names
from robustvlm.data.labels import Own, natural_key, settle_names
from robustvlm.data.names import readable
from robustvlm.data.prompts import CIFAR, DEFAULT, IMAGENET, check_templates, fill, read_templates
from robustvlm.data.specs import KINDS, open_data, parse_spec
from robustvlm.errors import UserError


@pytest.mark.parametrize(
    ("text", "rest", "options"),
    [
        ("imagefolder:a/b", "a/b", {}),
        ("imagefolder:C:\\photos", "C:\\photos", {}),
        ("imagefolder:a?links=1", "a", {"links": "1"}),
        ("imagefolder:what?/x", "what?/x", {}),
        ("imagefolder:a?b?links=1", "a?b", {"links": "1"}),
        ("parquet:a?image=my%20image&label=y", "a", {"image": "my image", "label": "y"}),
        ("emoji", "", {}),
        ("emoji?split=val&labels=all", "", {"split": "val", "labels": "all"}),
    ],
)
def test_parsing(text: str, rest: str, options: dict[str, str]) -> None:
    spec = parse_spec(text)
    assert (spec.rest, dict(spec.options)) == (rest, options)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_unknown_options_are_refused_by_every_kind(kind: str) -> None:
    pytest.importorskip("datasets")
    pytest.importorskip("webdataset")
    with pytest.raises(UserError, match="option"):
        open_data(f"{kind}?nonsense=1" if kind == "emoji" else f"{kind}:x?nonsense=1")


def test_a_wrong_kind_gets_a_hint(tmp_path: Path) -> None:
    for text, message in (
        ("imagefoldr:x", "unknown data kind 'imagefoldr': did you mean 'imagefolder'"),
        (str(tmp_path), f"did you mean 'imagefolder:{tmp_path}'"),
        ("a/test.parquet", "did you mean 'parquet:a/test.parquet'"),
        ("a/test.tar", "did you mean 'wds:a/test.tar'"),
        ("", "unknown data kind ''"),
        ("emoji:x", "takes options only"),
        ("emoji?split=val&split=test", "given twice"),
        ("imagefolder:", "names no folder: write imagefolder:FOLDER"),
    ):
        with pytest.raises(UserError, match=message.replace("\\", ".")):
            open_data(text)


def test_emoji_with_names_and_tree_of_ones_own(tmp_path: Path) -> None:
    source = open_data("emoji?copies=1")
    names = tmp_path / "names.json"
    names.write_text(json.dumps({source.class_names[0]: "something else"}))
    renamed = open_data("emoji?copies=1", classes=names)
    assert renamed.class_names == ("something else", *source.class_names[1:])
    assert renamed.tree is not None
    assert source.tree is not None
    assert renamed.tree[0].ancestors("something else") == source.tree[0].ancestors(source.class_names[0])
    assert renamed.fingerprint() != source.fingerprint()


def test_known_classes_bring_templates_and_tree(tmp_path: Path, folder: Path) -> None:
    assert open_data(f"imagefolder:{folder}").templates == DEFAULT
    assert open_data(f"imagefolder:{folder}").tree is None
    for name in CIFAR10:
        (tmp_path / "cifar" / name.capitalize()).mkdir(parents=True)
    (tmp_path / "cifar" / "Cat" / "a.png").write_bytes((folder / "cat" / "0.png").read_bytes())
    source = open_data(f"imagefolder:{tmp_path / 'cifar'}")
    assert source.templates == CIFAR
    assert source.tree is not None
    assert source.tree[0].ancestor("Cat", 1) == "mammal"


def test_files_override(tmp_path: Path, folder: Path) -> None:
    classes, templates, tree = tmp_path / "c.txt", tmp_path / "t.txt", tmp_path / "t.csv"
    classes.write_text("tabby\nhound\nvan\n")
    templates.write_text("# two\nart of a {}\n\n{}, seen from afar\nart of a {}\n")
    tree.write_text("parent,child\nroot,pet\npet,tabby\npet,hound\nroot,van\n")
    source = open_data(f"imagefolder:{folder}", classes=classes, templates=templates, tree=tree)
    assert source.class_names == ("tabby", "hound", "van")
    assert source.templates == ("art of a {}", "{}, seen from afar")
    assert source.tree is not None
    assert source.tree[0].groups(1) == {"pet": ("tabby", "hound"), "root": ("van",)}


def test_class_name_files(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    for text, message in (
        ("", "holds no class name"),
        ("# only a comment\n", "holds no class name"),
        ("cat\ndog\ncat\n", "names 'cat' 2 times"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_class_names(path)
    path.write_bytes(b"\xef\xbb\xbfcat\r\ndog\r\n")
    assert read_class_names(path) == ("cat", "dog")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        read_class_names(path)
    path = tmp_path / "names.json"
    for text, message in (
        ("[1, 2]", "list of strings"),
        ("[", "not valid JSON"),
        ('["a", ""]', "empty class name"),
        ("3", "list of"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_class_names(path)
    with pytest.raises(UserError, match="no class names file"):
        read_class_names(tmp_path / "none.txt")
    with pytest.raises(UserError, match="cannot read the class names file"):
        read_class_names(tmp_path)


def test_settling_names() -> None:
    found = ["cat", "dog", "fox"]
    assert settle_names(found, None, "x") == found
    assert settle_names(found, ["Fox", "Cat", "Dog"], "x") == ["Cat", "Dog", "Fox"]
    assert settle_names(found, ["tabby", "dog", "fox"], "x") == ["tabby", "dog", "fox"]
    assert settle_names(None, ["a", "b"], "x") == ["a", "b"]
    assert settle_names(found, {"fox": "red fox"}, "x") == ["cat", "dog", "red fox"]
    for given, message in (
        (["a", "b"], "has 3 classes, the class names file 2"),
        (["dog", "tabby", "fox"], "class name 1 of the file is 'dog', but x has 'cat' there and 'dog' at 2"),
        ({"wolf": "grey wolf"}, "has no class 'wolf'"),
        ({"cat": "dog"}, "names 'dog' 2 times"),
    ):
        with pytest.raises(UserError, match=message):
            settle_names(found, given, "x")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="holds no class names to rename"):
        settle_names(None, {"a": "b"}, "x")


def test_readable_names_stay_distinct() -> None:
    assert readable(["a_b", "c"]) == ("a b", "c")
    assert readable(["a_b", "a b"]) == ("a_b", "a b")


def test_templates(tmp_path: Path) -> None:
    for templates in (DEFAULT, CIFAR, IMAGENET):
        assert check_templates(templates, "built in") == templates
    assert fill("a {}", "{odd} name") == "a {odd} name"
    path = tmp_path / "t.txt"
    for text, message in (
        ("a photo\n", "lacks {}, the place of the class name"),
        ("a {} or {}\n", "once and no other brace"),
        ("a {name}\n", "lacks {}"),
        ("a {} {0}\n", "once and no other brace"),
        ("\n", "holds no template"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_templates(path)
    (tmp_path / "t.json").write_text('["x {}"]')
    assert read_templates(tmp_path / "t.json") == ("x {}",)
    (tmp_path / "t.json").write_text('{"x {}": "y {}"}')
    with pytest.raises(UserError, match="must hold a list"):
        read_templates(tmp_path / "t.json")
