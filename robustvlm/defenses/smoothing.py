"""Smoothing as a model: the mean feature of noisy copies of an image, fresh noise on every call."""

import contextlib
import copy
import hashlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from robustvlm.core import MAX_N0, PLAIN
from robustvlm.core.boundary import borrowed
from robustvlm.core.object_graph import fingerprint
from robustvlm.defenses.zoo.gradients import as_now
from robustvlm.errors import UserError, nearest
from robustvlm.models import VLM, ZeroShotClassifier
from robustvlm.models.vlm import fitted
from robustvlm.text import format_exact

if TYPE_CHECKING:
    from robustvlm.certify.threats import Noise

DEFAULT_N0 = 64
ROWS_PER_PASS = 128

Hook = Callable[[Tensor], Tensor]


RULE_ALPHAS = (1e-100, 0.5)
"""Error probabilities at which a rule may answer: below the first, logarithms of p-values run out of digits."""


RULE_USUAL = 0.001
"""That of a model that abstains without saying at which."""


@dataclass(frozen=True)
class Rule:
    """How a smoothed classifier answers from its n0 copies, and when it gives no answer: part of the model (T10).

    By the mean feature, the first half of the copies names the class and the second half has to beat every rival
    (`robustvlm.certify.predict`); by votes, the leading class has to beat the second in a two-sided exact binomial test
    (`robustvlm.certify.vote_predict`).

    Args:
        alpha: at an image where the ideal model's class is certified, another class is answered with at most this
            probability over the copies.
        votes: the copies vote, instead of being averaged.

    Raises:
        UserError: alpha is no error probability.

    Example:
        >>> Rule(0.001).words(64), Rule(0.001).least_copies
        ('the class that the mean of 64 noisy copies decides at alpha 0.001, else no answer', 27)
    """

    alpha: float
    votes: bool = False

    def __post_init__(self) -> None:
        least, most = RULE_ALPHAS
        if not least <= self.alpha <= most:
            raise UserError(
                f"a model abstains at an error probability from {least:g} to {most:g}, got {self.alpha:g}: pass 0.001"
            )

    def __str__(self) -> str:
        return f"{format_exact(self.alpha)}{':vote' * self.votes}"

    @cached_property
    def least_copies(self) -> int:
        """The fewest copies that can decide anything."""
        from robustvlm.certify.deployed import least_copies  # certificates' mathematics, which attacks do without

        return least_copies(self.alpha, votes=self.votes)

    def words(self, n0: int, *, refuses: bool = False) -> str:
        """Say how a model with `n0` copies answers; refuses: copies may be put into none of the classes as well."""
        how = f"the vote of {n0:,} noisy copies" if self.votes else f"the mean of {n0:,} noisy copies"
        what = "the class, or that it is none of them," if refuses else "the class"
        return f"{what} that {how} decides at alpha {self.alpha:g}, else no answer"


def told_of(vlm: VLM, noise: "Noise") -> VLM:
    """Return the model to use behind this noise: parts that ask for the level of Gaussian noise on pixels are told it.

    Raises:
        UserError: it has such parts, and this is other noise, of which they know nothing.
    """
    if noise.threat.of_pixels:
        return vlm.at_noise(noise.sigma)
    if any(getattr(part, "asks_for_noise", False) for part in vlm.modules()):
        raise UserError(
            f"the purifier or mapper of '{vlm.spec}' is for Gaussian noise on pixels, and would be switched off behind "
            f"noise against {noise.threat.name}: pass the model that it was made for"
        )
    return vlm


