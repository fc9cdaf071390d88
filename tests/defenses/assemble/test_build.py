"""Pipelines put together from runs: order, copies, fits and misfits, and that the whole is what its parts say."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from robustvlm.certify.threats.ellipsoids import _scales
from robustvlm.commands.assemble import build
from robustvlm.commands.certify import CertifySettings
from robustvlm.commands.certify.setup import settle_noise
from robustvlm.defenses import SmoothedVLM, load_classifier, load_pipeline, pipeline, smooth
from robustvlm.defenses.assemble import Misfit, Recipe, build_pipeline, copy_model
from robustvlm.defenses.immunity import immunise_without_images
from robustvlm.defenses.immunity.state import AdaptedVLM, Adapter, card_settings, save_tensors
from robustvlm.defenses.purify import Parts, PurifiedVLM
from robustvlm.defenses.purify.parts import Mapper, MapperShape, write_parts
from robustvlm.defenses.purify.unet import Purifier, PurifierShape
from robustvlm.errors import UserError
from robustvlm.models.saved import Card, read_card, write_card

ENCODER, OTHER = "small_encoders:Encoder", "small_encoders:SmallMemory"
CLASSES, TEMPLATES = ["cat", "dog", "fox"], ["a {}"]

# What an immunised model is, as far as a pipeline is concerned: an adapter around its base, and a head of its own.
IMMUNITY = """
import torch
from robustvlm.defenses.classifier import ZeroShot
from robustvlm.defenses.pipeline import SavedModel
from robustvlm.models import VLM, zero_shot

class Adapted(VLM):
    def __init__(self, base, by):
        super().__init__(spec=base.spec, image_size=base.image_size, logit_scale=base.logit_scale)
        self.base, self.by = base, by
    def at_noise(self, sigma):
        return Adapted(self.base.at_noise(sigma), self.by)
    def _image_features(self, pixels):
        return self.base.encode_image(pixels) + self.by * self.base.encode_image(pixels).roll(1, dims=1)
    def _text_features(self, texts):
        return self.base.encode_text(texts)
    def _identity(self):
        return (self.base.fingerprint, str(self.by))

class Head(ZeroShot):
    def forward(self, pixels):
        return 2 * super().forward(pixels)

class Immunised(SavedModel):
    def encoder(self, device):
        return Adapted(self.base(device), self.card.settings["by"])
    def classifier(self, encoder, class_names, templates, *, cache=True):
        return Head(zero_shot(encoder, class_names, templates, cache=cache)).eval()
