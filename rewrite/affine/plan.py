"""What a plan to absorb an affine map is: one edit a layer, or the reason why there is none."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import Node

from rewrite.affine.algebra import Affine
from rewrite.affine.layers import Layer, Side
from rewrite.affine.ledger import Ledger
from rewrite.graph.captured import TensorRef
from rewrite.graph.editor import Editor
from rewrite.outcomes import Declined

Refusal = Declined


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
        part = affine.part(self.scale, self.shift)
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
        write_ledger(editor, ledger)


def write_tensor(editor: Editor, layer: Layer, attr: str, tensor: Tensor) -> TensorRef:
    """Set a tensor of a layer; a functional call that has no bias yet gets one."""
    ref = {"weight": layer.weight, "bias": layer.bias}[attr]
    if ref is None and layer.module is not None:
        ref = TensorRef(layer.module, attr)
    if ref is None:
        return editor.set_argument(layer.node, 2, attr, tensor)
    editor.set_tensor(ref, tensor)
    return ref


def write_ledger(editor: Editor, ledger: Ledger) -> tuple[str, ...]:
    """Give every layer of `ledger` its new tensors, and return the names of clones.

    A shared layer that takes up different maps at different calls is cloned for all but one.
    """
    calls: dict[str, dict[Node, dict[str, Tensor]]] = {}

    def write(layer: Layer, attr: str, tensor: Tensor) -> None:
        if layer.call is None or layer.module is None:
            write_tensor(editor, layer, attr, tensor)
        else:
            calls.setdefault(layer.module, {}).setdefault(layer.call, {})[attr] = tensor

    ledger.write(write)
    return tuple(
        name for module, tensors in calls.items() for name in _separate(editor, module, tensors)
    )


def _separate(editor: Editor, name: str, tensors: dict[Node, dict[str, Tensor]]) -> list[str]:
    """Set the tensors of the calls of one module, and clone it where they differ."""
    groups: list[tuple[list[Node], dict[str, Tensor]]] = []
    for call, new in tensors.items():
        for members, held in groups:
            if held.keys() == new.keys() and all(torch.equal(held[k], new[k]) for k in new):
                members.append(call)
                break
        else:
            groups.append(([call], new))
    keeps_old = len(tensors) < len(editor.captured.calls(name))
    clones = []
    for number, (members, new) in enumerate(groups):
        if number == 0 and not keeps_old:
            for attr, tensor in new.items():
                editor.set_tensor(TensorRef(name, attr), tensor)
            continue
        old = editor.captured.module(name)
        for call in members:
            clone = copy.copy(old)
            clone._parameters = dict(old._parameters)
            for attr, tensor in new.items():
                requires_grad = old._parameters["weight"].requires_grad  # type: ignore[union-attr]
                clone.register_parameter(attr, nn.Parameter(tensor, requires_grad))
            leaf = name.rpartition(".")[2]
            leaf = f"{leaf}_clone" if not leaf.isdigit() else f"layer{leaf}_clone"
            clones.append(editor.merge(call, lambda line: line.all_input_nodes[0], clone, leaf))
    return clones
