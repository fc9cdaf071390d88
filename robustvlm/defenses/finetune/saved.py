"""Fine-tuned models on disk, and soups: the average of the weights of several."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from robustvlm.core.files import replacing
from robustvlm.defenses.finetune.trainable import plain_state
from robustvlm.defenses.pipeline import SavedModel
from robustvlm.errors import UserError
from robustvlm.models import VLM, load_model
from robustvlm.models.clip import ClipVLM
from robustvlm.models.export import write_clip_folder
from robustvlm.models.saved import Card, write_card
from robustvlm.models.weights import CONFIG_NAME, read_weights, stored_weights

# A fine-tuned model on disk: an open_clip folder of its own, or new weights for the encoder that it stands on

OVERLAY = "weights.safetensors"


class FinetunedModel(SavedModel):
    """A model whose weights were changed and whose architecture was not: by fine-tuning, or by averaging (a soup)."""

    def encoder(self, device: torch.device) -> VLM:
        if (self.folder / CONFIG_NAME).is_file():
            return load_model(str(self.folder), device=device)
        vlm = self.base(device)
        overlay(vlm, read_weights(self.folder / OVERLAY), what=f"'{self.folder / OVERLAY}'")
        return vlm


def save_finetuned(folder: Path, vlm: VLM, card: Card) -> None:
    """Write a model with changed weights into `folder`, LoRA and SSF merged in; the card comes last.

    An open_clip model becomes a folder that open_clip reads by itself; of any other the changed weights are kept, and
    the base is needed to load it.
    """
    state = plain_state(vlm)
    if isinstance(vlm, ClipVLM):
        inner = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
        write_clip_folder(vlm, folder, state=inner)
    else:
        with replacing(folder / OVERLAY) as temporary:
            save_file(stored_weights(state), temporary, metadata={"format": "pt"})
    write_card(folder, card)


@torch.no_grad()
def overlay(vlm: VLM, weights: dict[str, torch.Tensor], *, what: str) -> None:
    """Put `weights` in place of those of the same names; raise UserError where the model has no such ones."""
    own = vlm.state_dict()
    for name, value in weights.items():
        if name not in own or own[name].shape != value.shape:
            raise UserError(f"{what} does not fit '{vlm.spec}' ('{name}'): the model it was made for is needed")
        own[name].copy_(value)


# Model soups: the average of the weights of models that were tuned from one (Wortsman et al. 2022, 2203.05482)

State = Mapping[str, Tensor]


def require_alike(states: Sequence[tuple[str, State]]) -> None:
    """Refuse models of different architectures; raise UserError that names the first difference.

    Example:
        >>> require_alike([("a", {"w": torch.ones(2)}), ("b", {"w": torch.ones(3)})])
        Traceback (most recent call last):
        robustvlm.errors.UserError: 'a' and 'b' are of different architectures ('w' is [2] and [3]): a soup needs one
    """
    (first, own), *others = states
    for name, state in others:
        only = sorted(own.keys() ^ state.keys())
        if only:
            who = first if only[0] in own else name
            raise UserError(_different(first, name, f"'{only[0]}' is only in '{who}'"))
        for key, value in own.items():
            if value.shape != state[key].shape:
                shapes = f"'{key}' is {list(value.shape)} and {list(state[key].shape)}"
                raise UserError(_different(first, name, shapes))


def _different(first: str, other: str, why: str) -> str:
    return f"'{first}' and '{other}' are of different architectures ({why}): a soup needs one"


def averaged(states: Sequence[State]) -> dict[str, Tensor]:
    """Return the mean of every tensor, taken in float64; whole numbers are those of the first.

    Example:
        >>> averaged([{"w": torch.tensor([0.0])}, {"w": torch.tensor([1.0])}])
        {'w': tensor([0.5000])}
    """
    return {
        name: torch.stack([state[name].double() for state in states]).mean(dim=0).to(value.dtype)
        if value.is_floating_point()
        else value.clone()
        for name, value in states[0].items()
    }


@dataclass(frozen=True)
class Tasting:
    """One step of a greedy soup: the model that was tried, the measure with it, and whether it stayed."""

    name: str
    value: float
    kept: bool


def greedy(
    states: Sequence[tuple[str, State]], measure: Callable[[State], float]
) -> tuple[dict[str, Tensor], list[Tasting]]:
    """Return the greedy soup: best model first, each further one stays if the average is no worse (Recipe 1).

    Args:
        measure: of a set of weights, the larger the better, on images that chose nothing else.

    Example:
        >>> states = [(str(i), {"w": torch.tensor([float(i)])}) for i in range(3)]
        >>> soup, steps = greedy(states, lambda state: -abs(float(state["w"]) - 0.4))
        >>> soup["w"], [(step.name, step.kept) for step in steps]
        (tensor([0.5000]), [('0', True), ('1', True), ('2', False)])
    """
    alone = sorted(((measure(state), -i) for i, (_, state) in enumerate(states)), reverse=True)
    best, order = alone[0][0], [-i for _, i in alone]
    chosen = [states[order[0]][1]]
    steps = [Tasting(states[order[0]][0], best, True)]
    for i in order[1:]:
        value = measure(averaged([*chosen, states[i][1]]))
        kept = value >= best
        steps.append(Tasting(states[i][0], value, kept))
        if kept:
            best = value
            chosen.append(states[i][1])
    return averaged(chosen), steps
