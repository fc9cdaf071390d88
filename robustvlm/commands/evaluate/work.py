"""The work of `robustvlm evaluate`: look at every image, keep a row for each, and make the numbers of them."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from robustvlm.commands.common.inputs import describe_data, facts_of, named_files_of, probe_of, remarks_of
from robustvlm.commands.evaluate import EvaluateSettings, corrupted, record
from robustvlm.commands.evaluate.looks import Looker, Pairs
from robustvlm.commands.evaluate.measures import retrieval_places
from robustvlm.commands.evaluate.view import evaluate_report as report_of
from robustvlm.commands.evaluate.view import read_run, show, write_report
from robustvlm.core.files import first_line, parse_json, replacing, require_regular, write_text
from robustvlm.core.ranks import resolve_device
from robustvlm.core.size import sides
from robustvlm.data import DataSource, Unreadable, open_data
from robustvlm.data.corruptions import parse_corruptions, table_side, written
from robustvlm.defenses import load_classifier, load_pipeline
from robustvlm.defenses.classifier import Classifier, ZeroShot
from robustvlm.defenses.library import require_texts
from robustvlm.errors import UserError, setting
from robustvlm.models import VLM, ZeroShotClassifier
from robustvlm.runs.manifest import Manifest, carried, require_owner
from robustvlm.runs.records import write_rows
from robustvlm.runs.run import Facts, Session

__all__ = ["RESULTS", "evaluate_clean", "open_work", "read_run", "report_of", "show", "write_report"]

RESULTS = ("summary.json", "results.parquet")
_REASONS_KEPT = 100
# Seconds between two notes of what the run has cost so far.
_NOTED = 20.0


@dataclass(frozen=True, eq=False)
class EvaluateWork:
    """A run's facts, and the model with the images that it is asked about."""

    facts: Facts
    settings: EvaluateSettings
    looker: Looker

    def run(self, session: Session) -> None:
        """Look at the images that are left, and write rows, summary and, with captions, a row for each caption."""
        ledger = record.EvaluateLedger(session.folder)
        try:
            self._look(ledger, session)
            self._write(ledger, session)
        finally:
            ledger.close()

    def _look(self, ledger: record.EvaluateLedger, session: Session) -> None:
        source, limit = self.looker.source, self.settings.limit
        ids, seen = source.ids(), ledger.seen
        total = limit if ids is None else min(len(ids), limit or len(ids))
        session.observer.begin("Evaluating", total, len(seen))
        began = noted = time.monotonic()
        asked = 0
        for look in self.looker.looks(seen, ledger.batches):
            if look.pairs is not None:
                _save(session.path, look.number, look.pairs, session.manifest)
            for index, item in look.unreadable:
                ledger.add_unreadable(index, item)
            if look.corrupted:
                ledger.add_corrupted(look.corrupted)
            if look.rows:
                ledger.add_batch(look.rows)
            asked += sum(row.confidence is not None for row in look.rows) + sum(map(len, look.corrupted.values()))
            session.observer.advance(len(look.rows) + len(look.unreadable))
            if time.monotonic() - noted > _NOTED:
                noted = time.monotonic()
                ledger.add_cost(forward=asked, seconds=noted - began, model_seconds=0.0)
        if asked or not ledger.cost.seconds:
            ledger.add_cost(forward=asked, seconds=time.monotonic() - began, model_seconds=0.0)

    def _write(self, ledger: record.EvaluateLedger, session: Session) -> None:
        source = self.looker.source
        retrieval, captions = None, None
        places: dict[int, int] = {}
        if self.looker.encoder is not None:
            session.observer.begin("Comparing images and captions")
            retrieval, places, captions = _retrieved(session.path, ledger, session.manifest, source.group)
        if retrieval is not None and captions is not None and self.looker.encoder is not None:
            lost = self.looker.encoder.cut_tokens(captions.column("caption").to_pylist())
            retrieval = retrieval.model_copy(update={"cut": sum(tokens > 0 for tokens in lost)})
        summary = result_of(
            self.looker.model,
            source,
            ledger.rows,
            [(image.id, image.reason) for image in ledger.unreadable],
            seconds=ledger.cost.seconds,
            whole=self.settings.limit is None,
            retrieval=retrieval,
        )
        known = sorted((row for row in ledger.rows if row.known), key=lambda row: row.index)
        if self.looker.corruptions:
            side = table_side(min(sides(self.looker.model.image_size)))
            found = corrupted.measured(known, ledger.corrupted, side, group=source.group)
            summary = summary.model_copy(update={"corruptions": found})
        with session.results() as folder:
            write_rows(session.folder.results_path, record.table_of(ledger.rows, places))
            if summary.corruptions is not None:
                write_rows(folder / "corrupted.parquet", corrupted.table_of(known, ledger.corrupted))
            if captions is not None:
                write_rows(folder / "captions.parquet", captions)
            session.folder.report_path.unlink(missing_ok=True)
            write_text(session.folder.summary_path, summary.model_dump_json(indent=2) + "\n")


