import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from robustvlm.core.seeds import generator
from robustvlm.data.emoji import (
    ASSETS,
    SPRITES,
    STYLES,
    TEST_STYLE,
    TRAIN_STYLES,
    VALIDATION_STYLE,
    EmojiSource,
    background,
    compose,
    draw,
    emoji_classes,
    emoji_tree,
    label_set,
    placement_grid,
)
from robustvlm.data.source import Sample, select
from robustvlm.errors import UserError

METADATA = ["split", "domain", "superclass", "name", "label", "hexcode", "style", "license", "tags"]


@pytest.fixture(scope="module")
def rows():
    return pq.read_table(SPRITES, columns=METADATA).to_pylist()


def pixels(sample):
    assert isinstance(sample, Sample)
    return np.asarray(sample.image)


# --- the data set -------------------------------------------------------------------------------------------------


def test_label_sets_have_the_fixed_sizes():
    assert len(emoji_classes()) == 173
    assert len(label_set("default")) == 101
    by_superclass = {}
    for item in label_set("default"):
        by_superclass.setdefault(item.superclass, []).append(item.name)
    assert len(by_superclass) == 26
    assert max(map(len, by_superclass.values())) == 4


def test_default_labels_are_the_alphabetically_first_four_of_each_superclass():
    for superclass in {item.superclass for item in emoji_classes()}:
        members = [item for item in emoji_classes() if item.superclass == superclass]
        assert {item.name for item in members if item.default} == set(sorted(item.name for item in members)[:4])


def test_only_permissive_licences(rows):
    assert {row["license"] for row in rows} == {"MIT", "Apache-2.0", "CC-BY-4.0"}
    assert {row["style"] for row in rows} == set(STYLES)
    assert len({(row["style"], row["license"]) for row in rows}) == len(STYLES)


def test_every_drawing_is_there_once(rows):
    assert len({(row["style"], row["hexcode"]) for row in rows}) == len(rows)


def test_left_out_drawings_are_out(rows):
    fluent = {row["label"] for row in rows if row["style"].startswith("fluent")}
    assert fluent.isdisjoint({"paperclip", "video game"})


def test_near_and_far_names_are_no_classes(rows):
    names = {item.name for item in emoji_classes()}
    assert names.isdisjoint(row["name"] for row in rows if row["split"] != "id")
    known = {item.superclass for item in emoji_classes()}
    assert {row["superclass"] for row in rows if row["split"] == "near"} <= known
    assert known.isdisjoint(row["superclass"] for row in rows if row["split"] == "far")


def test_sprites_are_small_transparent_and_not_empty():
    for data in pq.read_table(SPRITES, columns=["image"]).column("image").to_pylist()[::40]:
        image = Image.open(io.BytesIO(data))
        assert image.size == (64, 64)
        alpha = np.asarray(image.convert("RGBA"))[..., 3]
        assert alpha.max() > 200
        assert (alpha > 128).mean() > 0.02


# --- the tree -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", ["default", "all"])
def test_tree_leaves_are_the_classes_and_agree_with_the_class_table(labels):
    classes = label_set(labels)
    tree = emoji_tree(labels)[0]
    assert tree.class_names == tuple(item.name for item in classes)
    assert tree.levels == 4
    for item in classes:
        assert tree.path(item.name) == (item.name, item.superclass, item.domain, "root")


def test_tree_file_has_every_class_as_a_leaf_once():
    def leaves(node):
        children = node.get("children")
        return [node["name"]] if not children else [leaf for child in children for leaf in leaves(child)]

    tree = json.loads((ASSETS / "trees" / "emoji.json").read_text(encoding="utf-8"))
    assert leaves(tree) == [item.name for item in emoji_classes()]


# --- the source ---------------------------------------------------------------------------------------------------


def test_default_source_is_the_unseen_style_with_enough_images():
    source = EmojiSource()
    ids = source.ids()
    assert len(ids) == len(set(ids)) == 556
    assert all(name.startswith(f"emoji/{TEST_STYLE}/") for name in ids)
    assert len(source.class_names) == 101
    assert source.tree is not None


def test_splits_share_no_drawing_and_the_known_ones_no_style():
    drawings = {}
    for split in ("train", "val", "test", "near", "far"):
        source = EmojiSource(split=split, labels="all", styles=None, copies=1)
        drawings[split] = {name.rsplit("/", 1)[0] for name in source.ids()}
    names = list(drawings)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            assert drawings[first].isdisjoint(drawings[second])
    styles = {split: {name.split("/")[1] for name in drawings[split]} for split in ("train", "val", "test")}
    assert styles == {"train": set(TRAIN_STYLES), "val": {VALIDATION_STYLE}, "test": {TEST_STYLE}}


def test_streaming_yields_the_ids_in_order_and_in_eight_bit_rgb():
    source = EmojiSource(copies=1)
    wanted = source.ids()[5:12]
    samples = list(source.samples(keep=lambda name: name in wanted))
    assert [sample.id for sample in samples] == wanted
    for sample in samples:
        assert sample.image.mode == "RGB"
        assert sample.image.size == (64, 64)


