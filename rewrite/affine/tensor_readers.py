"""Who reads a tensor: the layers and lines that would see it change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.fx import Node

from rewrite.affine.rules import asks_for_its_form
from rewrite.graph.captured import Captured, TensorRef
from rewrite.weights.baking import bake_refusal, originals

if TYPE_CHECKING:
    from rewrite.affine.layers import Layer


class TensorReaders:
    """Which nodes read each tensor of a captured model: a layer's own calls, or other code.

    `bake` lets a layer whose weight is computed absorb a map: it will be a plain one.
    """

    def __init__(self, captured: Captured, bake: bool = False) -> None:
        self._captured = captured
        self._bake = bake
        self._readers: dict[str, list[Node]] = {}
        for node in captured.nodes():
            if node.op == "get_attr":
                self._readers.setdefault(str(node.target), []).extend(node.users)

    def calls(self, layer: Layer) -> tuple[Node, ...]:
        """Return every call of the layer that was traced."""
        if layer.call is not None:
            return (layer.call,)
        if layer.module is not None:
            return self._captured.calls(layer.module)
        assert layer.weight is not None
        return tuple(dict.fromkeys(self.lines(layer.weight.name)))

    def lines(self, name: str) -> tuple[Node, ...]:
        """Return the lines that read a tensor themselves, for more than its type or device."""
        return tuple(node for node in self._readers.get(name, ()) if not asks_for_its_form(node))

    def refusal(self, layer: Layer) -> str | None:
        """Return why the tensors of `layer` must not change, or None, whoever calls it."""
        captured = self._captured
        if layer.module is not None:
            if reason := self.more_than_a_layer(layer.module):
                return f"{layer.name} {reason}"
            if (chosen := captured.code.chosen(layer.module)) is not None:
                return chosen
            if (caller := captured.unknown_caller(layer.module)) is not None:
                return f"{layer.name} may have callers that were not traced: {caller}"
        if (twice := self.both(layer)) is not None:
            return twice
        for ref in (layer.weight, layer.bias):
            if ref is None:
                continue
            if (whole := captured.code.read_whole(ref.owner)) is not None:
                return whole
            if tied := captured.tied(ref):
                return f"{ref.name} is one tensor with {tied[0].name}"
            if layer.module is not None and (reader := self.reader(ref)) is not None:
                return reader
            if layer.module is None and (caller := self.caller(ref)) is not None:
                return caller
            if not captured.tensor(ref).is_floating_point():
                return f"{ref.name} is of dtype {captured.tensor(ref).dtype}"
        if layer.module is None and layer.weight is not None and layer.bias is None:
            return captured.lines.refusal(layer.node)
        return None

    def reader(self, ref: TensorRef, calls: tuple[Node, ...] = ()) -> str | None:
        """Return what reads a tensor itself, beside the functional `calls`, in words, or None."""
        if (whole := self._captured.code.read_whole(ref.owner)) is not None:
            return whole
        others = [node for node in self._readers.get(ref.name, ()) if node not in calls]
        return f"{ref.name} is also read by {others[0].name} directly" if others else None

    def both(self, layer: Layer) -> str | None:
        """Return that one tensor is weight and bias of a layer, in words, or None."""
        if layer.weight is None or layer.weight != layer.bias:
            return None
        return f"{layer.weight.name} is its weight and its bias"

    def mentioned(self, ref: TensorRef) -> bool:
        """Return whether a line names a tensor, be it only to ask whether it is there."""
        return ref.name in self._readers

    def caller(self, ref: TensorRef) -> str | None:
        """Return what may read a tensor of a functional layer through the module that holds it.

        A region's root has one code, which was traced, whoever calls it.
        """
        captured = self._captured
        roots = {region.name for region in captured.regions}
        calls = captured.calls(ref.owner)
        others = [call for call in calls if captured.region_of(call).name != ref.owner]
        if others:
            return f"{ref.name} is also read by the call {others[0].name} of its module"
        if calls or ref.owner not in roots:
            caller = captured.opaque_caller(ref.owner)
            return (
                None
                if caller is None
                else (f"{ref.name} may have readers that were not traced: {caller}")
            )
        return None

    def more_than_a_layer(self, name: str) -> str | None:
        """Return why a call of a module is more than that of a plain layer, or None."""
        if not self._bake:
            return next(iter(self._captured.hooks(name)), None)
        if (reason := bake_refusal(self._captured, name)) is not None:
            return reason
        for ref in originals(self._captured, name):
            if others := self._readers.get(ref.name):
                return f"is made of {ref.name}, which is also read by {others[0].name} directly"
        return None
