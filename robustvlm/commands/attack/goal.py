"""What a run is to reach, and where its images stand before any attack: the goals, and the clean pass."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from robustvlm.attacks.goals import Goal, Known, Targeted, read_goals, split_goal
from robustvlm.attacks.goals.matching import crop
from robustvlm.attacks.tensors import Unperturbed, ask_unperturbed
from robustvlm.commands.attack.cost import MeteredOracle
from robustvlm.commands.attack.store import CleanFact, Ledger
from robustvlm.commands.attack.verdicts import NO_ANSWER
from robustvlm.commands.common.inputs import Images, Picture
from robustvlm.core.framing import Framing, to_pixels
from robustvlm.core.ranks import Ranks
from robustvlm.core.seeds import derive_seed, own_draws
from robustvlm.core.size import Size
from robustvlm.data import UNKNOWN, DataSource, Unreadable
from robustvlm.data.decode import decode, image_suffixes
from robustvlm.defenses.answering import image_tokens, speaker_of
from robustvlm.defenses.classifier import Classifier
from robustvlm.errors import BadSetting, UserError
from robustvlm.models import VLM
from robustvlm.models.sentences import sentence_encoder
from robustvlm.models.vlm import unit_features
from robustvlm.runs.records import Check
from robustvlm.runs.settings import Observer

# What `--goal` says: the goals to attack for, and what is attacked and judged

TARGET_DRAWS = 32
"""How often a model that draws is asked about a picture to aim at: one draw would be another target each time."""


@dataclass(frozen=True)
class Aim:
    """What a run attacks for.

    Args:
        spec: as on the command line.
        goals: the goals, each attacked in turn; one, but for `superclass:matrix`.
        model: what is attacked: pixels to the goals' outputs.
        notes: what the reader of the results has to know of the model.
        say: from images to what the model says of them in words, of one that does.
    """

    spec: str
    goals: tuple[Goal, ...]
    model: nn.Module
    notes: tuple[Check, ...] = ()
    say: Callable[[Tensor], list[str]] | None = None

    @property
    def leave(self) -> bool:
        """Whether an image leaves at its first success; otherwise every attack goes on to the end of its budget."""
        return len(self.goals) == 1 and self.goals[0].leave

    @property
    def unknown(self) -> bool:
        """Whether images of unknown classes are attacked, instead of those of known ones."""
        return self.goals[0].unknown

    @property
    def target(self) -> int | None:
        """The class that images are to be taken for; those that belong to it are left out."""
        return self.goals[0].target if isinstance(self.goals[0], Targeted) else None

    @property
    def everyone(self) -> bool:
        """Whether images are attacked also where the goal is reached unperturbed: scored at levels where it is not."""
        return len(self.goals) > 1

    def wants(self, label: int) -> bool:
        """Whether images of this class are attacked."""
        return label != self.target and (label == UNKNOWN) == self.unknown

    def why_not(self) -> str:
        """Say which images are left out, and what to do about it."""
        if self.unknown:
            return "of known classes: the goal intrude needs images of unknown classes"
        if self.target is not None:
            return "of the target class or of none: targeted attacks need labelled images of other classes"
        return "of none of the classes: attacks need labelled images (only --goal intrude takes unknown ones)"


class Features(nn.Module):
    """The image encoder of a classifier: pixels [B, 3, H, H] to unit features [B, D]."""

    def __init__(self, vlm: VLM) -> None:
        super().__init__()
        self.vlm = vlm

    def forward(self, pixels: Tensor) -> Tensor:
        """Return unit features [B, D]."""
        return self.vlm.encode_image(pixels)


class Tokens(nn.Module):
    """What the language model of a classifier reads: pixels [B, 3, H, H] to image tokens [B, T * D].

    Args:
        cropped: behind them come those of a crop of each image, [B, 2 * T * D]: a second pass.
    """

    def __init__(self, vlm: VLM, *, cropped: bool = False) -> None:
        super().__init__()
        self.vlm, self.cropped = vlm, cropped

    def forward(self, pixels: Tensor) -> Tensor:
        """Return image tokens side by side [B, T * D]."""
        views = (pixels, crop(pixels)) if self.cropped else (pixels,)
        return torch.cat([image_tokens(self.vlm, view).flatten(1) for view in views], dim=1)


def check_goal(text: str, min_cos: float = 0.5) -> None:
    """Refuse a goal that no model or data could make right."""
    split_goal(text)
    if not -1 < min_cos < 1:
        raise BadSetting("min_cos", "must lie between -1 and 1", got=f"{min_cos:g}: pass for example 0.5")


def make_aim(
    text: str, *, source: DataSource, classifier: Classifier, resolution: Size, min_cos: float = 0.5, seed: int = 0
) -> Aim:
    """Return what a goal's text stands for with this model and data.

    Args:
        seed: of the draws of a random model at a picture to aim at; random states are left as they were.

    Raises:
        UserError: an unknown class or level, no class tree, a model that never refuses, no encoder, no such file.

    Example:
        >>> from robustvlm.data import open_data
        >>> from robustvlm.defenses import load_classifier
        >>> emoji = open_data("emoji")
        >>> model = load_classifier("tiny", emoji.class_names, emoji.templates)
        >>> [goal.spec for goal in make_aim("superclass:matrix", source=emoji, classifier=model, resolution=64).goals]
        ['superclass:0', 'superclass:1', 'superclass:2', 'superclass:all']
    """
    check_goal(text, min_cos)
    vlm, embeddings = classifier.vlm, classifier.class_embeddings
    known = Known(
        classifier.spec,
        source.class_names,
        classifier.can_reject,
        embeddings=None if embeddings is None else embeddings.detach(),
        head=None if vlm is None or embeddings is None else (vlm.logit_scale * embeddings).detach(),
        feature_of=lambda target: _feature_of(target, _encoder(classifier), resolution, seed),
        speech=speaker_of(vlm),
        tokens_of=lambda target: _tokens_of(target, _encoder(classifier), resolution, seed),
        sentences=sentence_encoder,
        trees=source.tree,
        data=source.spec,
        min_cos=min_cos,
    )
    goals = read_goals(text, known)
    return Aim(text.strip(), goals, _attacked(goals[0], classifier), say=getattr(classifier, "say", None))


def picture_facts(text: str) -> dict[str, str]:
    """Return a digest of the picture's file that a goal aims at, for the manifest: another picture is another run.

    Example:
        >>> picture_facts("misclassify"), picture_facts("feature:a photo of a cat")
        ({}, {})
    """
    _, rest = split_goal(text)
    for name in (rest, rest.partition(":")[2]):
        path = Path(name)
        if path.suffix.lower() in image_suffixes() and path.is_file():
            return {f"picture of {name}": hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()}
    return {}


def _attacked(goal: Goal, classifier: Classifier) -> nn.Module:
    if goal.of_tokens:
        return Tokens(_encoder(classifier), cropped=goal.cropped)
    return Features(_encoder(classifier)) if goal.of_features else classifier


def _encoder(classifier: Classifier) -> VLM:
    # A defence that answers for itself is more than its encoder, whose features say nothing of it.
    if classifier.vlm is None or (classifier.class_embeddings is None and speaker_of(classifier.vlm) is None):
        raise UserError(f"feature goals need an image encoder, and '{classifier.spec}' has none: pass a VLM")
    return classifier.vlm


def _feature_of(target: str, vlm: VLM, resolution: Size, seed: int) -> tuple[Tensor, bool]:
    """Return the unit feature [D] of a picture's file or else of a text, and whether it was a picture.

    Of a model that draws it is the direction of the mean feature over many draws.
    """
    if Path(target).suffix.lower() not in image_suffixes():
        with torch.no_grad():
            return vlm.encode_text([target])[0], False
    pixels = _picture(target, vlm.framing.at(resolution)).to(vlm.device)
    found = _drawn(lambda: vlm.encode_image(pixels[None])[0], vlm.device, seed, target)
    return found[0] if len(found) == 1 else unit_features(found.mean(0)), True


def _tokens_of(target: str, vlm: VLM, resolution: Size, seed: int) -> Tensor:
    """Return the image tokens [1, T * D] of a picture's file, as the language model reads them; of a model that draws
    those of many draws [N, T * D].
    """
    pixels = _picture(target, vlm.framing.at(resolution)).to(vlm.device)
    return _drawn(lambda: image_tokens(vlm, pixels[None]).flatten(), vlm.device, seed, target)


@torch.no_grad()
def _drawn(ask: Callable[[], Tensor], device: torch.device, seed: int, target: str) -> Tensor:
    """Return a model's answers to a target: one alone, or `TARGET_DRAWS` if the second is another than the first."""
    found: list[Tensor] = []
    while len(found) < TARGET_DRAWS:
        with own_draws(device, derive_seed(seed, "target", target, len(found))):
            found.append(ask())
        if len(found) == 2 and torch.equal(*found):
            return found[0][None]
    return torch.stack(found)


