"""From images to features: the same bits wherever an image stands, kept in the run folder and read back."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from robustvlm.attacks.probe import declared_draws
from robustvlm.core import batches, framing, object_graph, seeds
from robustvlm.core.files import first_line, parse_json, replacing, require_regular
from robustvlm.data.source import DataSource, Sample, Unreadable, select
from robustvlm.defenses import Classifier
from robustvlm.errors import UserError, setting
from robustvlm.models import VLM
from robustvlm.models.zero_shot import class_embeddings
from robustvlm.runs.manifest import Manifest, carried, require_owner
from robustvlm.runs.records import UnreadableImage
from robustvlm.runs.settings import Observer

# Images per file: a killed run loses what it had of one.
CHUNK = 512


@dataclass(frozen=True, eq=False)
class Encoded:
    """What a model says of the images of one set, in source order.

    Args:
        ids: of the images; labels: int64 [N], -1 for unknown classes.
        features: unit features [N, D]; None for a model without an encoder.
        output: its logits [N, K], with the acceptance score behind for models that may refuse; None where the
            features decide them.
        seconds: of the encoder, over all sessions; unreadable: images left out.
    """

    ids: list[str]
    labels: Tensor
    features: Tensor | None
    output: Tensor | None
    seconds: float = 0.0
    unreadable: list[UnreadableImage] = field(default_factory=list)

    def rows(self, index: Tensor) -> Encoded:
        """Return some of the images."""
        return Encoded(
            [self.ids[i] for i in index.tolist()],
            self.labels[index],
            None if self.features is None else self.features[index],
            None if self.output is None else self.output[index],
            self.seconds,
            self.unreadable,
        )


class Answers:
    """What a model says of images, of any number at a time: an image's bits depend on neither its place nor its batch.

    The last batch of a set, or of a session, is filled up to a size on which that is so (`steady_sizes`): an image gets
    the same scores whoever stands beside it, and in two sets it gets them twice. Of a model whose answer to the same
    batch changes by rounding, no batch is filled; one that is random is asked one by one (`drawn`).

    Args:
        classifier: the model; batch_size: images per pass, fewer where memory does not suffice.

    Example:
        >>> from robustvlm.defenses import load_classifier
        >>> answers = Answers(load_classifier("tiny", ["apple", "dog"], ["{}"], cache=False), batch_size=8)
        >>> images = torch.rand(11, 3, 64, 64)
        >>> features, output = answers(images)
        >>> bool((answers(images[5:8])[0] == features[5:8]).all()), output
        (True, None)
    """

    def __init__(self, classifier: Classifier, *, batch_size: int) -> None:
        self.classifier = classifier
        self._sizes: tuple[int, ...] = (batch_size,)
        self._steady = self._asked = self._random = False

    def batch(self, shape: torch.Size) -> int:
        """Return how many images of a shape [3, H, W] are best asked about at a time; the model is tried out first."""
        self._try_out(shape)
        return self._sizes[0]

    def __call__(self, pixels: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return features [B, D] of pixels, if there is an encoder, and the output where they do not decide it.

        Both on the CPU in float32.
        """
        self._try_out(pixels.shape[1:])
        parts, rest = [], pixels
        while len(rest):
            for size in (
                batches.batch_sizes(self._sizes, min(len(rest), self._sizes[0])) if self._steady else self._sizes[:1]
            ):
                try:
                    parts.append(self._filled(rest[:size], size))
                except (RuntimeError, MemoryError) as error:
                    tried = self._sizes
                    self._sizes = batches.narrower_after(error, tried, self.classifier.device)
                    self._asked = self._sizes[0] in tried  # a size that was never tried is tried first
                    self._try_out(pixels.shape[1:])
                    break
                rest = rest[size:]
        return _stack([part[0] for part in parts]), _stack([part[1] for part in parts])

    def drawn(self, pixels: Tensor, seeds_of: Sequence[int]) -> tuple[Tensor | None, Tensor | None]:
        """Return what a call does; a random model draws for each row from its own seed, whoever stands beside it."""
        self._try_out(pixels.shape[1:])
        alone = self._random or self._sizes[0] == 1  # where batches are of one row, no one asked if it is random
        parts = []
        for rows, seed in zip(pixels.split(1), seeds_of, strict=True) if alone else [(pixels, seeds_of[0])]:
            with seeds.own_draws(self.classifier.device, seed):
                parts.append(self(rows))
        return _stack([part[0] for part in parts]), _stack([part[1] for part in parts])

    def _filled(self, pixels: Tensor, size: int) -> tuple[Tensor | None, Tensor | None]:
        """Ask about a batch, filled up to `size` with rows of its own."""
        count = len(pixels)
        if self._steady and count < size:
            pixels = pixels[torch.arange(size) % count]
        features, output = self._ask(pixels)
        return None if features is None else features[:count], None if output is None else output[:count]

    def _ask(self, pixels: Tensor) -> tuple[Tensor | None, Tensor | None]:
        classifier, moved = self.classifier, pixels.to(self.classifier.device)
        with torch.no_grad(), seeds.full_precision_kernels():
            features = None if classifier.vlm is None else classifier.vlm.encode_image(moved)
            output = None
            if features is not None and classifier.can_reject:
                output = classifier.from_features(features)
            if output is None and (features is None or classifier.can_reject):
                output = classifier(moved)
        return None if features is None else features.float().cpu(), None if output is None else output.float().cpu()

    def _try_out(self, shape: torch.Size) -> None:
        """Find the batch sizes on fixed noise, so that every session finds the same ones.

        Raises UserError for a model whose answer to an image depends on the others in its batch.
        """
        while not self._asked and self._sizes[0] > 1:
            noise = torch.rand((self._sizes[0], *shape), generator=torch.Generator().manual_seed(0))
            try:
                with seeds.own_draws(self.classifier.device, 0):
                    self._question(noise)
                break
            except (RuntimeError, MemoryError) as error:
                self._sizes = batches.narrower_after(error, self._sizes, self.classifier.device)
        self._asked = True

    def _question(self, noise: Tensor) -> None:
        self._random = declared_draws(self.classifier) > 0  # which noise need not show
        if self._random:
            return
        first, again = self._rows(noise), self._rows(noise)
        if not all(map(torch.equal, first, again)):
            self._random = _change(again, first) > batches.COUPLED
            return
        others = noise.flip(0) * 0.5
        others[-1] = noise[0]  # moving it shows what looks at earlier rows
        alone = [new[-1:] for new in self._rows(others)]
        if _change(alone, [rows[:1] for rows in first], by=first) > batches.COUPLED:  # or it draws, and seldom
            self._random = any(_change(self._rows(noise), first) > batches.COUPLED for _ in range(batches.TRIES))
            if self._random:
                return
        self._require_independent(alone, first)
        self._sizes, self._steady = batches.steady_sizes(lambda rows: self._rows(noise[rows]), len(noise), first), True

    def _rows(self, pixels: Tensor) -> list[Tensor]:
        return [found.nan_to_num() for found in self._ask(pixels) if found is not None]

    def _require_independent(self, alone: Sequence[Tensor], first: Sequence[Tensor]) -> None:
        change = _change(alone, [rows[:1] for rows in first], by=first)
        if change > batches.COUPLED:
            raise UserError(
                f"what model '{self.classifier.spec}' says of an image depends on the other images in its batch (it "
                f"moved by {change:.2g} standard deviations when only the neighbours changed): pass "
                f"{setting('batch_size', 1)}, or take out what works across the batch, such as batch normalisation in "
                "training mode"
            )


