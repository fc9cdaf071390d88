"""Training purifier and mapper, one stage after the other: the stages as tasks, and their losses."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.core.ranks import Ranks
from robustvlm.core.seeds import derive_seed, generator
from robustvlm.defenses.answering import speaker_of
from robustvlm.defenses.finetune.methods import InnerAttack, frozen
from robustvlm.defenses.purify.denoiser import OwnDenoiser, load_denoiser
from robustvlm.defenses.purify.parts import Mapper, MapperShape, Parts, PurifiedVLM
from robustvlm.defenses.purify.unet import NoiseLevels, Purifier, coefficients, purifier_shape
from robustvlm.defenses.smoothing import SmoothedVLM
from robustvlm.errors import UserError, setting
from robustvlm.models import VLM
from robustvlm.stats import mean
from robustvlm.training import Draws, Measure, Task, Trainer, TrainingConfig, TrainingData, TrainingObserver, gathered
from robustvlm.training.history import History

# What purifier and mapper are trained for: stage one and stage two of FS-PSM (arXiv 2601.16200)


@dataclass(frozen=True)
class PurifierWeights:
    """Weights of the terms of stage one, for means over pixels and images.

    Args:
        diffusion: of the denoising loss at unit weight for every noise level.
        feature: lambda_1, of 1 - cos to the clean feature.
        pixel: lambda_2, of the squared error of the pixels.
        text: of the divergence of the classes that are read off the purified image; 0 asks for no texts.
    """

    diffusion: float = 1.0
    feature: float = 1.0
    pixel: float = 1.0
    text: float = 0.0


@dataclass(frozen=True)
class MapperWeights:
    """Weights of the terms of stage two: `statistics` is lambda_3; 1 - cos to the clean feature has weight 1."""

    statistics: float = 1.0


def purifier_terms(
    estimate: Tensor, clean: Tensor, sigma: Tensor, features: Tensor, clean_features: Tensor
) -> dict[str, Tensor]:
    """Return the terms of stage one as scalars.

    * diffusion: |P(x + e) - x|^2 / c_out(sigma)^2, the U-Net's own squared error, which is of order one at every noise
      level (Karras et al. 2022, arXiv 2206.00364, section 5);
    * feature: 1 - cos(phi(P(x + e)), phi(x));
    * pixel: |P(x + e) - x|^2.

    Means over images and pixels (our reading of the squared norms).

    Args:
        estimate, clean: pixels [B, 3, H, W]; sigma: noise levels [B], above 0.
        features, clean_features: of both [B, D].

    Example:
        >>> x, z = torch.rand(2, 3, 4, 4), torch.eye(2)
        >>> terms = purifier_terms(x, x, torch.tensor([0.1, 0.5]), z, z)
        >>> {name: round(value.item(), 6) for name, value in terms.items()}
        {'diffusion': 0.0, 'feature': 0.0, 'pixel': 0.0}
    """
    squared = (estimate.float() - clean.float()).square().mean(dim=(1, 2, 3))
    scale = coefficients(sigma.float())[1]
    return {
        "diffusion": (squared / scale.square()).mean(),
        "feature": (1 - F.cosine_similarity(features.float(), clean_features.float(), dim=1)).mean(),
        "pixel": squared.mean(),
    }


def mapper_terms(mapped: Tensor, clean: Tensor) -> dict[str, Tensor]:
    """Return the terms of stage two as scalars.

    * similarity: 1 - cos(M(z), phi(x));
    * statistics: squared differences of the per-dimension mean and standard deviation over the batch, summed over the
      dimensions, so that the mapper cannot buy cosine by pulling all features to one place.

    The paper's third term, |M(z, 0) - z|^2, is zero by construction (see `Mapper`).

    Args:
        mapped, clean: unit features [B, D], B >= 2.

    Example:
        >>> z = torch.nn.functional.normalize(torch.rand(4, 8), dim=1)
        >>> {name: abs(round(value.item(), 5)) for name, value in mapper_terms(z, z).items()}
        {'similarity': 0.0, 'statistics': 0.0}
    """
    mapped, clean = mapped.float(), clean.float()
    mean_gap = (mapped.mean(dim=0) - clean.mean(dim=0)).square().sum()
    spread_gap = (_spread(mapped) - _spread(clean)).square().sum()
    return {"similarity": (1 - F.cosine_similarity(mapped, clean, dim=1)).mean(), "statistics": mean_gap + spread_gap}


def _spread(features: Tensor) -> Tensor:
    # The root has no gradient at 0, which a dimension without any spread would ask for.
    return (features.var(dim=0, unbiased=False) + 1e-12).sqrt()


def weighted(terms: dict[str, Tensor], weights: dict[str, float]) -> dict[str, Tensor]:
    """Return the terms and, as "loss", their weighted sum.

    Example:
        >>> weighted({"a": torch.tensor(2.0), "b": torch.tensor(3.0)}, {"a": 1.0, "b": 0.5})["loss"]
        tensor(3.5000)
    """
    total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
    return {"loss": total, **terms}


# The two stages of training, as tasks of the engine: the purifier before the encoder, then the mapper behind it

_ROWS = 64


class PurifierTask(Task):
    """Stage one: the purifier learns to denoise, and to give the frozen encoder what it would make of the clean image.

    Args:
        purifier: what is trained. encoder: frozen; gradients pass through it to the purifier only.
        levels: noise to train for. weights: of the terms of the loss.
        held_out: images [N, 3, S, S] on which the Gaussian robustness score is watched. worth: how many independent
            ones they are worth, where copies are among them.
        texts: unit embeddings [K, D] of class names, for the term `text`.
        attack: raises what the encoder and the texts make of the purified image, before every step; None: noise alone.
    """

    labelled = False

    def __init__(
        self,
        purifier: Purifier,
        encoder: VLM,
        levels: NoiseLevels,
        weights: PurifierWeights,
        held_out: Tensor,
        *,
        worth: float | None = None,
        texts: Tensor | None = None,
        attack: InnerAttack | None = None,
    ) -> None:
        super().__init__(purifier)
        self.purifier, self.encoder, self.levels = purifier, encoder.requires_grad_(False), levels
        self.weights, self.held_out, self.attack = asdict(weights), held_out, attack
        self.worth, self.texts = worth, texts if weights.text else None
        if self.texts is None:
            del self.weights["text"]

    def losses(self, pixels: Tensor, labels: Tensor, step: int, draws: Draws) -> dict[str, Tensor]:
        """Return the weighted sum and the terms of stage one, at attacked images where there is an attack."""
        del labels, step
        with torch.no_grad():
            clean = self.encoder.encode_image(pixels)
        sigma = self.levels.at(draws.uniform(pixels.new_empty(len(pixels), 2), "sigma"))
        noise = sigma.view(-1, 1, 1, 1) * draws.normal(pixels, "noise")
        seen = pixels
        if self.attack is not None:
            with frozen(self.purifier):
                seen, _ = self.attack(
                    lambda x, _: self._gap(x + noise, sigma, clean).sum(), pixels, draws, name="attack"
                )
        estimate = self.purifier(seen + noise, sigma)
        features = self.encoder.encode_image(estimate.to(pixels.dtype))
        terms = purifier_terms(estimate, pixels, sigma, features, clean)
        if self.texts is not None:
            terms["text"] = self._texts_apart(features, clean).mean()
        return weighted(terms, self.weights)

    def _gap(self, noisy: Tensor, sigma: Tensor, clean: Tensor) -> Tensor:
        """Return what the attack raises, for every image: the terms of the loss that are not about pixels."""
        features = self.encoder.encode_image(self.purifier(noisy, sigma).to(noisy.dtype))
        gap = self.weights["feature"] * (1 - F.cosine_similarity(features.float(), clean.float(), dim=1))
        return gap if self.texts is None else gap + self.weights["text"] * self._texts_apart(features, clean)

    def _texts_apart(self, features: Tensor, clean: Tensor) -> Tensor:
        """Return KL(classes of the clean image || classes of the purified one), for every image."""
        assert self.texts is not None
        texts = self.encoder.logit_scale * self.texts.float().T
        goal, found = ((z.float() @ texts).log_softmax(dim=1) for z in (clean, features))
        return F.kl_div(found, goal, reduction="none", log_target=True).sum(dim=1)

    def validate(self) -> Mapping[str, Measure]:
        """Return the score at every level given, behind the purifier."""
        return scores(PurifiedVLM(self.encoder, self.purifier, None), self.held_out, self.levels, worth=self.worth)


class MapperTask(Task):
    """Stage two: the mapper learns to give back the features of the clean image, behind the finished purifier.

    A step has one noise level, so that the statistics of its features are those of one distribution.

    Args:
        mapper: what is trained. encoder: what stands before it, told the noise level by `at_noise`.
        reference: the encoder whose clean features are aimed at.
        levels, weights, held_out, worth: as for `PurifierTask`.
    """

    labelled = False

    def __init__(
        self,
        mapper: Mapper,
        encoder: VLM,
        reference: VLM,
        levels: NoiseLevels,
        weights: MapperWeights,
        held_out: Tensor,
        *,
        worth: float | None = None,
    ) -> None:
        super().__init__(mapper)
        self.worth = worth
        self.mapper, self.encoder, self.reference, self.levels = mapper, encoder, reference, levels
        self.weights, self.held_out = {"similarity": 1.0, **asdict(weights)}, held_out

    def losses(self, pixels: Tensor, labels: Tensor, step: int, draws: Draws) -> dict[str, Tensor]:
        """Return the weighted sum and the terms of stage two."""
        del labels, step
        sigma = float(self.levels.at(torch.rand(1, 2, generator=draws.generator("sigma"))))
        with torch.no_grad():
            clean = self.reference.encode_image(pixels)
            noisy = self.encoder.at_noise(sigma).encode_image(pixels + sigma * draws.normal(pixels, "noise"))
        mapped = self.mapper.unit(noisy, sigma).float()
        return weighted(mapper_terms(gathered(mapped), gathered(clean)), self.weights)

    def validate(self) -> Mapping[str, Measure]:
        """Return the score at every level given, behind purifier and mapper."""
        return scores(PurifiedVLM(self.encoder, None, self.mapper), self.held_out, self.levels, worth=self.worth)


def scores(
    vlm: VLM, images: Tensor, levels: NoiseLevels, *, draws: int = 2, seed: int = 0, worth: float | None = None
) -> dict[str, Measure]:
    """Return the Gaussian robustness score E(1 + cos(f(x + e), f(x))) / 2 at every level, over images and draws.

    The noise is the same in every call, so that the weights of different steps are compared on the same draws. `worth`
    is how many independent images these are worth to the intervals, where copies are among them.

    Example:
        >>> from robustvlm.models import load_model
        >>> found = scores(load_model("tiny"), torch.rand(4, 3, 64, 64), NoiseLevels((0.01, 0.5)))
        >>> found["score at 0.01"].value > found["score at 0.5"].value
        True
    """
    found: dict[str, Measure] = {}
    with torch.no_grad():
        clean = torch.cat([vlm.encode_image(part) for part in images.split(_ROWS)])
        for sigma in levels.given:
            told, noise = vlm.at_noise(sigma), generator(seed, "score", repr(sigma))
            total = torch.zeros(len(images), device=clean.device)
            for _ in range(draws):
                for i, part in enumerate(images.split(_ROWS)):
                    e = torch.randn(part.shape, generator=noise).to(part)
                    features = told.encode_image(part + sigma * e)
                    total[i * _ROWS : i * _ROWS + len(part)] += (features * clean[i * _ROWS :][: len(part)]).sum(dim=1)
            score = (0.5 * (1 + total / draws)).tolist()
            found[f"score at {sigma:g}"] = mean(score, within=(0.0, 1.0), independent=worth)
    return found


# Training purifier and mapper, one stage after the other, each with checkpoints of its own

Stage = Literal["purifier", "mapper"]
STAGES: tuple[Stage, ...] = ("purifier", "mapper")


@dataclass(frozen=True, kw_only=True)
class PurifySettings:
    """What to train for an encoder, and how.

    Args:
        levels: noise levels to train for.
        stages: purifier, mapper, or both in this order.
        denoiser: `module:callable` of a denoiser of the user's, which then stands in the purifier's place.
        size: preset of the purifier.
        purifier, mapper: settings of the engine for the stages.
        purifier_weights, mapper_weights: of the terms of the losses.
        attack: what the purifier is trained against beside noise.

    Raises:
        UserError: nothing would be trained or used; an attack or texts without a purifier to train.
    """

    levels: NoiseLevels
    stages: tuple[Stage, ...] = STAGES
    denoiser: str | None = None
    size: str = "tiny"
    purifier: TrainingConfig
    mapper: TrainingConfig
    purifier_weights: PurifierWeights = field(default_factory=PurifierWeights)
    mapper_weights: MapperWeights = field(default_factory=MapperWeights)
    attack: InnerAttack | None = None

    def __post_init__(self) -> None:
        if "purifier" not in self.trained and (self.attack is not None or self.purifier_weights.text):
            raise UserError(
                f"{setting('eps')} and {setting('text_weight')} are for training a purifier, and none is trained here"
            )
        if self.attack is not None and not (self.purifier_weights.feature or self.purifier_weights.text):
            raise UserError(
                f"an attack has nothing to raise: {setting('eps')} wants {setting('feature_weight')} or "
                f"{setting('text_weight')} above 0"
            )
        if self.denoiser is not None and "purifier" in self.stages and len(self.stages) == 1:
            raise UserError("a denoiser of your own needs no training: leave out --only purifier to train its mapper")

    @property
    def trained(self) -> tuple[Stage, ...]:
        """The stages that have something to train."""
        return tuple(stage for stage in self.stages if stage == "mapper" or self.denoiser is None)

    def config(self, stage: Stage) -> TrainingConfig:
        """Return the engine's settings of a stage."""
        return self.purifier if stage == "purifier" else self.mapper

    def check_parts(self, ranks: int) -> None:
        """Refuse batches that so many processes cannot share, and parts of one image, which have no mean and spread."""
        for stage in self.trained:
            seen = self.config(stage).part_size(ranks) * ranks
            if stage == "mapper" and seen < 2 and self.mapper_weights.statistics:
                raise UserError(
                    f"{setting('statistics_weight')} is of mean and spread over the images of a part, and the mapper's "
                    f"parts hold one: pass a larger {setting('batch_size')}, a smaller {setting('accumulate')}, or "
                    f"{setting('statistics_weight', '0')}"
                )


