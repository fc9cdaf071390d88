"""A model under judgement and the attacks on it: unaware of its defence, through it, on features, without gradients.

All attacks are those of the library (`perturb`); here is only which of them are made, in which gradient mode.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from robustvlm.attacks.goals import Case, Misclassify
from robustvlm.attacks.honesty import inspect_model
from robustvlm.attacks.oracle import EOT_IF_RANDOM, Oracle
from robustvlm.attacks.perturb import Perturbed, perturb
from robustvlm.attacks.pgd import PGDFrom
from robustvlm.attacks.probe import Probe, ask_first, settle_draws
from robustvlm.attacks.tensors import image_ids
from robustvlm.attacks.threat import ThreatModel
from robustvlm.commands.common.questions import of_probe, of_sanity
from robustvlm.core.seeds import derive_seed
from robustvlm.defenses import Classifier
from robustvlm.defenses.zoo.base import IDENTITY, Passes
from robustvlm.defenses.zoo.wrap import Counted, counted_passes, defended, gradient_mode, modes_of
from robustvlm.runs.records import Check, Record

CLEAN, FEATURE, SQUARE = "clean", "feature", "square"
UNAWARE = {"unaware:pgd": "PGD", "unaware:apgd": "APGD"}
"""Attacks on the undefended model, whose points are shown to the defended one."""
LABEL = "label:pgd"
"""As the first of these, with what the undefended model says in the label's place: such points carry no label."""
TRANSFER = (*UNAWARE, LABEL)
MODE, SHORT, START, TARGETED, OWN = "mode:", "short:", "start:", "targeted:", "own"
"""How acts through a gradient mode are named, and what stands for the mode of a model that has none."""
EFFORT = 3
"""Of the attacks here; raised when they see more than before, so that no run mixes what two versions of them found."""
SHORTER = 4
"""A short attack makes one step where a full one makes so many."""
FINER, MOST_DRAWS = 4, 20
"""An act that begins at the transferred points averages a gradient over so many times the draws, up to a most."""


def targeted(steps: int, targets: int) -> str:
    """Return the attack towards wrong classes, as `perturb` reads it."""
    return f"apgd-t:steps={steps}:targets={targets}"


class Fate(Record):
    """What came of one image in one act: whether the answer is right, and the margin, at the worst point that was met.

    Attributes:
        index: place among the run's images. by: the attack that fooled it. passes: spent on it.
    """

    index: int
    right: bool
    margin: float
    prediction: int
    by: str | None = None
    passes: int = 0


class Lowest(Misclassify):
    """Any wrong class, but an attack never leaves an image: its point is that of the lowest margin it came by.

    The papers' protocol attacks every image to the end of the budget, also where the model is wrong at once.
    """

    def reached(self, output: Tensor, case: Case) -> Tensor:
        return torch.zeros_like(super().reached(output, case))


@dataclass(frozen=True, eq=False)
class Images:
    """Images in memory, as one model takes them: ids, pixels [N, 3, S, S] and labels [N]."""

    ids: Sequence[str]
    pixels: Tensor
    labels: Tensor

    def rows(self, places: Sequence[int]) -> Images:
        """Return the images at some places."""
        chosen = torch.tensor(places, dtype=torch.int64)
        return Images([self.ids[place] for place in places], self.pixels[chosen], self.labels[chosen])


