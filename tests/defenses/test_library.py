"""Classifiers of timm and torchvision: the library's own pixels and logits, the data's classes, one line otherwise."""

from __future__ import annotations

import html
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import robustvlm as rv
from robustvlm.certify import resize_norm, source_norm
from robustvlm.cli.main import main
from robustvlm.core.framing import Framing, to_pixels
from robustvlm.data.classes import imagenet_names, made_distinct, wordnet_names
from robustvlm.defenses.library import _LIBRARIES, _outputs, places_of
from robustvlm.defenses.load import own_classes
from robustvlm.defenses.pipeline import load_classifier, load_pipeline
from robustvlm.defenses.purify.parts import Mapper, MapperShape, Parts, write_parts
from robustvlm.defenses.purify.unet import Purifier, PurifierShape
from robustvlm.errors import UserError
from robustvlm.models import weights as hub
from robustvlm.models.saved import Card, write_card

NAMES = ("dog", "cat", "ice cream")
TEMPLATES = ("{}",)


def picture(width: int = 213, height: int = 171) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


def saved(
    folder: Path, net: Any, *, classes: tuple[str, ...] | None = NAMES, name: str = "w.pt", **wrapped: Any
) -> Path:
    torch.save(wrapped or net.state_dict(), folder / name)
    if classes:
        (folder / "classes.txt").write_text("\n".join(classes))
    return folder / name


def timm_net(classes: int = 3, name: str = "test_resnet") -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=classes).eval()


def refused(spec: str, names: tuple[str, ...] = NAMES) -> str:
    with pytest.raises(UserError) as caught:
        load_classifier(spec, names, TEMPLATES)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet.r160_in1k"])
def test_logits_are_timms_on_its_own_pixels(tmp_path: Path, name: str) -> None:
    net = timm_net(name=name)
    found = load_classifier(f"timm:{name}/{saved(tmp_path, net)}", NAMES, TEMPLATES)
    config = resolve_model_data_config(net)
    wanted = net(create_transform(**config, is_training=False)(picture())[None])
    assert torch.allclose(found(to_pixels(picture(), found.framing)[None]), wanted, atol=1e-4)


def test_logits_are_torchvisions_on_its_own_pixels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = torchvision.models.shufflenet_v2_x0_5(num_classes=3).eval()
    found = load_classifier(f"torchvision:shufflenet_v2_x0_5/{saved(tmp_path, net)}", NAMES, TEMPLATES)
    assert found.framing == Framing(224, "bilinear", short_side=256)
    weights = torchvision.models.get_model_weights("shufflenet_v2_x0_5").DEFAULT
    wanted = net(weights.transforms()(picture())[None])
    assert torch.allclose(found(to_pixels(picture(), found.framing)[None]), wanted, atol=1e-4)


def test_the_tag_of_a_name_says_how_images_are_brought(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert {tag.partition("_")[0] for tag in _LIBRARIES["timm"].tags("resnet18")} >= {"a1", "tv"}
    recipe = _LIBRARIES["torchvision"].recipe
    net = torch.nn.Identity()
    sides = {tag: recipe(net, f"resnet50.{tag}").framing.scaled for tag in ("IMAGENET1K_V1", "IMAGENET1K_V2")}
    assert sides == {"IMAGENET1K_V1": 256, "IMAGENET1K_V2": 232}
    file = saved(tmp_path, torchvision.models.mnasnet0_5(num_classes=3))
    with caplog.at_level(logging.WARNING, "robustvlm"):
        load_classifier(f"torchvision:mnasnet0_5/{file}", NAMES, TEMPLATES)
    assert not caplog.messages  # published once, so that there is no doubt


@pytest.mark.parametrize("side", [64, 100, 223])
@pytest.mark.parametrize("size", [(30, 47), (301, 200), (40, 5000)])
def test_cropping_after_a_larger_resize_is_torchvisions(side: int, size: tuple[int, int]) -> None:
    from torchvision.transforms import v2

    wanted = v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(side), v2.PILToTensor()])(picture(*size))
    found = to_pixels(picture(*size), Framing(side, "bilinear", short_side=256))
    assert torch.equal((255 * found).round().to(torch.uint8), wanted)


