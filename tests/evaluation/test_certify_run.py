"""Certify runs: resumed to the bit, the same in any number of processes, and what they note or refuse."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from certifying import Certifying, Interrupt, prepared, rows

from robustvlm.certify import Certificate
from robustvlm.certify.noise import Address
from robustvlm.commands.certify.record import source
from robustvlm.commands.certify.run import CertifyWork, finish
from robustvlm.commands.certify.store import CertifyLedger
from robustvlm.core.ranks import Ranks
from robustvlm.errors import UserError
from robustvlm.runs.settings import Observer

MakeFolder = Callable[..., Path]


@pytest.mark.equality
@pytest.mark.parametrize(
    "options",
    [{"claim": "feature"}, {"claim": "feature", "radius": 0.02}, {"claim": "class", "radius": 0.01}, {"claim": "vote"}],
)
def test_interrupted_runs_end_with_the_same_rows(make_folder: MakeFolder, options: dict[str, Any]) -> None:
    photos = make_folder(6)
    whole = prepared(photos, name="whole", **options)
    summary = whole.summary()
    assert summary.images == 6
    assert (summary.spread is not None) == (options["claim"] == "feature")
    assert all((point.apart is None) == (summary.spread is None) for point in summary.at)
    for images in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            prepared(photos, **options).summary(Interrupt(images))
    pieces = prepared(photos, **options)
    assert pieces.summary(resume=True).mean_radius == summary.mean_radius
    assert rows(pieces) == rows(whole)
    again = prepared(photos, **options).summary(Interrupt(0))  # finished: nothing is done
    assert (again.mean_radius, again.spread, again.at) == (summary.mean_radius, summary.spread, summary.at)


def test_every_row_has_the_record_of_its_certificate(make_folder: MakeFolder) -> None:
    run = prepared(make_folder(3), claim="feature", deployed=500, min_cos=0.4)
    run.summary()
    for row in rows(run):
        record = Certificate.from_dict(json.loads(row["certificate"]))
        assert record.radius == row["radius"]
        assert record.cos0 == 0.4
        assert record.r == row["r"]
        how = record.provenance
        assert (how.n, how.n_pilot, how.alpha, how.deployed_n0) == (300, 0, 0.01, 500)
        address = Address(0, row["image_id"], record.image, str(run.config.noise))
        assert how.seeds == {stage: address.stream(stage) for stage in ("pilot", "estimation")}
        assert (record.image_id, how.sigma, how.resize_norm) == (row["image_id"], 0.05, 1.0)
        assert record.rule.startswith("the mean feature m over the noise, of infinitely many copies")
        assert record.deployed_radius == row["deployed_radius"]
        assert how.encoder.endswith(":fp32")
        assert how.direction_source == "predictable"
        assert row["n"] + row["n_pilot"] == 300
        assert 0.0 <= row["deployed_radius"] <= row["radius"]
        assert row["paper_radius"] <= row["radius"]


def test_processes_share_the_images_and_find_the_same(make_folder: MakeFolder) -> None:
    photos = make_folder(5)
    alone = prepared(photos, name="alone")
    alone.summary()
    shared = prepared(photos, name="shared")
    assert isinstance(shared.work, CertifyWork)
    with shared.folder.opened(shared.manifest) as manifest:
        ledgers = [CertifyLedger(shared.folder, rank=rank, session="s") for rank in (0, 1)]
        for rank, ledger in enumerate(ledgers):
            shared.work.begin(ledger, Observer(), Ranks(rank=rank, size=2)).run()
        assert [len(ledger.found) for ledger in ledgers] == [3, 2]
        ledgers[0].sync()
        finish(ledgers[0], manifest, str)
        for ledger in ledgers:
            ledger.close()
    assert rows(shared) == rows(alone)
    assert ledgers[0].cost.forward_passes > 5 * 300


def test_a_rank_waits_for_all_that_the_others_have_written(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of a network may show a file late; one that the machines do not share never does."""
    run = prepared(make_folder(2), name="late")
    with run.folder.opened(run.manifest):
        ledger = CertifyLedger(run.folder, rank=0, session="s")
        other = run.folder.journal_of(1)
        text = json.dumps({"kind": "run", "id": ledger.owner}) + "\n"
        text += json.dumps({"kind": "unreadable", "index": 7, "id": "far", "reason": "damaged"}) + "\n"

        class Two(Ranks):
            def gathered(self, text_of_rank_0: str) -> list[str]:
                return [text_of_rank_0, str(len(text))]

        ledger.meet(Two(rank=0, size=2))
        threading.Timer(0.3, lambda: other.write_text(text)).start()
        ledger.sync()
        assert [image.id for image in ledger.unreadable] == ["far"]
        monkeypatch.setattr("robustvlm.commands.common.store._SEEN_SECONDS", 0.2)
        other.unlink()
        with pytest.raises(UserError, match=rf"'.*journal-1.jsonl' has 0 of the {len(text)} bytes .* see one folder"):
            ledger.sync()
        ledger.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 8}, r"8 samples at sigma 0.05 .* any radius for no image.* samples=\d+ or more"),
        ({"claim": "feature", "radius": 0.19}, "at best 0.1.* samples=.* or more"),
        ({"claim": "feature", "radius": 5.0}, "no number of samples does it"),
        ({"claim": "feature", "min_cos": 1.0}, "below 1"),
        ({"claim": "faeture"}, "did you mean 'feature'"),
        ({"claim": "openset"}, "pass tau"),
        ({"tau": 0.3}, "claim=openset"),
        ({"claim": "openset", "tau": 0.1, "deployed": 64}, "deployed is for feature, class and vote claims"),
        ({"claim": ""}, "unknown claim ''"),
        ({"sigma": 1e30}, "sigma must be above 0 and at most 10"),
        ({"sigma": float("nan")}, "sigma must be above 0"),
        ({"alpha": float("nan")}, "alpha must lie strictly between"),
        ({"alpha": 1.0 - 2.0**-53}, "at most 0.5"),
        ({"samples": 10**15}, "samples must be at most 10,000,000"),
        ({"claim": "openset", "tau": float("nan")}, "pass tau"),
        ({"claim": "openset", "tau": 0.1, "weight": float("inf")}, "finite number that is not negative"),
        ({"radius": float("nan")}, "radius must be a positive number"),
        ({"at": "0.1,nan"}, "at must be a positive number"),
        ({"sigma": -1.0}, "sigma must be above 0"),
        ({"threat": "rotation", "claim": "vote", "sigma": 0.0}, r"sigma must be above 0 .*\(l2, pixels in \[0, 1\]\)"),
        ({"alpha": 1.0}, "alpha must lie strictly between"),
        ({"cache": "int8"}, "float16 or float32"),
        ({"cache": "float16", "radius": 0.1}, "leave out radius"),
        ({"at": "0.1,x"}, "cannot read the radii"),
        ({"radius": 0.0}, "radius must be a positive number"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"precision": "fp8"}, "unknown precision"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_any_work(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    """The model and the data do not even exist: these mistakes are found first."""
    given = {"model": "nowhere", "data": f"imagefolder:{tmp_path}/none", "claim": "class", "sigma": 0.05, **options}
    with pytest.raises(UserError, match=message) as caught:
        Certifying(**given, out=tmp_path)
    assert "--" not in str(caught.value)  # a Python caller reads arguments, not flags
    assert not [*tmp_path.iterdir()]


def test_a_smoothed_model_is_certified_at_its_own_noise(make_folder: MakeFolder) -> None:
    photos = make_folder(2)
    plain = prepared(photos, sigma=0.03, claim="vote", name="plain")
    smoothed = prepared(photos, "Encoder+smooth:0.03:8", sigma=None, claim="vote", name="smoothed")
    plain.summary()
    smoothed.summary()
    assert smoothed.config.sigma == 0.03
    assert [row["radius"] for row in rows(smoothed)] == [row["radius"] for row in rows(plain)]
    with pytest.raises(UserError, match="leave out sigma"):
        prepared(photos, "Encoder+smooth:0.03", sigma=0.1)


@pytest.mark.parametrize("precision", ["bf16", "fp64"])
def test_another_precision_is_another_encoder(make_folder: MakeFolder, precision: str) -> None:
    photos = make_folder(2)
    base = prepared(photos, claim="feature", name="base")
    other = prepared(photos, claim="feature", precision=precision)
    base.summary()
    other.summary()
    dtypes = {"bf16": "bfloat16", "fp64": "float64"}
    for mine, theirs in zip(rows(base), rows(other), strict=True):
        record = Certificate.from_dict(json.loads(theirs["certificate"]))
        assert record.provenance.dtype == dtypes[precision]
        assert record.provenance.encoder != Certificate.from_dict(json.loads(mine["certificate"])).provenance.encoder
        assert theirs["r"] == pytest.approx(mine["r"], abs=0.02)  # its noise is its own


def test_an_encoder_that_mixes_images_is_refused(make_folder: MakeFolder) -> None:
    with pytest.raises(UserError, match="depending on the others in its batch"):
        prepared(make_folder(2), "Coupled").summary()


@pytest.mark.parametrize("model", ["Random", "Gated"])
def test_a_random_encoder_is_certified_with_a_warning(make_folder: MakeFolder, model: str) -> None:
    summary = prepared(make_folder(2), model, claim="feature").summary()
    assert [check.name for check in summary.checks] == ["random encoder"]


def test_a_random_encoder_s_certificates_are_the_same_when_made_again(make_folder: MakeFolder) -> None:
    photos, made = make_folder(3), []
    for name in ("first", "second"):
        torch.manual_seed(len(made))  # what else drew before does not matter
        run = prepared(photos, "Random", claim="feature", name=name)
        state = torch.get_rng_state()
        run.summary()
        assert torch.equal(torch.get_rng_state(), state)
        made.append([(row["r"], row["radius"]) for row in rows(run)])
    assert made[0] == made[1]
    assert len({r for r, _ in made[0]}) == 3


def test_memory_for_few_rows_is_used_and_noted(make_folder: MakeFolder) -> None:
    photos = make_folder(2)
    summary = prepared(photos, "SmallMemory").summary()
    assert [check.name for check in summary.checks] == ["lanes"]
    assert summary.images == 2


def test_failed_passes_are_counted_and_images_not_lost(make_folder: MakeFolder) -> None:
    summary = prepared(make_folder(2), "NaNOffGrid", claim="feature").summary()
    assert summary.failed_samples == 2 * 300
    assert summary.abstained.successes == 2


def test_unreadable_images_are_named_and_skipped(make_folder: MakeFolder) -> None:
    photos = make_folder(3)
    (photos / "cat" / "broken.png").write_bytes(b"no picture")
    summary = prepared(photos).summary()
    assert summary.images == 3
    assert summary.unreadable_images == 1
    assert "broken" in summary.unreadable[0].id


def test_a_changed_setting_is_not_mixed_into_a_run(make_folder: MakeFolder) -> None:
    photos = make_folder(2)
    prepared(photos).summary()
    with pytest.raises(UserError, match=r"alpha: 0\.01 -> 0\.02"):
        prepared(photos, alpha=0.02).summary()
    fresh = prepared(photos, alpha=0.02)
    assert fresh.summary(fresh=True).risk.expected_false == pytest.approx(0.04)


def test_nothing_is_stated_of_the_source_of_a_picture_that_was_resized(make_folder: MakeFolder) -> None:
    from PIL import Image

    photos = make_folder(2)
    Image.new("RGB", (40, 24), (200, 30, 30)).save(photos / "cat" / "large.png")
    run = prepared(photos)
    summary = run.summary()
    norms = {row["image_id"]: row["resize_norm"] for row in rows(run)}
    assert sorted(norms.values(), key=str) == [1.0, 1.0, None]
    assert norms[next(name for name in norms if "large" in name)] is None
    records = [json.loads(row["certificate"])["provenance"]["resize_norm"] for row in rows(run)]
    assert records == [row["resize_norm"] for row in rows(run)]
    assert summary.resized == 1
    assert "1 of 3 images were resized first and rounded to 8 bits" in source(summary)