def _picture(path: str, framing: Framing) -> Tensor:
    if not Path(path).exists():
        raise UserError(f"no picture at '{path}' to aim at")
    found = decode(path, Path(path), UNKNOWN)
    if isinstance(found, Unreadable):
        raise UserError(f"cannot read the picture '{path}' to aim at: {found.reason}")
    return to_pixels(found.image, framing)


# What the clean pass keeps of unperturbed images: a fact each


def clean_facts(
    seen: Unperturbed, goal: Goal, about: Sequence[tuple[int, str, int]], *, n_targets: int
) -> Iterator[CleanFact]:
    """Yield a fact per image; `about` holds index, id and label of each, in the order of the rows of `seen`."""
    answer, outputs = seen.answer, seen.output.cpu()
    columns = (answer.reached, answer.margin, answer.prediction, answer.confidence, answer.finite, answer.cosine)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    for (index, image_id, label), output, row in zip(about, outputs, rows, strict=False):
        reached, distance, prediction, confidence, finite, cosine = row
        yield CleanFact(
            index=index,
            image_id=image_id,
            label=label,
            prediction=prediction if finite else NO_ANSWER,
            margin=distance,
            confidence=confidence,
            targets=goal.targets(output, label, n_targets) if finite else [],
            exposed=finite and not reached,
            cosine=None if cosine != cosine else cosine,
        )


