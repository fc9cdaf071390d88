"""From a finished certify run to its audit: the same encoder, images and claims, attacked and judged."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from robustvlm.certify import image_digest
from robustvlm.certify.claims import Claim, Materials, Quantity, find_claim
from robustvlm.certify.claims.changed_words import WordsQuantity, changed_tables, words_quantity
from robustvlm.certify.claims.local_noise import NoiseQuantity
from robustvlm.certify.claims.vote import VOTE
from robustvlm.certify.claims.wordings import AnyWordingQuantity, SureVoteQuantity, worded_quantity
from robustvlm.certify.local_noise import read_local_noise
from robustvlm.certify.normal import Array
from robustvlm.certify.threats import Moving, Noise
from robustvlm.certify.wordings import Wordings
from robustvlm.commands.certify.audit_local_noise import audit_chosen
from robustvlm.commands.certify.audit_moves import audit_moves
from robustvlm.commands.certify.audit_search import Effort, Finding, Target, audit_image
from robustvlm.commands.certify.encoder import NoisyEncoder, behind
from robustvlm.commands.certify.gallery import Gallery, open_gallery
from robustvlm.commands.certify.materials import materials_of, rule_of, vectors_of_classes, wordings_of
from robustvlm.commands.certify.record import CertifyRecord, load_certify_run
from robustvlm.commands.certify.setup import certified_model, describe_head, prompts_of
from robustvlm.commands.certify.wordings import encoded, prompts_of_words, texts_of
from robustvlm.commands.common.inputs import probe_of
from robustvlm.commands.common.store import Journal, read_journal
from robustvlm.core.files import write_text
from robustvlm.core.framing import to_pixels
from robustvlm.core.probe import change_of
from robustvlm.core.seeds import full_precision_kernels
from robustvlm.core.size import Size
from robustvlm.core.user_code import named_by
from robustvlm.data import open_data
from robustvlm.data.source import DataSource, Sample, select
from robustvlm.defenses import SmoothedVLM, load_pipeline
from robustvlm.defenses.answering import token_shape
from robustvlm.errors import UserError
from robustvlm.models import VLM
from robustvlm.runs.manifest import run_identity
from robustvlm.runs.settings import Observer

# An audit that has not ended, kept so that a killed one goes on where it was


def _is_fact(fact: dict[str, Any]) -> bool:
    """Whether a line of the journal is one of those that `Partial.add` writes; others count as not there."""
    try:
        findings = [Finding(**finding) for finding in fact["findings"]]
        return isinstance(fact["image_id"], str) and float(
            fact["radius"] + fact["passes"] + fact["seconds"]
        ) >= 0 <= len(findings)
    except (KeyError, TypeError, ValueError):
        return False


class Partial:
    """The images that an audit has finished, in a journal whose first line holds the settings.

    Facts of an audit with other settings, or of a radius that is another one now, do not count.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        facts = list(read_journal(path))
        if facts[:1] != [header]:
            path.unlink(missing_ok=True)
        self.done: dict[str, dict[str, Any]] = {
            fact["image_id"]: fact for fact in facts[1:] if facts[0] == header and _is_fact(fact)
        }
        self._journal = Journal(path)
        if facts[:1] != [header]:
            self._journal.append(header)

    def has(self, row: dict[str, Any]) -> bool:
        """Whether the image was audited at this radius; forget it if it was another one."""
        known = self.done.get(row["image_id"])
        if known is not None and known["radius"] != row["radius"]:
            del self.done[row["image_id"]]
            known = None
        return known is not None

    def add(self, row: dict[str, Any], findings: list[Finding], *, passes: int, seconds: float) -> None:
        """Keep what was found for an image."""
        fact = {
            "image_id": row["image_id"], "radius": row["radius"], "passes": passes, "seconds": seconds,
            "findings": [finding.model_dump() for finding in findings],
        }  # fmt: skip
        self._journal.append(fact)
        self.done[row["image_id"]] = fact

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, *exception: object) -> None:
        self._journal.close()


# From a finished certify run to its audit: the same encoder, images and claims, attacked and judged


