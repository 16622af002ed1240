"""Whether a layer without a bias adds one that it is given, and does nothing else with it.

    W x  ->  W x + b        the layer alone, exported with a bias: b is read once, there

A class that derives from `nn.Linear` may write its product itself (`x @ self.weight.T`) or go on
with the sum (a router's softmax): what it does with a bias shows in the graph of its own call.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import Node

from rewrite.errors import CaptureError
from rewrite.graph.tensor_writer import TensorWriter
from rewrite.observe.export import ObservedCall, export_call
from rewrite.observe.flow import Follower
from rewrite.observe.spellings import FORM, contraction_of, op_name, shape_of
from rewrite.runtime.inputs import ExampleCall, Inputs


def adds_new_bias(layer: nn.Module, shape: tuple[int, ...]) -> bool:
    """Return whether a layer adds a bias that it is given to its product.

    Args:
        layer: of a class that derives from `nn.Linear`, without a bias; it does not change.
        shape: of an input that it takes as its only argument.
    """
    if not isinstance(layer, nn.Linear) or layer.bias is not None:
        return False
    held = layer.weight
    given = TensorWriter().copied(layer, {"bias": held.new_zeros(len(held))})
    value = torch.zeros(shape, dtype=held.dtype, device=held.device)
    try:
        observed = export_call(given, ExampleCall("with a bias", Inputs((value,))))
    except CaptureError:
        return False
    readers = Follower(observed).readers
    biases, weights = readers.get("bias", []), readers.get("weight", [])
    if len(biases) != 1 or len(weights) != 1:
        return False
    (added, bias), (product, weight) = biases[0], weights[0]
    values = [n for n in product.all_input_nodes if n not in (bias.node, weight.node)]
    found = contraction_of(product, values)
    if found is None or found.weight is not weight.node or not _whole(observed, bias.node):
        return False
    return found.bias is bias.node if added is product else _is_sum(added, product, bias.node)


def _whole(observed: ObservedCall, node: Node) -> bool:
    """Return whether a value has the shape of the bias itself."""
    return shape_of(node) == shape_of(observed.placeholders("bias")[0])


def _is_sum(node: Node, product: Node, bias: Node) -> bool:
    """Return whether a node is the sum of a product, which nothing else reads, and a bias."""
    users = [user for user in product.users if op_name(user) not in FORM]
    operands = {*node.args} == {product, bias}
    return op_name(node) == "add" and operands and not node.kwargs and users == [node]