def _change(new: Sequence[Tensor], old: Sequence[Tensor], *, by: Sequence[Tensor] | None = None) -> float:
    """Return by how many standard deviations answers moved at most, those of `by`, else of the old ones."""
    return max(
        float((after - before).abs().max() / spread.std().clamp_min(1e-12))
        for after, before, spread in zip(new, old, by or old, strict=True)
    )


# Rows [V, 3, H, W] in place of an image's pixels [3, H, W], by its id: a corrupted image, or several crops.
Views = Callable[[Tensor, str], Tensor]


class ChunkEncoder:
    """Encodes the images of a source, some `CHUNK` rows at a time.

    Args:
        answers: of the model; seed: of the draws of a random model.
    """

    def __init__(self, answers: Answers, *, seed: int, observer: Observer) -> None:
        self.answers, self.seed, self.observer = answers, seed, observer

    def chunks(
        self,
        source: DataSource,
        *,
        known: Iterable[str] = (),
        limit: int | None = None,
        only: frozenset[str] | None = None,
        views: Views | None = None,
    ) -> Iterator[Encoded]:
        """Yield the images that are not known, of `limit` that are chosen by a hash of their ids, each once.

        Args:
            only: leave out all others, and stop once these have come.
            views: what is encoded of an image, in rows that have its id and label each.

        Raises UserError when the model's output is not finite.
        """
        batch: list[tuple[Sample, Tensor]] = []
        done: list[Encoded] = []
        unreadable: list[UnreadableImage] = []
        seen = set(known)
        left = None if only is None else len(only - seen)
        for item in () if left == 0 else source.samples(limit=limit, keep=_wanted(frozenset(seen), only)):
            if item.id in seen or (only is not None and item.id not in only):
                continue  # streams also name what no one asked for
            seen.add(item.id)
            left = None if left is None else left - 1
            if isinstance(item, Unreadable):
                unreadable.append(UnreadableImage(id=item.id, reason=item.reason))
                self.observer.advance(1)
            else:
                pixels = framing.to_pixels(item.image, self.answers.classifier.framing)
                batch.append((item, pixels[None] if views is None else views(pixels, item.id)))
                if sum(len(rows) for _, rows in batch) >= self.answers.batch(pixels.shape):
                    done.append(self._ask(batch))
                    batch = []
            if sum(len(part.ids) for part in done) >= CHUNK:
                yield joined(done, unreadable)
                done, unreadable = [], []
            if left == 0:
                break
        if batch:
            done.append(self._ask(batch))
        if done or unreadable:
            yield joined(done, unreadable)

    def _ask(self, batch: Sequence[tuple[Sample, Tensor]]) -> Encoded:
        pixels = torch.cat([rows for _, rows in batch])
        samples = [sample for sample, rows in batch for _ in range(len(rows))]
        classifier, began = self.answers.classifier, time.perf_counter()
        views = [view for _, rows in batch for view in range(len(rows))]
        features, output = self.answers.drawn(
            pixels,
            [
                seeds.derive_seed(self.seed, "encode", sample.id, *((view,) if view else ()))
                for sample, view in zip(samples, views, strict=True)
            ],
        )
        seconds = time.perf_counter() - began
        for found in (features, output):
            if found is not None and not found.isfinite().all():
                name = samples[int(found.isfinite().all(dim=1).logical_not().nonzero()[0])].id
                raise UserError(f"model '{classifier.spec}' gives NaN or infinite values, first for the image '{name}'")
        self.observer.advance(len(batch))
        labels = torch.tensor([sample.label for sample in samples])
        return Encoded([sample.id for sample in samples], labels, features, output, seconds)


