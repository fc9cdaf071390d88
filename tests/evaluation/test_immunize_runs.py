"""Immunize runs from start to end on a small encoder, and what every other command makes of the result."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from certifying import Certifying
from PIL import Image

from robustvlm.commands.attack import attack
from robustvlm.commands.certify.audit import audit_folder
from robustvlm.commands.certify.audit_search import Effort
from robustvlm.commands.detect import detect
from robustvlm.commands.evaluate.work import evaluate_clean
from robustvlm.commands.immunize import IMMUNIZE, ImmunizeSettings, view, work
from robustvlm.commands.immunize.images import held_back
from robustvlm.commands.immunize.record import NAME, Measures, Unknown, measure, read_run
from robustvlm.data import open_data
from robustvlm.defenses import load_classifier
from robustvlm.defenses.immunity import Immunity
from robustvlm.defenses.immunity.antibodies import Antibodies
from robustvlm.defenses.immunity.recipe import thresholds_of
from robustvlm.defenses.immunity.state import Adapter, load_immunity, save_tensors
from robustvlm.defenses.immunity.thresholds import Thresholds
from robustvlm.defenses.prompts import Features
from robustvlm.detect.metrics import Interval
from robustvlm.errors import UserError
from robustvlm.models.saved import CARD_NAME, read_card
from robustvlm.report.page import page_of
from robustvlm.report.sections import Report
from robustvlm.report.words import percent
from robustvlm.runs.run import Run
from robustvlm.runs.settings import Observer
from robustvlm.stats import rate

MakeFolder = Callable[..., Path]
MODEL = "small_encoders:Encoder"


def prepared(photos: Path, *, name: str = "run", **changes: Any) -> Run:
    words = photos.parent / "antibodies.txt"
    words.write_text("cat: lynx\ncat: cat on the moon\ndog: <b>wolf</b>\nfox: jackal\nfox: fox\n")
    base: dict[str, Any] = {
        "model": MODEL,
        "data": f"imagefolder:{photos}",
        "held_out": 0.4,
        "antibodies": str(words),
        "band": (-0.99, 0.99),
        "min_images": 3,
        "hidden": 8,
        "steps": 40,
        "device": "cpu",
        "out": photos.parent / "runs",
        "name": name,
    }
    return Run(IMMUNIZE, ImmunizeSettings(**{**base, **changes}))


def made(photos: Path, *, name: str = "run", **changes: Any) -> Run:
    run = prepared(photos, name=name, **changes)
    run.start()
    return run


class Watching(Observer):
    """Counts what is done of each stage, and presses Ctrl-C when so many pieces of one are done."""

    def __init__(self, stop: tuple[str, int] | None = None) -> None:
        self.stop, self.title, self.done = stop, "", dict[str, int]()

    def begin(self, title: str, total: int | None = None, done: int = 0) -> None:
        del total
        self.title = title
        self.done[title] = done

    def advance(self, count: int = 1, **shown: str) -> None:
        del shown
        self.done[self.title] += count
        if self.stop == (self.title, self.done[self.title]):
            raise KeyboardInterrupt


def record_of(run: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.folder.path / NAME).read_text())
    return found


def test_run_leaves_a_model_a_record_and_a_report(make_folder: MakeFolder) -> None:
    run = made(make_folder())
    record = record_of(run)
    assert [row["name"] for row in record["classes"]] == ["cat", "dog", "fox"]
    assert {text for text, _, _ in record["antibodies"]["kept"]} <= {"lynx", "cat on the moon", "<b>wolf</b>", "jackal"}
    assert ["fox", "fox", "the name of 'fox'"] in record["antibodies"]["dropped"]
    assert record["images"]["fit"] + record["images"]["held_out"] == 36
    assert record["measures"]["accuracy_after"]["total"] == record["images"]["held_out"]
    assert record["vaccine"]["history"][0]["step"] == 0
    html = run.folder.report_path.read_text()
    assert "&lt;b&gt;wolf" in html
    assert "<b>wolf" not in html
    classifier = load_classifier(str(run.folder.path), ("fox", "cat", "dog"), ["{}"])
    assert classifier(torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))).shape == (2, 4)


def test_the_same_command_makes_the_same_model_and_finds_it_again(make_folder: MakeFolder) -> None:
    photos = make_folder()
    first, second = made(photos), made(photos, name="second")
    one, two = ((run.folder.path / "immunity.safetensors").read_bytes() for run in (first, second))
    assert one == two
    before = (first.folder.path / CARD_NAME).stat().st_mtime_ns
    watching = Watching()
    prepared(photos).start(watching)
    assert watching.done == {}
    assert (first.folder.path / CARD_NAME).stat().st_mtime_ns == before
    with pytest.raises(UserError, match="other settings"):
        prepared(photos, miss=0.1).start()


@pytest.mark.parametrize("name", ["antibodies", "near_names", "tree"])
def test_a_changed_file_is_not_shown_as_the_run_that_was_made_of_the_earlier_one(
    make_folder: MakeFolder, name: str
) -> None:
    photos = make_folder()
    files = {"antibodies": "cat: lynx\ndog: wolf\n", "near_names": "lynx\n"}
    files["tree"] = json.dumps({"name": "all", "children": [{"name": n} for n in ("cat", "dog", "fox")]})
    other = {"antibodies": "cat: cheetah\n", "near_names": "owl\n", "tree": files["tree"].replace("all", "thing")}
    paths = {key: photos.parent / f"own-{key}.{'json' if key == 'tree' else 'txt'}" for key in files}
    for key, path in paths.items():
        path.write_text(files[key])

    def again(folder: str = "run") -> Run:
        options: dict[str, Any] = {"antibodies": f"file:{paths['antibodies']}", "steps": 0, "name": folder}
        return prepared(photos, near_names=paths["near_names"], tree=paths["tree"], **options)

    again().start()
    again().start()
    paths[name].write_text(other[name])
    with pytest.raises(UserError, match=rf"other settings \({name}: other content of the same name\)"):
        again().start()
    # A run of the time before digests is still shown.
    at = again().folder.path / "manifest.json"
    kept = json.loads(at.read_text())
    del kept["named_files"]
    at.write_text(json.dumps(kept))
    again().start()


def test_a_file_that_is_missing_is_found_before_any_work(make_folder: MakeFolder) -> None:
    photos = make_folder(6)
    with pytest.raises(UserError, match=r"no file at .*absent.txt: near_names takes one"):
        made(photos, near_names=photos.parent / "absent.txt")


@pytest.mark.equality
def test_a_run_that_was_cut_short_is_no_model_and_goes_on(make_folder: MakeFolder) -> None:
    photos = make_folder()

    run = prepared(photos)
    with pytest.raises(KeyboardInterrupt):
        run.start(Watching(("Vaccinating", 5)))
    assert not (run.folder.path / CARD_NAME).exists()
    watching = Watching()
    run.start(watching)
    assert [title for title in watching.done if title.startswith("Encoding")] == []  # features were kept
    assert watching.done["Vaccinating"] > 0
    straight = made(photos, name="straight")
    one, two = ((r.folder.path / "immunity.safetensors").read_bytes() for r in (run, straight))
    assert one == two


@pytest.mark.parametrize("source", ["none", "noise"])
def test_baselines_run_without_texts(make_folder: MakeFolder, source: str) -> None:
    record = record_of(made(make_folder(), antibodies=source))
    assert (len(record["antibodies"]["kept"]) > 0) == (source == "noise")
    assert record["antibodies"]["band"] is None


def test_zero_shot_mode_says_what_is_lost(make_folder: MakeFolder) -> None:
    photos = make_folder()
    run = made(photos, no_images=True)
    record = record_of(run)
    assert "not controlled" in record["notes"][0]
    assert [row["alpha"] for row in record["classes"]] == [[1.0]] * 3
    assert [row["threshold"] for row in record["classes"]] == [0.0] * 3
    assert load_classifier(str(run.folder.path), ("cat", "dog", "fox"), ["{}"]).can_reject
    with pytest.raises(UserError, match="none that mean anything"):
        made(photos, name="b", no_images=True, antibodies="none")


def page_of_classes(count: int, images: int) -> str:
    """Return the table of so many classes, the last of which has the smallest margin, as the page shows it."""
    fit = {"distance": 0.1234} if images else None
    rows = [
        {"name": f"class {k}", "images": images, "alpha": [1.0], "kappa": 7.0, "threshold": 0.5, "antibodies": 1}
        | {"margin": 1 - k / 1000, "held_out_right": 0, "pooled": False, "fit": fit}
        for k in range(count)
    ]
    return page_of(Report("report", "run", "kicker", "", [], [view._classes({"classes": rows})]))


def test_of_many_classes_the_report_shows_the_likeliest_to_be_confused() -> None:
    page = page_of_classes(1000, images=3)
    assert page.count("<tr") == 1 + 100
    assert "The 100 of 1,000 with the smallest margin" in page
    assert ">class 999<" in page
    assert ">class 899<" not in page
    few = page_of_classes(100, images=3)
    assert few.count("<tr") == 1 + 100
    assert few.index(">class 0<") < few.index(">class 99<")
    assert "with the smallest" not in few


def test_a_model_of_texts_has_no_columns_about_images() -> None:
    taught, texts = page_of_classes(3, images=3), page_of_classes(3, images=0)
    for column in ("Images", "alpha", "kappa", "Threshold", "KS"):
        assert f">{column}</th>" in taught
        assert f">{column}</th>" not in texts
    assert ">Margin</th>" in texts
    assert "Weibull" not in texts


def test_several_prototypes_noise_thresholds_and_unknown_images(
    make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: dict[str, int | None] = {}
    monkeypatch.setattr(Observer, "begin", lambda _, title, total=None, *_more: begun.update({title: total}))
    photos = make_folder()
    strange = tmp_path / "strange" / "thing"
    strange.mkdir(parents=True)
    for number in range(4):
        Image.new("RGB", (16, 16), (60 * number, 20, 200)).save(strange / f"{number}.png")
    unknown = f"imagefolder:{strange.parent}"
    run = made(photos, prototypes_per_class=2, sigma=[0.1], ood=[unknown], margin="auto")
    encoded = {title: total for title, total in begun.items() if title.startswith("Encoding")}
    assert encoded[f"Encoding {unknown}"] == 4
    assert all(encoded.values()), encoded
    assert encoded["Encoding noise 0.1"] == encoded["Encoding held out"]
    record = record_of(run)
    assert all(len(row["alpha"]) == 2 for row in record["classes"])
    assert set(record["noisy_thresholds"]) == {"0.1"}
    found = record["measures"]["unknown"][unknown]
    assert found["images"] == 4
    assert 0 <= found["auroc"]["low"] <= found["auroc"]["value"] <= found["auroc"]["high"] <= 1
    assert "strange" in page_of(view.immunize_report(read_run(run.folder.path)))


def test_thresholds_under_noise_are_set_on_images_of_all_classes(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data come class by class, and of the held-out images a third at most is used."""
    seen: list[list[int]] = []

    def noted(features: torch.Tensor, labels: torch.Tensor, *rest: Any, **more: Any) -> Thresholds:
        seen.append(labels.tolist())
        return thresholds_of(features, labels, *rest, **more)

    monkeypatch.setattr(work, "MOST_IMAGES", 12)
    monkeypatch.setattr(work, "thresholds_of", noted)
    record = record_of(made(make_folder(), held_out=0.95, sigma=[0.05], min_images=3))
    means, copies = seen
    assert len(means) == 12
    assert len(set(means)) == 3
    assert sorted(copies) == sorted(means * work.COPIES_EACH)
    own = record["noisy_own"]["0.05"]
    assert own["images"] == 12
    assert 0 <= own["means"] <= 3