def test_a_radius_is_the_source_images_only_where_nothing_was_scaled_or_cropped() -> None:
    cropped = Framing(224, short_side=256)
    assert source_norm(224, 224, 224) == 1.0
    assert source_norm(224, 224, cropped) is source_norm(256, 256, cropped) is None
    # A resize to 256 that scales up by 8/7 at most stretches by it in each direction; the crop adds nothing.
    assert resize_norm(224, 224, cropped) == pytest.approx(resize_norm(224, 224, 256))
    assert resize_norm(256, 300, cropped) == 1.0


def test_a_long_strip_is_cropped_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    framing = Framing(48, short_side=64)
    whole = to_pixels(picture(900, 60), framing)
    monkeypatch.setattr("robustvlm.core.framing._STRIP", 1)
    assert (to_pixels(picture(900, 60), framing) - whole).abs().max() < 0.02


FAMILIES = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "maxvit_t", "mnasnet0_5", "mobilenet_v2", "resnet18",
    "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "vgg11", "vit_b_16",
)  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_heads_of_torchvision_are_known_by_the_last_layer(name: str) -> None:
    with torch.device("meta"):
        assert _outputs(_LIBRARIES["torchvision"].make(name, 7)) == 7


def test_wrapped_checkpoints_with_any_number_of_classes(tmp_path: Path) -> None:
    net = timm_net(5)
    file = saved(
        tmp_path,
        net,
        classes=None,
        name="x.pth.tar",
        state_dict_ema={"module." + n: t for n, t in net.state_dict().items()},
        epoch=3,
    )
    assert "has 5 classes, and nothing says which: put classes.txt beside" in refused(f"timm:test_resnet/{file}")
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    assert "lists 3 classes, and" in refused(f"timm:test_resnet/{file}")
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\ne")
    assert load_classifier(f"timm:test_resnet/{file}", ("e", "b"), TEMPLATES)(torch.rand(1, 3, 160, 160)).shape == (
        1,
        2,
    )
    assert own_classes(f"timm:test_resnet/{file}+reject:0.5") == ("a", "b", "c", "d", "e")
    assert "does not fit the model" in refused(f"timm:test_vit/{file}")


def test_columns_follow_the_names_of_the_data(tmp_path: Path) -> None:
    spec = f"timm:test_resnet/{saved(tmp_path, timm_net())}"
    pixels = torch.rand(2, 3, 160, 160)
    logits = load_classifier(spec, NAMES, TEMPLATES)(pixels)
    assert torch.equal(load_classifier(spec, ("Ice_Cream", "dog"), TEMPLATES)(pixels), logits[:, [2, 0]])
    assert "does not know the class 'wolf' of the data; its 3 classes begin with 'dog'" in refused(
        spec, ("dog", "wolf")
    )


def test_a_thousand_classes_are_imagenets(tmp_path: Path) -> None:
    spec = f"timm:test_resnet/{saved(tmp_path, timm_net(1000), classes=None)}"
    assert own_classes(spec) == imagenet_names()
    pixels = torch.rand(1, 3, 160, 160)
    picked = load_classifier(spec, ("goldfish", "n01440764"), TEMPLATES)(pixels)
    assert torch.equal(picked, load_classifier(spec, imagenet_names(), TEMPLATES)(pixels)[:, [1, 0]])
    ids = sorted(wordnet_names())
    assert places_of(ids, imagenet_names(), "m") == list(range(1000))


def test_names_that_differ_in_case_alone_are_columns_of_their_own() -> None:
    assert places_of(["A", "a", "B"], ["A", "B", "a"], "m") == [0, 2, 1]
    with pytest.raises(UserError, match="'m' has several classes like 'CRANE' of the data: 'crane', 'Crane'; write"):
        places_of(["CRANE"], ["crane", "Crane"], "m")
    with pytest.raises(UserError, match="has several classes like 'crane'"):
        places_of(["crane"], ["crane", "dog", "crane"], "m")
    with pytest.raises(UserError, match="'A' and 'a' of the data are one class of 'm': keep one of them"):
        places_of(["A", "a"], ["A", "b"], "m")