def _wanted(known: frozenset[str], only: frozenset[str] | None) -> Callable[[str], bool]:
    return lambda name: name not in known and (only is None or name in only)


class Encoder(ChunkEncoder):
    """Encodes sets of images with a model and keeps what it says, in files of about `CHUNK` rows.

    Args:
        answers: of the model; folder: of the kept features; owner: manifest of their run.
        seed: of the draws of a random model.
    """

    def __init__(self, answers: Answers, folder: Path, *, owner: Manifest, seed: int, observer: Observer) -> None:
        super().__init__(answers, seed=seed, observer=observer)
        self.folder, self.owner = folder, owner

    def encode(
        self,
        source: DataSource,
        name: str,
        *,
        limit: int | None,
        title: str,
        only: frozenset[str] | None = None,
        views: Views | None = None,
    ) -> Encoded:
        """Return what the model says of the images of a source; see `chunks`.

        Raises UserError when no image can be read, or the model's output is not finite.
        """
        chunks = [_read(path, self.owner) for path in self._files(name)]
        known = {item for chunk in chunks for item in (*chunk.ids, *(image.id for image in chunk.unreadable))}
        ids = source.ids()
        total = len(only) if only is not None else limit if ids is None else len(select(ids, limit))
        self.observer.begin(title, total, len(known))
        for part in self.chunks(source, known=known, limit=limit, only=only, views=views):
            _write(self.folder / f"{name}-{len(chunks):05d}.safetensors", part, self.owner)
            chunks.append(part)
        if not any(chunk.ids for chunk in chunks):
            raise UserError(_why_none(source.spec, [image for chunk in chunks for image in chunk.unreadable]))
        return _ordered(joined(chunks), ids)

    def _files(self, name: str) -> list[Path]:
        return sorted(self.folder.glob(f"{name}-[0-9][0-9][0-9][0-9][0-9].safetensors"))