def test_copies_of_an_image_do_not_make_a_class_of_many_images(make_folder: MakeFolder) -> None:
    few = record_of(made(make_folder(), sigma=[0.05], min_images=20))
    assert not any(row["images"] > 20 for row in few["classes"])
    assert few["noisy_own"]["0.05"] | {"images": 0} == {"images": 0, "means": 0, "copies": 0}


def test_images_held_out_teach_nothing_and_groups_stay_together() -> None:
    source = open_data("emoji?split=train&styles=noto&copies=2")
    held = {name: held_back(source.group(name), 0.3, 0) for name in source.ids() or ()}
    for name in held:
        first, _, copy = name.rpartition("/")
        assert held[name] == held[f"{first}/{1 - int(copy)}"]
    assert 0.2 < sum(held.values()) / len(held) < 0.4


@dataclass(frozen=True)
class Case:
    """What a wrong setting is answered with."""

    changes: dict[str, Any]
    message: str


WRONG = [
    Case({"miss": 0.7}, "miss must lie between 0 and 0.5"),
    Case({"xi": 200.0}, "xi must be at most 180 degrees, got 200"),
    Case({"prototypes_per_class": 0}, "prototypes_per_class must be at least 1"),
    Case({"lambda_inf": math.nan}, "lambda_inf must be at least 0"),
    Case({"held_out": 1.5}, "held_out takes data or a share"),
    Case({"sigma": [0.0]}, "sigma must be above 0"),
    Case({"kappa": "own"}, "unknown kappa 'own'"),
    Case({"shots": -1}, "shots must be at least 0"),
    Case({"no_images": True, "ood": ["emoji"]}, "need images: leave out no_images=True"),
    Case({"no_images": True, "mix_weight": 1.0}, "mix_weight trains an adapter between images and antibodies"),
    Case({"antibodies": "none", "mix_weight": 1.0}, "here there are no images, no antibodies or no training steps"),
    Case({"steps": 0, "mix_weight": 1.0}, "here there are no images, no antibodies or no training steps"),
    Case({"ood": ["emoji?split=near", "emoji?split=near"]}, "two sets of unknown images are called 'emoji"),
    Case({"ood": ["a=emoji?split=near", "a=emoji?split=far"]}, "called 'a': name them, as ood=NAME=emoji"),
    Case({"antibodies": "bnk"}, "antibodies come from"),
    Case({"antibodies": "missing.json"}, "missing.json"),
    Case({"antibodies": "llm"}, "--llm URL"),
    Case({"band": "0.9,0.1"}, "safe < risk"),
    Case({"model": f"{MODEL}+smooth:0.1:2"}, "is smoothed"),
    Case({"held_out": "emoji?split=val"}, "other classes"),
    Case({"rule": "hing"}, "unknown rule 'hing'"),
    Case({"thresholds": "pool"}, "unknown thresholds 'pool'"),
    Case({"tail": 0.01}, "tail must lie between the miss"),
    Case({"lambda_inf": 0.3}, "lambda_inf is the weight of S_DIS: pass rule=s-dis"),
    Case({"calibrate": "emoji"}, "calibrate is for a model without images"),
    Case({"no_images": True, "calibrate": "emoji?split=val"}, "calibrate needs the same ones"),
]


