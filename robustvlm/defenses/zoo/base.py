"""What a test-time defence is here: a frozen value with its source, its strengths and a function of one image.

A defence stands behind a model as `MODEL+name[:ARGS]`. There are three kinds, and to add one is to add one file to this
package:

1. Subclass `PixelDefence` (pixels to pixels), `FeatureDefence` (pixels to unit features, no classes needed) or
   `AnswerDefence` (pixels to logits, for which the classes must be known), as a frozen dataclass. Its fields are its
   strengths, each `Annotated[int | float | str, Strength(...)]` with the paper's constant as default: from these the
   words after the operator's name are read (`+blur:5:1.1` in the order of the fields, or `+blur:sigma=1.1`).
2. Say what it is in the class variable `about` (`About`): who published it, what was claimed, how near this version
   is, which constants have which origin. `off` names the strengths at which it is the undefended model to the bit.
3. Put `@DEFENCES.named("name")` on it. The grammar, `robustvlm judge`, the tables of the docs and the shared tests
   (`tests/defenses/zoo`) read that one table.
4. Write `move`, `feature` or `answer`. It is given pixels [B, 3, H, W] in float32 at the model's own size and `below`,
   the model it stands on (`Below`), and must treat every image as if it were alone: sums and norms per image, nothing
   kept between calls, draws from `generators(pixels)` only. Say in `cost` how many passes a clean answer takes, and of
   a `FeatureDefence` in `idle` when it is off.
5. Where the plain gradient is none or tells little, list gradient modes in `modes`, the default first, and read `mode`:
   a mode changes gradients and never a bit of what is returned (`robustvlm.defenses.zoo.gradients` has the parts).
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Protocol, get_args, get_origin

import torch
from torch import Tensor

from robustvlm.core.registry import Table
from robustvlm.core.seeds import generator
from robustvlm.core.size import Size
from robustvlm.errors import UserError
from robustvlm.text import format_exact

CODE, TEXT, DESCRIPTION, OWN = "code", "text", "description", "own"
"""How near a version is to the published one: its authors' code was read, its paper, a description by others only; or
it is a method of common use that has no one release."""

IDENTITY, THROUGH, SMOOTH, GATE_ON, GATE_OFF = "identity", "through", "smooth", "gate:on", "gate:off"
"""Gradient modes: the defence as the identity (BPDA), its exact gradient, signs and rounding made smooth, its gate
taken to be open or closed."""

MODES = {
    THROUGH: "the gradient of the whole defence, inner steps included",
    IDENTITY: "what the defence adds taken as a constant (BPDA)",
    SMOOTH: "as through, with smooth stand-ins for signs and rounding",
    GATE_ON: "the whole way, and pushed to where the detector fires",
    GATE_OFF: "the detector taken to stay silent, and pushed to",
}
"""Every gradient mode in words."""


@dataclass(frozen=True)
class Strength:
    """What a field of a defence is: its meaning, its bounds, and where the default comes from.

    Attributes:
        meaning: a few words. least, most: bounds, both allowed. odd: only odd numbers.
        words: all that may be written, for a text.
        origin: of the default: "C" read in the authors' code, "T" in the text, "K" from memory, "A" assumed here.
    """

    meaning: str
    least: float | None = None
    most: float | None = None
    odd: bool = False
    origin: str = "A"
    words: tuple[str, ...] = ()

    def problem(self, value: Any) -> str | None:
        """Say what is wrong with a value; None if nothing is."""
        if isinstance(value, str):
            known = not self.words or value in self.words
            return None if known else f"must be {' or '.join(self.words)}, got '{value}'"
        if self.odd and value % 2 == 0:
            return f"must be odd, got {value}"
        low, high = self.least, self.most
        if (low is None or value >= low) and (high is None or value <= high):
            return None
        bounds = f"at least {low:g}" if high is None else f"at most {high:g}" if low is None else f"{low:g} to {high:g}"
        bounds = f"{low:g}" if low is not None and low == high else bounds
        return f"must be {bounds}, got {value:g}"


@dataclass(frozen=True)
class Claim:
    """One published figure with its setting; accuracies in percent, None where the source gives none.

    Attributes:
        model, data, attack: in the source's words. eps: radius in 255ths, None where it was not read.
        clean, robust: accuracy. adaptive: the attack saw the defence. mark: how we know ("C", "T", "K").
    """

    model: str
    data: str
    attack: str
    eps: float | None
    robust: float
    clean: float | None = None
    norm: str = "Linf"
    adaptive: bool = False
    mark: str = "T"


@dataclass(frozen=True)
class About:
    """Where a defence comes from and how near this version is to it.

    Attributes:
        title, reference: the method's name, and authors, place and arXiv number.
        summary: what it does, for one line of a table.
        fidelity: CODE, TEXT, DESCRIPTION or OWN.
        claims: published robustness, empty where none was claimed for CLIP.
        differs: what is known to differ from the release, a sentence each.
        licence_note: of the release. commit: of the code that was read.
        image_local_as_released: the release treats every image alone (this version always does).
        partial: what of the method is not here, so that no claim of the whole is compared with it; "" for all of it.
    """

    title: str
    reference: str
    summary: str
    fidelity: str
    claims: tuple[Claim, ...] = ()
    differs: tuple[str, ...] = ()
    licence_note: str = ""
    commit: str = ""
    image_local_as_released: bool = True
    partial: str = ""


@dataclass(frozen=True)
class Passes:
    """Passes of the encoder for one image: forward, backward, and backward through a backward."""

    forward: float
    backward: float = 0.0
    double: float = 0.0

    @property
    def equivalents(self) -> float:
        """The cost in forward passes: a backward counts two, one through a backward four."""
        return self.forward + 2 * self.backward + 4 * self.double


class Below(Protocol):
    """The model that a defence stands on, as the defence may ask it; all in float32, differentiable in the pixels.

    `encode` and `embed` are there for models with an encoder, `classes` and `logits` where the classes are known.
    """

    @property
    def size(self) -> Size:
        """Side of the square that the model sees, or (height, width)."""

    @property
    def logit_scale(self) -> float:
        """Factor on cosines."""

    @property
    def classes(self) -> Tensor:
        """Unit class embeddings [K, D]."""

    def embed(self, pixels: Tensor) -> Tensor:
        """Return raw features [B, D] of pixels."""

    def encode(self, pixels: Tensor) -> Tensor:
        """Return unit features [B, D] of pixels."""

    def encode_text(self, texts: list[str]) -> Tensor:
        """Return unit features [N, D] of texts."""

    def logits(self, pixels: Tensor) -> Tensor:
        """Return logits [B, K] of pixels."""

    def scores(self, features: Tensor) -> Tensor:
        """Return logits [B, K] of unit features: scaled cosines to the classes."""


@dataclass(frozen=True)
class Defence(ABC):
    """A test-time defence with its strengths; see this module's beginning for how one is written."""

    about: ClassVar[About]
    kind: ClassVar[str]
    off: ClassVar[str]
    """The words behind the name with which it is the undefended model, to the bit: "0", or "eps=0"."""
    modes: ClassVar[tuple[str, ...]] = (THROUGH,)
    """Gradient modes, the default first."""
    random: ClassVar[bool] = False
    """Whether it draws at random."""
    eot: ClassVar[int] = 1
    """Draws that a gradient is to be averaged over."""
    gates: ClassVar[tuple[str, ...]] = ()
    """What its decisions are about, in words; empty where it decides nothing."""
    explicit: ClassVar[str] = ""
    """Why all of its strengths must be written; empty where they have defaults."""
    needs_encoder: ClassVar[bool] = False
    """Whether it asks for features, so that a classifier without an encoder cannot have it."""

    def cost(self, *, gate_open: bool = True) -> Passes:
        """Return the passes that a clean answer takes per image; for a gated one, those of the dearer way by default.

        The pass that gives the answer is among them.
        """
        del gate_open
        return Passes(1)

    @property
    def gradient_draws(self) -> int:
        """Draws that a gradient is averaged over; fewer where one call averages over views already."""
        return self.eot

    @property
    def name(self) -> str:
        """The operator's name."""
        return next(name for name, kind in DEFENCES.items() if kind is type(self))

    def __str__(self) -> str:
        values = [(known.name, getattr(self, known.name)) for known in strengths(type(self))]
        defaults = {item.name: item.default for item in dataclasses.fields(self)}
        if len(values) <= 3:
            return ":".join([self.name, *(_shown(value) for _, value in values)])
        changed = [f"{name}={_shown(value)}" for name, value in values if value != defaults[name]]
        return ":".join([self.name, *changed])

    @property
    def identity(self) -> str:
        """Text of all that decides what it does, for fingerprints."""
        values = [f"{known.name}={getattr(self, known.name)!r}" for known in strengths(type(self))]
        return " ".join(["defence", self.name, *values])


