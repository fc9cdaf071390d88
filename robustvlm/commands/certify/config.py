"""What defines a certify run: the settings that decide its certificates, and what its noise is drawn for."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator

from robustvlm.certify import settings_digest
from robustvlm.certify.claims import require_known
from robustvlm.certify.threats import Noise, find_threat
from robustvlm.core.files import first_line, parse_json, read_bytes
from robustvlm.core.probe import change_of
from robustvlm.core.size import Size
from robustvlm.errors import UserError
from robustvlm.runs.folder import RunFolder
from robustvlm.runs.manifest import Manifest

# What defines a certify run: the settings that decide its certificates

_LATER = (
    "abstains_at",
    "top",
    "threat",
    "gallery",
    "candidates",
    "n_candidates",
    "candidate_list",
    "dual",
    "paraphrases",
    "words",
)
ASIDE = 1e-3
"""Share of alpha that is set aside where the law of the noise is known up to rounding (`Threat.off_law`)."""
CacheType = Literal["float16", "float32"]
Prompts = Literal["independent", "adaptive", "candidates"]


class CertifyConfig(BaseModel):
    """Every setting that the rows of a certify run depend on; a run is resumed only under an equal one.

    Args:
        claim: a name of `robustvlm.certify.claims.CLAIMS`, or `module:callable`.
        samples: noisy copies per image at most, `n_pilot` of them for choices (label, direction, side).
        radius: certify at this radius and stop as soon as that is decided; None: the largest radius, all samples.
        at: radii at which the summary counts certified images.
        tau, antibodies, weight: threshold, file of antibody texts and their weight, for open-set claims.
        deployed: samples of the deployed smoother whose bound is shown beside the ideal one; those of MODEL+smooth if
            that is what is certified.
        abstains_at: alpha at which that model abstains; None: it always answers, or is not smoothed.
        gallery: data whose images are searched in place of texts (recall).
        threat: what the noise is against, as `robustvlm.certify.threats.find_threat` reads it; None: l2.
        top: how many classes or texts a claim lets the certified one be among.
        dual: how the noise level of each image is chosen, as `certify.local_noise.read_local_noise` reads it; then
            `sigma` is the noise at which copies vote for it. None: it is `sigma` for all images.
        paraphrases: whose wordings a certificate holds for, all at once: "templates", or a file; None: the usual ones.
        words: changed words of the prompts that a certificate bears, where copies read the `paraphrases` by turns.
        noise: digest of all that decides the certificates, from which the noise is drawn beside the seed; None in runs
            from before it was, whose noise followed from seed and image alone.
        cache: number type in which noisy features are kept.
        source: fingerprint of the run whose kept features are judged instead of new ones.
        prompts: for kept features: whether the prompts were fixed without looking at what the features gave.
        candidates, n_candidates, candidate_list: file, number and digest of the names that the classes were drawn from,
            where only those were fixed without looking.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    data: str
    classes: str | None = None
    templates: str | None = None
    tree: str | None = None
    claim: str
    sigma: float
    samples: int
    n_pilot: int
    alpha: float
    min_cos: float | None = None
    radius: float | None = None
    at: list[float]
    tau: float | None = None
    antibodies: str | None = None
    weight: float = 0.0
    deployed: int | None = None
    abstains_at: float | None = None
    top: int | None = None
    gallery: str | None = None
    threat: str | None = None
    cache: CacheType | None = None
    source: str | None = None
    prompts: Prompts | None = None
    candidates: str | None = None
    n_candidates: int | None = None
    candidate_list: str | None = None
    dual: str | None = None
    paraphrases: str | None = None
    words: int | None = None
    limit: int | None
    seed: int
    lanes: int
    device: str
    precision: str
    resolution: Size
    noise: str | None = None

    @property
    def against(self) -> Noise:
        """The noise, and what it is against."""
        return Noise(find_threat(self.threat), self.sigma)

    @property
    def bounding(self) -> CertifyConfig:
        """The settings that bounds are made under: less alpha, where some is set aside for the law of the noise."""
        aside = self.against.threat.off_law(1, self.sigma) > 0.0
        return self.model_copy(update={"alpha": self.alpha * (1.0 - ASIDE)}) if aside else self

    def stored(self) -> dict[str, Any]:
        """Return the settings for the manifest; without those that came later and are not used."""
        return self.model_dump(exclude={name for name in _LATER if getattr(self, name) is None})

    @field_validator("claim")
    @classmethod
    def _known(cls, claim: str) -> str:
        try:
            return require_known(claim)
        except UserError as error:
            raise ValueError(str(error)) from None


# What a run's noise is drawn for, and how often its images have been looked at: the paper trail of certificates.
#
# Every look has noise of its own, so that its certificates hold at their alpha whatever its settings were chosen by
# (`robustvlm.certify.noise`). Who picks the best of several looks multiplies the error probability all the same, and no
# run can know what was thrown away; what it can do is count. `certify-looks.jsonl`, beside the run folders, has a line
# for every look that was begun there, also of runs that were deleted or started over since.

LEDGER = "certify-looks.jsonl"

