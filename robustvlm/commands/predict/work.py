"""The work of `robustvlm predict`: images read as they come, the model asked batch by batch, a row for each image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from robustvlm.attacks.oracle import Oracle
from robustvlm.attacks.probe import row_changes
from robustvlm.attacks.tensors import image_ids
from robustvlm.commands.common.inputs import taken_for_granted
from robustvlm.commands.predict import PredictSettings, record
from robustvlm.core.framing import to_pixels
from robustvlm.core.ranks import current_ranks, resolve_device
from robustvlm.core.seeds import derive_seed
from robustvlm.core.size import sides
from robustvlm.data import DataSource, Unreadable, decode, files, open_data, specs
from robustvlm.data.classes import DEFAULT, read_class_names, read_templates, recognise
from robustvlm.defenses.classifier import Answers, Classifier
from robustvlm.defenses.load import own_classes
from robustvlm.defenses.pipeline import load_classifier
from robustvlm.defenses.smoothing import SmoothedVLM
from robustvlm.errors import UserError, is_out_of_memory, setting
from robustvlm.text import without_secrets

if TYPE_CHECKING:
    import pyarrow as pa

# Relative change of a logit that rounding does not explain, and chance or other images of the batch do.
_NOTICED = 1e-3


@dataclass(frozen=True)
class _Ready:
    """An image as the model takes it: pixels [3, H, H] in [0, 1]."""

    id: str
    pixels: Tensor


class Predictions(Sequence[record.Prediction]):
    """What a model says of images: a sequence of rows, and the same as columns.

    Attributes:
        rows: one `Prediction` for each image, in the order of the images.
        about: the model, its rule in words and its classes.

    Example:
        >>> about = record.About("tiny", "", "the largest logit", ("cat", "dog"))
        >>> found = Predictions([record.Prediction("a.png", "answered", "cat", 0.9, (("cat", 0.9),))], about)
        >>> found.classes, found.confidence, found[0].image
        (['cat'], [0.9], 'a.png')
    """

    def __init__(self, rows: Sequence[record.Prediction], about: record.About) -> None:
        self.rows, self.about = list(rows), about

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: Any) -> Any:
        return self.rows[place]

    @property
    def images(self) -> list[str]:
        """Paths, or ids in the data."""
        return [row.image for row in self.rows]

    @property
    def classes(self) -> list[str | None]:
        """The answers, None where there is none."""
        return [row.class_name for row in self.rows]

    @property
    def confidence(self) -> list[float | None]:
        """Softmax probabilities of the answers, or of the likeliest class where there is none."""
        return [row.confidence for row in self.rows]

    @property
    def rejected(self) -> list[bool]:
        """Where the model refuses the image."""
        return [row.status == record.REJECTED for row in self.rows]

    @property
    def abstained(self) -> list[bool]:
        """Where the draws of a smoothed model do not decide."""
        return [row.status == record.ABSTAINED for row in self.rows]

    @property
    def unreadable(self) -> list[bool]:
        """Where there was no image to read, or the model's output was not finite."""
        return [row.status in (record.UNREADABLE, record.FAILED) for row in self.rows]

    @property
    def rule(self) -> str:
        """How an answer comes about, in words."""
        return self.about.rule

    def to_arrow(self) -> pa.Table:
        """Return the rows as an Arrow table, with the columns of the Parquet file."""
        return record.arrow_of(self.rows, self.about)

    def to_pandas(self) -> Any:
        """Return the rows as a pandas frame; UserError without the package pandas."""
        try:
            return self.to_arrow().to_pandas()
        except ImportError:
            raise UserError("to_pandas needs the package 'pandas': pip install pandas, or use to_arrow()") from None