"""


@pytest.fixture(autouse=True)
def _immunity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plain_immunity.py").write_text(IMMUNITY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "plain_immunity", raising=False)
    monkeypatch.setitem(pipeline.KINDS, "immunize", "plain_immunity:Immunised")


def purified(folder: Path, base: str = ENCODER) -> str:
    """A purify run with random weights, and with the records that runs keep beside their model."""
    torch.manual_seed(0)
    parts = Parts(Purifier(PurifierShape(widths=(8,), embedding=8)), Mapper(MapperShape(12, embedding=8)), (0.25,))
    for part in (parts.purifier, parts.mapper):
        assert part is not None
        for parameter in part.parameters():
            nn.init.normal_(parameter, std=0.2)
    (folder / "training" / "mapper").mkdir(parents=True)
    (folder / "training" / "mapper" / "last.safetensors").write_bytes(b"checkpoint")
    (folder / "report.html").write_text("report")
    write_parts(folder, parts)
    fingerprint = load_pipeline(base).fingerprint
    write_card(folder, Card("purify", base=base, base_fingerprint=fingerprint, settings=parts.settings()))
    return str(folder)


def immunised(folder: Path, base: str) -> str:
    folder.mkdir()
    (folder / "adapter.safetensors").write_bytes(b"x")
    fingerprint = load_pipeline(base).fingerprint
    write_card(folder, Card("immunize", base=base, base_fingerprint=fingerprint, settings={"by": 0.5}))
    return str(folder)


def images(count: int = 3) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def logits(model: str, pixels: Tensor) -> Tensor:
    torch.manual_seed(0)  # the same noise
    with torch.no_grad():
        return load_classifier(model, CLASSES, TEMPLATES, cache=False)(pixels)


def test_the_whole_pipeline_is_the_chain_of_its_runs(tmp_path: Path) -> None:
    purify = purified(tmp_path / "p")
    immunize = immunised(tmp_path / "i", purify)
    vlm, misfits = build_pipeline(
        Recipe(ENCODER, purify=purify, smooth="0.25:6", immunize=immunize), tmp_path / "whole"
    )
    assert misfits == ()
    assert isinstance(vlm, SmoothedVLM)
    assert (vlm.sigma, vlm.n0) == (0.25, 6)
    inner = vlm.base.base  # below the adapter
    assert isinstance(inner, PurifiedVLM)
    assert inner.sigma == 0.25
    assert torch.equal(logits(str(tmp_path / "whole"), images()), logits(f"{immunize}+smooth:0.25:6", images()))
    wanted = 2 * logits(f"{purify}+smooth:0.25:6", images())
    assert not torch.allclose(logits(str(tmp_path / "whole"), images()), wanted, atol=1e-3)  # the adapter counts


def test_the_folder_stands_alone(tmp_path: Path) -> None:
    purify = purified(tmp_path / "p")
    immunize = immunised(tmp_path / "i", purify)
    build_pipeline(Recipe(ENCODER, purify=purify, smooth="0.25:2", immunize=immunize), tmp_path / "whole")
    before = logits(str(tmp_path / "whole"), images())
    shutil.rmtree(tmp_path / "p")
    shutil.rmtree(tmp_path / "i")
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "whole").rename(tmp_path / "elsewhere" / "moved")
    assert torch.equal(logits(str(moved), images()), before)
    copied = {path.name for path in moved.rglob("*") if path.is_file()}
    assert copied == {"model.json", "purifier.safetensors", "mapper.safetensors", "adapter.safetensors"}


def test_gradients_flow_from_the_head_to_the_pixels(tmp_path: Path) -> None:
    purify = purified(tmp_path / "p")
    immunize = immunised(tmp_path / "i", purify)
    build_pipeline(Recipe(ENCODER, purify=purify, smooth="0.25:3", immunize=immunize), tmp_path / "whole")
    classifier = load_classifier(str(tmp_path / "whole"), CLASSES, TEMPLATES, cache=False).double()
    direction = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def at(step: float) -> Tensor:
        torch.manual_seed(0)
        return classifier(images(2).double() + step * direction)[:, 0].sum()

    x = images(2).double().requires_grad_()
    torch.manual_seed(0)
    (gradient,) = torch.autograd.grad(classifier(x)[:, 0].sum(), x)
    with torch.no_grad():
        slope = (at(1e-4) - at(-1e-4)) / 2e-4
    assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=1e-3)


def test_parts_made_for_another_model_are_refused_unless_accepted(tmp_path: Path) -> None:
    purify = purified(tmp_path / "p", OTHER)
    recipe = Recipe(ENCODER, purify=purify, smooth="0.25")
    with pytest.raises(UserError, match=f"was made for '{OTHER}', not for '{ENCODER}': .*--accept-misfits"):
        build_pipeline(recipe, tmp_path / "whole")
    assert read_card(tmp_path / "whole") is None
    _, misfits = build_pipeline(recipe, tmp_path / "whole", accept_misfits=True)
    assert [wrong.harmless for wrong in misfits if isinstance(wrong, Misfit)] == [False]
    assert load_pipeline(str(tmp_path / "whole")).fingerprint


def test_a_head_made_for_the_encoder_alone_is_put_on_with_a_warning(tmp_path: Path) -> None:
    purify, immunize = purified(tmp_path / "p"), immunised(tmp_path / "i", ENCODER)
    _, misfits = build_pipeline(Recipe(ENCODER, purify=purify, immunize=immunize), tmp_path / "whole")
    assert [(m.part.name, m.harmless) for m in misfits if isinstance(m, Misfit)] == [("immunize", True)]
    assert "the encoder without its purifier" in str(misfits[0])
    with pytest.raises(UserError, match=f"was made for '{ENCODER}', not for"):
        build_pipeline(Recipe(OTHER, immunize=immunize), tmp_path / "other")


def test_models_below_models_are_copied_too(tmp_path: Path) -> None:
    first = purified(tmp_path / "first")
    second = immunised(tmp_path / "second", first)
    before = logits(second, images())
    spec = copy_model(second, tmp_path / "copy")
    shutil.rmtree(tmp_path / "first")
    shutil.rmtree(tmp_path / "second")
    assert torch.equal(logits(spec, images()), before)
    card = read_card(tmp_path / "copy")
    assert card is not None
    assert Path(str(card.base)).resolve() == (tmp_path / "copy" / "base").resolve()


def test_an_interrupted_build_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    purify, folder = purified(tmp_path / "p"), tmp_path / "whole"
    build_pipeline(Recipe(ENCODER, purify=purify), folder)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("robustvlm.defenses.assemble.shutil.copyfile", full)
    with pytest.raises(OSError, match="No space"):
        build_pipeline(Recipe(ENCODER, purify=purify, smooth="0.25"), folder)
    assert read_card(folder) is None


def test_the_run_of_a_build_can_be_given_again(tmp_path: Path) -> None:
    place = {"out": tmp_path / "runs", "name": "whole", "device": "cpu"}
    recipe = {"purify": purified(tmp_path / "p"), "smooth": "0.25:2"}
    first = build(ENCODER, **recipe, **place)
    before = logits(str(first.folder), images())
    parts = [f"purifier {tmp_path}/p", f"encoder {ENCODER}", f"mapper {tmp_path}/p", "smoothing 0.25:2"]
    assert first.summary.parts == parts
    again = build(ENCODER, **recipe, **place)
    assert torch.equal(logits(str(again.folder), images()), before)
    with pytest.raises(UserError, match="fresh=True"):
        build(ENCODER, smooth="0.25:2", **place)
    build(ENCODER, smooth="0.25:2", fresh=True, **place)
    assert not (tmp_path / "runs" / "whole" / "parts" / "purify").exists()


ASIDE = ("model.json", "parts", "summary.json", "checksums.json")


@pytest.mark.parametrize("stopped", [0, 1, 2, 3])
def test_a_build_stopped_while_it_puts_the_earlier_one_aside_leaves_that_one(
    stopped: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {"purify": purified(tmp_path / "p"), "smooth": "0.25:2", "out": tmp_path / "runs", "name": "whole"}
    folder = build(ENCODER, **recipe).folder
    before, rename, moved = logits(str(folder), images()), Path.rename, []

    def renamed(path: Path, target: Path) -> Path:
        if target.parent.name != ".before":
            return rename(path, target)
        moved.append(path.name)
        if len(moved) > stopped:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", renamed)
        with pytest.raises(KeyboardInterrupt):
            build(ENCODER, **recipe)
    assert tuple(moved) == ASIDE[: stopped + 1]
    assert torch.equal(logits(str(folder), images()), before)
    assert not (folder / ".before").exists()


@pytest.mark.parametrize("aside", [ASIDE[:count] for count in range(5)] + [("parts",)])
def test_a_build_killed_on_the_way_loses_nothing_of_the_earlier_one(
    aside: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one finds whatever lay aside at the kill, and cannot be made itself."""
    recipe = {"purify": purified(tmp_path / "p"), "smooth": "0.25:2", "out": tmp_path / "runs", "name": "whole"}
    folder = build(ENCODER, **recipe).folder
    before = logits(str(folder), images())
    (folder / ".before").mkdir()
    for name in aside:
        (folder / name).rename(folder / ".before" / name)
    if len(aside) == 4:
        (folder / "parts").mkdir()  # the new one had begun
        (folder / "parts" / "half").write_text("")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("robustvlm.commands.assemble.work.build_pipeline", full)
    with pytest.raises(UserError, match="is full"):
        build(ENCODER, **recipe)
    assert torch.equal(logits(str(folder), images()), before)
    assert {path.name for path in folder.iterdir()} >= set(ASIDE)
    assert not (folder / ".before").exists()
    assert not (folder / "parts" / "half").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "nothing to build"),
        ({"encoder": f"{ENCODER}+smooth:0.25"}, r"comes with an operator, \+smooth:0.25: pass --smooth"),
        ({"smooth": "much"}, "sigma must be a number"),
        ({"smooth": "0.25:0"}, "between 1 and"),
        ({"purify": "nowhere"}, "'nowhere' is no folder"),
        ({"purify": "."}, "holds no model"),
        ({"immunize": "{p}"}, "is one of `robustvlm purify`"),
    ],
)
def test_recipes_that_make_no_sense_are_explained(tmp_path: Path, settings: dict[str, str], words: str) -> None:
    purify = purified(tmp_path / "p")
    given = {"encoder": ENCODER} | {name: value.replace("{p}", purify) for name, value in settings.items()}
    with pytest.raises(UserError, match=words) as caught:
        build_pipeline(Recipe(**given), tmp_path / "whole")
    assert "\n" not in str(caught.value)


