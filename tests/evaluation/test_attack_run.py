"""Attack runs: the same answer whatever interrupts them, however many lanes, and whatever ran before."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from attacking import CURVE, Attacking, Interrupt, outcomes, pictures, prepared, rows, run_in_pieces, table
from safetensors.torch import load_file

from robustvlm.attacks.oracle import Oracle
from robustvlm.commands.attack.store import Ledger
from robustvlm.commands.common.store import read_journal
from robustvlm.data import open_data, select, to_pixels
from robustvlm.errors import UserError

Photos = Callable[..., Path]


@pytest.fixture(autouse=True)
def _quick_and_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick_and_apart(tmp_path, monkeypatch)


def quick_and_apart(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No drawing of reports, which takes longer than the runs, no calls of git, and a cache of the test's own."""

    def write_report(folder: Path) -> None:
        (folder / "report.html").write_text("report")

    monkeypatch.setattr("robustvlm.commands.attack.work.write_report", write_report)
    monkeypatch.setattr("robustvlm.runs.manifest.git_commit", lambda: None)
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_: str(place / "cache"))


@pytest.fixture(scope="module")
def kept(all_photos: Path) -> Path:
    """A copy of the folder of runs, with a finished one over three eps and two attacks."""
    with pytest.MonkeyPatch.context() as patch:
        quick_and_apart(all_photos.parent, patch)
        prepared(all_photos, name="straight", **CURVE).run()
    return shutil.copytree(all_photos.parent / "runs", all_photos.parent / "kept")


@pytest.fixture
def straight(all_photos: Path, kept: Path) -> Attacking:
    """The finished run as it was, alone in its place whatever the test before did to it."""
    runs = all_photos.parent / "runs"
    shutil.rmtree(runs)
    shutil.copytree(kept, runs)
    return prepared(all_photos, name="straight", **CURVE)


@pytest.mark.equality
@pytest.mark.parametrize("seed", range(5))
def test_interrupted_anywhere_and_resumed_is_the_same_to_the_bit(
    straight: Attacking, all_photos: Path, seed: int
) -> None:
    draws = random.Random(seed)
    pieces = [draws.randrange(90) for _ in range(4)]
    again = run_in_pieces(lambda: prepared(all_photos, **CURVE), pieces)
    assert table(again).equals(table(straight)), f"interrupted after {pieces}"
    assert pictures(again.folder.gallery_path) == pictures(straight.folder.gallery_path)
    assert len(pictures(again.folder.gallery_path)) == 12