class Work:
    """A classifier and images, ready to be put together.

    Args:
        settings: what was asked for; classifier: one that is loaded already; names: classes in place of a file's.

    Raises:
        UserError: wrong options, no such model or images, or no classes.
    """

    def __init__(
        self, settings: PredictSettings, classifier: Classifier | None = None, names: tuple[str, ...] | None = None
    ) -> None:
        if current_ranks().size > 1:
            raise UserError("`robustvlm predict` works in one process: start it without torchrun")
        self.settings, self.counts, self.notes = settings, record.Counts(), list[str]()
        if classifier is None:
            self.classifier, self.source = self._load(names)
        else:
            if names or settings.classes or settings.templates:
                raise UserError("the classifier has its classes and prompts already: leave out classes and templates")
            settings.require_usual(
                ("device",), "is for a spec; the classifier is on one already: move it with .to(device)"
            )
            self.classifier, self.source = classifier, self._unlabelled()
        self._smoothed = next((part for part in self.classifier.modules() if isinstance(part, SmoothedVLM)), None)
        self._require_abstaining()
        # A model on the CPU leaves no core idle to read ahead.
        self.ahead = 0 if self.classifier.device.type == "cpu" else 2 * settings.batch_size
        self._random, self._coupled = (True, False) if self._smoothed is not None else self._noticed()
        if settings.alpha is not None or self.classifier.withholds:
            self._require_independent_draws()

    def _require_independent_draws(self) -> None:
        """Refuse to abstain at an error probability where the noisy copies of an image change each other in a batch."""
        assert self._smoothed is not None
        size = sides(self._smoothed.image_size)
        rows = torch.rand(8, 3, *size, generator=torch.Generator().manual_seed(0)).to(self.classifier.device)
        with torch.no_grad():
            together = self._smoothed.encode_noisy(rows)
            alone = torch.cat([self._smoothed.encode_noisy(row[None]) for row in rows])
        if (together - alone).abs().max() > _NOTICED:
            raise UserError(
                "to abstain at an alpha needs independent draws, and what the encoder says of one image "
                "depends on the others of its batch: take out what works across the batch, such as batch statistics"
            )

    @cached_property
    def about(self) -> record.About:
        """What all rows have in common."""
        model, top = self.classifier, min(self.settings.top, len(self.classifier.class_names))
        return record.About(model.spec, model.fingerprint, self._rule(), model.class_names, model.can_reject, top)

    @property
    def total(self) -> int | None:
        """How many images there will be, where that can be known without reading them."""
        ids, limit = self.source.ids(), self.settings.limit
        return None if ids is None else len(ids) if limit is None else min(len(ids), limit)

    def batches(self) -> Iterator[list[record.Prediction]]:
        """Yield the rows of all images in their order, as they come, and count them."""
        items = self._items()
        batch: list[_Ready | Unreadable] = []
        for item in decode.prefetch(items, self.ahead) if self.ahead else items:
            batch.append(item)
            if len(batch) == self.settings.batch_size:
                yield self._rows(batch)
                batch = []
        if batch:
            yield self._rows(batch)

    def require_some(self) -> None:
        """Refuse an end at which no image was read."""
        first = self.counts.first_fault
        where = f"'{self.settings.data}'" if self.settings.data is not None else ", ".join(map(str, self._given()))
        if not self.counts.images:
            raise UserError(f"there is no image in {where}: expected image files, or folders that hold some")
        if first is not None and self.counts.faults == self.counts.images:
            raise UserError(
                f"none of the {self.counts.images:,} images could be read; the first, '{first.image}': {first.reason}"
            )

    @property
    def remarks(self) -> list[str]:
        """What a reader has to know of images and classes; complete once all images are read."""
        aside = getattr(self.source, "aside", 0)
        kind = "file that is no image" if aside == 1 else "files that are no images"
        said = [f"left aside in folders: {aside:,} {kind}"] if aside else []
        return [*taken_for_granted(self.classifier), *self.notes, *self.source.remarks, *said]

    def _given(self) -> list[str]:
        shown = [f"'{path}'" for path in self.settings.images[:3]]
        return [*shown, "..."] if len(self.settings.images) > 3 else shown

    def _load(self, names: tuple[str, ...] | None) -> tuple[Classifier, DataSource]:
        """Open the images, find the classes, and load the model: those given, else the model's own, else the data's."""
        settings, spec = self.settings, self.settings.model
        if settings.classes is not None:
            found, note = read_class_names(settings.classes)
            if not isinstance(found, tuple):
                raise UserError(f"the class names file {settings.classes} must hold a list here, got a JSON object")
            names = found
            self.notes += [note] if note else []
        known = own_classes(spec) if names is None else names
        if known is None and settings.data is None:
            raise UserError(
                f"'{spec}' knows no classes of its own: pass {setting('classes', 'FILE')}, a class name a line"
            )
        if known is None:
            assert settings.data is not None
            source = open_data(settings.data, templates=settings.templates)
            classes, templates = source.class_names, source.templates
        else:
            source, classes = self._unlabelled(), tuple(known)
            usual = recognise(classes)
            templates = usual.templates if usual is not None and source.templates == DEFAULT else source.templates
            if settings.templates is not None:
                templates = read_templates(settings.templates)
        return load_classifier(spec, classes, templates, device=resolve_device(settings.device)), source

    def _unlabelled(self) -> DataSource:
        """Return the images, whatever their data calls them."""
        if self.settings.data is None:
            return files.FileImages(self.settings.images)
        source = specs.open_unlabelled(self.settings.data)
        # Prompts that lie beside the data fit its pictures, whichever classes are asked for.
        source.templates = source.inner.templates or DEFAULT
        return source

    def _require_abstaining(self) -> None:
        model = self.classifier
        if self.settings.alpha is not None and model.withholds:
            raise UserError(
                f"'{model.spec}' abstains at an alpha of its own: leave out {setting('alpha')}, or pass the model with "
                "another, as +smooth:SIGMA:N0:ALPHA"
            )
        abstains = isinstance(model.vlm, SmoothedVLM) and model.class_embeddings is not None and not model.can_reject
        if self.settings.alpha is not None and not abstains:
            raise UserError(
                f"'{model.spec}' does not abstain: leave out {setting('alpha')}, or pass a smoothed encoder without "
                "refusal, as tiny+smooth:0.25:64"
            )

    def _noticed(self) -> tuple[bool, bool]:
        """Ask about two fixed images, and tell whether the answers are a matter of chance, or of other images."""
        size, draws = sides(self.classifier.image_size), torch.Generator().manual_seed(0)
        images = torch.rand(2, 3, *size, generator=draws).to(self.classifier.device)
        again, among = row_changes(Oracle(self.classifier, device=self.classifier.device), images)
        if again <= _NOTICED < among:
            self.notes.append("the model's answer depends on the other images of a batch: it is asked one by one")
        return again > _NOTICED, among > _NOTICED

    def _rule(self) -> str:
        model, smoothed, alpha = self.classifier, self._smoothed, self.settings.alpha
        copies = "" if smoothed is None else f"{smoothed.n0:,} noisy copies (sigma {smoothed.noise})"
        rule = "the class with the largest logit"
        if model.says is not None:
            return model.says
        if alpha is not None:
            rule = f"the class that {copies} decide at alpha {alpha:g}, else abstain"
        elif smoothed is not None:
            rule += f" for the mean of {copies}, significant or not"
        elif self._random:
            rule += " in one draw of a random model"
        return f"{rule}; rejected unless score > threshold" if model.can_reject else rule

    def _items(self) -> Iterator[_Ready | Unreadable]:
        for item in self.source.samples(limit=self.settings.limit):
            name = item.id if isinstance(self.source, files.FileImages) else without_secrets(item.id)
            if isinstance(item, Unreadable):
                yield Unreadable(name, item.reason)
            else:
                yield _Ready(name, to_pixels(item.image, self.classifier.framing))

    def _rows(self, batch: Sequence[_Ready | Unreadable]) -> list[record.Prediction]:
        ready = [item for item in batch if isinstance(item, _Ready)]
        answered = iter(self._answered(ready))
        rows = [
            record.Prediction(item.id, record.UNREADABLE, reason=item.reason)
            if isinstance(item, Unreadable)
            else next(answered)
            for item in batch
        ]
        for row in rows:
            self.counts.add(row)
        return rows

    def _answered(self, ready: Sequence[_Ready]) -> Iterator[record.Prediction]:
        size = 1 if self._random or self._coupled else max(1, len(ready))
        for start in range(0, len(ready), size):
            part = ready[start : start + size]
            pixels = torch.stack([item.pixels for item in part])
            yield from self._told([item.id for item in part], self._ask(pixels))

    def _ask(self, pixels: Tensor) -> list[Answers]:
        """Return the answers in one piece, or in several where memory for one was lacking."""
        try:
            return [self._asked_once(pixels)]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or len(pixels) == 1:
                raise
        # Outside the handler, which would keep the failed pass's tensors alive.
        half = len(pixels) // 2
        return self._ask(pixels[:half]) + self._ask(pixels[half:])

    def _asked_once(self, pixels: Tensor) -> Answers:
        if not self._random:
            return self.classifier.predict(pixels, alpha=self.settings.alpha, lanes=len(pixels))
        # Draws follow from the seed and the pixels: not from the name, the order or the batch.
        device = self.classifier.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(derive_seed(self.settings.seed, "predict", *image_ids(pixels)))
            return self.classifier.predict(pixels, alpha=self.settings.alpha, lanes=len(pixels))

    def _told(self, names: Sequence[str], parts: Iterable[Answers]) -> Iterator[record.Prediction]:
        waiting = iter(names)
        for answers in parts:
            for place, row in enumerate(self._facts(answers)):
                yield self._prediction(next(waiting), answers, place, *row)

    def _facts(self, answers: Answers) -> Iterator[tuple[Tensor, float | None, float | None]]:
        """Yield probabilities [K], score and threshold of each image."""
        output, refuses = answers.output, self.classifier.can_reject
        probabilities = (output[:, :-1] if refuses else output).double().softmax(dim=1)
        if not refuses:
            yield from ((row, None, None) for row in probabilities)
            return
        scores, thresholds = (values.tolist() for values in self.classifier.refusal(output))
        yield from zip(probabilities, scores, thresholds, strict=True)

    def _prediction(
        self, name: str, answers: Answers, place: int, row: Tensor, score: float | None, threshold: float | None
    ) -> record.Prediction:
        if not answers.output[place].isfinite().all():
            return record.Prediction(name, record.FAILED, reason="the model's output is NaN or infinite")
        values, labels = row.topk(self.about.top)
        classes = [self.classifier.class_names[label] for label in labels.tolist()]
        status = record.ABSTAINED if answers.abstained[place] else record.ANSWERED
        if answers.rejected[place]:
            status = record.REJECTED
        label = int(answers.classes[place])
        return record.Prediction(
            name,
            status,
            answers.names[place],
            float(row[label] if label >= 0 else values[0]),
            tuple(zip(classes, values.tolist(), strict=True)),
            score,
            threshold,
        )


def predictions(
    settings: PredictSettings, classifier: Classifier | None = None, names: tuple[str, ...] | None = None
) -> Predictions:
    """Return all rows, and write them where the settings say so."""
    work = Work(settings, classifier, names)
    rows: list[record.Prediction] = []
    to = None if settings.to_stdout else settings.to
    file = nullcontext() if settings.to is None else record.opened(settings.written_as, to, work.about, work.counts)
    with file as sink:
        for batch in work.batches():
            rows += batch
            if sink is not None:
                sink.write(batch)
        if not rows:
            work.require_some()
    work.require_some()
    return Predictions(rows, work.about)
