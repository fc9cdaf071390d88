"""Training reports: page and terminal say the same numbers, and a purifier's is spoken of as one."""

from __future__ import annotations

import io
from pathlib import Path

from pages import HOSTILE, Page
from rich.console import Console

from robustvlm.report.page import page_of
from robustvlm.report.screen import show
from robustvlm.report.training import (
    TrainingSummary,
    training_closing,
    training_report,
    verdict,
)
from robustvlm.report.words import RANGE
from robustvlm.runs.run import FinishedRun
from robustvlm.stats import Mean, Rate, mean, rate
from robustvlm.training.history import History, StepEntry, Validation, Warned


def run(
    kind: str = "finetune", name: str = "clean accuracy", skipped: dict[str, str] | None = None
) -> FinishedRun[TrainingSummary]:
    validations = [
        Validation(step=0, measures={name: rate(3, 8), "spread": mean([0.1, 0.3, 0.4])}),
        Validation(step=4, measures={name: rate(7, 8), "spread": mean([0.2, 0.3, 0.5])}),
    ]
    history = History(
        steps=[StepEntry(step=step, terms={"loss": 1 / step}, learning_rate=0.1, gradient_norm=1.0) for step in (2, 4)],
        validations=validations,
        warnings=[Warned(name="overfitting", step=4, message="the loss rises")],
        best_step=4,
        skipped=skipped or {},
    )
    summary = TrainingSummary(
        kind=kind, method="tecoa", trained_parameters=5, parameters=10, best_by=name, steps=4, history=history
    )
    manifest = {"name": "demo", "command": "robustvlm finetune", "config": {"model": "tiny", "data": "emoji"}}
    return FinishedRun(Path("runs/demo"), manifest, summary)


def rendered(found: FinishedRun[TrainingSummary]) -> str:
    return page_of(training_report(found))


def terminal(found: FinishedRun[TrainingSummary]) -> str:
    stream = io.StringIO()
    show(Console(file=stream, width=80), training_report(found), training_closing(found))
    return stream.getvalue()


def test_the_footer_names_the_intervals_that_there_are_and_how_copies_count() -> None:
    def footer(measures: dict[str, Rate | Mean | float], data: str, worth: float | None) -> str:
        one = run()
        history = History(validations=[Validation(step=0, measures=measures)], best_step=0)
        summary = one.summary.model_copy(update={"history": history, "worth": worth})
        config = {"model": "tiny", "data": data}
        return training_report(FinishedRun(one.folder, {**one.manifest, "config": config}, summary)).footer

    share: dict[str, Rate | Mean | float] = {"clean accuracy": rate(3, 8)}
    score: dict[str, Rate | Mean | float] = {"score at 0.1": mean([0.1, 0.3])}
    assert footer(share, "imagefolder:photos", None) == ""  # the usual one
    assert footer(score, "imagefolder:photos", 2.0) == "Intervals are Student's 95% t intervals."
    for data in ("emoji", "wds:frames-of-one-film.tar"):
        assert footer(score, data, 1.5).endswith(" Copies of one thing count once in them.")
    assert "Intervals count every image" in footer(score, "emoji", None)  # of an earlier version
    both = footer(share | score, "emoji?copies=1", 8.0)
    of_shares = f"exact 95% Clopper{RANGE}Pearson intervals of shares"
    assert both == f"Intervals are {of_shares} and Student's 95% t intervals of means."
    assert "Clopper" not in rendered_footer(score)


def rendered_footer(measures: dict[str, Rate | Mean | float]) -> str:
    one = run("purify", "score at 0.1")
    history = History(validations=[Validation(step=0, measures=measures)], best_step=0)
    page = rendered(FinishedRun(one.folder, one.manifest, one.summary.model_copy(update={"history": history})))
    return page[page.index('<footer class="page">') :]


def test_measures_that_chose_no_weights_are_not_said_to() -> None:
    chosen = run().summary
    watched = chosen.model_copy(
        update={
            "best_by": None,
            "watched": chosen.best_by,
            "history": chosen.history.model_copy(update={"best_step": None}),
        }
    )
    earlier = watched.model_copy(update={"best_by": chosen.best_by, "watched": None})
    assert "on the validation images, which chose the weights (those of step 4 of 4)" in verdict(chosen)
    for summary in (watched, earlier):
        assert "held out and chose nothing: the weights of the last step were kept." in verdict(summary)
        assert "from 37.5% (" in verdict(summary)


def test_page_and_terminal_say_the_same_numbers() -> None:
    page, said = " ".join(Page(rendered(run())).text), terminal(run())
    for words in ("37.5%", "8.5", "75.6%", "87.5%", "0.2667", "0.3333", "the loss rises", "Overfitting, after 4 steps"):
        assert words in page, words
        assert words in said, words
    assert "Model:  runs/demo\nReport: runs/demo/report.html\n" in said


def test_a_purifier_is_told_by_its_noise_and_how_to_smooth_it() -> None:
    found = run("purify", "score at 0.25")
    assert "Smoothed: runs/demo+smooth:0.25\n" in terminal(found)
    assert "Encoder alone" in terminal(found)
    assert "Encoder alone" in rendered(found)


def test_images_left_out_are_counted_and_named() -> None:
    found = run(skipped={"b.png": "empty file", "a.png": "no image"})
    for said in (terminal(found), rendered(found)):
        assert "2 images not used" in said
        assert "a.png" in said
    assert "empty file" in rendered(found)


def test_hostile_names_change_no_element_of_the_page() -> None:
    plain = Page(rendered(run(name="x", skipped={"x": "x"}))).tags
    for text in HOSTILE[:4]:
        assert Page(rendered(run(name=text, skipped={text: text}))).tags == plain