@pytest.mark.parametrize("case", WRONG, ids=lambda case: "-".join(case.changes))
def test_mistakes_are_one_line_and_found_before_work_begins(make_folder: MakeFolder, case: Case) -> None:
    photos = make_folder(6)
    with pytest.raises(UserError, match=case.message) as found:
        made(photos, **case.changes)
    assert "\n" not in str(found.value)
    assert not (photos.parent / "runs" / "run" / CARD_NAME).exists()


def test_images_set_score_and_thresholds_of_a_model_of_texts(make_folder: MakeFolder) -> None:
    photos = make_folder()
    run = made(photos, no_images=True, calibrate=f"imagefolder:{photos}")
    record = record_of(run)
    assert record["images"] == {"fit": 0, "held_out": 36}
    assert record["measures"]["rejected"]["total"] == 36
    assert record["diagnostics"]["neighbourhood"]["covered"]["total"] == 3
    assert not any("not controlled" in note for note in record["notes"])
    card = read_card(run.folder.path)
    assert card is not None
    settings = card.settings
    made_of = load_immunity(run.folder.path, settings)
    assert settings["hinge"] == {"weight": record["weight"], "floor": record["floor"]}
    assert len({row["threshold"] for row in record["classes"] if row["pooled"]}) <= 1
    assert made_of.floor == record["floor"]
    assert "of the neighbourhood" in page_of(view.immunize_report(read_run(run.folder.path)))
    with pytest.raises(UserError, match="images of its classes set its thresholds"):
        made(photos, name="more", model=str(run.folder.path), add_class="owl", band=None, hidden=128, min_images=30)