def test_labels_name_the_class_of_the_drawing(rows):
    name_of = {row["hexcode"].lower(): row["name"] for row in rows if row["split"] == "id"}
    for labels in ("default", "all"):
        source = EmojiSource(labels=labels, copies=1)
        kept = set(select(source.ids(), 20))
        for sample in source.samples(keep=kept.__contains__):
            assert source.class_names[sample.label] == name_of[sample.id.split("/")[2]]


def test_a_picture_depends_on_its_id_alone():
    wanted = EmojiSource(copies=1).ids()[7]
    first = next(iter(EmojiSource(copies=1).samples(keep=lambda name: name == wanted)))
    torch.manual_seed(123)
    others = EmojiSource(copies=3, labels="all").samples(keep=lambda name: name.startswith(wanted.rsplit("/", 1)[0]))
    again = {sample.id: pixels(sample) for sample in others}
    assert np.array_equal(again[wanted], pixels(first))
    copy = again[wanted.rsplit("/", 1)[0] + "/1"]
    assert np.abs(copy.astype(int) - pixels(first)).mean() > 5


@pytest.mark.parametrize(("split", "count"), [("near", 104), ("far", 86)])
def test_open_set_splits_have_no_label_and_the_test_style(split, count):
    source = EmojiSource(split=split, copies=1)
    assert len(source.ids()) == count
    assert all("/twemoji/" in name for name in source.ids())
    assert {sample.label for sample in source.samples(limit=5)} == {-1}


def test_fingerprint_tells_content_apart_and_is_stable():
    base = EmojiSource(copies=1).fingerprint()
    assert base == EmojiSource(copies=1).fingerprint()
    others = [EmojiSource(copies=2), EmojiSource(labels="all", copies=1), EmojiSource(split="val", copies=1)]
    assert len({base, *(source.fingerprint() for source in others)}) == 4


def test_options_as_text():
    source = EmojiSource.from_options({"split": "train", "styles": "fxemoji,noto", "copies": "1", "labels": "all"})
    assert source.styles == ("noto", "fxemoji")
    assert len(source.ids()) == 228 + 164


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "tset"}, "unknown split 'tset': did you mean 'test'?"),
        ({"labels": "some"}, "unknown label set 'some'"),
        ({"copies": "0"}, "copies must be at least 1, got 0"),
        ({"copies": "many"}, "copies must be a whole number, got 'many'"),
        ({"styles": "noto"}, "the split 'test' has no style 'noto'"),
        ({"split": "near", "styles": "openmoji"}, "unknown style 'openmoji'"),
        ({"colour": "red"}, "unknown emoji option 'colour'"),
    ],
)
def test_bad_options_are_one_clear_line(options, message):
    with pytest.raises(UserError, match=r".+") as caught:
        EmojiSource.from_options(options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# --- composition --------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 3), size=st.sampled_from([8, 17, 64]), seed=st.integers(0, 2**31))
def test_composed_pixels_stay_in_range(n, size, seed):
    stream = generator("test", seed)
    sprites = torch.rand(n, 4, size, size, generator=stream)
    composed = compose(sprites, stream)
    assert composed.shape == (n, 3, size, size)
    assert torch.isfinite(composed).all()
    assert composed.min() >= 0
    assert composed.max() <= 1


def test_an_invisible_sprite_leaves_the_background():
    sprite = torch.cat([torch.rand(2, 3, 16, 16), torch.zeros(2, 1, 16, 16)], 1)
    other = torch.cat([torch.rand(2, 3, 16, 16), torch.zeros(2, 1, 16, 16)], 1)
    first, second = (compose(which, generator("same")) for which in (sprite, other))
    assert torch.equal(first, second)


def test_identity_placement_reproduces_the_sprite():
    sprite = torch.rand(2, 4, 16, 16, generator=generator("sprite"))
    one, zero = torch.ones(2), torch.zeros(2)
    grid = placement_grid(2, 16, scale=one, angle=zero, shift=torch.zeros(2, 2), shear=zero, aspect=one, flip=one)
    colour, alpha = draw(sprite, grid)
    torch.testing.assert_close(alpha, sprite[:, 3:], atol=1e-5, rtol=0)
    torch.testing.assert_close(colour, sprite[:, :3] * sprite[:, 3:], atol=1e-5, rtol=0)


def test_half_size_covers_a_quarter_and_moves_with_the_shift():
    sprite = torch.ones(1, 4, 32, 32)
    one, zero = torch.ones(1), torch.zeros(1)
    shape = {"scale": one / 2, "angle": zero, "shear": zero, "aspect": one, "flip": one}
    _, alpha = draw(sprite, placement_grid(1, 32, shift=torch.tensor([[0.5, -0.5]]), **shape))
    assert alpha.mean().item() == pytest.approx(0.25, abs=0.02)
    assert alpha[0, 0, :16, 16:].mean() > 0.95  # right and up


def test_backgrounds_are_plain_or_not_in_about_the_stated_share():
    pictures, colour = background(400, 16, generator("share"))
    plain = (pictures.flatten(2).std(-1).amax(1) < 1e-6).float().mean().item()
    assert plain == pytest.approx(0.3 * 0.65, abs=0.07)
    assert colour.unique().numel() == 12
