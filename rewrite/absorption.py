"""What a plan to absorb an affine map is: one edit a layer, or the reason why there is none."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rewrite.absorb import Layer, Ledger, Side
from rewrite.algebra import Affine
from rewrite.capture import TensorRef
from rewrite.edit import Editor


@dataclass(frozen=True)
class Refusal:
    """Why a map cannot be absorbed."""

    reason: str


@dataclass(frozen=True, eq=False)
class Edit:
    """One layer takes up a part of the map.

    `index` holds, per channel of that side of the layer, the channel of the map (-1: none);
    `inverse` is whether it takes up the inverse.
    """

    layer: Layer
    side: Side
    index: Tensor
    scale: bool
    shift: bool
    inverse: bool

    def affine(self, affine: Affine) -> Affine:
        """Return what the layer takes up if the whole map is `affine`."""
        one, zero = torch.ones_like(affine.scale), torch.zeros_like(affine.shift)
        part = Affine(affine.scale if self.scale else one, affine.shift if self.shift else zero)
        return (part.inverse() if self.inverse else part).at(self.index)


@dataclass(frozen=True, eq=False)
class Absorption:
    """A map that layers can take up exactly.

    Attributes:
        edits: what each layer takes up.
        needs_positive: it holds only for positive scales.
    """

    edits: tuple[Edit, ...]
    needs_positive: bool = False

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that take something up, in the order in which they were reached."""
        return tuple(dict.fromkeys(edit.layer.name for edit in self.edits))

    @property
    def touched(self) -> tuple[str, ...]:
        """The modules whose parameters change."""
        return self.layers

    @property
    def needs_inverse(self) -> bool:
        """Whether some layer takes up the inverse map."""
        return any(edit.inverse for edit in self.edits)

    def enter(self, ledger: Ledger, affine: Affine) -> None:
        """Note in `ledger` what each layer takes up."""
        for edit in self.edits:
            ledger.take(edit.layer, edit.side, edit.affine(affine))

    def apply(self, editor: Editor, scale: Tensor, shift: Tensor) -> None:
        """Give the layers their new tensors, computed in float64 and rounded once."""
        captured = editor.captured
        ledger = Ledger(captured.tensor)
        self.enter(ledger, Affine(scale.detach().double(), shift.detach().double()))
        ledger.write(lambda layer, attr, tensor: write_tensor(editor, layer, attr, tensor))


def write_tensor(editor: Editor, layer: Layer, attr: str, tensor: Tensor) -> TensorRef:
    """Set a tensor of a layer; a functional call that has no bias yet gets one."""
    ref = {"weight": layer.weight, "bias": layer.bias}[attr]
    if ref is None and layer.module is not None:
        ref = TensorRef(layer.module, attr)
    if ref is None:
        return editor.set_argument(layer.node, 2, attr, tensor)
    editor.set_tensor(ref, tensor)
    return ref