def test_s_dis_is_what_it_was(make_folder: MakeFolder) -> None:
    record = record_of(made(make_folder(), rule="s-dis", lambda_inf=0.25))
    assert (record["weight"], record.get("floor")) == (0.25, None)


def test_data_that_taught_cannot_be_held_out(make_folder: MakeFolder) -> None:
    photos = make_folder()
    with pytest.raises(UserError, match="taught nothing"):
        made(photos, held_out=f"imagefolder:{photos}")


def test_every_command_takes_the_run(make_folder: MakeFolder) -> None:
    photos, other = make_folder(), make_folder(12, "other")
    for folder in list(other.iterdir()):  # things that the model does not know
        folder.rename(other / f"no {folder.name}")
    run = made(photos, sigma=[0.05])
    folder, out = str(run.folder.path), photos.parent / "runs"
    data = f"imagefolder:{photos}"
    source = open_data(data)
    clean = evaluate_clean(load_classifier(folder, source.class_names, source.templates), source)
    assert clean.rejected is not None
    for goal in ("misclassify", "deny"):
        attacked = attack(
            model=folder, data=data, goal=goal, attack="pgd:steps=4", eps="8/255", lanes=8, checks="none",
            name=f"attack-{goal}", out=out, device="cpu",
        )  # fmt: skip
        assert attacked.summary.images.evaluated > 0
        assert attacked.report.exists()
    for claim in ("openset", "class", "feature"):
        certified = Certifying(
            model=folder, data=data, claim=claim, samples=300, sigma=0.05, lanes=64, alpha=0.01, limit=6, device="cpu",
            out=out, name=f"certify-{claim}",
        )  # fmt: skip
        assert certified.summary().images == 6
    names = {row["claim"] for row in pq.read_table(out / "certify-openset" / "results.parquet").to_pylist()}
    assert names <= {"openset-accept", "openset-reject"}
    options = {"id": data, "ood": f"imagefolder:{other}", "scores": "mcm,energy", "draws": 100, "fit": "none"}
    assert detect(folder, **options, out=out, name="detect").summary.scores[0].name == "own"