def kept(path: Path, make: Callable[[], Encoded], *, owner: Manifest) -> Encoded:
    """Return what the file of a run holds; made and written first when there is none."""
    if not path.exists():
        _write(path, make(), owner)
    return _read(path, owner)


def embed_words(vlm: VLM, words: Sequence[str], templates: Sequence[str], path: Path, *, owner: Manifest) -> Tensor:
    """Return unit text embeddings [W, D] of words, read back from the run's own file if it holds those of the same."""
    wanted = carried(owner) | {"of": object_graph.fingerprint({}, (vlm.fingerprint, *words, "|", *templates))}
    with contextlib.suppress(OSError, SafetensorError, KeyError):
        require_regular(path)
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}) == wanted:
                return file.get_tensor("words")
    made = class_embeddings(vlm, words, templates).float().cpu()
    with replacing(path) as temporary:
        temporary.write_bytes(save({"words": made}, metadata=wanted))
    return made


def _stack(parts: Sequence[Tensor | None]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    return torch.cat(found) if found else None


def joined(parts: Sequence[Encoded], unreadable: Sequence[UnreadableImage] = ()) -> Encoded:
    return Encoded(
        [name for part in parts for name in part.ids],
        torch.cat([part.labels for part in parts]) if parts else torch.zeros(0, dtype=torch.int64),
        _stack([part.features for part in parts]),
        _stack([part.output for part in parts]),
        sum(part.seconds for part in parts),
        [*unreadable, *(image for part in parts for image in part.unreadable)],
    )


def _ordered(found: Encoded, ids: Sequence[str] | None) -> Encoded:
    """Return the images in source order, which a resumed run may not have met them in."""
    if ids is None:
        return found
    place = {name: number for number, name in enumerate(ids)}
    order = sorted(range(len(found.ids)), key=lambda row: place.get(found.ids[row], len(place)))
    return found.rows(torch.tensor(order, dtype=torch.int64))


def _write(path: Path, part: Encoded, owner: Manifest) -> None:
    tensors = {"labels": part.labels}
    for name, values in (("features", part.features), ("output", part.output)):
        if values is not None:
            tensors[name] = values.contiguous()
    about = carried(owner) | {
        "ids": json.dumps(part.ids),
        "seconds": repr(part.seconds),
        "unreadable": json.dumps([image.model_dump() for image in part.unreadable]),
    }
    with replacing(path) as temporary:
        # Written here and not by the library, whose errors for a full disk are not those of the operating system.
        temporary.write_bytes(save(tensors, metadata=about))


def _read(path: Path, owner: Manifest) -> Encoded:
    try:
        require_regular(path)
        with safe_open(path, framework="pt") as file:
            about, names = file.metadata() or {}, set(file.keys())
            found = {name: file.get_tensor(name) for name in names}
        require_owner(about.get("run"), owner, path)
        return Encoded(
            list(parse_json(about["ids"])),
            found["labels"],
            found.get("features"),
            found.get("output"),
            float(about["seconds"]),
            [UnreadableImage(**image) for image in parse_json(about["unreadable"])],
        )
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"cannot read the kept features '{path}' ({first_line(error)}): delete it, the run makes it again"
        ) from None


def _why_none(spec: str, unreadable: Sequence[UnreadableImage]) -> str:
    if unreadable:
        first = unreadable[0]
        return (
            f"none of the {len(unreadable)} images of '{spec}' could be read; the first, '{first.id}': {first.reason}"
        )
    return f"'{spec}' holds no images"