def test_lists_of_names_are_read_as_those_of_data_are() -> None:
    from torchvision.models import ResNet50_Weights

    ids = sorted(wordnet_names())
    names = [wordnet_names()[one] for one in ids]
    few = ["n01440764", "n02084071", "n01443537"]
    assert places_of(["goldfish", "tench"], [few[2], few[0]], "m") == [0, 1], "ids of a few folders on the model's side"
    assert places_of(names[::-1], ids, "m") == list(range(999, -1, -1))
    published = list(ResNet50_Weights.DEFAULT.meta["categories"])
    assert places_of(names, published, "m") == list(range(1000))
    assert places_of(made_distinct(published)[0], published, "m") == list(range(1000))


def test_networks_that_scale_their_input_do_so_with_weights_of_a_file(tmp_path: Path) -> None:
    from torchvision.models import googlenet

    net = googlenet(weights=None, num_classes=3, transform_input=True, init_weights=False).eval()
    torch.save(net.state_dict(), tmp_path / "best.pt")
    (tmp_path / "classes.txt").write_text("dog\ncat\nice cream\n")
    classes = ("dog", "cat", "ice cream")
    with pytest.raises(
        UserError, match=r"began from published weights, it does: write 'torchvision:googlenet\.IMAGENET1K_V1"
    ):
        load_classifier(f"torchvision:googlenet/{tmp_path / 'best.pt'}", classes, TEMPLATES)
    spec = f"torchvision:googlenet.IMAGENET1K_V1/{tmp_path / 'best.pt'}"
    model = load_classifier(spec, classes, TEMPLATES)
    pixels = torch.rand(1, 3, 224, 224)
    mean, std = (torch.tensor(row).view(1, 3, 1, 1) for row in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        torch.testing.assert_close(model(pixels), net((pixels - mean) / std))
    assert any("scales its input" in remark for remark in model.remarks)


def test_the_file_decides_what_a_model_is_known_by_not_its_place(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, two = saved(tmp_path / "a", timm_net()), saved(tmp_path / "b", timm_net())
    first = load_classifier(f"timm:test_resnet/{one}", NAMES, TEMPLATES)
    assert first.fingerprint == load_classifier(f"timm:test_resnet/{two}", NAMES, TEMPLATES).fingerprint
    assert first.fingerprint != load_classifier(f"timm:test_resnet/{two}", NAMES[::-1], TEMPLATES).fingerprint


def test_as_an_encoder_it_names_the_same_class_and_can_be_smoothed(tmp_path: Path) -> None:
    spec = f"timm:test_resnet/{saved(tmp_path, timm_net())}"
    pixels = torch.rand(8, 3, 160, 160)
    logits = load_classifier(spec, NAMES, TEMPLATES)(pixels)
    vlm = load_pipeline(spec)
    axes = vlm.class_vectors(NAMES)
    assert axes is not None
    features = vlm.encode_image(pixels)
    assert torch.allclose((features @ axes.T).square(), logits.softmax(1), atol=1e-5)
    assert torch.equal((features @ axes.T).argmax(1), logits.argmax(1))
    smoothed = load_classifier(f"{spec}+smooth:0.01:4", NAMES[::-1], ("a photo of a {}.",))
    assert torch.equal(smoothed(pixels).argmax(1), 2 - logits.argmax(1))
    certain = vlm.logit_scale * torch.eye(3)
    assert certain.softmax(1)[0, 0] == pytest.approx(0.99)
    with pytest.raises(UserError, match="is a classifier and has no text encoder"):
        vlm.encode_text(["a cat"])


def test_a_purified_classifier_keeps_its_classes(tmp_path: Path) -> None:
    spec, pixels = f"timm:test_resnet/{saved(tmp_path, timm_net())}", torch.rand(4, 3, 160, 160)
    base = load_pipeline(spec)
    parts = Parts(Purifier(PurifierShape(widths=(8,))), Mapper(MapperShape(dim=3)), (0.25,))
    write_parts(tmp_path / "run", parts)
    card = Card("purify", base=spec, base_fingerprint=base.fingerprint, settings=parts.settings())
    write_card(tmp_path / "run", card)
    names = NAMES[::-1]
    found = load_classifier(str(tmp_path / "run"), names, TEMPLATES)
    assert torch.equal(found(pixels).argmax(1), load_classifier(spec, names, TEMPLATES)(pixels).argmax(1))
    smoothed = load_classifier(f"{tmp_path / 'run'}+smooth:0.25:2", names, TEMPLATES)
    vectors, own = smoothed.class_embeddings, base.class_vectors(names)
    assert vectors is not None
    assert own is not None
    assert torch.equal(vectors, own)
    assert smoothed(pixels).isfinite().all()


def test_gradients_reach_the_pixels(tmp_path: Path) -> None:
    spec = f"timm:test_resnet/{saved(tmp_path, timm_net())}"
    for form in (spec, f"{spec}+smooth:0.1:2"):
        pixels = torch.rand(1, 3, 160, 160, requires_grad=True)
        (grad,) = torch.autograd.grad(load_classifier(form, NAMES, TEMPLATES)(pixels)[0, 0], pixels)
        assert grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("timm:resnet_18", "timm has no model 'resnet_18'"),
        ("timm:resnet18.a9_in1k", "timm has no weights 'a9_in1k' of 'resnet18'"),
        ("torchvision:resnet50.IMAGENET1K_V9", "torchvision has no weights 'IMAGENET1K_V9' of 'resnet50'"),
        ("torchvision:resnet50/none.pt", "no checkpoint file at 'none.pt'"),
        ("timm:resnet18/a1_in1k", "no file 'a1_in1k'; published weights are named 'timm:resnet18.TAG'"),
    ],
)
def test_what_is_not_there(spec: str, said: str) -> None:
    assert said in refused(spec)