def open_work(settings: EvaluateSettings) -> EvaluateWork:
    """Check all settings, open the data and load the model."""
    corruptions = () if settings.corrupt is None else parse_corruptions(settings.corrupt)
    source = open_data(settings.data, classes=settings.classes, templates=settings.templates, tree=settings.tree)
    if corruptions and not source.class_names:
        raise UserError(f"{setting('corrupt')} asks for classes, which '{settings.data}' has none of: leave it out")
    device = resolve_device(settings.device)
    model: Classifier | VLM
    if source.class_names:
        model = load_classifier(settings.model, source.class_names, source.templates, device=device)
        vlm, more = model.vlm, ["can_reject"]
    else:
        model = vlm = load_pipeline(settings.model, device=device)
        more = []
    if source.captioned:
        if vlm is None:
            raise UserError(
                f"'{settings.model}' has no encoder to compare images and captions with: leave out ?captions="
            )
        require_texts(vlm, "image-text retrieval")
    facts = Facts(
        (settings.model, settings.data),
        settings.stored(device=str(device)) | ({"corrupt": written(corruptions)} if corruptions else {}),
        facts_of(model, *more),
        describe_data(source),
        probe=probe_of(model, source.class_names, source.templates if source.class_names else ()),
        remarks=remarks_of(source, model),
        named_files=named_files_of(source),
    )
    return EvaluateWork(facts, settings, Looker(model, source, settings.limit, settings.batch_size, corruptions))


