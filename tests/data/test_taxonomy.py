"""Trees and forests: structure by random trees, every fault of a file by one example."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustvlm.data.trees import Forest, build_tree, load_forest, load_tree, save_forest
from robustvlm.errors import UserError

Links = list[tuple[str, str]]


@st.composite
def random_trees(draw: st.DrawFn) -> tuple[Links, list[str]]:
    """A random tree by parent links, and its leaves in random order."""
    count = draw(st.integers(2, 25))
    parents = [draw(st.integers(0, i - 1)) for i in range(1, count)]
    links = [(f"n{parent}", f"n{child}") for child, parent in enumerate(parents, start=1)]
    leaves = [f"n{i}" for i in range(1, count) if i not in parents]
    return draw(st.permutations(links)), draw(st.permutations(leaves))


@given(random_trees())
def test_levels_are_nested_partitions(case: tuple[Links, list[str]]) -> None:
    links, names = case
    tree = build_tree(links, names)
    assert tree.class_names == tuple(names)
    assert tree.level_names(0) == tuple(names)
    assert tree.level_names(tree.levels - 1) == (tree.root,) == ("n0",)
    for level in range(tree.levels):
        groups = tree.groups(level)
        assert sorted(name for group in groups.values() for name in group) == sorted(names)
    for fine, coarse in pairwise(range(tree.levels)):
        for group in tree.groups(fine).values():
            assert len({tree.ancestor(name, coarse) for name in group}) == 1


@given(random_trees())
def test_ancestors_are_the_links(case: tuple[Links, list[str]]) -> None:
    links, names = case
    parent = {child: above for above, child in links}
    tree = build_tree(links, names)
    for name in names:
        chain = [name]
        while chain[-1] in parent:
            chain.append(parent[chain[-1]])
        assert tree.ancestors(name) == tuple(chain[1:])
        assert tree.ancestor(name, 0) == name
        if tree.levels > 1:
            assert name not in tree.path(name)[1:]


@given(random_trees(), st.data())
def test_questions_about_pairs_agree(case: tuple[Links, list[str]], data: st.DataObject) -> None:
    tree = build_tree(*case)
    first, second = data.draw(st.sampled_from(case[1])), data.draw(st.sampled_from(case[1]))
    level = tree.common_level(first, second)
    assert level == tree.common_level(second, first)
    for n in range(tree.levels):
        assert (tree.ancestor(first, n) == tree.ancestor(second, n)) == (n >= level)
        if first != second:
            assert (second in tree.siblings(first, n)) == (n >= level)
        labels = tree.superclass_labels(n)
        assert [tree.level_names(n)[i] for i in labels] == list(tree.superclasses(n))


@settings(deadline=None)
@given(random_trees())
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, case: tuple[Links, list[str]]) -> None:
    tree = build_tree(*case)
    folder = tmp_path_factory.mktemp("trees")
    save_forest(Forest((tree,)), folder / "tree.json")
    assert load_tree(folder / "tree.json", case[1]) == tree
    (folder / "tree.yaml").write_text((folder / "tree.json").read_text())
    assert load_tree(folder / "tree.yaml", case[1]) == tree
    (folder / "tree.csv").write_text("".join(f"{above},{child}\n" for above, child in case[0]))
    assert load_tree(folder / "tree.csv", case[1]) == tree


@given(random_trees(), st.data())
def test_restriction_keeps_the_ancestors(case: tuple[Links, list[str]], data: st.DataObject) -> None:
    some = data.draw(st.lists(st.sampled_from(case[1]), min_size=1, unique=True))
    tree = build_tree(*case)
    small = tree.restrict(some)
    assert small.class_names == tuple(some)
    assert all(small.ancestors(name) == tree.ancestors(name) for name in some)
    assert build_tree(case[0], some, subset=True) == small


PETS = {"name": "root", "children": [{"name": "pet", "children": [{"name": "cat"}, {"name": "dog"}]}, {"name": "car"}]}
NAMES = ["cat", "dog", "car"]


def nested(tmp_path: Path, value: object, suffix: str = ".json") -> Path:
    path = tmp_path / f"tree{suffix}"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_an_uneven_leaf_repeats_its_parent(tmp_path: Path) -> None:
    tree = load_tree(nested(tmp_path, PETS), NAMES)
    assert tree.path("car") == ("car", "root", "root")
    assert tree.groups(1) == {"pet": ("cat", "dog"), "root": ("car",)}
    assert tree.superclass_level == 2
    assert tree.common_level("cat", "dog") == 1


def test_names_match_without_case_and_separators(tmp_path: Path) -> None:
    assert load_tree(nested(tmp_path, PETS), ["Cat", "DOG", "car"]).class_names == ("Cat", "DOG", "car")


def test_yaml_with_plain_leaves(tmp_path: Path) -> None:
    text = "name: root\nchildren:\n- name: pet\n  children: [cat, dog]\n- car\n"
    assert load_tree(nested(tmp_path, text, ".yml"), NAMES) == load_tree(nested(tmp_path, PETS), NAMES)


def test_forests(tmp_path: Path) -> None:
    place = {
        "name": "place",
        "children": [{"name": "home", "children": ["cat", "dog"]}, {"name": "street", "children": ["car"]}],
    }
    forest = load_forest(nested(tmp_path, [PETS, place]), NAMES)
    assert [tree.root for tree in forest] == ["root", "place"]
    assert forest["place"].ancestor("car", 1) == "street"
    assert forest.restrict(["dog"]).class_names == ("dog",)
    save_forest(forest, tmp_path / "again.json")
    assert load_forest(tmp_path / "again.json", NAMES) == forest
    rows = "tree,child,parent\nkind,cat,animal\nkind,dog,animal\nkind,car,thing\nkind,animal,thing\n"
    rows += "place,cat,home\nplace,dog,home\nplace,car,home\n"
    both = load_forest(nested(tmp_path, rows, ".csv"), NAMES)
    assert [tree.levels for tree in both] == [3, 2]
    with pytest.raises(UserError, match="2 trees where one is expected"):
        load_tree(tmp_path / "tree.csv", NAMES)
    with pytest.raises(UserError, match="no tree 'plase' in the forest: did you mean 'place'"):
        forest["plase"]
    with pytest.raises(UserError, match="different roots"):
        load_forest(nested(tmp_path, [PETS, PETS]), NAMES)


@pytest.mark.parametrize(
    ("text", "suffix", "message"),
    [
        ("a,b\nb,c\nc,a\n", ".csv", "cycle: b -> c -> a -> b"),
        ("r,cat\nr,dog\nr,car\nx,y\ny,x\n", ".csv", "cycle: y -> x -> y"),
        ("pet,cat\nfelid,cat\n", ".csv", "'cat' has two parents, 'pet' and 'felid'"),
        ("pet,cat\npet,dog\nthing,car\n", ".csv", r"2 roots \('pet', 'thing'\): put one node above"),
        ("r,cat\nr,dog\nr,caar\n", ".csv", "the leaf 'caar' is no class: did you mean 'car'"),
        ("r,cat\nr,dog\n", ".csv", r"the class 'car' is missing from the tree \(1 of 3"),
        ("r,cat\nr,dog\nr,car\ncar,cat2\n", ".csv", "'cat2' is no class"),
        ("r,cat\nr,dog\nr,car\nr,Cat\n", ".csv", "'cat' and 'Cat' both stand for the class 'cat'"),
        ("", ".csv", "holds no tree"),
        ("r,cat,t,u\n", ".csv", "row 1 must be parent,child"),
        ("r\n", ".csv", "row 1 must be parent,child"),
        ("{}", ".json", "a node must be"),
        ("[]", ".json", "holds no tree"),
        ('{"name": "r"}', ".json", "the tree is empty"),
        ('{"name": "r", "children": "cat"}', ".json", "the children of 'r' must be a list, got 'cat'"),
        ('{"name": "r", "children": [3]}', ".json", "a node must be .* got 3"),
        (
            '{"name": "r", "children": ["cat", "dog", "car", "cat"]}',
            ".json",
            "'cat' is there twice, under 'r' and under",
        ),
        ('{"name": "r", "children": [', ".json", "not valid JSON"),
        ("[" * 100_000, ".json", "not valid JSON"),
        ("name: r\nchildren: &a [{name: s, children: *a}]", ".yaml", "'s' is there twice"),
        ("name: [", ".yaml", "not valid YAML"),
        ("!!python/object/apply:os.system ['true']", ".yaml", "not valid YAML"),
        ("x", ".txt", "a tree file ends in"),
    ],
)
def test_faults_are_one_clear_line(tmp_path: Path, text: str, suffix: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_forest(nested(tmp_path, text, suffix), NAMES)
    assert "\n" not in str(caught.value)


def test_faults_of_names_and_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the class 'pet' has children, classes must be leaves"):
        load_tree(nested(tmp_path, PETS), [*NAMES, "pet"])
    with pytest.raises(UserError, match="the class name 'cat' is there twice"):
        load_tree(nested(tmp_path, PETS), [*NAMES, "cat"])
    with pytest.raises(UserError, match="no tree file at"):
        load_tree(tmp_path / "none.json", NAMES)
    (tmp_path / "latin.csv").write_bytes(b"r,\xe9\n")
    with pytest.raises(UserError, match="not UTF-8"):
        load_tree(tmp_path / "latin.csv", NAMES)
    tree = load_tree(nested(tmp_path, PETS), NAMES)
    with pytest.raises(UserError, match="'cta' is no class of the tree 'root': did you mean 'cat'"):
        tree.path("cta")
    with pytest.raises(UserError, match=r"levels 0 \(classes\) to 2 \(root\), got 3"):
        tree.ancestor("cat", 3)