def test_no_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("[Errno -2] Name or service not known\nlong story")

    monkeypatch.setattr(hub, "_reach_hub", fail)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", fail)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    said = refused("timm:test_resnet")
    assert "could not fetch 'timm/test_resnet.r160_in1k' from the Hugging Face hub" in said
    assert "pass a local file as 'timm:test_resnet/FILE'" in said
    assert "could not fetch 'torchvision:squeezenet1_1' ([Errno -2]" in refused("torchvision:squeezenet1_1")


def test_published_weights_are_read_from_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    net = timm_net(1000)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr(hub, "_reach_hub", lambda: pytest.fail("the network was asked"))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda _, name: str(tmp_path / name))
    found = load_classifier("timm:test_resnet", imagenet_names(), TEMPLATES)
    pixels = torch.rand(1, 3, 160, 160)
    mean, std = (torch.tensor(net.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    assert torch.allclose(found(pixels), net((pixels - mean) / std), atol=1e-4)


def test_the_lower_loader_says_which_one_opens_it() -> None:
    from robustvlm.models import load_model

    with pytest.raises(UserError, match=r"is a classifier: open it with robustvlm.load_model"):
        load_model("timm:resnet18")


def test_votes_are_certified_by_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = f"timm:test_resnet/{saved(tmp_path, timm_net())}"
    for name in NAMES:
        (tmp_path / "data" / name).mkdir(parents=True)
        picture(20, 20).save(tmp_path / "data" / name / "0.png")
    options: dict[str, Any] = {"data": "imagefolder:data", "device": "cpu", "limit": 1}
    record = rv.certify(spec, claim="vote", sigma=0.01, samples=60, **options)
    (row,) = record.rows.to_pylist()
    model = load_classifier(spec, ("cat", "dog", "ice cream"), TEMPLATES)
    clean = to_pixels(picture(20, 20), model.framing)
    votes = model(clean + 0.01 * torch.randn(64, *clean.shape)).argmax(1).bincount(minlength=3)
    assert row["prediction"] == votes.argmax().item()
    assert row["radius"] > 0


# Commands that need more than a classifier has, and what is taken for granted of it


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photographs of three classes and classifiers: `three`, `other` of other classes, `im` of 1000."""
    folder = tmp_path_factory.mktemp("classifiers")
    for name, classes, listed in (("three", 3, NAMES), ("other", 101, tuple(map(str, range(101)))), ("im", 1000, None)):
        (folder / name).mkdir()
        saved(folder / name, timm_net(classes), classes=listed)
    for label in ("tench", "goldfish"):
        (folder / "fish" / label).mkdir(parents=True)
        picture(20, 20).save(folder / "fish" / label / f"{label}.png")
    for label in NAMES:
        (folder / "photos" / label).mkdir(parents=True)
        picture(20, 20).save(folder / "photos" / label / "a.png")
    return folder


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["finetune", "timm:test_resnet/three/w.pt", "--method", "tecoa", "--steps", "1"], "fine-tuning needs"),
        (["finetune", "timm:test_resnet/three/w.pt", "--method", "fare", "--steps", "1"], "fine-tuning needs"),
        (["immunize", "timm:test_resnet/three/w.pt"], "immunising needs"),
        (["tune-prompts", "timm:test_resnet/three/w.pt"], "prompts can be tuned for open_clip models"),
        (["export", "timm:test_resnet/three/w.pt", "out"], "is a classifier and no CLIP-like model"),
        (["evaluate", "timm:test_resnet/other/w.pt"], "does not know the class 'cat' and 2 more of the data"),
        (["certify", "timm:test_resnet/other/w.pt", "--sigma", "0.1"], "does not know the class 'cat'"),
        (["evaluate", "timm:test_resnet/three/w.pt#ema"], "no weights named 'ema': all its tensors stand at the top"),
    ],
)
def test_what_a_classifier_cannot_be_used_for_is_one_line(
    command: list[str], said: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    data = [] if command[0] == "export" else ["--data", "imagefolder:photos"]
    monkeypatch.setattr(sys, "argv", ["robustvlm", *command, *data])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    heard = capsys.readouterr()
    assert said in heard.err
    assert "Traceback" not in heard.err
    assert len(heard.err.strip().splitlines()) == 1


def test_classes_that_nothing_names_are_said_in_every_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    said = "nothing says what the 1000 outputs of 'timm:test_resnet/im/w.pt' mean"
    spec, data = "timm:test_resnet/im/w.pt", "imagefolder:fish"
    assert [remark for remark in rv.evaluate(spec, data=data, name="unsure").remarks if remark.startswith(said)]
    run = rv.attack(spec, data=data, eps="1/255", attack="pgd:steps=1", name="attacked")
    assert [remark for remark in run.manifest["remarks"] if remark.startswith(said)]
    assert said in html.unescape((run.folder / "report.html").read_text(encoding="utf-8"))
    (place / "im/classes.txt").write_text("\n".join(imagenet_names()))
    try:
        assert not rv.evaluate(spec, data=data, name="sure").remarks
    finally:
        (place / "im/classes.txt").unlink()


def test_models_made_in_inference_mode_can_be_attacked_outside(place: Path) -> None:
    for spec in ("tiny", f"timm:test_resnet/{place / 'three/w.pt'}"):
        with torch.inference_mode():
            model = rv.load_classifier(spec, NAMES, device="cpu")
            assert model.predict(torch.rand(1, 3, 64, 64)).names
        assert model.fingerprint == rv.load_classifier(spec, NAMES, device="cpu").fingerprint
        pixels = torch.rand(1, 3, 64, 64, requires_grad=True)
        (gradient,) = torch.autograd.grad(model(pixels).sum(), pixels)
        assert gradient.abs().max() > 0
