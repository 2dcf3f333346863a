"""What a defence is: first the adversarial views, without leaving a trace; then a loss of the outer forward's features.

The training loop stands between the two: it encodes all views in one forward of the prepared (wrapped) module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeGuard

from torch import Tensor, nn

from fastmat.attacks.draws import Draws
from fastmat.models.protocol import FusionState, ImageState, TextState, VisionLanguageModel
from fastmat.types import Batch


class Pairs(NamedTuple):
    """P images and texts to be fused: rows [P] of the view `images` and rows [P] of the view `texts`.

    borrowed_images, borrowed_texts: rows [M] of the same views of all processes, by rank, which are fused here as well:
        they follow the own ones, so that row B + m is borrowed_images[m], and row T + m borrowed_texts[m].
    """

    images: str
    texts: str
    image_rows: Tensor
    text_rows: Tensor
    borrowed_images: Tensor | None = None
    borrowed_texts: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Views:
    """What the outer forward must encode, by name ("clean", "adv"), and constants that the loss needs.

    images: name -> [B, 3, H, W]; texts: name -> T captions; targets: name -> tensor (a frozen teacher's embeddings).
    shifts: name of a text view -> [T, L, D] added to its token embeddings, L as those texts alone are padded.
    match: called once inside the outer forward, without gradients, with the encoded views of this process: what a
        fusion model shall fuse of them, by name, equally many names in every process; None: nothing.
    borrows: whether `match` may ask for rows of other processes; alike in all of them.
    """

    images: Mapping[str, Tensor]
    texts: Mapping[str, tuple[str, ...]]
    targets: Mapping[str, Tensor] = field(default_factory=dict)
    shifts: Mapping[str, Tensor] = field(default_factory=dict)
    match: Callable[[Features], Mapping[str, Pairs]] | None = None
    borrows: bool = False


@dataclass(frozen=True, kw_only=True)
class Everyone:
    """The unit features of every view of all processes, by rank, through which gradients flow back to them.

    images: name -> [sum of B, E]; texts: name -> [sum of T, E]; group [sum of B], text_group [sum of T].
    """

    images: Mapping[str, Tensor]
    texts: Mapping[str, Tensor]
    group: Tensor
    text_group: Tensor


@dataclass(frozen=True, kw_only=True)
class Features:
    """The same views, encoded with gradients. logit_scale is the multiplier. group [B], text_group [T].

    everyone: with several processes, the views of all of them; gathered at the first call, the same at every later one.
        None: this process has the whole batch. `fastmat.defences.terms` uses it.
    fused: what `Views.match` asked for, by name.
    between: replaces the terms of a pair of views in `fastmat.defences.terms.pair_terms`.
    """

    images: Mapping[str, ImageState]
    texts: Mapping[str, TextState]
    targets: Mapping[str, Tensor]
    logit_scale: Tensor
    group: Tensor
    text_group: Tensor
    everyone: Callable[[], Everyone] | None = None
    fused: Mapping[str, FusionState] = field(default_factory=dict)
    between: Callable[[Features, str, str], dict[str, Tensor]] | None = None


class Defence(Protocol):
    """trains: which parts receive gradients, of ("image", "text", "fusion")."""

    trains: tuple[str, ...]

    def perturb(self, model: VisionLanguageModel, batch: Batch, draws: Draws) -> Views:
        """`model` is the unwrapped module; its weights, gradients, buffers and modes are as before afterwards."""
        ...

    def loss(self, features: Features) -> dict[str, Tensor]:
        """Named scalar terms; their sum is minimised.

        With several processes B and T are this process's share, and the mean over the processes is minimised: a mean
        over images is right as it stands, other means and all contrasts are in `fastmat.defences.terms`.
        """
        ...


class Remembering(Defence, Protocol):
    """A defence with a state of its own beside the model.

    memory: whose `state_dict` a checkpoint keeps; the same in every process; None: there is nothing to keep.
    """

    memory: nn.Module | None

    def remember(self) -> None:
        """The step of the last `loss` was taken, and its backward is done. Called by all processes."""
        ...


def remembers(defence: Defence) -> TypeGuard[Remembering]:
    return hasattr(defence, "remember")
