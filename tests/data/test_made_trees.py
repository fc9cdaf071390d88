"""Trees by WordNet and by a language model on loopback: every class a leaf once, levels bounded, faults told."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from robustvlm.data.make_trees import above, find_senses, llm_tree, make_forest, open_wordnet, wordnet_tree
from robustvlm.data.trees import load_forest, save_forest
from robustvlm.errors import UserError
from robustvlm.llm import LlmClient, LlmError
from robustvlm.llm.transport import AnswerCache

sys.path.insert(0, str(Path(__file__).parents[1] / "llm"))
from scripted import completion, serving


class Sense:
    """A stand-in for nltk's synsets: words, and the senses above."""

    def __init__(self, words: str, *parents: Sense) -> None:
        self.words, self.parents = words.split("|"), list(parents)

    def name(self) -> str:
        return f"{self.words[0]}.n.01"

    def lemma_names(self) -> list[str]:
        return self.words

    def hypernyms(self) -> list[Sense]:
        return self.parents

    def instance_hypernyms(self) -> list[Sense]:
        return []


class Nouns:
    def __init__(self, *senses: Sense) -> None:
        self.senses = {word: sense for sense in senses for word in sense.words}

    def synsets(self, lemma: str, pos: str) -> list[Sense]:
        assert pos == "n"
        return [self.senses[lemma]] if lemma in self.senses else []

    def synset_from_pos_and_offset(self, pos: str, offset: int) -> Sense:
        raise AssertionError(f"only ImageNet's classes have offsets, not {pos} {offset}")


ENTITY = Sense("entity")
OBJECT = Sense("object", ENTITY)
ANIMAL = Sense("animal|beast", OBJECT)
BIRD, MAMMAL = Sense("bird", ANIMAL), Sense("mammal", ANIMAL)
VEHICLE = Sense("vehicle", OBJECT)
LEAVES = [Sense(word, BIRD) for word in ("owl", "duck")] + [Sense(word, MAMMAL) for word in ("dog|hound", "cat", "cow")]
LEAVES += [Sense(word, VEHICLE) for word in ("truck", "hot_rod", "tram", "bus", "ship")]
NOUNS: Any = Nouns(*LEAVES, BIRD, ANIMAL)


def test_wordnet_levels_are_the_groups_that_tell_something() -> None:
    names = ["owl", "duck", "dog", "cat", "cow", "delivery truck", "hot rod", "tram", "bus", "ship"]
    tree = wordnet_tree(NOUNS, names)
    assert tree.class_names == tuple(names)
    # "object" has all the classes and says nothing; the vehicles need one level, and repeat it.
    assert tree.path("owl") == ("owl", "bird", "animal", "entity")
    assert tree.path("cow") == ("cow", "animal", "animal", "entity")  # mammals are too many for the second cut
    assert tree.path("delivery truck")[1:] == ("vehicle", "vehicle", "entity")


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_wordnet_trees_keep_to_the_levels_allowed(levels: int) -> None:
    names = ["owl", "duck", "dog", "cat", "tram", "bus"]
    tree = wordnet_tree(NOUNS, names, levels=levels)
    assert tree.levels <= levels + 1
    assert tree.root == "entity"
    assert sorted(tree.class_names) == sorted(names)


def test_a_class_with_the_name_of_a_group_stays_a_leaf() -> None:
    names = ("bird", "owl", "duck", "animal", "dog", "bus", "tram", "ship", "truck", "hot rod")
    tree = wordnet_tree(NOUNS, names)
    assert tree.class_names == names
    assert tree.path("owl") == ("owl", "bird (kind)", "beast", "entity")
    # The next word of a sense stands in where the first is a class; the class itself hangs beside the group.
    assert "beast" in tree.path("bird")
    assert "bird (kind)" not in tree.path("bird")


def test_wordnet_says_which_class_it_does_not_have() -> None:
    with pytest.raises(UserError, match=r"WordNet does not have the class 'qwerty' \(1 of 3 not found\)"):
        wordnet_tree(NOUNS, ["owl", "qwerty", "dog"])
    with pytest.raises(UserError, match="at least 1 inner level, got 0"):
        wordnet_tree(NOUNS, ["owl", "dog"], levels=0)


def test_loops_in_wordnet_end() -> None:
    first, second = Sense("first"), Sense("second")
    first.parents, second.parents = [second], [first]
    found: Any = first
    assert [sense.name() for sense in above(found)] == ["second.n.01", "first.n.01"]


