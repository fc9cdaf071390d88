"""What `--goal` says, and what is wrong with goals that do not fit the model or the data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from robustvlm.attacks import Superclass, Targeted
from robustvlm.attacks.goals import FeatureTo, SuperclassAll
from robustvlm.commands.attack.goal import Aim, Features, check_goal, make_aim
from robustvlm.core.framing import to_pixels
from robustvlm.data import DataSource, open_data
from robustvlm.defenses import SmoothedVLM, load_classifier
from robustvlm.defenses.classifier import Classifier
from robustvlm.errors import UserError

Make = Callable[..., Aim]
TREE = """parent,child,tree
kind,animal,kind
kind,vehicle,kind
animal,cat,kind
animal,dog,kind
vehicle,car,kind
vehicle,bus,kind
place,home,place
place,street,place
home,cat,place
home,dog,place
street,car,place
street,bus,place
"""


@pytest.fixture(scope="module")
def emoji() -> DataSource:
    return open_data("emoji")


@pytest.fixture(scope="module")
def tiny(emoji: DataSource) -> Classifier:
    return load_classifier("tiny", emoji.class_names, emoji.templates, cache=False)


@pytest.fixture(scope="module")
def make(emoji: DataSource, tiny: Classifier) -> Make:
    return lambda text, **more: make_aim(text, source=emoji, classifier=tiny, resolution=64, **more)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("misclassifi", "did you mean 'misclassify'"),
        ("", "unknown goal ''"),
        ("superclass", "superclass:LEVEL or superclass:all or superclass:matrix"),
        ("superclass: ", "says not which one"),
        ("targeted", "pass targeted:CLASS"),
        ("deny:all", "unknown goal 'deny:all': pass deny"),
        ("feature:", "pass feature or feature:FILE.png or feature:TEXT"),
    ],
)
def test_goals_that_no_model_could_have(text: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        check_goal(text)
    assert said in str(error.value)


@pytest.mark.parametrize("value", [1.0, -1.0, float("nan"), 7.0])
def test_the_threshold_is_a_cosine(value: float) -> None:
    with pytest.raises(UserError, match="min_cos must lie between -1 and 1"):
        check_goal("feature", value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("targeted:dolpin", "did you mean 'dolphin'"),
        ("targeted:101", "none of the 101 classes"),
        ("superclass:3", "levels 0 (classes) to 2 below its root, got 3"),
        ("superclass:-1", "got -1"),
        ("superclass:anmal", "did you mean 'animal'"),
        ("superclass:nowhere/1", "no tree 'nowhere' in the forest"),
        ("deny", "never does: pass for example 'tiny+reject:0.5'"),
        ("intrude", "needs a model that may refuse"),
        ("feature:gone.png", "no picture at 'gone.png'"),
    ],
)
def test_goals_that_do_not_fit(make: Make, text: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        make(text)
    assert said in str(error.value)


def test_a_class_is_named_in_any_spelling_or_by_its_number(make: Make, emoji: DataSource) -> None:
    number = emoji.class_names.index("baby chick")
    for text in ("targeted:baby chick", "targeted:Baby_Chick", f"targeted:{number}"):
        (goal,) = make(text).goals
        assert isinstance(goal, Targeted)
        assert goal.target == number
    aim = make("targeted:baby chick")
    assert not aim.wants(number)
    assert aim.wants(number - 1)
    assert not aim.wants(-1)


def test_levels_are_numbers_or_superclasses_that_stand_in_them(make: Make, emoji: DataSource) -> None:
    assert emoji.tree is not None
    tree = emoji.tree[0]
    (by_number,), (by_name,) = make("superclass:1").goals, make("superclass:insect").goals
    assert isinstance(by_number, Superclass)
    assert isinstance(by_name, Superclass)
    assert by_number.spec == by_name.spec == "superclass:1"
    names = tree.level_names(1)
    assert [names[i] for i in by_number.groups.tolist()] == [tree.ancestor(name, 1) for name in emoji.class_names]
    (universal,) = make("superclass:all").goals
    assert isinstance(universal, SuperclassAll)
    assert [level.n_groups for level in universal.levels] == [101, 26, 6]
    matrix = make("superclass:matrix")
    assert (matrix.leave, matrix.everyone) == (False, True)
    assert [goal.spec for goal in matrix.goals] == ["superclass:0", "superclass:1", "superclass:2", "superclass:all"]


def test_a_tree_of_several_is_named_before_the_level(tmp_path: Path) -> None:
    for name in ("cat", "dog", "car", "bus"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / name / "0.png")
    (tmp_path / "tree.csv").write_text(TREE)
    source = open_data(f"imagefolder:{tmp_path / 'photos'}", tree=tmp_path / "tree.csv")
    model = load_classifier("tiny", source.class_names, source.templates, cache=False)
    (goal,) = make_aim("superclass:place/1", source=source, classifier=model, resolution=64).goals
    assert isinstance(goal, Superclass)
    assert goal.spec == "superclass:place/1"
    assert len(set(goal.groups.tolist())) == 2
    bare = open_data(f"imagefolder:{tmp_path / 'photos'}")
    with pytest.raises(UserError, match="has no class tree"):
        make_aim("superclass:1", source=bare, classifier=model, resolution=64)


def test_feature_goals_attack_the_encoder(make: Make, tiny: Classifier, tmp_path: Path) -> None:
    aim = make("feature", min_cos=0.3)
    assert isinstance(aim.model, Features)
    assert not aim.leave
    pixels = torch.rand(2, 3, 64, 64)
    features = aim.model(pixels)
    assert torch.equal(aim.goals[0].prediction(features), tiny(pixels).argmax(1))
    Image.new("RGB", (100, 80), (200, 30, 40)).save(tmp_path / "red.png")
    (to_image,), (to_text,) = make(f"feature:{tmp_path / 'red.png'}").goals, make("feature:a photo of a dog").goals
    assert isinstance(to_image, FeatureTo)
    assert isinstance(to_text, FeatureTo)
    assert to_image.rivals is None
    assert tiny.vlm is not None
    assert torch.equal(to_text.target, tiny.vlm.encode_text(["a photo of a dog"])[0])
    (tmp_path / "torn.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="cannot read the picture"):
        make(f"feature:{tmp_path / 'torn.png'}")


def test_a_random_model_aims_at_one_target_that_follows_from_the_seed(emoji: DataSource, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), (200, 30, 40)).save(tmp_path / "red.png")
    model = load_classifier("tiny+smooth:0.25:2", emoji.class_names, emoji.templates, cache=False)

    def target(seed: int) -> Tensor:
        text = f"feature:{tmp_path / 'red.png'}"
        (goal,) = make_aim(text, source=emoji, classifier=model, resolution=64, seed=seed).goals
        assert isinstance(goal, FeatureTo)
        return goal.target

    torch.manual_seed(1)
    first, drawn = target(5), torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), drawn), "the caller's random state is left alone"
    assert torch.equal(target(5), first)
    assert not torch.equal(target(6), first)
    smoothed = model.vlm
    assert isinstance(smoothed, SmoothedVLM)
    image = to_pixels(Image.open(tmp_path / "red.png"), model.framing)[None]
    mean = F.normalize(smoothed.noisy_features(image, 400)[0].mean(0), dim=0)
    one = smoothed.encode_image(image)[0]
    assert first.norm() == pytest.approx(1.0, abs=1e-5)
    assert first @ mean > max(0.98, one @ mean), "it is that of the mean over many draws"


def test_refusing_models_have_goals_of_their_own(emoji: DataSource) -> None:
    model = load_classifier("tiny+reject:0.5", emoji.class_names, emoji.templates, cache=False)
    aims = {
        text: make_aim(text, source=emoji, classifier=model, resolution=64)
        for text in ("misclassify", "deny", "intrude")
    }
    assert [type(aim.goals[0]).__name__ for aim in aims.values()] == ["AcceptedMistake", "Deny", "Intrude"]
    assert [aim.wants(-1) for aim in aims.values()] == [False, False, True]
    assert [aim.wants(0) for aim in aims.values()] == [True, True, False]
    with pytest.raises(UserError, match="for models that never refuse"):
        make_aim("superclass:1", source=emoji, classifier=model, resolution=64)