def real_head(folder: Path, base: str, *, noise: tuple[float, ...] = ()) -> str:
    """An immunised run as this program makes it, with thresholds for some noise."""
    vlm = load_pipeline(base)
    immunity = immunise_without_images(vlm, CLASSES, TEMPLATES, ["wolf", "tiger"])
    for parameter in immunity.adapter.parameters():
        nn.init.normal_(parameter, std=0.3)
    noisy = {sigma: torch.zeros(len(CLASSES)) for sigma in noise}
    folder.mkdir()
    save_tensors(folder, dataclasses.replace(immunity, noisy=noisy))
    settings = card_settings(immunity)
    write_card(folder, Card("immunize", base=base, base_fingerprint=vlm.fingerprint, settings=settings))
    return str(folder)


@pytest.fixture
def _own_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pipeline.KINDS, "immunize", "robustvlm.defenses.immunity.saved:ImmunisedModel")


@pytest.mark.usefixtures("_own_heads")
def test_an_immunised_head_of_this_program_ends_the_pipeline(tmp_path: Path) -> None:
    purify = purified(tmp_path / "p")
    immunize = real_head(tmp_path / "i", purify, noise=(0.25,))
    recipe = Recipe(ENCODER, purify=purify, smooth="0.25:4", immunize=immunize)
    vlm, misfits = build_pipeline(recipe, tmp_path / "whole")
    assert misfits == ()
    assert isinstance(vlm, SmoothedVLM)
    assert isinstance(vlm.base, AdaptedVLM)
    assert isinstance(vlm.base.base, PurifiedVLM)
    assert vlm.base.base.sigma == 0.25
    whole = load_classifier(str(tmp_path / "whole"), CLASSES, TEMPLATES, cache=False)
    assert whole.can_reject
    assert torch.equal(logits(str(tmp_path / "whole"), images()), logits(f"{immunize}+smooth:0.25:4", images()))
    x = images(1).requires_grad_()
    (gradient,) = torch.autograd.grad(whole(x)[:, -1].sum(), x)  # of the acceptance score
    assert gradient.abs().max() > 0