@dataclass(frozen=True)
class PixelDefence(Defence):
    """Pixels to pixels; in front of any model, and it may look at the model's features."""

    kind = "pixel"

    @abstractmethod
    def move(self, pixels: Tensor, below: Below, mode: str) -> Tensor:
        """Return pixels [B, 3, S, S] of pixels [B, 3, S, S] in [0, 1]."""

    def seen(self, pixels: Tensor, below: Below, mode: str) -> tuple[Tensor, Tensor]:
        """Return what `move` does, and the pixels whose answer an attack takes the gradient of in its place.

        They are the same unless a mode takes a gate to be on one side whichever it is on.
        """
        moved = self.move(pixels, below, mode)
        return moved, moved


@dataclass(frozen=True)
class FeatureDefence(Defence):
    """Pixels to unit features: for every use of an encoder, no classes needed."""

    kind = "feature"
    needs_encoder = True

    @property
    def idle(self) -> bool:
        """Whether its strength is such that it leaves the encoder's feature alone."""
        return False

    @abstractmethod
    def feature(self, pixels: Tensor, below: Below, mode: str) -> Tensor:
        """Return unit features [B, D] of pixels [B, 3, S, S]."""


@dataclass(frozen=True)
class AnswerDefence(Defence):
    """Pixels to logits: what it does depends on the classes."""

    kind = "answer"

    @abstractmethod
    def answer(self, pixels: Tensor, below: Below, mode: str) -> Tensor:
        """Return logits [B, K] of pixels [B, 3, S, S]."""