@pytest.mark.equality
def test_killed_among_its_first_questions_a_run_ends_with_all_of_their_answers(make_folder: Photos) -> None:
    """At every byte of the line that holds them, and before and after it."""
    photos = make_folder(8)
    run = prepared(photos, attack="pgd:steps=2", checks="quick")
    asked = {check.name for check in run.run().checks}
    journal = run.folder.journal_path
    assert {"finite output", "logits", "gradient as stated"} <= asked
    lines = journal.read_bytes().splitlines(keepends=True)
    number = next(number for number, line in enumerate(lines) if json.loads(line)["kind"] == "checks")
    before, line = b"".join(lines[:number]), lines[number]
    for kept in (0, len(line) // 3, len(line) - 1, len(line)):
        shutil.rmtree(run.folder.gallery_path, ignore_errors=True)
        for made in ("results.parquet", "summary.json", "checksums.json", "report.html"):
            (run.folder.path / made).unlink(missing_ok=True)
        journal.write_bytes(before + line[:kept])
        again = prepared(photos, attack="pgd:steps=2", checks="quick").run()
        assert {check.name for check in again.checks} == asked, f"killed after {kept} bytes"


@pytest.mark.equality
@pytest.mark.parametrize("seed", range(6))
def test_killed_at_any_byte_of_the_journal_and_resumed_is_the_same(straight: Attacking, seed: int) -> None:
    expected, shown = table(straight), pictures(straight.folder.gallery_path)
    journal = straight.folder.journal_path.read_bytes()
    straight.folder.journal_path.write_bytes(journal[: random.Random(seed).randrange(len(journal))])
    left = {fact["index"] for fact in read_journal(straight.folder.journal_path) if fact.get("outcome") == "fooled"}
    for path in (straight.folder.summary_path, straight.folder.results_path, straight.folder.report_path):
        path.unlink()
    if len(left) < 12:  # then no picture had been evicted yet
        for path in straight.folder.gallery_path.iterdir():
            if int(path.stem) not in left:
                path.unlink()
    straight.run()
    assert table(straight).equals(expected)
    assert pictures(straight.folder.gallery_path).keys() == shown.keys()


def test_every_lane_count_decides_every_image_alike(make_folder: Photos) -> None:
    photos = make_folder(10)
    found = []
    for lanes in (1, 7, 64):
        run = prepared(photos, name=f"lanes{lanes}", **(CURVE | {"lanes": lanes, "precision": "fp64"}))
        run.run()
        found.append((outcomes(run), [row["margin"] for row in rows(run)]))
    assert found[0][0] == found[1][0] == found[2][0]
    assert found[1][1] == pytest.approx(found[0][1], abs=1e-4)
    assert found[2][1] == pytest.approx(found[0][1], abs=1e-4)


def test_a_finished_run_is_given_back_without_asking_the_model(
    straight: Attacking, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the model was asked again")

    summary = json.loads(straight.folder.summary_path.read_text())
    before = {path: path.read_bytes() for path in straight.folder.path.iterdir() if path.is_file()}
    monkeypatch.setattr(Oracle, "confirm", refuse)
    monkeypatch.setattr(Oracle, "gradient", refuse)
    assert straight.run().model_dump(mode="json") == summary
    assert straight.run(resume=True).model_dump(mode="json") == summary
    assert before == {path: path.read_bytes() for path in straight.folder.path.iterdir() if path.is_file()}
    straight.folder.report_path.unlink()
    straight.run()
    assert straight.folder.report_path.exists(), "a crash before the report must not leave the run without one"


@pytest.mark.parametrize("lost", ["results.parquet", "summary.json"])
def test_lost_results_are_made_again_from_the_journal(straight: Attacking, lost: str) -> None:
    expected = table(straight)
    (straight.folder.path / lost).unlink()
    summary = straight.run()
    assert table(straight).equals(expected)
    assert summary.model_dump(mode="json") == json.loads(straight.folder.summary_path.read_text())


def test_fresh_does_the_work_again_with_the_same_answer(straight: Attacking) -> None:
    expected, shown = table(straight), pictures(straight.folder.gallery_path)
    (straight.folder.gallery_path / "000099.safetensors").write_bytes(b"of an earlier run")
    straight.run(fresh=True)
    assert table(straight).equals(expected)
    assert pictures(straight.folder.gallery_path) == shown


def test_a_larger_eps_never_helps_the_model_and_the_fallen_are_not_attacked_again(straight: Attacking) -> None:
    summary = straight.run()
    assert [at.eps_text for at in summary.per_eps] == ["1/255", "2/255", "4/255"]
    fooled = [at.attack_success_rate.value or 0.0 for at in summary.per_eps]
    robust = [at.robust_accuracy.value or 0.0 for at in summary.per_eps]
    assert 0 < fooled[0] < fooled[2]
    assert fooled == sorted(fooled)
    assert robust == sorted(robust, reverse=True)
    # Rows come by eps and attack, which is the order of the stages.
    for _, group in itertools.groupby(sorted(rows(straight), key=lambda row: row["index"]), lambda row: row["index"]):
        sequence = [row["outcome"] for row in group]
        if "fooled" in sequence:
            at = sequence.index("fooled")
            assert set(sequence[:at]) <= {"robust"}
            assert set(sequence[at + 1 :]) <= {"skipped"}
        else:
            assert set(sequence) <= {"robust"} or set(sequence) == {"clean_wrong"}
    attacked = [row for row in rows(straight) if row["outcome"] in ("fooled", "robust")]
    assert all(row["passes"] > 0 for row in attacked)
    assert all(row["linf"] <= row["eps"] for row in attacked)


def test_limits_are_nested_and_chosen_by_id_alone(make_folder: Photos) -> None:
    photos = make_folder()
    found = {}
    for limit in (5, 12, 36, 1000):
        run = prepared(photos, name=f"limit{limit}", limit=limit)
        assert run.run().images.evaluated == min(limit, 36)
        found[limit] = {row["image_id"]: row["outcome"] for row in rows(run)}
    assert set(found[12]) == set(select(open_data(f"imagefolder:{photos}").ids() or [], 12))
    for small, large in itertools.pairwise(found.values()):
        assert small.items() <= large.items(), "an image's outcome does not depend on which others are attacked"


def test_the_seed_decides_the_draws_and_nothing_else_does(make_folder: Photos) -> None:
    photos = make_folder(20)
    runs = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run = prepared(photos, name=name, seed=seed, attack="apgd-ce:steps=2", eps="1/255")
        run.run()
        runs[name] = table(run)
    assert runs["a"].equals(runs["b"])
    assert runs["a"].column("margin") != runs["c"].column("margin")
    assert runs["a"].column("clean_margin") == runs["c"].column("clean_margin")


def test_images_of_a_run_in_float64_are_saved_in_it_and_so_stay_in_the_ball(make_folder: Photos) -> None:
    run = prepared(make_folder(6), precision="fp64", attack="pgd:steps=2", eps="4/255", save_adversarial=True, lanes=6)
    run.run()
    saved = [load_file(path) for path in sorted(run.folder.adversarial_path.iterdir())]
    assert saved
    for pair in saved:
        assert {tensor.dtype for tensor in pair.values()} == {torch.float64}
        assert float((pair["adversarial"] - pair["clean"]).abs().max()) <= 4 / 255


@pytest.mark.parametrize(("norm", "eps"), [("Linf", "2/255"), ("L2", "0.15")])
def test_saved_adversarial_images_are_what_the_rows_say(make_folder: Photos, norm: str, eps: str) -> None:
    photos = make_folder(24)
    run = prepared(photos, norm=norm, eps=eps, save_adversarial=True)
    run.run()
    fooled = [row for row in rows(run) if row["outcome"] == "fooled"]
    files = {int(path.stem): path for path in run.folder.adversarial_path.iterdir()}
    assert files.keys() == {row["index"] for row in fooled}
    assert len(files) > 3
    images = {sample.id: sample for sample in run.work.source.samples()}
    for row in fooled:
        tensors = load_file(files[row["index"]])
        clean, adversarial = tensors["clean"], tensors["adversarial"]
        assert torch.equal(clean, to_pixels(images[row["image_id"]].image, 16))
        assert adversarial.min() >= 0
        assert adversarial.max() <= 1
        delta = (adversarial.double() - clean.double()).flatten()
        assert delta.abs().max().item() == row["linf"]
        assert delta.norm().item() == pytest.approx(row["l2"], rel=1e-12)
        assert row["linf" if norm == "Linf" else "l2"] <= row["eps"]
        prediction = run.work.classifier(adversarial[None]).argmax(1).item()
        assert prediction == row["adversarial_prediction"] != row["label"]


def test_other_settings_under_the_same_name_are_refused_by_key(straight: Attacking, all_photos: Path) -> None:
    before = straight.folder.journal_path.read_bytes()
    changed = prepared(all_photos, name="straight", **(CURVE | {"seed": 3, "lanes": 4}))
    with pytest.raises(UserError, match="lanes: 8 -> 4; seed: 0 -> 3"):
        changed.run()
    more = all_photos / "cat" / "more.png"
    shutil.copy(next(more.parent.iterdir()), more)
    try:
        grown = prepared(all_photos, name="straight", **CURVE)
        with pytest.raises(UserError, match=r"data fingerprint: .*; data images: 36 -> 37"):
            grown.run()
    finally:
        more.unlink()
    first = next(more.parent.iterdir())
    whole = first.read_bytes()
    try:
        first.write_bytes(whole[:-1] + b"?")  # of the same size
        with pytest.raises(UserError, match=r"other settings \(data content: \w+ -> \w+\)"):
            prepared(all_photos, name="straight", **CURVE).run()
    finally:
        first.write_bytes(whole)
    assert straight.folder.journal_path.read_bytes() == before


def test_settings_find_their_run_again_and_others_do_not(make_folder: Photos) -> None:
    photos = make_folder(6)
    names = [
        prepared(photos, name=None, **changes).folder.name  # type: ignore[arg-type]
        for changes in ({}, {}, {"seed": 1}, {"model": "Random"}, {"limit": 3})
    ]
    assert names[0] == names[1]
    assert len(set(names)) == 4


def test_costs_of_interrupted_sessions_add_up(make_folder: Photos) -> None:
    photos = make_folder()
    whole = prepared(photos, name="whole").run().cost
    split = run_in_pieces(lambda: prepared(photos, name="split"), [20, 30])
    cost = split.run().cost
    assert cost.forward_passes >= whole.forward_passes > 0
    assert cost.backward_passes >= whole.backward_passes > 0
    assert cost.seconds >= cost.model_seconds > 0
    assert cost.passes_per_second == pytest.approx((cost.forward_passes + cost.backward_passes) / cost.seconds)


def test_ctrl_c_reaches_the_caller_and_frees_the_run(make_folder: Photos) -> None:
    photos = make_folder(12)
    with pytest.raises(KeyboardInterrupt):
        prepared(photos).run(Interrupt(3))
    run = prepared(photos)
    assert not run.folder.finished
    assert run.run(resume=True).images.evaluated == 12


def test_a_class_shown_to_be_out_of_reach_is_not_walked_to_again(make_folder: Photos) -> None:
    folder = make_folder(24)
    plan = {"attack": "apgd-t:steps=4,fab-t:steps=10", "eps": "0.5/255,1/255"}
    run = prepared(folder, name="straight", **plan)
    run.run()
    ledger = Ledger(run.folder)
    spared = 0
    for (eps, goal, attack, index), fact in ledger.found.items():
        if attack.startswith("fab-t") and fact.outcome == "robust":
            targets = set(ledger.clean[index].targets)
            known = set(ledger.beyond(eps, goal, index)) - set(fact.beyond)
            assert fact.passes <= 2 * len(known) + 2 * 11 * len(targets - known)
            assert all(radius > eps for radius in fact.beyond.values())
            spared += len(known)
    assert spared > 10
    again = run_in_pieces(lambda: prepared(folder, **plan), [15, 20, 10])
    assert table(again).equals(table(run))