@pytest.mark.usefixtures("_own_heads")
def test_thresholds_for_noise_on_the_bare_encoder_do_not_fit_behind_a_purifier(tmp_path: Path) -> None:
    purify, immunize = purified(tmp_path / "p"), real_head(tmp_path / "i", ENCODER, noise=(0.25,))
    for noise in ("0.25:2", None):  # without a smoothing of its own, the pipeline may be smoothed later
        recipe = Recipe(ENCODER, purify=purify, smooth=noise, immunize=immunize)
        with pytest.raises(
            UserError, match=r"and so were its thresholds for noise of 0\.25.*--accept-misfits"
        ) as caught:
            build_pipeline(recipe, tmp_path / "whole")
        assert "\n" not in str(caught.value)
    _, misfits = build_pipeline(recipe, tmp_path / "whole", accept_misfits=True)
    assert [wrong.harmless for wrong in misfits if isinstance(wrong, Misfit)] == [False]
    _, misfits = build_pipeline(Recipe(ENCODER, smooth="0.25:2", immunize=immunize), tmp_path / "bare")
    assert misfits == ()


@pytest.mark.usefixtures("_own_heads")
def test_a_head_smoothed_without_thresholds_for_the_noise_is_built_with_a_warning(tmp_path: Path) -> None:
    purify, immunize = purified(tmp_path / "p"), real_head(tmp_path / "i", ENCODER, noise=(0.5,))
    recipe = Recipe(ENCODER, purify=purify, smooth="0.25:2", immunize=immunize)
    _, found = build_pipeline(recipe, tmp_path / "whole")
    assert ["encoder without its purifier" in str(found[0]), "no thresholds for noise of 0.25" in str(found[1])] == [
        1,
        1,
    ]
    assert "--sigma 0.25` sets them, from images" in str(found[1])
    assert len(found) == 2
    whole = pipeline.saved_model(str(tmp_path / "whole"))
    assert whole is not None
    assert whole.noise_levels == (0.5,)