# What of a configuration decides no certificate, or is part of the digest by content instead of by path. Whatever is
# added to the configuration later counts unless it is named here.
_BESIDE = {
    "data", "gallery", "classes", "templates", "tree", "antibodies", "at", "deployed", "abstains_at", "cache", "limit",
    "seed", "lanes", "device", "source", "prompts", "noise", "paraphrases",
}  # fmt: skip
_NAMED = 20


def noise_settings(config: CertifyConfig, model: Mapping[str, Any], texts: Mapping[str, Sequence[str]]) -> str:
    """Return the digest of everything that decides the certificates of a run, except seed and images.

    Args:
        model: its facts; fingerprint and head are what count. texts: class names, templates, antibodies.
    """
    own = {name: value for name, value in config.stored().items() if name not in _BESIDE}
    parts = {
        "model": [model.get("fingerprint"), model.get("head")],
        **{name: list(some) for name, some in texts.items()},
    }
    return settings_digest(json.dumps([own, parts], sort_keys=True))


def describe_trail(folder: RunFolder, manifest: Manifest, *, judged: Manifest | None = None) -> dict[str, Any]:
    """Return what a manifest says of the looks at its images: its own, and those of other settings or seeds before.

    Args:
        folder: of the run; the ledger lies beside it. judged: manifest of the run whose kept features are judged.
    """
    look = _look(manifest, judged)
    known = [entry for entry in read_looks(folder.path.parent) if entry["images"] == look["images"]]
    if judged is not None:
        known.append(_look(judged, None))
    others: list[dict[str, Any]] = []
    for entry in known:
        if not any(_same(entry, other) for other in (look, *others)):
            others.append(entry)
    same = [entry for entry in others if entry["noise"] == look["noise"]]
    return {
        "look": look,
        "looks": len(others) + 1,
        "same_noise": len(same) + 1,
        "others": [str(entry["run"]) for entry in others][-_NAMED:],
    }


def trail_words(trail: Mapping[str, Any], alpha: float) -> str:
    """Say how often the images have been looked at and what that means for whoever chooses among the looks.

    Example:
        >>> trail_words({"looks": 1, "same_noise": 1, "others": []}, 0.001)
        'First look at these images in this folder of runs; its noise was drawn for these very settings.'
    """
    looks, same = int(trail["looks"]), int(trail["same_noise"])
    if looks == 1:
        return "First look at these images in this folder of runs; its noise was drawn for these very settings."
    drawn = (
        "Its noise was drawn for these very settings"
        if same == 1
        else f"{same} of them share the noise of this one (kept features, or a model changed where no digest looks)"
    )
    return (
        f"{looks} looks at these images in this folder of runs, this one included. {drawn}. A certificate is false "
        f"with probability at most {alpha!r} by itself; the best of {looks} that is picked by its results, with up to "
        f"{looks} times that. To publish one, fix its settings and certify once more with another --seed."
    )


def read_looks(out: Path) -> list[dict[str, Any]]:
    """Return the looks that were begun in a folder of runs; lines that are none are left out."""
    try:
        lines = read_bytes(out / LEDGER).decode("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read '{out / LEDGER}' ({first_line(error)}): it counts the looks at images") from None
    found = []
    for line in lines:
        try:
            entry = parse_json(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and all(
            isinstance(entry.get(key), str) for key in ("images", "look", "noise", "run")
        ):
            found.append(entry)
    return found


def record_look(folder: RunFolder, trail: Mapping[str, Any]) -> None:
    """Note in the ledger that a run has begun, unless it is there already."""
    look = dict(trail["look"])
    out = folder.path.parent
    if any(_same(entry, look) for entry in read_looks(out)):
        return
    # Appended in one write, and never through a symbolic link, which could lead to a file of somebody else's.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        handle = os.open(out / LEDGER, flags, 0o644)
        try:
            os.write(handle, (json.dumps(look) + "\n").encode())
        finally:
            os.close(handle)
    except OSError as error:
        raise UserError(f"cannot write '{out / LEDGER}' ({error.strerror}): it counts the looks at images") from None


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two entries are one look: a model can change where its digest does not see it, but its answers tell."""
    if one["look"] != other["look"]:
        return False
    before, now = one.get("probe"), other.get("probe")
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return True
    try:
        return change_of(before, now) is None
    except UserError:  # a damaged line
        return False


def _look(manifest: Manifest, judged: Manifest | None) -> dict[str, Any]:
    config, data = manifest["config"], manifest["data"]
    images = settings_digest(str(data.get("spec")))
    # Without a digest of settings (earlier versions), the noise followed from the seed alone.
    own = settings_digest(str(config.get("noise")), int(config["seed"]), images)
    noise = own if judged is None else str(_look(judged, None)["noise"])
    judging = json.dumps([config, data.get("class_names"), data.get("templates")], sort_keys=True, default=str)
    return {
        "images": images,
        "look": own if judged is None else settings_digest(noise, judging),
        "noise": noise,
        "run": str(manifest["name"]),
        "created": str(manifest["created"]),
        "claim": str(config.get("claim")),
        "model": str(config.get("model")),
        "seed": int(config["seed"]),
        "probe": manifest.get("probe"),
    }