def evaluate_clean(
    classifier: Classifier | ZeroShotClassifier,
    source: DataSource,
    *,
    limit: int | None = None,
    batch_size: int = 64,
    on_images: Callable[[int], None] | None = None,
) -> record.CleanResult:
    """Return accuracy, calibration error and superclass accuracy of `classifier` on the images of `source`; no run.

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
    rows: list[record.ImageRow] = []
    unreadable: list[tuple[int, Unreadable]] = []
    start = time.perf_counter()
    for look in Looker(classifier, source, limit, batch_size).looks():
        rows += look.rows
        unreadable += look.unreadable
        if on_images is not None:
            on_images(len(look.rows) + len(look.unreadable))
    reasons = [(item.id, item.reason) for _, item in sorted(unreadable, key=lambda pair: pair[0])]
    seconds = time.perf_counter() - start
    return result_of(classifier, source, rows, reasons, seconds=seconds, whole=limit is None)


def result_of(
    model: Classifier | VLM,
    source: DataSource,
    rows: Sequence[record.ImageRow],
    unreadable: Sequence[tuple[str, str]],
    *,
    seconds: float,
    whole: bool,
    retrieval: record.Retrieval | None = None,
) -> record.CleanResult:
    """Return the numbers made of all rows; UserError where there is nothing to measure.

    Args:
        unreadable: (id, reason) of images that could not be read. whole: no part of the images was selected.
    """
    ordered = sorted(rows, key=lambda row: row.index)
    if retrieval is None and not any(row.known for row in ordered):
        raise UserError(_why_none(source, ordered, unreadable))
    return record.CleanResult(
        model=model.spec,
        model_fingerprint=model.fingerprint,
        data=source.spec,
        classes=len(source.class_names),
        unreadable=len(unreadable),
        unreadable_reasons=list(unreadable[:_REASONS_KEPT]),
        remarks=[*remarks_of(source, model), *_empty_classes(source, ordered, whole=whole)],
        retrieval=retrieval,
        seconds=seconds,
        **record.measured(
            ordered,
            source.tree,
            source.class_names,
            abstains=getattr(model, "abstains", False),
            group=source.group,
        ),
    )


def _empty_classes(source: DataSource, rows: Sequence[record.ImageRow], *, whole: bool) -> list[str]:
    """Say which classes no image of the whole set is of: they only make the task harder."""
    seen = {row.label for row in rows if row.known}
    lost = [name for label, name in enumerate(source.class_names) if label not in seen]
    if not whole or not lost or not seen:
        return []
    shown = ", ".join(f"'{name}'" for name in lost[:6]) + (", ..." if len(lost) > 6 else "")
    return [f"no image that can be read is of {len(lost)} of the {len(source.class_names)} classes: {shown}"]


def _why_none(source: DataSource, rows: Sequence[record.ImageRow], unreadable: Sequence[tuple[str, str]]) -> str:
    spec = source.spec
    if unreadable:
        name, reason = unreadable[0]
        return f"none of the {len(unreadable)} images of '{spec}' could be read; the first, '{name}': {reason}"
    if rows and source.captioned:
        return f"none of the {len(rows)} images of '{spec}' has a caption"
    if rows:
        return f"all {len(rows)} images of '{spec}' are of unknown classes: accuracy needs images of known ones"
    return f"'{spec}' holds no images"


# Features of images and captions, a file a batch: they are compared once all are there


def _file(folder: Path, number: int) -> Path:
    return folder / "features" / f"pairs-{number:06d}.safetensors"


def _save(folder: Path, number: int, pairs: Pairs, manifest: Manifest) -> None:
    """Keep the features of a batch; before its rows, so that a batch with rows has them."""
    path = _file(folder, number)
    path.parent.mkdir(exist_ok=True)
    tensors = {"images": pairs.images, "features": pairs.features, "owner": pairs.owner}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    about = {"texts": json.dumps(pairs.texts), "index": json.dumps(pairs.index), **carried(manifest)}
    with replacing(path) as temporary:
        temporary.write_bytes(save(tensors, about))


def _load(path: Path, manifest: Manifest) -> Pairs:
    try:
        require_regular(path)
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            require_owner(about.get("run"), manifest, path, old=False)
            images, features, owner = (file.get_tensor(name) for name in ("images", "features", "owner"))
            return Pairs(parse_json(about["index"]), images, parse_json(about["texts"]), features, owner)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(
            f"'{path}' is damaged ({first_line(error)}): start over with {setting('fresh', True)}"
        ) from None


def _retrieved(
    folder: Path, ledger: record.EvaluateLedger, manifest: Manifest, group: record.Group
) -> tuple[record.Retrieval | None, dict[int, int], pa.Table | None]:
    """Compare every image that has captions with every caption: recalls, the places of images, a row a caption."""
    batches = [_load(path, manifest) for path in map(partial(_file, folder), range(ledger.batches)) if path.exists()]
    if not batches:
        return None, {}, None
    starts = list(_starts(batches))
    owner = torch.cat([pairs.owner + start for pairs, start in zip(batches, starts, strict=True)])
    index = [number for pairs in batches for number in pairs.index]
    images, texts = torch.cat([pairs.images for pairs in batches]), torch.cat([pairs.features for pairs in batches])
    of_images, of_texts = retrieval_places(images, texts, owner)
    name = {row.index: row.image_id for row in ledger.rows}
    about = [index[place] for place in owner.tolist()]
    columns: dict[str, list[Any]] = {
        "index": about,
        "image_id": [name[number] for number in about],
        "caption": [text for pairs in batches for text in pairs.texts],
        "image_place": of_texts.tolist(),
    }
    groups = [group(name[number]) for number in index]
    found = record.recalls(of_images, of_texts, owner, groups=groups, without=len(ledger.rows) - len(index))
    return found, dict(zip(index, of_images.tolist(), strict=True)), pa.table(columns, schema=record.CAPTIONS)


def _starts(batches: Sequence[Pairs]) -> Iterator[int]:
    start = 0
    for pairs in batches:
        yield start
        start += len(pairs.index)