def test_intruders_are_attacked_end_to_end(make_folder: MakeFolder, tmp_path: Path) -> None:
    photos = make_folder()
    run = made(photos)
    # Labelled -1: of no known class. What the model rejects of it, the attack tries to get accepted.
    pictures = []
    for number in range(12):
        file = io.BytesIO()
        values = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(values).save(file, "PNG")
        pictures.append({"bytes": file.getvalue(), "path": f"{number}.png"})
    pq.write_table(pa.table({"image": pictures, "label": [-1] * 12}), tmp_path / "strange.parquet")
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\nfox\n")
    folder = load_immunity_with(run.folder.path, threshold=2.0)
    attacked = attack(
        model=str(folder), data=f"parquet:{tmp_path / 'strange.parquet'}", classes=names, goal="intrude",
        attack="pgd:steps=4", eps="8/255", lanes=8, checks="none", name="intrude", out=tmp_path / "runs", device="cpu",
    )  # fmt: skip
    assert attacked.summary.images.evaluated == 12
    rows = pq.read_table(attacked.folder / "results.parquet").to_pylist()
    assert all(row["label"] == -1 for row in rows)


def load_immunity_with(folder: Path, threshold: float) -> Path:
    """Return a copy of a run whose thresholds reject everything: that is what intruders have to overcome."""
    copy = folder.parent / "strict"
    shutil.copytree(folder, copy)
    card = read_card(copy)
    assert card is not None
    found = load_immunity(copy, card.settings)
    save_tensors(copy, replace(found, thresholds=torch.full_like(found.thresholds, threshold)))
    return copy


def test_open_set_certificates_hold_under_audit_and_follow_the_rule(make_folder: MakeFolder) -> None:
    photos = make_folder()
    run = made(photos, sigma=[0.05])
    settings = {
        "model": str(run.folder.path), "data": f"imagefolder:{photos}", "claim": "openset", "samples": 400,
        "sigma": 0.05, "lanes": 64, "alpha": 0.01, "limit": 4, "device": "cpu", "out": photos.parent / "runs",
    }  # fmt: skip
    certified = Certifying(**settings, name="certified")
    certified.start()
    assert "head" in certified.manifest["model"]
    result = audit_folder(certified.folder.path, Effort(starts=1, steps=2, draws=4, choice=16, evidence=256), limit=2)
    assert result.broken == []
    with pytest.raises(UserError, match="antibodies of its own"):
        Certifying(**settings, antibodies=photos / "x.txt", name="other")


