"""Data specs, class-name and template files, and what comes with known classes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustvlm.data.classes import (
    CIFAR,
    CIFAR10,
    DEFAULT,
    IMAGENET,
    check_templates,
    fill,
    imagenet_names,
    made_distinct,
    read_class_names,
    read_templates,
)
from robustvlm.data.labels import Own, label_of, natural_key, settle_names
from robustvlm.data.names import readable
from robustvlm.data.specs import KINDS, open_data, parse_spec
from robustvlm.data.trees import load_forest
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
        (tmp_path / "cifar" / name.capitalize() / "a.png").write_bytes((folder / "cat" / "0.png").read_bytes())
    source = open_data(f"imagefolder:{tmp_path / 'cifar'}")
    assert source.templates == CIFAR
    assert source.tree is not None
    assert source.tree[0].ancestor("Cat", 1) == "mammal"


def test_files_override(tmp_path: Path, folder: Path) -> None:
    classes, templates, tree = tmp_path / "c.json", tmp_path / "t.txt", tmp_path / "t.csv"
    classes.write_text('{"dog": "hound", "cat": "tabby", "pickup_truck": "van"}')
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
    assert read_class_names(path) == (("cat", "dog"), None)
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


def settled(found: list[str] | None, given: object, *, marks: list[str] | None = None) -> list[str]:
    """Return the name of each of the source's own classes."""
    own = Own(tuple(marks or found or ()), None if found is None else tuple(found))
    made = settle_names(own, given, "x")  # type: ignore[arg-type]
    return list(made.names) if made.labels is None else [made.names[label] for label in made.labels]


def test_settling_names() -> None:
    found = ["cat", "dog", "fox"]
    assert settled(found, None) == found
    assert settled(found, ["Fox", "Cat", "Dog"]) == ["Cat", "Dog", "Fox"]
    assert settled(found, ["a fox", "dogs", "cats, felines"]) == ["cats, felines", "dogs", "a fox"]
    assert settled(None, ["a", "b"]) == ["a", "b"]
    assert settled(None, {"1": "dog", "0": "cat"}) == ["cat", "dog"]
    assert settled(found, {"fox": "red fox"}) == ["cat", "dog", "red fox"]
    assert settled(["tench", "goldfish"], {"n01443537": "koi"}, marks=["n01440764", "n01443537"]) == ["tench", "koi"]
    assert settled(["wolves", "mice"], ["mouse", "wolf"]) == ["wolf", "mouse"]
    assert settled(["T-shirt", "air plane"], ["airplane", "tshirt"]) == ["tshirt", "airplane"]
    assert settled(["buses", "glasses"], ["glasses", "bus"]) == ["bus", "glasses"]
    with pytest.raises(UserError, match="does not say for certain"):  # signs that are no letters tell words apart
        settled(["\u0915\u0940", "x"], ["y", "\u0915\u093e"])
    for names, message in (
        (["a", "b"], "has 3 classes, the class names file 2, .*'cat' -> ., 'dog' -> ., 'fox' -> .; no class: 'a', 'b'"),
        (
            ["tabby", "dog", "fox"],
            "does not say for certain .*'cat' -> ., 'dog' -> 'dog', 'fox' -> 'fox'; no class: 'tabby'",
        ),
        (["dog", "tabby", "fox"], "'cat' -> ., .*, and 'dog' stands at another place"),
        (["Katze", "Hund", "fox"], "does not say for certain .*'cat' -> ., 'dog' -> ., 'fox' -> 'fox'"),
        ({"wolf": "grey wolf"}, "has no class 'wolf'"),
        ({"cat": "dog"}, "names 'dog' 2 times"),
    ):
        with pytest.raises(UserError, match=message):
            settled(found, names)
    with pytest.raises(UserError, match='keys "0" to "0"'):
        settled(None, {"a": "b"})
    with pytest.raises(UserError, match="does not say for certain"):
        settled(["ka", "kb"], ["tench", "goldfish"])


@pytest.mark.parametrize(
    ("found", "given"),
    [
        (["1 dollar note", "5 dollar note"], ["10 dollar note", "5 dollar note"]),
        (["0_cat", "1_dog"], ["1_cat", "0_dog"]),
        (["c", "c++"], ["c#", "c"]),
        (["10", "-5"], ["-10", "5"]),
        (["1.5", "3"], ["15", "3"]),
        (["1-5", "6-10"], ["6-10", "15"]),
        (["vitamin a", "vitamin b"], ["vitamin", "vitamin b"]),
        (["temp 6", "temp -5"], ["temp 5", "temp -6"]),
    ],
)
def test_names_that_differ_in_numbers_or_signs_are_no_match(found: list[str], given: list[str]) -> None:
    with pytest.raises(UserError, match="does not say for certain"):
        settled(found, given)


