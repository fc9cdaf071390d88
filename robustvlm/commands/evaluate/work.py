"""`robustvlm evaluate`: clean accuracy, calibration and superclass accuracy over a stream of images."""

import math
import time
from collections.abc import Callable, Iterator

import torch
from pydantic import BaseModel, ConfigDict
from rich.console import Console

from robustvlm.commands.common.inputs import remarks_of
from robustvlm.commands.evaluate import EvaluateSettings
from robustvlm.core.boundary import borrowed
from robustvlm.core.framing import to_pixels
from robustvlm.core.seeds import derive_seed, full_precision_kernels, own_draws
from robustvlm.data import open_data
from robustvlm.data.source import UNKNOWN, DataSource, Sample, Unreadable
from robustvlm.data.trees import Forest, Tree
from robustvlm.defenses import load_classifier
from robustvlm.defenses.classifier import Classifier, ZeroShot
from robustvlm.errors import UserError, is_out_of_memory
from robustvlm.models.zero_shot import ZeroShotClassifier
from robustvlm.report import screen
from robustvlm.report.sections import Column, Measure, Row, Table, Text
from robustvlm.report.words import count_of, percent
from robustvlm.runs.settings import Observer
from robustvlm.stats import Rate, rate

# Measures of a classifier as pure functions; those with state are sums, so parts of a data set add up

N_BINS = 15


def correct(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return for each row of logits [N, K] whether its largest entry is the label's: bool [N].

    Example:
        >>> correct(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]))
        tensor([ True, False])
    """
    return logits.argmax(dim=-1) == labels


def superclass_correct(predictions: torch.Tensor, labels: torch.Tensor, superclass_of: torch.Tensor) -> torch.Tensor:
    """Return whether prediction and label [N] fall into one superclass: bool [N].

    `superclass_of` [K] maps each class to its superclass at one level of a class tree.

    Example:
        >>> superclass_correct(torch.tensor([0, 2]), torch.tensor([1, 1]), torch.tensor([0, 0, 1]))
        tensor([ True, False])
    """
    return superclass_of[predictions] == superclass_of[labels]


def calibration_bins(confidences: torch.Tensor, right: torch.Tensor, *, n_bins: int = N_BINS) -> torch.Tensor:
    """Return float64 sums [3, n_bins] over equal-width bins: images, confidence, correct predictions.

    Bin m holds the confidences in ((m-1)/n_bins, m/n_bins], the first one 0 as well. Sums of parts are the whole's.

    Example:
        >>> calibration_bins(torch.tensor([0.5, 0.6, 1.0]), torch.tensor([True, False, True]), n_bins=2)
        tensor([[1.0000, 2.0000],
                [0.5000, 1.6000],
                [1.0000, 1.0000]], dtype=torch.float64)
    """
    confidences = confidences.double()
    edges = torch.linspace(0, 1, n_bins + 1, dtype=torch.float64, device=confidences.device)
    index = (torch.bucketize(confidences, edges) - 1).clamp(0, n_bins - 1)
    rows = torch.stack([torch.ones_like(confidences), confidences, right.double()])
    return torch.zeros(3, n_bins, dtype=torch.float64, device=confidences.device).index_add_(1, index, rows)


def calibration_error(bins: torch.Tensor) -> float:
    """Return the expected calibration error of sums from `calibration_bins`: sum |correct - confidence| / images.

    Source: Guo et al. 2017, arXiv 1706.04599, equation 3. Raises ValueError when the bins are empty.

    Example:
        >>> round(calibration_error(torch.tensor([[2.0], [1.8], [1.0]])), 6)
        0.4
    """
    images, confidence, right = bins
    if images.sum() == 0:
        raise ValueError("the calibration error of no images is not defined")
    return float((right - confidence).abs().sum() / images.sum())


def expected_calibration_error(confidences: torch.Tensor, right: torch.Tensor, *, n_bins: int = N_BINS) -> float:
    """Return how far confidence is from accuracy, in [0, 1]; confidences float [N] in [0, 1], right bool [N].

    Source: Guo et al. 2017, arXiv 1706.04599, equation 3, with 15 bins of equal width unless told otherwise.

    Example:
        >>> round(expected_calibration_error(torch.tensor([0.9, 0.9]), torch.tensor([True, False])), 6)
        0.4
    """
    return calibration_error(calibration_bins(confidences, right, n_bins=n_bins))


# Clean accuracy of a classifier over a stream of images, in memory that does not grow with their number

_REASONS_KEPT = 100


class LevelAccuracy(BaseModel):
    """How often the prediction falls into the label's superclass, at one level of one class tree."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tree: str
    level: int
    superclasses: int
    accuracy: Rate


