"""What a training or a loop tells, in the words that every run's observer takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from robustvlm.report.words import duration
from robustvlm.runs.settings import Observer
from robustvlm.stats import Mean, Rate
from robustvlm.training import Estimate, TrainingObserver, Validation, Warned

_TERMS = 4


def told(observer: Observer) -> TrainingObserver:
    """Return an observer of a training that tells it to the observer of a run."""
    return _Told(observer)


def counted(observer: Observer) -> Callable[[int], None]:
    """Return what a loop calls with the number of pieces done so far, and the observer is told how many more that is.

    Example:
        >>> class Lines(Observer):
        ...     def advance(self, count=1, **shown):
        ...         print(count)
        >>> tell = counted(Lines())
        >>> tell(3), tell(5)
        3
        2
        (None, None)
    """
    before = 0

    def tell(done: int) -> None:
        nonlocal before
        observer.advance(done - before)
        before = done

    return tell


class _Told(TrainingObserver):
    def __init__(self, observer: Observer) -> None:
        self._observer, self._step = observer, 0

    def began(self, total: int, done: int) -> None:
        if done:
            self._observer.say(f"Going on after {done:,} of {total:,} steps.")
        self._step = done
        self._observer.begin("Training", total, done)

    def estimated(self, estimate: Estimate) -> None:
        self._observer.say(
            f"{estimate.steps:,} steps to go: {estimate.passes:,} encoder passes, about {duration(estimate.seconds)}."
        )

    def stepped(self, step: int, terms: Mapping[str, float]) -> None:
        shown = {name: f"{value:.3g}" for name, value in list(terms.items())[:_TERMS]}
        self._observer.advance(step - self._step, **shown)
        self._step = step

    def validated(self, found: Validation) -> None:
        shown = [] if found.train_loss is None else [f"loss {found.train_loss:.4g}"]
        for name, value in found.measures.items():
            if isinstance(value, Rate | Mean):
                shown.append(f"{name} {_words(value)}")
        self._observer.say(f"Step {found.step:,}: {', '.join(shown)}")

    def warned(self, warning: Warned) -> None:
        self._observer.warn(f"{warning.name}: {warning.message}")


def _words(found: Rate | Mean) -> str:
    if found.value is None:
        return "-"
    if isinstance(found, Mean):
        return f"{found.value:.3f}"
    return f"{found.value:.1%} ({found.low:.1%}-{found.high:.1%})"
