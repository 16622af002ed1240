"""One link of a chain of per-channel maps, as data: a norm, a constant per channel, a sign.

norm        y = (x - mean) / sqrt(var + eps) * weight + bias
constant    y = x * c,  x / c,  x + c,  x - c        c an expression of tensors
negative    y = -x
scale       y = s.x         of another link y = s.x + t: what it does to all terms of a sum but one
other       a map that is no data: it is that of the model at hand, and of no other checkpoint
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewrite.affine.algebra import Affine
from rewrite.affine.constants import ChannelConstant
from rewrite.affine.layers import Layer
from rewrite.errors import CheckpointError
from rewrite.fold.expressions import evaluate, expression, keys
from rewrite.graph.captured import Captured
from rewrite.graph.traits import operation

Read = Callable[[str], Tensor]


@dataclass(frozen=True, eq=False)
class Link:
    """One link: what a report holds of it, and its map in the model at hand, if that is all."""

    data: Mapping[str, Any]
    affine: Affine | None = None

    def value(self, read: Read) -> Affine:
        """Return the map, made of the tensors that `read` returns by name.

        Raises:
            CheckpointError: it is that of another model.
        """
        if self.data["is"] == "scale":
            return Link(self.data["of"], self.affine).value(read).part(scale=True, shift=False)
        if self.data["is"] != "other":
            return _affine(self.data, read)
        if self.affine is None:
            raise CheckpointError(
                f"{self.data['target']}: {self.data['reason']}; convert the model instead"
            )
        return self.affine

    def reads(self) -> set[str]:
        """Return the names of the tensors that the map is made of."""
        if self.data["is"] == "scale":
            return Link(self.data["of"]).reads()
        if self.data["is"] == "norm":
            held = (self.data[key] for key in ("mean", "var", "weight", "bias"))
            return {name for name in held if name is not None}
        return keys(self.data["value"]) if "value" in self.data else set()

    def without_shift(self) -> Link:
        """Return the link that scales as this one does, and adds nothing."""
        return Link({"is": "scale", "of": self.data}, self.affine)


NEGATIVE = Link({"is": "negative"})


def constant_link(captured: Captured, constant: ChannelConstant) -> Link:
    """Return what a constant per channel does, as an expression of tensors where that is exact."""
    node = constant.node
    others = [n for n in node.all_input_nodes if n is not constant.operand]
    row = operation(node)
    target = constant.root or captured.owner(node)
    name = None if row is None else {"einsum": "mul"}.get(row.name, row.name)
    if name in ("add", "sub", "mul", "div") and len(others) == 1:
        made = expression(others[0], captured.region_of(node).constants)
        data = {"is": "constant", "target": target, "operation": name, "value": made}
        if made is not None and _repeats(captured, data, constant.affine):
            return Link(data)
    reason = "is computed in a way that the map of keys does not repeat"
    return Link({"is": "other", "target": target, "reason": reason}, constant.affine)


def norm_link(layer: Layer) -> Link:
    """Return what a norm in eval mode does."""
    refs = {"mean": layer.mean, "var": layer.var, "weight": layer.weight, "bias": layer.bias}
    names = {key: None if ref is None else ref.name for key, ref in refs.items()}
    return Link({"is": "norm", "eps": layer.eps, **names})


def _repeats(captured: Captured, data: Mapping[str, Any], affine: Affine) -> bool:
    """Return whether the data says of the model at hand what was found in it."""

    def read(name: str) -> Tensor:
        owner, _, attr = name.rpartition(".")
        value: Tensor = getattr(captured.module(owner), attr)
        return value

    try:
        made = _affine(data, read)
    except (ValueError, TypeError, AttributeError, KeyError):
        return False
    return torch.equal(made.scale, affine.scale) and torch.equal(made.shift, affine.shift)


def _affine(data: Mapping[str, Any], read: Read) -> Affine:
    if data["is"] == "norm":
        held = [None if data[k] is None else read(data[k]) for k in ("mean", "var")]
        weight, bias = (None if data[k] is None else read(data[k]) for k in ("weight", "bias"))
        mean, var = held
        if mean is None or var is None:
            raise CheckpointError("a norm of the map has no running statistics")
        return Affine.batch_norm(mean, var, weight, bias, data["eps"])
    if data["is"] != "constant":
        raise CheckpointError(f"{data['is']!r} is no link of a map")
    # Maps of version 0.1 name the tensor itself.
    value = evaluate(data.get("value", {"key": data.get("key")}), read)
    value = torch.as_tensor(value, dtype=torch.float64).flatten()
    one, zero = torch.ones_like(value), torch.zeros_like(value)
    return {
        "mul": Affine(value, zero),
        "div": Affine(value.reciprocal(), zero),
        "add": Affine(one, value),
        "sub": Affine(one, -value),
    }[data["operation"]]
