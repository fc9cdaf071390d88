"""Images to features, encoded once and kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from robustvlm.commands.detect.config import DetectObserver
from robustvlm.commands.detect.encoding import Encoded, Encoder, embed_words
from robustvlm.commands.detect.scoring import own_sdis, score_all
from robustvlm.core.object_graph import fingerprint
from robustvlm.data import open_data
from robustvlm.data.names import same_things
from robustvlm.data.source import DataSource
from robustvlm.defenses import Classifier
from robustvlm.detect import outside, tree_words
from robustvlm.errors import UserError


class Kept:
    """A model's answers for the images of data specs, kept under `cache`, apart by model and spec."""

    def __init__(self, cache: Path, classifier: Classifier) -> None:
        self.folder = cache / classifier.fingerprint[:12]
        self.classifier = classifier
        self._encoder = Encoder(classifier, self.folder, owner={}, seed=0, batch_size=64, observer=DetectObserver())

    def answers(self, spec: str, limit: int | None = None) -> Encoded:
        """Return the answers for the images of a spec."""
        source = open_data(spec)
        name = f"{source.fingerprint()[:12]}-{limit or 'all'}"
        return self._encoder.encode(source, name, limit=limit, title=spec)

    def words(self, source: DataSource, unknown: Sequence[DataSource]) -> Tensor:
        """Return unit embeddings of the words of the bundled trees that are outside the classes of a source.

        Words that name what the unknown sets show are left out: they would tell a score what it is tested on.
        """
        assert self.classifier.vlm is not None
        words = outside(tree_words(), source.class_names, source.tree)
        naming = same_things(words, [name for other in unknown for name in other.things()])
        print(f"{len(naming)} of {len(words)} words name what the unknown sets show and are left out")
        words = tuple(word for word in words if word not in naming)
        path = self.folder / f"words-{fingerprint({}, words)[:12]}.safetensors"
        return embed_words(self.classifier.vlm, words, source.templates, path, owner={})

    def own_scores(self, spec: str) -> dict[str, Tensor]:
        """Return the model's own scores of every image of a spec, in source order: acceptance, and S_DIS if it has it.

        Raises UserError for a model that never refuses.
        """
        answers = self.answers(spec)
        if answers.output is None or not self.classifier.can_reject:
            raise UserError(f"'{self.classifier.spec}' never refuses: its scores are in the table already")
        found = {"acceptance": answers.output[:, -1]}
        sdis = own_sdis(self.classifier)
        if sdis is not None and answers.features is not None:
            found["S_DIS"] = score_all(sdis, answers.features)
        return found