class AuditResult(BaseModel):
    """What an audit found: per image and part of its radius, the lowest value reached beside the certified bound.

    Args:
        quantity: what was measured, in words.
        effort: settings of the search. passes: noisy images through the encoder; a gradient counts twice.
        of: identity of the audited run, None for runs from before there were identities.
        certified: images of the run with a certificate; `findings` may cover fewer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    claim: str
    quantity: str
    certified: int
    effort: dict[str, Any]
    seed: int
    passes: int
    seconds: float
    findings: list[Finding]
    of: str | None = None

    @property
    def broken(self) -> list[Finding]:
        """The findings below a certified bound, Monte-Carlo error excluded."""
        return [finding for finding in self.findings if finding.broken]


class _Deployed(SmoothedVLM):
    """The smoothed encoder of a run: noise at the run's resolution, passes in its precision, counted."""

    def __init__(self, encoder: NoisyEncoder, *, noise: Noise, resolution: Size, rows_per_pass: int) -> None:
        inner = encoder.vlm.base if isinstance(encoder.vlm, SmoothedVLM) else encoder.vlm
        super().__init__(inner, noise.sigma, rows_per_pass=rows_per_pass, threat=noise.threat.smoothed_by)
        self.framing = self.framing.at(
            resolution
        )  # noise is added here; the model's own resize is part of what follows
        self._precision = encoder.precision
        self._encode = encoder.vlm.encode_noisy if isinstance(encoder.vlm, SmoothedVLM) else encoder.vlm.encode_image
        self.rows = 0

    def encode_noisy(self, noisy: Tensor) -> Tensor:
        """Return unit features of noisy images [R, 3, S, S], as the run's encoder does."""
        self.rows += len(noisy) * (2 if torch.is_grad_enabled() else 1)
        wide = noisy.double() if self._precision == "fp64" else noisy
        half = torch.autocast(noisy.device.type, dtype=torch.bfloat16, enabled=self._precision == "bf16")
        with full_precision_kernels(), half:
            return self._encode(wide)


class _Levels:
    """The smoothed encoder of a run at any noise level, made once for each."""

    def __init__(self, encoder: NoisyEncoder, run: CertifyRecord, rows_per_pass: int) -> None:
        self._encoder, self._config, self._rows_per_pass = encoder, run.config, rows_per_pass
        self._made: dict[float, _Deployed] = {}

    def __call__(self, sigma: float) -> _Deployed:
        if sigma not in self._made:
            noise = Noise(self._config.against.threat, sigma)
            self._made[sigma] = _Deployed(
                self._encoder, noise=noise, resolution=self._config.resolution, rows_per_pass=self._rows_per_pass
            )
        return self._made[sigma]

    @property
    def rows(self) -> int:
        """Noisy images so far, at all levels; a gradient counts twice."""
        return sum(model.rows for model in self._made.values())


