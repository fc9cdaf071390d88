"""What a model says of images unperturbed: the clean pass, over its draws if it is random."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from robustvlm.attacks import Goal
from robustvlm.attacks.tensors import Unperturbed, ask_unperturbed
from robustvlm.commands.attack.cost import MeteredOracle
from robustvlm.commands.attack.goal import Aim
from robustvlm.commands.attack.store import CleanFact, Ledger
from robustvlm.commands.attack.verdicts import NO_ANSWER
from robustvlm.commands.common.inputs import Images, Picture
from robustvlm.core.ranks import Ranks
from robustvlm.data.source import Unreadable
from robustvlm.errors import UserError
from robustvlm.runs.settings import Observer

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