Observe = Callable[[Stage], TrainingObserver | None]


def train_parts(
    encoder: VLM,
    data: TrainingData,
    settings: PurifySettings,
    held_out: Tensor,
    folder: Path,
    *,
    ranks: Ranks | None = None,
    observe: Observe | None = None,
    run: str | None = None,
    texts: Tensor | None = None,
    worth: float | None = None,
) -> tuple[Parts, Mapping[Stage, History]]:
    """Train purifier and mapper around a frozen encoder; killed at any moment, the same call goes on.

    Args:
        encoder: not smoothed; one that is purified already can be given a mapper.
        data: training images, whose labels are not looked at.
        held_out: images [N, 3, S, S] on which the Gaussian robustness score is watched.
        folder: for checkpoints, in a folder for each stage.
        ranks: of a distributed job; observe: who watches a stage; run: identity of the run that the checkpoints are of.
        texts: unit embeddings [K, D] of class names, for the weight `text`.
        worth: how many independent images `held_out` are worth, where copies are among them.

    Returns:
        The parts, and the record of each stage that was trained.

    Raises:
        UserError: the encoder is smoothed, or already has a purifier and would get another; whatever the engine raises.
    """
    check_encoder(encoder, settings)
    settings.check_parts((ranks or Ranks()).size)
    device, levels = encoder.device, settings.levels
    held_out = held_out.to(device)
    observe = observe or (lambda _: None)
    records: dict[Stage, History] = {}

    def fit(stage: Stage, task: Task) -> None:
        trainer = Trainer(task, data, settings.config(stage), ranks=ranks, observer=observe(stage))
        records[stage] = trainer.fit(folder / stage, run=run)
        task.module.requires_grad_(False)

    purifier: Purifier | OwnDenoiser | None = None
    if settings.denoiser is not None:
        purifier = load_denoiser(settings.denoiser, encoder.image_size, device)
    elif "purifier" in settings.stages:
        with seeded(settings.purifier.seed, "purifier"):
            purifier = Purifier(purifier_shape(settings.size, encoder.image_size)).to(device)
        purifier = purifier.to(memory_format=torch.channels_last)
        weights, attack = settings.purifier_weights, settings.attack
        task = PurifierTask(purifier, encoder, levels, weights, held_out, worth=worth, texts=texts, attack=attack)
        fit("purifier", task)
    mapper: Mapper | None = None
    if "mapper" in settings.stages:
        with seeded(settings.mapper.seed, "mapper"):
            mapper = Mapper(mapper_shape(encoder, held_out[:1])).to(device)
        before = PurifiedVLM(encoder, purifier, None)
        fit("mapper", MapperTask(mapper, before, encoder, levels, settings.mapper_weights, held_out, worth=worth))
    return Parts(purifier, mapper, levels.given), records