def test_without_thresholds_for_the_noise_the_deployed_rule_is_another_and_not_certified(
    make_folder: MakeFolder,
) -> None:
    photos = make_folder()
    run = made(photos, sigma=[0.05])
    settings = {
        "model": str(run.folder.path), "data": f"imagefolder:{photos}", "claim": "openset", "samples": 400,
        "sigma": 0.1, "lanes": 64, "alpha": 0.01, "limit": 2, "device": "cpu", "out": photos.parent / "runs",
    }  # fmt: skip
    with pytest.raises(
        UserError, match=r"no thresholds for noise of 0\.1 \(only for 0\.05\).*immunize \.\.\. --sigma 0\.1"
    ) as no:
        Certifying(**settings, name="refused")
    assert "\n" not in str(no.value)
    assert not (photos.parent / "runs" / "refused").exists()
    other = Certifying(**settings, tau=0.1, name="other-rule")
    assert "not the decision of the deployed model" in other.manifest["plan"]["statement"]
    own = Certifying(**{**settings, "sigma": 0.05}, name="own-rule")
    assert "stays accepted, or stays rejected" in own.manifest["plan"]["statement"]


def test_a_class_is_added_and_the_others_are_checked(make_folder: MakeFolder, tmp_path: Path) -> None:
    photos = make_folder()
    run = made(photos, prototypes_per_class=2)
    before = (run.folder.path / "immunity.safetensors").read_bytes()
    more = tmp_path / "more" / "owl"
    more.mkdir(parents=True)
    for number in range(12):
        Image.new("RGB", (16, 16), (20 * number, 255 - 20 * number, 90)).save(more / f"{number}.png")
    words = tmp_path / "owls.txt"
    words.write_text("owl: eagle\n")

    def extended(name: str, model: Path | str = run.folder.path, add_class: str = "owl") -> Run:
        data = {"data": f"imagefolder:{more.parent}", "held_out": 0.4, "antibodies": str(words)}
        return prepared(photos, name=name, model=str(model), add_class=add_class, **data)

    extension = extended("more")
    record = extension.start().summary.model_dump()
    assert record == record_of(extension)
    assert [row["name"] for row in record["classes"]] == ["cat", "dog", "fox", "owl"]
    added = record["added"]
    held = record_of(run)["images"]["held_out"]
    paired = added["others"]
    assert paired["both"] + paired["only_first"] + paired["only_second"] + paired["neither"] == held == paired["total"]
    assert (run.folder.path / "immunity.safetensors").read_bytes() == before  # the earlier run stays as it is
    larger = load_classifier(str(extension.folder.path), ("owl", "cat", "dog", "fox"), ["{}"])
    assert larger(torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))).shape == (1, 5)
    # And once more: the larger run has kept what the next class needs.
    with pytest.raises(UserError, match="knows 'owl' already"):
        extended("again", extension.folder.path)
    with pytest.raises(UserError, match="no class 'bat'"):
        extended("bat", add_class="bat")
    with pytest.raises(UserError, match="is none"):
        extended("bare", "tiny")
    with pytest.raises(UserError, match="is the run that the class is added to: choose another name"):
        extended("run")