@dataclass(frozen=True, eq=False)
class Attacked:
    """A model and how hard it is attacked.

    Args:
        model: the classifier. features: the classifier whose encoder the attack on features looks at.
        first: images for the first questions.
        targets: wrong classes that APGD is aimed at; 0 for no such act.
        eot: draws for a gradient, None for what the defences declare. draws: that judge a success.
    """

    model: Classifier
    features: Classifier
    first: Images
    threat: ThreatModel
    steps: int
    queries: int
    targets: int
    lanes: int
    seed: int
    eot: int | None
    draws: int

    @property
    def modes(self) -> tuple[str, ...]:
        """The gradient modes that are tried."""
        return modes_of(self.model) or (OWN,)

    @property
    def acts(self) -> tuple[str, ...]:
        """All that is done, in order; each act but the first ones is for images that those before have left."""
        feature = (FEATURE,) if self.features.vlm is not None else ()
        square = (SQUARE,) if self.queries else ()
        through = (f"{MODE}{mode}" for mode in self.modes)
        # Longer steps in less number may find what a long attack does not, and more effort must never help a defence.
        short = (f"{SHORT}{mode}" for mode in self.modes if self.steps >= SHORTER)
        started = (f"{START}{mode}" for mode in self.modes)
        aimed = (f"{TARGETED}{self.modes[0]}",) if self.targets and len(self.model.class_names) > 2 else ()
        return (CLEAN, *TRANSFER, *through, *feature, *short, *started, *aimed, *square)

    @cached_property
    def probe(self) -> Probe:
        """What the first questions say of the model."""
        images = self.first
        return ask_first(self._plain(), images.pixels, images.labels, model=f"model '{self.model.spec}'")

    @property
    def random(self) -> bool:
        """Whether the model draws: as it was seen to, or as its defences say, which a plain image may not show."""
        return self.probe.random

    @property
    def gradient_draws(self) -> int:
        """Draws that a gradient is averaged over."""
        if not self.random:
            return 1
        return self.eot or self.probe.declared or EOT_IF_RANDOM

    @property
    def finer_draws(self) -> int:
        """Draws of a gradient for what other acts left: where more of them fool more, fewer were a mask.

        A number of draws that was asked for is kept to.
        """
        draws = self.gradient_draws
        return draws if self.eot or not self.random else max(draws, min(FINER * draws, MOST_DRAWS))

    @property
    def judging_draws(self) -> int:
        """Draws that judge a point."""
        return self.draws if self.random else 1

    def look(self, points: Tensor, labels: Tensor, purpose: str) -> list[Fate]:
        """Return whether the model is right at points; of a random model, in most of its draws."""
        oracle, goal, found = self._oracle(purpose), Misclassify(), []
        for start in range(0, len(points), self.lanes):
            x, label = points[start : start + self.lanes], labels[start : start + self.lanes].to(oracle.device)
            answer = oracle.judge(x.to(oracle.device, oracle.dtype), goal, Case(label, label))
            shown = zip(
                (~answer.reached & answer.finite).tolist(),
                answer.margin.tolist(),
                answer.prediction.tolist(),
                strict=True,
            )
            found += [
                Fate(index=start + row, right=right, margin=margin, prediction=prediction, passes=oracle.draws)
                for row, (right, margin, prediction) in enumerate(shown)
            ]
        return found

    def unaware_points(self, images: Images, act: str) -> Tensor:
        """Return the points of an attack on this model, which is the undefended one, for all images."""
        name = {"unaware:pgd": "pgd", "unaware:apgd": "apgd-ce", LABEL: "pgd"}[act]
        return self._perturb(images, f"{name}:steps={self.steps}", goal=Lowest(), stop=False).images

    def act(self, name: str, images: Images, start: Tensor | None = None) -> list[Fate]:
        """Attack images in one act and return what came of each.

        Args:
            start: points [N, 3, S, S] to begin at, for acts that do.
        """
        if name == SQUARE:
            return self._fates(self._perturb(images, f"square:queries={self.queries}"))
        if name == FEATURE:
            return self._away(images)
        kind, _, mode = name.partition(":")
        with contextlib.nullcontext() if mode == OWN else gradient_mode(self.model, mode):
            if f"{kind}:" == START:
                assert start is not None
                points = dict(zip(image_ids(images.pixels), start, strict=True))
                attacks = [PGDFrom(n_iter=self.steps, points=points)]
                return self._fates(self._perturb(images, attacks, eot=self.finer_draws))
            if f"{kind}:" == TARGETED:
                return self._fates(self._perturb(images, targeted(self.steps, self.targets)))
            if f"{kind}:" == SHORT:
                return self._fates(self._perturb(images, f"pgd:steps={self.steps // SHORTER}"))
            margin = f"apgd-ce:steps={self.steps}:objective=margin"
            return self._fates(self._perturb(images, f"pgd:steps={self.steps},{margin}"))

    def counted(self) -> contextlib.AbstractContextManager[Counted]:
        """Count the passes through the model's encoder, and through that which the attack on features looks at."""
        return counted_passes(self.model, self.features)

    def cost(self, images: Images) -> Passes:
        """Return the passes that a clean answer takes, counted at the encoder; the mean over all images."""
        oracle = self._oracle("cost")
        with torch.no_grad(), counted_passes(self.model) as seen:
            for pixels in images.pixels.split(self.lanes):
                oracle.outputs(pixels.to(self.model.device))
        return seen.per_image(len(images.pixels))

    def outputs(self, pixels: Tensor) -> Tensor:
        """Return logits [N, K] of pixels, one draw of a random model."""
        oracle = self._oracle("outputs")
        return torch.cat([oracle.confirm(part.to(oracle.device)).cpu() for part in pixels.split(self.lanes)])

    def checks(self, images: Images) -> list[Check]:
        """Return what the first questions show of the model, as `robustvlm attack` asks them."""
        found, oracle = self.probe, self._oracle("questions")
        sanity = inspect_model(
            oracle,
            images.pixels[: self.lanes],
            Misclassify(),
            Case(images.labels[: self.lanes]),
            self.threat,
            random=found.random,
            classes=len(self.model.class_names),
        )
        said = of_probe(found, oracle)
        made_up = any(part.mode == IDENTITY for part in defended(self.model))
        made_up |= any(not getattr(part, "differentiable", True) for part in self.model.modules())
        return said + of_sanity(sanity, attacks=[], zero_gradients=found.zero_gradients, declared=made_up)

    def _away(self, images: Images) -> list[Fate]:
        # The encoder under a defence that answers for itself need not draw where the defence does.
        parts = self.features.vlm.modules() if self.features.vlm is not None else ()
        draws = not defended(self.model) or any(getattr(part, "random_draws", 0) for part in parts)
        found = perturb(
            self.features,
            images.pixels,
            images.labels,
            eps=self.threat.eps,
            norm=self.threat.norm,
            attack=f"pgd:steps={self.steps}",
            goal="feature",
            stop_at_success=False,
            lanes=self.lanes,
            seed=self.seed,
            eot=self.gradient_draws if draws else 1,
            draws=1,
            ids=images.ids,
        )
        seen = self.look(found.images, images.labels, f"{FEATURE} {images.ids[0]}")
        return [
            fate.model_copy(update={"by": None if fate.right else FEATURE, "passes": fate.passes + spent})
            for fate, spent in zip(seen, found.passes.tolist(), strict=True)
        ]

    def _perturb(
        self,
        images: Images,
        attack: str | list[PGDFrom],
        *,
        goal: str | Lowest = "misclassify",
        stop: bool = True,
        eot: int | None = None,
    ) -> Perturbed:
        return perturb(
            self.model,
            images.pixels,
            images.labels,
            eps=self.threat.eps,
            norm=self.threat.norm,
            attack=attack,
            goal=goal,
            stop_at_success=stop,
            lanes=self.lanes,
            seed=self.seed,
            eot=eot or self.gradient_draws,
            draws=self.judging_draws,
            ids=images.ids,
            brisk=True,
            known=self.probe,
        )

    @staticmethod
    def _fates(found: Perturbed) -> list[Fate]:
        columns = (found.fooled | found.failed, found.margins, found.predictions, found.by, found.passes)
        lists = (column.tolist() if isinstance(column, Tensor) else list(column) for column in columns)
        return [
            Fate(index=row, right=not fooled, margin=margin, prediction=prediction, by=by, passes=passes)
            for row, (fooled, margin, prediction, by, passes) in enumerate(zip(*lists, strict=True))
        ]

    def _plain(self) -> Oracle:
        """Return the model as it is asked, without draws of its own settled."""
        return Oracle(self.model, device=self.model.device, seed=self.seed)

    def _oracle(self, purpose: str) -> Oracle:
        """Return the model as points are judged; its draws follow from the run's seed and the purpose alone."""
        seed = derive_seed(self.seed, "judge", purpose)
        oracle = Oracle(self.model, device=self.model.device, seed=seed, brisk=True)
        settle_draws(oracle, self.probe, eot=self.gradient_draws, draws=self.judging_draws)
        return oracle