@pytest.mark.parametrize(
    "names", [["Polish", "polish", "cat"], ["-10", "10", "5"], ["c", "c++", "c#"], ["a", "the", "an"]]
)
def test_the_same_spelling_is_certain_whatever_else_is_alike(names: list[str]) -> None:
    assert settled(names, names[::-1]) == names


def test_the_unknown_class_is_none_of_the_numbers() -> None:
    assert label_of("-1", ["0", "1", "2"], "x") == -1
    assert label_of("1", ["0", "1", "2"], "x") == 1


@pytest.mark.parametrize("form", ["{}", "{:03d}", "class_{}", "Class-{}"])
def test_a_number_means_the_class_of_that_number(form: str) -> None:
    names = [f"name{i}" for i in range(12)]
    assert settled([form.format(i) for i in (0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9)], names) == [
        names[i] for i in (0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9)
    ]
    assert settled([form.format(i) for i in range(1, 13)], names) == names
    assert settled([form.format(i) for i in (0, 7, 11)], names) == ["name0", "name7", "name11"]
    assert settled([form.format(i) for i in (1, 7, 12)], names) == ["name0", "name6", "name11"]
    for unclear in ([1, 2, 11], [0, 12], [3]):
        with pytest.raises(UserError, match="not every class has its name there"):
            settled([form.format(i) for i in unclear], names)


@given(st.permutations(CIFAR10), st.sampled_from(["{}", "{}s", "a {}", "the {}", "{}, see there"]))
def test_no_order_of_the_list_moves_a_name(order: list[str], form: str) -> None:
    names = settled(list(CIFAR10), [form.format(name) for name in order])
    assert names == [form.format(name) for name in CIFAR10]


def test_natural_order() -> None:
    names = ["class_10", "class_2", "10", "2", "01", "a", "B", "2b10", "2b9", "9" * 5000]
    assert sorted(names, key=natural_key) == [
        "01",
        "2",
        "2b9",
        "2b10",
        "10",
        "9" * 5000,
        "B",
        "a",
        "class_2",
        "class_10",
    ]


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


def test_class_name_files_that_are_not_text_for_a_reader(tmp_path: Path) -> None:
    path = tmp_path / "names.json"
    for text, message in (
        ('["\\ud800", "b"]', "U.D800"),
        ('["a\\u001b[2J", "b"]', "U.001B"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a": "x", "a": "y"}', "the key 'a' twice"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message) as caught:
            read_class_names(path)
        assert "\x1b" not in str(caught.value)
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match="is no regular file"):
        read_class_names(tmp_path / "pipe.txt")
    long = tmp_path / "tree.csv"
    long.write_text("parent,child\nroot," + "x" * 140_000)
    with pytest.raises(UserError, match="not valid CSV: field larger"):
        load_forest(long, ["x"])


def test_codes_for_names_are_told(folder: Path, tmp_path: Path) -> None:
    assert open_data(f"imagefolder:{folder}").remarks == []
    (folder / "cat").rename(folder / "001.cat")
    assert "begin with numbers or codes, as '001.cat'" in open_data(f"imagefolder:{folder}").remarks[0]
    names = tmp_path / "names.txt"
    names.write_text("dog\ncat\npickup truck\n")
    assert open_data(f"imagefolder:{folder}", classes=names).class_names == ("cat", "dog", "pickup truck")


def test_imagenet_lists_lose_their_doubled_names() -> None:
    names = list(imagenet_names())
    assert made_distinct(names) == (tuple(names), None)
    doubled = list(names)
    doubled[744], doubled[836] = doubled[657], doubled[837]
    mended, said = made_distinct(doubled)
    assert list(mended) == names
    assert said is not None
    assert "744 'missile' -> 'projectile'" in said
    reworded = [f"wording {i}" if i % 3 == 0 else name for i, name in enumerate(names)]
    own = Own(tuple(names), tuple(names))
    made = settle_names(own, reworded, "x")
    assert list(made.names) == reworded
    assert made.notes[0].startswith("334 names of the list are taken by their place: 0 'tench' -> 'wording 0', 3 ")
    reworded[1], reworded[2] = reworded[2], reworded[1]
    with pytest.raises(UserError, match="'goldfish' stands at another place"):
        settle_names(own, reworded, "x")
    other = [f"class {i}" for i in range(999)] + ["class 0"]
    assert made_distinct(other) == (tuple(other), None)