def test_antibodies_of_an_added_class_are_filtered_as_those_of_a_whole_run(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    photos = make_folder()
    tree = tmp_path / "tree.json"
    tree.write_text(json.dumps({"name": "beast", "children": [{"name": name} for name in ("cat", "dog", "fox")]}))
    run = made(photos, tree=tree, steps=0)
    (tmp_path / "more" / "owl").mkdir(parents=True)
    for number in range(12):
        Image.new("RGB", (16, 16), (20 * number, 255 - 20 * number, 90)).save(
            tmp_path / "more" / "owl" / f"{number}.png"
        )
    words = tmp_path / "all.json"
    entries = {"owl": {"look_alikes": ["eagle", "beast", "hound", "vixen"]}, "dog": {"same": ["hound"]}}
    words.write_text(json.dumps({"classes": entries}))
    more = {"data": f"imagefolder:{tmp_path / 'more'}", "antibodies": str(words), "steps": 50}
    record = record_of(made(photos, name="more", model=str(run.folder.path), add_class="owl", **more))
    assert {text for text, of, _ in record["antibodies"]["kept"] if of == "owl"} == {"eagle", "vixen"}
    reasons = {text: why for text, _, why in record["antibodies"]["dropped"]}
    assert reasons == {"beast": "the superclass 'beast'", "hound": "another name of 'dog', or a kind of it"}
    assert record["vaccine"]["history"] == record["vaccine"]["history"][:1]  # no step: the run itself had none
    # The class that was added is missing from the tree file, which may be gone as well.
    owls = tmp_path / "more" / "owl"
    (tmp_path / "then" / "bat").mkdir(parents=True)
    for path in owls.iterdir():
        shutil.copy(path, tmp_path / "then" / "bat" / path.name)
    then = {"data": f"imagefolder:{tmp_path / 'then'}", "antibodies": str(words), "steps": 50, "add_class": "bat"}
    extended = str(tmp_path / "runs" / "more")
    with pytest.raises(UserError, match=r"'bat'|bat"):  # of which the file knows nothing
        made(photos, name="unknown", model=extended, **then)
    words.write_text(json.dumps({"classes": {"bat": {"look_alikes": ["beast", "swallow"]}}}))
    record = record_of(made(photos, name="twice", model=extended, **then))
    assert {text for text, of, _ in record["antibodies"]["kept"] if of == "bat"} == {"swallow"}
    tree.unlink()
    gone = made(photos, name="gone", model=extended, **then)
    assert any("is gone" in remark for remark in gone.work.facts.remarks or [])


def strangers(folder: Path, **counts: int) -> str:
    """Return a spec of coloured pictures in folders of these names."""
    for place, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            shade = (40 * number + 7 * place) % 256
            Image.new("RGB", (16, 16), (shade, 20, 200 - 50 * place)).save(folder / name / f"{number}.png")
    return f"imagefolder:{folder}"


def test_antibodies_that_name_a_class_of_an_unknown_set_are_left_out_and_said(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    photos = make_folder()
    unknown = strangers(tmp_path / "strange", Jackals=4, thing=3)
    run = made(photos, ood=[f"wild={unknown}"])
    record = record_of(run)
    assert "jackal" not in {text for text, _, _ in record["antibodies"]["kept"]}
    assert ["jackal", "fox", "it names a class of the unknown set 'wild'"] in record["antibodies"]["dropped"]
    assert any(
        "1 antibodies that name classes of the unknown sets were left out (jackal)" in n for n in record["notes"]
    )
    oracle = made(photos, name="oracle", ood=[f"wild={unknown}"], oracle_words=True)
    kept = record_of(oracle)
    assert "jackal" in {text for text, _, _ in kept["antibodies"]["kept"]}
    assert any(note.startswith("Oracle: 1 antibodies") for note in kept["notes"])
    summary = read_run(oracle.folder.path).summary
    assert view.tone(summary.measures, summary.notes) != "held"
    assert list(summary.measures.unknown) == ["wild"]
    assert "of wild" in view.verdict(summary.measures)
    # A finished run keeps its antibodies, and `detect` says what they are to the sets that it is judged on.
    options = {"id": f"imagefolder:{photos}", "ood": f"near={unknown}", "draws": 100, "scores": "own,msp"}
    summary = detect(str(oracle.folder.path), **options, device="cpu", out=tmp_path, name="judged").summary
    assert any("Oracle: 1 antibodies of the model name classes" in check.message for check in summary.checks)
    plain = detect(str(run.folder.path), **options, device="cpu", out=tmp_path, name="plain").summary
    assert not any("Oracle" in check.message for check in plain.checks)


def test_the_record_says_how_many_unknown_images_are_rejected_and_known_ones_refused(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    unknown = strangers(tmp_path / "strange", thing=6, Cats=4)
    run = made(make_folder(), ood=[unknown])
    record = record_of(run)
    measured = record["measures"]["unknown"][unknown]
    assert (measured["images"], measured["known_classes"]) == (6, {"cat": 4})
    assert measured["rejected"]["successes"] == 6 - measured["accepted"]["successes"]
    # Against the model itself, image by image.
    classifier = load_classifier(str(run.folder.path), ("cat", "dog", "fox"), ["{}"])
    pixels = [np.asarray(Image.open(tmp_path / "strange" / "thing" / f"{n}.png")) for n in range(6)]
    with torch.no_grad():
        out = classifier(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255)
    assert measured["rejected"]["successes"] == int((out[:, -1] <= 0).sum())
    assert any("known classes were left out" in note and "cat (4)" in note for note in record["notes"])
    measures = read_run(run.folder.path).summary.measures
    said = view.verdict(measures)
    share = percent(measured["rejected"]["value"])
    assert said.startswith(f"Of unknown images the model rejects, at its own thresholds, {share} (")
    assert f"wrongly refuses {percent(record['measures']['rejected']['value'])} (" in said
    page = run.folder.report_path.read_text()
    assert share in page
    assert "Unknown images rejected" in page
    assert "Known images wrongly refused" in page
    without = measures.model_copy(update={"unknown": {}})
    assert "has not been measured: pass --ood DATA" in view.verdict(without)
    assert view.tone(without, []) == "neutral"


@pytest.mark.parametrize(
    ("rejected", "refused", "tone"), [(98, 3, "held"), (98, 30, "neutral"), (80, 3, "neutral"), (30, 3, "")]
)
def test_the_colour_of_the_verdict_says_what_it_means(rejected: int, refused: int, tone: str) -> None:
    half = Interval(0.5, 0.4, 0.6, "made up")
    # The second is of the time when the accepted alone were kept.
    told = (
        Unknown(images=100, auroc_msp=half, auroc=half, accepted=rate(0, 100), rejected=rate(rejected, 100)),
        Unknown(images=100, auroc_msp=half, auroc=half, accepted=rate(100 - rejected, 100)),
    )
    for unknown in told:
        assert view.tone(Measures(unknown={"x": unknown}, rejected=rate(refused, 100)), []) == tone


def test_copies_of_a_drawing_count_once_in_what_is_said_of_the_model() -> None:
    """Every share has the interval of as many images as there are drawings, and so has the colour of the verdict."""
    axes, count = torch.eye(4), 400
    adapter = Adapter(4, 2).eval().requires_grad_(False)
    immunity = Immunity(
        ("a", "b"), axes[:2, None], Antibodies((), torch.zeros(0, 4)), 0.0, torch.full((2,), 0.5), adapter
    )
    ids = tuple(str(row) for row in range(count))

    def measured(groups: tuple[str, ...]) -> Measures:
        held = Features(axes[torch.arange(count) % 2], torch.arange(count) % 2, ids, groups)
        far = Features(axes[2:3].repeat(count, 1), torch.full((count,), -1), ids, groups)
        return measure(immunity, axes[:2], 10.0, held, {"far": far})

    alone, copies = measured(ids), measured(tuple(str(row // 40) for row in range(count)))
    assert view.tone(alone, []) == "held"
    assert view.tone(copies, []) == "neutral"
    for name in ("accuracy_before", "accuracy_after", "accepted_right", "rejected", "rejected_right"):
        one, many = getattr(alone, name), getattr(copies, name)
        assert one.value == many.value
        assert one.high - one.low < many.high - many.low


def test_images_that_the_model_was_sure_of_before_do_not_tie() -> None:
    """At a scale of 100 the softmax is 1 in float32 for known and unknown images alike; its log-odds differ."""
    axes, scale = torch.eye(4), 100.0
    adapter = Adapter(4, 2).eval().requires_grad_(False)
    immunity = Immunity(("a", "b"), axes[:2, None], Antibodies((), torch.zeros(0, 4)), 0.0, torch.zeros(2), adapter)
    near, far = (torch.tensor([[c, 0.0, (1 - c * c) ** 0.5, 0.0]]).repeat(20, 1) for c in (0.9, 0.5))
    ids = tuple(map(str, range(20)))
    held = Features(near, torch.zeros(20, dtype=torch.int64), ids, ids)
    found = measure(immunity, axes[:2], scale, held, {"far": Features(far, torch.full((20,), -1), ids, ids)})
    assert found.unknown["far"].auroc_msp.value == 1.0
    old = found.unknown["far"].model_dump()
    old["auroc_mcm"] = old.pop("auroc_msp")
    assert Unknown(**old) == found.unknown["far"]


def test_held_out_copies_and_unreadable_images_are_said(make_folder: MakeFolder, tmp_path: Path) -> None:
    photos = make_folder()
    again = tmp_path / "again"
    shutil.copytree(photos, again)
    for number, path in enumerate(sorted(again.rglob("*.png"))):
        path.rename(path.with_name(f"copy-{number}.png"))
    (photos / "cat" / "broken.png").write_bytes(b"no picture")
    record = record_of(made(photos, held_out=f"imagefolder:{again}"))
    assert any(
        note.startswith("36 held-out images look to the model like images that taught") for note in record["notes"]
    )
    assert any(f"1 images of 'imagefolder:{photos}' could not be read" in note for note in record["notes"])