def test_real_wordnet_where_it_is_installed() -> None:
    pytest.importorskip("nltk")
    try:
        nouns = open_wordnet()
    except UserError:
        pytest.skip("nltk has no WordNet here")
    found = find_senses(nouns, ["dog", "fire engine", "purple truck"])
    assert [sense.name() for sense in found if sense] == ["dog.n.01", "fire_engine.n.01", "truck.n.01"]


def test_missing_wordnet_is_one_line_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nltk.corpus", None)
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(UserError, match=r"needs the package 'nltk': pip install 'robustvlm\[wordnet\]'"):
        make_forest("wordnet", CLASSES)


def test_missing_corpus_is_one_line_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lazy:
        def ensure_loaded(self) -> None:
            raise LookupError("a long story")

    monkeypatch.setitem(sys.modules, "nltk", ModuleType("nltk"))
    corpus = ModuleType("nltk.corpus")
    corpus.wordnet = Lazy()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nltk.corpus", corpus)
    with pytest.raises(UserError, match=r"run `python -m nltk\.downloader wordnet`"):
        make_forest("wordnet", CLASSES)


CLASSES = ("owl", "dog", "bus", "tram", "bird")
GROUPS = {
    "groups": [{"domain": d, "group": g} for d, g in (("animal", "bird"), ("animal", "Mammal"), ("thing", "bus"))]
}


def members(**groups: str) -> Any:
    return completion({"members": [{"name": name, "group": group} for name, group in groups.items()]})


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], LlmClient]:
    for name in ("ROBUSTVLM_LLM_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return lambda script: LlmClient(script.endpoint, cache=AnswerCache(tmp_path / "cache"), sleep=[].append, attempts=2)


def test_a_language_model_sorts_the_classes_and_names_never_collide(make: Any, tmp_path: Path) -> None:
    sorted_in = members(owl="bird", DOG="mammal", bus="bus", tram="BUS", bird="bird", stranger="bird")
    with serving(completion(GROUPS), sorted_in) as script:
        forest = make_forest("llm", CLASSES, client=make(script), criteria=("animal",))
    tree = forest[0]
    assert tree.class_names == CLASSES
    assert tree.path("owl") == ("owl", "bird (group)", "animal (domain)", "animal")
    assert tree.path("dog") == ("dog", "Mammal", "animal (domain)", "animal")
    assert tree.path("tram") == ("tram", "bus (group)", "thing", "animal")
    # The file is the user's to edit, and is read back as the same tree.
    save_forest(forest, tmp_path / "tree.json")
    assert load_forest(tmp_path / "tree.json", CLASSES) == forest
    asked = script.requests[1]["messages"][-1]["content"]
    assert json.dumps(list(CLASSES)) in asked


def test_several_criteria_make_a_forest(make: Any) -> None:
    sorted_in = members(**dict.fromkeys(CLASSES, "Mammal"))
    with serving(completion(GROUPS), sorted_in) as script:
        script.acts = [completion(GROUPS), sorted_in, completion(GROUPS), sorted_in]
        forest = make_forest("llm", CLASSES, client=make(script), criteria=("kind", "place"))
    assert [tree.root for tree in forest] == ["kind", "place"]


def test_a_class_left_out_is_asked_for_once_more(make: Any) -> None:
    first = members(owl="bird", dog="mammal", bus="no such group", bird="bird")
    with serving(completion(GROUPS), first, members(bus="bus", tram="bus")) as script:
        assert llm_tree(make(script), CLASSES).path("bus")[1] == "bus (group)"
    assert json.dumps(["bus", "tram"]) in script.requests[2]["messages"][-1]["content"]


def test_classes_never_placed_and_answers_without_groups_are_errors(make: Any) -> None:
    with (
        serving(completion(GROUPS), members(owl="bird")) as script,
        pytest.raises(LlmError, match="puts the class 'dog' into no group, asked twice"),
    ):
        llm_tree(make(script), CLASSES)
    with (
        serving(completion({"groups": [{"domain": "", "group": "x"}]})) as script,
        pytest.raises(LlmError, match="names no group"),
    ):
        llm_tree(make(script), CLASSES)
    with serving(completion(GROUPS)) as script, pytest.raises(UserError, match="at least 2 classes, got 1"):
        llm_tree(make(script), ["owl"])


def test_a_tree_by_a_language_model_needs_one() -> None:
    with pytest.raises(UserError, match="needs llm=URL and llm_model=NAME"):
        make_forest("llm", CLASSES)
