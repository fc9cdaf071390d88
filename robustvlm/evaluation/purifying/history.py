"""One record of a training in two stages."""

from __future__ import annotations

from collections.abc import Mapping

from robustvlm.training import Measure, Validation
from robustvlm.training.history import History


def joined(records: Mapping[str, History], before: Mapping[str, Measure]) -> History:
    """Return the stages as one training: steps counted on, terms named by their stage, seconds and passes added.

    Args:
        records: of every stage, in order. before: measures of the encoder alone, which stand at step 0.

    Example:
        >>> from robustvlm.training.history import StepEntry
        >>> step = StepEntry(step=10, terms={"loss": 1.0}, learning_rate=0.1, gradient_norm=1.0)
        >>> both = joined({"purifier": History(steps=[step]), "mapper": History(steps=[step])}, {"score": 0.5})
        >>> [(entry.step, entry.terms) for entry in both.steps]
        [(10, {'purifier loss': 1.0}), (20, {'mapper loss': 1.0})]
    """
    whole = History(validations=[Validation(step=0, measures=dict(before))])
    done = 0
    for stage, record in records.items():
        for entry in record.steps:
            terms = {f"{stage} {name}": value for name, value in entry.terms.items()}
            whole.steps.append(entry.model_copy(update={"step": done + entry.step, "terms": terms}))
        # What an untrained part does stands for nothing: the encoder alone is what training starts from.
        later = [found for found in record.validations if found.step > 0]
        whole.validations += [found.model_copy(update={"step": done + found.step}) for found in later]
        whole.warnings += [warned.model_copy(update={"step": done + warned.step}) for warned in record.warnings]
        done = whole.steps[-1].step if whole.steps else 0
        whole.images += record.images
        whole.passes += record.passes
        whole.seconds += record.seconds
        whole.validation_seconds += record.validation_seconds
        whole.peak_memory = max(whole.peak_memory, record.peak_memory)
        whole.skipped |= record.skipped
    return whole