DEFENCES: Table[type[Defence]] = Table(__package__ or "")
"""Every defence by name: each adds itself in its own file."""


VIEWS_PER_GRADIENT, MOST_CALLS = 16, 4
"""Views that a gradient is averaged over, in how many calls at most."""


def side_of(pixels: Tensor) -> float:
    """Return the side of images [B, 3, H, W]; where they are not square, that of a square with as many pixels.

    Strengths that are published for 224 pixels are scaled by it.

    Example:
        >>> side_of(torch.zeros(1, 3, 224, 224)), side_of(torch.zeros(1, 3, 4, 9))
        (224.0, 6.0)
    """
    return math.sqrt(pixels.shape[-2] * pixels.shape[-1])


def draws_of_views(views: int) -> int:
    """Return how many calls, each of so many views, a gradient is averaged over.

    Example:
        >>> [draws_of_views(views) for views in (1, 8, 31)]
        [4, 2, 1]
    """
    return min(MOST_CALLS, -(-VIEWS_PER_GRADIENT // max(1, views)))


# Strengths from the words of a spec


@dataclass(frozen=True)
class Known:
    """A strength of a kind of defence: its field, the type of its values, and what it declares."""

    name: str
    kind: Callable[[str], Any]
    strength: Strength
    default: Any = field(repr=False)


def strengths(kind: type[Defence]) -> list[Known]:
    """Return the strengths of a kind of defence in the order of its fields.

    Example:
        >>> [known.name for known in strengths(DEFENCES["blur"])]
        ['kernel', 'sigma']
    """
    hints: dict[str, Any] = {}
    for part in reversed(kind.__mro__):
        hints |= inspect.get_annotations(part)
    found = []
    for item in dataclasses.fields(kind):
        hint = hints[item.name]
        if isinstance(hint, str):
            hint = eval(hint, vars(inspect.getmodule(kind)))  # the class's own words
        if get_origin(hint) is not Annotated:
            raise TypeError(f"{kind.__name__}.{item.name} must be Annotated[..., Strength(...)]")
        value, strength = get_args(hint)[:2]
        found.append(Known(item.name, value, strength, item.default))
    return found


def form_of(name: str) -> str:
    """Return how the operator of that name is written, as `blur:KERNEL:SIGMA`."""
    known = strengths(DEFENCES[name])
    if DEFENCES[name].explicit:
        return ":".join([name, *(item.name.upper() for item in known)])
    shown = "".join(f"[:{item.name.upper()}" for item in known) + "]" * len(known)
    return f"{name}{shown}" if len(known) <= 3 else f"{name}[:STRENGTH=VALUE...]"


def read_defence(name: str, arguments: tuple[str, ...]) -> Defence:
    """Return the defence of that name with the strengths that the words behind it set, by place or by name.

    Raises:
        UserError: too many words, one that is no number where one is asked for, or a value out of bounds.

    Example:
        >>> str(read_defence("blur", ("5",))), str(read_defence("blur", ("sigma=2",)))
        ('blur:5:1.1', 'blur:5:2')
    """
    kind = DEFENCES[name]
    known = strengths(kind)
    written, chosen = ":".join((name, *arguments)), dict[str, Any]()
    options = ", ".join(f"{item.name} ({item.strength.meaning})" for item in known) or "none"
    for place, word in enumerate(arguments):
        key, equals, text = word.partition("=")
        item = next((it for it in known if it.name == key), None) if equals else None
        if not equals and place < len(known):
            item, text = known[place], word
        if item is None or item.name in chosen:
            raise UserError(f"'+{written}' must be written +{form_of(name)}; its strengths are: {options}")
        try:
            value = item.kind(text)
        except ValueError:
            wanted = "a whole number" if item.kind is int else "a number"
            raise UserError(f"'+{written}': {item.name} must be {wanted}, got '{text}'") from None
        problem = item.strength.problem(value)
        if problem is not None:
            raise UserError(f"'+{written}': {item.name} {problem} ({item.strength.meaning})")
        chosen[item.name] = value
    if kind.explicit and len(chosen) < len(known):
        raise UserError(f"'+{written}' must be written +{form_of(name)}: {kind.explicit}")
    return kind(**chosen)


def _shown(value: Any) -> str:
    return format_exact(value) if isinstance(value, float) else str(value)


# Draws


def generators(pixels: Tensor) -> list[torch.Generator]:
    """Return a generator of its own for each image [B, ...], fresh on every call.

    Its seed follows from torch's global stream, from which one number is taken per call, and from the image's pixels:
    an image's draws depend neither on its neighbours nor on its place in the batch. Draws are made on the CPU.

    Example:
        >>> x = torch.rand(3, 3, 2, 2)
        >>> def first(x):
        ...     torch.manual_seed(0)
        ...     return [torch.rand(1, generator=one).item() for one in generators(x)]
        >>> first(x)[1:] == first(x[1:])
        True
    """
    call = int(torch.randint(2**62, ()))
    rows = pixels.detach().float().cpu().contiguous()
    return [generator(call, hashlib.blake2b(row.numpy().tobytes(), digest_size=16).hexdigest()) for row in rows]