def test_nothing_is_smoothed_twice(tmp_path: Path) -> None:
    purify = purified(tmp_path / "p")
    build_pipeline(Recipe(ENCODER, purify=purify, smooth="0.25:2"), tmp_path / "whole")
    for twice in (f"{tmp_path / 'whole'}+smooth:0.5:2", f"{ENCODER}+smooth:0.25+smooth:0.5"):
        with pytest.raises(UserError, match="smoothed already") as caught:
            load_pipeline(twice)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="smoothed already"):
        build_pipeline(Recipe(str(tmp_path / "whole"), smooth="0.5:4"), tmp_path / "twice")
    with pytest.raises(UserError, match="smoothed already"):
        smooth(AdaptedVLM(load_pipeline(f"{ENCODER}+smooth:0.25:2"), Adapter(12, 4)), 0.25)
    assert read_card(tmp_path / "twice") is None


@pytest.mark.parametrize("smoothing", [0.25, ["0.25"], "x:y", "0.25:3:4", "0", "0.25:0", True])
def test_a_damaged_smoothing_is_explained_in_one_line(tmp_path: Path, smoothing: object) -> None:
    build_pipeline(Recipe(ENCODER, smooth="0.25:2"), tmp_path / "whole")
    card = read_card(tmp_path / "whole")
    assert card is not None
    write_card(tmp_path / "whole", dataclasses.replace(card, settings={"smooth": smoothing}))
    for use in (load_pipeline, lambda spec: settle_noise(CertifySettings(model=spec))):
        with pytest.raises(UserError, match="names no smoothing") as caught:
            use(str(tmp_path / "whole"))
        assert "\n" not in str(caught.value)


def test_a_pipeline_under_noise_of_a_map_is_refused_once_the_map_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would draw other noise than what was certified of it: the card keeps the digest of the map."""
    monkeypatch.chdir(tmp_path)
    Path("scales.txt").write_text("1 2\n2 4\n")
    built, _ = build_pipeline(Recipe(ENCODER, smooth="ellipsoid@scales.txt=0.25:12:0.01:vote"), tmp_path / "whole")
    assert load_pipeline(str(tmp_path / "whole")).fingerprint == built.fingerprint
    assert read_card(tmp_path / "whole").settings["smooth"].endswith("=0.25:12:0.01:vote")
    Path("scales.txt").write_text("1 2\n2 5\n")
    _scales.cache_clear()  # as in another process
    with pytest.raises(UserError, match=r"the map 'scales\.txt' has changed"):
        load_pipeline(str(tmp_path / "whole")).encode_image(images())
    for written in ("0.250:6", "brightness=0.20"):  # what is no map stands as it was written
        assert Recipe(ENCODER, smooth=written).pinned == written
