"""`robustvlm certify`: radii inside which no attack can do certain things to a smoothed model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import model_validator

from robustvlm.core import LAMBDA_INF, MAX_N0, MOST_WORDS, N_MAX
from robustvlm.errors import BadSetting, setting
from robustvlm.runs.run import Command, mirrors
from robustvlm.runs.settings import Settings, Shared, argument, option, shown_as, way

if TYPE_CHECKING:
    from robustvlm.commands.certify.record import CertifyRecord


class CertifySettings(Settings):
    """Certify a smoothed model: a radius per image inside which, with confidence 1 - alpha, no attack succeeds.

    Stopped or killed at any moment, the same command goes on where it was and ends with the same results.
    """

    group: ClassVar[str] = "Certificate"

    model: str = argument(
        "tiny", "Any model (`robustvlm models` lists the forms); of MODEL+smooth:SIGMA the smoothing is certified."
    )
    data: str = option("emoji", "The images; `robustvlm data` lists the forms.", group="Model and data")
    classes: Path | None = Shared.CLASSES
    templates: Path | None = Shared.TEMPLATES
    tree: Path | None = Shared.TREE_FILE
    claim: str | None = option(
        None,
        "feature (cosine to the smoothed clean feature), joint (the same, another bound), tokens (of each image token "
        "of a multimodal model), class (of the mean feature), vote (hard vote, another rule), named (by most free "
        "answers of a model that answers in words), topk (among the classes with most votes), recall (among the texts "
        "or images nearest to the mean feature), openset (accepted or rejected), open-vote (a class or none of them, "
        "by votes of an immunised model), or module:callable of your own "
        "[default: what a model that abstains answers by, else feature; with --from-cache: class].",
    )
    threat: str | None = option(
        None,
        "What images may do: l2 (any change of pixels), 8bit (l2 between images of whole numbers, sound in floating "
        "point), l1, ellipsoid@SCALES (of channels, as 1,1,2, or a map in a file), spectrum@SCALES (of bands of "
        "spatial frequency), brightness, contrast, light (both), gamma, colour, translation, rotation (every angle of "
        "a range, by l2 noise; vote); radii are in its unit [default: that of MODEL+smooth:THREAT=SIGMA, else l2].",
    )
    sigma: float | None = option(
        None, "Noise level, in pixels scaled to [0, 1] or the unit of the threat [default: 0.25, by threat]."
    )
    samples: int = option(10_000, "Noisy copies per image, at most.", at_least=2, at_most=N_MAX)
    alpha: float | None = option(
        None,
        "Probability that an image's certificate is false, at most [default: 0.001; with --from-cache that of the "
        "run].",
    )
    min_cos: float = option(0.5, "Cosine to certify (feature claims).")
    radius: float | None = option(
        None, "Decide only whether this radius is certified, with as few samples as that takes."
    )
    at: str | None = option(None, "Radii to count images at, as 0.1,0.25 [default: by sigma].")
    tau: float | None = option(
        None, "Threshold of the score, from other images (openset); in place of the model's own."
    )
    antibodies: Path | None = option(None, "File of names to score against (openset).")
    weight: float = option(LAMBDA_INF, "Weight of the antibodies (openset).")
    paraphrases: str | None = option(
        None,
        "Certify the class for all wordings at once (class, vote): templates (each by itself, and their mean), or a "
        "file of lines CLASS: TEXT, any of which a class may be written with.",
    )
    words: int | None = option(
        None,
        "Certify that the class stays though so many words of the prompts are changed too: each noisy copy reads one "
        "of the wordings of --paraphrases (vote).",
        at_least=0,
        at_most=MOST_WORDS,
    )
    top: int = option(5, "How many classes or texts it may be among (topk, recall).", at_least=1)
    gallery: str | None = option(
        None, "Data whose images are searched in place of texts: one of the image's class stays near (recall)."
    )
    deployed: int | None = option(
        None,
        "Also certify what this many fresh copies keep [default: N0 of MODEL+smooth:SIGMA:N0].",
        at_least=1,
        at_most=MAX_N0,
    )
    cache: str | None = option(
        None, "Keep the noisy features as float16 or float32, to certify other prompts later.", group="Kept features"
    )
    from_cache: str | None = way(
        None, "A run made with --cache: certify --classes by text passes only.", group="Kept features"
    )
    prompts: str | None = option(
        None,
        "With --from-cache: independent if the prompts were fixed without looking at what the features gave, else "
        "adaptive (the default, valid always, smaller radii).",
        group="Kept features",
    )
    candidates: Path | None = option(
        None,
        "With --from-cache: file of names fixed without looking, from which --classes is drawn at any time (class; "
        "larger radii than adaptive).",
        group="Kept features",
    )
    limit: int | None = option(
        None, "Certify this many images, chosen by a hash of their ids.", at_least=1, group="Model and data"
    )
    seed: int = option(0, "Seed of the noise.", at_least=0, group="Run")
    lanes: int | None = option(
        None, "Noisy images per batch [default: 128; GPU: 512].", at_least=1, at_most=N_MAX, group="Run"
    )
    device: str = Shared.DEVICE
    precision: str = option(
        "fp32", "fp32, bf16 or fp64: part of the encoder that is certified, to be deployed alike.", group="Run"
    )
    out: Path = Shared.OUT
    name: str | None = Shared.NAME
    resume: bool | None = Shared.RESUME
    track: str | None = Shared.TRACK
    audit: str | None = shown_as(
        None, "Attack the certificates of this finished run; exit code 1 if one breaks.", group="Audit"
    )
    audit_starts: int | None = shown_as(None, "Descents per image and distance (audit).", group="Audit")
    audit_steps: int | None = shown_as(None, "Gradient steps per descent (audit).", group="Audit")
    as_json: bool = Shared.SUMMARY_AS_JSON
    fail_if: list[str] | None = shown_as(
        None, "End with exit code 1 if this holds, e.g. 'certified@0.25<50%' or 'mean_radius<0.1'."
    )

    @model_validator(mode="after")
    def _of_one_kind(self) -> CertifySettings:
        """Refuse what has no effect in an audit, or outside one."""
        if self.audit is None:
            self.require_none(("audit_starts", "audit_steps"), f"is for {setting('audit', 'RUN')}")
            return self
        others = ("fail_if", "from_cache", "prompts", "candidates", "name", "track")
        why = f"is not for {setting('audit')}: what is audited stands in the run"
        self.require_none(others, why)
        self.require_only(("limit", "seed", "device"), why)
        for name in ("audit_starts", "audit_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadSetting(name, "must be at least 1", got=value)
        return self


CERTIFY = Command(
    "certify", CertifySettings, "robustvlm.commands.certify.work", doing="Certifying", shares="the images"
)


@mirrors(CERTIFY)
def certify(model: str = "tiny", **options: Any) -> CertifyRecord:
    """Certify a smoothed model, as `robustvlm certify` does; options by their names. Also `robustvlm.certify(...)`.

    Radii are l2 distances in the pixels that the noise is added to, in [0, 1], or in the unit of the `threat`. Each
    image's certificate is false with probability at most `alpha`.

    Raises:
        UserError: whatever is wrong with the options, the data or the model; settings that can certify nothing.

    Example:
        >>> import tempfile
        >>> found = certify("tiny", claim="class", sigma=0.05, samples=200, limit=2, out=tempfile.mkdtemp())
        >>> found.summary.images, found.rows.column("radius").to_numpy().shape
        (2, (2,))
    """
    found: CertifyRecord = CERTIFY.start(model=model, **options)  # type: ignore[assignment]
    return found