def audit_folder(
    folder: Path,
    effort: Effort | None = None,
    *,
    limit: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    rows_per_pass: int = 256,
    observer: Observer | None = None,
) -> AuditResult:
    """Attack the certificates of a finished run, write `audit.json` into its folder and return the result.

    A killed audit goes on where it was when it is called again with the same settings.

    Args:
        limit: audit this many of the images that have a certificate, a fixed selection.
        observer: told of the images that are done.

    Raises:
        UserError: the run has not ended, or model or images are not those that it was made with.
    """
    run = load_certify_run(folder)
    effort = effort or Effort()
    with named_by(f"the manifest of '{folder}'"):
        source = open_data(
            run.config.data, classes=_path(run.config.classes), templates=_path(run.config.templates),
            tree=_path(run.config.tree),
        )  # fmt: skip
        vlm = behind(load_pipeline(run.config.model, device=device), run.config.against)
        vlm, claim = certified_model(vlm, run.config, source.class_names), find_claim(run.config.claim)
        if not claim.quantity:
            raise UserError(f"certificates of the claim '{run.config.claim}' cannot be audited: it names no quantity")
        gallery = open_gallery(run.config, vlm, source)
    _require_same_model(run, vlm, source, gallery)
    _require_same_texts(run, source, claim)
    encoder = NoisyEncoder(vlm, precision=run.config.precision)
    noise, levels = run.config.against, _Levels(encoder, run, rows_per_pass)
    attack = partial(audit_moves, threat=noise.threat) if isinstance(noise.threat, Moving) else audit_image
    materials, changing = _materials(run, vlm, source, claim, gallery), _word_changes(run, vlm, source)
    rows = {row["image_id"]: row for row in run.rows.to_pylist() if row["radius"] > 0.0}
    wanted = {name: rows[name] for name in select(rows, limit)}
    identity = run_identity(run.manifest)
    header = {"effort": asdict(effort), "seed": seed, "images": len(wanted)}
    header |= {"run": run.manifest.get("created") if identity is None else identity}
    with Partial(folder / "audit.jsonl", json.loads(json.dumps(header))) as kept:
        left = {name: row for name, row in wanted.items() if not kept.has(row)}
        told = observer or Observer()
        told.begin("Attacking", len(wanted), len(wanted) - len(left))
        for row, pixels in _images(run, source, left, vlm):
            target = Target(
                image_id=row["image_id"],
                pixels=pixels,
                radius=row["radius"],
                claim=partial(_quantity, claim, row, run, materials, changing),
            )
            began, before, alpha = time.monotonic(), levels.rows, effort.alpha / len(wanted)
            if run.config.dual is None:
                found = attack(levels(noise.sigma), target, effort, alpha=alpha, seed=seed)
            else:
                found = audit_chosen(
                    levels, target, effort, noise=read_local_noise(run.config.dual), row=row,
                    sigma=_certified(row, "provenance")["sigma"], materials=materials, alpha=alpha, seed=seed,
                )  # fmt: skip
            kept.add(row, found, passes=levels.rows - before, seconds=time.monotonic() - began)
            told.advance()
        if len(kept.done) < len(wanted):
            raise UserError(f"some images of the run are no longer in '{run.config.data}': audit it on the same data")
        done = [kept.done[name] for name in wanted]
    result = AuditResult(
        run=run.name,
        of=identity,
        claim=run.config.claim,
        quantity=_measured(run, claim),
        certified=len(rows),
        effort=asdict(effort),
        seed=seed,
        passes=sum(fact["passes"] for fact in done),
        seconds=sum(fact["seconds"] for fact in done),
        findings=[Finding(**finding) for fact in done for finding in fact["findings"]],
    )
    write_text(folder / "audit.json", result.model_dump_json(indent=1) + "\n")
    (folder / "audit.jsonl").unlink(missing_ok=True)
    return result


def _measured(run: CertifyRecord, claim: Claim) -> str:
    """Say what an audit measures."""
    if run.config.dual is not None:
        return f"{NoiseQuantity.words}, or {claim.quantity}"
    if run.config.paraphrases is None:
        return claim.quantity
    by_vote = SureVoteQuantity if run.config.words is None else WordsQuantity
    return (by_vote if claim is VOTE else AnyWordingQuantity).words


def _word_changes(
    run: CertifyRecord, vlm: VLM, source: DataSource
) -> Callable[[Wordings, Array, int], list[Array]] | None:
    """Return how an audit changes the words of a run that certifies against it; None for any other."""
    words, where = run.config.words, run.config.paraphrases
    if words is None or where is None:
        return None
    prompts = prompts_of_words(texts_of(where, source.class_names, source.templates))
    known: dict[str, Array] = {}

    def encode(texts: list[str]) -> Array:
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if new:
            known.update(zip(new, encoded(vlm, new), strict=True))
        return np.stack([known[text] for text in texts])

    def changed(wordings: Wordings, steering: Array, label: int) -> list[Array]:
        return changed_tables(wordings, prompts, steering, label, words, encode)[0]

    return changed


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def _require_same_model(run: CertifyRecord, vlm: VLM, source: DataSource, gallery: Gallery | None) -> None:
    """Refuse another model than the certified one, by its digest and by what it answers."""
    before, probe = run.manifest.get("model") or {}, run.manifest.get("probe")
    now = {"fingerprint": vlm.fingerprint} | describe_head(run.config, source.class_names, gallery)
    answers = None
    if before.get("claim") != now.get("claim"):
        raise UserError(f"the claim '{run.config.claim}' has changed since '{run.folder}' was certified: certify again")
    if any(before.get(key) != now.get(key) for key in ("fingerprint", "head")):
        answers = "its weights or settings are others"
    elif probe is not None:
        data = run.manifest["data"]
        answers = change_of(probe, probe_of(vlm, data["class_names"], data["templates"]))
    if answers is not None:
        raise UserError(
            f"the model '{run.config.model}' has changed since '{run.folder}' was certified ({answers}): certify again"
        )


