"""A model looks at a stream of images, batch by batch: rows, and where there are captions, features of both."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robustvlm.commands.evaluate.corrupted import Answer, Answers
from robustvlm.commands.evaluate.measures import correct, places
from robustvlm.commands.evaluate.record import ImageRow
from robustvlm.core.boundary import borrowed
from robustvlm.core.framing import to_pixels
from robustvlm.core.seeds import derive_seed, full_precision_kernels, own_draws
from robustvlm.data.corruptions import Corruption, corrupted
from robustvlm.data.source import UNKNOWN, DataSource, Sample, Unreadable
from robustvlm.defenses.classifier import Classifier
from robustvlm.errors import UserError, is_out_of_memory
from robustvlm.models import VLM
from robustvlm.text import one_line


@dataclass(frozen=True, eq=False)
class Pairs:
    """Features of a batch's images that have captions, and of the captions.

    Args:
        index: of the images in source order; images: unit features [N, D].
        texts: the captions; features: of them, unit [M, D]; owner: the place in `index` that each is about, int64 [M].
    """

    index: list[int]
    images: Tensor
    texts: list[str]
    features: Tensor
    owner: Tensor


@dataclass(eq=False)
class Look:
    """A batch: what was found for each image, what could not be read on the way to it, and features where asked for."""

    number: int
    rows: list[ImageRow] = field(default_factory=list)
    unreadable: list[tuple[int, Unreadable]] = field(default_factory=list)
    pairs: Pairs | None = None
    corrupted: Answers = field(default_factory=dict)


@dataclass(frozen=True)
class Looker:
    """Asks a model about the images of a source.

    Args:
        model: a classifier of the source's classes, or an encoder for captions alone.
        source: the images; limit: how many of them; batch_size: images a pass.
        corruptions: under which the classifier sees its labelled images again.
    """

    model: Classifier | VLM
    source: DataSource
    limit: int | None = None
    batch_size: int = 64
    corruptions: tuple[Corruption, ...] = ()

    @property
    def classifier(self) -> Classifier | None:
        """The classifier, if there are classes."""
        return self.model if isinstance(self.model, Classifier) else None

    @property
    def encoder(self) -> VLM | None:
        """The encoder that captions are compared with; None where there are none."""
        if not self.source.captioned:
            return None
        return self.model.vlm if isinstance(self.model, Classifier) else self.model

    def looks(self, seen: Collection[str] = (), number: int = 0) -> Iterator[Look]:
        """Yield batch after batch; of a run that goes on, `seen` images are left out and `number` batches were made.

        Images that nothing is asked about, of unknown classes, stand in the batch before which they came.
        """
        order: dict[str, int] = {}
        done = frozenset(seen)

        def keep(name: str) -> bool:
            order.setdefault(name, len(order))
            return name not in done

        asked: list[Sample] = []
        passed: list[Sample] = []
        unreadable: list[tuple[int, Unreadable]] = []
        for item in self.source.samples(limit=self.limit, keep=keep):
            order.setdefault(item.id, len(order))  # the faults of a stream are not asked for
            if isinstance(item, Unreadable):
                unreadable.append((order[item.id], item))
                continue
            (asked if self._wants(item) else passed).append(item)
            if len(asked) == self.batch_size:
                yield self._look(number, asked, passed, unreadable, order)
                asked, passed, unreadable, number = [], [], [], number + 1
        if asked or passed or unreadable:
            yield self._look(number, asked, passed, unreadable, order)

    def _wants(self, sample: Sample) -> bool:
        """Whether a model is asked about an image: of unknown classes only one that may refuse, or knows captions."""
        captioned = self.encoder is not None and bool(sample.captions)
        if self.classifier is None:
            return captioned
        return sample.label != UNKNOWN or self.classifier.can_reject or captioned

    def _look(
        self,
        number: int,
        asked: list[Sample],
        passed: list[Sample],
        unreadable: list[tuple[int, Unreadable]],
        order: dict[str, int],
    ) -> Look:
        look = Look(number, unreadable=unreadable)
        look.rows = [ImageRow(order[one.id], one.id, one.label, one.subgroup) for one in passed]
        if not asked:
            return look
        pixels = torch.stack([to_pixels(sample.image, self.model.framing) for sample in asked])
        # A random model draws the same noise in every evaluation with this batch size, or its rates would never repeat.
        draws = own_draws(self.model.device, derive_seed("evaluate", number))
        # Not inference mode: defences that optimise their input need gradients of their own.
        with draws, borrowed(self.model), torch.no_grad(), full_precision_kernels():
            if self.classifier is None:
                look.rows += [ImageRow(order[one.id], one.id, one.label, one.subgroup) for one in asked]
            else:
                output = _halving(self.classifier, pixels.to(self.model.device)).cpu()
                _check_finite(output, asked, self.model.spec)
                look.rows += _rows(output, asked, order, self.classifier)
            if self.encoder is not None:
                look.pairs = self._pairs(self.encoder, pixels, asked, order)
        look.corrupted = self._corrupted(number, pixels, asked, order)
        return look

    def _corrupted(self, number: int, pixels: Tensor, asked: list[Sample], order: dict[str, int]) -> Answers:
        """Return what the classifier says of the labelled images of a batch under every corruption."""
        have = [place for place, sample in enumerate(asked) if sample.label != UNKNOWN]
        if not have or self.classifier is None:
            return {}
        labelled, model, found = [asked[place] for place in have], self.classifier, Answers()
        for one in self.corruptions:
            changed = corrupted(pixels[have], [sample.id for sample in labelled], one)
            draws = own_draws(model.device, derive_seed("evaluate", number, one.text))
            with draws, borrowed(model), torch.no_grad(), full_precision_kernels():
                output = _halving(model, changed.to(model.device)).cpu()
            _check_finite(output, labelled, model.spec)
            rows = _rows(output, labelled, order, model)
            found[one.text] = {row.index: Answer(row.prediction, row.confidence or 0.0, row.accepted) for row in rows}
        return found

    def _pairs(self, encoder: VLM, pixels: Tensor, asked: list[Sample], order: dict[str, int]) -> Pairs | None:
        have = [place for place, sample in enumerate(asked) if sample.captions]
        if not have:
            return None
        images = _halving(encoder.encode_image, pixels[have].to(encoder.device)).float()
        texts = [text for place in have for text in asked[place].captions]
        owner = torch.tensor([n for n, place in enumerate(have) for _ in asked[place].captions])
        parts = [encoder.encode_text(texts[at : at + self.batch_size]) for at in range(0, len(texts), self.batch_size)]
        features = torch.cat(parts)
        _check_finite(images, [asked[place] for place in have], encoder.spec, what="features")
        if not bool(features.isfinite().all()):
            bad = texts[int((~features.isfinite().all(dim=1)).nonzero()[0])]
            raise UserError(
                f"model '{encoder.spec}' gave features with NaN or infinite values for '{one_line(bad, limit=80)}'"
            )
        return Pairs([order[asked[place].id] for place in have], images.cpu(), texts, features.float().cpu(), owner)


def _rows(output: Tensor, asked: list[Sample], order: dict[str, int], model: Classifier) -> Iterator[ImageRow]:
    refuses, undecided = model.can_reject, model.undecided(output)
    labels = torch.tensor([sample.label for sample in asked])
    accepted = output[:, -1] > 0 if refuses else torch.ones(len(asked), dtype=torch.bool)
    logits = output[:, :-1] if refuses else output
    known = labels != UNKNOWN
    right, place = correct(logits, labels), places(logits, labels.clamp(min=0))
    predictions, confidences = logits.argmax(dim=-1), logits.softmax(dim=-1).amax(dim=-1)
    for n, sample in enumerate(asked):
        yield ImageRow(
            order[sample.id],
            sample.id,
            sample.label,
            sample.subgroup,
            prediction=int(predictions[n]),
            correct=bool(right[n] & accepted[n]) if known[n] else None,
            place=int(place[n]) if known[n] else None,
            confidence=float(confidences[n]),
            accepted=bool(accepted[n]) if refuses else None,
            undecided=None if undecided is None else bool(undecided[n]),
        )


def _halving(ask: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
    """Return an answer in one piece, or in several where memory for one is lacking."""
    try:
        return ask(pixels)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or len(pixels) == 1:
            raise
    # Outside the handler, which would keep the failed pass's tensors alive.
    half = len(pixels) // 2
    return torch.cat([_halving(ask, pixels[:half]), _halving(ask, pixels[half:])])


def _check_finite(values: Tensor, batch: list[Sample], spec: str, *, what: str = "logits") -> None:
    finite = torch.isfinite(values).all(dim=-1)
    if not finite.all():
        name = batch[int(finite.logical_not().nonzero()[0])].id
        raise UserError(f"model '{spec}' gives NaN or infinite {what}, first for the image '{name}'")