class CleanResult(BaseModel):
    """What a clean evaluation found; images `unreadable` or of an `unknown` class are not among `images` and rates.

    Of a model that may refuse, a right answer is one that it accepts; `rejected` is the share of the known images that
    it rejects, `unknown_rejected` that of the unknown ones. Both are None for other models.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str
    model_fingerprint: str
    data: str
    classes: int
    images: int
    unknown: int
    unreadable: int
    unreadable_reasons: list[tuple[str, str]]
    remarks: list[str] = []
    accuracy: Rate
    calibration_error: float
    mean_confidence: float
    superclass_accuracy: list[LevelAccuracy]
    rejected: Rate | None = None
    unknown_rejected: Rate | None = None
    seconds: float

    @property
    def images_per_second(self) -> float:
        """Throughput, reading and decoding included."""
        return self.images / self.seconds if self.seconds > 0 else 0.0


def evaluate_clean(
    classifier: Classifier | ZeroShotClassifier,
    source: DataSource,
    *,
    limit: int | None = None,
    batch_size: int = 64,
    on_images: Callable[[int], None] | None = None,
) -> CleanResult:
    """Return clean accuracy, calibration error and superclass accuracy of `classifier` on the images of `source`.

    The labels of `source` index the classifier's classes. `on_images` is called after each batch with the number of
    images read since the last call. Raises UserError when no image of a known class can be read, or the model's output
    is not finite.

    Example:
        >>> from robustvlm.data import open_data
        >>> from robustvlm.models import load_model, zero_shot
        >>> source = open_data("emoji")
        >>> classifier = zero_shot(load_model("tiny"), source.class_names, source.templates, cache=False)
        >>> evaluate_clean(classifier, source, limit=8).images
        8
    """
    if isinstance(classifier, ZeroShotClassifier):
        classifier = ZeroShot(classifier)
    if batch_size < 1:
        raise UserError(f"the batch size must be at least 1 image, got {batch_size}")
    if classifier.class_names != source.class_names:
        raise UserError(f"the classifier and '{source.spec}' have different classes")
    tally = _Tally(source.tree, source.class_names, refuses=classifier.can_reject)
    start, told = time.perf_counter(), 0
    for number, batch in enumerate(_batches(source, tally, limit, batch_size)):
        pixels = torch.stack([to_pixels(sample.image, classifier.framing) for sample in batch])
        # A random model draws the same noise in every evaluation with this batch size, or its rates would never repeat.
        draws = own_draws(classifier.device, derive_seed("evaluate", number))
        with draws, borrowed(classifier), torch.inference_mode(), full_precision_kernels():
            output = _logits(classifier, pixels.to(classifier.device)).cpu()
        _check_finite(output, batch, classifier.spec)
        tally.add(output, torch.tensor([sample.label for sample in batch]))
        if on_images is not None:
            on_images(tally.images + tally.unknown + tally.unreadable - told)
            told = tally.images + tally.unknown + tally.unreadable
    if tally.images == 0:
        raise UserError(_why_none(source.spec, tally))
    return tally.result(classifier, source, time.perf_counter() - start, limit=limit)


def measure(settings: EvaluateSettings, observer: Observer | None = None) -> CleanResult:
    """Open the data and the model that the settings name, and evaluate."""
    told = observer or Observer()
    source = open_data(settings.data, classes=settings.classes, templates=settings.templates, tree=settings.tree)
    classifier = load_classifier(settings.model, source.class_names, source.templates, device=settings.device)
    ids = source.ids()
    told.begin("Evaluating", settings.limit if ids is None else min(len(ids), settings.limit or len(ids)))
    return evaluate_clean(
        classifier, source, limit=settings.limit, batch_size=settings.batch_size, on_images=told.advance
    )


class _Tally:
    """Counts and sums over the batches so far."""

    def __init__(self, forest: Forest | None, class_names: tuple[str, ...], *, refuses: bool) -> None:
        self.refuses = refuses
        self.rejected = self.unknown_rejected = 0
        self.classes = class_names
        self.seen: set[int] = set()
        self.images = self.right = self.unknown = self.unreadable = 0
        self.confidences: list[torch.Tensor] = []
        self.hits: list[torch.Tensor] = []
        self.reasons: list[tuple[str, str]] = []
        self.levels = [
            (tree.root, level, _superclass_of(tree, level, class_names))
            for tree in forest or ()
            for level in range(1, tree.levels)
            # At the root every prediction is right, and where no classes are joined it is plain accuracy.
            if 1 < len(tree.level_names(level)) < len(class_names)
        ]
        self.right_at = [0] * len(self.levels)

    def add(self, output: torch.Tensor, labels: torch.Tensor) -> None:
        """Take in the output of a batch; images of unknown classes are in it only for models that may refuse."""
        known = labels != UNKNOWN
        accepted = output[:, -1] > 0 if self.refuses else torch.ones_like(known)
        self.unknown_rejected += int((~known & ~accepted).sum())
        logits, labels, accepted = output[known], labels[known], accepted[known]
        if self.refuses:
            logits = logits[:, :-1]
        self.rejected += int((~accepted).sum())
        if not len(labels):
            return
        right = correct(logits, labels)
        self.images += len(labels)
        self.seen.update(labels.tolist())
        self.right += int((right & accepted).sum())
        self.confidences.append(logits.softmax(dim=-1).amax(dim=-1))
        self.hits.append(right)
        for i, (_, _, superclass_of) in enumerate(self.levels):
            found = superclass_correct(logits.argmax(dim=-1), labels, superclass_of) & accepted
            self.right_at[i] += int(found.sum())

    def skip(self, item: Unreadable) -> None:
        self.unreadable += 1
        if len(self.reasons) < _REASONS_KEPT:
            self.reasons.append((item.id, item.reason))

    def without_images(self, *, whole: bool) -> list[str]:
        """Say which classes no image of the whole set is of: they only make the task harder."""
        lost = [name for label, name in enumerate(self.classes) if label not in self.seen]
        if not whole or not lost:
            return []
        shown = ", ".join(f"'{name}'" for name in lost[:6]) + (", ..." if len(lost) > 6 else "")
        return [f"no image that can be read is of {len(lost)} of the {len(self.classes)} classes: {shown}"]

    def result(
        self, classifier: Classifier, source: DataSource, seconds: float, *, limit: int | None = None
    ) -> CleanResult:
        # Summed once over all images: sums of batches would depend on the batch size in their last digits.
        confidences = torch.cat(self.confidences)
        bins = calibration_bins(confidences, torch.cat(self.hits))
        return CleanResult(
            model=classifier.spec,
            model_fingerprint=classifier.fingerprint,
            data=source.spec,
            classes=len(classifier.class_names),
            images=self.images,
            unknown=self.unknown,
            unreadable=self.unreadable,
            unreadable_reasons=self.reasons,
            remarks=[*remarks_of(source, classifier), *self.without_images(whole=limit is None)],
            accuracy=rate(self.right, self.images),
            calibration_error=calibration_error(bins),
            mean_confidence=math.fsum(confidences.tolist()) / self.images,
            superclass_accuracy=[
                LevelAccuracy(
                    tree=root,
                    level=level,
                    superclasses=int(superclass_of.max()) + 1,
                    accuracy=rate(self.right_at[i], self.images),
                )
                for i, (root, level, superclass_of) in enumerate(self.levels)
            ],
            rejected=rate(self.rejected, self.images) if self.refuses else None,
            unknown_rejected=rate(self.unknown_rejected, self.unknown) if self.refuses and self.unknown else None,
            seconds=seconds,
        )


def _superclass_of(tree: Tree, level: int, class_names: tuple[str, ...]) -> torch.Tensor:
    index = {name: i for i, name in enumerate(tree.level_names(level))}
    return torch.tensor([index[tree.ancestor(name, level)] for name in class_names])


def _batches(source: DataSource, tally: _Tally, limit: int | None, batch_size: int) -> Iterator[list[Sample]]:
    """Yield full batches, then the rest; images of unknown classes are in them only for models that may refuse."""
    batch: list[Sample] = []
    for item in source.samples(limit=limit):
        if isinstance(item, Unreadable):
            tally.skip(item)
        elif item.label == UNKNOWN:
            tally.unknown += 1
            if tally.refuses:
                batch.append(item)
        else:
            batch.append(item)
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _logits(classifier: Classifier, pixels: torch.Tensor) -> torch.Tensor:
    try:
        return classifier(pixels)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or len(pixels) == 1:
            raise
    # Outside the handler, which would keep the failed pass's tensors alive.
    half = len(pixels) // 2
    return torch.cat([_logits(classifier, pixels[:half]), _logits(classifier, pixels[half:])])


def _check_finite(logits: torch.Tensor, batch: list[Sample], spec: str) -> None:
    finite = torch.isfinite(logits).all(dim=-1)
    if not finite.all():
        name = batch[int(finite.logical_not().nonzero()[0])].id
        raise UserError(f"model '{spec}' gives NaN or infinite logits, first for the image '{name}'")


def _why_none(spec: str, tally: _Tally) -> str:
    if tally.unreadable:
        name, reason = tally.reasons[0]
        return f"none of the {tally.unreadable} images of '{spec}' could be read; the first, '{name}': {reason}"
    if tally.unknown:
        return f"all {tally.unknown} images of '{spec}' are of unknown classes: accuracy needs images of known ones"
    return f"'{spec}' holds no images"


# What is said of a clean evaluation


def show(result: CleanResult, console: Console) -> None:
    """Print every measure with its interval, and what a reader has to know of the images."""
    several = len({at.tree for at in result.superclass_accuracy}) > 1
    rows: list[Row] = [(f"accuracy, {result.classes:,} classes", Measure.of(result.accuracy))]
    for at in result.superclass_accuracy:
        where = f"{at.tree}, level {at.level}" if several else f"level {at.level}"
        label = f"superclass accuracy, {where} ({at.superclasses:,} groups)"
        rows.append((label, Measure.of(at.accuracy)))
    for what, found in (("known", result.rejected), ("unknown", result.unknown_rejected)):
        if found is not None:
            rows.append((f"rejected, images of {what} classes", Measure.of(found)))
    rows.append(("mean confidence", percent(result.mean_confidence)))
    rows.append(("calibration error (15 bins)", percent(result.calibration_error)))
    title = f"{result.model} on {result.data}"
    table = Table([Column("Measure"), Column("Value, 95% interval")], rows, title=title, strong=frozenset({0}))
    screen.show(console, [table, *map(Text, _notes(result))])


def _notes(result: CleanResult) -> Iterator[str]:
    speed = f"{result.images_per_second:,.0f} images/s"
    yield f"{count_of(result.images, 'images')} in {result.seconds:.1f} s ({speed}); {result.accuracy.method} intervals"
    if result.unknown and result.unknown_rejected is None:
        yield f"{count_of(result.unknown, 'images')} of unknown classes left out"
    yield from (f"Note: {remark}" for remark in result.remarks)
    if result.unreadable:
        name, reason = result.unreadable_reasons[0]
        yield f"{count_of(result.unreadable, 'images')} could not be read; the first, {name}: {reason}"