@torch.no_grad()
def mapper_shape(encoder: VLM, pixels: Tensor) -> MapperShape:
    """Return the sizes of a mapper: over the features of an encoder, or over each image token for a language model."""
    dim, speaker = encoder.encode_image(pixels).shape[1], speaker_of(encoder)
    if speaker is None or speaker.pooled:
        return MapperShape(dim)
    count, width = speaker.shape
    return MapperShape(width, hidden=0.5, tokens=count)


def check_encoder(encoder: VLM, settings: PurifySettings) -> None:
    """Refuse encoders that purifier or mapper cannot be trained for."""
    if isinstance(encoder, SmoothedVLM):
        plain, smoothed, _ = encoder.spec.partition("+smooth")
        below = f"'{plain}'" if smoothed else "the model below the smoothing"
        raise UserError(f"'{encoder.spec}' is smoothed already: purify {below}, then smooth the result")
    own = isinstance(encoder, PurifiedVLM) and encoder.purifier is not None
    if own and (settings.denoiser is not None or "purifier" in settings.stages):
        raise UserError(f"'{encoder.spec}' has a purifier already: pass --only mapper, or the model it stands on")


@contextlib.contextmanager
def seeded(seed: int, name: str) -> Iterator[None]:
    """Draw first weights from a stream of their own, and leave torch's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "first weights", name))
        yield
