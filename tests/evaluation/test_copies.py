"""Intervals of attacks and certificates count copies of one thing once, and the run says how many things there are."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import beta

import robustvlm as rv
from robustvlm.commands.attack.compare import comparison_report, untold_copies
from robustvlm.commands.certify.record import certified, share_lines
from robustvlm.data import open_data
from robustvlm.data.emoji import EmojiSource
from robustvlm.data.source import select
from robustvlm.errors import UserError
from robustvlm.report.page import page_of
from robustvlm.stats import Rate


def told(run: Any) -> list[str]:
    return [check.message for check in run.summary.checks if check.name == "copies"]


def worth(ids: list[str]) -> float:
    """Kish's effective size, written out: an id is STYLE/DRAWING/COPY behind the name of the set."""
    sizes = Counter(name.rsplit("/", 1)[0] for name in ids).values()
    return len(ids) / (sum(size * size for size in sizes) / len(ids))


def is_of(found: Rate, independent: float) -> bool:
    """Whether an interval is that of so many images, by the quantiles of the beta distribution."""
    hits, misses = (share * independent for share in (found.successes / found.total, 1 - found.successes / found.total))
    low = beta.ppf(0.025, hits, misses + 1) if hits else 0.0
    high = beta.ppf(0.975, hits + 1, misses) if misses else 1.0
    return (found.low, found.high) == pytest.approx((low, high))


def test_an_attack_says_how_many_independent_images_there_are(tmp_path: Path) -> None:
    few: dict[str, Any] = {"attack": "pgd:steps=1", "checks": "none", "limit": 24, "out": tmp_path}
    run = rv.attack("tiny", data="emoji?split=test", **few)
    ids = run.rows.column("image_id").unique().to_pylist()
    assert len(ids) == 24 > worth(ids)
    assert told(run)[0].startswith(f"24 images are worth {worth(ids):.0f} independent ones")
    assert run.summary.images.worth == pytest.approx(worth(ids))
    at = run.summary.per_eps[0]
    assert at.robust_accuracy.total == 24
    assert is_of(at.robust_accuracy, worth(ids))
    assert not is_of(at.robust_accuracy, 24)
    alone = rv.attack("tiny", data="emoji?split=test&copies=1", **few)
    assert told(alone) == []
    assert is_of(alone.summary.per_eps[0].robust_accuracy, 24)


def test_a_stopped_attack_counts_the_copies_that_it_has_not_come_to(tmp_path: Path) -> None:
    few: dict[str, Any] = {"attack": "pgd:steps=1", "checks": "none", "limit": 40, "out": tmp_path, "lanes": 4}
    run = rv.attack("tiny", data="emoji?split=test", budget="60passes", **few)
    images = run.summary.images
    assert min(images.waiting, images.evaluated) > 0
    ids = select(open_data("emoji?split=test").ids() or [], 40)
    assert is_of(run.summary.clean_accuracy, worth(ids))
    assert images.worth == pytest.approx(worth(run.rows.column("image_id").unique().to_pylist()))


def test_a_comparison_says_of_copies_that_ids_do_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few: dict[str, Any] = {"attack": "pgd:steps=1", "checks": "none", "limit": 6, "out": tmp_path}
    data = "emoji?split=test&copies=1"
    known = rv.attack("tiny", data=data, **few)
    monkeypatch.setattr(EmojiSource, "group", lambda *_: "one film")
    run = rv.attack("tiny", data=data, name="film", **few)
    assert not untold_copies(rv.open_run(known.folder))
    assert untold_copies(rv.open_run(run.folder))
    page = page_of(comparison_report([run, run], rv.compare(run, run)))
    assert "ids do not tell them" in page
    assert "ids do not tell them" not in page_of(comparison_report([known, known], rv.compare(known, known)))


@pytest.mark.parametrize("answer", [["film"], None, ""])
def test_a_source_that_names_no_thing_is_refused_before_any_work(tmp_path: Path, answer: Any) -> None:
    class Films(EmojiSource):
        def group(self, image_id: str) -> str:
            del image_id
            return answer  # type: ignore[no-any-return]

    source = Films.from_options({"split": "test", "copies": "1"})
    with pytest.raises(UserError, match=r"group\('emoji/.*' must return a text that names what the image is a copy of"):
        rv.attack("tiny", data=source, attack="pgd:steps=1", checks="none", limit=4, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_certificates_say_it_too_and_so_do_those_from_kept_features(tmp_path: Path) -> None:
    run = rv.certify("tiny", data="emoji?split=test", limit=11, samples=60, cache="float16", out=tmp_path)
    ids = run.rows.column("image_id").to_pylist()
    assert told(run)[0].startswith(f"11 images are worth {worth(ids):.0f} independent ones")
    again = rv.certify("tiny", from_cache=str(run.folder), prompts="independent", out=tmp_path)
    assert told(again) == told(run)
    drawn, whole = share_lines(run)[0].rates[0], certified(run.summary)  # the curve begins where the table ends
    assert (drawn.low, drawn.high) == pytest.approx((whole.low, whole.high))
    for one in (run.summary, again.summary):
        assert one.worth == pytest.approx(worth(ids))
        assert is_of(one.abstained, worth(ids))


def test_kept_features_whose_ids_do_not_tell_copies_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a source of one's own: what its images are copies of stands in no file."""
    monkeypatch.setattr(EmojiSource, "group", lambda *_: "one film")
    run = rv.certify("tiny", data="emoji?split=test&copies=1", limit=4, samples=100, cache="float16", out=tmp_path)
    assert run.summary.worth == 1
    again = rv.certify("tiny", from_cache=str(run.folder), prompts="independent", out=tmp_path)
    assert told(again)[0].startswith("The images are worth 1 independent one, and their ids do not tell")
    assert again.summary.worth is None
