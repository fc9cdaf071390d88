"""Randomized smoothing of any classifier by the vote of its noisy copies, with the certificate of Cohen et al.

Cohen, Rosenfeld and Kolter 2019, arXiv 1902.02918: the class that the classifier gives most often under Gaussian noise
is the smoothed one's; `predict` names it where the vote is significant, `certify` says how far it is safe.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from robustvlm.attacks.oracle import Oracle
from robustvlm.attacks.probe import row_changes
from robustvlm.attacks.tensors import AskedModel, as_images, image_ids, own_device
from robustvlm.certify.classes import CountedVotes, vote_predict
from robustvlm.certify.engine import Job, SamplingEngine
from robustvlm.certify.noise import settings_digest
from robustvlm.certify.normal import check_alpha
from robustvlm.certify.threats import PLAIN, Noise, find_threat
from robustvlm.core import MAX_N0
from robustvlm.core.batches import COUPLED
from robustvlm.core.object_graph import fingerprint
from robustvlm.data.classes import DEFAULT
from robustvlm.data.source import DataSource
from robustvlm.defenses.classifier import ZeroShot
from robustvlm.defenses.smoothing import DEFAULT_N0, ROWS_PER_PASS, SmoothedVLM
from robustvlm.defenses.zoo.gradients import as_now
from robustvlm.errors import UserError, arguments_named
from robustvlm.models import VLM, zero_shot
from robustvlm.models.custom import Hidden, source_of, state_of

ABSTAIN = -1
"""Stands for the class of an image whose vote decides nothing."""


@dataclass(frozen=True, eq=False)
class CertifiedVotes:
    """What `certify` found, one entry for each image.

    Attributes:
        classes: the certified class, ABSTAIN (-1) where nothing is certified; int64 [N].
        radius: within which the smoothed classifier keeps that class, 0 for ABSTAIN; float64 [N]. An L2 distance in the
            pixels of the images given, or in the unit of the threat. Each holds with probability at least 1 - alpha
            over the noise that was drawn.
        votes: share of the estimation votes for the class that the selection chose; float64 [N].
        sigma, n, n0, alpha: noise level, estimation and selection draws, error probability of each image.
        threat: what the noise is against, by name.
    """

    classes: Tensor
    radius: Tensor
    votes: Tensor = field(repr=False)
    sigma: float
    n: int
    n0: int
    alpha: float
    threat: str = PLAIN


class Smoothed(nn.Module):
    """A classifier smoothed by noise: most votes of noisy copies win.

    Noise is added to the images as they are given, before whatever resizing the model does, and is not clipped:
    N(0, sigma^2 I), or that of another threat (`robustvlm.certify.threats`). As a module it returns log vote shares
    [B, K] of `n` fresh copies, (votes + 1) / (n + K), with the gradient of the log mean softmax probability (Salman et
    al. 2019, arXiv 1906.04584), so that it can be attacked by `perturb`.

    Args:
        model: any module or function from pixels to logits, a classifier, or an encoder with `classes`. It is used in
            evaluation mode and left as it was. It must not draw at random itself nor refuse.
        sigma: noise level in [0, 1] pixels, or in the unit of the threat.
        n: noisy copies of a prediction.
        classes: class names, or data that has them (`open_data`), for an encoder; templates: its prompts.
        lanes: noisy images in a batch.
        threat: what the noise is against: "l2", "8bit" (images of whole numbers / 255), "l1", "brightness", ...

    Raises:
        UserError: sigma or n is out of range, there is no such threat, the model refuses or is smoothed already, an
            encoder has no classes.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        >>> smoothed = Smoothed(model, sigma=0.25, n=64)
        >>> smoothed.predict(torch.rand(5, 3, 2, 2)).shape, smoothed(torch.rand(5, 3, 2, 2)).shape
        (torch.Size([5]), torch.Size([5, 3]))
    """

    ABSTAIN = ABSTAIN

    @arguments_named()
    def __init__(
        self,
        model: Callable[..., Any],
        sigma: float,
        n: int = DEFAULT_N0,
        *,
        classes: Sequence[str] | DataSource | None = None,
        templates: Sequence[str] | None = None,
        lanes: int = ROWS_PER_PASS,
        threat: str = PLAIN,
    ) -> None:
        super().__init__()
        noise = Noise.of_model(find_threat(threat), float(sigma))
        _count("n", n, MAX_N0)
        _count("lanes", lanes, 65_536)
        if isinstance(model, nn.Module) and any(isinstance(m, SmoothedVLM | Smoothed) for m in model.modules()):
            raise UserError("the model is smoothed already: pass the one below, or use predict of this one")
        if getattr(model, "can_reject", False):
            raise UserError(
                "the vote is for models that never refuse: pass the model without its refusal, or certify acceptance "
                "with the command `robustvlm certify --claim openset`"
            )
        if isinstance(model, VLM):
            model = _with_classes(model, classes, templates)
        self.asked = AskedModel(model)
        self.noise, self.sigma, self.n, self.lanes = noise, noise.sigma, n, lanes
        self._classes: int | None = None

    def forward(self, pixels: Tensor) -> Tensor:
        """Return log vote shares [B, K] of pixels [B, C, H, W]; fresh noise on every call, from torch's generator."""
        counts = self._counts(len(pixels))
        soft: Tensor | None = None
        votes: Tensor | None = None
        for count in counts:
            if len(counts) > 1 and torch.is_grad_enabled() and pixels.requires_grad:
                # Recomputed in the backward pass, noise included, so that memory does not grow with n.
                part, hard = checkpoint(as_now(self._part), pixels, count, use_reentrant=False, preserve_rng_state=True)
            else:
                part, hard = self._part(pixels, count)
            soft = part if soft is None else torch.logaddexp(soft, part)
            votes = hard if votes is None else votes + hard
        assert soft is not None
        assert votes is not None
        shares = ((votes + 1) / (self.n + votes.shape[1])).to(soft.dtype).log()
        return shares + (soft - soft.detach())

    def _part(self, pixels: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the log sum of softmax probabilities over `count` noisy copies, and their votes; both [B, K]."""
        logits = self.asked(self._noisy(pixels, count)).view(len(pixels), count, -1)
        votes = nn.functional.one_hot(logits.detach().argmax(dim=2), logits.shape[2]).sum(dim=1)
        return logits.log_softmax(dim=2).logsumexp(dim=1), votes

    @torch.no_grad()
    def predict(self, images: Tensor, alpha: float = 0.001, *, n: int | None = None) -> Tensor:
        """Return the class of each image [N, C, H, W], or ABSTAIN (-1) where the vote is not significant; int64 [N].

        Cohen's PREDICT: `n` fresh copies vote (default: the model's n), and the leading class has to beat the second
        in a two-sided exact binomial test at level `alpha`. A class other than that of the smoothed classifier is
        returned with probability at most alpha, for images chosen without knowing this noise.

        Raises:
            UserError: images, alpha or n that do not fit, or a model whose rows depend on each other or on chance.
        """
        check_alpha(alpha)
        pixels = as_images(images)
        count = self.n if n is None else _count("n", n, MAX_N0)
        oracle = self._oracle(pixels)
        place, width = oracle.device, max(1, self.lanes // min(len(pixels), self.lanes))
        found = []
        for batch in pixels.split(self.lanes):
            rows = batch.to(place, self.asked.dtype)
            votes = torch.zeros(len(rows), self._classes or 0, dtype=torch.int64)
            for start in range(0, count, width):
                copies = min(width, count - start)
                chosen = self._vote(oracle, self._noisy(rows, copies)).view(len(rows), copies)
                cast = chosen.isfinite()
                votes.scatter_add_(1, chosen.nan_to_num().long(), cast.long())
            found += [vote_predict(row.numpy(), alpha) for row in votes]
        return torch.tensor([ABSTAIN if label is None else label for label in found])

    def certify(
        self, images: Tensor, n: int = 10_000, alpha: float = 0.001, *, n0: int = 100, seed: int = 0
    ) -> CertifiedVotes:
        """Return class and certified L2 radius of each image [N, C, H, W]; see `certify_tensors`."""
        check_alpha(alpha)
        _count("n", n, 10_000_000)
        _count("n0", n0, 10_000_000)
        pixels = as_images(images)
        oracle = self._oracle(pixels)
        classes, threat = self._classes or 0, self.noise.threat
        # Where the law of the noise is known up to rounding, that is paid for (`Threat.off_law`).
        spent = alpha - (n0 + n) * threat.off_law(pixels[0].numel(), self.sigma)
        if not spent > 0.5 * alpha:
            raise UserError(
                f"the law of the noise is exact to {alpha - spent:.1e} over {n0 + n:,} copies, which is too much for "
                f"alpha = {alpha:g}: pass fewer of them or a larger alpha"
            )

        def certifier(_: Job | None = None) -> CountedVotes:
            return CountedVotes(
                classes=classes, sigma=self.sigma, alpha=spent, n=n, n_pilot=n0, threat=self.noise.threat.name
            )

        named = () if threat.name == PLAIN else (threat.name,)
        engine = SamplingEngine(
            lambda noisy: self._vote(oracle, noisy)[:, None].to(noisy.device),
            seed=seed,
            lanes=self.lanes,
            device=oracle.device,
            settings=settings_digest(_digest(self.asked.model), certifier().key, *named),
            threat=threat.name,
        )
        jobs = [Job(name, i, pixels[i]) for i, name in enumerate(image_ids(pixels))]
        found = {sampled.job.index: sampled.finding for sampled in engine.run(jobs, certifier)}
        findings = [found[i] for i in range(len(jobs))]
        return CertifiedVotes(
            torch.tensor([ABSTAIN if f.radius <= 0 or f.prediction is None else f.prediction for f in findings]),
            torch.tensor([f.radius for f in findings], dtype=torch.float64),
            torch.tensor([f.columns["votes"] for f in findings], dtype=torch.float64),
            self.sigma,
            n,
            n0,
            float(alpha),
            threat.name,
        )

    def _oracle(self, pixels: Tensor) -> Oracle:
        """Return the model as votes are asked of it; the first time, see whether its rows are independent."""
        if self._classes is None:
            self._classes = self.asked.try_out(pixels)
            self._require_independent_rows(pixels)
        return self._asking(pixels)

    def _asking(self, pixels: Tensor) -> Oracle:
        precision = "fp64" if self.asked.dtype == torch.float64 else "fp32"
        return Oracle(self.asked, device=own_device(self.asked.model, pixels), precision=precision)

    def _require_independent_rows(self, pixels: Tensor) -> None:
        oracle = self._asking(pixels)
        rows = pixels[torch.arange(self.lanes) % len(pixels)].to(oracle.device, oracle.dtype)
        draws = torch.Generator().manual_seed(0)
        noisy = self.noise.fresh(rows.cpu(), draws).to(rows)
        repeat, batch = row_changes(oracle, noisy)
        if repeat > COUPLED:
            raise UserError(
                "the model gives other logits for the same image when it is asked again: votes must follow from the "
                "noise alone, so take out what draws at random"
            )
        if batch > COUPLED:
            raise UserError(
                "the model's output for one image depends on the other images of the batch: votes must be independent, "
                "so pass lanes=1, or take out what works across the batch, such as batch statistics"
            )

    def _vote(self, oracle: Oracle, noisy: Tensor) -> Tensor:
        """Return the class number of each noisy image [R], NaN where the output is not finite; on the CPU."""
        logits = oracle.confirm(noisy)
        chosen = logits.argmax(1).double()
        return torch.where(logits.isfinite().all(1), chosen, torch.full_like(chosen, np.nan)).cpu()

    def _noisy(self, pixels: Tensor, count: int) -> Tensor:
        """Return `count` noisy copies of each image [B * count, C, H, W], in float32 at least."""
        wide = pixels if pixels.dtype == torch.float64 else pixels.float()
        return self.noise.fresh(wide.repeat_interleave(count, dim=0))

    def _counts(self, images: int) -> list[int]:
        width = max(1, self.lanes // max(1, images))
        return [min(width, self.n - start) for start in range(0, self.n, width)]


def certify_tensors(
    model: Smoothed, images: Tensor, n: int = 10_000, alpha: float = 0.001, *, n0: int = 100, seed: int = 0
) -> CertifiedVotes:
    """Certify images [N, C, H, W]: the smoothed model's class, and the radius within which no attack changes it.

    Cohen's CERTIFY: `n0` draws choose the class, `n` independent ones bound its share from below (Clopper and Pearson,
    at level `alpha`), and the radius is sigma times the normal quantile of that bound. Noise follows from `seed`, the
    image and everything that decides the claim, the model's weights included: asked again, the same claim meets the
    same noise, and another claim other noise (`robustvlm.certify.noise`).

    Args:
        model: what `Smoothed` makes. images: floats in [0, 1].
        n: estimation draws. alpha: error probability for each image. n0: selection draws. seed: of the noise.

    Raises:
        UserError: an argument that does not fit, or a model whose rows depend on each other or on chance.

    Example:
        >>> smoothed = Smoothed(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), sigma=0.25)
        >>> found = certify_tensors(smoothed, torch.rand(2, 3, 2, 2), n=500)
        >>> bool(((found.radius > 0) == (found.classes >= 0)).all())
        True
    """
    if not isinstance(model, Smoothed):
        raise UserError(
            f"the vote is certified of a smoothed model, got a {type(model).__name__}: pass Smoothed(model, ...)"
        )
    return model.certify(images, n, alpha, n0=n0, seed=seed)


def _with_classes(vlm: VLM, classes: Sequence[str] | DataSource | None, templates: Sequence[str] | None) -> ZeroShot:
    if classes is None:
        raise UserError(f"'{vlm.spec}' is an encoder and knows no classes: pass classes=[...], or load_classifier(...)")
    names, prompts = (classes.class_names, classes.templates) if isinstance(classes, DataSource) else (classes, DEFAULT)
    return ZeroShot(zero_shot(vlm, names, templates or prompts)).eval()


def _count(name: str, value: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise UserError(f"{name} must be a whole number from 1 to {most:,}, got {value!r}")
    return value


def _digest(model: Any) -> str:
    """Return a digest of all that decides a model's output, as far as it can be seen."""
    known = getattr(model, "fingerprint", None)
    if isinstance(known, str):
        return known
    return fingerprint(state_of(model) | Hidden(model).state(), (*source_of(model), repr(model)))