class SmoothedVLM(VLM):
    """The smoothed encoder `m(x) = E f(x + noise)`, estimated anew on every call from `n0` draws.

    `f` is purifier, encoder, unit norm, mapper, unit norm: all of it inside the expectation, so that certificates need
    no property of the hooks. Noise comes from torch's global generator and is not clipped; that against l2 is
    N(0, sigma^2 I) in float32, in the [0, 1] pixels of the model's own resolution (after the resize, before its
    normalisation), and other threats have theirs (`robustvlm.certify.threats`).

    Args:
        base: the model to smooth; it encodes texts unchanged.
        sigma: noise level, in [0, 1] pixels or the unit of the threat.
        n0: draws per image.
        threat: what the noise is against, by name.
        purifier: from noisy pixels [R, 3, S, S] to pixels of that shape, row by row.
        mapper: from unit features [R, D] to features [R, D], row by row.
        rule: how a classifier on it answers from the draws, and when it does not; None: the class of their mean,
            significant or not. Features are the mean whatever the rule.
        rows_per_pass: noisy images per encoder pass (at least one draw of every image of the batch). With gradients,
            passes are recomputed in the backward pass, noise included, so that memory does not grow with `n0`.

    Attributes:
        per_image: its noise level is chosen for each image (`robustvlm.defenses.local_noise`).

    Raises:
        UserError: sigma or n0 is out of range, no such threat, or the model is smoothed already.
    """

    per_image: ClassVar[bool] = False

    def __init__(
        self,
        base: VLM,
        sigma: float,
        n0: int = DEFAULT_N0,
        *,
        purifier: Hook | None = None,
        mapper: Hook | None = None,
        rule: Rule | None = None,
        rows_per_pass: int = ROWS_PER_PASS,
        threat: str = PLAIN,
    ) -> None:
        if not isinstance(base, VLM):
            raise UserError(
                f"only an encoder can be smoothed, by its mean feature, and a {type(base).__name__} is none: give it "
                "encode_image, encode_text, image_size and logit_scale, and load it as module:callable (docs/models.md)"
            )
        from robustvlm.certify.threats import Noise, find_threat  # certificates' mathematics, loaded where it is used

        noise = Noise.of_model(find_threat(threat), float(sigma))
        if not 1 <= n0 <= MAX_N0:
            raise UserError(f"the smoothed model needs between 1 and {MAX_N0:,} samples, got {n0}: pass {DEFAULT_N0}")
        if any(isinstance(part, SmoothedVLM) for part in base.modules()):
            raise UserError(
                f"'{base.spec}' is smoothed already, so +smooth:{noise} is one too many: smooth the model below"
            )
        if rule is not None and n0 < rule.least_copies:
            raise UserError(
                f"{n0} copies never decide a class at alpha {rule.alpha:g}, and this model would never answer: pass "
                f"{rule.least_copies} or more, as +smooth:{noise}:{max(DEFAULT_N0, rule.least_copies)}:"
                f"{rule}"
            )
        answers = "" if rule is None else f":{rule}"
        super().__init__(
            spec=f"{base.spec}+smooth:{noise}:{n0}{answers}",
            logit_scale=base.logit_scale,
            **base.framing.options(),
        )
        self.base = told_of(base, noise)
        self.noise, self.sigma, self.n0, self.rows_per_pass = noise, noise.sigma, n0, rows_per_pass
        self.rule = rule
        self.purifier, self.mapper = _beside(base, purifier), _beside(base, mapper)
        self._anchor = self._anchor.to(base.device)
        self.training = False
        self._still = False

    def encode_noisy(self, noisy: Tensor) -> Tensor:
        """Return `f` of noisy images [R, 3, S, S] at the model's resolution: unit features [R, D]."""
        # The hooks are the caller's, and may be in training.
        with borrowed(self, frozen=False):
            features = self.base.encode_image(noisy if self.purifier is None else self.purifier(noisy))
            return features if self.mapper is None else F.normalize(self.mapper(features), dim=-1)

    def noisy_features(self, pixels: Tensor, n: int) -> Tensor:
        """Return features [B, n, D] of `n` noisy copies of each image [B, 3, H, H], fresh noise, no gradient."""
        with torch.no_grad():
            return self.drawn(pixels, n)

    def drawn(self, pixels: Tensor, n: int) -> Tensor:
        """Return features [B, n, D] of `n` noisy copies of each image [B, 3, H, H], fresh noise, differentiable."""
        clean = fitted(pixels, self.image_size, self.interpolation)
        if self._still:
            return self.encode_noisy(clean)[:, None].expand(-1, n, -1)
        counts = self._counts(len(clean), n)
        again = len(counts) > 1 and torch.is_grad_enabled() and clean.requires_grad
        draws = [
            checkpoint(as_now(self._features), clean, count, use_reentrant=False, preserve_rng_state=True)
            if again
            else self._features(clean, count)
            for count in counts
        ]
        return torch.cat(draws, dim=1)

    def mean_feature(self, pixels: Tensor, n: int) -> Tensor:
        """Return the mean [B, D] over `n` fresh draws for each image [B, 3, H, H]: not normalised, differentiable.

        An unbiased estimate of m(x).
        """
        clean = fitted(pixels, self.image_size, self.interpolation)
        if self._still:
            return self.encode_noisy(clean)
        counts = self._counts(len(clean), n)
        total: Tensor | None = None
        for count in counts:
            if len(counts) > 1 and torch.is_grad_enabled() and clean.requires_grad:
                part = checkpoint(as_now(self._sum), clean, count, use_reentrant=False, preserve_rng_state=True)
            else:
                part = self._sum(clean, count)
            total = part if total is None else total + part
        assert total is not None
        return total / n

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        """Answer without noise, with `f` of the pixels as they come, so that the answer is no matter of chance."""
        self._still = True
        try:
            yield
        finally:
            self._still = False

    def _image_features(self, pixels: Tensor) -> Tensor:
        return self.mean_feature(pixels, self.n0)

    def _text_features(self, texts: list[str]) -> Tensor:
        return self.base.encode_text(texts)

    @property
    def text_fingerprint(self) -> str:
        return f"{self.base.text_fingerprint} scaled to unit norm twice"

    def class_vectors(self, class_names: Sequence[str]) -> Tensor | None:
        return self.base.class_vectors(class_names)

    def cut_tokens(self, texts: Sequence[str]) -> list[int]:
        return self.base.cut_tokens(texts)

    def _counts(self, images: int, n: int) -> list[int]:
        """Split n draws into passes of at most `rows_per_pass` rows, or one draw of every image."""
        size = max(1, self.rows_per_pass // max(1, images))
        return [min(size, n - start) for start in range(0, n, size)]

    def _sum(self, clean: Tensor, count: int) -> Tensor:
        return self._features(clean, count).sum(dim=1)

    def _features(self, clean: Tensor, count: int) -> Tensor:
        # float32 at least: in half precision noise has a few thousand values, and its law is no longer normal.
        wide = clean if clean.dtype == torch.float64 else clean.float()
        return self.encode_noisy(self.noise.fresh(wide.repeat_interleave(count, dim=0))).view(len(clean), count, -1)

    @property
    def fingerprint(self) -> str:
        """Digest of the base model, the noise, the hooks and the rule."""
        hooks = [f"{name}: {_identity(hook)}" for name, hook in (("purifier", self.purifier), ("mapper", self.mapper))]
        rule = () if self.rule is None else (f"rule: {self.rule!r}",)  # models from before there were rules keep theirs
        level = repr(self.sigma) if self.noise.threat.name == PLAIN else str(self.noise)
        return fingerprint({}, (self.base.fingerprint, "smooth", level, str(self.n0), *hooks, *rule))


def _beside(base: VLM, hook: Hook | None) -> Hook | None:
    """Return a hook on the model's device: a module that is elsewhere is copied there."""
    if not isinstance(hook, nn.Module) or all(tensor.device == base.device for tensor in hook.state_dict().values()):
        return hook
    return copy.deepcopy(hook).to(base.device)


def smooth(
    vlm: VLM,
    sigma: float,
    n0: int = DEFAULT_N0,
    *,
    purifier: Hook | None = None,
    mapper: Hook | None = None,
    rule: Rule | None = None,
    threat: str = PLAIN,
) -> SmoothedVLM:
    """Return `vlm` smoothed with noise of `sigma` and `n0` draws per call; see `SmoothedVLM`.

    Example:
        >>> from robustvlm.models import load_model
        >>> smooth(load_model("tiny"), 0.25).spec
        'tiny+smooth:0.25:64'
        >>> smooth(load_model("tiny"), 0.2, threat="brightness").spec
        'tiny+smooth:brightness=0.2:64'
    """
    return SmoothedVLM(vlm, sigma, n0, purifier=purifier, mapper=mapper, rule=rule, threat=threat)


# The operator of a spec: `smooth:[THREAT=]SIGMA[:N0[:ALPHA[:vote]]]`

FORM = "smooth:[THREAT=]SIGMA[:N0[:ALPHA[:vote]]]"
DUAL_FORM = "dual:SIGMAS:THRESHOLDS:AT[:N0[:ALPHA[:vote]]]"
ANSWERS = ("mean", "vote")
"""How the copies of a model that abstains give their answer."""


def smoothed_as(vlm: VLM, written: str) -> SmoothedVLM:
    """Return `vlm` smoothed as an operator says that is written like `FORM`.

    Raises:
        UserError: it is written otherwise, or a number is out of range.

    Example:
        >>> from robustvlm.models import load_model
        >>> smoothed_as(load_model("tiny"), "smooth:0.25:64:0.001").rule
        Rule(alpha=0.001, votes=False)
    """
    arguments = written.split(":")[1:]
    if not 1 <= len(arguments) <= 4:
        raise UserError(
            f"'+{written}' must be written +{FORM}, as +smooth:0.25, +smooth:0.25:{DEFAULT_N0} or "
            f"+smooth:0.25:{DEFAULT_N0}:0.001"
        )
    from robustvlm.certify.threats import read_noise  # as above

    noise_text, n0_text = (*arguments, str(DEFAULT_N0))[:2]
    try:
        noise = read_noise(noise_text)
    except UserError as error:
        raise UserError(f"'+{written}': {error}") from None
    if not re.fullmatch(r"\d{1,9}", n0_text):
        raise UserError(f"'+{written}': the number of samples must be a whole number, got '{n0_text}'")
    return smooth(vlm, noise.sigma, int(n0_text), rule=read_rule(written), threat=noise.threat.name)


def read_rule(written: str) -> Rule | None:
    """Return how the model of an operator answers, from what follows its number of samples; None where nothing does.

    Example:
        >>> read_rule("smooth:0.25:64:0.001:vote"), read_rule("smooth:0.25:64")
        (Rule(alpha=0.001, votes=True), None)
    """
    arguments = written.split(":")[3:5]
    if not arguments:
        return None
    alpha_text, how = (*arguments, "mean")[:2]
    if how not in ANSWERS:
        raise UserError(f"'+{written}': copies answer by {' or '.join(ANSWERS)}: {nearest(how, ANSWERS)}")
    try:
        alpha = float(alpha_text)
    except ValueError:
        raise UserError(
            f"'+{written}': alpha, at which the model abstains, must be a number, got '{alpha_text}': as 0.001"
        ) from None
    return Rule(alpha, votes=how == "vote")


def dual_rule(written: str) -> Rule:
    """Return how the model of an operator `DUAL_FORM` answers; by the mean at 0.001 where it does not say.

    Example:
        >>> dual_rule("dual:0.02,0.05:0.1:0.05:64:0.01:vote")
        Rule(alpha=0.01, votes=True)
    """
    kept = written.split(":")[4:]  # N0 and what follows, as `+smooth` has them
    alike = ":".join(["smooth", "1", *kept])
    try:
        return read_rule(alike) or Rule(RULE_USUAL)
    except UserError as error:
        raise UserError(str(error).replace(f"+{alike}'", f"+{written}'")) from None


def rule_of(vlm: VLM | None) -> Rule | None:
    """Return the rule by which a smoothed encoder, or one within, has classes answered; None: as usual."""
    parts = () if vlm is None else vlm.modules()
    return next((part.rule for part in parts if isinstance(part, SmoothedVLM) and part.rule is not None), None)


def _identity(hook: Hook | None) -> str:
    if hook is None:
        return "none"
    kind = hook if inspect.isroutine(hook) else type(hook)
    name = f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', repr(kind))}"
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):
        source = ""
    state: Mapping[str, object] = hook.state_dict() if isinstance(hook, nn.Module) else getattr(hook, "__dict__", {})
    structure = repr(hook) if isinstance(hook, nn.Module) else ""
    code = hashlib.blake2b(source.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return fingerprint(dict(state), (name, structure, code))


class SmoothedClassifier:
    """The deployed smoothed zero-shot classifier: an answer only where it is significant, otherwise ABSTAIN (T10).

    Args:
        classifier: zero-shot head on a `SmoothedVLM`.

    Raises:
        UserError: the classifier's model is not smoothed.

    Example:
        >>> from robustvlm.models import load_model, zero_shot
        >>> vlm = smooth(load_model("tiny"), 0.1)
        >>> model = SmoothedClassifier(zero_shot(vlm, ["apple", "dog"], ["a drawing of {}"], cache=False))
        >>> len(model.predict(torch.rand(2, 3, 64, 64), n0=32, alpha0=0.01))
        2
    """

    def __init__(self, classifier: ZeroShotClassifier) -> None:
        if not isinstance(classifier.vlm, SmoothedVLM):
            raise UserError(
                f"'{classifier.vlm.spec}' is not smoothed: pass for example '{classifier.vlm.spec}+smooth:0.25'"
            )
        self.vlm: SmoothedVLM = classifier.vlm
        self.class_names = classifier.class_names
        self.class_embeddings = classifier.class_embeddings

    def predict(self, pixels: Tensor, n0: int | None = None, alpha0: float = 0.001) -> list[int | None]:
        """Return, per image [B, 3, H, H], the class of the mean feature, or None for ABSTAIN.

        The first half of `n0` fresh draws (default: the model's) names the class, the second half has to beat every
        rival at level `alpha0`. Anywhere inside the radius of a class certificate, the answer is another class than the
        certified one with probability at most `alpha0`, provided the input was chosen without knowing this noise.
        """
        from robustvlm.certify import predict  # certificates' mathematics, which attacks do without

        features = self.vlm.noisy_features(pixels, self.vlm.n0 if n0 is None else n0).double().cpu().numpy()
        text = self.class_embeddings.double().cpu().numpy()
        return [predict(rows, text, alpha0) for rows in features]