# The clean pass: what the model says of every image unperturbed


class CleanPass:
    """Classifies the images that the aim wants, as far as the ledger does not know them yet.

    Args:
        oracle: the model; images: the images; aim: which of them are attacked, and for what.
        ledger, observer: told what is found; ranks: the processes that share the images.
        n_targets: how many classes worth aiming at are noted for each image.
    """

    def __init__(
        self,
        oracle: MeteredOracle,
        images: Images,
        aim: Aim,
        *,
        ledger: Ledger,
        observer: Observer,
        ranks: Ranks,
        n_targets: int,
    ) -> None:
        self.oracle, self.images, self.aim = oracle, images, aim
        self.ledger, self.observer, self.ranks, self.n_targets = ledger, observer, ranks, n_targets

    def first_images(self, count: int) -> list[Picture]:
        """Return the first images that can be attacked, `count` at most; raise a UserError if there is none."""
        readable: list[Picture] = []
        reasons: list[str] = []
        left_out = 0
        for item in self.images.stream():
            if isinstance(item, Unreadable):
                reasons.append(f"'{item.id}': {item.reason}")
            elif self.aim.wants(item.label):
                readable.append(item)
            else:
                left_out += 1
            if len(readable) == count:
                break
        if not readable:
            why = "it is empty"
            if reasons:
                why = f"none of its {len(reasons)} images can be read (the first, {reasons[0]})"
            if left_out:
                why = f"{left_out} of its images are {self.aim.why_not()}"
            raise UserError(f"no image to attack in '{self.images.source.spec}': {why}")
        return readable

    def run(self, rungs: tuple[int, ...]) -> None:
        """Classify every image unperturbed, in full batches; of several processes each does its share."""
        known, index = self.ledger.seen, self.images.index
        self.observer.begin("clean", self.ledger.count_images(self.images.source, self.images.limit), len(known))
        batch: list[Picture] = []
        faults: list[Unreadable] = []
        for item in self.images.stream(lambda name: name not in known and self.ranks.mine(index(name))):
            if isinstance(item, Unreadable):
                if self.ranks.mine(index(item.id)):  # streams name their faults to everybody
                    faults.append(item)
                continue
            if not self.aim.wants(item.label):
                self.ledger.add_left_out(index(item.id), item.id)
                self.observer.advance()
                continue
            batch.append(item)
            if len(batch) == rungs[0]:
                self._record(batch, faults, rungs)
                batch, faults = [], []
        self._record(batch, faults, rungs)

    def _record(self, batch: list[Picture], faults: list[Unreadable], rungs: tuple[int, ...]) -> None:
        """Record images before faults: a stream's fault may bear the name of a good image, which must not be lost."""
        if batch:
            self._classify(batch, rungs)
        for fault in faults:
            self.ledger.add_unreadable(self.images.index(fault.id), fault)
            self.observer.advance()

    def _classify(self, batch: list[Picture], rungs: tuple[int, ...]) -> None:
        size = min(rung for rung in rungs if rung >= len(batch))
        self.oracle.meter.require(size * self.oracle.draws)
        rows = torch.arange(size) % len(batch)
        images = torch.stack([picture.pixels for picture in batch])[rows]
        label = torch.tensor([picture.label for picture in batch])[rows]
        seen = ask_unperturbed(self.oracle, self.aim.goals[0], images, label)
        self.oracle.note_spare((size - len(batch)) * self.oracle.draws)
        self.observer.passed(len(batch), size * self.oracle.draws)
        about = [(self.images.index(picture.id), picture.id, picture.label) for picture in batch]
        for fact in clean_facts(seen, self.aim.goals[0], about, n_targets=self.n_targets):
            self.ledger.add_clean(fact)
            self.observer.advance()