def _quantity(
    claim: Claim,
    row: dict[str, Any],
    run: CertifyRecord,
    materials: Materials,
    changing: Callable[[Wordings, Array, int], list[Array]] | None,
    steering: Array,
    evidence: Array,
) -> Quantity:
    if run.config.words is not None and materials.wordings is not None:
        assert changing is not None
        tables = changing(materials.wordings, steering, row["prediction"])
        return words_quantity(row, tables, materials)
    if materials.wordings is not None:
        return worded_quantity(row, materials, votes=claim is VOTE)
    return claim.audited(row, run.config, materials, steering=steering, evidence=evidence)


def _materials(run: CertifyRecord, vlm: VLM, source: DataSource, claim: Claim, gallery: Gallery | None) -> Materials:
    if not claim.needs_classes:
        return Materials(tokens=token_shape(vlm)[0])
    rule = rule_of(run.config, source.class_names)
    text = None if rule else vectors_of_classes(run.config, vlm, source.class_names, source.templates)
    wordings = wordings_of(run.config, vlm, text, source.class_names, source.templates)
    return materials_of(run.config, vlm, text, source.templates, rule=rule, gallery=gallery, wordings=wordings)


def _require_same_texts(run: CertifyRecord, source: DataSource, claim: Claim) -> None:
    """Refuse other classes, templates or antibodies than the certified claims are about: their files may have changed.

    Raises:
        UserError: what differs.
    """
    if not claim.needs_classes:
        return
    data = run.manifest["data"]
    now = {"class_names": list(source.class_names), "templates": list(source.templates)}
    other = [key.replace("_", " ") for key, texts in now.items() if data.get(key, texts) != texts]
    told = prompts_of(run.config, run.manifest["model"], source.templates)
    if not other and any(_certified(row, "prompts") not in (None, told) for row in run.rows.to_pylist()):
        other = ["antibodies" if run.config.paraphrases is None else "paraphrases"]
    if other:
        raise UserError(
            f"the {' and '.join(other)} of '{run.folder}' have changed since it was certified: certify again"
        )


def _certified(row: dict[str, Any], key: str) -> Any:
    """Return what a row's certificate says of something; None where it says nothing."""
    try:
        return json.loads(row["certificate"]).get(key)
    except (TypeError, ValueError, AttributeError):
        return None


def _images(
    run: CertifyRecord, source: DataSource, rows: dict[str, dict[str, Any]], vlm: VLM
) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Yield the wanted rows with their pixels [1, 3, S, S], in the order of the data."""
    waiting = dict(rows)
    for item in source.samples(keep=lambda name: name in waiting):
        if isinstance(item, Sample) and item.id in waiting:
            pixels = to_pixels(item.image, vlm.framing.at(run.config.resolution))
            row = waiting.pop(item.id)
            _require_same_image(row, pixels, run)
            yield row, pixels[None]
        if not waiting:
            return


def _require_same_image(row: dict[str, Any], pixels: Tensor, run: CertifyRecord) -> None:
    """Refuse an image that is no longer the one that was certified, as far as the run says which that was."""
    known = _certified(row, "image")
    if known and known != image_digest(pixels):
        raise UserError(f"the image '{row['image_id']}' has changed since '{run.folder}' was certified: certify again")
